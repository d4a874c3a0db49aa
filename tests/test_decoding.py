"""Arrays that are only read: zarrs where it is safe, and the same values as Zarr's own codecs."""

import itertools
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.core import sync
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from bigseg import store
from bigseg.decoding import decode_fast, is_decoded_fast, set_codec_threads

pytest.importorskip("zarrs", reason="without zarrs all arrays are decoded by Zarr's own codecs")

SHAPE = (21, 19, 30)
SHARDS = {"shards": (16, 16, 16)}
V2 = {"zarr_format": 2}


def fast_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for dtype, version in itertools.product(("?", *"bBhHiIqQ", "f2", "f4", "f8"), (2, 3)):
        name = np.dtype(dtype).name
        yield f"{name}, zarr {version}", {"dtype": name, "zarr_format": version}
    for fill, version in itertools.product((7, np.nan, -np.inf, -0.0), (2, 3)):
        yield (
            f"fill {fill}, zarr {version}",
            {"dtype": "f4", "fill_value": fill, "zarr_format": version},
        )
    yield "fill of 64 bits", {"dtype": "u8", "fill_value": 2**64 - 1}
    yield "no fill", {**V2, "fill_value": None}
    for name, shuffle in itertools.product(("blosclz", "lz4", "zlib", "zstd"), (0, 1, 2)):
        yield f"blosc {name} {shuffle}", {**V2, "compressors": numcodecs.Blosc(name, 5, shuffle)}
        kind = ("noshuffle", "shuffle", "bitshuffle")[shuffle]
        codec = BloscCodec(cname=name, shuffle=kind)
        yield f"blosc {name} {kind}, sharded", {**SHARDS, "compressors": codec}
    for level in (-3, 1, 22):
        yield f"zstd {level}", {"compressors": ZstdCodec(level=level, checksum=True)}
        yield f"zstd {level}, zarr 2", {**V2, "compressors": numcodecs.Zstd(level)}
    yield "zstd, sharded", {**SHARDS, "dtype": "f4", "compressors": ZstdCodec()}


def own_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "zstd with a checksum", {**V2, "compressors": numcodecs.Zstd(1, checksum=True)}
    yield "blosc, automatic shuffle", {**V2, "compressors": numcodecs.Blosc(shuffle=-1)}
    yield "column-major", {**V2, "order": "F"}
    yield "big-endian, zarr 2", {**V2, "dtype": ">u2"}
    yield "big-endian, zarr 3", {"dtype": ">u2", "serializer": BytesCodec(endian="big")}
    yield "big-endian floats", {"dtype": ">f4", "serializer": BytesCodec(endian="big")}
    for name in ("LZ4", "LZMA", "BZ2", "Zlib", "GZip"):
        yield name, {**V2, "compressors": getattr(numcodecs, name)()}
    for codec in (
        numcodecs.Delta("u2"),
        numcodecs.FixedScaleOffset(0, 1, "u2"),
        numcodecs.Shuffle(2),
        numcodecs.CRC32(),
        numcodecs.Adler32(),
        numcodecs.Fletcher32(),
        numcodecs.AsType("u4", "u2"),
    ):
        yield codec.codec_id, {**V2, "filters": [codec], "compressors": numcodecs.Zstd()}
    yield "raw", {"compressors": None}
    yield "raw, zarr 2", {**V2, "compressors": None}
    yield "gzip", {"compressors": GzipCodec()}
    yield "transpose", {"filters": TransposeCodec(order=(2, 1, 0))}
    yield "crc32c", {"compressors": [ZstdCodec(), Crc32cCodec()]}
    yield "crc32c, sharded", {**SHARDS, "compressors": [ZstdCodec(), Crc32cCodec()]}


FAST, OWN = dict(fast_cases()), dict(own_cases())


def write_array(url: str, **options: Any) -> zarr.Array[Any]:
    """Noise in most of the chunks; the others are missing."""
    array = zarr.create_array(url, shape=SHAPE, **{"dtype": "u2", "chunks": (8, 8, 8), **options})
    data = np.random.default_rng(0).integers(0, 99, SHAPE).astype(array.dtype)
    if array.dtype.kind == "f":
        data[0, 0, :3] = np.nan, np.inf, -0.0
    array[:8] = data[:8]
    array[8:, :9] = data[8:, :9]
    return array


@pytest.mark.parametrize("case", [*FAST, *OWN])
def test_every_codec_gives_the_values_of_zarrs_own(tmp_path: Path, case: str) -> None:
    url = str(tmp_path / "a")
    write_array(url, **(FAST | OWN)[case])
    own = zarr.open_array(url, mode="r")
    fast = store.open_array(url, mode="r")
    assert is_decoded_fast(fast) == (case in FAST)
    rng = np.random.default_rng(1)
    whole = tuple(slice(0, n) for n in SHAPE)
    parts = [[sorted(rng.integers(0, n + 1, 2)) for n in SHAPE] for _ in range(8)]
    for part in (whole, *(tuple(slice(int(a), int(b)) for a, b in p) for p in parts)):
        wanted, got = np.asarray(own[part]), np.asarray(fast[part])
        assert wanted.dtype == got.dtype
        assert wanted.tobytes() == got.tobytes(), part


def test_only_files_that_are_only_read_are_decoded_fast(tmp_path: Path) -> None:
    url = str(tmp_path / "a b ü.zarr")
    data = write_array(url)[:]
    assert is_decoded_fast(store.open_array(url, mode="r"))
    assert is_decoded_fast(store.open_array(f"file://{url}", mode="r"))
    assert not is_decoded_fast(store.open_array(url, mode="r+"))
    assert not is_decoded_fast(store.writable(store.open_array(url, mode="r")))

    class Watched(LocalStore):
        pass

    for other in (Watched(url, read_only=True), WrapperStore(LocalStore(url, read_only=True))):
        assert not is_decoded_fast(decode_fast(zarr.open_array(other, mode="r")))
    memory = zarr.create_array(MemoryStore(), data=data)
    assert not is_decoded_fast(decode_fast(memory))


def test_without_zarrs_arrays_are_decoded_by_zarr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_array(str(tmp_path / "a"))[:]
    monkeypatch.setitem(sys.modules, "zarrs", None)
    array = store.open_array(str(tmp_path / "a"), mode="r")
    assert not is_decoded_fast(array)
    np.testing.assert_array_equal(array[:], data)


def test_opening_for_reading_changes_nothing_for_others(tmp_path: Path) -> None:
    write_array(str(tmp_path / "a"))
    before = pickle.dumps(zarr.config.config)
    store.open_array(str(tmp_path / "a"), mode="r")
    assert pickle.dumps(zarr.config.config) == before
    assert not is_decoded_fast(zarr.open_array(str(tmp_path / "a"), mode="r"))


def test_an_array_that_is_decoded_fast_can_be_pickled_and_not_written(tmp_path: Path) -> None:
    data = write_array(str(tmp_path / "a"))[:]
    array = pickle.loads(pickle.dumps(store.open_array(str(tmp_path / "a"), mode="r")))
    assert is_decoded_fast(array)
    np.testing.assert_array_equal(array[:], data)
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 1


CHECKED = {
    "zstd": ({"compressors": ZstdCodec(checksum=True)}, "c/1/0/1"),
    "crc32c": ({"compressors": [ZstdCodec(), Crc32cCodec()]}, "c/1/0/1"),
    "shard": ({**SHARDS, "compressors": ZstdCodec(checksum=True)}, "c/0/0/0"),
}


@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("part", [np.s_[:16, :16, :16], np.s_[9:10, :3, 9:12]])
def test_a_flipped_bit_under_a_checksum_is_never_read(
    tmp_path: Path, case: str, part: tuple[slice, ...]
) -> None:
    options, path = CHECKED[case]
    write_array(str(tmp_path / "a"), **options)
    array = store.open_array(str(tmp_path / "a"), mode="r")
    wanted, whole = array[part], (tmp_path / "a" / path).read_bytes()
    rng = np.random.default_rng(0)
    errors = []
    for place in rng.integers(0, len(whole), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "a" / path).write_bytes(damaged)
        try:
            np.testing.assert_array_equal(array[part], wanted)
        except (RuntimeError, ValueError) as error:
            errors.append(type(error))
    # In a shard, a bit may lie in a chunk that is not read.
    assert len(errors) == 30 or (case == "shard" and len(errors) > 0)
    # Zarr's own crc32c raises ValueError.
    assert set(errors) == {ValueError if case == "crc32c" else RuntimeError}


def test_a_chunk_cut_short_is_an_error(tmp_path: Path) -> None:
    for compressor in (ZstdCodec(), BloscCodec()):
        url = str(tmp_path / type(compressor).__name__)
        write_array(url, compressors=compressor)
        array = store.open_array(url, mode="r")
        assert is_decoded_fast(array)
        chunk = Path(url, "c/0/0/0")
        whole = chunk.read_bytes()
        for n in (0, 1, 8, len(whole) // 2, len(whole) - 1):
            chunk.write_bytes(whole[:n])
            with pytest.raises(RuntimeError, match="a chunk cannot be read or decompressed"):
                array[:8, :8, :8]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("shards", [None, (16, 16, 16)])
def test_zarrs_own_blosc_is_called_only_for_bytes_that_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, shards: Any
) -> None:
    if version == 2 and shards:
        pytest.skip("Zarr 2 has no shards")
    monkeypatch.setitem(sys.modules, "zarrs", None)
    url = str(tmp_path / "a")
    codec = numcodecs.Blosc() if version == 2 else BloscCodec()
    write_array(url, zarr_format=version, compressors=codec, shards=shards)
    array = store.open_array(url, mode="r")
    assert not is_decoded_fast(array)
    own = zarr.open_array(url, mode="r")
    np.testing.assert_array_equal(array[:], own[:])
    path = Path(url, "0.0.0" if version == 2 else "c/0/0/0")
    whole = path.read_bytes()
    if shards:
        # The index at the end stays; the first chunk announces more than there is.
        path.write_bytes(whole[:12] + (1 << 20).to_bytes(4, "little") + whole[16:])
    else:
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"has \d+ of the \d+ bytes that blosc announces"):
        array[:8, :8, :8]


def test_the_number_of_threads_is_set_for_all_codecs(tmp_path: Path) -> None:
    data = write_array(str(tmp_path / "a"))[:]
    before = {key: zarr.config.get(key, None) for key in SETTINGS}
    try:
        for n_threads in (1, 3):
            set_codec_threads(n_threads)
            assert sync._get_executor()._max_workers == n_threads
            assert zarr.config.get("threading.max_workers") == n_threads
            for mode in ("r", "r+"):
                array = store.open_array(str(tmp_path / "a"), mode=mode)
                np.testing.assert_array_equal(array[:], data)
    finally:
        zarr.config.set(before)
        sync._executor = None


SETTINGS = (
    "threading.max_workers",
    "async.concurrency",
    "codec_pipeline.chunk_concurrent_minimum",
    "codec_pipeline.chunk_concurrent_maximum",
)
