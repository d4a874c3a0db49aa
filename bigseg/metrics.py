"""Scores from counts that add up over blocks, slices and ranks.

Everything is computed from one table: how many voxels carry id p in the prediction and id t in
the truth (contingency.py). So a score of a volume comes out the same however it was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bigseg.contingency import Contingency, disjoint_union

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "AP_TWENTIETHS",
    "Contingency",
    "Overlap",
    "PanopticQuality",
    "RandScore",
    "VariationOfInformation",
    "adapted_rand_error",
    "average_precision",
    "class_overlaps",
    "disjoint_union",
    "foreground_overlap",
    "met_objects",
    "n_objects",
    "panoptic_quality",
    "pixel_accuracy",
    "rand_error",
    "seg_score",
    "variation_of_information",
]

AP_TWENTIETHS = tuple(range(10, 20))
"""The IoU thresholds of the average precision, 0.5 to 0.95, in twentieths."""


@dataclass(frozen=True, slots=True)
class RandScore:
    """A Rand error and the two parts of its harmonic mean, all from 0 to 1."""

    error: float
    precision: float
    recall: float


def adapted_rand_error(table: Contingency) -> RandScore:
    """1 minus the F-score of pairs of voxels, where the truth is not 0 (SNEMI3D, ISBI 2012).

    Over the voxels whose truth is not 0: a pair counts as found when it has one id in the
    prediction, as true when it has one id in the truth (Arganda-Carreras et al. 2015, with pairs
    of distinct voxels). Prediction 0 is an object like any other. The error equals
    skimage.metrics.adapted_rand_error; precision is found and true over found, recall over true
    (skimage 0.26 returns the two the other way round). NaN where no truth is foreground.
    """
    table = table.foreground()
    return _rand_score(table) if len(table) else RandScore(math.nan, math.nan, math.nan)


def rand_error(table: Contingency) -> float:
    """1 minus the F-score of pairs of voxels, over all voxels, the background as one more object.

    The adapted Rand error looks only where the truth is an object, so that objects grow beyond it
    for nothing. Equals skimage.metrics.adapted_rand_error with no label ignored.
    """
    return _rand_score(table).error


@dataclass(frozen=True, slots=True)
class VariationOfInformation:
    """In bits: `split` grows with objects cut apart, `merge` with objects run together."""

    split: float
    merge: float

    @property
    def total(self) -> float:
        """The variation of information proper: the sum of both."""
        return self.split + self.merge


def variation_of_information(table: Contingency) -> VariationOfInformation:
    """Conditional entropies (Meila 2007): split = H(pred | truth), merge = H(truth | pred).

    Over all voxels of the table, id 0 as an object like any other; for the usual restriction to
    the truth's foreground give `table.foreground()`. NaN for no voxels.
    """
    if not len(table):
        return VariationOfInformation(math.nan, math.nan)
    joint = _entropy(table.count)
    of_pred = _entropy(table.pred_sizes()[1])
    of_truth = _entropy(table.truth_sizes()[1])
    return VariationOfInformation(max(0.0, joint - of_truth), max(0.0, joint - of_pred))


@dataclass(frozen=True, slots=True)
class Overlap:
    """How well one class is met: Dice and IoU from 0 to 1, NaN where neither side has it."""

    n_pred: int
    n_truth: int
    n_both: int

    @property
    def dice(self) -> float:
        """2 |P ∩ T| / (|P| + |T|)."""
        return _ratio(2 * self.n_both, self.n_pred + self.n_truth, empty=math.nan)

    @property
    def iou(self) -> float:
        """|P ∩ T| / |P ∪ T|."""
        return _ratio(self.n_both, self.n_pred + self.n_truth - self.n_both, empty=math.nan)


def class_overlaps(table: Contingency) -> dict[int, Overlap]:
    """The overlap of each id, taken as a class: the same number means the same on both sides."""
    n_pred = dict(zip(*_as_ints(*table.pred_sizes()), strict=True))
    n_truth = dict(zip(*_as_ints(*table.truth_sizes()), strict=True))
    equal = table.pred == table.truth
    n_both = dict(zip(*_as_ints(table.pred[equal], table.count[equal]), strict=True))
    return {
        i: Overlap(n_pred.get(i, 0), n_truth.get(i, 0), n_both.get(i, 0))
        for i in sorted(n_pred.keys() | n_truth.keys())
    }


def foreground_overlap(table: Contingency) -> Overlap:
    """The overlap of everything that is not 0, whatever the ids."""
    pred, truth = table.pred != 0, table.truth != 0
    return Overlap(
        int(table.count[pred].sum()),
        int(table.count[truth].sum()),
        int(table.count[pred & truth].sum()),
    )


def pixel_accuracy(table: Contingency) -> float:
    """The share of voxels with the same id on both sides; NaN for no voxels."""
    same = int(table.count[table.pred == table.truth].sum())
    return _ratio(same, table.n_voxels, empty=math.nan)


def average_precision(table: Contingency) -> dict[float, float]:
    """TP / (TP + FP + FN) of the objects at each IoU threshold, 0.5 to 0.95 in steps of 0.05.

    As StarDist counts: TP is the largest number of pairs, no object in two of them, whose IoU is at
    least the threshold. Thresholds are compared in integers, so rounding decides nothing. NaN
    without any object.
    """
    pairs = _object_pairs(table)
    n_pred, n_truth = n_objects(table)
    scores = {}
    for twentieths in AP_TWENTIETHS:
        n_met = pairs.n_matched(twentieths)
        n_all = n_pred + n_truth - n_met
        scores[twentieths / 20] = _ratio(n_met, n_all, empty=math.nan)
    return scores


@dataclass(frozen=True, slots=True)
class PanopticQuality:
    """How well objects are met (`sq`, the mean IoU of those that are), and how many (`rq`)."""

    sq: float
    rq: float

    @property
    def pq(self) -> float:
        """The panoptic quality proper: the product of both."""
        return self.sq * self.rq


def panoptic_quality(table: Contingency) -> PanopticQuality:
    """The quality of one class of objects (Kirillov et al. 2019).

    A pair is met when its IoU is above 0.5; rq = TP / (TP + FP / 2 + FN / 2). Without a pair both
    are 0, without any object NaN.
    """
    pairs = _object_pairs(table)
    n_all = sum(n_objects(table))
    if not n_all:
        return PanopticQuality(math.nan, math.nan)
    met = 2 * pairs.n_both > pairs.union
    n_met = int(np.count_nonzero(met))
    total = float((pairs.n_both[met] / pairs.union[met]).sum())
    return PanopticQuality(_ratio(total, n_met, empty=0.0), 2 * n_met / n_all)


def seg_score(table: Contingency) -> float:
    """SEG of the Cell Tracking Challenge: the mean IoU of the true objects with their match.

    The match of a true object covers more than half of it; without one its IoU counts as 0
    (Maska et al. 2014). NaN without true objects.
    """
    objects = table.foreground()
    ids, sizes = objects.truth_sizes()
    if not len(ids):
        return math.nan
    sizes = sizes[np.searchsorted(ids, objects.truth)]
    pred_ids, pred_sizes = table.pred_sizes()
    union = sizes + pred_sizes[np.searchsorted(pred_ids, objects.pred)] - objects.count
    matched = (objects.pred != 0) & (2 * objects.count > sizes)
    return float((objects.count[matched] / union[matched]).sum() / len(ids))


def met_objects(table: Contingency) -> NDArray[np.int64]:
    """The ids of the objects of the prediction whose IoU with a true one is above 0.5, sorted."""
    pairs = _object_pairs(table)
    return pairs.pred[2 * pairs.n_both > pairs.union].astype(np.int64)


def n_objects(table: Contingency) -> tuple[int, int]:
    """The number of ids other than 0 in the prediction and in the truth."""
    n_pred, n_truth = (np.count_nonzero(np.unique(ids)) for ids in (table.pred, table.truth))
    return int(n_pred), int(n_truth)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs of objects that overlap: their ids, intersections and unions in voxels."""

    pred: NDArray[np.uint64]
    truth: NDArray[np.uint64]
    n_both: NDArray[np.int64]
    union: NDArray[np.int64]

    def n_matched(self, twentieths: int) -> int:
        """The most pairs with an IoU of at least so many twentieths (10 or more), no object twice.

        With an IoU above one half, a pair is the only one of both its objects. At one half exactly
        an object can be in two pairs, with its two halves, which are in no other: ties form stars
        of e pairs, 1 or 2, of e + 1 objects, and one pair of each is matched.
        """
        above = 20 * self.n_both > twentieths * self.union
        ties = 20 * self.n_both == twentieths * self.union
        n_tied = len(np.unique(self.pred[ties])) + len(np.unique(self.truth[ties]))
        return int(np.count_nonzero(above)) + n_tied - int(np.count_nonzero(ties))


def _object_pairs(table: Contingency) -> _Pairs:
    pred_ids, pred_sizes = table.pred_sizes()
    truth_ids, truth_sizes = table.truth_sizes()
    keep = (table.pred != 0) & (table.truth != 0)
    pred, truth, n_both = table.pred[keep], table.truth[keep], table.count[keep]
    n_pred = pred_sizes[np.searchsorted(pred_ids, pred)]
    n_truth = truth_sizes[np.searchsorted(truth_ids, truth)]
    return _Pairs(pred, truth, n_both, n_pred + n_truth - n_both)


def _rand_score(table: Contingency) -> RandScore:
    both = _n_pairs(table.count)
    found = _n_pairs(table.pred_sizes()[1])
    true = _n_pairs(table.truth_sizes()[1])
    f_score = _ratio(2 * both, found + true, empty=1.0)
    return RandScore(1 - f_score, _ratio(both, found, empty=1.0), _ratio(both, true, empty=1.0))


def _n_pairs(sizes: NDArray[np.int64]) -> float:
    """Ordered pairs of distinct voxels within groups of these sizes: the sum of n (n - 1)."""
    n = sizes.astype(np.float64)  # n² does not fit 64-bit integers
    return float((n * (n - 1)).sum())


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _ratio(part: float, whole: float, *, empty: float) -> float:
    return part / whole if whole else empty


def _as_ints(ids: NDArray[np.uint64], count: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    return ids.tolist(), count.tolist()
