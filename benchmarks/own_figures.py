"""bigseg against its own raw forward, against fewer workers, and against its own bookkeeping."""

from __future__ import annotations

import math
import os
import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from bench import (
    HERE,
    LONG,
    LONG_RESULT,
    SHORT,
    SHORT_RESULT,
    Bench,
    Ours,
    Row,
    finish,
    last_json,
    plan_of,
    spread,
    start,
)
from setting import write_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass
class Raw:
    """Seconds of the network alone for a tile: one process, and as many as work in ours."""

    alone: Row = field(default_factory=lambda: Row("one process"))
    together: Row = field(default_factory=lambda: Row("together"))

    def measure(self, bench: Bench) -> None:
        """Time both once, on tiles of our last short result."""
        image = write_volume(bench.folder, bench.size.shape, n_repeats=SHORT)
        for row, n in ((self.alone, 1), (self.together, bench.n_workers)):
            row.seconds.append(raw(bench, image, n_processes=n, n_tiles=1))


def efficiency(bench: Bench, ours: Ours, network: Raw) -> dict[str, Any]:
    """Raw forward seconds of the tiles of a volume over what the volume costs."""
    workers, plan = bench.n_workers, plan_of(bench, LONG_RESULT)
    shape, tile = plan["source"]["shape"], plan["tile"]
    n_tiles = math.prod(-(-n // t) for n, t in zip(shape, tile, strict=True)) / LONG
    net_s = statistics.median(ours.seconds)
    kept = {
        row.name: n_tiles / workers * row.median / net_s
        for row in (network.alone, network.together)
    }
    print("\na. efficiency: raw forward of all tiles / wall time, Zarr to Zarr, without the start")
    print(f"   {n_tiles:g} tiles of {tile[1:]} a volume, {workers} workers; {spread(ours)} s each,")
    print(f"   and {ours.start_s:.2f} s once; {(LONG - SHORT) * n_tiles:g} tiles measured a round")
    for row in (network.alone, network.together):
        print(f"   raw, {row.name:12} {spread(row)} s a tile -> {kept[row.name]:.3f}", flush=True)
    return {
        "plan": {key: plan[key] for key in ("tile", "core", "engine")},
        "tiles": n_tiles,
        "short_s": ours.short,
        "longer_s": ours.longer,
        "raw_s_a_tile": {row.name: row.seconds for row in (network.alone, network.together)},
        "efficiency": kept,
    }


def raw(bench: Bench, image: Path, *, n_processes: int, n_tiles: int) -> float:
    """Mean seconds of a forward pass in so many processes that work at the same time."""
    command = [
        sys.executable,
        str(HERE / "raw_forward.py"),
        *bench.shared(image),
        *("--result", str(bench.folder / SHORT_RESULT)),
        *("--threads", str(max(1, bench.n_cpus // bench.n_workers))),
        *("--tiles", str(n_tiles)),
    ]
    processes = [start(command) for _ in range(n_processes)]
    for process in processes:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            if process.poll() is not None:
                raise SystemExit(finish(process, command))
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    reports = [last_json(finish(process, command)) for process in processes]
    return statistics.mean(r["seconds"] / r["n_forwards"] for r in reports)


class Scaling:
    """One worker of one thread on one processor, beside two on two."""

    def __init__(self, bench: Bench, ours: Ours) -> None:
        """Where `ours` is two workers on two processors it is not measured twice."""
        self.cpus = sorted(os.sched_getaffinity(0))[:2]
        self.one = Ours("one worker")
        self.is_ours = bench.n_workers == bench.n_cpus == 2
        self.two = ours if self.is_ours else Ours("two workers")

    @staticmethod
    def is_possible(bench: Bench) -> bool:
        """Whether there are two processors to work with."""
        return bench.n_cpus >= 2 and not torch.cuda.is_available()

    def measure(self, bench: Bench, tile: Sequence[int]) -> None:
        """Run both once, in the same tiles: those of ours where it is one of them."""
        if not self.is_ours:
            tile = self.two.measure(bench, workers=2, cpus=self.cpus)
        self.one.measure(bench, workers=1, cpus=self.cpus[:1], tile=tile)

    def report(self) -> dict[str, Any]:
        """Print and give how many times as fast two are."""
        one, two = (statistics.median(row.seconds) for row in (self.one, self.two))
        print("\ng. two workers of one thread against one, without the start")
        print(f"   one {spread(self.one)} s, two {spread(self.two)} s: {one / two:.2f} times")
        return {"one_s": self.one.seconds, "two_s": self.two.seconds, "speed_up": one / two}


def scheduling(bench: Bench) -> dict[str, Any]:
    """What a block costs the driver in processor time and in memory."""
    size = bench.size
    command = [sys.executable, str(HERE / "scheduling.py"), "--workers", "2", "--blocks"]
    figures: dict[str, Any] = {}
    for key, n in (("time", size.n_scheduled), ("memory", size.n_remembered)):
        whole = [*command, str(n)]
        runs = [last_json(finish(start(whole), whole)) for _ in range(bench.repeats)]
        figures[key] = {name: statistics.median(r[name] for r in runs) for name in runs[0]}
    print("\nh. what scheduling costs the driver (work that does nothing, reports in the ledger)")
    for f in figures.values():
        print(
            f"   {f['blocks']:.0f} blocks: {f['cpu_us_a_block']:.1f} us of processor a block, "
            f"memory grows by {f['growth_mib']:.1f} MiB (Ray's services by "
            f"{f['services_growth_mib']:.1f}), wall {f['wall_s']:.1f} s",
            flush=True,
        )
    return figures
