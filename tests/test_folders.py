"""Folders of images: each file an image of its own, labels beside them by name."""

import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from helpers import Recorder
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr_images import ramp, write_image

from bigseg import layout
from bigseg.blocks import Region
from bigseg.cli import main
from bigseg.convert import Conversion
from bigseg.errors import InputError, InputNotFoundError, OutputError, UsageError
from bigseg.folders import convert_files, destinations, images_in
from bigseg.sources import without_ending
from bigseg.volume import Volume, open_volume

SHAPES = {"a": (20, 30), "b2": (25, 18), "b10": (4, 40)}
LETTERS = st.text("abc123_-. é", min_size=1)


def plane(volume: Volume) -> NDArray[Any]:
    return volume.read(Region.of_shape(volume.shape))[0, 0, 0]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with images and labels of three different sizes."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, shape in SHAPES.items():
        tifffile.imwrite(folder / f"{name}_image.tif", ramp(shape, "uint8"))
        tifffile.imwrite(folder / f"{name}_nuclei.tif", (ramp(shape, "uint16") > 9).astype("u2"))
    return folder


def convert_both(data: Path, out: str, **options: Any) -> tuple[str, ...]:
    convert_files(Conversion(**options), [str(data)], out, each="{name}_image")
    wanted = Conversion(labels="nuclei", **options)
    return convert_files(wanted, [str(data)], out, each="{name}_nuclei")


def test_each_file_becomes_an_image_and_labels_find_theirs_by_name(
    data: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "images")
    labels = convert_both(data, out)
    assert labels == tuple(f"{out}/{name}.zarr/labels/nuclei" for name in SHAPES)
    for name, shape in SHAPES.items():
        image = open_volume(f"{out}/{name}.zarr")
        assert image.multiscale.name == name
        np.testing.assert_array_equal(plane(image), ramp(shape, "uint8"))
        np.testing.assert_array_equal(plane(image.label("nuclei")), ramp(shape, "uint16") > 9)
    assert images_in([out]) == tuple(f"{out}/{name}.zarr" for name in SHAPES)


def test_files_that_are_given_and_a_folder_of_them_go_to_the_same_places(data: Path) -> None:
    files = [str(data / f"{name}_image.tif") for name in SHAPES]
    wanted = {f"out/{name}.zarr": file for name, file in zip(SHAPES, files, strict=True)}
    assert destinations(files, "out/", pattern="{name}_image") == wanted
    assert destinations([str(data)], "out", pattern="{name}_image.tif") == wanted
    whole = destinations(files, "s3://bucket/out", pattern="{name}")
    assert list(whole) == [f"s3://bucket/out/{name}_image.zarr" for name in SHAPES]


@given(LETTERS, LETTERS, LETTERS, st.sampled_from([".tif", ".ome.tif", ".PNG", ".h5:/raw"]))
def test_the_pattern_gives_back_the_name_that_was_put_in(
    before: str, name: str, after: str, ending: str
) -> None:
    file = f"folder.tif/{before}-{name}+{after}{ending}"
    # The only separators of their kind, so that there is one answer.
    before, name, after = (part.replace("-", "") for part in (before, name, after))
    file = f"folder.tif/{before}-{name or 'x'}+{after}{ending}"
    assert without_ending(file) == f"{before}-{name or 'x'}+{after}"
    if after.endswith((".ome", ".tif")):
        return
    places = destinations([file], "out", pattern=f"{before}-{{name}}+{after}")
    assert places == {f"out/{name or 'x'}.zarr": file}


def test_datasets_of_hdf5_files_are_named_by_their_files(tmp_path: Path) -> None:
    for name in "ab":
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["raw"], file["label"] = ramp((4, 20, 30)), ramp((4, 20, 30)) % 3
    out = str(tmp_path / "images")
    raw, label = ([f"{tmp_path}/{n}.h5:/{kind}" for n in "ab"] for kind in ("raw", "label"))
    convert_files(Conversion(), raw, out, each="{name}")
    made = convert_files(Conversion(labels="cells"), label, out, each="{name}")
    assert made == tuple(f"{out}/{n}.zarr/labels/cells" for n in "ab")


def test_without_a_pattern_the_files_form_one_image(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{i}.tif") for i in range(3)]
    for i, file in enumerate(files):
        tifffile.imwrite(file, ramp((20, 30)) + i)
    (url,) = convert_files(Conversion(), files, str(tmp_path / "a.zarr"))
    assert open_volume(url).shape == (1, 3, 20, 30)


def test_nothing_is_written_where_names_do_not_fit(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    image, nuclei = str(data / "a_image.tif"), str(data / "a_nuclei.tif")
    (tmp_path / "other").mkdir()
    tifffile.imwrite(other := str(tmp_path / "other" / "a_image.tif"), ramp((4, 5)))
    cases: list[tuple[list[str], str, str, type[Exception]]] = [
        ([image], "image", r"pattern 'image' must hold \{name\} once", UsageError),
        ([image], "{name}{name}", r"must hold \{name\} once", UsageError),
        ([image, nuclei], "{name}_image", r"a_nuclei.tif fits the pattern", UsageError),
        ([str(data)], "{name}_raw", r"no file in .*data fits the pattern", UsageError),
        ([image, other], "{name}", r"and .* would both become .*a_image.zarr", UsageError),
        ([str(tmp_path)], "{name}", r"holds no TIFF or PNG files", InputError),
    ]
    for files, pattern, text, error in cases:
        with pytest.raises(error, match=text):
            convert_files(Conversion(), files, str(out), each=pattern)
    with pytest.raises(InputNotFoundError, match=r"there is no such image: convert the images"):
        convert_files(Conversion(labels="nuclei"), [nuclei], str(out), each="{name}")
    assert not out.exists()


def test_what_exists_is_replaced_only_when_asked(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "images")
    one = [str(data / "b2_image.tif")]
    convert_files(Conversion(), one, out, each="{name}_image")
    with pytest.raises(OutputError, match=r"1 of 3 outputs exist, such as .*b2.zarr: give another"):
        convert_files(Conversion(), [str(data)], out, each="{name}_image")
    assert images_in([out]) == (f"{out}/b2.zarr",)
    convert_both(data, out, overwrite=True)
    with pytest.raises(OutputError, match=r"3 of 3 outputs exist, such as .*/labels/nuclei"):
        convert_files(Conversion(labels="nuclei"), [str(data)], out, each="{name}_nuclei")
    again = Conversion(labels="nuclei", overwrite=True)
    assert len(convert_files(again, [str(data)], out, each="{name}_nuclei")) == 3


def test_an_image_that_was_cut_short_does_not_count_as_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    out = str(tmp_path / "images")
    with monkeypatch.context() as patch:
        patch.setattr(layout, "publish", stop)
        with pytest.raises(RuntimeError, match="killed"):
            convert_files(Conversion(), [str(data)], out, each="{name}_image")
    assert (tmp_path / "images" / "a.zarr" / "0").exists()
    assert len(convert_files(Conversion(), [str(data)], out, each="{name}_image")) == 3


def test_unknown_voxel_sizes_are_told_once(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        convert_both(data, str(tmp_path / "images"))
    assert len(caplog.messages) == 1
    assert "3 of 3 files state no voxel size, such as" in caplog.messages[0]


def test_progress_counts_every_file(data: Path, tmp_path: Path) -> None:
    seen = Recorder()
    out = str(tmp_path / "images")
    convert_files(Conversion(), [str(data)], out, each="{name}_image", progress=seen)
    assert seen.tasks == [{"label": "convert", "total": 3, "unit": "files", "done": 3}]


def test_images_stay_themselves_and_folders_become_what_they_hold(tmp_path: Path) -> None:
    for name in ("i10", "i9"):
        write_image(str(tmp_path / "f" / f"{name}.zarr"), [ramp((4, 5))], "yx")
    (tmp_path / "f" / "notes").mkdir()
    (tmp_path / "empty").mkdir()
    plain = write_image(str(tmp_path / "image"), [ramp((4, 5))], "yx")
    inside = (f"{tmp_path}/f/i9.zarr", f"{tmp_path}/f/i10.zarr")
    assert images_in([f"{tmp_path}/f"]) == inside
    # What cannot be found is left to whoever opens it, who explains it.
    others = (plain, inside[1], f"{tmp_path}/empty", f"{tmp_path}/nothing", "s3://bucket/f")
    assert images_in(others) == others


def test_the_command_names_every_image_that_it_made(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "images")
    files = [str(data / f"{name}_image.tif") for name in SHAPES]
    done = CliRunner().invoke(main, ["convert", *files, out, "--each"])
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [f"{out}/{name}_image.zarr" for name in SHAPES]
    done = CliRunner().invoke(main, ["convert", "--each", "{name}_nuclei", *files, out])
    assert done.exit_code == 2
    assert "fits the pattern '{name}_nuclei'" in done.stderr


def test_a_folder_is_trained_on_by_its_name(data: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "images")
    convert_files(Conversion(), [str(data)], out, each="{name}_image")
    words = ["train", out, "--labels", "nuclei", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, [*words, "--executor", "serial"])
    assert done.exit_code == 3
    assert f"labels 'nuclei' not found in {out}/a.zarr" in done.stderr
