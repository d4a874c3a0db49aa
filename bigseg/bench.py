"""What a segmentation would cost, and how much of the network's speed it keeps on this machine."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import store
from bigseg.checkpoint import read_card
from bigseg.errors import IncompleteError, InputError, OutputError
from bigseg.forecast import Forecast, count_tiles, make_forecast
from bigseg.ledger import EMPTY_MARK, Ledger
from bigseg.on_ray import on_ray
from bigseg.places import Here
from bigseg.plan import PREDICT, Plan
from bigseg.planner import locate_output, make_plan
from bigseg.reports import Spent
from bigseg.results import begun_plan, check_same, ledger_url
from bigseg.segment import prepare, with_engine
from bigseg.transform import load_transform
from bigseg.trial import is_worth_trying

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from bigseg.config import SegmentConfig
    from bigseg.places import Executor, Place
    from bigseg.probe import Timing
    from bigseg.progress import Progress


def foresee(config: SegmentConfig) -> Forecast:
    """The cost of `segment` with these settings; nothing is written.

    Without a cluster to ask, this process stands for a worker.

    Raises:
        BigsegError: the image, the model, the output or the cluster cannot be used.
    """
    transform = load_transform(config.transform) if config.transform else None
    with _place(config, ask_cluster=_is_remote(config)) as place:
        url = locate_output(config)
        ledger = None if config.overwrite else Ledger.open(ledger_url(url), read_only=True)
        begun = begun_plan(ledger, url) if ledger else None
        plan = make_plan(config, place.resources, transform=transform, begun=begun)
        if begun is not None:
            check_same(begun, plan, url)
        if begun is None and config.engine == "auto" and is_worth_trying(plan):
            trial = place.try_engines(plan)
            plan = with_engine(plan, trial)
        else:
            trial = place.try_engines(plan, only=(plan.engine,))
        n_workers = config.workers or min(place.resources.n_workers, len(plan.grid))
        if config.executor == "serial":
            n_workers = 1
        return make_forecast(plan, n_workers=n_workers, flops_a_second=trial.flops_a_second)


@dataclass(frozen=True)
class Bench:
    """Times of one machine: of the engines on a tile, and of the way from Zarr to Zarr.

    `tile_s` is the raw forward pass of one tile while all workers are at it; `ideal_s` what the
    tiles of the blocks that were segmented take at that rate, and `wall_s` what they took.
    """

    plan: Plan
    timings: tuple[Timing, ...]
    n_workers: int
    n_blocks: int
    n_tiles: int
    n_voxels: int
    tile_s: float
    start_s: float
    wall_s: float
    spent: Spent

    @property
    def ideal_s(self) -> float:
        """Raw forward time of the tiles that were computed, on all workers."""
        return self.n_tiles * self.tile_s / min(self.n_workers, self.n_blocks)

    @property
    def efficiency(self) -> float:
        """The share of the network's speed that is kept."""
        return self.ideal_s / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("plan", "timings", "spent")}
        engines = {
            str(t.engine): {"seconds": t.seconds, "largest_difference": t.largest_difference}
            for t in self.timings
        }
        return {
            **values,
            "efficiency": self.efficiency,
            "useful_voxels_a_second": self.n_voxels / self.wall_s,
            "engine": str(self.plan.engine),
            "engines_on_a_small_tile": engines,
            "spent": self.spent.as_dict(),
        }

    def as_text(self) -> str:
        """A few lines for people."""
        rows = [
            f"engine     {t.engine}: {t.seconds * 1e3:.1f} ms a small tile, probabilities within "
            f"{t.largest_difference:.2g} of float32"
            for t in sorted(self.timings, key=lambda t: t.seconds)
        ]
        sides = "×".join(map(str, self.plan.tile[1:]))
        rate = self.n_voxels / self.wall_s / 1e6
        rows += [
            f"taken      {self.plan.engine}",
            f"raw        {self.tile_s * 1e3:.1f} ms a tile of {sides} on each of "
            f"{self.n_workers} workers",
            f"segmented  {self.n_blocks} blocks, {self.n_tiles} tiles in {self.wall_s:.1f} s: "
            f"{rate:.2f} Mvox/s from Zarr to Zarr, {self.spent.as_text()}",
            f"kept       {100 * self.efficiency:.0f} % of the raw speed; starting took "
            f"{self.start_s:.1f} s",
        ]
        return "\n".join(rows)


def run_bench(config: SegmentConfig, *, n_blocks: int, progress: Progress) -> Bench:
    """Measure the engines (or the one asked for) on a tile, then segment blocks in the middle.

    They are written into a temporary place (a local one, or `config.out`), which is removed.

    Raises:
        BigsegError: the image, the model, the output or the cluster cannot be used.
        IncompleteError: a block could not be segmented.
    """
    transform = load_transform(config.transform) if config.transform else None
    with _scratch(config) as url, _place(config, ask_cluster=True) as place:
        elsewhere = config.model_copy(update={"out": url, "overwrite": False})
        plan = make_plan(elsewhere, place.resources, transform=transform)
        only = () if config.engine == "auto" else (plan.engine,)
        trial = place.try_engines(plan, only=only)
        engine = {"engine": trial.engine.name, "precision": trial.engine.precision}
        plan, _ = prepare(elsewhere.model_copy(update=engine), place.resources, transform=transform)
        tile_s = place.time_tile(plan)
        pending = _middle(len(plan.grid), n_blocks)
        started = time.perf_counter()
        with place.executor(plan, transform) as executor:
            # The first blocks build the engine in every worker.
            warm = _first_of_each(pending, executor.n_workers)
            _carry_out(executor, plan, warm, progress)
            start_s = time.perf_counter() - started
            started = time.perf_counter()
            spent, computed = _carry_out(executor, plan, pending, progress)
            wall_s = time.perf_counter() - started
        cores = [plan.grid[i].core.intersect(plan.region) for i in computed]
        if not cores:
            raise InputError(
                "all blocks that were tried are empty space: choose another --region, or look at "
                "--mask and --skip-below"
            )
        return Bench(
            plan=plan,
            timings=trial.timings,
            n_workers=executor.n_workers,
            n_blocks=len(cores),
            n_tiles=sum(count_tiles(plan, core) for core in cores),
            n_voxels=sum(core.n_voxels for core in cores),
            tile_s=tile_s,
            start_s=start_s,
            wall_s=wall_s,
            spent=spent,
        )


def _carry_out(
    executor: Executor, plan: Plan, pending: NDArray[np.bool_], progress: Progress
) -> tuple[Spent, list[int]]:
    """What was spent, and the blocks that were computed: not those that were skipped."""
    spent, computed = Spent(), []
    n_blocks = int(np.count_nonzero(pending))
    with progress.task("bench", total=n_blocks, unit="blocks") as task:
        for report in executor.run(PREDICT, pending):
            if report.error is not None:
                raise IncompleteError(f"a block could not be segmented: {report.error}")
            spent += report.spent or Spent()
            if report.checksum != EMPTY_MARK:
                computed.append(report.block)
            voxels = plan.grid[report.block].core.intersect(plan.region).n_voxels
            task.advance(1, voxels=voxels, note=spent.as_text())
    return spent, computed


def _middle(n: int, n_wanted: int) -> NDArray[np.bool_]:
    pending = np.zeros(n, np.bool_)
    first = max(0, (n - n_wanted) // 2)
    pending[first : first + n_wanted] = True
    return pending


def _first_of_each(pending: NDArray[np.bool_], n_workers: int) -> NDArray[np.bool_]:
    first = np.zeros_like(pending)
    first[np.flatnonzero(pending)[:n_workers]] = True
    return first


@contextmanager
def _scratch(config: SegmentConfig) -> Iterator[str]:
    """A place for an output that is thrown away."""
    read_card(config.model)
    if config.out is None:
        with tempfile.TemporaryDirectory(prefix="bigseg-bench-") as folder:
            yield os.path.join(folder, "out.zarr")
        return
    url = config.out
    if store.exists(url):
        raise OutputError(f"--out {url} exists: bench writes and removes it; name another")
    try:
        yield url
    finally:
        store.remove(url)


def _place(config: SegmentConfig, *, ask_cluster: bool) -> AbstractContextManager[Place]:
    if config.executor == "serial" or not ask_cluster:
        return nullcontext(Here(like_a_worker=config.executor != "serial"))
    return on_ray(config)


def _is_remote(config: SegmentConfig) -> bool:
    return bool(config.address or os.environ.get("RAY_ADDRESS"))
