"""bigseg against its own raw forward, against fewer workers, and against its own bookkeeping."""

from __future__ import annotations

import os
import statistics
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from bench import HERE, Bench, Row, finish, last_json, run_ours, spread, start, start_up, worked_s
from setting import write_volume

from bigseg.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path


def efficiency(bench: Bench) -> dict[str, Any]:
    """Raw forward seconds of all tiles over the wall time; raw alone, and raw side by side."""
    image = write_volume(bench.folder, bench.size.own_shape)
    workers = bench.n_workers
    wall, start_s, inside = Row("wall"), Row("start-up"), Row("workers")
    alone, together = Row("alone"), Row("together")
    for _ in range(bench.repeats):
        start_s.seconds.append(start_up(bench, workers=workers))
        wall.seconds.append(run_ours(bench, image, workers=workers))
        inside.seconds.append(worked_s(bench))
        n_tiles, plan = tiles_of(bench)
        share = max(1, n_tiles // workers)
        alone.seconds.append(raw(bench, image, n_processes=1, n_tiles=min(share, 8)))
        together.seconds.append(raw(bench, image, n_processes=workers, n_tiles=share))
    busy = wall.median - start_s.median
    figures = {
        "shape": bench.size.own_shape,
        "tile": plan["tile"],
        "core": plan["core"],
        "engine": plan["engine"],
        "tiles": n_tiles,
        "wall_s": wall.seconds,
        "start_up_s": start_s.seconds,
        "workers_s": inside.seconds,
        "raw_s_a_tile_alone": alone.seconds,
        "raw_s_a_tile_together": together.seconds,
        "efficiency_of_alone": n_tiles / workers * alone.median / busy,
        "efficiency_of_together": n_tiles / workers * together.median / busy,
        "mega_voxels_a_s": float(np.prod(bench.size.own_shape)) / busy / 1e6,
    }
    print("\na. efficiency: raw forward of all tiles / wall without start-up")
    print(f"   {n_tiles} tiles of {plan['tile'][1:]}, {workers} workers; wall {spread(wall)} s,")
    print(f"   start-up {spread(start_s)} s; workers, as recorded, {spread(inside)} s")
    print(
        f"   raw, one process:    {spread(alone)} s a tile -> {figures['efficiency_of_alone']:.3f}"
    )
    print(
        f"   raw, {workers} at a time:    {spread(together)} s a tile -> "
        f"{figures['efficiency_of_together']:.3f}",
        flush=True,
    )
    return figures


def tiles_of(bench: Bench) -> tuple[int, dict[str, Any]]:
    """How many forward passes the last result of ours took, and its plan."""
    ledger = Ledger.open(str(bench.folder / "ours.zarr" / "ledger"))
    assert ledger is not None
    plan = ledger.plan
    shape, tile = plan["source"]["shape"], plan["tile"]
    return int(np.prod([-(-n // t) for n, t in zip(shape, tile, strict=True)])), plan


def raw(bench: Bench, image: Path, *, n_processes: int, n_tiles: int) -> float:
    """Mean seconds of a forward pass in so many processes that work at the same time."""
    command = [
        sys.executable,
        str(HERE / "raw_forward.py"),
        *bench.shared(image),
        *("--result", str(bench.folder / "ours.zarr")),
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


def scaling(bench: Bench) -> dict[str, Any]:
    """Two workers of one thread on two processors against one on one."""
    if bench.n_cpus < 2 or torch.cuda.is_available():
        print("\ng. left out: needs two processors and no GPU", flush=True)
        return {}
    image = write_volume(bench.folder, bench.size.scaling_shape)
    cpus = sorted(os.sched_getaffinity(0))[:2]
    net = {n: Row(f"{n} workers, without start-up") for n in (1, 2)}
    for _ in range(bench.repeats):
        for n, row in net.items():
            begin = start_up(bench, workers=n, cpus=cpus[:n])
            row.seconds.append(run_ours(bench, image, workers=n, cpus=cpus[:n]) - begin)
    speedup = net[1].median / net[2].median
    print("\ng. two workers of one thread against one")
    print(f"   one {spread(net[1])} s, two {spread(net[2])} s: {speedup:.2f} times", flush=True)
    return {"one_s": net[1].seconds, "two_s": net[2].seconds, "speed_up": speedup}


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
