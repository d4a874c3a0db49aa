"""From Zarr to Zarr on this machine's GPU: the share of the network's raw speed that is kept.

    python benchmarks/gpu_pipeline.py [--side 1024] [--engines torch,compiled] [--scratch DIR]

A made-up volume of side³ uint8 in chunks of 64³ (zstd) and a 3-D U-Net of width 16 and depth 3;
`bigseg bench` segments some of its blocks on Ray for each engine and precision. Efficiency is the
raw forward time of the same tiles, input on the device, out of the wall time without start-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from setting import write_network, write_volume

ENGINES = "torch,compiled,compiled:fp16"


def main() -> None:
    """Print a row for each engine."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--engines", default=ENGINES)
    parser.add_argument("--scratch")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        image = write_volume(Path(folder), (options.side,) * 3)
        model = write_network(Path(folder), width=16, depth=3)
        for engine in options.engines.split(","):
            print(row(image, model, engine), flush=True)


def row(image: Path, model: Path, engine: str) -> str:
    """One engine's figures."""
    name, _, precision = engine.partition(":")
    words = [sys.executable, "-m", "bigseg", "bench", str(image), "--model", str(model)]
    words += ["--engine", name, "--precision", precision or "auto", "--blocks", "16", "--json"]
    words += ["--out", str(image.parent / "out.zarr")]
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
