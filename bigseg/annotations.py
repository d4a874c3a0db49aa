"""An image with its labels, seen as what the network learns: the target of any region.

    labels on disk ──read with a margin──> classes, or background, inside, border ──crop──> target
                                      └──> closeness to two objects, where the loss asks for it

Targets that are derived from instance labels depend on neighbouring voxels, so they are computed
with a margin: the target of a voxel is the same whatever region it is read with. It knows neither
patches nor networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import BlockGrid, Region, Vec, parse_region, round_up
from bigseg.errors import ConfigError, InputError, UsageError
from bigseg.targets import IGNORE, boundary, boundary_margin_vox, semantic
from bigseg.volume import Volume, open_volume
from bigseg.weightmap import closeness, closeness_margin_vox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.config import TrainConfig

MAX_CLASSES = 256
BLOCK_VOXELS = 1 << 22
HELD_OUT = 0.2
VALIDATION_VOXELS = 1 << 22
BORDER_VOX = 2.0
SIGMA_VOX = 5.0  # as in the U-Net paper


@dataclass(frozen=True)
class Annotated:
    """A volume, its labels at the same level, and how they become targets."""

    image: Volume
    labels: Volume
    config: TrainConfig

    @property
    def voxel_size(self) -> tuple[float, float, float]:
        """Voxel size along z, y, x: micrometers where the image says so, else its own units."""
        size = self.image.voxel_um or self.image.scale[1:]
        return tuple((1.0, *size)[-3:])  # type: ignore[return-value]

    def target(self, region: Region, *, dims: int, n_classes: int) -> NDArray[np.int16]:
        """Classes (t, z, y, x) of any region; IGNORE where not annotated or outside the volume.

        A 2-D network's targets are those of each plane by itself.

        Raises:
            InputError: the labels hold values that the task does not allow.
        """
        target = np.full(region.shape, IGNORE, np.int16)
        inside = region.intersect(Region.of_shape(self.image.shape))
        if inside.n_voxels:
            target[inside.relative_to(region.start).slices] = self._classes(inside, dims, n_classes)
        return target

    def closeness(self, region: Region, *, dims: int) -> NDArray[np.int16]:
        """How close the voxels (t, z, y, x) of any region lie to two objects; see weightmap.py.

        0 outside the volume.
        """
        found = np.zeros(region.shape, np.int16)
        inside = region.intersect(Region.of_shape(self.image.shape))
        if inside.n_voxels:
            found[inside.relative_to(region.start).slices] = self._closeness(inside, dims)
        return found

    def blocks(self, region: Region) -> Iterator[Region]:
        """The region in pieces of whole chunks, about `BLOCK_VOXELS` each."""
        return (block.core for block in BlockGrid(region, _block_shape(self.labels)))

    def read_labels(self, region: Region) -> NDArray[Any]:
        """The labels as they are stored (t, z, y, x); the region lies inside the volume."""
        labels: NDArray[Any] = self.labels.read(region)[0]
        return labels

    def objects(self, region: Region, *, dims: int) -> NDArray[np.int64]:
        """The true objects (t, z, y, x) of a region of labels, numbered from 1; 0 is background.

        IGNORE where not annotated. Where the network sees planes, objects end with their plane.
        """
        labels = self.read_labels(region)
        found = np.zeros(labels.shape, np.int64)
        stacks = zip(
            labels.reshape(-1, *labels.shape[-dims:]),
            found.reshape(-1, *labels.shape[-dims:]),
            strict=True,
        )
        n_objects = 0
        for stack, into in stacks:
            values, numbers = np.unique(stack, return_inverse=True)
            is_object = (values != 0) & (values != self.config.ignore)
            new = np.where(is_object, np.cumsum(is_object) + n_objects, 0)
            new[values == self.config.ignore] = IGNORE
            into[:] = new[numbers.reshape(stack.shape)]
            n_objects += int(np.count_nonzero(is_object))
        return found

    def count_labels(self, region: Region) -> NDArray[np.int64]:
        """Voxels of each label value below `MAX_CLASSES` in the region; not of `ignore`.

        Raises:
            InputError: there are higher or negative values: these are not classes.
        """
        counts = np.zeros(MAX_CLASSES, np.int64)
        for block in self.blocks(region):
            values = self.read_labels(block).ravel()
            if self.config.ignore is not None:
                values = values[values != self.config.ignore]
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < MAX_CLASSES:
                raise InputError(
                    f"labels {self.config.labels!r} of {self.image.url} have values from "
                    f"{values.min()} to {values.max()}, but classes are numbered 0 to "
                    f"{MAX_CLASSES - 1}: for numbered objects use `task: instances`, for voxels "
                    "without annotation set `ignore`"
                )
            counts += np.bincount(values.astype(np.int64), minlength=MAX_CLASSES)
        return counts

    def count_annotated(self, region: Region) -> NDArray[np.int64]:
        """Voxels of the region that are annotated, and those of them that belong to an object."""
        counts = np.zeros(2, np.int64)
        for block in self.blocks(region):
            labels = self.read_labels(block)
            annotated = labels != self.config.ignore
            counts += np.count_nonzero(annotated), np.count_nonzero(annotated & (labels != 0))
        return counts

    def count_classes(self, region: Region, *, dims: int, n_classes: int) -> NDArray[np.int64]:
        """Voxels of each target class in the region."""
        counts = np.zeros(n_classes, np.int64)
        for block in self.blocks(region):
            target = self.target(block, dims=dims, n_classes=n_classes)
            counts += np.bincount(target[target != IGNORE], minlength=n_classes)
        return counts

    def _classes(self, region: Region, dims: int, n_classes: int) -> NDArray[Any]:
        if self.config.task == "semantic":
            try:
                return semantic(
                    self.read_labels(region), n_classes=n_classes, ignore=self.config.ignore
                )
            except InputError as error:
                raise InputError(f"{self.labels.url}: {error}") from None
        return self._boundaries(region, dims)

    def _boundaries(self, region: Region, dims: int) -> NDArray[Any]:
        size = self.voxel_size[-dims:]
        border_vox = _in_voxels(self.config.border_um, size, default=BORDER_VOX)

        def classes(labels: NDArray[Any]) -> NDArray[Any]:
            return boundary(
                labels, border_vox=border_vox, voxel_size=size, ignore=self.config.ignore
            )

        try:
            return self._derived(region, classes, boundary_margin_vox(border_vox, size))
        except InputError as error:
            raise InputError(f"{self.labels.url}: {error}") from None

    def _closeness(self, region: Region, dims: int) -> NDArray[Any]:
        rule = self.config.loss.weight_map
        assert rule is not None
        size = self.voxel_size[-dims:]
        sigma_vox = _in_voxels(rule.sigma_um, size, default=SIGMA_VOX)

        def close(labels: NDArray[Any]) -> NDArray[Any]:
            return closeness(
                labels, sigma_vox=sigma_vox, voxel_size=size, ignore=self.config.ignore
            )

        return self._derived(region, close, closeness_margin_vox(sigma_vox, size))

    def _derived(
        self, region: Region, derive: Callable[[NDArray[Any]], NDArray[Any]], margin: Vec
    ) -> NDArray[Any]:
        """What `derive` makes of the labels, of each (z,) y, x by itself, with a margin of them."""
        dims = len(margin)
        around = (0,) * (4 - dims) + margin
        grown = region.grow(around, around).intersect(Region.of_shape(self.image.shape))
        labels = self.read_labels(grown)
        stack = labels.reshape(-1, *labels.shape[-dims:])
        whole: NDArray[Any] = np.stack([derive(one) for one in stack]).reshape(labels.shape)
        return whole[region.relative_to(grown.start).slices]


def open_annotated(url: str, config: TrainConfig) -> Annotated:
    """The image at `url` with the labels and at the level that `config` names.

    Raises:
        InputError: the image, level or labels cannot be used, or their extents differ.
    """
    image = open_volume(url, level=config.level)
    labels = image.label(config.labels)
    if labels.shape != image.shape:
        raise InputError(
            f"labels {config.labels!r} of {url} have {labels.shape} voxels (t, z, y, x), the image "
            f"has {image.shape} at level {config.level}: choose a level that both have, or write "
            "labels of the image's extent"
        )
    if labels.dtype.kind not in "biu":
        raise InputError(
            f"labels {config.labels!r} of {url} are of type {labels.dtype}, but labels are "
            "integers: convert them"
        )
    return Annotated(image, labels, config)


def split(annotated: Annotated) -> tuple[Region, Region]:
    """The regions to learn from and to validate on, along t, z, y, x.

    Without `val_region` the last fifth of the region's planes is held out; of its rows, where it
    has fewer than five planes. A `val_region` inside the region is left out of it when patches are
    read. With `val_images` nothing else is held out.

    Raises:
        ConfigError: regions, time point or channels that the image does not have.
    """
    config = annotated.config
    _check_place(annotated, config)
    train = _place(annotated, config.region, config)
    if config.val_images:
        return train, _nowhere(train)
    if config.val_region is not None:
        return train, _place(annotated, config.val_region, config)
    axis = 1 if train.shape[1] >= 5 else 2
    n_held = max(1, round(HELD_OUT * train.shape[axis]))
    cut = train.stop[axis] - n_held
    if cut <= train.start[axis]:
        raise ConfigError(
            f"the region {train} (t, z, y, x) of {annotated.image.url} is too small to hold a part "
            "out for validation: give val_region, or val_images"
        )
    return (
        Region(train.start, (*train.stop[:axis], cut, *train.stop[axis + 1 :])),
        Region((*train.start[:axis], cut, *train.start[axis + 1 :]), train.stop),
    )


def held_out(annotated: Annotated) -> tuple[Region, Region]:
    """The same of an image that is validated on whole: it is learned nowhere.

    Raises:
        ConfigError: a time point or channels that the image does not have.
    """
    _check_place(annotated, annotated.config)
    val = _place(annotated, None, annotated.config)
    return _nowhere(val), val


def judged(regions: Sequence[Region]) -> list[Region]:
    """What validation looks at of the held-out regions of all images; empty ones stay empty.

    All of it where that is at most `VALIDATION_VOXELS`; else the `middle` of those that have more
    than an equal share of what is left for them.
    """
    parts = list(regions)
    left, n_left = VALIDATION_VOXELS, sum(1 for region in regions if region.n_voxels)
    for i in sorted(range(len(parts)), key=lambda i: parts[i].n_voxels):
        if parts[i].n_voxels:
            parts[i] = middle(parts[i], at_most=max(1, left // n_left))
            left, n_left = left - parts[i].n_voxels, n_left - 1
    return parts


def middle(region: Region, *, at_most: int) -> Region:
    """The middle of a region: its longest axes are cut until it has `at_most` voxels."""
    shape = list(region.shape)
    while math.prod(shape) > at_most:
        longest = max(range(len(shape)), key=lambda axis: shape[axis])
        others = math.prod(shape) // shape[longest]
        second = max((n for axis, n in enumerate(shape) if axis != longest), default=1)
        fitting = max(1, at_most // others)
        shape[longest] = max(fitting, min(second, shape[longest] - 1))
    start = tuple(
        a + (n - s) // 2 for a, n, s in zip(region.start, region.shape, shape, strict=True)
    )
    return Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))


def _nowhere(region: Region) -> Region:
    return Region(region.start, region.start)


def _in_voxels(length: float | None, voxel_size: Sequence[float], *, default: float) -> float:
    """A length in the unit of `voxel_size` as voxels of the finest axis."""
    return default if length is None else length / min(voxel_size)


def _check_place(annotated: Annotated, config: TrainConfig) -> None:
    image = annotated.image
    if config.time is not None and config.time >= image.shape[0]:
        raise ConfigError(
            f"time: {config.time} is not in {image.url}, which has the time points 0 to "
            f"{image.shape[0] - 1}: give one of those"
        )
    if missing := [c for c in config.channels if c >= image.n_channels]:
        raise ConfigError(
            f"channels: {missing[0]} is not in {image.url}, which has the channels 0 to "
            f"{image.n_channels - 1}: give some of those"
        )


def _place(annotated: Annotated, text: str | None, config: TrainConfig) -> Region:
    image = annotated.image
    n_spatial = len(image.spatial_axes)
    shape = image.shape[-n_spatial:]
    try:
        spatial = Region.of_shape(shape) if text is None else parse_region(text, shape)
    except UsageError as error:
        raise ConfigError(f"{image.url}: {error}") from None
    first, last = (0, image.shape[0]) if config.time is None else (config.time, config.time + 1)
    fill = 3 - n_spatial
    return Region((first, *(0,) * fill, *spatial.start), (last, *(1,) * fill, *spatial.stop))


def _block_shape(volume: Volume) -> Vec:
    """Whole chunks, longest along x, about `BLOCK_VOXELS` in all."""
    shape = list(volume.chunk_shape)
    left = max(1, BLOCK_VOXELS // int(np.prod(shape)))
    for axis in (3, 2, 1, 0):
        chunk = volume.chunk_shape[axis]
        n = min(left, round_up(volume.shape[axis], chunk) // chunk)
        shape[axis] = n * chunk
        left = max(1, left // n)
    return tuple(shape)
