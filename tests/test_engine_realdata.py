"""On electron microscopy, with trained networks, every engine finds what float32 in torch finds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from scipy import ndimage
from training_data import write_annotated

from bigseg.checkpoint import load_model
from bigseg.config import TrainConfig
from bigseg.engine import build_engine, candidates, resolve_engine, torch_forward
from bigseg.metrics import Contingency, adapted_rand_error, average_precision
from bigseg.model import UNet, footprint
from bigseg.targets import INSIDE, boundary
from bigseg.train_ddp import train

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (DATA / "fib25").is_dir(), reason=f"the real data are not at {DATA}"),
]

# Shares of voxels whose class may differ (measured: 0 in fp32, 7e-4 in bf16 emulated by torch), the
# largest difference of a probability (4e-7 and 0.014), and of the scores (0 and 0.0014: one voxel
# can join two objects, and there are few).
CLASSES = {"fp32": 1e-5, "bf16": 1e-3}
PROBABILITIES = {"fp32": 1e-4, "bf16": 0.05}
SCORES = {"fp32": 0.002, "bf16": 0.002}
ERODED_VOX = 4
INTENSITIES = ("brightness", "contrast", "gamma", "noise", "blur_vox")
GEOMETRY_ONLY = {"probability": 1.0} | dict.fromkeys(INTENSITIES, 0.0)


@dataclass(frozen=True, eq=False)
class Case:
    """A trained network, a batch that it has not seen, and the true objects of its output."""

    net: UNet
    batch: NDArray[np.float32]
    objects: NDArray[np.int32]
    reference: NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


def trained(folder, image, inside, **settings) -> UNet:
    """A small network after seconds of training: its classes mean something."""
    url = write_annotated(str(folder / "a.zarr"), image, inside.astype(np.uint8), "zyx")
    config = TrainConfig(
        images=(url,),
        labels="cells",
        precision="fp32",
        optim={"lr": 0.005, "warmup_steps": 5},
        norm={"kind": "fixed", "offset": 128.0, "scale": 64.0},
        augment=GEOMETRY_ONLY,
        loss={"dice": 0.0},
        val_every=settings["steps"],
        **settings,
    )
    result = train(config, str(folder / "run"), executor="serial")
    assert result.best_score > 0.6, "the network has not learned"
    return load_model(str(folder / "run" / "model.safetensors"))[0].eval()


def case(net, image, truth) -> Case:
    """The middle of `image` in planes or as a volume, with the objects there."""
    image = (image.astype(np.float32) - 128) / 64
    batch = image[:, None] if net.spec.dims == 2 else image[None, None]
    halo = footprint(net.spec).halo
    inner = tuple(slice(h, n - h) for h, n in zip(halo, truth.shape[-len(halo) :], strict=True))
    reference = torch_forward(net, device=torch.device("cpu"), precision="fp32")(batch)
    return Case(net, np.ascontiguousarray(batch), truth[(..., *inner)], reference)


@pytest.fixture(scope="module")
def fly_medulla(tmp_path_factory):
    image = tifffile.imread(DATA / "fib25" / "image.tif")
    bodies = tifffile.imread(DATA / "fib25" / "bodies.tif").astype(np.int32)
    net = trained(
        tmp_path_factory.mktemp("fib25"),
        image[:40, :96, :96],
        boundary(bodies[:40, :96, :96], border_vox=4.0) == INSIDE,
        dims=3,
        net={"depth": 1, "width": 8, "padding": "same"},
        patch=(32, 32, 32),
        batch=1,
        steps=60,
        region="0:32,:,:",
        val_region="32:40,:,:",
    )
    where = np.s_[100:140, 60:160, 60:160]
    return case(net, image[where], bodies[where])


@pytest.fixture(scope="module")
def larva(tmp_path_factory):
    image = tifffile.imread(DATA / "isbi2012" / "images.tif")
    cells = tifffile.imread(DATA / "isbi2012" / "cells.tif")
    net = trained(
        tmp_path_factory.mktemp("isbi"),
        image[:12],
        cells[:12] == INSIDE,
        dims=2,
        net={"depth": 2, "width": 8, "padding": "same"},
        patch=(96, 96),
        batch=2,
        steps=150,
        region="0:10,:,:",
        val_region="10:12,:,:",
    )
    where = np.s_[20:22, :384, :384]
    truth = np.stack([ndimage.label(plane)[0] for plane in cells[where] == INSIDE])
    return case(net, image[where], truth)


CASES = ["fly_medulla", "larva"]


def objects_of(probabilities, dims):
    """Components of the eroded inside, grown back; those of one plane are not those of the next."""
    inside = probabilities.argmax(1) == INSIDE
    labels, n = np.zeros(inside.shape, np.int32), 0
    for part, found in zip(labels, inside, strict=True):
        seeds, n_here = ndimage.label(ndimage.distance_transform_edt(found) > ERODED_VOX)
        nearest = ndimage.distance_transform_edt(
            seeds == 0, return_distances=False, return_indices=True
        )
        part[found] = seeds[tuple(nearest)][found] + n
        n += n_here
    return labels if dims == 2 else labels[0]


def scores_of(case, probabilities):
    table = Contingency.of(objects_of(probabilities, case.net.spec.dims), case.objects)
    return adapted_rand_error(table).error, np.mean(list(average_precision(table).values()))


def assert_agrees(case, found, precision):
    truth = case.reference
    assert (found.shape, found.dtype) == (truth.shape, np.float32)
    share = (found.argmax(1) != truth.argmax(1)).mean()
    largest = np.abs(found - truth).max()
    ours, theirs = scores_of(case, found), scores_of(case, truth)
    told = f"classes {share:.1e}, probabilities {largest:.1e}, scores {ours}, reference {theirs}"
    assert share <= CLASSES[precision], told
    assert largest <= PROBABILITIES[precision], told
    np.testing.assert_allclose(ours, theirs, atol=SCORES[precision], rtol=0, err_msg=told)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_finds_objects(name, request):
    """Otherwise agreement with it would mean nothing."""
    case = request.getfixturevalue(name)
    classes = np.bincount(case.reference.argmax(1).ravel(), minlength=2) / case.objects.size
    assert 0.5 < classes[INSIDE] < 0.95
    error, precision = scores_of(case, case.reference)
    assert error < 0.65
    assert precision > 0


@pytest.mark.parametrize("engine", ["openvino", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_engines_in_float32_agree(name, engine, request):
    case = request.getfixturevalue(name)
    spec = resolve_engine(engine, "fp32", device="cpu")
    forward = build_engine(case.net, spec, input_shape=case.batch.shape, n_threads=1)
    assert_agrees(case, forward(case.batch), "fp32")


@pytest.mark.parametrize("name", CASES)
def test_engines_in_bf16_agree(name, request):
    case = request.getfixturevalue(name)
    for spec in candidates("cpu", "bf16"):
        if spec.name == "compiled" and spec.isa not in ("amx_bf16", "avx512_bf16"):
            continue  # It emulates bf16 too, minutes long.
        forward = build_engine(case.net, spec, input_shape=case.batch.shape, n_threads=1)
        assert_agrees(case, forward(case.batch), "bf16")
