"""Creating and writing images, against arrays in memory and two foreign validators."""

import itertools
import json
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr_images import (
    SIZES,
    fill,
    labels_spec,
    metadata,
    pyramid_of,
    ramp,
    validate,
    write_image,
)

from bigseg import store
from bigseg.blocks import BlockGrid, Region
from bigseg.errors import (
    BadChunkError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.volume import (
    create_pyramid,
    list_label,
    open_volume,
    unlist_label,
)


class Killed(Exception):
    """Stands for a kill: nothing catches it."""


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
    with pytest.raises(BadChunkError, match=r"(?i)decompress|checksum"):
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

    monkeypatch.setattr(store.durable, "write_durably", fail)
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
    write = store.durable.write_durably
    for survives in range(20):
        url, left = str(tmp_path / f"o{survives}"), [survives]

        def killed(path: Path, data: Any, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            write(path, data)

        monkeypatch.setattr(store.durable, "write_durably", killed)
        try:
            create_pyramid(volume, url, labels_spec(), name="x")
        except Killed:
            monkeypatch.setattr(store.durable, "write_durably", write)
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
