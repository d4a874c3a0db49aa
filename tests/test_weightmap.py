"""Laws of the weight map: it is the formula of the U-Net paper, and it travels with the class."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bigseg.targets import BACKGROUND, BORDER, IGNORE, INSIDE
from bigseg.weightmap import (
    LEVELS,
    closeness,
    closeness_margin_vox,
    extra_weights,
    pack,
    unpack,
)


def by_brute_force(labels, sigma, size, ignore):
    """Equation 2 of the paper, voxel by voxel, from the distances to all voxels of all objects."""
    steps = np.array(size, float) / min(size)
    objects = [
        np.argwhere(labels == number) * steps
        for number in np.unique(labels)
        if number not in (0, ignore)
    ]
    found = np.zeros(labels.shape, np.int16)
    for place in itertools.product(*map(range, labels.shape)):
        here = np.array(place) * steps
        nearest = sorted(np.sqrt(((o - here) ** 2).sum(axis=1)).min() for o in objects)
        if len(nearest) > 1:
            total = nearest[0] + nearest[1]
            found[place] = round(LEVELS * math.exp(-(total**2) / (2 * sigma**2)))
    return found


@st.composite
def cases(draw):
    n_axes = draw(st.integers(2, 3))
    shape = draw(st.tuples(*[st.integers(1, 7)] * n_axes))
    labels = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 4), fill=st.just(0)))
    size = draw(st.tuples(*[st.sampled_from([1.0, 1.3, 2.0, 5.0])] * n_axes))
    return labels, draw(st.sampled_from([0.5, 1.0, 2.0, 5.0])), size


@given(case=cases(), ignore=st.sampled_from([None, 0, 3]))
@settings(max_examples=60, deadline=None)
def test_closeness_equals_the_formula_written_out(case, ignore):
    labels, sigma, size = case
    found = closeness(labels, sigma_vox=sigma, voxel_size=size, ignore=ignore)
    np.testing.assert_array_equal(found, by_brute_force(labels, sigma, size, ignore))
    assert found.dtype == np.int16


@given(data=st.data(), sigma=st.sampled_from([0.4, 0.7, 1.0]), ignore=st.sampled_from([None, 3]))
@settings(max_examples=40, deadline=None)
def test_a_patch_with_margin_equals_the_whole(data, sigma, ignore):
    size = data.draw(st.sampled_from([(1.0, 1.0), (2.0, 1.0), (3.0, 1.3)]))
    labels = data.draw(hnp.arrays(np.uint8, (14, 16), elements=st.integers(0, 9)))
    margin = closeness_margin_vox(sigma, size)
    start = [data.draw(st.integers(0, n - 1)) for n in labels.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, labels.shape, strict=True)]
    first = [max(0, a - m) for a, m in zip(start, margin, strict=True)]
    cut = labels[tuple(slice(f, b + m) for f, b, m in zip(first, stop, margin, strict=True))]
    part = closeness(cut, sigma_vox=sigma, voxel_size=size, ignore=ignore)
    whole = closeness(labels, sigma_vox=sigma, voxel_size=size, ignore=ignore)
    core = tuple(slice(a - f, b - f) for a, b, f in zip(start, stop, first, strict=True))
    expected = whole[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    np.testing.assert_array_equal(part[core], expected)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 5.0])
def test_the_margin_is_no_larger_than_needed(sigma):
    (margin,) = closeness_margin_vox(sigma, (1.0,))
    row = np.zeros(margin + 3, np.uint8)
    row[0] = 1
    for distance, is_seen in ((margin, True), (margin + 1, False)):
        labels = row.copy()
        labels[distance] = 2
        assert (closeness(labels, sigma_vox=sigma)[0] > 0) == is_seen
    assert closeness_margin_vox(sigma, (3.0, 1.0)) == (int(margin / 3), margin)


def test_the_gap_between_two_objects_is_closest_and_a_lone_object_is_close_to_nothing():
    labels = np.zeros((9, 20), np.uint32)
    labels[2:7, 2:8], labels[2:7, 9:15] = 2**32 - 1, 7
    found = closeness(labels, sigma_vox=2.0)
    np.testing.assert_array_equal(found, found[::-1])
    assert found.max() == found[4, 8] == round(LEVELS * math.exp(-1 / 2))
    assert (np.diff(found[4, 8:14]) <= 0).all()
    labels[labels == 7] = 0
    assert not closeness(labels, sigma_vox=2.0).any()
    assert not closeness(labels * 0, sigma_vox=2.0).any()


@given(
    classes=hnp.arrays(np.int64, (3, 5), elements=st.integers(IGNORE, 2)),
    close=hnp.arrays(np.int16, (3, 5), elements=st.integers(0, LEVELS)),
)
def test_class_and_closeness_come_back_from_one_integer(classes, close):
    packed = pack(classes, close)
    assert packed.dtype == np.int16
    np.testing.assert_array_equal(packed == IGNORE, classes == IGNORE)
    again, weight = unpack(torch.from_numpy(packed).long())
    np.testing.assert_array_equal(again.numpy(), classes)
    np.testing.assert_array_equal(weight.numpy(), np.where(classes == IGNORE, 0, close) / LEVELS)
    assert (again.dtype, weight.dtype) == (torch.int64, torch.float32)


def test_gaps_leave_the_inside_without_extra_weight():
    classes = torch.tensor([[BACKGROUND, INSIDE, BORDER, BORDER, INSIDE, IGNORE]])
    close = torch.tensor([[0.5, 0.25, 1.0, 0.75, 0.25, 0.0]])
    everywhere = extra_weights(classes, close, w0=4, where="everywhere")
    assert everywhere.tolist() == [[2.0, 1.0, 4.0, 3.0, 1.0, 0.0]]
    gaps = extra_weights(classes, close, w0=4, where="gaps")
    assert gaps.tolist() == [[2.0, 0.0, 4.0, 3.0, 0.0, 0.0]]
