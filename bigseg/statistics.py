"""Normalisation constants of a volume, by a Dask computation on a stated level.

The constants come from the whole volume, never from a block: a statistic of a block would make the
result depend on where the blocks lie (Buglakova et al., ICCV 2025, arXiv 2503.19545).

A voxel that is not finite (NaN, inf, or beyond float32) has one meaning everywhere: the network
sees the offset in its place, and no statistic counts it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import dask
import numpy as np

from bigseg.blocks import BlockGrid, Region, ceil_div
from bigseg.config import NormConstants, NormRule
from bigseg.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Vec

logger = logging.getLogger(__name__)

ENOUGH_VOXELS = 1 << 20
MOST_VOXELS = 1 << 27
READ_VOXELS = 1 << 20, 1 << 24
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)
N_BINS = 1 << 16


def normalise(data: NDArray[Any], constants: NormConstants) -> NDArray[np.float32]:
    """(data - offset) / scale for each channel; data is (c, t, z, y, x) of any real dtype.

    Values that are not finite become 0, the offset: one NaN would spread over the whole halo.
    """
    shape = (-1,) + (1,) * (data.ndim - 1)
    # Offsets are subtracted before the multiplication, in float32, as the network sees them.
    offset = np.asarray(constants.offset, np.float32).reshape(shape)
    factor = (1.0 / np.asarray(constants.scale, np.float64)).astype(np.float32).reshape(shape)
    # A value beyond float32 becomes infinite, and so the offset.
    with np.errstate(over="ignore"):
        result = data.astype(np.float32)
        result -= offset
        result *= factor
    if data.dtype.kind == "f":
        result[~np.isfinite(result)] = 0
    return result


class Measurable(Protocol):
    """What is measured of a volume, or of a transformed one; see `Volume` for each."""

    @property
    def url(self) -> str: ...  # noqa: D102
    @property
    def level(self) -> int: ...  # noqa: D102
    @property
    def n_levels(self) -> int: ...  # noqa: D102
    @property
    def shape(self) -> Vec: ...  # noqa: D102
    @property
    def dtype(self) -> np.dtype[Any]: ...  # noqa: D102
    @property
    def chunk_shape(self) -> Vec: ...  # noqa: D102
    @property
    def write_unit(self) -> Vec: ...  # noqa: D102
    def at(self, level: int) -> Measurable: ...  # noqa: D102
    def read(self, region: Region, channels: Sequence[int]) -> NDArray[Any]: ...  # noqa: D102


def norm_constants(volume: Measurable, rule: NormRule, channels: Sequence[int]) -> NormConstants:
    """What `rule` gives for these channels of the volume.

    Measured on the coarsest level that still has 2^20 voxels (never finer than the volume's own);
    where that level has more than 2^27, on every k-th of its blocks, k as small as that allows.
    Percentiles are exact for integers of up to 16 bits, else to 1/65536 of the range. Values that
    are not finite are left out, and a warning says how many there are.

    Raises:
        InputError: the volume is constant, has no finite value, or a range beyond float32.
        BadChunkError: a chunk that is measured cannot be decoded.
    """
    if rule.kind == "fixed":
        n = len(channels)
        return NormConstants(offset=(rule.offset,) * n, scale=(rule.scale,) * n)
    measured = _statistics_level(volume)
    histograms = [_histogram(measured, channel) for channel in channels]
    pairs = [_constants_of(h, rule, volume, c) for h, c in zip(histograms, channels, strict=True)]
    return NormConstants(
        offset=tuple(offset for offset, _ in pairs),
        scale=tuple(scale for _, scale in pairs),
        level=measured.level,
        n_voxels=int(histograms[0].counts.sum()),
    )


def _statistics_level(volume: Measurable) -> Measurable:
    best = volume
    for level in range(volume.level + 1, volume.n_levels):
        candidate = volume.at(level)
        if np.prod(candidate.shape) < ENOUGH_VOXELS:
            break
        best = candidate
    return best


@dataclass(frozen=True)
class _Histogram:
    """Counts of values; bin i stands for the value `centres[i]`."""

    centres: NDArray[np.float64]
    counts: NDArray[np.int64]


def _histogram(volume: Measurable, channel: int) -> _Histogram:
    regions = _sampled_regions(volume)
    low, high = _range_of(volume, channel, regions)
    exact = volume.dtype.kind in "biu" and high - low < N_BINS
    n_bins = int(high - low) + 1 if exact else N_BINS
    count = dask.delayed(_count_exactly if exact else _count_in_bins)
    parts = dask.compute(*[count(volume, r, channel, low, high, n_bins) for r in regions])
    counts: NDArray[np.int64] = np.stack(parts).sum(axis=0)
    step = 1.0 if exact else (high - low) / n_bins
    centres = low + step * (np.arange(n_bins, dtype=np.float64) + (0.0 if exact else 0.5))
    return _Histogram(centres, counts)


def _sampled_regions(volume: Measurable) -> list[Region]:
    """Every k-th block of the volume, in a time and memory that do not grow with it."""
    grid = BlockGrid(Region.of_shape(volume.shape), _block_to_read(volume))
    every = ceil_div(math.prod(volume.shape), MOST_VOXELS)
    # A step that shares a factor with the number of blocks along an axis would visit the same
    # planes again and again, for example only those at the border.
    while any(math.gcd(every, n) > 1 for n in grid.shape):
        every += 1
    return [grid[i].core for i in range(0, len(grid), every)]


def _block_to_read(volume: Measurable) -> Vec:
    """Whole write units, or chunks where those are large, enough of them for one task."""
    least, most = READ_VOXELS
    unit = volume.write_unit
    block = list(unit if math.prod(unit) <= most else volume.chunk_shape)
    while math.prod(block) < least:
        open_axes = [i for i, n in enumerate(volume.shape) if block[i] < n]
        if not open_axes:
            break
        block[min(open_axes, key=lambda i: block[i])] *= 2
    return tuple(block)


def _range_of(volume: Measurable, channel: int, regions: list[Region]) -> tuple[float, float]:
    """Smallest and largest finite value; of integers exact, and what a narrow type can hold.

    Raises:
        InputError: there is no finite value, or the range is beyond float32.
    """
    dtype = volume.dtype
    if dtype.kind == "b" or (dtype.kind in "ui" and dtype.itemsize <= 2):
        info = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
        return info.min, info.max
    extremes = dask.delayed(_extremes)
    found = dask.compute(*[extremes(volume, region, channel) for region in regions])
    low, high = min(e.low for e in found), max(e.high for e in found)
    n_not_finite, n_voxels = sum(e.n_not_finite for e in found), sum(r.n_voxels for r in regions)
    if n_not_finite == n_voxels:
        raise InputError(
            f"channel {channel} of {volume.url} has no finite value in the {n_voxels} voxels of "
            f"level {volume.level} that are measured: check the channel and the level, or copy the "
            "image again"
        )
    if n_not_finite:
        logger.warning(
            "channel %d of %s: %d of the %d voxels of level %d that are measured are not finite "
            "(NaN or infinite); the network sees the offset in their place",
            *(channel, volume.url, n_not_finite, n_voxels, volume.level),
        )
    if high - low > FLOAT32_MAX or max(-low, high) > FLOAT32_MAX:
        raise InputError(
            f"channel {channel} of {volume.url} has values from {low:g} to {high:g}, beyond what "
            "float32 holds: rescale the image"
        )
    return low, high


@dataclass(frozen=True)
class _Extremes:
    low: float
    high: float
    n_not_finite: int


def _extremes(volume: Measurable, region: Region, channel: int) -> _Extremes:
    values = volume.read(region, [channel])
    if values.dtype.kind in "iu":
        return _Extremes(int(values.min()), int(values.max()), 0)
    finite = values[np.isfinite(values)]
    ends = (float(finite.min()), float(finite.max())) if finite.size else (math.inf, -math.inf)
    return _Extremes(*ends, values.size - finite.size)


def _count_exactly(
    volume: Measurable, region: Region, channel: int, low: int, high: int, n_bins: int
) -> NDArray[np.int64]:
    """Counts of each integer from `low` to `high`."""
    del high
    values = volume.read(region, [channel]).ravel()
    if values.dtype.itemsize < 8:
        values = values.astype(np.int64)
    # 64-bit values are subtracted in their own type: none is below `low`, and uint64 holds more
    # than int64.
    return np.bincount((values - values.dtype.type(low)).astype(np.int64), minlength=n_bins)


def _count_in_bins(
    volume: Measurable, region: Region, channel: int, low: float, high: float, n_bins: int
) -> NDArray[np.int64]:
    """Counts of finite values in equal bins from `low` to `high`."""
    values = volume.read(region, [channel]).ravel().astype(np.float64)
    values = values[np.isfinite(values)]
    per_value = n_bins / (high - low) if high > low else 0.0
    bins = ((values - low) * per_value).astype(np.int64)
    return np.bincount(bins.clip(max=n_bins - 1), minlength=n_bins)


def _constants_of(
    histogram: _Histogram, rule: NormRule, volume: Measurable, channel: int
) -> tuple[float, float]:
    present = histogram.counts > 0
    values, counts = histogram.centres[present], histogram.counts[present]
    if len(values) < 2:
        raise InputError(
            f"channel {channel} of {volume.url} has the same value ({values[0]:g}) everywhere, so "
            "that there is no contrast to normalise: check the channel, level and time point, or "
            "take the constants of the model (segment with --norm model)"
        )
    offset, scale = _offset_and_scale(values, counts, rule)
    # Its inverse must be a float32.
    if scale < FLOAT32_TINY:
        raise InputError(
            f"channel {channel} of {volume.url} has values from {values[0]:g} to {values[-1]:g}, "
            "which float32 does not tell apart: rescale the image"
        )
    return offset, scale


def _offset_and_scale(
    values: NDArray[np.float64], counts: NDArray[np.int64], rule: NormRule
) -> tuple[float, float]:
    if rule.kind == "meanstd":
        mean = float(np.average(values, weights=counts))
        return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    cumulative = np.cumsum(counts)
    targets = np.array([rule.low, rule.high]) / 100 * cumulative[-1]
    low, high = values[np.searchsorted(cumulative, targets).clip(max=len(values) - 1)]
    if high > low:
        return float(low), float(high - low)
    # Nearly all voxels have one value, such as the background: then the extreme farthest from it
    # counts.
    return float(low), float(max(values[-1] - low, low - values[0]))
