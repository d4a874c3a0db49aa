import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image
from PIL import Image
from planting import config_for, planted_shapes, write_planting_model

from bigseg import view
from bigseg.account import conclusion
from bigseg.blocks import Region
from bigseg.errors import OutputError, UsageError
from bigseg.progress import NullProgress
from bigseg.sample import make_sample
from bigseg.segment import segment_serially
from bigseg.view import (
    CAPTION_PX,
    GAP_PX,
    LARGEST_PX,
    PALETTE,
    middle_plane,
    save_overlay,
    save_result_picture,
)
from bigseg.volume import Volume, open_volume

RNG = np.random.default_rng(0)
RAW = RNG.integers(0, 4000, (600, 500), dtype=np.uint16)  # neither enlarged nor reduced


def panels(path: Path, n: int) -> list[np.ndarray]:
    """The panels of a picture, without captions, as int (y, x, 3)."""
    picture = np.asarray(Image.open(path)).astype(int)[CAPTION_PX:]
    width = (picture.shape[1] - GAP_PX * (n - 1)) // n
    return [picture[:, i * (width + GAP_PX) :][:, :width] for i in range(n)]


def saved(tmp_path: Path, *planes: np.ndarray, **options: str) -> list[np.ndarray]:
    path = tmp_path / "view.png"
    save_overlay(str(path), *planes, **options)
    return panels(path, len(planes) + 1)


def blocks(n: int) -> np.ndarray:
    """RAW's shape, cut into n × n rectangles numbered from 1, with a margin of background."""
    labels = np.zeros(RAW.shape, np.uint32)
    rows, columns = (np.arange(s) * n // s for s in RAW.shape)
    labels[:] = rows[:, None] * n + columns + 1
    labels[:10] = 0
    return labels


def test_the_panels_are_raw_truth_result_and_the_overlay(tmp_path: Path):
    labels = blocks(10)
    raw, truth, result, overlay = saved(tmp_path, RAW, labels, labels[::-1])
    assert raw.shape == truth.shape == result.shape == overlay.shape
    assert raw.shape[:2] == RAW.shape
    assert (raw[..., 0] == raw[..., 1]).all()
    assert (truth[:8] > 0).any()
    assert (truth[-8:] == 0).all()
    assert (result[:8] == 0).all()
    without_truth = saved(tmp_path, RAW, labels)
    assert len(without_truth) == 3


def test_an_object_has_one_colour_in_every_picture_and_others_have_others(tmp_path: Path):
    labels = blocks(10)
    alone = np.where(labels == 37, labels, 0)
    here, there = saved(tmp_path, RAW, labels)[1], saved(tmp_path, RAW, alone)[1]
    inside = labels == 37
    assert (here[inside] == there[inside]).all()
    colours = [tuple(here[labels == i][0]) for i in range(1, 101)]
    assert len(set(colours)) == 100
    for first, second in itertools.pairwise(colours):
        assert np.abs(np.subtract(first, second)).max() > 40
    assert min(max(c) for c in colours) > 150


def test_background_is_black_in_the_panel_and_transparent_in_the_overlay(tmp_path: Path):
    raw, result, overlay = saved(tmp_path, RAW, blocks(10))
    assert (result[:10] == 0).all()
    assert (overlay[:10] == raw[:10]).all()
    assert (overlay[12:] != raw[12:]).any()


def test_classes_have_the_colours_of_the_palette(tmp_path: Path):
    classes = (blocks(10) % 3).astype(np.uint8)
    result = saved(tmp_path, RAW, classes)[1]
    for value in range(3):
        assert (result[classes == value] == PALETTE[value]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_probabilities_become_brighter_with_their_value(tmp_path: Path, dtype: type):
    ramp = np.broadcast_to(np.linspace(0, 1, RAW.shape[1]), RAW.shape)
    plane = ramp.astype(np.float32) if dtype is np.float32 else np.rint(255 * ramp).astype(dtype)
    row = saved(tmp_path, RAW, plane)[1][300].sum(axis=-1)
    assert (np.diff(row) >= 0).all()
    assert (row[0], row[-1]) == (0, 255 + 255 + 64)


def test_what_a_result_is_can_be_said(tmp_path: Path):
    few = np.minimum(blocks(10), 3).astype(np.uint8)
    assert (saved(tmp_path, RAW, few)[1] != saved(tmp_path, RAW, few, kind="objects")[1]).any()


def test_contrast_is_stretched_between_percentiles_whatever_the_type(tmp_path: Path):
    raw = 100 + RNG.random(RAW.shape).astype(np.float32)
    raw[:1] = 1e6  # hot pixels
    raw[5, 5] = np.nan
    shown = saved(tmp_path, raw, blocks(4))[0]
    assert (shown.min(), shown.max()) == (0, 255)
    assert 100 < shown[10:].mean() < 155
    flat = saved(tmp_path, np.full_like(RAW, 7), blocks(4))[0]
    assert (flat == 0).all()


def test_tiny_planes_are_enlarged_by_a_whole_factor_without_blurring(tmp_path: Path):
    labels = np.arange(16, dtype=np.uint32).reshape(4, 4)
    raw, result, _ = saved(tmp_path, labels, labels)
    assert raw.shape == (512, 512, 3)
    assert len(np.unique(result.reshape(-1, 3), axis=0)) == 16


@pytest.mark.parametrize("shape", [(3000, 9000), (9000, 300), (5000, 5000), (1, 20_000)])
def test_large_planes_are_reduced_to_the_width_of_a_screen(tmp_path: Path, shape: tuple[int, int]):
    plane = np.zeros(shape, np.uint8)
    save_overlay(str(tmp_path / "v.png"), plane, plane)
    with Image.open(tmp_path / "v.png") as picture:
        assert max(picture.size) <= LARGEST_PX
        assert max(picture.size) > LARGEST_PX // 2


def test_planes_that_do_not_lie_on_each_other_are_refused(tmp_path: Path):
    text = "planes raw (600, 500), result (600, 499) do not lie on each other: give planes (y, x)"
    with pytest.raises(UsageError, match=re.escape(text)):
        save_overlay(str(tmp_path / "v.png"), RAW, RAW[:, 1:])
    with pytest.raises(UsageError, match="do not lie on each other"):
        save_overlay(str(tmp_path / "v.png"), RAW[None], RAW[None])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"v\.png cannot be written"):
        save_overlay(str(tmp_path / "file" / "v.png"), RAW, RAW)


def test_the_middle_plane_is_that_of_the_middle_of_z(tmp_path: Path):
    volume = make_sample(str(tmp_path / "a.zarr"), shape=(9, 140, 40))
    plane = middle_plane(volume)
    np.testing.assert_array_equal(plane, np.asarray(volume.array)[4])
    coarse = middle_plane(volume, most_px=100)
    np.testing.assert_array_equal(coarse, np.asarray(volume.at(1).array)[4])
    assert middle_plane(volume, most_px=10).shape == coarse.shape


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Region]]:
    """The level and the region of everything that is read of volumes from now on."""
    found = []
    read = Volume.read

    def noting(volume: Volume, region: Region, channels: tuple[int, ...] = (0,)) -> np.ndarray:
        found.append((volume.level, region))
        return read(volume, region, channels)

    monkeypatch.setattr(Volume, "read", noting)
    return found


def assert_shown(
    tmp_path: Path, shape: tuple[int, ...], *, n_levels: int, part: Region, shown: tuple[slice, ...]
):
    """The picture of a part of a result is the one of these voxels of the finest level."""
    raw = RNG.integers(0, 4000, shape, dtype=np.uint16)
    labels = np.repeat(RNG.integers(0, 30, (*shape[:2], shape[2] // 50 + 1)), 50, axis=2)
    labels = labels[..., : shape[2]].astype(np.uint32)
    volumes = []
    for name, data in (("raw", raw), ("labels", labels)):
        url = write_image(tmp_path / f"{name}.zarr", data, chunks=(1, 64, 256), n_levels=n_levels)
        volumes.append(open_volume(url))
    path = save_result_picture(*volumes, part, channel=0, kind="objects")
    assert path == str(tmp_path / "labels.png")
    expected = tmp_path / "expected.png"
    save_overlay(str(expected), raw[shown], labels[shown], kind="objects")
    assert Path(path).read_bytes() == expected.read_bytes()


def test_of_a_wide_plane_a_piece_at_a_time_is_read(
    tmp_path: Path, reads: list[tuple[int, Region]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(view, "PIECE_VOXELS", 1 << 16)
    part = Region((0, 0, 10, 100), (1, 3, 290, 8900))
    shown = (1, slice(10, 290), slice(100, 8900))
    assert_shown(tmp_path, (3, 300, 9000), n_levels=1, part=part, shown=shown)
    assert max(region.n_voxels for _, region in reads) <= 1 << 16
    assert sum(region.n_voxels for _, region in reads) == 2 * 280 * 8800


def test_of_a_wide_plane_a_coarser_level_is_read_where_there_is_one(
    tmp_path: Path, reads: list[tuple[int, Region]]
):
    shown = (1, slice(None, None, 4), slice(None, None, 4))
    whole = Region.of_shape((1, 2, 300, 9000))
    assert_shown(tmp_path, (2, 300, 9000), n_levels=4, part=whole, shown=shown)
    assert {(level, region.n_voxels) for level, region in reads} == {(2, 75 * 2250)}


def test_of_a_plane_that_is_not_wide_every_voxel_counts(
    tmp_path: Path, reads: list[tuple[int, Region]]
):
    part = Region((0, 0, 0, 3), (1, 2, 100, 2710))
    shown = (1, slice(None), slice(3, 2710))
    assert_shown(tmp_path, (2, 100, 5000), n_levels=2, part=part, shown=shown)
    assert {(level, region.n_voxels) for level, region in reads} == {(0, 100 * 2707)}


def test_a_damaged_chunk_that_only_the_picture_reads_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(view, "LARGEST_PX", 40)
    data = planted_shapes()
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16), n_levels=2)
    model = write_planting_model(tmp_path / "model.safetensors")
    config = config_for(image, model, tmp_path / "out.zarr", {}, block=(24, 40, 48))
    result = segment_serially(config, NullProgress())
    chunk = tmp_path / "image.zarr" / "1" / "c" / "1" / "0" / "0"
    assert chunk.exists()
    chunk.write_bytes(b"damaged")
    assert "a middle plane" in conclusion(result)[1]
    assert "1/c/1/0/0" in caplog.text
