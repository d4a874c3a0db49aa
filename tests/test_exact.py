"""Blockwise equals whole: the first promise.

The whole-volume result is computed here by itself: mirror the volume with numpy, run the network
once over all of it in float32, crop. Nothing of bigseg's tiling takes part in it.
"""

import itertools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NORM, config_of, noise, write_image, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigseg.blocks import ceil_div, round_up
from bigseg.config import UNetSpec
from bigseg.model import UNet, footprint
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.volume import open_volume


def whole_volume(net, data):
    """Probabilities (k, z, y, x) of the whole volume in one pass (a plane each in 2-D).

    One pass for each mirror image where the network asks for them.
    """
    mark = footprint(net.spec)
    x = (data.astype(np.float32) - np.float32(NORM.offset)) / np.float32(NORM.scale)
    shape = data.shape[-net.spec.dims :]
    margins = []
    for n, halo, output in zip(shape, mark.halo, mark.smallest_output(shape), strict=True):
        margins.append((halo, output - n + halo))
    lead = [(0, 0)] * (data.ndim - net.spec.dims)
    padded = np.pad(x, lead + margins, mode="reflect")
    axes = range(-net.spec.dims, 0) if net.spec.mirror else ()
    sides = [s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n)]
    images = [np.flip(one_pass(net, np.flip(padded, side)), side) for side in sides]
    probabilities = np.mean(images, axis=0)
    index = tuple(slice(0, n) for n in shape)
    return probabilities[(..., *index)]


def one_pass(net, padded):
    x = torch.from_numpy(padded.copy())
    with torch.inference_mode():
        logits = net(x[None, None])[0] if net.spec.dims == 3 else net(x[:, None]).swapaxes(0, 1)
        return logits.softmax(0).numpy()


def run(image, model, out, **options):
    result = segment_serially(config_of(image, model, out, **options), NullProgress())
    assert result.is_complete, result.failed
    return open_volume(str(out))


def voxels(volume):
    return volume.array[:]


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


@st.composite
def cases(draw):
    dims = draw(st.sampled_from([2, 3]))
    depth = draw(st.integers(0, 2 if dims == 2 else 1))
    anisotropy = draw(st.sampled_from([None, (4.0, 1.0, 1.0)])) if dims == 3 else None
    spec = UNetSpec.build(
        dims,
        out_channels=3,
        depth=depth,
        width=2,
        voxel_um=anisotropy,
        mirror=draw(st.booleans()),
    )
    stride = footprint(spec).stride
    z = draw(st.sampled_from([1, 2, 5, 17] if dims == 3 else [1, 3]))
    shape = (z, draw(st.integers(1, 50)), draw(st.integers(1, 50)))
    chunks = tuple(draw(st.integers(1, max(1, n))) for n in shape)
    shards = draw(st.sampled_from([None, 2]))
    shards = shards and tuple(shards * c for c in chunks)
    # At most four tiles along an axis: enough for every kind of neighbour, few enough to be fast.
    sides = zip(shape[-dims:], stride, strict=True)
    tile = tuple(round_up(ceil_div(n, draw(st.integers(1, 4))), s) for n, s in sides)
    block = tuple(draw(st.integers(1, 60)) for _ in range(3))
    return spec, shape, chunks, shards, tile, block


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(cases(), st.sampled_from(["float32", "uint8"]))
def test_blockwise_probabilities_equal_the_whole_volumes(case, prob_dtype):
    spec, shape, chunks, shards, tile, block = case
    data = noise(shape, seed=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = write_image(folder / "image.zarr", data, chunks=chunks, shards=shards)
        net, model = write_model(folder / "model.safetensors", spec)
        found = run(
            image, model, folder / "out.zarr", tile=tile, block=block, prob_dtype=prob_dtype
        )
        truth = whole_volume(net, data)
        blockwise = voxels(found)
    assert blockwise.shape == truth.shape
    if prob_dtype == "float32":
        np.testing.assert_allclose(blockwise, truth, atol=1e-5, rtol=0)
    else:
        assert np.abs(blockwise.astype(int) - np.rint(truth * 255)).max() <= 1


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(cases(), st.lists(st.tuples(*[st.integers(1, 60)] * 3), min_size=2, max_size=3))
def test_every_block_size_gives_the_same_bytes_at_one_tile(case, blocks):
    spec, shape, chunks, shards, tile, _ = case
    data = noise(shape, seed=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = write_image(folder / "image.zarr", data, chunks=chunks, shards=shards)
        _, model = write_model(folder / "model.safetensors", spec)
        results = []
        for i, block in enumerate(blocks):
            out = folder / f"{i}.zarr"
            found = run(image, model, out, tile=tile, block=block, prob_dtype="float32")
            results.append(voxels(found).tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("dims", [2, 3])
def test_a_region_equals_the_full_run_and_is_background_elsewhere(folder, dims):
    spec = UNetSpec.build(dims, out_channels=2, depth=1, width=2)
    data = noise((9, 40, 37), seed=3)
    image = write_image(folder / "image.zarr", data, chunks=(4, 16, 16))
    _, model = write_model(folder / "model.safetensors", spec)
    full = voxels(run(image, model, folder / "full.zarr"))
    part = voxels(run(image, model, folder / "part.zarr", region="2:7,5:30,11:37"))
    inside = (slice(None), slice(2, 7), slice(5, 30), slice(11, 37))
    np.testing.assert_array_equal(part[inside], full[inside])
    outside = np.ones(part.shape, bool)
    outside[inside] = False
    assert not part[outside].any()


def test_labels_are_the_argmax_of_the_probabilities(folder):
    spec = UNetSpec.build(3, out_channels=3, depth=1, width=2)
    data = noise((9, 24, 31), seed=4)
    image = write_image(folder / "image.zarr", data, chunks=(4, 16, 16))
    _, model = write_model(folder / "model.safetensors", spec)
    probabilities = voxels(run(image, model, folder / "p.zarr", prob_dtype="float32"))
    labels = voxels(run(image, model, folder / "l.zarr", output="labels"))
    np.testing.assert_array_equal(labels, probabilities.argmax(0))
    assert labels.dtype == np.uint8


def test_a_network_trained_with_padding_segments_in_valid_mode(folder):
    spec = UNetSpec.build(2, out_channels=2, depth=1, width=2, padding="same")
    data = noise((2, 30, 33), seed=5)
    image = write_image(folder / "image.zarr", data, chunks=(1, 16, 16))
    net, model = write_model(folder / "model.safetensors", spec)
    valid = UNet(spec.model_copy(update={"padding": "valid"}))
    valid.load_state_dict(net.state_dict())
    found = voxels(run(image, model, folder / "p.zarr", prob_dtype="float32"))
    np.testing.assert_allclose(found, whole_volume(valid.eval(), data), atol=1e-5)
