"""Reading an array in spite of chunks that cannot be decoded, which are found one by one.

    a read that fails             [  object c/0  |  object c/1  |  object c/2  ]
    each object by itself               read          fails           read
    each chunk of it by itself                     read | fails

Zarr's error says neither which object it met nor whose fault it was. So every failure is looked
into: an error of the store, such as no permission or no answer, is no damage and is raised as it
is. It knows arrays that are open and boxes of their indices, and nothing of images.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from bigseg.patience import is_permanent, is_transient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import zarr
    from numpy.typing import NDArray
    from zarr.storage import StorePath

    Box = tuple[slice, ...]

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class BadChunk:
    """A chunk that cannot be decoded, and why; `start` and `stop` are those of its voxels.

    `key` is its object's, below the array; a chunk of a shard has its place in it behind that:
    `c/0/1/0[2,0,1]`.
    """

    key: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    reason: str

    def touches(self, box: Box) -> bool:
        """Whether it has a voxel in a box of the array."""
        ends = zip(self.start, self.stop, box, strict=True)
        return all(max(a, s.start) < min(b, s.stop) for a, b, s in ends)


def read_box(array: zarr.Array[Any], box: Box, on_bad: Callable[[BadChunk], None]) -> NDArray[Any]:
    """The values of a box, with the fill value in chunks that cannot be decoded.

    `on_bad` is told of each of those, and may raise.

    Raises:
        OSError: the store does not let them be read.
    """
    try:
        return np.asarray(array[box])
    # Codecs raise errors of any type (zarr 3.1.6 and its codecs: at least nine).
    except Exception as error:
        if _is_of_store(error):
            raise
    return _read_apart(array, box, on_bad)


def _read_apart(
    array: zarr.Array[Any], box: Box, on_bad: Callable[[BadChunk], None]
) -> NDArray[Any]:
    # Zarr 2 allows no fill value at all, and then reads zeros.
    fill = 0 if array.fill_value is None else array.fill_value
    values = np.full([s.stop - s.start for s in box], fill, array.dtype)
    for part, found in _pieces(array, box):
        if isinstance(found, BadChunk):
            on_bad(found)
        else:
            ends = zip(part, box, strict=True)
            values[tuple(slice(p.start - b.start, p.stop - b.start) for p, b in ends)] = found
    return values


def _pieces(array: zarr.Array[Any], box: Box) -> Iterator[tuple[Box, NDArray[Any] | BadChunk]]:
    """The box in parts of one object or chunk, each with its values or with what is wrong."""
    for part in _cut(box, array.shards or array.chunks):
        found = _attempt(array, part)
        if isinstance(found, BadChunk):
            yield from _chunks_of_bad(array, part, found)
        else:
            yield part, found


def _chunks_of_bad(
    array: zarr.Array[Any], part: Box, found: BadChunk
) -> Iterator[tuple[Box, NDArray[Any] | BadChunk]]:
    """The chunks of an object that failed as a whole: one, or those of a shard."""
    failure = _failure_of_store(array, part)
    for chunk in _cut(part, array.chunks):
        inner = found if array.shards is None else _attempt(array, chunk)
        if failure is not None and isinstance(inner, BadChunk):
            inner = replace(inner, reason=failure)
        yield chunk, inner


def _attempt(array: zarr.Array[Any], part: Box) -> NDArray[Any] | BadChunk:
    try:
        return np.asarray(array[part])
    except Exception as error:  # as in `read_box`
        if _is_of_store(error):
            raise
        return _bad_chunk(array, part, _reason(error))


def _cut(box: Box, unit: Sequence[int]) -> Iterator[Box]:
    """The parts of a box that lie in one unit each."""
    axes = (
        [slice(max(s.start, a), min(s.stop, a + u)) for a in range(s.start // u * u, s.stop, u)]
        for s, u in zip(box, unit, strict=True)
    )
    return itertools.product(*axes)


def _is_of_store(error: Exception) -> bool:
    return is_permanent(error) or is_transient(error)


def _failure_of_store(array: zarr.Array[Any], part: Box) -> str | None:
    """What goes wrong when the bytes of an object are read without being decoded; mostly nothing.

    zarrs has the words of the system in its errors, not its numbers (0.2.3).
    """
    try:
        sync(_read_through(array.store_path / _key_of(array, part)))
    except FileNotFoundError:
        return None
    except Exception as error:  # stores, too, raise errors of any type
        if _is_of_store(error):
            raise
        return _reason(error)
    return None


async def _read_through(place: StorePath) -> None:
    n_bytes = await place.store.getsize(place.path)
    for start in range(0, n_bytes, PIECE_BYTES):
        piece = RangeByteRequest(start, min(start + PIECE_BYTES, n_bytes))
        await place.store.get(place.path, default_buffer_prototype(), piece)


def _key_of(array: zarr.Array[Any], part: Box) -> str:
    unit = array.shards or array.chunks
    position = tuple(s.start // u for s, u in zip(part, unit, strict=True))
    return array.metadata.encode_chunk_key(position)


def _bad_chunk(array: zarr.Array[Any], part: Box, reason: str) -> BadChunk:
    chunk, key = array.chunks, _key_of(array, part)
    start = tuple(s.start // c * c for s, c in zip(part, chunk, strict=True))
    stop = tuple(min(a + c, n) for a, c, n in zip(start, chunk, array.shape, strict=True))
    if array.shards is not None:
        ends = zip(start, array.shards, chunk, strict=True)
        key += f"[{','.join(str(a % s // c) for a, s, c in ends)}]"
    return BadChunk(key, start, stop, reason)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
