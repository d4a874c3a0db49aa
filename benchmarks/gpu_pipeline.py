"""From Zarr to Zarr on this machine's GPU: the share of the network's raw speed that is kept.

    python benchmarks/gpu_pipeline.py [--repeat 6] [--engines torch,compiled] [--scratch DIR]

A made-up volume of (256 · repeat)³ uint8 in chunks of 128³ (zstd) and a 3-D U-Net of width 16 and
depth 3; `bigseg bench` segments it for each engine and precision, in tiles of 256³, on Ray.
Efficiency is the raw forward time of the same tiles, input on the device, out of the wall time
without start-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from setting import membranes, write_network

ENGINES = "torch,compiled,compiled:fp16"


def main() -> None:
    """Print a row for each engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--engines", default=ENGINES)
    parser.add_argument("--scratch")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        image = write_repeated(Path(folder, "image.zarr"), options.repeat)
        model = write_network(Path(folder), width=16, depth=3)
        for engine in options.engines.split(","):
            print(row(image, model, engine), flush=True)


def write_repeated(path: Path, repeat: int) -> Path:
    """An OME-Zarr image of `repeat` times the same 256³ voxels along each axis."""
    data = np.tile(membranes((256,) * 3), (repeat,) * 3)
    group = zarr.create_group(str(path), zarr_format=3)
    codec = zarr.codecs.ZstdCodec(level=3)
    names = ["z", "y", "x"]
    group.create_array("0", data=data, chunks=(128,) * 3, compressors=codec, dimension_names=names)
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in names]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    level = {"path": "0", "coordinateTransformations": scale}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    return path


def row(image: Path, model: Path, engine: str) -> str:
    """One engine's figures."""
    name, _, precision = engine.partition(":")
    words = [sys.executable, "-m", "bigseg", "bench", str(image), "--model", str(model)]
    words += ["--engine", name, "--precision", precision or "auto", "--blocks", "216", "--json"]
    words += ["--tile", "256,256,256", "--out", str(image.parent / "out.zarr")]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    if run.returncode:
        return f"{engine:14s} {run.stderr.strip().splitlines()[-1]}"
    values = json.loads(run.stdout)
    rate = values["useful_voxels_a_second"] / 1e6
    return (
        f"{engine:14s} tile {values['tile_s'] * 1e3:6.1f} ms raw, {values['n_tiles']} tiles in "
        f"{values['wall_s']:5.2f} s, {rate:6.1f} Mvox/s, efficiency {values['efficiency']:.2f}, "
        f"start {values['start_s']:.1f} s, {values['spent']}"
    )


if __name__ == "__main__":
    main()
