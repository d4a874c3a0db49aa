"""What was packed comes back; what was not is refused."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from bigseg.errors import OutputError
from bigseg.packing import MAGIC, VERSION, pack, unpack

MANY = 1 << 20
DTYPES = [np.dtype(name) for name in ("u1", "u2", "u4", "u8", "i8", "f8", ">u4")]


@st.composite
def collections(draw):
    names = draw(st.lists(st.text("abcdef 09", min_size=1, max_size=16), unique=True, max_size=4))
    shapes = st.lists(st.integers(0, 5), max_size=6).map(tuple)
    return {
        name: draw(arrays_of.arrays(draw(st.sampled_from(DTYPES)), draw(shapes))) for name in names
    }


@settings(max_examples=60, deadline=None)
@given(collections())
def test_arrays_come_back_as_they_were(arrays):
    found = unpack(pack("test", arrays), "test", most_bytes=MANY)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found[name], array)


def test_only_what_was_asked_for_is_read():
    data = pack("test", {"a": np.arange(3), "b": np.arange(4)})
    assert list(unpack(data, "test", most_bytes=MANY, names={"b", "c"})) == ["b"]


def test_equal_arrays_are_equal_bytes_however_they_lie_in_memory():
    array = np.arange(24, dtype=np.uint16).reshape(4, 6)
    assert pack("test", {"a": array}) == pack("test", {"a": np.asfortranarray(array)})


PACKED = pack("test", {"a": np.arange(30, dtype=np.uint32), "b": np.ones((2, 3))})


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(PACKED) - 1), st.integers(0, 7))
def test_every_flipped_bit_is_noticed(place, bit):
    data = bytearray(PACKED)
    data[place] ^= 1 << bit
    with pytest.raises(OutputError, match="no test of bigseg's, or damaged"):
        unpack(bytes(data), "test", most_bytes=MANY)


@pytest.mark.parametrize("n", [0, 1, 20, len(PACKED) // 2, len(PACKED) - 1])
def test_what_was_cut_short_is_refused(n):
    with pytest.raises(OutputError, match="remove the folder scratch of the result"):
        unpack(PACKED[:n], "test", most_bytes=MANY)


@pytest.mark.parametrize("data", [PACKED + b"\0", b"\x93NUMPY" + bytes(200), bytes(1000), b"\x80"])
def test_something_else_is_refused(data):
    with pytest.raises(OutputError, match="is no test of bigseg's"):
        unpack(data, "test", most_bytes=MANY)


def test_another_kind_is_refused():
    with pytest.raises(OutputError, match=r"is no other of bigseg's.*it begins with b'bigsegPK"):
        unpack(PACKED, "other", most_bytes=MANY)


def forged(dtype, shape, payload, *, n_axes=None):
    """A file whose checksum is right and whose record says something untrue."""
    sizes = (*shape, *(0,) * (6 - len(shape)))
    record = struct.pack(
        "<16s4sB6QQ", b"a", dtype, len(shape) if n_axes is None else n_axes, *sizes, len(payload)
    )
    body = record + payload
    head = struct.pack("<8sH16sHQI", MAGIC, VERSION, b"test", 1, len(body), zlib.crc32(body))
    return head + body


def test_a_forger_who_says_the_truth_is_believed():
    data = forged(b"<u8", (2,), zlib.compress(np.array([1, 2], "<u8").tobytes()))
    assert unpack(data, "test", most_bytes=16)["a"].tolist() == [1, 2]


@pytest.mark.parametrize("shape", [(2**60,), (2**63, 2**63), (3,)])
def test_announced_sizes_are_compared_before_anything_is_allocated(shape):
    data = forged(b"<u8", shape, zlib.compress(bytes(16)))
    with pytest.raises(OutputError, match="bytes are announced where 16 are possible"):
        unpack(data, "test", most_bytes=16)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (forged(b"|O", (2,), b""), "type"),
        (forged(b"<u8", (2,), b"", n_axes=7), "7 axes"),
        (forged(b"<u8", (2,), zlib.compress(bytes(15))), "has not the 16 bytes"),
        (forged(b"<u8", (2,), zlib.compress(bytes(1 << 20))), "has not the 16 bytes"),
        (forged(b"<u8", (2,), zlib.compress(bytes(16)) + b"more"), "has not the 16 bytes"),
        (forged(b"<u8", (2,), zlib.compress(bytes(16))[:-4]), "has not the 16 bytes"),
        (forged(b"<u8", (2,), b"not compressed"), "while decompressing"),
    ],
)
def test_records_that_do_not_fit_their_bytes_are_refused(data, why):
    with pytest.raises(OutputError, match=why):
        unpack(data, "test", most_bytes=1 << 30)
