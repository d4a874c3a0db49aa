"""What the examples share: their arguments, commands as a user types them, and a picture."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bigseg.view import save_overlay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bigseg.blocks import Region
    from bigseg.volume import Volume


def parser_of(about: str | None, *, steps: int | None) -> argparse.ArgumentParser:
    """The arguments of an example, whose docstring is `about`."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument(
        "--seed", type=int, default=0, help="run the seeds of one folder one after the other"
    )
    parser.add_argument("--executor", default="ray", choices=["ray", "serial"])
    return parser


def bigseg(*words: object) -> None:
    """Run a bigseg command; of many words only the first and last are shown."""
    shown = [str(word) for word in words]
    if len(shown) > 20:
        shown[3:-6] = ["..."]
    print("$ bigseg", *shown, flush=True)
    subprocess.run([sys.executable, "-m", "bigseg", *map(str, words)], check=True)


def train_and_segment(train: Iterable[object], *segments: Iterable[object]) -> None:
    """`bigseg train` with these words, then each `bigseg segment`; says how long both took."""
    started = time.monotonic()
    bigseg("train", *train)
    trained = time.monotonic()
    for words in segments:
        bigseg("segment", *words)
    print(f"train {trained - started:.0f} s, segment {time.monotonic() - trained:.0f} s")


def draw(image: Volume, plane: Region, *, truth: str, picture: Path) -> None:
    """A picture of one plane of an image: raw, its labels `truth`, labels `bigseg`, overlay."""
    volumes = (image, image.label("bigseg"), image.label(truth))
    raw, found, true = (v.read(plane)[0, 0, 0] for v in volumes)
    save_overlay(str(picture), raw, found, truth=true, kind="objects")
    print(f"{image.url}, plane {plane}, raw | truth | result | overlay: {picture}")
