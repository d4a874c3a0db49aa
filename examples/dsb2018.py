"""Nuclei in fluorescence, images of many kinds and sizes: AP at IoU 0.5 on images never seen.

120 images of the 2018 Data Science Bowl (CC0) are not part of bigseg; give the folder that holds
ID_image.tif and ID_nuclei.tif (instances).

    python examples/dsb2018.py ../shared/data/dsb2018 dsb2018-run

A fifth of the images, by the SHA-1 of their ids, is held out to be scored, and a quarter of the
others to choose the best network and the rule of objects by. AP is that of StarDist (Schmidt et
al. 2018), TP / (TP + FP + FN) of all nuclei of all test images together.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from commands import bigseg, draw, parser_of, train_and_segment

from bigseg.blocks import Region
from bigseg.evaluate import Contingency, scores
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = """\
task: instances
border_um: 2.0
net: {depth: 3, width: 32, padding: same, mirror: true}
patch: [192, 192]
batch: 2
loss: {dice: 0.5, balance: true, weight_map: {w0: 10, sigma_um: 3.0, where: gaps}}
augment: {rotate_degrees: 0, scale: 0, elastic_vox: 0, noise: 0, blur_vox: 0}
val_every: 2500
"""


def main() -> None:
    """Convert, train, segment, score."""
    options = parser_of(__doc__, steps=5000).parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {name: options.out / name for name in ("learn", "validate", "test")}
    for name, folder in parts.items():
        if not folder.exists():
            convert(
                [f for f in sorted(options.data.glob("*_image.tif")) if part(f) == name], folder
            )
    settings, run = options.out / "config.yaml", options.out / f"run-{options.seed}"
    settings.write_text(SETTINGS)
    tests = sorted(parts["test"].glob("*.zarr"))
    train_and_segment(
        (
            *(parts["learn"], "--val-image", parts["validate"], "--labels", "nuclei"),
            *("--out", run, "--dims", 2, "-c", settings, "--steps", options.steps),
            *("--seed", options.seed, "--executor", options.executor),
        ),
        # Starting a cluster takes longer than an image of this size.
        *(
            (image, "--model", run / "model.safetensors", "--overwrite", "--executor", "serial")
            for image in tests
        ),
    )
    report(tests, options.out / f"dsb2018-{options.seed}.png")


def part(file: Path) -> str:
    """Which of the three parts an image belongs to, by its id and nothing else."""
    number = int(hashlib.sha1(file.name.split("_")[0].encode()).hexdigest(), 16)
    if number % 5 == 0:
        return "test"
    return "validate" if number // 5 % 4 == 0 else "learn"


def convert(images: list[Path], folder: Path) -> None:
    """Images and their nuclei as OME-Zarrs in a folder, one for each."""
    nuclei = [f.with_name(f.name.replace("_image", "_nuclei")) for f in images]
    bigseg("convert", *images, folder, "--each", "{name}_image")
    bigseg("convert", *nuclei, folder, "--each", "{name}_nuclei", "--labels", "nuclei")


def report(images: list[Path], picture: Path) -> None:
    """Print the scores of all images together and draw the one with the most nuclei."""
    tables, n_nuclei = [], []
    for image in images:
        volume = open_volume(str(image))
        whole = Region.of_shape(volume.shape)
        truth = volume.label("nuclei").read(whole)
        tables.append(Contingency.of(volume.label("bigseg").read(whole), truth))
        n_nuclei.append(int(truth.max()))
    found = scores(tables)
    print(
        f"{found.n_pred_objects} nuclei (truth {found.n_truth_objects}), "
        f"AP at IoU 0.5 {found.average_precision[0.5]:.3f}, 0.75 "
        f"{found.average_precision[0.75]:.3f}, SEG {found.seg:.3f}"
    )
    volume = open_volume(str(images[n_nuclei.index(max(n_nuclei))]))
    draw(volume, Region.of_shape(volume.shape), truth="nuclei", picture=picture)


if __name__ == "__main__":
    main()
