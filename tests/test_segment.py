"""Nothing is lost: whatever is cut off, the same command goes on and ends in the same bytes."""

import contextlib
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import RESOURCES, Recorder, config_of, noise, write_image, write_model
from zarr_images import write_image as write_version

from bigseg import durable, segment, stages
from bigseg.config import UNetSpec
from bigseg.errors import LockedError, OutputError, ResourceError, StoreError, UsageError
from bigseg.layout import list_label, listed_labels
from bigseg.ledger import Ledger
from bigseg.places import SerialExecutor
from bigseg.progress import NullProgress
from bigseg.segment import carry_out, prepare, segment_serially
from bigseg.volume import Volume, open_volume

SPEC = UNetSpec.build(3, out_channels=3, depth=1, width=2)
SHAPE = (8, 36, 20)
OPTIONS = {"tile": (4, 16, 16), "output": "labels"}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16), n_levels=3)


@pytest.fixture
def model(tmp_path):
    # A seed with which all three classes come out.
    return write_model(tmp_path / "model.safetensors", SPEC, seed=4)[1]


def run(config):
    return segment_serially(config, NullProgress())


def bytes_under(url, *, but=()):
    """The content of every file below `url`, but of those below folders called so."""
    root = Path(url)
    files = (p for p in root.rglob("*") if p.is_file())
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in files
        if not set(but) & set(p.relative_to(root).parts)
    }


def levels_of(url):
    volume = open_volume(url)
    return [volume.at(i).array[:] for i in range(volume.n_levels)]


class Interrupted:
    """The serial executor, killed after so many reports in all; notes which blocks it ran."""

    def __init__(self, plan, after):
        self.inner = SerialExecutor(plan, 1)
        self.after = after
        self.ran = []

    n_workers = 1
    n_deaths = 0

    def run(self, stage, pending, stopping):
        for report in self.inner.run(stage, pending, stopping):
            if len(self.ran) == self.after:
                raise Killed
            self.ran.append((stage, report.block))
            yield report


def run_until_killed(config, after):
    plan, ledger = prepare(config, RESOURCES)
    executor = Interrupted(plan, after)
    with contextlib.suppress(Killed):
        carry_out(plan, ledger, executor, NullProgress())
    return executor.ran


def test_a_run_that_was_cut_off_redoes_only_what_is_missing(image, model, tmp_path):
    whole = tmp_path / "whole.zarr"
    every = run_until_killed(config_of(image, model, whole, **OPTIONS), 99)
    assert len(every) == 14
    assert set(np.unique(levels_of(str(whole))[0])) == {0, 1, 2}
    for after in (0, 5, 12, 13):
        out = tmp_path / f"{after}.zarr"
        config = config_of(image, model, out, **OPTIONS)
        first = run_until_killed(config, after)
        again = run_until_killed(config, 99)
        assert first == every[:after]
        assert again == every[after:]
        assert bytes_of_arrays(out) == bytes_of_arrays(whole)


def bytes_of_arrays(url):
    return {k: v for k, v in bytes_under(url, but=("ledger",)).items() if k != "zarr.json"}


def test_two_interruptions_and_a_lost_mark_change_nothing(image, model, tmp_path):
    whole, out = tmp_path / "whole.zarr", tmp_path / "out.zarr"
    run(config_of(image, model, whole, **OPTIONS))
    config = config_of(image, model, out, **OPTIONS)
    run_until_killed(config, 3)
    run_until_killed(config, 4)
    marks = zarr.open_group(str(out / "ledger"), mode="r+")["predict"]
    assert int(np.count_nonzero(marks[:])) == 7
    marks[2] = 0
    result = run(config)
    assert result.is_complete
    assert result.n_done_before == 6
    assert bytes_of_arrays(out) == bytes_of_arrays(whole)


@pytest.mark.parametrize("after", [1, 6])
def test_who_asks_to_stop_gets_the_blocks_in_flight_and_the_rest_later(
    after, image, model, tmp_path
):
    whole, out = tmp_path / "whole.zarr", tmp_path / "out.zarr"
    run(config_of(image, model, whole, **OPTIONS))
    config = config_of(image, model, out, **OPTIONS)
    asked, seen = threading.Event(), []

    def stop(n_done):
        seen.append(n_done)
        if len(seen) == after:
            asked.set()

    with pytest.raises(KeyboardInterrupt):
        segment_serially(config, Recorder(stop), stopping=lambda: contextlib.nullcontext(asked))
    assert after <= len(seen) <= after + 6
    assert "bigseg" not in listed_labels(image)
    result = run(config)
    assert result.is_complete
    # What was in flight was kept.
    assert result.n_done_before == len(seen)
    assert bytes_of_arrays(out) == bytes_of_arrays(whole)


def test_leftovers_of_a_write_that_was_killed_are_gone_when_the_rerun_is_complete(
    image, model, tmp_path
):
    config = config_of(image, model, tmp_path / "out.zarr", **OPTIONS)
    run_until_killed(config, 5)
    left = [
        tmp_path / "out.zarr" / "0" / ".0.0123.partial",
        tmp_path / "out.zarr" / "ledger" / "predict" / ".c.4567.partial",
    ]
    for path in left:
        path.write_bytes(b"torn")
    assert run(config).is_complete
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_run_on_the_same_output_is_refused(image, model, tmp_path):
    config = config_of(image, model, tmp_path / "out.zarr", **OPTIONS)
    refused = []

    def again(n_done):
        if n_done == 3:
            with pytest.raises(LockedError, match=f"process {os.getpid()}") as caught:
                run(config)
            refused.append(caught.value.exit_code)

    assert segment_serially(config, Recorder(again)).is_complete
    assert refused
    assert set(refused) == {5}
    assert not list(tmp_path.glob(".*.lock"))


def test_a_run_that_was_taken_over_writes_nothing_more(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    config = config_of(image, model, out, **OPTIONS)

    def take_over(n_done):
        if n_done == 3:
            path = tmp_path / ".out.zarr.lock"
            path.write_text(json.dumps({**json.loads(path.read_text()), "owner": "another"}))

    with pytest.raises(ResourceError, match="no longer this run's"):
        segment_serially(config, Recorder(take_over))
    assert json.loads((tmp_path / ".out.zarr.lock").read_text())["owner"] == "another"
    (tmp_path / ".out.zarr.lock").unlink()
    result = run(config)
    assert result.is_complete
    assert result.n_done_before == 0


def test_what_no_other_try_can_mend_ends_the_run_at_once(image, model, tmp_path, monkeypatch):
    config = config_of(image, model, tmp_path / "out.zarr", **OPTIONS)
    whole = config_of(image, model, tmp_path / "whole.zarr", **OPTIONS)
    run(whole)
    tried = []
    write = durable.write_durably

    def full(path, data):
        if "ledger" not in str(path) and path.parent.name != "out.zarr":
            tried.append(path)
            if len(tried) > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_durably", full)
        with pytest.raises(StoreError, match=r"No space left on device.*the same command goes on"):
            run(config)
    assert len(tried) < 40
    result = run(config)
    assert result.is_complete
    assert 0 < result.n_done_before < result.n_blocks
    assert bytes_of_arrays(tmp_path / "out.zarr") == bytes_of_arrays(tmp_path / "whole.zarr")


def test_the_same_command_on_a_finished_output_does_nothing(image, model, monkeypatch):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    before = bytes_under(image)

    def refuse(*_):
        raise AssertionError("a finished run needs no worker")

    monkeypatch.setattr(stages, "make_stage", refuse)
    result = run(config)
    assert result.is_complete
    assert (result.n_done_before, result.n_done) == (result.n_blocks, result.n_blocks)
    assert bytes_under(image) == before


def test_other_settings_are_refused_and_named(image, model, tmp_path):
    run_until_killed(config_of(image, model, None, **OPTIONS), 2)
    before = bytes_under(image)
    with pytest.raises(UsageError) as caught:
        run(config_of(image, model, None, **{**OPTIONS, "tile": (8, 16, 16)}))
    for part in (
        f"{image}/labels/bigseg was made with other settings (core: [1, 4, 16, 16], not",
        "tile: [1, 4, 16, 16], not [1, 8, 16, 16]",
        "repeat those, choose another --name or --out, or start anew with --overwrite",
    ):
        assert part in str(caught.value)
    _, other = write_model(tmp_path / "other.safetensors", SPEC, seed=1)
    with pytest.raises(UsageError, match=r"model\.sha256: .*, not .*; model\.url: "):
        run(config_of(image, other, None, **OPTIONS))
    assert bytes_under(image) == before


def test_an_output_of_another_version_of_bigseg_is_refused(image, model, tmp_path):
    config = config_of(image, model, tmp_path / "o.zarr", **OPTIONS)
    run_until_killed(config, 2)
    group = zarr.open_group(str(tmp_path / "o.zarr" / "ledger"), mode="r+")
    group.attrs["plan"] = {**group.attrs["plan"], "colour": "red"}
    with pytest.raises(UsageError) as caught:
        run(config)
    assert "was begun by another version of bigseg" in str(caught.value)
    assert "unknown setting 'colour'" in str(caught.value)
    assert "start anew with --overwrite" in str(caught.value)
    assert run(config.model_copy(update={"overwrite": True})).is_complete


def test_overwrite_starts_anew_with_other_settings(image, model):
    run(config_of(image, model, None, **OPTIONS))
    first = levels_of(f"{image}/labels/bigseg")
    config = config_of(image, model, None, **{**OPTIONS, "region": "0:4,:,:"}, overwrite=True)
    result = run(config)
    assert result.is_complete
    assert result.n_done_before == 0
    second = levels_of(f"{image}/labels/bigseg")
    np.testing.assert_array_equal(second[0][:4], first[0][:4])
    assert not second[0][4:].any()
    assert open_volume(image).label_names() == ("bigseg",)


def test_an_image_that_segmenting_did_not_make_is_never_deleted(image, model, tmp_path):
    truth = f"{image}/labels/cells"
    write_version(truth, [noise(SHAPE)], "zyx")
    # What `convert` and `sample` make carries a note of bigseg too.
    made = zarr.open_group(truth, mode="r+")
    made.attrs["bigseg"] = {"version": "0.1", "command": "convert"}
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "precious.txt").write_text("precious")
    foreign = write_image(tmp_path / "foreign.zarr", noise(SHAPE), chunks=SHAPE)
    cases = [
        {"name": "cells", "out": None},
        {"out": str(tmp_path / "plain")},
        {"out": foreign},
    ]
    before = bytes_under(tmp_path)
    for case in cases:
        config = config_of(image, model, case["out"], **OPTIONS, overwrite=True)
        config = config.model_copy(update=case)
        with pytest.raises(OutputError) as caught:
            run(config)
        assert "was not made by bigseg segment, so --overwrite does not delete it" in str(
            caught.value
        )
        with pytest.raises(OutputError, match="exists: give another name or use --overwrite"):
            run(config.model_copy(update={"overwrite": False}))
    with pytest.raises(UsageError, match="holds the image itself"):
        run(config_of(image, model, image, **OPTIONS, overwrite=True))
    assert bytes_under(tmp_path) == before


@pytest.mark.parametrize("survivor", ["ledger", "0", "1"])
def test_a_removal_cut_short_is_neither_listed_nor_finished(image, model, survivor, monkeypatch):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    url = f"{image}/labels/bigseg"
    truth = levels_of(url)

    real = segment.store.remove

    def cut_short(place):
        if place.endswith("ledger"):
            return real(place) if survivor != "ledger" else None
        for part in Path(place).iterdir():
            if part.name not in (survivor, "ledger", "zarr.json"):
                shutil.rmtree(part)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(segment.store, "remove", cut_short)
        with pytest.raises(Killed):
            run(config.model_copy(update={"overwrite": True}))
    assert open_volume(image).label_names() == ()
    assert Ledger.open(f"{url}/ledger") is None
    assert run(config.model_copy(update={"overwrite": True})).is_complete
    for found, wanted in zip(levels_of(url), truth, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("moment", ["create_image", "ledger", "plan"])
def test_a_run_killed_while_it_prepares_goes_on(image, model, moment, monkeypatch):
    config = config_of(image, model, None, **OPTIONS)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "create_image":
            patch.setattr("bigseg.ngff.multiscale_attributes", killed)
        elif moment == "ledger":
            patch.setattr(Ledger, "create", killed)
        else:
            patch.setattr("bigseg.ledger.ZstdCodec", killed)
        with pytest.raises(Killed):
            run(config)
    assert run(config).is_complete
    assert open_volume(image).label_names() == ("bigseg",)


def test_a_ledger_that_was_lost_means_that_nothing_is_done(image, model):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    url = f"{image}/labels/bigseg"
    truth = bytes_of_arrays(url)
    shutil.rmtree(f"{url}/ledger")
    run_until_killed(config, 3)
    assert open_volume(image).label_names() == ()
    result = run(config)
    assert result.n_done_before == 3
    assert bytes_of_arrays(url) == truth
    assert open_volume(image).label_names() == ("bigseg",)


def test_labels_are_listed_only_when_complete_and_beside_others(image, model):
    write_version(f"{image}/labels/cells", [noise(SHAPE)], "zyx")
    list_label(image, "cells")
    config = config_of(image, model, None, **OPTIONS)
    for after in (3, 9, 2):
        run_until_killed(config, after)
        listed = open_volume(image).label_names()
        assert listed == (("cells",) if after != 2 else ("cells", "bigseg"))


def test_a_result_that_fell_out_of_the_list_is_listed_again(image, model):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    labels = zarr.open_group(f"{image}/labels", mode="r+")
    labels.attrs.put({"ome": {"version": "0.5", "labels": []}})
    run(config)
    assert open_volume(image).label_names() == ("bigseg",)


@pytest.mark.parametrize("step", ["read", "work", "write"])
def test_a_block_that_fails_is_set_aside_and_done_by_the_next_run(
    image, model, tmp_path, step, monkeypatch
):
    whole = tmp_path / "whole.zarr"
    run(config_of(image, model, whole, **OPTIONS))
    config = config_of(image, model, None, **OPTIONS)
    real = getattr(stages.PredictStage, step)

    def fail(self, block, *data):
        if block.index in (2, 5):
            raise ValueError(f"no luck in {step}")
        return real(self, block, *data)

    with monkeypatch.context() as patch:
        patch.setattr(stages.PredictStage, step, fail)
        result = run(config)
    assert not result.is_complete
    assert [report.block for report in result.failed] == [2, 5]
    assert result.failed[0].error == f"block 0:1,0:4,16:32,0:16: ValueError: no luck in {step}"
    assert "Traceback" in result.failed[0].details
    # The pyramid is not built on holes, and what has holes is not listed.
    assert result.n_done == len(result.plan.grid) - 2
    assert open_volume(image).label_names() == ()
    again = run(config)
    assert again.is_complete
    assert (again.n_done_before, again.n_done) == (result.n_done, again.n_blocks)
    assert open_volume(image).label_names() == ("bigseg",)
    assert bytes_of_arrays(f"{image}/labels/bigseg") == bytes_of_arrays(whole)


def test_an_error_of_bigseg_in_a_block_is_told_in_its_own_words(image, model, monkeypatch):
    def full(self, region, data):
        raise OutputError("the disk is full: make room")

    monkeypatch.setattr(Volume, "write", full)
    result = run(config_of(image, model, None, **OPTIONS))
    assert len(result.failed) == len(result.plan.grid)
    assert result.failed[0].error == "block 0:1,0:4,0:16,0:16: the disk is full: make room"


@pytest.mark.parametrize(("n_failing", "ends"), [(2, False), (9, True)])
def test_a_store_that_stays_away_ends_the_run_and_one_that_comes_back_does_not(
    n_failing, ends, image, model, tmp_path, monkeypatch
):
    config = config_of(image, model, tmp_path / "out.zarr", **OPTIONS)
    whole = config_of(image, model, tmp_path / "whole.zarr", **OPTIONS)
    run(whole)
    tried, write = [], Volume.write

    def away(volume, region, data):
        tried.append(region)
        if 2 < len(tried) <= 2 + n_failing:
            raise TimeoutError("no answer")
        write(volume, region, data)

    with monkeypatch.context() as patch:
        patch.setattr(Volume, "write", away)
        if ends:
            with pytest.raises(StoreError, match=r"no answer; what is done is kept"):
                run(config)
            assert len(tried) <= 2 + 3 + 4
        else:
            assert len(run(config).failed) == 2
    assert run(config).is_complete
    assert bytes_of_arrays(tmp_path / "out.zarr") == bytes_of_arrays(tmp_path / "whole.zarr")
