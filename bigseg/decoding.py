"""Who decodes an array that is only read: zarrs (written in Rust) where that is safe, else Zarr.

It knows arrays that are open, and nothing of locations, images or writing. What zarrs may decode is
a list of what was compared value by value and damaged byte by byte against Zarr's own codecs:

    bytes ▸ zstd    bytes ▸ blosc    in chunks, or in the inner chunks of shards; Zarr 2 and 3

Everything else is Zarr's own: with zarrs 0.2.3 a part of a damaged chunk under gzip, zlib or crc32c
is read without a word, big-endian and column-major arrays fail, and only files are fast. Of Zarr's
own codecs blosc is called only for bytes as long as they say, because it reads past their end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numcodecs.blosc import Blosc  # type: ignore[import-untyped]
from zarr.codecs import BloscCodec, ShardingCodec
from zarr.codecs._v2 import V2Codec
from zarr.core import sync
from zarr.core.buffer.cpu import NDBuffer
from zarr.storage import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.abc.codec import Codec, CodecPipeline

    Check = Callable[[Path, Sequence[slice]], None]

# zarrs ends the process when memory runs out, where Zarr raises MemoryError.
MAX_CHUNK_BYTES = 2**30
# Of blosc: version, flags, sizes; the last four bytes are the length of the whole.
BLOSC_HEADER_BYTES = 16


@dataclasses.dataclass(frozen=True)
class ZarrsPipeline:
    """All that an array asks of its codec pipeline: reads go to zarrs, writes to Zarr's own.

    A selection that cuts through chunks is read as whole chunks, one layer of them at a time, and
    cropped. zarrs does not check what it leaves out of a chunk, holds Python's lock while it
    decodes a part, and takes a fifth longer (zarrs 0.2.3, 280³ voxels of chunks of 64³).
    """

    fast: CodecPipeline
    own: CodecPipeline
    chunks: tuple[int, ...]
    check: Check | None = None

    async def read(self, batch_info: Any, out: Any, drop_axes: tuple[int, ...] = ()) -> Any:  # noqa: ANN401
        """Decode chunks into `out`.

        Raises:
            RuntimeError: a chunk is damaged or cannot be read, as from Zarr's own codecs.
        """
        batch = list(batch_info)
        try:
            if drop_axes or not all(_is_box(item) for item in batch):
                return await self.fast.read(batch, out, drop_axes)
            pieces = [_Piece.of(item, self.chunks) for item in batch]
            for piece in pieces:
                if self.check is not None:
                    self.check(piece.source.store.root / piece.source.path, piece.inside)
            if all(piece.is_exact for piece in pieces):
                return await self.fast.read(batch, out)
            return await self._read_layers(pieces, out.as_ndarray_like())
        except (OSError, IndexError, ValueError, RuntimeError) as error:
            raise RuntimeError(f"a chunk cannot be read or decompressed: {error}") from error

    async def write(self, batch_info: Any, value: Any, drop_axes: tuple[int, ...] = ()) -> Any:  # noqa: ANN401
        """What Zarr does with a write to a store that is only read."""
        return await self.own.write(batch_info, value, drop_axes)

    async def _read_layers(self, pieces: list[_Piece], out: NDArray[Any]) -> None:
        layer = np.empty(0, out.dtype)
        for group in _layers(pieces):
            low = tuple(map(min, zip(*(piece.start for piece in group), strict=True)))
            high = tuple(map(max, zip(*(piece.stop for piece in group), strict=True)))
            shape = tuple(b - a for a, b in zip(low, high, strict=True))
            if layer.shape != shape:
                layer = np.empty(shape, out.dtype)
            batch = [piece.item_in(low) for piece in group]
            await self.fast.read(batch, NDBuffer.from_numpy_array(layer))
            ends = list(zip(low, high, out.shape, strict=True))
            wanted = tuple(slice(max(a, 0), min(b, n)) for a, b, n in ends)
            kept = tuple(slice(w.start - a, w.stop - a) for w, a in zip(wanted, low, strict=True))
            await asyncio.to_thread(np.copyto, out[wanted], layer[kept])


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One stored object of a read: which box of it, widened to whole chunks, goes where.

    `start` and `stop` are in the coordinates of what is read, and may lie outside of it.
    """

    source: Any
    spec: Any
    inside: tuple[slice, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    is_exact: bool

    @classmethod
    def of(cls, item: Any, chunks: tuple[int, ...]) -> _Piece:  # noqa: ANN401 - Zarr's own tuples
        """The piece of an item of Zarr's batch."""
        source, spec, selection, place, _ = item
        low = [s.start // c * c for s, c in zip(selection, chunks, strict=True)]
        high = [-(-s.stop // c) * c for s, c in zip(selection, chunks, strict=True)]
        inside = tuple(map(slice, low, high))
        start = tuple(p.start - s.start + a for p, s, a in zip(place, selection, low, strict=True))
        stop = tuple(a + i.stop - i.start for a, i in zip(start, inside, strict=True))
        return cls(source, spec, inside, start, stop, is_exact=inside == tuple(selection))

    def item_in(self, origin: tuple[int, ...]) -> tuple[Any, ...]:
        """The item of a batch that reads the widened box into an array that begins at `origin`."""
        ends = zip(self.start, self.stop, origin, strict=True)
        place = tuple(slice(a - o, b - o) for a, b, o in ends)
        return self.source, self.spec, self.inside, place, True


def _is_box(item: Any) -> bool:  # noqa: ANN401
    return all(isinstance(s, slice) and s.step in (None, 1) for s in (*item[2], *item[3]))


def _layers(pieces: list[_Piece]) -> list[list[_Piece]]:
    """The pieces in groups that follow each other along the first axis where they differ."""
    varies = [len(set(starts)) > 1 for starts in zip(*(p.start for p in pieces), strict=True)]
    axis = varies.index(True) if any(varies) else 0
    groups: dict[int, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.start[axis], []).append(piece)
    return list(groups.values())


class WholeBlosc(Blosc):  # type: ignore[misc]
    """blosc for bytes that are all there: its library trusts their header (numcodecs 0.16)."""

    codec_id = "blosc"

    def decode(self, buf: Any, out: Any = None) -> Any:  # noqa: ANN401 - as numcodecs has it
        """What was compressed.

        Raises:
            ValueError: the bytes end before they say.
        """
        view = memoryview(buf)
        header = bytes(view[:BLOSC_HEADER_BYTES])
        announced = max(BLOSC_HEADER_BYTES, int.from_bytes(header[-4:], "little"))
        if view.nbytes < announced:
            raise ValueError(f"it has {view.nbytes} of the {announced} bytes that blosc announces")
        return super().decode(buf, out)


def _guard_blosc(codecs: Iterable[Codec]) -> None:
    """Let these codecs decode only what is whole."""
    for codec in codecs:
        if isinstance(codec, BloscCodec):
            # Where zarr keeps what it has made once (zarr 3.1.6).
            vars(codec)["_blosc_codec"] = _whole(codec._blosc_codec)
        elif isinstance(codec, ShardingCodec):
            _guard_blosc(codec.codecs)
        elif isinstance(codec, V2Codec) and isinstance(codec.compressor, Blosc):
            object.__setattr__(codec, "compressor", _whole(codec.compressor))


def _whole(codec: Blosc) -> WholeBlosc:
    settings = {key: value for key, value in codec.get_config().items() if key != "id"}
    return WholeBlosc(**settings)


def decode_fast(
    array: zarr.Array[Any], check_of: Callable[[zarr.Array[Any]], Check] | None = None
) -> zarr.Array[Any]:
    """The array, for reading: decoded by zarrs where that is installed and safe.

    `check_of` gives what looks at a stored object, and the box wanted of it, before zarrs does.
    """
    pipeline: Any = array.async_array.codec_pipeline
    _guard_blosc(pipeline)
    if _is_safe(array):
        try:
            from zarrs import ZarrsCodecPipeline
        except ImportError:
            return array
        inner = array.async_array
        with warnings.catch_warnings():
            # What it does not take after all is no news to the user: Zarr reads it.
            warnings.simplefilter("ignore")
            fast = ZarrsCodecPipeline.from_array_metadata_and_store(
                inner.metadata, inner.store_path.store
            )
        if fast.impl is None:
            return array
        # Zarr chooses the pipeline by its configuration, which all threads share: a change for a
        # moment would reach arrays that others open for writing.
        check = None if check_of is None else check_of(array)
        chosen = ZarrsPipeline(fast, pipeline, tuple(array.chunks), check)
        object.__setattr__(inner, "codec_pipeline", chosen)
    return array


def is_decoded_fast(array: zarr.Array[Any]) -> bool:
    """Whether zarrs decodes the chunks of this array."""
    return isinstance(array.async_array.codec_pipeline, ZarrsPipeline)


def set_codec_threads(n_threads: int) -> None:
    """Let this process decode and encode with `n_threads` for each read or write.

    It holds for arrays that are opened afterwards. Requests to a remote store are not decoding:
    at least ten stay in flight.
    """
    zarr.config.set(
        {
            "threading.max_workers": n_threads,
            "async.concurrency": max(10, 2 * n_threads),
            "codec_pipeline.chunk_concurrent_minimum": 1,
            "codec_pipeline.chunk_concurrent_maximum": n_threads,
        }
    )
    # Zarr makes its executor once; the old one ends when its last call has returned.
    sync._executor = None
    executor = sync._get_executor()
    assert isinstance(executor, ThreadPoolExecutor)
    assert executor._max_workers == n_threads, (executor._max_workers, n_threads)


def _is_safe(array: zarr.Array[Any]) -> bool:
    store = array.async_array.store_path.store
    return (
        # A subclass may do more than read files, such as count or cache.
        type(store) is LocalStore
        and store.read_only
        and array.dtype.kind in "biuf"
        and array.dtype.isnative
        and array.order == "C"
        and 0 < math.prod(array.chunks) * array.dtype.itemsize <= MAX_CHUNK_BYTES
        and _are_known(array.metadata.to_dict())
    )


def _are_known(metadata: Mapping[str, Any]) -> bool:
    if metadata["zarr_format"] == 2:
        codec = dict(metadata["compressor"] or {})
        # zarrs 0.2.3 takes zstd of Zarr 2 only without a checksum.
        known = not metadata["filters"] and not codec.get("checksum")
        return known and _is_known(codec.pop("id", ""), codec)
    codecs = metadata["codecs"]
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        inner = codecs[0]["configuration"]
        index = [codec["name"] for codec in inner["index_codecs"]]
        return index == ["bytes", "crc32c"] and _is_known_chain(inner["codecs"])
    return _is_known_chain(codecs)


def _is_known_chain(codecs: Sequence[Mapping[str, Any]]) -> bool:
    if len(codecs) != 2 or codecs[0]["name"] != "bytes":
        return False
    settings = [codec.get("configuration") or {} for codec in codecs]
    endian = settings[0].get("endian") or "little"
    return endian == "little" and _is_known(codecs[1]["name"], settings[1])


def _is_known(codec: str, settings: Mapping[str, Any]) -> bool:
    """Whether zarrs takes this codec with these settings, as Zarr writes them."""
    if codec == "zstd":
        return settings.get("level", 0) in range(-7, 23)
    shuffles = ("noshuffle", "shuffle", "bitshuffle", 0, 1, 2)
    return codec == "blosc" and settings.get("shuffle") in shuffles
