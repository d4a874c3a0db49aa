"""Entries of the folder for later runs are whole or absent, and the folder is private."""

import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigseg import reuse
from bigseg.reuse import cache_dir, digest_of, load_entry, processor, save_entry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGSEG_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_the_folder_is_made_for_this_user_alone(folder):
    assert cache_dir() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("BIGSEG_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "bigseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "bigseg"


@pytest.mark.parametrize(("harm", "reason"), [("others", "others may write"), ("file", "exists")])
def test_a_folder_that_cannot_be_used_is_announced_once_and_nothing_is_kept(
    harm, reason, folder, caplog
):
    if harm == "others":
        folder.mkdir()
        folder.chmod(0o770)
    else:
        folder.touch()
    for _ in range(2):
        assert cache_dir() is None
        save_entry("a", b"1")
        assert load_entry("a") is None
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert "set BIGSEG_CACHE to a folder of your own" in caplog.text


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 999])
def test_what_is_kept_is_read_back(data, folder):
    assert load_entry("a") is None
    save_entry("a", b"before")
    save_entry("a", data)
    assert load_entry("a") == data
    assert os.listdir(folder) == ["a"]


@given(st.data())
def test_a_damaged_entry_reads_as_absent(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("kept")
    folder.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(folder))
        save_entry("a", data.draw(st.binary(max_size=50)))
        whole = (folder / "a").read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        flipped = bytes([whole[at] ^ data.draw(st.integers(1, 255))])
        cut = data.draw(st.booleans())
        (folder / "a").write_bytes(whole[:at] + (b"" if cut else flipped + whole[at + 1 :]))
        assert load_entry("a") is None


def test_an_entry_that_cannot_be_written_is_a_warning(folder, caplog):
    cache_dir()
    (folder / "a").mkdir()
    save_entry("a", b"1")
    assert "could not be kept for the next run" in caplog.text
    assert os.listdir(folder) == ["a"]


def test_processes_that_write_the_same_entry_at_once_leave_one_whole(folder):
    code = (
        "from bigseg.reuse import *\n"
        "import sys\n"
        "for _ in range(200): save_entry('a', sys.argv[1].encode() * 100_000)\n"
        "assert load_entry('a') is not None"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "xyz"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert load_entry("a") in [letter * 100_000 for letter in (b"x", b"y", b"z")]
    assert os.listdir(folder) == ["a"]


def test_what_was_used_least_recently_goes_first(folder, monkeypatch):
    monkeypatch.setattr(reuse, "MOST_BYTES", 3 * (32 + 10))
    for i, name in enumerate("abc"):
        save_entry(name, b"0123456789")
        os.utime(folder / name, (i, i))
    assert load_entry("a") is not None
    save_entry("d", b"0123456789")
    assert sorted(os.listdir(folder)) == ["a", "c", "d"]


@given(st.lists(st.binary(max_size=5)), st.lists(st.binary(max_size=5)))
def test_names_are_equal_only_for_equal_parts(a, b):
    assert (digest_of(*a) == digest_of(*b)) == (a == b)
    assert digest_of("a", "b") == digest_of(b"a", b"b")


def test_a_processor_says_what_it_is():
    assert processor() == processor() != ""
