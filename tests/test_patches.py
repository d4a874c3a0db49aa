"""Laws of the patches: what they depend on, where they lie, and that nothing hidden is learned."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_data import blobs, write_annotated
from zarr_images import ramp

from bigseg.annotations import open_annotated
from bigseg.augment import PatchFrame
from bigseg.blocks import Region
from bigseg.config import AugmentConfig, NormConstants, TrainConfig
from bigseg.errors import InputError
from bigseg.patches import PatchPlan, PatchSampler, PatchSource
from bigseg.targets import IGNORE
from bigseg.weightmap import LEVELS

PLAIN = AugmentConfig(
    flip=False,
    rotate90=False,
    rotate_degrees=0,
    tilt_degrees=0,
    scale=0,
    elastic_vox=0,
    brightness=0,
    contrast=0,
    gamma=0,
    noise=0,
    blur_vox=0,
)
UNCHANGED = NormConstants(offset=(0.0,), scale=(1.0,))
NOWHERE = Region((0,) * 4, (0,) * 4)


def source_of(url, *, region=None, excluded=NOWHERE, dims=3, n_classes=3, weight=1.0, **settings):
    config = TrainConfig(images=(url,), labels="cells", **settings)
    annotated = open_annotated(url, config)
    return PatchSource(
        annotated=annotated,
        region=region or Region.of_shape(annotated.image.shape),
        excluded=excluded,
        constants=UNCHANGED,
        weight=weight,
        dims=dims,
        n_classes=n_classes,
    )


def plan_of(
    image=(12, 20, 20), target=(4, 12, 12), *, augment=PLAIN, batch=2, seed=0, channels=(0,)
):
    return PatchPlan(PatchFrame(image, target), augment, channels, batch, seed)


@pytest.fixture(scope="module")
def volume_url(tmp_path_factory):
    """A 3-D image whose voxels all differ, and balls as labels."""
    url = str(tmp_path_factory.mktemp("patches") / "a.zarr")
    _, labels = blobs((16, 40, 36))
    return write_annotated(url, ramp(labels.shape, "uint16"), labels, "zyx", chunks=(8, 16, 16))


def equal(a, b) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.target, b.target)


def places(batch, shape):
    """Where the first voxel of each target lies in a ramp image, from the values of the image."""
    halo = [
        (i - t) // 2 for i, t in zip(batch.image.shape[2:], batch.target.shape[1:], strict=True)
    ]
    firsts = batch.image[(slice(None), 0, *halo)].long().tolist()
    return [tuple(int(n) for n in np.unravel_index(v, shape)) for v in firsts]


@pytest.mark.parametrize("augment", [PLAIN, AugmentConfig(elastic_grid_vox=8)])
def test_a_patch_depends_on_seed_step_rank_and_number_alone(volume_url, augment):
    sources = [source_of(volume_url, task="instances")]
    sampler = PatchSampler(sources, plan_of(augment=augment))
    first = sampler.batch(7, rank=1)
    sampler.batch(8)
    assert equal(first, PatchSampler(sources, plan_of(augment=augment)).batch(7, rank=1))
    larger = PatchSampler(sources, plan_of(augment=augment, batch=4)).batch(7, rank=1)
    assert torch.equal(larger.image[:2], first.image)
    assert not torch.equal(larger.image[2], larger.image[0])
    other_seed = PatchSampler(sources, plan_of(augment=augment, seed=1)).batch(7, rank=1)
    others = [sampler.batch(8, rank=1), sampler.batch(7, rank=0), other_seed]
    assert not any(torch.equal(first.image, other.image) for other in others)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_reading_ahead_changes_nothing(volume_url, n_threads):
    sampler = PatchSampler([source_of(volume_url, task="instances")], plan_of())
    before = torch.get_num_threads()
    stream = list(sampler.stream(range(3, 9), rank=1, n_threads=n_threads))
    assert [b.step for b in stream] == list(range(3, 9))
    assert all(equal(b, sampler.batch(b.step, rank=1)) for b in stream)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("task", ["instances", "semantic"])
@pytest.mark.parametrize("dims", [2, 3])
def test_patches_from_memory_equal_patches_from_zarr(volume_url, task, dims):
    region = Region((0, 3, 5, 0), (1, 9, 40, 30))
    source = source_of(
        volume_url,
        region=region,
        excluded=Region((0, 8, 0, 0), (1, 16, 12, 36)),
        dims=dims,
        task=task,
        n_classes=13 if task == "semantic" else 3,
    )
    shapes = ((20, 20), (12, 12)) if dims == 2 else ((12, 20, 60), (4, 12, 52))
    plan = plan_of(*shapes, augment=AugmentConfig(elastic_grid_vox=8), batch=1)
    memory, zarr = PatchSampler([source], plan), PatchSampler([source], plan, budget_bytes=0)
    assert memory.is_resident
    assert not zarr.is_resident
    assert all(equal(memory.batch(step), zarr.batch(step)) for step in range(12))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_weight_map_changes_neither_image_nor_target(volume_url, dims):
    shapes = ((20, 20), (12, 12)) if dims == 2 else ((12, 20, 20), (4, 12, 12))
    plan = plan_of(*shapes, augment=AugmentConfig(elastic_grid_vox=8))
    with_map, without = (
        source_of(volume_url, dims=dims, task="instances", loss={"weight_map": rule})
        for rule in ({"sigma_um": 1.5}, None)
    )
    batch, plain = PatchSampler([with_map], plan).batch(3), PatchSampler([without], plan).batch(3)
    assert equal(batch, plain)
    assert plain.closeness is None
    assert batch.closeness.shape == batch.target.shape
    assert 0 < batch.closeness.max() <= 1
    from_zarr = PatchSampler([with_map], plan, budget_bytes=0).batch(3)
    assert torch.equal(from_zarr.closeness, batch.closeness)


def test_closeness_comes_from_where_the_target_comes_from(volume_url):
    source = source_of(volume_url, task="instances", loss={"weight_map": {"sigma_um": 2.0}})
    whole = source.annotated.closeness(Region.of_shape(source.volume.shape), dims=3)[0]
    batch = PatchSampler([source], plan_of(batch=6)).batch(0)
    for start, close in zip(places(batch, whole.shape), batch.closeness.numpy(), strict=True):
        box = tuple(slice(a, a + n) for a, n in zip(start, close.shape, strict=True))
        np.testing.assert_array_equal(close * LEVELS, whole[box])


def test_closeness_is_turned_with_the_target(tmp_path):
    image, labels = blobs((16, 16), n=6)
    url = write_annotated(str(tmp_path / "a"), image, labels, "yx")
    source = source_of(url, dims=2, task="instances", loss={"weight_map": {"sigma_um": 2.0}})
    everywhere = Region.of_shape(source.volume.shape)
    classes = source.annotated.target(everywhere, dims=2, n_classes=3)[0, 0]
    close = source.annotated.closeness(everywhere, dims=2)[0, 0]
    turned = AugmentConfig(**{**PLAIN.model_dump(), "flip": True, "rotate90": True})
    batch = PatchSampler([source], plan_of((16, 16), (16, 16), augment=turned, batch=8)).batch(0)
    symmetries = [
        lambda a, k=k, flip=flip: np.rot90(a[::-1] if flip else a, k)
        for k in range(4)
        for flip in (False, True)
    ]
    seen = set()
    for target, found in zip(batch.target.numpy(), batch.closeness.numpy(), strict=True):
        fitting = [i for i, s in enumerate(symmetries) if np.array_equal(s(classes), target)]
        assert len(fitting) == 1
        np.testing.assert_array_equal(symmetries[fitting[0]](close), found * LEVELS)
        seen.add(fitting[0])
    assert len(seen) > 2


@pytest.mark.parametrize("dims", [2, 3])
def test_closeness_does_not_depend_on_the_patch(volume_url, dims):
    source = source_of(volume_url, dims=dims, task="instances", loss={"weight_map": {}})
    annotated = source.annotated
    whole = annotated.closeness(Region.of_shape(source.volume.shape), dims=dims)
    rng = np.random.default_rng(0)
    for _ in range(8):
        start = [0, *(int(rng.integers(0, n - 2)) for n in (16, 40, 36))]
        stop = [1, *(int(rng.integers(a + 1, n + 1)) for a, n in zip(start[1:], (16, 40, 36)))]  # noqa: B905
        region = Region(tuple(start), tuple(stop))
        part = annotated.closeness(region, dims=dims)
        np.testing.assert_array_equal(part, whole[region.slices])
    outside = annotated.closeness(Region((0, -2, -3, 30), (1, 9, 9, 40)), dims=dims)
    np.testing.assert_array_equal(outside[:, 2:, 3:, :6], whole[:, :9, :9, 30:])
    assert not outside[:, :2].any()


def test_image_and_target_of_a_patch_come_from_the_same_place(volume_url):
    source = source_of(volume_url, task="semantic", n_classes=13)
    sampler = PatchSampler([source], plan_of(batch=8))
    labels = source.annotated.read_labels(Region.of_shape(source.volume.shape))[0]
    batch = sampler.batch(0)
    for start, target in zip(places(batch, labels.shape), batch.target.numpy(), strict=True):
        box = tuple(slice(a, a + n) for a, n in zip(start, target.shape, strict=True))
        np.testing.assert_array_equal(target, labels[box])


def test_targets_lie_inside_the_region_and_everywhere_in_it(volume_url):
    region = Region((0, 2, 8, 10), (1, 8, 24, 36))
    source = source_of(volume_url, region=region, task="semantic", n_classes=13)
    sampler = PatchSampler([source], plan_of(batch=16))
    starts = [p for step in range(8) for p in places(sampler.batch(step), (16, 40, 36))]
    assert {p[0] for p in starts} == {2, 3, 4}
    assert {p[1] for p in starts} == {8, 9, 10, 11, 12}
    assert min(p[2] for p in starts) == 10
    assert max(p[2] for p in starts) == 24
    assert all((sampler.batch(step).target != IGNORE).all() for step in range(8))


def test_the_image_outside_the_volume_is_mirrored(volume_url):
    corner = Region((0, 0, 0, 0), (1, 4, 12, 12))
    source = source_of(volume_url, region=corner, task="semantic", n_classes=13)
    image = PatchSampler([source], plan_of(batch=1)).batch(0).image[0, 0].numpy()
    whole = source.volume.read(Region.of_shape(source.volume.shape))[0, 0]
    mirrored = np.pad(whole, [(4, 4)] * 3, mode="reflect")[:12, :20, :20]
    np.testing.assert_array_equal(image, mirrored.astype(np.float32))


def test_a_region_smaller_than_the_patch_is_ignored_around(volume_url):
    region = Region((0, 4, 10, 10), (1, 6, 16, 30))
    source = source_of(volume_url, region=region, task="semantic", n_classes=13)
    target = PatchSampler([source], plan_of(batch=6)).batch(0).target
    assert all(int((t != IGNORE).sum()) == 2 * 6 * 12 for t in target)


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
def test_labels_of_the_validation_region_are_never_learned(volume_url, budget_bytes):
    hidden = Region((0, 6, 0, 0), (1, 11, 40, 36))
    source = source_of(volume_url, excluded=hidden, task="semantic", n_classes=13)
    sampler = PatchSampler([source], plan_of(batch=16), budget_bytes=budget_bytes)
    batch = sampler.batch(0)
    for start, target in zip(places(batch, (16, 40, 36)), batch.target, strict=True):
        planes = range(start[0], start[0] + 4)
        assert [bool((t == IGNORE).all()) for t in target] == [6 <= z < 11 for z in planes]
        assert [bool((t == IGNORE).any()) for t in target] == [6 <= z < 11 for z in planes]


@pytest.mark.parametrize("dims", [2, 3])
def test_border_targets_do_not_depend_on_the_patch(volume_url, dims):
    source = source_of(volume_url, dims=dims, task="instances", border_um=3)
    annotated = source.annotated
    whole = annotated.target(Region.of_shape(source.volume.shape), dims=dims, n_classes=3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        start = [0, *(int(rng.integers(0, n - 2)) for n in (16, 40, 36))]
        stop = [1, *(int(rng.integers(a + 1, n + 1)) for a, n in zip(start[1:], (16, 40, 36)))]  # noqa: B905
        region = Region(tuple(start), tuple(stop))
        part = annotated.target(region, dims=dims, n_classes=3)
        np.testing.assert_array_equal(part, whole[region.slices])
    assert set(np.unique(whole)) == {0, 1, 2}


def test_a_2d_network_gets_planes_of_every_depth_and_time(tmp_path):
    image = ramp((3, 5, 24, 24), "uint16")
    url = write_annotated(str(tmp_path / "a"), image, (image % 2).astype("u1"), "tzyx")
    source = source_of(url, dims=2, n_classes=2)
    sampler = PatchSampler([source], plan_of((20, 20), (12, 12), batch=128))
    batch = sampler.batch(0)
    assert batch.image.shape == (128, 1, 20, 20)
    assert batch.target.shape == (128, 12, 12)
    assert batch.image.dtype == torch.float32
    assert batch.target.dtype == torch.int64
    planes = {int(v) // (24 * 24) for v in batch.image[:, 0, 10, 10]}
    assert planes == set(range(15))


def test_channels_are_read_in_the_order_asked_for(tmp_path):
    data = np.stack([np.full((4, 24, 24), v, np.uint8) for v in (10, 20, 30)])
    url = write_annotated(str(tmp_path / "a"), data, np.ones((4, 24, 24), np.uint8), "czyx")
    source = replace(
        source_of(url, dims=2, n_classes=2),
        constants=NormConstants(offset=(0.0, 10.0), scale=(1.0, 2.0)),
    )
    image = PatchSampler([source], plan_of((20, 20), (12, 12), channels=(2, 0))).batch(0).image
    assert image.unique(dim=0)[0, :, 0, 0].tolist() == [30.0, 0.0]


def test_images_are_drawn_by_their_weight(tmp_path):
    sources = []
    for value, size, weight in ((1, 30, 1), (2, 60, 3)):
        image = np.full((1, size, size), value, np.uint8)
        url = write_annotated(str(tmp_path / str(value)), image, image // image, "zyx")
        sources.append(source_of(url, dims=2, n_classes=2, weight=weight))
    batch = PatchSampler(sources, plan_of((20, 20), (12, 12), batch=400)).batch(0)
    share = float((batch.image[:, 0, 0, 0] == 2).float().mean())
    assert share == pytest.approx(0.75, abs=0.07)


def test_patches_without_annotation_are_drawn_again(tmp_path):
    labels = np.full((1, 120, 120), 9, np.uint8)
    labels[0, 40:70, 60:90] = 1
    url = write_annotated(str(tmp_path / "a"), ramp(labels.shape), labels, "zyx")
    source = source_of(url, dims=2, n_classes=2, ignore=9)
    target = PatchSampler([source], plan_of((20, 20), (12, 12), batch=60)).batch(0).target
    # A patch at random would see an annotated voxel with a chance of 14 %; twenty draws with 95 %.
    assert np.mean([bool((t != IGNORE).any()) for t in target]) > 0.85
    labels[:] = 9
    empty = source_of(
        write_annotated(str(tmp_path / "b"), ramp(labels.shape), labels, "zyx"),
        dims=2,
        n_classes=2,
        ignore=9,
    )
    target = PatchSampler([empty], plan_of((20, 20), (12, 12))).batch(0).target
    assert (target == IGNORE).all()


def test_values_that_are_not_finite_are_the_offset_as_when_segmenting(tmp_path):
    image = np.random.default_rng(0).normal(5, 1, (8, 24, 24)).astype(np.float32)
    holes = np.random.default_rng(1).random(image.shape) < 0.1
    constants = NormConstants(offset=(4.5,), scale=(2.0,))
    batches = []
    for name, value in (("a", np.nan), ("b", np.inf), ("c", None)):
        changed = image.copy()
        changed[holes] = constants.offset[0] if value is None else value
        url = write_annotated(str(tmp_path / name), changed, np.ones(image.shape, "u1"), "zyx")
        source = source_of(url, n_classes=2)
        sampler = PatchSampler(
            [replace(source, constants=constants)], plan_of((8, 20, 20), (4, 12, 12))
        )
        batches.append(sampler.batch(0))
    for batch in batches:
        assert torch.isfinite(batch.image).all()
        torch.testing.assert_close(batch.image, batches[2].image, rtol=0, atol=0)


def test_an_error_while_reading_ahead_reaches_the_loop(volume_url, monkeypatch):
    sampler = PatchSampler([source_of(volume_url, task="instances")], plan_of())
    make = sampler.batch

    def failing(step, rank):
        if step == 2:
            raise InputError("planted")
        return make(step, rank)

    monkeypatch.setattr(sampler, "batch", failing)
    stream = sampler.stream(range(9))
    assert [next(stream).step, next(stream).step] == [0, 1]
    with pytest.raises(InputError, match="planted"):
        next(stream)
    assert not [t for t in threading.enumerate() if t.name.startswith("patches")]


def test_labels_that_are_no_classes_are_refused(volume_url):
    source = source_of(volume_url, task="semantic", n_classes=2)
    with pytest.raises(InputError, match=r"labels/cells: the labels hold 2, 3, 4"):
        PatchSampler([source], plan_of())
