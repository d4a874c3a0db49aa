"""The stages of a segmentation in order, at any place.

    prepare    plan ─> output created, unlisted ─> ledger
    carry_out  predict ─> pyramid-1 ─> pyramid-2 ... ─> list
               predict ─> seeds ─> stitch ─> number ─> grow ─> pyramid-1 ... ─> objects ─> list

Each stage runs the blocks that the ledger does not have yet. A label image is listed in `labels/`
last, when it is complete.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import store
from bigseg.counting import carry_out_alone, read_count
from bigseg.errors import StoreError
from bigseg.forecast import make_forecast
from bigseg.ledger import Ledger
from bigseg.lock import Lock
from bigseg.places import Here
from bigseg.plan import ALONE, NUMBER, PREDICT, Plan, stage_grids
from bigseg.planner import locate_output, make_plan
from bigseg.reports import BlockReport, Spent
from bigseg.results import (
    begun_plan,
    check_same,
    create_result,
    erase_condemned,
    ledger_url,
    remove_result,
    restore_scratch,
)
from bigseg.scratch import has_scratch, remove_scratch
from bigseg.transform import load_transform
from bigseg.trial import is_worth_trying
from bigseg.volume import list_label

if TYPE_CHECKING:
    from collections.abc import Generator

    from bigseg.blocks import BlockGrid
    from bigseg.config import SegmentConfig
    from bigseg.machine import Resources
    from bigseg.places import Executor, Place
    from bigseg.progress import Progress, Task
    from bigseg.transform import Transform
    from bigseg.trial import Trial

logger = logging.getLogger(__name__)

NOTE_EVERY_S = 1.0
# Blocks in a row that a store did not answer for, each after all tries: it is away.
AWAY_AFTER = 3

# Gives the event that is set when the user wants a run to end after the blocks in flight.
Stopping = Callable[[], AbstractContextManager[threading.Event]]


def _nothing(**values: object) -> None:
    """Who holds no lock checks nothing, and tells nobody."""


def never() -> AbstractContextManager[threading.Event]:
    """An event that nobody sets."""
    return nullcontext(threading.Event())


@dataclass(frozen=True)
class SegmentResult:
    """What a run did: where the output lies, and the blocks that it had to set aside."""

    plan: Plan
    n_blocks: int
    n_done_before: int
    n_done: int
    n_empty: int
    n_objects: int | None
    filled: tuple[str, ...]
    failed: tuple[BlockReport, ...]
    spent: Spent
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every block of every stage is written, as the ledger says."""
        return self.n_done == self.n_blocks


def segment_serially(
    config: SegmentConfig, progress: Progress, *, stopping: Stopping = never
) -> SegmentResult:
    """Segment as `config` says, in this process.

    Raises:
        BigsegError: the image, the model or the output cannot be used.
        KeyboardInterrupt: it was stopped; the blocks in flight were finished.
    """
    return segment_at(Here(), config, progress, stopping=stopping)


def segment_at(
    place: Place, config: SegmentConfig, progress: Progress, *, stopping: Stopping = never
) -> SegmentResult:
    """Segment as `config` says, at this place, with the lock of the output held.

    Raises:
        BigsegError: the image, the model or the output cannot be used, or another run writes it.
        KeyboardInterrupt: it was stopped; the blocks in flight were finished.
    """
    transform = load_transform(config.transform) if config.transform else None
    with Lock.acquire(locate_output(config)) as lock:
        plan, ledger = prepare(
            config,
            place.resources,
            transform=transform,
            try_engines=place.try_engines,
            guard=lock.check,
        )
        with place.executor(plan, transform, lock.owner) as executor, stopping() as stop:
            return carry_out(plan, ledger, executor, progress, stop=stop, note=lock.note)


def prepare(
    config: SegmentConfig,
    resources: Resources,
    *,
    transform: Transform | None = None,
    try_engines: Callable[[Plan], Trial] | None = None,
    guard: Callable[[], None] = _nothing,
) -> tuple[Plan, Ledger]:
    """The plan, and the ledger of its output: the one that is there, or a new one.

    What is left open is taken from a result that was begun, so that another machine goes on with
    it; engines are tried for a new one, where the user leaves it open and the run is long. `guard`
    is called before anything is written, and raises where that is not allowed.

    Raises:
        UsageError: the output was begun with other settings.
        OutputError: the output exists and bigseg did not make it, or it cannot be written.
    """
    url = locate_output(config)
    if config.overwrite:
        remove_result(url, image=config.image if config.out is None else None, guard=guard)
    ledger = Ledger.open(ledger_url(url), guard=guard)
    if ledger is None:
        plan = make_plan(config, resources, transform=transform)
        if try_engines is not None and config.engine == "auto" and is_worth_trying(plan):
            plan = with_engine(plan, try_engines(plan))
        return plan, create_result(plan, guard)
    begun = begun_plan(ledger, url)
    plan = make_plan(config, resources, transform=transform, begun=begun)
    check_same(begun, plan, url)
    return plan, ledger


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


def carry_out(
    plan: Plan,
    ledger: Ledger,
    executor: Executor,
    progress: Progress,
    *,
    stop: threading.Event | None = None,
    note: Callable[..., None] = _nothing,
) -> SegmentResult:
    """Run what the ledger does not have yet, stage by stage, and list the result when complete.

    A stage with failed blocks is the last one run: the next would build on its holes. `note` is
    told how far it is, for those who watch from outside.

    Raises:
        StoreError: a store can no longer be read or written; what is done is kept.
        KeyboardInterrupt: `stop` was set; the blocks in flight were finished.
    """
    started = time.monotonic()
    stop = stop or threading.Event()
    erase_condemned(plan, ledger)
    restore_scratch(plan, ledger)
    grids = stage_grids(plan)
    n_before = sum(map(ledger.n_done, grids))
    failed: list[BlockReport] = []
    spent: dict[str, Spent] = {}
    for stage, grid in grids.items():
        pending = ledger.pending(stage)
        n_done = len(grid) - int(np.count_nonzero(pending))
        if n_done == len(grid):
            continue
        with progress.task(stage, total=len(grid), unit="blocks", done=n_done) as task:
            if stage in ALONE:
                _carry_out_alone(plan, stage, ledger, task)
            else:
                follower = _Follower(ledger, stage, grid, plan, task, note)
                spent[stage] = follower.follow(executor.run(stage, pending, stop), failed)
        if stop.is_set() or ledger.n_done(stage) < len(grid):
            break
    n_done, n_blocks = sum(map(ledger.n_done, grids)), sum(map(len, grids.values()))
    if stop.is_set() and n_done < n_blocks:
        raise KeyboardInterrupt
    result = SegmentResult(
        plan=plan,
        n_blocks=n_blocks,
        n_done_before=n_before,
        n_done=n_done,
        n_empty=ledger.n_empty(PREDICT),
        n_objects=_count_objects(plan, ledger),
        filled=tuple(ledger.filled),
        failed=tuple(failed),
        spent=spent.get(PREDICT, Spent()),
        seconds=time.monotonic() - started,
    )
    if result.is_complete:
        _complete(result, ledger, executor, spent)
    return result


def _carry_out_alone(plan: Plan, stage: str, ledger: Ledger, task: Task) -> None:
    """Do a stage that is one block of the driver's."""
    ledger.mark(stage, 0, carry_out_alone(plan, stage, ledger.check))
    ledger.flush()
    task.advance(1)


def _count_objects(plan: Plan, ledger: Ledger) -> int | None:
    """The number of objects, where there are any and they have been numbered."""
    if plan.instances is None:
        return None
    if ledger.is_finished or not has_scratch(plan):
        return ledger.record.get("objects")
    return read_count(plan) if ledger.n_done(NUMBER) else None


def _complete(
    result: SegmentResult, ledger: Ledger, executor: Executor, spent: dict[str, Spent]
) -> None:
    """Tidy up behind those that were killed, list the result, note what it cost."""
    plan = result.plan
    # Makes sure, too, that the result is still this run's to list.
    ledger.flush()
    if (not ledger.is_new and not ledger.is_finished) or executor.n_deaths:
        store.sweep(plan.output.url)
    if plan.output.beside:
        # Also where it was listed before: another run can have taken it out of the list.
        list_label(plan.source.url, plan.output.name)
    if not ledger.is_finished:
        ledger.finish(_record(result, executor.n_workers, spent))
    if plan.instances is not None:
        remove_scratch(plan.output.url)


@dataclass
class _Follower:
    """Notes every report of a stage in the ledger, on the display, and for those outside."""

    ledger: Ledger
    stage: str
    grid: BlockGrid
    plan: Plan
    task: Task
    note: Callable[..., None]
    noted_s: float = 0.0
    n_voxels: int = 0
    n_done: int = 0
    started_s: float = field(default_factory=time.monotonic)

    def follow(
        self, reports: Generator[BlockReport, None, None], failed: list[BlockReport]
    ) -> Spent:
        """Take all reports; gives what the workers spent.

        Raises:
            StoreError: a worker met what no other try can mend, or a store is away.
        """
        total, n_unanswered = Spent(), 0
        try:
            for report in reports:
                total += report.spent or Spent()
                if report.error is None:
                    n_unanswered = 0
                    self._done(report, total)
                    continue
                self.ledger.fail(self.stage, report.block, report.error)
                logger.warning("%s", report.error)
                n_unanswered = n_unanswered + 1 if report.kind == "store" else 0
                if report.kind == "permanent" or n_unanswered >= AWAY_AFTER:
                    raise StoreError(
                        f"{report.error}; what is done is kept, the same command goes on from it"
                    )
                failed.append(report)
        finally:
            try:
                self.ledger.flush()
            finally:
                reports.close()
        return total

    def _done(self, report: BlockReport, total: Spent) -> None:
        self.ledger.mark(self.stage, report.block, report.checksum)
        if report.filled:
            self.ledger.note_filled(self.stage, report.block, report.filled)
        core, text = self.grid[report.block].core, ""
        if self.stage == PREDICT:
            core, text = core.intersect(self.plan.region), total.as_text()
        self.task.advance(1, voxels=core.n_voxels, note=text)
        self.n_voxels += core.n_voxels
        self.n_done += 1
        now = time.monotonic()
        if now - self.noted_s >= NOTE_EVERY_S:
            self.noted_s = now
            self.note(
                stage=self.stage,
                n_done=self.ledger.n_done(self.stage),
                n_blocks=len(self.grid),
                mvox_per_s=round(self.n_voxels / max(now - self.started_s, 1e-3) / 1e6, 3),
                blocks_per_s=round(self.n_done / max(now - self.started_s, 1e-3), 3),
            )


def _record(result: SegmentResult, n_workers: int, spent: dict[str, Spent]) -> dict[str, Any]:
    """What the run cost, beside what the plan predicted where it did all of it."""
    record: dict[str, Any] = {
        "seconds": round(result.seconds, 3),
        "blocks": result.n_done - result.n_done_before,
        "empty_blocks": result.n_empty,
        "filled_chunks": list(result.filled),
        "workers": n_workers,
        **({} if result.n_objects is None else {"objects": result.n_objects}),
        "spent": {stage: value.as_dict() for stage, value in spent.items()},
    }
    if result.n_done_before == 0:
        record["predicted"] = make_forecast(result.plan, n_workers=n_workers).as_dict()
    return record
