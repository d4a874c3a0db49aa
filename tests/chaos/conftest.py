"""Fixtures of the chaos suite: seeds, a scene, one Ray for all of them."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from bigseg.cluster import connect
from chaos.faults import PLANTED, Faults
from chaos.scene import Scene


def pytest_generate_tests(metafunc):
    if "chance" in metafunc.fixturenames:
        n = metafunc.config.getoption("--chaos-seeds")
        # One seed is another one each time: the suite sees more moments the more often it runs.
        # CHAOS_SEED repeats the one that a failure names.
        one = int(os.environ.get("CHAOS_SEED") or secrets.randbelow(1 << 20))
        seeds = range(n) if n > 1 else [one]
        metafunc.parametrize("chance", seeds, ids=lambda seed: f"seed-{seed}", indirect=True)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.chaos)


@pytest.fixture
def chance(request):
    """Random numbers; the seed stands in the name of the test that fails."""
    return random.Random(request.param)


@pytest.fixture(scope="package")
def faults(tmp_path_factory):
    """What is to break in the processes that the tests start."""
    short = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    yield Faults(tmp_path_factory.mktemp("faults") / "now", short)
    # Of those that were killed; the others tidy up themselves.
    shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="package")
def stage(tmp_path_factory, faults):
    """The place itself; tests use `scene`."""
    scene = Scene(tmp_path_factory.mktemp("scene"), faults)
    scene.truth()
    return scene


@pytest.fixture
def scene(stage):
    """An image that is not segmented yet."""
    stage.fresh()
    yield stage
    stage.fresh()


@pytest.fixture(scope="package")
def one_ray(faults):
    """A Ray of this process with two processors, whose workers can be broken.

    Commands that are run in this process use it.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in faults.environment().items():
            patch.setenv(name, value)
        with connect("local", n_cpus=2):
            patch.delenv("PYTHONPATH")
            patch.delenv("BIGSEG_CHAOS")
            assert PLANTED.is_dir()
            yield
