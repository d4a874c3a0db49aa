"""Reading the grown regions of a segmentation: bigseg against tensorstore and Zarr's own codecs.

    python benchmarks/reading.py [--repeats N] [--threads N] [--size VOXELS]

A cube of 512³ voxels like electron microscopy (smooth structure and noise, one byte each, zstd
level 1) is written in three layouts. Each row reads the regions of all 200³ cores with a halo of 44
voxels, clipped at the volume, each once and in order, one at a time:

    bigseg       Volume.read, as everything in bigseg reads
    cached       ChunkCache.read with a budget of 512 MB, from empty: chunks near once
    tensorstore  without its chunk cache, as many threads for decoding and for files
    zarr         Zarr's own codecs, for information

All use the same number of threads on the same files, which are in the page cache. The readers take
turns; a row gives the median of the repeats as bytes of regions a second, and the ratio of each to
tensorstore. What was read is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore
import zarr
from scipy import ndimage
from zarr.codecs import ZstdCodec

from bigseg.blocks import BlockGrid, Region
from bigseg.cache import ChunkCache
from bigseg.decoding import is_decoded_fast, set_codec_threads
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from bigseg.volume import Volume

    Read = Callable[[Region], NDArray[Any]]

CORE, HALO = 200, 44
CACHE_BYTES = 512 * 10**6
LAYOUTS: dict[str, dict[str, Any]] = {
    "chunks 64³": {"chunks": (64,) * 3},
    "chunks 128³": {"chunks": (128,) * 3},
    "shards 256³ of 64³": {"chunks": (64,) * 3, "shards": (256,) * 3},
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    set_codec_threads(options.threads)
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} threads, zarr "
        f"{zarr.__version__}, tensorstore {tensorstore_version()}, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{'layout':20s} {'reader':12s} {'ms':>8s} {'MB/s':>8s} {'to tensorstore':>15s}")
    data = microscopy(options.size)
    for label, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            volume = write_volume(folder, data, layout)
            regions = grown_regions(volume)
            seconds = time_in_turns(readers(volume, options.threads), regions, options.repeats)
            report(label, seconds, sum(region.n_voxels for region in regions))


def microscopy(size: int) -> NDArray[np.uint8]:
    """A cube of smooth structure with noise, made in slabs that continue each other."""
    rng = np.random.default_rng(0)
    white = rng.standard_normal((size,) * 3, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, 3, mode="wrap", truncate=3)
    smooth *= 12 / float(smooth[::8].std())
    smooth += 128 + 2 * white
    return np.clip(smooth, 0, 255, out=smooth).astype(np.uint8)


def write_volume(folder: str, data: NDArray[np.uint8], layout: dict[str, Any]) -> Volume:
    """An OME-Zarr image with one level."""
    axes = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    ome = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    group = zarr.create_group(folder, attributes={"ome": ome}, overwrite=True)
    options = {"compressors": ZstdCodec(level=1), "dimension_names": list("zyx"), **layout}
    array = group.create_array("0", data=data, **options)
    print(f"({data.nbytes / array.nbytes_stored():.2f} times smaller when compressed)")
    return open_volume(folder)


def grown_regions(volume: Volume) -> list[Region]:
    """What a segmentation of the whole volume reads."""
    whole = Region.of_shape(volume.shape)
    margin = (0, HALO, HALO, HALO)
    cores = BlockGrid(whole, (1, CORE, CORE, CORE))
    return [block.core.grow(margin, margin).intersect(whole) for block in cores]


def readers(volume: Volume, n_threads: int) -> dict[str, Callable[[], Read]]:
    """For each reader a function that makes it anew."""
    url = f"{volume.url}/0"
    own = zarr.open_array(url, mode="r")
    assert is_decoded_fast(volume.array), "zarrs is not installed"
    limit = {"limit": n_threads}
    context = tensorstore.Context(
        {
            "data_copy_concurrency": limit,
            "file_io_concurrency": limit,
            "cache_pool": {"total_bytes_limit": 0},
        }
    )
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": url}}
    other = tensorstore.open(spec, context=context, open=True, read=True).result()

    def cached() -> Read:
        cache = ChunkCache(volume, (0,), budget_bytes=CACHE_BYTES)
        return lambda region: cache.read(region).data[0, 0]

    return {
        "bigseg": lambda: lambda region: volume.read(region)[0, 0],
        "cached": cached,
        "tensorstore": lambda: lambda region: other[region.slices[1:]].read().result(),
        "zarr": lambda: lambda region: np.asarray(own[region.slices[1:]]),
    }


def time_in_turns(
    makers: dict[str, Callable[[], Read]], regions: list[Region], n_repeats: int
) -> dict[str, list[float]]:
    """Seconds of each reader for all regions, after a turn in which all must read the same."""
    for region in regions[:2] + regions[-2:]:
        first, *others = (make()(region) for make in makers.values())
        for other in others:
            np.testing.assert_array_equal(first, other)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(n_repeats):
        for name, make in makers.items():
            seconds[name].append(seconds_of(make(), regions))
    return seconds


def seconds_of(read: Read, regions: Iterable[Region]) -> float:
    """Seconds to read the regions one after the other."""
    started = time.perf_counter()
    for region in regions:
        read(region)
    return time.perf_counter() - started


def report(label: str, seconds: dict[str, list[float]], n_bytes: int) -> None:
    """Print the rows of one layout."""
    reference = statistics.median(seconds["tensorstore"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{label:20s} {name:12s} {median * 1e3:8.0f} {n_bytes / median / 1e6:8.0f} "
            f"{reference / median:15.2f}",
            flush=True,
        )


def tensorstore_version() -> str:
    """The installed version."""
    from importlib.metadata import version

    return version("tensorstore")


if __name__ == "__main__":
    main()
