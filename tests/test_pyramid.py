"""Downsampling against loops over voxels; independence of the cut into blocks."""

import collections
import fractions
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bigseg.blocks import BlockGrid, Region, ceil_div
from bigseg.pyramid import (
    downsample,
    level_rule,
    mean_downsample,
    mode_downsample,
    nearest_downsample,
    source_region,
)

factors_2d = st.tuples(st.integers(1, 4), st.integers(1, 4))
shapes_2d = st.tuples(st.integers(1, 9), st.integers(1, 9))
DTYPES = ("uint8", "int8", "uint16", "int32", "uint64", "int64", "float32", "bool")


def windows(data: NDArray[Any], factors: tuple[int, ...]) -> dict[tuple[int, ...], list[Any]]:
    """The values of each window, voxel by voxel."""
    found: dict[tuple[int, ...], list[Any]] = collections.defaultdict(list)
    for place in itertools.product(*map(range, data.shape)):
        found[tuple(p // f for p, f in zip(place, factors, strict=True))].append(data[place].item())
    return found


def majority(values: list[Any]) -> Any:
    counts = collections.Counter(values)
    return min(counts, key=lambda v: (-counts[v], v))


@given(
    shapes_2d, factors_2d, st.integers(0, 2**32 - 1), st.sampled_from(["uint8", "int16", "uint64"])
)
@settings(max_examples=80, deadline=None)
def test_mode_is_the_majority_with_ties_to_the_smaller(
    shape: tuple[int, int], factors: tuple[int, int], seed: int, dtype: str
) -> None:
    data = np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)
    result = mode_downsample(data, factors)
    assert result.dtype == data.dtype
    for place, values in windows(data, factors).items():
        assert result[place] == majority(values)


@given(shapes_2d, factors_2d, st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
@settings(max_examples=120, deadline=None)
def test_mean_is_exact_and_rounds_half_to_even(
    shape: tuple[int, int], factors: tuple[int, int], seed: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        data = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    else:
        data = (rng.random(shape) * 2).astype(dtype)
    result = mean_downsample(data, factors)
    assert result.dtype == data.dtype
    for place, values in windows(data, factors).items():
        if dtype == "float32":
            assert result[place] == np.float32(np.float64(np.sum(values)) / len(values))
        else:
            # Python's round is exact on fractions and rounds half to even.
            assert result[place] == round(fractions.Fraction(sum(map(int, values)), len(values)))


def test_means_of_the_largest_integers_do_not_overflow() -> None:
    for dtype in ("uint64", "int64", "int32", "uint8"):
        top, low = np.iinfo(dtype).max, np.iinfo(dtype).min
        assert mean_downsample(np.full((3, 3), top, dtype), (3, 3)) == top
        assert mean_downsample(np.full((3, 3), low, dtype), (3, 3)) == low


def test_nearest_takes_the_voxel_behind_the_middle() -> None:
    data = np.arange(8)
    assert nearest_downsample(data, (3,)).tolist() == [1, 4, 7]
    assert nearest_downsample(data, (2,)).tolist() == [1, 3, 5, 7]
    assert nearest_downsample(np.arange(7), (4,)).tolist() == [2, 6]


def test_all_zero_and_uniform_labels_stay() -> None:
    for value in (0, 7):
        assert (mode_downsample(np.full((5, 6, 7), value, "uint32"), (2, 3, 2)) == value).all()


@pytest.mark.parametrize(
    ("fine", "coarse", "scale", "wanted"),
    [
        (100, 50, 2.0, 2),
        (101, 50, 2.0, 2),
        (101, 51, 2.0, 2),
        (275, 137, 2.0, 2),
        (10, 5, 2.02, 2),
        (100, 100, 1.0, 1),
        (100, 25, 4.0, 4),
        (5, 2, 2.0, 2),
        (100, 50, 1.0, 2),  # scales that say nothing: the lengths decide
        (10, 5, float("inf"), 2),
        (100, 70, 1.43, None),
        (100, 48, 2.0, None),
        (1, 1, 2.0, 2),
        (7, 5, 1.4, None),
    ],
)
def test_the_rule_is_the_integer_factor_that_explains_the_length(
    fine: int, coarse: int, scale: float, wanted: int | None
) -> None:
    rule = level_rule((fine,), (coarse,), fine_scale=(0.5,), coarse_scale=(0.5 * scale,))
    assert rule == (wanted,)


@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
    st.lists(st.sampled_from(["floor2", "ceil2", "ceil3", "same", "odd"]), min_size=3, max_size=3),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    st.sampled_from(["mode", "mean", "nearest"]),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_the_cut_into_blocks_changes_no_voxel(
    fine: list[int], kinds: list[str], core: tuple[int, ...], method: Any, seed: int
) -> None:
    coarse, scale = [], []
    for n, kind in zip(fine, kinds, strict=True):
        coarse.append(
            {
                "floor2": max(1, n // 2),
                "ceil2": ceil_div(n, 2),
                "ceil3": ceil_div(n, 3),
                "same": n,
                "odd": max(1, round(n / 1.6)),
            }[kind]
        )
        scale.append({"floor2": 2.0, "ceil2": 2.0, "ceil3": 3.0, "same": 1.0, "odd": 1.6}[kind])
    data = np.random.default_rng(seed).integers(0, 5, (2, *fine)).astype("uint8")
    rule = level_rule(fine, coarse, fine_scale=(1.0,) * 3, coarse_scale=scale)

    def compute(target: Region) -> NDArray[Any]:
        source = source_region(target, fine_shape=fine, coarse_shape=coarse, rule=rule)
        assert source.intersect(Region.of_shape(fine)) == source
        return downsample(
            data[(slice(None), *source.slices)],
            target,
            fine_shape=fine,
            coarse_shape=coarse,
            rule=rule,
            method=method,
        )

    whole = compute(Region.of_shape(coarse))
    assert whole.shape == (2, *coarse)
    assert whole.dtype == data.dtype
    pieces = np.zeros_like(whole)
    for block in BlockGrid(Region.of_shape(coarse), core):
        pieces[(slice(None), *block.core.slices)] = compute(block.core)
    np.testing.assert_array_equal(pieces, whole)


def test_without_a_factor_the_voxel_at_the_centre_is_taken() -> None:
    def centre(i: int, n: int, m: int) -> int:
        return int((fractions.Fraction(2 * i + 1, 2 * m) * n) // 1)

    for n, m in [(7, 5), (10, 7), (9, 8), (100, 70), (3, 2)]:
        data = np.arange(n)
        got = downsample(
            data,
            Region((0,), (m,)),
            fine_shape=(n,),
            coarse_shape=(m,),
            rule=(None,),
            method="mode",
        )
        assert got.tolist() == [centre(i, n, m) for i in range(m)]


def test_an_empty_target_needs_and_gives_nothing() -> None:
    target = Region((2, 0), (2, 3))
    shapes: dict[str, Any] = {"fine_shape": (8, 6), "coarse_shape": (4, 3), "rule": (2, 2)}
    assert source_region(target, **shapes).n_voxels == 0
    result = downsample(np.zeros((0, 6)), target, **shapes, method="mean")
    assert result.shape == (0, 3)
