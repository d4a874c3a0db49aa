"""What a chunk announces is read as its own library reads it, and damage is met before zarrs is."""

import json

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, ZstdCodec

from bigseg import store
from bigseg.decoding import is_decoded_fast
from bigseg.frames import HEAD_BYTES, announced_bytes

SIZES = st.one_of(st.integers(0, 1000), st.sampled_from([255, 256, 65_791, 65_792, 200_000]))


@given(SIZES, st.integers(-5, 5), st.booleans())
def test_the_size_that_zstd_announces_is_that_of_what_was_compressed(n, level, checksum):
    data = numcodecs.Zstd(level=level, checksum=checksum).encode(bytes(n))
    assert announced_bytes("zstd", data[:HEAD_BYTES]) == n


@given(SIZES.filter(bool), st.integers(1, 8), st.sampled_from(["lz4", "zstd"]))
def test_the_size_that_blosc_announces_is_that_of_what_was_compressed(n, itemsize, name):
    values = np.zeros(n * itemsize, np.uint8).view(f"V{itemsize}")
    data = numcodecs.Blosc(cname=name).encode(values)
    assert announced_bytes("blosc", data[:HEAD_BYTES]) == n * itemsize


@given(st.binary(max_size=HEAD_BYTES))
def test_any_bytes_announce_a_size_or_none(head):
    for codec in ("zstd", "blosc"):
        announced = announced_bytes(codec, head)
        assert announced is None or 0 <= announced < 2**64 + 256


@pytest.mark.parametrize("shards", [None, (8, 16)])
@pytest.mark.parametrize("codec", [ZstdCodec(), BloscCodec()], ids=["zstd", "blosc"])
@pytest.mark.parametrize("index", ["start", "end"])
def test_whole_chunks_are_read_and_others_refused(tmp_path, shards, codec, index):
    data = np.random.default_rng(0).integers(0, 9, (16, 16), np.uint16)
    inner = {"chunks": (4, 8), "compressors": codec}
    if shards is None:
        array = zarr.create_array(str(tmp_path / "a"), data=data, **inner)
    else:
        from zarr.codecs import ShardingCodec

        serializer = ShardingCodec(
            chunk_shape=(4, 8), codecs=[zarr.codecs.BytesCodec(), codec], index_location=index
        )
        array = zarr.create_array(
            str(tmp_path / "a"), data=data, chunks=shards, serializer=serializer, compressors=None
        )
    del array
    read = store.open_array(str(tmp_path / "a"), mode="r")
    assert is_decoded_fast(read)
    np.testing.assert_array_equal(read[:], data)
    np.testing.assert_array_equal(read[1:9, 3:15], data[1:9, 3:15])
    path = next(
        p for p in sorted(tmp_path.rglob("*")) if p.parent.name in ("0", "c") and p.is_file()
    )
    # Another size: a frame of one more row, in the place of the first.
    raw = bytearray(path.read_bytes())
    start = 16 * 4 + 4 if shards is not None and index == "start" else 0
    if isinstance(codec, ZstdCodec):
        raw[start + 5] ^= 0x10
    else:
        raw[start + 4] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(RuntimeError, match=r"announces \d+ bytes where a chunk has 64"):
        read[:4, :8]


def test_what_zarrs_does_not_take_after_all_is_read_by_zarr_without_a_word(tmp_path):
    data = np.arange(64, dtype=np.uint8).reshape(8, 8)
    zarr.create_array(str(tmp_path / "a"), data=data, chunks=(4, 4))
    path = tmp_path / "a" / "zarr.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "attributes": [document["attributes"]]}))
    read = store.open_array(str(tmp_path / "a"), mode="r")
    assert not is_decoded_fast(read)
    np.testing.assert_array_equal(read[:], data)
