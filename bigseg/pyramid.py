"""From one level of a pyramid to the next coarser one, any region at a time.

Along one axis, by an integer factor 3 (the last window may be shorter) or, where the lengths of
two levels fit no integer factor, by the nearest voxel:

    fine     |0 1 2|3 4 5|6 7|          fine     |0 1 2 3 4 5 6|
    coarse   |  0  |  1  | 2 |          coarse   |0  1  2  3  4|   takes  0 2 3 4 6

Each coarse voxel depends on its own window alone, so however a level is cut into blocks, the
result is the same. Knows arrays and integers, no files.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg.blocks import Region, Vec, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

Method = Literal["mode", "mean", "nearest"]
Rule = tuple[int | None, ...]


def level_rule(
    fine_shape: Sequence[int],
    coarse_shape: Sequence[int],
    *,
    fine_scale: Sequence[float],
    coarse_scale: Sequence[float],
) -> Rule:
    """For each axis the integer factor between two levels, or None for the nearest voxel.

    A factor r holds when the coarse length is the fine one over r, rounded down or up; r is taken
    from the scales, else from the lengths.
    """
    scales = [b / a for a, b in zip(fine_scale, coarse_scale, strict=True)]
    lengths = zip(fine_shape, coarse_shape, strict=True)
    return tuple(_factor(n, m, s) for (n, m), s in zip(lengths, scales, strict=True))


def source_region(
    target: Region, *, fine_shape: Sequence[int], coarse_shape: Sequence[int], rule: Rule
) -> Region:
    """What of the fine level must be read to compute `target` of the coarse one."""
    axes = [
        _source_interval(a, b, n, m, r)
        for a, b, n, m, r in zip(
            target.start, target.stop, fine_shape, coarse_shape, rule, strict=True
        )
    ]
    return Region(tuple(a for a, _ in axes), tuple(b for _, b in axes))


def downsample(
    data: NDArray[Any],
    target: Region,
    *,
    fine_shape: Sequence[int],
    coarse_shape: Sequence[int],
    rule: Rule,
    method: Method,
) -> NDArray[Any]:
    """The voxels of `target` from `data`, which holds its `source_region`; dtype unchanged.

    `data` may have more axes in front (channels); they are kept.
    """
    ahead = data.ndim - len(rule)
    source = source_region(target, fine_shape=fine_shape, coarse_shape=coarse_shape, rule=rule)
    assert data.shape[ahead:] == source.shape, (data.shape, source)
    for axis, factor in enumerate(rule):
        if factor is None:
            n, m = fine_shape[axis], coarse_shape[axis]
            wanted = [
                _nearest(i, n, m) - source.start[axis]
                for i in range(target.start[axis], target.stop[axis])
            ]
            data = np.take(data, wanted, axis=ahead + axis)
    factors = (1,) * ahead + tuple(factor or 1 for factor in rule)
    return _METHODS[method](data, factors)


def mode_downsample(data: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """The most frequent value of each window, ties to the smallest; same dtype."""
    return _by_windows(data, factors, _mode)


def mean_downsample(data: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """The mean of each window, same dtype; integers are exact, rounded half to even."""
    return _by_windows(data, factors, _mean)


def nearest_downsample(data: NDArray[Any], factors: Sequence[int]) -> NDArray[Any]:
    """The voxel behind the middle of each window, in a short last window its last at most."""
    for axis, f in enumerate(factors):
        n = data.shape[axis]
        wanted = [min(i * f + f // 2, n - 1) for i in range(ceil_div(n, f))]
        data = np.take(data, wanted, axis=axis)
    return data


_METHODS: dict[str, Callable[[NDArray[Any], Sequence[int]], NDArray[Any]]] = {
    "mode": mode_downsample,
    "mean": mean_downsample,
    "nearest": nearest_downsample,
}


def _factor(fine: int, coarse: int, scale: float) -> int | None:
    from_scale = max(1, round(scale)) if math.isfinite(scale) else 1
    for r in (from_scale, max(1, round(fine / max(1, coarse)))):
        if coarse in (fine // r, ceil_div(fine, r)):
            return r
    return None


def _source_interval(start: int, stop: int, fine: int, coarse: int, r: int | None) -> Vec:
    if stop <= start:
        return (0, 0)
    if r is None:
        return (_nearest(start, fine, coarse), _nearest(stop - 1, fine, coarse) + 1)
    return (start * r, min(stop * r, fine))


def _nearest(i: int, fine: int, coarse: int) -> int:
    """The fine voxel that holds the centre of coarse voxel `i`, in integers."""
    return (2 * i + 1) * fine // (2 * coarse)


def _by_windows(
    data: NDArray[Any],
    factors: Sequence[int],
    reduce: Callable[[list[NDArray[Any]]], NDArray[Any]],
) -> NDArray[Any]:
    """Apply `reduce` to the voxels of all windows: one view for each place in the window.

    Short windows at the end of an axis are reduced by themselves, with the length that they have.
    """
    shape = tuple(ceil_div(n, f) for n, f in zip(data.shape, factors, strict=True))
    result = np.empty(shape, data.dtype)
    parts = [_parts(n, f) for n, f in zip(data.shape, factors, strict=True)]
    for part in itertools.product(*parts):
        target, source, window = zip(*part, strict=True)
        views = [
            data[tuple(slice(a + o, b, w) for (a, b), o, w in zip(source, at, window, strict=True))]
            for at in itertools.product(*(range(w) for w in window))
        ]
        result[tuple(slice(a, b) for a, b in target)] = reduce(views)
    return result


def _parts(n: int, f: int) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """(coarse interval, fine interval, window length) of the whole windows and of the short one."""
    whole, rest = divmod(n, f)
    if whole:
        yield (0, whole), (0, whole * f), f
    if rest:
        yield (whole, whole + 1), (whole * f, n), rest


def _mode(views: list[NDArray[Any]]) -> NDArray[Any]:
    result = views[0].copy()
    differs = np.zeros(result.shape, bool)
    for view in views[1:]:
        differs |= view != result
    if differs.any():
        # Most windows of a label image hold one value; only the others are sorted.
        rows = np.sort(np.stack([view[differs] for view in views]), axis=0)
        result[differs] = _longest_run(rows)
    return result


def _longest_run(rows: NDArray[Any]) -> NDArray[Any]:
    """Of each sorted column the value with the longest run, the first of equals."""
    best = np.ones(rows.shape[1], np.int64)
    run = best.copy()
    value: NDArray[Any] = rows[0].copy()
    for previous, current in itertools.pairwise(rows):
        run = np.where(current == previous, run + 1, np.int64(1))
        longer = run > best
        best[longer] = run[longer]
        value[longer] = current[longer]
    return value


def _mean(views: list[NDArray[Any]]) -> NDArray[Any]:
    dtype, n = views[0].dtype, len(views)
    if dtype.kind == "f":
        total = np.zeros(views[0].shape, np.float64)
        for view in views:
            total += view
        mean: NDArray[Any] = (total / n).astype(dtype)
        return mean
    whole, rest = _integer_sum(views, n)
    carry, rest = np.divmod(rest, n)
    whole = whole + carry.astype(whole.dtype)
    up = (2 * rest > n) | ((2 * rest == n) & (whole % 2 == 1))
    rounded: NDArray[Any] = (whole + up.astype(whole.dtype)).astype(dtype)
    return rounded


def _integer_sum(views: list[NDArray[Any]], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(a, b) with sum = a * n + b; no intermediate overflows, not even for 64-bit values."""
    wide = np.dtype(np.uint64 if views[0].dtype == np.uint64 else np.int64)
    whole = np.zeros(views[0].shape, wide)
    rest = np.zeros(views[0].shape, np.int64)
    if views[0].dtype.itemsize < 8:
        for view in views:
            rest += view
        return whole, rest
    for view in views:
        quotient, remainder = np.divmod(view.astype(wide), wide.type(n))
        whole += quotient
        rest += remainder.astype(np.int64)
    return whole, rest
