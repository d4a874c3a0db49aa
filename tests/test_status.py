"""How far a result is, at every moment of its life, without touching it."""

import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import RESOURCES, config_of, noise, write_image, write_model

from bigseg import cli, store
from bigseg.config import UNetSpec
from bigseg.errors import InputNotFoundError, NotOmeZarrError
from bigseg.ledger import Ledger
from bigseg.lock import Lock, lock_url, read_lock
from bigseg.places import SerialExecutor
from bigseg.plan import PREDICT
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially
from bigseg.status import image_of, read_status

SPEC = UNetSpec.build(3, out_channels=2, depth=1, width=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("status")
    write_model(folder / "model.safetensors", SPEC)
    return folder


@pytest.fixture
def config(tmp_path, place):
    image = write_image(tmp_path / "image.zarr", noise((8, 36, 20)), chunks=(4, 16, 16), n_levels=2)
    model = str(place / "model.safetensors")
    return config_of(image, model, None, tile=(4, 16, 16), output="labels")


def snapshot(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def begin(config, n_blocks, *, failed=()):
    """A run that ended after so many blocks; gives its plan and ledger."""
    plan, ledger = prepare(config, RESOURCES)
    with SerialExecutor(plan, 1) as executor:
        for report in executor.run(PREDICT, ledger.pending(PREDICT)):
            if report.block < n_blocks:
                ledger.mark(PREDICT, report.block, report.checksum)
    for block in failed:
        ledger.fail(PREDICT, block, f"block {plan.grid[block].core}: it is cursed")
    ledger.flush()
    return plan, ledger


def test_a_finished_result_is_finished_and_says_from_what(config):
    plan = segment_serially(config, NullProgress()).plan
    before = snapshot(config.image)
    found = read_status(plan.output.url + "/")
    assert snapshot(config.image) == before
    assert found.is_finished
    assert [(s.name, s.n_blocks, s.n_done, s.n_left) for s in found.stages] == [
        (PREDICT, 12, 12, 0),
        ("pyramid-1", 1, 1, 0),
        ("list", 1, 1, 0),
    ]
    assert (found.n_done, found.n_blocks) == (13, 13)
    assert found.owner is None
    assert found.left_s is None
    values = found.as_dict()
    assert (values["image"], values["model"]) == (config.image, config.model)
    assert values["engine"].startswith("torch ")
    assert "finished" in found.as_text()
    assert "nothing is left to do" in found.way_on


def test_an_interrupted_run_is_unfinished_and_says_how_to_go_on(config):
    plan, _ = begin(config, 5, failed=(7, 9))
    found = read_status(plan.output.url)
    assert found.state == "unfinished"
    assert [(s.name, s.n_done, s.n_failed, s.n_left) for s in found.stages] == [
        (PREDICT, 5, 2, 7),
        ("pyramid-1", 0, 0, 1),
        ("list", 0, 0, 1),
    ]
    assert found.n_failures == 2
    assert all("it is cursed" in reason for reason in found.failures)
    assert f"bigseg segment {config.image} --model {config.model} --name bigseg" in found.way_on
    text = found.as_text()
    assert "5 of 12 blocks done, 2 set aside, 7 left" in text
    assert str(plan.grid[7].core) in text


def test_only_the_first_failures_are_listed_and_all_are_counted(config, monkeypatch):
    monkeypatch.setattr("bigseg.status.MAX_LISTED", 3)
    plan, _ = begin(config, 0, failed=range(8))
    found = read_status(plan.output.url)
    assert len(found.failures) == 3
    assert found.n_failures == 8
    assert "and 5 more" in found.as_text()


def test_a_living_run_shows_its_owner_its_rate_and_what_is_left(config):
    plan, _ = begin(config, 4)
    url = plan.output.url
    with Lock.acquire(url, beat_s=0.05) as lock:
        assert read_status(url).state == "running"
        assert "not known yet" in read_status(url).as_text()
        # Half a million voxels a second; the 12 blocks of the volume hold 5760.
        lock.note(stage=PREDICT, n_done=6, n_blocks=12, mvox_per_s=0.5)
        for _ in range(100):
            if read_lock(url).notes:
                break
            time.sleep(0.05)
        found = read_status(url)
    assert found.state == "running"
    assert found.owner.pid == os.getpid()
    assert found.owner.is_alive
    assert found.stages[0].n_done == 6
    assert found.mvox_per_s == 0.5
    assert found.blocks_per_s == pytest.approx(0.5e6 * 12 / 5760, rel=1e-3)
    assert found.left_s == pytest.approx(6 / found.blocks_per_s, abs=1e-3)
    assert f"process {os.getpid()}" in found.as_text()
    assert "Mvox/s" in found.as_text()


def abandon(url):
    """A lock whose owner's process has ended."""
    lock = Lock.acquire(url)
    left = Path(lock_url(url)).read_bytes()
    lock.release()
    state = json.loads(left)
    state["pid"] = 2**22 + 1
    Path(lock_url(url)).write_text(json.dumps(state))


def test_a_run_that_died_is_abandoned_and_its_rate_is_not_told(config):
    plan, _ = begin(config, 4)
    abandon(plan.output.url)
    found = read_status(plan.output.url)
    assert found.state == "abandoned"
    assert not found.owner.is_alive
    assert found.blocks_per_s is found.left_s is None
    assert "ended without finishing" in found.as_text()


def test_a_run_that_was_cut_off_before_its_first_block_is_unfinished(config):
    plan, _ = begin(config, 0)
    store.remove(f"{plan.output.url}/ledger")
    found = read_status(plan.output.url)
    assert found.state == "unfinished"
    assert found.stages == ()
    assert found.as_dict()["image"] is None
    assert "the same `bigseg segment` command" in found.way_on


def test_a_finished_result_that_is_not_listed_is_not_finished(config):
    from bigseg.volume import unlist_label

    plan = segment_serially(config, NullProgress()).plan
    unlist_label(config.image, "bigseg")
    found = read_status(plan.output.url)
    assert found.state == "unfinished"
    assert found.stages[-1].n_left == 1


def test_what_is_no_result_is_refused_with_a_hint(config, tmp_path):
    segment_serially(config, NullProgress())
    with pytest.raises(InputNotFoundError, match="no such store"):
        read_status(str(tmp_path / "none.zarr"))
    with pytest.raises(NotOmeZarrError, match=r"not made by .*image\.zarr/labels/bigseg"):
        read_status(config.image)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("mine")
    with pytest.raises(NotOmeZarrError, match="without Zarr metadata"):
        read_status(str(tmp_path / "folder"))


def test_a_damaged_ledger_is_said_to_be_damaged(config):
    plan = segment_serially(config, NullProgress()).plan
    chunk = Path(plan.output.url, "ledger", PREDICT, "c", "0")
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(NotOmeZarrError, match=r"ledger of .* is damaged .*--overwrite"):
        read_status(plan.output.url)


def test_the_ledger_of_another_version_is_read_as_far_as_it_is_known(config):
    plan, ledger = begin(config, 3)
    ledger._group.attrs["plan"] = {"something": "else"}
    found = read_status(plan.output.url)
    assert found.stages[0].n_done == 3
    assert found.as_dict()["engine"] is None
    assert found.as_text()


def test_json_has_its_documented_keys(config):
    plan = segment_serially(config, NullProgress()).plan
    result = CliRunner().invoke(cli.main, ["status", plan.output.url, "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert list(values) == [
        *("url", "state", "image", "model", "engine", "output", "stages", "failures", "failed"),
        *("filled", "owner", "blocks_per_s", "mvox_per_s", "left_s", "way_on"),
    ]
    assert set(values["stages"][0]) == {"name", "blocks", "done", "empty", "failed", "left"}


def test_the_image_beside_which_a_result_lies_follows_from_its_place():
    assert image_of("/data/image.zarr/labels/cells") == "/data/image.zarr"
    assert image_of("s3://bucket/image.zarr/labels/cells") == "s3://bucket/image.zarr"
    assert image_of("/data/out.zarr") is None
    assert Ledger.open("/nowhere/ledger") is None
