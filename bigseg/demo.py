"""The whole way once, on this computer: sample, train, segment, evaluate.

    DIR/cells.zarr                    the image, with labels/cells and labels/tissue (the truth)
    DIR/cells.zarr/labels/bigseg      the cells that the trained network found, and their table
    DIR/run/model.safetensors         the network
    DIR/demo.png                      raw | truth | result | overlay of a plane that it never saw

It calls what the commands call; `as_text` names the commands that do the same.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigseg import store
from bigseg.blocks import Region, parse_region
from bigseg.cluster import connect
from bigseg.config import (
    AugmentConfig,
    NetConfig,
    OptimConfig,
    SegmentConfig,
    TrainConfig,
    dump_yaml,
)
from bigseg.errors import InputError
from bigseg.evaluate import evaluate
from bigseg.on_ray import segment_on_ray
from bigseg.sample import CELLS, TISSUE, make_sample
from bigseg.train_ddp import train
from bigseg.view import save_overlay
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from bigseg.evaluate import Scores
    from bigseg.progress import Progress

# Validation chooses the checkpoint, so the planes that are scored are not among its own.
TRAIN, VALIDATE, TEST = ":44,:,:", "44:52,:,:", "52:,:,:"
STEPS = 200


@dataclass(frozen=True)
class DemoResult:
    """Where everything lies, and the scores on planes that were not trained on."""

    folder: str
    picture: str
    scores: Scores
    seconds: float

    def as_text(self) -> str:
        """The figures, the places, and the commands that do the same."""
        folder = _shortest(self.folder)
        image, model = f"{folder}/cells.zarr", f"{folder}/run/model.safetensors"
        scores = self.scores
        rows = [
            f"  objects              {scores.n_pred_objects} found, {scores.n_truth_objects} true",
            f"  AP at IoU 0.5        {scores.average_precision[0.5]:.3f}",
            f"  SEG                  {scores.seg:.3f}",
            f"  adapted Rand error   {scores.rand.error:.3f}",
        ]
        return "\n".join(
            [
                f"Scores on the planes {TEST.partition(',')[0]}, which the network never saw:",
                *rows,
                "",
                f"picture  {_shortest(self.picture)}",
                f"image    {image}  (labels: {CELLS}, {TISSUE}, bigseg)",
                f"objects  {image}/labels/bigseg/objects.parquet",
                f"model    {model}",
                f"done in  {self.seconds:.0f} s",
                "",
                "The same by hand:",
                f"  bigseg sample {image}",
                f"  bigseg train {image} --labels {CELLS} --task instances --out {folder}/run "
                f"-c {folder}/config.yaml",
                f"  bigseg segment {image} --model {model}",
                f"  bigseg objects {image}/labels/bigseg",
                f"  bigseg evaluate {image}/labels/bigseg {image}/labels/{CELLS} --region {TEST}",
            ]
        )


def _has_truth(url: str) -> bool:
    """Whether the sample is there, whole: its truth is listed last."""
    try:
        return TISSUE in open_volume(url).label_names()
    except InputError:
        return False


def _shortest(path: str) -> str:
    """The path as it is typed here: relative where that is shorter."""
    return min(path, os.path.relpath(path), key=len)


def demo_config(image: str) -> TrainConfig:
    """A small 3-D network, trained in about a minute on two cores."""
    return TrainConfig(
        images=(image,),
        labels=CELLS,
        task="instances",
        region=TRAIN,
        val_region=VALIDATE,
        dims=3,
        net=NetConfig(depth=2, width=8, padding="same"),
        patch=(24, 64, 64),
        batch=2,
        steps=STEPS,
        val_every=STEPS // 2,
        optim=OptimConfig(lr=5e-3, warmup_steps=20),
        augment=AugmentConfig(rotate_degrees=0.0, tilt_degrees=0.0, scale=0.0, elastic_vox=0.0),
    )


def run_demo(folder: str, progress: Progress) -> DemoResult:
    """Sample, train, segment and evaluate in `folder`; what is there already is used again.

    Raises:
        BigsegError: the folder cannot be written, or holds something else.
    """
    started = time.monotonic()
    url = store.join(folder, "cells.zarr")
    if not _has_truth(url):
        make_sample(url, overwrite=True, progress=progress)
    config = demo_config(url)
    store.write_atomic(store.join(folder, "config.yaml"), dump_yaml(config).encode())
    with connect("local"):
        trained = train(config, store.join(folder, "run"), progress=progress)
        result = segment_on_ray(SegmentConfig(image=url, model=trained.model_url), progress)
    image = open_volume(url)
    found, truth = image.label(result.plan.output.name), image.label(CELLS)
    where = parse_region(TEST, image.shape[1:])
    test = Region((0, *where.start), (1, *where.stop))
    picture = store.join(folder, "demo.png")
    plane = Region((0, where.start[0] + 6, 0, 0), (1, where.start[0] + 7, *where.stop[1:]))
    raw, labels, answer = (v.read(plane)[0, 0, 0] for v in (image, truth, found))
    save_overlay(picture, raw, answer, truth=labels, kind="objects")
    scores = evaluate(found, truth, region=test)
    return DemoResult(folder, picture, scores, time.monotonic() - started)
