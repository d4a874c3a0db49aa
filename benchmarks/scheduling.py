"""What a block costs the driver: everything but the work, through the real executor and ledger.

    image of N tiles of 8³, never written ─> plan, ledger ─> RayExecutor ─> actors that do nothing

Processor time is that of the driver's process with all its threads. Growth is the largest resident
memory while the blocks run, over that after a small run in the same process, so that what Ray and
the interpreter load once does not count; `services` are Ray's own processes beside the driver.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr
from setting import report, write_network

from bigseg import infer_actor
from bigseg.cluster import connect
from bigseg.config import SegmentConfig
from bigseg.infer_actor import RayExecutor
from bigseg.machine import Workers
from bigseg.places import own_resources
from bigseg.reports import BlockReport, Spent
from bigseg.segment import carry_out, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bigseg.ledger import Ledger
    from bigseg.plan import Plan

SIDE = 8
CROSS_SECTION = 10
N_WARM = 1000


class IdleWorker:
    """A worker that finds everything done."""

    def run(self, stage: str, blocks: Sequence[int]) -> Iterator[BlockReport]:
        """A report for each block."""
        del stage
        return (BlockReport(block, checksum=1) for block in blocks)

    def prepare(self, stage: str) -> None:
        """Nothing is to be opened."""

    def take_spent(self) -> Spent:
        """Nothing was."""
        return Spent()


class IdleActor(infer_actor.SegmentActor):
    """The real actor around a worker that does nothing."""

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - the real actor's own
        super().__init__(*arguments)
        self._worker = IdleWorker()


class Watch:
    """A progress that looks at the memory of the driver and of Ray's services now and then."""

    def __init__(self, every: int) -> None:
        self.largest = memory_mib()
        self._every = every
        self._n_done = 0

    @contextmanager
    def task(self, label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Watch]:
        """The only task of the run."""
        del label, total, unit, done
        yield self

    def advance(self, n: int = 1, *, voxels: int = 0, note: str = "") -> None:
        """Count, and look."""
        del voxels, note
        self._n_done += n
        if self._n_done % self._every == 0:
            self.look()

    def look(self) -> None:
        """Keep the largest of what was seen."""
        now = memory_mib()
        self.largest = (max(self.largest[0], now[0]), max(self.largest[1], now[1]))


def main() -> None:
    """A small run, then the run that is measured."""
    options = parse()
    infer_actor.SegmentActor = IdleActor  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder, connect("local", n_cpus=options.workers):
        write_network(Path(folder), width=2, depth=1)
        run_blocks(Path(folder), N_WARM, options.workers)
        figures = run_blocks(Path(folder), options.blocks, options.workers)
    report(**figures)


def run_blocks(folder: Path, n_blocks: int, n_workers: int) -> dict[str, float]:
    """What the driver spent on so many blocks, from a plan and a new ledger to the last mark."""
    before = memory_mib()
    plan, ledger = make_work(folder, n_blocks)
    watch = Watch(every=max(1, n_blocks // 100))
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    with RayExecutor(plan, Workers(n_workers, 1)) as executor:
        result = carry_out(plan, ledger, executor, watch)
        cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
        watch.look()
    assert result.is_complete, result
    assert result.n_done - result.n_done_before == n_blocks - 1, result
    return {
        "blocks": n_blocks,
        "cpu_us_a_block": 1e6 * cpu_s / n_blocks,
        "wall_s": wall_s,
        "growth_mib": watch.largest[0] - before[0],
        "services_growth_mib": watch.largest[1] - before[1],
    }


def make_work(folder: Path, n_blocks: int) -> tuple[Plan, Ledger]:
    """The plan and the ledger for a volume of so many tiles."""
    config = SegmentConfig(
        image=write_nothing(folder / f"image-{n_blocks}.zarr", n_blocks),
        model=str(folder / "model.safetensors"),
        out=str(folder / f"labels-{n_blocks}.zarr"),
        tile=(SIDE,) * 3,
        block=(SIDE,) * 3,
    )
    plan, ledger = prepare(config, own_resources())
    assert len(plan.grid) == n_blocks, (len(plan.grid), n_blocks)
    # A run that goes on makes no forecast at its end: that is no part of scheduling.
    ledger.mark("predict", 0, 1)
    return plan, ledger


def write_nothing(path: Path, n_blocks: int) -> str:
    """An OME-Zarr image without a stored chunk; of version 0.4, for which blocks stay small."""
    across = CROSS_SECTION * SIDE
    group = zarr.create_group(str(path), zarr_format=2)
    group.create_array(
        "0",
        shape=(n_blocks // CROSS_SECTION**2 * SIDE, across, across),
        chunks=(across,) * 3,
        dtype="uint8",
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    level = {"path": "0", "coordinateTransformations": scale}
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [level]}]
    return str(path)


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process, and of the processes that it started itself."""
    services = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                services += resident_mib(folder)
        except OSError:
            # It ended between the two.
            continue
    return resident_mib(Path("/proc/self")), services


def resident_mib(folder: Path) -> float:
    """Resident memory of one process."""
    pages = int((folder / "statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def parse() -> argparse.Namespace:
    """The options of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
