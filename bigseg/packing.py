"""Named arrays as bytes, checked before they are believed: what blocks leave for later stages.

    magic, version, kind, number of arrays, bytes that follow, their CRC-32
    for each array: name, type, number of axes, shape, compressed bytes
    the arrays, little-endian in C order, each compressed by itself with zlib

Nothing in it is ever executed. What was cut short, changed or written by something else is refused,
and no size that a file announces is allocated before it has been compared with what is possible.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bigseg.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from numpy.typing import NDArray

MAGIC = b"bigsegPK"
VERSION = 1
MOST_AXES = 6
_HEAD = struct.Struct("<8sH16sHQI")
_RECORD = struct.Struct(f"<16s4sB{MOST_AXES}QQ")
_TYPES = {np.dtype(name).newbyteorder("<").str for name in ("u1", "u2", "u4", "u8", "i8", "f8")}


class _Record(NamedTuple):
    """What is said of one array, and where its compressed bytes lie."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pack(kind: str, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The arrays as bytes, their names (at most 16 letters) with them.

    Types are unsigned integers of any width, int64 and float64; at most six axes.
    """
    records, payloads = [], []
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        assert plain.dtype.str in _TYPES, (name, plain.dtype)
        payload = zlib.compress(plain.tobytes(), 1)
        shape = array.shape + (0,) * (MOST_AXES - array.ndim)
        code = plain.dtype.str.encode()
        records.append(_RECORD.pack(_word(name), code, array.ndim, *shape, len(payload)))
        payloads.append(payload)
    body = b"".join([*records, *payloads])
    return _HEAD.pack(MAGIC, VERSION, _word(kind), len(arrays), len(body), zlib.crc32(body)) + body


def unpack(
    data: bytes, kind: str, *, most_bytes: int, names: Container[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays that were packed as this kind, or only those of these names; they are read-only.

    `most_bytes` is what all arrays together can have, uncompressed.

    Raises:
        OutputError: the bytes are damaged, of another kind, or announce more than `most_bytes`.
    """
    try:
        records = _records(data, kind)
        announced = sum(record.n_bytes for record in records)
        if announced > most_bytes:
            raise ValueError(f"{announced} bytes are announced where {most_bytes} are possible")
        return {r.name: _array(data, r) for r in records if names is None or r.name in names}
    except (ValueError, struct.error, zlib.error) as error:
        raise damaged(kind, str(error), len(data)) from None


def damaged(kind: str, why: str, n_bytes: int) -> OutputError:
    """The error that says why bytes are refused."""
    return OutputError(
        f"a file of {n_bytes} bytes is no {kind} of bigseg's, or damaged ({why}): remove the "
        "folder scratch of the result, and the same command makes it again"
    )


def _word(text: str) -> bytes:
    word = text.encode("ascii")
    assert 0 < len(word) <= 16, text
    return word


def _records(data: bytes, kind: str) -> list[_Record]:
    """What the file says of its arrays, with all bytes of the file accounted for."""
    magic, version, found_kind, n_arrays, n_bytes, checksum = _HEAD.unpack_from(data)
    found = (magic, version, found_kind.rstrip(b"\0"))
    if found != (MAGIC, VERSION, kind.encode()):
        raise ValueError(f"it begins with {data[:26]!r}")
    body = memoryview(data)[_HEAD.size :]
    if len(body) != n_bytes or zlib.crc32(body) != checksum:
        raise ValueError("its length or its checksum is wrong")
    records, place = [], _HEAD.size + n_arrays * _RECORD.size
    for i in range(n_arrays):
        record = _record(_RECORD.unpack_from(data, _HEAD.size + i * _RECORD.size), place)
        records.append(record)
        place = record.stop
    if place != len(data):
        raise ValueError(f"its arrays end at byte {place}")
    return records


def _record(fields: tuple[Any, ...], start: int) -> _Record:
    name, code, n_axes, *shape, length = fields
    dtype = code.rstrip(b"\0").decode("ascii", "replace")
    if dtype not in _TYPES or n_axes > MOST_AXES:
        raise ValueError(f"an array of type {dtype!r} with {n_axes} axes")
    text = name.rstrip(b"\0").decode("ascii", "replace")
    return _Record(text, np.dtype(dtype), tuple(shape[:n_axes]), start, start + length)


def _array(data: bytes, record: _Record) -> NDArray[Any]:
    decoder = zlib.decompressobj()
    # One byte more than announced, so that a longer one is noticed.
    content = decoder.decompress(data[record.start : record.stop], record.n_bytes + 1)
    if len(content) != record.n_bytes or not decoder.eof or decoder.unused_data:
        raise ValueError(f"{record.name} has not the {record.n_bytes} bytes that are announced")
    return np.frombuffer(content, record.dtype).reshape(record.shape)
