"""What is marked stays marked, and nothing is taken for done that is not."""

import tracemalloc
import zlib

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg import ledger as room
from bigseg.errors import OutputError
from bigseg.ledger import EMPTY_MARK, FLUSH_EVERY_S, MARKS_PER_CHUNK, Ledger, checksum_of

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
    return np.flatnonzero(ledger.pending(stage)).tolist()


def test_a_ledger_that_is_reopened_has_the_plan_and_the_marks(url):
    ledger = Ledger.create(url, PLAN, {"predict": 10, "pyramid-1": 3})
    ledger.mark("predict", 4, 0xFFFFFFFE)
    ledger.mark("pyramid-1", 0, 7)
    ledger.flush()
    again = Ledger.open(url)
    assert again.plan == PLAN
    assert again.checksum("predict", 4) == 0xFFFFFFFE
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
        assert each.pending("predict").tolist() == [block not in done for block in range(n)]
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
    assert left(Ledger.open(url))[0] == 0


def test_what_is_left_is_a_snapshot(url):
    ledger = Ledger.create(url, PLAN, {"predict": 6})
    pending = ledger.pending("predict")
    for block in range(6):
        ledger.mark("predict", block, 1)
    assert pending.dtype == np.bool_
    assert pending.all()
    pending[:] = True
    assert ledger.n_done("predict") == 6


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([None, "written", "empty"]), max_size=40))
def test_empty_blocks_are_done_and_counted_by_themselves(tmp_path_factory, states):
    url = str(tmp_path_factory.mktemp("l") / "ledger")
    ledger = Ledger.create(url, PLAN, {"predict": len(states)})
    for block, state in enumerate(states):
        if state is not None:
            ledger.mark("predict", block, EMPTY_MARK if state == "empty" else EMPTY_MARK - 1)
    ledger.flush()
    for each in (ledger, Ledger.open(url)):
        assert each.n_empty("predict") == states.count("empty")
        assert each.n_done("predict") == len(states) - states.count(None)
        assert left(each) == [i for i, state in enumerate(states) if state is None]


def ending_with_crc(start, wanted):
    """`start` and the four bytes after which its CRC-32 is `wanted`, by running the sum backwards.

    The eight top bytes of the table's entries differ, so each names the entry that was used.
    """
    table = [zlib.crc32(bytes([i]), 0xFFFFFFFF) ^ 0xFFFFFFFF for i in range(256)]
    entry_of = {entry >> 24: i for i, entry in enumerate(table)}
    register = wanted ^ 0xFFFFFFFF
    for _ in range(4):
        i = entry_of[register >> 24]
        register = ((register ^ table[i]) << 8 & 0xFFFFFFFF) | i
    last = register ^ zlib.crc32(start) ^ 0xFFFFFFFF
    return start + last.to_bytes(4, "little")


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_have_the_checksum_of_a_block_not_done_or_empty(start):
    for wanted, mark in ((0, 1), (EMPTY_MARK, EMPTY_MARK - 1), (1, 1), (77, 77)):
        data = ending_with_crc(start, wanted)
        assert zlib.crc32(data) == wanted
        assert checksum_of(data) == checksum_of(memoryview(data)) == mark


def test_the_checksum_of_an_array_is_that_of_its_bytes():
    data = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    assert checksum_of(data.data) == zlib.crc32(data.tobytes())
    assert checksum_of(b"") == 1


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
        patch.setattr(room.store.durable, "write_durably", full)
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
    assert np.flatnonzero(ledger.pending("predict")[:3]).tolist() == [0, 1, 2]
    ledger.mark("predict", n - 1, 1)
    ledger.flush()
    assert ledger.n_done("predict") == 1
    assert ledger._of("predict").nbytes == 4 * n


def test_a_million_blocks_take_a_few_megabytes(url):
    ledger = Ledger.create(url, PLAN, {"predict": 1_000_000})
    tracemalloc.start()
    try:
        pending = ledger.pending("predict")
        for block in range(0, 1_000_000, 1000):
            ledger.mark("predict", block, EMPTY_MARK)
        counts = (ledger.n_done("predict"), ledger.n_empty("predict"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pending.nbytes == 1_000_000
    assert counts == (1000, 1000)
    assert peak < 12_000_000
