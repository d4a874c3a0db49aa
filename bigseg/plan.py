"""What was decided before running: source, engine, tiles, cores, order, output.

A plan is plain frozen data. It can be printed, compared, stored in the ledger and sent to workers,
and it decides every byte of the result; how many workers carry it out does not. planner.py makes
it.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg import store
from bigseg.blocks import BlockGrid, Region, Vec, ceil_div, round_up
from bigseg.config import ModelCard, NormConstants, OnBadChunk, Settings
from bigseg.cost import MemoryModel
from bigseg.empty import EmptyRule
from bigseg.engine import EngineSpec
from bigseg.predict import TileGeometry, tile_geometry
from bigseg.transform import TransformPlan
from bigseg.volume import OutputSpec, Volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.config import UNetSpec

ALGORITHM = 2
# What a block writes where bigseg may choose: the voxels that it reads are several times as many,
# wider, and in memory with those of the next block.
BLOCK_BYTES = 1 << 24
PREDICT = "predict"
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
    def voxel_bytes(self) -> int:
        """Bytes of one voxel with all channels."""
        return max(1, len(self.channel_names)) * np.dtype(self.dtype).itemsize

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
        out_voxel_bytes=plan.output.voxel_bytes,
        memory_bytes=plan.memory_bytes,
    )


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
            "core": list(plan.core),
            "fingerprint": plan.fingerprint,
        },
    )


def pyramid_grid(level: Volume, fine_shape: Sequence[int], region: Region) -> BlockGrid:
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
