"""Disks that are full, read only, or fail: the run ends with the reason, and goes on later."""

import contextlib
import errno
import shutil
import subprocess
import time

import pytest

from bigseg import ledger
from chaos.faults import SLOWLY, Fault, wait_until
from chaos.scene import N_BLOCKS, assert_same, files_of, here, marks_of, wait_for_blocks


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, at which only this test writes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True
    )
    if not made or made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {made.stderr if made else 'no mount'}")
    yield place
    # Whoever holds a file there is about to end.
    subprocess.run(["umount", "--lazy", place], check=True)


def remount(place, options):
    """Whether it could be done: a disk at which someone writes right now stays writable."""
    return not subprocess.run(["mount", "-o", f"remount,{options}", place]).returncode


@pytest.fixture
def truth_at(scene, disk):
    """What an undisturbed run leaves on the disk."""
    ended, _ = here(scene.serial("--out", disk / "out.zarr"))
    assert ended.code == 0, ended.said
    truth = files_of(disk)
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return truth


def n_done(out):
    return sum(int((m != 0).sum()) for m in marks_of(out).values())


def test_a_full_disk_ends_the_run_at_once_and_with_space_it_goes_on(
    scene, faults, disk, truth_at, one_ray, monkeypatch
):
    out = disk / "out.zarr"
    faults.plan(SLOWLY)
    # Of this process, which is the driver: on a full disk the last marks may find no room.
    monkeypatch.setattr(ledger, "FLUSH_EVERY_S", 0.1)
    # Enough for the arrays and a third of the chunks: each takes a page.
    assert remount(disk, "size=160k")
    ended, _ = here(scene.on_ray("--out", out))
    assert ended.code == 5, ended.said
    assert "No space left on device" in ended.said
    assert "Traceback" not in ended.said
    n_begun = len(faults.at("before-work"))
    done = n_done(out)
    assert 0 < done <= n_begun < N_BLOCKS, "nobody goes on where nothing can be written"
    assert remount(disk, "size=8m")
    faults.forget()
    ended, _ = here(scene.serial("--out", out))
    assert ended.code == 0, ended.said
    assert f"went on from {done} of" in ended.said
    assert_same(files_of(disk), truth_at)


def test_an_output_turned_read_only_ends_the_run_and_later_it_goes_on(
    scene, faults, disk, truth_at
):
    out = disk / "out.zarr"
    faults.plan(SLOWLY, ledger={"FLUSH_EVERY_S": 0.1})
    running = scene.start(scene.serial("--out", out))
    wait_for_blocks(faults, 10)
    wait_until(lambda: remount(disk, "ro"), within_s=20, what="read only")
    turned = time.monotonic()
    ended = running.end()
    assert time.monotonic() - turned < 15
    assert ended.code == 5, ended.said
    assert "Read-only file system" in ended.said
    assert remount(disk, "rw")
    assert n_done(out) >= 5
    # The lock could not be removed; its owner is known to be gone.
    ended, _ = here(scene.serial("--out", out))
    assert ended.code == 0, ended.said
    assert_same(files_of(disk), truth_at)


def test_input_output_errors_that_pass_cost_one_more_try_each(scene, faults, one_ray):
    reading = Fault("before-read", "error", at=r"^predict 11$", value=errno.EIO)
    writing = Fault("before-write", "error", at=r"^predict 30$", value=errno.EIO)
    faults.plan(reading, writing, SLOWLY)
    ended, _ = here(scene.on_ray())
    assert ended.code == 0, ended.said
    assert len(faults.suffered("error")) == 2
    scene.check()


def test_no_space_for_the_ledger_ends_the_run_with_the_reason(scene, faults):
    full = Fault("before-rename", "error", at=r"/ledger/predict/c/", value=errno.ENOSPC, skip=5)
    faults.plan(SLOWLY, full, ledger={"FLUSH_EVERY_S": 0.1})
    ended = scene.run(scene.serial())
    assert ended.code == 5, ended.said
    assert "No space left on device" in ended.said
    with contextlib.suppress(FileNotFoundError):
        assert not list(scene.out.rglob("*.partial"))
    scene.go_on(scene.serial())
    scene.check()
