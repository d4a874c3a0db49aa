"""Laws of growing and eroding by steps: the definition voxel by voxel, and how far it reaches."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from bigseg import steps as steps_module
from bigseg.steps import Steps, erode, grow

RATIOS = {
    2: [(1.0, 1.0), (1.0, 1.5), (3.0, 1.0)],
    3: [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (3.5, 1.0, 1.25), (1.0, 40.0, 1.0), (5.0, 2.0, 1.0)],
}
# All slabs at once, and every plane by itself.
SLAB_BYTES = [1, 1 << 19]


@st.composite
def arrays(draw):
    """Two masks of one shape (t, z, y, x), the steps, and a generator of random numbers."""
    shape = draw(st.tuples(*(st.integers(1, n) for n in (2, 3, 4, 4))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = [rng.random(shape) < draw(st.sampled_from([0.05, 0.4, 0.7, 0.95])) for _ in range(2)]
    steps = Steps(draw(st.sampled_from(RATIOS[2] + RATIOS[3])))
    return masks[0], masks[1], steps, rng


def offsets(step, ratios):
    """Where the neighbours of a voxel lie in step 1, 2, 3, ..., word by word."""
    moves = [math.floor(step / r + 1e-6) > math.floor((step - 1) / r + 1e-6) for r in ratios]
    still = [False] * (4 - len(ratios))
    around = itertools.product(*((-1, 0, 1) if m else (0,) for m in still + moves))
    return [o for o in around if (np.count_nonzero(o) == 1 if step % 2 else any(o))]


def beside(values, voxel, where):
    """The values of a voxel's neighbours within the array."""
    places = [tuple(v + o for v, o in zip(voxel, offset, strict=True)) for offset in where]
    return [values[p] for p in places if p in values]


def grown_by_brute_force(numbers, foreground, n_steps, ratios):
    after = {voxel: int(numbers[voxel]) for voxel in np.ndindex(numbers.shape)}
    for step in range(1, n_steps + 1):
        where, before = offsets(step, ratios), dict(after)
        for voxel, number in before.items():
            if not number and foreground[voxel]:
                after[voxel] = min(filter(None, beside(before, voxel, where)), default=0)
    return np.array(list(after.values()), numbers.dtype).reshape(numbers.shape)


def eroded_by_brute_force(mask, n_steps, ratios):
    after = {voxel: bool(mask[voxel]) for voxel in np.ndindex(mask.shape)}
    for step in range(1, n_steps + 1):
        where, before = offsets(step, ratios), dict(after)
        for voxel, is_inside in before.items():
            after[voxel] = is_inside and all(beside(before, voxel, where))
    return np.array(list(after.values())).reshape(mask.shape)


@settings(max_examples=150, deadline=None)
@given(arrays(), st.integers(0, 5), st.sampled_from(SLAB_BYTES))
def test_a_voxel_is_eroded_where_a_neighbour_of_a_step_is_outside(case, n_steps, slab_bytes):
    mask, _, steps, _ = case
    given_mask = mask.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "_SLAB_BYTES", slab_bytes)
        eroded = erode(mask, n_steps, steps)
    np.testing.assert_array_equal(mask, given_mask)
    assert eroded.dtype == np.bool_
    np.testing.assert_array_equal(eroded, eroded_by_brute_force(mask, n_steps, steps.ratios))


@settings(max_examples=250, deadline=None)
@given(
    arrays(),
    st.integers(0, 6),
    st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
    st.sampled_from(SLAB_BYTES),
)
def test_each_step_gives_foreground_the_smallest_number_beside_it(case, n_steps, dtype, slab_bytes):
    foreground, seeds, steps, rng = case
    highest = np.iinfo(dtype).max
    names = rng.choice(np.array([1, 2, 3, 200, highest - 1, highest], dtype), seeds.shape)
    numbers = np.where(seeds, names, dtype(0))
    given_numbers, given_foreground = numbers.copy(), foreground.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "_SLAB_BYTES", slab_bytes)
        grown = grow(numbers, foreground, n_steps, steps)
    np.testing.assert_array_equal(numbers, given_numbers)
    np.testing.assert_array_equal(foreground, given_foreground)
    assert grown.dtype == dtype
    expected = grown_by_brute_force(numbers, foreground, n_steps, steps.ratios)
    np.testing.assert_array_equal(grown, expected)
    np.testing.assert_array_equal(grown[seeds], numbers[seeds])
    assert not grown[~foreground & ~seeds].any()


@settings(max_examples=60, deadline=None)
@given(arrays(), st.integers(0, 4))
def test_what_is_eroded_is_what_the_outside_grows_into(case, n_steps):
    mask, _, steps, _ = case
    outside = grow((~mask).astype(np.uint8), np.ones_like(mask), n_steps, steps)
    np.testing.assert_array_equal(erode(mask, n_steps, steps), outside == 0)


@settings(max_examples=150, deadline=None)
@given(arrays(), st.integers(0, 5), st.data())
def test_a_part_with_its_reach_around_it_knows_as_much_as_the_whole(case, n_steps, data):
    foreground, seeds, steps, rng = case
    numbers = seeds * rng.integers(1, 100_000, seeds.shape).astype(np.uint32)
    reach = steps.reach_vox(n_steps)
    core, grown, inner = [], [], []
    for n, margin in zip(seeds.shape, reach, strict=True):
        start = data.draw(st.integers(0, n - 1))
        stop = data.draw(st.integers(start + 1, n))
        first = max(0, start - margin)
        core.append(slice(start, stop))
        grown.append(slice(first, min(n, stop + margin)))
        inner.append(slice(start - first, stop - first))
    core, grown, inner = tuple(core), tuple(grown), tuple(inner)
    np.testing.assert_array_equal(
        grow(numbers[grown], foreground[grown], n_steps, steps)[inner],
        grow(numbers, foreground, n_steps, steps)[core],
    )
    np.testing.assert_array_equal(
        erode(foreground[grown], n_steps, steps)[inner], erode(foreground, n_steps, steps)[core]
    )


@pytest.mark.parametrize("ratios", RATIOS[2] + RATIOS[3])
@pytest.mark.parametrize("n_steps", [0, 1, 2, 3, 7])
def test_a_voxel_grows_as_far_as_the_reach_says(ratios, n_steps):
    steps = Steps(ratios)
    reach = steps.reach_vox(n_steps)
    assert reach[: 4 - len(ratios)] == (0,) * (4 - len(ratios))
    seeds = np.zeros((3, 17, 17, 17), np.uint16)
    seeds[1, 8, 8, 8] = 7
    reached = np.argwhere(grow(seeds, np.ones(seeds.shape, np.bool_), n_steps, steps))
    centre = np.array([1, 8, 8, 8])
    np.testing.assert_array_equal(reached.min(axis=0), centre - reach)
    np.testing.assert_array_equal(reached.max(axis=0), centre + reach)


def test_a_coarse_axis_moves_as_often_as_its_voxels_are_long():
    moving = [move.axes for move in Steps((3.0, 1.5, 1.0)).moves(6)]
    assert [axes[0] for axes in moving] == [False, False, True, False, False, True]
    assert [axes[1] for axes in moving] == [False, True, True, False, True, True]
    assert [axes[2] for axes in moving] == [True] * 6
    assert [move.in_boxes for move in Steps((1.0, 1.0)).moves(4)] == [False, True, False, True]


def test_steps_know_no_unit_and_no_rounding_of_sizes():
    assert Steps.of((2.0, 0.5, 0.5)) == Steps.of((2000.0, 500.0, 500.0)) == Steps((4.0, 1.0, 1.0))
    # 0.3 / 0.1 is a little less than 3.
    assert Steps.of((0.3, 0.1)).reach_vox(6) == (0, 0, 2, 6)
    assert Steps.of((0.1 * 3, 0.1)).reach_vox(6) == (0, 0, 2, 6)


def test_two_steps_make_an_octagon():
    seed = np.zeros((1, 1, 5, 5), np.uint8)
    seed[0, 0, 2, 2] = 1
    grown = grow(seed, np.ones(seed.shape, np.bool_), 2, Steps((1.0, 1.0)))
    np.testing.assert_array_equal(
        grown[0, 0],
        [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]],
    )


@pytest.mark.parametrize("n_numbers", [40_000, 70_000])
def test_numbers_of_any_size_and_count_grow_like_their_ranks(n_numbers):
    rng = np.random.default_rng(3)
    ranks = np.zeros((1, 1, 700, 300), np.uint32)
    places = rng.choice(ranks.size, n_numbers, replace=False)
    ranks.flat[places] = rng.permutation(n_numbers) + 1
    names = np.sort(rng.choice(2**62, n_numbers + 1, replace=False)).astype(np.uint64)
    names[0] = 0
    foreground = rng.random(ranks.shape) < 0.8
    steps = Steps((1.0, 1.0))
    grown = grow(names[ranks], foreground, 3, steps)
    np.testing.assert_array_equal(grown, names[grow(ranks, foreground, 3, steps)])
    np.testing.assert_array_equal(grown, names[grown_by_filters(ranks, foreground, 3)])


@pytest.mark.parametrize("highest", [2**k + d for k in (8, 16, 32) for d in (-2, -1, 0, 1)])
def test_the_largest_number_of_a_type_is_a_number_like_others(highest):
    numbers = np.array([0, highest, 0, 0, 3, 0], np.uint64).reshape(1, 1, 1, 6)
    grown = grow(numbers, np.ones(numbers.shape, np.bool_), 2, Steps((1.0, 1.0)))
    assert grown.ravel().tolist() == [highest, highest, highest, 3, 3, 3]


def grown_by_filters(numbers, foreground, n_steps):
    """In planes of square voxels, by scipy's minimum filter."""
    highest = 2**30
    labels = numbers.astype(np.int64)
    for step in range(1, n_steps + 1):
        footprint = ndimage.generate_binary_structure(2, 1 if step % 2 else 2)[None, None]
        lowest = ndimage.minimum_filter(
            np.where(labels == 0, highest, labels),
            footprint=footprint,
            mode="constant",
            cval=highest,
        )
        labels = np.where((labels == 0) & foreground & (lowest < highest), lowest, labels)
    return labels


def test_arrays_may_be_views_in_any_order():
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 4, (2, 6, 8, 10)).astype(np.uint8)
    numbers = np.where(rng.random(codes.shape) < 0.2, codes + np.uint64(2**40), np.uint64(0))
    steps = Steps((2.0, 1.0, 1.0))
    foreground = (codes & 2) != 0
    for view in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=3)[..., ::2]):
        np.testing.assert_array_equal(
            grow(view(numbers), view(foreground), 3, steps), grow(numbers, foreground, 3, steps)
        )
        np.testing.assert_array_equal(
            erode(view(foreground), 2, steps), erode(foreground, 2, steps)
        )
    numbers.setflags(write=False)
    for n_steps in (0, 3):
        grow(numbers, foreground, n_steps, steps)[...] = 0
