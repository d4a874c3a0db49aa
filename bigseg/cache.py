"""Reading near once: decoded chunks of a volume, kept for the next regions within a budget.

A worker reads grown regions, and those of neighbouring blocks share their halos:

    chunks       |     |     |     |     |     |     |
    1st region     [................]                    fetches chunks 0 to 2
    2nd region               [................]          has chunk 2, fetches 3 and 4

Kept are the chunks touched last, all channels of a chunk together. What a sequence of regions will
fetch follows from their numbers alone, so that a plan can say it without reading.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region, ceil_div
from bigseg.presence import Presence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Vec
    from bigseg.volume import Volume


@dataclass(frozen=True)
class Reading:
    """The voxels of a region, and what of it the store does not have.

    `data` has axes (c, t, z, y, x). `absent` are the extents (t, z, y, x) of the stored objects
    that touch the region and exist for none of the channels; there the data are the fill value.
    """

    data: NDArray[Any]
    absent: tuple[Region, ...]


@dataclass(frozen=True)
class _Chunk:
    data: NDArray[Any]
    is_blank: bool


_Futures = dict[int, Future[_Chunk]]


class ChunkCache:
    """Regions of some channels of a volume, with at most `budget_bytes` of decoded chunks kept.

    While a region is read, its own chunks come on top. Several threads may read; what one of them
    is fetching, the others wait for. Without a budget every region is read by itself.
    """

    def __init__(self, volume: Volume, channels: Sequence[int], *, budget_bytes: int) -> None:
        self._volume = volume
        self._channels = tuple(channels)
        bytes_per_voxel = volume.dtype.itemsize * len(self._channels)
        self._grid = _Grid(volume.shape, volume.chunk_shape, bytes_per_voxel)
        self._presence = Presence(volume, self._channels)
        self._recent = _Recent(budget_bytes)
        self._chunks: _Futures = {}
        self._on_their_way: _Futures = {}
        self._lock = threading.Lock()
        self._n_bytes_fetched = 0
        self._n_bytes_read = 0

    @property
    def n_bytes_fetched(self) -> int:
        """Decoded bytes of all chunks fetched so far, those at the volume's end without padding."""
        return self._n_bytes_fetched

    @property
    def n_bytes_read(self) -> int:
        """Bytes of all regions handed out so far."""
        return self._n_bytes_read

    @property
    def n_bytes_kept(self) -> int:
        """Bytes of the chunks kept now."""
        return self._recent.n_bytes

    def read(self, region: Region) -> Reading:
        """The voxels of `region` (t, z, y, x), which must lie inside the volume.

        Raises:
            UsageError: the region or a channel lies outside.
        """
        self._volume.check_inside(region)
        if self._recent.budget_bytes > 0:
            data, is_blank = self._read_chunks(region)
        else:
            data, is_blank = self._read_straight(region)
        with self._lock:
            self._n_bytes_read += data.nbytes
        blank = [self._grid.extent(_single(p)) for p, only_fill in is_blank.items() if only_fill]
        if not blank:
            return Reading(data, ())
        other = [
            self._grid.extent(_single(p)) for p, only_fill in is_blank.items() if not only_fill
        ]
        return Reading(data, self._presence.absent(blank, other))

    def _read_straight(self, region: Region) -> tuple[NDArray[Any], dict[Vec, bool]]:
        data = self._volume.read(region, self._channels)
        span = self._grid.span(region)
        with self._lock:
            self._n_bytes_fetched += sum(self._grid.sizes(span).values())
        pieces = {p: self._grid.extent(_single(p)).intersect(region) for p in _positions_of(span)}
        return data, {
            p: self._presence.is_blank(_part_of(data, region, piece)) for p, piece in pieces.items()
        }

    def _read_chunks(self, region: Region) -> tuple[NDArray[Any], dict[Vec, bool]]:
        span = self._grid.span(region)
        sizes = self._grid.sizes(span)
        positions = dict(zip(sizes, _positions_of(span), strict=True))
        data = np.empty((len(self._channels), *region.shape), self._volume.dtype)
        mine, others = self._claim(sizes)
        try:
            for box in boxes_of([positions[key] for key in mine]):
                self._fetch(box, mine, region, data)
        except BaseException as error:
            self._arrived(mine, error)
            raise
        self._arrived(mine)
        for key, future in others.items():
            _copy_common(
                future.result().data, self._grid.extent(_single(positions[key])), data, region
            )
        futures = mine | others
        return data, {p: futures[key].result().is_blank for key, p in positions.items()}

    def _claim(self, sizes: dict[int, int]) -> tuple[_Futures, _Futures]:
        """The chunks that this thread must fetch, and those that are there or on their way."""
        mine: _Futures = {}
        with self._lock:
            for key in self._recent.touch(sizes):
                if key not in self._on_their_way:
                    mine[key] = self._on_their_way[key] = Future()
                    self._n_bytes_fetched += sizes[key]
                self._chunks[key] = self._on_their_way[key]
            others = {key: self._chunks[key] for key in sizes if key not in mine}
            for key in self._recent.evict():
                del self._chunks[key]
        return mine, others

    def _fetch(self, box: Region, mine: _Futures, region: Region, data: NDArray[Any]) -> None:
        """Read a box of chunks at once, for the cache and for the region's `data`."""
        extent = self._grid.extent(box)
        voxels = self._volume.read(extent, self._channels)
        _copy_common(voxels, extent, data, region)
        for key, position in zip(self._grid.sizes(box), _positions_of(box), strict=True):
            chunk = _part_of(voxels, extent, self._grid.extent(_single(position)))
            # A view would keep the whole box in memory.
            kept = chunk if chunk.size == voxels.size else chunk.copy()
            mine[key].set_result(_Chunk(kept, self._presence.is_blank(kept)))

    def _arrived(self, mine: _Futures, error: BaseException | None = None) -> None:
        """Chunks are no longer on their way; those that failed are forgotten, to be tried again."""
        with self._lock:
            for key, future in mine.items():
                del self._on_their_way[key]
                if not future.done():
                    future.set_exception(error)
                    if self._chunks.get(key) is future:
                        del self._chunks[key]
                        self._recent.forget(key)


def predicted_fetch_bytes(
    regions: Iterable[Region],
    *,
    shape: Vec,
    chunk: Vec,
    bytes_per_voxel: int,
    budget_bytes: int,
) -> int:
    """What `ChunkCache.n_bytes_fetched` will be after one thread has read `regions` in this order.

    `shape` and `chunk` of the volume along t, z, y, x; `bytes_per_voxel` of all channels together.
    Regions are clipped at the volume.
    """
    grid = _Grid(shape, chunk, bytes_per_voxel)
    recent = _Recent(budget_bytes)
    n_bytes = 0
    for region in regions:
        sizes = grid.sizes(grid.span(region.intersect(Region.of_shape(shape))))
        if budget_bytes > 0:
            n_bytes += sum(sizes[key] for key in recent.touch(sizes))
            recent.evict()
        else:
            n_bytes += sum(sizes.values())
    return n_bytes


class _Recent:
    """Which chunks are kept, by number and size: those touched last, within a budget."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self._sizes: OrderedDict[int, int] = OrderedDict()

    def touch(self, sizes: dict[int, int]) -> list[int]:
        """Keep these chunks, in this order; gives those that were not kept before."""
        kept, new = self._sizes, []
        for key, size in sizes.items():
            if key in kept:
                kept.move_to_end(key)
            else:
                kept[key] = size
                self.n_bytes += size
                new.append(key)
        return new

    def evict(self) -> list[int]:
        """Drop chunks until the rest is within the budget; gives them, longest untouched first."""
        dropped = []
        while self.n_bytes > self.budget_bytes:
            key, size = self._sizes.popitem(last=False)
            self.n_bytes -= size
            dropped.append(key)
        return dropped

    def forget(self, key: int) -> None:
        """Drop one chunk that is kept."""
        self.n_bytes -= self._sizes.pop(key)


@dataclass(frozen=True)
class _Grid:
    """The chunks of a volume. A span is a Region of chunk positions, a key a chunk's number."""

    shape: Vec
    chunk: Vec
    bytes_per_voxel: int

    def span(self, region: Region) -> Region:
        """The positions of the chunks that touch `region`."""
        ends = list(zip(region.start, region.stop, self.chunk, strict=True))
        start = tuple(a // c for a, _, c in ends)
        return Region(start, tuple(ceil_div(b, c) if b > a else a // c for a, b, c in ends))

    def extent(self, span: Region) -> Region:
        """The voxels of the chunks of a span, clipped at the volume."""
        start = tuple(p * c for p, c in zip(span.start, self.chunk, strict=True))
        ends = zip(span.stop, self.chunk, self.shape, strict=True)
        return Region(start, tuple(min(p * c, n) for p, c, n in ends))

    def sizes(self, span: Region) -> dict[int, int]:
        """Decoded bytes of the chunks of a span by their keys, in raster order."""
        keys = np.zeros(1, np.int64)
        sizes = np.full(1, self.bytes_per_voxel, np.int64)
        for axis, (n, c) in enumerate(zip(self.shape, self.chunk, strict=True)):
            places = np.arange(span.start[axis], span.stop[axis])
            keys = (keys[:, None] * ceil_div(n, c) + places).ravel()
            sizes = (sizes[:, None] * np.minimum(c, n - places * c)).ravel()
        return dict(zip(keys.tolist(), sizes.tolist(), strict=True))


def boxes_of(positions: Sequence[Vec]) -> list[Region]:
    """Disjoint boxes that hold exactly these positions, which are in raster order; few, not fewest.

    Each begins at the first position left and grows as far as it can along the last axis, then
    along the one before it, and so on.
    """
    left, boxes = set(positions), []
    for position in positions:
        if position in left:
            boxes.append(_grow_box(_single(position), left))
            left.difference_update(_positions_of(boxes[-1]))
    return boxes


def _grow_box(box: Region, inside: set[Vec]) -> Region:
    for axis in reversed(range(len(box.start))):
        while True:
            end = box.stop[axis]
            start = (*box.start[:axis], end, *box.start[axis + 1 :])
            stop = (*box.stop[:axis], end + 1, *box.stop[axis + 1 :])
            if not inside.issuperset(_positions_of(Region(start, stop))):
                break
            box = Region(box.start, stop)
    return box


def _positions_of(span: Region) -> Iterator[Vec]:
    """The positions of a span in raster order."""
    return itertools.product(*map(range, span.start, span.stop))


def _single(position: Vec) -> Region:
    """The span of one position."""
    return Region(position, tuple(p + 1 for p in position))


def _part_of(data: NDArray[Any], extent: Region, part: Region) -> NDArray[Any]:
    """The view of `part` in `data` (c, t, z, y, x), which holds `extent`."""
    return data[(slice(None), *part.relative_to(extent.start).slices)]


def _copy_common(
    source: NDArray[Any], source_extent: Region, target: NDArray[Any], target_extent: Region
) -> None:
    """Copy what both arrays (c, t, z, y, x) hold of the volume."""
    common = source_extent.intersect(target_extent)
    _part_of(target, target_extent, common)[...] = _part_of(source, source_extent, common)
