"""A plan decides everything, refuses what cannot be, and costs little for a huge volume."""

import math
import time
import tracemalloc

import pytest
import zarr
from helpers import RESOURCES, assert_writable, config_of, noise, write_image, write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr_images import metadata

from bigseg import plan as room
from bigseg import planner
from bigseg.blocks import Region
from bigseg.config import NormConstants, NormRule, UNetSpec
from bigseg.engine import EngineSpec
from bigseg.errors import InputError, UsageError
from bigseg.model import footprint
from bigseg.plan import Plan, stage_grids
from bigseg.planner import make_plan
from bigseg.segment import prepare
from bigseg.volume import open_volume

TWO_D = UNetSpec.build(2, out_channels=2, depth=2, width=2)
THREE_D = UNetSpec.build(3, out_channels=3, depth=1, width=2)
WIDE_3D = UNetSpec.build(3, out_channels=2, depth=3, width=16)
WIDE_2D = UNetSpec.build(2, out_channels=2, depth=4, width=32)


def empty_image(path, shape, *, dims="zyx", chunks=None, scales=None, version="0.5", **options):
    """An image of any size that takes no space: no chunk is written."""
    zarr_format = 2 if version == "0.4" else 3
    attributes = metadata(version, dims, scales or [(1.0,) * len(dims)], **options)
    group = zarr.create_group(path, zarr_format=zarr_format, attributes=attributes)
    for level, scale in enumerate(scales or [(1.0,) * len(dims)]):
        sides = tuple(max(1, round(n / s)) for n, s in zip(shape, scale, strict=True))
        sides = sides if scales and scales[0] == (1.0,) * len(dims) else shape
        names = {} if version == "0.4" else {"dimension_names": list(dims)}
        if version == "0.4":
            names["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        fitting = tuple(min(n, c) for n, c in zip(sides, chunks or sides, strict=True))
        group.create_array(str(level), shape=sides, chunks=fitting, dtype="uint8", **names)
    return str(path)


def plan_of(image, model, out="out.zarr", **options):
    return make_plan(config_of(image, model, out, **options), RESOURCES)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", THREE_D)[1]


@pytest.fixture
def image(tmp_path):
    return write_image(
        tmp_path / "image.zarr", noise((2, 20, 50, 60)), chunks=(1, 8, 16, 16), dims="czyx"
    )


# Geometry


@st.composite
def layouts(draw):
    dims = draw(st.sampled_from([2, 3]))
    spec = TWO_D if dims == 2 else THREE_D
    stride = footprint(spec).stride
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 90)), draw(st.integers(1, 90)))
    tile = tuple(s * draw(st.integers(1, 12)) for s in stride)
    if dims == 2:
        tile = draw(st.sampled_from([tile, (draw(st.integers(1, 8)), *tile)]))
    tile = draw(st.none() | st.just(tile))
    block = draw(st.none() | st.tuples(*[st.integers(1, 90)] * 3))
    region = [sorted(draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    return spec, shape, tile, block, ",".join(f"{a}:{b}" for a, b in region)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(layouts(), st.sampled_from([1, 4096]), st.sampled_from(["labels", "probabilities"]))
def test_cores_are_whole_tiles_and_whole_write_units_of_every_level(
    tmp_path_factory, monkeypatch, layout, many_chunks, kind
):
    spec, shape, tile, block, region = layout
    # With few chunks allowed the output is sharded; small blocks make several of them.
    monkeypatch.setattr(planner, "MANY_CHUNKS", many_chunks)
    monkeypatch.setattr(room, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(planner, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(planner, "CHUNK_SIDE", {2: 16, 3: 8})
    folder = tmp_path_factory.mktemp("plan")
    scales = [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (2.0, 4.0, 4.0)]
    image = empty_image(folder / "i.zarr", shape, scales=scales)
    _, model = write_model(folder / "m.safetensors", spec)
    config = config_of(
        image, model, folder / "o.zarr", tile=tile, block=block, region=region, output=kind
    )
    plan, _ = prepare(config, RESOURCES)
    grids = stage_grids(plan)
    output = open_volume(plan.output.url)
    for level, grid in enumerate(grids.values()):
        assert_writable(grid, output.at(level))
    for block in plan.grid:
        for a, b, t, n in zip(
            block.core.start, block.core.stop, plan.tile, output.shape, strict=True
        ):
            assert a % t == 0
            assert b % t == 0 or b == n
    inside = [block.core.intersect(plan.region) for block in plan.grid]
    assert sum(r.n_voxels for r in inside) == plan.region.n_voxels
    assert all(r.n_voxels for r in inside)


@pytest.mark.parametrize("many_chunks", [1, 4096])
@pytest.mark.parametrize("spec", [WIDE_2D, WIDE_3D])
@pytest.mark.parametrize(
    "shape", [(131, 700, 1301), (1, 3000, 3000), (997, 997, 997), (20_000, 17, 33)]
)
def test_no_chunk_is_tiny_and_no_block_is_huge(spec, shape, many_chunks, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "MANY_CHUNKS", many_chunks)
    image = empty_image(tmp_path / "i.zarr", shape)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    plan = plan_of(image, model, output="labels", out=str(tmp_path / "o.zarr"))
    wanted = planner.CHUNK_SIDE[spec.dims]
    for n, c, t in zip(shape, plan.output.chunk[1:], plan.tile[1:], strict=True):
        assert c >= min(n, t, wanted / 2)
        assert c <= 1.5 * wanted
    assert math.prod(plan.core) <= max(room.BLOCK_BYTES, 8 * math.prod(plan.tile))


def test_the_tile_does_not_depend_on_the_region_or_the_block(image, model):
    whole = plan_of(image, model)
    part = plan_of(image, model, region="3:9,10:40,5:6", block=(1, 1, 1))
    assert part.tile == whole.tile
    assert part.region == Region((0, 3, 10, 5), (1, 9, 40, 6))


@pytest.mark.parametrize("spec", [WIDE_2D, WIDE_3D])
def test_a_huge_volume_is_planned_in_no_time_and_memory(spec, tmp_path):
    image = empty_image(tmp_path / "huge.zarr", (20_000,) * 3, chunks=(64,) * 3)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    make_plan(config_of(image, model, tmp_path / "o.zarr"), RESOURCES)
    tracemalloc.start()
    started = time.process_time()
    config = config_of(image, model, tmp_path / "o.zarr", output="labels")
    plan, ledger = prepare(config, RESOURCES)
    n_blocks = sum(map(len, stage_grids(plan).values()))
    assert ledger.pending("predict").all()
    seconds = time.process_time() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_blocks > 10_000
    assert seconds < 4
    assert peak < 100e6  # of which 62 MB are the model file


# Choices


def scaled(tmp_path, scales, **options):
    return empty_image(tmp_path / "s.zarr", (32, 64, 64), scales=scales, **options)


def test_the_level_nearest_the_models_voxels_is_taken(tmp_path):
    image = scaled(tmp_path, [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (2.0, 4.0, 4.0)])
    for voxel_um, level in [((1.0, 1.2, 1.2), 0), ((1.0, 1.9, 1.9), 1), ((2.5, 4.0, 3.0), 2)]:
        _, model = write_model(tmp_path / "m.safetensors", THREE_D, voxel_um=voxel_um)
        plan = plan_of(image, model)
        assert plan.source.level == level
    # A plane's voxels are compared with the last axes.
    _, model = write_model(tmp_path / "m.safetensors", TWO_D, voxel_um=(2.0, 2.0))
    assert plan_of(image, model).source.level == 1


def test_a_voxel_size_beyond_a_factor_one_and_a_half_is_refused_unless_told(tmp_path):
    image = scaled(tmp_path, [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0)])
    _, model = write_model(tmp_path / "m.safetensors", THREE_D, voxel_um=(1.0, 3.1, 3.1))
    with pytest.raises(InputError) as caught:
        plan_of(image, model)
    for part in ("within a factor 1.5 of the model's 1×3.1×3.1 µm", "level 1: 1×2×2 µm", "--level"):
        assert part in str(caught.value)
    assert plan_of(image, model, level=1).source.level == 1


def test_a_3d_model_on_a_2d_image_is_refused(tmp_path, model):
    image = write_image(tmp_path / "p.zarr", noise((30, 40)), chunks=(16, 16), dims="yx")
    with pytest.raises(InputError) as caught:
        plan_of(image, model)
    assert "is a 2-D image (yx)" in str(caught.value)
    assert "a 3-D model: train a 2-D model (bigseg train --dims 2)" in str(caught.value)
    _, flat = write_model(tmp_path / "m2.safetensors", TWO_D)
    plan = plan_of(image, flat, region="2:10,5:40")
    assert plan.region == Region((0, 0, 2, 5), (1, 1, 10, 40))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"channels": (0, 1)}, InputError, "reads 1 channels, --channel names 2"),
        ({"channels": (2,)}, InputError, "channel 2 is not in"),
        ({"time": 1}, UsageError, "--time 1: the image has 1 time points, 0 to 0"),
        ({"level": 1}, InputError, "has no level 1; it has 0"),
        ({"region": "0:5,0:5"}, UsageError, "has 2 axes, the volume has 3 (zyx)"),
        ({"tile": (3, 8, 8)}, UsageError, "must be multiples of its stride (2, 2, 2)"),
        ({"tile": (8,)}, UsageError, "--tile 8: give z,y,x or y,x in voxels"),
        ({"tile": (0, 8, 8)}, UsageError, "--tile 0,8,8: give z,y,x or y,x in voxels"),
        ({"block": (8, 8, 8, 8)}, UsageError, "--block 8,8,8,8: give z,y,x or y,x in voxels"),
        ({"norm": "model"}, InputError, "holds no constants of its training volume"),
        ({"out": None}, UsageError, "--output probabilities makes an image of its own"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(image, model, options, error, sentence):
    with pytest.raises(error) as caught:
        plan_of(image, model, **{"out": "out.zarr", **options})
    assert sentence in str(caught.value)


def test_labels_of_a_coarser_level_need_a_place_of_their_own(tmp_path, model):
    image = scaled(tmp_path, [(1.0, 1.0, 1.0), (1.0, 2.0, 2.0)])
    with pytest.raises(UsageError, match=r"level 1 .* is segmented \(--level\).*with --out"):
        plan_of(image, model, out=None, output="labels", level=1)
    _, fitting = write_model(tmp_path / "f.safetensors", THREE_D, voxel_um=(1.0, 2.0, 2.0))
    with pytest.raises(UsageError, match=r"level 1 .* is segmented \(nearest to the model's"):
        plan_of(image, fitting, out=None, output="labels")
    beside = plan_of(image, model, out=None, output="labels", level=0)
    assert beside.output.url == f"{image}/labels/bigseg"
    assert beside.output.beside
    own = plan_of(image, model, out="o.zarr", output="labels", level=1)
    assert not own.output.beside


@pytest.mark.parametrize("up", [0, 1])
def test_an_output_that_holds_the_image_is_refused(image, model, up):
    out = image if not up else image.rpartition("/")[0]
    with pytest.raises(UsageError, match="holds the image itself: say another place"):
        plan_of(image, model, out=out)


def test_constants_are_the_volumes_or_the_models(tmp_path, image):
    training = NormConstants(offset=(11.0,), scale=(22.0,), level=0, n_voxels=5)
    rule = NormRule(kind="meanstd")
    path = tmp_path / "m.safetensors"
    _, model = write_model(path, THREE_D, norm=rule, norm_constants=training)
    assert plan_of(image, model, norm="model").constants == training
    measured = plan_of(image, model, channels=(1,)).constants
    data = open_volume(image).array[1].astype(float)
    assert measured.offset[0] == pytest.approx(data.mean())
    assert measured.scale[0] == pytest.approx(data.std())


# Fingerprint


def test_the_fingerprint_changes_with_what_decides_the_bytes(tmp_path, image, model):
    _, other = write_model(tmp_path / "other.safetensors", THREE_D, seed=1)
    constants = NormConstants(offset=(1.0,), scale=(2.0,))
    _, constant = write_model(tmp_path / "c.safetensors", THREE_D, norm_constants=constants)
    base = plan_of(image, model)
    changes = [
        {"model": other},
        {"model": constant, "norm": "model"},
        {"region": "0:10,:,:"},
        {"tile": (8, 8, 8)},
        {"block": (20, 60, 60)},
        {"channels": (1,)},
        {"output": "labels"},
        {"prob_dtype": "float32"},
        {"engine": "openvino"},
        {"precision": "bf16"},
        {"out": "other.zarr"},
    ]
    plans = [base]
    for change in changes:
        options = {"out": "out.zarr", "model": model, "tile": (4, 8, 8), **change}
        plans.append(plan_of(image, options.pop("model"), **options))
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_the_fingerprint_does_not_change_with_how_it_is_carried_out(image, model):
    base = plan_of(image, model)
    same = plan_of(
        image, model, workers=7, executor="ray", address="ray://x:1", overwrite=True, time=0
    )
    assert same.fingerprint == base.fingerprint
    assert base.differences(same) == []


def test_another_source_at_the_same_place_is_noticed(tmp_path, image, model):
    base = plan_of(image, model)
    array = zarr.open_group(image, mode="r+")["0"]
    # What viewers note down does not matter, what the voxels are stored as does.
    array.attrs["viewed"] = True
    assert plan_of(image, model).fingerprint == base.fingerprint
    again = write_image(
        tmp_path / "2.zarr", noise((2, 20, 50, 60)), chunks=(1, 8, 16, 32), dims="czyx"
    )
    assert plan_of(again, model).source.identity != base.source.identity


def test_a_plan_reads_back_from_what_the_ledger_stores(image, model):
    plan = plan_of(image, model, region="3:9,:,:")
    again = Plan.model_validate(plan.model_dump(mode="json"))
    assert again == plan
    assert again.fingerprint == plan.fingerprint


def test_differences_name_the_settings(image, model):
    here = plan_of(image, model)
    engine = here.engine.model_copy(update={"version": "0.1"})
    assert isinstance(engine, EngineSpec)
    there = here.model_copy(update={"engine": engine, "tile": (1, 8, 8, 8)})
    assert here.differences(there) == [
        f"engine.version: {here.engine.version!r}, not '0.1'",
        f"tile: {list(here.tile)}, not [1, 8, 8, 8]",
    ]


def test_an_axis_within_one_tile_has_one_core_of_that_tile(tmp_path):
    """Chunks of 125 under a tile of 252 once made a core of 31,500 voxels."""
    image = write_image(tmp_path / "image.zarr", noise((150, 250, 250)), chunks=(64, 64, 64))
    spec = UNetSpec.build(3, out_channels=3, depth=2, width=8)
    _, model = write_model(tmp_path / "model.safetensors", spec)
    plan = make_plan(config_of(image, model, tmp_path / "out.zarr"), RESOURCES)
    assert plan.core == plan.tile
