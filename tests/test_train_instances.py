"""Training for instances: the rule that makes objects is chosen, and nothing else changes."""

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import run_command
from short_runs import bytes_of, config_of, cut_at, here, journal_loss
from training_data import blobs, write_annotated

from bigseg.annotations import open_annotated
from bigseg.blocks import Region
from bigseg.checkpoint import load_model, read_card
from bigseg.config import NormConstants, TrainConfig
from bigseg.model import UNet
from bigseg.recipe import SourceRecipe, make_recipe
from bigseg.rules import InstanceRule
from bigseg.runs import RunFiles, stored_run
from bigseg.targets import IGNORE
from bigseg.tuning import choose_rule
from bigseg.validation import (
    LEAST_BOX_VOXELS,
    SURROUNDINGS_VOXELS,
    VALIDATION_VOXELS,
    _learnt_boxes,
    _surroundings,
    judged_objects,
)


@pytest.fixture(scope="module")
def cells_url(tmp_path_factory):
    """Discs in 10 planes, some of which touch."""
    folder = tmp_path_factory.mktemp("cells")
    pairs = [blobs((56, 56), seed=seed, n=14) for seed in range(10)]
    image, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    return write_annotated(str(folder / "a.zarr"), image, labels, "zyx")


def objects_config(url, **changes) -> TrainConfig:
    settings = {"task": "instances", "dims": 2, "steps": 6, "val_every": 3, "batch": 1}
    return config_of(url, **(settings | changes))


def test_the_rule_is_judged_with_what_surrounds_the_held_out_region():
    source = SourceRecipe(
        url="a.zarr",
        shape=(1, 90, 60, 50),
        train_start=(0, 0, 0, 0),
        train_stop=(1, 60, 60, 40),
        val_start=(0, 60, 0, 0),
        val_stop=(1, 80, 60, 40),
        constants=NormConstants(offset=(0.0,), scale=(1.0,)),
        n_annotated=1,
    )
    held_out = Region((0, 60, 0, 0), (1, 80, 60, 40))
    assert _surroundings(source, held_out, 3, n_images=1) == Region((0, 0, 0, 0), (1, 80, 60, 40))
    # Planes of a 2-D network do not see each other.
    assert _surroundings(source, held_out, 2, n_images=1) == held_out
    seen = _surroundings(source, held_out, 3, n_images=50)
    assert held_out.n_voxels < seen.n_voxels <= SURROUNDINGS_VOXELS // 50


def source_of(shape, val_start, val_stop) -> SourceRecipe:
    """An image that is learnt but for a box in it."""
    return SourceRecipe(
        url="a.zarr",
        shape=shape,
        train_start=(0, 0, 0, 0),
        train_stop=shape,
        val_start=val_start,
        val_stop=val_stop,
        constants=NormConstants(offset=(0.0,), scale=(1.0,)),
        n_annotated=1,
    )


def test_a_box_that_is_learnt_lies_beside_what_is_held_out():
    within = source_of((1, 400, 400, 400), (0, 80, 80, 70), (1, 320, 330, 310))
    (_, box), *others = _learnt_boxes([within])
    assert not others
    assert not box.intersect(within.val).n_voxels
    assert box.intersect(within.train) == box
    assert VALIDATION_VOXELS // 2 < box.n_voxels <= VALIDATION_VOXELS
    # The largest side is behind it along the last axis.
    assert box.start[3] >= 310
    assert _learnt_boxes([source_of((1, 9, 9, 9), (0, 0, 0, 0), (1, 9, 9, 9))]) == []


@pytest.mark.parametrize("n", [1, 3, 16, 100, 5000])
def test_boxes_of_many_images_are_not_too_small_and_not_too_many(n):
    nowhere = (0, 0, 0, 0)
    found = _learnt_boxes([source_of((1, 1, 600, 700), nowhere, nowhere)] * n)
    n_voxels = sum(box.n_voxels for _, box in found)
    assert min(n * 600 * 700, VALIDATION_VOXELS) / 2 < n_voxels <= VALIDATION_VOXELS
    assert all(box.n_voxels > LEAST_BOX_VOXELS / 2 for _, box in found)


@pytest.mark.parametrize(
    ("shape", "dims", "settings"),
    [
        ((12, 30, 26), 3, {}),
        ((12, 30, 26), 2, {}),
        ((12, 30, 26), 3, {"val_region": "0:12,10:20,0:26"}),
        ((12, 30, 26), 3, {"region": "0:12,0:30,0:20", "val_region": "6:11,4:20,5:26"}),
        ((30, 26), 2, {}),
        ((30, 26), 2, {"val_images": 1}),
        ((12, 30, 26), 3, {"val_images": 1}),
    ],
)
def test_the_rule_is_judged_by_all_that_is_annotated(tmp_path, shape, dims, settings):
    urls = []
    for seed in (1, 2):
        image, labels = blobs(shape, seed=seed, n=20)
        urls.append(
            write_annotated(str(tmp_path / f"{seed}.zarr"), image, labels, "zyx"[-len(shape) :])
        )
    settings = dict(settings)
    n_val = settings.pop("val_images", 0)
    config = objects_config(
        urls[0],
        images=urls[n_val:],
        val_images=urls[:n_val],
        dims=dims,
        patch=(12,) * dims,
        **settings,
    )
    recipe = make_recipe(config, device="cpu")
    parts = judged_objects(UNet(recipe.card.spec), recipe, device=torch.device("cpu"))
    true = {"held out": Counter(), "learnt": Counter()}
    found = {"held out": Counter(), "learnt": Counter()}
    for source in recipe.sources:
        labels = recipe.open(source).read_labels(Region.of_shape(source.shape))
        learnt = np.zeros(labels.shape, bool)
        learnt[source.train.slices] = True
        learnt[source.val.slices] = False
        true["held out"].update(labels[source.val.slices].ravel().tolist())
        true["learnt"].update(labels[learnt].tolist())
    for part in parts:
        counted = np.zeros(part.probabilities.shape[1:], int)
        for kind, objects in (("held out", part.objects), ("learnt", part.learnt)):
            if objects is not None:
                counted += objects != IGNORE
                found[kind].update((objects[objects != IGNORE] > 0).tolist())
        assert counted.max() == 1
    for kind, values in true.items():
        n_objects = sum(n for value, n in values.items() if value)
        assert found[kind] == {True: n_objects, False: values[0]}, kind


def test_training_ends_with_the_rule_that_makes_the_best_objects(cells_url, tmp_path):
    config = objects_config(cells_url, steps=60, val_every=30, batch=4)
    result = here(config, tmp_path / "run")
    net, card = load_model(result.model_url)
    recipe = stored_run(config, str(tmp_path / "run"))
    parts = judged_objects(net, recipe, device=torch.device("cpu"))
    rule, score = choose_rule(parts)
    assert (card.instances, card.trained["instances"]) == (rule, score.as_dict())
    for n, region in (
        (score.n_objects, recipe.sources[0].val),
        (score.n_learnt, recipe.sources[0].train),
    ):
        labels = open_annotated(cells_url, config).read_labels(region)
        assert n == sum(len(np.unique(plane)) - 1 for plane in labels[0])
    assert score.score > 0.5
    assert result.instances == (
        f"objects: threshold {rule.threshold:g}, erode {rule.erode}, grow {rule.grow}, foreground "
        f"{rule.foreground:g}, seeds of at least {rule.min_size} voxels; chosen on "
        f"{score.n_objects} held-out and {score.n_learnt} learnt objects; mean AP of the held-out "
        f"ones {score.average_precision:.4f}, Rand error {score.rand_error:.4f}"
    )
    # The same network without its rule: nothing but the card differs.
    best, before = load_model(RunFiles(str(tmp_path / "run")).best)
    assert before.instances == InstanceRule()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), best.parameters(), strict=True))


@pytest.mark.parametrize("loss", [{}, {"weight_map": {"sigma_um": 2.0}}])
def test_a_run_for_instances_that_was_cut_off_ends_in_the_same_bytes(cells_url, tmp_path, loss):
    config = objects_config(cells_url, loss=loss)
    here(config, tmp_path / "a")
    # At the end there is a state and a best model, and no rule yet.
    for step in (4, 6):
        cut_at(config, tmp_path / "b", step)
    here(config, tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_weight_map_changes_the_loss_and_one_that_weighs_nothing_does_not(cells_url, tmp_path):
    losses = []
    for name, rule in (("a", None), ("b", {}), ("c", {"w0": 1e-6}), ("d", {"where": "gaps"})):
        config = objects_config(cells_url, steps=1, loss={"weight_map": rule})
        losses.append(journal_loss(here(config, tmp_path / name)))
    plain, mapped, hardly, in_gaps = losses
    assert abs(mapped - plain) > 1e-3
    assert abs(in_gaps - mapped) > 1e-3
    assert hardly == pytest.approx(plain, rel=1e-5)


def test_too_few_held_out_objects_leave_the_default_rule(tmp_path, caplog):
    image, labels = blobs((6, 48, 48), n=30)
    labels[5] = 0
    labels[5, 4:10, 4:10] = 5
    url = write_annotated(str(tmp_path / "a.zarr"), image, labels, "zyx")
    result = here(objects_config(url, steps=2, val_every=2), tmp_path / "run")
    card = read_card(result.model_url)
    assert card.instances == InstanceRule()
    assert "instances" not in card.trained
    assert "the validation regions hold fewer than 3 objects, too few to choose a rule" in (
        caplog.text
    )
    assert result.instances.endswith(
        "foreground 0.5, seeds of at least 1 voxels (the defaults: too few objects to choose by)"
    )


def test_images_of_many_sizes_train_and_whole_ones_validate(tmp_path):
    urls = []
    for seed, shape in enumerate([(48, 40), (12, 14), (90, 33), (26, 28), (15, 70)]):
        image, labels = blobs(shape, seed=seed, n=10)
        urls.append(write_annotated(str(tmp_path / f"{seed}.zarr"), image, labels, "yx"))
    config = tmp_path / "config.yaml"
    config.write_text("net: {depth: 1, width: 4}\npatch: [20, 20]\nbatch: 2\nprecision: fp32\n")
    out = tmp_path / "run"
    code, said = run_command(
        *("train", *urls[:3], "--val-image", urls[3], "--val-image", urls[4], "--labels", "cells"),
        *("--task", "instances", "--steps", 3, "-c", config, "--out", out),
        *("--executor", "serial"),
    )
    assert code == 0, said
    assert "3 steps in" in said
    assert "objects: threshold " in said
    card = read_card(str(out / "model.safetensors"))
    assert card.trained["images"] == ["0.zarr", "1.zarr", "2.zarr"]
    assert card.trained["val_images"] == ["3.zarr", "4.zarr"]
    truth = [blobs(shape, seed=seed, n=10)[1] for seed, shape in ((3, (26, 28)), (4, (15, 70)))]
    n_objects = sum(len(np.unique(labels)) - 1 for labels in truth)
    assert card.trained["instances"]["n_objects"] == n_objects
