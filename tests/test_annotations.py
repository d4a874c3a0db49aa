"""Where is learned and where is validated, and labels that cannot be used."""

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from training_data import blobs, write_annotated
from zarr_images import ramp, write_image

from bigseg import annotations
from bigseg.annotations import held_out, judged, middle, open_annotated, split
from bigseg.blocks import Region
from bigseg.config import TrainConfig
from bigseg.errors import ConfigError, InputError
from bigseg.targets import IGNORE, boundary


@pytest.fixture
def opened(tmp_path):
    """Opens an image of zeros and ones of any shape with the settings given."""

    def make(shape, axes, **settings):
        image = ramp(shape, "uint8")
        url = str(tmp_path / f"{axes}{'-'.join(map(str, shape))}")
        labels = (image % 2)[0] if axes[0] == "c" else image % 2
        write_annotated(url, image, labels, axes)
        return open_annotated(url, TrainConfig(images=(url,), labels="cells", **settings))

    return make


def test_the_last_fifth_of_the_planes_is_held_out(opened):
    train, val = split(opened((20, 6, 8), "zyx"))
    assert (train, val) == (
        Region((0, 0, 0, 0), (1, 16, 6, 8)),
        Region((0, 16, 0, 0), (1, 20, 6, 8)),
    )


def test_the_last_fifth_of_the_rows_where_there_are_few_planes(opened):
    for shape, axes in (((4, 10, 8), "zyx"), ((10, 8), "yx")):
        train, val = split(opened(shape, axes))
        n_planes = shape[0] if axes == "zyx" else 1
        assert train == Region((0, 0, 0, 0), (1, n_planes, 8, 8))
        assert val == Region((0, 0, 8, 0), (1, n_planes, 10, 8))


def test_the_split_keeps_to_the_region_and_the_time_point(opened):
    train, val = split(opened((3, 20, 6, 8), "tzyx", region="5:15,:,2:6", time=1))
    assert (train, val) == (
        Region((1, 5, 0, 2), (2, 13, 6, 6)),
        Region((1, 13, 0, 2), (2, 15, 6, 6)),
    )


def test_a_validation_region_leaves_the_region_as_it_is(opened):
    train, val = split(opened((20, 6, 8), "zyx", val_region="3:6,:,:"))
    assert (train, val) == (
        Region((0, 0, 0, 0), (1, 20, 6, 8)),
        Region((0, 3, 0, 0), (1, 6, 6, 8)),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region": "0:30,:,:"}, r"region '0:30,:,:': '0:30' is empty or outside the axis"),
        ({"val_region": "1:2"}, r"region '1:2' has 1 axes, the volume has 3 \(zyx\)"),
        ({"time": 2}, r"time: 2 is not in .*, which has the time points 0 to 0"),
        ({"channels": (0, 3)}, r"channels: 3 is not in .*, which has the channels 0 to 0"),
        ({"region": "0:1,0:1,:"}, r"is too small to hold a part out for validation: give val_reg"),
    ],
)
def test_a_region_that_is_not_there_is_refused(opened, settings, message):
    with pytest.raises(ConfigError, match=message):
        split(opened((20, 6, 8), "zyx", **settings))


@given(
    shape=st.tuples(*[st.integers(1, 60)] * 4),
    start=st.tuples(*[st.integers(0, 9)] * 4),
    budget=st.integers(1, 5000),
)
def test_the_middle_is_inside_fills_the_budget_and_is_in_the_middle(shape, start, budget):
    region = Region(start, tuple(a + n for a, n in zip(start, shape, strict=True)))
    part = middle(region, at_most=budget)
    assert part.intersect(region) == part
    assert 1 <= part.n_voxels <= budget
    assert part == region or 2 * part.n_voxels > budget
    before = [a - b for a, b in zip(part.start, region.start, strict=True)]
    after = [a - b for a, b in zip(region.stop, part.stop, strict=True)]
    assert all(0 <= a - b <= 1 for a, b in zip(after, before, strict=True))


@given(
    sides=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    budget=st.integers(100, 5000),
)
def test_small_images_are_judged_whole_and_large_ones_share_what_is_left(sides, budget):
    regions = [Region((0, 0, 3, 3), (1, 1, 3 + n, 3 + n)) for n in sides]
    original = annotations.VALIDATION_VOXELS
    annotations.VALIDATION_VOXELS = budget
    try:
        parts = judged(regions)
    finally:
        annotations.VALIDATION_VOXELS = original
    sizes = [part.n_voxels for part in parts]
    assert sum(sizes) <= budget
    assert all((part.n_voxels > 0) == (n > 0) for part, n in zip(parts, sides, strict=True))
    cut = [size for size, n in zip(sizes, sides, strict=True) if size < n * n]
    whole = [size for size, n in zip(sizes, sides, strict=True) if size == n * n]
    if sum(n * n for n in sides) <= budget:
        assert not cut
    # A cut takes whole rows: less than a row is lost.
    assert all(size >= max(whole, default=0) - 40 for size in cut)


def test_nothing_is_held_out_of_images_where_others_are_validated_on_whole(opened):
    train, val = split(opened((20, 6, 8), "zyx", region="2:9,:,:", val_images=("other.zarr",)))
    assert train == Region((0, 2, 0, 0), (1, 9, 6, 8))
    assert not val.n_voxels
    train, val = held_out(opened((3, 20, 6, 8), "tzyx", region="2:9,:,:", time=1))
    assert not train.n_voxels
    assert val == Region((1, 0, 0, 0), (2, 20, 6, 8))


@pytest.mark.parametrize(
    ("border_um", "border_vox"), [(None, 2.0), (0.02, 2.0), (0.05, 5.0), (0.001, 0.1)]
)
def test_a_border_has_its_width_in_micrometers(tmp_path, border_um, border_vox):
    image, labels = blobs((6, 40, 40), n=20)
    size = (0.03, 0.01, 0.01)
    url = write_annotated(str(tmp_path / "a"), image, labels, "zyx", scale=size)
    config = TrainConfig(images=(url,), labels="cells", task="instances", border_um=border_um)
    annotated = open_annotated(url, config)
    everywhere = Region.of_shape(annotated.image.shape)
    expected = boundary(labels, border_vox=border_vox, voxel_size=size)
    np.testing.assert_array_equal(annotated.target(everywhere, dims=3, n_classes=3)[0], expected)
    planes = np.stack([boundary(plane, border_vox=border_vox) for plane in labels])
    np.testing.assert_array_equal(annotated.target(everywhere, dims=2, n_classes=3)[0], planes)


def test_objects_end_with_what_the_network_sees(tmp_path):
    labels = np.zeros((3, 4, 20, 20), np.uint32)
    labels[:, :, 2:6, 2:6], labels[:, :2, 10:13, 2:6], labels[..., 15:] = 2**31, 7, 9
    url = write_annotated(str(tmp_path / "a"), labels.astype("u1"), labels, "tzyx")
    annotated = open_annotated(url, TrainConfig(images=(url,), labels="cells", ignore=9))
    region = Region((1, 0, 0, 0), (3, 4, 20, 20))
    part = labels[1:]
    for dims, n_objects in ((3, 2 * 2), (2, 2 * 4 + 2 * 2)):
        found = annotated.objects(region, dims=dims)
        np.testing.assert_array_equal(found == IGNORE, part == 9)
        np.testing.assert_array_equal(found == 0, part == 0)
        assert sorted(np.unique(found[found > 0])) == list(range(1, n_objects + 1))
        # Every number is one object of one volume or plane.
        stacks = zip(found.reshape(-1, *found.shape[-dims:]), range(99), strict=False)
        of_stack = [set(np.unique(stack[stack > 0])) for stack, _ in stacks]
        assert sum(map(len, of_stack)) == n_objects


def test_counts_are_those_of_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "BLOCK_VOXELS", 500)
    image, labels = blobs((6, 30, 30))
    labels[3] = 200
    url = write_annotated(str(tmp_path / "a"), image, labels, "zyx", chunks=(2, 8, 8))
    config = TrainConfig(images=(url,), labels="cells", ignore=200, task="instances")
    annotated = open_annotated(url, config)
    region = Region((0, 1, 3, 0), (1, 6, 30, 29))
    part = labels[1:6, 3:30, 0:29]
    counts = annotated.count_labels(region)
    np.testing.assert_array_equal(counts[:13], np.bincount(part[part != 200], minlength=13))
    assert counts.sum() == (part != 200).sum()
    assert annotated.count_annotated(region).tolist() == [
        (part != 200).sum(),
        ((part != 200) & (part > 0)).sum(),
    ]
    target = annotated.target(region, dims=2, n_classes=3)
    classes = annotated.count_classes(region, dims=2, n_classes=3)
    assert classes.tolist() == [(target == c).sum() for c in range(3)]


def test_numbered_objects_are_no_classes(tmp_path):
    labels = ramp((4, 20, 20), "uint16")
    url = write_annotated(str(tmp_path / "a"), labels, labels, "zyx")
    annotated = open_annotated(url, TrainConfig(images=(url,), labels="cells"))
    with pytest.raises(InputError, match="for numbered objects use `task: instances`"):
        annotated.count_labels(Region.of_shape((1, 4, 20, 20)))


def test_labels_of_another_extent_are_refused(tmp_path):
    url = str(tmp_path / "a")
    image = ramp((4, 20, 20))
    write_annotated(url, image, image, "zyx")
    write_image(f"{url}/labels/small", [image[:, :10]], "zyx")
    zarr.open_group(f"{url}/labels").attrs["ome"] = {"version": "0.5", "labels": ["small"]}
    with pytest.raises(InputError, match=r"have \(1, 4, 10, 20\) voxels .* has \(1, 4, 20, 20\)"):
        open_annotated(url, TrainConfig(images=(url,), labels="small"))
    with pytest.raises(InputError, match=r"labels 'cells' not found in .*; there are: small"):
        open_annotated(url, TrainConfig(images=(url,), labels="cells"))


def test_labels_that_are_no_integers_are_refused(tmp_path):
    image = ramp((4, 20, 20))
    url = write_annotated(str(tmp_path / "a"), image, image.astype(np.float32), "zyx")
    with pytest.raises(InputError, match="of type float32, but labels are integers"):
        open_annotated(url, TrainConfig(images=(url,), labels="cells"))
