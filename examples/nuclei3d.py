"""Crowded nuclei in a noisy 3-D stack with long voxels: AP at IoU 0.5 on the part held out.

The stack (100³ voxels of 0.28 × 0.127 × 0.127 µm, 54 nuclei) is not part of bigseg; give the
folder that holds gonuclear_1135.h5, with the datasets raw and label.

    python examples/nuclei3d.py ../shared/data/nuclei3d nuclei3d-run

Along y the network learns rows 0-51; rows 52-65 choose the best network and the rule by which
nuclei are made of it, rows 66-99 are scored. They hold about 30 nuclei, many cut by the border or
hardly brighter than what is around them: the score is rough, and says whether the way works.
"""

from __future__ import annotations

from commands import bigseg, draw, parser_of, train_and_segment

from bigseg.blocks import Region
from bigseg.volume import open_volume

LEARN, VALIDATE, TEST = ":,0:52,:", ":,52:66,:", ":,66:100,:"
ROWS = (66, 100)
SETTINGS = """\
task: instances
net: {depth: 2, width: 8, padding: same}
patch: [32, 64, 64]
batch: 2
optim: {lr: 5.0e-3}
loss: {dice: 1.0, balance: true}
val_every: 100
"""


def main() -> None:
    """Convert, train, segment, score."""
    options = parser_of(__doc__, steps=600).parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    image, run = options.out / "nuclei.zarr", options.out / f"run-{options.seed}"
    settings, source = options.out / "config.yaml", options.data / "gonuclear_1135.h5"
    settings.write_text(SETTINGS)
    if not image.exists():
        bigseg("convert", f"{source}:/raw", image)
        bigseg("convert", f"{source}:/label", image, "--labels", "nuclei")
    executor = ("--executor", options.executor)
    train_and_segment(
        (
            *(image, "--labels", "nuclei", "--out", run, "--dims", 3, "-c", settings),
            *("--region", LEARN, "--val-region", VALIDATE, "--steps", options.steps),
            *("--seed", options.seed, *executor),
        ),
        (image, "--model", run / "model.safetensors", "--overwrite", *executor),
    )
    labels = image / "labels"
    bigseg("evaluate", labels / "bigseg", labels / "nuclei", "--region", TEST)
    volume = open_volume(str(image))
    z = volume.shape[1] // 2
    plane = Region((0, z, ROWS[0], 0), (1, z + 1, ROWS[1], volume.shape[3]))
    draw(volume, plane, truth="nuclei", picture=options.out / f"nuclei3d-{options.seed}.png")


if __name__ == "__main__":
    main()
