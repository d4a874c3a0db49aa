"""Objects made block by block are those of the same algorithm on the whole array in one memory."""

import json
from pathlib import Path

import cc3d
import numpy as np
import pytest
from helpers import Recorder, run_command, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from planting import (
    INSIDE,
    config_for,
    labels_at,
    planted_shapes,
    truth_of,
    write_planting_model,
)
from scipy import ndimage
from skimage.measure import regionprops_table
from zarr_images import write_image as write_version

from bigseg.errors import UsageError
from bigseg.layout import listed_labels
from bigseg.progress import NullProgress
from bigseg.rerun import remake_instances
from bigseg.rules import InstanceRule, RuleOptions
from bigseg.segment import segment_serially
from bigseg.table import objects_url, read_table

RULES = {
    "eroded and grown": {"erode": 1, "grow": 3},
    "as they are, across faces": {"erode": 0, "grow": 0},
    "as they are, across edges": {"erode": 0, "grow": 2, "connectivity": 2},
    "as they are, across corners": {"erode": 0, "grow": 9, "connectivity": 3},
    "only large ones, holes filled": {"erode": 1, "grow": 1, "min_size": 30, "fill_holes": True},
}
BLOCKS = {"small": (8, 8, 8), "oblong": (8, 24, 16), "the whole": (24, 40, 48)}


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


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_painting_in_any_blocks_gives_the_objects_of_the_whole_array(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    dims = data.draw(st.sampled_from([2, 3]), label="dims")
    shape = data.draw(st.tuples(*(st.integers(1, n) for n in (7, 12, 13))), label="shape")
    painting = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2)), label="painting")
    rule = {
        "erode": data.draw(st.integers(0, 2), label="erode"),
        "grow": data.draw(st.integers(0, 3), label="grow"),
        "min_size": data.draw(st.integers(1, 3), label="min_size"),
        "connectivity": data.draw(st.integers(1, dims), label="connectivity"),
        "fill_holes": data.draw(st.booleans(), label="fill_holes"),
    }
    tile = data.draw(st.sampled_from([(2, 4, 4), (4, 4, 8), (8, 8, 4)]), label="tile")
    image = write_image(folder / "image.zarr", painting, chunks=(4, 8, 8))
    model = write_planting_model(folder / "model.safetensors", dims=dims)
    config = config_for(image, model, folder / "out.zarr", rule, tile=tile[-dims:], block=tile)
    result = segment_serially(config, NullProgress())
    truth, n = truth_of(painting, rule, ratios=(1.0,) * dims, dims=dims)
    assert result.n_objects == n
    np.testing.assert_array_equal(labels_at(folder / "out.zarr"), truth)


@pytest.mark.parametrize("connectivity", [1, 2, 3])
def test_seeds_are_the_components_that_cc3d_finds_in_the_whole_volume(
    planted, connectivity, tmp_path
):
    image, model = planted
    rule = {"erode": 0, "grow": 0, "connectivity": connectivity}
    out = tmp_path / "out.zarr"
    segment_serially(config_for(image, model, out, rule, block=(8, 24, 16)), NullProgress())
    seeds = (planted_shapes() == INSIDE).astype(np.uint8)
    found = cc3d.connected_components(seeds, connectivity={1: 6, 2: 18, 3: 26}[connectivity])
    ids, first = np.unique(found, return_index=True)
    numbers = np.zeros(len(ids), int)
    numbers[1:] = 1 + np.argsort(np.argsort(first[1:]))
    np.testing.assert_array_equal(labels_at(out)[0], numbers[found])


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


def test_a_link_can_be_taken_out_of_a_rule_again():
    linked = RuleOptions(link="z").applied_to(InstanceRule(), 2)
    assert linked.link == "z"
    assert RuleOptions(grow=2).applied_to(linked, 2).link == "z"
    assert RuleOptions(link="none").applied_to(linked, 2).link is None


@pytest.mark.parametrize(("dims", "n"), [(3, 8), (3, 4), (2, 6), (2, 18), (2, 26)])
def test_neighbours_that_the_network_does_not_see_are_refused(planted, dims, n, tmp_path):
    image, _ = planted
    model = write_planting_model(tmp_path / "model.safetensors", dims=dims)
    words = ("plan", image, "--model", model, "--out", tmp_path / "o.zarr", "--connectivity", n)
    code, said = run_command(*words, "--executor", "serial")
    assert code == 2
    sees, those = {2: ("planes", "4 or 8"), 3: ("volumes", "6, 18 or 26")}[dims]
    assert said.strip() == (
        f"error: --connectivity {n}: the network sees {sees}, where a voxel has {those} "
        "neighbours: choose one of those"
    )


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


def test_chunks_that_only_the_table_reads_are_filled_and_told_as_well(tmp_path):
    painting = planted_shapes()
    data = np.stack([painting, painting])
    image = write_image(tmp_path / "image.zarr", data, chunks=(1, 24, 40, 44), dims="czyx")
    (tmp_path / "image.zarr/0/c/1/0/0/0").write_bytes(b"damaged")
    model = write_planting_model(tmp_path / "model.safetensors")
    out = tmp_path / "out.zarr"
    options = {"block": (24, 40, 48), "keep_probabilities": True}
    result = segment_serially(config_for(image, model, out, {}, **options), NullProgress())
    assert "--on-bad-chunk fill" in result.failed[0].error
    filling = config_for(image, model, out, {}, on_bad_chunk="fill", **options)
    result = segment_serially(filling, NullProgress())
    assert result.is_complete
    assert result.filled == ("0/c/1/0/0/0",)
    np.testing.assert_array_equal(labels_at(out), truth_of(painting, {})[0])
    other = {"erode": 0, "grow": 2}
    again = remake_instances(
        str(out), RuleOptions(**other), executor="serial", progress=NullProgress()
    )
    assert again.is_complete, again.failed
    assert again.filled == result.filled
    np.testing.assert_array_equal(labels_at(out), truth_of(painting, other)[0])


def test_instances_and_labels_do_not_go_on_from_each_other(planted, tmp_path):
    image, model = planted
    out = tmp_path / "out.zarr"
    segment_serially(config_for(image, model, out, {}, block=(24, 40, 48)), NullProgress())
    other = config_for(image, model, out, {}, output="labels", block=(24, 40, 48))
    with pytest.raises(UsageError, match="holds instances, and labels are asked for"):
        segment_serially(other, NullProgress())
