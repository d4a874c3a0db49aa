"""One output has one writer: a second run is refused, a dead one's output is taken over."""

import signal
import socket
import time

import psutil
import pytest

from chaos.faults import SLOWLY, Fault, pace, wait_until
from chaos.scene import NAME, assert_same, files_of, here, listed, wait_for_blocks

LOCK = f"labels/.{NAME}.lock"
# Seconds instead of a minute.
QUICKLY = {"BEAT_S": 0.3, "STALE_S": 1.5, "SETTLE_S": 0.3}


def test_a_second_run_is_refused_while_the_first_lives(scene, faults):
    faults.plan(SLOWLY)
    first = scene.start(scene.serial())
    wait_for_blocks(faults, 1)
    second, ran = here(scene.serial())
    assert second.code == 5, second.said
    assert f"a run on {socket.gethostname()} (process {first.pid}" in second.said
    assert ran == []
    anew, _ = here(scene.serial("--overwrite"))
    assert anew.code == 5, anew.said
    assert first.end().code == 0
    scene.check()


def test_of_many_that_start_at_once_one_wins(scene, faults):
    faults.plan(pace(0.2))
    runs = [scene.start(scene.serial()) for _ in range(3)]
    codes = sorted(run.end().code for run in runs)
    assert codes == [0, 5, 5], [run.said() for run in runs]
    assert set(faults.computed().values()) == {1}
    scene.check()


def test_the_output_of_a_dead_run_is_taken_over_and_that_is_said(scene, faults):
    faults.plan(SLOWLY)
    first = scene.start(scene.serial())
    wait_for_blocks(faults, 5)
    first.kill()
    assert (scene.image / LOCK).exists()
    faults.forget()
    second = scene.run(scene.serial())
    assert second.code == 0, second.said
    assert f"took over {scene.out} from a run on {socket.gethostname()}" in second.said
    assert f"(process {first.pid})" in second.said
    scene.check()


def state_of(process):
    return psutil.Process(process.pid).status()


def times_of(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("moment", "n_written"), [("before-mark", 0), ("before-write", 1)])
def test_a_run_that_was_only_paused_writes_nothing_more(moment, n_written, scene, faults):
    """But for the chunk of which it had made sure, before it was paused, that it may write it."""
    faults.plan(pace(0.03), Fault(moment, "stop", at="^predict 20$"), lock=QUICKLY)
    first = scene.start(scene.serial())
    try:
        wait_until(lambda: faults.suffered("stop"), within_s=60, what="the first is at block 20")
        wait_until(lambda: state_of(first) == psutil.STATUS_STOPPED, within_s=5, what="stopped")
        wait_until(lambda: age_of(scene) > QUICKLY["STALE_S"], within_s=10, what="stale")
        second = scene.run(scene.serial())
        assert second.code == 0, second.said
        assert "took over" in second.said
        scene.check()
        before = times_of(scene.image)
    finally:
        first.process.send_signal(signal.SIGCONT)
    ended = first.end(within_s=30)
    assert ended.code == 5, ended.said
    assert "no longer this run's" in ended.said
    changed = [p for p, at in times_of(scene.image).items() if before.get(p) != at]
    assert len(changed) <= n_written, changed
    scene.check()


def age_of(scene):
    return time.time() - (scene.image / LOCK).stat().st_mtime


def test_two_runs_on_one_image_with_different_names_are_both_listed(scene, faults):
    faults.plan(SLOWLY)
    named = [scene.serial() for _ in range(2)]
    named[1][named[1].index(NAME)] = "others"
    runs = [scene.start(words) for words in named]
    ends = [run.end() for run in runs]
    assert [end.code for end in ends] == [0, 0], ends
    assert sorted(listed(scene.image)) == [NAME, "others"]
    others = scene.image / "labels" / "others"
    found = files_of(others)
    truth = files_of(scene.out)
    arrays = {name for name in truth if "/c/" in name and not name.startswith("ledger")}
    assert_same({n: found[n] for n in arrays}, {n: truth[n] for n in arrays})
    assert not list((scene.image / "labels").glob(".*")), "no lock is left"
