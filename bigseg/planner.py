"""Makes the plan: what the user asked, what the image and the model say, what the workers have.

    image, model ─> level, channels, region ─> tile ─> output ─> core ─> beam ─> Plan

What the user leaves open is chosen so that `Resources.n_workers` workers are soonest done within
their memory. Where a result was begun (`begun`), its choices are kept: another machine goes on
with the same plan.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import store
from bigseg.blocks import (
    Region,
    Vec,
    ceil_div,
    core_shape,
    nearest_divisor,
    parse_region,
    round_up,
)
from bigseg.checkpoint import hash_model, read_card
from bigseg.config import NormConstants
from bigseg.cost import MemoryModel, default_beam, default_tile
from bigseg.empty import identity_of, make_rule
from bigseg.engine import resolve_engine
from bigseg.errors import InputError, UsageError
from bigseg.filling import SourceVolume
from bigseg.instance_plan import kind_of, plan_instances, predicted_type
from bigseg.ledger import MAX_BLOCKS
from bigseg.plan import BLOCK_BYTES, HOW, SMALLEST, ModelPlan, OutputPlan, Plan, SourcePlan, grow_to
from bigseg.predict import tile_geometry
from bigseg.statistics import norm_constants
from bigseg.transform import TransformedVolume, describe
from bigseg.units import format_bytes
from bigseg.volume import Volume, nearest_level, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.config import ModelCard, SegmentConfig
    from bigseg.engine import EngineSpec
    from bigseg.machine import Resources
    from bigseg.transform import Transform, TransformPlan

CHUNK_SIDE = {2: 512, 3: 128}
MANY_CHUNKS = 4096
PLANES_AT_ONCE = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True)
class _Asked:
    """What does not change while the plan is made."""

    config: SegmentConfig
    card: ModelCard
    resources: Resources
    begun: Plan | None


def make_plan(
    config: SegmentConfig,
    resources: Resources,
    *,
    transform: Transform | None = None,
    begun: Plan | None = None,
) -> Plan:
    """The plan for what the user asked, on such workers.

    Raises:
        UsageError: options that contradict each other, the image, or the memory.
        InputError: the image or the model cannot be used, or do not fit each other.
    """
    asked = _Asked(config, read_card(config.model), _with_memory(config, resources), begun)
    source = _choose_source(config, asked.card)
    channels = _choose_channels(asked, source, transform)
    region = _choose_region(config, source)
    engine = _choose_engine(asked)
    memory = _memory_model(asked, engine, source, channels)
    tile = _choose_tile(asked, memory, source)
    output = _choose_output(asked, source, tile)
    core = _choose_core(asked, source, tile, output.write_unit)
    plan = Plan(
        source=SourcePlan(
            url=source.url,
            level=source.level,
            shape=source.shape,
            dtype=str(source.dtype),
            channels=channels,
            identity=identity_of(source),
        ),
        model=ModelPlan(url=config.model, sha256=hash_model(config.model)),
        engine=engine,
        engine_reason="" if config.engine == "auto" else "as asked",
        norm=config.norm,
        constants=NormConstants(offset=(0.0,), scale=(1.0,)),
        transform=_describe(asked, source, channels, transform),
        empty=make_rule(
            source,
            mask=config.mask,
            skip_below=config.skip_below,
            skip_level=config.skip_level,
        ),
        on_bad_chunk=config.on_bad_chunk,
        tile=tile,
        core=core,
        beam=(1, 1),
        memory_bytes=asked.resources.memory_bytes,
        cache_bytes=0,
        region_start=region.start,
        region_stop=region.stop,
        output=output,
        instances=plan_instances(config, asked.card, source, core, begun=begun),
    )
    _check_number(plan)
    order = _choose_order(asked, plan, source, memory)
    constants = _choose_constants(asked, plan, source, transform)
    return plan.model_copy(update={**order, "constants": constants})


def _check_number(plan: Plan) -> None:
    if (n_blocks := math.prod(plan.grid.shape)) > MAX_BLOCKS:
        raise UsageError(
            f"{plan.source.url} would be {n_blocks} blocks, more than {MAX_BLOCKS}: choose a "
            "--region, a coarser --level or a larger --block"
        )


def locate_output(config: SegmentConfig) -> str:
    """Where the output lies: `--out`, else among the labels of the image, which must be there.

    Raises:
        InputError: there is no such image; so nothing is made at a path that was mistyped.
        UsageError: the image itself lies there, or it lies in the image, where only labels go.
        OutputError: it is a link, or behind one inside the image.
    """
    image = open_volume(config.image).url
    url = config.out or store.join(image, "labels", config.name)
    store.check_no_links(url)
    if config.out is None:
        return url
    inner, outer = _real(image), _real(config.out)
    if f"{inner}/".startswith(f"{outer}/"):
        raise UsageError(
            f"--out {config.out} holds the image itself: say another place for the output"
        )
    if f"{outer}/".startswith(f"{inner}/"):
        raise UsageError(
            f"--out {config.out} lies inside the image {image}: say another place for the output, "
            "or leave out --out and give labels beside the image a --name"
        )
    return config.out


def _real(url: str) -> str:
    """The location without links, as far as this machine can tell."""
    return os.path.realpath(url.removeprefix("file://")) if store.is_local(url) else url.rstrip("/")


def _with_memory(config: SegmentConfig, resources: Resources) -> Resources:
    shared = resources.shared_by(config.workers or 1)
    return shared if config.memory is None else replace(shared, memory_bytes=config.memory)


def _choose_source(config: SegmentConfig, card: ModelCard) -> Volume:
    volume = open_volume(config.image)
    if config.level is not None:
        volume = volume.at(config.level)
    elif card.voxel_um is not None:
        volume = volume.at(nearest_level(volume, card.voxel_um))
    if card.spec.dims == 3 and volume.spatial_axes != "zyx":
        raise InputError(
            f"{config.image} is a 2-D image ({volume.spatial_axes}), {config.model} a 3-D model: "
            "train a 2-D model (bigseg train --dims 2), or give a volume with a z axis"
        )
    return SourceVolume.of(volume, config.on_bad_chunk)


def _choose_channels(asked: _Asked, source: Volume, transform: Transform | None) -> tuple[int, ...]:
    config, card = asked.config, asked.card
    channels = config.channels or card.channels
    # A transform may make one channel of two: its result is counted instead.
    if transform is None and len(channels) != card.spec.in_channels:
        raise InputError(
            f"{config.model} reads {card.spec.in_channels} channels, --channel names "
            f"{len(channels)}: name as many as the model has"
        )
    if max(channels) >= source.n_channels:
        names = ", ".join(source.channel_names)
        raise InputError(
            f"channel {max(channels)} is not in {config.image}, which has {source.n_channels} "
            f"({names}): choose with --channel"
        )
    return channels


def _choose_region(config: SegmentConfig, source: Volume) -> Region:
    region = Region.of_shape(source.shape)
    if config.region is not None:
        n = len(source.spatial_axes)
        part = parse_region(config.region, source.shape[-n:])
        region = Region(region.start[:-n] + part.start, region.stop[:-n] + part.stop)
    if config.time is not None:
        if config.time >= source.shape[0]:
            raise UsageError(
                f"--time {config.time}: the image has {source.shape[0]} time points, "
                f"0 to {source.shape[0] - 1}: choose one of those, or leave --time out"
            )
        region = Region((config.time, *region.start[1:]), (config.time + 1, *region.stop[1:]))
    return region


def _choose_engine(asked: _Asked) -> EngineSpec:
    name, precision = asked.config.engine, asked.config.precision
    if asked.begun is not None:
        begun_on, here = asked.begun.engine.device, asked.resources.device
        if begun_on != here:
            kinds = {"cpu": "processors", "cuda": "GPUs"}
            raise UsageError(
                f"{asked.begun.output.url} was begun on {kinds[begun_on]}, here are {kinds[here]}: "
                "go on where it was begun, or start anew with --overwrite"
            )
        name = asked.begun.engine.name if name == "auto" else name
        precision = asked.begun.engine.precision if precision == "auto" else precision
    return resolve_engine(name, precision, device=asked.resources.device)


def _memory_model(
    asked: _Asked, engine: EngineSpec, source: Volume, channels: Sequence[int]
) -> MemoryModel:
    dtype, n_channels = predicted_type(asked.config, asked.card, asked.begun)
    return MemoryModel(
        spec=asked.card.spec,
        device=engine.device,
        value_bytes=4 if engine.precision == "fp32" else 2,
        in_voxel_bytes=len(channels) * source.dtype.itemsize,
        out_voxel_bytes=n_channels * np.dtype(dtype).itemsize,
        memory_bytes=asked.resources.memory_bytes,
        device_bytes=asked.resources.device_bytes,
    )


def _choose_tile(asked: _Asked, memory: MemoryModel, source: Volume) -> Vec:
    config, spec = asked.config, asked.card.spec
    if config.tile is not None:
        tile = _as_4d(config.tile, "--tile", n_planes=1)
    elif asked.begun is not None:
        tile = asked.begun.tile
    else:
        tile = default_tile(
            spec,
            source.shape,
            memory.fits,
            n_planes=PLANES_AT_ONCE[asked.resources.device],
            n_workers=asked.resources.n_workers,
        )
    geometry = tile_geometry(spec, tile)
    if not memory.is_countable(geometry.output):
        raise UsageError(
            f"tiles of {','.join(map(str, tile[1:]))} voxels make the network's tensors larger "
            "than 2^31 values, beyond which kernels are slow or wrong: use a smaller --tile"
        )
    if config.memory is not None and not memory.fits(geometry.output):
        needed = memory.needs(geometry.output) + memory.cache_bytes
        raise UsageError(
            f"--memory {format_bytes(config.memory)}: a worker with tiles of "
            f"{','.join(map(str, tile[1:]))} voxels needs {format_bytes(needed)}: give more memory"
            + (" or smaller tiles" if config.tile else "")
        )
    return tile


def _choose_output(asked: _Asked, source: Volume, tile: Vec) -> OutputPlan:
    config, card = asked.config, asked.card
    beside = config.out is None
    kind = kind_of(config, card)
    if beside and kind == "probabilities":
        raise UsageError("--output probabilities makes an image of its own: say where with --out")
    if beside and source.level != 0:
        reason = "--level" if config.level is not None else "nearest to the model's voxel size"
        raise UsageError(
            f"level {source.level} of the image is segmented ({reason}), and labels beside an "
            "image must have its own size: say where a store of their own goes with --out"
        )
    url = locate_output(config)
    of_instances = ("uint64", 1)  # at most
    dtype, n_channels = of_instances if kind == "instances" else predicted_type(config, card)
    chunk = tuple(
        _chunk_side(t, n, CHUNK_SIDE[card.spec.dims])
        for t, n in zip(tile, source.shape, strict=True)
    )
    most_voxels = BLOCK_BYTES // (n_channels * np.dtype(dtype).itemsize)
    return OutputPlan(
        url=url,
        kind=kind,
        name=config.name,
        beside=beside,
        dtype=SMALLEST if kind == "instances" else dtype,
        chunk=chunk,
        shard=_choose_shard(source, tile, chunk, most_voxels),
        class_names=card.classes,
    )


def _chunk_side(tile: int, length: int, wanted: int) -> int:
    """The side nearest to `wanted` that cuts a tile, or an axis within one tile, equally."""
    if length <= tile:
        return ceil_div(length, max(1, round(length / wanted)))
    return nearest_divisor(tile, wanted)


def _choose_shard(source: Volume, tile: Vec, chunk: Vec, most_voxels: int) -> Vec | None:
    """Whole tiles, where the output would otherwise be many thousands of files."""
    n_chunks = math.prod(ceil_div(n, c) for n, c in zip(source.shape, chunk, strict=True))
    if n_chunks < MANY_CHUNKS or source.multiscale.version == "0.4":
        return None
    sides = (round_up(t, c) for t, c in zip(tile, chunk, strict=True))
    return grow_to(tuple(sides), source.shape, most_voxels)


def _choose_core(asked: _Asked, source: Volume, tile: Vec, write_unit: Vec) -> Vec:
    config = asked.config
    if config.block is None and asked.begun is not None and asked.begun.tile == tile:
        return asked.begun.core
    wanted = tile if config.block is None else _as_4d(config.block, "--block", n_planes=tile[1])
    # Along an axis within one tile or one write unit there is one core; it needs no alignment.
    axes = list(zip(source.shape, tile, write_unit, strict=True))
    units = tuple(1 if n <= max(t, u) else u for n, t, u in axes)
    core = core_shape(wanted, tile, units)
    return tuple(
        round_up(n, t) if n <= max(t, u) else c for c, (n, t, u) in zip(core, axes, strict=True)
    )


def _as_4d(sides: Sequence[int], option: str, *, n_planes: int) -> Vec:
    if len(sides) not in (2, 3) or min(sides) < 1:
        raise UsageError(f"{option} {','.join(map(str, sides))}: give z,y,x or y,x in voxels")
    return (1, n_planes, *sides) if len(sides) == 2 else (1, *sides)


def _choose_order(asked: _Asked, plan: Plan, source: Volume, memory: MemoryModel) -> dict[str, Any]:
    """The beam, and the memory for decoded chunks that it needs."""
    begun = asked.begun
    if begun is not None and begun.core == plan.core:
        # The ledger's numbers follow the beam; memory is that of the workers that go on.
        kept = {key: getattr(begun, key) for key in HOW if key != "memory_bytes"}
        return {**kept, "cache_bytes": min(begun.cache_bytes, memory.cache_bytes)}
    beam, n_bytes = default_beam(
        plan.grid.shape,
        plan.core,
        tile_geometry(asked.card.spec, plan.tile).halo,
        chunk=source.chunk_shape,
        shape=source.shape,
        voxel_bytes=memory.in_voxel_bytes,
        budget_bytes=memory.cache_bytes,
    )
    return {"beam": beam, "cache_bytes": n_bytes}


def _describe(
    asked: _Asked, source: Volume, channels: tuple[int, ...], transform: Transform | None
) -> TransformPlan | None:
    if transform is None:
        return None
    described = describe(transform, source, channels)
    if described.n_channels != asked.card.spec.in_channels:
        raise InputError(
            f"{asked.config.model} reads {asked.card.spec.in_channels} channels, the transform "
            f"{described.name} gives {described.n_channels}: return as many as the model has"
        )
    return described


def _choose_constants(
    asked: _Asked, plan: Plan, source: Volume, transform: Transform | None
) -> NormConstants:
    begun, card = asked.begun, asked.card
    if asked.config.norm == "model":
        if card.norm_constants is None:
            raise InputError(
                f"{plan.model.url} holds no constants of its training volume: use --norm volume"
            )
        return card.norm_constants
    same = ("source", "model", "norm", "transform")
    if begun is not None and all(getattr(begun, key) == getattr(plan, key) for key in same):
        return begun.constants
    if transform is None or plan.transform is None:
        return norm_constants(source, card.norm, plan.source.channels)
    channels = plan.source.channels
    changed = TransformedVolume(
        lambda region: source.read(region, channels), source, channels, transform, plan.transform
    )
    return norm_constants(changed, card.norm, range(plan.transform.n_channels))
