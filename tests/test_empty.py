"""What is kept of any region is what is kept of the whole volume there, whatever the resolution."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr_images import metadata, write_image

from bigseg import empty
from bigseg.blocks import BlockGrid, Region
from bigseg.empty import EmptyRule, EmptySpace, both, keep_of_absent, make_rule
from bigseg.errors import InputError, InputNotFoundError, UsageError
from bigseg.volume import open_volume

SIDES = st.integers(1, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    numbers = itertools.count()
    return lambda: str(root / f"{next(numbers)}.zarr")


def image_of(url, data, axes="tzyx", *, size=None, unit="micrometer"):
    """An image of one level whose voxels have this size."""
    attributes = metadata("0.5", axes, [size or [1.0] * len(axes)], unit=unit)
    chunks = [min(n, max(3, n // 2)) for n in data.shape]
    return open_volume(write_image(url, [data], axes, chunks=chunks, attributes=attributes))


def covering(url, mask, shape, *, unit="micrometer"):
    """A mask of any resolution with the extent of an image of `shape` and voxels of 1 µm."""
    size = [n / m for n, m in zip(shape, mask.shape, strict=True)]
    return image_of(url, mask, size=size, unit=unit)


def brute_force(shape, kept):
    """`kept` (t, z, y, x) at any resolution, looked up where the centre of each voxel lies."""
    result = np.zeros(shape, bool)
    for voxel in np.ndindex(*shape):
        place = (Fraction(2 * i + 1, 2 * n) for i, n in zip(voxel, shape, strict=True))
        result[voxel] = kept[tuple(int(p * m) for p, m in zip(place, kept.shape, strict=True))]
    return result


def assert_is(keep, wanted):
    """The answer says what is wanted, as a boolean wherever that can say it."""
    np.testing.assert_array_equal(np.broadcast_to(keep, wanted.shape), wanted)
    assert isinstance(keep, bool) == (wanted.all() or not wanted.any())


def region_in(draw, shape):
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    return Region(
        tuple(starts),
        tuple(draw(st.integers(a + 1, n)) for a, n in zip(starts, shape, strict=True)),
    )


@st.composite
def masked_volumes(draw):
    """The shape of a volume, a mask of another, in which whole parts are 0, and a region."""
    shape = tuple(draw(st.tuples(st.integers(1, 3), SIDES, SIDES, SIDES)))
    n_times = draw(st.sampled_from([1, shape[0]]))
    n_planes = draw(st.sampled_from([1, draw(SIDES)]))
    mask = np.zeros((n_times, n_planes, draw(SIDES), draw(SIDES)), np.uint8)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    part = region_in(draw, mask.shape)
    mask[part.slices] = rng.choice([0, 1, 200], part.shape)
    return shape, mask, region_in(draw, shape)


@given(masked_volumes())
@settings(max_examples=40, deadline=None)
def test_a_region_keeps_what_the_whole_volume_keeps_there(folder, case):
    shape, mask, region = case
    source = image_of(folder(), np.zeros(shape, np.uint8))
    rule = make_rule(
        source,
        mask=covering(folder(), mask, shape).url,
        skip_below=None,
        skip_level=None,
    )
    space = EmptySpace(rule, source, (0,))
    whole = brute_force(shape, mask != 0)
    assert_is(space.keep(region), whole[region.slices])
    assert_is(space.keep(Region.of_shape(shape)), whole)


@given(masked_volumes(), st.tuples(st.integers(1, 3), SIDES, SIDES, SIDES))
@settings(max_examples=20, deadline=None)
def test_any_partition_into_blocks_keeps_the_same(folder, case, core):
    shape, mask, region = case
    source = image_of(folder(), np.zeros(shape, np.uint8))
    space = EmptySpace(EmptyRule(mask_url=covering(folder(), mask, shape).url), source, (0,))
    whole = np.broadcast_to(space.keep(region), region.shape)
    for block in BlockGrid(region, core):
        inside = block.core.relative_to(region.start)
        assert_is(space.keep(block.core), whole[inside.slices])


def test_a_mask_much_finer_than_the_volume_is_read_in_parts_with_the_same_result(
    folder, monkeypatch
):
    shape = (2, 3, 5, 7)
    mask = np.random.default_rng(0).integers(0, 2, (2, 30, 41, 64)).astype(np.uint8)
    mask[:, :, :20] = 0
    source = image_of(folder(), np.zeros(shape, np.uint8))
    space = EmptySpace(EmptyRule(mask_url=covering(folder(), mask, shape).url), source, (0,))
    sizes = []
    read = type(source).read

    def counted(volume, region, channels=(0,)):
        sizes.append(region.n_voxels)
        return read(volume, region, channels)

    monkeypatch.setattr(type(source), "read", counted)
    monkeypatch.setattr(empty, "MOST_VOXELS", 5000)
    region = Region((0, 0, 1, 1), (2, 3, 5, 7))
    assert_is(space.keep(region), brute_force(shape, mask != 0)[region.slices])
    assert len(sizes) > 1
    assert max(sizes) <= 5000


def test_only_the_part_of_the_mask_under_the_region_is_read(folder, monkeypatch):
    shape = (1, 8, 80, 80)
    mask = np.zeros((1, 4, 20, 20), np.uint8)
    mask[0, 0, 3, 5] = 1
    source = image_of(folder(), np.zeros(shape, np.uint8))
    space = EmptySpace(EmptyRule(mask_url=covering(folder(), mask, shape).url), source, (0,))
    read, regions = type(source).read, []

    def noted(volume, region, channels=(0,)):
        regions.append(region)
        return read(volume, region, channels)

    monkeypatch.setattr(type(source), "read", noted)
    assert space.keep(Region((0, 2, 8, 8), (1, 5, 40, 17))) is False
    assert regions == [Region((0, 1, 2, 2), (1, 3, 10, 5))]
    assert space.keep(Region((0, 0, 12, 20), (1, 2, 16, 24))) is True


def test_a_mask_without_units_is_matched_by_its_extent(folder):
    source = image_of(folder(), np.zeros((1, 4, 6, 6), np.uint8))
    mask = image_of(folder(), np.eye(2, dtype=np.uint8)[None, None], size=[1.0] * 4, unit=None)
    rule = make_rule(source, mask=mask.url, skip_below=None, skip_level=None)
    wanted = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), bool))
    keep = EmptySpace(rule, source, (0,)).keep(Region.of_shape(source.shape))
    assert_is(keep, np.broadcast_to(wanted, source.shape))


def test_a_two_dimensional_mask_serves_all_planes_whatever_the_axes_of_the_volume(folder):
    source = image_of(folder(), np.zeros((2, 3, 4, 4), np.uint8), "czyx")
    mask = image_of(folder(), np.eye(4, dtype=np.uint8), "yx")
    rule = make_rule(source, mask=mask.url, skip_below=None, skip_level=None)
    keep = EmptySpace(rule, source, (1,)).keep(Region((0, 1, 0, 0), (1, 3, 4, 4)))
    assert_is(keep, np.broadcast_to(np.eye(4, dtype=bool), (1, 2, 4, 4)))


def test_the_mask_is_its_first_channel(folder):
    source = image_of(folder(), np.zeros((4, 4), np.uint8), "yx")
    data = np.stack([np.eye(4, dtype=np.uint8), np.ones((4, 4), np.uint8)])
    rule = EmptyRule(mask_url=image_of(folder(), data, "cyx").url)
    keep = EmptySpace(rule, source, (0,)).keep(Region.of_shape(source.shape))
    assert_is(keep, np.eye(4, dtype=bool)[None, None])


@st.composite
def pyramids(draw):
    """Two levels (c, z, y, x) of values, some NaN, with a threshold that is one of the values."""
    fine = tuple(draw(st.tuples(SIDES, SIDES, SIDES)))
    coarse = tuple(draw(st.integers(1, n)) for n in fine)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(["uint8", "int64", "float32", "float16", "bool"]))
    values = np.array([0, 1, 2.5, 100, np.nan] if "float" in dtype else [0, 1, 2, 100])
    levels = [rng.choice(values, (2, *shape)).astype(dtype) for shape in (fine, coarse)]
    limit = draw(st.sampled_from([-1e300, -1.0, 0.0, 0.5, 1.0, 2.5, 100.0, 1e30, 1e300]))
    return levels, limit


@given(pyramids(), st.sampled_from([(0,), (1,), (0, 1)]), st.sampled_from([0, 1, None]))
@settings(max_examples=40, deadline=None)
def test_a_voxel_is_kept_where_a_channel_that_is_read_reaches_the_value(
    folder, pyramid, channels, level
):
    levels, limit = pyramid
    source = open_volume(write_image(folder(), levels, "czyx"))
    rule = make_rule(source, mask=None, skip_below=limit, skip_level=level)
    looked_at = levels[-1 if level is None else level][list(channels)]
    reached = np.zeros(looked_at.shape[1:], bool)
    for voxel in np.ndindex(*reached.shape):
        reached[voxel] = any(float(looked_at[(c, *voxel)]) >= limit for c in range(len(channels)))
    keep = EmptySpace(rule, source, channels).keep(Region.of_shape(source.shape))
    assert_is(keep, brute_force(source.shape, reached[None]))


def test_a_stored_value_reaches_itself_and_large_integers_are_exact(folder):
    for dtype, below in (("float32", 0.7), ("float16", 0.1), ("int64", float(2**53))):
        value = np.array([[below]]).astype(dtype)
        source = image_of(folder(), np.hstack([value, value - value.dtype.type(1)]), "yx")
        rule = make_rule(source, mask=None, skip_below=below, skip_level=None)
        keep = EmptySpace(rule, source, (0,)).keep(Region.of_shape(source.shape))
        assert_is(keep, np.array([[[[True, False]]]]))


def test_the_coarsest_level_is_looked_at_unless_another_is_named(folder):
    source = open_volume(write_image(folder(), [np.zeros((n, n)) for n in (8, 4, 2)], "yx"))

    def level(volume, wanted):
        return make_rule(volume, mask=None, skip_below=1.0, skip_level=wanted).skip_level

    assert [level(source, None), level(source, 1), level(source.at(2), None)] == [2, 1, 2]
    alone = image_of(folder(), np.zeros((4, 4)), "yx")
    assert level(alone, None) == 0


def test_mask_and_value_must_both_keep_a_voxel(folder):
    data = np.array([[0, 9], [0, 9]], np.uint8)
    source = image_of(folder(), data, "yx")
    mask = image_of(folder(), np.array([[1, 1], [0, 0]], np.uint8), "yx")
    rule = make_rule(source, mask=mask.url, skip_below=5.0, skip_level=None)
    space = EmptySpace(rule, source, (0,))
    assert_is(space.keep(Region.of_shape(source.shape)), np.array([[[[False, True], [False] * 2]]]))
    assert space.keep(Region((0, 0, 0, 0), (1, 1, 2, 1))) is False
    assert space.keep(Region((0, 0, 0, 1), (1, 1, 1, 2))) is True


def test_without_a_wish_there_is_no_rule(folder):
    source = image_of(folder(), np.zeros((4, 4)), "yx")
    assert make_rule(source, mask=None, skip_below=None, skip_level=None) is None
    assert EmptySpace(EmptyRule(), source, (0,)).keep(Region.of_shape(source.shape)) is True


def test_a_rule_is_plan_data_that_survives_json(folder):
    source = image_of(folder(), np.zeros((4, 4)), "yx")
    rule = make_rule(source, mask=source.url, skip_below=0.1, skip_level=0)
    assert rule.mask_url == source.url
    assert EmptyRule.model_validate_json(rule.model_dump_json()) == rule


@st.composite
def absences(draw):
    shape = tuple(draw(st.tuples(SIDES, SIDES, SIDES, SIDES)))
    absent = [region_in(draw, shape) for _ in range(draw(st.integers(0, 3)))]
    return shape, region_in(draw, shape), absent


@given(absences())
@settings(max_examples=200, deadline=None)
def test_exactly_the_voxels_of_absent_objects_are_not_kept(case):
    shape, region, absent = case
    whole = np.ones(shape, bool)
    for part in absent:
        whole[part.slices] = False
    assert_is(keep_of_absent(region, absent), whole[region.slices])


KEEPS = st.booleans() | (
    st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda k: len(set(k)) > 1).map(np.array)
)


@given(KEEPS, KEEPS)
def test_two_rules_keep_what_each_of_them_keeps(first, second):
    assert_is(both(first, second), np.broadcast_to(first, 4) & np.broadcast_to(second, 4))


def test_a_level_of_the_same_pyramid_fits_in_spite_of_its_rounding(folder):
    for n, m in itertools.product([99, 100, 101], [12, 13]):
        source = image_of(folder(), np.zeros((n, n), np.uint8), "yx")
        mask = image_of(folder(), np.ones((m, m), np.uint8), "yx", size=[8.0, 8.0])
        assert make_rule(source, mask=mask.url, skip_below=None, skip_level=None) is not None
        assert make_rule(mask, mask=source.url, skip_below=None, skip_level=None) is not None


def refused(error, text, source, **wishes):
    with pytest.raises(error) as caught:
        make_rule(source, **{"mask": None, "skip_below": None, "skip_level": None, **wishes})
    assert text in str(caught.value)


def test_a_mask_of_another_field_of_view_is_refused_with_both_extents(folder):
    source = image_of(folder(), np.zeros((2, 20, 30), np.uint8), "zyx")
    mask = image_of(folder(), np.ones((1, 10, 10), np.uint8), "zyx", size=[1.0, 2.0, 2.0])
    refused(
        InputError,
        f"the mask {mask.url} covers 20×20 µm along y, x, level 0 of {source.url} covers 20×30 µm: "
        "they must show the same field of view; give another mask, or correct its voxel size",
        source,
        mask=mask.url,
    )


def test_a_mask_with_other_time_points_or_more_planes_is_refused(folder):
    source = image_of(folder(), np.zeros((4, 4), np.uint8), "yx")
    movie = image_of(folder(), np.ones((3, 4, 4), np.uint8), "tyx")
    volume = image_of(folder(), np.ones((3, 4, 4), np.uint8), "zyx")
    refused(InputError, "has 3 time points, ", source, mask=movie.url)
    refused(InputError, "give a mask with as many, or with one for all", source, mask=movie.url)
    refused(InputError, "has 3 planes, ", source, mask=volume.url)
    refused(InputNotFoundError, "no such image", source, mask=source.url + "nowhere")


def test_wishes_that_make_no_rule_are_refused(folder):
    source = image_of(folder(), np.zeros((4, 4), np.uint8), "yx")
    refused(UsageError, "--skip-below nan is not a finite number", source, skip_below=np.nan)
    refused(UsageError, "--skip-below inf is not a finite number", source, skip_below=np.inf)
    refused(UsageError, "--skip-level 0 says where to look, not for what", source, skip_level=0)
    refused(
        UsageError,
        f"--skip-level 1: {source.url} has no such level, it has 0: choose among those",
        source,
        skip_below=1.0,
        skip_level=1,
    )


def test_another_mask_in_the_place_of_the_planned_one_is_refused(folder):
    source = image_of(folder(), np.zeros((4, 4), np.uint8), "yx")
    mask = image_of(folder(), np.ones((4, 4), np.uint8), "yx")
    rule = make_rule(source, mask=mask.url, skip_below=None, skip_level=None)
    group = zarr.open_group(mask.url, mode="r+")
    del group["0"]
    group.create_array("0", data=np.ones((2, 2), np.uint8), dimension_names=["y", "x"])
    with pytest.raises(InputError, match="is not the one that was planned with"):
        EmptySpace(rule, source, (0,))
