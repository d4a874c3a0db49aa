"""Whole volumes of components, and the same cut into the cores of a grid: what tests compare."""

import itertools

import numpy as np
from hypothesis import strategies as st
from scipy import ndimage

from bigseg.blocks import BlockGrid, Region
from bigseg.faces import Adjacency, describe, equal_pairs
from bigseg.joining import Tables
from bigseg.stitch import neighbours

adjacencies = st.builds(
    Adjacency, st.sampled_from([2, 3]), st.integers(1, 3), st.sampled_from([None, "z", "t"])
)


def structure(adjacency):
    """The neighbours of a voxel as scipy wants them, (3, 3, 3, 3), from the words of the rule."""
    result = np.zeros((3,) * 4, bool)
    for step in itertools.product((-1, 0, 1), repeat=4):
        outside, inside = step[: 4 - adjacency.dims], step[4 - adjacency.dims :]
        if not any(outside) and sum(map(abs, inside)) <= adjacency.connectivity:
            result[tuple(s + 1 for s in step)] = True
    if adjacency.link:
        index = [1, 1, 1, 1]
        for index["tz".index(adjacency.link)] in (0, 2):
            result[tuple(index)] = True
    return result


def label(mask, adjacency):
    """Components 1..n in the order of their first voxels."""
    ids, _ = ndimage.label(mask, structure(adjacency))
    return in_order(ids).astype(np.uint32)


def in_order(ids):
    """The same objects as 1..n in the order of their first voxels."""
    values, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    ranks = np.zeros(len(values), np.uint64)
    is_some = values > 0
    order = np.argsort(first[is_some])
    ranks[np.flatnonzero(is_some)[order]] = np.arange(1, is_some.sum() + 1)
    return ranks[inverse].reshape(ids.shape)


@st.composite
def cut_volumes(draw):
    """A mask (t, z, y, x) and a grid whose region is a part of it or all, in beams or in raster."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), *[st.integers(1, 9)] * 2))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    region = draw(st.sampled_from([Region(start, stop), Region.of_shape(shape)]))
    core = draw(st.tuples(st.integers(1, 2), *[st.integers(1, 4)] * 3))
    beam = draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.zeros(shape, bool)
    mask[region.slices] = rng.random(region.shape) < draw(st.sampled_from([0.2, 0.5, 0.8]))
    return mask, BlockGrid(region, core, beam)


def local_ids(mask, grid, adjacency):
    """The components of every core by itself."""
    return [label(mask[block.core.slices], adjacency) for block in grid]


def tables_of(ids, grid, shape, adjacency, *, sized=True, owners=None):
    """The tables of all blocks, and the pairs between them."""
    blocks = [
        describe(
            ids[block.index],
            block.core,
            shape,
            axes=adjacency.axes,
            sized=sized,
            owners=None if owners is None else owners[block.index],
        )
        for block in grid
    ]

    def pairs(i):
        for offset, j in neighbours(grid, i, adjacency):
            yield j, equal_pairs(blocks[i], blocks[j], offset, adjacency)

    return Tables(grid, shape, blocks.__getitem__, pairs)
