"""Connected components of a whole volume: blockwise with two workers, and by others in one memory.

    python benchmarks/components.py --side 512 --repeats 5 [--peer-python ENV/bin/python]

The volume is a mask of smoothed noise in shared memory. bigseg's way, by two processes: the ids of
every block by itself, as scratch space has them, and faces; pairs; numbers; and the numbers written
into one uint32 volume. cc3d labels the whole with one thread. dask-image and igneous (its stages
for components on a precomputed volume of its own, in memory) run as their users run them, where a
Python that has them is given. Ours is compared voxel by voxel with cc3d's, numbered anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cc3d
import numpy as np
from scipy import ndimage

from bigseg.blocks import BlockGrid, Region
from bigseg.faces import Adjacency, BlockComponents, describe, equal_pairs, renumbered
from bigseg.instances import components
from bigseg.joining import Tables
from bigseg.stitch import neighbours, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from bigseg.blocks import Vec

ADJACENCY = Adjacency(3, 1)
_HELD: dict[str, SharedMemory] = {}
_ARRAYS: dict[str, NDArray[Any]] = {}


def main() -> None:
    """Time all ways in turn, some times over; print the medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--peer-python", help="a Python with dask-image, igneous-pipeline")
    options = parser.parse_args()
    shape = (1, *(options.side,) * 3)
    if options.side % options.block:
        parser.error("--side must be a multiple of --block")
    mask, labels = _shared("mask", np.uint8, shape), _shared("labels", np.uint32, shape)
    mask[:] = _blobs(shape)
    grid = BlockGrid(Region.of_shape(shape), (1, *(options.block,) * 3))
    ids = _shared("ids", np.uint32, (len(grid), *grid.core_shape))
    arrays = [(name, _HELD[name].name, a.dtype, a.shape) for name, a in _ARRAYS.items()]
    seconds: dict[str, list[float]] = {"cc3d": [], "bigseg": []}
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), initializer=_attach, initargs=(arrays,)
    ) as pool:
        list(pool.map(_nothing, range(4 * options.workers)))
        for _ in range(options.repeats):
            whole = functools.partial(cc3d.connected_components, mask[0], connectivity=6)
            seconds["cc3d"].append(_timed(whole))
            seconds["bigseg"].append(_timed(lambda: _blockwise(pool, grid, shape)))
            for name, time_s in _peers(options.peer_python, mask).items():
                seconds.setdefault(name, []).append(time_s)
    truth, n = components(mask != 0, dims=3, connectivity=1)
    assert np.array_equal(labels, truth), "the ways differ"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {"components": n, "blocks": len(grid), "medians_s": medians}
    found["of cc3d"] = {name: round(value / medians["cc3d"], 3) for name, value in medians.items()}
    found["parts_s of one process"] = _parts(grid)
    print(json.dumps(found, indent=2))
    del mask, labels, ids
    _ARRAYS.clear()
    for memory in _HELD.values():
        memory.unlink()


def _parts(grid: BlockGrid) -> dict[str, float]:
    """Seconds of each step over all blocks, one after the other in this process."""
    seconds: dict[str, float] = {}
    found: dict[int, BlockComponents] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the work gives
        started = time.perf_counter()
        result = work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    mask = _ARRAYS["mask"]
    for block in grid:
        part = timed("copy mask", lambda c=block.core: mask[c.slices] != 0)
        small = functools.partial(cc3d.connected_components, part[0].view(np.uint8), connectivity=6)
        timed("cc3d alone", small)
        of_block, _ = timed("components", lambda p=part: components(p, dims=3, connectivity=1))
        found[block.index] = timed(
            "describe", lambda b=block, i=of_block: _described(b.core, i, mask.shape)
        )
        timed("write ids", lambda b=block, i=of_block: _ARRAYS["ids"].__setitem__(b.index, i))
    numbers = timed("pairs and numbers", lambda: _numbers(grid, mask.shape, found)[1])
    for block in grid:
        timed("write numbers", lambda b=block: _renumber((b.index, b.core, numbers[b.index])))
    return {name: round(value, 3) for name, value in seconds.items()}


def _blobs(shape: Vec) -> NDArray[np.bool_]:
    noise = np.random.default_rng(0).standard_normal(shape[1:], dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, 4.0)
    return smooth[None] > np.quantile(smooth[::8, ::8, ::8], 0.8)


def _shared(name: str, dtype: type, shape: Vec) -> NDArray[Any]:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    _HELD[name] = SharedMemory(create=True, size=n_bytes)
    _ARRAYS[name] = np.ndarray(shape, dtype, _HELD[name].buf)
    return _ARRAYS[name]


def _attach(arrays: list[tuple[str, str, np.dtype[Any], Vec]]) -> None:
    for name, where, dtype, shape in arrays:
        # From Python 3.13 on it can be said that who made it also removes it.
        untracked = {"track": False} if sys.version_info >= (3, 13) else {}
        _HELD[name] = SharedMemory(name=where, **untracked)
        _ARRAYS[name] = np.ndarray(shape, dtype, _HELD[name].buf)


def _nothing(_: int) -> None:
    time.sleep(0.05)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _blockwise(pool: ProcessPoolExecutor, grid: BlockGrid, shape: Vec) -> int:
    found: dict[int, BlockComponents] = {}
    cores = [(block.index, block.core) for block in grid]
    for (index, _), table in zip(cores, pool.map(_label, cores), strict=True):
        found[index] = table
    n, numbers = _numbers(grid, shape, found)
    list(pool.map(_renumber, ((index, core, numbers[index]) for index, core in cores)))
    return n


def _numbers(
    grid: BlockGrid, shape: Vec, found: dict[int, BlockComponents]
) -> tuple[int, dict[int, NDArray[np.uint64]]]:
    """How many components there are in all, and the numbers of those of each block."""
    pairs = {
        i: [(j, equal_pairs(found[i], found[j], d, ADJACENCY)) for d, j in _beside(grid, i)]
        for i in found
    }
    numbers: dict[int, NDArray[np.uint64]] = {}
    tables = Tables(grid, shape, found.__getitem__, pairs.__getitem__)
    return number(tables, numbers.__setitem__, min_size=1), numbers


def _beside(grid: BlockGrid, block: int) -> Iterator[tuple[Vec, int]]:
    return neighbours(grid, block, ADJACENCY)


def _label(block: tuple[int, Region]) -> BlockComponents:
    index, core = block
    mask = _ARRAYS["mask"]
    ids, _ = components(mask[core.slices] != 0, dims=3, connectivity=1)
    _ARRAYS["ids"][index] = ids
    return _described(core, ids, mask.shape)


def _described(core: Region, ids: NDArray[np.uint32], shape: Vec) -> BlockComponents:
    return describe(ids, core, shape, axes=ADJACENCY.axes, sized=False)


def _renumber(block: tuple[int, Region, NDArray[np.uint64]]) -> None:
    index, core, numbers = block
    _ARRAYS["labels"][core.slices] = renumbered(_ARRAYS["ids"][index], numbers.astype(np.uint32))


def _peers(python: str | None, mask: NDArray[Any]) -> dict[str, float]:
    """Seconds of others, each in a process of its own."""
    if python is None:
        return {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file, program = Path(folder, "mask.npy"), Path(__file__).with_name("peer_components.py")
        np.save(file, mask[0])
        words = [python, str(program), str(file), folder]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
