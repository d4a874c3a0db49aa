"""Objects come out the same from Ray's workers, however many there are and whichever die."""

import contextlib
import os
import signal

import numpy as np
import pytest
import ray
from helpers import Recorder, config_of, write_image
from planting import planted_shapes, write_planting_model

from bigseg import infer_actor, on_ray
from bigseg.cluster import connect
from bigseg.progress import NullProgress
from bigseg.rules import RuleOptions
from bigseg.segment import segment_serially
from bigseg.volume import open_volume

OPTIONS = {
    "tile": (8, 8, 8),
    "block": (8, 16, 24),
    "output": None,
    "rule": RuleOptions(erode=1, grow=3, fill_holes=True),
}


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with connect("local", n_cpus=2):
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    image = write_image(folder / "image.zarr", planted_shapes(), chunks=(8, 16, 16), n_levels=2)
    model = write_planting_model(folder / "model.safetensors")
    out = folder / "truth.zarr"
    segment_serially(config_of(image, model, out, **OPTIONS), NullProgress())
    return image, model, contents(out)


def contents(url):
    """Labels of all levels, and the table."""
    volume = open_volume(str(url))
    levels = [volume.at(i).array[:] for i in range(volume.n_levels)]
    return [*levels, np.frombuffer((url / "objects.parquet").read_bytes(), np.uint8)]


def assert_equal(found, truth):
    assert [a.dtype for a in found] == [a.dtype for a in truth]
    for a, b in zip(found, truth, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_give_the_bytes_of_the_serial_executor(planted, n_workers, tmp_path):
    image, model, truth = planted
    out = tmp_path / "out.zarr"
    config = config_of(image, model, out, executor="ray", workers=n_workers, **OPTIONS)
    result = on_ray.segment_on_ray(config, NullProgress())
    assert result.is_complete
    assert_equal(contents(out), truth)


@pytest.mark.parametrize("stage", ["seeds", "grow", "fill"])
def test_workers_that_are_killed_in_a_stage_are_replaced(planted, stage, tmp_path, monkeypatch):
    image, model, truth = planted
    out = tmp_path / "out.zarr"
    started = []
    start = infer_actor.RayExecutor._start

    def noting(self, of_stage):
        member = start(self, of_stage)
        started.append(member.actor)
        return member

    monkeypatch.setattr(infer_actor.RayExecutor, "_start", noting)
    killed = []

    class Killer(Recorder):
        @contextlib.contextmanager
        def task(self, label, **about):
            if label == stage and not killed:
                for actor in started:
                    pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            with super().task(label, **about) as task:
                yield task

    config = config_of(image, model, out, executor="ray", workers=2, **OPTIONS)
    result = on_ray.segment_on_ray(config, Killer())
    assert len(killed) == 2
    assert result.is_complete
    assert_equal(contents(out), truth)
