"""Nothing is lost: whatever is cut off, the same command goes on and ends in the same bytes."""

import contextlib
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import config_of, noise, write_image, write_model
from zarr_images import pyramid_of, validate
from zarr_images import write_image as write_version

from bigseg import segment, stages
from bigseg.config import NormRule, UNetSpec
from bigseg.errors import InputError, OutputError, UsageError
from bigseg.layout import list_label
from bigseg.ledger import Ledger
from bigseg.plan import PREDICT
from bigseg.progress import NullProgress
from bigseg.segment import SerialExecutor, carry_out, prepare, segment_serially
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
    return write_model(tmp_path / "model.safetensors", SPEC)[1]


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

    def run(self, stage, blocks, n_blocks):
        for report in self.inner.run(stage, blocks, n_blocks):
            if len(self.ran) == self.after:
                raise Killed
            self.ran.append((stage, report.block))
            yield report


def run_until_killed(config, after):
    plan, ledger = prepare(config, device="cpu")
    executor = Interrupted(plan, after)
    with contextlib.suppress(Killed):
        carry_out(plan, ledger, executor, NullProgress())
    return executor.ran


def test_a_run_that_was_cut_off_redoes_only_what_is_missing(image, model, tmp_path):
    whole = tmp_path / "whole.zarr"
    every = run_until_killed(config_of(image, model, whole, **OPTIONS), 99)
    assert len(every) == 14
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


# What is written


@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(1, "uint8"), (2, "uint8"), (5, "uint8"), (300, "uint16")]
)
def test_labels_are_the_most_probable_class_and_the_first_of_equals(n_classes, dtype):
    # Few different values, so that ties are frequent.
    data = np.random.default_rng(3).integers(0, 4, (n_classes, 1, 3, 5, 7)).astype(np.float32)
    found = stages._argmax(data, np.dtype(dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, data.argmax(axis=0, keepdims=True))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "tczyx"])
def test_labels_beside_an_image_have_its_version_and_pass_foreign_validators(
    tmp_path, version, axes
):
    sizes = {"t": 2, "c": 2, "z": 4, "y": 24, "x": 20}
    data = noise([sizes[a] for a in axes])
    factors = [2 if a in "yx" else 1 for a in axes]
    levels = pyramid_of(data, 3, factors)
    image = write_version(str(tmp_path / "image.zarr"), levels, axes, version=version)
    spec = UNetSpec.build(2, out_channels=3, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    assert run(config_of(image, model, None, output="labels")).is_complete
    label = open_volume(image).label("bigseg")
    assert label.multiscale.version == version
    assert label.multiscale.axis_names == tuple(a for a in axes if a != "c")
    assert [label.at(i).shape for i in range(3)] == [
        open_volume(image).at(i).shape for i in range(3)
    ]
    name = "zarr.json" if version == "0.5" else ".zattrs"
    text = json.loads((Path(label.url) / name).read_text())
    assert "bigseg" in (text["attributes"] if version == "0.5" else text)
    validate(image)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_probabilities_are_an_image_with_a_channel_for_each_class(tmp_path, version, model):
    levels = pyramid_of(noise((4, 24, 20)), 2, (1, 2, 2))
    image = write_version(str(tmp_path / "image.zarr"), levels, "zyx", version=version)
    out = str(tmp_path / "p.zarr")
    assert run(config_of(image, model, out, prob_dtype="float32")).is_complete
    found = open_volume(out)
    assert found.multiscale.axis_names == ("c", "z", "y", "x")
    assert found.channel_names == ("class 0", "class 1", "class 2")
    np.testing.assert_allclose(found.array[:].sum(0), 1, atol=1e-5)
    # The coarser level is the mean of the finer one.
    fine, coarse = levels_of(out)
    mean = fine.reshape(3, 4, 12, 2, 10, 2).mean((3, 5))
    np.testing.assert_allclose(coarse, mean, atol=1e-6)
    validate(out)


def test_one_time_point_is_that_of_all_and_the_others_stay_background(tmp_path):
    data = noise((3, 2, 24, 20), seed=8)
    image = write_image(tmp_path / "i.zarr", data, chunks=(1, 1, 16, 16), dims="tzyx", n_levels=2)
    spec = UNetSpec.build(2, out_channels=2, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    run(config_of(image, model, tmp_path / "all.zarr"))
    run(config_of(image, model, tmp_path / "one.zarr", time=1))
    for whole, part in zip(
        levels_of(str(tmp_path / "all.zarr")), levels_of(str(tmp_path / "one.zarr")), strict=True
    ):
        assert whole.shape[:2] == (3, 2)
        np.testing.assert_array_equal(part[1], whole[1])
        assert whole.any(axis=(1, 2, 3, 4)).all()
        assert not part[[0, 2]].any()


def test_each_time_point_is_segmented_by_itself(tmp_path):
    data = noise((2, 3, 20, 24), seed=9)
    spec = UNetSpec.build(3, out_channels=2, depth=1, width=2)
    _, model = write_model(tmp_path / "m.safetensors", spec)
    movie = write_image(tmp_path / "m.zarr", data, chunks=(1, 2, 16, 16), dims="tzyx")
    run(config_of(movie, model, tmp_path / "movie.zarr", prob_dtype="float32"))
    both = levels_of(str(tmp_path / "movie.zarr"))[0]
    for t in range(2):
        frame = write_image(tmp_path / f"{t}.zarr", data[t], chunks=(2, 16, 16))
        run(config_of(frame, model, tmp_path / f"f{t}.zarr", prob_dtype="float32"))
        np.testing.assert_array_equal(both[t], levels_of(str(tmp_path / f"f{t}.zarr"))[0])


def test_a_network_of_several_channels_reads_them_in_its_order(tmp_path):
    data = noise((3, 4, 20, 24), seed=10)
    spec = UNetSpec.build(3, out_channels=2, depth=1, width=2, in_channels=2)
    _, model = write_model(tmp_path / "m.safetensors", spec, channels=(2, 0))
    image = write_image(tmp_path / "i.zarr", data, chunks=(1, 4, 16, 16), dims="czyx")
    reordered = write_image(tmp_path / "r.zarr", data[[2, 0]], chunks=(2, 4, 16, 16), dims="czyx")
    results = {}
    for name, source, channels in [
        ("card", image, None),
        ("told", reordered, (0, 1)),
        ("swapped", image, (0, 2)),
    ]:
        out = tmp_path / f"{name}.zarr"
        run(config_of(source, model, out, channels=channels, prob_dtype="float32"))
        results[name] = levels_of(str(out))[0]
    np.testing.assert_array_equal(results["card"], results["told"])
    assert not np.array_equal(results["card"], results["swapped"])


def test_a_coarser_level_is_segmented_as_an_image_of_its_own(image, model, tmp_path):
    out = tmp_path / "o.zarr"
    assert run(config_of(image, model, out, level=1, **OPTIONS)).is_complete
    found = open_volume(str(out))
    assert found.n_levels == 2
    source = open_volume(image)
    for level in range(2):
        assert found.at(level).shape == source.at(level + 1).shape
        assert found.at(level).voxel_um == source.at(level + 1).voxel_um
    alone = write_image(tmp_path / "a.zarr", source.at(1).array[:], chunks=(4, 16, 16))
    run(config_of(alone, model, tmp_path / "b.zarr", **OPTIONS))
    np.testing.assert_array_equal(levels_of(str(out))[0], levels_of(str(tmp_path / "b.zarr"))[0])


def test_the_pyramid_of_a_region_is_the_same_as_of_the_whole_where_it_is_inside(image, model):
    run(config_of(image, model, None, **OPTIONS, name="whole"))
    run(config_of(image, model, None, **OPTIONS, name="part", region="0:8,8:32,4:16"))
    whole, part = (levels_of(f"{image}/labels/{name}") for name in ("whole", "part"))
    for level, (a, b) in enumerate(zip(whole, part, strict=True)):
        f = 2**level
        inside = (slice(None), slice(8 // f, 32 // f), slice(4 // f, 16 // f))
        np.testing.assert_array_equal(b[inside], a[inside])
        outside = np.ones(b.shape, bool)
        outside[inside] = False
        assert not b[outside].any()


def test_an_image_without_contrast_is_refused_before_anything_is_written(tmp_path):
    image = write_image(tmp_path / "i.zarr", np.full((4, 8, 8), 7, np.uint8), chunks=(4, 8, 8))
    _, model = write_model(tmp_path / "m.safetensors", SPEC, norm=NormRule())
    with pytest.raises(InputError, match="has the same value"):
        run(config_of(image, model, None, output="labels"))
    assert not (tmp_path / "i.zarr" / "labels").exists()


def test_every_mark_is_the_checksum_of_what_lies_on_disk(image, model):
    config = config_of(image, model, None, **OPTIONS)
    run(config)
    plan, ledger = prepare(config, device="cpu")
    output = open_volume(plan.output.url)
    for block in itertools.islice(plan.grid, 0, None, 5):
        stored = output.read(block.core)
        assert ledger.checksum(PREDICT, block.index) == stages._checksum(stored)
    assert ledger.record["blocks"] == 14
