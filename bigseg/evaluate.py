"""Prediction against truth, block by block; used for validation in training too.

It reads label volumes and knows no networks. The scores are sums over blocks (metrics.py), so the
blocks decide how much is in memory and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import BlockGrid, Region, parse_region
from bigseg.errors import InputError
from bigseg.metrics import (
    Contingency,
    Overlap,
    PanopticQuality,
    RandScore,
    VariationOfInformation,
    adapted_rand_error,
    average_precision,
    class_overlaps,
    disjoint_union,
    foreground_overlap,
    n_objects,
    panoptic_quality,
    pixel_accuracy,
    seg_score,
    variation_of_information,
)
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bigseg.blocks import Vec
    from bigseg.volume import Volume

__all__ = ["Contingency", "Scores", "evaluate", "evaluate_urls", "scores"]

MAX_BLOCK_VOXELS = 2**24
MAX_CLASSES = 256
MAX_ROWS = 16


@dataclass(frozen=True)
class Scores:
    """All scores of one comparison; NaN where there was nothing to judge.

    Ids as objects: `rand` and `voi` over the voxels whose truth is not 0, `average_precision` by
    IoU threshold, `panoptic`, `seg`. Ids as classes: `classes` and `pixel_accuracy`, None where
    there are too many ids for classes. `foreground` is everything that is not 0 and fits both.
    """

    n_voxels: int
    n_pred_objects: int
    n_truth_objects: int
    foreground: Overlap
    rand: RandScore
    voi: VariationOfInformation
    average_precision: dict[float, float]
    panoptic: PanopticQuality
    seg: float
    pixel_accuracy: float | None
    classes: dict[int, Overlap] | None

    @property
    def mean_average_precision(self) -> float:
        """The mean over the IoU thresholds 0.5 to 0.95."""
        return _mean(self.average_precision.values())

    @property
    def mean_dice(self) -> float:
        """The mean Dice of the classes that the truth has; NaN where ids are no classes."""
        return _mean(c.dice for c in (self.classes or {}).values() if c.n_truth)

    @property
    def mean_iou(self) -> float:
        """The mean IoU of the classes that the truth has; NaN where ids are no classes."""
        return _mean(c.iou for c in (self.classes or {}).values() if c.n_truth)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, with None for NaN."""
        found: dict[str, Any] = {
            "n_voxels": self.n_voxels,
            "n_pred_objects": self.n_pred_objects,
            "n_truth_objects": self.n_truth_objects,
            "foreground": _overlap_dict(self.foreground),
            "adapted_rand_error": asdict(self.rand),
            "variation_of_information": {**asdict(self.voi), "total": self.voi.total},
            "average_precision": {f"{t:.2f}": v for t, v in self.average_precision.items()},
            "mean_average_precision": self.mean_average_precision,
            "panoptic_quality": {"pq": self.panoptic.pq, **asdict(self.panoptic)},
            "seg": self.seg,
        }
        if self.classes is not None:
            found["pixel_accuracy"] = self.pixel_accuracy
            found["mean_dice"], found["mean_iou"] = self.mean_dice, self.mean_iou
            found["classes"] = {str(i): _overlap_dict(c) for i, c in self.classes.items()}
        return _without_nan(found)

    def as_text(self) -> str:
        """The scores as a page to read."""
        precision = self.average_precision
        lines = [
            f"voxels                  {self.n_voxels:,}",
            f"foreground Dice, IoU    {self.foreground.dice:.4f}, {self.foreground.iou:.4f}",
            "ids as objects (Rand and VOI where the truth is not 0)",
            f"  predicted, true       {self.n_pred_objects:,}, {self.n_truth_objects:,}",
            f"  adapted Rand error    {self.rand.error:.4f}"
            f" (precision {self.rand.precision:.4f}, recall {self.rand.recall:.4f})",
            f"  VOI split, merge      {self.voi.split:.4f}, {self.voi.merge:.4f}",
            f"  AP at IoU 0.5, 0.75   {precision[0.5]:.4f}, {precision[0.75]:.4f}"
            f" (mean of 0.5 to 0.95: {self.mean_average_precision:.4f})",
            f"  PQ                    {self.panoptic.pq:.4f}"
            f" (SQ {self.panoptic.sq:.4f}, RQ {self.panoptic.rq:.4f})",
            f"  SEG                   {self.seg:.4f}",
        ]
        return "\n".join([*lines, *self._class_lines()])

    def _class_lines(self) -> list[str]:
        if self.classes is None or self.pixel_accuracy is None:
            return []
        rows = [
            f"  class {i:<16}{c.dice:.4f}, {c.iou:.4f} (Dice, IoU)" for i, c in self.classes.items()
        ]
        if len(rows) > MAX_ROWS:
            rows = [*rows[:MAX_ROWS], f"  and {len(rows) - MAX_ROWS} more"]
        return [
            "ids as classes",
            f"  pixel accuracy        {self.pixel_accuracy:.4f}",
            f"  mean Dice, IoU        {self.mean_dice:.4f}, {self.mean_iou:.4f}",
            *rows,
        ]


def evaluate(
    pred: Volume, truth: Volume, *, region: Region | None = None, ignore: int | None = None
) -> Scores:
    """The scores of the labels `pred` against the labels `truth`.

    Time points are judged each by itself: an id in two of them is two objects. Along z an id is
    one object.

    Args:
        pred: a label volume.
        truth: another of the same shape.
        region: what to compare, (t, z, y, x); None: all.
        ignore: truth value of voxels that were not annotated and count nowhere.

    Raises:
        InputError: shapes differ, one of them holds no labels, or negative ids.
    """
    for volume in (pred, truth):
        _check_labels(volume)
    if pred.shape != truth.shape:
        raise InputError(
            f"{pred.url} has shape {pred.shape} (t, z, y, x), {truth.url} has {truth.shape}: they "
            "must be the same voxels; choose the level of the same size"
        )
    region = region or Region.of_shape(truth.shape)
    frames = [_frame(region, t) for t in range(region.start[0], region.stop[0])]
    return scores([_table(pred, truth, frame, ignore) for frame in frames])


def evaluate_urls(
    pred: str, truth: str, *, region: str | None = None, ignore: int | None = None
) -> Scores:
    """The scores of the labels at `pred` against those at `truth`, both at level 0.

    `region` is written z0:z1,y0:y1,x0:x1 (y0:y1,x0:x1 for planes) and holds for all time points.

    Raises:
        UsageError: the region is malformed, empty, or outside.
        InputError: as `evaluate`, or there is no such image.
    """
    pred_volume, truth_volume = open_volume(pred), open_volume(truth)
    part = None if region is None else _spatial_region(truth_volume, region)
    return evaluate(pred_volume, truth_volume, region=part, ignore=ignore)


def _spatial_region(volume: Volume, text: str) -> Region:
    n_spatial = len(volume.spatial_axes)
    spatial = parse_region(text, volume.shape[-n_spatial:])
    rest = volume.shape[:-n_spatial]
    return Region((0,) * len(rest) + spatial.start, rest + spatial.stop)


def scores(tables: Sequence[Contingency]) -> Scores:
    """The scores of voxels counted before, one table for each time point or separate image."""
    classes = Contingency.merged(tables)
    objects = classes if len(tables) == 1 else disjoint_union(tables)
    n_pred, n_truth = n_objects(objects)
    overlaps = class_overlaps(classes) if _are_classes(classes) else None
    return Scores(
        n_voxels=classes.n_voxels,
        n_pred_objects=n_pred,
        n_truth_objects=n_truth,
        foreground=foreground_overlap(classes),
        rand=adapted_rand_error(objects),
        voi=variation_of_information(objects.foreground()),
        average_precision=average_precision(objects),
        panoptic=panoptic_quality(objects),
        seg=seg_score(objects),
        pixel_accuracy=None if overlaps is None else pixel_accuracy(classes),
        classes=overlaps,
    )


def _are_classes(table: Contingency) -> bool:
    return len(np.union1d(table.pred, table.truth)) <= MAX_CLASSES


def _table(pred: Volume, truth: Volume, frame: Region, ignore: int | None) -> Contingency:
    grid = BlockGrid(frame, _block_shape(truth.chunk_shape, truth.shape, limit=MAX_BLOCK_VOXELS))
    return Contingency.merged(
        Contingency.of(pred.read(b.core), truth.read(b.core), ignore_truth=ignore) for b in grid
    )


def _frame(region: Region, t: int) -> Region:
    return Region((t, *region.start[1:]), (t + 1, *region.stop[1:]))


def _block_shape(chunk: Vec, shape: Vec, *, limit: int) -> Vec:
    """One time point of whole chunks of at most `limit` voxels, or a part of one larger chunk."""
    block = [1, *(min(c, n) for c, n in zip(chunk[1:], shape[1:], strict=True))]
    while math.prod(block) > limit:
        longest = block.index(max(block))
        block[longest] = -(-block[longest] // 2)
    for axis in (3, 2, 1):
        n_more = limit // math.prod(block)
        n_chunks = -(-shape[axis] // block[axis])
        block[axis] *= max(1, min(n_more, n_chunks))
    return tuple(block)


def _check_labels(volume: Volume) -> None:
    if volume.n_channels > 1:
        raise InputError(
            f"{volume.url} has {volume.n_channels} channels, which are intensities or "
            "probabilities, but labels are compared: give a label image (IMAGE/labels/NAME)"
        )
    if volume.dtype.kind not in "biu":
        raise InputError(
            f"{volume.url} has values of type {volume.dtype}, but labels are integers: give a "
            "label image (IMAGE/labels/NAME)"
        )


def _overlap_dict(overlap: Overlap) -> dict[str, Any]:
    return {**asdict(overlap), "dice": overlap.dice, "iou": overlap.iou}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nan(value)
        if isinstance(value, dict)
        else (None if isinstance(value, float) and math.isnan(value) else value)
        for key, value in values.items()
    }
