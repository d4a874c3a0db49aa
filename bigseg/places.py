"""Where blocks are carried out: the interface of all places, and this process.

a Place      what its workers have, and how fast they are
an Executor  carries out blocks of one plan there
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bigseg.cuda import gpu_memory, n_gpus
from bigseg.engine import available_cpus, pick_device
from bigseg.machine import USABLE, Resources, Workers, cpu_resources, memory_of_machine
from bigseg.stages import Worker
from bigseg.trial import Trial, time_tile, try_engines

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from bigseg.engine import EngineSpec
    from bigseg.plan import Plan
    from bigseg.reports import BlockReport
    from bigseg.transform import Transform


class Executor(Protocol):
    """Carries out blocks of a stage, somewhere; the reports come in any order."""

    n_workers: int
    n_deaths: int

    def run(
        self,
        stage: str,
        pending: NDArray[np.bool_],
        stopping: threading.Event | None = None,
    ) -> Generator[BlockReport, None, None]:
        """A report for every block that is pending; after `stopping` for those in flight."""


class SerialExecutor:
    """Carries out blocks in this process, one after the other; a context manager."""

    n_workers = 1
    n_deaths = 0

    def __init__(
        self,
        plan: Plan,
        n_threads: int | None = None,
        *,
        transform: Transform | None = None,
        owner: str | None = None,
    ) -> None:
        n_threads = n_threads or available_cpus()
        self._worker = Worker(plan, n_threads, transform=transform, owner=owner)

    def __enter__(self) -> SerialExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def run(
        self,
        stage: str,
        pending: NDArray[np.bool_],
        stopping: threading.Event | None = None,
    ) -> Generator[BlockReport, None, None]:
        """A report for every block that is pending, in order; after `stopping` only those begun."""
        self._worker.stopping = stopping or threading.Event()
        try:
            for report in self._worker.run(stage, map(int, np.flatnonzero(pending))):
                yield replace(report, spent=self._worker.take_spent())
        except GeneratorExit:
            # Nobody listens any more: what was only read ahead is left out.
            self._worker.stopping.set()
            raise


class Place(Protocol):
    """Where blocks are carried out: this process, or the workers of a cluster."""

    resources: Resources

    def try_engines(self, plan: Plan, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
        """Time engines on one of the workers; see `trial.try_engines`."""

    def time_tile(self, plan: Plan) -> float:
        """Seconds of the raw forward pass of a tile while all workers are at it."""

    def workers(self, plan: Plan) -> Workers:
        """The workers that the plan gets."""

    def executor(
        self, plan: Plan, transform: Transform | None, owner: str | None = None
    ) -> AbstractContextManager[Executor]:
        """Something that carries the plan out for the owner of the output's lock."""


class Here:
    """This process, on its GPU or its processors: all of them, or as many as a worker would get."""

    def __init__(self, *, like_a_worker: bool = False) -> None:
        self.resources = own_resources()
        self._n_threads = self.resources.n_threads if like_a_worker else available_cpus()

    def try_engines(self, plan: Plan, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
        """Time engines."""
        return try_engines(plan, self._n_threads, only=only)

    def time_tile(self, plan: Plan) -> float:
        """Seconds of the raw forward pass."""
        return time_tile(plan, self._n_threads)

    def workers(self, plan: Plan) -> Workers:
        """One."""
        del plan
        return Workers(1, self._n_threads, 1.0 if self.resources.device == "cuda" else 0.0)

    def executor(
        self, plan: Plan, transform: Transform | None, owner: str | None = None
    ) -> SerialExecutor:
        """The serial one."""
        return SerialExecutor(plan, transform=transform, owner=owner)


def own_resources() -> Resources:
    """What the workers of this machine have when nobody says: the same as with Ray."""
    n_cpus, memory = available_cpus(), memory_of_machine()
    if pick_device().type != "cuda":
        return cpu_resources(n_cpus, memory)
    n_workers = n_gpus()
    return Resources(
        device="cuda",
        n_workers=n_workers,
        n_threads=max(1, n_cpus // n_workers),
        memory_bytes=int(USABLE * memory) // n_workers,
        device_bytes=gpu_memory(),
    )
