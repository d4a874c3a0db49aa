"""Normalisation constants of a volume, by a Dask computation on a stated level.

The constants come from the whole volume, never from a block: a statistic of a block would make the
result depend on where the blocks lie (Buglakova et al., ICCV 2025, arXiv 2503.19545).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dask
import numpy as np

from bigseg.config import NormConstants, NormRule
from bigseg.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigseg.volume import Volume

ENOUGH_VOXELS = 1 << 20
MOST_VOXELS = 1 << 27
N_BINS = 1 << 16


def normalise(data: NDArray[Any], constants: NormConstants) -> NDArray[np.float32]:
    """(data - offset) / scale for each channel; data is (c, t, z, y, x) of any real dtype."""
    shape = (-1,) + (1,) * (data.ndim - 1)
    # Offsets are subtracted before the multiplication, in float32, as the network sees them.
    offset = np.asarray(constants.offset, np.float32).reshape(shape)
    factor = (1.0 / np.asarray(constants.scale, np.float64)).astype(np.float32).reshape(shape)
    result = data.astype(np.float32)
    result -= offset
    result *= factor
    return result


def norm_constants(volume: Volume, rule: NormRule, channels: Sequence[int]) -> NormConstants:
    """What `rule` gives for these channels of the volume.

    Measured on the coarsest level that still has 2^20 voxels (never finer than the volume's own);
    where that level has more than 2^27, on every k-th of its chunks, k as small as that allows.
    Percentiles are exact for integers of up to 16 bits, else to 1/65536 of the range. Values that
    are not finite are left out.

    Raises:
        InputError: the volume is constant or has no finite value.
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


def _statistics_level(volume: Volume) -> Volume:
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


def _histogram(volume: Volume, channel: int) -> _Histogram:
    blocks = _sampled_blocks(volume, channel)
    low, high = _range_of(volume.dtype, blocks)
    if not low <= high:
        raise InputError(
            f"{volume.url} has no finite value in channel {channel}: there is nothing to normalise"
        )
    exact = volume.dtype.kind in "biu" and high - low < N_BINS
    n_bins = int(high - low) + 1 if exact else N_BINS
    count = dask.delayed(_count, pure=True)
    parts = dask.compute(*[count(block, low, high, n_bins, exact) for block in blocks])
    counts: NDArray[np.int64] = np.stack(parts).sum(axis=0)
    step = 1.0 if exact else (high - low) / n_bins
    centres = low + step * (np.arange(n_bins, dtype=np.float64) + (0.0 if exact else 0.5))
    return _Histogram(centres, counts)


def _sampled_blocks(volume: Volume, channel: int) -> list[Any]:
    blocks: list[Any] = volume.dask(channels=[channel]).to_delayed().ravel().tolist()
    every = max(1, -(-int(np.prod(volume.shape)) // MOST_VOXELS))
    return blocks[::every]


def _range_of(dtype: np.dtype[Any], blocks: list[Any]) -> tuple[float, float]:
    if dtype.kind == "b" or (dtype.kind in "ui" and dtype.itemsize <= 2):
        info = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
        return float(info.min), float(info.max)
    extremes = dask.delayed(_extremes, pure=True)
    pairs = dask.compute(*[extremes(block) for block in blocks])
    return min(p[0] for p in pairs), max(p[1] for p in pairs)


def _extremes(block: NDArray[Any]) -> tuple[float, float]:
    finite = block[np.isfinite(block)] if block.dtype.kind == "f" else block
    return (float(finite.min()), float(finite.max())) if finite.size else (np.inf, -np.inf)


def _count(
    block: NDArray[Any], low: float, high: float, n_bins: int, exact: bool
) -> NDArray[np.int64]:
    values = block.ravel()
    if exact:
        return np.bincount(values.astype(np.int64) - int(low), minlength=n_bins)
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if high == low:
        counts = np.zeros(n_bins, np.int64)
        counts[0] = values.size
        return counts
    return np.histogram(values.astype(np.float64), bins=n_bins, range=(low, high))[0]


def _constants_of(
    histogram: _Histogram, rule: NormRule, volume: Volume, channel: int
) -> tuple[float, float]:
    present = histogram.counts > 0
    values, counts = histogram.centres[present], histogram.counts[present]
    if len(values) < 2:
        raise InputError(
            f"channel {channel} of {volume.url} has the same value ({values[0]:g}) everywhere: "
            "there is no contrast to normalise; check the channel, level and time point"
        )
    if rule.kind == "meanstd":
        mean = float(np.average(values, weights=counts))
        return mean, float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
    cumulative = np.cumsum(counts)
    targets = np.array([rule.low, rule.high]) / 100 * cumulative[-1]
    low, high = values[np.searchsorted(cumulative, targets).clip(max=len(values) - 1)]
    # An image that is mostly background can have both percentiles in it: then the range counts.
    return (float(low), float(high - low)) if high > low else (float(low), float(values[-1] - low))
