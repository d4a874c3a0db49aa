"""Descriptions of what is at a location."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr_images import pyramid_of, ramp, write_image

from bigseg.errors import InputNotFoundError, NotOmeZarrError
from bigseg.info import as_text, describe
from bigseg.volume import OutputSpec, create_pyramid, list_label, open_volume


def test_an_image_is_described_whole(tmp_path: Path) -> None:
    levels = pyramid_of(ramp((2, 6, 16, 16)), 2, (1, 1, 2, 2))
    url = write_image(
        str(tmp_path / "a.zarr"),
        levels,
        "czyx",
        chunks=(1, 2, 4, 4),
        shards=(1, 4, 8, 8),
        scale0=(1, 2, 0.5, 0.5),
        channels=("DAPI", "actin"),
    )
    spec = OutputSpec(np.dtype("uint32"), (1, 4, 4, 4), None, (), {"version": "9"})
    create_pyramid(open_volume(url), f"{url}/labels/cells", spec, name="cells")
    list_label(url, "cells")
    found = describe(url + "/")
    assert json.loads(json.dumps(found)) == found
    assert found["levels"][1] == {
        "path": "1",
        "shape": [2, 6, 8, 8],
        "scale": [1, 2, 1.0, 1.0],
        "translation": [0, 0, 0, 0],
        "chunks": [1, 2, 4, 4],
        "shards": [1, 4, 8, 8],
        "bytes": 2 * 6 * 8 * 8 * 2,
    }
    assert {k: v for k, v in found.items() if k not in ("levels", "url")} == {
        "kind": "image",
        "name": "test",
        "version": "0.5",
        "zarr_format": 3,
        "axes": "czyx",
        "units": {"z": "micrometer", "y": "micrometer", "x": "micrometer"},
        "voxel_um": [2.0, 0.5, 0.5],
        "dtype": "uint16",
        "channels": ["DAPI", "actin"],
        "labels": ["cells"],
        "bytes": 2 * 6 * (256 + 64) * 2,
        "bigseg": None,
    }
    text = as_text(found)
    for part in (
        "image, OME-Zarr 0.5 (zarr v3)",
        "2×0.5×0.5 µm",
        "0 DAPI, 1 actin",
        "level 1   2×6×8×8, chunks 1×2×4×4, shards 1×4×8×8, scale 1, 2, 1, 1 (path 1)",
        "labels    cells",
        "7.5 KiB uncompressed",
    ):
        assert part in text
    label = describe(f"{url}/labels/cells")
    assert label["kind"] == "labels"
    assert "made by   bigseg: version 9" in as_text(label)


def test_an_image_without_units_says_so(tmp_path: Path) -> None:
    attributes = {
        "multiscales": [
            {
                "version": "0.4",
                "axes": [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}],
                "datasets": [{"path": "0"}],
            }
        ]
    }
    url = write_image(
        str(tmp_path / "a"), [ramp((4, 4))], "yx", version="0.4", attributes=attributes
    )
    found = describe(url)
    assert found["voxel_um"] is None
    assert "unknown (no units of length)" in as_text(found)
    assert "labels    none" in as_text(found)


def test_a_plate_names_the_images_of_each_well(tmp_path: Path) -> None:
    url = str(tmp_path / "p.zarr")
    wells = [{"path": "A/1"}, {"path": "B/2"}, {"path": "C/3"}]
    zarr.create_group(url, attributes={"ome": {"version": "0.5", "plate": {"wells": wells}}})
    zarr.create_group(
        f"{url}/A/1", attributes={"ome": {"well": {"images": [{"path": "0"}, {"path": "1"}]}}}
    )
    zarr.create_group(f"{url}/B/2", zarr_format=3)
    found = describe(url)
    assert (found["kind"], found["n_images"]) == ("plate", 4)
    assert found["images"] == ["A/1/0", "A/1/1", "B/2/0", "C/3/0"]
    assert as_text(found).splitlines() == [
        f"{url}: plate of 4 images",
        *("  A/1/0", "  A/1/1", "  B/2/0", "  C/3/0"),
    ]


@pytest.mark.parametrize(
    ("attributes", "kind", "images"),
    [
        ({"well": {"images": [{"path": "0"}]}}, "well", ["0"]),
        ({"ome": {"series": ["x", "y"], "version": "0.5"}}, "collection", ["x", "y"]),
        ({"ome": {"labels": ["cells"], "version": "0.5"}}, "list", ["cells"]),
    ],
)
def test_collections_name_their_images(
    tmp_path: Path, attributes: dict[str, object], kind: str, images: list[str]
) -> None:
    zarr.create_group(str(tmp_path / "a"), attributes=attributes)
    found = describe(str(tmp_path / "a"))
    assert (found["kind"], found["images"]) == (kind, images)


def test_numbered_images_of_a_collection_are_found(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    zarr.create_group(url, zarr_format=2, attributes={"bioformats2raw.layout": 3})
    for name in ("0", "1", "10", "2", "OME"):
        zarr.create_group(f"{url}/{name}", zarr_format=2)
    assert describe(url)["images"] == ["0", "1", "2", "10"]


def test_what_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no such image"):
        describe(str(tmp_path / "nope"))
    zarr.create_group(str(tmp_path / "a"))
    with pytest.raises(NotOmeZarrError, match="without OME-Zarr metadata"):
        describe(str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    with pytest.raises(NotOmeZarrError, match="without Zarr metadata"):
        describe(str(tmp_path / "b"))
