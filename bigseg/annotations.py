"""An image with its labels, seen as what the network learns: the target of any region.

    labels on disk ──read with a margin──> classes, or background, inside, border ──crop──> target

Targets that are derived from instance labels depend on neighbouring voxels, so they are computed
with a margin: the target of a voxel is the same whatever region it is read with. It knows neither
patches nor networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import BlockGrid, Region, Vec, round_up
from bigseg.errors import InputError
from bigseg.targets import IGNORE, boundary, boundary_margin_vox, semantic
from bigseg.volume import Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bigseg.config import TrainConfig

MAX_CLASSES = 256
BLOCK_VOXELS = 1 << 22


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

    def count_annotated(self, region: Region) -> tuple[int, int]:
        """Voxels of the region that are annotated, and those of them that belong to an object."""
        n_annotated = n_objects = 0
        for block in self.blocks(region):
            labels = self.read_labels(block)
            annotated = labels != self.config.ignore
            n_annotated += int(np.count_nonzero(annotated))
            n_objects += int(np.count_nonzero(annotated & (labels != 0)))
        return n_annotated, n_objects

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
