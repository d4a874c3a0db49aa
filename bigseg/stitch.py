"""From the components of blocks to objects: size filter, numbers 1..N, owners of holes.

    pairs of all blocks ──> which components are one ──> sizes and first voxels of their objects
                                                                          │
    tables of all blocks, slab by slab ──> how many objects begin where ──> numbers of each block

Objects are numbered by their first voxels in the raster order of the volume. Nothing is sorted for
that: in a line of voxels along x objects begin block by block, and lines follow each other, so it
is enough to count the objects that begin in each.

    slab         blocks of one place along (t, z); before and behind it lie other voxels only
    row          blocks of a slab of one place along y: side by side along x
    plane, line  voxels of one (t, z), of one (t, z, y)

Held are 24 bytes for each component that is equal to one of another block (33 while they are
collected), what `memory_bytes` allows for tables of blocks, counts for the planes of a slab in each
of its rows, and counts for the lines of one row. The order of blocks in their grid does not matter.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bigseg.blocks import Region
from bigseg.borders import touching
from bigseg.instances import NOBODY, SEVERAL
from bigseg.joining import Held, Tables, Threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from bigseg.blocks import BlockGrid, Vec
    from bigseg.faces import Adjacency, BlockComponents

    Write = Callable[[int, NDArray[np.uint64]], None]
    Index = NDArray[np.int64]

_NEVER = np.uint64(2**64 - 1)


def neighbours(grid: BlockGrid, index: int, adjacency: Adjacency) -> Iterator[tuple[Vec, int]]:
    """The offsets and numbers of those neighbours that a block is to be compared with.

    From all blocks together, each two neighbours come once.
    """
    corner = [a // c for a, c in zip(grid[index].core.start, grid.core_shape, strict=True)]
    for offset in adjacency.block_offsets():
        lattice = [p + step for p, step in zip(corner, offset, strict=True)]
        start = tuple(p * c for p, c in zip(lattice, grid.core_shape, strict=True))
        stop = tuple(a + c for a, c in zip(start, grid.core_shape, strict=True))
        for neighbour in touching(grid, Region(start, stop)):
            yield offset, neighbour


def number(
    tables: Tables,
    write: Write,
    *,
    min_size: int,
    memory_bytes: int = 256 << 20,
    n_threads: int = 4,
) -> int:
    """Number the objects 1..N by their first voxels; those below `min_size` voxels get 0.

    `write` is called once for each block, by several threads, with the numbers of its components
    1..n. `memory_bytes` is how much is kept of tables, so that they need not be read again.
    Returns N.

    Raises:
        OutputError: pairs and tables do not fit each other.
    """
    with Threads.open(n_threads) as threads:
        held = Held.of(tables, threads)
        cached = replace(tables, read=_Cache(tables.read, memory_bytes))
        objects = _Objects.of(held, cached, threads, min_size)
        n = 0
        for rows in _slabs(tables.grid):
            slab = _Slab(rows, cached, objects, threads)
            n = slab.number(n)
            for block, numbers in slab.all_numbers():
                threads.write(write, block, numbers)
    return n


def fill(tables: Tables, write: Write, *, n_threads: int = 4) -> None:
    """Give each component the one label that is seen beside its object, by all blocks together.

    `write` is called once for each block, by several threads, with the labels of its components
    1..n: 0 where an object has no owner or several. The tables have owners.

    Raises:
        OutputError: pairs and tables do not fit each other.
    """
    with Threads.open(n_threads) as threads:
        held = Held.of(tables, threads)
        labels = _owners_of_objects(held, tables, threads)
        for block, table in threads.ordered(tables.read, range(len(tables.grid))):
            own = _owners(table)
            own[own == SEVERAL] = NOBODY
            own[held.places(block, table)] = labels[held.roots_of(block)]
            threads.write(write, block, own)


@dataclass(frozen=True)
class _Objects:
    """What is known of the objects of held components, at the nodes that are their roots.

    Attributes:
        held: the components.
        first: raster index of the object's first voxel; _NEVER if it is too small to count.
        numbers: of the objects that are numbered so far, else 0.
        min_size: voxels of the smallest object that counts.
    """

    held: Held
    first: NDArray[np.uint64]
    numbers: NDArray[np.uint64]
    min_size: int

    @classmethod
    def of(cls, held: Held, tables: Tables, threads: Threads, min_size: int) -> _Objects:
        """Sums of sizes and first voxels, from the tables of the blocks."""
        sizes = np.ones(len(held.ids), np.uint64)
        first = np.empty(len(held.ids), np.uint64)
        for block, table in threads.ordered(tables.read, held.blocks()):
            places, nodes = held.places(block, table), held.slice_of(block)
            first[nodes] = table.first[places]
            if min_size > 1:
                sizes[nodes] = _sizes(table)[places]
        held.fold(np.add, sizes)
        held.fold(np.minimum, first)
        first[sizes < min_size] = _NEVER
        # Sizes are not wanted any more: their memory becomes that of the numbers.
        sizes[:] = 0
        return cls(held, first, sizes, min_size)

    def beginnings(self, block: int, table: BlockComponents) -> Index:
        """Places in the table, ascending, of the components with which an object begins."""
        # Every component has a voxel.
        is_new = (
            np.ones(table.n, np.bool_) if self.min_size <= 1 else _sizes(table) >= self.min_size
        )
        places = self.held.places(block, table)
        is_new[places] = table.first[places] == self.first[self.held.roots_of(block)]
        return np.flatnonzero(is_new)

    def learn(self, block: int, table: BlockComponents, own: NDArray[np.uint64]) -> None:
        """Take over the numbers of the held objects that begin in a block."""
        numbers = own[self.held.places(block, table)]
        begins = numbers > 0
        self.numbers[self.held.roots_of(block)[begins]] = numbers[begins]

    def complete(self, block: int, table: BlockComponents, own: NDArray[np.uint64]) -> None:
        """Put in the numbers of held components, wherever their objects begin."""
        own[self.held.places(block, table)] = self.numbers[self.held.roots_of(block)]


class _Slab:
    """The rows of a slab, numbered by how many objects begin in its planes and lines."""

    def __init__(
        self, rows: list[Region], tables: Tables, objects: _Objects, threads: Threads
    ) -> None:
        self._rows, self._tables, self._objects, self._threads = rows, tables, objects, threads
        self._box = Region(rows[0].start, rows[-1].stop)
        # Rows of one place along y share a column, where a slab has several places along z.
        self._columns = sorted({row.start[2] for row in rows})
        self._before: Index = np.zeros(0, np.int64)

    def number(self, n_before: int) -> int:
        """Number what begins here after `n_before` objects; returns how many there are then."""
        counts = np.zeros((*self._box.shape[:2], len(self._columns)), np.int64)
        for row in self._rows:
            column = self._columns.index(row.start[2])
            for block, table in self._read(row):
                places = self._objects.beginnings(block, table)
                t, z, _ = self._lines(table, places, self._box)
                np.add.at(counts[:, :, column], (t, z), 1)
        ends = n_before + np.cumsum(counts).reshape(counts.shape)
        self._before = ends - counts
        for block, table, own in self._numbers_of_beginnings():
            self._objects.learn(block, table, own)
        return int(ends[-1, -1, -1])

    def all_numbers(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Each block and the numbers of its components, once `number` has been called."""
        for block, table, own in self._numbers_of_beginnings():
            self._objects.complete(block, table, own)
            yield block, own

    def _numbers_of_beginnings(self) -> Iterator[tuple[int, BlockComponents, NDArray[np.uint64]]]:
        """Each block, its table, and the numbers of objects that begin in it, else 0."""
        for row in self._rows:
            following = self._numbers_of_lines(row)
            for block, table in self._read(row):
                places = self._objects.beginnings(block, table)
                lines = self._lines(table, places, row)
                # Places ascend, and so do their lines: what comes before the first of a line
                # belongs to other lines.
                flat = np.ravel_multi_index(lines, following.shape)
                in_line = np.arange(len(flat)) - np.searchsorted(flat, flat)
                own = np.zeros(table.n, np.uint64)
                own[places] = following[lines] + in_line
                np.add.at(following, lines, 1)
                yield block, table, own

    def _numbers_of_lines(self, row: Region) -> Index:
        """The number of the first object that begins in each line (t, z, y) of a row."""
        counts = np.zeros(row.shape[:3], np.int64)
        for block, table in self._read(row):
            places = self._objects.beginnings(block, table)
            np.add.at(counts, self._lines(table, places, row), 1)
        t, z, *_ = row.relative_to(self._box.start).slices
        before = self._before[t, z, self._columns.index(row.start[2])]
        numbers: Index = before[..., None] + 1 + np.cumsum(counts, axis=2) - counts
        return numbers

    def _lines(self, table: BlockComponents, places: Index, box: Region) -> tuple[Index, ...]:
        """Along t, z and y of a box: where components at places of a table begin."""
        _, n_z, n_y, n_x = self._tables.shape
        planes, y = np.divmod(table.first[places].astype(np.int64) // n_x, n_y)
        t, z = np.divmod(planes, n_z)
        return t - box.start[0], z - box.start[1], y - box.start[2]

    def _read(self, row: Region) -> Iterator[tuple[int, BlockComponents]]:
        """The blocks of a row, along x."""
        grid = self._tables.grid
        blocks = sorted(touching(grid, row), key=lambda block: grid[block].core.start[-1])
        return self._threads.ordered(self._tables.read, blocks)


class _Cache:
    """What was read of the last blocks, without planes, within a budget; for several threads."""

    def __init__(self, read: Callable[[int], BlockComponents], budget_bytes: int) -> None:
        self._read, self._left_bytes = read, budget_bytes
        self._kept: OrderedDict[int, BlockComponents] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, block: int) -> BlockComponents:
        with self._lock:
            if block in self._kept:
                self._kept.move_to_end(block)
                return self._kept[block]
        table = replace(self._read(block), planes={}, owners=None)
        with self._lock:
            if block not in self._kept:
                self._kept[block] = table
                self._left_bytes -= _n_bytes(table)
            while self._left_bytes < 0 and self._kept:
                self._left_bytes += _n_bytes(self._kept.popitem(last=False)[1])
        return table


def _n_bytes(table: BlockComponents) -> int:
    return table.first.nbytes + (0 if table.sizes is None else table.sizes.nbytes)


def _slabs(grid: BlockGrid) -> Iterator[list[Region]]:
    """The rows of each slab, slabs in raster order."""
    t, z, y, _ = (
        list(itertools.pairwise(itertools.accumulate(lengths, initial=start)))
        for lengths, start in zip(grid.chunks, grid.region.start, strict=True)
    )
    # Cores of several frames interleave along z: then all of them are one slab.
    is_single = max(grid.chunks[0], default=1) == 1
    for frames in t:
        for places in ([place] for place in z) if is_single else [z]:
            yield [_row(grid.region, (frames, *rest)) for rest in itertools.product(places, y)]


def _row(region: Region, bounds: tuple[tuple[int, int], ...]) -> Region:
    starts, stops = zip(*bounds, strict=True)
    return Region((*starts, region.start[-1]), (*stops, region.stop[-1]))


def _owners_of_objects(held: Held, tables: Tables, threads: Threads) -> NDArray[np.uint64]:
    """At each root the one owner of its object, NOBODY where there is none or several."""
    highest = np.empty(len(held.ids), np.uint64)
    for block, table in threads.ordered(tables.read, held.blocks()):
        highest[held.slice_of(block)] = _owners(table)[held.places(block, table)]
    # A component without an owner agrees with every other: the highest of all, for the lowest.
    lowest = np.where(highest == NOBODY, np.uint64(SEVERAL), highest)
    held.fold(np.maximum, highest)
    held.fold(np.minimum, lowest)
    highest[(lowest != highest) | (highest == SEVERAL)] = NOBODY
    return highest


def _sizes(table: BlockComponents) -> NDArray[np.uint64]:
    """The sizes, where they are needed."""
    assert table.sizes is not None, table.core
    return table.sizes


def _owners(table: BlockComponents) -> NDArray[np.uint64]:
    """A copy of the owners."""
    assert table.owners is not None, table.core
    return table.owners.copy()
