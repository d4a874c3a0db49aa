"""What a plan says that it will cost is what it costs."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import RESOURCES, config_of, noise, write_image, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import cli, predictor
from bigseg.blocks import tiles_of
from bigseg.config import UNetSpec
from bigseg.errors import UsageError
from bigseg.forecast import count_tiles, make_forecast
from bigseg.model import footprint
from bigseg.places import SerialExecutor
from bigseg.plan import PREDICT
from bigseg.planner import make_plan
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially

SPEC = UNetSpec.build(3, out_channels=2, depth=2, width=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    image = write_image(folder / "image.zarr", noise((20, 70, 50)), chunks=(8, 32, 32))
    return image, write_model(folder / "model.safetensors", SPEC)[1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_are_counted_as_they_are_computed(place, data):
    plan = make_plan(config_of(*place, "out.zarr"), RESOURCES)
    sides = [data.draw(st.sampled_from([4, 8, 12])) for _ in range(3)]
    tile = (1, *sides)
    core = (1, *(s * data.draw(st.integers(1, 3)) for s in sides))
    start = [data.draw(st.integers(0, n - 1)) for n in (20, 70, 50)]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, (20, 70, 50), strict=True)]
    changed = {"region_start": (0, *start), "region_stop": (1, *stop), "tile": tile, "core": core}
    plan = plan.model_copy(update=changed)
    cores = [block.core.intersect(plan.region) for block in plan.grid]
    assert count_tiles(plan) == sum(len(list(tiles_of(c, tile))) for c in cores)
    assert count_tiles(plan, cores[0]) == len(list(tiles_of(cores[0], tile)))


@pytest.mark.parametrize("options", [{}, {"region": "3:18,:,7:50"}, {"block": (12, 24, 24)}])
def test_computed_operations_are_those_of_the_forward_passes(place, tmp_path, monkeypatch, options):
    computed = []
    build = predictor.build_engine

    def counting(*arguments, **given):
        forward = build(*arguments, **given)
        halo = footprint(SPEC).halo

        def counted(batch):
            output = [n - 2 * h for n, h in zip(batch.shape[2:], halo, strict=True)]
            computed.append(len(batch) * footprint(SPEC).flops(output))
            return forward(batch)

        return counted

    monkeypatch.setattr(predictor, "build_engine", counting)
    config = config_of(*place, tmp_path / "out.zarr", tile=(12, 12, 12), **options)
    result = segment_serially(config, NullProgress())
    forecast = make_forecast(result.plan, n_workers=1)
    assert forecast.computed_flops == sum(computed)
    assert forecast.n_tiles == len(computed)
    assert forecast.useful_share < 1


def test_useful_operations_are_those_of_an_endless_output():
    for spec in (SPEC, UNetSpec.build(2, out_channels=3, depth=3, width=4)):
        mark = footprint(spec)
        output = mark.smallest_output((1 << 15,) * spec.dims)
        share = mark.useful_flops(math.prod(output)) / mark.flops(output)
        assert 0.99 < share < 1


def test_operations_of_many_outputs_are_those_of_each():
    mark = footprint(UNetSpec.build(3, out_channels=2, depth=2, width=4, voxel_um=(3, 1, 1)))
    outputs = [sorted({mark.smallest_output((n,) * 3)[a] for n in (1, 9, 30)}) for a in range(3)]
    table = mark.flops_of_all(outputs)
    for index in np.ndindex(table.shape):
        output = [sizes[i] for sizes, i in zip(outputs, index, strict=True)]
        assert table[index] == mark.flops(output)


def test_more_blocks_than_are_followed_are_extrapolated(tmp_path, monkeypatch):
    image = write_image(tmp_path / "i.zarr", noise((400, 40, 40)), chunks=(16, 16, 16))
    model = write_model(tmp_path / "model.safetensors", SPEC)[1]
    plan = make_plan(config_of(image, model, "out.zarr", tile=(8, 20, 20)), RESOURCES)
    whole = make_forecast(plan, n_workers=2).fetched_bytes
    monkeypatch.setattr("bigseg.forecast.MOST_FOLLOWED", len(plan.grid) // 2)
    assert make_forecast(plan, n_workers=2).fetched_bytes == pytest.approx(whole, rel=0.1)


def call(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


def test_plan_prints_the_cost_and_writes_nothing(place, tmp_path):
    image, model = place
    words = ["plan", image, "--model", model, "--out", tmp_path / "o.zarr", "--tile", "8,16,16"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    for word in ("blocks", "compute", "read", "written", "memory", "time"):
        assert f"\n{word}" in result.stdout
    values = json.loads(call(*words, "--json").stdout)
    assert values["n_blocks"] == 3 * 5 * 4
    assert values["fetched_bytes"] >= values["volume_bytes"] == 20 * 70 * 50
    assert values["seconds"] > 0
    assert not (tmp_path / "o.zarr").exists()


def test_plan_of_a_begun_result_is_what_was_begun(place, tmp_path):
    image, model = place
    config = config_of(image, model, tmp_path / "o.zarr", tile=(8, 16, 16), engine="auto")
    plan, _ = prepare(config, RESOURCES)
    with SerialExecutor(plan, 1) as executor:
        next(executor.run(PREDICT, np.ones(len(plan.grid), np.bool_)))
    words = ["plan", image, "--model", model, "--out", tmp_path / "o.zarr"]
    words += ["--output", "probabilities", "--precision", "fp32", "--json"]
    assert json.loads(call(*words).stdout)["n_blocks"] == len(plan.grid)


def test_too_little_memory_is_refused_with_what_is_needed(place, tmp_path):
    image, model = place
    words = ["plan", image, "--model", model, "--out", tmp_path / "o.zarr"]
    result = call(*words, "--memory", "100MiB")
    assert result.exit_code == 2
    assert re.search(r"a worker with tiles of 4,4,4 voxels needs 64\d MiB", result.stderr)
    result = call(*words, "--memory", "much")
    assert result.exit_code == 2
    assert "'much' is no size of memory: write it as 6GiB or 500MiB" in result.stderr


def test_bench_measures_and_leaves_nothing(place, tmp_path):
    image, model = place
    out = tmp_path / "bench.zarr"
    words = ["bench", image, "--model", model, "--out", out, "--executor", "serial"]
    words += ["--tile", "8,16,16", "--blocks", "4", "--engine", "torch"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    for word in ("engine", "taken      torch", "raw", "segmented  4 blocks, 4 tiles", "kept"):
        assert word in result.stdout
    assert not out.exists()
    values = json.loads(call(*words, "--json").stdout)
    assert 2 * 8 * 16 * 16 < values["n_voxels"] <= 4 * 8 * 16 * 16
    assert values["efficiency"] > 0


def test_bench_of_empty_space_says_so(place, tmp_path):
    image, model = place
    words = ["bench", image, "--model", model, "--out", tmp_path / "b.zarr", "--tile", "8,16,16"]
    result = call(*words, "--executor", "serial", "--engine", "torch", "--skip-below", "1e9")
    assert result.exit_code == 3
    assert "all blocks that were tried are empty space" in result.stderr


def test_plan_of_other_settings_than_were_begun_is_refused(place, tmp_path):
    image, model = place
    config = config_of(image, model, tmp_path / "o.zarr", tile=(8, 16, 16), output="labels")
    prepare(config, RESOURCES)
    words = ["plan", image, "--model", model, "--out", tmp_path / "o.zarr", "--engine", "torch"]
    assert call(*words, "--precision", "fp32").exit_code == 0
    result = call(*words, "--precision", "fp32", "--region", "0:8,:,:")
    assert result.exit_code == 2
    assert "was made with other settings (region_stop" in result.stderr


def test_a_result_that_was_begun_goes_on_with_the_memory_of_others(place, tmp_path):
    image, model = place
    config = config_of(image, model, tmp_path / "o.zarr", output="labels")
    rich = dataclasses.replace(RESOURCES, memory_bytes=200 << 30)
    begun, _ = prepare(config, rich)
    plan, _ = prepare(config, RESOURCES)
    assert (plan.tile, plan.core, plan.beam) == (begun.tile, begun.core, begun.beam)
    assert plan.memory_bytes == RESOURCES.memory_bytes
    assert plan.cache_bytes <= begun.cache_bytes
    gpu = dataclasses.replace(RESOURCES, device="cuda", device_bytes=80 << 30)
    with pytest.raises(UsageError, match="was begun on processors, here are GPUs: go on where it"):
        prepare(config, gpu)


def test_a_tile_beyond_32_bit_sizes_is_refused(place):
    config = config_of(*place, "o.zarr", tile=(2048, 2048, 2048))
    with pytest.raises(UsageError, match="larger than 2\\^31 values"):
        make_plan(config, RESOURCES)
