"""The blocks of coarser levels that a region reaches."""

from dataclasses import dataclass

import numpy as np
from helpers import assert_writable
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import plan as room
from bigseg.blocks import Region
from bigseg.plan import pyramid_grid
from bigseg.pyramid import level_rule, source_region

UINT8 = np.dtype("uint8")


@dataclass
class OneAxis:
    """A level of a pyramid along one axis; the other axes have one voxel."""

    n: int
    unit: int
    n_channels: int = 1
    dtype: np.dtype = UINT8

    @property
    def shape(self):
        return (1, 1, 1, self.n)

    @property
    def write_unit(self):
        return (1, 1, 1, self.unit)


@st.composite
def chains(draw):
    """Lengths of the levels of an axis: halved up or down, by 3, unchanged, or any."""
    lengths, scales = [draw(st.integers(1, 200))], [1.0]
    for _ in range(draw(st.integers(1, 4))):
        n = lengths[-1]
        r = draw(st.sampled_from([1, 2, 2, 2, 3, 4]))
        shorter = draw(st.sampled_from([max(1, n // r), -(-n // r), draw(st.integers(1, n))]))
        lengths.append(shorter)
        scales.append(scales[-1] * r)
    return lengths, scales


@settings(max_examples=150, deadline=None)
@given(chains(), st.integers(1, 9), st.data())
def test_the_blocks_of_a_level_hold_all_that_a_region_reaches(chain, unit, data):
    lengths, scales = chain
    a, b = sorted(data.draw(st.sets(st.integers(0, lengths[0]), min_size=2, max_size=2)))
    region = Region((0, 0, 0, a), (1, 1, 1, b))
    level = OneAxis(lengths[-1], unit)
    grid = pyramid_grid(level, (1, 1, 1, lengths[0]), region)
    assert_writable(grid, level)
    for i in range(lengths[-1]):
        reached = Region((i,), (i + 1,))
        for k in reversed(range(1, len(lengths))):
            fine, coarse = lengths[k - 1 : k + 1]
            rule = level_rule(
                (fine,), (coarse,), fine_scale=(scales[k - 1],), coarse_scale=(scales[k],)
            )
            reached = source_region(reached, fine_shape=(fine,), coarse_shape=(coarse,), rule=rule)
        touches = reached.start[0] < b and reached.stop[0] > a
        if touches:
            assert grid.region.start[3] <= i < grid.region.stop[3], (i, chain, a, b)


def test_a_small_region_of_a_large_level_needs_few_blocks():
    level = OneAxis(5_000_000, 64)
    region = Region((0, 0, 0, 7_000_000), (1, 1, 1, 7_000_100))
    grid = pyramid_grid(level, (1, 1, 1, 10_000_000), region)
    assert sum(block.core.n_voxels for block in grid) <= 5_000_000
    assert len(grid) == 1


def test_blocks_of_a_wide_level_are_smaller():
    def core(n_channels, dtype):
        level = OneAxis(1 << 26, 64, n_channels, np.dtype(dtype))
        return pyramid_grid(level, level.shape, Region.of_shape(level.shape)).core_shape[3]

    assert core(1, "uint8") == room.BLOCK_BYTES
    assert core(4, "float32") == room.BLOCK_BYTES // 16
