"""What a segmentation leaves on disk: made, found again, removed.

    OUT/            group: multiscales, and `bigseg` (the fingerprint of the plan that made it)
      0  1  2 ...   the voxels
      ledger/       what is finished
      scratch/      what instances need until they are finished
      probabilities/, objects.parquet       of instances: where they are kept; the table

It is in the list of labels only while it is finished.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bigseg import layout, store
from bigseg.errors import ConfigError, InputError, OutputError, UsageError
from bigseg.ledger import Ledger
from bigseg.plan import NUMBER, PREDICT, Plan, output_spec, stage_grids
from bigseg.scratch import (
    create_scratch,
    has_scratch,
    predicted_url,
    remove_scratch,
)
from bigseg.settings import parse_settings
from bigseg.table import objects_url
from bigseg.volume import create_pyramid, open_volume, unlist_label

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bigseg.volume import Volume


def ledger_url(output_url: str) -> str:
    """Where the ledger of a result lies."""
    return store.join(output_url, "ledger")


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
    if begun.output.kind != plan.output.kind:
        raise UsageError(
            f"{url} holds {begun.output.kind}, and {plan.output.kind} are asked for: add --output "
            f"{begun.output.kind}, choose another --name or --out, or start anew with --overwrite"
        )
    if differences := begun.differences(plan):
        raise UsageError(
            f"{url} was made with other settings ({'; '.join(differences[:4])}): repeat those, "
            "choose another --name or --out, or start anew with --overwrite"
        )


def create_result(plan: Plan, guard: Callable[[], None]) -> Ledger:
    """An empty result for the plan, unlisted, and its ledger.

    Raises:
        OutputError: there is something else, or the place cannot be written.
    """
    source = open_volume(plan.source.url, level=plan.source.level)
    url = plan.output.url
    guard()
    if is_begun := _is_begun(plan):
        if plan.output.beside:
            unlist_label(source.url, plan.output.name)
    elif plan.instances is None:
        create_pyramid(source, url, output_spec(plan), name=plan.output.name)
    else:
        layout.begin_image(url, like=source.multiscale, spec=output_spec(plan, "uint64"))
    if plan.instances is not None:
        create_scratch(plan)
    n_blocks = {stage: len(grid) for stage, grid in stage_grids(plan).items()}
    ledger = Ledger.create(ledger_url(url), plan.model_dump(mode="json"), n_blocks, guard=guard)
    ledger.is_new = not is_begun
    return ledger


def remove_result(url: str, *, image: str | None, guard: Callable[[], None]) -> None:
    """Unlist and delete a result, if a segmentation by bigseg made it; nothing is fine.

    `image` is the image that lists it, if any. Its list entry and its ledger go first: what a
    removal that is cut short leaves is neither listed nor taken for finished, and can be removed by
    the next.

    Raises:
        OutputError: something else made it, or it cannot be deleted.
    """
    if not store.exists(url) or store.is_empty(url):
        return
    if not is_made_by_segment(url):
        raise OutputError(
            f"{url} was not made by bigseg segment, so --overwrite does not delete it: delete it "
            "yourself or choose another --name or --out"
        )
    guard()
    if image is not None:
        unlist_label(image, store.name_of(url))
    ledger = Ledger.open(ledger_url(url), guard=guard)
    if ledger is not None:
        ledger.discard()
    store.remove(url)


def is_made_by_segment(url: str) -> bool:
    """Whether a segmentation by bigseg made what is at `url`."""
    try:
        # Of the group alone: its arrays can be gone already.
        provenance = store.open_group(url, mode="r").attrs.get(layout.PROVENANCE)
    except InputError:
        return False
    return isinstance(provenance, dict) and "fingerprint" in provenance


def erase_condemned(plan: Plan, ledger: Ledger) -> None:
    """Erase what lies in condemned blocks, so that what was taken back can be made again.

    Zarr reads a shard before it writes it, also to write all of it (3.1.6), so that one that cannot
    be read would never be written again; and blocks that are empty are not written. Whoever goes on
    with a result does this first: the `verify` that took them back may have been cut off.

    Raises:
        OutputError: it cannot be written.
    """
    for stage, blocks in ledger.condemned.items():
        level = _level_of(plan, ledger, stage)
        if level is None:
            continue
        grid = stage_grids(plan)[stage]
        for block in blocks:
            ledger.check()
            core = grid[block].core
            # Objects that would hold nothing but zeros are deleted.
            level.write(core, np.zeros((level.n_channels, *core.shape), level.dtype))
    ledger.settle()


def _level_of(plan: Plan, ledger: Ledger, stage: str) -> Volume | None:
    """What a stage writes, None where that is to be made anew, empty, before the stage."""
    if plan.instances is not None:
        if stage == PREDICT:
            return open_volume(predicted_url(plan)) if has_probabilities(plan) else None
        if not ledger.n_done(NUMBER):
            return None
    level = 0 if stage == plan.finest_stage else int(stage.removeprefix("pyramid-"))
    return open_volume(plan.output.url, level=level)


def restore_scratch(plan: Plan, ledger: Ledger) -> None:
    """Let everything that needs scratch space be done again, where that is gone.

    It goes when a result is finished; `verify` can take blocks back after that. The pyramid is done
    again too, because numbering makes all arrays anew.
    """
    stages = ledger.stages
    if plan.instances is None or has_scratch(plan):
        return
    if all(ledger.n_done(s) == n for s, n in stages.items() if not s.startswith("pyramid-")):
        return
    if has_probabilities(plan):
        del stages[PREDICT]
    # First: empty arrays beside these marks would pass for what finished blocks wrote.
    for stage, n_blocks in stages.items():
        ledger.unmark(stage, range(n_blocks))
    remove_scratch(plan.output.url)
    create_scratch(plan)


def needs_network(plan: Plan, taken_back: Iterable[str]) -> bool:
    """Whether making blocks of these stages again takes the network, over the whole volume.

    It does for objects where all that they were made from is gone; see `restore_scratch`.
    """
    if plan.instances is None or has_scratch(plan) or has_probabilities(plan):
        return False
    return any(not stage.startswith("pyramid-") for stage in taken_back)


def has_probabilities(plan: Plan) -> bool:
    """Whether there is what objects can be made again from, whole or not."""
    return plan.keeps_probabilities and store.exists(predicted_url(plan))


def change_rule(plan: Plan, changed: Plan, ledger: Ledger, guard: Callable[[], None]) -> None:
    """Let all stages after `predict` be done again as another plan says.

    What the network said must have been kept. Cut short, the result is an unfinished one of the
    first plan.

    Raises:
        OutputError: the result cannot be written.
    """
    guard()
    if plan.output.beside:
        unlist_label(plan.source.url, plan.output.name)
    for stage, n_blocks in ledger.stages.items():
        if stage != PREDICT:
            ledger.unmark(stage, range(n_blocks))
    url = plan.output.url
    remove_scratch(url)
    layout.take_back_image(url, output_spec(changed, "uint64"))
    store.remove_file(objects_url(url))
    create_scratch(changed)
    n_blocks_of = {stage: len(grid) for stage, grid in stage_grids(changed).items()}
    ledger.replan(changed.model_dump(mode="json"), n_blocks_of)


def _is_begun(plan: Plan) -> bool:
    """Whether the output of this very plan is there: created by a run killed before its ledger."""
    url = plan.output.url
    if not store.exists(url):
        return False
    try:
        if plan.instances is None:
            # Published: one that was cut short before is made anew.
            open_volume(url)
        provenance = store.open_group(url, mode="r").attrs.get(layout.PROVENANCE)
    except InputError:
        return False
    return isinstance(provenance, dict) and provenance.get("fingerprint") == plan.fingerprint
