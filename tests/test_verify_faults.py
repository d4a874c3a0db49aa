"""A fault of each kind is found by its check, and mended by the same command."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import Recorder
from killing import Killed, kill_at_write
from verifying import (
    chunk_of,
    files_of,
    image_in,
    look,
    model_in,
    overwrite,
    run,
    tear,
    with_mask,
    without_context,
    wrong_by_check,
)

from bigseg import planner
from bigseg.blocks import Region
from bigseg.errors import (
    NotOmeZarrError,
)
from bigseg.ledger import EMPTY_MARK, Ledger
from bigseg.plan import PREDICT, stage_grids
from bigseg.progress import NullProgress
from bigseg.pyramid_stage import PyramidStage
from bigseg.results import begun_plan
from bigseg.seams import Reference
from bigseg.segment import segment_serially
from bigseg.volume import open_volume


@pytest.fixture
def model(tmp_path):
    return model_in(tmp_path)


@pytest.fixture
def image(tmp_path):
    return image_in(tmp_path)


# ---- faults


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


DAMAGE = {
    "torn": (tear, "cannot be decoded"),
    "a flipped bit": (flip, "cannot be decoded"),
    "gone": (lambda path: path.unlink(), "what was written is gone"),
    "another's": (
        lambda path: shutil.copy(path.parent / "1", path),
        "other bytes lie there than were written",
    ),
}


def test_a_fault_of_a_result_that_was_moved_is_told_and_nothing_is_taken_back(
    image, model, tmp_path
):
    config, plan = run(image, model)
    before = files_of(plan.output.url)
    moved = shutil.move(image, tmp_path / "elsewhere.zarr")
    url = f"{moved}/labels/bigseg"
    tear(chunk_of(url, 1, 1, 0))
    torn = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    found = look(url, n_seams=0)
    assert wrong_by_check(found) == {"blocks": 1}
    assert found.n_taken_back == 0
    assert f"it was made, at {plan.output.url}: move it back" in found.sentence
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == torn
    assert open_volume(str(moved)).label_names() == ("bigseg",)
    shutil.move(moved, image)
    assert look(plan.output.url, n_seams=0).n_taken_back == 3
    segment_serially(config, NullProgress())
    assert files_of(plan.output.url) == before


def test_another_name_of_the_same_place_is_not_elsewhere(image, model, tmp_path):
    config, plan = run(image, model)
    before = files_of(plan.output.url)
    link = tmp_path / "link"
    link.symlink_to(Path(image).parent)
    tear(chunk_of(plan.output.url, 1, 1, 0))
    assert look(f"{link}/image.zarr/labels/bigseg", n_seams=0).n_taken_back == 3
    segment_serially(config, NullProgress())
    assert files_of(plan.output.url) == before


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_damaged_chunk_is_found_and_mended(image, model, tmp_path, monkeypatch, what, sharded):
    if sharded:
        monkeypatch.setattr(planner, "MANY_CHUNKS", 1)
        monkeypatch.setattr(planner, "BLOCK_BYTES", 4 * 16 * 16)
    damage, words = DAMAGE[what]
    config, plan = run(image, model)
    assert (plan.output.shard is not None) == sharded
    url = plan.output.url
    before = files_of(url)
    damage(chunk_of(url, 1, 1, 0))
    found = look(url)
    assert wrong_by_check(found) == {"blocks": 1}
    (finding,) = found.findings
    assert finding.region == Region((0, 4, 16, 0), (1, 8, 32, 16))
    assert words in finding.reason
    assert found.n_taken_back == 3
    assert open_volume(image).label_names() == ()
    assert not found.is_finished
    assert "3 blocks were taken back: the same `bigseg segment` command" in found.sentence
    result = segment_serially(config, NullProgress())
    assert result.n_done_before == result.n_blocks - 3
    assert files_of(url) == before
    assert open_volume(image).label_names() == ("bigseg",)
    assert look(url).is_right


def test_what_lies_in_an_empty_block_is_found_and_erased(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    options = {"output": "labels", **with_mask(tmp_path)}
    config, plan = run(image, model, out, **options)
    before = files_of(out)
    ledger = Ledger.open(f"{out}/ledger")
    marks = [ledger.checksum(PREDICT, i) for i in range(len(plan.grid))]
    empty = plan.grid[marks.index(0xFFFFFFFF)].core
    open_volume(str(out)).write(empty, np.ones((1, *empty.shape), np.uint8))
    found = look(out)
    assert wrong_by_check(found) == {"blocks": 1}
    assert "was left empty" in found.findings[0].reason
    segment_serially(config, NullProgress())
    assert files_of(out) == before
    assert look(out).is_right


def fill_an_empty_block(url):
    ledger = Ledger.open(f"{url}/ledger")
    grid = begun_plan(ledger, url).grid
    empty = next(i for i in range(len(grid)) if ledger.checksum(PREDICT, i) == EMPTY_MARK)
    open_volume(url).write(grid[empty].core, np.ones((1, *grid[empty].core.shape), np.uint8))


FAULTS = {
    "a torn chunk": (lambda url: tear(chunk_of(url, 1, 1, 0)), False),
    "a torn shard": (lambda url: tear(chunk_of(url, 1, 1, 0)), True),
    "something in an empty block": (fill_an_empty_block, False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_taking_back_that_is_killed_at_any_write_is_none_or_is_finished_by_the_next_run(
    image, model, tmp_path, monkeypatch, fault
):
    damage, sharded = FAULTS[fault]
    if sharded:
        monkeypatch.setattr(planner, "MANY_CHUNKS", 1)
        monkeypatch.setattr(planner, "BLOCK_BYTES", 4 * 16 * 16)
    config, plan = run(image, model, **with_mask(tmp_path))
    url, labels, whole = plan.output.url, Path(image, "labels"), tmp_path / "whole"
    before = files_of(url)
    shutil.copytree(labels, whole)
    options = {"n_seams": 0, "n_chunks": 0}
    seen = []

    def unlisted(n_done):
        seen.append(n_done)
        assert open_volume(image).label_names() == ()

    for n in itertools.count(1):
        shutil.rmtree(labels)
        shutil.copytree(whole, labels)
        damage(url)
        seen.clear()
        survives = True
        with monkeypatch.context() as patch:
            kill_at_write(patch, n)
            try:
                look(url, **options)
            except Killed:
                survives = False
        if Ledger.open(f"{url}/ledger", read_only=True).is_finished:
            # Nothing is known of the fault yet: it is found as if for the first time.
            assert look(url, **options).n_taken_back == 3
        segment_serially(config, Recorder(unlisted))
        assert seen
        assert files_of(url) == before
        assert open_volume(image).label_names() == ("bigseg",)
        if survives:
            break
    assert n > 6
    assert look(url).is_right


def make_pyramid_again(plan):
    """Every block of the pyramid follows from the finest level as it is now."""
    for stage, grid in list(stage_grids(plan).items())[1:]:
        maker = PyramidStage(plan, int(stage.removeprefix("pyramid-")), 1)
        for block in grid:
            overwrite(plan.output.url, stage, block, maker.read(block))


@pytest.mark.parametrize("knows", ["the ledger knows", "the ledger does not know"])
def test_a_wrong_chunk_of_the_pyramid_is_found_and_mended(image, model, knows):
    config, plan = run(image, model)
    url = plan.output.url
    before = files_of(url)
    block = stage_grids(plan)["pyramid-1"][0]
    level = open_volume(url, level=1)
    values = level.read(block.core)
    values[..., 3, 3] = (values[..., 3, 3] + 1) % 3
    if knows == "the ledger knows":
        level.write(block.core, values)
    else:
        overwrite(url, "pyramid-1", block, values)
    found = look(url)
    check = "blocks" if knows == "the ledger knows" else "pyramid"
    assert set(wrong_by_check(found)) == {check}
    assert "pyramid-1" in {finding.stage for finding in found.findings}
    assert found.n_taken_back == 2
    segment_serially(config, NullProgress())
    assert files_of(url) == before
    assert look(url).is_right


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_a_block_that_did_not_see_its_neighbours_is_found_at_its_seams(
    image, model, tmp_path, kind
):
    out = tmp_path / "out.zarr"
    config, plan = run(image, model, out, output=kind)
    before = files_of(out)
    (number,) = (b.index for b in plan.grid if b.core.start == (0, 4, 16, 16))
    block = plan.grid[number]
    values = without_context(image, model, block.core, tmp_path, output=kind)
    assert (values != open_volume(str(out)).read(block.core, range(len(values)))).any()
    overwrite(str(out), PREDICT, block, values)
    make_pyramid_again(plan)
    assert not look(out, n_seams=0).findings
    found = look(out, n_seams=24)
    assert set(wrong_by_check(found)) == {"seams"}
    touched = [f.region.intersect(block.core).n_voxels for f in found.findings]
    assert all(touched)
    again = segment_serially(config, NullProgress())
    assert again.n_done_before < again.n_blocks
    assert files_of(out) == before
    assert look(out, n_seams=24).is_right


def test_one_wrong_voxel_breaks_the_bound_and_rounding_does_not(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    _, plan = run(image, model, out, prob_dtype="float32")
    reference = Reference(plan, image=image, transform=None)
    box = Region((0, 1, 9, 7), (1, 7, 25, 23))
    stored = open_volume(str(out)).read(box, range(3))
    assert reference.compare(box, stored) is None
    for shift, is_wrong in ((5e-5, False), (2e-4, True), (np.nan, True)):
        changed = stored.copy()
        changed[1, 0, 2, 3, 4] += shift
        found = reference.compare(box, changed)
        assert (found is not None) == is_wrong
        assert found is None or found.n_wrong == 1


def test_a_label_is_wrong_unless_its_probability_is_nearly_the_largest(image, model, tmp_path):
    labels, probabilities = tmp_path / "labels.zarr", tmp_path / "probabilities.zarr"
    _, plan = run(image, model, labels, output="labels")
    run(image, model, probabilities, prob_dtype="float32")
    reference = Reference(plan, image=image, transform=None)
    box = Region((0, 1, 9, 7), (1, 7, 25, 23))
    stored = open_volume(str(labels)).read(box)
    values = open_volume(str(probabilities)).read(box, range(3))
    assert reference.compare(box, stored) is None
    for label in (0, 1, 2, 3):
        found = reference.compare(box, np.full_like(stored, label))
        chosen = values[label] if label < 3 else -1
        gap = values.max(axis=0) - chosen
        assert found.n_wrong == pytest.approx(np.count_nonzero(gap > 2e-4), abs=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda url: shutil.rmtree(f"{url}/1"), "level 1 of .* is missing"),
        (lambda url: Path(url, "0", "zarr.json").write_text("{"), "damaged"),
        (lambda url: edit(Path(url, "2", "zarr.json"), data_type="uint16"), "type of level 2"),
        (lambda url: edit(Path(url, "1", "zarr.json"), fill_value=1), "fill value of level 1"),
        (lambda url: change_fingerprint(url), "its fingerprint is 123"),
        (lambda url: drop_level(url), "lists 2 levels, its ledger has 3"),
        (lambda url: Path(url, "zarr.json").write_text("{}"), ""),
    ],
)
def test_wrong_metadata_are_told_and_nothing_is_taken_back(image, model, change, words):
    _, plan = run(image, model)
    url = plan.output.url
    marks = files_of(f"{url}/ledger")
    change(url)
    if not words:
        with pytest.raises(NotOmeZarrError):
            look(url)
        return
    found = look(url)
    assert set(wrong_by_check(found)) == {"metadata"}
    assert any(re.search(words, f.reason) for f in found.findings), found.findings
    assert [c.not_done for c in found.checks] == ["", *["the metadata are wrong"] * 3]
    assert not found.is_right
    assert "--overwrite" in found.sentence
    assert files_of(f"{url}/ledger") == marks


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_fingerprint(url):
    group = zarr.open_group(url, mode="r+")
    group.attrs["bigseg"] = {**group.attrs["bigseg"], "fingerprint": "123"}


def drop_level(url):
    group = zarr.open_group(url, mode="r+")
    ome = group.attrs["ome"]
    del ome["multiscales"][0]["datasets"][2]
    group.attrs["ome"] = ome


def test_a_finished_result_that_is_not_listed_is_told_and_listed_again(image, model):
    config, plan = run(image, model)
    zarr.open_group(f"{image}/labels", mode="r+").attrs["ome"] = {"version": "0.5", "labels": []}
    found = look(plan.output.url)
    assert wrong_by_check(found) == {"metadata": 1}
    assert "does not list bigseg, which is finished: the same" in found.sentence
    assert all(check.n_checked for check in found.checks)
    segment_serially(config, NullProgress())
    assert look(plan.output.url).is_right
