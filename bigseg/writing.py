"""How voxels reach an array: by whole write units, those that hold only the fill value as absence.

zarr finds out by itself which chunks need not be stored, but takes 12 ms for 2 MiB, one chunk after
the other, longer than to compress and store them (zarr 3.1.6).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from zarr.core.sync import sync

from bigseg import store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import zarr
    from numpy.typing import NDArray


class UnitWriter:
    """Writes parts of an array whose fill value is 0, durably."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = store.writable(array)
        self._unit = array.shards or array.chunks

    def write(self, start: Sequence[int], data: NDArray[Any]) -> None:
        """Store `data` from `start` on, both in the array's own axes.

        It must begin with a write unit on every axis and end with one, or with the array.
        """
        boxes = list(self._boxes(data.shape))
        empty = [not data[box].any() for box in boxes]
        if not any(empty):
            self._put(start, data, tuple(slice(0, n) for n in data.shape))
            return
        for box, is_empty in zip(boxes, empty, strict=True):
            if is_empty:
                self._erase(start, box)
            else:
                self._put(start, data, box)

    def _boxes(self, shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
        axes = (
            [slice(a, min(a + u, n)) for a in range(0, n, u)]
            for n, u in zip(shape, self._unit, strict=True)
        )
        return itertools.product(*axes)

    def _put(self, start: Sequence[int], data: NDArray[Any], box: tuple[slice, ...]) -> None:
        place = tuple(slice(a + s.start, a + s.stop) for a, s in zip(start, box, strict=True))
        self._array[place] = data[box]

    def _erase(self, start: Sequence[int], box: tuple[slice, ...]) -> None:
        unit = tuple((a + s.start) // u for a, s, u in zip(start, box, self._unit, strict=True))
        inner = self._array.async_array
        sync((inner.store_path / inner.metadata.encode_chunk_key(unit)).delete())
