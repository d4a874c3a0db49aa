"""Ray actors that carry out blocks, and the bounded, fault-tolerant scheduling of their leases.

    driver  ──(stage, block numbers)──>  actor: read ▸ forward ▸ write  <──voxels──>  Zarr
            <──────(checksums)─────────

No voxel passes through the driver or Ray's object store. Retries live here and nowhere else: the
actors have `max_restarts=0, max_task_retries=0`, because Ray's own are spent before a lost node is
declared dead, or never end on a block that kills its worker.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from bigseg.cluster import Cluster, connect, set_worker_threads
from bigseg.engine import available_cpus
from bigseg.errors import BigsegError, ResourceError
from bigseg.leases import Lease, LeaseBook
from bigseg.plan import Plan
from bigseg.segment import SegmentResult, carry_out, n_workers_for, prepare
from bigseg.stages import BlockReport, Worker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bigseg.config import SegmentConfig
    from bigseg.progress import Progress

logger = logging.getLogger(__name__)

LEASES_IN_FLIGHT = 2
START_TIMEOUT_S = 180.0


class SegmentActor:
    """One worker process; holds the network and its open arrays between leases."""

    def __init__(self, plan: dict[str, Any], n_threads: int) -> None:
        set_worker_threads(n_threads)
        self._worker = Worker(Plan.model_validate(plan), n_threads)

    def prepare(self, stage: str) -> None:
        """Open what the stage needs; raises what stops it from working at all."""
        self._worker.prepare(stage)

    def run(self, stage: str, blocks: tuple[int, ...]) -> tuple[list[BlockReport], float]:
        """The reports of these blocks, and the seconds that they took."""
        started = time.perf_counter()
        return list(self._worker.run(stage, blocks)), time.perf_counter() - started


@dataclass
class _Member:
    """An actor of the pool: what it answers when it is ready, and its leases, oldest first."""

    actor: Any
    starting: Any
    flying: list[tuple[Any, Lease]] = field(default_factory=list)

    def takes_more(self) -> bool:
        """Whether another lease may be sent to it."""
        return (
            self.starting is None
            and len(self.flying) < LEASES_IN_FLIGHT
            and not any(lease.alone for _, lease in self.flying)
        )

    def awaited(self) -> Any:  # noqa: ANN401 - Ray's reference has no useful type
        """What it answers next; an actor answers its oldest lease first. None: nothing is asked."""
        return self.starting or (self.flying[0][0] if self.flying else None)


class RayExecutor:
    """A pool of actors for one plan; a context manager that ends them."""

    def __init__(self, plan: Plan, *, n_workers: int, n_threads: int, n_gpus: float) -> None:
        self._plan = plan.model_dump(mode="json")
        self._n_workers = n_workers
        self._n_threads = n_threads
        self._n_gpus = n_gpus
        self._pool: list[_Member] = []
        self._deaths_in_a_row = 0

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._pool:
            ray.kill(member.actor)
        self._pool.clear()

    def run(self, stage: str, blocks: Iterable[int], n_blocks: int) -> Iterator[BlockReport]:
        """Reports of all blocks in the order in which they come; errors only after all tries.

        Raises:
            ResourceError: workers cannot be placed, or keep dying without finishing a block.
        """
        n_workers = min(self._n_workers, n_blocks)
        while len(self._pool) < n_workers:
            self._pool.append(self._start(stage))
        book = LeaseBook.of(blocks, n_blocks, n_workers=n_workers)
        while True:
            for member in self._pool:
                self._feed(member, stage, book)
            if not any(member.flying for member in self._pool) and book.is_empty():
                return
            member = self._next_to_answer()
            try:
                answer = ray.get(member.awaited())
            except RayTaskError as error:
                # Errors of blocks are in their reports; this one stops the worker from working.
                if isinstance(error.cause, BigsegError):
                    raise error.cause from None
                raise
            except RayError as error:
                yield from self._replace(member, stage, book, error)
                continue
            if member.starting is not None:
                member.starting = None
                continue
            self._deaths_in_a_row = 0
            reports, seconds = answer
            book.done(len(member.flying.pop(0)[1].blocks), seconds)
            for report in reports:
                if report.error is None or book.failed(report.block):
                    yield report

    def _feed(self, member: _Member, stage: str, book: LeaseBook) -> None:
        while member.takes_more():
            lease = book.next(idle=not member.flying)
            if lease is None:
                return
            member.flying.append((member.actor.run.remote(stage, lease.blocks), lease))

    def _next_to_answer(self) -> _Member:
        awaited = {member.awaited(): member for member in self._pool if member.awaited()}
        # A worker at work may take long; one that only starts may not.
        busy = any(member.flying for member in self._pool)
        timeout = None if busy else START_TIMEOUT_S
        ready, _ = ray.wait(list(awaited), num_returns=1, timeout=timeout)
        if not ready:
            raise ResourceError(
                f"{len(self._pool)} workers of {self._n_threads} CPUs and {self._n_gpus:g} GPUs "
                f"could not be placed within {START_TIMEOUT_S:.0f} s: ask for fewer with "
                "--workers, or see with `ray status` what the cluster has"
            )
        return awaited[ready[0]]

    def _replace(
        self, member: _Member, stage: str, book: LeaseBook, error: RayError
    ) -> Iterator[BlockReport]:
        """Put a new actor in the place of a dead one; gives the blocks that it killed it with."""
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > 3 * self._n_workers:
            raise ResourceError(
                f"workers died {self._deaths_in_a_row} times in a row without finishing a block "
                f"({error}): is there enough memory for {self._n_workers} of them?"
            ) from error
        leases = [lease for _, lease in member.flying]
        reason = f"its worker died: {str(error).strip().splitlines()[0]}"
        logger.warning("a worker died with %d leases in flight: %s", len(leases), reason)
        lost = book.died(leases[0] if leases else None, leases[1:])
        ray.kill(member.actor)
        self._pool[self._pool.index(member)] = self._start(stage)
        for block in lost:
            yield BlockReport(block, error=f"block {block}: {reason}")

    def _start(self, stage: str) -> _Member:
        remote = ray.remote(SegmentActor).options(
            num_cpus=self._n_threads, num_gpus=self._n_gpus, max_restarts=0, max_task_retries=0
        )
        actor: Any = remote.remote(self._plan, self._n_threads)
        return _Member(actor, starting=actor.prepare.remote(stage))


def segment_on_ray(config: SegmentConfig, progress: Progress) -> SegmentResult:
    """Segment as `config` says on a Ray cluster, or on a private Ray of this machine.

    Raises:
        BigsegError: the image, the model, the output or the cluster cannot be used.
    """
    n_cpus = max(available_cpus(), config.workers or 1)
    with connect(config.address, n_cpus=n_cpus) as cluster:
        plan, ledger = prepare(config, device="cuda" if cluster.n_gpus else "cpu")
        n_workers, n_threads, n_gpus = _share(cluster, config, plan)
        with RayExecutor(plan, n_workers=n_workers, n_threads=n_threads, n_gpus=n_gpus) as pool:
            return carry_out(plan, ledger, pool, progress)


def _share(cluster: Cluster, config: SegmentConfig, plan: Plan) -> tuple[int, int, float]:
    """Workers, and the CPUs and GPUs of each."""
    if plan.engine.device == "cuda":
        n_workers = config.workers or cluster.n_gpus
        n_gpus = min(1.0, cluster.n_gpus / n_workers)
    else:
        n_workers = config.workers or n_workers_for(plan, cluster.n_cpus)
        n_gpus = 0.0
    return n_workers, cluster.cpus_a_worker(n_workers), n_gpus
