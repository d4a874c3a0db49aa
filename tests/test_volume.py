"""Opening and reading images, against arrays in memory."""

import pickle
import uuid
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from zarr_images import (
    SIZES,
    canonical,
    fill,
    labels_spec,
    metadata,
    pyramid_of,
    ramp,
    write_image,
)

from bigseg import store
from bigseg.blocks import Region
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    UsageError,
)
from bigseg.volume import (
    create_pyramid,
    list_label,
    nearest_level,
    open_volume,
)


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize("axes", ["yx", "zyx", "cyx", "tyx", "czyx", "tczyx", "tcyx", "xyz"])
def test_every_version_and_subset_of_axes_reads_the_same_voxels(
    tmp_path: Path, version: str, axes: str
) -> None:
    data = ramp([SIZES[a] for a in axes])
    chunks = [1 if a in "tc" else 4 for a in axes]
    url = write_image(str(tmp_path / "a.zarr"), [data], axes, version=version, chunks=chunks)
    volume, wanted = open_volume(url), canonical(data, axes)
    assert (volume.n_channels, *volume.shape) == wanted.shape
    np.testing.assert_array_equal(
        volume.read(Region.of_shape(volume.shape), range(volume.n_channels)), wanted
    )
    assert volume.spatial_axes == ("zyx" if "z" in axes else "yx")


def test_any_region_and_channels_are_what_the_array_holds(tmp_path: Path) -> None:
    data = ramp([SIZES[a] for a in "tczyx"])
    url = write_image(
        str(tmp_path / "a"), [data], "tczyx", chunks=(1, 1, 2, 4, 4), shards=(1, 2, 4, 8, 8)
    )
    volume = open_volume(url)
    assert volume.chunk_shape == (1, 2, 4, 4)
    assert volume.write_unit == (1, 4, 8, 8)
    rng = np.random.default_rng(0)
    wanted = canonical(data, "tczyx")
    for _ in range(20):
        ends = [sorted(rng.integers(0, n + 1, 2)) for n in volume.shape]
        region = Region(tuple(int(a) for a, _ in ends), tuple(int(b) for _, b in ends))
        for channels in ([0], [1], [0, 1], [1, 0], [1, 1]):
            got = volume.read(region, channels)
            np.testing.assert_array_equal(got, wanted[(channels, *region.slices)])
            assert got.flags.c_contiguous


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "uint32", "int64", "uint64", "float16", "float64"]
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_supported_type_reads_back(tmp_path: Path, dtype: str, version: str) -> None:
    data = ramp((4, 5), dtype)
    volume = open_volume(write_image(str(tmp_path / "a"), [data], "yx", version=version))
    got = volume.read(Region.of_shape(volume.shape))
    assert got.dtype == volume.dtype == data.dtype
    np.testing.assert_array_equal(got[0, 0, 0], data)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_big_endian_is_read_as_native(tmp_path: Path, version: str) -> None:
    data = ramp((4, 500))
    url = write_image(str(tmp_path / "a"), [data], "yx", version=version, big_endian=True)
    got = open_volume(url).read(Region.of_shape((1, 1, 4, 500)))
    assert got.dtype == np.dtype("uint16")
    assert got.dtype.isnative
    np.testing.assert_array_equal(got[0, 0, 0], data)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_other_types_are_refused(tmp_path: Path, dtype: str) -> None:
    url = write_image(str(tmp_path / "a"), [np.zeros((4, 5), dtype)], "yx", version="0.4")
    with pytest.raises(InputError, match=rf"values of type {dtype}; .*convert it first"):
        open_volume(url)


def test_chunks_named_with_dots_are_read(tmp_path: Path) -> None:
    data = ramp((9, 11))
    attributes = metadata("0.4", "yx", [(1.0, 1.0)])
    group = zarr.create_group(str(tmp_path / "a"), zarr_format=2, attributes=attributes)
    array = group.create_array(
        "0", shape=(9, 11), chunks=(4, 4), dtype="uint16", order="F", fill_value=None
    )
    array[:] = data
    assert (tmp_path / "a/0/1.1").exists()
    got = open_volume(str(tmp_path / "a")).read(Region((0, 0, 1, 2), (1, 1, 8, 10)))
    np.testing.assert_array_equal(got[0, 0, 0], data[1:8, 2:10])


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_urls_read_and_write_like_paths(tmp_path: Path, scheme: str) -> None:
    root = f"file://{tmp_path}" if scheme == "file" else f"memory://{uuid.uuid4().hex}"
    data = ramp((5, 9, 11))
    url = write_image(f"{root}/a.zarr", [data], "zyx", chunks=(4, 4, 4))
    volume = open_volume(url + "/")
    np.testing.assert_array_equal(volume.read(Region.of_shape(volume.shape))[0, 0], data)
    label = create_pyramid(volume, f"{url}/labels/cells", labels_spec(), name="cells")
    fill(label, 3)
    list_label(url, "cells")
    assert open_volume(url).label_names() == ("cells",)
    assert volume.label("cells").read(Region.of_shape(label.shape)).min() == 3
    if scheme == "memory":
        store.remove(url)


def test_a_volume_can_be_pickled_and_reopened(tmp_path: Path) -> None:
    data = ramp((9, 11))
    url = write_image(str(tmp_path / "a"), pyramid_of(data, 2, (2, 2)), "yx")
    volume = open_volume(url, level=1)
    region = Region.of_shape(volume.shape)
    for other in (pickle.loads(pickle.dumps(volume)), open_volume(url, level=volume.location[1])):
        assert other == volume
        np.testing.assert_array_equal(other.read(region), volume.read(region))


def test_levels_are_chosen_by_number(tmp_path: Path) -> None:
    url = write_image(
        str(tmp_path / "a"), pyramid_of(ramp((5, 8, 12)), 3, (1, 2, 2)), "zyx", scale0=(1, 0.5, 0.5)
    )
    volume = open_volume(url, level=1)
    assert volume.shape == (1, 5, 4, 6)
    assert volume.scale == (1.0, 1.0, 1.0, 1.0)
    assert volume.voxel_um == (1.0, 1.0, 1.0)
    assert volume.at(2).shape == (1, 5, 2, 3)
    assert volume.at(1) is volume
    for bad in (3, -1):
        with pytest.raises(InputError, match=rf"no level {bad}; it has 0, 1, 2: choose"):
            open_volume(url, level=bad)
        with pytest.raises(InputError, match="choose one with `--level`"):
            volume.at(bad)


def test_what_is_no_image_is_refused_with_the_way_out(tmp_path: Path) -> None:
    url = write_image(str(tmp_path / "a"), pyramid_of(ramp((8, 8)), 2, (2, 2)), "yx")
    with pytest.raises(InputNotFoundError, match=r"no such image: .*nope; check the path"):
        open_volume(str(tmp_path / "nope"))
    with pytest.raises(
        NotOmeZarrError, match=r"a/1 is level 1 of an image: give .*a with `--level 1`"
    ):
        open_volume(f"{url}/1")
    tif = tmp_path / "b.tif"
    tif.write_bytes(b"II*")
    with pytest.raises(NotOmeZarrError, match=r"`bigseg convert .*b.tif OUT.ome.zarr`"):
        open_volume(str(tif))
    zarr.create_group(
        str(tmp_path / "p"), attributes={"ome": {"plate": {"wells": [{"path": "A/1"}]}}}
    )
    with pytest.raises(NotOmeZarrError, match=r"plate of 1 wells: give .*p/A/1/0"):
        open_volume(str(tmp_path / "p"))
    zarr.create_array(str(tmp_path / "lone"), shape=(4,), dtype="uint8")
    with pytest.raises(NotOmeZarrError, match="single Zarr array: give the image that holds it"):
        open_volume(str(tmp_path / "lone"))


def test_metadata_that_contradict_the_arrays_are_refused(tmp_path: Path) -> None:
    url = write_image(
        str(tmp_path / "a"), [ramp((8, 8))], "yx", attributes=metadata("0.5", "zyx", [(1.0,) * 3])
    )
    with pytest.raises(InputError, match="has 2 axes, its image states z,y,x"):
        open_volume(url)
    url = write_image(
        str(tmp_path / "b"),
        [ramp((8, 8))],
        "yx",
        attributes=metadata("0.5", "yx", [(1.0,) * 2] * 2),
    )
    with pytest.raises(
        InputNotFoundError, match=r"level 1 of .* is listed, but its array .* missing"
    ):
        open_volume(url, level=1)
    empty, attributes = np.zeros((0, 8), "uint8"), metadata("0.5", "yx", [(1.0, 1.0)])
    url = write_image(str(tmp_path / "c"), [empty], "yx", chunks=(1, 8), attributes=attributes)
    with pytest.raises(InputError, match=r"is empty, its shape \(y,x\) is \(0, 8\)"):
        open_volume(url)


def test_regions_and_channels_outside_are_usage_errors(tmp_path: Path) -> None:
    url = write_image(str(tmp_path / "a"), [ramp((2, 8, 8))], "cyx", channels=("DAPI", "actin"))
    volume = open_volume(url)
    assert volume.channel_names == ("DAPI", "actin")
    for region in (
        Region((0, 0, 0, 0), (1, 1, 9, 8)),
        Region((0, 0, -1, 0), (1, 1, 8, 8)),
        Region((0, 0, 5, 0), (1, 1, 4, 8)),
        Region((0, 0), (8, 8)),
    ):
        with pytest.raises(UsageError, match=r"is not inside .* \(1, 1, 8, 8\)"):
            volume.read(region)
    for channels in ((2,), (-1,), ()):
        with pytest.raises(UsageError, match=r"it has 0 \(DAPI\), 1 \(actin\): choose"):
            volume.read(Region.of_shape(volume.shape), channels)


@pytest.mark.parametrize("axes", ["yx", "czyx", "tczyx"])
def test_the_dask_view_holds_the_volume_in_write_units(tmp_path: Path, axes: str) -> None:
    data = ramp([SIZES[a] for a in axes])
    url = write_image(str(tmp_path / "a"), [data], axes, chunks=[min(3, SIZES[a]) for a in axes])
    volume = open_volume(url)
    view = volume.dask()
    assert isinstance(view, da.Array)
    assert view.chunksize[1:] == volume.write_unit
    assert view.dtype == volume.dtype
    np.testing.assert_array_equal(view.compute(scheduler="synchronous"), canonical(data, axes))
    last = volume.n_channels - 1
    for index in (
        np.s_[..., 2:7, 1::2],
        np.s_[..., 3, ::-2],
        np.s_[..., 4:4, :],
        np.s_[..., [5, 2]],
        np.s_[0, :, :, 5, 2],
    ):
        part = volume.dask([last])[index].compute(scheduler="threads")
        np.testing.assert_array_equal(part, canonical(data, axes)[[last]][index])


def test_dask_chunks_are_shards_where_there_are_shards(tmp_path: Path) -> None:
    url = write_image(str(tmp_path / "a"), [ramp((16, 16))], "yx", chunks=(4, 4), shards=(8, 16))
    assert open_volume(url).dask().chunksize == (1, 1, 1, 8, 16)


def test_labels_are_found_by_name_at_the_level_of_equal_extent(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a"), pyramid_of(ramp((8, 8)), 2, (2, 2)), "yx")
    volume = open_volume(image)
    assert volume.label_names() == ()
    with pytest.raises(InputError, match=r"labels 'cells' not found in .*a; there are none"):
        volume.label("cells")
    for name in ("cells", "nuclei"):
        fill(create_pyramid(volume, f"{image}/labels/{name}", labels_spec(), name=name))
    assert volume.label_names() == ()  # not listed, so not finished
    list_label(image, "cells")
    list_label(image, "nuclei")
    with pytest.raises(InputError, match=r"labels 'x' not found in .*a; there are: cells, nuclei"):
        volume.label("x")
    assert volume.label("nuclei").level == 0
    assert volume.at(1).label("nuclei").level == 1
    assert volume.at(1).label("nuclei").shape == (1, 1, 4, 4)
    assert open_volume(f"{image}/labels/cells").multiscale.is_label


def test_labels_with_more_levels_than_the_image_fit_by_extent(tmp_path: Path) -> None:
    levels = pyramid_of(ramp((16, 16)), 3, (2, 2))
    image = write_image(str(tmp_path / "a"), levels[2:], "yx")
    zarr.create_group(f"{image}/labels", attributes={"ome": {"labels": ["n"]}})
    write_image(f"{image}/labels/n", levels, "yx")
    assert open_volume(image).label("n").level == 2


def test_the_level_nearest_to_the_models_voxels_is_found(tmp_path: Path) -> None:
    levels = pyramid_of(ramp((4, 16, 16)), 3, (1, 2, 2))
    volume = open_volume(write_image(str(tmp_path / "a"), levels, "zyx", scale0=(1.0, 0.25, 0.25)))
    assert nearest_level(volume, (1.0, 0.5, 0.5)) == 1
    assert nearest_level(volume, (1.2, 0.3, 0.3)) == 0
    assert nearest_level(volume, (0.9, 0.9)) == 2
    with pytest.raises(InputError, match=r"no level of .* level 2: 1×1×1 µm.*`--level`"):
        nearest_level(volume, (5.0, 5.0, 5.0))
    assert nearest_level(volume, (5.0, 5.0, 5.0), tolerance=6.0) == 2


def test_without_units_the_level_must_be_chosen(tmp_path: Path) -> None:
    attributes = metadata("0.5", "yx", [(1.0, 1.0)], unit=None)
    volume = open_volume(
        write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx", attributes=attributes)
    )
    assert volume.voxel_um is None
    with pytest.raises(InputError, match=r"no voxel size in units of length.*`--level`"):
        nearest_level(volume, (1.0, 1.0))
