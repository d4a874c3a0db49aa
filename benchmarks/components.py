"""Connected components of a whole volume: blockwise with two workers, and by others in one memory.

    python benchmarks/components.py --side 512 --repeats 5 [--peer-python ENV/bin/python]

The volume is a mask of smoothed noise in shared memory. bigseg's way: every block by itself, faces,
pairs, numbers, and the numbers written into one uint32 volume, by two processes; cc3d labels the
whole with one thread; dask-image and scipy as their users run them, where they are installed. Every
way gives the same components; ours is compared voxel by voxel with cc3d's, numbered anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
from scipy import ndimage

from bigseg.blocks import BlockGrid, Region
from bigseg.faces import Adjacency, BlockComponents, describe, equal_pairs
from bigseg.instances import components
from bigseg.joining import Tables
from bigseg.stitch import neighbours, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from bigseg.blocks import Vec

ADJACENCY = Adjacency(3, 1)
_HELD: dict[str, Any] = {}


def main() -> None:
    """Time all ways in turn, some times over; print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-python", help="a Python with dask-image")
    options = parser.parse_args()
    shape = (1, *(options.side,) * 3)
    mask, ids = _shared("mask", np.uint8, shape), _shared("ids", np.uint32, shape)
    mask[:] = _blobs(shape)
    grid = BlockGrid(Region.of_shape(shape), (1, *(options.block,) * 3))
    names = (_HELD["mask"].name, _HELD["ids"].name)
    seconds: dict[str, list[float]] = {"cc3d": [], "bigseg": []}
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), initializer=_attach, initargs=(*names, shape)
    ) as pool:
        list(pool.map(_nothing, range(4 * options.workers)))
        for _ in range(options.repeats):
            seconds["cc3d"].append(
                _timed(lambda: cc3d.connected_components(mask[0], connectivity=6))
            )
            seconds["bigseg"].append(_timed(lambda: _blockwise(pool, grid, shape)))
            for name, time_s in _peers(options.peer_python, names[0], shape).items():
                seconds.setdefault(name, []).append(time_s)
    truth, n = components(mask != 0, dims=3, connectivity=1)
    assert np.array_equal(ids, truth), "the ways differ"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {"components": n, "blocks": len(grid), "medians_s": medians}
    found["of cc3d"] = {name: round(value / medians["cc3d"], 3) for name, value in medians.items()}
    print(json.dumps(found, indent=2))
    for memory in _HELD.values():
        memory.unlink()


def _blobs(shape: Vec) -> NDArray[np.bool_]:
    noise = np.random.default_rng(0).standard_normal(shape[1:], dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, 4.0)
    return smooth[None] > np.quantile(smooth[::8, ::8, ::8], 0.8)


def _shared(name: str, dtype: type, shape: Vec) -> NDArray[np.generic]:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    _HELD[name] = SharedMemory(create=True, size=n_bytes)
    return np.ndarray(shape, dtype, _HELD[name].buf)


def _attach(mask: str, ids: str, shape: Vec) -> None:
    for name, where, dtype in (("mask", mask, np.uint8), ("ids", ids, np.uint32)):
        _HELD[name + "-memory"] = (
            SharedMemory(name=where, track=False)
            if sys.version_info
            >= (
                3,
                13,
            )
            else SharedMemory(name=where)
        )
        _HELD[name] = np.ndarray(shape, dtype, _HELD[name + "-memory"].buf)


def _nothing(_: int) -> None:
    time.sleep(0.05)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _blockwise(pool: ProcessPoolExecutor, grid: BlockGrid, shape: Vec) -> int:
    found: dict[int, BlockComponents] = {}
    for block, table in zip(grid, pool.map(_label, (b.core for b in grid)), strict=True):
        found[block.index] = table
    pairs = {
        i: [(j, equal_pairs(found[i], found[j], d, ADJACENCY)) for d, j in _beside(grid, i)]
        for i in found
    }
    numbers: dict[int, Any] = {}
    tables = Tables(grid, shape, found.__getitem__, pairs.__getitem__)
    n = number(tables, numbers.__setitem__, min_size=1)
    list(pool.map(_renumber, (b.core for b in grid), (numbers[b.index] for b in grid)))
    return n


def _beside(grid: BlockGrid, block: int) -> Iterator[tuple[Vec, int]]:
    return neighbours(grid, block, ADJACENCY)


def _label(core: Region) -> BlockComponents:
    mask = np.ascontiguousarray(_HELD["mask"][core.slices]) != 0
    ids, _ = components(mask, dims=3, connectivity=1)
    _HELD["ids"][core.slices] = ids
    return describe(ids, core, _HELD["mask"].shape, axes=ADJACENCY.axes)


def _renumber(core: Region, numbers: NDArray[np.uint64]) -> None:
    table = np.concatenate([np.zeros(1, np.uint32), numbers.astype(np.uint32)])
    part = _HELD["ids"][core.slices]
    part[:] = table[part]


def _peers(python: str | None, mask: str, shape: Vec) -> dict[str, float]:
    """Seconds of others, each in a process of its own."""
    if python is None:
        return {}
    words = [python, __file__.replace("components.py", "peer_components.py"), mask]
    done = subprocess.run(
        [*words, ",".join(map(str, shape))], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
