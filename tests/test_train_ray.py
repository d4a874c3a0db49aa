"""Training on a real local Ray: two workers with gloo, one of which dies once."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from training_data import blobs, write_annotated

from bigseg.checkpoint import load_model
from bigseg.cluster import Cluster
from bigseg.config import TrainConfig
from bigseg.errors import ConfigError, InputError, OutputError, ResourceError
from bigseg.runs import RunFiles
from bigseg.train_ddp import Share, _cause, _noting, _raise_noted, _worker, share_of, train

pytestmark = [
    # Ray Train sets up Ray Data, which warns of its own default settings (ray 2.60).
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\.context"),
]


def config_of(tmp_path, **changes) -> TrainConfig:
    image, labels = blobs((6, 48, 48), n=30)
    url = str(tmp_path / "a.zarr")
    if not Path(url).exists():
        write_annotated(url, image, (labels > 0).astype(np.uint8), "zyx")
    return TrainConfig(
        images=(url,),
        labels="cells",
        steps=24,
        val_every=8,
        batch=1,
        patch=(20, 20),
        net={"depth": 1, "width": 4},
        workers=2,
        **changes,
    )


@pytest.fixture(scope="module")
def one_ray():
    """One Ray for the tests of this file; `train` uses the one that runs."""
    from bigseg.cluster import connect

    with connect(None, n_cpus=2):
        yield


def test_a_killed_worker_is_replaced_and_training_goes_on(one_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    killed, log = tmp_path / "killed", tmp_path / "steps"
    log.mkdir()

    def kill_rank_1_once(rank, step):
        (log / f"{rank}-{step}-{os.getpid()}").touch()
        if rank == 1 and step == 13 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "run"
    result = train(config_of(tmp_path), "run", after_step=kill_rank_1_once)
    assert killed.exists()
    assert (result.first_step, result.steps) == (0, 24)
    starts = {}
    for name in (p.name.split("-") for p in log.iterdir()):
        starts.setdefault((name[0], name[2]), []).append(int(name[1]))
    # Each rank ran twice: from the beginning, and from the state at step 8.
    assert sorted((rank, min(s), max(s)) for (rank, _), s in starts.items())[-1] == ("1", 9, 24)
    assert sorted(min(s) for s in starts.values()) == [1, 1, 9, 9]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_dice" in line] == [8, 16, 24]
    load_model(result.model_url)
    again = train(config_of(tmp_path), "run")
    assert again.first_step == 24


def test_two_workers_learn_objects_by_a_weight_map_and_choose_a_rule(one_ray, tmp_path):
    pairs = [blobs((40, 40), seed=seed, n=10) for seed in range(5)]
    image, labels = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    url = write_annotated(str(tmp_path / "b.zarr"), image, labels, "zyx")
    changes = {"images": (url,), "steps": 3, "task": "instances", "loss": {"weight_map": {}}}
    config = TrainConfig(**{**config_of(tmp_path).model_dump(), **changes})
    result = train(config, str(tmp_path / "run"))
    _, card = load_model(result.model_url)
    assert card.trained["instances"]["n_objects"] == len(np.unique(labels[4])) - 1
    assert result.instances.startswith("objects: threshold ")


@pytest.mark.slow
def test_an_error_of_bigseg_in_a_worker_comes_out_as_it_is(one_ray, tmp_path):
    def fail(rank, step):
        if rank == 1 and step == 3:
            raise InputError("the planted image cannot be used: give another")

    out = str(tmp_path / "run")
    with pytest.raises(InputError, match=r"^the planted image cannot be used: give another$"):
        train(config_of(tmp_path), out, after_step=fail)
    with pytest.raises(ConfigError, match="steps: 5, not 24"):
        train(config_of(tmp_path).model_copy(update={"steps": 5}), out)


def test_too_many_workers_are_refused_at_once(one_ray, tmp_path):
    config = config_of(tmp_path).model_copy(update={"workers": 3})
    with pytest.raises(ResourceError, match="3 workers need 3 processors, the cluster has 2: use"):
        train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("n_workers", "cluster", "share"),
    [
        (1, Cluster(((8, 0),)), Share(1, False, 8)),
        (3, Cluster(((8, 0),)), Share(3, False, 2)),
        (3, Cluster(((8, 0), (8, 0))), Share(3, False, 4)),
        (2, Cluster(((32, 2), (32, 2))), Share(2, True, 4)),
        (4, Cluster(((8, 4),)), Share(4, True, 2)),
    ],
)
def test_each_worker_gets_a_gpu_or_an_equal_share(n_workers, cluster, share):
    assert share_of(n_workers, cluster) == share


@pytest.mark.parametrize("kind", [InputError, ConfigError])
def test_an_error_that_would_come_again_is_noted_and_ends_the_next_attempt(tmp_path, kind):
    files = RunFiles(str(tmp_path))
    _raise_noted(files)
    with pytest.raises(kind, match="planted"), _noting(files):
        raise kind("planted")
    attempt = {"out": str(tmp_path), "folder": os.getcwd()}
    assert _worker(attempt) is None  # It would need the other settings if it went on.
    with pytest.raises(kind, match=r"^planted$"):
        _raise_noted(files)
    _raise_noted(files)


def test_an_error_that_may_pass_is_not_noted(tmp_path):
    files = RunFiles(str(tmp_path))
    with pytest.raises(OutputError), _noting(files):
        raise OutputError("no space")
    _raise_noted(files)


def test_the_cause_of_a_dead_group_is_what_bigseg_said():
    assert str(_cause({0: RuntimeError("gloo"), 1: InputError("no labels")})) == "no labels"
    cause = _cause({1: MemoryError("too\nlittle")})
    assert isinstance(cause, ResourceError)
    assert "died four times, last rank 1 of MemoryError (little)" in str(cause)
