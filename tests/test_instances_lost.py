"""Nothing of objects is lost: cut off, taken back, half deleted, they come out the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, run_command
from planting import config_for, labels_at, planted_shapes, truth_of

from bigseg import counting, grow_stages, results, segment, store
from bigseg import plan as plan_module
from bigseg.blocks import Region
from bigseg.errors import IncompleteError
from bigseg.ledger import Ledger
from bigseg.progress import NullProgress
from bigseg.rerun import remake_instances
from bigseg.rules import RuleOptions
from bigseg.segment import segment_serially
from bigseg.verify import verify
from bigseg.volume import open_volume


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_after_every_block(run):
    """What `run(progress)` gives when it survives; it is killed after one more block each time."""
    for n_done in range(1, 100):
        told = []

        def kill(_, told=told, n_done=n_done):
            told.append(1)
            if len(told) == n_done:
                raise Killed

        try:
            result = run(Recorder(kill))
        except Killed:
            continue
        assert n_done > 1
        return result
    raise AssertionError("it never survives")


def test_cut_off_after_any_block_the_same_command_ends_in_the_same_bytes(planted, tmp_path):
    image, model = planted
    rule = {"erode": 1, "grow": 2, "fill_holes": True}
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, rule, block=(24, 24, 48))
    result = killed_after_every_block(lambda progress: segment_serially(config, progress))
    assert result.is_complete
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])
    again = segment_serially(config, NullProgress())
    assert again.n_done_before == again.n_blocks


def test_numbering_that_is_cut_off_is_done_again(planted, tmp_path, monkeypatch):
    image, model = planted
    rule = {"erode": 1, "grow": 2}
    out = tmp_path / "out.zarr"
    whole = counting._create_output

    def killed(*arguments):
        whole(*arguments)
        raise Killed

    monkeypatch.setattr(counting, "_create_output", killed)
    with pytest.raises(Killed):
        segment_serially(config_for(image, model, out, rule, block=(8, 24, 24)), NullProgress())
    monkeypatch.undo()
    segment_serially(config_for(image, model, out, rule, block=(8, 24, 24)), NullProgress())
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])


def test_a_change_of_rule_that_is_cut_off_anywhere_goes_on(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    first, second = {"erode": 1, "grow": 3}, {"erode": 0, "grow": 2}
    options = {"block": (24, 24, 48), "keep_probabilities": True}
    segment_serially(config_for(image, model, out, first, **options), NullProgress())
    killed_after_every_block(
        lambda progress: remake_instances(
            str(out), RuleOptions(**second), executor="serial", progress=progress
        )
    )
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), second)[0])


def test_verify_finds_what_is_wrong_with_labels_and_the_same_command_mends_it(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, {"erode": 1, "grow": 3}, block=(8, 24, 24))
    segment_serially(config, NullProgress())
    truth = labels_at(out)
    found = verify(str(out), progress=NullProgress())
    assert found.is_right, found.as_text()
    assert {check.name: check.n_checked for check in found.checks}["seams"] > 3
    volume = open_volume(str(out))
    core = Region((0, 8, 0, 0), (1, 16, 24, 24))
    volume.write(core, volume.read(core)[:, :, ::-1].copy())
    assert not verify(str(out), progress=NullProgress()).is_right
    segment_serially(config, NullProgress())
    np.testing.assert_array_equal(labels_at(out), truth)
    assert verify(str(out), progress=NullProgress()).is_right


@pytest.mark.parametrize("wrong", ["numbers", "shift"])
def test_verify_finds_seams_that_no_checksum_shows(planted, tmp_path, monkeypatch, wrong):
    image, model = planted
    out = tmp_path / "out.zarr"

    true = grow_stages.read_numbers

    def other(plan, kind, block):
        numbers = true(plan, kind, block)
        return numbers + (block % 2 if wrong == "numbers" else 0) * (numbers > 0)

    monkeypatch.setattr(grow_stages, "read_numbers", other)
    if wrong == "shift":
        whole = grow_stages.grow
        monkeypatch.setattr(grow_stages, "grow", lambda *a: np.roll(whole(*a), 4, axis=3))
    config = config_for(image, model, out, {"erode": 0, "grow": 1}, block=(8, 16, 16))
    segment_serially(config, NullProgress())
    monkeypatch.undo()
    found = verify(str(out), n_seams=40, progress=NullProgress())
    assert any(check.name == "seams" and check.findings for check in found.checks)


def test_verify_of_a_result_without_labels_says_so(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"

    def kill(_):
        raise Killed

    with pytest.raises(Killed):
        segment_serially(config_for(image, model, out, {}, block=(24, 40, 48)), Recorder(kill))
    with pytest.raises(IncompleteError, match="no labels yet"):
        verify(str(out), progress=NullProgress())


def level_at(url, level):
    volume = open_volume(str(url), level=level)
    return volume.read(Region.of_shape(volume.shape))[0]


def spoil(url, level=0):
    """Write other labels than a run did into the core of one block, in whole write units."""
    volume = open_volume(str(url), level=level)
    core = Region((0, 0, 0, 0), (1, 24, *volume.shape[2:]))
    volume.write(core, volume.read(core)[:, :, ::-1].copy())
    assert not verify(str(url), progress=NullProgress()).is_right


def test_objects_made_again_after_verify_take_the_whole_pyramid_with_them(
    planted, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan_module, "BLOCK_BYTES", 8 * 8**3)
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, {"grow": 3}, block=(24, 24, 24))
    segment_serially(config, NullProgress())
    truth = [level_at(out, k) for k in (0, 1)]
    volume = open_volume(str(out))
    core = Region((0, 0, 24, 24), (1, 24, 40, 44))
    volume.write(core, volume.read(core)[:, :, ::-1].copy())
    assert not verify(str(out), progress=NullProgress()).is_right
    ledger = Ledger.open(results.ledger_url(str(out)), read_only=True)
    assert 0 < ledger.n_done("pyramid-1") < ledger.stages["pyramid-1"]
    segment_serially(config, NullProgress())
    for k in (0, 1):
        np.testing.assert_array_equal(level_at(out, k), truth[k])


def test_a_level_that_is_made_again_needs_no_scratch_space(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, {}, block=(24, 40, 48))
    n_objects = segment_serially(config, NullProgress()).n_objects
    truth = level_at(out, 1)
    spoil(out, level=1)
    assert segment_serially(config, NullProgress()).n_objects == n_objects
    np.testing.assert_array_equal(level_at(out, 1), truth)


@pytest.mark.parametrize("moment", ["removed", "restored"])
def test_scratch_space_that_is_not_whole_is_never_built_on(planted, tmp_path, monkeypatch, moment):
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, {"grow": 3}, block=(24, 24, 48))

    def half_deleted(fs, path, *, local):
        del fs, local
        if path.endswith("/ids"):
            shutil.rmtree(Path(path, "0", "c"))
            raise Killed

    def half_restored(plan):
        create_scratch(plan)
        raise Killed

    create_scratch = results.create_scratch
    if moment == "removed":
        monkeypatch.setattr(store, "_delete", half_deleted)
        with pytest.raises(Killed):
            segment_serially(config, NullProgress())
        monkeypatch.undo()
    else:
        segment_serially(config, NullProgress())
    truth = labels_at(out)
    spoil(out)
    if moment == "restored":
        monkeypatch.setattr(results, "create_scratch", half_restored)
        with pytest.raises(Killed):
            segment_serially(config, NullProgress())
        monkeypatch.undo()
    segment_serially(config, NullProgress())
    np.testing.assert_array_equal(labels_at(out), truth)
    assert not (out / "scratch").exists()


def test_probabilities_that_are_gone_are_not_taken_for_background(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    options = {"block": (24, 40, 48), "keep_probabilities": True}
    segment_serially(config_for(image, model, out, {}, **options), NullProgress())
    shutil.rmtree(out / "probabilities")
    code, said = run_command("instances", out, "--grow", 1, "--executor", "serial")
    assert code == 2
    assert "has lost its folder probabilities" in said
    assert labels_at(out).any()
    code, said = run_command("verify", out)
    assert code == 3
    assert "bring it back from a copy" in said


def test_clean_removes_scratch_space_of_a_finished_result_and_nothing_else(
    planted, tmp_path, monkeypatch
):
    image, model = planted
    out = tmp_path / "out.zarr"

    def killed(url):
        raise Killed

    monkeypatch.setattr(segment, "remove_scratch", killed)
    with pytest.raises(Killed):
        segment_serially(config_for(image, model, out, {}, block=(24, 40, 48)), NullProgress())
    truth = labels_at(out)
    code, said = run_command("clean", out)
    assert code == 0, said
    assert "scratch space" in said
    assert not (out / "scratch").exists()
    np.testing.assert_array_equal(labels_at(out), truth)
    assert run_command("clean", out)[1].strip().endswith("nothing to remove")


def test_a_table_that_is_gone_is_found_and_made_again(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, {"erode": 1, "grow": 3}, block=(8, 24, 48))
    segment_serially(config, NullProgress())
    truth, labels = (out / "objects.parquet").read_bytes(), labels_at(out)
    (out / "objects.parquet").unlink()
    found = verify(str(out), n_seams=0, progress=NullProgress())
    assert [finding.stage for finding in found.findings] == ["objects"]
    segment_serially(config, NullProgress())
    assert (out / "objects.parquet").read_bytes() == truth
    np.testing.assert_array_equal(labels_at(out), labels)
    assert verify(str(out), n_seams=0, progress=NullProgress()).is_right


def test_verify_finds_labels_of_another_type_than_their_number_asks_for(
    planted, tmp_path, monkeypatch
):
    image, model = planted
    out = tmp_path / "out.zarr"
    monkeypatch.setattr(counting, "smallest_type", lambda n: np.dtype("uint32"))
    config = config_for(image, model, out, {"erode": 0, "grow": 1}, block=(24, 40, 48))
    segment_serially(config, NullProgress())
    monkeypatch.undo()
    found = verify(str(out), progress=NullProgress())
    assert "the type of level 0 is uint32, the plan asks for uint8" in str(found.findings[0])
