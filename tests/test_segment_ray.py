"""Ray gives the bytes of the serial executor, and loses nothing when a worker is killed."""

import dataclasses
import os
import signal
import time

import numpy as np
import pytest
import ray
from helpers import config_of, noise, write_image, write_model

from bigseg import infer_actor, on_ray
from bigseg.cluster import connect
from bigseg.config import UNetSpec
from bigseg.progress import NullProgress
from bigseg.reports import Spent
from bigseg.segment import segment_serially
from bigseg.volume import open_volume


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with connect("local", n_cpus=2):
        yield


CASES = {
    "3-D, anisotropic, sharded, float32": (
        UNetSpec.build(3, out_channels=3, depth=1, width=4, voxel_um=(4.0, 1.0, 1.0)),
        (9, 50, 41),
        {"chunks": (3, 16, 16), "shards": (9, 32, 32)},
        {"prob_dtype": "float32", "tile": (4, 16, 16), "block": (4, 16, 16)},
    ),
    "2-D, labels with a pyramid": (
        UNetSpec.build(2, out_channels=3, depth=2, width=4),
        (5, 70, 66),
        {"chunks": (1, 32, 32), "n_levels": 3},
        {"output": "labels", "tile": (32, 32)},
    ),
    "3-D, uint8, a region, OpenVINO": (
        UNetSpec.build(3, out_channels=2, depth=1, width=4),
        (20, 33, 47),
        {"chunks": (8, 16, 16)},
        {"tile": (8, 16, 16), "region": "3:17,:,10:40", "engine": "openvino"},
    ),
}


def levels_of(url):
    volume = open_volume(url)
    return [volume.at(i).array[:] for i in range(volume.n_levels)]


@pytest.mark.parametrize("case", CASES)
def test_one_and_two_actors_give_the_bytes_of_the_serial_executor(case, tmp_path):
    spec, shape, layout, options = CASES[case]
    image = write_image(tmp_path / "image.zarr", noise(shape), **layout)
    _, model = write_model(tmp_path / "model.safetensors", spec)
    results = {}
    for name in ("serial", "one", "two"):
        out = tmp_path / f"{name}.zarr"
        if name == "serial":
            result = segment_serially(config_of(image, model, out, **options), NullProgress())
        else:
            workers = {"one": 1, "two": 2}[name]
            config = config_of(image, model, out, executor="ray", workers=workers, **options)
            result = on_ray.segment_on_ray(config, NullProgress())
        assert result.is_complete
        assert len(result.plan.grid) > 3
        results[name] = levels_of(str(out))
    for name in ("one", "two"):
        for found, truth in zip(results[name], results["serial"], strict=True):
            np.testing.assert_array_equal(found, truth)


def test_all_workers_killed_at_once_are_replaced_and_nothing_is_lost(tmp_path, monkeypatch):
    spec, shape, layout, options = CASES["2-D, labels with a pyramid"]
    image = write_image(tmp_path / "image.zarr", noise(shape), **layout)
    _, model = write_model(tmp_path / "model.safetensors", spec)
    truth = tmp_path / "truth.zarr"
    segment_serially(config_of(image, model, truth, **options), NullProgress())

    class Murderous(infer_actor.SegmentActor):
        """Kills the other worker and itself, once, in the middle of a lease."""

        def prepare(self, stage):
            (tmp_path / f"pid-{os.getpid()}").touch()
            super().prepare(stage)

        def run(self, stage, blocks):
            if (tmp_path / "died").exists():
                # Whoever comes first must leave the other one something to do.
                wait_for(4)
            elif 6 in blocks:
                (tmp_path / "died").touch()
                wait_for(2)
                for path in sorted(
                    tmp_path.glob("pid-*"), key=lambda p: str(os.getpid()) in p.name
                ):
                    os.kill(int(path.name[4:]), signal.SIGKILL)
            return super().run(stage, blocks)

    def wait_for(n_workers):
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("pid-*"))) < n_workers:
            assert time.monotonic() < deadline, f"fewer than {n_workers} workers came in 60 s"
            time.sleep(0.01)

    monkeypatch.setattr(infer_actor, "SegmentActor", Murderous)
    out = tmp_path / "out.zarr"
    config = config_of(image, model, out, executor="ray", workers=2, **options)
    result = on_ray.segment_on_ray(config, NullProgress())
    assert (tmp_path / "died").exists()
    assert len(list(tmp_path.glob("pid-*"))) == 4
    assert result.is_complete
    for found, expected in zip(levels_of(str(out)), levels_of(str(truth)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_block_that_always_kills_its_worker_is_set_aside_alone(tmp_path, monkeypatch):
    spec, shape, layout, options = CASES["2-D, labels with a pyramid"]
    image = write_image(tmp_path / "image.zarr", noise(shape), **layout)
    _, model = write_model(tmp_path / "model.safetensors", spec)

    class Poisoned(infer_actor.SegmentActor):
        def run(self, stage, blocks):
            if 5 in blocks:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(stage, blocks)

    monkeypatch.setattr(infer_actor, "SegmentActor", Poisoned)
    config = config_of(image, model, tmp_path / "o.zarr", executor="ray", workers=2, **options)
    result = on_ray.segment_on_ray(config, NullProgress())
    assert [report.block for report in result.failed] == [5]
    assert "its worker died" in result.failed[0].error
    monkeypatch.undo()
    again = on_ray.segment_on_ray(config, NullProgress())
    assert again.is_complete
    assert again.n_done_before == len(again.plan.grid) - 1


def test_no_voxel_passes_through_the_driver():
    """What crosses Ray is block numbers and checksums: the reports have no arrays."""
    fields = infer_actor.BlockReport.__dataclass_fields__
    assert set(fields) == {"block", "checksum", "error", "details", "kind", "filled", "spent"}
    assert {f.type for f in dataclasses.fields(Spent)} == {"int", "float"}
    assert ray.is_initialized()
