"""Which blocks a worker gets next, and who is to blame when one dies. Knows no Ray and no Zarr.

    waiting ──lease──> in flight ──report──> done
       ^                  │  └── report with an error: again, at most `max_tries` times
       └── a worker died ─┘      all that it had in flight is suspect: each of those blocks is tried
                                 alone, so that no innocent one is blamed for a block that kills

Each worker has a part of its own and works through it in order, because it keeps what it has read
and decoded, and blocks that follow each other share that:

    blocks       |0·································································n|
    parts        |      worker 0       |      worker 1       |      worker 2       |
    later        |====================>|=============>       |======>       |      |
                  worker 0 has used up its part: it steals the later half of the ───^
                  largest part, and works through that

The parts have equally many blocks that wait. A worker that has died for good, or never started, is
one whose part the others steal. Leases grow with the pace of the blocks up to `lease_s` seconds of
work, so that the driver spends microseconds a block, and shrink towards the end, so that the
workers finish together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

# Blocks that are looked at in one step: bounds the memory of a step to half a megabyte.
WIDEST_STEP = 1 << 16


@dataclass(frozen=True)
class Lease:
    """Blocks handed to a worker in one call; `alone` means that no second lease is behind it."""

    blocks: tuple[int, ...]
    alone: bool = False


@dataclass
class _Part:
    """The next `n_waiting` pending blocks from `start` on."""

    start: int
    n_waiting: int


@dataclass
class LeaseBook:
    """The waiting, running and suspect blocks of one stage.

    `pending` says of each block of the stage whether it is to be done. It is kept, not copied, and
    never changed; nobody else may change it either.
    """

    pending: NDArray[np.bool_]
    n_workers: int
    max_tries: int = 3
    lease_s: float = 10.0
    longest: int = 256
    _parts: dict[int, _Part] = field(init=False)
    _n_waiting: int = field(init=False)
    _again: deque[int] = field(init=False, default_factory=deque)
    _suspects: deque[int] = field(init=False, default_factory=deque)
    _tries: dict[int, int] = field(init=False, default_factory=dict)
    _pace_s: float | None = field(init=False, default=None)
    _blindly: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        assert self.n_workers > 0, self.n_workers
        self._n_waiting = int(np.count_nonzero(self.pending))
        self._parts, start = {}, 0
        cuts = (k * self._n_waiting // self.n_workers for k in range(self.n_workers + 1))
        for worker, (first, last) in enumerate(pairwise(cuts)):
            self._parts[worker] = _Part(start, last - first)
            start = self._behind(start, last - first)

    def next(self, worker: int, *, idle: bool) -> Lease | None:
        """A lease for a worker, or None where there is none for it now.

        Suspects go to idle workers only, one by one. Blocks that raised an error go to whoever
        asks next, then come the next ones of the worker's own part. When that is used up, an idle
        worker takes the later half of what is left of the largest part for its own. A worker whose
        number is not below `n_workers` begins with nothing of its own.
        """
        if idle and self._suspects:
            return Lease((self._suspects.popleft(),), alone=True)
        size = self._size()
        if self._again:
            n = min(size, len(self._again))
            return Lease(tuple(self._again.popleft() for _ in range(n)))
        blocks = self._take(worker, size, idle=idle)
        return Lease(blocks) if blocks else None

    def is_empty(self) -> bool:
        """Whether no block waits; some may still be in flight."""
        return not (self._n_waiting or self._again or self._suspects)

    def done(self, n_blocks: int, seconds: float) -> None:
        """Note that a worker took `seconds` for `n_blocks`, without those that it could skip.

        While all are skipped, leases double.
        """
        if not n_blocks:
            self._blindly = min(2 * self._blindly, self.longest)
            return
        pace = seconds / n_blocks
        self._pace_s = pace if self._pace_s is None else 0.7 * self._pace_s + 0.3 * pace

    def failed(self, block: int) -> bool:
        """Note that a block raised an error; True when it has used up its tries."""
        if self._charge(block):
            return True
        self._again.append(block)
        return False

    def died(self, leases: Iterable[Lease]) -> list[int]:
        """Note that a worker died with `leases` in flight; returns the blocks out of tries.

        The leases of a worker overlap, so any of their blocks may have killed it. Only a block that
        was the only one in flight is charged; several are suspects, and each is tried alone.
        """
        blocks = [block for lease in leases for block in lease.blocks]
        if len(blocks) == 1 and self._charge(blocks[0]):
            return blocks
        self._suspects.extend(blocks)
        return []

    def _take(self, worker: int, n: int, *, idle: bool) -> tuple[int, ...]:
        part = self._parts.get(worker)
        if part is None or not part.n_waiting:
            if not idle:
                # Another one may be idle, or about to be: it comes first.
                return ()
            part = self._parts[worker] = self._steal()
        n = min(n, part.n_waiting)
        start, part.start = part.start, self._behind(part.start, n)
        part.n_waiting -= n
        self._n_waiting -= n
        return tuple((np.flatnonzero(self.pending[start : part.start]) + start).tolist())

    def _steal(self) -> _Part:
        """The later half of the largest part; all of a single block; nothing where nothing is."""
        largest = max(self._parts.values(), key=lambda part: part.n_waiting)
        n_kept = largest.n_waiting // 2
        stolen = _Part(self._behind(largest.start, n_kept), largest.n_waiting - n_kept)
        largest.n_waiting = n_kept
        return stolen

    def _behind(self, start: int, n: int) -> int:
        """The end of the shortest stretch from `start` that holds `n` pending blocks."""
        step = max(64, n)
        while n > 0:
            step = min(step, WIDEST_STEP)
            stretch = self.pending[start : start + step]
            n_here = int(np.count_nonzero(stretch))
            if n_here >= n:
                return start + int(np.flatnonzero(stretch)[n - 1]) + 1
            assert len(stretch) == step, "more blocks were asked for than are pending"
            n, start, step = n - n_here, start + step, 2 * step
        return start

    def _charge(self, block: int) -> bool:
        self._tries[block] = self._tries.get(block, 0) + 1
        return self._tries[block] >= self.max_tries

    def _size(self) -> int:
        by_pace = self._blindly
        if self._pace_s is not None:
            by_pace = int(self.lease_s / max(self._pace_s, 1e-6))
        by_share = (self._n_waiting + len(self._again)) // (4 * self.n_workers)
        return max(1, min(by_pace, by_share, self.longest))
