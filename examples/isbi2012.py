"""Electron microscopy as in the U-Net paper: train on slices 0-17, score slices 18-23.

The ISBI 2012 set (24 annotated slices of ssTEM, 50 × 4 × 4 nm) is not part of bigseg; give the
folder that holds images.tif and cells.tif (1 inside a cell, 0 membrane).

    python examples/isbi2012.py ../shared/data/isbi2012 isbi-run

Scores, each the mean over the six slices at the best of 19 thresholds:
- Rand error: adapted Rand error over the pixels that are inside a cell in the truth
  (Arganda-Carreras et al. 2015), of regions that a watershed of the inside probability grows from
  its connected components, so that membranes are thin;
- pixel error: share of pixels on the wrong side of the threshold.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from bigseg.blocks import Region
from bigseg.metrics import Contingency, adapted_rand_error
from bigseg.view import save_overlay
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAIN, VALIDATE, TEST = "0:16,:,:", "16:18,:,:", (18, 24)
THRESHOLDS = np.arange(0.05, 1.0, 0.05)


def main() -> None:
    """Convert, train, segment, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--executor", default="ray", choices=["ray", "serial"])
    options = parser.parse_args()
    image, run = options.out / "isbi.zarr", options.out / f"run-{options.seed}"
    options.out.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        bigseg("convert", options.data / "images.tif", image, "--voxel-size", "0.05,0.004,0.004")
        bigseg("convert", options.data / "cells.tif", image, "--labels", "cells")
    started = time.monotonic()
    bigseg(
        *("train", image, "--labels", "cells", "--out", run, "--dims", 2, "--seed", options.seed),
        *("--steps", options.steps, "--region", TRAIN, "--val-region", VALIDATE),
        *("--executor", options.executor),
    )
    trained = time.monotonic()
    probabilities = options.out / f"probabilities-{options.seed}.zarr"
    bigseg(
        *("segment", image, "--model", run / "model.safetensors", "--out", probabilities),
        *("--output", "probabilities", "--executor", options.executor),
    )
    print(f"train {trained - started:.0f} s, segment {time.monotonic() - trained:.0f} s")
    report(image, probabilities, options.out / f"isbi2012-{options.seed}.png")


def bigseg(*words: object) -> None:
    """Run a bigseg command as a user types it."""
    print("$ bigseg", *words, flush=True)
    subprocess.run([sys.executable, "-m", "bigseg", *map(str, words)], check=True)


def report(image: Path, probabilities: Path, picture: Path) -> None:
    """Print the scores of the test slices and draw one of them."""
    inside, truth, raw = load(image, probabilities)
    rand = np.array(
        [[rand_error(p, t, at) for p, t in zip(inside, truth, strict=True)] for at in THRESHOLDS]
    ).mean(axis=1)
    pixel = np.array([((inside > at) != truth).mean() for at in THRESHOLDS])
    for name, errors in (("Rand error", rand), ("pixel error", pixel)):
        best = int(errors.argmin())
        print(f"{name:12s} {errors[best]:.4f} at threshold {THRESHOLDS[best]:.2f}")
    cells = regions(inside[2], float(THRESHOLDS[rand.argmin()]))
    save_overlay(str(picture), raw[2], cells, truth=ndimage.label(truth[2])[0])
    print(f"slice {TEST[0] + 2}, raw | truth | result | overlay: {picture}")


def load(image: Path, probabilities: Path) -> tuple[NDArray[np.float32], ...]:
    """Inside probability, truth (bool) and raw slices of the test set, each (slice, y, x)."""
    volume, predicted = open_volume(str(image)), open_volume(str(probabilities))
    where = Region((0, TEST[0], 0, 0), (1, TEST[1], *volume.shape[2:]))
    inside = predicted.read(where, [1])[0, 0].astype(np.float32) / 255
    truth = volume.label("cells").read(where)[0, 0] > 0
    return inside, truth, volume.read(where)[0, 0]


def regions(inside: NDArray[np.float32], threshold: float) -> NDArray[np.int32]:
    """Cells of one slice: connected components above the threshold, grown until they meet."""
    seeds, _ = ndimage.label(inside > threshold)
    return watershed(-inside, seeds)


def rand_error(inside: NDArray[np.float32], truth: NDArray[np.bool_], threshold: float) -> float:
    """Adapted Rand error of one slice over the true cells' pixels."""
    cells, _ = ndimage.label(truth)
    return adapted_rand_error(Contingency.of(regions(inside, threshold), cells))[0]


if __name__ == "__main__":
    main()
