"""Stored objects that are missing, against what was written and a store that counts."""

import uuid
from pathlib import Path

import numpy as np
import pytest
import zarr
from counting import counted
from zarr_images import write_image

from bigseg import presence
from bigseg.blocks import BlockGrid, Region
from bigseg.cache import ChunkCache
from bigseg.volume import open_volume

CASES = {
    "chunks": ("0.5", "czyx", (1, 4, 4, 4), None),
    "shards": ("0.5", "czyx", (1, 4, 4, 4), (1, 8, 8, 4)),
    "shards of two channels": ("0.5", "czyx", (1, 4, 4, 4), (2, 4, 8, 8)),
    "zarr 2": ("0.4", "czyx", (1, 4, 4, 4), None),
    "channels together": ("0.4", "czyx", (2, 4, 4, 4), None),
    "another order of axes": ("0.5", "cxyz", (1, 4, 4, 4), (1, 8, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ["path", "memory"])
@pytest.mark.parametrize("budget", [0, 10**6])
def test_objects_absent_for_all_channels_are_named(
    tmp_path: Path, case: str, scheme: str, budget: int
) -> None:
    version, axes, chunks, shards = CASES[case]
    sizes = {"c": 3, "z": 10, "y": 12, "x": 14}
    data = np.ones([sizes[a] for a in axes], "uint8")

    def at(c: slice, z: slice, y: slice, x: slice) -> tuple[slice, ...]:
        return tuple({"c": c, "z": z, "y": y, "x": x}[a] for a in axes)

    data[at(np.s_[:], np.s_[8:], np.s_[8:], np.s_[8:])] = 0  # nowhere
    data[at(np.s_[1:], np.s_[:8], np.s_[:8], np.s_[:8])] = 0  # in channel 0 only
    root = str(tmp_path / "a") if scheme == "path" else f"memory://{uuid.uuid4().hex}"
    url = write_image(root, [data], axes, version=version, chunks=chunks, shards=shards)
    image = open_volume(url)
    unit = image.write_unit
    whole = Region.of_shape(image.shape)
    for channels in ((0,), (1,), (1, 2), (0, 2)):
        cache = ChunkCache(image, channels, budget_bytes=budget)
        wanted = tuple(
            block.core
            for block in BlockGrid(whole, unit)
            if not stored(data, axes, block.core, channels_together(channels, case)).any()
        )
        assert cache.read(whole).absent == wanted
        assert cache.read(whole).absent == wanted
        inside = Region((0, 9, 9, 9), (1, 10, 12, 14))
        touched = tuple(w for w in wanted if w.intersect(inside).n_voxels)
        assert cache.read(inside).absent == touched


def channels_together(channels: tuple[int, ...], case: str) -> list[int]:
    """All channels that lie in objects of these channels."""
    together = 2 if "channels" in case else 1
    return [c for c in range(3) if c // together in {k // together for k in channels}]


def stored(data: np.ndarray, axes: str, box: Region, channels: list[int]) -> np.ndarray:
    """The voxels of a box as (c, z, y, x)."""
    canonical = np.einsum(f"{axes}->czyx", data)
    return canonical[(channels, *box.slices[1:])]


@pytest.mark.parametrize("fill", [0.0, np.nan, 7.0])
def test_only_objects_that_may_be_missing_are_asked_about_and_once(
    tmp_path: Path, fill: float
) -> None:
    url = write_image(str(tmp_path / "a"), [np.zeros((8, 8), "float32")], "yx", chunks=(4, 4))
    array = zarr.create_array(
        f"{url}/0", shape=(8, 8), chunks=(4, 4), dtype="float32", fill_value=fill, overwrite=True
    )
    array[:4] = 3
    watched, store = counted(open_volume(url))
    cache = ChunkCache(watched, (0,), budget_bytes=100)
    for _ in range(3):
        reading = cache.read(Region.of_shape((1, 1, 8, 8)))
        np.testing.assert_array_equal(reading.data[0, 0, 0, 4:], np.full((4, 8), fill))
        assert reading.absent == (
            Region((0, 0, 4, 0), (1, 1, 8, 4)),
            Region((0, 0, 4, 4), (1, 1, 8, 8)),
        )
    assert sorted(store.asked) == ["c/1/0", "c/1/1"]


def test_stored_objects_of_fill_values_are_not_absent(tmp_path: Path) -> None:
    url = write_image(str(tmp_path / "a"), [np.zeros((8, 8), "uint8")], "yx", chunks=(4, 4))
    array = zarr.create_array(
        f"{url}/0",
        shape=(8, 8),
        chunks=(4, 4),
        dtype="uint8",
        overwrite=True,
        config={"write_empty_chunks": True},
    )
    array[:4] = 0
    cache = ChunkCache(open_volume(url), (0,), budget_bytes=0)
    assert cache.read(Region((0, 0, 0, 0), (1, 1, 4, 8))).absent == ()
    assert len(cache.read(Region((0, 0, 0, 0), (1, 1, 8, 8))).absent) == 2


def test_what_is_remembered_of_the_store_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_image(str(tmp_path / "a"), [np.zeros((4, 40), "uint8")], "yx", chunks=(4, 4))
    watched, store = counted(open_volume(url))
    monkeypatch.setattr(presence, "MAX_REMEMBERED", 3)
    cache = ChunkCache(watched, (0,), budget_bytes=0)
    for _ in range(2):
        assert len(cache.read(Region.of_shape((1, 1, 4, 40))).absent) == 10
    assert len(cache._presence._exists) == 3
    assert len(store.asked) > 10
