"""On electron microscopy, with a trained network, blocks give the objects of the whole array."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import config_of
from planting import labels_at
from training_data import write_annotated

from bigseg.blocks import Region
from bigseg.cluster import connect
from bigseg.config import TrainConfig
from bigseg.instances import codes_of, segment_codes
from bigseg.on_ray import segment_on_ray
from bigseg.progress import NullProgress
from bigseg.rules import RuleOptions
from bigseg.segment import segment_serially
from bigseg.steps import Steps
from bigseg.train_ddp import train
from bigseg.volume import open_volume

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not (DATA / "fib25").is_dir(), reason=f"the real data are not at {DATA}"),
]
RULES = [
    {"threshold": 0.5, "erode": 1, "grow": 4, "min_size": 1},
    {"threshold": 0.8, "erode": 0, "grow": 2, "min_size": 1, "neighbours": 26, "fill_holes": True},
]


@pytest.fixture(scope="module")
def neurons(tmp_path_factory):
    """A part of the fly's medulla, and a network that has seen some of it for seconds."""
    folder = tmp_path_factory.mktemp("fib25")
    image = tifffile.imread(DATA / "fib25" / "image.tif")[:64, :112, :104]
    bodies = tifffile.imread(DATA / "fib25" / "bodies.tif")[:64, :112, :104]
    url = write_annotated(str(folder / "a.zarr"), image, bodies.astype(np.uint32), "zyx")
    config = TrainConfig(
        images=(url,),
        labels="cells",
        task="instances",
        dims=3,
        net={"depth": 1, "width": 6},
        patch=(32, 32, 32),
        steps=40,
        val_every=40,
        precision="fp32",
        optim={"lr": 0.005, "warmup_steps": 5},
        augment={"probability": 0.0},
    )
    result = train(config, str(folder / "run"), executor="serial")
    assert result.best_score > 0.5, "the network has not learned"
    return url, str(folder / "run" / "model.safetensors")


@pytest.mark.parametrize("rule", RULES)
def test_real_objects_are_those_of_the_whole_array_whatever_the_blocks(neurons, rule, tmp_path):
    image, model = neurons
    options = {"output": None, "rule": RuleOptions(**rule), "tile": (16, 16, 16)}

    def run(name, **more):
        out = tmp_path / f"{name}.zarr"
        config = config_of(image, model, out, **options, **more)
        how = segment_on_ray if more.get("executor") == "ray" else segment_serially
        return how(config, NullProgress()), labels_at(out)

    kept, whole = run("whole", block=(64, 112, 112), keep_probabilities=True)
    probabilities = open_volume(str(tmp_path / "whole.zarr" / "probabilities"))
    region = Region.of_shape(probabilities.shape)
    applied = kept.plan.instances.rule
    codes = codes_of(probabilities.read(region, range(3)), applied)
    truth, n = segment_codes(codes, applied, Steps((1.0, 1.0, 1.0)), dims=3)
    assert kept.n_objects == n > 20
    np.testing.assert_array_equal(whole, truth)
    for number, block in enumerate([(32, 32, 48), (16, 112, 64)]):
        np.testing.assert_array_equal(run(f"blocks-{number}", block=block)[1], truth)
    with connect("local", n_cpus=2):
        found = run("ray", block=(32, 64, 64), executor="ray", workers=2)[1]
    np.testing.assert_array_equal(found, truth)
