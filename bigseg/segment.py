"""The stages of a segmentation in order, with any executor; holds the serial one.

    prepare    plan ─> output created, unlisted ─> ledger
    carry_out  predict ─> pyramid-1 ─> pyramid-2 ... ─> list

Each stage runs the blocks that the ledger does not have yet. A label image is listed in `labels/`
last, when it is complete.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bigseg import layout, store
from bigseg.config import parse_settings
from bigseg.cuda import gpu_memory, n_gpus
from bigseg.engine import available_cpus, pick_device
from bigseg.errors import ConfigError, InputError, OutputError, UsageError
from bigseg.forecast import make_forecast
from bigseg.ledger import Ledger
from bigseg.machine import USABLE, Resources, Workers, cpu_resources, memory_of_machine
from bigseg.plan import PREDICT, Plan, output_spec
from bigseg.planner import locate_output, make_plan
from bigseg.reports import BlockReport, Spent
from bigseg.stages import Worker, stage_grids
from bigseg.transform import load_transform
from bigseg.trial import Trial, is_worth_trying, time_tile, try_engines
from bigseg.volume import create_pyramid, list_label, open_volume, unlist_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from bigseg.blocks import BlockGrid
    from bigseg.config import SegmentConfig
    from bigseg.engine import EngineSpec
    from bigseg.progress import Progress, Task
    from bigseg.transform import Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentResult:
    """What a run did: where the output lies, and the blocks that it had to set aside."""

    plan: Plan
    n_blocks: int
    n_done_before: int
    n_done: int
    n_empty: int
    failed: tuple[BlockReport, ...]
    spent: Spent
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every block of every stage is written, as the ledger says."""
        return self.n_done == self.n_blocks


class Executor(Protocol):
    """Carries out blocks of a stage, somewhere; the reports come in any order."""

    n_workers: int

    def run(self, stage: str, pending: NDArray[np.bool_]) -> Iterator[BlockReport]:
        """A report for every block that is pending."""


class SerialExecutor:
    """Carries out blocks in this process, one after the other; a context manager."""

    n_workers = 1

    def __init__(
        self, plan: Plan, n_threads: int | None = None, *, transform: Transform | None = None
    ) -> None:
        self._worker = Worker(plan, n_threads or available_cpus(), transform=transform)

    def __enter__(self) -> SerialExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def run(self, stage: str, pending: NDArray[np.bool_]) -> Iterator[BlockReport]:
        """A report for every block that is pending, in order."""
        for report in self._worker.run(stage, map(int, np.flatnonzero(pending))):
            yield replace(report, spent=self._worker.take_spent())


class Place(Protocol):
    """Where blocks are carried out: this process, or the workers of a cluster."""

    resources: Resources

    def try_engines(self, plan: Plan, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
        """Time engines on one of the workers; see `trial.try_engines`."""

    def time_tile(self, plan: Plan) -> float:
        """Seconds of the raw forward pass of a tile while all workers are at it."""

    def workers(self, plan: Plan) -> Workers:
        """The workers that the plan gets."""

    def executor(self, plan: Plan, transform: Transform | None) -> AbstractContextManager[Executor]:
        """Something that carries the plan out."""


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

    def executor(self, plan: Plan, transform: Transform | None) -> SerialExecutor:
        """The serial one."""
        return SerialExecutor(plan, transform=transform)


def segment_serially(config: SegmentConfig, progress: Progress) -> SegmentResult:
    """Segment as `config` says, in this process.

    Raises:
        BigsegError: the image, the model or the output cannot be used.
    """
    return segment_at(Here(), config, progress)


def segment_at(place: Place, config: SegmentConfig, progress: Progress) -> SegmentResult:
    """Segment as `config` says, at this place.

    Raises:
        BigsegError: the image, the model or the output cannot be used.
    """
    transform = load_transform(config.transform) if config.transform else None
    plan, ledger = prepare(
        config, place.resources, transform=transform, try_engines=place.try_engines
    )
    with place.executor(plan, transform) as executor:
        return carry_out(plan, ledger, executor, progress)


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


def prepare(
    config: SegmentConfig,
    resources: Resources,
    *,
    transform: Transform | None = None,
    try_engines: Callable[[Plan], Trial] | None = None,
) -> tuple[Plan, Ledger]:
    """The plan, and the ledger of its output: the one that is there, or a new one.

    What is left open is taken from a result that was begun, so that another machine goes on with
    it; engines are tried for a new one, where the user leaves it open and the run is long.

    Raises:
        UsageError: the output was begun with other settings.
        OutputError: the output exists and bigseg did not make it, or it cannot be written.
    """
    url = locate_output(config)
    if config.overwrite:
        _remove(config.image, url, beside=config.out is None)
    ledger = Ledger.open(_ledger_url(url))
    if ledger is None:
        plan = make_plan(config, resources, transform=transform)
        if try_engines is not None and config.engine == "auto" and is_worth_trying(plan):
            plan = with_engine(plan, try_engines(plan))
        return plan, _create_output(plan)
    begun = begun_plan(ledger, url)
    plan = make_plan(config, resources, transform=transform, begun=begun)
    check_same(begun, plan, url)
    return plan, ledger


def begun_plan(ledger: Ledger, url: str) -> Plan:
    """The plan of a result that was begun at `url`.

    Raises:
        UsageError: another version of bigseg made it.
    """
    try:
        return parse_settings(Plan, ledger.plan, source=ledger.url)
    except ConfigError as error:
        raise UsageError(
            f"{url} was begun by another version of bigseg ({error}): go on with that one, choose "
            "another --name or --out, or start anew with --overwrite"
        ) from None


def check_same(begun: Plan, plan: Plan, url: str) -> None:
    """Refuse to go on at `url` with another plan.

    Raises:
        UsageError: names what differs.
    """
    if differences := begun.differences(plan):
        raise UsageError(
            f"{url} was made with other settings ({'; '.join(differences[:4])}): repeat those, "
            "choose another --name or --out, or start anew with --overwrite"
        )


def with_engine(plan: Plan, trial: Trial) -> Plan:
    """The plan with the engine that was chosen."""
    logger.info("engine %s", trial.reason)
    return plan.model_copy(
        update={
            "engine": trial.engine,
            "engine_reason": trial.reason,
            "flops_a_second": trial.flops_a_second,
        }
    )


def carry_out(plan: Plan, ledger: Ledger, executor: Executor, progress: Progress) -> SegmentResult:
    """Run what the ledger does not have yet, stage by stage, and list the result when complete.

    A stage with failed blocks is the last one run: the next would build on its holes.
    """
    started = time.monotonic()
    grids = stage_grids(plan)
    n_before = sum(ledger.n_done(stage) for stage in grids)
    failed: list[BlockReport] = []
    spent: dict[str, Spent] = {}
    for stage, grid in grids.items():
        pending = ledger.pending(stage)
        if not pending.any():
            continue
        n_done = len(grid) - int(np.count_nonzero(pending))
        with progress.task(stage, total=len(grid), unit="blocks", done=n_done) as task:
            reports = executor.run(stage, pending)
            spent[stage] = _follow(reports, ledger, stage, grid, plan, task, failed)
        if ledger.n_done(stage) < len(grid):
            break
    n_done = sum(ledger.n_done(stage) for stage in grids)
    result = SegmentResult(
        plan=plan,
        n_blocks=sum(map(len, grids.values())),
        n_done_before=n_before,
        n_done=n_done,
        n_empty=ledger.n_empty(PREDICT),
        failed=tuple(failed),
        spent=spent.get(PREDICT, Spent()),
        seconds=time.monotonic() - started,
    )
    if result.is_complete and plan.output.beside:
        # Also where it was listed before: another run can have taken it out of the list.
        list_label(plan.source.url, plan.output.name)
    if result.is_complete and not ledger.is_finished:
        ledger.finish(_record(result, executor.n_workers, spent))
    return result


def _follow(
    reports: Iterator[BlockReport],
    ledger: Ledger,
    stage: str,
    grid: BlockGrid,
    plan: Plan,
    task: Task,
    failed: list[BlockReport],
) -> Spent:
    """Note every report in the ledger and on the display; gives what the workers spent."""
    total = Spent()
    try:
        for report in reports:
            total += report.spent or Spent()
            if report.error is not None:
                failed.append(report)
                logger.warning("%s", report.error)
                continue
            ledger.mark(stage, report.block, report.checksum)
            core, note = grid[report.block].core, ""
            if stage == PREDICT:
                core, note = core.intersect(plan.region), total.as_text()
            task.advance(1, voxels=core.n_voxels, note=note)
    finally:
        ledger.flush()
    return total


def _record(result: SegmentResult, n_workers: int, spent: dict[str, Spent]) -> dict[str, Any]:
    """What the run cost, beside what the plan predicted where it did all of it."""
    record: dict[str, Any] = {
        "seconds": round(result.seconds, 3),
        "blocks": result.n_done - result.n_done_before,
        "empty_blocks": result.n_empty,
        "workers": n_workers,
        "spent": {stage: value.as_dict() for stage, value in spent.items()},
    }
    if result.n_done_before == 0:
        record["predicted"] = make_forecast(result.plan, n_workers=n_workers).as_dict()
    return record


def _ledger_url(output_url: str) -> str:
    return store.join(output_url, "ledger")


def _create_output(plan: Plan) -> Ledger:
    source = open_volume(plan.source.url, level=plan.source.level)
    url = plan.output.url
    if _is_begun(plan):
        if plan.output.beside:
            unlist_label(source.url, plan.output.name)
    else:
        create_pyramid(source, url, output_spec(plan), name=plan.output.name)
    n_blocks = {stage: len(grid) for stage, grid in stage_grids(plan).items()}
    return Ledger.create(_ledger_url(url), plan.model_dump(mode="json"), n_blocks)


def _is_begun(plan: Plan) -> bool:
    """Whether the output of this very plan is there: created by a run killed before its ledger."""
    url = plan.output.url
    if not store.exists(url):
        return False
    try:
        provenance = open_volume(url).provenance
    except InputError:
        return False
    return (provenance or {}).get("fingerprint") == plan.fingerprint


def _remove(image: str, url: str, *, beside: bool) -> None:
    """Unlist and delete the old output, if a segmentation by bigseg made it.

    Its list entry and its ledger go first: what a removal that is cut short leaves is neither
    listed nor taken for finished, and can be removed by the next.
    """
    if not store.exists(url) or store.is_empty(url):
        return
    if not _is_made_by_segment(url):
        raise OutputError(
            f"{url} was not made by bigseg segment, so --overwrite does not delete it: delete it "
            "yourself or choose another --name or --out"
        )
    if beside:
        unlist_label(image, store.name_of(url))
    ledger = Ledger.open(_ledger_url(url))
    if ledger is not None:
        ledger.discard()
    store.remove(url)


def _is_made_by_segment(url: str) -> bool:
    try:
        # Of the group alone: its arrays can be gone already.
        provenance = store.open_group(url, mode="r").attrs.get(layout.PROVENANCE)
    except InputError:
        return False
    return isinstance(provenance, dict) and "fingerprint" in provenance
