"""Running the contestants of peers.py: every measurement is a process of its own."""

from __future__ import annotations

import json
import math
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
SHORT, LONG = 3, 9
SHORT_RESULT, LONG_RESULT = "short.zarr", "long.zarr"


@dataclass(frozen=True)
class Size:
    """How large everything is: in earnest, and to see whether it runs."""

    width: int
    depth: int
    shape: tuple[int, int, int]
    window: int
    blocks: tuple[int, ...]
    wide_halo: int
    n_scheduled: int
    n_remembered: int


EARNEST = Size(16, 3, (208,) * 3, 96, (104, 208), 16, 10**5, 10**6)
QUICK = Size(4, 1, (64,) * 3, 32, (32,), 4, 2000, 20000)


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
    tile: Sequence[int] | None

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


@dataclass
class Ours:
    """Wall seconds of `bigseg segment` for SHORT volumes in a row, and for LONG of them.

    Both are cut into the same tiles, so that their difference is what the others cost, Zarr to
    Zarr. The start is not in it, neither Ray's nor that of a worker, which touches
    its memory for the first time: peers are warm when they are measured, too.
    """

    name: str
    short: list[float] = field(default_factory=list)
    longer: list[float] = field(default_factory=list)

    def measure(
        self,
        bench: Bench,
        *,
        workers: int,
        cpus: Sequence[int] | None = None,
        tile: Sequence[int] | None = None,
    ) -> list[int]:
        """Run both once, in these tiles (z, y, x), or those that the shorter one gets; gives them.

        Were a worker left without a tile at the end, or did a tile reach beyond the volume, the
        difference would be that of other work than LONG - SHORT volumes: then it ends here.
        """
        for n, out in ((SHORT, SHORT_RESULT), (LONG, LONG_RESULT)):
            image = write_volume(bench.folder, bench.size.shape, n_repeats=n)
            sides = ",".join(map(str, tile or ()))
            words = ("--tile", sides, "--block", sides) if tile else ()
            wall_s = _run_ours(bench, image, workers, cpus, out, words)
            (self.longer if n == LONG else self.short).append(wall_s)
            tile = plan_of(bench, out)["tile"][1:]
            planes, rest = divmod(n * bench.size.shape[0], tile[0])
            if rest or planes * _across(bench, tile) % workers:
                raise SystemExit(
                    f"{n} volumes are no whole tiles of {tile} for each of {workers} workers: give "
                    "others with --tile"
                )
        assert tile is not None
        return list(tile)

    @property
    def seconds(self) -> list[float]:
        """What one more volume cost."""
        pairs = zip(self.short, self.longer, strict=True)
        return [(longer - short) / (LONG - SHORT) for short, longer in pairs]

    @property
    def start_s(self) -> float:
        """Median seconds of all that does not grow with the volume."""
        pairs = zip(self.short, self.seconds, strict=True)
        return statistics.median(short - SHORT * each for short, each in pairs)


def _across(bench: Bench, tile: Sequence[int]) -> int:
    """How many tiles lie side by side."""
    return math.prod(-(-n // t) for n, t in zip(bench.size.shape[1:], tile[1:], strict=True))


def _run_ours(
    bench: Bench,
    image: Path,
    workers: int,
    cpus: Sequence[int] | None,
    out: str,
    options: Sequence[str] = (),
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


def plan_of(bench: Bench, out: str) -> dict[str, Any]:
    """The plan of our last result of this name."""
    ledger = Ledger.open(str(bench.folder / out / "ledger"))
    assert ledger is not None
    return ledger.plan


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


def spread(row: Row | Ours) -> str:
    """Median, smallest and largest."""
    seconds = row.seconds
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} ... {max(seconds):.2f})"
