"""Reaching a Ray cluster, or starting a private one on this machine; resources and threads.

Without an address a Ray of its own starts, and ends with the block. It listens on the loopback
interface only, asks for a token that no file holds, and keeps its sockets and logs in a folder that
nobody else can enter, which is deleted at the end unless something failed. With an address (or
RAY_ADDRESS, which `ray job submit` sets) the running cluster is used and left running.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray._private import ray_constants
from ray.exceptions import RayError, RayTaskError

from bigseg.engine import available_cpus
from bigseg.errors import BigsegError, ResourceError
from bigseg.machine import USABLE, Resources, default_workers, memory_of_machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bigseg.machine import Workers

# Read by Ray when it starts; set only where the user has not.
_ENVIRONMENT = {
    # No usage reports: what a lab segments is nobody else's business.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's coming default; without it every GPU-less actor warns (ray 2.60).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


logger = logging.getLogger(__name__)

# Paths of sockets have at most 107 characters; Ray adds 80 to its folder.
_LONGEST_FOLDER = 24

# Where a cluster does not say.
UNKNOWN_MEMORY = 8 << 30
# Ray notices within seconds that a node is gone; a worker of it can be missed before.
NODE_TIMEOUT_S = 5.0
# Compiling a network for a trial takes a minute on few processors.
TASK_TIMEOUT_S = 900.0


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
    with _private_folder() if is_local else nullcontext() as folder:
        _start(target, (n_cpus or available_cpus()) if is_local else None, folder)
        try:
            yield _resources(is_local=is_local)
        finally:
            ray.shutdown()


def _start(target: str, n_cpus: int | None, folder: str | None) -> None:
    """Reach the cluster at `target`, or start one whose files are in `folder`."""
    if folder is not None:
        _use_private_token()
    try:
        with nullcontext() if folder is None else _loopback_only():
            ray.init(
                address=target,
                num_cpus=n_cpus,
                include_dashboard=None if folder is None else False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=folder,
            )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ResourceError(
            f"no Ray cluster could be reached at {target!r} ({reason}): check the address, set "
            "RAY_AUTH_MODE=token where the cluster asks for a token, or leave --address out"
        ) from error


def _use_private_token() -> None:
    """A token that lives in this process and its workers, and in no file, unless the user has one.

    Ray (2.60) turns authentication on for a cluster that `ray.init` starts, unless the environment
    said otherwise when it was imported; without a token it would write a file that others of the
    machine can read. It reads a token once in a process, so one that was made for one cluster
    stays for the next.
    """
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        logger.warning(
            "RAY_AUTH_MODE is %r: whoever has an account on this machine can run programs as you "
            "while Ray runs; set it to token",
            mode,
        )


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let what starts in the body listen on 127.0.0.1 alone.

    On macOS and Windows Ray does that by itself, on Linux (2.60) it listens on all interfaces,
    whatever address it is told, unless this constant says that no other machine will join.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _private_folder() -> Iterator[str]:
    """A new folder that only this user can reach; kept, and named, where the body fails."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="bigseg-", dir=base if len(base) < _LONGEST_FOLDER else "/tmp")
    # One folder deeper, because Ray opens its own to everybody.
    inner = os.path.join(folder, "r")
    try:
        yield inner
    except Exception:
        logger.info("the logs of Ray are in %s", folder)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


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


def is_lost(node: str) -> bool:
    """Whether a node of the cluster is gone, as Ray comes to know."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    if not node or len(nodes) < 2:
        return False
    end_s = time.monotonic() + NODE_TIMEOUT_S
    while True:
        if not any(n["NodeID"] == node and n["Alive"] for n in nodes):
            return True
        if time.monotonic() > end_s:
            return False
        time.sleep(0.5)
        nodes = ray.nodes()  # type: ignore[no-untyped-call]


def run_tasks(
    workers: Workers,
    function: Callable[..., Any],
    *args: Any,  # noqa: ANN401 - what the function takes
    **options: Any,  # noqa: ANN401
) -> list[Any]:
    """What `function(*args, n_threads, **options)` gives in `workers.n` processes at once.

    Raises:
        ResourceError: they find no place, or die.
        BigsegError: what they raise.
    """
    task = ray.remote(_in_worker).options(
        num_cpus=workers.n_threads, num_gpus=workers.n_gpus, max_retries=0
    )
    return _results(
        [task.remote(function, workers.n_threads, args, options) for _ in range(workers.n)]
    )


def gpu_bytes(cluster: Cluster, ask: Callable[[], int]) -> int | None:
    """What `ask` gives on a GPU of the cluster: this process may have none. None without GPUs."""
    if not cluster.n_gpus:
        return None
    asked = ray.remote(ask).options(num_gpus=1, max_retries=0)
    n_bytes: int = _results([asked.remote()])[0]
    return n_bytes


def _in_worker(
    function: Callable[..., Any], n_threads: int, args: tuple[Any, ...], options: dict[str, Any]
) -> Any:  # noqa: ANN401 - what the function gives
    set_worker_threads(n_threads)
    return function(*args, n_threads, **options)


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
