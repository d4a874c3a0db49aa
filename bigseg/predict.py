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

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region, Vec, mirrored_axis, tiles_of
from bigseg.errors import UsageError
from bigseg.model import footprint
from bigseg.statistics import normalise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.config import NormConstants, UNetSpec
    from bigseg.engine import Forward
    from bigseg.volume import Volume


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

    def flops(self, spec: UNetSpec) -> int:
        """Operations of one forward pass, with all its planes."""
        planes = math.prod(self.output[: -self.dims])
        return planes * footprint(spec).flops(self.output[-self.dims :])

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
            f"multiples of its stride {mark.stride}, and it has one time point: give such a --tile"
        )
    lead = tuple(tile[: 4 - spec.dims])
    return TileGeometry(
        dims=spec.dims,
        tile=tuple(tile),
        halo=(0,) * len(lead) + mark.halo,
        output=lead + mark.smallest_output(spatial),
    )


def region_inside(region: Region, shape: Sequence[int]) -> Region:
    """What must be read of a volume of `shape` for a region that may leave it."""
    axes = [
        mirrored_axis(a, b, n) for a, b, n in zip(region.start, region.stop, shape, strict=True)
    ]
    return Region(tuple(a[0] for a in axes), tuple(a[1] for a in axes))


def mirrored(
    read: Callable[[Region], NDArray[Any]], shape: Sequence[int], region: Region
) -> NDArray[Any]:
    """The voxels (c, t, z, y, x) of any region; outside the volume the context is mirrored.

    `read` gives those of a region inside the volume of `shape`.
    """
    data = read(region_inside(region, shape))
    for axis, (a, b, n) in enumerate(zip(region.start, region.stop, shape, strict=True), start=1):
        positions = mirrored_axis(a, b, n)[2]
        if positions is not None:
            data = np.take(data, positions, axis=axis)
    return data


def read_mirrored(volume: Volume, region: Region, channels: Sequence[int]) -> NDArray[Any]:
    """The voxels (c, t, z, y, x) of any region of the volume, mirrored outside it."""
    return mirrored(lambda inside: volume.read(inside, channels), volume.shape, region)


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
    probabilities: NDArray[np.float32] = predict_grown(
        data, forward, geometry, region, encode=lambda p: p
    )
    return probabilities


def predict_grown(
    data: NDArray[np.float32],
    forward: Forward,
    geometry: TileGeometry,
    core: Region,
    *,
    encode: Callable[[NDArray[np.float32]], NDArray[Any]],
    keep: NDArray[np.bool_] | bool = True,
) -> NDArray[Any]:
    """What `encode` makes of the probabilities of a core, from its normalised grown region.

    `data` is (c, ...); `encode` gets and gives (channels, t, z, y, x). Tiles of which nothing is
    kept are not computed, and are 0.
    """
    origin = geometry.grown(core).start
    result: NDArray[Any] | None = None
    for part in kept_tiles(core, geometry.tile, keep):
        tile = part.tile
        grown = geometry.grown(tile).relative_to(origin)
        probabilities = _forward_tile(data[(slice(None), *grown.slices)], forward, geometry.dims)
        source = (slice(None), *part.inside.relative_to(tile.start).slices)
        encoded = encode(probabilities[source])
        if result is None:
            result = np.zeros((len(encoded), *core.shape), encoded.dtype)
        result[(slice(None), *part.inside.relative_to(core.start).slices)] = encoded
    assert result is not None, "nothing is kept of the core"
    return result


@dataclass(frozen=True)
class KeptTile:
    """A whole tile of the lattice, and what of it lies inside the core."""

    tile: Region
    inside: Region


def kept_tiles(
    core: Region, tile_shape: Sequence[int], keep: NDArray[np.bool_] | bool
) -> Iterator[KeptTile]:
    """The tiles of `core` with a voxel that is kept; `keep` has the core's shape."""
    for tile in tiles_of(core, tile_shape):
        inside = tile.intersect(core)
        here = keep if isinstance(keep, bool) else keep[inside.relative_to(core.start).slices]
        if np.any(here):
            yield KeptTile(tile, inside)


def _forward_tile(data: NDArray[np.float32], forward: Forward, dims: int) -> NDArray[np.float32]:
    """One forward pass on (c, t, z, y, x); gives (classes, t, z, y, x) of the computed output."""
    c, t, z, y, x = data.shape
    if dims == 3:
        return forward(np.ascontiguousarray(data.swapaxes(0, 1))).swapaxes(0, 1)
    batch = np.ascontiguousarray(data.transpose(1, 2, 0, 3, 4)).reshape(t * z, c, y, x)
    planes = forward(batch)
    return planes.swapaxes(0, 1).reshape(planes.shape[1], t, z, *planes.shape[2:])
