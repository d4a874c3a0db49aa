"""The command line: one sentence and an exit code for every wrong call, results on stdout."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from helpers import noise, write_image, write_model

from bigseg import cli
from bigseg.config import UNetSpec
from bigseg.volume import open_volume


def call(*words):
    return CliRunner().invoke(cli.main, [str(w) for w in words])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An image with labels `cells`, a 2-D image, a plate, a text file, and a model of each kind."""
    folder = tmp_path_factory.mktemp("cli")
    write_image(folder / "image.zarr", noise((6, 40, 40)), chunks=(2, 20, 20))
    group = zarr.create_group(folder / "image.zarr" / "labels", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "labels": ["cells", "small"]}
    labels = (noise((6, 40, 40), seed=1) > 128).astype(np.uint8)
    write_image(folder / "image.zarr" / "labels" / "cells", labels, chunks=(2, 20, 20))
    write_image(folder / "image.zarr" / "labels" / "small", labels[:, :30], chunks=(2, 20, 20))
    write_image(folder / "flat.zarr", noise((40, 40)), chunks=(20, 20), dims="yx")
    plate = zarr.create_group(folder / "plate.zarr", zarr_format=3)
    well = {"path": "B/03", "rowIndex": 0, "columnIndex": 0}
    plate.attrs["ome"] = {"version": "0.5", "plate": {"wells": [well]}}
    zarr.create_group(folder / "empty.zarr", zarr_format=3)
    (folder / "file.txt").write_text("no image")
    (folder / "stack.tif").write_bytes(b"II*\0")
    for dims in (2, 3):
        spec = UNetSpec.build(dims, out_channels=2, depth=1, width=2)
        write_model(folder / f"model{dims}.safetensors", spec)
    (folder / "unknown.yaml").write_text("stepps: 5\n")
    (folder / "nested.yaml").write_text("optim: {lrate: 0.1}\n")
    return folder


TRAIN = ("train", "{0}/image.zarr", "--labels")
SEGMENT = ("segment", "{0}/image.zarr", "--executor", "serial", "--model")

WRONG_CALLS = {
    "a wrong path": (
        ("segment", "{0}/none.zarr", "--model", "{0}/model3.safetensors", "--executor", "serial"),
        3,
        r"no such image: .*/none\.zarr; check the path",
    ),
    "a wrong path to info": (("info", "{0}/none.zarr"), 3, r"no such .*none\.zarr"),
    "a group that is no image": (
        ("segment", "{0}/empty.zarr", "--model", "{0}/model3.safetensors", "--executor", "serial"),
        3,
        r"without OME-Zarr metadata.*bigseg convert",
    ),
    "a file that is no image": (
        ("info", "{0}/file.txt"),
        3,
        r"file\.txt is a file, not an OME-Zarr image",
    ),
    "a TIFF instead of an image": (("info", "{0}/stack.tif"), 3, r"stack\.tif.*bigseg convert"),
    "a plate": (
        ("segment", "{0}/plate.zarr", "--model", "{0}/model3.safetensors", "--executor", "serial"),
        3,
        r"plate.*B/03",
    ),
    "a missing label name": (
        (*TRAIN, "nuclei", "--out", "{0}/r1", "--executor", "serial"),
        3,
        r"labels 'nuclei' not found in .*image\.zarr; there are: cells, small",
    ),
    "labels of another shape": (
        (*TRAIN, "small", "--out", "{0}/r2", "--executor", "serial"),
        3,
        r"small.*\b30\b.*\b40\b",
    ),
    "a 3-D model for a 2-D image": (
        ("segment", "{0}/flat.zarr", "--model", "{0}/model3.safetensors", "--executor", "serial"),
        3,
        r"is a 2-D image.*3-D model.*--dims 2",
    ),
    "a model that is none": (
        (*SEGMENT, "{0}/file.txt"),
        3,
        r"file\.txt.*",
    ),
    "a model that is not there": ((*SEGMENT, "{0}/gone.safetensors"), 3, r"gone\.safetensors"),
    "an output that cannot be written": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/file.txt/out.zarr"),
        5,
        r"file\.txt/out\.zarr cannot be written",
    ),
    "an unknown setting": (
        (*TRAIN, "cells", "--out", "{0}/r3", "-c", "{0}/unknown.yaml"),
        2,
        r"unknown setting 'stepps'; did you mean 'steps'\?",
    ),
    "an unknown nested setting": (
        (*TRAIN, "cells", "--out", "{0}/r3", "-c", "{0}/nested.yaml"),
        2,
        r"unknown setting 'optim\.lrate'; did you mean 'lr'\?",
    ),
    "a region outside": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/x.zarr", "--region", "0:9,:,:"),
        2,
        r"'0:9' is empty or outside the axis, which runs from 0 to 6",
    ),
    "a region of two axes": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/x.zarr", "--region", "0:9,:"),
        2,
        r"has 2 axes, the volume has 3",
    ),
    "a level that is not there": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/x.zarr", "--level", "4"),
        3,
        r"level 4",
    ),
    "a channel that is not there": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/x.zarr", "--channel", "2"),
        3,
        r"channel 2 is not in .*image\.zarr, which has 1",
    ),
    "a time point that is not there": (
        (*SEGMENT, "{0}/model3.safetensors", "--out", "{0}/x.zarr", "--time", "3"),
        2,
        r"--time 3: the image has 1 time points",
    ),
    "probabilities without a place": (
        (*SEGMENT, "{0}/model3.safetensors", "--output", "probabilities"),
        2,
        r"--output probabilities makes an image of its own: say where with --out",
    ),
    "a block that is no block": (
        (*SEGMENT, "{0}/model3.safetensors", "--block", "8,big,8"),
        2,
        r"--block '8,big,8': give numbers",
    ),
    "a name that is a path": (
        (*SEGMENT, "{0}/model3.safetensors", "--name", "../evil"),
        2,
        r"name",
    ),
    "a source alone": (("convert", "{0}/file.txt"), 2, r"convert needs sources and an output"),
    "the status of an image": (("status", "{0}/image.zarr"), 3, r"not made by `bigseg segment`"),
    "verifying what is not there": (("verify", "{0}/none.zarr"), 3, r"no such store: .*none\.zarr"),
    "cleaning an image": (
        ("clean", "{0}/image.zarr", "--yes"),
        5,
        r"image\.zarr was not made by `bigseg segment`.*nothing is removed",
    ),
    "scores of other shapes": (
        ("evaluate", "{0}/image.zarr/labels/small", "{0}/image.zarr/labels/cells"),
        3,
        r"\b30\b.*\b40\b",
    ),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_a_wrong_call_gets_one_sentence_and_its_exit_code(what, place):
    words, code, pattern = WRONG_CALLS[what]
    result = call(*(w.format(place) for w in words))
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert re.search(pattern, lines[0]), lines[0]


def test_the_traceback_is_shown_with_v_only(place):
    quiet = call("info", place / "none.zarr")
    loud = call("info", place / "none.zarr", "-v")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert quiet.exit_code == loud.exit_code == 3


def test_an_unexpected_error_ends_with_1_and_one_line(place, monkeypatch):
    def broken(url):
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("bigseg.info.describe", broken)
    result = call("info", place / "image.zarr")
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected ZeroDivisionError: seven\n"


def test_an_unknown_option_and_command_end_with_2():
    assert call("segment", "a", "--modell", "b").exit_code == 2
    assert call("segmant").exit_code == 2


def test_segment_writes_labels_beside_the_image_and_a_picture(place):
    result = call(*(w.format(place) for w in SEGMENT), place / "model3.safetensors")
    assert result.exit_code == 0, result.output
    labels = open_volume(str(place / "image.zarr")).label("bigseg")
    assert labels.shape == (1, 6, 40, 40)
    url, picture = (line.split(": ")[0] for line in result.stdout.splitlines())
    assert url.endswith("image.zarr/labels/bigseg")
    with open(picture, "rb") as file:
        assert file.read(4) == b"\x89PNG"
    again = call(*(w.format(place) for w in SEGMENT), place / "model3.safetensors")
    assert re.search(r"went on from (\d+) of \1 finished blocks", again.stderr)


def test_info_and_evaluate_print_json(place):
    described = json.loads(call("info", place / "image.zarr", "--json").stdout)
    assert described["version"] == "0.5"
    cells = place / "image.zarr" / "labels" / "cells"
    scores = json.loads(call("evaluate", cells, cells, "--json").stdout)
    assert scores["adapted_rand_error"]["error"] == pytest.approx(0)


@pytest.fixture
def result(place, tmp_path):
    """A finished result in a store of its own."""
    out = tmp_path / "out.zarr"
    segment = (*(w.format(place) for w in SEGMENT), place / "model3.safetensors", "--out", out)
    assert call(*segment).exit_code == 0
    return out, segment


def test_status_says_how_far_a_result_is(result):
    out, _ = result
    found = call("status", out)
    assert found.exit_code == 0, found.output
    assert f"{out}: finished" in found.stdout
    assert json.loads(call("status", out, "--json").stdout)["state"] == "finished"


def test_verify_ends_with_0_or_with_4_and_what_it_found(result):
    out, segment = result
    found = call("verify", out, "--seams", 2)
    assert found.exit_code == 0, found.output
    assert "2 places made again, nothing wrong" in found.stdout
    chunk = next(p for p in (out / "0" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(b"torn")
    found = call("verify", out, "--json")
    assert found.exit_code == 4
    assert json.loads(found.stdout)["taken_back"] > 0
    assert re.search(r"error: .* blocks were taken back: the same `bigseg segment`", found.stderr)
    assert call(*segment).exit_code == 0
    assert call("verify", out, "--seams", 0, "--chunks", 0).exit_code == 0


def test_clean_asks_before_it_deletes(result, monkeypatch):
    out, _ = result
    assert "nothing to remove" in call("clean", out).stdout
    assert out.exists()
    zarr.open_group(out / "ledger", mode="r+").attrs["finished"] = False
    refused = call("clean", out)
    assert refused.exit_code == 2
    assert re.search(r"error: delete .*not finished.* say --yes", refused.stderr)
    assert out.exists()
    monkeypatch.setattr("bigseg.result_commands.can_answer", lambda: True)
    no = CliRunner().invoke(cli.main, ["clean", str(out)], input="n\n")
    assert no.exit_code == 1
    assert out.exists()
    yes = CliRunner().invoke(cli.main, ["clean", str(out)], input="y\n")
    assert yes.exit_code == 0, yes.output
    assert "removed the unfinished result" in yes.stdout
    assert not out.exists()
    assert call("clean", out, "--yes").exit_code == 3


def test_every_command_has_help_with_an_example():
    assert set(cli.main.commands) == {
        *("convert", "info", "sample", "train", "segment"),
        *("plan", "bench", "evaluate", "demo", "objects", "instances"),
        *("status", "verify", "clean"),
    }
    for name in cli.main.commands:
        text = call(name, "--help").stdout
        assert "Example" in text, name
        assert f"bigseg {name}" in text, name


def test_help_loads_nothing_heavy_and_answers_at_once():
    code = (
        "import sys; from bigseg.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'zarr', 'dask', 'numpy') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "segment" in done.stdout
    assert min(times) < 0.3, times
