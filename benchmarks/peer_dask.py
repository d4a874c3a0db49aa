"""dask.array.map_overlap around bigseg's own forward, from a Zarr array to a Zarr array.

Dask's threads, as many as there are processors; each has an engine of one thread, as bigseg's
workers do, unless there are fewer blocks than processors. On a GPU the threads share it.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import dask
import dask.array as da
import numpy as np
import zarr
from setting import (
    ValidForward,
    classes_of,
    contestant_parser,
    halo_of,
    median_s,
    normalise,
    read_network,
    report,
    set_threads,
    timed_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from bigseg.model import UNet


def main() -> None:
    """Time one pass over the volume; after it, blocks on all threads at once."""
    options = contestant_parser(__doc__).parse_args()
    set_threads(options.threads)
    image = zarr.open_array(str(options.image / "0"), mode="r")
    block = tuple(min(options.side, n) for n in image.shape)
    n_blocks = int(np.prod([-(-n // b) for n, b in zip(image.shape, block, strict=True)]))
    n_workers = min(options.threads, n_blocks)
    net = read_network(options.folder)
    halo = halo_of(net)
    grown = np.zeros(tuple(b + 2 * halo for b in block), np.uint8)
    engines = Engines(net, grown, n_workers, n_threads=options.threads // n_workers)

    def work(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return classes_of(engines.forward(normalise(data)))

    def together() -> None:
        side_by_side(lambda: work(grown), n_workers)

    def whole() -> None:
        with dask.config.set(scheduler="threads", num_workers=n_workers):
            segment(options.image, options.out, block, halo, work)

    together()
    seconds = timed_s(whole)
    after = median_s(together)
    forward_s = n_blocks / n_workers * after
    report(seconds=seconds, forward_s=forward_s, n_forwards=n_blocks)


class Engines:
    """As many forward functions as threads; a thread takes whichever is free."""

    def __init__(self, net: UNet, grown: NDArray[np.uint8], n: int, *, n_threads: int) -> None:
        self._free: queue.SimpleQueue[ValidForward] = queue.SimpleQueue()
        for _ in range(n):
            engine = ValidForward(net, n_threads=n_threads)
            engine(normalise(grown))
            self._free.put(engine)

    def forward(self, grown: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities (2, z, y, x) of the core."""
        engine = self._free.get()
        try:
            return engine(grown)
        finally:
            self._free.put(engine)


def segment(
    image: Path,
    out: Path,
    block: tuple[int, ...],
    halo: int,
    work: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
) -> None:
    """The graph, built and computed: both are what a user waits for."""
    source = da.from_zarr(str(image), component="0", chunks=block)
    labels = da.map_overlap(
        work,
        source,
        depth=halo,
        boundary="reflect",
        trim=False,
        dtype=np.uint8,
        chunks=source.chunks,
        meta=np.empty((0, 0, 0), np.uint8),
    )
    da.to_zarr(labels, str(out), overwrite=True)


def side_by_side(call: Callable[[], object], n: int) -> None:
    """The call in n threads at once; raises what one of them raises."""
    with ThreadPoolExecutor(n) as threads:
        for future in [threads.submit(call) for _ in range(n)]:
            future.result()


if __name__ == "__main__":
    main()
