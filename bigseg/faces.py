"""What a block says of its components, and which components of two blocks are equal.

The components of every core are numbered by themselves, 1..n. Where two cores touch, only their
outermost planes are compared, so that stitching never reads a volume:

    block a   |. 1 1 . 2|3 3 . 4 .|  block b, at offset (0, 0, 0, 1) of a
              |. 1 . . 2|3 . . 4 4|
              |. . . 5 .|3 . . . .|     faces: 2 = 3; with edges (connectivity 2): 5 = 3 as well
                       ^ ^
             (axis 3, side 1 of a) (axis 3, side 0 of b)

Axes are (t, z, y, x). Neighbours of a voxel are those that differ by one along 1 to `connectivity`
of the last `dims` axes; with `link`, also the two along that axis alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.packing import damaged, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Region, Vec

N_AXES = 4
_COMPONENTS, _PAIRS = "components", "pairs"
_ID_BITS = np.uint64(32)


@dataclass(frozen=True)
class BlockComponents:
    """The table of a core's components 1..n, and its outermost planes.

    Attributes:
        core: where in the volume (t, z, y, x) the components were numbered.
        first: raster index in the whole volume of each one's first voxel, uint64 of shape (n,),
            ascending.
        planes: local ids (0: none) of the outermost plane on a side (0 or 1) of an axis, uint32,
            without that axis; the two of a core one voxel thick are the same.
        sizes: voxels of each component in this core, uint64; None where nobody asks for them.
        owners: for holes, the only label beside each component, uint64; NOBODY where none was
            seen, SEVERAL where there are several, or the end of the volume (instances.py).
    """

    core: Region
    first: NDArray[np.uint64]
    planes: Mapping[tuple[int, int], NDArray[np.uint32]]
    sizes: NDArray[np.uint64] | None = None
    owners: NDArray[np.uint64] | None = None

    @property
    def n(self) -> int:
        """Number of components."""
        return len(self.first)

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads."""
        arrays: dict[str, NDArray[Any]] = {
            "core": np.array([self.core.start, self.core.stop], np.uint64),
            "first": self.first,
        }
        for name, table in (("sizes", self.sizes), ("owners", self.owners)):
            if table is not None:
                arrays[name] = table
        for (axis, side), plane in self.planes.items():
            if side < self.core.shape[axis]:
                arrays[_plane_name(axis, side)] = plane
        return pack(_COMPONENTS, arrays)

    @classmethod
    def from_bytes(
        cls, data: bytes, *, core: Region, axes: Iterable[int] = range(N_AXES)
    ) -> BlockComponents:
        """The components of this core, with those of its planes that lie across `axes`.

        The less planes, the quicker: numbering needs none.

        Raises:
            OutputError: the bytes are damaged or foreign, or are those of another core.
        """
        wanted = {_plane_name(axis, side): (axis, side) for axis in axes for side in (0, 1)}
        # A component has at least a voxel, and a row of three numbers; a plane is within the core.
        most_bytes = (3 * 8 + 2 * N_AXES * 4) * core.n_voxels + 2 * N_AXES * 8
        names = {"core", "sizes", "first", "owners", *wanted}
        arrays = unpack(data, _COMPONENTS, most_bytes=most_bytes, names=names)
        if why := _flaw(arrays, core):
            raise damaged(_COMPONENTS, why, len(data))
        planes = {place: arrays[name] for name, place in wanted.items() if name in arrays}
        for axis, side in list(planes):
            if core.shape[axis] == 1:
                planes[axis, 1] = planes[axis, side]
        return cls(core, arrays["first"], planes, arrays.get("sizes"), arrays.get("owners"))


@dataclass(frozen=True)
class Adjacency:
    """Which voxels are neighbours, and so which blocks are; see above."""

    dims: int
    connectivity: int
    link: str | None = None

    def block_offsets(self) -> tuple[Vec, ...]:
        """Offsets (t, z, y, x) of the neighbours of a block; of each two opposite ones the later.

        Looking at these from every block compares each pair of neighbours once.
        """
        steps = itertools.product((-1, 0, 1), repeat=N_AXES)
        return tuple(step for step in steps if step > (0,) * N_AXES and self.joins(step))

    def joins(self, displacement: Vec) -> bool:
        """Whether voxels (or blocks) this far from each other, -1, 0 or 1 an axis, are neighbours.

        A voxel is no neighbour of itself.
        """
        moved = [axis for axis, step in enumerate(displacement) if step]
        if moved == [self._link_axis]:
            return True
        return 1 <= len(moved) <= self.connectivity and moved[0] >= N_AXES - self.dims

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes along which blocks can touch."""
        return tuple(sorted({*range(N_AXES - self.dims, N_AXES), self._link_axis} - {-1}))

    @cached_property
    def _link_axis(self) -> int:
        return {None: -1, "t": 0, "z": 1}[self.link]


def describe(
    ids: NDArray[np.unsignedinteger[Any]],
    core: Region,
    shape: Vec,
    *,
    axes: Sequence[int],
    first: NDArray[np.int64] | None = None,
    sized: bool = True,
    owners: NDArray[np.uint64] | None = None,
) -> BlockComponents:
    """What there is to say of the components `ids` (t, z, y, x) of a core of a volume of `shape`.

    `ids` are 0 where there is none, else 1..n in the order of their first voxels; `axes` are those
    of `Adjacency.axes`. `first` are the flat indices of first voxels in `ids`, where they are known
    already. Sizes, which cost more than the rest, are left out unless `sized`.
    """
    assert ids.shape == core.shape, (ids.shape, core)
    if first is None:
        first, n = beginnings(ids)
        assert n == len(first), "ids must be in the order of their first voxels"
    planes = {
        (axis, side): np.take(ids, -side, axis).astype(np.uint32, order="C")
        for axis in axes
        for side in (0, 1)
    }
    sizes = _sizes(ids, len(first)) if sized else None
    return BlockComponents(core, _raster_in(shape, core, first), planes, sizes, owners)


def beginnings(ids: NDArray[np.unsignedinteger[Any]]) -> tuple[NDArray[np.int64], int]:
    """Where `ids` exceed all before them in raster order, as flat indices, and the highest of them.

    There are as many as the highest where ids are numbered 1, 2, ... by their first voxels, and
    less where they are not.
    """
    if not ids.size:
        return np.zeros(0, np.int64), 0
    n_rows, length = (1, *ids.shape)[-2:]
    planes = np.ascontiguousarray(ids).reshape(-1, n_rows, length)
    # Only planes that raise the highest id are looked into, and in these only such rows: the
    # highest of a plane takes a fraction of what those of its rows take.
    plane, _ = _rises(planes.reshape(len(planes), -1).max(axis=1))
    place, before = _rises(planes[plane].max(axis=2).reshape(-1))
    row = plane[place // n_rows] * n_rows + place % n_rows
    values = planes.reshape(-1, length)[row]
    which, column = np.nonzero(values > before[:, np.newaxis])
    so_far = np.maximum.accumulate(values[which, column])
    is_first = np.diff(so_far, prepend=ids.dtype.type(0)) > 0
    return (row[which] * length + column)[is_first], int(so_far.max(initial=0))


def _rises(values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Where values exceed all before them, and the highest before each of these places."""
    highest = np.maximum.accumulate(values)
    before = np.concatenate([np.zeros(1, values.dtype), highest])[:-1]
    places = np.flatnonzero(highest > before)
    return places, before[places]


def equal_pairs(
    a: BlockComponents, b: BlockComponents, offset: Vec, adjacency: Adjacency
) -> NDArray[np.uint32]:
    """The distinct pairs (id in a, id in b) that touch, ascending; shape (m, 2).

    Block b lies at block `offset` (t, z, y, x) of a: one of `adjacency.block_offsets()`.
    """
    outer_a, outer_b = _facing(a, offset), _facing(b, tuple(-step for step in offset))
    free = [axis for axis, step in enumerate(offset) if not step]
    found = [np.zeros(0, np.uint64)]
    for shift in itertools.product((-1, 0, 1), repeat=len(free)):
        displacement = list(offset)
        for axis, step in zip(free, shift, strict=True):
            displacement[axis] = step
        if adjacency.joins(tuple(displacement)):
            found.append(_keys(_shifted(outer_a, shift), _shifted(outer_b, [-s for s in shift])))
    keys = np.unique(np.concatenate(found))
    return np.stack([keys >> _ID_BITS, keys & np.uint64(2**32 - 1)], axis=1).astype(np.uint32)


def pairs_to_bytes(pairs: Iterable[tuple[int, NDArray[np.uint32]]]) -> bytes:
    """The equal pairs of a block with each of its neighbours, as `pairs_from_bytes` reads them."""
    listed = list(pairs)
    together = [np.zeros((0, 2), np.uint32), *(found for _, found in listed)]
    return pack(
        _PAIRS,
        {
            "blocks": np.array([block for block, _ in listed], np.uint64),
            "counts": np.array([len(found) for _, found in listed], np.uint64),
            "pairs": np.concatenate(together),
        },
    )


def pairs_from_bytes(data: bytes, *, most_pairs: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Each neighbour's number and the equal pairs (m, 2) with it.

    `most_pairs` is how many there can be in all: more are refused before they are read.

    Raises:
        OutputError: the bytes are damaged or foreign.
    """
    # As many blocks as voxels have neighbours: 80 in four axes.
    arrays = unpack(data, _PAIRS, most_bytes=8 * most_pairs + 2 * 8 * 80)
    missing = {"blocks", "counts", "pairs"} - set(arrays)
    if missing or not _fit(arrays["blocks"], arrays["counts"], arrays["pairs"]):
        raise damaged(_PAIRS, "its arrays do not fit each other", len(data))
    stops = np.cumsum(arrays["counts"]).tolist()
    parts = zip(arrays["blocks"].tolist(), [0, *stops], stops, strict=False)
    return ((block, arrays["pairs"][start:stop]) for block, start, stop in parts)


def _fit(blocks: NDArray[Any], counts: NDArray[Any], pairs: NDArray[Any]) -> bool:
    return (
        pairs.dtype == np.uint32
        and pairs.shape[1:] == (2,)
        and blocks.shape == counts.shape == (blocks.size,)
        and sum(counts.tolist()) == len(pairs)
        and bool((pairs > 0).all())
    )


def _flaw(arrays: Mapping[str, NDArray[Any]], core: Region) -> str | None:
    """Why these arrays are no components of this core; None if they are."""
    if {"core", "first"} - set(arrays):
        return "a table is missing"
    if arrays["core"].tolist() != [list(core.start), list(core.stop)]:
        return f"it is of the core {arrays['core'].tolist()}, not of {core}"
    tables = [arrays[name] for name in ("first", "sizes", "owners") if name in arrays]
    n = tables[0].size
    if any(table.dtype != np.uint64 or table.shape != (n,) for table in tables):
        return "its tables are of different lengths"
    if not (arrays["first"][1:] > arrays["first"][:-1]).all():
        return "its components are not in order"
    for name, plane in arrays.items():
        if name.startswith("plane"):
            axis = int(name.split()[1])
            expected = core.shape[:axis] + core.shape[axis + 1 :]
            if plane.dtype != np.uint32 or plane.shape != expected or plane.max(initial=0) > n:
                return f"its {name} does not fit"
    return None


def _plane_name(axis: int, side: int) -> str:
    return f"plane {axis} {side}"


def _sizes(ids: NDArray[np.unsignedinteger[Any]], n: int) -> NDArray[np.uint64]:
    """Voxels of each of the components 1..n."""
    flat = ids.reshape(-1)
    # Runs of one id are long: counting their lengths is quicker than counting voxels.
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    sizes = np.zeros(n + 1, np.uint64)
    if flat.size:
        np.add.at(sizes, flat[starts], np.diff(starts, append=flat.size).astype(np.uint64))
    return sizes[1:]


def _raster_in(shape: Vec, core: Region, local: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Raster indices within a core as raster indices within the volume."""
    index = np.zeros(len(local), np.uint64)
    for position, start, length in zip(
        np.unravel_index(local, core.shape), core.start, shape, strict=True
    ):
        index *= np.uint64(length)
        index += (position + start).astype(np.uint64)
    return index


def _facing(block: BlockComponents, offset: Sequence[int]) -> NDArray[np.uint32]:
    """The ids of the voxels that lie outermost towards `offset`, along the axes it leaves free."""
    crossed = next(axis for axis, step in enumerate(offset) if step)
    index = tuple(
        slice(None) if not step else (-1 if step > 0 else 0)
        for axis, step in enumerate(offset)
        if axis != crossed
    )
    return block.planes[crossed, 1 if offset[crossed] > 0 else 0][index]


def _shifted(ids: NDArray[np.uint32], shift: Sequence[int]) -> NDArray[np.uint32]:
    """Those ids that have a partner at `shift`: without the last where it is 1, the first if -1."""
    return ids[
        tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, ids.shape, strict=True))
    ]


def _keys(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Pairs of ids at the same places, neither of them 0, as one integer each; some repeated."""
    is_pair = (a != 0) & (b != 0)
    keys: NDArray[np.uint64] = (a[is_pair].astype(np.uint64) << _ID_BITS) | b[is_pair]
    is_new = np.ones(len(keys), bool)
    # Runs of the same pair go first: most pairs touch at many voxels.
    is_new[1:] = keys[1:] != keys[:-1]
    return keys[is_new]
