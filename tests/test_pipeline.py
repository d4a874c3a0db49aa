"""Reading, working and writing overlap, stay bounded, and keep failures apart."""

import threading
import time

import pytest

from bigseg.pipeline import Pipeline


def run_pipeline(items, read, work, write, **options):
    with Pipeline(read, work, write, **options) as pipeline:
        yield from pipeline.run(items)


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


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_what_is_no_exception_belongs_to_its_item_too(step):
    """Such as sys.exit() in a user's function: it would end the thread, and nobody would know."""

    def leave(name, item):
        if name == step and item == 2:
            raise SystemExit(3)
        return item

    outcomes = list(
        run_pipeline(
            range(5),
            lambda i: leave("read", i),
            lambda i, _: leave("work", i),
            lambda i, _: leave("write", i),
        )
    )
    failed = [(o.item, str(o.error)) for o in outcomes if o.error]
    assert failed == [(2, "SystemExit: 3")]
    assert len(outcomes) == 5


def test_steps_overlap():
    def slow(*_):
        time.sleep(0.05)

    started = time.perf_counter()
    list(run_pipeline(range(8), slow, slow, slow))
    # One after the other it would take 1.2 s.
    assert time.perf_counter() - started < 0.9


@pytest.mark.parametrize(("ahead", "behind", "n_readers"), [(1, 1, 1), (3, 2, 2)])
def test_items_in_memory_are_bounded(ahead, behind, n_readers):
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

    with Pipeline(
        read, lambda *_: None, write, ahead=ahead, behind=behind, n_readers=n_readers
    ) as pipeline:
        list(pipeline.run(range(40)))
    assert most <= pipeline.most_items == ahead + behind + 1
    assert alive == 0


def test_closing_early_finishes_what_is_in_flight():
    written = []
    running = run_pipeline(range(100), lambda i: i, lambda _, r: r, lambda i, _: written.append(i))
    next(running)
    running.close()
    assert 1 <= len(written) < 10


def test_the_clock_tells_work_from_waiting():
    with Pipeline(lambda _: time.sleep(0.05), lambda *_: None, lambda *_: None) as pipeline:
        list(pipeline.run(range(4)))
    clock = pipeline.clock
    assert clock.wait_read_s > 5 * clock.work_s
    with Pipeline(lambda _: None, lambda *_: None, lambda *_: time.sleep(0.05)) as pipeline:
        list(pipeline.run(range(8)))
    assert pipeline.clock.wait_write_s > 5 * pipeline.clock.work_s


def test_a_second_call_is_read_while_the_first_is_worked_on():
    first_works, second_is_read = threading.Event(), threading.Event()

    def read(item):
        if item == "second":
            second_is_read.set()

    def work(item, _):
        if item == "first":
            first_works.set()
            assert second_is_read.wait(10)

    with Pipeline(read, work, lambda item, _: item) as pipeline:
        answers = []
        calls = [
            threading.Thread(target=lambda i=i: answers.extend(pipeline.run([i])))
            for i in ("first", "second")
        ]
        calls[0].start()
        assert first_works.wait(10)
        calls[1].start()
        for call in calls:
            call.join()
    assert sorted(o.written for o in answers) == ["first", "second"]


def test_readers_run_side_by_side_and_the_order_of_work_stays():
    together = threading.Barrier(3)
    worked = []

    def read(item):
        together.wait(10)
        return item

    with Pipeline(read, lambda i, _: worked.append(i), lambda *_: None, ahead=3, n_readers=3) as p:
        list(p.run(range(9)))
    assert worked == list(range(9))


def test_endless_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    with Pipeline(lambda i: i, lambda _, r: r, lambda i, _: i) as pipeline:
        running = pipeline.run(items())
        next(running)
        running.close()
    assert len(taken) <= pipeline.most_items + 2
