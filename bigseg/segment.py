"""The stages of a segmentation in order, with any executor; holds the serial one.

    prepare    plan ─> output created, unlisted ─> ledger
    carry_out  predict ─> pyramid-1 ─> pyramid-2 ... ─> list

Each stage runs the blocks that the ledger does not have yet. A label image is listed in `labels/`
last, when it is complete.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bigseg import layout, store
from bigseg.config import parse_settings
from bigseg.engine import available_cpus, pick_device
from bigseg.errors import ConfigError, InputError, OutputError, UsageError
from bigseg.ledger import Ledger
from bigseg.plan import Plan, make_plan, output_spec
from bigseg.stages import BlockReport, Worker, stage_grids
from bigseg.volume import create_pyramid, list_label, open_volume, unlist_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bigseg.config import SegmentConfig
    from bigseg.engine import Device
    from bigseg.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentResult:
    """What a run did: where the output lies, and the blocks that it had to set aside."""

    plan: Plan
    n_blocks: int
    n_done_before: int
    n_done: int
    failed: tuple[BlockReport, ...]
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every block of every stage is written, as the ledger says."""
        return self.n_done == self.n_blocks


class Executor(Protocol):
    """Carries out blocks of a stage, somewhere; the reports come in any order."""

    def run(self, stage: str, blocks: Iterable[int], n_blocks: int) -> Iterator[BlockReport]:
        """A report for every block."""


class SerialExecutor:
    """Carries out blocks in this process, one after the other: for debugging and tests."""

    def __init__(self, plan: Plan, n_threads: int | None = None) -> None:
        self._worker = Worker(plan, n_threads or available_cpus())

    def run(self, stage: str, blocks: Iterable[int], n_blocks: int) -> Iterator[BlockReport]:
        """A report for every block, in order."""
        del n_blocks
        return self._worker.run(stage, blocks)


def segment_serially(config: SegmentConfig, progress: Progress) -> SegmentResult:
    """Segment as `config` says, in this process, on its GPU or its processors.

    Raises:
        BigsegError: the image, the model or the output cannot be used.
    """
    device: Device = "cuda" if pick_device().type == "cuda" else "cpu"
    plan, ledger = prepare(config, device=device)
    return carry_out(plan, ledger, SerialExecutor(plan), progress)


def prepare(config: SegmentConfig, *, device: Device) -> tuple[Plan, Ledger]:
    """The plan, and the ledger of its output: the one that is there, or a new one.

    Raises:
        UsageError: the output was begun with other settings.
        OutputError: the output exists and bigseg did not make it, or it cannot be written.
    """
    plan = make_plan(config, device=device)
    url = plan.output.url
    if config.overwrite:
        _remove(plan)
    ledger = Ledger.open(_ledger_url(plan))
    if ledger is None:
        return plan, _create_output(plan)
    try:
        begun = parse_settings(Plan, ledger.plan, source=ledger.url)
    except ConfigError as error:
        raise UsageError(
            f"{url} was begun by another version of bigseg ({error}): go on with that one, choose "
            "another --name or --out, or start anew with --overwrite"
        ) from None
    differences = begun.differences(plan)
    if differences:
        raise UsageError(
            f"{url} was made with other settings ({'; '.join(differences[:4])}): repeat those, "
            "choose another --name or --out, or start anew with --overwrite"
        )
    return plan, ledger


def carry_out(plan: Plan, ledger: Ledger, executor: Executor, progress: Progress) -> SegmentResult:
    """Run what the ledger does not have yet, stage by stage, and list the result when complete.

    A stage with failed blocks is the last one run: the next would build on its holes.
    """
    started = time.monotonic()
    grids = stage_grids(plan)
    n_before = sum(ledger.n_done(stage) for stage in grids)
    failed: list[BlockReport] = []
    incomplete = False
    for stage, grid in grids.items():
        n_left = len(grid) - ledger.n_done(stage)
        if n_left and not incomplete:
            done = len(grid) - n_left
            with progress.task(stage, total=len(grid), unit="blocks", done=done) as task:
                try:
                    for report in executor.run(stage, ledger.left(stage), n_left):
                        if report.error is not None:
                            failed.append(report)
                            logger.warning("%s", report.error)
                            continue
                        ledger.mark(stage, report.block, report.checksum)
                        task.advance(1, voxels=grid[report.block].core.n_voxels)
                finally:
                    ledger.flush()
            incomplete = ledger.n_done(stage) < len(grid)
    n_done = sum(ledger.n_done(stage) for stage in grids)
    result = SegmentResult(
        plan=plan,
        n_blocks=sum(map(len, grids.values())),
        n_done_before=n_before,
        n_done=n_done,
        failed=tuple(failed),
        seconds=time.monotonic() - started,
    )
    if result.is_complete and plan.output.beside:
        # Also where it was listed before: another run can have taken it out of the list.
        list_label(plan.source.url, plan.output.name)
    if result.is_complete and not ledger.is_finished:
        ledger.finish({"seconds": round(result.seconds, 3), "blocks": n_done - n_before})
    return result


def n_workers_for(plan: Plan, n_cpus: int) -> int:
    """How many workers a machine with this many processors gets when nobody says.

    Small machines run one worker a processor (two of one thread did 2.03 times the work of one);
    on larger ones a worker has four, which bounds memory. Never more than there are blocks.
    """
    return max(1, min(math.ceil(n_cpus / (1 if n_cpus <= 4 else 4)), len(plan.grid)))


def _ledger_url(plan: Plan) -> str:
    return store.join(plan.output.url, "ledger")


def _create_output(plan: Plan) -> Ledger:
    source = open_volume(plan.source.url, level=plan.source.level)
    url = plan.output.url
    if _is_begun(plan):
        _unlist(plan)
    else:
        create_pyramid(source, url, output_spec(plan), name=plan.output.name)
    n_blocks = {stage: len(grid) for stage, grid in stage_grids(plan).items()}
    return Ledger.create(_ledger_url(plan), plan.model_dump(mode="json"), n_blocks)


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


def _remove(plan: Plan) -> None:
    """Unlist and delete the old output, if a segmentation by bigseg made it.

    Its list entry and its ledger go first: what a removal that is cut short leaves is neither
    listed nor taken for finished, and can be removed by the next.
    """
    url = plan.output.url
    if not store.exists(url) or store.is_empty(url):
        return
    if not _is_made_by_segment(url):
        raise OutputError(
            f"{url} was not made by bigseg segment, so --overwrite does not delete it: delete it "
            "yourself or choose another --name or --out"
        )
    _unlist(plan)
    ledger = Ledger.open(_ledger_url(plan))
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


def _unlist(plan: Plan) -> None:
    if plan.output.beside:
        unlist_label(plan.source.url, plan.output.name)
