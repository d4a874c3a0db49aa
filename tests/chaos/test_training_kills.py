"""Training goes on from its last good state, whatever is killed: same curve, same weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_data import blobs, write_annotated

from bigseg.checkpoint import load_model
from bigseg.engine import available_cpus
from chaos.faults import ALWAYS, Fault, wait_until
from chaos.scene import Running, here

STEPS, SAVED_EVERY = 24, 8
SETTINGS = f"net: {{depth: 1, width: 4}}\npatch: [20, 20]\nbatch: 1\nval_every: {SAVED_EVERY}\n"
STEP_BY_STEP = Fault("before-step", "sleep", value=0.05, times=ALWAYS)


class School:
    """An annotated image and the command that learns from it."""

    def __init__(self, root, faults):
        self.root, self.faults, self.out = root, faults, root / "run"
        image, labels = blobs((6, 48, 48), n=30)
        write_annotated(str(root / "a.zarr"), image, (labels > 0).astype(np.uint8), "zyx")
        (root / "config.yaml").write_text(SETTINGS)
        self.running = None

    def words(self, *options):
        words = ["train", self.root / "a.zarr", "--labels", "cells", "--out", self.out]
        words += ["-c", self.root / "config.yaml", "--dims", 2, "--steps", STEPS, *options]
        return [str(word) for word in words]

    def start(self, words):
        self.running = Running(words, self.faults.environment(), self.root / "said")
        return self.running

    def lines(self):
        """The journal without what says how long it took."""
        texts = (self.out / "metrics.jsonl").read_text().splitlines()
        kept = [json.loads(text) for text in texts]
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "patches_per_s")}
            for line in kept
        ]

    def check_curve(self):
        """Each step once, in order."""
        for key in ("loss", "val_dice"):
            steps = [line["step"] for line in self.lines() if key in line]
            assert steps == sorted(set(steps))
            assert steps[-1] == STEPS

    def result(self):
        return self.lines(), (self.out / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory, faults):
    return School(tmp_path_factory.mktemp("school"), faults)


@pytest.fixture
def school(place):
    shutil.rmtree(place.out, ignore_errors=True)
    place.faults.forget()
    yield place
    if place.running is not None:
        place.running.clear()
        place.running = None
    place.faults.forget()


@pytest.fixture(scope="module")
def truth(place):
    """The journal and the weights of a run that nobody disturbed."""
    place.faults.forget()
    ended = place.start(place.words("--executor", "serial")).end()
    assert ended.code == 0, ended.said
    result = place.result()
    assert len(result[0]) == 2 * STEPS // SAVED_EVERY + 1
    shutil.rmtree(place.out)
    return result


def go_on(school, *options):
    """The same command in this process."""
    torch.set_num_threads(available_cpus())
    school.faults.forget()
    ended, _ = here(school.words(*options))
    assert ended.code == 0, ended.said


def check(school, truth):
    school.check_curve()
    lines, weights = school.result()
    assert lines == truth[0]
    assert weights == truth[1]
    assert not list(school.out.rglob("*.partial"))


STATE = r"/checkpoints/state-"
MOMENTS = {
    "between a state and its name": Fault("before-rename", "kill", at=STATE, skip=1),
    "between the journal and its name": Fault(
        "before-rename", "kill", at=r"/metrics\.jsonl$", skip=1
    ),
    "between the model and its name": Fault("before-rename", "kill", at=r"/model\.safetensors$"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_killed_at_any_moment_ends_in_the_same_weights(moment, school, faults, truth):
    faults.plan(MOMENTS[moment])
    ended = school.start(school.words("--executor", "serial")).end()
    assert ended.code == -9, ended.said
    go_on(school, "--executor", "serial")
    check(school, truth)


def test_a_training_killed_at_a_random_step_repeats_only_what_was_not_saved(
    school, faults, truth, chance
):
    step = chance.randrange(SAVED_EVERY + 1, STEPS)
    faults.plan(Fault("before-step", "kill", at=f"^0 {step}$"))
    ended = school.start(school.words("--executor", "serial")).end()
    assert ended.code == -9, ended.said
    faults.forget()
    ended = school.start(school.words("--executor", "serial")).end()
    assert ended.code == 0, ended.said
    first = int(faults.at("before-step")[0].what.split()[1])
    assert first == (step - 1) // SAVED_EVERY * SAVED_EVERY + 1
    check(school, truth)


def test_of_a_truncated_state_the_one_before_it_is_used(school, faults, truth):
    faults.plan(Fault("before-step", "kill", at=f"^0 {2 * SAVED_EVERY + 3}$"))
    ended = school.start(school.words("--executor", "serial")).end()
    assert ended.code == -9, ended.said
    killed = shutil.copytree(school.out, school.root / "killed", dirs_exist_ok=True)
    for share in (0.0, 0.01, 0.5, 0.999):
        shutil.rmtree(school.out)
        shutil.copytree(killed, school.out)
        states = (school.out / "checkpoints").glob("state-*")
        newest = max(states, key=lambda path: path.stat().st_mtime_ns)
        content = newest.read_bytes()
        newest.write_bytes(content[: int(share * len(content))])
        go_on(school, "--executor", "serial")
        check(school, truth)


def test_the_driver_of_a_ray_training_killed_at_a_random_step(
    school, faults, truth, chance, request
):
    faults.plan(STEP_BY_STEP)
    running = school.start(school.words("--workers", 1))
    n_steps = chance.randrange(SAVED_EVERY + 1, STEPS - 4)
    wait_until(lambda: len(faults.at("before-step")) >= n_steps, within_s=90, what="steps")
    running.kill()
    running.wait_for_family()
    request.getfixturevalue("one_ray")
    go_on(school, "--workers", 1)
    check(school, truth)


def test_a_rank_killed_at_a_random_step_is_replaced_and_the_curve_goes_on(
    school, faults, chance, one_ray
):
    step = chance.randrange(SAVED_EVERY + 1, STEPS)
    faults.plan(Fault("before-step", "kill", at=f"^1 {step}$"))
    ended, _ = here(school.words("--workers", 2))
    assert ended.code == 0, ended.said
    assert len(faults.suffered("kill")) == 1
    school.check_curve()
    steps = [int(line.what.split()[1]) for line in faults.at("before-step")]
    saved = (step - 1) // SAVED_EVERY * SAVED_EVERY
    assert all(steps.count(n) == 2 for n in range(1, saved + 1)), "what was saved is not repeated"
    load_model(str(school.out / "model.safetensors"))
