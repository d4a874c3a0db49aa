"""The choices that bigseg makes for a training run, and the contradictions that it names."""

import numpy as np
import pytest
import torch
from training_data import blobs, write_annotated
from zarr_images import ramp

from bigseg.blocks import Region
from bigseg.config import NormRule, TrainConfig
from bigseg.errors import ConfigError, InputError
from bigseg.model import footprint
from bigseg.recipe import Recipe, differences, make_recipe
from bigseg.rules import InstanceRule


@pytest.fixture
def image_at(tmp_path):
    """Writes an image with two classes and gives its location."""
    written = []

    def make(shape, axes="zyx", *, scale=None, labels=None):
        image = ramp(shape, "uint8")
        labels = image % 2 if labels is None else labels
        url = str(tmp_path / f"{len(written)}.zarr")
        written.append(url)
        return write_annotated(url, image, labels, axes, scale=scale)

    return make


def recipe_of(*urls, **settings):
    return make_recipe(TrainConfig(images=urls, labels="cells", **settings), device="cpu")


@pytest.mark.parametrize(
    ("shape", "axes", "scale", "dims"),
    [
        ((40, 64, 64), "zyx", (1, 1, 1), 3),
        ((40, 64, 64), "zyx", (2.9, 1, 1), 3),
        ((40, 64, 64), "zyx", (3, 1, 1), 2),
        ((31, 64, 64), "zyx", (1, 1, 1), 2),
        ((64, 64), "yx", (1, 1), 2),
        ((40, 64, 64), "tyx", (1, 1, 1), 2),
    ],
)
def test_a_network_is_3d_where_the_volume_is(image_at, shape, axes, scale, dims):
    recipe = recipe_of(image_at(shape, axes, scale=scale))
    assert recipe.config.dims == recipe.card.spec.dims == dims
    assert len(recipe.card.voxel_um) == dims
    widths = (32, 64, 128, 256, 512) if dims == 2 else (16, 32, 64, 128)
    assert recipe.card.spec.widths == widths
    assert recipe.config.batch == (4 if dims == 2 else 1)


@pytest.mark.parametrize(("n_values", "is_said"), [(20, False), (21, True)])
def test_labels_that_look_like_numbered_objects_are_mentioned(image_at, caplog, n_values, is_said):
    labels = ramp((1, 60, 60), "uint8") % n_values
    recipe_of(image_at(labels.shape, labels=labels))
    assert ("--task instances" in caplog.text) == is_said
    caplog.clear()
    names = tuple(f"tissue {i}" for i in range(n_values))
    recipe_of(image_at(labels.shape, labels=labels), classes=names)
    assert not caplog.text


def test_the_default_patches(image_at):
    plane = recipe_of(image_at((1, 400, 400)))
    assert plane.frame.target_shape == (196, 196)
    assert plane.frame.image_shape == (380, 380)
    cube = recipe_of(image_at((60, 70, 70)))
    assert cube.frame.target_shape == (44, 44, 44)
    assert cube.frame.image_shape == (132, 132, 132)


def test_a_patch_is_hardly_larger_than_the_region(image_at):
    recipe = recipe_of(image_at((6, 50, 70)))
    patch = recipe.config.patch
    assert all(n <= p < n + 16 for n, p in zip((50, 70), patch, strict=True))
    assert footprint(recipe.card.spec).fits(patch)


def test_voxels_that_are_longer_in_z_are_fewer_and_pooled_later(image_at):
    recipe = recipe_of(image_at((40, 80, 80), scale=(2.5, 1, 1)))
    assert recipe.card.spec.kernels[0] == (1, 3, 3)
    assert recipe.card.spec.strides[0] == (1, 2, 2)
    assert recipe.config.patch[0] < 30 <= 44 <= recipe.config.patch[1]
    assert recipe.frame.voxel_size == (2.5, 1.0, 1.0)
    plain = recipe_of(image_at((40, 80, 80), scale=(2.5, 1, 1)), net={"anisotropic": False})
    assert set(plain.card.spec.kernels) == {(3, 3, 3)}


def test_a_padded_network_computes_all_that_it_reads(image_at):
    recipe = recipe_of(image_at((6, 50, 300)), net={"padding": "same"})
    assert recipe.frame.image_shape == recipe.frame.target_shape == (64, 256)


def test_what_the_user_says_is_kept(image_at):
    recipe = recipe_of(
        image_at((6, 60, 60)),
        net={"depth": 1, "width": 3},
        patch=(20, 24),
        batch=3,
        val_every=7,
        classes=("membrane", "cell"),
        precision="bf16",
        norm={"kind": "fixed", "offset": 4, "scale": 2},
    )
    assert recipe.config.patch == (20, 24)
    assert recipe.card.spec.widths == (3, 6)
    assert (recipe.config.batch, recipe.config.val_every) == (3, 7)
    assert recipe.card.classes == ("membrane", "cell")
    assert recipe.config.precision == "bf16"
    assert recipe.sources[0].constants.offset == (4.0,)


def test_steps_between_validations(image_at):
    url = image_at((6, 60, 60))
    every = [recipe_of(url, steps=n).config.val_every for n in (20, 300, 5000)]
    assert every == [20, 50, 500]


def test_a_recipe_comes_back_from_json(image_at):
    recipe = recipe_of(image_at((6, 60, 60)), loss={"balance": True})
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


def test_classes_come_from_the_labels(image_at):
    labels = ramp((6, 60, 60), "uint8") % 4
    assert recipe_of(image_at((6, 60, 60), labels=labels)).card.classes == (
        "background",
        "class 1",
        "class 2",
        "class 3",
    )
    assert recipe_of(image_at((6, 60, 60))).card.classes == ("background", "foreground")
    _, cells = blobs((6, 60, 60))
    objects = recipe_of(image_at((6, 60, 60), labels=cells), task="instances")
    assert objects.card.classes == ("background", "inside", "border")


def test_balanced_weights_are_those_of_the_voxels_to_learn_from(image_at):
    labels = np.zeros((10, 60, 60), np.uint8)
    labels[:8, :6] = 1
    labels[8:] = 1
    url = image_at(labels.shape, labels=labels)
    assert recipe_of(url).class_weights is None
    weights = recipe_of(url, loss={"balance": True}).class_weights
    assert weights[1] / weights[0] == pytest.approx(3.0)
    overlapping = recipe_of(url, loss={"balance": True}, val_region="8:10,:,:").class_weights
    assert overlapping == weights


def test_annotated_voxels_weigh_the_images(image_at):
    labels = ramp((10, 60, 60), "uint8") % 2
    labels[:, 30:] = 9
    recipe = recipe_of(image_at((10, 60, 60)), image_at((10, 60, 60), labels=labels), ignore=9)
    assert [s.n_annotated for s in recipe.sources] == [8 * 60 * 60, 8 * 30 * 60]


def test_images_that_are_validated_on_whole_are_learned_nowhere(image_at):
    learned, held = [image_at((6, 60, 70)), image_at((50, 60), "yx")], image_at((6, 40, 30))
    recipe = recipe_of(*learned, val_images=(held,), patch=(68, 68), dims=2)
    assert [s.url for s in recipe.sources] == [*learned, held]
    of_a_folder = recipe_of(held, *learned, val_images=(held,), patch=(68, 68), dims=2)
    assert of_a_folder.sources == recipe.sources
    assert [s.train.shape for s in recipe.sources] == [(1, 6, 60, 70), (1, 1, 50, 60), (0,) * 4]
    assert [(s.url, part) for s, part in recipe.validated] == [
        (held, Region((0, 0, 0, 0), (1, 6, 40, 30)))
    ]
    assert [s.n_annotated for s in recipe.sources] == [6 * 60 * 70, 50 * 60, 0]
    only = [s.constants for s in recipe.sources[:2]]
    assert recipe.card.norm_constants.n_voxels == sum(c.n_voxels for c in only)
    # Its image is smaller than the patch; nothing of the held out one is among the voxels.
    batch = recipe.sampler(torch.device("cpu")).batch(0)
    assert batch.target.shape[1:] == (68, 68)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_region": "4:6,:,:"}, r"val_region: 4:6,:,: together with 1 val_images, which are"),
        ({"val_images": None}, r"val_images: they hold .*0\.zarr and all other images, which leav"),
    ],
)
def test_what_is_validated_on_is_said_once_and_not_learned(image_at, settings, message):
    url, other = image_at((6, 60, 60)), image_at((6, 60, 60))
    chosen = {"val_images": (other,), **settings}
    with pytest.raises(ConfigError, match=message):
        recipe_of(url, **{**chosen, "val_images": chosen["val_images"] or (url,)})


def test_held_out_images_without_annotation_are_refused(image_at):
    labels = np.full((6, 60, 60), 9, np.uint8)
    held = image_at((6, 60, 60), labels=labels)
    with pytest.raises(InputError, match="no voxel of the val_images is annotated in 'cells'"):
        recipe_of(image_at((6, 60, 60)), val_images=(held,), ignore=9)


def test_a_weight_map_needs_objects(image_at):
    with pytest.raises(
        ConfigError, match=r"loss\.weight_map with task: semantic, whose labels are"
    ):
        recipe_of(image_at((6, 60, 60)), loss={"weight_map": {}})


def test_a_model_of_instances_has_a_rule_from_the_start(image_at):
    _, cells = blobs((6, 60, 60))
    assert recipe_of(image_at((6, 60, 60), labels=cells), task="instances").card.instances == (
        InstanceRule()
    )
    assert recipe_of(image_at((6, 60, 60))).card.instances is None


def test_the_card_holds_the_middle_of_the_normalisations(image_at):
    urls = [image_at((6, 60, 60)) for _ in range(3)]
    recipe = recipe_of(*urls, norm={"kind": "percentile", "low": 5, "high": 95})
    assert recipe.card.norm == NormRule(low=5, high=95)
    assert recipe.card.norm_constants.offset == recipe.sources[0].constants.offset


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": 3, "patch": (20, 20)}, r"patch: \[20, 20\] for a 3-D network, which needs 3 num"),
        ({"dims": 2, "patch": (197, 196)}, r"the next that fits is \[212, 196\]"),
        (
            {"dims": 2, "patch": (50, 64), "net": {"padding": "same"}},
            r"the next that fits is \[64, 64\]",
        ),
        ({"classes": ("one",)}, r"classes: 1 names for labels with values up to 1: give 2 names"),
        (
            {"task": "instances", "classes": ("a", "b", "c")},
            r"classes: \['a', 'b', 'c'\] with task: instances, whose classes are background",
        ),
    ],
)
def test_contradictions_are_named(image_at, settings, message):
    with pytest.raises(ConfigError, match=message):
        recipe_of(image_at((40, 60, 60)), **settings)


def test_a_plane_has_no_3d_network(image_at):
    with pytest.raises(ConfigError, match=r"dims: 3, but .* has no z axis: use dims: 2"):
        recipe_of(image_at((60, 60), "yx"), dims=3)


def test_images_of_other_voxel_sizes_are_refused(image_at):
    first = image_at((6, 60, 60), scale=(1, 1, 1))
    recipe_of(first, image_at((6, 50, 60), scale=(1.09, 1, 1)))
    other = image_at((6, 60, 60), scale=(1.2, 1, 1))
    with pytest.raises(InputError, match=r"has voxels of 1.2 × 1 × 1 µm \(z, y, x\), .* of 1 × 1"):
        recipe_of(first, other)


def test_labels_of_one_value_are_refused(image_at):
    url = image_at((6, 60, 60), labels=np.ones((6, 60, 60), np.uint8))
    with pytest.raises(InputError, match="hold only the value 1 in the training region"):
        recipe_of(url)
    with pytest.raises(InputError, match="hold no object in the training region"):
        recipe_of(image_at((6, 60, 60), labels=np.zeros((6, 60, 60), np.uint8)), task="instances")


def test_regions_without_annotation_are_refused(image_at):
    labels = ramp((10, 60, 60), "uint8") % 2
    labels[8:] = 9
    with pytest.raises(InputError, match=r"no voxel of the middle of val_region .* is annotated"):
        recipe_of(image_at((10, 60, 60), labels=labels), ignore=9)
    labels[:] = 9
    labels[8:, ::2] = 1
    with pytest.raises(InputError, match=r"no voxel of region .* is annotated in 'cells'"):
        recipe_of(image_at((10, 60, 60), labels=labels), ignore=9)


def test_differences_name_what_was_asked_otherwise(image_at):
    url = image_at((6, 60, 60))
    asked = TrainConfig(images=(url,), labels="cells")
    recipe = make_recipe(asked, device="cpu")
    assert differences(recipe, asked) == []
    assert differences(recipe, recipe.config) == []
    other = asked.model_copy(update={"steps": 7, "net": asked.net.model_copy(update={"width": 5})})
    assert differences(recipe, other) == ["net.width: 5, not 32", "steps: 7, not 1000"]


def test_an_image_that_changed_its_extent_is_refused(image_at, tmp_path):
    recipe = recipe_of(image_at((6, 60, 60)))
    other = recipe.sources[0].model_copy(update={"shape": (1, 6, 60, 64)})
    with pytest.raises(InputError, match=r"has \(1, 6, 60, 60\) voxels .* had \(1, 6, 60, 64\)"):
        recipe.open(other)
