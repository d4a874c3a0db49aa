"""The way through a GPU: the bytes of the processors, never waiting, never losing a tile."""

import logging

import numpy as np
import pytest
import torch
from helpers import config_of, noise, write_image, write_model

from bigseg.config import NormRule, UNetSpec
from bigseg.cuda import _codes, _Halving
from bigseg.instances import codes_of
from bigseg.progress import NullProgress
from bigseg.rules import InstanceRule
from bigseg.segment import segment_serially
from bigseg.volume import open_volume

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Small:
    """Forward passes on a device that holds only so many planes; of one shape each, as built."""

    def __init__(self, most):
        self.most, self.sizes, self.built = most, [], []

    def build(self, n_planes):
        self.built.append(n_planes)

        def forward(batch):
            assert len(batch) == n_planes
            self.sizes.append(len(batch))
            if len(batch) > self.most:
                raise torch.OutOfMemoryError
            return batch.mean(dim=1, keepdim=True) * 2

        return forward


def test_codes_of_instances_are_those_of_the_processors():
    probabilities = np.random.default_rng(0).integers(0, 256, (3, 1, 9, 40, 40)).astype(np.uint8)
    probabilities[:, :, 0] = 0
    for threshold, foreground in [(0.5, 0.5), (0.31, 0.77), (1.0, 0.004)]:
        rule = InstanceRule(threshold=threshold, foreground=foreground)
        found = _codes(torch.from_numpy(probabilities).to(torch.int32), rule)
        np.testing.assert_array_equal(found.numpy(), codes_of(probabilities, rule))


@pytest.mark.parametrize("n_planes", [8, 5, 6])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_out_of_memory_halves_the_planes_and_gives_the_same(n_planes, most, caplog):
    batch = torch.rand(n_planes, 2, 5, 5)
    device, freed = Small(most), []
    halving = _Halving(device.build, n_planes, lambda: freed.append(1))
    with caplog.at_level(logging.WARNING):
        results = [halving(batch) for _ in range(3)]
    for result in results:
        assert torch.equal(result, batch.mean(dim=1, keepdim=True) * 2)
    failures = [n for n in device.sizes if n > most]
    assert len(failures) == len(freed) == len(caplog.records) == len(device.built) - 1
    # What did not fit is not tried again.
    assert failures == sorted(set(failures), reverse=True)


def test_a_single_tile_that_does_not_fit_is_an_error():
    halving = _Halving(Small(0).build, 4, lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        halving(torch.rand(4, 1, 3, 3))


CASES = {
    "3-D, uint8": (3, {"dtype": np.uint8}, {"tile": (8, 16, 16)}),
    "3-D, uint16, a region": (
        3,
        {"dtype": np.uint16},
        {"tile": (8, 16, 16), "region": "3:15,5:40,:", "block": (16, 32, 48)},
    ),
    "3-D, float64": (3, {"dtype": np.float64}, {"tile": (8, 16, 16), "block": (8, 32, 32)}),
    "2-D, planes": (2, {"dtype": np.uint8}, {"tile": (32, 32), "block": (4, 32, 64)}),
}


def run(image, model, out, **options):
    config = config_of(image, model, out, **options)
    result = segment_serially(config, NullProgress())
    return result, open_volume(str(out)).array[:]


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("prob_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_what_processors_give(case, prob_dtype, tmp_path, monkeypatch):
    dims, image_options, options = CASES[case]
    data = noise((18, 50, 47), **image_options)
    if data.dtype.kind == "f":
        data[3, 4, 5] = np.nan
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16))
    spec = UNetSpec.build(dims, out_channels=3, depth=2, width=8)
    model = write_model(tmp_path / "m.safetensors", spec, norm=NormRule())[1]
    options = {**options, "prob_dtype": prob_dtype}
    result, found = run(image, model, tmp_path / "cuda.zarr", **options)
    assert result.plan.engine.device == "cuda"
    assert 0 < result.spent.busy_s < result.spent.wall_s
    _, again = run(image, model, tmp_path / "again.zarr", **options)
    np.testing.assert_array_equal(found, again)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, truth = run(image, model, tmp_path / "cpu.zarr", **options)
    tolerance = 1e-4 if prob_dtype == "float32" else 1
    assert np.abs(found.astype(float) - truth.astype(float)).max() <= tolerance


@pytest.mark.gpu
@NO_GPU
def test_the_size_of_a_block_changes_no_byte_on_a_gpu(tmp_path):
    image = write_image(tmp_path / "image.zarr", noise((40, 90, 70)), chunks=(16, 32, 32))
    spec = UNetSpec.build(3, out_channels=2, depth=2, width=16)
    model = write_model(tmp_path / "m.safetensors", spec)[1]
    options = {"tile": (8, 16, 16), "precision": "bf16", "prob_dtype": "float32"}
    _, small = run(image, model, tmp_path / "small.zarr", **options)
    _, large = run(image, model, tmp_path / "large.zarr", block=(40, 48, 80), **options)
    np.testing.assert_array_equal(small, large)


@pytest.mark.gpu
@NO_GPU
def test_masked_tiles_are_background_on_a_gpu(tmp_path):
    data = noise((16, 64, 48))
    data[:, :32] = 0
    image = write_image(tmp_path / "image.zarr", data, chunks=(8, 16, 16))
    spec = UNetSpec.build(3, out_channels=2, depth=1, width=4)
    model = write_model(tmp_path / "m.safetensors", spec)[1]
    options = {"tile": (8, 16, 16), "block": (16, 64, 48), "skip_below": 1.0}
    _, found = run(image, model, tmp_path / "out.zarr", **options)
    assert not found[:, data == 0].any()
    assert found[:, data > 0].any()
