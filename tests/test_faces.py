"""Blocks say of their components what is true, and pairs are those that the whole volume has."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cut_components import adjacencies, cut_volumes, local_ids, structure
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from bigseg.blocks import Region
from bigseg.errors import OutputError
from bigseg.faces import (
    Adjacency,
    BlockComponents,
    beginnings,
    describe,
    equal_pairs,
    pairs_from_bytes,
    pairs_to_bytes,
)
from bigseg.packing import pack
from bigseg.stitch import neighbours


@settings(max_examples=60, deadline=None)
@given(cut_volumes(), adjacencies)
def test_a_block_says_of_its_components_what_is_true(cut, adjacency):
    mask, grid = cut
    raster = np.arange(mask.size).reshape(mask.shape)
    for block, ids in zip(grid, local_ids(mask, grid, adjacency), strict=True):
        found = describe(ids, block.core, mask.shape, axes=adjacency.axes)
        assert found.n == ids.max()
        for i in range(found.n):
            assert found.sizes[i] == (ids == i + 1).sum()
            assert found.first[i] == raster[block.core.slices][ids == i + 1].min()
        assert sorted(found.planes) == [(axis, side) for axis in adjacency.axes for side in (0, 1)]
        for (axis, side), plane in found.planes.items():
            np.testing.assert_array_equal(plane, np.moveaxis(ids, axis, 0)[-side])


def test_ids_that_are_not_in_the_order_of_first_voxels_are_a_mistake():
    ids = np.array([[[[2, 0, 1]]]], np.uint32)
    with pytest.raises(AssertionError):
        describe(ids, Region.of_shape(ids.shape), ids.shape, axes=(3,))


@settings(max_examples=100, deadline=None)
@given(arrays(np.uint32, array_shapes(max_dims=4, max_side=5), elements=st.integers(0, 6)))
def test_beginnings_are_where_ids_exceed_all_before(ids):
    flat = ids.ravel().tolist()
    expected = [i for i, value in enumerate(flat) if value > max([0, *flat[:i]])]
    places, highest = beginnings(ids)
    assert places.tolist() == expected
    assert highest == max(flat)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("link", [None, "z", "t"])
def test_every_two_neighbours_are_looked_at_once(dims, connectivity, link):
    adjacency = Adjacency(dims, connectivity, link)
    offsets = adjacency.block_offsets()
    both = {*offsets, *(tuple(-step for step in offset) for offset in offsets)}
    expected = {tuple(int(i) - 1 for i in p) for p in np.argwhere(structure(adjacency))}
    assert both == expected - {(0,) * 4}
    assert len(both) == 2 * len(offsets)
    assert set(adjacency.axes) == {axis for p in both for axis in range(4) if p[axis]}


def touching_pairs(ids, grid, adjacency, a, b):
    """Pairs of ids in two blocks by a look at every voxel of one and each of its neighbours."""
    core_a, core_b = grid[a].core, grid[b].core
    steps = np.argwhere(structure(adjacency)) - 1
    found = set()
    for place in itertools.product(*map(range, core_a.start, core_a.stop)):
        for step in steps:
            other = tuple(int(p + s) for p, s in zip(place, step, strict=True))
            if all(map(int.__le__, core_b.start, other)) and all(
                map(int.__lt__, other, core_b.stop)
            ):
                pair = (ids[a][at(place, core_a)], ids[b][at(other, core_b)])
                found.add(tuple(map(int, pair)))
    return sorted(pair for pair in found if 0 not in pair)


def at(place, core):
    return tuple(p - s for p, s in zip(place, core.start, strict=True))


@settings(max_examples=80, deadline=None)
@given(cut_volumes(), adjacencies)
def test_pairs_are_those_of_a_look_at_every_voxel(cut, adjacency):
    mask, grid = cut
    ids = local_ids(mask, grid, adjacency)
    blocks = [describe(ids[b.index], b.core, mask.shape, axes=adjacency.axes) for b in grid]
    for a in range(min(4, len(grid))):
        for offset, b in neighbours(grid, a, adjacency):
            pairs = equal_pairs(blocks[a], blocks[b], offset, adjacency)
            assert pairs.dtype == np.uint32
            expected = touching_pairs(ids, grid, adjacency, a, b)
            assert list(map(tuple, pairs.tolist())) == expected
            mirrored = equal_pairs(blocks[b], blocks[a], tuple(-s for s in offset), adjacency)
            assert sorted(map(tuple, mirrored[:, ::-1].tolist())) == expected


def same(a, b):
    return (
        a.core == b.core
        and (a.sizes is b.sizes is None or np.array_equal(a.sizes, b.sizes))
        and np.array_equal(a.first, b.first)
        and sorted(a.planes) == sorted(b.planes)
        and all(np.array_equal(a.planes[k], b.planes[k]) for k in a.planes)
        and (a.owners is b.owners is None or np.array_equal(a.owners, b.owners))
    )


@settings(max_examples=40, deadline=None)
@given(cut_volumes(), adjacencies, st.booleans(), st.booleans())
def test_blocks_come_back_from_bytes_as_they_were(cut, adjacency, has_owners, is_sized):
    mask, grid = cut
    for block, ids in zip(grid, local_ids(mask, grid, adjacency), strict=True):
        owners = np.arange(ids.max(), dtype=np.uint64) if has_owners else None
        told = describe(
            ids, block.core, mask.shape, axes=adjacency.axes, sized=is_sized, owners=owners
        )
        assert (told.sizes is not None) == is_sized
        data = told.to_bytes()
        assert same(BlockComponents.from_bytes(data, core=block.core), told)
        axis = adjacency.axes[-1]
        only = BlockComponents.from_bytes(data, core=block.core, axes=[axis])
        assert sorted(only.planes) == [(axis, 0), (axis, 1)]
        assert not BlockComponents.from_bytes(data, core=block.core, axes=()).planes


IDS = np.array([[[[1, 1, 0], [0, 2, 3]]]], np.uint32)
CORE = Region((0, 0, 2, 3), (1, 1, 4, 6))
BLOCK = describe(IDS, CORE, (1, 1, 10, 10), axes=(2, 3))


def test_a_core_one_voxel_thick_stores_its_plane_once():
    thin = Region((0, 0, 0, 0), (1, 1, 1, 1000))
    rng = np.random.default_rng(1)
    ids = np.cumsum(rng.random(thin.shape) < 0.5, axis=3).astype(np.uint32)
    once = describe(ids, thin, thin.shape, axes=(2,))
    twice = replace(once, core=Region((0,) * 4, (1, 1, 2, 1000)))
    assert len(once.to_bytes()) < len(twice.to_bytes()) - 500


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(BLOCK.to_bytes()) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(place, change):
    data = bytearray(BLOCK.to_bytes())
    data[place] ^= change
    with pytest.raises(OutputError, match="damaged"):
        BlockComponents.from_bytes(bytes(data), core=CORE)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, len(BLOCK.to_bytes()) - 1))
def test_a_block_cut_short_is_noticed(n):
    with pytest.raises(OutputError, match="damaged"):
        BlockComponents.from_bytes(BLOCK.to_bytes()[:n], core=CORE)


def test_the_table_of_another_core_is_refused():
    other = Region((0, 0, 2, 6), (1, 1, 4, 9))
    with pytest.raises(OutputError, match=r"it is of the core .*, not of 0:1,0:1,2:4,6:9"):
        BlockComponents.from_bytes(BLOCK.to_bytes(), core=other)


def arrays_of_block(**changes):
    """The arrays of BLOCK as they are packed, some of them changed or left out (None)."""
    arrays = {
        "core": np.array([CORE.start, CORE.stop], np.uint64),
        "sizes": BLOCK.sizes,
        "first": BLOCK.first,
        "plane 3 0": BLOCK.planes[3, 0],
    }
    arrays |= changes
    return {name: array for name, array in arrays.items() if array is not None}


def test_the_arrays_are_named_as_the_next_test_believes():
    found = BlockComponents.from_bytes(pack("components", arrays_of_block()), core=CORE)
    assert same(found, replace(BLOCK, planes={(3, 0): BLOCK.planes[3, 0]}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"first": None}, "a table is missing"),
        ({"first": BLOCK.first[:2]}, "its tables are of different lengths"),
        ({"sizes": BLOCK.sizes.astype(np.uint32)}, "its tables are of different lengths"),
        ({"owners": np.zeros(4, np.uint64)}, "its tables are of different lengths"),
        ({"first": BLOCK.first[::-1]}, "its components are not in order"),
        ({"plane 3 0": np.zeros((1, 1, 3), np.uint32)}, "its plane 3 0 does not fit"),
        ({"plane 3 0": np.full((1, 1, 2), 4, np.uint32)}, "its plane 3 0 does not fit"),
        ({"sizes": np.ones(1000, np.uint64)}, "bytes are announced where"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(changes, why):
    with pytest.raises(OutputError, match=why):
        BlockComponents.from_bytes(pack("components", arrays_of_block(**changes)), core=CORE)


some_pairs = st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(1, 2**32 - 1)), max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), some_pairs), max_size=4))
def test_pairs_come_back_from_bytes_as_they_were(listed):
    pairs = [(block, np.array(found, np.uint32).reshape(-1, 2)) for block, found in listed]
    found = list(pairs_from_bytes(pairs_to_bytes(pairs), most_pairs=100))
    assert [(block, p.tolist()) for block, p in found] == [(b, p.tolist()) for b, p in pairs]


def test_damaged_pairs_are_refused():
    data = pairs_to_bytes([(7, np.ones((300, 2), np.uint32))])
    with pytest.raises(OutputError, match="are possible"):
        pairs_from_bytes(data, most_pairs=100)
    with pytest.raises(OutputError, match="checksum"):
        pairs_from_bytes(data[:-1], most_pairs=300)


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": np.array([2**60], np.uint64)},
        {"counts": np.array([1, 1], np.uint64)},
        {"pairs": np.ones((2, 3), np.uint32)},
        {"pairs": np.ones((2, 2), np.uint64)},
        {"pairs": np.array([[1, 1], [0, 1]], np.uint32)},
        {"blocks": np.zeros((1, 1), np.uint64)},
    ],
)
def test_pairs_that_contradict_themselves_are_refused(changes):
    one = np.array([1], np.uint64)
    arrays = {"blocks": one, "counts": one * 2, "pairs": np.ones((2, 2), np.uint32)}
    with pytest.raises(OutputError, match="its arrays do not fit each other"):
        pairs_from_bytes(pack("pairs", arrays | changes), most_pairs=100)
