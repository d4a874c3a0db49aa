"""What a worker has: processors, memory, the memory of its GPU. It knows numbers only."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

# The rest is for the system, the page cache and whoever else is on the machine.
USABLE = 0.7
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Resources:
    """What each of the workers has that segment when nobody says otherwise.

    The plan is made for these, so that it does not change with `--workers`, unless more workers
    than these share the memory. `memory_bytes` is main memory, `device_bytes` that of the GPU.
    """

    device: Literal["cpu", "cuda"]
    n_workers: int
    n_threads: int
    memory_bytes: int
    device_bytes: int | None = None

    def shared_by(self, n_workers: int) -> Resources:
        """The same machines where so many workers share the memory, if that is more than usual."""
        share = min(1.0, self.n_workers / n_workers)
        on_device = None if self.device_bytes is None else int(self.device_bytes * share)
        return replace(self, memory_bytes=int(self.memory_bytes * share), device_bytes=on_device)


@dataclass(frozen=True)
class Workers:
    """How many workers, and the processors and GPUs of each."""

    n: int
    n_threads: int
    n_gpus: float = 0.0


def default_workers(n_cpus: int) -> int:
    """Workers on a machine with this many processors when nobody says.

    Small machines run one worker a processor (two of one thread did 2.03 times the work of one);
    on larger ones a worker has four, which bounds memory.
    """
    return max(1, math.ceil(n_cpus / (1 if n_cpus <= 4 else 4)))


def cpu_resources(n_cpus: int, memory_bytes: int) -> Resources:
    """The default workers of a machine without a GPU."""
    n_workers = default_workers(n_cpus)
    return Resources(
        device="cpu",
        n_workers=n_workers,
        n_threads=max(1, n_cpus // n_workers),
        memory_bytes=int(USABLE * memory_bytes / n_workers),
    )


def memory_of_machine(*, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Bytes of main memory that processes of this machine, container or batch job may have.

    All of it, not what is free at the moment: the plan should not change from one minute to the
    next.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        limits = [8 << 30]
    for path in _limit_files(cgroups, own):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return min(limits)


def _limit_files(cgroups: Path, own: Path) -> Iterator[Path]:
    """Where the groups of this process, the inner and the outer ones, state their limits.

    The outermost is a container's; a scheduler such as SLURM puts a job into a group further in.
    """
    yield cgroups / "memory.max"
    yield cgroups / "memory" / "memory.limit_in_bytes"
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            base, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for place in (group, *group.parents):
            yield base / place / name
