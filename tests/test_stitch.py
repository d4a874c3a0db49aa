"""The numbers of blocks are those of the whole volume, and the holes those of a look at it all."""

import itertools
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from cut_components import adjacencies, cut_volumes, in_order, label, local_ids, tables_of
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import joining
from bigseg.blocks import BlockGrid, Region
from bigseg.errors import OutputError
from bigseg.faces import Adjacency
from bigseg.instances import SEVERAL
from bigseg.joining import UnionFind
from bigseg.stitch import fill, neighbours, number


class PlainUnionFind:
    """The textbook."""

    def __init__(self, n):
        self.parent = list(range(n))

    def find(self, i):
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def union(self, a, b):
        low, high = sorted((self.find(a), self.find(b)))
        self.parent[high] = low


@st.composite
def unions(draw):
    n = draw(st.integers(1, 40))
    nodes = st.integers(0, n - 1)
    return n, draw(st.lists(st.lists(st.tuples(nodes, nodes), max_size=30), max_size=4))


@settings(max_examples=150, deadline=None)
@given(unions(), st.integers(1, 9))
def test_sets_are_those_of_the_textbook_and_roots_are_smallest(made, chunk):
    n, batches = made
    plain, sets = PlainUnionFind(n), UnionFind(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "CHUNK", chunk)
        for batch in batches:
            sets.union(np.array(batch, np.int64).reshape(-1, 2))
            for pair in batch:
                plain.union(*pair)
        assert sets.roots().tolist() == [plain.find(i) for i in range(n)]


@pytest.mark.timeout(60)  # Step by step along a chain it would take minutes.
@pytest.mark.parametrize("order", ["forth", "back", "random", "star"])
def test_long_chains_and_stars_are_one_set(order):
    n = 200_000
    nodes = {
        "forth": np.arange(n),
        "back": np.arange(n)[::-1],
        "random": np.random.default_rng(0).permutation(n),
        "star": np.arange(n),
    }[order]
    other = np.full(n - 1, n - 1) if order == "star" else nodes[1:]
    sets = UnionFind(n)
    sets.union(np.stack([nodes[:-1], other], axis=1))
    assert not sets.roots().any()


def test_nodes_take_four_bytes_each():
    assert UnionFind(10).roots().dtype == np.uint32


def stitched(tables, ids, **options):
    """The volume of numbers, and N."""
    volume, written = np.zeros(tables.shape, np.uint64), []

    def write(block, numbers):
        core = tables.grid[block].core
        volume[core.slices] = np.concatenate([[np.uint64(0)], numbers])[ids[block]]
        written.append(block)

    n = number(tables, write, **options)
    assert sorted(written) == list(range(len(tables.grid)))
    return volume, n


def numbered(mask, adjacency, min_size):
    """What the whole volume says, and N."""
    ids = label(mask, adjacency)
    small = np.flatnonzero(np.bincount(ids.ravel()) < min_size)
    ids[np.isin(ids, small)] = 0
    result = in_order(ids)
    return result, int(result.max())


@settings(max_examples=200, deadline=None)
@given(
    cut_volumes(),
    adjacencies,
    st.integers(1, 6),
    st.sampled_from([0, 300, 1 << 20]),
    st.integers(1, 3),
)
def test_numbers_are_those_of_the_whole_volume(cut, adjacency, min_size, memory_bytes, n_threads):
    mask, grid = cut
    ids = local_ids(mask, grid, adjacency)
    # Of one voxel, every size is enough, and none is needed.
    tables = tables_of(ids, grid, mask.shape, adjacency, sized=min_size > 1)
    options = {"min_size": min_size, "memory_bytes": memory_bytes, "n_threads": n_threads}
    found, n = stitched(tables, ids, **options)
    expected, expected_n = numbered(mask, adjacency, min_size)
    np.testing.assert_array_equal(found, expected)
    assert n == expected_n


@settings(max_examples=30, deadline=None)
@given(cut_volumes(), adjacencies, st.integers(1, 4), st.integers(2, 50))
def test_numbers_do_not_depend_on_how_much_is_held_at_once(cut, adjacency, min_size, chunk):
    mask, grid = cut
    ids = local_ids(mask, grid, adjacency)
    tables = tables_of(ids, grid, mask.shape, adjacency)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "CHUNK", chunk)
        found, _ = stitched(tables, ids, min_size=min_size)
    np.testing.assert_array_equal(found, numbered(mask, adjacency, min_size)[0])


def test_a_large_volume_in_beams_is_numbered_like_one_block():
    rng = np.random.default_rng(3)
    mask = rng.random((2, 24, 60, 70)) < 0.06
    adjacency = Adjacency(3, 2, "t")
    grid = BlockGrid(Region.of_shape(mask.shape), (1, 7, 16, 11), beam=(2, 3))
    ids = local_ids(mask, grid, adjacency)
    tables = tables_of(ids, grid, mask.shape, adjacency)
    for memory_bytes in (0, 500, 1 << 20):
        found, n = stitched(tables, ids, min_size=3, memory_bytes=memory_bytes)
        expected, expected_n = numbered(mask, adjacency, 3)
        assert n == expected_n > 100
        np.testing.assert_array_equal(found, expected)


def test_without_anything_there_is_nothing_to_number():
    mask = np.zeros((1, 2, 4, 4), bool)
    adjacency = Adjacency(3, 1)
    grid = BlockGrid(Region.of_shape(mask.shape), (1, 1, 2, 4))
    ids = local_ids(mask, grid, adjacency)
    found, n = stitched(tables_of(ids, grid, mask.shape, adjacency), ids, min_size=1)
    assert n == 0
    assert not found.any()


def counting(tables):
    """The tables, and how often each block was read."""
    counts = Counter()

    def read(block):
        counts[block] += 1
        return tables.read(block)

    return replace(tables, read=read), counts


def test_tables_that_fit_are_read_once_and_others_a_few_times():
    rng = np.random.default_rng(4)
    mask = rng.random((1, 6, 20, 20)) < 0.3
    adjacency = Adjacency(3, 1)
    grid = BlockGrid(Region.of_shape(mask.shape), (1, 3, 5, 5))
    ids = local_ids(mask, grid, adjacency)
    tables, counts = counting(tables_of(ids, grid, mask.shape, adjacency))
    for memory_bytes, most in ((1 << 20, 1), (0, 6)):
        counts.clear()
        stitched(tables, ids, min_size=1, memory_bytes=memory_bytes, n_threads=1)
        assert set(counts.values()) == {most}


@settings(max_examples=60, deadline=None)
@given(cut_volumes(), adjacencies)
def test_every_two_blocks_that_touch_are_neighbours_once(cut, adjacency):
    _, grid = cut
    found = Counter()
    for i in range(len(grid)):
        for offset, j in neighbours(grid, i, adjacency):
            found[frozenset((i, j))] += 1
            assert i != j
            assert offset in adjacency.block_offsets()
    lattice = [
        tuple(a // c for a, c in zip(block.core.start, grid.core_shape, strict=True))
        for block in grid
    ]
    offsets = adjacency.block_offsets()
    expected = {
        frozenset((i, j))
        for i, j in itertools.permutations(range(len(grid)), 2)
        if tuple(b - a for a, b in zip(lattice[i], lattice[j], strict=True)) in offsets
    }
    assert found == Counter(expected)


def plain_owners(values):
    """The rule in words: none and x is x, x and x is x, x and y is many."""
    known = {value for value in values if value}
    return known.pop() if len(known) == 1 else (SEVERAL if known else 0)


@settings(max_examples=100, deadline=None)
@given(cut_volumes(), st.integers(2, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_holes_get_the_one_label_that_is_seen_beside_them(cut, dims, n_labels, seed):
    mask, grid = cut
    adjacency = Adjacency(dims, 1)
    ids = local_ids(mask, grid, adjacency)
    rng = np.random.default_rng(seed)
    choices = np.array([0, 0, SEVERAL, *range(1, n_labels + 1)], np.uint64)
    odds = np.array([0.35, 0.35, 0.05, *[0.25 / n_labels] * n_labels])
    owners = [rng.choice(choices, int(part.max()), p=odds) for part in ids]
    whole, seen = label(mask, adjacency), defaultdict(list)
    for block in grid:
        for i, owner in enumerate(owners[block.index]):
            inside = whole[block.core.slices][ids[block.index] == i + 1]
            seen[inside[0]].append(int(owner))
    filled = {}
    tables = tables_of(ids, grid, mask.shape, adjacency, owners=owners)
    fill(tables, filled.__setitem__, n_threads=2)
    assert len(filled) == len(grid)
    for block in grid:
        for i, value in enumerate(filled[block.index]):
            inside = whole[block.core.slices][ids[block.index] == i + 1]
            owner = plain_owners(seen[inside[0]])
            assert value == (0 if owner == SEVERAL else owner)


def small_tables():
    mask = np.ones((1, 1, 1, 4), bool)
    adjacency = Adjacency(2, 1)
    grid = BlockGrid(Region.of_shape(mask.shape), (1, 1, 1, 2))
    return tables_of(local_ids(mask, grid, adjacency), grid, mask.shape, adjacency)


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ((1, [[1, 2]]), "name component 2 of block 1, which has 1"),
        ((1, [[0, 1]]), "name component 0 of block 0, which has 1"),
        ((2, [[1, 1]]), "name block 2, where there are 2"),
    ],
)
def test_pairs_of_other_tables_are_refused(pairs, text):
    tables = small_tables()

    def foreign(block):
        return [(pairs[0], np.array(pairs[1], np.uint32))] if block == 0 else []

    with pytest.raises(OutputError, match=text):
        number(replace(tables, pairs=foreign), lambda *_: None, min_size=1)


def test_what_goes_wrong_in_a_thread_is_raised():
    def refuse(block, numbers):
        raise OSError("disk full")

    def fail(block):
        raise OSError("no such block")

    with pytest.raises(OSError, match="disk full"):
        number(small_tables(), refuse, min_size=1)
    with pytest.raises(OSError, match="no such block"):
        number(replace(small_tables(), read=fail), lambda *_: None, min_size=1)
