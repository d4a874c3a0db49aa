"""Laws of the sums of objects: equal to the reference on the whole array, however it was cut."""

from fractions import Fraction

import numpy as np
import pytest
import skimage.measure
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bigseg.blocks import BlockGrid, Region
from bigseg.errors import OutputError
from bigseg.objects import Merger, ObjectSums, sums_of
from bigseg.packing import pack

INTEGERS = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
COLUMNS = ObjectSums.__annotations__
ORIGIN = Region((0, 0, 0, 0), (1, 1, 1, 1))


def equal(a, b):
    """Whether all columns are the same values of the same types."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in COLUMNS]
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@st.composite
def label_arrays(draw, types=("uint8", "uint16", "uint32", "uint64")):
    """Labels (t, z, y, x) of a few objects, which need not be connected."""
    shape = draw(st.tuples(st.integers(1, 3), *[st.integers(1, 6)] * 3))
    ids = st.sampled_from([0, 0, 1, 2, 3, 200])
    return draw(hnp.arrays(draw(st.sampled_from(types)), shape, elements=ids, fill=ids))


@st.composite
def images(draw, shape, types):
    """An image (c, t, z, y, x) with any values of its type that are finite."""
    dtype = np.dtype(draw(st.sampled_from(types)))
    n_channels = draw(st.integers(1, 2))
    elements = hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    return draw(hnp.arrays(dtype, (n_channels, *shape), elements=elements, fill=elements))


@st.composite
def cut_images(draw, types):
    labels = draw(label_arrays())
    grid = draw(grids(labels.shape))
    return labels, draw(images(labels.shape, types)), grid


@st.composite
def grids(draw, shape):
    core = draw(st.tuples(*[st.integers(1, 6)] * 4))
    return BlockGrid(Region.of_shape(shape), core, draw(st.sampled_from([None, (1, 2)])))


def sums_of_blocks(labels, image, grid):
    """The sums of each block, cut out of the whole arrays."""
    found = []
    for block in grid:
        at = block.core.slices
        part = None if image is None else image[(slice(None), *at)]
        found.append(sums_of(labels[at], part, block.core))
    return found


def exact(high, low):
    return [int(h) * 2**32 + int(x) for h, x in zip(high, low, strict=True)]


# Against the reference.


@given(cut=cut_images(["uint8", "int16", "uint16", "int32"]), order=st.randoms())
@settings(max_examples=60)
def test_sums_of_blocks_give_the_properties_of_the_whole_array(cut, order):
    labels, image, grid = cut
    parts = sums_of_blocks(labels, image, grid)
    order.shuffle(parts)
    found = ObjectSums.merged(parts)
    signed = labels.astype(np.int64)
    for t in range(labels.shape[0]):
        frame = np.where(np.arange(labels.shape[0])[:, None, None, None] == t, signed, 0)
        at_t = ObjectSums.merged(
            sums_of_blocks(frame.astype(np.uint64), image, grid) or [ObjectSums.empty()]
        )
        expected = skimage.measure.regionprops_table(
            signed[t],
            np.moveaxis(image[:, t], 0, -1).astype(np.float64),
            properties=[
                *("label", "area", "bbox", "centroid"),
                *("intensity_mean", "intensity_min", "intensity_max"),
            ],
        )
        np.testing.assert_array_equal(at_t.label, expected["label"])
        np.testing.assert_array_equal(at_t.n_voxels, expected["area"])
        for axis in range(3):
            np.testing.assert_array_equal(at_t.start[1 + axis], expected[f"bbox-{axis}"])
            np.testing.assert_array_equal(at_t.stop[1 + axis], expected[f"bbox-{axis + 3}"])
            # The mean of the reference is one of float64 too, summed in another order.
            np.testing.assert_allclose(
                at_t.mean_index()[1 + axis], expected[f"centroid-{axis}"], rtol=1e-14
            )
        for c in range(len(image)):
            np.testing.assert_array_equal(at_t.mean_value()[c], expected[f"intensity_mean-{c}"])
            np.testing.assert_array_equal(at_t.minimum[c], expected[f"intensity_min-{c}"])
            np.testing.assert_array_equal(at_t.maximum[c], expected[f"intensity_max-{c}"])
    assert equal(found, sums_of(labels, image, Region.of_shape(labels.shape)))


@given(cut=cut_images(INTEGERS), origin=st.tuples(*[st.integers(0, 2**40)] * 4))
@settings(max_examples=80)
def test_sums_of_integers_are_exact_for_every_type_and_place(cut, origin):
    labels, image, grid = cut
    parts = []
    for block in grid:
        at = block.core.slices
        core = block.core.relative_to([-o for o in origin])
        parts.append(sums_of(labels[at], image[(slice(None), *at)], core))
    found = ObjectSums.merged(parts)
    assert found.label.tolist() == [i for i in np.unique(labels).tolist() if i]
    for row, label in enumerate(found.label.tolist()):
        voxels = np.argwhere(labels == label)
        assert found.n_voxels[row] == len(voxels)
        for axis in range(4):
            index = [int(v) + origin[axis] for v in voxels[:, axis]]
            assert (found.start[axis, row], found.stop[axis, row]) == (min(index), max(index) + 1)
            assert exact(found.index_high[axis], found.index_low[axis])[row] == sum(index)
            mean = Fraction(sum(index), len(index))
            assert found.mean_index()[axis, row] == pytest.approx(float(mean), rel=4e-16)
        for c, channel in enumerate(image):
            values = [int(v) for v in channel[labels == label]]
            assert (found.minimum[c, row], found.maximum[c, row]) == (min(values), max(values))
            assert exact(found.value_high[c], found.value_low[c])[row] == sum(values)
            mean = float(Fraction(sum(values), len(values)))
            assert found.mean_value()[c, row] == pytest.approx(mean, rel=4e-16)
            assert found.n_finite[c, row] == len(values)
    assert (found.index_low < 2**32).all()
    assert (found.value_low < 2**32).all()


@given(data=st.data(), labels=label_arrays())
@settings(max_examples=60)
def test_intensities_that_are_not_finite_count_as_none(data, labels):
    dtype = np.dtype(data.draw(st.sampled_from(["float16", "float32", "float64"])))
    limit = 1000.0
    values = st.one_of(st.sampled_from([np.nan, np.inf, -np.inf]), st.floats(-limit, limit))
    image = data.draw(
        hnp.arrays(np.float64, (1, *labels.shape), elements=values, fill=values)
    ).astype(dtype)
    grid = data.draw(grids(labels.shape))
    found = ObjectSums.merged(sums_of_blocks(labels, image, grid))
    for row, label in enumerate(found.label.tolist()):
        there = image[0][labels == label].astype(np.float64)
        there = there[np.isfinite(there)]
        assert found.n_finite[0, row] == len(there)
        if len(there):
            assert (found.minimum[0, row], found.maximum[0, row]) == (there.min(), there.max())
            # A rounding for each voxel, of a sum that is at most the sum of all sizes.
            bound = np.finfo(np.float64).eps * np.abs(there).sum()
            assert found.mean_value()[0, row] == pytest.approx(there.mean(), rel=0, abs=bound)
        else:
            assert np.isnan(found.mean_value()[0, row])
            assert found.minimum[0, row] > found.maximum[0, row]


def test_blocks_in_one_order_give_the_same_bits_of_floats():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 1, 8, 8, 8)).astype(np.float32)
    labels = rng.integers(0, 3, image.shape[1:]).astype(np.uint8)
    parts = sums_of_blocks(labels, image, BlockGrid(Region.of_shape(labels.shape), (1, 2, 3, 4)))
    assert equal(ObjectSums.merged(parts), ObjectSums.merged(list(parts)))


# Limits.


def test_labels_up_to_the_largest_are_told_apart():
    labels = np.array([2**63, 2**63 - 1, 0, 2**64 - 1], np.uint64).reshape(1, 1, 1, 4)
    found = sums_of(labels, None, Region.of_shape(labels.shape))
    assert found.label.tolist() == [2**63 - 1, 2**63, 2**64 - 1]
    assert found.start[3].tolist() == [1, 0, 3]
    assert equal(ObjectSums.from_bytes(found.to_bytes()), found)


def test_no_object_is_too_large_for_its_sums():
    part = sums_of(np.full((1, 1, 1, 2), 7, np.uint8), None, ORIGIN.grow((0,) * 4, (0, 0, 0, 1)))
    row = {name: getattr(part, name) for name in COLUMNS}
    row["index_low"] = np.full((4, 1), 2**32 - 1, np.uint64)
    row["index_high"] = np.full((4, 1), 2**40, np.int64)
    huge = ObjectSums(**row)
    found = ObjectSums.merged([huge] * 1000)
    assert exact(found.index_high[0], found.index_low[0]) == [1000 * (2**72 + 2**32 - 1)]


def test_background_alone_has_no_objects():
    labels = np.zeros((1, 2, 3, 4), np.uint32)
    image = np.ones((2, *labels.shape), np.float32)
    found = sums_of(labels, image, Region.of_shape(labels.shape))
    assert equal(found, ObjectSums.empty(2, np.dtype(np.float32)))
    assert equal(ObjectSums.merged([found, found]), found)
    assert equal(ObjectSums.merged([]), ObjectSums.empty())
    assert equal(ObjectSums.from_bytes(found.to_bytes()), found)


def test_an_image_is_not_needed():
    labels = np.array([[[[5, 5, 0]]]], np.uint16)
    found = sums_of(labels, None, Region((3, 2, 1, 10), (4, 3, 2, 13)))
    assert (found.n_channels, found.n_voxels.tolist(), found.start[:, 0].tolist()) == (
        0,
        [2],
        [3, 2, 1, 10],
    )
    assert found.mean_index()[:, 0].tolist() == [3.0, 2.0, 1.0, 10.5]
    assert found.mean_value().shape == (0, 1)


def test_a_merger_adds_only_to_the_labels_it_was_made_for():
    table = sums_of(np.array([[[[1, 2]]]], np.uint8), None, Region.of_shape((1, 1, 1, 2)))
    merger = Merger(np.array([2, 3], np.uint64), like=table)
    with pytest.raises(AssertionError):
        merger.add(table)
    merger.add(table.between(2, 9))
    assert merger.sums().label.tolist() == [2]


def test_arrays_are_left_as_they_were():
    labels = np.array([[[[1, 0, 2]]]], np.uint8)
    image = np.array([[[[[np.nan, 1, 2]]]]], np.float32)
    labels.flags.writeable = image.flags.writeable = False
    assert len(sums_of(labels, image, Region.of_shape(labels.shape))) == 2
    strided = np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4))
    expected = sums_of(np.ascontiguousarray(strided), None, Region.of_shape(strided.shape))
    assert equal(sums_of(strided, None, Region.of_shape(strided.shape)), expected)


# Files of blocks.


@given(cut=cut_images([*INTEGERS, "float16", "float32", "float64"]))
@settings(max_examples=40)
def test_what_was_written_is_read_back(cut):
    labels, image, _ = cut
    sums = sums_of(labels, image, Region.of_shape(labels.shape))
    back = ObjectSums.from_bytes(sums.to_bytes())
    assert equal(back, sums)
    assert all(getattr(back, name).dtype.isnative for name in COLUMNS)
    assert equal(ObjectSums.merged([back, back]), ObjectSums.merged([sums, sums]))


def some_sums():
    labels = np.arange(60, dtype=np.uint32).reshape(1, 3, 4, 5) // 7
    return sums_of(labels, labels[None].astype(np.uint8), Region.of_shape(labels.shape))


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_changed_bit_or_a_missing_end_is_refused(place, bit):
    data = bytearray(some_sums().to_bytes())
    place %= len(data)
    with pytest.raises(OutputError, match="is no objects of bigseg's, or damaged"):
        ObjectSums.from_bytes(bytes(data[:place]))
    data[place] ^= 1 << bit
    with pytest.raises(OutputError, match="remove the folder scratch of the result"):
        ObjectSums.from_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("label", lambda a: a[::-1]),
        ("label", lambda a: a - a[0]),
        ("label", lambda a: a[:, None]),
        ("start", lambda a: a[:3]),
        ("n_voxels", lambda a: a[:-1]),
        ("value_low", lambda a: a.astype(np.uint8)),
        ("minimum", lambda a: a.astype(np.uint16)),
    ],
)
def test_whole_files_of_another_meaning_are_refused(name, change):
    sums = some_sums()
    columns = {column: getattr(sums, column) for column in COLUMNS}
    ObjectSums.from_bytes(pack("objects", columns))
    with pytest.raises(OutputError, match="no objects of bigseg's"):
        ObjectSums.from_bytes(pack("objects", {**columns, name: change(columns[name])}))
    with pytest.raises(OutputError, match="its columns are"):
        ObjectSums.from_bytes(pack("objects", {"label": columns["label"]}))
