"""Reaching a Ray cluster, or starting a private one on this machine; resources and threads.

Without an address a Ray of its own starts, reachable from this machine only, with token
authentication on, and ends with the block. With an address (or RAY_ADDRESS, which `ray job submit`
sets) the running cluster is used and left running.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch

from bigseg.engine import available_cpus
from bigseg.errors import ResourceError
from bigseg.machine import USABLE, Resources, default_workers, memory_of_machine

if TYPE_CHECKING:
    from collections.abc import Iterator

# Read by Ray when it starts; set only where the user has not.
_ENVIRONMENT = {
    # No usage reports: what a lab segments is nobody else's business.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's coming default; without it every GPU-less actor warns (ray 2.60).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


# Where a cluster does not say.
UNKNOWN_MEMORY = 8 << 30


@dataclass(frozen=True)
class Cluster:
    """What there is to work with: for each node its processors and GPUs.

    `memory` holds for each node the bytes that workers may share.
    """

    nodes: tuple[tuple[int, int], ...]
    is_local: bool = True
    memory: tuple[int, ...] = ()

    @property
    def n_cpus(self) -> int:
        """Processors of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def n_gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)

    def resources(self, device_bytes: int | None = None) -> Resources:
        """What each worker has when nobody says how many there are.

        A worker for each GPU, or where there is none as many as suit the processors.
        """
        # A head that is told to compute nothing has no processors.
        counts = [
            gpus if self.n_gpus else default_workers(cpus) if cpus else 0
            for cpus, gpus in self.nodes
        ]
        shares = [m // n for m, n in zip(self.memory, counts, strict=True) if n and m]
        n_workers = max(1, sum(counts))
        return Resources(
            device="cuda" if self.n_gpus else "cpu",
            n_workers=n_workers,
            n_threads=self.cpus_a_worker(n_workers),
            memory_bytes=min(shares, default=UNKNOWN_MEMORY),
            device_bytes=device_bytes,
        )

    def cpus_a_worker(self, n_workers: int) -> int:
        """The most processors that each of `n_workers` can have so that all find a node.

        On a cluster with GPUs workers go where those are, as many to each GPU.
        """
        if self.n_gpus:
            on_a_gpu = -(-n_workers // self.n_gpus)
            return max(1, min(cpus // (gpus * on_a_gpu) for cpus, gpus in self.nodes if gpus))
        most = self.n_cpus // max(1, n_workers)
        fitting = (n for n in range(most, 0, -1) if sum(c // n for c, _ in self.nodes) >= n_workers)
        return next(fitting, 1)


@contextmanager
def connect(address: str | None, *, n_cpus: int | None = None) -> Iterator[Cluster]:
    """A Ray to work with: the running one at `address` or RAY_ADDRESS, else a private local one.

    `n_cpus` limits a private one; by default it has all processors that this process may use.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield _resources(is_local=False)
        return
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    is_local = target == "local"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if is_local:
        _use_private_token()
    try:
        ray.init(
            address=target,
            num_cpus=(n_cpus or available_cpus()) if is_local else None,
            include_dashboard=False if is_local else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ResourceError(
            f"no Ray cluster could be reached at {target!r} ({reason}): check the address, set "
            "RAY_AUTH_MODE=token where the cluster asks for a token, or leave --address out"
        ) from error
    try:
        yield _resources(is_local=is_local)
    finally:
        ray.shutdown()


def _use_private_token() -> None:
    """A token that lives in this process and its workers, and in no file, unless the user has one.

    Ray (2.60) turns authentication on for a cluster that `ray.init` starts; without a token it
    would write a file that others of the machine can read.
    """
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def set_worker_threads(n_threads: int) -> None:
    """Give this worker process `n_threads` for torch, and make sure that they are set.

    Ray sets OMP_NUM_THREADS from the actor's CPUs before libraries load; torch may have read
    another value.

    Raises:
        ResourceError: torch did not take the setting.
    """
    torch.set_num_threads(n_threads)
    if torch.get_num_threads() != n_threads:
        raise ResourceError(
            f"torch uses {torch.get_num_threads()} threads where {n_threads} were set: unset "
            "OMP_NUM_THREADS and MKL_NUM_THREADS"
        )


def _resources(*, is_local: bool) -> Cluster:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    # Ray counts what is free at the moment, which on one machine would change the plan.
    own = int(USABLE * memory_of_machine()) if is_local else 0
    return Cluster(
        tuple((int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in alive),
        is_local=is_local,
        memory=tuple(own or int(r.get("memory", 0)) for r in alive),
    )
