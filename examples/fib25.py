"""Isotropic 3-D electron microscopy: learn membranes from dense bodies, score planes 100-149.

The FIB-25 crop (150 × 250 × 250 voxels of 10 nm, FIB-SEM of fly medulla) is not part of bigseg;
give the folder that holds image.tif and bodies.tif (instances without gaps).

    python examples/fib25.py ../shared/data/fib25 fib25-run

The network learns background, inside and border on planes 0-89 (the last 12 of them validate). It
segments all planes; planes 100-149 are scored: Dice of inside and border against those derived from
the true bodies, and the adapted Rand error of bodies made from the inside class: its connected
components, as they are or eroded first, every voxel then given to the nearest of them. One leak in
a membrane joins two bodies for good, which is why eroding matters so much.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from bigseg.blocks import Region
from bigseg.metrics import Contingency, adapted_rand_error, class_overlaps, variation_of_information
from bigseg.targets import BORDER, INSIDE, boundary
from bigseg.view import save_overlay
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEST = (100, 150)
BORDER_VOX = 4.0
SETTINGS = f"""\
task: boundary
border_vox: {BORDER_VOX}
net: {{depth: 2, width: 8, padding: same}}
patch: [64, 64, 64]
batch: 1
optim: {{lr: 5.0e-3}}
loss: {{dice: 0.0, balance: true}}
val_every: 200
"""


def main() -> None:
    """Convert, train, segment, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--executor", default="ray", choices=["ray", "serial"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    image, run = options.out / "fib25.zarr", options.out / "run"
    settings = options.out / "config.yaml"
    settings.write_text(SETTINGS)
    if not image.exists():
        bigseg("convert", options.data / "image.tif", image, "--voxel-size", "0.01,0.01,0.01")
        bigseg("convert", options.data / "bodies.tif", image, "--labels", "bodies")
    started = time.monotonic()
    bigseg(
        *("train", image, "--labels", "bodies", "--out", run, "--dims", 3, "-c", settings),
        *("--region", "0:78,:,:", "--val-region", "78:90,:,:", "--steps", options.steps),
        *("--executor", options.executor),
    )
    trained = time.monotonic()
    bigseg("segment", image, "--model", run / "model.safetensors", "--executor", options.executor)
    print(f"train {trained - started:.0f} s, segment {time.monotonic() - trained:.0f} s")
    report(image, options.out / "fib25.png")


def bigseg(*words: object) -> None:
    """Run a bigseg command as a user types it."""
    print("$ bigseg", *words, flush=True)
    subprocess.run([sys.executable, "-m", "bigseg", *map(str, words)], check=True)


def report(image: Path, picture: Path) -> None:
    """Print the scores of the test planes and draw one of them."""
    raw, classes, bodies = load(image)
    truth = boundary(bodies, border_vox=BORDER_VOX)
    found = class_overlaps(Contingency.of(classes, truth))
    for name, value in (("inside", INSIDE), ("border", BORDER)):
        print(f"{name:7s} Dice {found[value].dice:.3f}  IoU {found[value].iou:.3f}")
    cells = {erosion: bodies_of(classes, erosion) for erosion in (0, 1, 2, 3)}
    errors = {}
    for erosion, labels in cells.items():
        table = Contingency.of(labels, bodies)
        rand, voi = adapted_rand_error(table), variation_of_information(table)
        errors[erosion] = rand.error
        print(
            f"components of inside eroded by {erosion}: {labels.max():4d} bodies "
            f"(truth {len(np.unique(bodies))}), adapted Rand error {rand.error:.3f}, "
            f"VOI split {voi.split:.2f} merge {voi.merge:.2f}"
        )
    best = min(errors, key=lambda erosion: errors[erosion])
    middle = len(raw) // 2
    save_overlay(
        str(picture), raw[middle], cells[best][middle], truth=bodies[middle], kind="objects"
    )
    print(f"plane {TEST[0] + middle}, raw | truth | result (eroded by {best}) | overlay: {picture}")


def load(image: Path) -> tuple[NDArray[Any], ...]:
    """Raw, predicted classes and true bodies of the test planes (z, y, x)."""
    volume = open_volume(str(image))
    where = Region((0, TEST[0], 0, 0), (1, TEST[1], *volume.shape[2:]))
    volumes = (volume, volume.label("bigseg"), volume.label("bodies"))
    return tuple(v.read(where)[0, 0] for v in volumes)


def bodies_of(classes: NDArray[Any], erosion: int) -> NDArray[np.int32]:
    """Connected components of the eroded inside; every voxel belongs to the nearest one."""
    inside = classes == INSIDE
    seeds, _ = ndimage.label(ndimage.distance_transform_edt(inside) > erosion)
    nearest = ndimage.distance_transform_edt(
        seeds == 0, return_distances=False, return_indices=True
    )
    labels: NDArray[np.int32] = seeds[tuple(nearest)]
    return labels


if __name__ == "__main__":
    main()
