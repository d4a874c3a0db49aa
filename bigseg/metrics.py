"""Scores from counts that add up over blocks, slices and ranks.

Everything is computed from one table: how many voxels carry id p in the prediction and id t in
the truth. Tables of disjoint voxels add up to the table of all of them, so a score of a volume
needs no more memory than its pairs of ids, and comes out the same however it was cut.

    prediction  1 1 1 2      pairs (1, 5): 2
    truth       5 5 6 6            (1, 6): 1
                                   (2, 6): 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

AP_TWENTIETHS = tuple(range(10, 20))
"""The IoU thresholds of the average precision, 0.5 to 0.95, in twentieths."""


@dataclass(frozen=True, eq=False)
class Contingency:
    """Voxel counts of the pairs (pred id, truth id) that occur, sorted by pred, then truth.

    `pred` and `truth` are uint64, `count` is int64 and positive. Id 0 is background.
    """

    pred: NDArray[np.uint64]
    truth: NDArray[np.uint64]
    count: NDArray[np.int64]

    @classmethod
    def empty(cls) -> Contingency:
        """The table of no voxels: what sums start from."""
        ids = np.zeros(0, np.uint64)
        return cls(ids, ids, np.zeros(0, np.int64))

    @classmethod
    def of(
        cls, pred: NDArray[Any], truth: NDArray[Any], *, ignore_truth: int | None = None
    ) -> Contingency:
        """The table of two arrays of ids, without the voxels whose truth is `ignore_truth`.

        Raises:
            InputError: shapes differ, ids are no integers, or one that counts is negative.
        """
        if pred.shape != truth.shape:
            raise InputError(
                f"the prediction has shape {pred.shape}, the truth {truth.shape}: they must be the "
                "same voxels; give the same region of both"
            )
        _check_integers(pred, truth)
        if ignore_truth is not None:
            counts = truth != ignore_truth
            pred, truth = pred[counts], truth[counts]
        # Runs of equal pairs are counted first: label images have few, and only they are sorted.
        pred, truth = pred.ravel(), truth.ravel()
        if not len(pred):
            return cls.empty()
        changes = np.flatnonzero((pred[1:] != pred[:-1]) | (truth[1:] != truth[:-1])) + 1
        starts = np.concatenate([[0], changes])
        lengths = np.diff(starts, append=len(pred))
        pred, truth = pred[starts], truth[starts]
        _check_not_negative(pred, truth)
        return _sorted_table(pred.astype(np.uint64), truth.astype(np.uint64), lengths)

    @classmethod
    def merged(cls, tables: Iterable[Contingency]) -> Contingency:
        """The sum of many tables, such as those of all blocks of a volume, read one by one.

        Tables of like size are added first, so that n tables cost n log n and not n².
        """
        stack: list[Contingency] = []
        for table in tables:
            stack.append(table)
            while len(stack) > 1 and len(stack[-2]) <= 2 * len(stack[-1]):
                last = stack.pop()
                stack.append(stack.pop() + last)
        return sum(reversed(stack), cls.empty())

    @classmethod
    def from_dense(cls, counts: NDArray[Any]) -> Contingency:
        """The table of a dense matrix (pred class, truth class) of counts."""
        pred, truth = np.nonzero(counts)
        count = counts[pred, truth].astype(np.int64)
        return cls(pred.astype(np.uint64), truth.astype(np.uint64), count)

    def dense(self, n_classes: int) -> NDArray[np.int64]:
        """(pred class, truth class) int64 counts: small, of fixed shape, to be summed over ranks.

        Raises:
            InputError: an id is n_classes or larger.
        """
        largest = max(self.pred.max(initial=0), self.truth.max(initial=0))
        if len(self) and largest >= n_classes:
            raise InputError(
                f"id {largest} does not fit a table of {n_classes} classes: give the number of "
                "classes of the labels"
            )
        counts = np.zeros((n_classes, n_classes), np.int64)
        counts[self.pred.astype(np.intp), self.truth.astype(np.intp)] = self.count
        return counts

    def __add__(self, other: Contingency) -> Contingency:
        return _sorted_table(
            np.concatenate([self.pred, other.pred]),
            np.concatenate([self.truth, other.truth]),
            np.concatenate([self.count, other.count]),
        )

    def __len__(self) -> int:
        return len(self.count)

    @property
    def n_voxels(self) -> int:
        """Number of voxels counted."""
        return int(self.count.sum())

    def foreground(self) -> Contingency:
        """The part where the truth is not 0."""
        keep = self.truth != 0
        return Contingency(self.pred[keep], self.truth[keep], self.count[keep])


def disjoint_union(tables: Sequence[Contingency]) -> Contingency:
    """One table in which equal ids of different tables are different objects; 0 stays 0.

    For time points or planes whose objects are numbered each by themselves.
    """
    n_pred = n_truth = 0
    parts = []
    for table in tables:
        pred, n_pred = _renumbered(table.pred, n_pred)
        truth, n_truth = _renumbered(table.truth, n_truth)
        parts.append((pred, truth, table.count))
    if not parts:
        return Contingency.empty()
    return _sorted_table(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class RandScore:
    """Adapted Rand error and the two parts of its harmonic mean, all from 0 to 1."""

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
    if not len(table):
        return RandScore(math.nan, math.nan, math.nan)
    both = _n_pairs(table.count)
    found = _n_pairs(_totals(table.pred, table.count)[1])
    true = _n_pairs(_totals(table.truth, table.count)[1])
    f_score = _ratio(2 * both, found + true, empty=1.0)
    return RandScore(1 - f_score, _ratio(both, found, empty=1.0), _ratio(both, true, empty=1.0))


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
    of_pred = _entropy(_totals(table.pred, table.count)[1])
    of_truth = _entropy(_totals(table.truth, table.count)[1])
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
    n_pred = dict(zip(*_as_ints(*_totals(table.pred, table.count)), strict=True))
    n_truth = dict(zip(*_as_ints(*_totals(table.truth, table.count)), strict=True))
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

    An object is met when its IoU with one of the other side is above the threshold; from 0.5 on
    that can be only one, so there is nothing to assign (as in the Data Science Bowl 2018).
    Thresholds are compared in integers, so rounding decides nothing. NaN without any object.
    """
    n_both, union = _object_pairs(table)
    n_pred, n_truth = n_objects(table)
    scores = {}
    for twentieths in AP_TWENTIETHS:
        n_met = int(np.count_nonzero(20 * n_both > twentieths * union))
        n_all = n_pred + n_truth - n_met
        scores[twentieths / 20] = _ratio(n_met, n_all, empty=math.nan)
    return scores


def seg_score(table: Contingency) -> float:
    """SEG of the Cell Tracking Challenge: the mean IoU of the true objects with their match.

    The match of a true object covers more than half of it; without one its IoU counts as 0
    (Maska et al. 2014). NaN without true objects.
    """
    objects = table.foreground()
    ids, sizes = _totals(objects.truth, objects.count)
    if not len(ids):
        return math.nan
    sizes = sizes[np.searchsorted(ids, objects.truth)]
    pred_ids, pred_sizes = _totals(table.pred, table.count)
    union = sizes + pred_sizes[np.searchsorted(pred_ids, objects.pred)] - objects.count
    matched = (objects.pred != 0) & (2 * objects.count > sizes)
    return float((objects.count[matched] / union[matched]).sum() / len(ids))


def n_objects(table: Contingency) -> tuple[int, int]:
    """The number of ids other than 0 in the prediction and in the truth."""
    n_pred, n_truth = (np.count_nonzero(np.unique(ids)) for ids in (table.pred, table.truth))
    return int(n_pred), int(n_truth)


def _object_pairs(table: Contingency) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Intersections and unions of the pairs of objects that overlap."""
    pred_ids, pred_sizes = _totals(table.pred, table.count)
    truth_ids, truth_sizes = _totals(table.truth, table.count)
    keep = (table.pred != 0) & (table.truth != 0)
    n_both = table.count[keep]
    n_pred = pred_sizes[np.searchsorted(pred_ids, table.pred[keep])]
    n_truth = truth_sizes[np.searchsorted(truth_ids, table.truth[keep])]
    return n_both, n_pred + n_truth - n_both


def _sorted_table(
    pred: NDArray[np.uint64], truth: NDArray[np.uint64], count: NDArray[np.int64]
) -> Contingency:
    """The table of pairs that may repeat, in any order."""
    if not len(count):
        return Contingency.empty()
    if max(pred.max(), truth.max()) < 2**32:  # one sort of packed keys is 2.5 times as fast
        order = np.argsort(pred << np.uint64(32) | truth)
    else:
        order = np.lexsort((truth, pred))
    pred, truth, count = pred[order], truth[order], count[order]
    new = np.concatenate([[True], (pred[1:] != pred[:-1]) | (truth[1:] != truth[:-1])])
    starts = np.flatnonzero(new)
    return Contingency(pred[starts], truth[starts], np.add.reduceat(count, starts))


def _totals(
    ids: NDArray[np.uint64], count: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sorted distinct ids and the sum of `count` for each."""
    if not len(ids):
        return ids, count
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    return ids[starts], np.add.reduceat(count[order], starts)


def _renumbered(ids: NDArray[np.uint64], offset: int) -> tuple[NDArray[np.uint64], int]:
    distinct = np.unique(ids[ids != 0])
    numbers = np.searchsorted(distinct, ids).astype(np.uint64) + np.uint64(offset + 1)
    numbers[ids == 0] = 0
    return numbers, offset + len(distinct)


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


def _check_integers(*arrays: NDArray[Any]) -> None:
    for ids in arrays:
        if ids.dtype.kind not in "biu":
            raise InputError(
                f"ids of type {ids.dtype} cannot be counted, they must be integers: give labels, "
                "or the class with the largest probability"
            )


def _check_not_negative(pred: NDArray[Any], truth: NDArray[Any]) -> None:
    for name, ids in (("prediction", pred), ("truth", truth)):
        if ids.dtype.kind == "i" and ids.min() < 0:
            raise InputError(
                f"the {name} holds the id {ids.min()}, but ids are at least 0: set `ignore` to the "
                "value that means nothing"
            )
