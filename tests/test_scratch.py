"""Scratch space of objects is whole, or it is missed, said so, and made again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, write_image
from killing import Killed, kill_at_write
from planting import INSIDE, config_for, labels_at, planted_shapes, truth_of, write_planting_model

from bigseg import layout, results, scratch, seed_stages, segment
from bigseg.ledger import Ledger
from bigseg.progress import NullProgress
from bigseg.rerun import remake_instances
from bigseg.rules import RuleOptions
from bigseg.segment import segment_serially
from bigseg.verify import verify
from bigseg.volume import open_volume

RULE = {"erode": 1, "grow": 2, "fill_holes": True}
BLOCK = (24, 24, 48)


def cut_off(config, stage, n=None):
    """A run that is killed when a stage is done, or `n` of its blocks."""

    def kill(n_done):
        task = recorder.tasks[-1]
        if task["label"] == stage and n_done == (n or task["total"]):
            raise Killed

    recorder = Recorder(kill)
    with pytest.raises(Killed):
        segment_serially(config, recorder)


def stages_of(config):
    """The stages that a run had something to do in, when it ends well."""
    recorder = Recorder()
    assert segment_serially(config, recorder).is_complete
    return [task["label"] for task in recorder.tasks]


def objects_of(url, *, below="c"):
    return sorted(path for path in Path(url, "0", below).rglob("*") if path.is_file())


def grid_of(out):
    """The cores of a result."""
    ledger = Ledger.open(results.ledger_url(str(out)), read_only=True)
    return results.begun_plan(ledger, str(out)).grid


def object_of(url, out, block):
    """What the block of a result wrote to an array without channels."""
    grid = grid_of(out)
    ends = zip(grid[block].core.start, grid.core_shape, strict=True)
    return Path(url, "0", "c", *(str(a // c) for a, c in list(ends)[1:]))


def why(result):
    assert not result.is_complete
    return " ".join(report.error for report in result.failed)


# ---- what was deleted is no background

LOST = {
    "codes, before seeds": ("predict", "codes"),
    "codes, before growing": ("number", "codes"),
    "ids, before growing": ("number", "ids"),
    "labels, before holes are found": ("grow", "grown"),
    "labels, before holes are filled": ("close", "grown"),
    "holes, before they are filled": ("close", "gaps"),
}


@pytest.mark.parametrize(
    ("what", "damage"),
    [*((what, "gone") for what in LOST), ("ids, before growing", "torn")],
)
def test_an_object_that_is_lost_between_two_stages_is_told_and_made_again(
    planted, tmp_path, what, damage
):
    stage, array = LOST[what]
    out = tmp_path / "out.zarr"
    config = config_for(*planted, out, RULE, block=BLOCK)
    cut_off(config, stage)
    lost = objects_of(out / "scratch" / array)[0]
    if damage == "gone":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes()[:-1])
    said = why(segment_serially(config, NullProgress()))
    words = "does not hold what a finished block wrote" if damage == "gone" else "cannot be decoded"
    assert f"{out}/scratch/{array} {words}" in said
    assert f"remove {out}/scratch, and the same command makes it again" in said
    assert "--overwrite" not in said
    assert "copy" not in said
    shutil.rmtree(out / "scratch")
    assert segment_serially(config, NullProgress()).is_complete
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), RULE)[0])


@pytest.mark.parametrize(
    ("stage", "array"), [("seeds", "codes"), ("grow", "ids"), ("grow", "codes"), ("holes", "grown")]
)
def test_what_a_block_that_is_done_has_lost_is_missed_by_its_neighbours(
    planted, tmp_path, stage, array
):
    out = tmp_path / "out.zarr"
    config = config_for(*planted, out, RULE, block=(24, 16, 24))
    cut_off(config, stage, n=1)
    ledger = Ledger.open(results.ledger_url(str(out)), read_only=True)
    (done,) = np.flatnonzero(~ledger.pending(stage)).tolist()
    object_of(out / "scratch" / array, out, done).unlink()
    said = why(segment_serially(config, NullProgress()))
    assert f"{out}/scratch/{array} does not hold what a finished block wrote" in said


def test_blocks_that_are_empty_have_lost_nothing(tmp_path):
    painting = np.zeros((16, 48, 48), np.uint8)
    painting[2:6, 2:6, 2:6] = painting[2:6, 40:44, 20:30] = INSIDE
    image = write_image(tmp_path / "image.zarr", painting, chunks=(8, 16, 16))
    Path(image, "0", "c", "1", "2", "2").unlink(missing_ok=True)
    model = write_planting_model(tmp_path / "model.safetensors")
    for keep in (False, True):
        out = tmp_path / f"{keep}.zarr"
        options = {"block": (8, 16, 16), "keep_probabilities": keep, "region": "1:15,1:47,1:41"}
        config = config_for(image, model, out, RULE, **options)
        result = segment_serially(config, NullProgress())
        assert (result.is_complete, result.n_objects) == (True, 2)
        assert result.n_empty


@pytest.mark.parametrize("channel", [0, 1])
def test_kept_probabilities_that_are_lost_are_told_and_made_again(planted, tmp_path, channel):
    out = tmp_path / "out.zarr"
    options = {"block": BLOCK, "keep_probabilities": True}
    first, second = {"erode": 1, "grow": 3}, {"erode": 0, "grow": 2}
    segment_serially(config_for(*planted, out, first, **options), NullProgress())
    objects_of(out / "probabilities", below=f"c/{channel}")[0].unlink()
    result = remake_instances(
        str(out), RuleOptions(**second), executor="serial", progress=NullProgress()
    )
    assert f"`bigseg verify {out}` takes it back, and the same `bigseg segment`" in why(result)
    found = verify(str(out), progress=NullProgress())
    assert [(finding.stage, finding.block) for finding in found.findings] == [
        ("predict", result.failed[0].block)
    ]
    assert found.n_taken_back
    recorder = Recorder()
    config = config_for(*planted, out, second, **options)
    assert segment_serially(config, recorder).is_complete
    predict = recorder.tasks[0]
    assert (predict["label"], predict["total"], predict["done"]) == ("predict", 2, 2)
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), second)[0])


# ---- one damaged file


@pytest.mark.parametrize("damage", ["gone", "torn"])
@pytest.mark.parametrize(
    ("stage", "kind"), [("seeds", "seeds"), ("stitch", "pairs"), ("number", "number")]
)
def test_a_damaged_file_of_a_block_costs_scratch_space_and_not_the_network(
    planted, tmp_path, stage, kind, damage
):
    out = tmp_path / "out.zarr"
    rule = {"erode": 1, "grow": 3}
    config = config_for(*planted, out, rule, block=BLOCK, keep_probabilities=True)
    cut_off(config, stage)
    file = out / "scratch" / kind / "0" / "0"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    try:
        said = why(segment_serially(config, NullProgress()))
    except OSError as error:
        said = str(error)
    assert str(file) in said
    folder = f"{out}/scratch" if damage == "gone" else "the folder scratch of the result"
    assert f"remove {folder}, and the same command makes it again" in said
    shutil.rmtree(out / "scratch")
    stages = stages_of(config)
    assert stages[0] == "seeds"
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])


# ---- creations that were cut off


def kill_before_it_is_an_image(monkeypatch, name):
    publish = layout.publish

    def killed(url, *args, **options):
        if url.endswith(f"/{name}"):
            raise Killed
        publish(url, *args, **options)

    monkeypatch.setattr(layout, "publish", killed)


@pytest.mark.parametrize("array", ["codes", "ids"])
def test_scratch_space_whose_restoring_is_cut_off_is_restored(
    planted, tmp_path, monkeypatch, array
):
    out = tmp_path / "out.zarr"
    config = config_for(*planted, out, {"grow": 3}, block=BLOCK)
    segment_serially(config, NullProgress())
    truth = labels_at(out)
    volume, core = open_volume(str(out)), grid_of(out)[0].core
    volume.write(core, 1 - np.minimum(volume.read(core), 1))
    assert verify(str(out), progress=NullProgress()).n_taken_back
    with monkeypatch.context() as patch:
        kill_before_it_is_an_image(patch, array)
        with pytest.raises(Killed):
            segment_serially(config, NullProgress())
    assert segment_serially(config, NullProgress()).is_complete
    np.testing.assert_array_equal(labels_at(out), truth)
    assert not (out / "scratch").exists()


def test_a_change_of_rule_that_is_cut_off_in_scratch_space_can_be_given_up(
    planted, tmp_path, monkeypatch
):
    out = tmp_path / "out.zarr"
    first, second = {"erode": 1, "grow": 3}, {"erode": 0, "grow": 2}
    config = config_for(*planted, out, first, block=BLOCK, keep_probabilities=True)
    segment_serially(config, NullProgress())
    with monkeypatch.context() as patch:
        kill_before_it_is_an_image(patch, "ids")
        with pytest.raises(Killed):
            remake_instances(
                str(out), RuleOptions(**second), executor="serial", progress=NullProgress()
            )
    assert stages_of(config)[0] == "seeds"
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), first)[0])


def test_a_folder_that_a_killed_creation_left_alone_is_made_scratch_space(
    planted, tmp_path, monkeypatch
):
    out = tmp_path / "out.zarr"
    config = config_for(*planted, out, {"grow": 3}, block=BLOCK)

    def killed(plan):
        (out / "scratch").mkdir()
        (out / "scratch" / ".zarr.json.abc.partial").write_bytes(b"{")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(results, "create_scratch", killed)
        with pytest.raises(Killed):
            segment_serially(config, NullProgress())
    for _ in range(2):
        assert segment_serially(config, NullProgress()).is_complete
        assert not (out / "scratch").exists()


# ---- what verify takes back


def test_scratch_space_that_outlived_its_result_gets_the_type_for_the_new_number(
    tmp_path, monkeypatch
):
    painting = np.zeros((9, 42, 45), np.uint8)
    painting[1::3, 1::3, 1::3] = INSIDE
    image = write_image(tmp_path / "image.zarr", painting, chunks=(8, 16, 16), n_levels=2)
    model = write_planting_model(tmp_path / "model.safetensors")
    out = tmp_path / "out.zarr"
    rule = {"erode": 0, "grow": 0, "fill_holes": True}
    config = config_for(image, model, out, rule, block=(16, 48, 48), keep_probabilities=True)

    def killed(url):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(seed_stages, "codes_of", lambda p, rule: np.zeros(p.shape[1:], np.uint8))
        patch.setattr(segment, "remove_scratch", killed)
        with pytest.raises(Killed):
            segment_serially(config, NullProgress())
    assert open_volume(str(out / "scratch" / scratch.GROWN)).dtype == np.uint8
    torn = objects_of(out / "probabilities")[0]
    torn.write_bytes(torn.read_bytes()[:-1])
    assert verify(str(out), progress=NullProgress()).n_taken_back
    assert segment_serially(config, NullProgress()).n_objects == 630
    np.testing.assert_array_equal(labels_at(out), truth_of(painting, rule)[0])


@pytest.mark.parametrize("n", [1, 2, 3, 6, 10])
def test_probabilities_taken_back_with_a_kill_at_any_write_take_everything_with_them(
    planted, tmp_path, monkeypatch, n
):
    out = tmp_path / "out.zarr"
    rule = {"erode": 1, "grow": 3}
    config = config_for(*planted, out, rule, block=(24, 40, 48), keep_probabilities=True)
    segment_serially(config, NullProgress())
    torn = objects_of(out / "probabilities")[-1]
    torn.write_bytes(torn.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        kill_at_write(patch, n)
        with pytest.raises(Killed):
            verify(str(out), n_seams=0, progress=NullProgress())
    if Ledger.open(f"{out}/ledger", read_only=True).is_finished:
        # Nothing was noted yet: the next one finds it.
        assert n == 1
        assert verify(str(out), n_seams=0, progress=NullProgress()).n_taken_back
    assert stages_of(config) == [
        *("predict", "seeds", "stitch", "number", "grow", "pyramid-1", "objects"),
    ]
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])
