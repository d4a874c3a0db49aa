"""TIFF, PNG, HDF5 and stacks of them as arrays, through their conversion."""

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr_images import ramp

from bigseg.blocks import Region
from bigseg.convert import convert
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    ResourceError,
    UsageError,
)
from bigseg.volume import Volume


def whole(volume: Volume) -> NDArray[Any]:
    return volume.read(Region.of_shape(volume.shape), range(volume.n_channels))


def tiff(path: Path, data: NDArray[Any], **options: Any) -> str:
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    return str(path)


def pngs(folder: Path, data: NDArray[Any]) -> list[str]:
    folder.mkdir()
    paths = [folder / f"image{i}.png" for i in range(len(data))]
    for path, plane in zip(paths, data, strict=True):
        Image.fromarray(plane).save(path)
    return [str(p) for p in paths]


def test_imagej_metadata_name_axes_and_voxel_size(tmp_path: Path) -> None:
    data = ramp((2, 3, 4, 20, 30))
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        data,
        imagej=True,
        resolution=(10.0, 5.0),
        metadata={"axes": "TZCYX", "spacing": 0.5, "unit": "um"},
    )
    volume = convert([str(path)], str(tmp_path / "a.zarr"))
    assert "".join(volume.multiscale.axis_names) == "tczyx"
    np.testing.assert_allclose(volume.voxel_um or (), (0.5, 0.2, 0.1))
    np.testing.assert_array_equal(whole(volume), np.einsum("tzcyx->ctzyx", data))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_ome_tiff_metadata_name_axes_and_voxel_size(tmp_path: Path, compression: Any) -> None:
    data = ramp((3, 2, 20, 30))
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path,
        data,
        ome=True,
        photometric="minisblack",
        compression=compression,
        metadata={
            "axes": "ZCYX",
            "PhysicalSizeX": 0.1,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": 100,
            "PhysicalSizeYUnit": "nm",
            "PhysicalSizeZ": 0.5,
            "PhysicalSizeZUnit": "µm",
        },
    )
    volume = convert([str(path)], str(tmp_path / "a.zarr"))
    np.testing.assert_allclose(volume.voxel_um or (), (0.5, 0.1, 0.1))
    np.testing.assert_array_equal(whole(volume)[:, 0], np.einsum("zcyx->czyx", data))


def test_printers_resolution_is_no_voxel_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiff(tmp_path / "a.tif", ramp((20, 30)), resolution=(72, 72), resolutionunit="inch")
    with caplog.at_level(logging.WARNING):
        volume = convert([source], str(tmp_path / "a.zarr"))
    assert volume.voxel_um is None
    assert "states no voxel size: give one with --voxel-size" in caplog.text


def test_colours_become_channels(tmp_path: Path) -> None:
    data = ramp((3, 20, 30, 3), "uint8")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, photometric="rgb")
    volume = convert([str(path)], str(tmp_path / "a.zarr"))
    assert "".join(volume.multiscale.axis_names) == "czyx"
    np.testing.assert_array_equal(whole(volume)[:, 0], np.einsum("zyxc->czyx", data))
    paths = pngs(tmp_path / "png", data)
    stacked = convert(paths, str(tmp_path / "b.zarr"))
    np.testing.assert_array_equal(whole(stacked), whole(volume))
    assert len(zarr.open_group(stacked.url, mode="r").attrs["ome"]["omero"]["channels"]) == 3


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_folder_of_pngs_is_ordered_by_number(tmp_path: Path, dtype: str) -> None:
    data = ramp((12, 20, 30), dtype)
    pngs(tmp_path / "png", data)
    (tmp_path / "png" / "notes.txt").write_text("no image")
    volume = convert([str(tmp_path / "png")], str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(whole(volume)[0, 0], data)


def test_files_stack_in_the_order_given_and_a_strange_order_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ramp((11, 20, 30))
    paths = [tiff(tmp_path / f"p{i}.tif", plane) for i, plane in enumerate(data)]
    order = sorted(paths)  # p0, p1, p10, p2, ... as a shell sorts them
    with caplog.at_level(logging.WARNING):
        volume = convert(order, str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(whole(volume)[0, 0], data[[0, 1, 10, *range(2, 10)]])
    assert "as given, not by number" in caplog.text


def test_volumes_stack_along_a_named_axis(tmp_path: Path) -> None:
    data = ramp((3, 4, 20, 30))
    paths = [tiff(tmp_path / f"t{i}.tif", part, compression="zlib") for i, part in enumerate(data)]
    volume = convert(paths, str(tmp_path / "a.zarr"), axes="tzyx")
    np.testing.assert_array_equal(whole(volume)[0], data)


def test_unknown_numbers_of_axes_must_be_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one"] = np.arange(4)
    with pytest.raises(UsageError, match=r"shape \(4,\), whose axes are unknown: name them"):
        convert([f"{tmp_path}/a.h5:/one"], str(tmp_path / "a.zarr"))


def test_files_that_cannot_be_used_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a.tif", "a.png", "a.h5", "a.czi"):
        (tmp_path / name).write_bytes(b"nonsense")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["g/raw"] = ramp((4, 5))
        file["text"] = np.full((2, 2), b"word")
    cases: list[tuple[str, type[Exception], str]] = [
        ("nope.tif", InputNotFoundError, "no such file: .*nope.tif; check the path"),
        ("nope.h5:/raw", InputNotFoundError, "no such file: .*nope.h5; check the path"),
        ("a.tif", InputError, "no TIFF file that can be read"),
        ("a.png", InputError, "no PNG file that can be read"),
        ("a.h5:/raw", InputError, "no HDF5 file that can be read"),
        ("a.czi", InputError, "format that bigseg does not read: give TIFF, PNG, or HDF5"),
        ("empty", InputError, "holds no TIFF or PNG files"),
        ("b.h5", UsageError, r"file:/dataset, not .*; there are: .*b.h5:/g/raw"),
        ("b.h5:/g", UsageError, r"there are: .*b.h5:/g/raw"),
        ("b.h5:/text", InputError, "bigseg takes integers, booleans"),
    ]
    for name, error, text in cases:
        with pytest.raises(error, match=text):
            convert([str(tmp_path / name)], str(tmp_path / "out.zarr"))
    with pytest.raises(UsageError, match="no image given"):
        convert([], str(tmp_path / "out.zarr"))


def test_files_of_a_stack_must_be_alike(tmp_path: Path) -> None:
    paths = [
        tiff(tmp_path / "a1.tif", ramp((20, 30))),
        tiff(tmp_path / "a2.tif", ramp((20, 31))),
    ]
    with pytest.raises(InputError, match=r"a2.tif is \(20, 31\) uint16, .*a1.tif is \(20, 30\)"):
        convert(paths, str(tmp_path / "a.zarr"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(ResourceError, match=r"h5py: install it with `pip install h5py`"):
        convert([f"{tmp_path}/a.h5:/x"], str(tmp_path / "a.zarr"))


def test_a_page_that_cannot_be_decoded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiff(tmp_path / "a.tif", ramp((4, 20, 30)), compression="zlib")

    def fail(*_: object, **__: object) -> None:
        raise KeyError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffFrame, "asarray", fail)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
    with pytest.raises(
        InputError, match=r"page 0 of .*a.tif cannot be read: .*install imagecodecs"
    ):
        convert([source], str(tmp_path / "a.zarr"))


def test_pngs_that_are_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pngs(tmp_path / "png", ramp((1, 30, 40), "uint8"))
    for limit in (1000, 100):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="too large for a PNG: save it as a tiled TIFF"):
            convert(paths, str(tmp_path / "a.zarr"))
