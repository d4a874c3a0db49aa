"""Reading, working and writing overlap, stay bounded, and keep failures apart."""

import threading
import time

import pytest

from bigseg.pipeline import Clock, run_pipeline


def test_every_item_passes_all_steps_in_order():
    outcomes = list(
        run_pipeline(range(7), lambda i: i + 1, lambda i, r: (i, r * 10), lambda i, w: w[1] + i)
    )
    assert [o.item for o in outcomes] == list(range(7))
    assert [o.written for o in outcomes] == [(i + 1) * 10 + i for i in range(7)]


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_a_failure_belongs_to_its_item_and_the_others_go_on(step):
    def fail(name, item):
        if name == step and item == 2:
            raise ValueError(f"{name} of {item}")
        return item

    outcomes = list(
        run_pipeline(
            range(5),
            lambda i: fail("read", i),
            lambda i, _: fail("work", i),
            lambda i, _: fail("write", i),
        )
    )
    assert sorted(o.item for o in outcomes) == list(range(5))
    failed = [o for o in outcomes if o.error]
    assert [(o.item, str(o.error)) for o in failed] == [(2, f"{step} of 2")]


def test_steps_overlap():
    def slow(*_):
        time.sleep(0.05)

    started = time.perf_counter()
    list(run_pipeline(range(8), slow, slow, slow))
    # One after the other it would take 1.2 s.
    assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize("depth", [1, 3])
def test_items_in_memory_are_bounded(depth):
    lock = threading.Lock()
    alive, most = 0, 0

    def read(_):
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)

    def write(*_):
        nonlocal alive
        time.sleep(0.005)
        with lock:
            alive -= 1

    list(run_pipeline(range(40), read, lambda *_: None, write, depth=depth))
    assert most <= 2 * depth + 3
    assert alive == 0


def test_closing_early_finishes_what_is_in_flight():
    written = []
    running = run_pipeline(range(100), lambda i: i, lambda _, r: r, lambda i, _: written.append(i))
    next(running)
    running.close()
    assert 1 <= len(written) < 10


def test_the_clock_tells_work_from_waiting():
    clock = Clock()
    list(
        run_pipeline(
            range(4), lambda _: time.sleep(0.05), lambda *_: None, lambda *_: None, clock=clock
        )
    )
    assert clock.wait_read_s > 5 * clock.work_s
