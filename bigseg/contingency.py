"""How many voxels carry id p in the prediction and id t in the truth: a table that adds up.

    prediction  1 1 1 2      pairs (1, 5): 2
    truth       5 5 6 6            (1, 6): 1
                                   (2, 6): 1

Tables of disjoint voxels add up to the table of all of them, so what is computed from one needs no
more memory than its pairs of ids, and comes out the same however a volume was cut.
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


PLACES_EACH = 8
"""Where ids give at most so many possible pairs for each one to count, none are sorted."""


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

    def pred_sizes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The ids of the prediction, sorted, and the voxels of each."""
        return _totals(self.pred, self.count)

    def truth_sizes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The ids of the truth, sorted, and the voxels of each."""
        return _totals(self.truth, self.count)

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


def _sorted_table(
    pred: NDArray[np.uint64], truth: NDArray[np.uint64], count: NDArray[np.int64]
) -> Contingency:
    """The table of pairs that may repeat, in any order."""
    if not len(count):
        return Contingency.empty()
    shape = int(pred.max()) + 1, int(truth.max()) + 1
    if math.prod(shape) <= PLACES_EACH * len(count):
        counts = np.zeros(shape, np.int64)
        np.add.at(counts.ravel(), (pred * np.uint64(shape[1]) + truth).astype(np.intp), count)
        return Contingency.from_dense(counts)
    if max(shape) <= 2**32:  # one sort of packed keys is 2.5 times as fast
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
