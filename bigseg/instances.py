"""From inside and foreground to numbered objects, on one array: the definition of the result.

It knows arrays and no volumes. One row, eroded by one step and grown by two:

    inside      · # # # # · # # # # # · · ·      where the network sees the inside of an object
    foreground  · # # # # # # # # # # # · ·      where it sees an object or its border
    seeds       · · # # · · · # # # · · · ·      the inside, eroded
    numbers     · · 1 1 · · · 2 2 2 · · · ·      components of the seeds, by their first voxels
    objects     · 1 1 1 1 1 2 2 2 2 2 2 · ·      grown; where two meet the smaller number wins

Arrays are (t, z, y, x). With dims 2 each plane (y, x) is by itself, with dims 3 each volume
(z, y, x); only `link` joins components across them. Erosion and growth by n steps depend on nothing
farther than `Steps.reach_vox(n)`, components on the whole array.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import cc3d
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from bigseg.faces import beginnings
from bigseg.rules import n_neighbours
from bigseg.steps import Steps, as_stacks, erode, grow

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from bigseg.rules import InstanceRule, Neighbours

Unsigned = TypeVar("Unsigned", bound=np.unsignedinteger[Any])

__all__ = [
    "FOREGROUND_BIT",
    "INSIDE_BIT",
    "NOBODY",
    "SEVERAL",
    "Steps",
    "codes_of",
    "components",
    "erode",
    "fill_holes",
    "grow",
    "in_raster_order",
    "owners_of",
    "segment_codes",
]

INSIDE_BIT, FOREGROUND_BIT = 1, 2

NOBODY = 0
SEVERAL = np.iinfo(np.uint64).max
"""Owners of a hole that has no label beside it, and of one that nobody encloses alone."""

_TIME, _Z = 0, 1


def codes_of(probabilities: NDArray[np.uint8], rule: InstanceRule) -> NDArray[np.uint8]:
    """INSIDE_BIT and FOREGROUND_BIT of each voxel, of probabilities (c, ...) in 255ths.

    Channels are the background, the inside and, if there, the border. The foreground is what is
    not background; where nothing was computed all channels are 0, and that is background.
    """
    inside = probabilities[1] >= rule.inside_at
    # Rounded halves add up to 256.
    foreground = probabilities[1:].sum(axis=0, dtype=np.uint16) >= rule.foreground_at
    codes: NDArray[np.uint8] = inside.astype(np.uint8) * np.uint8(INSIDE_BIT)
    codes |= foreground.astype(np.uint8) * np.uint8(FOREGROUND_BIT)
    return codes


def components(
    mask: NDArray[np.bool_],
    *,
    dims: int,
    connectivity: int,
    link: Literal["z", "t"] | None = None,
) -> tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]:
    """The connected components of `mask` (t, z, y, x), numbered 1..n by their first voxels.

    Neighbours differ by one along up to `connectivity` of the `dims` last axes, or along `link`
    alone. The order of first voxels is that of the array in memory (raster order). Returns the
    numbers, 0 where the mask is not, and the flat index of each one's first voxel (n,). Numbers are
    of type uint16, half of what has to be moved, where cc3d knows beforehand that these hold them,
    else (and where `link` joins) uint32.
    """
    if not mask.size:
        return np.zeros(mask.shape, np.uint32), np.zeros(0, np.int64)
    stack = as_stacks(np.ascontiguousarray(mask).view(np.uint8), dims)
    ids, first = in_raster_order(
        _label(stack, n_neighbours(dims, connectivity)).reshape(mask.shape)
    )
    if link == "t" or (link == "z" and dims == 2):
        return _joined(ids, first, axis=_TIME if link == "t" else _Z)
    return ids, first


def _label(stack: NDArray[np.uint8], neighbours: Neighbours) -> NDArray[np.unsignedinteger[Any]]:
    """The components of each part of the stack."""
    n_parts, length, *others = stack.shape
    if n_parts > 1:
        # One array for all parts, with an empty row between each two.
        rows = np.zeros((n_parts, length + 1, *others), np.uint8)
        rows[:, :length] = stack
    else:
        rows = stack
    # Numbers, not truth: there cc3d 4.1.1 takes other ways, which fail on arrays one voxel across
    # (RuntimeError with 26 neighbours, background in components with 8).
    ids = cc3d.connected_components(rows.reshape(-1, *others), connectivity=neighbours)
    return np.ascontiguousarray(ids.reshape(rows.shape)[:, :length])


def in_raster_order(ids: NDArray[Unsigned]) -> tuple[NDArray[Unsigned], NDArray[np.int64]]:
    """The same components, numbered by their first voxels, and the flat indices of these.

    `ids` themselves where they are so already: cc3d numbers like this, but does not promise it.
    """
    places, n = beginnings(ids)
    if n == len(places):
        return ids, places
    known, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    numbers = np.zeros(len(known), ids.dtype)
    real = np.flatnonzero(known)
    numbers[real[np.argsort(first[real])]] = np.arange(1, len(real) + 1)
    return numbers[inverse.reshape(ids.shape)], np.sort(first[real])


def _joined(
    ids: NDArray[Unsigned], first: NDArray[np.int64], *, axis: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Components that follow each other along `axis` become one, numbered by the first of them."""
    a, b = _overlaps(ids, axis)
    n = len(first)
    edges = sparse.coo_array((np.ones(len(a), np.uint8), (a, b)), shape=(n + 1, n + 1))
    n_joined, group = csgraph.connected_components(edges, directed=False)
    # The first voxel of a group is that of its smallest id: ids are in this order already.
    _, smallest = np.unique(group, return_index=True)
    numbers = np.empty(n_joined, np.uint32)
    numbers[np.argsort(smallest)] = np.arange(n_joined)
    # The background comes first, and has none.
    return numbers[group][ids], first[np.sort(smallest)[1:] - 1]


def _overlaps(ids: NDArray[Unsigned], axis: int) -> tuple[NDArray[Unsigned], NDArray[Unsigned]]:
    """Pairs of ids (two arrays) that follow each other along `axis`, some more than once."""
    first, second = [ids[:0, 0, 0, 0]], [ids[:0, 0, 0, 0]]
    for a, b in itertools.pairwise(np.moveaxis(ids, axis, 0)):
        both = (a != 0) & (b != 0)
        u, v = a[both], b[both]
        # Along a row the same pair comes many times.
        new = np.concatenate([[True], (u[1:] != u[:-1]) | (v[1:] != v[:-1])])[: len(u)]
        first.append(u[new])
        second.append(v[new])
    return np.concatenate(first), np.concatenate(second)


def fill_holes(labels: NDArray[Unsigned], *, dims: int) -> NDArray[Unsigned]:
    """`labels` (t, z, y, x), with holes in one object given to it.

    A hole is a component (face neighbours along the `dims` last axes) of voxels without a label
    that does not touch an end of these axes; it is filled if only one label lies beside it. In an
    array of one plane, with dims 3, everything touches an end.
    """
    holes, first = components(labels == 0, dims=dims, connectivity=1)
    n = len(first)
    ends = {(axis, side) for axis in range(4 - dims, 4) for side in (0, 1)}
    owners = owners_of(holes, n, labels, dims=dims, ends=ends)
    fillings = np.zeros(n + 1, labels.dtype)
    fillings[1:] = np.where(owners == SEVERAL, NOBODY, owners)
    filled: NDArray[Unsigned] = labels + fillings[holes]
    return filled


def owners_of(
    holes: NDArray[np.unsignedinteger[Any]],
    n_holes: int,
    labels: NDArray[Any],
    *,
    dims: int,
    ends: Collection[tuple[int, int]],
) -> NDArray[np.uint64]:
    """Whose each of the holes 1..n is, (n,): a label, NOBODY (none beside it) or SEVERAL.

    `ends` are the ends of the array, (axis, 0 or 1), that count as somebody else: those of the
    volume. Where both arrays reach one voxel beyond a block, without holes there, its neighbours'
    labels count too.
    """
    if n_holes == 0:
        return np.empty(0, np.uint64)
    lowest = np.full(n_holes + 1, SEVERAL, np.uint64)
    highest = np.zeros(n_holes + 1, np.uint64)
    is_free = labels == 0
    for axis in range(4 - dims, 4):
        along = (slice(None),) * axis
        front, back = (*along, slice(None, -1)), (*along, slice(1, None))
        differs = np.zeros(labels.shape, np.bool_)
        np.not_equal(is_free[front], is_free[back], out=differs[front])
        here = np.flatnonzero(differs)
        there = here + math.prod(labels.shape[axis + 1 :])
        # One of both voxels has no label, the other is in no hole.
        ids = np.maximum(holes.flat[here], holes.flat[there])
        owners = np.maximum(labels.flat[here], labels.flat[there]).astype(np.uint64)
        np.minimum.at(lowest, ids, owners)
        np.maximum.at(highest, ids, owners)
    owners = np.where(lowest == highest, highest, SEVERAL)
    owners[highest == 0] = NOBODY
    for axis, side in ends:
        owners[holes.take(-side, axis=axis)] = SEVERAL
    return owners[1:]


def segment_codes(
    codes: NDArray[np.uint8], rule: InstanceRule, steps: Steps, *, dims: int
) -> tuple[NDArray[np.uint64], int]:
    """The objects of a whole array of codes (t, z, y, x), numbered 1..N, and N.

    What is segmented block by block is equal to this, voxel by voxel.
    """
    seeds = erode((codes & INSIDE_BIT) != 0, rule.erode, steps)
    ids, first = components(seeds, dims=dims, connectivity=rule.connectivity, link=rule.link)
    large = np.bincount(ids.ravel(), minlength=len(first) + 1) >= rule.min_size
    large[0] = False
    numbers = (np.cumsum(large, dtype=np.uint32) * large)[ids]
    labels = grow(numbers, (codes & FOREGROUND_BIT) != 0, rule.grow, steps)
    if rule.fill_holes:
        labels = fill_holes(labels, dims=dims)
    return labels.astype(np.uint64), int(np.count_nonzero(large))
