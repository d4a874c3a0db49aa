"""Everything decided before running: source, engine, tiles, cores, output, stages.

A plan is plain frozen data. It can be printed, compared, stored in the ledger and sent to workers,
and it decides every byte of the result; how many workers carry it out does not.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg import store
from bigseg.blocks import BlockGrid, Region, Vec, ceil_div, core_shape, parse_region, round_up
from bigseg.checkpoint import hash_model, read_card
from bigseg.config import ModelCard, NormConstants, SegmentConfig, Settings
from bigseg.engine import EngineSpec, resolve_engine
from bigseg.errors import InputError, UsageError
from bigseg.predict import TileGeometry, default_tile, tile_geometry
from bigseg.statistics import norm_constants
from bigseg.volume import OutputSpec, Volume, nearest_level, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.engine import Device

ALGORITHM = 1
CHUNK_SIDE = {2: 512, 3: 128}
MANY_CHUNKS = 4096
# What a block writes where bigseg may choose: the voxels that it reads are several times as many,
# wider, and in memory with those of the next block.
BLOCK_BYTES = 1 << 24
PREDICT = "predict"


class SourcePlan(Settings):
    """The volume that is read, and a hash by which it is known again."""

    url: str
    level: int
    shape: Vec
    dtype: str
    channels: tuple[int, ...]
    identity: str


class ModelPlan(Settings):
    """The model file and the hash of its bytes."""

    url: str
    sha256: str


class OutputPlan(Settings):
    """The pyramid that is written; `beside` says that it lies in the image's own labels."""

    url: str
    kind: Literal["labels", "probabilities"]
    name: str
    beside: bool
    dtype: str
    chunk: Vec
    shard: Vec | None
    class_names: tuple[str, ...]

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The classes where each is a channel; none for labels."""
        return self.class_names if self.kind == "probabilities" else ()

    @property
    def write_unit(self) -> Vec:
        """What no two blocks may share: shards where there are any, else chunks (t, z, y, x)."""
        return self.shard or self.chunk


class Plan(Settings):
    """One segmentation, decided."""

    algorithm: int = ALGORITHM
    source: SourcePlan
    model: ModelPlan
    engine: EngineSpec
    constants: NormConstants
    tile: Vec
    core: Vec
    region_start: Vec
    region_stop: Vec
    output: OutputPlan

    @property
    def region(self) -> Region:
        """The region asked for (t, z, y, x); the output is background outside it."""
        return Region(self.region_start, self.region_stop)

    @property
    def grid(self) -> BlockGrid:
        """The cores of the predict stage: whole cores of the lattice that touch the region."""
        hull = Region(
            tuple(a // c * c for a, c in zip(self.region_start, self.core, strict=True)),
            tuple(round_up(b, c) for b, c in zip(self.region_stop, self.core, strict=True)),
        )
        return BlockGrid(hull.intersect(Region.of_shape(self.source.shape)), self.core)

    @property
    def fingerprint(self) -> str:
        """A hash over everything that decides the bytes of the result."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """The settings in which two plans differ, as `name: mine, not other`."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return [
            f"{key}: {mine.get(key)!r}, not {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]


def make_plan(config: SegmentConfig, *, device: Device, card: ModelCard | None = None) -> Plan:
    """The plan for what the user asked, on workers with this kind of device.

    Raises:
        UsageError: options that contradict each other or the image.
        InputError: the image or the model cannot be used, or do not fit each other.
    """
    card = card or read_card(config.model)
    source = _choose_source(config, card)
    channels = _choose_channels(config, card, source)
    region = _choose_region(config, source)
    n_planes = 8 if device == "cuda" else 1
    tile = _choose_tile(config, card, source, n_planes)
    output = _choose_output(config, card, source, tile)
    constants = (
        _model_constants(card, config.model)
        if config.norm == "model"
        else norm_constants(source, card.norm, channels)
    )
    return Plan(
        source=SourcePlan(
            url=source.url,
            level=source.level,
            shape=source.shape,
            dtype=str(source.dtype),
            channels=channels,
            identity=_identity(source),
        ),
        model=ModelPlan(url=config.model, sha256=hash_model(config.model)),
        engine=resolve_engine(config.engine, config.precision, device=device),
        constants=constants,
        tile=tile,
        core=_choose_core(config, source, tile, output.write_unit),
        region_start=region.start,
        region_stop=region.stop,
        output=output,
    )


def geometry_of(plan: Plan, card: ModelCard) -> TileGeometry:
    """The tiles of the plan for the network of the model."""
    return tile_geometry(card.spec, plan.tile)


def output_spec(plan: Plan) -> OutputSpec:
    """How the output's arrays are to be created."""
    return OutputSpec(
        dtype=np.dtype(plan.output.dtype),
        chunk=plan.output.chunk,
        shard=plan.output.shard,
        channel_names=plan.output.channel_names,
        class_names=plan.output.class_names,
        provenance={
            "model": store.name_of(plan.model.url),
            "model_sha256": plan.model.sha256,
            "level": plan.source.level,
            "engine": str(plan.engine),
            "fingerprint": plan.fingerprint,
        },
    )


def pyramid_grid(level: Volume, fine_shape: Sequence[int], region: Region) -> BlockGrid:
    """The cores of one coarser level that a region of the finest level can reach.

    `region` is in voxels of the level with `fine_shape`.
    """
    unit = level.write_unit
    bytes_per_voxel = level.n_channels * level.dtype.itemsize
    core = _grow_to(unit, level.shape, BLOCK_BYTES // bytes_per_voxel)
    start, stop = [], []
    for a, b, n, fine, c in zip(
        region.start, region.stop, level.shape, fine_shape, core, strict=True
    ):
        # One voxel more on each side, whatever the rounding of the level's size.
        first, last = max(0, a * n // fine - 1), min(n, ceil_div(b * n, fine) + 1)
        start.append(first // c * c)
        stop.append(min(n, round_up(last, c)))
    return BlockGrid(Region(tuple(start), tuple(stop)), core)


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
    return volume


def _choose_channels(config: SegmentConfig, card: ModelCard, source: Volume) -> tuple[int, ...]:
    channels = config.channels or card.channels
    if len(channels) != card.spec.in_channels:
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
                f"0 to {source.shape[0] - 1}"
            )
        region = Region((config.time, *region.start[1:]), (config.time + 1, *region.stop[1:]))
    return region


def _choose_tile(config: SegmentConfig, card: ModelCard, source: Volume, n_planes: int) -> Vec:
    if config.tile is None:
        return default_tile(card.spec, source.shape, n_planes=n_planes)
    tile = _as_4d(config.tile, "--tile", n_planes=1)
    tile_geometry(card.spec, tile)
    return tile


def _choose_output(config: SegmentConfig, card: ModelCard, source: Volume, tile: Vec) -> OutputPlan:
    beside = config.out is None
    if beside and config.output == "probabilities":
        raise UsageError("--output probabilities makes an image of its own: say where with --out")
    if beside and source.level != 0:
        reason = "--level" if config.level is not None else "nearest to the model's voxel size"
        raise UsageError(
            f"level {source.level} of the image is segmented ({reason}), and labels beside an "
            "image must have its own size: say where a store of their own goes with --out"
        )
    url = config.out or store.join(source.url, "labels", config.name)
    if f"{source.url}/".startswith(f"{url.rstrip('/')}/"):
        raise UsageError(f"--out {url} holds the image itself: say another place for the output")
    if config.output == "labels":
        dtype, n_channels = "uint8" if card.spec.out_channels <= 256 else "uint16", 1
    else:
        dtype, n_channels = config.prob_dtype, card.spec.out_channels
    chunk = tuple(
        _chunk_side(t, n, CHUNK_SIDE[card.spec.dims])
        for t, n in zip(tile, source.shape, strict=True)
    )
    most_voxels = BLOCK_BYTES // (n_channels * np.dtype(dtype).itemsize)
    return OutputPlan(
        url=url,
        kind=config.output,
        name=config.name,
        beside=beside,
        dtype=dtype,
        chunk=chunk,
        shard=_choose_shard(source, tile, chunk, most_voxels),
        class_names=card.classes,
    )


def _chunk_side(tile: int, length: int, wanted: int) -> int:
    """The side nearest to `wanted` that cuts a tile, or an axis within one tile, equally."""
    if length <= tile:
        return ceil_div(length, max(1, round(length / wanted)))
    divisors = (d for d in range(1, tile + 1) if tile % d == 0)
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def _choose_shard(source: Volume, tile: Vec, chunk: Vec, most_voxels: int) -> Vec | None:
    """Whole tiles, where the output would otherwise be many thousands of files."""
    n_chunks = math.prod(ceil_div(n, c) for n, c in zip(source.shape, chunk, strict=True))
    if n_chunks < MANY_CHUNKS or source.multiscale.version == "0.4":
        return None
    sides = (round_up(t, c) for t, c in zip(tile, chunk, strict=True))
    return _grow_to(tuple(sides), source.shape, most_voxels)


def _choose_core(config: SegmentConfig, source: Volume, tile: Vec, write_unit: Vec) -> Vec:
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


def _grow_to(unit: Vec, shape: Sequence[int], most_voxels: int) -> Vec:
    """`unit` doubled along its shortest axis that is not yet covered, up to `most_voxels`."""
    core = list(unit)
    while True:
        open_axes = [i for i in range(1, len(core)) if core[i] < shape[i]]
        if not open_axes or 2 * math.prod(core) > most_voxels:
            return tuple(core)
        core[min(open_axes, key=lambda i: core[i])] *= 2


def _model_constants(card: ModelCard, url: str) -> NormConstants:
    if card.norm_constants is None:
        raise InputError(f"{url} holds no constants of its training volume: use --norm volume")
    return card.norm_constants


def _identity(source: Volume) -> str:
    """A hash of the metadata of what is read."""
    document = json.dumps(
        {
            "array": {
                key: value
                for key, value in source.array.metadata.to_dict().items()
                if key != "attributes"
            },
            "level": source.multiscale.levels[source.level].path,
            "scale": source.multiscale.levels[source.level].scale,
        },
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(document.encode()).hexdigest()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
