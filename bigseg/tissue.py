r"""A synthetic membrane-stained tissue without end, of which any region can be rendered by itself.

Nothing is stored and nothing depends on what was rendered before: every random number is a hash
of (seed, stream, position), so two regions agree bit for bit on the voxels that they share.

Cells grow around the jittered sites of a body-centred lattice. A voxel at p belongs to the cell
with the smallest |stretch · (warp(p) - site)| - radius, if that is below REACH_UM, else to the
background. The warp is smooth, so faces are curved; cells touch; small gaps remain where several
meet, and sites without a cell leave larger ones.

    distance    cell 7 \      / cell 12          brightness        _/\_     membrane
    to the              \    /                   across both    __/    \___/\_
    two nearest          \  / } gap                                        vesicle
                          \/
                         face

What makes it hard for a threshold, as in real stains: the contrast of the membrane changes from
place to place, vesicles are as bright as it, cytoplasm and background overlap, light fades with
depth and varies from side to side, the optics blur, and photons are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from bigseg.blocks import Region

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Field = NDArray[np.float32]
    Triple = tuple[float, float, float]

LATTICE_UM = 12.0  # two sites in each cube of this side
JITTER_UM = 2.2
RADIUS_UM = (-1.2, 1.2)  # what a cell reaches beyond REACH_UM
REACH_UM = 6.9
STRETCH = (0.88, 1.14)
WARP_UM = 1.8  # amplitude of each of the two waves along an axis
EMPTY_WAVE = 0.3  # where the wave that holds the large gaps is above it, no cell grows
EMPTY_SHARE = 0.04  # of the sites elsewhere
MEMBRANE_UM = 0.3  # standard deviation of the profile
MEMBRANE_LIGHT = (0.12, 0.55)  # weakest and strongest membrane
CYTOPLASM_LIGHT = (0.22, 0.48)
BACKGROUND_LIGHT = (0.14, 0.4)
NUCLEUS_LIGHT = -0.07
NUCLEUS_DEPTH_UM = 3.6
GRAIN_LIGHT = 0.24  # standard deviation of the texture before the blur
VESICLE_LIGHT = 5.0
VESICLE_BITS = 8  # one voxel in 2**8 of the inside of cells
BLUR_UM = (0.7, 0.42, 0.42)  # standard deviation of the optics along z, y, x
BLUR_REACH = 3.0  # in standard deviations
FADE = 0.5  # share of the light that is lost at the far end of z
SHADE = 0.45  # depth of the shading from side to side
PHOTONS = 250.0  # at full brightness
READ_NOISE = 0.012

# Streams of the hash: each property draws from its own. The waves of an axis take ten.
_JITTER, _RADIUS, _STRETCH, _BRIGHTNESS, _EMPTY = 0, 3, 4, 7, 8
_GRAIN, _PHOTONS = 20, 21
_GAPS, _WARP, _CONTRAST, _HAZE, _SHADE = 100, 200, 300, 400, 500


@dataclass(frozen=True)
class Tissue:
    """The tissue in a volume of `shape` (z, y, x) voxels of `voxel_um` micrometres.

    The shape decides only the numbers of the cells and the depth over which light fades.
    """

    seed: int
    shape: tuple[int, int, int]
    voxel_um: Triple

    @property
    def label_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds every cell's number."""
        largest = 2 * math.prod(_cubes(Region.of_shape(self.shape), self.voxel_um).shape)
        return np.dtype(np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)

    def render(self, region: Region) -> tuple[NDArray[np.uint8], NDArray[np.unsignedinteger]]:
        """Intensities and cell numbers (0 is background) of `region`, both (z, y, x)."""
        sigma = [b / v for b, v in zip(BLUR_UM, self.voxel_um, strict=True)]
        margin = [int(BLUR_REACH * s + 0.5) for s in sigma]
        grown = region.grow(margin, margin)
        cells = self._cells_near(grown)
        owner, gap, depth = self._partition(grown, cells)
        light = self._stain(grown, brightness=cells.brightness[owner], gap=gap, depth=depth)
        inner = region.relative_to(grown.start).slices
        light = ndimage.gaussian_filter(light, sigma, radius=margin, mode="nearest")[inner]
        return self._photograph(light, region), cells.number[owner[inner]]

    def _cells_near(self, region: Region) -> _Cells:
        """The cells that can reach `region`, in raster order of their sites."""
        near = _cubes(region, self.voxel_um)
        axes = [np.arange(a, b) for a, b in zip(near.start, near.stop, strict=True)]
        cube = np.stack(np.meshgrid(*axes, [0, 1], indexing="ij"), axis=-1).reshape(-1, 4)

        def draw(stream: int, low: float, high: float) -> NDArray[np.float64]:
            bits = _hash(self.seed, stream, cube[:, 0], cube[:, 1], 2 * cube[:, 2] + cube[:, 3])
            return np.asarray(low + (high - low) * (bits >> np.uint64(11)) / 2.0**53, np.float64)

        def draw_vectors(stream: int, low: float, high: float) -> NDArray[np.float64]:
            return np.stack([draw(stream + axis, low, high) for axis in range(3)], axis=-1)

        site = LATTICE_UM * (cube[:, :3] + 0.5 * cube[:, 3:])
        site += draw_vectors(_JITTER, -JITTER_UM, JITTER_UM)
        large_gap = _wave(self.seed, _GAPS, list(site.T), period_um=75.0) > EMPTY_WAVE
        kept = ~large_gap & (draw(_EMPTY, 0, 1) > EMPTY_SHARE)
        return _Cells(
            site=site[kept].astype(np.float32),
            stretch=draw_vectors(_STRETCH, *STRETCH)[kept].astype(np.float32),
            radius=draw(_RADIUS, *RADIUS_UM)[kept].astype(np.float32),
            brightness=np.append(0, draw(_BRIGHTNESS, *CYTOPLASM_LIGHT)[kept]).astype(np.float32),
            number=np.append(0, self._numbers(cube)[kept]).astype(self.label_dtype),
        )

    def _numbers(self, cube: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cell numbers by site, 1 for the first that can reach the volume."""
        whole = _cubes(Region.of_shape(self.shape), self.voxel_um)
        index = tuple((cube[:, :3] - np.array(whole.start)).T)
        # Sites outside `whole` reach only voxels outside the volume: any number will do.
        position = np.ravel_multi_index(index, whole.shape, mode="clip")
        return np.asarray(2 * position + cube[:, 3] + 1, np.int64)

    def _partition(self, region: Region, cells: _Cells) -> tuple[NDArray[np.int32], Field, Field]:
        """For each voxel its cell (1 is the first of `cells`, 0 background), its gap, its depth.

        The gap is how much farther the second nearest cell is, in micrometres: 0 on a face. The
        depth is how far the voxel lies below the surface that the cell would have alone.
        """
        places = self._places(region)
        warped = [
            (p + WARP_UM * _wave(self.seed, _WARP + 10 * a, places, period_um=32.0)).astype(
                np.float32
            )
            for a, p in enumerate(places)
        ]
        owner = np.zeros(region.shape, np.int32)
        best = np.full(region.shape, REACH_UM, np.float32)
        second = np.full(region.shape, 2 * REACH_UM, np.float32)
        for i, box in cells.boxes(region, self.voxel_um):
            offsets = [
                (w[box] - s) * f
                for w, s, f in zip(warped, cells.site[i], cells.stretch[i], strict=True)
            ]
            distance = np.sqrt(sum(o * o for o in offsets)) - cells.radius[i]
            best_here, second_here = best[box], second[box]
            np.minimum(second_here, np.maximum(best_here, distance), out=second_here)
            owner[box][distance < best_here] = i + 1
            np.minimum(best_here, distance, out=best_here)
        return owner, second - best, REACH_UM - best

    def _stain(self, region: Region, *, brightness: Field, gap: Field, depth: Field) -> Field:
        """Light that leaves each voxel before the optics, about 0 to 1."""
        places = self._places(region)
        bits = _hash(self.seed, _GRAIN, *_indices(region))
        inside = brightness > 0
        low, high = BACKGROUND_LIGHT
        haze = _wave(self.seed, _HAZE, places, period_um=40.0)
        light = np.where(inside, brightness, low + (high - low) * (0.5 + 0.7 * haze))
        light += NUCLEUS_LIGHT * np.clip(depth - NUCLEUS_DEPTH_UM, 0, 1)
        light += GRAIN_LIGHT * _normal(bits) * np.where(inside, 1.0, 0.6).astype(np.float32)
        in_cytoplasm = inside & (gap > 1.5) & (depth < NUCLEUS_DEPTH_UM + 0.5)
        light[in_cytoplasm & (bits >> np.uint64(64 - VESICLE_BITS) == 0)] += VESICLE_LIGHT
        weak, strong = MEMBRANE_LIGHT
        contrast = 0.5 + 0.9 * _wave(self.seed, _CONTRAST, places, period_um=26.0)
        contrast = weak + (strong - weak) * np.clip(contrast, 0, 1)
        light += contrast * np.exp(-((gap / np.float32(2 * MEMBRANE_UM)) ** 2) / 2)
        return light.astype(np.float32)

    def _photograph(self, light: Field, region: Region) -> NDArray[np.uint8]:
        """What the camera makes of `light`: shading, counted photons, read noise, 8 bits."""
        places = self._places(region)
        shading = 1 - SHADE * (0.5 + 0.5 * _wave(self.seed, _SHADE, places, period_um=110.0))
        depth_um = max(1, self.shape[0]) * self.voxel_um[0]
        seen = light * (shading * (1 - FADE * places[0] / depth_um)).astype(np.float32)
        noise = np.sqrt(np.clip(seen, 0, None) / PHOTONS + READ_NOISE**2)
        seen += noise * _normal(_hash(self.seed, _PHOTONS, *_indices(region)))
        return np.clip(np.rint(seen * 255), 0, 255).astype(np.uint8)

    def _places(self, region: Region) -> list[NDArray[np.float64]]:
        """Micrometres of the region's voxels along z, y, x, shaped to broadcast."""
        return [
            np.asarray(i * v, np.float64)
            for i, v in zip(_indices(region), self.voxel_um, strict=True)
        ]


@dataclass(frozen=True)
class _Cells:
    """Cells in micrometres; `brightness` and `number` start with an entry for the background."""

    site: Field
    stretch: Field
    radius: Field
    brightness: Field
    number: NDArray[np.unsignedinteger]

    def boxes(self, region: Region, voxel_um: Triple) -> Iterator[tuple[int, tuple[slice, ...]]]:
        """Each cell that can reach `region`, with the box of the region that it can reach."""
        reach = _largest_reach_um()
        for i, site in enumerate(self.site):
            box = Region(
                tuple(math.floor((s - reach) / v) for s, v in zip(site, voxel_um, strict=True)),
                tuple(math.ceil((s + reach) / v) + 1 for s, v in zip(site, voxel_um, strict=True)),
            ).intersect(region)
            if box.n_voxels:
                yield i, box.relative_to(region.start).slices


def _largest_reach_um() -> float:
    """How far from its site a cell's last voxel can be, along an axis."""
    return (REACH_UM + RADIUS_UM[1]) / STRETCH[0] + 2 * WARP_UM


def _cubes(region: Region, voxel_um: Triple) -> Region:
    """The cubes of the lattice whose cells can reach `region`."""
    reach = _largest_reach_um() + JITTER_UM
    return Region(
        tuple(
            math.floor((a * v - reach) / LATTICE_UM - 0.5)
            for a, v in zip(region.start, voxel_um, strict=True)
        ),
        tuple(
            math.ceil((b * v + reach) / LATTICE_UM) + 1
            for b, v in zip(region.stop, voxel_um, strict=True)
        ),
    )


def _indices(region: Region) -> list[NDArray[np.int64]]:
    """Voxel indices of the region along each axis, shaped to broadcast."""
    axes = [np.arange(a, b) for a, b in zip(region.start, region.stop, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def _wave(
    seed: int,
    stream: int,
    places: list[NDArray[np.float64]],
    *,
    period_um: float,
) -> Field:
    """A smooth field within ±2, mostly ±0.7: two products of cosines of different periods."""
    total: Field | None = None
    for term, period in enumerate((period_um, 1.55 * period_um)):
        product: Field | None = None
        for axis, place in enumerate(places):
            bits = _hash(seed, stream + 3 * term + axis, np.zeros(1, np.int64))
            phase = 2 * math.pi * int(bits[0]) / 2.0**64
            # A little faster along one axis than another, so that no lattice shows.
            rate = 2 * math.pi / period * (1 + 0.13 * ((axis + term) % 3 - 1))
            wave = np.cos(rate * place + phase).astype(np.float32)
            product = wave if product is None else product * wave
        assert product is not None
        total = product if total is None else total + product
    assert total is not None
    return total


def _hash(seed: int, stream: int, *keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each combination of the broadcast keys (the finaliser of splitmix64)."""
    bits = _mix(np.array([(seed * 1_000_003 + stream) & (2**64 - 1)], np.uint64))
    for key in keys:
        bits = _mix(bits + key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return bits


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def _normal(bits: NDArray[np.uint64]) -> Field:
    """Nearly normal numbers with mean 0 and variance 1: the sum of four 16-bit uniform ones."""
    parts = bits.view(np.uint16).reshape(*bits.shape, 4).astype(np.float32)
    total = parts[..., 0] + parts[..., 1] + parts[..., 2] + parts[..., 3]
    return (total - np.float32(2 * 65535)) * np.float32(math.sqrt(3) / 65536)
