"""Isotropic 3-D electron microscopy: bodies of neurons from membranes, scored on planes 100-149.

The FIB-25 crop (150 × 250 × 250 voxels of 10 nm, FIB-SEM of fly medulla) is not part of bigseg;
give the folder that holds image.tif and bodies.tif (instances without gaps).

    python examples/fib25.py ../shared/data/fib25 fib25-run

The network learns background, inside and border on planes 0-79; planes 80-99 choose the best
network and the rule by which bodies are made of it. All planes are segmented, planes 100-149
scored: the adapted Rand error first of all, since bodies fill the space. One leak in a membrane
joins two bodies for good, which is why seeds are eroded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bigseg.blocks import Region
from bigseg.view import save_overlay
from bigseg.volume import open_volume

LEARN, VALIDATE, TEST = "0:80,:,:", "80:100,:,:", "100:150,:,:"
PLANE = 125
SETTINGS = """\
task: instances
border_um: 0.04
net: {depth: 2, width: 8, padding: same}
patch: [64, 64, 64]
batch: 1
optim: {lr: 5.0e-3}
loss: {dice: 0.0, balance: true}
val_every: 200
"""


def main() -> None:
    """Convert, train, segment, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=700)
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
        *("--region", LEARN, "--val-region", VALIDATE, "--steps", options.steps),
        *("--executor", options.executor),
    )
    trained = time.monotonic()
    bigseg("segment", image, "--model", run / "model.safetensors", "--executor", options.executor)
    print(f"train {trained - started:.0f} s, segment {time.monotonic() - trained:.0f} s")
    labels = image / "labels"
    bigseg("evaluate", labels / "bigseg", labels / "bodies", "--region", TEST)
    draw(image, options.out / "fib25.png")


def bigseg(*words: object) -> None:
    """Run a bigseg command as a user types it."""
    print("$ bigseg", *words, flush=True)
    subprocess.run([sys.executable, "-m", "bigseg", *map(str, words)], check=True)


def draw(image: Path, picture: Path) -> None:
    """One of the planes that were scored."""
    volume = open_volume(str(image))
    where = Region((0, PLANE, 0, 0), (1, PLANE + 1, *volume.shape[2:]))
    raw, found, truth = (
        v.read(where)[0, 0, 0] for v in (volume, volume.label("bigseg"), volume.label("bodies"))
    )
    save_overlay(str(picture), raw, found, truth=truth, kind="objects")
    print(f"plane {PLANE}, raw | truth | result | overlay: {picture}")


if __name__ == "__main__":
    main()
