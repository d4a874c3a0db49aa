"""Probabilities of a region, tile by tile, exactly as for the whole volume.

Along one axis, for a core of two tiles:

    core                  [   tile 1   |   tile 2   ]
    read          [ halo  |   tile 1   |   tile 2   |rest|  halo ]
    forward 1     [ halo  |   tile 1   |rest|  halo ]
    forward 2             [    halo    |   tile 2   |rest|  halo ]      (drawn with halo < tile)

Every tile of the lattice is computed from the same voxels whatever the core that asks for it, so
the size of a core cannot change a byte. `rest` is what the network computes beyond the tile because
not every size fits it; it is cropped. A 2-D network sees the planes of a tile as a batch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region, Vec, ceil_div, mirrored_axis, round_up, tiles_of
from bigseg.errors import UsageError
from bigseg.model import footprint
from bigseg.statistics import normalise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigseg.config import NormConstants, UNetSpec
    from bigseg.engine import Forward
    from bigseg.volume import Volume

LARGEST_TILE = 512


@dataclass(frozen=True)
class TileGeometry:
    """One forward pass in (t, z, y, x): the tile, its halo, and the output that is computed."""

    dims: int
    tile: Vec
    halo: Vec
    output: Vec

    @property
    def input(self) -> Vec:
        """Voxels that one forward pass reads along t, z, y, x."""
        return tuple(o + 2 * h for o, h in zip(self.output, self.halo, strict=True))

    def input_shape(self, n_channels: int) -> Vec:
        """Shape of the network's input: (n, channels, *spatial)."""
        t, z, y, x = self.input
        return (t * z, n_channels, y, x) if self.dims == 2 else (t, n_channels, z, y, x)

    def grown(self, core: Region) -> Region:
        """What must be read for all tiles that touch `core`; may leave the volume."""
        first = tuple(a // t * t for a, t in zip(core.start, self.tile, strict=True))
        last = tuple((b - 1) // t * t for b, t in zip(core.stop, self.tile, strict=True))
        stop = tuple(a + o for a, o in zip(last, self.output, strict=True))
        return Region(first, stop).grow(self.halo, self.halo)


def tile_geometry(spec: UNetSpec, tile: Sequence[int]) -> TileGeometry:
    """The geometry of tiles of (t, z, y, x) voxels for a network.

    Raises:
        UsageError: the tile is no multiple of the network's stride, or has several time points.
    """
    mark = footprint(spec)
    spatial = tuple(tile[-spec.dims :])
    if any(n < 1 or n % s for n, s in zip(spatial, mark.stride, strict=True)) or tile[0] != 1:
        raise UsageError(
            f"a tile of {tuple(tile)} (t, z, y, x) does not fit the network: its sides must be "
            f"multiples of its stride {mark.stride}, and it has one time point"
        )
    lead = tuple(tile[: 4 - spec.dims])
    return TileGeometry(
        dims=spec.dims,
        tile=tuple(tile),
        halo=(0,) * len(lead) + mark.halo,
        output=lead + mark.smallest_output(spatial),
    )


def default_tile(
    spec: UNetSpec, shape: Sequence[int], *, budget_bytes: int = 2 << 30, n_planes: int = 1
) -> Vec:
    """The tile (t, z, y, x) that computes least for a volume of `shape` within the memory budget.

    The budget counts the largest activations of one forward pass in float32. A 2-D network takes
    `n_planes` planes at once. The choice depends on the whole volume, never on a region of it.
    """
    mark = footprint(spec)
    spatial = shape[-spec.dims :]
    lead = (1, min(n_planes, shape[1])) if spec.dims == 2 else (1,)
    sides = [_candidate_sides(n, s) for n, s in zip(spatial, mark.stride, strict=True)]
    computed = [
        {side: mark.smallest_output((side,) * spec.dims)[axis] for side in candidates}
        for axis, candidates in enumerate(sides)
    ]

    def output_of(sizes: Vec) -> Vec:
        return tuple(output[side] for output, side in zip(computed, sizes, strict=True))

    def fits(sizes: Vec) -> bool:
        return math.prod(lead) * forward_bytes(spec, output_of(sizes)) <= budget_bytes

    def cost(sizes: Vec) -> int:
        n_tiles = math.prod(ceil_div(n, s) for n, s in zip(spatial, sizes, strict=True))
        return n_tiles * mark.flops(output_of(sizes))

    # Along the last axis the longest side that fits computes least, unless the last tile of the
    # axis is then nearly empty: two are enough to look at.
    candidates = (
        sizes
        for first in itertools.product(*sides[:-1])
        for sizes in itertools.islice(filter(fits, ((*first, side) for side in sides[-1])), 2)
    )
    # Where nothing fits the budget the least memory wins, so that there is always a tile.
    smallest = tuple(axis[-1] for axis in sides)
    return (*lead, *min(candidates, key=cost, default=smallest))


def _candidate_sides(length: int, stride: int) -> list[int]:
    """Sides that cut an axis into equal parts, from the longest to a single stride by sixths."""
    sides: list[int] = []
    wanted = round_up(LARGEST_TILE, stride)
    while not sides or sides[-1] > stride:
        n_parts = ceil_div(length, wanted)
        # A tile that is shorter than the axis is a multiple of 4, so that chunks can divide it.
        unit = stride if n_parts == 1 else math.lcm(stride, 4)
        side = round_up(ceil_div(length, n_parts), unit)
        if side not in sides:
            sides.append(side)
        if wanted <= unit:
            break
        wanted = max(unit, wanted * 5 // 6)
    return sides


def forward_bytes(spec: UNetSpec, output: Sequence[int]) -> int:
    """Rough float32 bytes of the activations alive at the widest point of one forward pass.

    At level 0 the input of the second convolution, its output and the kept skip are alive at once.
    """
    halo = footprint(spec).halo
    voxels = math.prod(o + 2 * h for o, h in zip(output, halo, strict=True))
    return int(4 * voxels * (spec.in_channels + 3.5 * spec.widths[0]))


def read_mirrored(volume: Volume, region: Region, channels: Sequence[int]) -> NDArray[Any]:
    """The voxels (c, t, z, y, x) of any region; outside the volume the context is mirrored."""
    axes = [
        mirrored_axis(a, b, n)
        for a, b, n in zip(region.start, region.stop, volume.shape, strict=True)
    ]
    inside = Region(tuple(a[0] for a in axes), tuple(a[1] for a in axes))
    data: NDArray[Any] = volume.read(inside, channels)
    for axis, (_, _, positions) in enumerate(axes, start=1):
        if positions is not None:
            data = np.take(data, positions, axis=axis)
    return data


def predict_region(
    volume: Volume,
    forward: Forward,
    geometry: TileGeometry,
    region: Region,
    *,
    channels: Sequence[int],
    constants: NormConstants,
) -> NDArray[np.float32]:
    """Probabilities (classes, t, z, y, x) of a region of the volume."""
    data = normalise(read_mirrored(volume, geometry.grown(region), channels), constants)
    return predict_grown(data, forward, geometry, region)


def predict_grown(
    data: NDArray[np.float32], forward: Forward, geometry: TileGeometry, core: Region
) -> NDArray[np.float32]:
    """Probabilities (classes, t, z, y, x) of a core from its normalised grown region (c, ...)."""
    origin = geometry.grown(core).start
    result: NDArray[np.float32] | None = None
    for tile in tiles_of(core, geometry.tile):
        grown = geometry.grown(tile).relative_to(origin)
        probabilities = _forward_tile(data[(slice(None), *grown.slices)], forward, geometry.dims)
        if result is None:
            result = np.empty((len(probabilities), *core.shape), np.float32)
        kept = tile.intersect(core)
        source = (slice(None), *kept.relative_to(tile.start).slices)
        result[(slice(None), *kept.relative_to(core.start).slices)] = probabilities[source]
    assert result is not None
    return result


def _forward_tile(data: NDArray[np.float32], forward: Forward, dims: int) -> NDArray[np.float32]:
    """One forward pass on (c, t, z, y, x); gives (classes, t, z, y, x) of the computed output."""
    c, t, z, y, x = data.shape
    if dims == 3:
        return forward(np.ascontiguousarray(data.swapaxes(0, 1))).swapaxes(0, 1)
    batch = np.ascontiguousarray(data.transpose(1, 2, 0, 3, 4)).reshape(t * z, c, y, x)
    planes = forward(batch)
    return planes.swapaxes(0, 1).reshape(planes.shape[1], t, z, *planes.shape[2:])
