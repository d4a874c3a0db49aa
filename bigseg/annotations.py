"""An image with its labels, seen as what the network learns: the target of any region.

    labels on disk ──read with a margin──> classes, or background, inside, border ──crop──> target

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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bigseg.config import TrainConfig

MAX_CLASSES = 256
BLOCK_VOXELS = 1 << 22
HELD_OUT = 0.2
VALIDATION_VOXELS = 1 << 22


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

    def blocks(self, region: Region) -> Iterator[Region]:
        """The region in pieces of whole chunks, about `BLOCK_VOXELS` each."""
        return (block.core for block in BlockGrid(region, _block_shape(self.labels)))

    def read_labels(self, region: Region) -> NDArray[Any]:
        """The labels as they are stored (t, z, y, x); the region lies inside the volume."""
        labels: NDArray[Any] = self.labels.read(region)[0]
        return labels

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
                    f"{MAX_CLASSES - 1}: for numbered objects use `task: boundary`, for voxels "
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
        margin = (0,) * (4 - dims) + boundary_margin_vox(self.config.border_vox, size)
        grown = region.grow(margin, margin).intersect(Region.of_shape(self.image.shape))
        labels = self.read_labels(grown)
        stack = labels.reshape(-1, *labels.shape[-dims:])
        try:
            classes = [
                boundary(
                    one,
                    border_vox=self.config.border_vox,
                    voxel_size=size,
                    ignore=self.config.ignore,
                )
                for one in stack
            ]
        except InputError as error:
            raise InputError(f"{self.labels.url}: {error}") from None
        whole: NDArray[Any] = np.stack(classes).reshape(labels.shape)
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
    read.

    Raises:
        ConfigError: regions, time point or channels that the image does not have.
    """
    config = annotated.config
    _check_place(annotated, config)
    train = _place(annotated, config.region, config)
    if config.val_region is not None:
        return train, _place(annotated, config.val_region, config)
    axis = 1 if train.shape[1] >= 5 else 2
    n_held = max(1, round(HELD_OUT * train.shape[axis]))
    cut = train.stop[axis] - n_held
    if cut <= train.start[axis]:
        raise ConfigError(
            f"the region {train} (t, z, y, x) of {annotated.image.url} is too small to hold a part "
            "out for validation: give val_region"
        )
    return (
        Region(train.start, (*train.stop[:axis], cut, *train.stop[axis + 1 :])),
        Region((*train.start[:axis], cut, *train.start[axis + 1 :]), train.stop),
    )


def middle(region: Region, *, n_images: int = 1) -> Region:
    """The middle of a held-out region, which is what validation looks at.

    Its longest axes are cut until it has at most `VALIDATION_VOXELS` / `n_images` voxels.
    """
    budget = max(1, VALIDATION_VOXELS // n_images)
    shape = list(region.shape)
    while math.prod(shape) > budget:
        longest = max(range(len(shape)), key=lambda axis: shape[axis])
        others = math.prod(shape) // shape[longest]
        second = max((n for axis, n in enumerate(shape) if axis != longest), default=1)
        fitting = max(1, budget // others)
        shape[longest] = max(fitting, min(second, shape[longest] - 1))
    start = tuple(
        a + (n - s) // 2 for a, n, s in zip(region.start, region.shape, shape, strict=True)
    )
    return Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))


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
