"""Integer geometry of volumes: regions, cores, tiles, halos. It knows integers and nothing else.

Along one axis (the same on every axis):

    volume   |0·······························································N|
    cores    |· · · · · core 0 · · · · |· · · · · core 1 · · · · |· · core 2 · ·|
    tiles    |  tile 0  |  tile 1  |  tile 2  |  tile 3  |  ...
    grown              [halo|  tile 1  |rest|halo]

Tiles lie on a lattice from the volume's origin; one tile is one forward pass of the network. The
network reads the grown region, which starts at `tile.start - halo`; it computes the smallest size
that fits it and covers the tile, and the rest is cropped. A core is what one block writes: whole
tiles and whole write units, clipped at the volume's end. Outside the volume the context is
mirrored.

Blocks are numbered in raster order, or in beams, so that blocks that share what they read follow
each other. A beam runs along z through the whole grid, every other one backwards. Four by two
blocks in two planes, in beams of two by two:

    z = 0    |  0  1 | 12 13 |      z = 1    |  4  5 |  8  9 |
             |  2  3 | 14 15 |               |  6  7 | 10 11 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from bigseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Vec = tuple[int, ...]


def ceil_div(a: int, b: int) -> int:
    """The smallest integer that is at least a / b, for b > 0."""
    return -(-a // b)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, by their ratio."""
    divisors = (d for d in range(1, n + 1) if n % d == 0)
    return min(divisors, key=lambda d: max(d / wanted, wanted / d))


def round_up(n: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least n."""
    return ceil_div(n, unit) * unit


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open box of voxels: `start` is inside, `stop` is not. One entry per axis."""

    start: Vec
    stop: Vec

    def __post_init__(self) -> None:
        assert len(self.start) == len(self.stop), (self.start, self.stop)

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Region:
        """The region from the origin with this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Vec:
        """Extent along each axis in voxels, never negative."""
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def n_voxels(self) -> int:
        """Number of voxels inside."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index for an array whose origin is the origin of this region's coordinates."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def grow(self, before: Sequence[int], after: Sequence[int]) -> Region:
        """The region with margins added in front of and behind each axis."""
        return Region(
            tuple(a - m for a, m in zip(self.start, before, strict=True)),
            tuple(b + m for b, m in zip(self.stop, after, strict=True)),
        )

    def intersect(self, other: Region) -> Region:
        """The common part; empty (shape with a zero) where there is none."""
        start = tuple(map(max, self.start, other.start))
        return Region(start, tuple(map(max, start, map(min, self.stop, other.stop))))

    def relative_to(self, origin: Sequence[int]) -> Region:
        """The same region in coordinates that start at `origin`."""
        return Region(
            tuple(a - o for a, o in zip(self.start, origin, strict=True)),
            tuple(b - o for b, o in zip(self.stop, origin, strict=True)),
        )

    def __str__(self) -> str:
        return ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True))


def parse_region(text: str, shape: Sequence[int]) -> Region:
    """The region written as `z0:z1,y0:y1,x0:x1` inside an array of `shape`.

    A side may be left out (`:90` or `10:`), a negative number counts from the end, and `:` is a
    whole axis, as in Python.

    Raises:
        UsageError: wrong number of axes, not integers, empty, or outside the volume.

    """
    parts = text.split(",")
    axes = "zyx"[-len(shape) :] if len(shape) <= 3 else "tzyx"
    if len(parts) != len(shape):
        raise UsageError(
            f"region {text!r} has {len(parts)} axes, the volume has {len(shape)} ({axes}): "
            f"write {','.join(f'{a}0:{a}1' for a in axes)}"
        )
    bounds = [_parse_interval(p, n, text) for p, n in zip(parts, shape, strict=True)]
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def _parse_interval(part: str, length: int, text: str) -> tuple[int, int]:
    sides = part.split(":")
    try:
        if len(sides) != 2:
            raise ValueError
        first, last = (int(s) if s.strip() else None for s in sides)
    except ValueError:
        raise UsageError(
            f"region {text!r}: {part!r} is not an interval of integers; write it as 0:{length}"
        ) from None
    start = 0 if first is None else first + length * (first < 0)
    stop = length if last is None else last + length * (last < 0)
    if not 0 <= start < stop <= length:
        raise UsageError(
            f"region {text!r}: {part!r} is empty or outside the axis, which runs from 0 to "
            f"{length}: give a part of it"
        )
    return start, stop


@dataclass(frozen=True, slots=True)
class Block:
    """One core of a grid: its number and the region that it writes."""

    index: int
    core: Region


@dataclass(frozen=True)
class BlockGrid:
    """The cores that tile `region` of a volume exactly once, numbered in raster order or in beams.

    Cores lie on a lattice from the volume's origin with period `core_shape`, so that a core never
    moves with the region; they are clipped at the region. Only cores that touch it are counted.

    `beam` is the cross-section of a beam in blocks along y and x; None is raster order, and so is a
    beam as wide as the grid. Numbers run through t, the beams of a time point (raster order in y
    and x), z, and y and x within the beam. Every other beam of a time point runs backwards along z,
    so that it begins in the plane in which the one before ended. Beams at the far sides of the grid
    are as narrow as what is left for them. With one plane, beams are patches of the plane.
    """

    region: Region
    core_shape: Vec
    beam: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        assert all(c > 0 for c in self.core_shape), self.core_shape
        # A beam needs an axis to run along.
        assert self.beam is None or (min(self.beam) > 0 and len(self.core_shape) >= 3), self.beam

    @cached_property
    def first(self) -> Vec:
        """Lattice position of the first core."""
        return tuple(a // c for a, c in zip(self.region.start, self.core_shape, strict=True))

    @cached_property
    def shape(self) -> Vec:
        """Number of cores along each axis."""
        return tuple(
            ceil_div(b, c) - f if n else 0
            for b, c, f, n in zip(
                self.region.stop, self.core_shape, self.first, self.region.shape, strict=True
            )
        )

    def __len__(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(index)
        lattice = tuple(f + p for f, p in zip(self.first, self._position(index), strict=True))
        start = tuple(p * c for p, c in zip(lattice, self.core_shape, strict=True))
        stop = tuple(a + c for a, c in zip(start, self.core_shape, strict=True))
        return Block(index, Region(start, stop).intersect(self.region))

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    @property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """The grid as Dask chunks of the region: the lengths of the cores along each axis."""
        return tuple(
            tuple(min(b, (f + i + 1) * c) - max(a, (f + i) * c) for i in range(n))
            for a, b, c, f, n in zip(
                self.region.start,
                self.region.stop,
                self.core_shape,
                self.first,
                self.shape,
                strict=True,
            )
        )

    def position_of(self, block: Block) -> Vec:
        """Where in the grid a block lies, counted in cores from the first."""
        return tuple(
            a // c - f
            for a, c, f in zip(block.core.start, self.core_shape, self.first, strict=True)
        )

    def number_at(self, position: Sequence[int]) -> int | None:
        """The number of the block at a place of the grid; None beside the grid."""
        if not all(0 <= p < n for p, n in zip(position, self.shape, strict=True)):
            return None
        if self.beam is None:
            return _raster_number(position, self.shape)
        *outer, n_z, n_y, n_x = self.shape
        *time_point, z, y, x = position
        beam_y, beam_x = self.beam
        row, column = y // beam_y, x // beam_x
        height = min(beam_y, n_y - row * beam_y)
        width = min(beam_x, n_x - column * beam_x)
        if self._runs_backwards(row, column):
            z = n_z - 1 - z
        before = _raster_number(time_point, outer) * n_z * n_y * n_x
        before += n_z * (row * beam_y * n_x + column * height * beam_x)
        inside = (z, y - row * beam_y, x - column * beam_x)
        return before + _raster_number(inside, (n_z, height, width))

    def _runs_backwards(self, row: int, column: int) -> bool:
        """Whether the beam in this row and column of beams runs against z."""
        assert self.beam is not None
        return (row * ceil_div(self.shape[-1], self.beam[1]) + column) % 2 == 1

    def _position(self, index: int) -> Vec:
        """Where in the grid block `index` lies, counted in cores from the first."""
        if self.beam is None:
            return _raster_position(index, self.shape)
        *outer, n_z, n_y, n_x = self.shape
        beam_y, beam_x = self.beam
        time_point, rest = divmod(index, n_z * n_y * n_x)
        row, rest = divmod(rest, n_z * beam_y * n_x)
        height = min(beam_y, n_y - row * beam_y)
        column, rest = divmod(rest, n_z * height * beam_x)
        width = min(beam_x, n_x - column * beam_x)
        z, y, x = _raster_position(rest, (n_z, height, width))
        if self._runs_backwards(row, column):
            z = n_z - 1 - z
        return (*_raster_position(time_point, outer), z, row * beam_y + y, column * beam_x + x)


def _raster_position(index: int, shape: Sequence[int]) -> Vec:
    position = []
    for n in reversed(shape):
        index, p = divmod(index, n)
        position.append(p)
    return tuple(reversed(position))


def _raster_number(position: Sequence[int], shape: Sequence[int]) -> int:
    number = 0
    for p, n in zip(position, shape, strict=True):
        number = number * n + p
    return number


def tiles_of(core: Region, tile_shape: Sequence[int]) -> Iterator[Region]:
    """The tiles of the lattice that touch `core`, whole (not clipped), in raster order."""
    unclipped = BlockGrid(_lattice_hull(core, tile_shape), tuple(tile_shape))
    return (block.core for block in unclipped)


def _lattice_hull(region: Region, period: Sequence[int]) -> Region:
    return Region(
        tuple(a // p * p for a, p in zip(region.start, period, strict=True)),
        tuple(round_up(b, p) for b, p in zip(region.stop, period, strict=True)),
    )


def core_shape(wanted: Sequence[int], tile: Sequence[int], write_unit: Sequence[int]) -> Vec:
    """`wanted` rounded up to whole tiles and whole write units on each axis."""
    return tuple(
        round_up(max(1, w), math.lcm(t, u))
        for w, t, u in zip(wanted, tile, write_unit, strict=True)
    )


def mirror(index: int, length: int) -> int:
    """Where voxel `index` of an infinite mirrored axis lies in the real one of `length` voxels.

    The mirror stands on the outermost voxel (numpy's `reflect`: 2 1 0 1 2) and repeats where an
    axis is shorter than the halo; an axis of one voxel repeats it.
    """
    if length == 1:
        return 0
    period = 2 * (length - 1)
    folded = index % period
    return min(folded, period - folded)


def mirrored_axis(start: int, stop: int, length: int) -> tuple[int, int, list[int] | None]:
    """What to read for the mirrored interval [start, stop) of an axis of `length` voxels.

    Returns the half-open interval to read from the volume, and for each voxel of the mirrored
    interval its position within what was read, or None where that is the identity.
    """
    if start >= 0 and stop <= length:
        return start, stop, None
    indices = [mirror(i, length) for i in range(start, stop)]
    low, high = min(indices), max(indices)
    return low, high + 1, [i - low for i in indices]
