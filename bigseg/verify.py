"""Whether a result is what its plan says, and taking back what is not, so that it is made again.

    metadata   what a viewer and bigseg read of it: levels, types, chunks, the fingerprint, the list
    blocks     every block that is marked done, read again: the bytes that were written
    pyramid    chunks of coarser levels, made again from the level below
    seams      places across the borders of blocks, made again in one forward pass (seams.py)

Each check looks at what those before it found right. What is wrong is taken back in the ledger,
with all that was made from it, and the result is taken out of the list: the same `segment` command
then makes those blocks again. Wrong metadata are only told, and so is all that is wrong with a
result that was moved. Of objects that have no labels yet the kept probabilities are checked.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from bigseg import store
from bigseg.blocks import Block
from bigseg.borders import touching
from bigseg.engine import available_cpus
from bigseg.errors import (
    BadChunkError,
    BigsegError,
    IncompleteError,
    InputError,
    LockedError,
    StoreError,
)
from bigseg.examined import Examined
from bigseg.findings import Check, Finding, Verification
from bigseg.ledger import EMPTY_MARK, NOT_DONE, Ledger, checksum_of
from bigseg.lock import read_lock
from bigseg.object_seams import fault_of_kept
from bigseg.plan import NUMBER, OBJECTS
from bigseg.pyramid_stage import PyramidStage
from bigseg.results import begun_plan, needs_network
from bigseg.seams import Reference
from bigseg.soundness import BESIDE, check_metadata
from bigseg.status import image_of, open_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bigseg.borders import Place
    from bigseg.plan import Plan
    from bigseg.progress import Progress
    from bigseg.transform import Transform

Item = TypeVar("Item")
Found = TypeVar("Found")

MOST_THREADS = 8
NO_LABELS = "there are no labels yet"


def verify(
    url: str,
    *,
    n_seams: int = 16,
    n_chunks: int = 64,
    seed: int = 0,
    transform: Transform | None = None,
    progress: Progress,
) -> Verification:
    """Check the result at `url`, and take back what is wrong with it, unless it was moved.

    Of the pyramid `n_chunks` chunks are made again, of the seams `n_seams` places, drawn with
    `seed`; 0 leaves the check out. `transform` is the user's function where the result was made
    with one.

    Raises:
        InputNotFoundError: there is nothing.
        NotOmeZarrError: `bigseg segment` did not make what is there, or its ledger is damaged.
        IncompleteError: nothing is done yet.
        LockedError: a run writes it.
        StoreError: it cannot be read.
        OutputError: what is wrong cannot be taken back.
    """
    url = url.rstrip("/") or url
    with _reading(url):
        ledger = _open(url)
        plan = _moved(begun_plan(ledger, url), ledger, url)
        has_labels = plan.instances is None or ledger.n_done(NUMBER) > 0
        if not has_labels and not plan.keeps_probabilities:
            raise IncompleteError(
                f"{url} has no labels yet: the same `bigseg segment` command goes on"
            )
        image = image_of(url) if plan.output.beside else None
        metadata = Check("metadata", 0, not_done=NO_LABELS)
        if has_labels:
            metadata = check_metadata(plan, ledger, image=image)
        if any(finding.stage not in BESIDE for finding in metadata.findings):
            return _verification(ledger, url, (metadata, *_not_made("the metadata are wrong")))
        examined = Examined.of(plan, ledger, image)
        if any(finding.stage == OBJECTS for finding in metadata.findings):
            examined.wrong[OBJECTS] = {0}
        checks = [metadata, _check_blocks(examined, progress)]
        if has_labels:
            chunks, places = (np.random.default_rng((seed, i)) for i in range(2))
            checks.append(_check_pyramid(examined, n_chunks, chunks, progress))
            checks.append(_check_seams(examined, n_seams, places, transform, progress))
        else:
            checks += _not_made(NO_LABELS)[1:]
    return _concluded(examined, ledger, url, tuple(checks))


def _open(url: str) -> Ledger:
    """The ledger of a result that nobody writes and that holds something."""
    ledger = open_result(url)
    _refuse_while_running(url)
    if ledger is None:
        raise IncompleteError(
            f"{url} was begun and holds nothing yet: the same `bigseg segment` command goes on"
        )
    return ledger


def _concluded(
    examined: Examined, ledger: Ledger, url: str, checks: tuple[Check, ...]
) -> Verification:
    """What was found, and taken back unless the result was moved: elsewhere no run goes on."""
    made_at = begun_plan(ledger, url).output.url
    is_there = _place_of(made_at) == _place_of(url)
    n_taken_back = examined.take_back() if is_there else 0
    return replace(
        _verification(ledger, url, checks, n_taken_back=n_taken_back),
        needs_network=needs_network(examined.plan, examined.wrong),
        made_at=None if is_there else made_at,
    )


def _place_of(url: str) -> str:
    """One name for all names that a place has on this machine."""
    return os.path.realpath(url.removeprefix("file://")) if store.is_local(url) else url.rstrip("/")


def _not_made(why: str) -> tuple[Check, ...]:
    return tuple(Check(name, 0, not_done=why) for name in ("blocks", "pyramid", "seams"))


def _verification(
    ledger: Ledger, url: str, checks: tuple[Check, ...], *, n_taken_back: int = 0
) -> Verification:
    return Verification(
        url=url,
        is_finished=ledger.is_finished and not n_taken_back,
        n_blocks=sum(ledger.stages.values()),
        n_done=sum(map(ledger.n_done, ledger.stages)) - n_taken_back,
        checks=checks,
        n_taken_back=n_taken_back,
    )


def _refuse_while_running(url: str) -> None:
    lock = read_lock(url)
    if lock is not None and lock.is_alive:
        raise LockedError(
            f"{url} is being written by a run on {lock.host} (process {lock.pid}): verify it when "
            "that has ended; `bigseg status` says how far it is"
        )


def _moved(plan: Plan, ledger: Ledger, url: str) -> Plan:
    """The plan for where the result lies now, reading chunks of the image as its blocks did."""
    output = plan.output.model_copy(update={"url": url})
    rule = "fill" if ledger.filled else plan.on_bad_chunk
    return plan.model_copy(update={"output": output, "on_bad_chunk": rule})


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except BigsegError:
        raise
    except OSError as error:
        raise StoreError(
            f"{url}, or what it was made from, cannot be read ({error.strerror or error}): check "
            "rights and connection, then verify again"
        ) from error


def _check_blocks(examined: Examined, progress: Progress) -> Check:
    """Read every block that is done and compare with its mark."""
    findings: list[Finding] = []
    n_checked = 0
    for stage, marks in examined.marks.items():
        done = np.flatnonzero(marks != NOT_DONE).tolist()
        with progress.task(f"verify {stage}", total=len(done), unit="blocks") as task:
            for block, fault in _in_threads(partial(_fault_of, examined, stage), done):
                core = examined.grids[stage][block].core
                if fault:
                    findings.append(Finding(stage, block, core, fault))
                task.advance(1, voxels=core.n_voxels)
        n_checked += len(done)
    for finding in findings:
        assert finding.block is not None
        examined.condemn(finding.stage, finding.block)
    return Check("blocks", n_checked, tuple(findings))


def _fault_of(examined: Examined, stage: str, block: int) -> str:
    """What is wrong with a block that is marked done; empty where nothing is."""
    mark = examined.marks[stage][block]
    try:
        voxels = examined.read(stage, examined.grids[stage][block].core)
    except BadChunkError as error:
        # It is made again, so no copy is needed.
        return str(error).removesuffix(": restore it from a copy")
    if mark == EMPTY_MARK:
        return "it was left empty, and something lies there" if voxels.any() else ""
    if checksum_of(np.ascontiguousarray(voxels).data) == mark:
        return ""
    if not voxels.any():
        return "what was written is gone, it reads as background"
    return "other bytes lie there than were written"


def _check_pyramid(
    examined: Examined, n_chunks: int, rng: np.random.Generator, progress: Progress
) -> Check:
    """Make chunks of coarser levels again from the level below."""
    makers = {
        stage: PyramidStage(examined.plan, level.level, 1)
        for stage, level in examined.levels.items()
        if level.level
    }
    chunks = examined.draw_chunks(n_chunks, rng)
    findings = []
    with progress.task("verify chunks", total=len(chunks), unit="chunks") as task:
        for stage, block, chunk in chunks:
            stored = examined.read(stage, chunk)
            n_wrong = np.count_nonzero(stored != makers[stage].read(Block(block, chunk)))
            if n_wrong:
                reason = f"{n_wrong} values do not follow from the level below"
                findings.append(Finding(stage, block, chunk, reason))
            task.advance(1, voxels=chunk.n_voxels)
    for finding in findings:
        assert finding.block is not None
        examined.blame(finding.stage, [finding.block])
    return Check("pyramid", len(chunks), tuple(findings), remark=_left_out(n_chunks))


def _check_seams(
    examined: Examined,
    n_seams: int,
    rng: np.random.Generator,
    transform: Transform | None,
    progress: Progress,
) -> Check:
    """Make places across borders of blocks again in one pass."""
    if not n_seams:
        return Check("seams", 0, remark=_left_out(n_seams))
    try:
        image = examined.image or examined.plan.source.url
        reference = Reference(examined.plan, image=image, transform=transform)
    except BigsegError as error:
        return Check("seams", 0, not_done=str(error))
    places, stage = examined.draw_places(n_seams, reference.sides, rng), examined.seam_stage
    findings, unread = [], []
    with progress.task("verify seams", total=len(places), unit="places") as task:
        for place in places:
            try:
                difference = reference.compare(place.box, examined.read(stage, place.box))
            except InputError as error:
                unread.append(f"{place.box}: {error}")
            else:
                if difference is not None:
                    findings.append(Finding(stage, None, place.box, str(difference)))
                elif fault := fault_of_kept(
                    examined.plan, place.box, read=examined.read, is_right=examined.is_right
                ):
                    findings.append(fault)
            task.advance(1, voxels=place.box.n_voxels)
    for finding in findings:
        assert finding.region is not None
        examined.blame(finding.stage, touching(examined.grids[finding.stage], finding.region))
    return Check(
        "seams",
        len(places) - len(unread),
        tuple(findings),
        not_done=_several(unread),
        remark=_kinds_of(places),
    )


def _in_threads(
    function: Callable[[Item], Found], items: Iterable[Item]
) -> Iterator[tuple[Item, Found]]:
    """Each item with what the function gives for it, in order; few are under way at a time."""
    n_threads = min(MOST_THREADS, available_cpus())
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[tuple[Item, Future[Found]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > n_threads:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _left_out(n_wanted: int) -> str:
    return "" if n_wanted else "left out, as asked"


def _several(reasons: list[str]) -> str:
    more = f" and {len(reasons) - 1} more places" if len(reasons) > 1 else ""
    return reasons[0] + more if reasons else ""


def _kinds_of(places: list[Place]) -> str:
    """What was looked at: faces, edges and corners, or places inside the only block."""
    names = ("inside a block", "across faces", "across edges", "across corners")
    counts = [sum(place.n_axes == k for place in places) for k in range(len(names))]
    kinds = [f"{n} {name}" for n, name in zip(counts, names, strict=True) if n]
    return ", ".join(kinds) or "no block holds anything"
