"""A right result is found right; a fault of each kind is found by its check, and mended."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import RESOURCES, Recorder, config_of, noise, write_image, write_model
from killing import Killed, kill_at_write
from zarr_images import write_image as write_version

from bigseg import planner, store
from bigseg.blocks import Region
from bigseg.config import UNetSpec
from bigseg.errors import (
    IncompleteError,
    InputNotFoundError,
    LockedError,
    NotOmeZarrError,
)
from bigseg.ledger import EMPTY_MARK, Ledger, checksum_of
from bigseg.lock import Lock
from bigseg.places import SerialExecutor
from bigseg.plan import PREDICT, stage_grids
from bigseg.progress import NullProgress
from bigseg.pyramid_stage import PyramidStage
from bigseg.results import begun_plan
from bigseg.seams import Reference
from bigseg.segment import prepare, segment_serially
from bigseg.transform import load_transform
from bigseg.verify import verify
from bigseg.volume import open_volume

# With these random weights every block has all three classes.
SPEC = UNetSpec.build(3, out_channels=3, depth=1, width=4)
SHAPE = (8, 36, 24)
TILE = (4, 16, 16)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16), n_levels=3)


def run(image, model, out=None, **options):
    defaults = {"tile": TILE, "output": "labels"} if out is None else {"tile": TILE}
    config = config_of(image, model, out, **{**defaults, **options})
    result = segment_serially(config, NullProgress())
    assert result.is_complete, result.failed
    return config, result.plan


def look(url, **options):
    return verify(str(url), progress=NullProgress(), **{"n_seams": 6, "n_chunks": 99, **options})


def wrong_by_check(verification):
    return {check.name: len(check.findings) for check in verification.checks if check.findings}


def files_of(url):
    """The content of every file of a result but those of its ledger."""
    files = (p for p in Path(url).rglob("*") if p.is_file())
    return {
        str(p.relative_to(url)): p.read_bytes()
        for p in files
        if "ledger" not in p.relative_to(url).parts
    }


def chunk_of(url, *place, level=0):
    return Path(url, str(level), "c", *map(str, place))


# ---- right results


def test_labels_beside_an_image_are_right(image, model):
    _, plan = run(image, model)
    found = look(plan.output.url)
    assert found.is_right, found.as_text()
    metadata, blocks, pyramid, seams = found.checks
    assert metadata.n_checked == 3
    assert blocks.n_checked == found.n_blocks == found.n_done == 12 + 2
    assert pyramid.n_checked > 2
    assert seams.n_checked == 6
    assert "3 across faces, 2 across edges, 1 across corners" in seams.remark
    assert found.sentence == ""


@pytest.mark.parametrize("prob_dtype", ["uint8", "float16", "float32"])
def test_probabilities_are_right_in_every_type(image, model, tmp_path, prob_dtype):
    out = tmp_path / "out.zarr"
    run(image, model, out, prob_dtype=prob_dtype)
    found = look(out)
    assert found.is_right, found.as_text()
    assert found.checks[3].n_checked == 6


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_2_d_network_on_planes_of_each_version_is_right(tmp_path, version):
    spec = UNetSpec.build(2, out_channels=2, depth=2, width=2)
    model = write_model(tmp_path / "m.safetensors", spec)[1]
    data = noise((3, 50, 70))
    levels = [data, data[:, ::2, ::2]]
    image = write_version(str(tmp_path / "i.zarr"), levels, "zyx", version=version)
    _, plan = run(image, model, tile=(16, 16))
    found = look(plan.output.url)
    assert found.is_right, found.as_text()
    assert open_volume(plan.output.url).multiscale.version == version


def test_shards_are_right(image, model, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "MANY_CHUNKS", 1)
    monkeypatch.setattr(planner, "BLOCK_BYTES", 4 * 16 * 16 * 3)
    out = tmp_path / "out.zarr"
    _, plan = run(image, model, out)
    assert plan.output.shard is not None
    found = look(out)
    assert found.is_right, found.as_text()


def with_mask(tmp_path):
    mask = np.zeros((8, 12, 12), np.uint8)
    mask[2:7, 3:10, 2:7] = 1
    scale = (1.0, 3.0, 2.0)
    url = write_version(str(tmp_path / "mask.zarr"), [mask], "zyx", scale0=scale)
    return {"mask": url}


RULES = {
    "a mask": with_mask,
    "an intensity": lambda _: {"skip_below": 128.0, "skip_level": 1},
    "a region": lambda _: {"region": "1:7,5:30,:"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_what_is_left_out_on_purpose_is_right(image, model, tmp_path, rule, kind):
    out = tmp_path / "out.zarr"
    run(image, model, out, output=kind, **RULES[rule](tmp_path))
    found = look(out, n_seams=12)
    assert found.is_right, found.as_text()
    assert found.checks[3].n_checked > 6


def test_chunks_that_the_image_does_not_have_are_right(model, tmp_path):
    image = write_image(tmp_path / "image.zarr", noise(SHAPE), chunks=(4, 16, 16))
    chunk_of(image, 0, 1, 1).unlink()
    out = tmp_path / "out.zarr"
    run(image, model, out)
    found = look(out, n_seams=30)
    assert found.is_right, found.as_text()
    assert Ledger.open(f"{out}/ledger").n_empty(PREDICT) == 1


def test_a_transformed_image_is_right_with_the_function_only(image, model, tmp_path):
    code = tmp_path / "my.py"
    code.write_text("def double(image):\n    return image.astype('uint16') * 2\n")
    out = tmp_path / "out.zarr"
    run(image, model, out, transform=f"{code}:double")
    found = look(out, transform=load_transform(f"{code}:double"))
    assert found.is_right, found.as_text()
    without = look(out)
    assert not without.findings
    assert not without.is_right
    assert "give it with --transform" in without.sentence


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_bf16_is_right_within_its_bound_and_a_block_without_context_is_not(
    image, model, tmp_path, kind
):
    out = tmp_path / "out.zarr"
    options = {"output": kind, "precision": "bf16"}
    _, plan = run(image, model, out, **options)
    found = look(out, n_seams=24)
    assert found.is_right, found.as_text()
    block = plan.grid[7]
    overwrite(
        str(out), PREDICT, block, without_context(image, model, block.core, tmp_path, **options)
    )
    assert wrong_by_check(look(out, n_seams=24, n_chunks=0)).keys() == {"seams"}


def test_another_engine_is_right_within_its_bound(image, model, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "out.zarr"
    run(image, model, out, engine="openvino", prob_dtype="float32")
    found = look(out)
    assert found.is_right, found.as_text()


def test_a_volume_of_one_block_is_looked_at_inside(model, tmp_path):
    image = write_image(tmp_path / "image.zarr", noise((3, 9, 11)), chunks=(3, 9, 11))
    _, plan = run(image, model)
    found = look(plan.output.url)
    assert found.is_right, found.as_text()
    assert "inside a block" in found.checks[3].remark


def test_a_result_that_was_moved_with_its_image_is_right(image, model, tmp_path):
    run(image, model)
    moved = shutil.move(image, tmp_path / "elsewhere.zarr")
    found = look(f"{moved}/labels/bigseg")
    assert found.is_right, found.as_text()


# ---- faults


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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


def overwrite(url, stage, block, values):
    """Write a block and its mark, as if a stage had made it so."""
    ledger = Ledger.open(f"{url}/ledger")
    level = list(ledger.stages).index(stage)
    open_volume(url, level=level).write(block.core, values)
    ledger.mark(stage, block.index, checksum_of(np.ascontiguousarray(values).data))
    ledger.flush()


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


def without_context(image, model, core, folder, **options):
    """What the voxels of a core become when all around them is dark."""
    data = open_volume(image).array[:]
    alone = np.zeros_like(data)
    alone[core.slices[1:]] = data[core.slices[1:]]
    dark = write_image(folder / "dark.zarr", alone, chunks=(4, 16, 16))
    run(dark, model, folder / "dark-out.zarr", **options)
    volume = open_volume(str(folder / "dark-out.zarr"))
    return volume.read(core, range(volume.n_channels))


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


# ---- what stands in the way


def begin(config, n_blocks):
    """A run that ends after so many blocks, without a word."""
    plan, ledger = prepare(config, RESOURCES)
    with SerialExecutor(plan, 1) as executor:
        for report in itertools.islice(executor.run(PREDICT, ledger.pending(PREDICT)), n_blocks):
            ledger.mark(PREDICT, report.block, report.checksum)
        ledger.flush()
    return plan


def test_an_unfinished_result_is_checked_as_far_as_it_is(image, model):
    config = config_of(image, model, None, tile=TILE, output="labels")
    plan = begin(config, 7)
    found = look(plan.output.url)
    assert not found.findings
    assert not found.is_right
    assert found.checks[1].n_checked == found.n_done == 7
    assert found.checks[2].n_checked == 0
    assert "7 of 14 blocks are done and nothing is wrong with those" in found.sentence
    tear(
        chunk_of(
            plan.output.url,
            *(
                a // c
                for a, c in zip(plan.grid[3].core.start[1:], plan.output.chunk[1:], strict=True)
            ),
        )
    )
    assert look(plan.output.url).n_taken_back == 1
    assert segment_serially(config, NullProgress()).n_done_before == 6
    assert look(plan.output.url).is_right


def test_a_result_is_not_verified_while_a_run_lives(image, model):
    _, plan = run(image, model)
    with Lock.acquire(plan.output.url), pytest.raises(LockedError, match=r"process \d+.*status"):
        look(plan.output.url)


def test_what_changed_in_the_meantime_is_not_taken_back(image, model):
    _, plan = run(image, model)
    url = plan.output.url
    tear(chunk_of(url, 0, 0, 0))

    def mend(_):
        ledger = Ledger.open(f"{url}/ledger")
        if ledger.is_finished:
            ledger.unmark(PREDICT, range(len(plan.grid)))

    with pytest.raises(LockedError, match="changed by another run while it was verified"):
        verify(url, progress=Recorder(mend))


@pytest.mark.parametrize("gone", ["the model", "another model", "the image"])
def test_seams_that_cannot_be_checked_are_said_not_passed(image, model, tmp_path, gone):
    out = tmp_path / "out.zarr"
    run(image, model, out)
    if gone == "the image":
        shutil.rmtree(image)
    elif gone == "the model":
        Path(model).unlink()
    else:
        write_model(model, SPEC, seed=1)
    found = look(out)
    assert not found.findings
    assert found.checks[3].not_done
    assert not found.is_right
    assert "--seams 0" in found.sentence
    assert look(out, n_seams=0).is_right


def test_a_place_whose_context_cannot_be_read_is_said_not_passed(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    run(image, model, out)
    for chunk in Path(image, "0", "c").rglob("*"):
        if chunk.is_file():
            tear(chunk)
    found = look(out)
    assert not found.findings
    assert found.checks[3].n_checked == 0
    assert "cannot be decoded" in found.checks[3].not_done
    assert "and 5 more places" in found.checks[3].not_done


def test_chunks_of_the_image_that_were_filled_are_filled_again(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    tear(chunk_of(image, 0, 1, 1))
    run(image, model, out, on_bad_chunk="fill")
    found = look(out, n_seams=24)
    assert found.is_right, found.as_text()


def test_what_bigseg_did_not_make_is_refused(image, model, tmp_path):
    run(image, model)
    with pytest.raises(InputNotFoundError):
        look(tmp_path / "none.zarr")
    with pytest.raises(NotOmeZarrError, match=r"not made by .*image.zarr/labels/bigseg"):
        look(image)
    store.remove(f"{image}/labels/bigseg/ledger")
    with pytest.raises(IncompleteError, match="holds nothing yet"):
        look(f"{image}/labels/bigseg")


def test_the_same_seed_looks_at_the_same_places(image, model, tmp_path):
    out = tmp_path / "out.zarr"
    run(image, model, out)
    remarks = {}
    for seed in (0, 0, 1):
        recorder = Recorder()
        found = verify(str(out), n_seams=5, n_chunks=3, seed=seed, progress=recorder)
        assert [task["total"] for task in recorder.tasks] == [12, 1, 1, 3, 5]
        remarks.setdefault(seed, []).append(found.as_dict())
    assert remarks[0][0] == remarks[0][1]
    assert json.loads(json.dumps(remarks[1][0])) == remarks[1][0]
    assert set(remarks[0][0]) == {
        *("url", "right", "finished", "blocks", "done", "taken_back", "checks"),
    }
