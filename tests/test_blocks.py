"""Integer geometry: cores and tiles cover everything once, and the mirror is numpy's."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.blocks import (
    BlockGrid,
    Region,
    core_shape,
    mirror,
    mirrored_axis,
    parse_region,
    tiles_of,
)
from bigseg.errors import UsageError


@st.composite
def regions(draw, n_axes=3, longest=25):
    start = [draw(st.integers(0, longest)) for _ in range(n_axes)]
    return Region(tuple(start), tuple(a + draw(st.integers(1, longest)) for a in start))


shapes = st.tuples(*[st.integers(1, 12)] * 3)
beams = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def grids(draw, beam=beams):
    """Grids of up to seven cores along each of t, z, y, x, anywhere on the lattice."""
    core = draw(st.tuples(*[st.integers(1, 3)] * 4))
    first = draw(st.tuples(*[st.integers(0, 4)] * 4))
    shape = draw(st.tuples(st.integers(1, 2), *[st.integers(1, 7)] * 3))
    region = Region(
        tuple(f * c + draw(st.integers(0, c - 1)) for f, c in zip(first, core, strict=True)),
        tuple((f + n) * c for f, n, c in zip(first, shape, core, strict=True)),
    )
    return BlockGrid(region, core, draw(beam))


def positions_in_beams(shape, beam):
    """The order of beams by walking through them."""
    n_t, n_z, n_y, n_x = shape
    for t in range(n_t):
        corners = itertools.product(range(0, n_y, beam[0]), range(0, n_x, beam[1]))
        for number, (y0, x0) in enumerate(corners):
            ys, xs = range(y0, min(y0 + beam[0], n_y)), range(x0, min(x0 + beam[1], n_x))
            zs = range(n_z) if number % 2 == 0 else reversed(range(n_z))
            yield from ((t, z, y, x) for z in zs for y in ys for x in xs)


@settings(max_examples=60, deadline=None)
@given(regions(), shapes)
def test_cores_tile_the_region_exactly_once(region, core):
    counts = np.zeros(region.stop, int)
    grid = BlockGrid(region, core)
    for i, block in enumerate(grid):
        assert block.index == i
        assert block == grid[i]
        assert block.core.n_voxels > 0
        counts[block.core.slices] += 1
    assert i + 1 == len(grid)
    assert (counts[region.slices] == 1).all()
    assert counts.sum() == region.n_voxels


@settings(max_examples=40, deadline=None)
@given(regions(), shapes)
def test_a_core_does_not_move_with_the_region(region, core):
    for block in BlockGrid(region, core):
        whole = Region(
            tuple(a // c * c for a, c in zip(block.core.start, core, strict=True)),
            tuple(a // c * c + c for a, c in zip(block.core.start, core, strict=True)),
        )
        assert whole.intersect(region) == block.core


@settings(max_examples=40, deadline=None)
@given(regions(), shapes)
def test_the_grid_as_dask_chunks_is_the_lengths_of_the_cores(region, core):
    grid = BlockGrid(region, core)
    cut = [np.cumsum((a, *lengths)) for a, lengths in zip(region.start, grid.chunks, strict=True)]
    assert [ends[-1] for ends in cut] == list(region.stop)
    intervals = [list(itertools.pairwise(ends.tolist())) for ends in cut]
    cores = [Region(*zip(*i, strict=True)) for i in itertools.product(*intervals)]
    assert cores == [block.core for block in grid]


@settings(max_examples=60, deadline=None)
@given(regions(), shapes)
def test_tiles_are_whole_lie_on_the_lattice_and_cover_the_core_once(core, tile):
    tiles = list(tiles_of(core, tile))
    counts = np.zeros([b + t for b, t in zip(core.stop, tile, strict=True)], int)
    for found in tiles:
        assert found.shape == tile
        assert all(a % t == 0 for a, t in zip(found.start, tile, strict=True))
        assert found.intersect(core).n_voxels > 0
        counts[found.slices] += 1
    assert (counts[core.slices] == 1).all()
    assert counts.max() == 1


@settings(max_examples=80, deadline=None)
@given(grids())
def test_beams_are_numbered_as_one_walks_through_them(grid):
    raster = BlockGrid(grid.region, grid.core_shape)
    core_at = dict(zip(itertools.product(*map(range, raster.shape)), raster, strict=True))
    walk = [core_at[position].core for position in positions_in_beams(grid.shape, grid.beam)]
    assert [block.core for block in grid] == walk
    assert [block.index for block in grid] == list(range(len(raster)))


@settings(max_examples=60, deadline=None)
@given(grids())
def test_beams_change_the_numbers_of_blocks_and_nothing_else(grid):
    raster = BlockGrid(grid.region, grid.core_shape)
    assert {block.core for block in grid} == {block.core for block in raster}
    assert (len(grid), grid.shape, grid.first) == (len(raster), raster.shape, raster.first)
    assert grid.chunks == raster.chunks


@settings(max_examples=60, deadline=None)
@given(grids())
def test_a_beam_begins_in_the_plane_in_which_the_one_before_ended(grid):
    for before, after in itertools.pairwise(block.core for block in grid):
        if before.start[0] == after.start[0]:
            step = after.start[1] // grid.core_shape[1] - before.start[1] // grid.core_shape[1]
            assert abs(step) <= 1
            same_beam = all(
                (a // c - f) // b == (n // c - f) // b
                for a, n, c, f, b in zip(
                    before.start[2:],
                    after.start[2:],
                    grid.core_shape[2:],
                    grid.first[2:],
                    grid.beam,
                    strict=True,
                )
            )
            assert same_beam or step == 0


@settings(max_examples=40, deadline=None)
@given(grids(beam=st.tuples(st.integers(7, 9), st.integers(7, 9))))
def test_a_beam_as_wide_as_the_grid_is_raster_order(grid):
    assert list(grid) == list(BlockGrid(grid.region, grid.core_shape))


def test_beams_are_numbered_as_they_are_drawn():
    for outer in ((), (1,)):
        grid = BlockGrid(Region.of_shape((*outer, 2, 2, 4)), (*outer, 1, 1, 1), (2, 2))
        numbers = np.zeros(grid.region.shape, int)
        for block in grid:
            numbers[block.core.slices] = block.index
        assert numbers.reshape(2, 2, 4).tolist() == [
            [[0, 1, 12, 13], [2, 3, 14, 15]],
            [[4, 5, 8, 9], [6, 7, 10, 11]],
        ]


@pytest.mark.parametrize("beam", [None, (1, 1), (5, 5)])
def test_an_index_outside_the_grid_is_refused(beam):
    grid = BlockGrid(Region((0, 0, 0), (1, 4, 4)), (1, 2, 3), beam)
    assert len(grid) == 4
    for index in (-1, 4):
        with pytest.raises(IndexError):
            grid[index]


@pytest.mark.parametrize("beam", [None, (4, 3)])
def test_a_huge_grid_costs_nothing(beam):
    started = time.process_time()
    grid = BlockGrid(Region.of_shape((1, 20_000, 20_000, 20_000)), (1, 1, 16, 16), beam)
    assert len(grid) == 20_000 * 1250 * 1250
    last = grid[len(grid) - 1]
    # 313 x 417 beams are an odd number: the last one runs forwards.
    assert last.core == Region((0, 19_999, 19_984, 19_984), (1, 20_000, 20_000, 20_000))
    assert next(iter(grid)).index == 0
    assert time.process_time() - started < 0.5


@given(st.tuples(shapes, shapes, shapes))
def test_a_core_is_the_smallest_of_whole_tiles_and_whole_write_units(case):
    wanted, tile, unit = case
    for c, w, t, u in zip(core_shape(*case), wanted, tile, unit, strict=True):
        assert c == next(n for n in itertools.count(w) if n % t == 0 and n % u == 0)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(0, 40))
def test_the_mirror_is_numpys_reflection_however_long_the_halo(length, before, after):
    truth = np.pad(np.arange(length), (before, after), mode="reflect")
    assert [mirror(i, length) for i in range(-before, length + after)] == truth.tolist()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.integers(-30, 30), st.integers(1, 30))
def test_a_mirrored_interval_is_read_from_the_fewest_voxels_in_one_piece(length, start, n):
    low, high, positions = mirrored_axis(start, start + n, length)
    wanted = [mirror(i, length) for i in range(start, start + n)]
    assert (low, high) == (min(wanted), max(wanted) + 1)
    read = list(range(low, high))
    assert (read if positions is None else [read[i] for i in positions]) == wanted


def test_an_interval_inside_the_axis_is_read_as_it_is():
    assert mirrored_axis(0, 10, 10) == (0, 10, None)
    assert mirrored_axis(3, 5, 10) == (3, 5, None)


@given(regions(), regions(), st.tuples(*[st.integers(0, 9)] * 3))
def test_regions_grow_meet_and_move_like_sets_of_voxels(a, b, margin):
    grown = a.grow(margin, margin)
    assert grown.shape == tuple(n + 2 * m for n, m in zip(a.shape, margin, strict=True))
    common = a.intersect(b)
    mask = np.zeros((60, 60, 60), np.uint8)
    mask[a.slices] += 1
    mask[b.slices] += 1
    assert (mask == 2).sum() == common.n_voxels
    assert a.relative_to(a.start) == Region.of_shape(a.shape)


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("1:4,2:5,3:6", ((1, 2, 3), (4, 5, 6))),
        (":,:90,10:", ((0, 0, 10), (50, 90, 200))),
        (" 1 : 4 , 0:1,-10:-5", ((1, 0, 190), (4, 1, 195))),
        ("-50:,0:100,:-1", ((0, 0, 0), (50, 100, 199))),
    ],
)
def test_a_region_is_written_like_a_slice(text, stop):
    assert parse_region(text, (50, 100, 200)) == Region(*stop)


@given(regions(longest=20))
def test_a_region_reads_back_what_it_prints(region):
    assert parse_region(str(region), (40, 40, 40)) == region


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0:1,0:2", "has 2 axes, the volume has 3 (zyx): write z0:z1,y0:y1,x0:x1"),
        ("", "has 1 axes, the volume has 3"),
        ("0:1,0:2,a:3", "'a:3' is not an interval of integers; write it as 0:200"),
        ("0:1,0:2,1.5:3", "'1.5:3' is not an interval of integers"),
        ("0:1,0:2,3", "'3' is not an interval of integers"),
        ("0:1,0:2,3:4:5", "'3:4:5' is not an interval of integers"),
        ("0:1,0:2,5:5", "'5:5' is empty or outside the axis, which runs from 0 to 200"),
        ("0:1,0:2,5:3", "'5:3' is empty or outside the axis"),
        ("0:1,0:2,0:201", "'0:201' is empty or outside the axis, which runs from 0 to 200"),
        ("-51:10,:,:", "'-51:10' is empty or outside the axis, which runs from 0 to 50"),
        ("0:1,0:2,200:", "'200:' is empty or outside the axis"),
    ],
)
def test_a_region_that_is_none_is_refused_with_the_way_out(text, sentence):
    with pytest.raises(UsageError) as caught:
        parse_region(text, (50, 100, 200))
    assert sentence in str(caught.value)
    assert f"region {text!r}" in str(caught.value)


def test_axes_are_named_by_their_number():
    with pytest.raises(UsageError, match=r"2 \(yx\): write y0:y1,x0:x1"):
        parse_region("0:1", (5, 5))
    with pytest.raises(UsageError, match=r"4 \(tzyx\): write t0:t1,z0:z1,y0:y1,x0:x1"):
        parse_region("0:1", (1, 5, 5, 5))
