"""What is said of a segmentation when it has ended: how it went, and where its picture lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigseg.errors import IncompleteError
from bigseg.filling import SourceVolume
from bigseg.view import save_result_picture
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from bigseg.segment import SegmentResult
    from bigseg.view import Kind


_PICTURES: dict[str, Kind] = {
    "labels": "classes",
    "probabilities": "probability",
    "instances": "objects",
}


def remarks(result: SegmentResult) -> list[str]:
    """How it was done, in sentences."""
    plan = result.plan
    lines = []
    if result.n_done_before:
        lines.append(f"went on from {result.n_done_before} of {result.n_blocks} finished blocks")
    reason = f" ({plan.engine_reason})" if plan.engine_reason else ""
    lines.append(f"core {plan.core[1:]} voxels, tile {plan.tile[1:]}, {plan.engine}{reason}")
    if result.spent.wall_s:
        lines.append(f"engine {result.spent.as_text()}")
    if result.n_empty:
        lines.append(f"{result.n_empty} blocks are empty space and were skipped")
    if result.filled:
        lines.append(
            f"chunks of the image that cannot be decoded were read as the fill value, "
            f"{len(result.filled)} in all: {', '.join(result.filled[:5])}"
        )
    return lines


def conclusion(result: SegmentResult) -> list[str]:
    """Where the result lies, and a picture of it, which is made here.

    Raises:
        IncompleteError: blocks were set aside; says why.
    """
    plan = result.plan
    if not result.is_complete:
        reasons = "\n".join(f"  {report.error}" for report in result.failed[:20])
        raise IncompleteError(
            f"{len(result.failed)} of {result.n_blocks} blocks were set aside; the same command "
            f"tries them again:\n{reasons}"
        )
    source = open_volume(plan.source.url, level=plan.source.level)
    picture = save_result_picture(
        # Everything is done: a chunk of a coarser level, which nothing else reads, ends no run.
        SourceVolume.of(source, "fill"),
        open_volume(plan.output.url),
        plan.region,
        channel=plan.source.channels[0],
        kind=_PICTURES[plan.output.kind],
    )
    what = f"{result.n_blocks} blocks" if result.n_objects is None else _objects(result.n_objects)
    return [
        f"{plan.output.url}: {what} in {result.seconds:.1f} s",
        f"{picture}: a middle plane, raw | result | overlay",
    ]


def _objects(n: int) -> str:
    return f"{n} object" if n == 1 else f"{n} objects"
