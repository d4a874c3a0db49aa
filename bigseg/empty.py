"""Where the output is background, voxel by voxel: by mask, by intensity, by what is not stored.

Every rule is about voxels. That a block of which nothing is kept need not be read is only the
optimisation of it, so where the blocks lie cannot change a byte.

Masks and coarse levels belong to voxels by their extents, whatever their resolution. Along one
axis, n = 8 voxels and m = 3 of the mask, voxel i gets mask voxel floor((2i + 1) m / 2n), the one in
which its centre lies:

    volume   | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |
    mask     |    0     |    1    |    2     |

Offsets in the metadata are not used. Writers of pyramids disagree on them (half a voxel of the
coarse level, or none, for the same voxels), and masks drawn on an overview mostly carry none, while
both cover the field of view of the image. Everything is integer arithmetic, thus exact.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bigseg.blocks import Region
from bigseg.errors import InputError, UsageError
from bigseg.settings import Settings
from bigseg.units import format_um
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigseg.blocks import Vec
    from bigseg.volume import Volume

# What is kept of a region: all (True), nothing (False), or voxel by voxel (t, z, y, x).
Keep = NDArray[np.bool_] | bool
# A mask finer than the volume is read in parts of at most so many voxels.
MOST_VOXELS = 1 << 26
# Rounding on the way to a coarse level moves its end by less than one of its voxels.
TOLERANCE_VOX = 1.5


class EmptyRule(Settings):
    """What makes a voxel background; part of the plan. Where rules are combined, all must keep it.

    mask: channel 0 of the mask is 0 there. `mask_identity` is the hash of its metadata.
    skip_below: no channel that is read reaches `skip_below` there on level `skip_level`.
    """

    mask_url: str | None = None
    mask_level: Annotated[int, Field(ge=0)] = 0
    mask_identity: str | None = None
    skip_below: float | None = None
    skip_level: Annotated[int, Field(ge=0)] | None = None


def make_rule(
    source: Volume, *, mask: str | None, skip_below: float | None, skip_level: int | None
) -> EmptyRule | None:
    """The rule that the user asked for, checked against the volume; None without any.

    The mask is taken at its finest level, the intensity by default on the coarsest of the image.

    Raises:
        UsageError: `skip_below` is not finite, or `skip_level` is given alone or does not exist.
        InputError: the mask cannot be opened, or does not cover the same field of view.
    """
    if mask is None and skip_below is None and skip_level is None:
        return None
    picture = None if mask is None else open_volume(mask)
    if picture is not None:
        _check_fit(picture, source)
    return EmptyRule(
        mask_url=None if picture is None else picture.url,
        mask_identity=None if picture is None else identity_of(picture),
        skip_below=skip_below,
        skip_level=_choose_skip_level(source, skip_below, skip_level),
    )


def identity_of(volume: Volume) -> str:
    """A hash of the metadata of what is read, by which it is known again."""
    document = json.dumps(
        {
            "array": {
                key: value
                for key, value in volume.array.metadata.to_dict().items()
                if key != "attributes"
            },
            "level": volume.multiscale.levels[volume.level].path,
            "scale": volume.multiscale.levels[volume.level].scale,
        },
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(document.encode()).hexdigest()


class EmptySpace:
    """Answers for any region what a rule keeps of it; reads what lies under the region only.

    `source` is the image as stored, at the level that is segmented, and `channels` are those that
    are read of it.

    Raises:
        InputError: the mask cannot be opened, or is not the one that was planned with.
    """

    def __init__(self, rule: EmptyRule, source: Volume, channels: Sequence[int]) -> None:
        self._shape = source.shape
        self._layers: list[_Layer] = []
        if rule.mask_url is not None:
            mask = open_volume(rule.mask_url, level=rule.mask_level)
            _check_identity(mask, rule)
            self._layers.append(_Layer(mask, (0,), _is_marked))
        if rule.skip_below is not None:
            level = source.level if rule.skip_level is None else rule.skip_level
            is_kept = functools.partial(_reaches, value=rule.skip_below)
            self._layers.append(_Layer(source.at(level), tuple(channels), is_kept))

    def keep(self, region: Region) -> Keep:
        """What is kept of `region` (t, z, y, x), which must lie inside the volume.

        A boolean where that is all or nothing, else an array of the region's shape.
        """
        kept: Keep = True
        for layer in self._layers:
            kept = both(kept, layer.keep(region, self._shape))
            if kept is False:
                break
        return kept


def keep_of_absent(region: Region, absent: Sequence[Region]) -> Keep:
    """What is kept of `region` where the voxels of `absent` hold no data: all the others."""
    touching = [part for part in (a.intersect(region) for a in absent) if part.n_voxels]
    if not touching or not region.n_voxels:
        return True
    if any(part == region for part in touching):
        return False
    kept = np.ones(region.shape, np.bool_)
    for part in touching:
        kept[part.relative_to(region.start).slices] = False
    return _simplest(kept)


def both(first: Keep, second: Keep) -> Keep:
    """What two rules keep of one region: the voxels that each of them keeps."""
    if isinstance(first, bool):
        return second if first else False
    if isinstance(second, bool):
        return first if second else False
    return _simplest(first & second)


@dataclass(frozen=True)
class _Layer:
    """An image that covers the volume, and which of its voxels (c, ...) -> (...) are kept."""

    image: Volume
    channels: tuple[int, ...]
    is_kept: Callable[[NDArray[Any]], NDArray[np.bool_]]

    def keep(self, region: Region, shape: Vec) -> Keep:
        """What is kept of a region of a volume of `shape`."""
        axes = [
            _nearest(a, b, n, m)
            for a, b, n, m in zip(region.start, region.stop, shape, self.image.shape, strict=True)
        ]
        box = Region(tuple(int(i[0]) for i in axes), tuple(int(i[-1]) + 1 for i in axes))
        if box.n_voxels > MOST_VOXELS:
            return self._keep_by_halves(region, shape, axis=int(np.argmax(box.shape)))
        marks = self.is_kept(self.image.read(box, self.channels))
        return _spread(marks, [i - a for i, a in zip(axes, box.start, strict=True)])

    def _keep_by_halves(self, region: Region, shape: Vec, *, axis: int) -> Keep:
        middle = (region.start[axis] + region.stop[axis]) // 2
        stop = tuple(middle if i == axis else b for i, b in enumerate(region.stop))
        start = tuple(middle if i == axis else a for i, a in enumerate(region.start))
        halves = [Region(region.start, stop), Region(start, region.stop)]
        kept = [self.keep(half, shape) for half in halves]
        if kept[0] is kept[1]:
            return kept[0]
        whole = [np.broadcast_to(k, h.shape) for k, h in zip(kept, halves, strict=True)]
        return np.concatenate(whole, axis=axis)


def _nearest(start: int, stop: int, length: int, mask_length: int) -> NDArray[np.int64]:
    """For voxels [start, stop) of an axis the voxels of the mask in which their centres lie."""
    return (2 * np.arange(start, stop, dtype=np.int64) + 1) * mask_length // (2 * length)


def _spread(marks: NDArray[np.bool_], axes: Sequence[NDArray[np.int64]]) -> Keep:
    """`marks` at the positions of each axis; those needed are looked at before they are spread."""
    needed, positions = zip(*(np.unique(i, return_inverse=True) for i in axes), strict=True)
    kept = _simplest(marks[np.ix_(*needed)])
    if isinstance(kept, bool):
        return kept
    # From the last axis on: what is spread first is spread while the array is small.
    for axis in reversed(range(kept.ndim)):
        if len(positions[axis]) > kept.shape[axis]:
            kept = np.take(kept, positions[axis], axis=axis)
    return kept


def _simplest(kept: NDArray[np.bool_]) -> Keep:
    if kept.all():
        return True
    return kept if kept.any() else False


def _is_marked(data: NDArray[Any]) -> NDArray[np.bool_]:
    marked: NDArray[np.bool_] = data[0] != 0
    return marked


def _reaches(data: NDArray[Any], *, value: float) -> NDArray[np.bool_]:
    """Where at least one channel of (c, t, z, y, x) is `value` or more; NaN never is."""
    if data.dtype.kind == "f":
        # In the type of the data, so that what was stored as 0.7 reaches 0.7.
        with np.errstate(over="ignore"):
            limit = data.dtype.type(value)
    else:
        # An integer: 64-bit ones are compared exactly.
        limit = math.ceil(value)
        data = data.view(np.uint8) if data.dtype.kind == "b" else data
    reached: NDArray[np.bool_] = (data >= limit).any(axis=0)
    return reached


def _choose_skip_level(
    source: Volume, skip_below: float | None, skip_level: int | None
) -> int | None:
    if skip_below is None:
        if skip_level is not None:
            raise UsageError(
                f"--skip-level {skip_level} says where to look, not for what: "
                "add --skip-below VALUE, or leave it out"
            )
        return None
    if not math.isfinite(skip_below):
        raise UsageError(f"--skip-below {skip_below} is not a finite number: give an intensity")
    level = source.n_levels - 1 if skip_level is None else skip_level
    if not 0 <= level < source.n_levels:
        there = ", ".join(map(str, range(source.n_levels)))
        raise UsageError(
            f"--skip-level {level}: {source.url} has no such level, it has {there}: "
            "choose among those"
        )
    return level


def _check_identity(mask: Volume, rule: EmptyRule) -> None:
    if rule.mask_identity not in (None, identity_of(mask)):
        raise InputError(
            f"the mask {mask.url} is not the one that was planned with, its type, shape or voxel "
            "size changed: bring the old one back, or begin anew with --overwrite"
        )


def _check_fit(mask: Volume, source: Volume) -> None:
    if mask.shape[0] not in (1, source.shape[0]):
        raise InputError(
            f"the mask {mask.url} has {mask.shape[0]} time points, {source.url} has "
            f"{source.shape[0]}: give a mask with as many, or with one for all"
        )
    if mask.shape[1] > 1 and "z" not in source.spatial_axes:
        raise InputError(
            f"the mask {mask.url} has {mask.shape[1]} planes, {source.url} is a 2-D image: "
            "give a 2-D mask"
        )
    _check_extents(mask, source)


def _check_extents(mask: Volume, source: Volume) -> None:
    mask_um, source_um = _sizes_um(mask), _sizes_um(source)
    # One plane serves all, so its thickness says nothing.
    axes = [a for a in mask_um if a in source_um and (a != "z" or mask.shape[1] > 1)]
    n_mask, n_source = (dict(zip("tzyx", v.shape, strict=True)) for v in (mask, source))
    extents = [[n_mask[a] * mask_um[a] for a in axes], [n_source[a] * source_um[a] for a in axes]]
    allowed = [TOLERANCE_VOX * max(mask_um[a], source_um[a]) for a in axes]
    if any(abs(e - f) > most for e, f, most in zip(*extents, allowed, strict=True)):
        raise InputError(
            f"the mask {mask.url} covers {format_um(extents[0])} along {', '.join(axes)}, level "
            f"{source.level} of {source.url} covers {format_um(extents[1])}: they must show the "
            "same field of view; give another mask, or correct its voxel size"
        )


def _sizes_um(volume: Volume) -> dict[str, float]:
    """Voxel size of each spatial axis in micrometer; empty without units of length."""
    return dict(zip(volume.spatial_axes, volume.voxel_um or (), strict=volume.voxel_um is not None))
