"""The network alone: bigseg's own forward on tiles that lie in memory, in a fresh process.

Which tile, engine and precision is read from the plan of a result, so that exactly what the
pipeline computed is timed. Prints `ready`, waits for a line on stdin, works, prints its figures:
several such processes can be started on the same mark, because they share the memory bandwidth.
Up to four different tiles are computed again and again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr
from setting import halo_of, normalise, read_network, report, set_threads

from bigseg.engine import EngineSpec, build_engine
from bigseg.ledger import Ledger
from bigseg.model import footprint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.model import UNet


def main() -> None:
    """Build, warm up, wait for the mark, work."""
    options = parse()
    set_threads(options.threads)
    ledger = Ledger.open(f"{options.result}/ledger")
    assert ledger is not None, options.result
    net = read_network(options.folder)
    tile = tuple(ledger.plan["tile"][1:])
    tiles = cut_tiles(options.image, net, tile)
    forward = build_engine(
        net,
        EngineSpec.model_validate(ledger.plan["engine"]),
        input_shape=tiles[0].shape,
        n_threads=options.threads,
    )
    forward(tiles[0])
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for i in range(options.tiles):
        forward(tiles[i % len(tiles)])
    report(seconds=time.perf_counter() - started, n_forwards=options.tiles)


def cut_tiles(image: Path, net: UNet, tile: tuple[int, ...]) -> list[NDArray[np.float32]]:
    """Inputs (1, 1, z, y, x) of one forward pass, cut from the volume or its mirror image."""
    volume = zarr.open_array(str(image / "0"), mode="r")[:]
    shape = [n + 2 * halo_of(net) for n in footprint(net.spec).smallest_output(tile)]
    missing = [max(0, n - have) for n, have in zip(shape, volume.shape, strict=True)]
    large = np.pad(volume, [(0, n) for n in missing], mode="symmetric")
    rng = np.random.default_rng(0)
    tiles = []
    for _ in range(4):
        start = [rng.integers(0, n - s + 1) for n, s in zip(large.shape, shape, strict=True)]
        part = tuple(slice(a, a + s) for a, s in zip(start, shape, strict=True))
        tiles.append(normalise(large[part])[None, None])
    return tiles


def parse() -> argparse.Namespace:
    """The options of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--tiles", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
