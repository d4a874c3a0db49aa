"""A right result is found right, an unfinished one as far as it is, and refusals say why."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from helpers import RESOURCES, Recorder, config_of, noise, write_image, write_model
from verifying import (
    SHAPE,
    SPEC,
    TILE,
    chunk_of,
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
from zarr_images import write_image as write_version

from bigseg import planner, store
from bigseg.config import UNetSpec
from bigseg.errors import (
    IncompleteError,
    InputNotFoundError,
    LockedError,
    NotOmeZarrError,
)
from bigseg.ledger import Ledger
from bigseg.lock import Lock
from bigseg.places import SerialExecutor
from bigseg.plan import PREDICT
from bigseg.progress import NullProgress
from bigseg.segment import prepare, segment_serially
from bigseg.transform import load_transform
from bigseg.verify import verify
from bigseg.volume import open_volume


@pytest.fixture
def model(tmp_path):
    return model_in(tmp_path)


@pytest.fixture
def image(tmp_path):
    return image_in(tmp_path)


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
