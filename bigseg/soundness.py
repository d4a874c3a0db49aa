"""Whether the metadata of a result are those that its plan asks for; no voxel is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import layout, store
from bigseg.errors import InputError
from bigseg.findings import Check, Finding
from bigseg.plan import OBJECTS, smallest_type, stage_grids
from bigseg.table import objects_url
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bigseg.ledger import Ledger
    from bigseg.plan import Plan
    from bigseg.volume import Volume


LIST = "list"
# The stages of findings about what lies beside the voxels, which do not hinder the other checks.
BESIDE = (LIST, OBJECTS)


def check_metadata(plan: Plan, ledger: Ledger, *, image: str | None) -> Check:
    """Compare what lies at the plan's output with the plan and the ledger.

    `image` is the image beside which the labels lie, if any. The plan may have been moved: its
    output is where the result lies now.
    """
    try:
        finest = open_volume(plan.output.url)
    except InputError as error:
        return Check("metadata", 0, (_fault(str(error)),))
    findings = [*_image_faults(plan, ledger, finest), *_list_faults(plan, ledger, image)]
    findings += _table_faults(plan, ledger)
    source = _source_of(plan, image)
    for level in range(finest.n_levels):
        try:
            findings += _level_faults(plan, finest.at(level), source, ledger)
        except InputError as error:
            findings.append(_fault(str(error)))
    if not findings:
        n_blocks = {stage: len(grid) for stage, grid in stage_grids(plan).items()}
        findings += _ledger_faults(ledger.stages, n_blocks)
    return Check("metadata", finest.n_levels, tuple(findings))


def _fault(reason: str) -> Finding:
    return Finding("", None, None, reason)


def _image_faults(plan: Plan, ledger: Ledger, finest: Volume) -> Iterator[Finding]:
    fingerprint = (finest.provenance or {}).get("fingerprint")
    # Of the plan as it was stored: one that has moved has another.
    stored = type(plan).model_validate(ledger.plan).fingerprint
    if fingerprint != stored:
        yield _fault(
            f"its fingerprint is {str(fingerprint)[:12]}, that of the plan in its ledger "
            f"{stored[:12]}"
        )
    if finest.multiscale.is_label != (plan.output.kind != "probabilities"):
        kind = "a label image" if finest.multiscale.is_label else "no label image"
        yield _fault(f"it is {kind}, and the plan asks for {plan.output.kind}")
    n_levels = 1 + sum(stage.startswith("pyramid-") for stage in ledger.stages)
    if finest.n_levels != n_levels:
        yield _fault(f"it lists {finest.n_levels} levels, its ledger has {n_levels}")


def _list_faults(plan: Plan, ledger: Ledger, image: str | None) -> Iterator[Finding]:
    if image is None or not plan.output.beside:
        return
    name = store.name_of(plan.output.url)
    is_listed = name in layout.listed_labels(image)
    if is_listed and not ledger.is_finished:
        yield Finding(LIST, None, None, f"{image} lists {name}, which is not finished")
    if ledger.is_finished and not is_listed:
        yield Finding(LIST, None, None, f"{image} does not list {name}, which is finished")


def _table_faults(plan: Plan, ledger: Ledger) -> Iterator[Finding]:
    if plan.instances is not None and ledger.n_done(OBJECTS):
        url = objects_url(plan.output.url)
        if not store.exists(url):
            yield Finding(OBJECTS, None, None, f"the table of objects, {url}, is gone")


def _source_of(plan: Plan, image: str | None) -> Volume | None:
    """The volume that was segmented, None where it is gone: the rest can be checked without."""
    try:
        return open_volume(image or plan.source.url, level=plan.source.level)
    except InputError:
        return None


def _type(plan: Plan, volume: Volume, ledger: Ledger) -> Any:  # noqa: ANN401 - or words for it
    """The type that a level must have; of instances the one for their number when finished."""
    if plan.instances is None:
        return np.dtype(plan.output.dtype)
    # What an unfinished result notes can be of objects by another rule.
    n_objects = ledger.record.get("objects") if ledger.is_finished else None
    if n_objects is not None:
        return smallest_type(n_objects)
    return volume.dtype if volume.dtype.kind == "u" else "an unsigned integer"


def _level_faults(
    plan: Plan, volume: Volume, source: Volume | None, ledger: Ledger
) -> Iterator[Finding]:
    wanted = {
        "type": _type(plan, volume, ledger),
        "number of channels": max(1, len(plan.output.channel_names)),
        "chunk": tuple(map(min, plan.output.chunk, volume.shape)),
        "write unit": _write_unit(plan, volume),
        "fill value": 0,
    }
    found = {
        "type": volume.dtype,
        "number of channels": volume.n_channels,
        "chunk": volume.chunk_shape,
        "write unit": volume.write_unit,
        "fill value": volume.array.fill_value,
    }
    if volume.level == 0:
        wanted["shape"], found["shape"] = plan.source.shape, volume.shape
    if source is not None and source.level + volume.level < source.n_levels:
        like = source.at(source.level + volume.level)
        wanted |= {"shape": like.shape, "scale": like.scale}
        found |= {"shape": volume.shape, "scale": volume.scale}
    for what, value in wanted.items():
        if found[what] != value:
            yield _fault(
                f"the {what} of level {volume.level} is {found[what]}, the plan asks for {value}"
            )


def _write_unit(plan: Plan, volume: Volume) -> tuple[int, ...]:
    """The shard that a level gets, else its chunk, as they are created."""
    has_shards = volume.multiscale.version != "0.4"
    shard = plan.output.shard if has_shards else None
    chunk, shard = layout.units_of(plan.output.chunk, shard, volume.shape)
    return shard or chunk


def _ledger_faults(stages: Mapping[str, int], n_blocks: Mapping[str, int]) -> Iterator[Finding]:
    if dict(stages) != dict(n_blocks):
        yield _fault(f"the ledger counts {dict(stages)} blocks, the plan {dict(n_blocks)}")
