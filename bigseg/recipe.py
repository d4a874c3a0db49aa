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
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.annotations import Annotated, judged, open_annotated
from bigseg.augment import PatchFrame
from bigseg.blocks import Region, Vec, round_up
from bigseg.config import ModelCard, NormConstants, TrainConfig, UNetSpec
from bigseg.engine import best_precision
from bigseg.errors import ConfigError, InputError
from bigseg.model import footprint
from bigseg.patches import PatchPlan, PatchSampler, PatchSource
from bigseg.rules import InstanceRule
from bigseg.settings import Settings
from bigseg.statistics import norm_constants
from bigseg.survey import Survey, survey

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from bigseg.engine import Device

# Depth, width and the patch that the network computes: what the U-Net papers train with (388² and
# 44³ there; half as wide here, so that four patches of a plane fit a small GPU).
DEFAULT_DEPTH = {2: 4, 3: 3}
DEFAULT_WIDTH = {2: 32, 3: 16}
DEFAULT_PATCH = {2: 188, 3: 44}
PADDED_PATCH = {2: 256, 3: 64}
DEFAULT_BATCH = {2: 4, 3: 1}


class SourceRecipe(Settings):
    """One annotated image: where it is learned and validated; regions along t, z, y, x.

    One of them is empty where images are validated on whole.
    """

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
    def validated(self) -> list[tuple[SourceRecipe, Region]]:
        """What validation looks at, image by image."""
        parts = judged([source.val for source in self.sources])
        return [(s, part) for s, part in zip(self.sources, parts, strict=True) if part.n_voxels]

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
            if source.train.n_voxels
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
    found = survey(asked)
    spec = _choose_spec(asked, found)
    config = asked.model_copy(
        update={
            "dims": found.dims,
            "classes": found.classes,
            "net": asked.net.model_copy(update={"depth": spec.depth, "width": spec.widths[0]}),
            "patch": _choose_patch(asked, spec, found),
            "batch": asked.batch or DEFAULT_BATCH[found.dims],
            "val_every": min(asked.steps, asked.val_every or max(50, asked.steps // 10)),
            # Processors without bf16 instructions emulate them: a step of the default 2-D network
            # takes 28.9 s instead of 1.4, of the 3-D one 221 instead of 29 (2 cores, AVX2).
            "precision": best_precision(device) if asked.precision == "auto" else asked.precision,
        }
    )
    constants = [norm_constants(a.image, asked.norm, asked.channels) for a in found.images]
    learned = [c for c, n in zip(constants, found.n_learned, strict=True) if n]
    card = ModelCard(
        spec=spec,
        classes=found.classes,
        task=asked.task,
        instances=InstanceRule() if asked.task == "instances" else None,
        voxel_um=found.voxel_um,
        norm=asked.norm,
        norm_constants=_middle(learned),
        channels=asked.channels,
    )
    return Recipe(
        asked=asked,
        config=config,
        card=card,
        voxel_size=found.voxel_size,
        sources=_sources(found, constants),
        class_weights=found.class_weights() if asked.loss.balance else None,
    )


def _sources(found: Survey, constants: Sequence[NormConstants]) -> tuple[SourceRecipe, ...]:
    return tuple(
        SourceRecipe(
            url=annotated.image.url,
            shape=annotated.image.shape,
            train_start=train.start,
            train_stop=train.stop,
            val_start=val.start,
            val_stop=val.stop,
            constants=known,
            n_annotated=n,
        )
        for annotated, (train, val), known, n in zip(
            found.images, found.regions, constants, found.n_learned, strict=True
        )
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


# Choices about the network.


def _choose_spec(asked: TrainConfig, found: Survey) -> UNetSpec:
    return UNetSpec.build(
        found.dims,
        out_channels=len(found.classes),
        depth=DEFAULT_DEPTH[found.dims] if asked.net.depth is None else asked.net.depth,
        width=asked.net.width or DEFAULT_WIDTH[found.dims],
        in_channels=len(asked.channels),
        voxel_um=found.voxel_size if asked.net.anisotropic else None,
        padding=asked.net.padding,
        mirror=asked.net.mirror,
    )


def _choose_patch(asked: TrainConfig, spec: UNetSpec, found: Survey) -> Vec:
    """The patch asked for, checked; else one of the default extent, no larger than the region.

    Along an axis of longer voxels it has as many fewer.
    """
    if asked.patch is not None:
        return _checked_patch(asked.patch, spec)
    wanted = (DEFAULT_PATCH if spec.padding == "valid" else PADDED_PATCH)[spec.dims]
    finest = min(found.voxel_size)
    shapes = [train.shape[-spec.dims :] for train, _ in found.regions if train.n_voxels]
    at_least = tuple(
        min(max(lengths), math.ceil(wanted * finest / size))
        for lengths, size in zip(zip(*shapes, strict=True), found.voxel_size, strict=True)
    )
    return _next_patch(at_least, spec)


def _next_patch(at_least: Vec, spec: UNetSpec) -> Vec:
    """The smallest patch of at least this shape that the network can compute."""
    mark = footprint(spec)
    if spec.padding == "valid":
        return mark.smallest_output(at_least)
    return tuple(round_up(n, s) for n, s in zip(at_least, mark.stride, strict=True))


def _checked_patch(patch: Vec, spec: UNetSpec) -> Vec:
    if len(patch) != spec.dims or min(patch) < 1:
        axes = "z, y, x" if spec.dims == 3 else "y, x"
        raise ConfigError(
            f"patch: {list(patch)} for a {spec.dims}-D network, which needs {spec.dims} numbers of "
            f"at least 1 ({axes}): give those, or leave patch out"
        )
    if (fitting := _next_patch(patch, spec)) != patch:
        raise ConfigError(
            f"patch: {list(patch)} is not what the network can compute, its poolings need other "
            f"sizes: the next that fits is {list(fitting)}"
        )
    return patch


def _middle(constants: Sequence[NormConstants]) -> NormConstants:
    """The median of the images' constants: what `--norm model` uses for an image it never saw."""
    return constants[0].model_copy(
        update={
            "offset": tuple(map(float, np.median([c.offset for c in constants], axis=0))),
            "scale": tuple(map(float, np.median([c.scale for c in constants], axis=0))),
            "n_voxels": sum(c.n_voxels for c in constants),
        }
    )
