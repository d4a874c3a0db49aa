"""What stitching costs the driver, and what a block's faces cost a worker.

    simulated blocks: each has `--held` components that are equal to one of another block and as
    many that are not; half of its neighbours' pairs; nothing is read from disk

Memory is the growth of the largest resident memory over that before numbering began, divided by
the number of held components; `--memory-mib` of it are tables that are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from bigseg.blocks import BlockGrid, Region
from bigseg.faces import Adjacency, BlockComponents, describe, equal_pairs
from bigseg.joining import Held, Tables, Threads
from bigseg.stitch import neighbours, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

CORE = (1, 128, 256, 256)
ADJACENCY = Adjacency(3, 1)
N_PATTERNS = 64
SIDE = 96


def simulated(grid: BlockGrid, n_held: int) -> Tables:
    """Tables whose blocks have the same components, and random pairs through each face."""
    rng = np.random.default_rng(0)
    shape = grid.region.stop
    n = 2 * n_held
    inside = np.sort(rng.choice(np.prod(CORE), n, replace=False))
    t, z, y, x = np.unravel_index(inside, CORE)
    first = ((t * shape[1] + z) * shape[2] + y) * shape[3] + x
    sizes = rng.integers(1, 5000, n).astype(np.uint64)
    patterns = [random_pairs(rng, n_held) for _ in range(N_PATTERNS)]

    def read(block: int) -> BlockComponents:
        core = grid[block].core
        corner = np.ravel_multi_index(core.start, shape)
        return BlockComponents(core, sizes, (first + corner).astype(np.uint64), {})

    def pairs(block: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        for i, (_, other) in enumerate(neighbours(grid, block, ADJACENCY)):
            yield other, patterns[(3 * block + i) % N_PATTERNS]

    return Tables(grid, shape, read, pairs)


def random_pairs(rng: np.random.Generator, n_held: int) -> NDArray[np.uint32]:
    """A sixth of the odd components through each face."""
    chosen = [2 * rng.choice(n_held, n_held // 6, replace=False) + 1 for _ in range(2)]
    return np.stack(chosen, axis=1).astype(np.uint32)


def largest_bytes() -> int:
    """The largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_driver(n_blocks: int, n_held: int, memory_bytes: int) -> dict[str, float]:
    """Numbering of simulated blocks, in a grid of about that many."""
    side = max(1, round((n_blocks / 20) ** 0.5))
    counts = (1, 20, side, side)
    shape = tuple(n * c for n, c in zip(counts, CORE, strict=True))
    tables = simulated(BlockGrid(Region.of_shape(shape), CORE, beam=(4, 4)), n_held)
    before, start, start_cpu = largest_bytes(), time.perf_counter(), time.process_time()
    n = number(tables, lambda *_: None, min_size=100, memory_bytes=memory_bytes)
    seconds, growth = time.perf_counter() - start, largest_bytes() - before
    cpu_seconds = time.process_time() - start_cpu
    with Threads.open(4) as threads:
        n_nodes = len(Held.of(tables, threads).ids)
    return {
        "blocks": len(tables.grid),
        "objects": n,
        "held components": n_nodes,
        "seconds": round(seconds, 1),
        "processor seconds": round(cpu_seconds, 1),
        "growth in MiB": round(growth / 2**20, 1),
        "bytes a held component": round(growth / n_nodes, 1),
    }


def measure_block() -> dict[str, float]:
    """A worker's part for a block of CORE with seeds of about a dozen voxels across."""
    rng = np.random.default_rng(1)
    z, y, x = (min(n, SIDE) for n in CORE[1:])
    noise = ndimage.gaussian_filter(rng.random((z, y, x)), 4, mode="wrap")
    repeats = [-(-n // s) for n, s in zip(CORE[1:], noise.shape, strict=True)]
    mask = np.tile(noise > np.quantile(noise, 0.7), repeats)[tuple(map(slice, CORE[1:]))]
    labelled, _ = ndimage.label(mask)
    ids = labelled.astype(np.uint32)[None]
    shape = (1, *(2 * n for n in CORE[1:]))
    a, b = Region((0,) * 4, CORE), Region((0, 0, 0, CORE[3]), (*CORE[:3], 2 * CORE[3]))
    block = describe(ids, a, shape, axes=ADJACENCY.axes)
    other = describe(ids, b, shape, axes=ADJACENCY.axes)
    data = block.to_bytes()
    figures: dict[str, float] = {"components": block.n, "KiB of the file": round(len(data) / 1024)}
    for name, call in {
        "describe": lambda: describe(ids, a, shape, axes=ADJACENCY.axes),
        "to_bytes": block.to_bytes,
        "from_bytes": lambda: BlockComponents.from_bytes(data, core=a),
        "from_bytes without planes": lambda: BlockComponents.from_bytes(data, core=a, axes=()),
        "equal_pairs, faces": lambda: equal_pairs(block, other, (0, 0, 0, 1), ADJACENCY),
        "equal_pairs, corners": lambda: equal_pairs(block, other, (0, 0, 0, 1), Adjacency(3, 3)),
    }.items():
        figures[f"ms of {name}"] = round(1000 * best_s(call), 2)
    return figures


def best_s(call: Callable[[], object]) -> float:
    """Seconds of the quickest of five calls."""
    times = [time.perf_counter()]
    for _ in range(5):
        call()
        times.append(time.perf_counter())
    return min(b - a for a, b in itertools.pairwise(times))


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20_000, help="about how many")
    parser.add_argument("--held", type=int, default=800, help="components a block to draw from")
    parser.add_argument("--memory-mib", type=int, default=16, help="of tables that are kept")
    options = parser.parse_args()
    # First of all: what it takes must not hide below what others took before.
    driver = measure_driver(options.blocks, options.held, options.memory_mib << 20)
    print(json.dumps({"driver": driver}))
    print(json.dumps({"block": measure_block()}))


if __name__ == "__main__":
    main()
