"""Laws of training in one process: it can be cut off anywhere, and ends in the same bytes."""

import json
import logging
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_command
from training_data import blobs, write_annotated

from bigseg.annotations import open_annotated
from bigseg.blocks import Region
from bigseg.checkpoint import load_model, read_card
from bigseg.config import NormConstants, TrainConfig, load_train_config
from bigseg.errors import ConfigError, InputError, OutputError
from bigseg.predict import read_mirrored
from bigseg.predictor import Encoding
from bigseg.recipe import SourceRecipe, make_recipe
from bigseg.rules import InstanceRule
from bigseg.runs import RunFiles, open_run, stored_run
from bigseg.statistics import normalise
from bigseg.train_ddp import train
from bigseg.training import Runtime, learning_rate, run
from bigseg.tuning import choose_rule
from bigseg.validation import (
    SURROUNDINGS_VOXELS,
    _in_255ths,
    _surroundings,
    judged_objects,
    validate,
)

MILD = {"elastic_vox": 1.0, "elastic_grid_vox": 8.0, "scale": 0.05}


class Cut(Exception):
    """What stops a run in these tests."""


@pytest.fixture(scope="module")
def image_url(tmp_path_factory):
    image, labels = blobs((6, 48, 48), n=30)
    url = str(tmp_path_factory.mktemp("train") / "a.zarr")
    return write_annotated(url, image, (labels > 0).astype(np.uint8), "zyx")


def config_of(url, **changes) -> TrainConfig:
    settings = {
        "images": (url,),
        "labels": "cells",
        "steps": 24,
        "val_every": 8,
        "batch": 2,
        "patch": (20, 20),
        "net": {"depth": 1, "width": 4},
        "optim": {"lr": 0.01, "warmup_steps": 4},
        "augment": MILD,
        "precision": "fp32",
    }
    return TrainConfig(**(settings | changes))


def here(config, out, **options):
    return train(config, str(out), executor="serial", **options)


def cut_at(config, out, step, **options):
    def after(rank, done):
        if done == step:
            raise Cut

    with pytest.raises(Cut):
        here(config, out, after_step=after, **options)


def bytes_of(out) -> bytes:
    return (out / "model.safetensors").read_bytes()


def journal(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(image_url, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "run"
    return here(config_of(image_url), out), out


@pytest.mark.parametrize("cuts", [(1,), (8,), (13,), (9, 23), (24,), (12, 12)])
def test_a_run_that_was_cut_off_ends_in_the_same_bytes(image_url, undisturbed, tmp_path, cuts):
    config = config_of(image_url)
    for step in cuts:
        cut_at(config, tmp_path, step)
    result = here(config, tmp_path)
    assert result.first_step == cuts[-1] // 8 * 8
    assert bytes_of(tmp_path) == bytes_of(undisturbed[1])
    timeless = [
        [{k: v for k, v in line.items() if k not in ("seconds", "patches_per_s")} for line in lines]
        for lines in (journal(tmp_path), journal(undisturbed[1]))
    ]
    assert timeless[0] == timeless[1]


def test_a_torn_state_is_skipped_for_the_one_before_it(image_url, undisturbed, tmp_path, caplog):
    config = config_of(image_url)
    cut_at(config, tmp_path, 17)
    newest = Path(max(RunFiles(str(tmp_path)).states, key=lambda p: Path(p).stat().st_mtime_ns))
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        result = here(config, tmp_path)
    assert result.first_step == 8
    assert "a training state is skipped, the one before it is used" in caplog.text
    assert bytes_of(tmp_path) == bytes_of(undisturbed[1])


def test_a_finished_run_returns_at_once(image_url, undisturbed, caplog):
    result, out = undisturbed
    written = (out / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        again = here(config_of(image_url), out)
    assert (again.first_step, again.steps) == (24, 24)
    assert again.best_score == result.best_score
    assert "is finished: 24 steps" in caplog.text
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_the_resolved_settings_continue_the_run(undisturbed):
    resolved = load_train_config(undisturbed[1] / "config.yaml", {})
    assert here(resolved, undisturbed[1]).first_step == 24


def test_another_configuration_is_refused_and_named(image_url, undisturbed):
    other = config_of(image_url, steps=25, net={"depth": 1, "width": 5})
    with pytest.raises(ConfigError) as caught:
        here(other, undisturbed[1])
    assert "holds a run with other settings (net.width: 5, not 4; steps: 25, not 24)" in str(
        caught.value
    )
    assert "--overwrite" in str(caught.value)


def test_overwriting_begins_anew(image_url, undisturbed, tmp_path):
    cut_at(config_of(image_url, steps=30), tmp_path, 20)
    result = here(config_of(image_url), tmp_path, overwrite=True)
    assert result.first_step == 0
    assert bytes_of(tmp_path) == bytes_of(undisturbed[1])
    # The same settings again: the states there are, are not taken up.
    cut_at(config_of(image_url), tmp_path, 4, overwrite=True)
    assert bytes_of(tmp_path) == b""
    assert here(config_of(image_url), tmp_path).first_step == 0


def test_overwriting_with_settings_that_are_wrong_leaves_the_run(image_url, undisturbed):
    before = bytes_of(undisturbed[1])
    with pytest.raises(ConfigError, match="time: 3 is not in"):
        here(config_of(image_url, time=3), undisturbed[1], overwrite=True)
    assert bytes_of(undisturbed[1]) == before


def test_a_model_of_no_run_is_not_replaced(image_url, undisturbed, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes_of(undisturbed[1]))
    with pytest.raises(OutputError, match="holds a model but not the run that made it"):
        here(config_of(image_url), tmp_path)
    other = tmp_path / "other"
    open_run(config_of(image_url, steps=9), str(other), device="cpu")
    (other / "model.safetensors").write_bytes(bytes_of(undisturbed[1]))
    with pytest.raises(OutputError, match="was not made by the run in"):
        here(config_of(image_url, steps=9), other)


def test_a_damaged_recipe_is_refused(image_url, tmp_path):
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json is damaged: use --overwrite"):
        here(config_of(image_url), tmp_path)


def test_the_best_model_is_kept_and_says_what_it_is(undisturbed):
    result, out = undisturbed
    scores = {line["step"]: line["val_dice"] for line in journal(out) if "val_dice" in line}
    assert sorted(scores) == [8, 16, 24]
    card = read_card(result.model_url)
    assert scores[result.best_step] == result.best_score == max(scores.values())
    assert (card.trained["step"], card.trained["steps"]) == (result.best_step, 24)
    assert card.trained["images"] == ["a.zarr"]
    assert card.voxel_um == (1.0, 1.0)
    assert card.norm_constants is not None


def test_the_journal_tells_loss_rate_and_pace(undisturbed):
    lines = [line for line in journal(undisturbed[1]) if "loss" in line]
    assert [line["step"] for line in lines] == [8, 16, 20, 24]
    assert all(line["patches_per_s"] > 0 and line["lr"] > 0 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_it_learns(image_url, tmp_path):
    result = here(config_of(image_url, steps=120, val_every=60, batch=4), tmp_path)
    assert result.best_score > 0.9


def test_validation_is_that_of_the_whole_region(image_url, undisturbed):
    """Against a network that computes the held-out plane in one piece, and counts by hand."""
    recipe = make_recipe(config_of(image_url), device="cpu")
    net, _ = load_model(undisturbed[0].model_url)
    found = validate(net, recipe, device=torch.device("cpu"))
    source = recipe.sources[0]
    annotated = recipe.open(source)
    # 50 is the next size that the network computes; its halo is 8.
    region = Region((0, *source.val.start[1:]), source.val.stop).grow((0, 0, 8, 8), (0, 0, 10, 10))
    data = normalise(read_mirrored(annotated.image, region, (0,)), source.constants)[0, 0]
    with torch.inference_mode():
        whole = net(torch.from_numpy(data)[:, None]).softmax(1).numpy()[:, :, :48, :48]
    truth = annotated.target(source.val, dims=2, n_classes=2)[0]
    classes = whole.argmax(1)
    dice = [
        2 * ((classes == c) & (truth == c)).sum() / ((classes == c).sum() + (truth == c).sum())
        for c in (0, 1)
    ]
    assert found.score == pytest.approx(np.mean(dice))
    picked = np.take_along_axis(whole, truth[:, None].astype(int), axis=1)
    assert found.loss == pytest.approx(-np.log(picked).mean(), rel=1e-4)


def test_probabilities_are_judged_as_segmenting_keeps_them():
    probabilities = np.random.default_rng(0).random((3, 2, 4, 6, 7), np.float32)
    kept = Encoding("probabilities", np.dtype(np.uint8))(probabilities)
    np.testing.assert_array_equal(_in_255ths(probabilities), kept)


def test_training_that_diverges_is_stopped_and_says_so(image_url, tmp_path):
    config = config_of(image_url, optim={"lr": 1e37, "warmup_steps": 0})
    with pytest.raises(InputError, match=r"the loss is nan at step 8, so the training diverged"):
        here(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_the_rate_warms_up_and_falls_to_nothing():
    config = TrainConfig(images=("a",), labels="b", steps=1000)
    rates = [learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 50)
    assert rates[49] == rates[50] == pytest.approx(1e-3)
    assert rates.index(max(rates)) in (49, 50)
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert 0 < rates[-1] < 1e-8
    short = config.model_copy(update={"steps": 10})
    assert learning_rate(short, 4) == pytest.approx(1e-3)


def test_the_callers_random_numbers_are_left_alone(image_url, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    here(config_of(image_url, steps=2), tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_runs_of_other_seeds_differ(image_url, undisturbed, tmp_path):
    here(config_of(image_url, seed=1), tmp_path)
    assert bytes_of(tmp_path) != bytes_of(undisturbed[1])


def test_progress_counts_the_steps_that_are_left(image_url, tmp_path):
    seen = []

    class Recorder:
        @contextmanager
        def task(self, label, *, total, unit, done=0):
            seen.append([label, total, unit, done, 0])
            yield self

        def advance(self, n=1, *, voxels=0):
            seen[-1][-1] += n

    config = config_of(image_url)
    cut_at(config, tmp_path, 10, progress=Recorder())
    here(config, tmp_path, progress=Recorder())
    assert seen == [["train", 24, "steps", 0, 10], ["train", 24, "steps", 8, 16]]


def test_a_place_that_cannot_be_written_is_refused(image_url, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be the folder of a run"):
        here(config_of(image_url), tmp_path / "file" / "run")


def test_several_workers_need_ray(image_url, tmp_path):
    with pytest.raises(ConfigError, match="workers: 2 with the serial executor, which has one"):
        here(config_of(image_url, workers=2), tmp_path)


def test_a_run_can_lie_on_any_store(image_url, undisturbed):
    url = "memory://runs/one"
    result = here(config_of(image_url), url)
    assert result.model_url == "memory://runs/one/model.safetensors"
    assert read_card(result.model_url) == read_card(undisturbed[0].model_url)


def test_borders_in_3d_with_padding_balance_time_and_two_images(tmp_path):
    urls = []
    for seed in (0, 1):
        image, labels = blobs((2, 10, 24, 26), seed=seed, n=20)
        urls.append(write_annotated(str(tmp_path / str(seed)), image, labels, "tzyx"))
    config = config_of(
        urls[0],
        images=tuple(urls),
        task="instances",
        dims=3,
        patch=(8, 12, 12),
        batch=1,
        steps=6,
        val_every=3,
        net={"depth": 1, "width": 3, "padding": "same"},
        loss={"balance": True, "weight_map": {"sigma_um": 2.0}},
    )
    out = tmp_path / "run"
    cut_at(config, out, 4)
    result = here(config, out)
    net, card = load_model(result.model_url)
    assert net.spec.padding == "same"
    assert card.classes == ("background", "inside", "border")
    assert set(journal(out)[-1]["val_dice_of"]) == set(card.classes)


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


def test_training_ends_with_the_rule_that_makes_the_best_objects(cells_url, tmp_path):
    config = objects_config(cells_url, steps=60, val_every=30, batch=4)
    result = here(config, tmp_path / "run")
    net, card = load_model(result.model_url)
    recipe = stored_run(config, str(tmp_path / "run"))
    parts = judged_objects(net, recipe, device=torch.device("cpu"))
    rule, score = choose_rule(parts)
    assert (card.instances, card.trained["instances"]) == (rule, score.as_dict())
    labels = open_annotated(cells_url, config).read_labels(recipe.sources[0].val)
    assert score.n_objects == sum(len(np.unique(plane)) - 1 for plane in labels[0])
    assert score.score > 0.5
    assert result.instances == (
        f"objects: threshold {rule.threshold:g}, erode {rule.erode}, grow {rule.grow}, foreground "
        f"{rule.foreground:g}, seeds of at least {rule.min_size} voxels; on {score.n_objects} "
        f"held-out objects mean AP {score.average_precision:.4f}, adapted Rand error "
        f"{score.rand_error:.4f}"
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
    for name, rule in (("a", None), ("b", {}), ("c", {"w0": 1e-6})):
        config = objects_config(cells_url, steps=1, loss={"weight_map": rule})
        losses.append(journal_loss(here(config, tmp_path / name)))
    plain, mapped, hardly = losses
    assert abs(mapped - plain) > 1e-3
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


def test_bf16_trains_too(image_url, tmp_path):
    config = config_of(image_url, steps=2, precision="bf16", batch=1)
    assert np.isfinite(journal_loss(here(config, tmp_path)))


def journal_loss(result) -> float:
    with open(result.metrics_url, encoding="utf-8") as lines:
        return json.loads(lines.readline())["loss"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dims", [2, 3])
def test_a_gpu_trains_and_goes_on(image_url, tmp_path, dims):
    patch = (20, 20) if dims == 2 else (4, 20, 20)
    config = config_of(image_url, precision="auto", dims=dims, patch=patch, steps=60, val_every=20)
    cut_at(config, tmp_path, 30)
    result = here(config, tmp_path)
    assert (result.first_step, result.steps) == (20, 60)
    assert result.best_score > 0.6


def test_the_loop_runs_without_the_launcher(image_url, tmp_path):
    """`run` is the function for other launchers: it needs a recipe, a place and a device."""
    recipe = open_run(config_of(image_url, steps=3), str(tmp_path), device="cpu")
    seen = []
    first = run(recipe, str(tmp_path), Runtime(torch.device("cpu")), after_step=seen.append)
    assert (first, seen) == (0, [1, 2, 3])
    assert read_card(str(tmp_path / "model.safetensors")).trained["steps"] == 3
