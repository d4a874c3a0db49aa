"""Which blocks touch a region, and boxes across borders, against looking at every block."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bigseg.blocks import BlockGrid, Region
from bigseg.borders import draw_place, scaled, touching
from bigseg.pyramid import level_rule, source_region


@st.composite
def grids(draw):
    core = tuple(draw(st.integers(1, 5)) for _ in range(4))
    start = tuple(draw(st.integers(0, 3)) * c for c in core)
    shape = tuple(draw(st.integers(1, 12)) for _ in range(4))
    beam = draw(st.sampled_from([None, (1, 1), (1, 2), (2, 1), (2, 3), (9, 9)]))
    stop = tuple(a + n for a, n in zip(start, shape, strict=True))
    return BlockGrid(Region(start, stop), core, beam)


@st.composite
def regions(draw):
    start = tuple(draw(st.integers(0, 25)) for _ in range(4))
    return Region(start, tuple(a + draw(st.integers(0, 9)) for a in start))


@given(grids(), regions())
def test_the_blocks_that_touch_a_region_are_those_that_share_a_voxel_with_it(grid, region):
    expected = [block.index for block in grid if block.core.intersect(region).n_voxels]
    assert touching(grid, region) == expected


@given(grids())
def test_every_block_touches_itself_alone(grid):
    for block in grid:
        assert touching(grid, block.core) == [block.index]


@given(
    fine=st.integers(1, 60),
    factor=st.integers(1, 5),
    up=st.booleans(),
    start=st.integers(0, 59),
    length=st.integers(1, 20),
)
def test_a_scaled_region_holds_all_that_depends_on_it(fine, factor, up, start, length):
    coarse = max(1, -(-fine // factor) if up else fine // factor)
    rule = level_rule((fine,), (coarse,), fine_scale=(1.0,), coarse_scale=(float(factor),))
    region = Region((start % fine,), (min(fine, start % fine + length),))
    above = scaled(region, (fine,), (coarse,))
    for i in range(coarse):
        target = Region((i,), (i + 1,))
        needed = source_region(target, fine_shape=(fine,), coarse_shape=(coarse,), rule=rule)
        if needed.intersect(region).n_voxels:
            assert above.start[0] <= i < above.stop[0]
        below = scaled(target, (coarse,), (fine,))
        assert below.intersect(needed) == needed


@given(grids(), st.integers(0, 999), st.integers(1, 3), st.tuples(*[st.integers(1, 6)] * 3))
def test_a_place_lies_in_the_grid_and_across_borders_of_its_block(grid, seed, n_axes, sides):
    rng = np.random.default_rng(seed)
    block = grid[seed % len(grid)]
    place = draw_place(grid, block, (1, *sides), n_axes=n_axes, rng=rng)
    crossable = sum(n > 1 for n in grid.shape[1:])
    assert place.n_axes == min(n_axes, crossable)
    assert place.box.n_voxels
    assert place.box.intersect(grid.region) == place.box
    assert block.index in touching(grid, place.box)
    blocks = [grid[i] for i in touching(grid, place.box)]
    starts = zip(*(b.core.start for b in blocks), strict=True)
    crossed = [len(set(axis)) > 1 for axis in starts]
    assert crossed[0] is False
    assert sum(crossed) >= place.n_axes
