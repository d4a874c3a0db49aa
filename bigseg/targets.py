"""From annotations to what the network learns: classes, or background, inside and border.

It knows label arrays and no volumes. Touching objects are separated as in the U-Net paper
(Ronneberger et al. 2015): the network learns a border between them. One row of two objects that
touch, A and B, beside background (·), with borders 2 voxels wide:

    labels    · · · A A A A A A B B B B B · ·
    classes   0 0 0 2 1 1 1 1 2 2 1 1 1 2 0 0

2-D models get their planes one by one: a 2-D array means that nothing beyond the plane counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

IGNORE = -1
"""The class number of voxels that say nothing; the same value as in losses.py."""

BACKGROUND, INSIDE, BORDER = 0, 1, 2


def class_names(task: str, n_classes: int = 2) -> tuple[str, ...]:
    """Names of the classes of `task` (semantic or instances) where the user gave none."""
    if task == "instances":
        return ("background", "inside", "border")
    if n_classes == 2:
        return ("background", "foreground")
    return ("background", *(f"class {i}" for i in range(1, n_classes)))


def semantic(labels: NDArray[Any], *, n_classes: int, ignore: int | None = None) -> NDArray[Any]:
    """The labels as int64 classes 0..n_classes-1, with IGNORE where the label is `ignore`.

    Raises:
        InputError: other values than the classes and `ignore`.
    """
    skipped = _is_label(labels, ignore)
    strange = ~skipped & ((labels < 0) | (labels >= n_classes))
    if strange.any():
        values = np.unique(labels[strange])
        raise InputError(
            f"the labels hold {_listed(values)}, but {n_classes} classes have the values 0 to "
            f"{n_classes - 1}: name every class, or set `ignore` to the value that means nothing"
        )
    classes = labels.astype(np.int64)
    classes[skipped] = IGNORE
    return classes


def boundary(
    labels: NDArray[Any],
    *,
    border_vox: float,
    voxel_size: Sequence[float] | None = None,
    ignore: int | None = None,
) -> NDArray[Any]:
    """Classes 0 background, 1 inside, 2 border, or IGNORE, of instance labels (0: background).

    A voxel of an object is border when the centre of a voxel with another label, background
    included, lies closer to its own centre than border_vox / 2 + 1; or when a voxel of another
    object is among its neighbours, across corners too. So touching objects are separated by a
    border of at least `border_vox`, alone standing ones have a rim half as wide (rounded up to
    whole voxels), and inside voxels of two objects are never neighbours. The end of the array is
    no border. Objects no wider than the two rims have no inside.

    A class is given only where it is certain: voxels of objects that have an ignored voxel within
    that reach are ignored too.

    Args:
        labels: integers at least 0, any number of spatial axes.
        border_vox: thickness of the border between two objects, in voxels of the finest axis.
        voxel_size: length of a voxel along each axis in any unit; None: all the same.
        ignore: the label of voxels that were not annotated.

    Returns:
        int64, same shape. It is exact for all voxels that are at least `boundary_margin_vox` away
        from where the labels were cut.

    Raises:
        InputError: negative labels, apart from `ignore`.
    """
    skipped = _is_label(labels, ignore)
    if (negative := ~skipped & (labels < 0)).any():
        raise InputError(
            f"the labels hold {_listed(np.unique(labels[negative]))}, but objects are numbered "
            "from 1 and 0 is background: set `ignore` to the value that means nothing"
        )
    steps = relative_size(voxel_size or [1.0] * labels.ndim)
    reach = border_vox / 2 + 1
    border = _has_other_within(labels, reach, steps) | _touches_other(labels, skipped, reach, steps)
    classes = np.where(border, BORDER, INSIDE)
    if skipped.any():
        near = _has_other_within(skipped, reach, steps) | _dilated(skipped)
        classes[near] = IGNORE
    classes[labels == 0] = BACKGROUND
    classes[skipped] = IGNORE
    return classes.astype(np.int64, copy=False)


def boundary_margin_vox(border_vox: float, voxel_size: Sequence[float]) -> tuple[int, ...]:
    """How many voxels around a patch decide about its border classes, for each axis."""
    reach = border_vox / 2 + 1
    return tuple(max(1, _n_steps(reach, step)) for step in relative_size(voxel_size))


def _is_label(labels: NDArray[Any], ignore: int | None) -> NDArray[np.bool_]:
    if ignore is None:
        return np.zeros(labels.shape, bool)
    return np.asarray(labels == ignore)


def _listed(values: NDArray[Any], at_most: int = 5) -> str:
    shown = ", ".join(str(v) for v in values[:at_most])
    return f"{shown} and {len(values) - at_most} other values" if len(values) > at_most else shown


def relative_size(voxel_size: Sequence[float]) -> list[float]:
    """Lengths of a voxel in units of the shortest."""
    return [size / min(voxel_size) for size in voxel_size]


def _n_steps(reach: float, step: float) -> int:
    """The largest number of steps that is shorter than `reach`."""
    return math.ceil(reach / step) - 1


def _has_other_within(
    values: NDArray[Any], reach: float, steps: Sequence[float]
) -> NDArray[np.bool_]:
    """Whether a voxel with another value lies closer than `reach` (Euclidean), exactly.

    Separable, axis by axis. Let D(v) be the squared distance to the nearest other value within
    the line, plane, ... of the axes done so far. Along the next axis a voxel w at distance d
    offers d² where its own value differs, and d² + D(w) where it is the same: D(w) then speaks of
    the same value. The cost grows with the reach, not with its cube.
    """
    far = np.float32(reach) ** 2
    nearest = np.full(values.shape, far, np.float32)
    for axis, step in enumerate(steps):
        before = nearest.copy()
        for k in range(1, _n_steps(reach, step) + 1):
            squared = np.float32(k * step) ** 2
            for here, there in _shifted(values.ndim, axis, k):
                offer = np.where(values[here] == values[there], before[there] + squared, squared)
                np.minimum(nearest[here], offer, out=nearest[here])
    return np.asarray(nearest < far)


def _touches_other(
    labels: NDArray[Any], skipped: NDArray[np.bool_], reach: float, steps: Sequence[float]
) -> NDArray[np.bool_]:
    """Whether another object (not background, not ignored) is among the 3^n neighbours."""
    if math.hypot(*steps) < reach:  # all neighbours are within reach already
        return np.zeros(labels.shape, bool)
    objects = labels.astype(np.uint64)
    nothing = skipped | (labels == 0)
    objects[nothing] = 0
    largest = _over_neighbours(objects, np.maximum)
    objects[nothing] = np.iinfo(np.uint64).max
    smallest = _over_neighbours(objects, np.minimum)
    return np.asarray(~nothing & ((largest > objects) | (smallest < objects)))


def _dilated(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return _over_neighbours(mask, np.logical_or)


def _over_neighbours(values: NDArray[Any], combine: np.ufunc) -> NDArray[Any]:
    """`combine` of each voxel and its 3^n - 1 neighbours inside the array."""
    result = values.copy()
    for axis in range(values.ndim):
        before = result.copy()
        for here, there in _shifted(values.ndim, axis, 1):
            combine(result[here], before[there], out=result[here])
    return result


def _shifted(n_axes: int, axis: int, k: int) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Index pairs (here, there) of all voxels and those k voxels ahead, then k voxels behind."""
    whole = [slice(None)] * n_axes
    low, high = whole.copy(), whole.copy()
    low[axis], high[axis] = slice(None, -k), slice(k, None)
    return [(tuple(low), tuple(high)), (tuple(high), tuple(low))]
