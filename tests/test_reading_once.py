"""Neighbouring blocks share what was decoded: the store is read nearly once, as the plan says."""

import os

import numpy as np
import pytest
import ray
from counting import counted
from helpers import RESOURCES, config_of, noise, write_image, write_model

from bigseg import predict_stage
from bigseg.cluster import connect
from bigseg.config import UNetSpec
from bigseg.forecast import make_forecast
from bigseg.infer_actor import RayExecutor
from bigseg.ledger import Ledger
from bigseg.machine import Workers
from bigseg.places import SerialExecutor
from bigseg.plan import PREDICT
from bigseg.planner import make_plan
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially

SPEC = UNetSpec.build(3, out_channels=2, depth=2, width=2)
SHAPE = (72, 120, 96)
# The halo is 20 voxels: without a cache each byte would be read about eight times.
OPTIONS = {"tile": (24, 24, 24), "output": "labels"}


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


def stored_bytes(folder):
    return sum(
        os.path.getsize(os.path.join(place, file))
        for place, _, files in os.walk(folder)
        for file in files
        if file != "zarr.json"
    )


@pytest.mark.parametrize(
    "layout",
    [{"chunks": (16, 16, 16)}, {"chunks": (8, 16, 16), "shards": (24, 48, 48)}],
    ids=["chunks", "shards"],
)
def test_one_worker_fetches_the_volume_about_once(tmp_path, model, layout, monkeypatch):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), **layout)
    plan, _ = prepare(config_of(image, model, tmp_path / "out.zarr", **OPTIONS), RESOURCES)
    counting = []

    def open_counted(url, **options):
        volume = open_volume(url, **options)
        if url != image:
            return volume
        volume, store = counted(volume)
        counting.append(store)
        return volume

    open_volume = predict_stage.open_volume
    monkeypatch.setattr(predict_stage, "open_volume", open_counted)
    with SerialExecutor(plan, 1) as executor:
        reports = list(executor.run(PREDICT, np.ones(len(plan.grid), np.bool_)))
    assert len(reports) == len(plan.grid) > 50
    [store] = counting
    assert 0 < store.n_bytes <= 1.15 * stored_bytes(tmp_path / "image.zarr")
    fetched = sum(report.spent.bytes_fetched for report in reports)
    assert fetched == make_forecast(plan, n_workers=1).fetched_bytes == np.prod(SHAPE)


def test_a_beam_that_must_be_narrow_fetches_what_the_plan_says(tmp_path, model):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(16, 16, 16))
    plan, _ = prepare(config_of(image, model, tmp_path / "out.zarr", **OPTIONS), RESOURCES)
    narrow = plan.model_copy(update={"beam": (2, 1), "cache_bytes": 300_000})
    with SerialExecutor(narrow, 1) as executor:
        reports = list(executor.run(PREDICT, np.ones(len(plan.grid), np.bool_)))
    fetched = sum(report.spent.bytes_fetched for report in reports)
    assert fetched == make_forecast(narrow, n_workers=1).fetched_bytes
    assert fetched > 1.2 * np.prod(SHAPE)


def test_several_workers_fetch_what_the_plan_says(tmp_path, model):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(16, 16, 16))
    plan, _ = prepare(config_of(image, model, tmp_path / "out.zarr", **OPTIONS), RESOURCES)
    with connect("local", n_cpus=2), RayExecutor(plan, Workers(2, 1)) as executor:
        # One that starts late leaves a part of its blocks to the other, which fetches less.
        executor._pool = [executor._start(PREDICT) for _ in range(2)]
        ray.wait([member.starting for member in executor._pool], num_returns=2)
        reports = list(executor.run(PREDICT, np.ones(len(plan.grid), np.bool_)))
    fetched = sum(report.spent.bytes_fetched for report in reports if report.spent)
    predicted = make_forecast(plan, n_workers=2).fetched_bytes
    assert fetched == pytest.approx(predicted, rel=0.05)
    assert predicted > np.prod(SHAPE)


def test_what_was_spent_stands_in_the_record_beside_what_was_predicted(tmp_path, model):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(16, 16, 16))
    out = tmp_path / "out.zarr"
    result = segment_serially(config_of(image, model, out, **OPTIONS), NullProgress())
    record = Ledger.open(f"{out}/ledger").record
    spent, predicted = record["spent"][PREDICT], record["predicted"]
    assert spent["bytes_fetched"] == predicted["fetched_bytes"]
    assert spent["bytes_written"] == predicted["written_bytes"] == np.prod(SHAPE)
    assert 0 < spent["busy_s"] < spent["wall_s"] <= record["seconds"]
    assert predicted["n_blocks"] == len(result.plan.grid) == record["blocks"]


def test_a_plan_does_not_depend_on_who_carries_it_out(tmp_path, model):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(16, 16, 16))
    one = make_plan(config_of(image, model, "out.zarr", workers=1), RESOURCES)
    two = make_plan(config_of(image, model, "out.zarr", workers=2), RESOURCES)
    assert one == two
