"""What a block says of the objects in it: voxel counts, boxes, and sums that add up exactly.

One object may lie in many blocks; its rows are added. Everything comes from the runs of equal
labels along x, of which a block has far fewer than voxels:

    labels   0 0 7 7 7 2 2 0        runs   7: 3 voxels from x = 2,  2: 2 voxels from x = 5
    image    9 9 5 6 7 1 4 9        sums   7: 18                    2: 5

Sums of integers (indices of voxels, intensities of integer images) are kept as two numbers, so
that no object is too large for them. It knows arrays and bytes, and nothing of files and units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.packing import damaged, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Region, Vec

_N_AXES = 4
_LOW_BITS = 32
_LOW = 2**_LOW_BITS - 1
_KIND = "objects"
# No bytes that zlib has packed become more than 1032 times as many.
_MOST_INFLATION = 1032
_EXTENT = ("start", "stop", "index_high", "index_low")
_INTENSITY = ("n_finite", "minimum", "maximum", "value_high", "value_low")
# How rows of one object become one, in the order in which columns are stored.
_RULES: dict[str, Any] = {
    "n_voxels": np.add,
    "start": np.minimum,
    "stop": np.maximum,
    "index_high": np.add,
    "index_low": np.add,
    "n_finite": np.add,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "value_high": np.add,
    "value_low": np.add,
}


@dataclass(frozen=True, eq=False)
class ObjectSums:
    """One entry an object, n in all; labels ascend and are positive. c is the number of channels.

    label       (n,)   uint64
    n_voxels    (n,)   int64
    start, stop (4, n) int64   the smallest half-open box, along t, z, y, x of the volume
    index_high, index_low (4, n) int64, uint64   sums of the voxels' indices along t, z, y, x
    n_finite    (c, n) int64   voxels whose intensity is a finite number: all, of integers
    minimum, maximum (c, n)    of those, uint64, int64 or float64 as the image is of unsigned or
                               signed integers or floats. Without any the minimum is the larger.
    value_high, value_low (c, n) int64, uint64   sums of the intensities

    A sum is high · 2^32 + low, with low below 2^32. It is exact for objects of any size; with
    images of 64-bit integers, of 2^31 voxels. Sums of float images are value_high alone, float64,
    and value_low is 0; two orders of adding differ by float64 rounding.
    """

    label: NDArray[np.uint64]
    n_voxels: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    index_high: NDArray[np.int64]
    index_low: NDArray[np.uint64]
    n_finite: NDArray[np.int64]
    minimum: NDArray[Any]
    maximum: NDArray[Any]
    value_high: NDArray[Any]
    value_low: NDArray[np.uint64]

    @classmethod
    def empty(cls, n_channels: int = 0, dtype: np.dtype[Any] | None = None) -> ObjectSums:
        """No objects, of an image with so many channels of this type."""
        columns = _columns(n_channels, _stored_type(dtype or np.dtype(np.uint8)))
        return cls(**{name: np.empty((*width, 0), d) for name, (width, d) in columns.items()})

    @classmethod
    def merged(cls, tables: Sequence[ObjectSums]) -> ObjectSums:
        """The sums of objects whose voxels are spread over these tables of one image."""
        if not tables:
            return cls.empty()
        merger = Merger(np.unique(np.concatenate([t.label for t in tables])), like=tables[0])
        for table in tables:
            merger.add(table)
        return merger.sums()

    @classmethod
    def from_bytes(cls, data: bytes) -> ObjectSums:
        """What `to_bytes` wrote.

        Raises:
            OutputError: it did not write these bytes, or they are damaged.
        """
        arrays = unpack(data, _KIND, most_bytes=_MOST_INFLATION * len(data))
        if why := _flaw(arrays):
            raise damaged(_KIND, why, len(data))
        return cls(**{name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()})

    def to_bytes(self) -> bytes:
        """All of it, compressed, with a checksum."""
        return pack(_KIND, {name: getattr(self, name) for name in ("label", *_RULES)})

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: slice) -> ObjectSums:
        return ObjectSums(**{name: getattr(self, name)[..., rows] for name in ("label", *_RULES)})

    @property
    def n_channels(self) -> int:
        """Number of channels of the image; 0 without one."""
        return len(self.minimum)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the smallest and largest intensities."""
        return self.minimum.dtype

    @property
    def n_bytes_each(self) -> int:
        """What an object takes in memory."""
        return _n_bytes_each(_columns(self.n_channels, self.dtype))

    def between(self, first: int, stop: int) -> ObjectSums:
        """Those with labels from `first` up to and without `stop`."""
        low, high = np.searchsorted(self.label, np.array([first, stop], np.uint64))
        return self[low:high]

    def mean_index(self) -> NDArray[np.float64]:
        """(4, n) mean index of the voxels along t, z, y, x."""
        return _as_float(self.index_high, self.index_low) / self.n_voxels

    def mean_value(self) -> NDArray[np.float64]:
        """(c, n) mean of the intensities that are finite; NaN without any."""
        is_float = self.dtype.kind == "f"
        total = self.value_high if is_float else _as_float(self.value_high, self.value_low)
        with np.errstate(invalid="ignore"):  # 0 / 0
            return np.asarray(total / self.n_finite)


class Merger:
    """Adds up tables in memory for the objects given first, and no more.

    Floats are added in the order of the calls, so that the same order gives the same bits.
    """

    def __init__(self, label: NDArray[np.uint64], *, like: ObjectSums) -> None:
        """Nothing yet for these labels, which ascend, of the image that `like` was made of."""
        self._label = label
        columns = _columns(like.n_channels, like.dtype)
        self._sums = {
            name: np.full((*columns[name][0], len(label)), _neutral(rule, columns[name][1]))
            for name, rule in _RULES.items()
        }

    def add(self, table: ObjectSums) -> None:
        """Add a table, all of whose labels must be among those given first."""
        rows = np.searchsorted(self._label, table.label)
        assert np.array_equal(self._label[rows], table.label)
        with np.errstate(over="ignore", invalid="ignore"):
            for name, rule in _RULES.items():
                column = self._sums[name]
                column[..., rows] = rule(column[..., rows], getattr(table, name))

    def sums(self) -> ObjectSums:
        """The sums of those objects that have voxels."""
        found = dict(self._sums)
        # Low parts are below 2^32 in each table: 2^32 tables fit before they are carried.
        for high, low in (("index_high", "index_low"), ("value_high", "value_low")):
            if found[high].dtype.kind == "i":
                found[high], found[low] = _carried(found[high], found[low])
        has_voxels = found["n_voxels"] > 0
        if has_voxels.all():
            return ObjectSums(self._label, **found)
        kept = {name: column[..., has_voxels] for name, column in found.items()}
        return ObjectSums(self._label[has_voxels], **kept)


def sums_of(labels: NDArray[Any], image: NDArray[Any] | None, core: Region) -> ObjectSums:
    """The sums of the objects in a core: labels (t, z, y, x), 0 is none; image (c, t, z, y, x).

    An intensity that is not finite (NaN, inf) counts in no mean, minimum or maximum.
    """
    assert labels.shape == core.shape, (labels.shape, core)
    channels = () if image is None else image
    dtype = _stored_type(np.dtype(np.uint8) if image is None else image.dtype)
    runs = _Runs.of(labels)
    if not len(runs.label):
        return ObjectSums.empty(len(channels), dtype)
    columns = _columns(len(channels), dtype)
    found = {name: np.empty((*w, len(runs.label)), d) for name, (w, d) in columns.items()}
    found["label"][:] = runs.label
    found["n_voxels"][:] = runs.each(np.add, runs.length)
    for axis, first in enumerate(core.start):
        _fill_extent({k: found[k][axis] for k in _EXTENT}, runs, axis, first, found["n_voxels"])
    is_object = (labels != 0).ravel()
    for c, channel in enumerate(channels):
        assert channel.shape == labels.shape, (channel.shape, labels.shape)
        values = channel.ravel()[is_object]
        values = values.view(np.uint8) if values.dtype.kind == "b" else values
        _fill_intensity({k: found[k][c] for k in _INTENSITY}, runs, values, found["n_voxels"])
    return ObjectSums(**found)


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of equal labels along x that are no background, and which of them form an object.

    `start` and `length` are those of the runs, sorted by label, then by place; `first` says where
    in them each object of `label` begins. `order` sorts the runs as they follow each other in the
    array, and `offset` says where these begin among the voxels of objects alone.
    """

    shape: Vec
    offset: NDArray[np.intp]
    order: NDArray[np.intp]
    start: NDArray[np.intp]
    length: NDArray[np.intp]
    label: NDArray[Any]
    first: NDArray[np.intp]

    @classmethod
    def of(cls, labels: NDArray[Any]) -> _Runs:
        rows = labels.reshape(-1, labels.shape[-1])
        begins = np.ones(rows.shape, bool)
        np.not_equal(rows[:, 1:], rows[:, :-1], out=begins[:, 1:])
        start = np.flatnonzero(begins)
        ids, length = rows.ravel()[start], np.diff(start, append=rows.size)
        is_object = ids != 0
        start, length, ids = start[is_object], length[is_object], ids[is_object]
        order = np.argsort(ids, kind="stable")
        ids = ids[order]
        first = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])[: len(ids)])
        offset = np.cumsum(length) - length
        return cls(labels.shape, offset, order, start[order], length[order], ids[first], first)

    def each(self, rule: Any, values: NDArray[Any]) -> NDArray[Any]:  # noqa: ANN401 - a ufunc
        """One value an object of one value a run."""
        return np.asarray(rule.reduceat(values, self.first))

    def reduced(self, rule: Any, voxels: NDArray[Any], dtype: Any = None) -> NDArray[Any]:  # noqa: ANN401
        """One value an object of one value a voxel, of the voxels of objects alone."""
        return self.each(rule, rule.reduceat(voxels, self.offset, dtype=dtype)[self.order])


def _fill_extent(
    out: dict[str, NDArray[Any]], runs: _Runs, axis: int, origin: int, n_voxels: NDArray[np.int64]
) -> None:
    """Box and sum of indices along one axis of a core that begins at index `origin`."""
    index = runs.start // math.prod(runs.shape[axis + 1 :]) % runs.shape[axis]
    last, total = index, index * runs.length
    if axis == _N_AXES - 1:
        last = index + runs.length - 1
        total += runs.length * (runs.length - 1) // 2
    out["start"][:] = runs.each(np.minimum, index) + origin
    out["stop"][:] = runs.each(np.maximum, last) + origin + 1
    total = runs.each(np.add, total)
    # A core has fewer than 2^31 voxels, so that no part overflows before it is carried.
    high = (total >> _LOW_BITS) + n_voxels * (origin >> _LOW_BITS)
    low = (total & _LOW) + n_voxels * (origin & _LOW)
    out["index_high"][:], out["index_low"][:] = _carried(high, low.astype(np.uint64))


def _fill_intensity(
    out: dict[str, NDArray[Any]], runs: _Runs, values: NDArray[Any], n_voxels: NDArray[np.int64]
) -> None:
    """Number, range and sum of the intensities, one for each voxel of objects."""
    lowest = highest = values
    out["n_finite"][:] = n_voxels
    if values.dtype.kind == "f":
        is_finite = np.isfinite(values)
        if not is_finite.all():
            out["n_finite"][:] = runs.reduced(np.add, is_finite, np.int64)
            lowest = np.where(is_finite, values, np.inf)
            highest = np.where(is_finite, values, -np.inf)
            values = np.where(is_finite, values, 0)
    out["minimum"][:] = runs.reduced(np.minimum, lowest)
    out["maximum"][:] = runs.reduced(np.maximum, highest)
    out["value_high"][:], out["value_low"][:] = _sums(runs, values)


def _sums(runs: _Runs, values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """High and low parts of the sums of intensities."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            # Converted first: what is converted on the way takes twice as long.
            total = runs.reduced(np.add, values.astype(np.float64))
        return total, np.zeros(len(total), np.uint64)
    if values.dtype.itemsize < 8:
        total = runs.reduced(np.add, values.astype(np.int64))
        return total >> _LOW_BITS, (total & _LOW).astype(np.uint64)
    high = runs.reduced(np.add, (values >> _LOW_BITS).astype(np.int64), np.int64)
    return _carried(high, runs.reduced(np.add, (values & _LOW).astype(np.uint64), np.uint64))


def _carried(
    high: NDArray[np.int64], low: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """The same sums with low parts below 2^32."""
    return high + (low >> _LOW_BITS).astype(np.int64), low & _LOW


def _as_float(high: NDArray[np.int64], low: NDArray[np.uint64]) -> NDArray[np.float64]:
    return np.asarray(high * float(2**_LOW_BITS) + low, np.float64)


def _columns(n_channels: int, dtype: np.dtype[Any]) -> dict[str, tuple[Vec, np.dtype[Any]]]:
    """Shape but for the last axis, and type, of each column, in the order of storing."""
    count, low = np.dtype(np.int64), np.dtype(np.uint64)
    high = np.dtype(np.float64) if dtype.kind == "f" else count
    axes, channels = (_N_AXES,), (n_channels,)
    return {
        "label": ((), np.dtype(np.uint64)),
        "n_voxels": ((), count),
        "start": (axes, count),
        "stop": (axes, count),
        "index_high": (axes, count),
        "index_low": (axes, low),
        "n_finite": (channels, count),
        "minimum": (channels, dtype),
        "maximum": (channels, dtype),
        "value_high": (channels, high),
        "value_low": (channels, low),
    }


def _n_bytes_each(columns: dict[str, tuple[Vec, np.dtype[Any]]]) -> int:
    return sum(math.prod(width) * dtype.itemsize for width, dtype in columns.values())


def _stored_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type in which the intensities of an image are kept: the widest of its kind."""
    return np.dtype({"b": "u8", "u": "u8", "i": "i8", "f": "f8"}[dtype.kind])


def _neutral(rule: Any, dtype: np.dtype[Any]) -> Any:  # noqa: ANN401
    """What a value is added to first: of this type, and changing nothing."""
    if rule is np.add:
        return dtype.type(0)
    sign = 1 if rule is np.minimum else -1
    if dtype.kind == "f":
        return dtype.type(sign * np.inf)
    limits = np.iinfo(dtype)
    return dtype.type(limits.max if sign > 0 else limits.min)


def _flaw(arrays: dict[str, NDArray[Any]]) -> str | None:
    """What is wrong with unpacked columns."""
    if set(arrays) != {"label", *_RULES}:
        return f"its columns are {', '.join(sorted(arrays))}"
    label, minimum = arrays["label"], arrays["minimum"]
    columns = _columns(len(minimum), minimum.dtype)
    for name, (width, dtype) in columns.items():
        if arrays[name].dtype != dtype or arrays[name].shape != (*width, *label.shape):
            return f"{name} is of type {arrays[name].dtype} and shape {arrays[name].shape}"
    if label.ndim != 1 or (len(label) and label[0] == 0) or np.any(label[1:] <= label[:-1]):
        return "its labels do not ascend from 1"
    return None
