"""The recipe of a training run: everything that is decided before the first step, as plain data.

    what the user asked ──look at the images and labels──> recipe ──> the same patches, the same
    (TrainConfig, None = choose)                                      network, on every worker

A recipe is stored with the run. It holds no choice that depends on how many workers carry it out
or on the time of day; of the machine it only takes the precision that its device multiplies in.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg.annotations import Annotated, open_annotated
from bigseg.augment import PatchFrame
from bigseg.blocks import Region, Vec, parse_region, round_up
from bigseg.config import ModelCard, NormConstants, Settings, TrainConfig, UNetSpec
from bigseg.engine import best_precision
from bigseg.errors import ConfigError, InputError, UsageError
from bigseg.losses import balanced_weights
from bigseg.model import footprint
from bigseg.patches import PatchPlan, PatchSampler, PatchSource
from bigseg.statistics import norm_constants
from bigseg.targets import class_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from bigseg.engine import Device

# Depth, width and the patch that the network computes: what the U-Net papers train with (388² and
# 44³ there; half as wide here, so that four patches of a plane fit a small GPU).
DEFAULT_DEPTH = {2: 4, 3: 3}
DEFAULT_WIDTH = {2: 32, 3: 16}
DEFAULT_PATCH = {2: 188, 3: 44}
DEFAULT_BATCH = {2: 4, 3: 1}
DEEP_ENOUGH = 32
FLATTEST = 3.0
HELD_OUT = 0.2
VALIDATION_VOXELS = 1 << 22


class SourceRecipe(Settings):
    """One annotated image: where it is learned and validated; regions along t, z, y, x."""

    url: str
    shape: Vec
    train_start: Vec
    train_stop: Vec
    val_start: Vec
    val_stop: Vec
    constants: NormConstants
    n_annotated: int

    @property
    def train(self) -> Region:
        """Where patches are drawn; the part that overlaps `val` is not learned."""
        return Region(self.train_start, self.train_stop)

    @property
    def val(self) -> Region:
        """Where the network is validated."""
        return Region(self.val_start, self.val_stop)


class Recipe(Settings):
    """A training run, decided: `config` is `asked` with every choice made."""

    asked: TrainConfig
    config: TrainConfig
    card: ModelCard
    voxel_size: tuple[float, ...]
    sources: tuple[SourceRecipe, ...]
    class_weights: tuple[float, ...] | None

    @property
    def fingerprint(self) -> str:
        """A hash over everything that decides the weights."""
        decided = self.model_dump(mode="json", exclude={"asked"})
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()

    @property
    def frame(self) -> PatchFrame:
        """The shapes of a patch: what the network reads and what it computes."""
        patch = self.config.patch
        assert patch is not None
        same = self.card.spec.padding == "same"
        image = patch if same else footprint(self.card.spec).input_shape(patch)
        return PatchFrame(image, patch, self.voxel_size)

    def sampler(self, device: torch.device) -> PatchSampler:
        """The source of batches; opens the images.

        Raises:
            InputError: an image or its labels cannot be used, or changed since the recipe was made.
        """
        assert self.config.batch is not None
        plan = PatchPlan(
            frame=self.frame,
            augment=self.config.augment,
            channels=self.config.channels,
            batch=self.config.batch,
            seed=self.config.seed,
        )
        sources = [
            PatchSource(
                annotated=self.open(source),
                region=source.train,
                excluded=source.val,
                constants=source.constants,
                weight=source.n_annotated,
                dims=self.card.spec.dims,
                n_classes=self.card.spec.out_channels,
            )
            for source in self.sources
        ]
        return PatchSampler(sources, plan, device=device)

    def open(self, source: SourceRecipe) -> Annotated:
        """The image and labels of a source, which must still have the extent they had."""
        annotated = open_annotated(source.url, self.config)
        if annotated.image.shape != source.shape:
            raise InputError(
                f"{source.url} has {annotated.image.shape} voxels (t, z, y, x) and had "
                f"{source.shape} when this run began: use --overwrite to begin anew"
            )
        return annotated


def make_recipe(asked: TrainConfig, *, device: Device) -> Recipe:
    """The recipe for what the user asked, on devices of this kind.

    Raises:
        ConfigError: settings that contradict each other or the images.
        InputError: images or labels that cannot be used, or differ in voxel size.
    """
    opened = [open_annotated(url, asked) for url in asked.images]
    for annotated in opened:
        _check_place(annotated, asked)
    regions = [_split(annotated, asked) for annotated in opened]
    dims = asked.dims or _choose_dims(opened)
    _check_dims(opened, dims)
    voxel_size = _common_voxel_size(opened)[-dims:]
    classes, annotated_voxels = _choose_classes(opened, regions, asked)
    spec = _choose_spec(asked, dims, len(classes), voxel_size)
    extent = _largest_extent([train for train, _ in regions], dims)
    config = asked.model_copy(
        update={
            "dims": dims,
            "classes": classes,
            "net": asked.net.model_copy(update={"depth": spec.depth, "width": spec.widths[0]}),
            "patch": _choose_patch(asked, spec, extent),
            "batch": asked.batch or DEFAULT_BATCH[dims],
            "val_every": min(asked.steps, asked.val_every or max(50, asked.steps // 10)),
            "precision": _choose_precision(asked, device),
        }
    )
    constants = [norm_constants(a.image, asked.norm, asked.channels) for a in opened]
    return Recipe(
        asked=asked,
        config=config,
        card=ModelCard(
            spec=spec,
            classes=classes,
            task=asked.task,
            voxel_um=_micrometers(opened, dims),
            norm=asked.norm,
            norm_constants=_middle(constants),
            channels=asked.channels,
        ),
        voxel_size=voxel_size,
        sources=tuple(
            SourceRecipe(
                url=a.image.url,
                shape=a.image.shape,
                train_start=train.start,
                train_stop=train.stop,
                val_start=val.start,
                val_stop=val.stop,
                constants=c,
                n_annotated=n,
            )
            for a, (train, val), c, n in zip(
                opened, regions, constants, annotated_voxels, strict=True
            )
        ),
        class_weights=_class_weights(opened, regions, config) if asked.loss.balance else None,
    )


def differences(recipe: Recipe, asked: TrainConfig) -> list[str]:
    """The settings in which `asked` differs from a stored recipe, as `name: mine, not stored`.

    What was left to choose then and is given now, equal to the choice, does not differ.
    """
    mine = _flat(asked.model_dump(mode="json"))
    before = _flat(recipe.asked.model_dump(mode="json"))
    chosen = _flat(recipe.config.model_dump(mode="json"))
    return [
        f"{key}: {mine.get(key)!r}, not {chosen.get(key)!r}"
        for key in sorted(mine.keys() | before.keys())
        if mine.get(key) not in (before.get(key), chosen.get(key))
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


# Where patches are drawn and where they are validated.


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


def _split(annotated: Annotated, config: TrainConfig) -> tuple[Region, Region]:
    """The regions to learn from and to validate on, along t, z, y, x.

    Without `val_region` the last fifth of the region's planes is held out; of its rows, where it
    has fewer than five planes. A `val_region` inside the region is left out of it when patches are
    read.
    """
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
    return Region(
        (first, *(0,) * fill, *spatial.start), (last, *(1,) * fill, *spatial.stop)
    )


def validation_part(region: Region, budget: int) -> Region:
    """The middle of a region: its longest axes are cut until it has at most `budget` voxels."""
    shape = list(region.shape)
    while math.prod(shape) > budget:
        longest = max(range(len(shape)), key=lambda axis: shape[axis])
        others = math.prod(shape) // shape[longest]
        second = max((n for axis, n in enumerate(shape) if axis != longest), default=1)
        fitting = max(1, budget // others)
        shape[longest] = max(fitting, min(second, shape[longest] - 1))
    start = tuple(a + (n - s) // 2 for a, n, s in zip(region.start, region.shape, shape, strict=True))
    return Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))


# Choices about the data.


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


def _micrometers(opened: Sequence[Annotated], dims: int) -> tuple[float, ...] | None:
    size = opened[0].image.voxel_um
    return None if size is None or len(size) < dims else size[-dims:]


def _middle(constants: Sequence[NormConstants]) -> NormConstants:
    """The median of the images' constants: what `--norm model` uses for an image it never saw."""
    return constants[0].model_copy(
        update={
            "offset": tuple(map(float, np.median([c.offset for c in constants], axis=0))),
            "scale": tuple(map(float, np.median([c.scale for c in constants], axis=0))),
            "n_voxels": sum(c.n_voxels for c in constants),
        }
    )
