"""Ray actors that carry out blocks, and the bounded, fault-tolerant scheduling of their leases.

    driver  ──(stage, block numbers)──>  actor: read ▸ forward ▸ write  <──voxels──>  Zarr
            <──────(checksums)─────────

No voxel passes through the driver or Ray's object store. Retries live here and nowhere else: the
actors have `max_restarts=0, max_task_retries=0`, because Ray's own are spent before a lost node is
declared dead, or never end on a block that kills its worker. A worker that dies, hangs (Ray never
says so) or fails where others succeed is replaced.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from bigseg.cluster import is_lost, set_worker_threads
from bigseg.errors import BigsegError, ResourceError
from bigseg.leases import Lease, LeaseBook
from bigseg.ledger import EMPTY_MARK
from bigseg.plan import Plan
from bigseg.reports import BlockReport
from bigseg.stages import Worker

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from numpy.typing import NDArray

    from bigseg.machine import Workers
    from bigseg.transform import Transform

logger = logging.getLogger(__name__)

LEASES_IN_FLIGHT = 2
START_TIMEOUT_S = 180.0
POLL_S = 1.0
# A worker that fails where others succeed is started again so many times, then given up.
MAX_BREAKS = 2


class SegmentActor:
    """One worker process; holds the network and its open arrays between leases.

    Two leases run in it at a time, in threads: the second's blocks are read while the first's are
    computed. `owner` is the holder of the output's lock, for whom it writes.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        n_threads: int,
        transform: Transform | None,
        owner: str | None = None,
    ) -> None:
        set_worker_threads(n_threads)
        self._worker = Worker(
            Plan.model_validate(plan), n_threads, transform=transform, owner=owner
        )
        self._lock = threading.Lock()
        self._last_end_s = 0.0

    def prepare(self, stage: str) -> str:
        """Open what the stage needs; raises what stops it from working at all. Gives the node."""
        self._worker.prepare(stage)
        node: str = ray.get_runtime_context().get_node_id()
        return node

    def run(self, stage: str, blocks: tuple[int, ...]) -> tuple[list[BlockReport], float]:
        """The reports of these blocks, and the seconds that they took by themselves.

        After `stop` those that have not been begun are left out.
        """
        started = time.perf_counter()
        reports = list(self._worker.run(stage, blocks))
        if reports:
            reports[-1] = replace(reports[-1], spent=self._worker.take_spent())
        with self._lock:
            # A lease that began behind another one waited for it.
            started = max(started, self._last_end_s)
            self._last_end_s = time.perf_counter()
            return reports, self._last_end_s - started

    def stop(self) -> None:
        """Begin no further block."""
        self._worker.stopping.set()


@dataclass
class _Member:
    """An actor of the pool: what it answers when it is ready, and its leases, oldest first.

    `since_s` is when it began with the oldest, or began to start; `n_breaks` how often the worker
    in this place failed where others succeeded.
    """

    actor: Any
    starting: Any
    flying: list[tuple[Any, Lease]] = field(default_factory=list)
    since_s: float = field(default_factory=time.monotonic)
    node: str = ""
    n_breaks: int = 0

    @property
    def is_retired(self) -> bool:
        """Whether nobody works in this place any more."""
        return self.actor is None

    @property
    def waits_s(self) -> float:
        """How long its answer is awaited."""
        return time.monotonic() - self.since_s

    def takes_more(self, n_leases: int) -> bool:
        """Whether another lease may be sent to it, so that it has at most `n_leases`."""
        return (
            not self.is_retired
            and self.starting is None
            and len(self.flying) < n_leases
            and not any(lease.alone for _, lease in self.flying)
        )

    def awaited(self) -> Any:  # noqa: ANN401 - Ray's reference has no useful type
        """What it answers next; an actor answers its oldest lease first. None: nothing is asked."""
        return self.starting or (self.flying[0][0] if self.flying else None)

    def send(self, stage: str, lease: Lease) -> None:
        """Hand it a lease."""
        if not self.flying:
            self.since_s = time.monotonic()
        self.flying.append((self.actor.run.remote(stage, lease.blocks), lease))

    def answered(self) -> None:
        """Its oldest lease has come back."""
        self.flying.pop(0)
        self.since_s = time.monotonic()

    def leases(self) -> list[Lease]:
        """What it has in flight."""
        return [lease for _, lease in self.flying]


class RayExecutor:
    """A pool of actors for one plan; a context manager that ends them.

    `owner` holds the lock of the output. No worker is taken for hanging before `deadline_s`.
    """

    def __init__(
        self,
        plan: Plan,
        workers: Workers,
        *,
        transform: Transform | None = None,
        owner: str | None = None,
        deadline_s: float = 60.0,
    ) -> None:
        self._made_with = (plan.model_dump(mode="json"), workers.n_threads, transform, owner)
        self.n_workers = workers.n
        self.n_deaths = 0
        self._workers = workers
        self._deadline_s = deadline_s
        self._pool: list[_Member] = []
        self._deaths_in_a_row = 0

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._pool:
            if not member.is_retired:
                ray.kill(member.actor)
        self._pool.clear()

    def run(
        self,
        stage: str,
        pending: NDArray[np.bool_],
        stopping: threading.Event | None = None,
    ) -> Generator[BlockReport, None, None]:
        """Reports of all blocks in the order in which they come; errors only after all tries.

        When `stopping` is set, the blocks in flight are finished, and the others are left out.

        Raises:
            ResourceError: workers cannot be placed, or keep dying without finishing a block.
        """
        # Who was given up in the stage before gets another chance in this one.
        self._pool = [member for member in self._pool if not member.is_retired]
        n_workers = min(self.n_workers, int(np.count_nonzero(pending)))
        while len(self._pool) < n_workers:
            self._pool.append(self._start(stage))
        book = LeaseBook(
            pending, len(self._pool), shortest_deadline_s=self._deadline_s, is_lost=is_lost
        )
        stopping = stopping or threading.Event()
        told = False
        while True:
            if not stopping.is_set():
                self._feed_all(stage, book)
            elif not told:
                told = True
                for member in self._pool:
                    if member.flying:
                        member.actor.stop.remote()
            flying = any(member.flying for member in self._pool)
            if not flying and (book.is_empty() or stopping.is_set()):
                return
            answering = self._next_to_answer()
            if answering is None:
                yield from self._replace_hanging(stage, book)
                continue
            member = answering
            try:
                answer = ray.get(member.awaited())
            except RayTaskError as error:
                # Errors of blocks are in their reports; this one stops the worker from working.
                if isinstance(error.cause, BigsegError):
                    raise error.cause from None
                raise
            except RayError as error:
                reason = f"its worker died: {str(error).strip().splitlines()[0]}"
                yield from self._replace_dead(member, stage, book, reason)
                continue
            if member.starting is not None:
                member.starting, member.node = None, answer or ""
                continue
            yield from self._take_answer(member, answer, book)
            for number in book.broken():
                self._replace_broken(number, stage, book)

    def _feed_all(self, stage: str, book: LeaseBook) -> None:
        # Everyone gets a first lease before anyone gets a second.
        for n_leases in range(1, LEASES_IN_FLIGHT + 1):
            for number, member in enumerate(self._pool):
                while member.takes_more(n_leases):
                    lease = book.next(number, idle=not member.flying)
                    if lease is None:
                        break
                    member.send(stage, lease)

    def _take_answer(
        self, member: _Member, answer: tuple[list[BlockReport], float], book: LeaseBook
    ) -> Iterator[BlockReport]:
        reports, seconds = answer
        number = self._pool.index(member)
        member.answered()
        self._deaths_in_a_row = 0
        # Blocks that are skipped say nothing of how long the others take, nor do failures.
        if reports and not any(r.error for r in reports):
            book.done(sum(r.checksum != EMPTY_MARK for r in reports), seconds)
        for report in reports:
            if report.error is None:
                book.succeeded(report.block, number)
                yield report
            # What no other try can mend ends the run: it is told at once.
            elif report.kind == "permanent" or book.failed(
                report.block, number, is_input=report.kind == "input"
            ):
                yield report

    def _next_to_answer(self) -> _Member | None:
        """A member that has answered; None when nobody does for a while."""
        awaited = {member.awaited(): member for member in self._pool if member.awaited()}
        if not awaited:
            time.sleep(POLL_S)
            return None
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=POLL_S)
        return awaited[ready[0]] if ready else None

    def _replace_hanging(self, stage: str, book: LeaseBook) -> Iterator[BlockReport]:
        for member in list(self._pool):
            if not member.flying:
                continue
            deadline_s = book.deadline_s(member.leases()[0])
            if member.waits_s > deadline_s:
                reason = f"its worker did not answer for {member.waits_s:.0f} s"
                yield from self._replace_dead(member, stage, book, reason)
        # A worker at work may take long; one that only starts may not.
        if any(member.flying for member in self._pool):
            return
        late = [m for m in self._pool if m.starting and m.waits_s > START_TIMEOUT_S]
        others = any(not m.is_retired and m.starting is None for m in self._pool)
        if late and not others:
            raise ResourceError(
                f"{len(self._pool)} workers of {self._workers.n_threads} CPUs and "
                f"{self._workers.n_gpus:g} GPUs "
                f"could not be placed within {START_TIMEOUT_S:.0f} s: ask for fewer with "
                "--workers, or see with `ray status` what the cluster has"
            )
        for member in late:
            logger.warning(
                "a worker found no place within %.0f s: the others go on without it",
                START_TIMEOUT_S,
            )
            self._retire(self._pool.index(member), book)

    def _replace_dead(
        self, member: _Member, stage: str, book: LeaseBook, reason: str
    ) -> Iterator[BlockReport]:
        """Put a new actor in the place of a dead one; gives the blocks that it killed it with."""
        self.n_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > 3 * self.n_workers:
            raise ResourceError(
                f"workers died {self._deaths_in_a_row} times in a row without finishing a block "
                f"({reason}): is there enough memory for {self.n_workers} of them?"
            )
        logger.warning(
            "a worker is replaced with %d leases in flight: %s", len(member.flying), reason
        )
        ray.kill(member.actor)
        lost = book.died(member.leases(), node=member.node)
        self._put(self._pool.index(member), self._start(stage), member.n_breaks)
        for block in lost:
            yield BlockReport(block, error=f"block {block}: {reason}")

    def _replace_broken(self, number: int, stage: str, book: LeaseBook) -> None:
        """Start a worker again that fails where others succeed, and in the end do without it."""
        member = self._pool[number]
        self.n_deaths += 1
        book.returned(member.leases())
        if member.n_breaks >= MAX_BREAKS:
            logger.warning("a worker fails again and again: the others go on without it")
            self._retire(number, book)
            return
        logger.warning("a worker fails at blocks that others can do: it is started again")
        ray.kill(member.actor)
        self._put(number, self._start(stage), member.n_breaks + 1)

    def _retire(self, number: int, book: LeaseBook) -> None:
        member = self._pool[number]
        ray.kill(member.actor)
        member.actor = member.starting = None
        member.flying.clear()
        book.retire(number)

    def _put(self, number: int, member: _Member, n_breaks: int) -> None:
        member.n_breaks = n_breaks
        self._pool[number] = member

    def _start(self, stage: str) -> _Member:
        remote = ray.remote(SegmentActor).options(
            num_cpus=self._workers.n_threads,
            num_gpus=self._workers.n_gpus,
            max_restarts=0,
            max_task_retries=0,
            # One more for `stop`.
            max_concurrency=LEASES_IN_FLIGHT + 1,
        )
        actor: Any = remote.remote(*self._made_with)
        return _Member(actor, starting=actor.prepare.remote(stage))
