"""Laws of training in one process: it can be cut off anywhere, and ends in the same bytes."""

import logging
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from short_runs import bytes_of, config_of, cut_at, here, journal, journal_loss
from training_data import blobs, write_annotated

from bigseg.blocks import Region
from bigseg.checkpoint import load_model, read_card
from bigseg.config import TrainConfig, load_train_config
from bigseg.errors import ConfigError, InputError, OutputError
from bigseg.predict import read_mirrored
from bigseg.predictor import Encoding
from bigseg.recipe import make_recipe
from bigseg.runs import RunFiles, open_run
from bigseg.statistics import normalise
from bigseg.training import Runtime, learning_rate, run
from bigseg.validation import (
    _in_255ths,
    validate,
)


@pytest.fixture(scope="module")
def image_url(tmp_path_factory):
    image, labels = blobs((6, 48, 48), n=30)
    url = str(tmp_path_factory.mktemp("train") / "a.zarr")
    return write_annotated(url, image, (labels > 0).astype(np.uint8), "zyx")


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


def test_bf16_trains_too(image_url, tmp_path):
    config = config_of(image_url, steps=2, precision="bf16", batch=1)
    assert np.isfinite(journal_loss(here(config, tmp_path)))


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
