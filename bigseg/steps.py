"""Growing and eroding by steps, which are those of an octagon in voxels of any size.

It knows arrays and no volumes. Arrays are (t, z, y, x); steps go along the last two axes, each
plane by itself, or along the last three, each time point by itself. A step is one voxel of the
finest of these axes; an axis whose voxels are r times as long moves in every r-th step. Odd steps
go to the face neighbours, even ones also to those across edges and corners:

                     · · · · ·                      · # # # ·
    after one step   · · # · ·    after two steps   # # # # #
                     · # # # ·                      # # # # #
                     · · # · ·                      # # # # #
                     · · · · ·                      · # # # ·

What grows or erodes by n steps depends on nothing farther than `Steps.reach_vox(n)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Vec

Unsigned = TypeVar("Unsigned", bound=np.unsignedinteger[Any])

# What is looked at in one go stays in the processor's second cache.
_SLAB_BYTES = 1 << 19


@dataclass(frozen=True)
class Move:
    """The neighbours of one step: along which axes, and with their edges and corners (boxes)."""

    axes: tuple[bool, ...]
    in_boxes: bool


@dataclass(frozen=True)
class Steps:
    """The steps of objects; voxels are `ratios` (at least 1) times as long as the finest axis'."""

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.ratios) in (2, 3), self.ratios
        assert min(self.ratios) >= 1, self.ratios

    @classmethod
    def of(cls, voxel_size: Sequence[float]) -> Steps:
        """The steps in voxels of this size along the axes of an object, in any unit."""
        return cls(tuple(size / min(voxel_size) for size in voxel_size))

    def reach_vox(self, n_steps: int) -> Vec:
        """How far `n_steps` go along (t, z, y, x)."""
        return (0,) * (4 - len(self.ratios)) + tuple(_moved(n_steps, r) for r in self.ratios)

    def moves(self, n_steps: int) -> Iterator[Move]:
        """The first `n_steps` steps."""
        for step in range(1, n_steps + 1):
            axes = tuple(_moved(step, r) > _moved(step - 1, r) for r in self.ratios)
            yield Move(axes, in_boxes=step % 2 == 0)


def _moved(n_steps: int, ratio: float) -> int:
    # Sizes such as 0.3 and 0.1 have a ratio that is no integer by the last digit.
    return math.floor(n_steps / ratio + 1e-6)


def erode(mask: NDArray[np.bool_], n_steps: int, steps: Steps) -> NDArray[np.bool_]:
    """`mask` (t, z, y, x) without what is within `n_steps` of its outside.

    What lies beyond the array counts as inside.
    """
    candidates = mask.copy(order="C")
    # The outside grows; it is 0, and 255 what nothing has reached.
    values = np.negative(candidates.view(np.uint8))
    _spread(values, candidates, n_steps, steps)
    return values.astype(np.bool_)


def grow(
    numbers: NDArray[Unsigned], foreground: NDArray[np.bool_], n_steps: int, steps: Steps
) -> NDArray[Unsigned]:
    """`numbers` (t, z, y, x), grown by `n_steps` where `foreground` is and no number.

    In each step a voxel takes the smallest number among its neighbours of that step. Takes three
    bytes a voxel beside what goes in and out; five with more than 65,534 different numbers.
    """
    candidates = np.logical_and(foreground, numbers == 0, order="C")
    if n_steps == 0 or not candidates.any():
        return numbers.copy(order="C")
    values, by_value = _order_preserving(numbers)
    # One less: 0, no number, becomes the largest value, which loses against every other.
    values -= 1
    _spread(values, candidates, n_steps, steps)
    values += 1
    return values.astype(numbers.dtype, copy=False) if by_value is None else by_value[values]


def _order_preserving(
    numbers: NDArray[Unsigned],
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[Unsigned] | None]:
    """A copy of `numbers` in the smallest type, as ranks if need be, and the number of each rank.

    Numbers of a huge volume do not fit in small types, but the few of one block do.
    """
    highest = int(numbers.max())
    if highest <= np.iinfo(np.uint16).max:
        return numbers.astype(np.uint16, order="C"), None
    flat = np.ravel(numbers)
    # Runs of one number are long: looking at their first voxels is enough.
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    by_rank, ranks = np.unique(flat[starts], return_inverse=True)
    if by_rank[0] != 0:
        by_rank, ranks = np.concatenate([by_rank[:1] * 0, by_rank]), ranks + 1
    small = np.uint16 if len(by_rank) <= np.iinfo(np.uint16).max else np.uint32
    lengths = np.diff(starts, append=flat.size)
    return np.repeat(ranks.astype(small), lengths).reshape(numbers.shape), by_rank


def _spread(
    values: NDArray[np.unsignedinteger[Any]],
    candidates: NDArray[np.bool_],
    n_steps: int,
    steps: Steps,
) -> None:
    """Lets small values spread into `candidates` in place, which are of the largest value."""
    n_axes = len(steps.ratios)
    if n_axes == 3:
        parts = list(zip(as_stacks(values, 3), as_stacks(candidates, 3), strict=True))
    else:
        # Planes know nothing of each other: all steps of a few of them, then of the next.
        stack, stack_candidates = as_stacks(values, 2), as_stacks(candidates, 2)
        parts = [(stack[slab], stack_candidates[slab]) for slab in _slabs(stack)]
    for part, part_candidates in parts:
        for move in steps.moves(n_steps):
            _spread_once(part, part_candidates, move)


def as_stacks(array: NDArray[Any], n_axes: int) -> NDArray[Any]:
    """The array with all but its last `n_axes` axes as one, without a copy."""
    return array.reshape(math.prod(array.shape[:-n_axes]), *array.shape[-n_axes:])


def _slabs(stack: NDArray[Any]) -> Iterator[slice]:
    """Cuts along the first axis that make parts of about _SLAB_BYTES."""
    n, *plane = stack.shape
    thickness = max(1, _SLAB_BYTES // max(1, math.prod(plane) * stack.itemsize))
    return (slice(start, min(n, start + thickness)) for start in range(0, n, thickness))


def _spread_once(
    stack: NDArray[np.unsignedinteger[Any]], candidates: NDArray[np.bool_], move: Move
) -> None:
    """One step in `stack` (z, y, x), slab by slab; all slabs see the values before the step."""
    nothing = np.iinfo(stack.dtype).max
    axes = (False, *move.axes)[-3:]
    before = stack[:0]
    for slab in _slabs(stack):
        here, wanted = stack[slab], candidates[slab]
        last = here[-1:].copy() if axes[0] else before
        if wanted.any():
            after = stack[slab.stop : slab.stop + 1] if axes[0] else before
            lowest = _lowest_beside(here, (before, after), axes, in_boxes=move.in_boxes)
            # All bits, which lose against every value, where nothing is wanted: many times as fast
            # as copying by a mask.
            lowest |= np.subtract(wanted.view(np.uint8), 1, dtype=stack.dtype)
            np.minimum(here, lowest, out=here)
            wanted &= here == nothing
        before = last


def _lowest_beside(
    here: NDArray[np.unsignedinteger[Any]],
    outer: tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.unsignedinteger[Any]]],
    axes: tuple[bool, ...],
    *,
    in_boxes: bool,
) -> NDArray[np.unsignedinteger[Any]]:
    """The smallest of each voxel's value and its neighbours'.

    `outer` are the planes before and after `here`, without planes at the ends of the array.
    """
    lowest = here.copy()
    for plane, side in zip(outer, (slice(None, 1), slice(-1, None)), strict=True):
        if len(plane):
            np.minimum(lowest[side], plane, out=lowest[side])
    for axis in range(3):
        if axes[axis]:
            # A box is what its axes reach one after the other.
            _lower_along(axis, lowest, lowest.copy() if in_boxes and axis else here)
    return lowest


def _lower_along(
    axis: int,
    lowest: NDArray[np.unsignedinteger[Any]],
    source: NDArray[np.unsignedinteger[Any]],
) -> None:
    """Lowers each voxel to the `source` of its two neighbours along `axis`.

    Works on the memory as one long row, several times as fast as on short ones. The ends of the
    axis, which see the next line there, get their values back.
    """
    stride = math.prod(lowest.shape[axis + 1 :])
    row, source_row = lowest.reshape(-1), source.reshape(-1)
    front, back = slice(None, -stride), slice(stride, None)
    for these, those, end in ((back, front, 0), (front, back, -1)):
        last = lowest.take(end, axis=axis)
        np.minimum(row[these], source_row[those], out=row[these])
        np.moveaxis(lowest, axis, 0)[end] = last
