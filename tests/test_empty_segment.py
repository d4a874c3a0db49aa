"""Empty space is background voxel by voxel, costs nothing, and is counted."""

import os

import numpy as np
import pytest
import zarr
from helpers import RESOURCES, config_of, noise, write_image, write_model
from zarr_images import write_image as write_version

from bigseg import predictor
from bigseg.config import UNetSpec
from bigseg.errors import UsageError
from bigseg.ledger import Ledger
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially
from bigseg.volume import open_volume

SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)
SHAPE = (16, 64, 48)
OPTIONS = {"prob_dtype": "float32", "tile": (8, 16, 16)}


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


def run(image, model, out, **options):
    config = config_of(image, model, out, **{**OPTIONS, **options})
    result = segment_serially(config, NullProgress())
    return result, open_volume(str(out)).array[:]


def coarse_mask():
    """A box and a lone voxel, at a third of the resolution in y and x."""
    mask = np.zeros((16, 22, 16), np.uint8)
    mask[2:9, 3:8, 2:11] = 1
    mask[12, 15, 14] = 7
    return mask


def test_outside_a_mask_is_background_whatever_the_blocks(tmp_path, model):
    data = noise(SHAPE)
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16))
    mask = coarse_mask()
    url = write_version(str(tmp_path / "mask.zarr"), [mask], "zyx", scale0=(1.0, 64 / 22, 3.0))
    _, truth = run(image, model, tmp_path / "all.zarr")
    z, y, x = (
        (2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(SHAPE, mask.shape, strict=True)
    )
    kept = mask[np.ix_(z, y, x)] != 0
    for name, options in {"small": {}, "large": {"block": (16, 32, 48)}}.items():
        result, found = run(image, model, tmp_path / f"{name}.zarr", mask=str(url), **options)
        np.testing.assert_array_equal(found, np.where(kept, truth, 0))
        assert (result.n_empty > 0) == (name == "small")
    record = Ledger.open(f"{tmp_path}/small.zarr/ledger").record
    small = prepare(
        config_of(image, model, tmp_path / "small.zarr", mask=str(url), **OPTIONS), RESOURCES
    )[0]
    touched = sum(bool(kept[block.core.slices[1:]].any()) for block in small.grid)
    assert record["empty_blocks"] == len(small.grid) - touched


def test_skipped_blocks_and_tiles_are_never_computed(tmp_path, model, monkeypatch):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(8, 16, 16))
    mask = np.zeros((2, 4, 3), np.uint8)
    mask[0, 1, 2] = mask[1, 3, 0] = 1
    url = str(write_version(str(tmp_path / "mask.zarr"), [mask], "zyx", scale0=(8.0, 16.0, 16.0)))
    passes = []
    build = predictor.build_engine

    def counting(*arguments, **options):
        forward = build(*arguments, **options)
        return lambda batch: passes.append(len(batch)) or forward(batch)

    monkeypatch.setattr(predictor, "build_engine", counting)
    for options in ({}, {"block": (16, 64, 48)}):
        passes.clear()
        run(image, model, tmp_path / f"{len(options)}.zarr", mask=url, **options)
        assert len(passes) == 2


def test_below_an_intensity_on_a_coarse_level_is_background(tmp_path, model):
    data = noise(SHAPE)
    data[:, 32:] = 3
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16), n_levels=2)
    _, truth = run(image, model, tmp_path / "all.zarr")
    result, found = run(image, model, tmp_path / "some.zarr", skip_below=10.0)
    coarse = data[:, ::2, ::2] >= 10
    kept = coarse.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(found, np.where(kept, truth, 0))
    assert result.n_empty == 12
    assert result.plan.empty.skip_level == 1


def test_chunks_that_do_not_exist_are_background_and_cost_nothing(tmp_path, model):
    data = noise(SHAPE)
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16))
    _, truth = run(image, model, tmp_path / "all.zarr")
    gone = [(0, 0, 0), (1, 2, 1)]
    for chunk in gone:
        os.remove(os.path.join(image, "0", "c", *map(str, chunk)))
    result, found = run(image, model, tmp_path / "some.zarr")
    kept = np.ones(SHAPE, bool)
    for z, y, x in gone:
        kept[8 * z : 8 * z + 8, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = False
    assert not found[:, ~kept].any()
    far = np.zeros(SHAPE, bool)
    far[:, :, 40:] = True  # beyond the halo of what is gone
    np.testing.assert_array_equal(found[:, kept & far], truth[:, kept & far])
    assert result.n_empty == 2


def test_a_mask_is_part_of_the_fingerprint(tmp_path, model):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(8, 16, 16))
    url = str(
        write_version(
            str(tmp_path / "mask.zarr"),
            [np.ones((1, 4, 3), np.uint8)],
            "zyx",
            scale0=(16.0, 16.0, 16.0),
        )
    )
    run(image, model, tmp_path / "out.zarr")
    with pytest.raises(UsageError, match="empty"):
        run(image, model, tmp_path / "out.zarr", mask=url)
    assert zarr.open_group(tmp_path / "out.zarr", mode="r")
