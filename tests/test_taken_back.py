"""What is taken back is so at once, and stays so until it was erased and can be made again."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from killing import Killed, kill_at_write

from bigseg import durable
from bigseg import taken_back as room
from bigseg.ledger import MARKS_PER_CHUNK, Ledger
from bigseg.taken_back import TakenBack, blocks_in

STAGES = st.dictionaries(
    st.sampled_from(["predict", "grow", "pyramid-1"]), st.lists(st.integers(0, 40))
)
PLAN = {"tile": [1, 8, 8, 8]}


def blocks_of(ranges):
    return {stage: set(blocks_in(part)) for stage, part in ranges.items() if part}


def united(*noted):
    stages = {stage for part in noted for stage in part}
    found = {stage: {b for part in noted for b in part.get(stage, ())} for stage in stages}
    return {stage: blocks for stage, blocks in found.items() if blocks}


@given(STAGES, STAGES, STAGES, STAGES)
def test_a_note_has_all_blocks_that_were_taken_back_and_no_others(wrong, condemned, more, most):
    note = TakenBack.of(wrong, condemned).joined(more, most)
    assert blocks_of(note.condemned) == united(condemned, most)
    assert blocks_of(note.wrong) == united(wrong, condemned, more, most)
    assert TakenBack.from_json(json.loads(json.dumps(note.as_json()))) == note


@given(wrong=STAGES, condemned=STAGES)
def test_a_note_of_scattered_blocks_stays_short_and_erases_nothing_else(wrong, condemned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MOST_RANGES", 2)
        note = TakenBack.of(wrong, condemned)
    assert all(len(part) <= 2 for kind in (note.wrong, note.condemned) for part in kind.values())
    noted, erased = blocks_of(note.wrong), blocks_of(note.condemned)
    for stage, blocks in united(wrong, condemned).items():
        assert blocks <= noted[stage]
    for stage, blocks in united(condemned).items():
        assert blocks <= erased[stage] <= noted[stage]


@pytest.mark.parametrize(
    "note",
    [
        {"wrong": {"predict": [[3, 2]]}, "condemned": {}},
        {"wrong": {"predict": [[-1, 2]]}, "condemned": {}},
        {"wrong": {"predict": [[0, 2**60]]}, "condemned": {}},
        {"wrong": {"predict": 3}, "condemned": {}},
        {"wrong": 3, "condemned": {}},
        {"wrong": {}},
        "all",
    ],
)
def test_another_note_is_refused(note):
    with pytest.raises((ValueError, TypeError, KeyError)):
        TakenBack.from_json(note)


def marked_ledger(url, n=MARKS_PER_CHUNK + 5):
    ledger = Ledger.create(url, PLAN, {"predict": n, "pyramid-1": 3})
    for stage, blocks in (("predict", range(n)), ("pyramid-1", range(3))):
        for block in blocks:
            ledger.mark(stage, block, 7)
    ledger.finish({"seconds": 1})
    return ledger


def test_a_kill_leaves_everything_taken_back_or_nothing(tmp_path, monkeypatch):
    wrong = {"predict": [2, MARKS_PER_CHUNK + 1], "pyramid-1": [0]}
    for n in range(1, 20):
        url = str(tmp_path / str(n))
        ledger = marked_ledger(url)
        n_all = sum(ledger.stages.values())
        survives = True
        with monkeypatch.context() as patch:
            kill_at_write(patch, n)
            try:
                ledger.take_back(wrong, {"predict": [2]})
                ledger.settle()
            except Killed:
                survives = False
        again = Ledger.open(url)
        n_done = sum(map(again.n_done, again.stages))
        if again.is_finished:
            assert (n_done, again.condemned) == (n_all, {})
        else:
            assert n_done == n_all - 3
            assert again.condemned == ({} if survives else {"predict": [2]})
            again.settle()
        if survives:
            break
    assert n == 6


def test_what_was_made_again_after_that_stays_done(tmp_path):
    url = str(tmp_path / "ledger")
    marked_ledger(url).take_back({"predict": [2, 3]}, {"predict": [3]})
    ledger = Ledger.open(url)
    assert np.flatnonzero(ledger.pending("predict")).tolist() == [2, 3]
    ledger.settle()
    assert Ledger.open(url).n_done("predict") == MARKS_PER_CHUNK + 3
    ledger.mark("predict", 2, 7)
    ledger.flush()
    again = Ledger.open(url)
    assert np.flatnonzero(again.pending("predict")).tolist() == [3]
    assert (again.plan, again.record, again.condemned) == (PLAN, {"seconds": 1}, {})


def test_what_is_taken_back_twice_is_all_taken_back(tmp_path):
    url = str(tmp_path / "ledger")
    ledger = marked_ledger(url)
    ledger.take_back({"predict": [2]}, {"predict": [2]})
    ledger.take_back({"predict": [4], "pyramid-1": [1]}, {"pyramid-1": [1]})
    for one in (ledger, Ledger.open(url)):
        assert one.condemned == {"predict": [2], "pyramid-1": [1]}
        assert np.flatnonzero(one.pending("predict")).tolist() == [2, 4]


def test_what_belongs_together_changes_in_one_write(tmp_path, monkeypatch):
    url = str(tmp_path / "ledger")
    ledger = Ledger.create(url, PLAN, {"predict": 3})
    written = []
    write = durable.write_durably
    monkeypatch.setattr(
        durable, "write_durably", lambda path, data: (written.append(path), write(path, data))
    )
    ledger.replan({"tile": [1, 4, 4, 4]}, {"predict": 3, "grow": 3})
    assert written.count(Path(url, "zarr.json")) == 1
    ledger.finish({"seconds": 1})
    assert written.count(Path(url, "zarr.json")) == 2
