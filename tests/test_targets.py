"""Laws of the targets: exact against brute force, and independent of where a patch was cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from bigseg.errors import InputError
from bigseg.targets import (
    BACKGROUND,
    BORDER,
    IGNORE,
    INSIDE,
    boundary,
    boundary_margin_vox,
    class_names,
    semantic,
)

SIZES = {2: [None, (1.0, 1.0), (1.5, 1.0)], 3: [None, (4.0, 1.0, 1.0), (1.25, 1.0, 1.0)]}


@st.composite
def cases(draw):
    n_axes = draw(st.sampled_from([1, 2, 2, 3]))
    shape = draw(
        hnp.array_shapes(min_dims=n_axes, max_dims=n_axes, max_side=7 if n_axes < 3 else 4)
    )
    labels = draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 4), fill=st.integers(0, 2)))
    border = draw(st.sampled_from([0.5, 1.0, 2.0, 3.0, 5.5]))
    return labels, border, draw(st.sampled_from(SIZES.get(n_axes, [None])))


def by_brute_force(labels, border_vox, voxel_size, ignore):
    """The definition, one pair of voxels at a time."""
    step = np.array(voxel_size or [1.0] * labels.ndim)
    step = step / step.min()
    result = np.empty(labels.shape, np.int64)
    voxels = list(np.ndindex(labels.shape))
    for v in voxels:
        own = labels[v]
        if own in (0, ignore):
            result[v] = IGNORE if own == ignore else BACKGROUND
            continue
        result[v] = INSIDE
        for w in voxels:
            offset = np.subtract(v, w)
            near = np.sqrt(((offset * step) ** 2).sum()) < border_vox / 2 + 1
            neighbour = np.abs(offset).max() <= 1
            if labels[w] == ignore and (near or neighbour):
                result[v] = IGNORE
                break
            if labels[w] != own and (near or (neighbour and labels[w] != 0)):
                result[v] = BORDER
    return result


@given(case=cases(), ignore=st.sampled_from([None, 0, 3]))
@settings(max_examples=120, deadline=None)
def test_border_classes_equal_the_definition_written_out(case, ignore):
    labels, border, size = case
    found = boundary(labels, border_vox=border, voxel_size=size, ignore=ignore)
    np.testing.assert_array_equal(found, by_brute_force(labels, border, size, ignore))
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("border_vox", "size"), [(1, (1, 1, 1)), (2, (1, 1, 1)), (5, (1, 1, 1)), (6, (3, 1, 1))]
)
def test_border_distance_equals_scipys_distance_transform(border_vox, size):
    labels = blobs((12, 20, 24), n=6)
    found = boundary(labels, border_vox=border_vox, voxel_size=size)
    for label in range(1, labels.max() + 1):
        far = ndimage.distance_transform_edt(
            np.pad(labels == label, 9, mode="edge"), sampling=size
        )[9:-9, 9:-9, 9:-9]
        inside = (labels == label) & (far >= border_vox / 2 + 1)
        neighbours = ndimage.grey_dilation(labels, (3, 3, 3)) > label
        others = np.where(labels == 0, 99, labels)
        neighbours |= ndimage.grey_erosion(others, (3, 3, 3)) < label
        np.testing.assert_array_equal((found == INSIDE) & (labels == label), inside & ~neighbours)


def blobs(shape, n, seed=0, gaps=True):
    """Voronoi cells of random points; with gaps, some of them are background."""
    rng = np.random.default_rng(seed)
    points = np.ones(shape, bool)
    numbers = np.zeros(shape, np.int32)
    for number, index in enumerate(rng.choice(points.size, n + 2 * gaps, replace=False)):
        points.flat[index] = False
        numbers.flat[index] = number + 1
    nearest = ndimage.distance_transform_edt(points, return_distances=False, return_indices=True)
    cells = numbers[tuple(nearest)]
    return np.where(cells > n, 0, cells)


@pytest.mark.parametrize("border_vox", [0.5, 1, 2, 3, 4, 5])
def test_touching_objects_are_as_far_apart_as_the_border_is_wide(border_vox):
    labels = np.repeat([[0] * 8 + [1] * 12 + [2] * 12], 5, axis=0)
    row = boundary(labels, border_vox=border_vox)[2]
    half = int(np.ceil(border_vox / 2))
    assert (row[8 : 8 + half] == BORDER).all()
    assert row[8 + half] == INSIDE
    assert (row == BORDER).sum() == 3 * half
    assert (row[20 - half : 20 + half] == BORDER).all()
    assert row[-1] == INSIDE, "the end of the array is no border"


@pytest.mark.parametrize("voxel_size", [(1, 1, 1), (5, 1, 1)])
def test_inside_voxels_of_two_objects_are_never_neighbours(voxel_size):
    labels = blobs((10, 14, 14), n=8, gaps=False)
    inside = boundary(labels, border_vox=0.5, voxel_size=voxel_size) == INSIDE
    connected, _ = ndimage.label(inside, np.ones((3, 3, 3)))
    for number in range(1, connected.max() + 1):
        assert len(np.unique(labels[connected == number])) == 1


@pytest.mark.parametrize("voxel_size", [(1.0, 1.0, 1.0), (4.0, 1.0, 1.0), (1.3, 1.1, 1.0)])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("border_vox", [2.0, 4.0])
def test_a_patch_with_margin_equals_the_whole(voxel_size, ignore, border_vox):
    labels = blobs((12, 18, 20), n=9)
    whole = boundary(labels, border_vox=border_vox, voxel_size=voxel_size, ignore=ignore)
    margin = boundary_margin_vox(border_vox, voxel_size)
    start, stop = (4, 6, 5), (8, 11, 12)
    cut = tuple(slice(a - m, b + m) for a, b, m in zip(start, stop, margin, strict=True))
    patch = boundary(labels[cut], border_vox=border_vox, voxel_size=voxel_size, ignore=ignore)
    core = tuple(slice(m, m + b - a) for a, b, m in zip(start, stop, margin, strict=True))
    expected = whole[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    np.testing.assert_array_equal(patch[core], expected)


def test_the_margin_is_no_larger_than_needed():
    assert boundary_margin_vox(2, (1, 1)) == (1, 1)
    assert boundary_margin_vox(4, (50, 4, 4)) == (1, 2, 2)
    assert boundary_margin_vox(0.1, (1, 1)) == (1, 1)


def test_planes_are_separate_when_given_one_by_one():
    labels = np.zeros((2, 5, 5), np.uint16)
    labels[0], labels[1] = 1, 2
    assert (boundary(labels, border_vox=2) == BORDER).all()
    assert all((boundary(plane, border_vox=2) == INSIDE).all() for plane in labels)


def test_the_largest_ids_are_told_apart():
    top = np.iinfo(np.uint64).max
    labels = np.array([[top - 1, top - 1, top, top]] * 3, np.uint64)
    expected = [[INSIDE, BORDER, BORDER, INSIDE]] * 3
    np.testing.assert_array_equal(boundary(labels, border_vox=1), expected)


def test_negative_object_numbers_are_refused():
    with pytest.raises(InputError, match=r"the labels hold -2, but objects are numbered from 1"):
        boundary(np.array([[-2, 1]]), border_vox=2)
    found = boundary(np.array([[-1, 0, 1]]), border_vox=2, ignore=-1)
    np.testing.assert_array_equal(found, [[IGNORE, BACKGROUND, BORDER]])


@given(
    labels=hnp.arrays(np.uint8, (3, 4), elements=st.integers(0, 3)),
    ignore=st.sampled_from([None, -1, 0, 3, 255]),
)
@settings(max_examples=50, deadline=None)
def test_semantic_classes_are_the_labels_with_the_ignored_marked(labels, ignore):
    found = semantic(labels, n_classes=4, ignore=ignore)
    expected = [[IGNORE if v == ignore else int(v) for v in row] for row in labels]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64


def test_an_ignored_label_outside_the_classes_is_allowed():
    labels = np.array([0, 1, 2**64 - 1], np.uint64)
    np.testing.assert_array_equal(semantic(labels, n_classes=2, ignore=2**64 - 1), [0, 1, IGNORE])


def test_labels_beyond_the_classes_are_named():
    with pytest.raises(InputError, match=r"the labels hold 2, 7, but 2 classes have the values 0"):
        semantic(np.array([0, 1, 7, 2, 7]), n_classes=2)
    with pytest.raises(InputError, match=r"hold -1, but"):
        semantic(np.array([0, -1], np.int8), n_classes=2)
    with pytest.raises(InputError, match=r"hold 2, 3, 4, 5, 6 and 93 other values"):
        semantic(np.arange(100), n_classes=2)


def test_class_names_fit_the_task():
    assert class_names("instances") == ("background", "inside", "border")
    assert class_names("semantic") == ("background", "foreground")
    for n in itertools.chain(range(1, 5)):
        assert len(set(class_names("semantic", n))) == n
