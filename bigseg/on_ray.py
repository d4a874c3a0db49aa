"""The place that is a Ray cluster: what its workers have, and segmenting there.

It asks cluster.py for what it needs of Ray, and infer_actor.py for a pool of actors.
"""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bigseg.cluster import Cluster, connect, gpu_bytes, run_tasks
from bigseg.cuda import gpu_memory
from bigseg.engine import available_cpus
from bigseg.infer_actor import RayExecutor
from bigseg.machine import Workers
from bigseg.places import own_resources
from bigseg.segment import SegmentResult, Stopping, never, segment_at
from bigseg.trial import Trial, time_tile, try_engines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigseg.config import SegmentConfig
    from bigseg.engine import EngineSpec
    from bigseg.plan import Plan
    from bigseg.progress import Progress
    from bigseg.transform import Transform


class OnRay:
    """The workers of a Ray cluster; a `segment.Place`."""

    def __init__(self, cluster: Cluster, n_workers: int | None) -> None:
        self._cluster = cluster
        self._n_workers = n_workers
        # A private Ray is this machine, whatever number of processors it was told for --workers.
        self.resources = (
            own_resources()
            if cluster.is_local
            else cluster.resources(gpu_bytes(cluster, gpu_memory))
        )

    def try_engines(self, plan: Plan, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
        """Time engines on a worker: this process may have another processor, and no GPU."""
        workers = Workers(1, self.resources.n_threads, 1.0 if self._on_gpus else 0.0)
        trial: Trial = run_tasks(workers, try_engines, plan, only=only)[0]
        return trial

    def time_tile(self, plan: Plan) -> float:
        """Mean seconds of the raw forward pass while all workers are at it."""
        return statistics.fmean(run_tasks(self.workers(plan), time_tile, plan))

    def workers(self, plan: Plan) -> Workers:
        """As many as were asked for, else as the cluster has places and the plan has blocks."""
        n_gpus = self._cluster.n_gpus
        if self._on_gpus:
            n = self._n_workers or min(n_gpus, len(plan.grid))
            # As many to each GPU: 2/3 of one could be placed once on each, and leave the rest.
            return Workers(n, self._cluster.cpus_a_worker(n), 1 / -(-n // n_gpus))
        n = self._n_workers or min(self.resources.n_workers, len(plan.grid))
        return Workers(n, self._cluster.cpus_a_worker(n))

    def executor(
        self, plan: Plan, transform: Transform | None, owner: str | None = None
    ) -> RayExecutor:
        """A pool of actors."""
        return RayExecutor(plan, self.workers(plan), transform=transform, owner=owner)

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


def segment_on_ray(
    config: SegmentConfig, progress: Progress, *, stopping: Stopping = never
) -> SegmentResult:
    """Segment as `config` says on a Ray cluster, or on a private Ray of this machine.

    Raises:
        BigsegError: the image, the model, the output or the cluster cannot be used.
        KeyboardInterrupt: it was stopped; the blocks in flight were finished.
    """
    with on_ray(config) as place:
        return segment_at(place, config, progress, stopping=stopping)
