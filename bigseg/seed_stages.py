"""The stages that find the components of instances: in each block by itself, then between blocks.

codes of the core and a margin ──erode──> seeds ──number them in the core──> ids
└──sizes, first voxels, outermost planes──> file
files of a block and its neighbours ──> which of their components are one
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import scratch
from bigseg.faces import (
    Adjacency,
    BlockComponents,
    describe,
    equal_pairs,
    pairs_from_bytes,
    pairs_to_bytes,
)
from bigseg.instances import INSIDE_BIT, Steps, codes_of, components, erode
from bigseg.intact import marked
from bigseg.ledger import checksum_of
from bigseg.plan import HOLES, PREDICT, SEEDS, STITCH_HOLES, Plan
from bigseg.scratch import BlockFiles
from bigseg.stitch import neighbours
from bigseg.thread_stage import ThreadStage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Block, Region

PAIRS = "pairs"


class CodeReader:
    """What the network said, as codes of instances: as they are stored, or by the rule."""

    def __init__(self, plan: Plan) -> None:
        assert plan.instances is not None
        self._predicted = marked(plan, PREDICT, scratch.predicted_url(plan))
        self._rule = plan.instances.rule if plan.instances.keep_probabilities else None

    def read(self, region: Region, block: int) -> NDArray[np.uint8]:
        """Codes (t, z, y, x) of a region that holds a block's part of the plan's region.

        Raises:
            OutputError: what the network said is no longer there.
        """
        values: NDArray[np.uint8] = self._predicted.read(region, block)
        codes: NDArray[np.uint8] = values[0] if self._rule is None else codes_of(values, self._rule)
        return codes


class SeedsStage(ThreadStage):
    """Seeds of a core, numbered by themselves, and what stitching needs to know of them."""

    def __init__(self, plan: Plan, n_threads: int) -> None:
        assert plan.instances is not None
        super().__init__(plan.grid, n_threads)
        self._plan, self._rule, self._dims = plan, plan.instances.rule, plan.instances.dims
        self._parts = plan.clipped_grid
        self._steps = Steps(plan.instances.ratios)
        self._codes = CodeReader(plan)
        self._ids = scratch.open_array(plan, scratch.array_url(plan, scratch.IDS))
        self._files = BlockFiles.of(plan, SEEDS)
        self._adjacency = adjacency_of(plan, SEEDS)

    def read(self, block: Block) -> tuple[NDArray[np.unsignedinteger[Any]], BlockComponents]:
        """The ids (t, z, y, x) of the core inside the plan's region, and what to say of them."""
        core = self._parts[block.index].core
        margin = self._steps.reach_vox(self._rule.erode)
        grown = core.grow(margin, margin).intersect(self._plan.region)
        codes = self._codes.read(grown, block.index)
        self.fetched.add(codes.nbytes)
        seeds = erode((codes & INSIDE_BIT) != 0, self._rule.erode, self._steps)
        ids, first = components(
            np.ascontiguousarray(seeds[core.relative_to(grown.start).slices]),
            dims=self._dims,
            connectivity=self._rule.connectivity,
            link=self._rule.link,
        )
        found = describe(
            ids,
            core,
            self._plan.source.shape,
            axes=self._adjacency.axes,
            first=first,
            sized=self._rule.min_size > 1,
        )
        return ids, found

    def write(
        self, block: Block, result: tuple[NDArray[np.unsignedinteger[Any]], BlockComponents]
    ) -> int:
        """Write the ids and the file of the block."""
        found = result[1]
        ids = result[0].astype(np.uint32, copy=False)
        self._ids.write(block.core, widened(ids, found.core, block.core)[np.newaxis])
        data = found.to_bytes()
        self._files.write(block.index, data)
        self.written.add(ids.nbytes + len(data))
        return checksum_of(data)


class StitchStage(ThreadStage):
    """Which components of a block and of its neighbours are one; `kind` says of which stage."""

    def __init__(self, plan: Plan, kind: str, n_threads: int) -> None:
        super().__init__(plan.grid, n_threads)
        self._plan = plan
        self._components = ComponentFiles(plan, kind)
        self._files = BlockFiles.of(plan, pairs_of(kind))
        self._adjacency = adjacency_of(plan, kind)

    def read(self, block: Block) -> list[tuple[int, NDArray[np.uint32]]]:
        """The equal pairs with each of half of its neighbours, by their numbers."""
        own = self._components.read(block.index)
        found: list[tuple[int, NDArray[np.uint32]]] = []
        if not own.n:
            return found
        for offset, number in neighbours(self.grid, block.index, self._adjacency):
            # Of the neighbour only the planes across the first axis on which it lies beside.
            axis = next(axis for axis, step in enumerate(offset) if step)
            other = self._components.read(number, axes=(axis,))
            pairs = equal_pairs(own, other, offset, self._adjacency)
            if len(pairs):
                found.append((number, pairs))
        return found

    def write(self, block: Block, result: list[tuple[int, NDArray[np.uint32]]]) -> int:
        """Write them."""
        data = pairs_to_bytes(result)
        self._files.write(block.index, data)
        self.written.add(len(data))
        return checksum_of(data)


class ComponentFiles:
    """What blocks say of their components, in `kind` of files."""

    def __init__(self, plan: Plan, kind: str) -> None:
        self._parts, self._files = plan.clipped_grid, BlockFiles.of(plan, kind)
        self._kind, self._plan = kind, plan

    def read(self, block: int, *, axes: Sequence[int] = range(4)) -> BlockComponents:
        """Those of one block, with its outermost planes across some axes.

        Raises:
            OutputError: the file is gone or damaged.
        """
        core = self._parts[block].core
        return self._files.load(
            block, lambda data: BlockComponents.from_bytes(data, core=core, axes=axes)
        )

    def read_table(self, block: int) -> BlockComponents:
        """Those of one block without planes.

        Raises:
            OutputError: the file is gone or damaged.
        """
        return self.read(block, axes=())

    def read_pairs(self, block: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """What stitching found for a block: neighbours, and pairs of ids with each.

        Raises:
            OutputError: the file is gone or damaged.
        """
        # A voxel has 80 neighbours in four axes.
        most_pairs = 80 * self._parts[block].core.n_voxels
        return BlockFiles.of(self._plan, pairs_of(self._kind)).load(
            block, lambda data: pairs_from_bytes(data, most_pairs=most_pairs)
        )


def pairs_of(kind: str) -> str:
    """The kind of files that hold the pairs of a kind of components."""
    return {SEEDS: PAIRS, HOLES: STITCH_HOLES}[kind]


def adjacency_of(plan: Plan, kind: str) -> Adjacency:
    """Which voxels are neighbours: by the rule for seeds, across faces for holes."""
    assert plan.instances is not None
    rule, dims = plan.instances.rule, plan.instances.dims
    if kind == HOLES:
        return Adjacency(dims, 1, None)
    return Adjacency(dims, rule.connectivity, rule.link)


def widened(values: NDArray[Any], inside: Region, core: Region) -> NDArray[Any]:
    """Values (t, z, y, x) of a part of a core as the whole core, 0 beside them."""
    if inside == core:
        return values
    whole = np.zeros(core.shape, values.dtype)
    whole[inside.relative_to(core.start).slices] = values
    return whole
