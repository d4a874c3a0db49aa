"""Which blocks a worker gets next, and who is to blame when one dies. Knows no Ray and no Zarr.

    waiting ──lease──> in flight ──report──> done
       ^                  │  └── report with an error: again elsewhere, at most `max_tries` times
       └── a worker died ─┘      its running lease is suspect: each of those blocks is tried alone,
                                 so that no innocent neighbour is blamed for a block that kills

Leases grow with the pace of the blocks up to `lease_s` seconds of work, so that the driver spends
microseconds a block, and shrink towards the end, so that the workers finish together.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class Lease:
    """Blocks handed to a worker in one call; `alone` means that no second lease is behind it."""

    blocks: tuple[int, ...]
    alone: bool = False


@dataclass
class LeaseBook:
    """The waiting, running and suspect blocks of one stage."""

    n_workers: int
    max_tries: int = 3
    lease_s: float = 10.0
    longest: int = 256
    _waiting: Iterator[int] = field(default_factory=lambda: iter(()))
    _again: deque[int] = field(default_factory=deque)
    _suspects: deque[int] = field(default_factory=deque)
    _tries: dict[int, int] = field(default_factory=dict)
    _left: int = 0
    _pace_s: float | None = None

    @classmethod
    def of(cls, blocks: Iterable[int], n_blocks: int, *, n_workers: int) -> LeaseBook:
        """A book for `n_blocks` blocks, which are taken from `blocks` as they are needed."""
        return cls(n_workers, _waiting=iter(blocks), _left=n_blocks)

    def next(self, *, idle: bool) -> Lease | None:
        """A lease for a worker, or None where there is none for it now.

        Suspects go to idle workers only, one by one.
        """
        if idle and self._suspects:
            return Lease((self._suspects.popleft(),), alone=True)
        blocks: list[int] = []
        while len(blocks) < self._size():
            block = self._again.popleft() if self._again else next(self._waiting, None)
            if block is None:
                break
            blocks.append(block)
        return Lease(tuple(blocks)) if blocks else None

    def is_empty(self) -> bool:
        """Whether no block waits; some may still be in flight."""
        if not (self._again or self._suspects):
            self._again.extend(islice(self._waiting, 1))
        return not (self._again or self._suspects)

    def done(self, n_blocks: int, seconds: float) -> None:
        """Note that a worker took `seconds` for `n_blocks`."""
        pace = seconds / max(1, n_blocks)
        self._pace_s = pace if self._pace_s is None else 0.7 * self._pace_s + 0.3 * pace
        self._left -= n_blocks

    def failed(self, block: int) -> bool:
        """Note that a block raised an error; True when it has used up its tries."""
        if self._charge(block):
            return True
        self._again.append(block)
        return False

    def died(self, running: Lease | None, queued: Iterable[Lease]) -> list[int]:
        """Note that a worker died; returns the blocks that have used up their tries."""
        for lease in queued:
            self._again.extend(lease.blocks)
        if running is None:
            return []
        if not running.alone and len(running.blocks) > 1:
            # Nobody knows which it was: no charge, but each is tried alone.
            self._suspects.extend(running.blocks)
            return []
        lost = [block for block in running.blocks if self._charge(block)]
        self._suspects.extend(block for block in running.blocks if block not in lost)
        return lost

    def _charge(self, block: int) -> bool:
        self._tries[block] = self._tries.get(block, 0) + 1
        return self._tries[block] >= self.max_tries

    def _size(self) -> int:
        if self._pace_s is None:
            return 1
        by_pace = int(self.lease_s / max(self._pace_s, 1e-6))
        by_share = self._left // (4 * self.n_workers)
        return max(1, min(by_pace, by_share, self.longest))
