"""Which blocks a worker gets next, and who is to blame when one dies. Knows no Ray and no Zarr.

    waiting ──lease──> in flight ──report──> done
       ^                  │  └── report with an error: again, elsewhere, at most `max_tries` times
       └── a worker died ─┘      all that it had in flight is suspect: each of those blocks is tried
                                 alone, so that no innocent one is blamed for a block that kills

Blocks and workers are told apart by where a block fails. One that fails with several workers is set
aside. A worker with `PUT_ON_HOLD_AFTER` failures in a row gets nothing until others have tried
those blocks: where they succeed, it is the worker that is broken. Blocks that die with a node that
is lost (`is_lost`) are innocent.

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
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

# Blocks that are looked at in one step: bounds the memory of a step to half a megabyte.
WIDEST_STEP = 1 << 16
PUT_ON_HOLD_AFTER = 3
# A worker is hanging when it takes this many times as long as the slowest lease so far.
SLOWER_BY = 10.0
UNKNOWN_PACE_S = 1800.0


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
class _Doubts:
    """With whom a block failed: the workers that reported an error, the nodes it died on."""

    workers: set[int] = field(default_factory=set)
    n_errors: int = 0
    nodes: list[str] = field(default_factory=list)


def _never(node: str) -> bool:
    del node
    return False


@dataclass
class LeaseBook:
    """The waiting, running and suspect blocks of one stage.

    `pending` says of each block of the stage whether it is to be done. It is kept, not copied, and
    never changed; nobody else may change it either. `is_lost` says of a node whether it is gone.
    """

    pending: NDArray[np.bool_]
    n_workers: int
    max_tries: int = 3
    lease_s: float = 10.0
    longest: int = 256
    shortest_deadline_s: float = 60.0
    is_lost: Callable[[str], bool] = _never
    _parts: dict[int, _Part] = field(init=False)
    _n_waiting: int = field(init=False)
    _again: deque[int] = field(init=False, default_factory=deque)
    _suspects: deque[int] = field(init=False, default_factory=deque)
    _doubts: dict[int, _Doubts] = field(init=False, default_factory=dict)
    _streaks: dict[int, int] = field(init=False, default_factory=dict)
    _broken: set[int] = field(init=False, default_factory=set)
    _retired: set[int] = field(init=False, default_factory=set)
    _pace_s: float | None = field(init=False, default=None)
    _slowest_s: float = field(init=False, default=0.0)
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
        asks next and has not tried them, then come the next ones of the worker's own part. When
        that is used up, an idle worker takes the later half of what is left of the largest part for
        its own. A worker whose number is not below `n_workers` begins with nothing of its own.
        """
        if worker in self._retired or self._is_on_hold(worker):
            return None
        if idle and self._suspects:
            return Lease((self._suspects.popleft(),), alone=True)
        size = self._size()
        if self._again and (again := self._take_again(worker, size)):
            return Lease(again)
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
        self._slowest_s = max(self._slowest_s, pace)

    def deadline_s(self, lease: Lease) -> float:
        """Seconds after which a worker that has only this lease to do is taken for hanging."""
        if not self._slowest_s:
            return max(UNKNOWN_PACE_S, self.shortest_deadline_s)
        return max(self.shortest_deadline_s, SLOWER_BY * self._slowest_s * len(lease.blocks))

    def succeeded(self, block: int, worker: int) -> None:
        """Note that a worker did a block; those that failed at it are to blame themselves."""
        self._streaks.pop(worker, None)
        if (doubts := self._doubts.pop(block, None)) is not None:
            others = doubts.workers - {worker}
            self._broken |= {w for w in others if self._streaks.get(w, 0) >= PUT_ON_HOLD_AFTER}

    def failed(self, block: int, worker: int, *, is_input: bool = False) -> bool:
        """Note that a block raised an error; True when it has used up its tries.

        `is_input` says that it is the input that cannot be read, whoever reads it.
        """
        doubts = self._doubts.setdefault(block, _Doubts())
        for other in doubts.workers - {worker}:
            # Both fail at it: it is the block.
            self._streaks.pop(other, None)
        if not is_input and not doubts.workers - {worker}:
            self._streaks[worker] = self._streaks.get(worker, 0) + 1
        doubts.workers.add(worker)
        doubts.n_errors += 1
        if self._is_out_of_tries(doubts):
            del self._doubts[block]
            return True
        self._again.append(block)
        return False

    def broken(self) -> set[int]:
        """The workers that fail where others succeed; each is told once, and starts afresh."""
        broken, self._broken = self._broken, set()
        for worker in broken:
            self._streaks.pop(worker, None)
        return broken

    def retire(self, worker: int) -> None:
        """Give a worker nothing any more; its part is there for the others to steal."""
        self._retired.add(worker)

    def returned(self, leases: Iterable[Lease]) -> None:
        """Take back the blocks of leases that were not begun or are not awaited; nobody's fault."""
        for lease in leases:
            self._again.extend(lease.blocks)

    def died(self, leases: Iterable[Lease], *, node: str = "") -> list[int]:
        """Note that a worker on `node` died with `leases`; returns the blocks out of tries.

        The leases of a worker overlap, so any of their blocks may have killed it. Only a block that
        was the only one in flight is charged; several are suspects, and each is tried alone.
        """
        blocks = [block for lease in leases for block in lease.blocks]
        if len(blocks) == 1:
            doubts = self._doubts.setdefault(blocks[0], _Doubts())
            doubts.nodes.append(node)
            if self._is_out_of_tries(doubts):
                del self._doubts[blocks[0]]
                return blocks
        self._suspects.extend(blocks)
        return []

    def _is_out_of_tries(self, doubts: _Doubts) -> bool:
        if doubts.n_errors + len(doubts.nodes) < self.max_tries:
            return False
        doubts.nodes = [node for node in doubts.nodes if not self.is_lost(node)]
        return doubts.n_errors + len(doubts.nodes) >= self.max_tries

    def _is_on_hold(self, worker: int) -> bool:
        """Whether others are to try first what this worker failed at, and there are others."""
        if self._streaks.get(worker, 0) < PUT_ON_HOLD_AFTER:
            return False
        return any(
            self._streaks.get(other, 0) < PUT_ON_HOLD_AFTER
            for other in range(self.n_workers)
            if other != worker and other not in self._retired
        )

    def _take_again(self, worker: int, n: int) -> tuple[int, ...]:
        """Blocks that failed, to be tried by a worker that has not, where there is another."""
        at_work = set(range(self.n_workers)) - self._retired
        taken: list[int] = []
        for _ in range(len(self._again)):
            block = self._again.popleft()
            tried = self._doubts[block].workers if block in self._doubts else set()
            if len(taken) < n and (worker not in tried or at_work <= tried):
                taken.append(block)
            else:
                self._again.append(block)
        return tuple(taken)

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

    def _size(self) -> int:
        by_pace = self._blindly
        if self._pace_s is not None:
            by_pace = int(self.lease_s / max(self._pace_s, 1e-6))
        by_share = (self._n_waiting + len(self._again)) // (4 * self.n_workers)
        return max(1, min(by_pace, by_share, self.longest))
