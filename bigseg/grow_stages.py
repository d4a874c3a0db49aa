"""The stages that end in the labels: growth, and where asked the filling of holes.

codes, ids and numbers of the core and a margin ──grow──> labels, sums of the objects
or ──> labels before holes are filled
labels of the core and a margin ──> the background in pieces, and what encloses each
labels, pieces and what they become ──> labels, sums of the objects
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigseg import scratch
from bigseg.borders import touching
from bigseg.faces import describe
from bigseg.filling import SourceVolume
from bigseg.instances import FOREGROUND_BIT, Steps, components, grow, owners_of
from bigseg.intact import marked, numbered
from bigseg.ledger import checksum_of
from bigseg.objects import ObjectSums, sums_of
from bigseg.packing import pack, unpack
from bigseg.plan import CLOSE, GROW, HOLES, NUMBER, OBJECTS, Plan
from bigseg.scratch import BlockFiles
from bigseg.seed_stages import CodeReader, adjacency_of, widened
from bigseg.thread_stage import ThreadStage
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.blocks import Block, Region
    from bigseg.faces import BlockComponents
    from bigseg.steps import Unsigned

# What stays in the cache of a processor while it is read and written.
_CACHED_VOXELS = 1 << 16
# Blocks whose numbers are kept: those around the ones that are grown side by side.
KEPT_NUMBERS = 256
NUMBERS = "numbers"


class LabelStage(ThreadStage):
    """What writes the labels of the result and the sums of their objects."""

    def __init__(self, plan: Plan, n_threads: int) -> None:
        super().__init__(plan.grid, n_threads)
        self.plan, self.parts = plan, plan.clipped_grid
        self.output = open_volume(plan.output.url)
        source = open_volume(plan.source.url, level=plan.source.level)
        self._source = SourceVolume.of(source, plan.on_bad_chunk)
        self._sums = BlockFiles.of(plan, OBJECTS)
        self._filled: dict[int, tuple[str, ...]] = {}

    def write(self, block: Block, result: NDArray[np.uint64]) -> int:
        """Write labels (t, z, y, x) of the core and the sums of their objects."""
        values = result.astype(self.output.dtype)
        core = self.parts[block.index].core
        inner = values[core.relative_to(block.core.start).slices]
        if values.any():
            channels = range(self._source.n_channels)
            image = self._source.read(core, channels)
            self.fetched.add(image.nbytes)
            sums = sums_of(inner, image, core)
            self._filled[block.index] = self._source.filled_in(core, channels)
        else:
            sums = ObjectSums.empty(self._source.n_channels, self._source.dtype)
        data = sums.to_bytes()
        self._sums.write(block.index, data)
        self.output.write(block.core, values[np.newaxis])
        self.written.add(values.nbytes + len(data))
        return checksum_of(np.ascontiguousarray(values[np.newaxis]).data)

    def take_filled(self, block: Block) -> tuple[str, ...]:
        """The chunks of the image that were filled for the intensities of a block, told once."""
        return self._filled.pop(block.index, ())


class GrowStage(LabelStage):
    """The labels of a core: seeds by their final numbers, grown within the foreground."""

    def __init__(self, plan: Plan, n_threads: int) -> None:
        super().__init__(plan, n_threads)
        assert plan.instances is not None
        self._rule = plan.instances.rule
        self._steps = Steps(plan.instances.ratios)
        self._codes = CodeReader(plan)
        self._numbers = functools.lru_cache(KEPT_NUMBERS)(functools.partial(read_numbers, plan))
        self._ids = numbered(plan, scratch.IDS, lambda block: len(self._numbers(NUMBER, block)))
        self._grown = None
        if self._rule.fill_holes:
            self._grown = scratch.open_array(plan, scratch.array_url(plan, scratch.GROWN))

    def read(self, block: Block) -> NDArray[np.uint64]:
        """The labels (t, z, y, x) of the core; 0 outside the plan's region."""
        core = self.parts[block.index].core
        margin = self._steps.reach_vox(self._rule.grow)
        around = core.grow(margin, margin).intersect(self.plan.region)
        seeds = self._seeds(around, block.index)
        if not seeds.any():
            return np.zeros(block.core.shape, np.uint64)
        codes = self._codes.read(around, block.index)
        self.fetched.add(codes.nbytes + seeds.nbytes)
        labels = grow(seeds, (codes & FOREGROUND_BIT) != 0, self._rule.grow, self._steps)
        return widened(labels[core.relative_to(around.start).slices], core, block.core)

    def write(self, block: Block, result: NDArray[np.uint64]) -> int:
        """Write the labels: as the result, or where holes are filled in it first."""
        if self._grown is None:
            return super().write(block, result)
        values = result.astype(self._grown.dtype)[np.newaxis]
        self._grown.write(block.core, values)
        self.written.add(values.nbytes)
        return checksum_of(np.ascontiguousarray(values).data)

    def _seeds(self, region: Region, block: int) -> NDArray[np.uint64]:
        """Seeds (t, z, y, x) by their numbers, from all blocks that have a part of the region."""
        ids = self._ids.read(region, block)[0]
        seeds = np.zeros(ids.shape, np.uint64)
        for number in touching(self.grid, region):
            part = self.grid[number].core.intersect(region).relative_to(region.start).slices
            if ids[part].any():
                renumber(ids[part], self._numbers(NUMBER, number), out=seeds[part])
        return seeds


class HolesStage(ThreadStage):
    """The background of a core in pieces, numbered by themselves, and what is beside each."""

    def __init__(self, plan: Plan, n_threads: int) -> None:
        super().__init__(plan.grid, n_threads)
        assert plan.instances is not None
        self._plan, self._parts, self._dims = plan, plan.clipped_grid, plan.instances.dims
        self._grown = marked(plan, GROW, scratch.array_url(plan, scratch.GROWN))
        self._gaps = scratch.open_array(plan, scratch.array_url(plan, scratch.GAPS))
        self._files = BlockFiles.of(plan, HOLES)
        self._adjacency = adjacency_of(plan, HOLES)

    def read(self, block: Block) -> tuple[NDArray[np.uint32], BlockComponents]:
        """Ids (t, z, y, x) of the pieces of the core, and what there is to say of them."""
        core = self._parts[block.index].core
        margin = (0,) * (4 - self._dims) + (1,) * self._dims
        around = core.grow(margin, margin).intersect(self._plan.region)
        labels = self._grown.read(around, block.index)[0]
        self.fetched.add(labels.nbytes)
        within = core.relative_to(around.start).slices
        ids = np.zeros(labels.shape, np.uint32)
        ids[within], first = components(
            np.ascontiguousarray(labels[within] == 0), dims=self._dims, connectivity=1
        )
        owners = owners_of(ids, len(first), labels, dims=self._dims, ends=self._ends(around))
        pieces = describe(
            ids[within],
            core,
            self._plan.source.shape,
            axes=self._adjacency.axes,
            first=first,
            sized=False,
            owners=owners,
        )
        return ids[within], pieces

    def write(self, block: Block, result: tuple[NDArray[np.uint32], BlockComponents]) -> int:
        """Write the ids and the file of the block."""
        ids, pieces = result
        core = self._parts[block.index].core
        data = pieces.to_bytes()
        self._gaps.write(block.core, widened(ids, core, block.core)[np.newaxis])
        self._files.write(block.index, data)
        self.written.add(ids.nbytes + len(data))
        return checksum_of(data)

    def _ends(self, region: Region) -> set[tuple[int, int]]:
        """The sides (axis, 0 or 1) on which a region ends with the plan's."""
        whole = self._plan.region
        axes = range(4 - self._dims, 4)
        starts = {(axis, 0) for axis in axes if region.start[axis] == whole.start[axis]}
        return starts | {(axis, 1) for axis in axes if region.stop[axis] == whole.stop[axis]}


class FillStage(LabelStage):
    """The labels of a core with holes filled."""

    def __init__(self, plan: Plan, n_threads: int) -> None:
        super().__init__(plan, n_threads)
        self._grown = marked(plan, GROW, scratch.array_url(plan, scratch.GROWN))
        self._numbers = functools.lru_cache(KEPT_NUMBERS)(functools.partial(read_numbers, plan))
        self._gaps = numbered(plan, scratch.GAPS, lambda block: len(self._numbers(CLOSE, block)))

    def read(self, block: Block) -> NDArray[np.uint64]:
        """The labels (t, z, y, x) of the core."""
        grown = self._grown.read(block.core, block.index)[0]
        labels: NDArray[np.uint64] = grown.astype(np.uint64)
        gaps = self._gaps.read(block.core, block.index)[0]
        self.fetched.add(grown.nbytes + gaps.nbytes)
        becomes = np.empty(gaps.shape, np.uint64)
        renumber(gaps, self._numbers(CLOSE, block.index), out=becomes)
        labels += becomes
        return labels


def renumber(
    ids: NDArray[np.unsignedinteger[Any]], numbers: NDArray[Unsigned], *, out: NDArray[Unsigned]
) -> None:
    """Write into `out` what `numbers` (n,) has for each of `ids` (t, z, y, x), which are 0 or 1..n.

    Ids are below 2³¹, as voxels of a core are. 0 stays 0. Raises IndexError for an id above n.
    """
    table = np.zeros(len(numbers) + 1, numbers.dtype)
    table[1:] = numbers
    # torch gathers twice as fast as numpy, which makes 64-bit indices of ids first; it does so for
    # signed integers of 32 bits.
    signed = torch.from_numpy(table.view(f"i{table.itemsize}"))
    n_planes = max(1, _CACHED_VOXELS // max(1, math.prod(ids.shape[2:])))
    for t, z in itertools.product(range(len(ids)), range(0, ids.shape[1], n_planes)):
        part = ids[t, z : z + n_planes]
        places = torch.from_numpy(part.reshape(-1).astype(np.uint32, copy=False).view(np.int32))
        found = torch.index_select(signed, 0, places).numpy().view(table.dtype)
        out[t, z : z + n_planes] = found.reshape(part.shape)


def read_numbers(plan: Plan, kind: str, block: int) -> NDArray[np.uint64]:
    """What the components 1, 2, ... of a block are in the result, 0 for nothing.

    Raises:
        OutputError: the file is gone or damaged.
    """
    # A component has at least a voxel.
    most_bytes = 8 * plan.clipped_grid[block].core.n_voxels
    numbers: NDArray[np.uint64] = BlockFiles.of(plan, kind).load(
        block, lambda data: unpack(data, NUMBERS, most_bytes=most_bytes)
    )[NUMBERS]
    return numbers


def pack_numbers(numbers: NDArray[np.uint64]) -> bytes:
    """What `read_numbers` reads."""
    return pack(NUMBERS, {NUMBERS: numbers})
