"""Which components of all blocks are one. It knows neither their sizes nor their order.

    pairs of all blocks ──> held components (blocks in order, ids ascending) ──> union-find
         (2, 7) = (3, 1)         node 0: block 2, id 7                           root 0
         (3, 1) = (5, 4)         node 1: block 3, id 1                           root 0
                                 node 2: block 5, id 4                           root 0

Only components that are equal to one of another block are held: 8 bytes each when all is done, and
at most 40 while they are collected.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bigseg.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from bigseg.blocks import BlockGrid, Vec
    from bigseg.faces import BlockComponents

    Pairs = NDArray[np.uint32]

CHUNK = 1 << 18
_ID_BITS = np.uint64(32)
_LOW = np.uint64(2**32 - 1)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Tables:
    """The components of all blocks of a grid, read when they are wanted, by several threads.

    Attributes:
        grid: the blocks; its region may be a part of the volume.
        shape: the volume (t, z, y, x), in whose raster order `BlockComponents.first` counts.
        read: the components of a block; planes are not used. Called several times for a block.
        pairs: the numbers of a block's neighbours and the pairs (m, 2) of equal local ids (in the
            block, in the neighbour), for half of the neighbours. Called twice for each block.
    """

    grid: BlockGrid
    shape: Vec
    read: Callable[[int], BlockComponents]
    pairs: Callable[[int], Iterable[tuple[int, Pairs]]]


class UnionFind:
    """Which of n nodes are one, by pairs of equal ones, many at a time.

    Every node points to one that is not larger; roots point to themselves. The root of a set is its
    smallest node, whatever the order of the pairs.
    """

    def __init__(self, n: int) -> None:
        self._parent: NDArray[Any] = np.arange(n, dtype=np.uint32 if n <= 2**32 else np.uint64)

    def union(self, pairs: NDArray[Any]) -> None:
        """Make the two nodes of each pair (m, 2) one."""
        for start in range(0, len(pairs), CHUNK):
            self._union(pairs[start : start + CHUNK])

    def roots(self) -> NDArray[Any]:
        """The root of every node; no copy."""
        for start in range(0, len(self._parent), CHUNK):
            self._find(np.arange(start, min(start + CHUNK, len(self._parent))))
        return self._parent

    def _union(self, pairs: NDArray[Any]) -> None:
        a, b = self._find(pairs.T)
        while (is_open := a != b).any():
            a, b = a[is_open], b[is_open]
            # Of several smaller roots the smallest wins; pairs with the others come up again.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            a, b = self._find(np.stack([a, b]))

    def _find(self, nodes: NDArray[Any]) -> NDArray[Any]:
        """The roots of nodes, which point to them from now on.

        Ways halve in each step as far as the nodes on them are among those that are looked up.
        """
        parents = self._parent[nodes]
        while not np.array_equal(further := self._parent[parents], parents):
            self._parent[nodes] = parents = further
        return parents  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Held:
    """The components that are equal to one of another block, and which of them are one.

    Attributes:
        ids: their local ids, ascending in each block; their places here are their nodes.
        starts: the first node of each block, and the end.
        roots: the root of each node.
    """

    ids: NDArray[np.uint32]
    starts: NDArray[np.int64]
    roots: NDArray[Any]

    @classmethod
    def of(cls, tables: Tables, threads: Threads) -> Held:
        """Those that the pairs name.

        Raises:
            OutputError: pairs name a block that is not in the grid.
        """
        keys = _distinct(_keys_in_pairs(tables, threads))
        borders = np.arange(len(tables.grid) + 1, dtype=np.uint64) << _ID_BITS
        starts = np.searchsorted(keys, borders).astype(np.int64)
        ids = np.empty(len(keys), np.uint32)
        for start in range(0, len(keys), CHUNK):
            ids[start : start + CHUNK] = keys[start : start + CHUNK] & _LOW
        del keys
        return cls(ids, starts, _joined(ids, starts, tables, threads))

    def slice_of(self, block: int) -> slice:
        """The nodes of a block."""
        return slice(int(self.starts[block]), int(self.starts[block + 1]))

    def roots_of(self, block: int) -> NDArray[Any]:
        """The roots of a block's nodes."""
        return self.roots[self.slice_of(block)]

    def places(self, block: int, table: BlockComponents) -> NDArray[np.int64]:
        """Where in the table of a block its nodes lie, ascending.

        Raises:
            OutputError: the table has less components than pairs name.
        """
        places = self.ids[self.slice_of(block)].astype(np.int64) - 1
        if len(places) and not 0 <= places[0] <= places[-1] < table.n:
            raise _misfit(f"component {places[-1] + 1} of block {block}, which has {table.n}")
        return places

    def blocks(self) -> list[int]:
        """The blocks that have nodes."""
        return [int(block) for block in np.flatnonzero(np.diff(self.starts))]

    def fold(self, ufunc: np.ufunc, values: NDArray[np.uint64]) -> None:
        """Reduce the values of all nodes of one root at that root, in place."""
        for start in range(0, len(values), CHUNK):
            roots = self.roots[start : start + CHUNK]
            others = np.flatnonzero(roots != np.arange(start, start + len(roots)))
            ufunc.at(values, roots[others], values[start + others])


class Threads:
    """Threads that read ahead in order and write behind, a bounded number at a time."""

    def __init__(self, pool: ThreadPoolExecutor, n_waiting: int) -> None:
        self._pool, self._n_waiting = pool, n_waiting
        self._written: deque[Future[None]] = deque()

    @classmethod
    @contextmanager
    def open(cls, n_threads: int) -> Iterator[Threads]:
        """Threads that have written everything when the context ends."""
        with ThreadPoolExecutor(n_threads, "stitch") as pool:
            threads = cls(pool, 2 * n_threads)
            yield threads
            threads._finish(0)

    def ordered(
        self, read: Callable[[int], Result], items: Iterable[int]
    ) -> Iterator[tuple[int, Result]]:
        """Each item and what was read for it, in order."""
        begun: deque[tuple[int, Future[Result]]] = deque()
        for item in items:
            begun.append((item, self._pool.submit(read, item)))
            if len(begun) > self._n_waiting:
                first, future = begun.popleft()
                yield first, future.result()
        for last, future in begun:
            yield last, future.result()

    def write(
        self,
        write: Callable[[int, NDArray[np.uint64]], None],
        block: int,
        values: NDArray[np.uint64],
    ) -> None:
        """Begin to write; waits while too much is being written, and raises what went wrong."""
        self._written.append(self._pool.submit(write, block, values))
        self._finish(self._n_waiting)

    def _finish(self, n_left: int) -> None:
        while len(self._written) > n_left:
            self._written.popleft().result()


def _listed_pairs(tables: Tables, threads: Threads) -> Iterator[tuple[int, int, Pairs]]:
    """Block, neighbour and pairs, without empty ones."""
    for block, found in threads.ordered(lambda i: list(tables.pairs(i)), range(len(tables.grid))):
        for neighbour, pairs in found:
            if not 0 <= neighbour < len(tables.grid):
                raise _misfit(f"block {neighbour}, where there are {len(tables.grid)}")
            if len(pairs):
                yield block, neighbour, pairs


def _keys_in_pairs(tables: Tables, threads: Threads) -> Iterator[NDArray[np.uint64]]:
    """Block and local id of each component in the pairs, as one integer each; with repetitions."""
    for block, neighbour, pairs in _listed_pairs(tables, threads):
        yield np.uint64(block << 32) | pairs[:, 0]
        yield np.uint64(neighbour << 32) | pairs[:, 1]


def _distinct(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The distinct values, ascending. At no time there are more than half as many others."""
    known: NDArray[np.uint64] = np.zeros(0, np.uint64)
    fresh: NDArray[np.uint64] = np.empty(CHUNK, np.uint64)
    n_fresh = 0
    for part in parts:
        rest = part
        while len(rest):
            taken, rest = np.split(rest, [len(fresh) - n_fresh])
            fresh[n_fresh : n_fresh + len(taken)] = taken
            n_fresh += len(taken)
            if n_fresh == len(fresh):
                known = _merged(known, fresh)
                fresh, n_fresh = np.empty(max(CHUNK, len(known) // 2), np.uint64), 0
    return _merged(known, fresh[:n_fresh])


def _merged(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    both = np.concatenate([a, b])
    both.sort()
    is_new = np.ones(len(both), bool)
    np.not_equal(both[1:], both[:-1], out=is_new[1:])
    return both[is_new]


def _joined(
    ids: NDArray[np.uint32], starts: NDArray[np.int64], tables: Tables, threads: Threads
) -> NDArray[Any]:
    """The root of every node."""

    def nodes(block: int, wanted: NDArray[np.uint32]) -> NDArray[np.int64]:
        start, stop = starts[block : block + 2]
        return start + np.searchsorted(ids[start:stop], wanted)  # type: ignore[no-any-return]

    sets, batch, n_batch = UnionFind(len(ids)), [], 0
    for block, neighbour, pairs in _listed_pairs(tables, threads):
        batch.append(np.stack([nodes(block, pairs[:, 0]), nodes(neighbour, pairs[:, 1])], axis=1))
        n_batch += len(pairs)
        if n_batch >= CHUNK:
            sets.union(np.concatenate(batch))
            batch, n_batch = [], 0
    if batch:
        sets.union(np.concatenate(batch))
    return sets.roots()


def _misfit(what: str) -> OutputError:
    return OutputError(
        f"pairs of equal components name {what}, so the tables of this run do not fit each "
        "other: remove the folder scratch of the result, and the same command makes them again"
    )
