"""Connected components of a whole volume: blockwise with two workers, and by others in one memory.

    python benchmarks/components.py --side 512 --repeats 5 [--peer-python ENV/bin/python]

dask-image takes minutes for 512³ voxels: leave it out with `--peers igneous`.

The volume is a mask of smoothed noise. Each time each way has processes of its own, as for someone
who labels one volume: code is loaded and the mask is in memory, but not what the way allocates.
bigseg's way, in the stages and by the functions of `bigseg segment`, by two processes and in shared
memory instead of scratch space: the components of every block by itself, of which ids and outermost
planes are kept; the pairs of every block and its neighbours; numbers; and the numbers written into
one volume of the smallest type that holds them all. cc3d labels the whole with one thread, into the
type that it finds safe. dask-image and igneous (its stages for components, on a precomputed volume
of its own in memory) run as their users run them, where a Python that has them is given. Ours is
compared voxel by voxel with the components of the whole.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")
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
    parser.add_argument("--alone", choices=OURS, help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side % options.block:
        parser.error("--side must be a multiple of --block")
    if options.alone:
        print(json.dumps(OURS[options.alone](np.load(options.mask), options)))
    else:
        print(json.dumps(_side_by_side(options), indent=2))


def _side_by_side(options: argparse.Namespace) -> dict[str, Any]:
    """What all ways take, and what they say of themselves the last time."""
    here, seconds, last = Path(__file__), defaultdict(list), {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file, used = Path(folder, "mask.npy"), Path(folder, "used")
        np.save(file, _blobs(options.side))
        sizes = ("--side", options.side, "--block", options.block, "--workers", options.workers)
        ways: dict[str, tuple[object, ...]] = {
            name: (sys.executable, here, *sizes, "--alone", name, "--mask", file) for name in OURS
        }
        if options.peer_python:
            peers = here.with_name("peer_components.py")
            ways |= {n: (options.peer_python, peers, file, used, n) for n in options.peers}
        for _ in range(options.repeats):
            for name, words in ways.items():
                done = subprocess.run(
                    [str(word) for word in words], stdout=subprocess.PIPE, text=True, check=True
                )
                shutil.rmtree(used, ignore_errors=True)
                last[name] = json.loads(done.stdout)
                seconds[name].append(last[name].pop("seconds"))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    of_cc3d = {name: round(value / medians["cc3d"], 3) for name, value in medians.items()}
    return {"medians_s": medians, "of cc3d": of_cc3d, "all_s": seconds, "last": last}


def _blobs(side: int) -> NDArray[np.bool_]:
    noise = np.random.default_rng(0).standard_normal((side,) * 3, dtype=np.float32)
    smooth = ndimage.gaussian_filter(noise, 4.0)
    return np.asarray(smooth > np.quantile(smooth[::8, ::8, ::8], 0.8))


def _by_cc3d(mask: NDArray[np.bool_], _: argparse.Namespace) -> dict[str, Any]:
    """Of one call, after one with a small mask."""
    label = functools.partial(cc3d.connected_components, connectivity=6)
    label(mask[:32, :32, :32].view(np.uint8))
    seconds, labels = _timed(lambda: label(mask.view(np.uint8)))
    return {"seconds": seconds, "type": str(labels.dtype)}


def _by_bigseg(mask: NDArray[np.bool_], options: argparse.Namespace) -> dict[str, Any]:
    """Of all stages, after those of a small volume in each process."""
    grid = BlockGrid(Region.of_shape((1, *mask.shape)), (1, *[options.block] * 3))
    for name, (kind, shape) in _layout(grid).items():
        _share(name, kind, shape)
    _ARRAYS["mask"][:] = mask
    arrays = [(name, _HELD[name].name, a.dtype, a.shape) for name, a in _ARRAYS.items()]
    try:
        _ready(0)
        with ProcessPoolExecutor(
            options.workers, get_context("spawn"), initializer=_attach, initargs=(arrays,)
        ) as pool:
            list(pool.map(_ready, range(4 * options.workers)))
            # Several blocks at a time, as workers of bigseg get them; four times each, so that none
            # waits long for the other.
            a_task = max(1, len(grid) // (4 * options.workers))
            each = functools.partial(pool.map, chunksize=a_task)
            seconds, (n, stages) = _timed(lambda: _blockwise(grid, each))
        dtype = smallest_type(n)
        truth, _ = components(mask[None], dims=3, connectivity=1)
        assert np.array_equal(_as(dtype, _ARRAYS["labels"]), truth), "ways differ"
        found: dict[str, Any] = {"components": n, "blocks": len(grid), "type": str(dtype)}
        found |= {"stages_s": stages, "parts_s of one process": _parts(grid)}
        return {"seconds": seconds, **found}
    finally:
        _ARRAYS.clear()
        for memory in _HELD.values():
            memory.unlink()


OURS = {"cc3d": _by_cc3d, "bigseg": _by_bigseg}


def _layout(grid: BlockGrid) -> dict[str, tuple[type, Vec]]:
    """Types and shapes of what all stages share; labels and ids may take half of their room."""
    core = grid.core_shape
    return {
        "mask": (np.bool_, grid.region.shape),
        "labels": (np.uint32, grid.region.shape),
        "ids": (np.uint32, (len(grid), *core)),
        # All sides of a core are equally long.
        "planes": (np.uint32, (len(grid), len(PLANES), 1, *core[2:])),
    }


def _share(name: str, dtype: type, shape: Vec) -> None:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    _HELD[name] = SharedMemory(create=True, size=n_bytes)
    _ARRAYS[name] = np.ndarray(shape, dtype, _HELD[name].buf)


def _attach(arrays: list[tuple[str, str, np.dtype[Any], Vec]]) -> None:
    for name, where, dtype, shape in arrays:
        # From Python 3.13 on it can be said that who made it also removes it.
        untracked = {"track": False} if sys.version_info >= (3, 13) else {}
        _HELD[name] = SharedMemory(name=where, **untracked)
        _ARRAYS[name] = np.ndarray(shape, dtype, _HELD[name].buf)
    torch.set_num_threads(1)


def _ready(_: int) -> None:
    """All stages of a small grid in memory of its own, which loads the code that they need."""
    time.sleep(0.05)  # so that all workers get one of these
    kept, grid = dict(_ARRAYS), BlockGrid(Region.of_shape((1, 64, 64, 64)), (1, 32, 32, 32))
    _ARRAYS.update({name: np.ones(shape, kind) for name, (kind, shape) in _layout(grid).items()})
    _blockwise(grid, map)
    _ARRAYS.update(kept)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def _blockwise(grid: BlockGrid, each: Callable[..., Iterable[Any]]) -> tuple[int, dict[str, float]]:
    """The number of components, and the seconds of each stage; `each` maps over blocks."""
    grids, blocks, ended = [grid] * len(grid), range(len(grid)), [time.perf_counter()]
    types, firsts = zip(*each(_label, grids, blocks), strict=True)
    ended.append(time.perf_counter())
    pairs = list(each(_pairs, grids, blocks))
    ended.append(time.perf_counter())
    numbers = _numbers(grid, firsts, pairs)
    ended.append(time.perf_counter())
    list(each(_renumber, grids, blocks, types, numbers))
    ended.append(time.perf_counter())
    seconds = [round(end - start, 3) for start, end in itertools.pairwise(ended)]
    stages = zip(("label", "pairs", "numbers", "renumber"), seconds, strict=True)
    return max(int(ns.max(initial=0)) for ns in numbers), dict(stages)


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
    return _as(dtype, _ARRAYS["ids"][index])


def _as(dtype: np.dtype[Any], room: NDArray[Any]) -> NDArray[Any]:
    """The beginning of `room` as an array of the same shape and of a type no larger."""
    return room.reshape(-1).view(dtype)[: room.size].reshape(room.shape)


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
    labels = _as(numbers.dtype, _ARRAYS["labels"])[grid[index].core.slices]
    renumber(_ids_of(index, dtype), numbers, out=labels)


def _parts(grid: BlockGrid) -> dict[str, float]:
    """Seconds of each stage over all blocks in this process, and of what is in the first."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 - of the work
        took, result = _timed(lambda: work(*args))
        seconds[name] = seconds.get(name, 0.0) + took
        return result

    def each(work: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
        return [timed(work.__name__.strip("_"), work, *row) for row in zip(*columns, strict=True)]

    timed("all", _blockwise, grid, each)
    for block in grid:
        part = timed("of label: copy mask", lambda c=block.core: _ARRAYS["mask"][c.slices].copy())
        alone = functools.partial(cc3d.connected_components, part[0].view(np.uint8), connectivity=6)
        timed("of label: cc3d alone", alone)
    return {name: round(value, 3) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
