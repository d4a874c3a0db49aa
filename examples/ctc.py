"""The two films of the U-Net paper: SEG on frames that lie apart in time from those learnt.

PhC-U373 and DIC-HeLa of the Cell Tracking Challenge are not part of bigseg; give the folder that
holds image_NNN.tif and cells_NNN.tif (instances) of one of them.

    python examples/ctc.py ../shared/data/phc-u373 u373-run
    python examples/ctc.py ../shared/data/dic-hela hela-run

Neighbouring frames show the same cells, so frames that lie close together are never divided
between learning and testing. How much the truth of the nearest learnt frame would score, copied,
says what the rest of the likeness is worth. SEG is that of the challenge (Maska et al. 2014): the
mean IoU of the true cells. The paper's 0.920 and 0.776 are of frames whose labels are not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from commands import bigseg, parser_of, train_and_segment

from bigseg.blocks import Region
from bigseg.evaluate import Contingency, scores
from bigseg.view import save_overlay
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Film:
    """Which frames serve what, voxel size along y, x in µm, and what is trained how long."""

    learn: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    voxel_size: str
    level: int
    steps: int
    settings: str


FILMS = {
    "phc-u373": Film(
        learn=("001", "005", "006", "007", "021", "049", "059", "067"),
        validate=("072", "075"),
        test=("092", "096", "100", "102", "112"),
        voxel_size="0.65,0.65",
        level=1,
        steps=800,
        settings="""\
task: instances
border_um: 3.9
net: {depth: 4, width: 16, padding: same}
patch: [160, 160]
batch: 4
optim: {lr: 2.0e-3}
loss: {dice: 1.0, balance: true}
val_every: 100
""",
    ),
    "dic-hela": Film(
        learn=("002", "005", "039", "054"),
        validate=("021",),
        test=("031", "033", "034"),
        voxel_size="0.19,0.19",
        level=1,
        steps=800,
        settings="""\
task: instances
border_um: 1.52
net: {depth: 4, width: 16, padding: same}
patch: [192, 192]
batch: 4
optim: {lr: 2.0e-3}
loss: {dice: 1.0, balance: true, weight_map: {w0: 10}}
augment: {scale: 0.2}
val_every: 100
""",
    ),
}


def main() -> None:
    """Convert, train, segment, score."""
    parser = parser_of(__doc__, steps=None)
    parser.add_argument("--film", choices=FILMS, help="Default: the name of the data's folder.")
    options = parser.parse_args()
    film = FILMS[options.film or options.data.resolve().name]
    options.out.mkdir(parents=True, exist_ok=True)
    learn, validate, test = (options.out / f"{n}.zarr" for n in ("learn", "validate", "test"))
    for image, frames in ((learn, film.learn), (validate, film.validate), (test, film.test)):
        if not image.exists():
            convert(options.data, frames, image, film.voxel_size)
    settings, run = options.out / "config.yaml", options.out / f"run-{options.seed}"
    settings.write_text(film.settings)
    result, executor = options.out / f"result-{options.seed}.zarr", ("--executor", options.executor)
    train_and_segment(
        (
            *(learn, "--val-image", validate, "--labels", "cells", "--level", film.level),
            *("--out", run, "--dims", 2, "-c", settings, "--steps", options.steps or film.steps),
            *("--seed", options.seed, *executor),
        ),
        (test, "--model", run / "model.safetensors", "--out", result, *executor),
    )
    report(options.data, film, result, options.out / f"result-{options.seed}.png")


def convert(data: Path, frames: tuple[str, ...], image: Path, voxel_size: str) -> None:
    """Frames as one film, and the cells in them beside it."""
    files = [[data / f"{kind}_{frame}.tif" for frame in frames] for kind in ("image", "cells")]
    axes = "tyx" if len(frames) > 1 else "yx"
    bigseg("convert", *files[0], image, "--axes", axes, "--voxel-size", voxel_size)
    bigseg("convert", *files[1], image, "--axes", axes, "--labels", "cells")


def report(data: Path, film: Film, result: Path, picture: Path) -> None:
    """Print the scores of the test frames and of copying, and draw the first of them."""
    volume = open_volume(str(result))
    found = volume.read(Region.of_shape(volume.shape))[0, :, 0]
    truth = np.stack([tifffile.imread(data / f"cells_{frame}.tif") for frame in film.test])
    # A coarser level was segmented; the finest is scored.
    found = enlarged(found, 2**film.level, truth.shape)
    pairs = zip(found, truth, strict=True)
    scored = scores([Contingency.of(one, other) for one, other in pairs])
    print(
        f"{scored.n_pred_objects} cells (truth {scored.n_truth_objects}), "
        f"AP at IoU 0.5 {scored.average_precision[0.5]:.3f}"
    )
    copies = [tifffile.imread(data / f"cells_{nearest(f, film.learn)}.tif") for f in film.test]
    tables = [Contingency.of(one, other) for one, other in zip(copies, truth, strict=True)]
    print(f"SEG {scored.seg:.3f}; of the nearest learnt frame, copied, {scores(tables).seg:.3f}")
    raw = tifffile.imread(data / f"image_{film.test[0]}.tif")
    save_overlay(str(picture), raw, found[0], truth=truth[0], kind="objects")
    print(f"frame {film.test[0]}, raw | truth | result | overlay: {picture}")


def enlarged(labels: NDArray[Any], factor: int, shape: tuple[int, ...]) -> NDArray[Any]:
    """Labels (t, y, x) of a coarser level at the size of the finest."""
    large = labels.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.asarray(large[:, : shape[1], : shape[2]])


def nearest(frame: str, frames: tuple[str, ...]) -> str:
    """The frame that is nearest in time."""
    return min(frames, key=lambda other: abs(int(other) - int(frame)))


if __name__ == "__main__":
    main()
