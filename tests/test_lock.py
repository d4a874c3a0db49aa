"""One writer for one output, whoever dies, sleeps or comes late."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import noise, write_image

from bigseg import lock as room
from bigseg import store
from bigseg.errors import LockedError
from bigseg.layout import list_label, listed_labels, unlist_label
from bigseg.lock import Lock, LockState, check_owner, holding, lock_url, read_lock

PLACES = ["local", "memory"]


@pytest.fixture(params=PLACES)
def url(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "a b" / "out.zarr")
    return f"memory://{tmp_path.name}/out.zarr"


def plant(url, **changes):
    """A lock that another run left."""
    there = LockState(
        owner="other",
        host="elsewhere",
        machine="another boot",
        pid=1,
        process_start=1,
        generation=3,
        beat=7,
        time_s=time.time(),
    )
    state = replace(there, **changes)
    store.write_atomic(lock_url(url), json.dumps(asdict(state)).encode())
    return state


def test_the_lock_lies_beside_the_output():
    assert lock_url("/a/b.zarr/") == "/a/.b.zarr.lock"
    assert lock_url("b.zarr") == ".b.zarr.lock"
    assert lock_url("memory://b.zarr") == "memory://.b.zarr.lock"
    assert lock_url("s3://bucket/i.zarr/labels/x") == "s3://bucket/i.zarr/labels/.x.lock"


def test_a_second_one_is_refused_while_the_first_lives_and_not_after(url):
    with Lock.acquire(url) as first:
        first.check()
        with pytest.raises(
            LockedError,
            match=rf"out.zarr is being written by a run on .* "
            rf"\(process {os.getpid()}, last sign of life 0 s ago\): wait for",
        ):
            Lock.acquire(url)
        first.check()
    assert read_lock(url) is None
    with Lock.acquire(url) as second:
        assert second.owner != first.owner
        with pytest.raises(LockedError, match="no longer this run's"):
            first.check()


def test_of_many_that_start_at_once_one_wins(tmp_path):
    for attempt in range(20):
        url, won, lost = str(tmp_path / f"{attempt}.zarr"), [], []
        gate = threading.Barrier(8)

        def start(url=url, won=won, lost=lost, gate=gate):
            gate.wait()
            try:
                won.append(Lock.acquire(url))
            except LockedError:
                lost.append(url)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        won[0].release()


def test_of_many_that_take_over_at_once_one_wins(tmp_path, caplog):
    url = str(tmp_path / "out.zarr")
    plant(url, machine=room._machine(), pid=2**22 + 1)
    won, lost, gate = [], [], threading.Barrier(6)

    def start():
        gate.wait()
        try:
            won.append(Lock.acquire(url))
        except LockedError:
            lost.append(url)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)
    assert read_lock(url).generation == 4
    assert "took over" in caplog.text
    assert "elsewhere (process 4194305)" in caplog.text
    won[0].release()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, caplog):
    url = str(tmp_path / "out.zarr")
    code = f"""
import time
from bigseg.lock import Lock
lock = Lock.acquire({url!r})
print("locked", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"process {child.pid}"):
            Lock.acquire(url)
        child.send_signal(signal.SIGKILL)
    with Lock.acquire(url):
        assert f"process {child.pid}) that ended without finishing" in caplog.text


def test_a_run_that_still_beats_elsewhere_is_alive_whatever_its_clock_says(url):
    state = plant(url, time_s=time.time() - 10_000)

    def beat():
        time.sleep(0.2)
        plant(url, time_s=time.time() - 10_000, beat=state.beat + 1)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockedError, match="elsewhere"):
        Lock.acquire(url, beat_s=0.4)
    thread.join()


@pytest.mark.parametrize("shift_s", [-10_000, 10_000])
def test_a_run_elsewhere_that_stands_still_is_taken_over(url, shift_s):
    plant(url, time_s=time.time() + shift_s)
    with Lock.acquire(url, beat_s=0.2) as mine:
        assert read_lock(url).generation == 4
        mine.check()


def test_an_owner_that_was_paused_finds_out_and_leaves_the_new_lock_alone(url):
    paused = Lock.acquire(url, beat_s=0.05)
    plant(url, owner="new")
    with pytest.raises(LockedError, match=r"a run on elsewhere \(process 1\) has it now"):
        paused.check()
    time.sleep(0.3)
    paused.release()
    assert read_lock(url).owner == "new"
    with pytest.raises(LockedError):
        check_owner(url, paused.owner)
    check_owner(url, "new")


def test_the_heartbeat_goes_on_and_carries_what_is_noted(url):
    with Lock.acquire(url, beat_s=0.05) as mine:
        first = read_lock(url)
        mine.note(stage="predict", n_done=3)
        time.sleep(0.5)
        state = read_lock(url)
        assert state.beat > first.beat
        assert state.time_s > first.time_s
        assert state.notes == {"stage": "predict", "n_done": 3}
        assert state.is_alive
        assert 0 <= state.age_s < 5


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"owner": 1}', b"\xff\xfe"])
def test_what_is_no_lock_of_bigseg_is_nobody(url, text):
    store.write_atomic(lock_url(url), text)
    with Lock.acquire(url) as mine:
        mine.check()


def test_a_folder_made_for_the_lock_goes_with_it_unless_it_is_used(tmp_path):
    with Lock.acquire(str(tmp_path / "labels" / "a")):
        assert (tmp_path / "labels").exists()
    assert list(tmp_path.iterdir()) == []
    with Lock.acquire(str(tmp_path / "labels" / "a")):
        (tmp_path / "labels" / "a").mkdir()
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["a"]


def test_what_killed_owners_left_of_their_locks_goes_with_the_next(tmp_path):
    url = str(tmp_path / "out.zarr")
    (tmp_path / "..out.zarr.lock.0123.partial").write_bytes(b"torn")
    with Lock.acquire(url):
        late = tmp_path / "..out.zarr.lock.4567.partial"
        late.write_bytes(b"of somebody who is just trying")
        other = tmp_path / ".other.0123.partial"
        other.write_bytes(b"not ours")
        future = time.time() + 60
        os.utime(late, (future, future))
    assert sorted(tmp_path.iterdir()) == [late, other]


def test_nothing_is_left_behind(tmp_path):
    with Lock.acquire(str(tmp_path / "out.zarr"), beat_s=0.01):
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_ended_is_known_from_one_that_reuses_its_number():
    mine = room._start_of(os.getpid())
    assert mine > 0
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert room._start_of(child.pid) == 0
    state = LockState("o", "h", room._machine(), os.getpid(), mine + 1, 1, 0, time.time())
    assert state.is_gone
    assert not replace(state, process_start=mine).is_gone


def test_holding_waits_for_its_turn(tmp_path):
    url, order = str(tmp_path / "list"), []

    def hold(name):
        with holding(url):
            order.append(f"{name} in")
            time.sleep(0.05)
            order.append(f"{name} out")

    threads = [threading.Thread(target=hold, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.split()[1] for entry in order] == ["in", "out"] * 4
    with Lock.acquire(url), pytest.raises(LockedError), holding(url, patience_s=0.2):
        pass


def test_no_entry_of_the_list_is_lost_when_many_list_at_once(tmp_path):
    image = write_image(tmp_path / "image.zarr", noise((4, 8, 8)), chunks=(4, 8, 8))
    names = [f"cells-{i}" for i in range(8)]
    code = "import sys; from bigseg.layout import list_label; list_label(sys.argv[1], sys.argv[2])"
    children = [subprocess.Popen([sys.executable, "-c", code, image, name]) for name in names]
    for child in children:
        assert child.wait() == 0
    assert sorted(listed_labels(image)) == names
    unlist_label(image, names[0])
    list_label(image, names[1])
    assert sorted(listed_labels(image)) == names[1:]
    assert not list(Path(image).glob(".*.lock"))
