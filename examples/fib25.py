"""Isotropic 3-D electron microscopy: bodies of neurons from membranes, scored on planes 100-149.

The FIB-25 crop (150 × 250 × 250 voxels of 10 nm, FIB-SEM of fly medulla) is not part of bigseg;
give the folder that holds image.tif and bodies.tif (instances without gaps).

    python examples/fib25.py ../shared/data/fib25 fib25-run

The network learns background, inside and border on planes 0-79; planes 80-99 choose the best
network and the rule by which bodies are made of it. Planes 100-149 are segmented by themselves and
scored: the adapted Rand error first of all, since bodies fill the space. One leak in a membrane
joins two bodies for good, so the same planes are scored once more as part of all 150, where two
bodies can also be joined by a leak in planes 0-99.
"""

from __future__ import annotations

from commands import bigseg, draw, parser_of, train_and_segment

from bigseg.blocks import Region
from bigseg.volume import open_volume

LEARN, VALIDATE, TEST = "0:80,:,:", "80:100,:,:", "100:150,:,:"
PLANE = 125
ALONE, WHOLE = "held-out", "bigseg"
SETTINGS = """\
task: instances
border_um: 0.04
net: {depth: 2, width: 16, padding: same}
patch: [64, 64, 64]
batch: 1
optim: {lr: 3.0e-3}
loss: {dice: 0.0, balance: true}
augment: {rotate_degrees: 0, tilt_degrees: 0, scale: 0, elastic_vox: 0}
val_every: 500
"""


def main() -> None:
    """Convert, train, segment, score."""
    options = parser_of(__doc__, steps=2000).parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    image, run = options.out / "fib25.zarr", options.out / f"run-{options.seed}"
    settings = options.out / "config.yaml"
    settings.write_text(SETTINGS)
    if not image.exists():
        bigseg("convert", options.data / "image.tif", image, "--voxel-size", "0.01,0.01,0.01")
        bigseg("convert", options.data / "bodies.tif", image, "--labels", "bodies")
    executor = ("--executor", options.executor)
    train_and_segment(
        (
            *(image, "--labels", "bodies", "--out", run, "--dims", 3, "-c", settings),
            *("--region", LEARN, "--val-region", VALIDATE, "--steps", options.steps),
            *("--seed", options.seed, *executor),
        ),
        *(
            (image, "--model", run / "model.safetensors", "--overwrite", *words, *executor)
            for words in (("--name", ALONE, "--region", TEST), ("--name", WHOLE))
        ),
    )
    for name in (ALONE, WHOLE):
        bigseg("evaluate", image / "labels" / name, image / "labels" / "bodies", "--region", TEST)
    volume = open_volume(str(image))
    plane = Region((0, PLANE, 0, 0), (1, PLANE + 1, *volume.shape[2:]))
    draw(volume, plane, truth="bodies", picture=options.out / f"fib25-{options.seed}.png")


if __name__ == "__main__":
    main()
