"""Laws of instances on one array: the definition voxel by voxel, and reference libraries."""

import itertools

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_steps import RATIOS, eroded_by_brute_force, grown_by_brute_force

from bigseg.instances import (
    FOREGROUND_BIT,
    INSIDE_BIT,
    NOBODY,
    SEVERAL,
    codes_of,
    components,
    fill_holes,
    in_raster_order,
    owners_of,
    segment_codes,
)
from bigseg.rules import InstanceRule
from bigseg.steps import Steps

LINKS = {None: None, "t": 0, "z": 1}
neighbourhoods = st.fixed_dictionaries(
    {
        "dims": st.sampled_from([2, 3]),
        "connectivity": st.sampled_from([1, 2, 3]),
        "link": st.sampled_from(list(LINKS)),
    }
)


@st.composite
def arrays(draw, low=0, high=1, largest=(2, 3, 4, 4)):
    """Numbers from `low` to `high` in (t, z, y, x), often of one voxel across, few of them 0."""
    shape = draw(st.tuples(*(st.integers(1, n) for n in largest)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = rng.integers(low, high, shape, endpoint=True)
    return np.where(rng.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.8, 1.0])), drawn, 0)


def offsets(dims, connectivity, link):
    """Where the neighbours of a voxel lie, word by word."""
    for offset in itertools.product((-1, 0, 1), repeat=4):
        axes = {axis for axis in range(4) if offset[axis]}
        if (axes and axes == {LINKS[link]}) or (
            1 <= len(axes) <= connectivity and min(axes) >= 4 - dims
        ):
            yield offset


def beside(shape, voxel, where):
    """The neighbours of a voxel within the array."""
    for offset in where:
        other = tuple(v + o for v, o in zip(voxel, offset, strict=True))
        if all(0 <= v < n for v, n in zip(other, shape, strict=True)):
            yield other


def components_by_brute_force(mask, dims, connectivity, link):
    where = list(offsets(dims, connectivity, link))
    ids, n = np.zeros(mask.shape, np.uint32), 0
    for voxel in np.ndindex(mask.shape):
        if mask[voxel] and not ids[voxel]:
            n += 1
            ids[voxel], waiting = n, [voxel]
            while waiting:
                for other in beside(mask.shape, waiting.pop(), where):
                    if mask[other] and not ids[other]:
                        ids[other] = n
                        waiting.append(other)
    return ids, n


def owners_by_brute_force(holes, n_holes, labels, dims, ends):
    where = list(offsets(dims, 1, None))
    seen = [set() for _ in range(n_holes)]
    for voxel in np.ndindex(holes.shape):
        if holes[voxel]:
            found = seen[holes[voxel] - 1]
            found |= {int(labels[other]) for other in beside(holes.shape, voxel, where)} - {0}
            last = [(axis, 0) for axis in range(4) if voxel[axis] == 0]
            last += [(axis, 1) for axis in range(4) if voxel[axis] == holes.shape[axis] - 1]
            if set(last) & set(ends):
                found |= {"the end of the array", "and no label"}
    return [NOBODY if not s else s.pop() if len(s) == 1 else SEVERAL for s in seen]


def filled_by_brute_force(labels, dims):
    holes, n = components_by_brute_force(labels == 0, dims, 1, None)
    ends = [(axis, side) for axis in range(4 - dims, 4) for side in (0, 1)]
    filled = labels.copy()
    for i, owner in enumerate(owners_by_brute_force(holes, n, labels, dims, ends), start=1):
        if owner not in (NOBODY, SEVERAL):
            filled[holes == i] = owner
    return filled


@settings(max_examples=200, deadline=None)
@given(arrays(), neighbourhoods)
def test_components_are_connected_and_numbered_by_their_first_voxels(mask, neighbourhood):
    mask = mask.astype(np.bool_)
    given_mask = mask.copy()
    ids, first = components(mask, **neighbourhood)
    np.testing.assert_array_equal(mask, given_mask)
    assert ids.dtype in (np.uint16, np.uint32)
    expected, n_expected = components_by_brute_force(mask, **neighbourhood)
    np.testing.assert_array_equal(ids, expected)
    assert first.tolist() == [expected.ravel().tolist().index(i) for i in range(1, n_expected + 1)]


@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_components_are_those_of_scipy_and_of_cc3d(connectivity, share):
    mask = np.random.default_rng(7).random((1, 19, 40, 33)) < share
    ids, first = components(mask, dims=3, connectivity=connectivity)
    reference, n_reference = ndimage.label(
        mask[0], ndimage.generate_binary_structure(3, connectivity)
    )
    assert len(first) == n_reference
    np.testing.assert_array_equal(ids[0], in_raster_order(reference.astype(np.uint32))[0])
    other = cc3d.connected_components(mask[0], connectivity={1: 6, 2: 18, 3: 26}[connectivity])
    np.testing.assert_array_equal(ids[0], in_raster_order(other.astype(np.uint32))[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("connectivity", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 33), (1, 1, 33, 1), (1, 33, 1, 1), (33, 1, 1, 1)])
def test_arrays_of_one_voxel_across_have_components_like_others(shape, connectivity, dims):
    # Most components that there can be, and a run at the end.
    mask = (np.arange(33) % 2 == 0).reshape(shape)
    mask.flat[-2] = True
    ids, first = components(mask, dims=dims, connectivity=connectivity)
    expected, n_expected = components_by_brute_force(mask, dims, connectivity, None)
    np.testing.assert_array_equal(ids, expected)
    assert len(first) == n_expected


@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_as_many_components_as_there_can_be_are_found(connectivity):
    where = np.indices((1, 9, 9, 9)).sum(axis=0) % 2 == 0
    if connectivity == 2:
        # The centres and the corners of cubes, which meet only across corners.
        corners = np.all(np.indices((1, 9, 9, 9))[1:] % 2 == 0, axis=0)
        where = corners | np.all(np.indices((1, 9, 9, 9))[1:] % 2 == 1, axis=0)
    if connectivity == 3:
        where = np.all(np.indices((1, 9, 9, 9))[1:] % 2 == 0, axis=0)
    _, first = components(where, dims=3, connectivity=connectivity)
    np.testing.assert_array_equal(first, np.flatnonzero(where))


@pytest.mark.parametrize("side", [50, 54])
def test_ids_take_two_bytes_where_these_hold_them(side):
    # Every other voxel: 62,500 components, and more than two bytes hold.
    mask = np.indices((1, 50, 50, side)).sum(axis=0) % 2 == 0
    for dims, connectivity in ((3, 1), (2, 1)):
        ids, first = components(mask, dims=dims, connectivity=connectivity)
        n = len(first)
        assert n == mask.sum()
        np.testing.assert_array_equal(ids[mask], np.arange(1, n + 1))
        assert not ids[~mask].any()
        if n > np.iinfo(np.uint16).max:
            assert ids.dtype == np.uint32
    few = np.ones_like(mask)
    assert components(few, dims=3, connectivity=1)[0].dtype == np.uint16


@pytest.mark.parametrize("shape", [(0, 1, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_an_empty_array_has_no_components(shape):
    ids, first = components(np.zeros(shape, np.bool_), dims=3, connectivity=1, link="t")
    assert (ids.shape, len(first)) == (shape, 0)


def test_a_mask_may_be_a_view_in_any_order():
    mask = np.random.default_rng(1).random((2, 6, 8, 10)) < 0.4
    for dims, link in itertools.product((2, 3), LINKS):
        expected, first = components(mask, dims=dims, connectivity=2, link=link)
        for view in (np.asfortranarray(mask), np.repeat(mask, 2, axis=3)[..., ::2]):
            ids, first_in_view = components(view, dims=dims, connectivity=2, link=link)
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_array_equal(first_in_view, first)


@settings(max_examples=150, deadline=None)
@given(arrays(high=9), st.randoms(use_true_random=False))
def test_any_numbering_becomes_that_of_first_voxels(labels, random):
    names = [0, *random.sample(range(1, random.choice([10, 12, 1000])), 9)]
    ids, first = in_raster_order(np.array(names, np.uint32)[labels])
    in_order = list(dict.fromkeys(labels[labels > 0].tolist()))
    expected = np.array([1 + in_order.index(v) if v else 0 for v in labels.flat])
    np.testing.assert_array_equal(ids.ravel(), expected)
    assert first.tolist() == [labels.ravel().tolist().index(value) for value in in_order]
    assert in_raster_order(ids)[0] is ids


@pytest.mark.parametrize("ids", [*itertools.permutations([1, 2, 3]), (1, 2, 4), (1, 3, 3)])
def test_numbers_that_were_left_out_or_swapped_are_noticed(ids):
    found, _ = in_raster_order(np.array([0, *ids, 0], np.uint32).reshape(1, 1, 1, 5))
    assert found.ravel().tolist() == [0, 1, 2, 2 if ids == (1, 3, 3) else 3, 0]


@settings(max_examples=150, deadline=None)
@given(arrays(high=2, largest=(2, 5, 5, 5)), st.sampled_from([2, 3]), st.sampled_from([1, 2**61]))
def test_a_hole_in_one_object_is_filled_with_it(labels, dims, factor):
    labels = labels.astype(np.uint64) * np.uint64(factor) + (labels > 0)
    given_labels = labels.copy()
    filled = fill_holes(labels, dims=dims)
    np.testing.assert_array_equal(labels, given_labels)
    assert filled.dtype == labels.dtype
    np.testing.assert_array_equal(filled, filled_by_brute_force(labels, dims))


def test_holes_are_filled_in_volumes_only_if_they_are_closed_in_volumes():
    labels = np.zeros((1, 5, 5, 5), np.uint16)
    labels[0, 1:4, 1:4, 1:4] = 3
    labels[0, 2, 2, 2] = 0
    solid = labels.copy()
    solid[0, 2, 2, 2] = 3
    np.testing.assert_array_equal(fill_holes(labels, dims=3), solid)
    np.testing.assert_array_equal(fill_holes(labels, dims=2), solid)
    labels[0, 3, 2, 2] = 0
    np.testing.assert_array_equal(fill_holes(labels, dims=3), labels)
    labels[0, 1:4, 2, 2] = 3
    np.testing.assert_array_equal(fill_holes(labels, dims=2), solid)
    solid[0, 2, 1, 2], solid[0, 2, 2, 2] = 4, 0
    np.testing.assert_array_equal(fill_holes(solid, dims=3), solid)


@settings(max_examples=150, deadline=None)
@given(arrays(high=2), st.sampled_from([2, 3]), st.data())
def test_owners_of_holes_are_seen_one_voxel_around_a_block(labels, dims, data):
    core = tuple(
        slice(a, data.draw(st.integers(a + 1, n)))
        for n in labels.shape
        for a in [data.draw(st.integers(0, n - 1))]
    )
    ids, first = components(labels[core] == 0, dims=dims, connectivity=1)
    n = len(first)
    holes = np.zeros(labels.shape, np.uint32)
    holes[core] = ids
    ends = data.draw(st.sets(st.tuples(st.integers(4 - dims, 3), st.integers(0, 1))))
    owners = owners_of(holes, n, labels.astype(np.uint16), dims=dims, ends=ends)
    assert owners.dtype == np.uint64
    assert owners.tolist() == owners_by_brute_force(holes, n, labels, dims, ends)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 255), min_size=12, max_size=12),
    st.sampled_from([0.001, 1 / 255, 0.25, 0.5, 128 / 255, 0.7, 1.0]),
    st.sampled_from([0.001, 1 / 255, 0.3, 0.5, 1.0]),
    st.sampled_from([2, 3]),
)
def test_codes_compare_probabilities_in_255ths(values, threshold, foreground, n_channels):
    rule = InstanceRule(threshold=threshold, foreground=foreground)
    probabilities = np.array(values[: 4 * n_channels], np.uint8).reshape(n_channels, 1, 1, 2, 2)
    codes = codes_of(probabilities, rule)
    assert (codes.dtype, codes.shape) == (np.uint8, (1, 1, 2, 2))
    for voxel in np.ndindex(codes.shape):
        _, inside, *border = (int(channel[voxel]) for channel in probabilities)
        expected = INSIDE_BIT * (inside >= 255 * threshold - 1e-9)
        expected += FOREGROUND_BIT * (inside + sum(border) >= 255 * foreground - 1e-9)
        assert codes[voxel] == expected


def test_what_was_never_computed_is_background():
    rule = InstanceRule(threshold=1e-6, foreground=1e-6)
    assert not codes_of(np.zeros((3, 1, 2, 2, 2), np.uint8), rule).any()
    # Two halves are rounded to 128 of 255 each.
    assert codes_of(np.array([0, 128, 128], np.uint8), InstanceRule(foreground=1.0)) == 3


@settings(max_examples=200, deadline=None)
@given(
    arrays(high=3),
    neighbourhoods,
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.data(),
)
def test_objects_are_what_the_definition_says(
    codes, neighbourhood, n_erode, n_grow, min_size, has_filling, data
):
    dims = neighbourhood["dims"]
    ratios = data.draw(st.sampled_from(RATIOS[dims]))
    rule = InstanceRule(
        erode=n_erode,
        grow=n_grow,
        min_size=min_size,
        connectivity=neighbourhood["connectivity"],
        link=neighbourhood["link"],
        fill_holes=has_filling,
    )
    labels, n = segment_codes(codes.astype(np.uint8), rule, Steps(ratios), dims=dims)

    seeds = eroded_by_brute_force(codes % 2 == 1, n_erode, ratios)
    ids, n_ids = components_by_brute_force(seeds, **neighbourhood)
    numbers, n_expected = np.zeros(codes.shape, np.uint64), 0
    for i in range(1, n_ids + 1):
        if (ids == i).sum() >= min_size:
            n_expected += 1
            numbers[ids == i] = n_expected
    expected = grown_by_brute_force(numbers, codes >= 2, n_grow, ratios)
    if has_filling:
        expected = filled_by_brute_force(expected, dims)
    assert (labels.dtype, n) == (np.uint64, n_expected)
    np.testing.assert_array_equal(labels, expected)


def test_touching_objects_are_separated_as_the_drawing_shows():
    inside = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0])
    foreground = np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    codes = (inside * INSIDE_BIT + foreground * FOREGROUND_BIT).astype(np.uint8)[None, None, None]
    labels, n = segment_codes(codes, InstanceRule(erode=1, grow=2), Steps((1.0, 1.0)), dims=2)
    assert n == 2
    assert labels.ravel().tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]
