"""Reading, creating and writing images, against arrays in memory and two foreign validators."""

import itertools
import json
import pickle
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import yaozarrs
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr_images import metadata, pyramid_of, ramp, write_image

from bigseg import store
from bigseg.blocks import BlockGrid, Region
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.volume import (
    OutputSpec,
    Volume,
    create_pyramid,
    list_label,
    nearest_level,
    open_volume,
    unlist_label,
)

SIZES = {"t": 3, "c": 2, "z": 5, "y": 9, "x": 11}
U8 = np.dtype("uint8")
U32 = np.dtype("uint32")


class Killed(Exception):
    """Stands for a kill: nothing catches it."""


def canonical(data: NDArray[Any], axes: str) -> NDArray[Any]:
    """`data` with axes (c, t, z, y, x), the slow and plain way."""
    for name in "ctzyx":
        if name not in axes:
            data, axes = data[None], name + axes
    return np.einsum(f"{axes}->ctzyx", data)


def labels_spec(chunk: tuple[int, ...] = (1, 4, 4, 4), **changes: Any) -> OutputSpec:
    plain: dict[str, Any] = {
        "dtype": U32,
        "chunk": chunk,
        "shard": None,
        "channel_names": (),
        "provenance": {"version": "0"},
    }
    return OutputSpec(**{**plain, **changes})


def fill(volume: Volume, value: int = 1) -> None:
    for level in range(volume.n_levels):
        at = volume.at(level)
        at.write(Region.of_shape(at.shape), np.full((at.n_channels, *at.shape), value, at.dtype))


def validate(url: str) -> None:
    """Both validators, on a 0.4 or 0.5 image with its labels."""
    yaozarrs.validate_zarr_store(url)
    group = zarr.open_group(url, mode="r")
    with warnings.catch_warnings():
        # ome-zarr-models builds pydantic models whose field names shadow their parents'.
        warnings.simplefilter("ignore")
        import ome_zarr_models.v04
        import ome_zarr_models.v05

        version = ome_zarr_models.v04 if group.metadata.zarr_format == 2 else ome_zarr_models.v05
        image = version.Image.from_zarr(group)
        if "labels" in group:
            labels = version.Labels.from_zarr(group["labels"])
            assert labels is not None
            for name in (
                labels.attributes.labels
                if version is ome_zarr_models.v04
                else (labels.ome_attributes.labels)
            ):
                version.ImageLabel.from_zarr(group["labels"][name])
        assert image is not None


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


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize("axes", ["yx", "czyx", "tczyx"])
def test_labels_beside_an_image_pass_foreign_validators(
    tmp_path: Path, version: str, axes: str
) -> None:
    factors = [2 if a in "yx" else 1 for a in axes]
    levels = pyramid_of(ramp([SIZES[a] for a in axes]), 2, factors)
    image = write_image(str(tmp_path / "a.zarr"), levels, axes, version=version)
    volume = open_volume(image)
    label = create_pyramid(volume, f"{image}/labels/cells", labels_spec(), name="cells")
    fill(label)
    list_label(image, "cells")
    assert label.multiscale.version == ("0.4" if version == "0.4" else "0.5")
    assert label.shape == volume.shape
    assert [v.scale for v in label.multiscale.levels] == [
        tuple(s for s, a in zip(v.scale, axes, strict=True) if a != "c")
        for v in volume.multiscale.levels
    ]
    if version != "0.6":
        # No validator of 0.6 runs on Python 3.11, and they open the image that a label names.
        validate(image)
        validate(label.url)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_channel_images_pass_foreign_validators(tmp_path: Path, version: str) -> None:
    levels = pyramid_of(ramp((3, 5, 8, 8)), 2, (1, 1, 2, 2))
    volume = open_volume(write_image(str(tmp_path / "a"), levels, "tzyx", version=version))
    spec = labels_spec(channel_names=("background", "cell"), dtype=np.dtype("float32"))
    out = create_pyramid(volume, str(tmp_path / "p.zarr"), spec, name="probabilities")
    assert out.multiscale.axis_names == ("t", "c", "z", "y", "x")
    assert out.channel_names == ("background", "cell")
    assert out.array.chunks[1] == 1
    data = np.random.default_rng(0).random((2, *out.shape)).astype("float32")
    out.write(Region.of_shape(out.shape), data)
    again = open_volume(out.url)
    np.testing.assert_array_equal(again.read(Region.of_shape(out.shape), (0, 1)), data)
    assert "image-label" not in json.dumps(zarr.open_group(out.url, mode="r").attrs.asdict())
    validate(out.url)


def test_outputs_carry_offsets_units_and_provenance(tmp_path: Path) -> None:
    offsets = [(0.0, 0.0, 0.0), (0.0, 0.25, 0.25)]
    scales = [(2.0, 0.5, 0.5), (2.0, 1.0, 1.0)]
    attributes = metadata("0.5", "zyx", scales, translations=offsets, unit="um")
    levels = pyramid_of(ramp((3, 8, 8)), 2, (1, 2, 2))
    volume = open_volume(write_image(str(tmp_path / "a"), levels, "zyx", attributes=attributes))
    label = create_pyramid(volume, str(tmp_path / "out"), labels_spec(), name="cells")
    again = open_volume(label.url)
    assert again.multiscale.levels == label.multiscale.levels
    assert [v.translation for v in again.multiscale.levels] == offsets
    assert [a.unit for a in again.multiscale.axes] == ["micrometer"] * 3
    assert again.provenance == {"version": "0"}
    assert volume.provenance is None
    attrs = zarr.open_group(label.url, mode="r").attrs.asdict()
    assert "source" not in attrs["ome"]["image-label"]


def test_a_store_of_its_own_from_a_coarse_level_has_the_coarser_levels(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a"), pyramid_of(ramp((16, 16)), 3, (2, 2)), "yx")
    volume = open_volume(image, level=1)
    out = create_pyramid(volume, str(tmp_path / "out"), labels_spec(), name="x")
    assert [out.at(i).shape for i in range(out.n_levels)] == [(1, 1, 8, 8), (1, 1, 4, 4)]
    assert [v.path for v in out.multiscale.levels] == ["0", "1"]
    with pytest.raises(
        UsageError, match=r"labels from level 1 cannot lie in .*output of their own"
    ):
        create_pyramid(volume, f"{image}/labels/x", labels_spec(), name="x")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_flipped_bit_in_a_chunk_is_noticed(tmp_path: Path, version: str) -> None:
    image = write_image(str(tmp_path / "a"), [ramp((64, 64))], "yx", version=version)
    volume = open_volume(image)
    out = create_pyramid(volume, str(tmp_path / "o"), labels_spec((1, 1, 64, 64)), name="x")
    data = np.random.default_rng(0).integers(0, 99, (1, *out.shape)).astype("uint32")
    out.write(Region.of_shape(out.shape), data)
    chunk = tmp_path / ("o/0/0/0" if version == "0.4" else "o/0/c/0/0")
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 4
    chunk.write_bytes(raw)
    with pytest.raises(RuntimeError, match=r"(?i)decompress|checksum"):
        out.read(Region.of_shape(out.shape))


def test_chunks_and_shards_are_clipped_at_the_volume(tmp_path: Path) -> None:
    volume = open_volume(write_image(str(tmp_path / "a"), [ramp((3, 100, 20))], "zyx"))
    spec = labels_spec((1, 16, 32, 32), shard=(1, 64, 64, 64))
    out = create_pyramid(volume, str(tmp_path / "o"), spec, name="x")
    assert out.chunk_shape == (1, 3, 32, 20)
    assert out.write_unit == (1, 3, 64, 20)


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 4),
    chunk=st.tuples(*[st.integers(3, 5)] * 4),
    multiple=st.tuples(*[st.integers(1, 2)] * 4),
    sharded=st.booleans(),
    dtype=st.sampled_from(["uint8", "uint16", "int32"]),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_blocks_of_whole_write_units_fill_the_volume(
    tmp_path: Path, shape: Any, chunk: Any, multiple: Any, sharded: bool, dtype: str
) -> None:
    root = tmp_path / uuid.uuid4().hex
    source = open_volume(write_image(str(root / "a"), [ramp(shape)], "tzyx"))
    shard = tuple(c * m for c, m in zip(chunk, multiple, strict=True))
    spec = labels_spec(chunk, shard=shard if sharded else None, dtype=np.dtype(dtype))
    out = create_pyramid(source, str(root / "o"), spec, name="x")
    data = ramp((1, *shape), dtype)
    for block in reversed(list(BlockGrid(Region.of_shape(shape), out.write_unit))):
        out.write(block.core, data[(slice(None), *block.core.slices)])
    np.testing.assert_array_equal(open_volume(out.url).read(Region.of_shape(shape)), data)
    shutil.rmtree(root)


def test_writes_that_share_an_object_or_do_not_fit_are_refused(tmp_path: Path) -> None:
    volume = open_volume(write_image(str(tmp_path / "a"), [ramp((10, 10))], "yx"))
    out = create_pyramid(volume, str(tmp_path / "o"), labels_spec(), name="x")
    for start, stop in itertools.product((0, 2, 4), (5, 6, 9)):
        region = Region((0, 0, 0, start), (1, 1, 10, stop))
        with pytest.raises(OutputError, match=r"cuts through write units \(1, 1, 4, 4\)"):
            out.write(region, np.zeros((1, *region.shape), "uint32"))
    good = Region((0, 0, 4, 4), (1, 1, 10, 8))
    out.write(good, np.ones((1, 1, 1, 6, 4), "uint32"))
    for bad in (
        np.ones((1, 1, 1, 6, 4), "int64"),
        np.ones((1, 1, 1, 6, 4), "uint16"),
        np.ones((1, 1, 1, 4, 6), "uint32"),
        np.ones((2, 1, 1, 6, 4), "uint32"),
    ):
        with pytest.raises(OutputError, match=r"do not fit block .*takes \(1, 1, 1, 6, 4\)"):
            out.write(good, bad)


def test_the_image_is_not_written_by_opening_it(tmp_path: Path) -> None:
    url = write_image(str(tmp_path / "a"), [ramp((10, 10))], "yx")
    with pytest.raises(ValueError, match="read-only"):
        open_volume(url).array[:] = 0


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = open_volume(write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx"))
    out = create_pyramid(volume, str(tmp_path / "o"), labels_spec(), name="x")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write_durably", fail)
    with pytest.raises(OutputError, match=r"block 0:1,0:1,0:4,0:4 of .*No space left on device"):
        out.write(Region.of_shape(out.shape), np.ones((1, *out.shape), "uint32"))
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left on device"):
        create_pyramid(volume, str(tmp_path / "p"), labels_spec(), name="x")


def test_an_existing_output_is_never_replaced(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx")
    volume = open_volume(image)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    zarr.create_group(str(tmp_path / "foreign"), attributes={"a": 1})
    zarr.create_array(str(tmp_path / "full/0"), shape=(4,), dtype="uint8")
    zarr.create_group(str(tmp_path / "full"))
    create_pyramid(volume, str(tmp_path / "done"), labels_spec(), name="x")
    for name in ("a", "notes", "file", "foreign", "full", "done"):
        with pytest.raises(OutputError, match=r"(exists: give another name or use --overwrite)"):
            create_pyramid(volume, str(tmp_path / name), labels_spec(), name="x")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_creation_killed_at_any_write_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    levels = pyramid_of(ramp((8, 8)), 2, (2, 2))
    volume = open_volume(write_image(str(tmp_path / "a"), levels, "yx", version=version))
    write = store._write_durably
    for survives in range(20):
        url, left = str(tmp_path / f"o{survives}"), [survives]

        def killed(path: Path, data: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            write(path, data)

        monkeypatch.setattr(store, "_write_durably", killed)
        try:
            create_pyramid(volume, url, labels_spec(), name="x")
        except Killed:
            monkeypatch.setattr(store, "_write_durably", write)
            with pytest.raises((NotOmeZarrError, InputNotFoundError)):
                open_volume(url)
            assert create_pyramid(volume, url, labels_spec(), name="x").n_levels == 2
        else:
            break
    assert survives > 3


def test_labels_must_be_integers(tmp_path: Path) -> None:
    volume = open_volume(write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx"))
    for dtype in ("float32", "bool"):
        with pytest.raises(UsageError, match=f"labels of type {dtype}: .*choose an integer type"):
            create_pyramid(
                volume, str(tmp_path / "o"), labels_spec(dtype=np.dtype(dtype)), name="x"
            )


def test_listing_keeps_what_others_wrote(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx")
    zarr.create_group(
        f"{image}/labels", attributes={"other": 1, "ome": {"labels": ["old"], "note": "kept"}}
    )
    list_label(image, "new")
    list_label(image, "new")
    wanted = {"other": 1, "ome": {"version": "0.5", "labels": ["old", "new"], "note": "kept"}}
    assert zarr.open_group(f"{image}/labels", mode="r").attrs.asdict() == wanted
    unlist_label(image, "old")
    unlist_label(image, "absent")
    assert open_volume(image).label_names() == ("new",)
    unlist_label(image, "new")
    assert open_volume(image).label_names() == ()


def test_unlisting_where_no_labels_are_makes_nothing(tmp_path: Path) -> None:
    image = write_image(str(tmp_path / "a"), [ramp((4, 4))], "yx")
    unlist_label(image, "x")
    assert not (tmp_path / "a" / "labels").exists()


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


def test_other_programs_open_what_bigseg_writes(tmp_path: Path) -> None:
    levels = pyramid_of(ramp((5, 16, 16)), 2, (1, 2, 2))
    image = write_image(str(tmp_path / "a.zarr"), levels, "zyx", scale0=(2.0, 0.5, 0.5))
    fill(
        create_pyramid(open_volume(image), f"{image}/labels/cells", labels_spec(), name="cells"), 7
    )
    list_label(image, "cells")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ome-zarr warns about its own version detection
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        location = parse_url(image)
        assert location is not None
        nodes = list(Reader(location)())
        label = next(n for n in nodes if "cells" in str(n.zarr))
        assert [d.shape for d in label.data] == [(5, 16, 16), (5, 8, 8)]
        assert int(label.data[0].max().compute(scheduler="synchronous")) == 7
