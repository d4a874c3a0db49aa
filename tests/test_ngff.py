"""OME-Zarr metadata in and out, against metadata written by hand and two foreign validators."""

import json
import logging
from typing import Any

import numpy as np
import pytest
from zarr_images import metadata

from bigseg.errors import InputError, NotOmeZarrError
from bigseg.ngff import (
    UNIT_TO_UM,
    Axis,
    Level,
    Multiscale,
    image_paths,
    labels_attributes,
    listed_labels,
    multiscale_attributes,
    parse_multiscale,
)
from bigseg.units import canonical_unit, format_um, nearest_size

SCALES = [(2.0, 1.0, 0.5, 0.25, 0.25), (2.0, 1.0, 0.5, 0.5, 0.5)]
OFFSETS = [(0.0,) * 5, (0.0, 0.0, 0.0, 0.125, 0.125)]


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6", "0.6rc0"])
def test_every_version_says_the_same(version: str) -> None:
    attributes = metadata(
        version, "tczyx", SCALES, translations=OFFSETS, channels=("DAPI", "actin")
    )
    ms = parse_multiscale(attributes, where="X")
    assert ms == Multiscale(
        version=version[:3],
        name="test",
        axes=(
            Axis("t", "time", None),
            Axis("c", "channel", None),
            *(Axis(a, "space", "micrometer") for a in "zyx"),
        ),
        levels=(Level("0", SCALES[0], OFFSETS[0]), Level("1", SCALES[1], OFFSETS[1])),
        channels=("DAPI", "actin"),
        is_label=False,
    )
    assert ms.axis_names == ("t", "c", "z", "y", "x")
    assert ms.voxel_um(1) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "axes", ["yx", "zyx", "cyx", "tyx", "czyx", "tzyx", "tczyx", "xyz", "tcyx"]
)
def test_every_legal_subset_of_axes_is_read(axes: str) -> None:
    ms = parse_multiscale(metadata("0.5", axes, [(1.0,) * len(axes)]), where="X")
    assert "".join(ms.axis_names) == axes
    assert ms.spatial_axes == ("zyx" if "z" in axes else "yx")


@pytest.mark.parametrize("axes", ["x", "zy", "yxx", "yxc", "ctzyx", "tzcyx"])
def test_illegal_orders_and_subsets_of_axes_are_refused(axes: str) -> None:
    attributes = metadata("0.5", axes, [(1.0,) * len(axes)])
    with pytest.raises(
        NotOmeZarrError, match=r"has the axes .*time, channel, space.* hold y and x"
    ):
        parse_multiscale(attributes, where="X")


@pytest.mark.parametrize(
    "axis",
    [
        {"name": "w", "type": "wavelength"},
        {"name": "q", "type": "space"},
        {"name": "c", "type": "space"},
        {"name": "z", "type": "channel"},
        {"name": "angle"},
    ],
)
def test_foreign_axes_are_refused_by_name(axis: dict[str, str]) -> None:
    attributes = metadata("0.4", "zyx", [(1.0, 1.0, 1.0)])
    attributes["multiscales"][0]["axes"][0] = axis
    with pytest.raises(NotOmeZarrError, match=f"axis '{axis['name']}' of type .*write the image"):
        parse_multiscale(attributes, where="X")


def test_an_axis_without_type_is_known_by_its_name() -> None:
    attributes = metadata("0.4", "czyx", [(1.0,) * 4])
    for axis in attributes["multiscales"][0]["axes"]:
        del axis["type"]
    assert parse_multiscale(attributes, where="X").axis_names == ("c", "z", "y", "x")


@pytest.mark.parametrize("version", ["0.1", "0.3", "0.7", "0.9.dev1", "1.0", "latest", "0.40"])
def test_unknown_versions_are_refused_with_the_known_ones(version: str) -> None:
    attributes = metadata("0.5", "yx", [(1.0, 1.0)])
    attributes["ome"]["version"] = version
    with pytest.raises(NotOmeZarrError, match=r"bigseg reads 0.4, 0.5 and 0.6: convert it to 0.5"):
        parse_multiscale(attributes, where="X")


def test_a_missing_version_follows_from_where_the_metadata_lie() -> None:
    old = metadata("0.4", "yx", [(1.0, 1.0)])
    del old["multiscales"][0]["version"]
    new = metadata("0.5", "yx", [(1.0, 1.0)])
    del new["ome"]["version"]
    assert parse_multiscale(old, where="X").version == "0.4"
    assert parse_multiscale(new, where="X").version == "0.5"


def test_transformations_of_the_whole_image_come_after_those_of_the_level() -> None:
    attributes = metadata("0.4", "yx", [(2.0, 3.0)], translations=[(1.0, 1.0)])
    attributes["multiscales"][0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [10.0, 100.0]},
        {"type": "translation", "translation": [5.0, 0.0]},
    ]
    level = parse_multiscale(attributes, where="X").levels[0]
    assert level == Level("0", (20.0, 300.0), (15.0, 100.0))


def test_0_6_knows_identity_and_ignores_transformations_to_other_systems() -> None:
    attributes = metadata("0.6", "zyx", [(1.0, 1.0, 1.0)])
    image = attributes["ome"]["multiscales"][0]
    ends = {"input": {"path": "0"}, "output": {"name": "physical"}}
    image["datasets"][0]["coordinateTransformations"] = [{"type": "identity", **ends}]
    image["coordinateTransformations"] = [
        {"type": "affine", "input": {"name": "physical"}, "output": {"name": "world"}}
    ]
    ms = parse_multiscale(attributes, where="X")
    assert ms.levels[0].scale == (1.0, 1.0, 1.0)
    assert ms.axes[0].unit == "micrometer"


@pytest.mark.parametrize(
    "scale",
    [[1.0], [0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1], "ab", [None, 1]],
)
def test_a_scale_that_is_not_positive_is_refused(scale: Any) -> None:
    attributes = metadata("0.4", "yx", [(1.0, 1.0)])
    attributes["multiscales"][0]["datasets"][0]["coordinateTransformations"][0]["scale"] = scale
    with pytest.raises(InputError, match=r"it must be 2 positive numbers.*correct the metadata"):
        parse_multiscale(attributes, where="X")


@pytest.mark.parametrize("kind", ["affine", "rotation", "mapAxis"])
def test_other_transformations_of_a_level_are_refused(kind: str) -> None:
    attributes = metadata("0.6", "yx", [(1.0, 1.0)])
    steps = attributes["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    steps[0]["type"] = kind
    with pytest.raises(InputError, match=f"by a transformation '{kind}'"):
        parse_multiscale(attributes, where="X")


def test_a_missing_scale_means_one_without_unit_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    attributes = metadata("0.4", "zyx", [(1.0,) * 3, (2.0,) * 3])
    del attributes["multiscales"][0]["datasets"][1]["coordinateTransformations"]
    with caplog.at_level(logging.WARNING):
        ms = parse_multiscale(attributes, where="X")
    assert ms.voxel_um(0) is None
    assert ms.levels[1].scale == (1.0, 1.0, 1.0)
    assert "X has levels without a scale: voxel size taken as 1 without unit" in caplog.text


@pytest.mark.parametrize("path", ["../other/0", "/etc", "s3://bucket/0", "a/../../0", "", "."])
def test_paths_that_leave_the_store_are_refused(path: str) -> None:
    attributes = metadata("0.5", "yx", [(1.0, 1.0)])
    attributes["ome"]["multiscales"][0]["datasets"][0]["path"] = path
    with pytest.raises(InputError, match="leaves the store"):
        parse_multiscale(attributes, where="X")


def test_an_integer_path_is_understood() -> None:
    attributes = metadata("0.4", "yx", [(1.0, 1.0)])
    attributes["multiscales"][0]["datasets"][0]["path"] = 0
    assert parse_multiscale(attributes, where="X").levels[0].path == "0"


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            {"plate": {"wells": [{"path": "B/03"}, {"path": "C/01"}]}},
            "plate of 2 wells: give X/B/03/0",
        ),
        ({"ome": {"version": "0.5", "plate": {"wells": [{"path": "A/1"}]}}}, "give X/A/1/0"),
        ({"well": {"images": [{"path": "0"}, {"path": "1"}]}}, "well of 2 images: give X/0 or X/1"),
        ({"bioformats2raw.layout": 3}, "collection of images: give X/0"),
        ({"ome": {"bioformats2raw.layout": 3, "version": "0.5"}}, "collection of images: give X/0"),
        (
            {"ome": {"series": ["first", "second"]}},
            "collection of images: give X/first or X/second",
        ),
        ({"labels": ["cells"]}, "list of label images: give X/cells"),
        ({"ome": {"scene": {}}}, "scene of several images"),
        ({}, "without OME-Zarr metadata .*check the path"),
        ({"multiscales": []}, "without OME-Zarr metadata"),
        ({"multiscales": "text"}, "without OME-Zarr metadata"),
        ({"ome": 3}, "without OME-Zarr metadata"),
        ({"plate": 7}, "plate of 0 wells"),
    ],
)
def test_what_is_no_image_is_refused_with_the_way_out(attributes: Any, text: str) -> None:
    with pytest.raises(NotOmeZarrError, match=text):
        parse_multiscale(attributes, where="X")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["datasets"], None),
        (["datasets"], [1]),
        (["datasets", 0], {}),
        (["datasets", 0, "coordinateTransformations"], [[]]),
        (["axes"], 3),
        (["axes"], [{}]),
        (["axes", 0], None),
    ],
)
def test_damaged_metadata_are_refused_in_one_sentence(keys: list[Any], value: Any) -> None:
    attributes = metadata("0.4", "yx", [(1.0, 1.0)])
    target = attributes["multiscales"][0]
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    with pytest.raises(NotOmeZarrError, match=r"X .*(damaged|no resolution level)"):
        parse_multiscale(attributes, where="X")


def test_damaged_coordinate_systems_are_refused() -> None:
    attributes = metadata("0.6", "yx", [(1.0, 1.0)])
    attributes["ome"]["multiscales"][0]["coordinateSystems"][1]["name"] = "elsewhere"
    with pytest.raises(NotOmeZarrError, match="damaged"):
        parse_multiscale(attributes, where="X")


@pytest.mark.parametrize(
    "omero", [None, [], {"channels": 3}, {"channels": [{}, 1, {"label": "b"}]}]
)
def test_damaged_channel_names_do_no_harm(omero: Any) -> None:
    attributes = metadata("0.5", "cyx", [(1.0, 1.0, 1.0)], extra={"omero": omero})
    names = parse_multiscale(attributes, where="X").channels
    assert names in ((), ("0", "1", "b"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "tzyx", "czyx", "tczyx"])
def test_what_is_written_reads_back_equal(version: str, axes: str) -> None:
    n = len(axes)
    scales = [(0.5,) * n, (1.0,) * n]
    source = metadata(version, axes, scales, translations=[(0.0,) * n, (0.25,) * n])
    ms = parse_multiscale(source, where="X")
    labels = Multiscale(ms.version, "cells", ms.axes, ms.levels, (), is_label=True)
    attributes = multiscale_attributes(labels, downsampling="mode", source="../../")
    assert parse_multiscale(json.loads(json.dumps(attributes)), where="X") == labels


def test_channels_come_after_time_and_go_again() -> None:
    ms = parse_multiscale(metadata("0.5", "tczyx", SCALES), where="X")
    plain = ms.without_channels()
    assert plain.axis_names == ("t", "z", "y", "x")
    assert plain.levels[1].scale == (2.0, 0.5, 0.5, 0.5)
    named = ms.with_channels(("a", "b", "c"))
    assert named.axis_names == ("t", "c", "z", "y", "x")
    assert named.channels == ("a", "b", "c")
    no_time = parse_multiscale(metadata("0.5", "yx", [(1.0, 2.0)]), where="X").with_channels(("a",))
    assert no_time.axis_names == ("c", "y", "x")
    assert no_time.levels[0].scale == (1.0, 1.0, 2.0)


def test_classes_have_names_and_distinct_colours() -> None:
    ms = parse_multiscale(metadata("0.5", "yx", [(1.0, 1.0)]), where="X")
    labels = Multiscale("0.5", "m", ms.axes, ms.levels, (), is_label=True)
    names = ("background", "cell", "border")
    found = multiscale_attributes(labels, downsampling="mode", class_names=names)
    image_label = found["ome"]["image-label"]
    assert [p["name"] for p in image_label["properties"]] == list(names)
    assert image_label["colors"][0]["rgba"] == [0, 0, 0, 0]
    assert len({tuple(c["rgba"]) for c in image_label["colors"]}) == 3
    assert "source" not in image_label


def test_provenance_lies_outside_the_ome_namespace() -> None:
    ms = parse_multiscale(metadata("0.5", "yx", [(1.0, 1.0)]), where="X")
    found = multiscale_attributes(ms, downsampling="mean", extra={"bigseg": {"version": "1"}})
    assert found["bigseg"] == {"version": "1"}
    assert "bigseg" not in found["ome"]


def test_the_list_of_labels_carries_its_version() -> None:
    assert labels_attributes(["a"], version="0.4") == {"labels": ["a"]}
    new = labels_attributes(["a", "b"], version="0.5")
    assert new == {"ome": {"version": "0.5", "labels": ["a", "b"]}}
    assert listed_labels(new) == ("a", "b")
    assert listed_labels({}) == listed_labels({"labels": 3}) == ()


def test_a_well_names_its_images() -> None:
    assert image_paths({"well": {"images": [{"path": 0}, {"path": "1"}]}}) == ["0", "1"]
    assert image_paths({"plate": {"wells": [{"no": "path"}]}}) == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("um", "micrometer"),
        ("µm", "micrometer"),
        ("micrometers", "micrometer"),
        ("microns", "micrometer"),
        ("nm", "nanometer"),
        ("seconds", "second"),
        ("s", "second"),
        ("micrometer", "micrometer"),
        ("furlong", "furlong"),
        (None, None),
    ],
)
def test_units_get_the_names_of_the_specification(given: str | None, wanted: str | None) -> None:
    assert canonical_unit(given) == wanted


def test_every_unit_keeps_its_own_name() -> None:
    for unit in UNIT_TO_UM:
        assert canonical_unit(unit) == unit


@pytest.mark.parametrize(
    ("unit", "factor"), [("nanometer", 1e-3), ("millimeter", 1e3), ("angstrom", 1e-4)]
)
def test_voxel_sizes_are_given_in_micrometer(unit: str, factor: float) -> None:
    ms = parse_multiscale(metadata("0.5", "zyx", [(4.0, 2.0, 1.0)], unit=unit), where="X")
    np.testing.assert_allclose(ms.voxel_um(0) or (), np.array([4.0, 2.0, 1.0]) * factor)


def test_voxel_sizes_come_in_the_order_z_y_x_whatever_is_stored() -> None:
    ms = parse_multiscale(metadata("0.5", "xyz", [(1.0, 2.0, 3.0)]), where="X")
    assert ms.voxel_um(0) == (3.0, 2.0, 1.0)


@pytest.mark.parametrize("unit", [None, "furlong", "second"])
def test_without_a_unit_of_length_there_is_no_voxel_size(unit: str | None) -> None:
    ms = parse_multiscale(metadata("0.5", "zyx", [(4.0, 2.0, 1.0)], unit=unit), where="X")
    assert ms.voxel_um(0) is None


def test_the_nearest_size_is_by_the_worst_axis() -> None:
    sizes = [(1.0, 0.1, 0.1), (1.0, 0.2, 0.2), (2.0, 0.4, 0.4)]
    assert nearest_size(sizes, (1.0, 0.19, 0.19), tolerance=1.5, where="X") == 1
    assert nearest_size(sizes, (0.4, 0.4), tolerance=1.5, where="X") == 2
    assert nearest_size(sizes, (1.5, 0.1, 0.1), tolerance=1.5, where="X") == 0


def test_sizes_too_far_away_are_refused_with_the_choice() -> None:
    text = (
        r"no level of X .*factor 1.5 .*level 0: 1×1 µm; level 1: 2×2 µm.*choose one with `--level`"
    )
    with pytest.raises(InputError, match=text):
        nearest_size([(1.0, 1.0), (2.0, 2.0)], (9.0, 9.0), tolerance=1.5, where="X")
    with pytest.raises(InputError, match="fewer spatial axes than the model's 3"):
        nearest_size([(1.0, 1.0)], (1.0, 1.0, 1.0), tolerance=1.5, where="X")
    assert format_um((0.5, 0.123456)) == "0.5×0.1235 µm"
