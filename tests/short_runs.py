"""Training runs of seconds, and what they leave."""

import json

import pytest

from bigseg.config import TrainConfig
from bigseg.train_ddp import train

MILD = {"elastic_vox": 1.0, "elastic_grid_vox": 8.0, "scale": 0.05}


class Cut(Exception):
    """What stops a run in these tests."""


def config_of(url, **changes) -> TrainConfig:
    """Settings of a run of 24 steps, with any of them changed."""
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
    """The run in this process."""
    return train(config, str(out), executor="serial", **options)


def cut_at(config, out, step, **options):
    """The run until so many steps are done."""

    def after(rank, done):
        if done == step:
            raise Cut

    with pytest.raises(Cut):
        here(config, out, after_step=after, **options)


def bytes_of(out) -> bytes:
    """The model file."""
    return (out / "model.safetensors").read_bytes()


def journal(out) -> list[dict]:
    """The lines of the journal."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def journal_loss(result) -> float:
    """The loss of the first line of a run's journal."""
    with open(result.metrics_url, encoding="utf-8") as lines:
        return json.loads(lines.readline())["loss"]
