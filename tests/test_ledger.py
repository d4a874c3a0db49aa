"""What is marked stays marked, and nothing is taken for done that is not."""

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import ledger as room
from bigseg.errors import OutputError
from bigseg.ledger import FLUSH_EVERY_S, MARKS_PER_CHUNK, Ledger

PLAN = {"tile": [1, 8, 8, 8], "engine": {"name": "torch"}, "scale": 0.1}


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "ledger")


def left(ledger, stage="predict"):
    return list(ledger.left(stage))


def test_a_ledger_that_is_reopened_has_the_plan_and_the_marks(url):
    ledger = Ledger.create(url, PLAN, {"predict": 10, "pyramid-1": 3})
    ledger.mark("predict", 4, 0xFFFFFFFF)
    ledger.mark("pyramid-1", 0, 7)
    ledger.flush()
    again = Ledger.open(url)
    assert again.plan == PLAN
    assert again.checksum("predict", 4) == 0xFFFFFFFF
    assert (again.n_done("predict"), again.n_done("pyramid-1")) == (1, 1)
    assert left(again) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert left(again, "pyramid-1") == [1, 2]
    assert not again.is_finished


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.data())
def test_what_is_left_is_what_is_not_marked(tmp_path_factory, n, data):
    url = str(tmp_path_factory.mktemp("l") / "ledger")
    ledger = Ledger.create(url, PLAN, {"predict": n})
    done = data.draw(st.sets(st.integers(0, n - 1))) if n else set()
    for block in done:
        ledger.mark("predict", block, block + 1)
    for each in (ledger, None):
        if each is None:
            ledger.flush()
            each = Ledger.open(url)
        assert left(each) == sorted(set(range(n)) - done)
        assert each.n_done("predict") == len(done)


def test_marks_are_flushed_by_the_clock(url):
    clock = Clock()
    ledger = Ledger.create(url, PLAN, {"predict": 5}, clock=clock)
    ledger.mark("predict", 0, 1)
    clock.now += FLUSH_EVERY_S - 0.01
    ledger.mark("predict", 1, 1)
    assert left(Ledger.open(url)) == [0, 1, 2, 3, 4]
    clock.now += 0.01
    ledger.mark("predict", 2, 1)
    assert left(Ledger.open(url)) == [3, 4]
    # The clock starts again with each flush.
    ledger.mark("predict", 3, 1)
    assert left(Ledger.open(url)) == [3, 4]
    ledger.flush()
    assert left(Ledger.open(url)) == [4]


def test_only_chunks_of_marks_that_changed_are_written(url, tmp_path):
    n = 3 * MARKS_PER_CHUNK + 5
    ledger = Ledger.create(url, PLAN, {"predict": n})
    ledger.mark("predict", MARKS_PER_CHUNK, 9)
    ledger.mark("predict", n - 1, 8)
    ledger.flush()
    chunks = sorted(p.name for p in (tmp_path / "ledger" / "predict" / "c").iterdir())
    assert chunks == ["1", "3"]
    assert Ledger.open(url).n_done("predict") == 2
    assert next(Ledger.open(url).left("predict")) == 0


def test_what_is_left_is_a_snapshot(url):
    ledger = Ledger.create(url, PLAN, {"predict": 6})
    snapshot = ledger.left("predict")
    for block in range(6):
        ledger.mark("predict", block, 1)
    assert list(snapshot) == list(range(6))


def test_there_is_no_ledger_where_there_is_nothing_or_no_plan(url, tmp_path):
    assert Ledger.open(url) is None
    (tmp_path / "ledger").mkdir()
    assert Ledger.open(url) is None
    zarr.create_group(url, zarr_format=3, overwrite=True).create_array(
        "predict", shape=(3,), dtype="uint32"
    )
    assert Ledger.open(url) is None


def test_a_ledger_replaces_what_a_creation_cut_short_left(url):
    group = zarr.create_group(url, zarr_format=3)
    group.create_array("predict", shape=(3,), dtype="uint32")[:] = 1
    ledger = Ledger.create(url, PLAN, {"predict": 4})
    assert left(ledger) == left(Ledger.open(url)) == [0, 1, 2, 3]


def test_a_finished_ledger_says_so_with_its_figures(url):
    ledger = Ledger.create(url, PLAN, {"predict": 1})
    assert ledger.record == {}
    ledger.mark("predict", 0, 3)
    ledger.finish({"seconds": 1.5, "blocks": 1})
    again = Ledger.open(url)
    assert again.is_finished
    assert again.record == {"seconds": 1.5, "blocks": 1}
    assert again.plan == PLAN
    assert again.n_done("predict") == 1


def test_a_discarded_ledger_is_none_even_if_its_deletion_is_cut_short(url, monkeypatch):
    Ledger.create(url, PLAN, {"predict": 1}).finish({})

    def killed(url):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room.store, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            Ledger.open(url).discard()
    assert Ledger.open(url) is None
    Ledger.create(url, PLAN, {"predict": 1}).discard()
    assert not room.store.exists(url)


def test_marks_are_durable_when_a_flush_returns(url, monkeypatch):
    synced = []
    real = room.store.os.fsync
    monkeypatch.setattr(room.store.os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    ledger = Ledger.create(url, PLAN, {"predict": 2})
    before = len(synced)
    assert before
    ledger.mark("predict", 1, 5)
    ledger.flush()
    assert len(synced) > before


@pytest.mark.parametrize("action", ["create", "flush", "finish", "discard"])
def test_a_ledger_that_cannot_be_written_says_so(url, action, monkeypatch):
    ledger = None if action == "create" else Ledger.create(url, PLAN, {"predict": 2})
    if ledger:
        ledger.mark("predict", 1, 5)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(room.store, "_write_durably", full)
        with pytest.raises(OutputError, match=r"ledger.* cannot be written: No space left"):
            {
                "create": lambda: Ledger.create(url, PLAN, {"predict": 2}),
                "flush": lambda: ledger.flush(),
                "finish": lambda: ledger.finish({}),
                "discard": lambda: ledger.discard(),
            }[action]()
    if action == "flush":
        # What could not be written is written the next time.
        ledger.flush()
        assert left(Ledger.open(url)) == [0]


def test_a_ledger_of_many_blocks_needs_little_memory(url):
    n = 20_000_000
    ledger = Ledger.create(url, PLAN, {"predict": n})
    blocks = ledger.left("predict")
    assert [next(blocks) for _ in range(3)] == [0, 1, 2]
    ledger.mark("predict", n - 1, 1)
    ledger.flush()
    assert ledger.n_done("predict") == 1
    assert ledger._of("predict").nbytes == 4 * n
