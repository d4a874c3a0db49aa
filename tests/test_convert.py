"""TIFF, PNG and HDF5 to OME-Zarr, against the arrays that were written to the files."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from helpers import Recorder
from numpy.typing import NDArray
from PIL import Image
from zarr_images import ramp, validate, write_image

from bigseg import convert as convert_room
from bigseg import levels, sources, store
from bigseg.blocks import Region
from bigseg.convert import convert
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.pyramid import mean_downsample, mode_downsample
from bigseg.volume import Volume, open_volume


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


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "int16", "uint32"])
def test_a_tiff_stack_becomes_its_voxels(tmp_path: Path, compression: Any, dtype: str) -> None:
    data = ramp((5, 20, 30), dtype)
    source = tiff(tmp_path / "a.tif", data, compression=compression)
    volume = convert([source], str(tmp_path / "a.ome.zarr"), voxel_size=(50, 4, 4), unit="nm")
    assert volume.multiscale.axis_names == ("z", "y", "x")
    assert volume.multiscale.name == "a"
    assert volume.dtype == data.dtype
    np.testing.assert_allclose(volume.voxel_um or (), (0.05, 0.004, 0.004))
    assert [a.unit for a in volume.multiscale.axes] == ["nanometer"] * 3
    np.testing.assert_array_equal(whole(volume)[0, 0], data)
    assert volume.provenance is not None
    assert volume.provenance["source"] == "a.tif"


def test_big_endian_and_bool_become_plain(tmp_path: Path) -> None:
    data = ramp((5, 20, 30))
    source = tiff(tmp_path / "a.tif", data.astype(">u2"), byteorder=">")
    volume = convert([source], str(tmp_path / "a.zarr"))
    assert volume.dtype == np.dtype("uint16")
    np.testing.assert_array_equal(whole(volume)[0, 0], data)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["m"] = data % 2 == 0
    volume = convert([f"{tmp_path}/b.h5:m"], str(tmp_path / "b.zarr"))
    assert volume.dtype == np.dtype("uint8")
    np.testing.assert_array_equal(whole(volume)[0, 0], data % 2 == 0)


@pytest.mark.parametrize("axes", ["zyx", "tyx", "cyx", "xyz", "yxc", "zxy"])
def test_axes_are_those_that_are_named(tmp_path: Path, axes: str) -> None:
    data = ramp((4, 5, 6))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["raw"] = data
    volume = convert([f"{tmp_path}/a.h5:/raw"], str(tmp_path / "a.zarr"), axes=axes)
    order = "".join(a for a in "tczyx" if a in axes)
    assert "".join(volume.multiscale.axis_names) == order
    wanted = np.einsum(f"{axes}->{order}", data)
    np.testing.assert_array_equal(np.squeeze(whole(volume)), wanted)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("labels", [False, True])
def test_the_pyramid_is_the_mean_or_the_majority_of_the_level_before(
    tmp_path: Path, version: Any, labels: bool
) -> None:
    data = np.random.default_rng(0).integers(0, 3, (7, 301, 260)).astype("uint8")
    source = tiff(tmp_path / "a.tif", data)
    out = str(tmp_path / "a.zarr")
    volume = convert([source], out, voxel_size=(2.0, 0.5, 0.5), version=version)
    reduce = mean_downsample
    if labels:
        volume, reduce = convert([source], out, labels="cells"), mode_downsample
        assert open_volume(out).label_names() == ("cells",)
    assert volume.multiscale.version == version
    # z (2 µm) waits until y and x (0.5, 1, 2 µm) have caught up.
    assert [volume.at(i).shape for i in range(volume.n_levels)] == [
        (1, 7, 301, 260),
        (1, 7, 151, 130),
        (1, 7, 76, 65),
    ]
    wanted = data
    for level in range(volume.n_levels):
        np.testing.assert_array_equal(whole(volume.at(level))[0, 0], wanted)
        wanted = reduce(wanted, (1, 2, 2))
    assert [v.translation for v in volume.multiscale.levels] == [
        (0.0, 0.0, 0.0),
        (0.0, 0.25, 0.25),
        (0.0, 0.75, 0.75),
    ]
    validate(out)


@pytest.mark.parametrize(
    ("shape", "sizes", "wanted"),
    [
        ((1, 1, 128, 128), (1, 1, 1), [(1, 1, 128, 128)]),
        ((1, 1, 129, 20), (1, 1, 1), [(1, 1, 129, 20), (1, 1, 65, 10)]),
        ((3, 200, 300, 300), (1, 1, 1), [(3, 200, 300, 300), (3, 100, 150, 150), (3, 50, 75, 75)]),
        ((1, 300, 64, 64), (4, 1, 1), None),
        ((1, 10**5, 10**5, 10**5), (1, 1, 1), None),
    ],
)
def test_levels_halve_until_small_enough(shape: Any, sizes: Any, wanted: Any) -> None:
    shapes, factors = levels.plan_levels(shape, sizes)
    assert len(shapes) == len(factors) <= levels.MAX_LEVELS
    if wanted is not None:
        assert list(shapes) == wanted
    assert len(shapes) == levels.MAX_LEVELS or max(shapes[-1][1:]) <= 128
    for s, f in zip(shapes, factors, strict=True):
        assert all(-(-n // k) == m for n, m, k in zip(shape, s, f, strict=True))


def test_large_volumes_are_sharded_in_whole_chunks() -> None:
    chunk, shard = levels.plan_chunks((1, 1000, 2000, 3000), 2)
    assert chunk == (1, 64, 64, 64)
    assert shard == (1, 256, 256, 256)
    assert levels.plan_chunks((1, 100, 200, 300), 2) == ((1, 64, 64, 64), None)


@pytest.mark.parametrize("depth", [1, 9, 80])
def test_blocks_of_any_size_give_the_same_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    data = np.random.default_rng(0).integers(0, 255, (depth, 200, 300), "uint8")
    source = tiff(tmp_path / "a.tif", data, compression="zlib")
    first = convert([source], str(tmp_path / "a.zarr"))
    monkeypatch.setattr(convert_room, "BLOCK_BYTES", 1)
    monkeypatch.setattr(levels, "SHARD_FROM_BYTES", 1)
    second = convert([source], str(tmp_path / "b.zarr"))
    assert second.array.shards is not None
    for level in range(first.n_levels):
        np.testing.assert_array_equal(whole(first.at(level)), whole(second.at(level)))
    np.testing.assert_array_equal(whole(second)[0, 0], data)


def test_only_planes_of_one_block_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ramp((130, 70, 80), "uint8")
    source = tiff(tmp_path / "a.tif", data, compression="zlib")
    sizes = []
    read = sources._Tiff.read

    def spy(self: Any, index: Any) -> NDArray[Any]:
        part = read(self, index)
        sizes.append(part.nbytes)
        return part

    monkeypatch.setattr(sources._Tiff, "read", spy)
    monkeypatch.setattr(convert_room, "BLOCK_BYTES", 64 * 64 * 80)
    convert([source], str(tmp_path / "a.zarr"))
    assert sum(sizes) == data.nbytes
    assert max(sizes) <= 64 * 64 * 80


def test_progress_counts_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_room, "BLOCK_BYTES", 1)
    seen = Recorder()
    source = tiff(tmp_path / "a.tif", ramp((130, 140, 70), "uint8"))
    convert([source], str(tmp_path / "a.zarr"), progress=seen)
    n_blocks = 3 * 3 * 2 + 2 * 2 * 1
    wanted = {"label": "convert", "total": n_blocks, "unit": "blocks", "done": n_blocks}
    assert seen.tasks == [wanted]


@pytest.mark.parametrize(
    ("given", "top", "wanted"),
    [
        ("uint8", 255, "uint8"),
        ("uint32", 3, "uint32"),
        ("int32", 200, "uint8"),
        ("int64", 70_000, "uint32"),
        ("bool", 1, "uint8"),
    ],
)
def test_labels_get_the_unsigned_type_that_fits(
    tmp_path: Path, given: str, top: int, wanted: str
) -> None:
    image = write_image(str(tmp_path / "a.zarr"), [ramp((4, 20, 30))], "zyx")
    data = np.zeros((4, 20, 30), given)
    data[2, 5, 7] = top
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x/labels"] = data
    label = convert([f"{tmp_path}/a.h5:/x/labels"], image, labels="cells")
    assert label.dtype == np.dtype(wanted)
    np.testing.assert_array_equal(whole(label)[0, 0], data)
    assert open_volume(image).label("cells").url == label.url


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a.zarr"), [ramp((4, 20, 30))], "zyx")
    cases: list[tuple[NDArray[Any], str, type[Exception]]] = [
        (ramp((4, 20, 31)), r"4×20×31, image .*a.zarr has 4×20×30; they must be equal", InputError),
        (np.zeros((4, 20, 30), "float32"), r"are float32; labels are integers", InputError),
        (np.full((4, 20, 30), -1, "int16"), r"hold -1; labels are not negative", InputError),
    ]
    for data, text, error in cases:
        source = tiff(tmp_path / "l.tif", data)
        with pytest.raises(error, match=text):
            convert([source], image, labels="cells")
    assert not (tmp_path / "a.zarr" / "labels").exists()
    with pytest.raises(UsageError, match="voxel size of their image: leave out --voxel-size"):
        convert([source], image, labels="cells", voxel_size=(1, 1, 1))
    with pytest.raises(InputNotFoundError, match="no such image"):
        convert([source], str(tmp_path / "nope.zarr"), labels="cells")
    with pytest.raises(InputError, match="leaves the store"):
        convert([tiff(tmp_path / "m.tif", ramp((4, 20, 30)))], image, labels="../cells")


def test_labels_of_a_coloured_image_need_no_channels(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a.zarr"), [ramp((2, 4, 20, 30))], "czyx")
    source = tiff(tmp_path / "l.tif", ramp((4, 20, 30)))
    label = convert([source], image, labels="cells")
    assert label.multiscale.axis_names == ("z", "y", "x")
    validate(image)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": "yx"}, "axes 'yx' do not fit .* give 3 different letters"),
        ({"axes": "zzx"}, "axes 'zzx' do not fit"),
        ({"axes": "abc"}, "axes 'abc' do not fit"),
        ({"axes": "tcz"}, "axes 'tcz' do not fit"),
        ({"voxel_size": (1, 1)}, "give 3 positive numbers, along z, y, x"),
        ({"voxel_size": (1, 1, 0)}, "give 3 positive numbers"),
        ({"voxel_size": (1, 1, float("nan"))}, "give 3 positive numbers"),
        ({"voxel_size": (1, 1, 1), "unit": "parrot"}, "unit 'parrot' is no unit of length"),
    ],
)
def test_senseless_options_are_usage_errors(tmp_path: Path, options: Any, text: str) -> None:
    source = tiff(tmp_path / "a.tif", ramp((4, 20, 30)))
    with pytest.raises(UsageError, match=text):
        convert([source], str(tmp_path / "a.zarr"), **options)
    assert not (tmp_path / "a.zarr").exists()


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_bigseg_made_it(
    tmp_path: Path,
) -> None:
    one, two = (tiff(tmp_path / f"{i}.tif", ramp((4, 20, 30)) + i) for i in (1, 2))
    out = str(tmp_path / "a.zarr")
    convert([one], out)
    with pytest.raises(OutputError, match="exists: give another name or use --overwrite"):
        convert([two], out)
    assert whole(convert([two], out, overwrite=True)).min() == 2
    convert([one], out, labels="cells")
    with pytest.raises(OutputError, match="exists: give another name or use --overwrite"):
        convert([two], out, labels="cells")
    assert whole(convert([two], out, labels="cells", overwrite=True)).min() == 2
    assert open_volume(out).label_names() == ("cells",)
    with pytest.raises(OutputError, match="holds the labels cells, which would be lost"):
        convert([one], out, overwrite=True)
    foreign = write_image(str(tmp_path / "b.zarr"), [ramp((4, 20, 30))], "zyx")
    with pytest.raises(OutputError, match="was not made by bigseg, so it is not overwritten"):
        convert([one], foreign, overwrite=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    with pytest.raises((OutputError, NotOmeZarrError)):
        convert([one], str(tmp_path / "folder"), overwrite=True)
    assert (tmp_path / "folder" / "x").exists()


def test_a_conversion_cut_short_is_no_image_and_is_done_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiff(tmp_path / "a.tif", ramp((80, 70, 80), "uint8"))
    out = str(tmp_path / "a.zarr")
    monkeypatch.setattr(convert_room, "BLOCK_BYTES", 1)

    def stop(done: int) -> None:
        if done == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        convert([source], out, progress=Recorder(stop))
    assert store.exists(out)
    with pytest.raises(NotOmeZarrError, match="without OME-Zarr metadata"):
        open_volume(out)
    np.testing.assert_array_equal(whole(convert([source], out))[0, 0], ramp((80, 70, 80), "uint8"))


def test_viewers_are_told_what_to_show_of_each_channel(tmp_path: Path) -> None:
    data = np.stack([np.full((20, 30), 7), np.arange(600).reshape(20, 30)]).astype("uint16")
    source = tiff(tmp_path / "a.tif", data)
    volume = convert([source], str(tmp_path / "a.zarr"), axes="cyx")
    channels = zarr.open_group(volume.url, mode="r").attrs["ome"]["omero"]["channels"]
    assert [c["label"] for c in channels] == ["0", "1"]
    assert (channels[0]["window"]["start"], channels[0]["window"]["end"]) == (7.0, 8.0)
    assert 590 < channels[1]["window"]["end"] < 600


def test_voxels_that_are_no_numbers_do_not_spoil_the_metadata(tmp_path: Path) -> None:
    data = np.full((2, 20, 30), np.nan, "float32")
    data[1, :5] = np.inf
    data[1, 10:] = 3.0
    source = tiff(tmp_path / "a.tif", data)
    url = convert([source], str(tmp_path / "a.zarr"), axes="cyx").url
    channels = zarr.open_group(url, mode="r").attrs["ome"]["omero"]["channels"]
    assert [c["window"]["start"] for c in channels] == [0.0, 3.0]
    validate(url)
