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
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

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
    """An actor of the pool and its leases in flight, oldest first."""

    actor: Any
    flying: list[tuple[Any, Lease]] = field(default_factory=list)

    def takes_more(self) -> bool:
        return len(self.flying) < LEASES_IN_FLIGHT and not any(
            lease.alone for _, lease in self.flying
        )


class RayExecutor:
    """A pool of actors for one plan; a context manager that ends them."""

    def __init__(self, plan: Plan, *, n_workers: int, n_threads: int, n_gpus: float) -> None:
        self._plan = plan.model_dump(mode="json")
        self._n_workers = n_workers
        self._n_threads = n_threads
        self._n_gpus = n_gpus
        self._pool: list[_Member] = []

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
        self._fill_pool(stage, n_workers)
        book = LeaseBook.of(blocks, n_blocks, n_workers=n_workers)
        deaths_in_a_row = 0
        while True:
            for member in self._pool:
                self._feed(member, stage, book)
            # An actor answers its oldest lease first; its later ones are not ready before.
            oldest = {member.flying[0][0]: member for member in self._pool if member.flying}
            if not oldest:
                return
            ready, _ = ray.wait(list(oldest), num_returns=1)
            member = oldest[ready[0]]
            try:
                reports, seconds = ray.get(ready[0])
            except RayTaskError:
                # The actor's own methods report the errors of blocks; this one is bigseg's.
                raise
            except RayError as error:
                deaths_in_a_row += 1
                if deaths_in_a_row > 3 * self._n_workers:
                    raise ResourceError(
                        f"workers died {deaths_in_a_row} times in a row without finishing a block "
                        f"({error}): is there enough memory for {self._n_workers} of them?"
                    ) from error
                yield from self._replace(member, stage, book, error)
                continue
            deaths_in_a_row = 0
            lease = member.flying.pop(0)[1]
            book.done(len(lease.blocks), seconds)
            for report in reports:
                if report.error is None or book.failed(report.block):
                    yield report

    def _feed(self, member: _Member, stage: str, book: LeaseBook) -> None:
        while member.takes_more():
            lease = book.next(idle=not member.flying)
            if lease is None:
                return
            member.flying.append((member.actor.run.remote(stage, lease.blocks), lease))

    def _replace(
        self, member: _Member, stage: str, book: LeaseBook, error: RayError
    ) -> Iterator[BlockReport]:
        leases = [lease for _, lease in member.flying]
        reason = f"its worker died: {str(error).strip().splitlines()[0]}"
        logger.warning("a worker died with %d leases in flight: %s", len(leases), reason)
        lost = book.died(leases[0] if leases else None, leases[1:])
        ray.kill(member.actor)
        self._pool.remove(member)
        for block in lost:
            yield BlockReport(block, error=f"block {block}: {reason}")
        self._fill_pool(stage, len(self._pool) + 1)

    def _fill_pool(self, stage: str, n_workers: int) -> None:
        new = [_Member(self._start_actor()) for _ in range(n_workers - len(self._pool))]
        self._pool.extend(new)
        waiting = [member.actor.prepare.remote(stage) for member in self._pool]
        try:
            ray.get(waiting, timeout=START_TIMEOUT_S)
        except GetTimeoutError:
            raise ResourceError(
                f"{n_workers} workers of {self._n_threads} CPUs and {self._n_gpus:g} GPUs could "
                f"not be placed within {START_TIMEOUT_S:.0f} s: ask for fewer with --workers, or "
                "see with `ray status` what the cluster has"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, BigsegError):
                raise error.cause from None
            raise

    def _start_actor(self) -> Any:  # noqa: ANN401 - Ray's handle has no useful type
        remote = ray.remote(SegmentActor).options(
            num_cpus=self._n_threads, num_gpus=self._n_gpus, max_restarts=0, max_task_retries=0
        )
        return remote.remote(self._plan, self._n_threads)


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
