"""Workers that hang, blocks that kill, workers that are broken: who is to blame is found out."""

import contextlib
import errno
import os
import signal

import psutil
import pytest

from bigseg import infer_actor
from bigseg.infer_actor import RayExecutor
from chaos.faults import ALWAYS, SLOWLY, Fault, wait_until
from chaos.scene import Watch, here, is_alive

pytestmark = pytest.mark.usefixtures("one_ray")


@pytest.fixture
def impatient(monkeypatch):
    """Workers are taken for hanging after seconds, not minutes."""
    monkeypatch.setitem(RayExecutor.__init__.__kwdefaults__, "deadline_s", 4.0)


def gone(pid):
    try:
        return not is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def test_a_worker_that_hangs_is_replaced(scene, faults, impatient):
    faults.plan(SLOWLY, Fault("before-work", "stop", at="^predict 15$"))
    try:
        with Watch(scene):
            ended, _ = here(scene.on_ray())
        assert ended.code == 0, ended.said
        (stopped,) = faults.suffered("stop")
        wait_until(lambda: gone(stopped), within_s=15, what="the one that hung has been ended")
    finally:
        for pid in faults.suffered("stop"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert max(faults.computed().values()) <= 3
    scene.check()


def test_a_block_that_kills_its_worker_is_set_aside_alone(scene, faults):
    poison = "predict 15"
    faults.plan(SLOWLY, Fault("before-work", "kill", at=f"^{poison}$", times=ALWAYS))
    ended, _ = here(scene.on_ray())
    assert ended.code == 4, ended.said
    assert "1 of " in ended.said
    assert "its worker died" in ended.said
    tries = faults.computed()
    assert {what for what in tries if what not in scene.done()} == {poison}
    # Once among others, then alone as often as a block is tried.
    assert tries[poison] <= 4
    ended = scene.go_on(scene.on_ray())
    assert set(faults.computed()) == {poison, "pyramid-1 0", "pyramid-2 0"}
    scene.check()


def test_a_broken_worker_does_not_use_up_the_tries_of_the_blocks(scene, faults):
    broken = Fault("before-read", "error", value=errno.EIO, times=ALWAYS, whose="one")
    faults.plan(SLOWLY, broken)
    with Watch(scene):
        ended, _ = here(scene.on_ray())
    assert ended.code == 0, ended.said
    assert len(set(faults.suffered("error"))) == 1
    scene.check()


@pytest.mark.timeout(150)
def test_a_place_where_every_worker_is_broken_is_done_without(scene, faults, monkeypatch, caplog):
    # The first that is found to be broken is the last.
    monkeypatch.setattr(infer_actor, "MAX_BREAKS", 0)
    broken = Fault(
        "before-read", "error", "^predict", value=errno.EIO, times=ALWAYS, whose="others"
    )
    # The one that is left also has bad luck in the next stage, and nobody else to ask.
    unlucky = Fault("before-read", "error", "^pyramid-1", value=errno.EIO)
    faults.plan(SLOWLY, broken, unlucky)
    ended, _ = here(scene.on_ray())
    assert ended.code == 0, ended.said
    assert "the others go on without it" in caplog.text
    scene.check()
