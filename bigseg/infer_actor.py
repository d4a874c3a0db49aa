"""Ray actors that carry out blocks, and the bounded, fault-tolerant scheduling of their leases.

    driver  ──(stage, block numbers)──>  actor: read ▸ forward ▸ write  <──voxels──>  Zarr
            <──────(checksums)─────────

No voxel passes through the driver or Ray's object store. Retries live here and nowhere else: the
actors have `max_restarts=0, max_task_retries=0`, because Ray's own are spent before a lost node is
declared dead, or never end on a block that kills its worker.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from bigseg.cluster import Cluster, connect, set_worker_threads
from bigseg.cuda import gpu_memory
from bigseg.engine import available_cpus
from bigseg.errors import BigsegError, ResourceError
from bigseg.leases import Lease, LeaseBook
from bigseg.ledger import EMPTY_MARK
from bigseg.machine import Workers
from bigseg.plan import Plan
from bigseg.reports import BlockReport
from bigseg.segment import SegmentResult, own_resources, segment_at
from bigseg.stages import Worker
from bigseg.trial import Trial, time_tile, try_engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from bigseg.config import SegmentConfig
    from bigseg.engine import EngineSpec
    from bigseg.progress import Progress
    from bigseg.transform import Transform

logger = logging.getLogger(__name__)

LEASES_IN_FLIGHT = 2
START_TIMEOUT_S = 180.0
# Compiling a network for a trial takes a minute on few processors.
TASK_TIMEOUT_S = 900.0


class SegmentActor:
    """One worker process; holds the network and its open arrays between leases.

    Two leases run in it at a time, in threads: the second's blocks are read while the first's are
    computed.
    """

    def __init__(self, plan: dict[str, Any], n_threads: int, transform: Transform | None) -> None:
        set_worker_threads(n_threads)
        self._worker = Worker(Plan.model_validate(plan), n_threads, transform=transform)
        self._lock = threading.Lock()
        self._last_end_s = 0.0

    def prepare(self, stage: str) -> None:
        """Open what the stage needs; raises what stops it from working at all."""
        self._worker.prepare(stage)

    def run(self, stage: str, blocks: tuple[int, ...]) -> tuple[list[BlockReport], float]:
        """The reports of these blocks, and the seconds that they took by themselves."""
        started = time.perf_counter()
        reports = list(self._worker.run(stage, blocks))
        reports[-1] = replace(reports[-1], spent=self._worker.take_spent())
        with self._lock:
            # A lease that began behind another one waited for it.
            started = max(started, self._last_end_s)
            self._last_end_s = time.perf_counter()
            return reports, self._last_end_s - started


@dataclass
class _Member:
    """An actor of the pool: what it answers when it is ready, and its leases, oldest first."""

    actor: Any
    starting: Any
    flying: list[tuple[Any, Lease]] = field(default_factory=list)

    def takes_more(self, n_leases: int) -> bool:
        """Whether another lease may be sent to it, so that it has at most `n_leases`."""
        return (
            self.starting is None
            and len(self.flying) < n_leases
            and not any(lease.alone for _, lease in self.flying)
        )

    def awaited(self) -> Any:  # noqa: ANN401 - Ray's reference has no useful type
        """What it answers next; an actor answers its oldest lease first. None: nothing is asked."""
        return self.starting or (self.flying[0][0] if self.flying else None)


class RayExecutor:
    """A pool of actors for one plan; a context manager that ends them."""

    def __init__(self, plan: Plan, workers: Workers, *, transform: Transform | None = None) -> None:
        self._plan = plan.model_dump(mode="json")
        self.n_workers = workers.n
        self._workers = workers
        self._transform = transform
        self._pool: list[_Member] = []
        self._deaths_in_a_row = 0

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._pool:
            ray.kill(member.actor)
        self._pool.clear()

    def run(self, stage: str, pending: NDArray[np.bool_]) -> Iterator[BlockReport]:
        """Reports of all blocks in the order in which they come; errors only after all tries.

        Raises:
            ResourceError: workers cannot be placed, or keep dying without finishing a block.
        """
        n_workers = min(self.n_workers, int(np.count_nonzero(pending)))
        while len(self._pool) < n_workers:
            self._pool.append(self._start(stage))
        book = LeaseBook(pending, len(self._pool))
        while True:
            # Everyone gets a first lease before anyone gets a second.
            for n_leases in range(1, LEASES_IN_FLIGHT + 1):
                for number, member in enumerate(self._pool):
                    self._feed(number, member, stage, book, n_leases)
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
            member.flying.pop(0)
            # Blocks that are skipped say nothing of how long the others take, nor do failures.
            if not any(r.error for r in reports):
                book.done(sum(r.checksum != EMPTY_MARK for r in reports), seconds)
            for report in reports:
                if report.error is None or book.failed(report.block):
                    yield report

    def _feed(
        self, number: int, member: _Member, stage: str, book: LeaseBook, n_leases: int
    ) -> None:
        while member.takes_more(n_leases):
            lease = book.next(number, idle=not member.flying)
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
                f"{len(self._pool)} workers of {self._workers.n_threads} CPUs and "
                f"{self._workers.n_gpus:g} GPUs "
                f"could not be placed within {START_TIMEOUT_S:.0f} s: ask for fewer with "
                "--workers, or see with `ray status` what the cluster has"
            )
        return awaited[ready[0]]

    def _replace(
        self, member: _Member, stage: str, book: LeaseBook, error: RayError
    ) -> Iterator[BlockReport]:
        """Put a new actor in the place of a dead one; gives the blocks that it killed it with."""
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > 3 * self.n_workers:
            raise ResourceError(
                f"workers died {self._deaths_in_a_row} times in a row without finishing a block "
                f"({error}): is there enough memory for {self.n_workers} of them?"
            ) from error
        leases = [lease for _, lease in member.flying]
        reason = f"its worker died: {str(error).strip().splitlines()[0]}"
        logger.warning("a worker died with %d leases in flight: %s", len(leases), reason)
        lost = book.died(leases)
        ray.kill(member.actor)
        self._pool[self._pool.index(member)] = self._start(stage)
        for block in lost:
            yield BlockReport(block, error=f"block {block}: {reason}")

    def _start(self, stage: str) -> _Member:
        remote = ray.remote(SegmentActor).options(
            num_cpus=self._workers.n_threads,
            num_gpus=self._workers.n_gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=LEASES_IN_FLIGHT,
        )
        actor: Any = remote.remote(self._plan, self._workers.n_threads, self._transform)
        return _Member(actor, starting=actor.prepare.remote(stage))


class OnRay:
    """The workers of a Ray cluster; a `segment.Place`."""

    def __init__(self, cluster: Cluster, n_workers: int | None) -> None:
        self._cluster = cluster
        self._n_workers = n_workers
        # A private Ray is this machine, whatever number of processors it was told for --workers.
        self.resources = (
            own_resources() if cluster.is_local else cluster.resources(_device_bytes(cluster))
        )

    def try_engines(self, plan: Plan, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
        """Time engines on a worker: this process may have another processor, and no GPU."""
        workers = Workers(1, self.resources.n_threads, 1.0 if self._on_gpus else 0.0)
        trial: Trial = _results([_send(workers, try_engines, plan, only=only)])[0]
        return trial

    def time_tile(self, plan: Plan) -> float:
        """Mean seconds of the raw forward pass while all workers are at it."""
        workers = self.workers(plan)
        return statistics.fmean(
            _results([_send(workers, time_tile, plan) for _ in range(workers.n)])
        )

    def workers(self, plan: Plan) -> Workers:
        """As many as were asked for, else as the cluster has places and the plan has blocks."""
        n_gpus = self._cluster.n_gpus
        if self._on_gpus:
            n = self._n_workers or min(n_gpus, len(plan.grid))
            # As many to each GPU: 2/3 of one could be placed once on each, and leave the rest.
            return Workers(n, self._cluster.cpus_a_worker(n), 1 / -(-n // n_gpus))
        n = self._n_workers or min(self.resources.n_workers, len(plan.grid))
        return Workers(n, self._cluster.cpus_a_worker(n))

    def executor(self, plan: Plan, transform: Transform | None) -> RayExecutor:
        """A pool of actors."""
        return RayExecutor(plan, self.workers(plan), transform=transform)

    @property
    def _on_gpus(self) -> bool:
        return self.resources.device == "cuda"


@contextmanager
def on_ray(config: SegmentConfig) -> Iterator[OnRay]:
    """The cluster that the user named, or a private Ray of this machine.

    Raises:
        ResourceError: no cluster answers.
    """
    n_cpus = max(available_cpus(), config.workers or 1)
    with connect(config.address, n_cpus=n_cpus) as cluster:
        yield OnRay(cluster, config.workers)


def segment_on_ray(config: SegmentConfig, progress: Progress) -> SegmentResult:
    """Segment as `config` says on a Ray cluster, or on a private Ray of this machine.

    Raises:
        BigsegError: the image, the model, the output or the cluster cannot be used.
    """
    with on_ray(config) as place:
        return segment_at(place, config, progress)


def _in_worker(
    function: Callable[..., Any], plan: dict[str, Any], n_threads: int, options: dict[str, Any]
) -> Any:  # noqa: ANN401 - what the function gives
    set_worker_threads(n_threads)
    return function(Plan.model_validate(plan), n_threads, **options)


def _send(workers: Workers, function: Callable[..., Any], plan: Plan, **options: Any) -> Any:  # noqa: ANN401
    task = ray.remote(_in_worker).options(
        num_cpus=workers.n_threads, num_gpus=workers.n_gpus, max_retries=0
    )
    return task.remote(function, plan.model_dump(mode="json"), workers.n_threads, options)


def _results(references: list[Any]) -> list[Any]:
    """What tasks give.

    Raises:
        ResourceError: they find no place, or die.
        BigsegError: what they raise.
    """
    ready, waiting = ray.wait(references, num_returns=len(references), timeout=TASK_TIMEOUT_S)
    if waiting:
        raise ResourceError(
            f"{len(waiting)} of {len(references)} tasks on the cluster did not end within "
            f"{TASK_TIMEOUT_S:.0f} s: see with `ray status` whether others hold its processors "
            "and GPUs"
        )
    try:
        return [ray.get(reference) for reference in ready]
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, BigsegError):
            raise cause from None
        reason = str(cause).strip().splitlines()[-1:] or [type(cause).__name__]
        raise ResourceError(
            f"a worker of the cluster cannot work ({reason[0]}): check that its torch sees its GPU"
        ) from error
    except RayError as error:
        reason = str(error).strip().splitlines()
        raise ResourceError(
            f"a worker of the cluster died: {reason[0]}; is there enough memory?"
        ) from error


def _device_bytes(cluster: Cluster) -> int | None:
    """Memory of a GPU of the cluster, asked of a worker: this process may have none."""
    if not cluster.n_gpus:
        return None
    asked = ray.remote(gpu_memory).options(num_gpus=1, max_retries=0)
    n_bytes: int = _results([asked.remote()])[0]
    return n_bytes
