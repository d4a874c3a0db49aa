"""Ctrl-C once ends soon and keeps what is in flight; twice ends at once; both go on later."""

import time

import pytest

from chaos.faults import pace
from chaos.scene import Watch, wait_for_blocks

# Long enough for blocks to be in flight when the signal comes.
HALF_A_SECOND = pace(0.5)


def begin(scene, faults, executor):
    faults.plan(HALF_A_SECOND, ledger={"FLUSH_EVERY_S": 0.1})
    running = scene.start({"serial": scene.serial, "ray": scene.on_ray}[executor]())
    wait_for_blocks(faults, 6)
    return running


@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_once_ends_within_seconds_and_keeps_the_blocks_in_flight(executor, scene, faults, request):
    with Watch(scene):
        running = begin(scene, faults, executor)
        running.family()
        in_flight = set(faults.computed())
        pressed = time.monotonic()
        running.interrupt()
        ended = running.end(within_s=30)
    took_s = time.monotonic() - pressed
    assert ended.code == 130, ended.said
    assert took_s < 15
    assert "the same command goes on" in ended.said
    assert "Traceback" not in ended.said
    assert in_flight <= scene.done(), "what was at work when the key was pressed is kept"
    assert not list(scene.image.rglob(".*.lock"))
    running.wait_for_family()
    if executor == "ray":
        request.getfixturevalue("one_ray")
    scene.go_on({"serial": scene.serial, "ray": scene.on_ray}[executor]())
    scene.check()


def test_twice_ends_at_once(scene, faults):
    running = begin(scene, faults, "ray")
    running.family()
    running.interrupt()
    time.sleep(0.2)
    pressed = time.monotonic()
    running.interrupt()
    ended = running.end(within_s=30)
    assert ended.code == 130, ended.said
    assert time.monotonic() - pressed < 8
    assert "Traceback" not in ended.said
    running.wait_for_family()
    scene.go_on(scene.serial())
    scene.check()
