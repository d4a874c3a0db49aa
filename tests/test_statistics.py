"""Normalisation constants are those of the whole volume, and cost the same for a huge one."""

import time
from dataclasses import dataclass

import numpy as np
import pytest
import zarr
from helpers import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr_images import metadata

from bigseg import statistics
from bigseg.config import NormConstants, NormRule
from bigseg.errors import InputError
from bigseg.statistics import norm_constants, normalise
from bigseg.volume import open_volume

PERCENTILE = NormRule(kind="percentile", low=1.0, high=99.8)


@dataclass
class InMemory:
    """As much of a Volume as statistics use."""

    data: np.ndarray
    url: str = "memory"
    level: int = 0
    n_levels: int = 1

    @property
    def shape(self):
        return self.data.shape[1:]

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def write_unit(self):
        return (1, 3, 4, 5)

    chunk_shape = write_unit

    def read(self, region, channels):
        return self.data[(list(channels), *region.slices)]


def volume_of(values):
    return InMemory(np.asarray(values).reshape(1, 1, 1, 1, -1))


def both_percentiles(values, rule):
    values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = np.percentile(values, [rule.low, rule.high], method="inverted_cdf")
    return float(low), float(high)


@st.composite
def integers(draw):
    dtype = draw(st.sampled_from(["uint8", "uint16", "int16", "int8", "int32", "uint64", "int64"]))
    info = np.iinfo(dtype)
    spread = draw(st.integers(1, min(60_000, info.max - info.min)))
    low = draw(st.integers(info.min, info.max - spread))
    seed, n = draw(st.integers(0, 99)), draw(st.integers(2, 3000))
    steps = np.random.default_rng(seed).integers(0, spread, n, endpoint=True)
    steps[0], steps[1] = 0, spread
    return np.array([low + int(s) for s in steps], dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(integers(), st.sampled_from([(1.0, 99.8), (0.0, 100.0), (5.0, 95.0), (0.1, 50.0)]))
def test_percentiles_of_integers_are_exact(values, percentiles):
    rule = NormRule(kind="percentile", low=percentiles[0], high=percentiles[1])
    low, high = both_percentiles(values, rule)
    found = norm_constants(volume_of(values), rule, [0])
    assert found.offset == (low,)
    if high > low:
        # Differences of 64-bit integers are rounded once, as floats.
        assert found.scale[0] == pytest.approx(high - low, rel=1e-12, abs=2e-15 * abs(high))
    assert found.n_voxels == values.size


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_percentiles_of_other_types_are_within_a_bin_of_the_range(dtype):
    rng = np.random.default_rng(0)
    values = (rng.normal(size=5000) * 1e6 - 3e5).astype(dtype)
    low, high = both_percentiles(values, PERCENTILE)
    found = norm_constants(volume_of(values), PERCENTILE, [0])
    extent = float(values.max()) - float(values.min())
    assert abs(found.offset[0] - low) <= extent / 65536
    assert abs(found.offset[0] + found.scale[0] - high) <= 2 * extent / 65536


def test_values_that_are_not_finite_are_left_out():
    values = np.linspace(-1, 1, 10_001)
    spoilt = np.concatenate([values, [np.nan, np.inf, -np.inf] * 500])
    clean = norm_constants(volume_of(values), PERCENTILE, [0])
    found = norm_constants(volume_of(spoilt), PERCENTILE, [0])
    assert found == clean
    assert found.n_voxels == 10_001


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int32", "float32"])
def test_mean_and_standard_deviation_are_numpys(dtype):
    values = np.random.default_rng(1).integers(0, 2 if dtype == "bool" else 200, 4000)
    values = values.astype(dtype)
    found = norm_constants(volume_of(values), NormRule(kind="meanstd"), [0])
    assert found.offset[0] == pytest.approx(values.mean(), abs=200 / 65536)
    assert found.scale[0] == pytest.approx(values.std(), abs=200 / 65536)


def test_fixed_constants_are_taken_for_every_channel_without_reading():
    rule = NormRule(kind="fixed", offset=3.0, scale=2.0)
    assert norm_constants(None, rule, [0, 4]) == NormConstants(offset=(3.0, 3.0), scale=(2.0, 2.0))


def test_each_channel_has_constants_of_its_own():
    data = np.stack([np.arange(60), np.arange(60) * 3 + 7]).astype(np.uint16)
    volume = InMemory(data.reshape(2, 1, 3, 4, 5))
    found = norm_constants(volume, NormRule(low=0, high=100), [1, 0])
    assert found.offset == (7.0, 0.0)
    assert found.scale == (177.0, 59.0)


@pytest.mark.parametrize("value", [7, 7.5])
def test_a_constant_volume_is_refused(value):
    with pytest.raises(InputError) as caught:
        norm_constants(volume_of(np.full(100, value)), PERCENTILE, [0])
    assert str(caught.value) == (
        f"channel 0 of memory has the same value ({value}) everywhere, so that there is no "
        "contrast to normalise: check the channel, level and time point, or take the constants of "
        "the model "
        "(segment with --norm model)"
    )


def test_a_volume_without_a_finite_value_is_refused():
    with pytest.raises(InputError, match="channel 0 of memory has no finite value in the 10 vox"):
        norm_constants(volume_of(np.full(10, np.nan)), PERCENTILE, [0])


@pytest.mark.parametrize("rule", [PERCENTILE, NormRule(kind="meanstd")])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([-1.7e308, 1.7e308], "beyond what float32 holds"),
        ([0.0, 1e39], "beyond what float32 holds"),
        ([0.0, 1e-200], "float32 does not tell apart"),
    ],
)
def test_a_range_that_the_network_cannot_see_is_refused(values, reason, rule):
    with pytest.raises(InputError, match=reason):
        norm_constants(volume_of(np.array(values * 10)), rule, [0])


def test_a_warning_counts_the_values_that_are_not_finite(caplog):
    norm_constants(volume_of([0.0, 1.0, np.nan, np.inf, 2.0]), PERCENTILE, [0])
    (told,) = caplog.messages
    assert "2 of the 5 voxels of level 0 that are measured are not finite" in told


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=8),
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
)
def test_whatever_is_normalised_is_finite_and_zero_where_it_was_not(values, offset, scale):
    data = np.array(values).reshape(1, 1, 1, 1, -1)
    found = normalise(data, NormConstants(offset=(offset,), scale=(scale,))).ravel()
    assert np.isfinite(found).all()
    assert not found[~np.isfinite(values)].any()


@pytest.mark.parametrize("common", [0, 255])
def test_a_volume_that_is_nearly_all_one_value_is_scaled_by_its_range(common):
    values = np.full(100_000, common, np.uint8)
    values[:10] = np.linspace(0, 255, 10)
    found = norm_constants(volume_of(values), PERCENTILE, [0])
    assert (found.offset, found.scale) == ((float(common),), (255.0,))


def test_statistics_come_from_the_coarsest_level_that_is_large_enough(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (4, 32, 32)).astype(np.uint8)
    url = write_image(tmp_path / "a.zarr", data, chunks=(2, 16, 16), n_levels=3)
    # Levels have 4096, 1024 and 256 voxels.
    for enough, level in [(4097, 0), (1024, 1), (256, 2)]:
        monkeypatch.setattr(statistics, "ENOUGH_VOXELS", enough)
        volume = open_volume(url)
        found = norm_constants(volume, PERCENTILE, [0])
        assert found.level == level
        read = volume.at(level).array[:]
        assert found.n_voxels == read.size
        assert found.offset == (np.percentile(read, 1.0, method="inverted_cdf"),)
    # Never a finer level than the one that is segmented.
    monkeypatch.setattr(statistics, "ENOUGH_VOXELS", 10**6)
    assert norm_constants(open_volume(url, level=2), PERCENTILE, [0]).level == 2


def test_a_sample_of_a_large_volume_is_spread_over_it(monkeypatch):
    monkeypatch.setattr(statistics, "READ_VOXELS", (1, 1 << 24))
    # 16 x 16 x 16 blocks of 3 x 4 x 5 voxels, of which every 16th may be read: steps of 16 blocks
    # would see nothing but the border x < 5.
    monkeypatch.setattr(statistics, "MOST_VOXELS", 48 * 64 * 80 // 16)
    data = np.broadcast_to(np.arange(80, dtype=np.uint8), (1, 1, 48, 64, 80))
    found = norm_constants(InMemory(data), NormRule(low=0, high=100), [0])
    assert (found.offset, found.scale) == ((0.0,), (79.0,))
    assert found.n_voxels < 48 * 64 * 80 / 15


def test_the_constants_of_a_huge_volume_cost_little(tmp_path):
    group = zarr.create_group(tmp_path / "huge.zarr", zarr_format=3)
    array = group.create_array(
        "0", shape=(20_000,) * 3, chunks=(64,) * 3, dtype="uint8", dimension_names=list("zyx")
    )
    array[0, 0, :64] = np.arange(64, dtype=np.uint8)
    group.attrs.update(metadata("0.5", "zyx", [(1.0, 1.0, 1.0)]))
    volume = open_volume(str(tmp_path / "huge.zarr"))
    started = time.process_time()
    regions = statistics._sampled_regions(volume)
    assert time.process_time() - started < 0.5
    assert sum(r.n_voxels for r in regions) <= statistics.MOST_VOXELS
    assert all(len({r.start[axis] for r in regions}) > 50 for axis in (1, 2, 3))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64", "bool"])
def test_normalising_subtracts_and_scales_each_channel_in_float32(dtype):
    data = np.random.default_rng(3).integers(0, 2 if dtype == "bool" else 120, (2, 1, 3, 4, 5))
    data = data.astype(dtype)
    constants = NormConstants(offset=(2.0, 50.0), scale=(3.0, 0.25))
    before = data.copy()
    found = normalise(data, constants)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(data, before)
    for channel, (offset, scale) in enumerate(zip((2.0, 50.0), (3.0, 0.25), strict=True)):
        truth = (data[channel].astype(np.float64) - offset) / scale
        np.testing.assert_allclose(found[channel], truth, rtol=1e-6, atol=1e-6)


def test_what_is_not_finite_is_normalised_to_zero():
    data = np.array([1.0, np.nan, np.inf, -np.inf], np.float32).reshape(1, 1, 1, 1, 4)
    found = normalise(data, NormConstants(offset=(3.0,), scale=(2.0,)))
    assert found.ravel().tolist() == [-1.0, 0.0, 0.0, 0.0]
