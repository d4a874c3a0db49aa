"""Objects made block by block are those of the same algorithm on the whole array in one memory."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import Recorder, config_of, run_command, write_image
from planting import INSIDE, codes_of_painting, planted_shapes, write_planting_model
from scipy import ndimage
from skimage.measure import regionprops_table
from zarr_images import write_image as write_version

from bigseg import counting, grow_stages
from bigseg.blocks import Region
from bigseg.config import InstanceRule, RuleOptions
from bigseg.errors import IncompleteError, UsageError
from bigseg.instances import segment_codes
from bigseg.layout import listed_labels
from bigseg.progress import NullProgress
from bigseg.rerun import remake_instances
from bigseg.segment import segment_serially
from bigseg.steps import Steps
from bigseg.table import objects_url, read_table
from bigseg.verify import verify
from bigseg.volume import open_volume

TILE = (8, 8, 8)
RULES = {
    "eroded and grown": {"erode": 1, "grow": 3},
    "as they are, across faces": {"erode": 0, "grow": 0},
    "as they are, across edges": {"erode": 0, "grow": 2, "connectivity": 2},
    "as they are, across corners": {"erode": 0, "grow": 9, "connectivity": 3},
    "only large ones, holes filled": {"erode": 1, "grow": 1, "min_size": 30, "fill_holes": True},
}
BLOCKS = {"small": (8, 8, 8), "oblong": (8, 24, 16), "the whole": (24, 40, 48)}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The planted shapes as an image, and the model that reads them."""
    folder = tmp_path_factory.mktemp("planted")
    image = write_image(folder / "image.zarr", planted_shapes(), chunks=(8, 16, 16), n_levels=2)
    return image, write_planting_model(folder / "model.safetensors")


def config_for(image, model, out, rule, **options):
    options = {"tile": TILE, "output": None, **options}
    return config_of(image, model, out, rule=RuleOptions(**rule), **options)


def labels_at(url):
    volume = open_volume(str(url))
    return volume.read(Region.of_shape(volume.shape))[0]


def truth_of(painting, rule, *, ratios=(1.0, 1.0, 1.0), dims=3):
    """The definition, on the whole array (t, z, y, x)."""
    rule = RuleOptions(**rule).applied_to(InstanceRule())
    painting = painting.reshape((1,) * (4 - painting.ndim) + painting.shape)
    return segment_codes(codes_of_painting(painting), rule, Steps(ratios), dims=dims)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("rule", RULES)
def test_planted_shapes_are_those_of_the_whole_array_whatever_the_blocks(
    planted, rule, block, tmp_path
):
    image, model = planted
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, RULES[rule], block=BLOCKS[block])
    result = segment_serially(config, NullProgress())
    truth, n = truth_of(planted_shapes(), RULES[rule])
    assert result.n_objects == n >= 3
    labels = labels_at(out)
    np.testing.assert_array_equal(labels, truth)
    assert labels.dtype == np.uint8
    assert not (out / "scratch").exists()
    assert json.loads((out / "zarr.json").read_text())["attributes"]["bigseg"]["rule"]


def test_planes_are_objects_of_their_own_or_joined_along_z(tmp_path):
    painting = planted_shapes()
    image = write_image(tmp_path / "image.zarr", painting, chunks=(8, 16, 16))
    model = write_planting_model(tmp_path / "model.safetensors", dims=2)
    for number, rule in enumerate(
        [
            {"erode": 1, "grow": 2},
            {"erode": 0, "grow": 2, "connectivity": 2, "link": "z"},
            {"erode": 1, "grow": 2, "link": "z", "fill_holes": True},
        ]
    ):
        out = tmp_path / f"{number}.zarr"
        options = {"tile": (8, 8), "block": (5, 16, 16)}
        segment_serially(config_for(image, model, out, rule, **options), NullProgress())
        truth, _ = truth_of(painting, rule, ratios=(1.0, 1.0), dims=2)
        np.testing.assert_array_equal(labels_at(out), truth)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_frames_are_linked_only_when_asked_and_coarse_axes_step_less_often(version, tmp_path):
    painting = np.stack([planted_shapes(), np.roll(planted_shapes(), 3, axis=2)])
    image = write_version(
        str(tmp_path / "image.zarr"),
        [painting],
        "tzyx",
        version=version,
        chunks=(1, 8, 16, 16),
        scale0=(1.0, 0.5, 0.2, 0.2),
    )
    model = write_planting_model(tmp_path / "model.safetensors")
    for number, rule in enumerate([{"erode": 1, "grow": 5}, {"erode": 2, "grow": 5, "link": "t"}]):
        out = tmp_path / f"{number}.zarr"
        config = config_for(image, model, out, rule, block=(16, 24, 24))
        segment_serially(config, NullProgress())
        truth, _ = truth_of(painting, rule, ratios=(2.5, 1.0, 1.0))
        np.testing.assert_array_equal(labels_at(out), truth)


def test_a_region_is_an_array_of_its_own_and_the_rest_is_background(planted, tmp_path):
    image, model = planted
    rule = {"erode": 1, "grow": 3, "fill_holes": True}
    out = tmp_path / "out.zarr"
    config = config_for(image, model, out, rule, region="3:20,5:37,2:43", block=(8, 16, 16))
    segment_serially(config, NullProgress())
    part = (slice(3, 20), slice(5, 37), slice(2, 43))
    truth, _ = truth_of(planted_shapes()[part], rule)
    labels = labels_at(out)[0]
    np.testing.assert_array_equal(labels[part], truth[0])
    labels[part] = 0
    assert not labels.any()


def test_the_labels_have_the_smallest_type_that_holds_all_numbers(tmp_path):
    painting = np.zeros((1, 40, 80), np.uint8)
    painting[0, ::2, ::2] = INSIDE
    image = write_image(tmp_path / "image.zarr", painting, chunks=(1, 16, 16))
    model = write_planting_model(tmp_path / "model.safetensors", dims=2)
    rule = {"erode": 0, "grow": 0}
    config = config_for(image, model, None, rule, tile=(16, 16), block=(16, 32))
    result = segment_serially(config, NullProgress())
    assert result.n_objects == 800
    labels = labels_at(f"{image}/labels/bigseg")
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, truth_of(painting, rule, ratios=(1.0, 1.0), dims=2)[0])
    assert listed_labels(image) == ("bigseg",)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_cut_off_after_any_block_the_same_command_ends_in_the_same_bytes(planted, tmp_path):
    image, model = planted
    rule = {"erode": 1, "grow": 2, "fill_holes": True}
    options = {"block": (24, 24, 48)}
    truth, _ = truth_of(planted_shapes(), rule)
    out = tmp_path / "out.zarr"
    for n_done in range(1, 100):
        stages = []

        def kill(_, stages=stages, n_done=n_done):
            stages.append(1)
            if len(stages) == n_done:
                raise Killed

        try:
            result = segment_serially(
                config_for(image, model, out, rule, **options), Recorder(kill)
            )
        except Killed:
            continue
        break
    assert result.is_complete
    assert 1 < n_done < 100
    np.testing.assert_array_equal(labels_at(out), truth)
    again = segment_serially(config_for(image, model, out, rule, **options), NullProgress())
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


def test_kept_probabilities_give_the_objects_of_any_rule_without_the_network(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    first, second = {"erode": 1, "grow": 3}, {"erode": 0, "grow": 2, "fill_holes": True}
    options = {"block": (8, 24, 24), "keep_probabilities": True}
    segment_serially(config_for(image, model, out, first, **options), NullProgress())
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), first)[0])
    Path(model).rename(tmp_path / "hidden")
    try:
        progress = Recorder()
        remake_instances(str(out), RuleOptions(**second), executor="serial", progress=progress)
    finally:
        (tmp_path / "hidden").rename(model)
    assert "predict" not in [task["label"] for task in progress.tasks]
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), second)[0])
    assert (out / "probabilities").exists()
    assert not (out / "scratch").exists()
    with pytest.raises(UsageError, match="made with other settings"):
        segment_serially(config_for(image, model, out, first, **options), NullProgress())


def test_a_change_of_rule_that_is_cut_off_anywhere_goes_on(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    first, second = {"erode": 1, "grow": 3}, {"erode": 0, "grow": 2}
    options = {"block": (24, 24, 48), "keep_probabilities": True}
    segment_serially(config_for(image, model, out, first, **options), NullProgress())
    for n_done in range(1, 100):
        told = []

        def kill(_, told=told, n_done=n_done):
            told.append(1)
            if len(told) == n_done:
                raise Killed

        try:
            remake_instances(
                str(out), RuleOptions(**second), executor="serial", progress=Recorder(kill)
            )
        except Killed:
            continue
        break
    assert 1 < n_done < 100
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), second)[0])


def test_without_kept_probabilities_another_rule_is_refused(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    segment_serially(config_for(image, model, out, {}, block=(24, 40, 48)), NullProgress())
    with pytest.raises(UsageError, match="made without --keep-probabilities"):
        remake_instances(str(out), RuleOptions(grow=1), executor="serial", progress=NullProgress())


def test_the_table_is_that_of_regionprops_on_the_whole_array(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    rule = {"erode": 1, "grow": 3}
    segment_serially(config_for(image, model, out, rule, block=(8, 24, 24)), NullProgress())
    table = read_table(objects_url(str(out))).to_pydict()
    properties = ("label", "area", "bbox", "centroid", "intensity_mean", "intensity_max")
    labels = labels_at(out)[0]
    truth = regionprops_table(labels, planted_shapes(), properties=properties)
    assert table["label"] == truth["label"].tolist()
    assert table["n_voxels"] == truth["area"].astype(int).tolist()
    for i, axis in enumerate("zyx"):
        assert table[f"{axis}_start"] == truth[f"bbox-{i}"].tolist()
        assert table[f"{axis}_stop"] == truth[f"bbox-{i + 3}"].tolist()
        np.testing.assert_allclose(table[f"centroid_{axis}_um"], truth[f"centroid-{i}"])


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
    monkeypatch.setattr(counting, "smallest_type", lambda n: "uint16")
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


def test_commands_make_look_at_and_change_objects(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    words = ("segment", image, "--model", model, "--out", out, "--executor", "serial")
    tiles = ("--tile", "8,8,8", "--block", "24,40,48", "--engine", "torch", "--erode", 0)
    code, said = run_command(*words, *tiles, "--connectivity", 26, "--keep-probabilities")
    assert code == 0, said
    assert "objects in" in said
    n_before = int(labels_at(out).max())
    code, said = run_command("status", out)
    assert code == 0
    assert "grow" in said
    code, said = run_command("objects", out)
    assert code == 0, said
    assert "n_voxels" in said
    code, csv = run_command("objects", out, "--csv")
    assert code == 0
    assert len(csv.splitlines()) == n_before + 1
    code, said = run_command("instances", out, "--connectivity", 6, "--executor", "serial")
    assert code == 0, said
    assert int(labels_at(out).max()) > n_before
    code, said = run_command("evaluate", out, out)
    assert code == 0, said


def test_an_object_in_two_components_is_one_label_only_through_its_numbers(planted):
    """The painting holds what it promises, or the tests above would compare nothing."""
    painting = planted_shapes()
    ids, n_faces = ndimage.label(painting == INSIDE)
    _, n_corners = ndimage.label(painting == INSIDE, np.ones((3, 3, 3)))
    assert n_corners < n_faces
    spread = ndimage.find_objects(ids)
    assert any(all(s.stop - s.start > 8 for s in box) for box in spread)
    blocks = painting.reshape(3, 8, 5, 8, -1)[..., :40].reshape(3, 8, 5, 8, 5, 8)
    assert (blocks.max(axis=(1, 3, 5)) == 0).any()
