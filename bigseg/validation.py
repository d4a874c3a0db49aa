"""The score of a network on the held-out regions, measured as it will segment: valid, by tiles.

At most `VALIDATION_VOXELS` voxels are looked at, shared by the images: all of the held-out regions
or the middle of each (`annotations.judged`), the same at every validation of a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.annotations import VALIDATION_VOXELS, middle
from bigseg.blocks import Region
from bigseg.cost import default_tile, forward_bytes
from bigseg.engine import torch_forward
from bigseg.evaluate import Contingency, Scores, scores
from bigseg.predict import predict_region, tile_geometry
from bigseg.targets import IGNORE
from bigseg.tuning import Judged

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from bigseg.annotations import Annotated
    from bigseg.engine import Forward
    from bigseg.model import UNet
    from bigseg.recipe import Recipe, SourceRecipe

# A step of training takes more memory than this, so validation never decides what fits.
TILE_BYTES = 512 << 20
# The rule of instances is tried on so many voxels with their surroundings, once, in the end.
SURROUNDINGS_VOXELS = 2 * VALIDATION_VOXELS
# Objects of smaller boxes are mostly cut.
LEAST_BOX_VOXELS = 1 << 18
_NOWHERE = Region.of_shape((0, 0, 0, 0))


@dataclass(frozen=True)
class Validation:
    """Cross-entropy a voxel, and the scores that `evaluate` gives for the classes."""

    loss: float
    scores: Scores
    classes: tuple[str, ...]

    @property
    def score(self) -> float:
        """What the best model is chosen by: the mean Dice of the classes that the truth has."""
        return self.scores.mean_dice

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None for a class that neither side has."""
        overlaps = self.scores.classes or {}
        dice = {name: overlaps[i].dice for i, name in enumerate(self.classes) if i in overlaps}
        return {
            "val_loss": self.loss,
            "val_dice": self.score,
            "val_iou": self.scores.mean_iou,
            "val_dice_of": {n: None if math.isnan(d) else d for n, d in dice.items()},
        }


def validate(net: UNet, recipe: Recipe, *, device: torch.device) -> Validation:
    """The scores of `net` on the held-out regions of the recipe's images."""
    forward = _forward(net, recipe, device)
    parts = [_judge(recipe, source, region, forward) for source, region in recipe.validated]
    n_voxels = sum(table.n_voxels for table, _ in parts)
    return Validation(
        loss=sum(loss for _, loss in parts) / n_voxels,
        scores=scores([table for table, _ in parts]),
        classes=recipe.card.classes,
    )


def judged_objects(net: UNet, recipe: Recipe, *, device: torch.device) -> list[Judged]:
    """What `net` says of held-out and learnt regions, and their true objects; for task instances.

    Learnt is what surrounds a held-out region where that is as much again; else, and of images
    without a held-out region, a box of each image or of some, as much as is validated on at most.
    """
    forward, dims = _forward(net, recipe, device), recipe.card.spec.dims
    n_images = len(recipe.validated)
    places: list[tuple[SourceRecipe, Region, Region, Region]] = []
    in_sight = set()
    for source, held_out in recipe.validated:
        seen = _surroundings(source, held_out, dims, n_images=n_images)
        learnt = seen.intersect(source.train)
        if learnt.n_voxels - learnt.intersect(source.val).n_voxels >= held_out.n_voxels:
            in_sight.add(source.url)
            places.append((source, seen, held_out, learnt))
        else:
            places.append((source, seen, held_out, _NOWHERE))
    others = [source for source in recipe.sources if source.url not in in_sight]
    places += [(source, seen, _NOWHERE, seen) for source, seen in _learnt_boxes(others)]
    return [_judged(recipe, *place, forward) for place in places]


def _learnt_boxes(sources: Sequence[SourceRecipe]) -> list[tuple[SourceRecipe, Region]]:
    """A box of each image where it is learnt, or of every second, third ... if that is too much."""
    learnt = [(s, box) for s in sources if (box := _beside(s.train, s.val)).n_voxels]
    at_most = max(LEAST_BOX_VOXELS, VALIDATION_VOXELS // max(1, len(learnt)))
    boxes = [(source, middle(box, at_most=at_most)) for source, box in learnt]
    n_voxels = sum(box.n_voxels for _, box in boxes)
    return boxes[:: max(1, math.ceil(n_voxels / VALIDATION_VOXELS))]


def _beside(region: Region, other: Region) -> Region:
    """The largest box of the region that has nothing of the other."""
    if not region.intersect(other).n_voxels:
        return region
    boxes = []
    for axis, (first, stop) in enumerate(zip(other.start, other.stop, strict=True)):
        for start, end in ((region.start[axis], first), (stop, region.stop[axis])):
            lower, upper = list(region.start), list(region.stop)
            lower[axis], upper[axis] = start, max(start, end)
            boxes.append(Region(tuple(lower), tuple(upper)))
    return max(boxes, key=lambda box: box.n_voxels)


def _judged(
    recipe: Recipe,
    source: SourceRecipe,
    seen: Region,
    held_out: Region,
    learnt: Region,
    forward: Forward,
) -> Judged:
    """What is said of `seen`; `learnt` counts where it is not held out from training."""
    annotated, dims = recipe.open(source), recipe.card.spec.dims

    def objects_in(region: Region) -> NDArray[np.int64] | None:
        if not region.n_voxels:
            return None
        objects = np.full(seen.shape, IGNORE, np.int64)
        objects[region.relative_to(seen.start).slices] = annotated.objects(region, dims=dims)
        return objects

    learnt_objects = objects_in(learnt)
    if learnt_objects is not None:
        learnt_objects[seen.intersect(source.val).relative_to(seen.start).slices] = IGNORE
    return Judged(
        probabilities=_in_255ths(_predict(recipe, source, annotated, seen, forward)),
        objects=objects_in(held_out),
        voxel_size=annotated.voxel_size[-dims:],
        learnt=learnt_objects,
    )


def _surroundings(source: SourceRecipe, region: Region, dims: int, *, n_images: int) -> Region:
    """The region with what is annotated around it, up to `SURROUNDINGS_VOXELS` for all images.

    Two objects that run together anywhere are one, within the region too: rules that are judged on
    a thin region by itself are too generous (FIB-25: adapted Rand error 0.38 instead of 0.21).
    """
    axes = range(4 - dims, 4)
    whole = Region(
        tuple(map(min, source.train_start, source.val_start)),
        tuple(map(max, source.train_stop, source.val_stop)),
    )
    seen = region
    while True:
        margin = tuple(8 if axis in axes else 0 for axis in range(4))
        larger = seen.grow(margin, margin).intersect(whole)
        if larger == seen or larger.n_voxels > SURROUNDINGS_VOXELS // n_images:
            return seen
        seen = larger


def _forward(net: UNet, recipe: Recipe, device: torch.device) -> Forward:
    precision = recipe.config.precision
    assert precision != "auto"
    return torch_forward(net, device=device, precision=precision)


def _in_255ths(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """As segmenting keeps them, plane by plane for the sake of memory."""
    found = np.empty(probabilities.shape, np.uint8)
    for plane, into in zip(probabilities.swapaxes(0, 2), found.swapaxes(0, 2), strict=True):
        into[:] = np.rint(plane * np.float32(255.0))
    return found


def _judge(
    recipe: Recipe, source: SourceRecipe, region: Region, forward: Forward
) -> tuple[Contingency, float]:
    """Counts of (predicted, true) class over one image, and its summed cross-entropy."""
    spec, annotated = recipe.card.spec, recipe.open(source)
    probabilities = _predict(recipe, source, annotated, region, forward)
    truth = annotated.target(region, dims=spec.dims, n_classes=spec.out_channels)
    found = probabilities.argmax(axis=0).astype(np.int16)
    table = Contingency.of(found, truth, ignore_truth=IGNORE)
    return table, _summed_cross_entropy(probabilities, truth)


def _predict(
    recipe: Recipe, source: SourceRecipe, annotated: Annotated, region: Region, forward: Forward
) -> NDArray[np.float32]:
    spec = recipe.card.spec

    def fits(output: Sequence[Any]) -> Any:  # noqa: ANN401 - arrays of sizes
        return forward_bytes(spec, output[-spec.dims :]) <= TILE_BYTES

    return predict_region(
        annotated.image,
        forward,
        tile_geometry(spec, default_tile(spec, region.shape, fits)),
        region,
        channels=recipe.config.channels,
        constants=source.constants,
    )


def _summed_cross_entropy(probabilities: NDArray[np.float32], truth: NDArray[np.int16]) -> float:
    counted = truth != IGNORE
    of_truth = np.take_along_axis(probabilities, truth[np.newaxis].clip(min=0), axis=0)[0]
    tiny = np.finfo(np.float32).tiny
    return float(-np.log(of_truth[counted].clip(min=tiny), dtype=np.float64).sum())
