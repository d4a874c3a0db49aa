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
import shutil
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
from bigseg.config import ModelCard, NormRule, SegmentConfig, UNetSpec
from bigseg.model import UNet
from bigseg.on_ray import segment_on_ray
from bigseg.progress import NullProgress
from bigseg.rules import RuleOptions
from bigseg.sample import make_sample
from bigseg.targets import BORDER, INSIDE, boundary
from bigseg.volume import OutputSpec, create_pyramid

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
    folder = Path(tempfile.mkdtemp(prefix="bigseg-bench-"))
    shape = tuple(map(int, options.shape.split(",")))
    image = make_sample(str(folder / "image.zarr"), shape=shape, seed=0, progress=NullProgress())
    painted = paint(image, str(folder / "painted.zarr"))
    block = tuple(map(int, options.block.split(",")))
    jobs = {
        "network": (image.url, network(folder / "network.safetensors"), "labels"),
        "objects": (painted, painter(folder / "painter.safetensors"), "instances"),
    }
    seconds: dict[str, list[float]] = {}
    n_objects = None
    for _ in range(options.repeats):
        for name, (url, model, output) in jobs.items():
            config = SegmentConfig(
                image=url,
                model=model,
                out=str(folder / f"{name}.zarr"),
                output=output,  # type: ignore[arg-type]
                rule=RuleOptions(erode=1, grow=3) if output == "instances" else RuleOptions(),
                block=block,
                # A network of one voxel has no tile of its own, and the tile decides the chunks.
                tile=block if output == "instances" else None,
                workers=options.workers,
                engine="openvino",
                overwrite=True,
            )
            clock = StageClock()
            result = segment_on_ray(config, clock)
            n_objects = result.n_objects or n_objects
            for stage, time_s in clock.seconds.items():
                seconds.setdefault(f"{name} {stage}", []).append(time_s)
    shutil.rmtree(folder)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    predict = medians["network predict"]
    later = {k: medians[f"objects {k}"] for k in ("seeds", "stitch", "number", "grow", "objects")}
    found: dict[str, Any] = {
        "shape": shape,
        "objects": n_objects,
        "medians_s": {name: round(value, 3) for name, value in medians.items()},
        "stitch and number of predict": round((later["stitch"] + later["number"]) / predict, 4),
        "all of predict": round(sum(later.values()) / predict, 4),
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


def paint(image: Volume, url: str) -> str:
    """An image of 0 background, 1 border, 2 inside of the true cells."""
    cells = image.label("cells")
    spec = OutputSpec(np.dtype(np.uint8), (1, 64, 64, 64), None, ("painted",), {})
    painted = create_pyramid(image, url, spec, name="painted")
    grid = BlockGrid(Region.of_shape(image.shape), (1, 128, 256, 256))
    for block in grid:
        around = block.core.grow((0, *(MARGIN,) * 3), (0, *(MARGIN,) * 3)).intersect(grid.region)
        classes = boundary(cells.read(around)[0, 0].astype(np.int64), border_vox=2.0)
        values = np.select([classes == INSIDE, classes == BORDER], [2, 1], 0).astype(np.uint8)
        part = values[None, None][(slice(None), *block.core.relative_to(around.start).slices)]
        painted.write(block.core, part)
    return painted.url


def network(path: Path) -> str:
    """The U-Net of width 16 and depth 3."""
    torch.manual_seed(0)
    spec = UNetSpec.build(3, out_channels=3, depth=3, width=16)
    net = UNet(spec).eval()
    save_model(str(path), net, ModelCard(spec=spec, classes=("background", "inside", "border")))
    return str(path)


def painter(path: Path) -> str:
    """A network that says which of the three intensities it sees."""
    spec = UNetSpec(
        dims=3,
        out_channels=3,
        widths=(3,),
        kernels=((1, 1, 1),),
        strides=(),
        n_convs=1,
        norm="none",
    )
    net = UNet(spec)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        weights["down.0.0.weight"].copy_(torch.tensor([1.0, 1.0, -1.0]).reshape(3, 1, 1, 1, 1))
        weights["down.0.0.bias"].copy_(torch.tensor([0.0, -1.0, 1.0]))
        head = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, -2.0, 0.0]])
        weights["head.weight"].copy_(50 * head.reshape(3, 3, 1, 1, 1))
        weights["head.bias"].zero_()
    card = ModelCard(
        spec=spec,
        classes=("background", "inside", "border"),
        task="instances",
        norm=NormRule(kind="fixed", offset=0.0, scale=1.0),
    )
    save_model(str(path), net.eval(), card)
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
