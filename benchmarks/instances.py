"""What making objects costs beside the network, stage by stage, on this machine.

    python benchmarks/instances.py --shape 256,512,512 [--repeats 5]

The image is a synthetic tissue. The network's time is that of a 3-D U-Net of width 16 and depth 3
with random weights, from Zarr to Zarr on Ray; the objects are those of the tissue's true cells: an
image of their inside and border goes through the same stages with a network that only says what it
sees. Both run in turn with the same blocks and workers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigseg.blocks import BlockGrid, Region
from bigseg.checkpoint import save_model
from bigseg.config import ModelCard, SegmentConfig, UNetSpec
from bigseg.model import UNet
from bigseg.on_ray import segment_on_ray
from bigseg.progress import NullProgress
from bigseg.rules import RuleOptions
from bigseg.sample import make_sample
from bigseg.targets import BORDER, INSIDE, boundary
from bigseg.volume import OutputSpec, create_pyramid

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from planting import BACKGROUND, write_planting_model
from planting import BORDER as PAINTED_BORDER
from planting import INSIDE as PAINTED_INSIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigseg.volume import Volume

MARGIN = 4


def main() -> None:
    """Run both some times over; print the medians of each stage and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="256,512,512")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block", default="128,128,256")
    options = parser.parse_args()
    shape, block = (tuple(map(int, text.split(","))) for text in (options.shape, options.block))
    with tempfile.TemporaryDirectory(prefix="bigseg-bench-") as folder:
        jobs = jobs_in(Path(folder), shape, block, options.workers)
        seconds: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for name, config in jobs.items():
                clock = StageClock()
                result = segment_on_ray(config, clock)
                for stage, time_s in clock.seconds.items():
                    seconds.setdefault(f"{name} {stage}", []).append(time_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    predict = medians["network predict"]
    later = {k: medians[f"objects {k}"] for k in ("seeds", "stitch", "number", "grow", "objects")}
    found: dict[str, Any] = {
        "shape": shape,
        "objects": result.n_objects,
        "medians_s": {name: round(value, 3) for name, value in medians.items()},
        "stitch and number of predict": round((later["stitch"] + later["number"]) / predict, 4),
        "all of predict": round(sum(later.values()) / predict, 4),
    }
    print(json.dumps(found, indent=2))


def jobs_in(
    folder: Path, shape: tuple[int, ...], block: tuple[int, ...], workers: int
) -> dict[str, SegmentConfig]:
    """The network on the tissue, and the objects of what is painted of its true cells."""
    image = make_sample(str(folder / "image.zarr"), shape=shape, seed=0, progress=NullProgress())
    common: dict[str, Any] = {
        "block": block,
        "workers": workers,
        "engine": "openvino",
        "overwrite": True,
    }
    return {
        "network": SegmentConfig(
            image=image.url,
            model=network(folder / "network.safetensors"),
            out=str(folder / "network.zarr"),
            **common,
        ),
        "objects": SegmentConfig(
            image=paint(image, str(folder / "painted.zarr")),
            model=write_planting_model(folder / "painter.safetensors"),
            out=str(folder / "objects.zarr"),
            rule=RuleOptions(erode=1, grow=3),
            # A network of one voxel has no tile of its own, and the tile decides the chunks.
            tile=block,
            **common,
        ),
    }


def paint(image: Volume, url: str) -> str:
    """An image of the true cells as the planting network reads it."""
    cells = image.label("cells")
    spec = OutputSpec(np.dtype(np.uint8), (1, 64, 64, 64), None, ("painted",), {})
    painted = create_pyramid(image, url, spec, name="painted")
    grid = BlockGrid(Region.of_shape(image.shape), (1, 128, 256, 256))
    for block in grid:
        around = block.core.grow((0, *(MARGIN,) * 3), (0, *(MARGIN,) * 3)).intersect(grid.region)
        classes = boundary(cells.read(around)[0, 0].astype(np.int64), border_vox=2.0)
        painted_as = [PAINTED_INSIDE, PAINTED_BORDER]
        values = np.select([classes == INSIDE, classes == BORDER], painted_as, BACKGROUND)
        part = values.astype(np.uint8)[None, None][
            (slice(None), *block.core.relative_to(around.start).slices)
        ]
        painted.write(block.core, part)
    return painted.url


def network(path: Path) -> str:
    """The U-Net of width 16 and depth 3."""
    torch.manual_seed(0)
    spec = UNetSpec.build(3, out_channels=3, depth=3, width=16)
    net = UNet(spec).eval()
    save_model(str(path), net, ModelCard(spec=spec, classes=("background", "inside", "border")))
    return str(path)


class StageClock(NullProgress):
    """Notes how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, label: str, **about: Any) -> Iterator[Any]:  # noqa: ANN401
        """Time it."""
        started = time.perf_counter()
        with super().task(label, **about) as task:
            yield task
        self.seconds[label] = time.perf_counter() - started


if __name__ == "__main__":
    main()
