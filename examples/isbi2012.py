"""Electron microscopy as in the U-Net paper: slices 0-16 train, 17 validates, 18-23 are scored.

The ISBI 2012 set (24 annotated slices of ssTEM, 50 × 4 × 4 nm) is not part of bigseg; give the
folder that holds images.tif and cells.tif (1 inside a cell, 0 membrane).

    python examples/isbi2012.py ../shared/data/isbi2012 isbi-run

Scores, each the mean over the six slices at the best threshold:
- Rand error: adapted Rand error over the pixels that are inside a cell in the truth
  (Arganda-Carreras et al. 2015), of regions that a watershed of the inside probability grows from
  its eroded connected components, so that membranes are thin; also at the threshold and erosion
  that were best on the validation slice;
- pixel error: share of pixels on the wrong side of the threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from commands import bigseg, parser_of, train_and_segment
from scipy import ndimage
from skimage.segmentation import watershed

from bigseg.blocks import Region
from bigseg.metrics import Contingency, adapted_rand_error
from bigseg.view import save_overlay
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

TRAIN, VALIDATE, TEST = (0, 17), (17, 18), (18, 24)
THRESHOLDS = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99])
EROSIONS = (0, 1, 2)
SMALLEST_SEED_PX = 50
SETTINGS = """\
net: {depth: 3, width: 16, padding: same}
patch: [256, 256]
batch: 4
optim: {lr: 3.0e-3}
loss: {dice: 0.0, balance: true}
val_every: 300
"""


def main() -> None:
    """Convert, train, segment, score."""
    options = parser_of(__doc__, steps=900).parse_args()
    image, run = options.out / "isbi.zarr", options.out / f"run-{options.seed}"
    options.out.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        bigseg("convert", options.data / "images.tif", image, "--voxel-size", "0.05,0.004,0.004")
        bigseg("convert", options.data / "cells.tif", image, "--labels", "cells")
    settings = options.out / "config.yaml"
    settings.write_text(SETTINGS)
    probabilities = options.out / f"probabilities-{options.seed}.zarr"
    executor = ("--executor", options.executor)
    train_and_segment(
        (
            *(image, "--labels", "cells", "--out", run, "--dims", 2, "--seed", options.seed),
            *("--region", "{}:{},:,:".format(*TRAIN)),
            *("--val-region", "{}:{},:,:".format(*VALIDATE)),
            *("--steps", options.steps, "-c", settings, *executor),
        ),
        (
            *(image, "--model", run / "model.safetensors", "--out", probabilities),
            *("--output", "probabilities", *executor),
        ),
    )
    report(image, probabilities, options.out / f"isbi2012-{options.seed}.png")


def report(image: Path, probabilities: Path, picture: Path) -> None:
    """Print the scores of the test slices and draw one of them."""
    inside, truth, raw = load(image, probabilities, TEST)
    pixel = np.array([((inside > at) != truth).mean() for at in THRESHOLDS])
    print(f"pixel error {pixel.min():.4f} at threshold {THRESHOLDS[pixel.argmin()]:.3f}")
    choices = [(float(at), erosion) for erosion in EROSIONS for at in THRESHOLDS]
    errors = np.array([rand_error(inside, truth, *choice) for choice in choices])
    at, erosion = choices[errors.argmin()]
    print(f"Rand error  {errors.min():.4f} at threshold {at:.3f}, seeds eroded by {erosion} px")
    validated = load(image, probabilities, VALIDATE)[:2]
    chosen = int(np.argmin([rand_error(*validated, *choice) for choice in choices]))
    at, erosion = choices[chosen]
    print(
        f"Rand error  {errors[chosen]:.4f} at threshold {at:.3f}, seeds eroded by {erosion} px, "
        f"which were best on slice {VALIDATE[0]}"
    )
    cells = regions(inside[2], at, erosion)
    save_overlay(str(picture), raw[2], cells, truth=ndimage.label(truth[2])[0], kind="objects")
    print(f"slice {TEST[0] + 2}, raw | truth | result | overlay: {picture}")


def load(image: Path, probabilities: Path, slices: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """Inside probability, truth (bool) and raw slices, each (slice, y, x)."""
    volume, predicted = open_volume(str(image)), open_volume(str(probabilities))
    where = Region((0, slices[0], 0, 0), (1, slices[1], *volume.shape[2:]))
    inside = predicted.read(where, [1])[0, 0].astype(np.float32) / 255
    truth = volume.label("cells").read(where)[0, 0] > 0
    return inside, truth, volume.read(where)[0, 0]


def regions(inside: NDArray[np.float32], threshold: float, erosion: int) -> NDArray[np.int32]:
    """Cells of one slice: connected components of the eroded inside, grown until they meet."""
    seeds, _ = ndimage.label(ndimage.distance_transform_edt(inside > threshold) > erosion)
    seeds[np.bincount(seeds.ravel())[seeds] < SMALLEST_SEED_PX] = 0
    cells: NDArray[np.int32] = watershed(-inside, seeds)
    return cells


def rand_error(
    inside: NDArray[np.float32], truth: NDArray[np.bool_], threshold: float, erosion: int
) -> float:
    """Mean over slices of the adapted Rand error over the true cells' pixels."""
    errors = []
    for p, t in zip(inside, truth, strict=True):
        table = Contingency.of(regions(p, threshold, erosion), ndimage.label(t)[0])
        errors.append(adapted_rand_error(table).error)
    return float(np.mean(errors))


if __name__ == "__main__":
    main()
