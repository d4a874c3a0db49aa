"""Connected components of a whole volume: blockwise with two workers, and by others in one memory.

    python benchmarks/components.py --side 512 --repeats 5 [--peer-python ENV/bin/python]

dask-image takes minutes for 512³ voxels: leave it out with `--peers igneous`.

The volume is a mask of smoothed noise in shared memory. bigseg's way, in the stages and by the
functions of `bigseg segment`, by two processes: the components of every block by itself, their ids
and outermost planes left in shared memory instead of scratch space; the pairs of every block and
its neighbours; numbers; and the numbers written into one volume of the smallest type that holds
them all. cc3d labels the whole with one thread, into the type that it finds safe. dask-image and
igneous (its stages for components, on a precomputed volume of its own in memory) run as their users
run them, where a Python that has them is given. Ours is compared voxel by voxel with cc3d's,
numbered anew.
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
import torch
from scipy import ndimage

from bigseg.blocks import BlockGrid, Region
from bigseg.faces import Adjacency, BlockComponents, describe, equal_pairs
from bigseg.grow_stages import renumber
from bigseg.instances import components
from bigseg.joining import Tables
from bigseg.plan import smallest_type
from bigseg.stitch import neighbours, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Vec

ADJACENCY = Adjacency(3, 1)
PLANES = tuple((axis, side) for axis in ADJACENCY.axes for side in (0, 1))
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
    parser.add_argument("--peers", nargs="+", default=["igneous", "dask-image"])
    options = parser.parse_args()
    if options.side % options.block:
        parser.error("--side must be a multiple of --block")
    grid = BlockGrid(Region.of_shape((1, *[options.side] * 3)), (1, *[options.block] * 3))
    _make_arrays(grid)
    mask = _ARRAYS["mask"]
    seconds: dict[str, list[float]] = {"cc3d": [], "bigseg": []}
    arrays = [(name, _HELD[name].name, a.dtype, a.shape) for name, a in _ARRAYS.items()]
    with ProcessPoolExecutor(
        options.workers, get_context("spawn"), initializer=_attach, initargs=(arrays,)
    ) as pool:
        list(pool.map(_nothing, range(4 * options.workers)))
        # Several blocks at a time, as workers of bigseg get them; four times each, so that none
        # waits long for the other.
        each = functools.partial(pool.map, chunksize=max(1, len(grid) // (4 * options.workers)))
        for _ in range(options.repeats):
            whole = functools.partial(
                cc3d.connected_components, mask[0].view(np.uint8), connectivity=6
            )
            seconds["cc3d"].append(_timed(whole))
            seconds["bigseg"].append(_timed(lambda: _blockwise(grid, each)))
            for name, time_s in _peers(options.peer_python, options.peers, mask).items():
                seconds.setdefault(name, []).append(time_s)
    truth, first = components(mask, dims=3, connectivity=1)
    n = len(first)
    assert np.array_equal(_held_as("labels", smallest_type(n), mask.shape), truth), "ways differ"
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    types = {"labels": str(smallest_type(n)), "cc3d": str(whole().dtype)}
    found = {"components": n, "blocks": len(grid), "types": types}
    found |= {"medians_s": medians, "all_s": seconds}
    found["of cc3d"] = {name: round(value / medians["cc3d"], 3) for name, value in medians.items()}
    found["parts_s of one process"] = _parts(grid)
    print(json.dumps(found, indent=2))
    del mask
    _ARRAYS.clear()
    for memory in _HELD.values():
        memory.unlink()


def _make_arrays(grid: BlockGrid) -> None:
    shape, core = grid.region.shape, grid.core_shape
    _share("mask", np.bool_, shape)[:] = _blobs(shape)
    # For labels and ids of two or four bytes.
    _share("labels", np.uint32, shape)
    _share("ids", np.uint32, (len(grid), *core))
    # All sides of a core are equally long.
    _share("planes", np.uint32, (len(grid), len(PLANES), 1, *core[2:]))


def _blobs(shape: Vec) -> NDArray[np.bool_]:
    noise = np.random.default_rng(0).standard_normal(shape[1:], dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, 4.0)
    return smooth[None] > np.quantile(smooth[::8, ::8, ::8], 0.8)


def _share(name: str, dtype: type, shape: Vec) -> NDArray[Any]:
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
    torch.set_num_threads(1)


def _nothing(_: int) -> None:
    time.sleep(0.05)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _blockwise(grid: BlockGrid, each: Callable[..., Iterable[Any]]) -> None:
    """All of it; `each` maps a function over blocks."""
    blocks = range(len(grid))
    types, firsts = zip(*each(_label, [grid] * len(grid), blocks), strict=True)
    pairs = list(each(_pairs, [grid] * len(grid), blocks))
    numbers = _numbers(grid, firsts, pairs)
    list(each(_renumber, [grid] * len(grid), blocks, types, numbers))


def _label(grid: BlockGrid, index: int) -> tuple[np.dtype[Any], NDArray[np.uint64]]:
    """Type of a block's ids, and first voxels; ids and planes are left behind."""
    core, mask = grid[index].core, _ARRAYS["mask"]
    ids, first = components(mask[core.slices], dims=3, connectivity=1)
    _ids_of(index, ids.dtype)[:] = ids
    found = describe(ids, core, mask.shape, axes=ADJACENCY.axes, first=first, sized=False)
    for place, plane in zip(PLANES, _ARRAYS["planes"][index], strict=True):
        plane[:] = found.planes[place]
    return ids.dtype, found.first


def _ids_of(index: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Where the ids of a block lie, in their type."""
    room = _ARRAYS["ids"][index]
    return room.reshape(-1).view(dtype)[: room.size].reshape(room.shape)


def _held_as(name: str, dtype: np.dtype[Any], shape: Vec) -> NDArray[Any]:
    """The beginning of the shared memory of an array, in another type."""
    return np.ndarray(shape, dtype, _HELD[name].buf)


def _pairs(grid: BlockGrid, index: int) -> list[tuple[int, NDArray[np.uint32]]]:
    """The equal pairs of a block with half of its neighbours."""
    return [
        (other, equal_pairs(_faces(grid, index), _faces(grid, other), offset, ADJACENCY))
        for offset, other in neighbours(grid, index, ADJACENCY)
    ]


def _faces(grid: BlockGrid, index: int) -> BlockComponents:
    planes = dict(zip(PLANES, _ARRAYS["planes"][index], strict=True))
    return BlockComponents(grid[index].core, np.zeros(0, np.uint64), planes)


def _numbers(
    grid: BlockGrid,
    firsts: Sequence[NDArray[np.uint64]],
    pairs: list[list[tuple[int, NDArray[np.uint32]]]],
) -> list[NDArray[np.unsignedinteger[Any]]]:
    """The numbers of each block's components, in the type of the result."""
    numbers: dict[int, NDArray[np.uint64]] = {}
    tables = Tables(
        grid,
        grid.region.shape,
        lambda block: BlockComponents(grid[block].core, firsts[block], {}),
        pairs.__getitem__,
    )
    dtype = smallest_type(number(tables, numbers.__setitem__, min_size=1))
    return [numbers[index].astype(dtype) for index in range(len(grid))]


def _renumber(
    grid: BlockGrid, index: int, dtype: np.dtype[Any], numbers: NDArray[np.unsignedinteger[Any]]
) -> None:
    labels = _held_as("labels", numbers.dtype, grid.region.shape)[grid[index].core.slices]
    renumber(_ids_of(index, dtype), numbers, out=labels)


def _parts(grid: BlockGrid) -> dict[str, float]:
    """Seconds of each stage over all blocks in this process, and of what is in the first."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - of the work
        started = time.perf_counter()
        result = work(*args)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        return result

    def each(work: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
        return [timed(work.__name__.strip("_"), work, *row) for row in zip(*columns, strict=True)]

    timed("all", _blockwise, grid, each)
    for block in grid:
        part = timed("of label: copy mask", lambda c=block.core: _ARRAYS["mask"][c.slices].copy())
        alone = functools.partial(cc3d.connected_components, part[0].view(np.uint8), connectivity=6)
        timed("of label: cc3d alone", alone)
    return {name: round(value, 3) for name, value in seconds.items()}


def _peers(python: str | None, names: list[str], mask: NDArray[Any]) -> dict[str, float]:
    """Seconds of others, each in a process of its own."""
    if python is None:
        return {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file, program = Path(folder, "mask.npy"), Path(__file__).with_name("peer_components.py")
        np.save(file, mask[0])
        words = [python, str(program), str(file), folder, *names]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
