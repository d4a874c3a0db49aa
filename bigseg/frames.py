"""What compressed chunks of local files announce, read before a decoder believes it.

    zstd    magic | descriptor | window size | content size in 0, 1, 2, 4 or 8 bytes | blocks ...
    blosc   version, flags, type size | content size in 4 bytes | block size | bytes in all

zarrs (0.2.3) takes as much memory as a chunk announces, and ends the process where there is not so
much: a flipped bit or a hostile file of a few bytes would end a run. A chunk of Zarr has one size,
so any other is damage. A frame of zstd need not announce one; such a frame is believed.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import zarr

HEAD_BYTES = 18
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ABSENT = 2**64 - 1
_INDEX_CHECKSUM_BYTES = 4


def announced_bytes(codec: str, head: bytes) -> int | None:
    """The content size that the first bytes of a chunk announce; None where they do not."""
    if codec == "blosc":
        return int.from_bytes(head[4:8], "little") if len(head) >= 8 else None
    if len(head) < 5 or head[:4] != _ZSTD_MAGIC:
        return None
    descriptor = head[4]
    is_single = bool(descriptor & 0x20)
    # RFC 8878, 3.1.1.1: a flag of two bits for the size, one for a single segment, two for a
    # dictionary; sizes in two bytes count from 256.
    size_bytes = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    start = 5 + (0 if is_single else 1) + (0, 1, 2, 4)[descriptor & 3]
    if not size_bytes or len(head) < start + size_bytes:
        return None
    size = int.from_bytes(head[start : start + size_bytes], "little")
    return size + 256 if size_bytes == 2 else size


def check_of(array: zarr.Array[Any]) -> Callable[[Path, Sequence[slice]], None]:
    """What refuses a box of a stored object of the array; see `Frames.check`."""
    return Frames.of(array).check


@dataclass(frozen=True)
class Frames:
    """The chunks of one array: their codec and size, and how they lie in shards, if they do."""

    codec: str
    chunk: tuple[int, ...]
    chunk_bytes: int
    shard: tuple[int, ...] | None
    is_index_first: bool

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Frames:
        """Those of an array under zstd or blosc."""
        metadata: dict[str, Any] = array.metadata.to_dict()
        is_index_first = False
        if metadata["zarr_format"] == 2:
            codec = metadata["compressor"]["id"]
        else:
            codecs = metadata["codecs"]
            if codecs[0]["name"] == "sharding_indexed":
                inner = codecs[0]["configuration"]
                codecs, is_index_first = inner["codecs"], inner.get("index_location") == "start"
            codec = codecs[1]["name"]
        n_bytes = math.prod(array.chunks) * array.dtype.itemsize
        return cls(codec, tuple(array.chunks), n_bytes, array.shards, is_index_first)

    def check(self, path: Path, selection: Sequence[slice]) -> None:
        """Refuse what a box of one stored object would take; nothing where there is no file.

        Raises:
            ValueError: a chunk announces another size than it has.
            OSError: the file cannot be read.
        """
        try:
            handle = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                return  # Zarr takes it for absent.
            for place in self._places(handle, selection):
                announced = announced_bytes(self.codec, os.pread(handle, HEAD_BYTES, place))
                if announced not in (None, self.chunk_bytes):
                    raise ValueError(
                        f"{path} announces {announced} bytes where a chunk has {self.chunk_bytes}"
                    )
        finally:
            os.close(handle)

    def _places(self, handle: int, selection: Sequence[slice]) -> Iterator[int]:
        """Where in the file the chunks begin that the box touches."""
        if self.shard is None:
            yield 0
            return
        counts = tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        n_bytes = 16 * math.prod(counts)
        end = os.fstat(handle).st_size - n_bytes - _INDEX_CHECKSUM_BYTES
        text = os.pread(handle, n_bytes, 0 if self.is_index_first else max(0, end))
        if len(text) < n_bytes:
            return  # What is cut short is refused by its checksum.
        starts = np.frombuffer(text, "<u8").reshape(*counts, 2)[..., 0]
        boxes = (
            range(s.start // c, -(-s.stop // c)) for s, c in zip(selection, self.chunk, strict=True)
        )
        for place in itertools.product(*boxes):
            if (start := int(starts[place])) < _ABSENT:
                yield min(start, 2**62)
