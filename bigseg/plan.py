"""What was decided before running: source, engine, tiles, cores, order, output.

A plan is plain frozen data. It can be printed, compared, stored in the ledger and sent to workers,
and it decides every byte of the result; how many workers carry it out does not. planner.py makes
it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg import store
from bigseg.blocks import BlockGrid, Region, Vec, ceil_div, round_up
from bigseg.config import ModelCard, NormConstants, OnBadChunk, OutputKind
from bigseg.cost import MemoryModel
from bigseg.empty import EmptyRule
from bigseg.engine import EngineSpec
from bigseg.errors import InputError
from bigseg.layout import units_of
from bigseg.predict import TileGeometry, tile_geometry
from bigseg.rules import InstanceRule
from bigseg.settings import Settings
from bigseg.transform import TransformPlan
from bigseg.volume import OutputSpec, Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.config import UNetSpec

ALGORITHM = 3
# What a block writes where bigseg may choose: the voxels that it reads are several times as many,
# wider, and in memory with those of the next block.
BLOCK_BYTES = 1 << 24
PREDICT = "predict"
# The stages of a plan that makes instances, after `predict` and in this order; those of HOLES only
# where holes are filled, those of ALONE are one block, which the driver does.
SEEDS, STITCH, NUMBER, GROW = "seeds", "stitch", "number", "grow"
HOLES, STITCH_HOLES, CLOSE, FILL = "holes", "stitch-holes", "close", "fill"
OBJECTS = "objects"
ALONE = (NUMBER, CLOSE, OBJECTS)
# The type of an output of which only the number of its objects, known later, can tell.
SMALLEST = "smallest"
# What a plan says that does not decide a byte.
HOW = ("engine_reason", "flops_a_second", "beam", "memory_bytes", "cache_bytes")
# A block that was finished is the same with either rule, unless the ledger lists what was filled
# of its input: so a run that met a bad chunk can go on with the other.
EITHER = ("on_bad_chunk",)


class SourcePlan(Settings):
    """The volume that is read, and a hash by which it is known again."""

    url: str
    level: int
    shape: Vec
    dtype: str
    channels: tuple[int, ...]
    identity: str

    @property
    def voxel_bytes(self) -> int:
        """Bytes of one voxel with all channels that are read."""
        return len(self.channels) * np.dtype(self.dtype).itemsize


class ModelPlan(Settings):
    """The model file and the hash of its bytes."""

    url: str
    sha256: str


class InstancePlan(Settings):
    """How probabilities become numbered objects: the rule, and where it works.

    The `dims` last axes belong together; `ratios` are the voxel sizes along them, in units of the
    smallest. Scratch arrays lie in shards of a core with chunks of `chunk`.
    """

    rule: InstanceRule
    dims: Literal[2, 3]
    ratios: tuple[float, ...]
    keep_probabilities: bool
    chunk: Vec


class OutputPlan(Settings):
    """The pyramid that is written; `beside` says that it lies in the image's own labels.

    The type of instances is `SMALLEST`.
    """

    url: str
    kind: OutputKind
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
    def voxel_bytes(self) -> int:
        """Bytes of one voxel with all channels, at most."""
        return max(1, len(self.channel_names)) * self.largest_dtype.itemsize

    @property
    def largest_dtype(self) -> np.dtype[Any]:
        """The type of the voxels, or the largest that it can be."""
        return np.dtype("uint64" if self.dtype == SMALLEST else self.dtype)

    @property
    def write_unit(self) -> Vec:
        """What no two blocks may share: shards where there are any, else chunks (t, z, y, x)."""
        return self.shard or self.chunk


class Plan(Settings):
    """One segmentation, decided.

    `tile` is one forward pass and `core` what a block writes, in voxels along t, z, y, x; `beam`
    is how many blocks along y and x follow each other before the next along z. `memory_bytes` is
    the memory of a worker for which the sizes were chosen, `flops_a_second` the rate of a worker
    where it was measured, `cache_bytes` what of it keeps decoded
    chunks that neighbouring blocks need again.
    """

    algorithm: int = ALGORITHM
    source: SourcePlan
    model: ModelPlan
    engine: EngineSpec
    engine_reason: str = ""
    flops_a_second: float | None = None
    norm: Literal["volume", "model"]
    constants: NormConstants
    transform: TransformPlan | None = None
    empty: EmptyRule | None = None
    on_bad_chunk: OnBadChunk = "set-aside"
    tile: Vec
    core: Vec
    beam: tuple[int, int]
    memory_bytes: int
    cache_bytes: int
    region_start: Vec
    region_stop: Vec
    output: OutputPlan
    instances: InstancePlan | None = None

    @property
    def predicted_voxel_bytes(self) -> int:
        """Bytes of one voxel, with all channels, of what the predict stage writes."""
        if self.instances is None:
            return self.output.voxel_bytes
        return len(self.output.class_names) if self.instances.keep_probabilities else 1

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
        inside = hull.intersect(Region.of_shape(self.source.shape))
        return BlockGrid(inside, self.core, self.beam)

    @property
    def finest_stage(self) -> str:
        """The stage that writes the finest level of the output."""
        if self.instances is None:
            return PREDICT
        return FILL if self.instances.rule.fill_holes else GROW

    @property
    def keeps_probabilities(self) -> bool:
        """Whether the probabilities of instances stay beside them."""
        return self.instances is not None and self.instances.keep_probabilities

    @property
    def clipped_grid(self) -> BlockGrid:
        """The same blocks by the same numbers, without what lies outside the region."""
        return BlockGrid(self.region, self.core, self.beam)

    @property
    def fingerprint(self) -> str:
        """A hash over everything that decides the bytes of the result."""
        text = json.dumps(self._deciding(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: Plan) -> list[str]:
        """The settings in which two plans differ, as `name: mine, not other`."""
        mine, theirs = _flat(self._deciding()), _flat(other._deciding())
        return [
            f"{key}: {mine.get(key)!r}, not {theirs.get(key)!r}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]

    def _deciding(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={*HOW, *EITHER})


def geometry_of(plan: Plan, card: ModelCard) -> TileGeometry:
    """The tiles of the plan for the network of the model."""
    return tile_geometry(card.spec, plan.tile)


def memory_model(plan: Plan, spec: UNetSpec) -> MemoryModel:
    """The memory of a worker of the plan."""
    return MemoryModel(
        spec=spec,
        device=plan.engine.device,
        value_bytes=4 if plan.engine.precision == "fp32" else 2,
        in_voxel_bytes=plan.source.voxel_bytes,
        out_voxel_bytes=plan.predicted_voxel_bytes,
        memory_bytes=plan.memory_bytes,
    )


def output_spec(plan: Plan, dtype: str | None = None) -> OutputSpec:
    """How the output's arrays are to be created; with `dtype` where the plan cannot know it."""
    return OutputSpec(
        dtype=np.dtype(dtype or plan.output.dtype),
        chunk=plan.output.chunk,
        shard=plan.output.shard,
        channel_names=plan.output.channel_names,
        class_names=() if plan.instances else plan.output.class_names,
        provenance={
            "model": store.name_of(plan.model.url),
            "model_sha256": plan.model.sha256,
            "level": plan.source.level,
            "engine": str(plan.engine),
            "core": list(plan.core),
            "fingerprint": plan.fingerprint,
            **({"rule": plan.instances.rule.model_dump()} if plan.instances else {}),
        },
    )


def stage_grids(plan: Plan) -> dict[str, BlockGrid]:
    """The stages of a plan, in order, with their blocks.

    For labels and probabilities the output must have been created.

    Raises:
        InputError: neither the output nor the image is there.
    """
    levels = _levels(plan)
    grids = {PREDICT: plan.grid}
    alone = BlockGrid(plan.region, plan.region_stop)
    if plan.instances is not None:
        grids |= dict.fromkeys((SEEDS, STITCH), plan.grid) | {NUMBER: alone, GROW: plan.grid}
        if plan.instances.rule.fill_holes:
            grids |= dict.fromkeys((HOLES, STITCH_HOLES), plan.grid)
            grids |= {CLOSE: alone, FILL: plan.grid}
    for k, level in enumerate(levels[1:], start=1):
        grids[f"pyramid-{k}"] = pyramid_grid(level, plan.source.shape, plan.region)
    if plan.instances is not None:
        grids[OBJECTS] = alone
    return grids


def smallest_type(n: int) -> np.dtype[Any]:
    """The type of labels up to n: the smallest unsigned one that holds it."""
    return np.min_scalar_type(n)


@dataclass(frozen=True)
class PlannedLevel:
    """A level of an output that need not be there yet; shapes along t, z, y, x."""

    shape: Vec
    write_unit: Vec
    n_channels: int
    dtype: np.dtype[Any]


def planned_level(plan: Plan, shape: Vec) -> PlannedLevel:
    """The level of this shape of the plan's output."""
    chunk, shard = units_of(plan.output.chunk, plan.output.shard, shape)
    n_channels = max(1, len(plan.output.channel_names))
    return PlannedLevel(shape, shard or chunk, n_channels, plan.output.largest_dtype)


def _levels(plan: Plan) -> list[Volume | PlannedLevel]:
    if plan.instances is None:
        finest = open_volume(plan.output.url)
        return [finest.at(k) for k in range(finest.n_levels)]
    try:
        finest = open_volume(plan.output.url)
    except InputError:
        # Instances get their arrays when they have been counted.
        finest = open_volume(plan.source.url, level=plan.source.level)
    levels = range(finest.level, finest.n_levels)
    return [planned_level(plan, finest.at(k).shape) for k in levels]


def pyramid_grid(
    level: Volume | PlannedLevel, fine_shape: Sequence[int], region: Region
) -> BlockGrid:
    """The cores of one coarser level that a region of the finest level can reach.

    `region` is in voxels of the level with `fine_shape`.
    """
    unit = level.write_unit
    bytes_per_voxel = level.n_channels * level.dtype.itemsize
    core = grow_to(unit, level.shape, BLOCK_BYTES // bytes_per_voxel)
    start, stop = [], []
    for a, b, n, fine, c in zip(
        region.start, region.stop, level.shape, fine_shape, core, strict=True
    ):
        # One voxel more on each side, whatever the rounding of the level's size.
        first, last = max(0, a * n // fine - 1), min(n, ceil_div(b * n, fine) + 1)
        start.append(first // c * c)
        stop.append(min(n, round_up(last, c)))
    return BlockGrid(Region(tuple(start), tuple(stop)), core)


def grow_to(unit: Vec, shape: Sequence[int], most_voxels: int) -> Vec:
    """`unit` doubled along its shortest axis that is not yet covered, up to `most_voxels`."""
    core = list(unit)
    while True:
        open_axes = [i for i in range(1, len(core)) if core[i] < shape[i]]
        if not open_axes or 2 * math.prod(core) > most_voxels:
            return tuple(core)
        core[min(open_axes, key=lambda i: core[i])] *= 2


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
