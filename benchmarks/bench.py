"""Running the contestants of peers.py: every measurement is a process of its own."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from setting import write_volume

from bigseg.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Size:
    """How large everything is: in earnest, and to see whether it runs."""

    width: int
    depth: int
    peer_shape: tuple[int, int, int]
    own_shape: tuple[int, int, int]
    scaling_shape: tuple[int, int, int]
    window: int
    blocks: tuple[int, ...]
    wide_halo: int
    n_scheduled: int
    n_remembered: int


EARNEST = Size(
    16, 3, (208,) * 3, (208, 416, 416), (208, 208, 416), 96, (104, 208), 16, 10**5, 10**6
)
QUICK = Size(4, 1, (64,) * 3, (64, 64, 128), (64, 64, 64), 32, (32,), 4, 2000, 20000)


@dataclass
class Row:
    """What was measured of one contestant."""

    name: str
    seconds: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


@dataclass
class Bench:
    """Where everything lies, and what runs it."""

    folder: Path
    peer_python: str
    size: Size
    repeats: int
    n_cpus: int
    n_workers: int

    def shared(self, image: Path) -> list[str]:
        """The options that all scripts take."""
        return ["--folder", str(self.folder), "--image", str(image)]


def machine(bench: Bench) -> dict[str, Any]:
    """What the figures were measured on."""
    name = "processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else name,
        "threads": bench.n_cpus,
        "workers": bench.n_workers,
        "torch": torch.__version__,
    }


def start_up(bench: Bench, *, workers: int, cpus: Sequence[int] | None = None) -> float:
    """Wall seconds of the same command where there is next to nothing to do for each worker."""
    image = write_volume(bench.folder, (8 * workers, 8, 8))
    tiny = ["--tile", "8,8,8", "--block", "8,8,8"]
    return run_ours(bench, image, workers=workers, cpus=cpus, options=tiny, out="tiny.zarr")


def run_ours(
    bench: Bench,
    image: Path,
    *,
    workers: int,
    cpus: Sequence[int] | None = None,
    options: Sequence[str] = (),
    out: str = "ours.zarr",
) -> float:
    """Wall seconds of `bigseg segment`, from the start of its process to its end."""
    command = [
        *(sys.executable, "-m", "bigseg", "segment", str(image)),
        *("--model", str(bench.folder / "model.safetensors")),
        *("--out", str(bench.folder / out), "--overwrite"),
        *("--workers", str(workers)),
        *options,
    ]
    started = time.perf_counter()
    finish(start(command, cpus), command)
    return time.perf_counter() - started


def worked_s(bench: Bench) -> float:
    """Mean seconds of a worker in the last result of ours, from ready to its last report.

    As the run itself recorded it: without start-up, and without the driver's beginning and end.
    """
    ledger = Ledger.open(str(bench.folder / "ours.zarr" / "ledger"))
    assert ledger is not None
    record = ledger.record
    seconds: float = record["spent"]["predict"]["wall_s"] / record["workers"]
    return seconds


def start(command: Sequence[str], cpus: Sequence[int] | None = None) -> subprocess.Popen[str]:
    """The process, with bigseg of this checkout, on these processors only."""
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)
    paths = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    before = os.sched_getaffinity(0)
    # A child inherits the processors of its parent.
    os.sched_setaffinity(0, cpus or before)
    try:
        return subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.sched_setaffinity(0, before)


def finish(process: subprocess.Popen[str], command: Sequence[str]) -> str:
    """What the process printed; ends everything where it failed."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-4000:]}")
    return output


def last_json(output: str) -> dict[str, Any]:
    """The figures on the last line."""
    figures: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return figures


def spread(row: Row) -> str:
    """Median, smallest and largest."""
    return f"{row.median:.2f} ({min(row.seconds):.2f} ... {max(row.seconds):.2f})"
