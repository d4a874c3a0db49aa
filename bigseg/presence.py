"""Which stored objects of a volume are missing, asked of the store only where voxels leave a doubt.

Zarr reads a missing object (a shard where there are shards, else a chunk) as the fill value. So an
object of which any voxel has another value is there, and most volumes are never asked about. It
knows nothing of what is cached, nor of why an object is missing.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.core.sync import sync

from bigseg.blocks import Region
from bigseg.layout import PLACE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray
    from zarr.storage import StorePath

    from bigseg.blocks import Vec
    from bigseg.volume import Volume

# About 20 MB; those asked longest ago are forgotten, and asked again.
MAX_REMEMBERED = 100_000


class Presence:
    """What is known of the stored objects of `channels` of a volume; safe in several threads."""

    def __init__(self, volume: Volume, channels: Sequence[int]) -> None:
        self._volume = volume
        self._channels = tuple(dict.fromkeys(channels))
        fill = volume.array.fill_value
        # Zarr 2 allows no fill value at all, and then reads zeros.
        self._fill = np.asarray(0 if fill is None else fill).astype(volume.dtype)
        self._exists: OrderedDict[Vec, bool] = OrderedDict()
        self._lock = threading.Lock()

    def is_blank(self, voxels: NDArray[Any]) -> bool:
        """Whether all voxels have the fill value, so that their object may be missing."""
        if not voxels.size or not self._equals_fill(voxels[(0,) * voxels.ndim]):
            return False
        return bool(np.all(self._equals_fill(voxels)))

    def absent(self, blank: Iterable[Region], other: Iterable[Region]) -> tuple[Region, ...]:
        """Extents (t, z, y, x) of the objects that are missing for all channels, in raster order.

        `blank` are boxes that hold nothing but the fill value, `other` boxes that hold more; every
        box lies within one object. Only objects with no box of the second kind are asked about.
        """
        doubtful = {self._object_of(box) for box in blank}
        if doubtful:
            doubtful -= {self._object_of(box) for box in other}
        exists = self._ask(sorted(doubtful))
        return tuple(self._extent(place) for place, there in exists.items() if not there)

    def _equals_fill(self, voxels: NDArray[Any]) -> NDArray[np.bool_]:
        found = np.isnan(voxels) if self._fill != self._fill else voxels == self._fill
        return np.asarray(found)

    def _object_of(self, box: Region) -> Vec:
        return tuple(a // u for a, u in zip(box.start, self._volume.write_unit, strict=True))

    def _extent(self, place: Vec) -> Region:
        unit = self._volume.write_unit
        start = tuple(p * u for p, u in zip(place, unit, strict=True))
        stop = tuple(a + u for a, u in zip(start, unit, strict=True))
        return Region(start, stop).intersect(Region.of_shape(self._volume.shape))

    def _ask(self, places: Sequence[Vec]) -> dict[Vec, bool]:
        with self._lock:
            known = {place: self._exists[place] for place in places if place in self._exists}
        unknown = [place for place in places if place not in known]
        if unknown:
            known.update(zip(unknown, sync(self._any_exist(unknown)), strict=True))
            with self._lock:
                self._exists.update((place, known[place]) for place in unknown)
                while len(self._exists) > MAX_REMEMBERED:
                    self._exists.popitem(last=False)
        return {place: known[place] for place in places}

    async def _any_exist(self, places: Sequence[Vec]) -> list[bool]:
        paths = [self._paths(place) for place in places]
        found = iter(await asyncio.gather(*(p.exists() for p in itertools.chain(*paths))))
        return [any(list(itertools.islice(found, len(group)))) for group in paths]

    def _paths(self, place: Vec) -> list[StorePath]:
        """Where the objects at this place lie: one, or one for each part of a channel axis."""
        array, names = self._volume.array, self._volume.multiscale.axis_names
        n_together = self._volume.multiscale.along("c", array.shards or array.chunks, absent=1)
        parts = sorted({c // int(n_together) for c in self._channels})
        position = dict(zip(PLACE, place, strict=True))
        keys = (
            array.metadata.encode_chunk_key(tuple({**position, "c": part}[n] for n in names))
            for part in parts
        )
        return [array.store_path / key for key in keys]
