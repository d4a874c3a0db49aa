"""What the annotated images of a training run have in common: axes, voxel size, classes.

It looks at metadata and counts labels; it decides nothing about the network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from bigseg.annotations import Annotated, held_out, judged, open_annotated, split
from bigseg.errors import ConfigError, InputError
from bigseg.losses import balanced_weights
from bigseg.targets import class_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.config import TrainConfig

logger = logging.getLogger(__name__)

DEEP_ENOUGH = 32
FLATTEST = 3.0
MOST_LIKELY_CLASSES = 20

_Regions = tuple["Region", "Region"]


@dataclass(frozen=True)
class Survey:
    """The images, where each is learned and validated (t, z, y, x), and what they agree on.

    Images that are validated on whole come last. A region is empty where there is nothing of it.
    `voxel_size` is along the `dims` last axes, in micrometers where the images say so;
    `n_learned` are the annotated voxels to learn from in each image.
    """

    images: tuple[Annotated, ...]
    regions: tuple[tuple[Region, Region], ...]
    dims: Literal[2, 3]
    voxel_size: tuple[float, ...]
    voxel_um: tuple[float, ...] | None
    classes: tuple[str, ...]
    n_learned: tuple[int, ...]

    def class_weights(self) -> tuple[float, ...]:
        """Weights of the classes by their share of the voxels to learn from; counts them."""
        counts = np.zeros(len(self.classes), np.int64)
        for image, (train, val) in zip(self.images, self.regions, strict=True):
            counts += _learned(self._class_count(image), train, val)
        return tuple(balanced_weights([int(n) for n in counts]).tolist())

    def _class_count(self, image: Annotated) -> Callable[[Region], NDArray[np.int64]]:
        return lambda region: image.count_classes(
            region, dims=self.dims, n_classes=len(self.classes)
        )


def survey(asked: TrainConfig) -> Survey:
    """What the images of a training run are like.

    Raises:
        ConfigError: settings that contradict the images.
        InputError: images or labels that cannot be used, or differ in voxel size.
    """
    learned = _images_to_learn(asked)
    images = tuple(open_annotated(url, asked) for url in (*learned, *asked.val_images))
    n = len(learned)
    regions = tuple(split(a) for a in images[:n]) + tuple(held_out(a) for a in images[n:])
    dims = asked.dims or _choose_dims(images)
    _check_dims(images, dims)
    classes, n_learned = _choose_classes(images, regions, asked)
    size = images[0].image.voxel_um
    return Survey(
        images=images,
        regions=regions,
        dims=dims,
        voxel_size=_common_voxel_size(images)[-dims:],
        voxel_um=None if size is None or len(size) < dims else size[-dims:],
        classes=classes,
        n_learned=tuple(n_learned),
    )


def _images_to_learn(asked: TrainConfig) -> list[str]:
    """The images but those that are held out, so that a folder may hold both."""
    if asked.val_images and asked.val_region is not None:
        raise ConfigError(
            f"val_region: {asked.val_region} together with {len(asked.val_images)} val_images, "
            "which are validated on whole: leave one of them out"
        )
    learned = [url for url in asked.images if url not in asked.val_images]
    if not learned:
        raise ConfigError(
            f"val_images: they hold {asked.images[0]} and all other images, which leaves nothing "
            "to learn from: hold out some of them"
        )
    return learned


def _choose_dims(opened: Sequence[Annotated]) -> Literal[2, 3]:
    """3 where every image is deep enough and its planes lie close enough together."""
    for annotated in opened:
        z, y, _ = annotated.voxel_size
        if annotated.image.shape[1] < DEEP_ENOUGH or z / y >= FLATTEST:
            return 2
    return 3


def _check_dims(opened: Sequence[Annotated], dims: int) -> None:
    flat = [a.image for a in opened if len(a.image.spatial_axes) < dims]
    if flat:
        raise ConfigError(f"dims: 3, but {flat[0].url} has no z axis: use dims: 2")


def _common_voxel_size(opened: Sequence[Annotated]) -> tuple[float, ...]:
    first = opened[0]
    for other in opened[1:]:
        known = (first.image.voxel_um is None) == (other.image.voxel_um is None)
        ratios = [a / b for a, b in zip(first.voxel_size, other.voxel_size, strict=True)]
        if not known or any(not 1 / 1.1 <= r <= 1.1 for r in ratios):
            raise InputError(
                f"{other.image.url} has voxels of {_sizes(other)} (z, y, x), "
                f"{first.image.url} of {_sizes(first)}: images that are trained on together must "
                "agree within 10 %; choose a level where they do, or resample"
            )
    return first.voxel_size


def _sizes(annotated: Annotated) -> str:
    sizes = " × ".join(f"{v:g}" for v in annotated.voxel_size)
    return f"{sizes} µm" if annotated.image.voxel_um else f"{sizes} (no unit of length)"


def _choose_classes(
    opened: Sequence[Annotated], regions: Sequence[_Regions], asked: TrainConfig
) -> tuple[tuple[str, ...], list[int]]:
    """The names of the classes, and the voxels to learn from in each image."""
    choose = _semantic_classes if asked.task == "semantic" else _instance_classes
    classes, to_learn, to_validate = choose(opened, regions, asked)
    if not sum(to_learn) or not sum(to_validate):
        first = asked.images[0]
        held = "the val_images" if asked.val_images else f"the middle of val_region of {first}"
        part = held if sum(to_learn) else f"region of {first}"
        raise InputError(
            f"no voxel of {part} is annotated in {asked.labels!r}: choose one "
            "where there are labels"
        )
    return classes, to_learn


def _semantic_classes(
    opened: Sequence[Annotated], regions: Sequence[_Regions], asked: TrainConfig
) -> tuple[tuple[str, ...], list[int], list[int]]:
    if asked.loss.weight_map is not None:
        raise ConfigError(
            "loss.weight_map with task: semantic, whose labels are no objects between which there "
            "could be gaps: use task: instances, or leave weight_map out"
        )
    learned = [_learned(a.count_labels, *r) for a, r in zip(opened, regions, strict=True)]
    held = [a.count_labels(val) for a, (_, val) in zip(opened, regions, strict=True)]
    judged = [a.count_annotated(part)[0] for a, part in zip(opened, _judged(regions), strict=True)]
    total = np.sum(learned, axis=0)
    present = np.flatnonzero(total + np.sum(held, axis=0))
    if np.count_nonzero(total) == 1:
        raise InputError(
            f"the labels {asked.labels!r} hold only the value {int(np.flatnonzero(total)[0])} in "
            "the training region: a network needs two classes to learn; choose another region, or "
            "labels that name the background too"
        )
    n_classes = max(2, int(present.max(initial=0)) + 1)
    if len(present) > MOST_LIKELY_CLASSES and asked.classes is None:
        logger.warning(
            "the labels %r hold %d different values, each of which is learned as a class of its "
            "own: if they number objects, stop and say --task instances",
            asked.labels,
            len(present),
        )
    classes = asked.classes or class_names("semantic", n_classes)
    if len(classes) < n_classes:
        raise ConfigError(
            f"classes: {len(classes)} names for labels with values up to {n_classes - 1}: give "
            f"{n_classes} names, the first for value 0"
        )
    return classes, [int(c.sum()) for c in learned], [int(n) for n in judged]


def _instance_classes(
    opened: Sequence[Annotated], regions: Sequence[_Regions], asked: TrainConfig
) -> tuple[tuple[str, ...], list[int], list[int]]:
    classes = class_names("instances")
    if asked.classes not in (None, classes):
        raise ConfigError(
            f"classes: {list(asked.classes or ())} with task: instances, whose classes are "
            f"{', '.join(classes)}: leave classes out"
        )
    learned = [_learned(a.count_annotated, *r) for a, r in zip(opened, regions, strict=True)]
    judged = [a.count_annotated(part)[0] for a, part in zip(opened, _judged(regions), strict=True)]
    n_annotated, n_objects = np.sum(learned, axis=0)
    if n_annotated and not n_objects:
        raise InputError(
            f"the labels {asked.labels!r} hold no object in the training region, only background: "
            "choose another region"
        )
    return classes, [int(c[0]) for c in learned], [int(n) for n in judged]


def _judged(regions: Sequence[_Regions]) -> list[Region]:
    return judged([val for _, val in regions])


def _learned(
    count: Callable[[Region], NDArray[np.int64]], train: Region, val: Region
) -> NDArray[np.int64]:
    """A count over the training region without the validation region."""
    both = train.intersect(val)
    return count(train) - count(both) if both.n_voxels else count(train)
