"""Bytes and Zarr nodes on local paths, file:// and memory://."""

import json
import os
import pickle
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pytest
import zarr

from bigseg import guards, store
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.patience import PatientStore


@pytest.fixture(params=["path", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place, once for each kind of store."""
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}"
        yield url
        fs = fsspec.filesystem("memory")
        if fs.exists(url):
            fs.rm(url, recursive=True)
    else:
        yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


@pytest.mark.parametrize(
    ("url", "parts", "wanted"),
    [
        ("a", ("b", "c"), "a/b/c"),
        ("a/", ("b/c/",), "a/b/c"),
        ("/", ("b",), "/b"),
        ("memory://", ("b",), "memory://b"),
        ("s3://bucket/x/", ("labels", "cells"), "s3://bucket/x/labels/cells"),
        ("a", (), "a"),
    ],
)
def test_join_appends_components(url: str, parts: tuple[str, ...], wanted: str) -> None:
    assert store.join(url, *parts) == wanted


@pytest.mark.parametrize(
    "part",
    ["..", "../x", "a/../b", "/etc", "//x", "s3://x/y", "file:x", "", ".", "a//b", "a\\b", "a\0"],
)
def test_join_refuses_what_leaves_the_store(part: str) -> None:
    with pytest.raises(InputError, match=r"leaves the store or is empty.*relative"):
        store.join("/data/image.zarr", part)


@pytest.mark.parametrize(
    ("url", "up", "name"),
    [("/a/b", "/a", "b"), ("/a", "/", "a"), ("a", ".", "a"), ("s3://x/y/", "s3://x", "y")],
)
def test_parent_and_name_split_a_url(url: str, up: str, name: str) -> None:
    assert (store.parent(url), store.name_of(url)) == (up, name)


def test_bytes_written_are_read_back(root: str) -> None:
    url = store.join(root, "deep/er/file.bin")
    assert not store.exists(url)
    store.write_atomic(url, b"first")
    store.write_atomic(url, b"second")
    assert store.exists(url)
    assert store.read_bytes(url, limit_bytes=6) == b"second"


def test_reading_more_than_the_limit_is_refused(root: str) -> None:
    url = store.join(root, "file")
    store.write_atomic(url, bytes(11))
    with pytest.raises(InputError, match="more than the 10 bytes allowed: give a smaller file"):
        store.read_bytes(url, limit_bytes=10)


def test_reading_what_is_not_there_says_so(root: str) -> None:
    with pytest.raises(InputNotFoundError, match=r"no such file: .*nope; check the path"):
        store.read_bytes(store.join(root, "nope"), limit_bytes=1)


def test_reading_allocates_what_the_file_has_and_not_the_limit(root: str) -> None:
    url = store.join(root, "file")
    store.write_atomic(url, b"x" * 1000)
    tracemalloc.start()
    assert len(store.read_bytes(url, limit_bytes=1 << 40)) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 26


def test_an_atomic_write_that_fails_leaves_the_old_bytes_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "file")
    store.write_atomic(url, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="No space left on device; check rights and space"):
        store.write_atomic(url, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_writing_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        store.write_atomic(str(tmp_path / "file" / "x"), b"")


def test_groups_and_arrays_open_in_every_kind_of_store(root: str) -> None:
    url = store.join(root, "a.zarr")
    group = store.open_group(url, mode="a")
    array = group.create_array("x/0", shape=(10, 10), chunks=(4, 4), dtype="uint16")
    array[:] = np.arange(100).reshape(10, 10)
    assert store.open_group(url, mode="a").metadata.zarr_format == 3
    read = store.open_array(store.join(url, "x/0"), mode="r")
    np.testing.assert_array_equal(read[:], np.arange(100).reshape(10, 10))
    with pytest.raises(ValueError, match="read-only"):
        read[:] = 1
    store.writable(read)[:4, :4] = 7
    assert (read[:4, :4] == 7).all()


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_opening_asks_for_no_document_of_the_other_format(
    zarr_format: Literal[2, 3], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{uuid.uuid4().hex}/a.zarr"
    group = store.make_group(url, zarr_format=zarr_format)
    group.create_array("0", shape=(4,), chunks=(2,), dtype="uint8")
    asked = []
    get = PatientStore.get

    async def recording(self: PatientStore, key: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(key.rpartition("/")[2])
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(PatientStore, "get", recording)
    store.open_group(url, mode="r")
    store.open_array(store.join(url, "0"), mode="r")
    wanted = {2: {".zgroup", ".zarray", ".zattrs"}, 3: {"zarr.json"}}
    assert set(asked) == wanted[zarr_format]
    assert len(asked) == (2 if zarr_format == 3 else 4)


def test_a_writable_array_survives_pickling(tmp_path: Path) -> None:
    url = str(tmp_path / "a.zarr")
    store.open_group(url, mode="a").create_array("0", shape=(4,), dtype="uint8")
    array = store.writable(store.open_array(f"{url}/0", mode="r"))
    pickle.loads(pickle.dumps(array))[:] = 3
    assert array[:].tolist() == [3, 3, 3, 3]


def test_local_writes_are_flushed_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = store.open_group(str(tmp_path / "a.zarr"), mode="a")
    array = group.create_array("0", shape=(8,), chunks=(4,), dtype="uint8")
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    array[:] = 1
    assert len(flushed) == 4  # a file and its directory, for each of two chunks


def test_what_is_not_a_group_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "image.tif").write_bytes(b"II*")
    (tmp_path / "notes.txt").write_bytes(b"")
    zarr.create_array(str(tmp_path / "array"), shape=(4,), dtype="uint8")
    zarr.create_array(str(tmp_path / "array2"), shape=(4,), dtype="uint8", zarr_format=2)
    (tmp_path / "folder" / "inner.zarr").mkdir(parents=True)
    for name, error, text in [
        ("nope", InputNotFoundError, "no such store: .*nope; check the path"),
        ("image.tif", NotOmeZarrError, "is a file, not an OME-Zarr image: .*`bigseg convert .*tif"),
        ("notes.txt", NotOmeZarrError, "is a file, .*give the directory"),
        ("array", NotOmeZarrError, "single Zarr array: give the image that holds it"),
        ("array2", NotOmeZarrError, "single Zarr array: give the image that holds it"),
        ("folder", NotOmeZarrError, "without Zarr metadata: give one of inner.zarr in it"),
        ("folder/inner.zarr", NotOmeZarrError, "without Zarr metadata: check the path"),
    ]:
        with pytest.raises(error, match=text):
            store.open_group(str(tmp_path / name), mode="r")


def test_a_group_where_an_array_is_needed_is_refused(tmp_path: Path) -> None:
    for zarr_format in (2, 3):
        url = str(tmp_path / f"{zarr_format}")
        zarr.create_group(url, zarr_format=zarr_format)
        with pytest.raises(NotOmeZarrError, match="check"):
            store.open_array(url, mode="r")


@pytest.mark.parametrize("text", ["{", "[]", '{"zarr_format": 9}', "[" * 100_000, "null"])
def test_damaged_metadata_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(NotOmeZarrError, match="damaged or not understood"):
        store.open_group(str(tmp_path), mode="r")


@pytest.mark.parametrize("name", ["zarr.json", ".zattrs", ".zgroup", ".zarray"])
def test_metadata_documents_over_the_limit_are_not_parsed(tmp_path: Path, name: str) -> None:
    zarr.create_group(str(tmp_path), zarr_format=2)
    with (tmp_path / name).open("wb") as file:
        file.truncate(guards.MAX_METADATA_BYTES + 1)
    with pytest.raises(InputError, match="more than the 16777216 allowed for metadata"):
        store.open_group(str(tmp_path), mode="r")


def test_chunks_that_fit_no_memory_are_refused(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "a"))
    group.create_array("ok", shape=(2**40,), chunks=(2**33,), dtype="uint16")
    group.create_array("bad", shape=(2**40,), chunks=(2**33 + 1,), dtype="uint16")
    assert store.open_array(str(tmp_path / "a/ok"), mode="r").shape == (2**40,)
    with pytest.raises(InputError, match="take 17179869186 bytes each, more than 17179869184"):
        store.open_array(str(tmp_path / "a/bad"), mode="r")


def test_an_unknown_codec_is_refused_in_one_sentence(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "a"), shape=(4,), dtype="uint8")
    path = tmp_path / "a" / "zarr.json"
    meta = json.loads(path.read_text())
    meta["codecs"] = [{"name": "bytes"}, {"name": "acme-secret"}]
    path.write_text(json.dumps(meta))
    with pytest.raises(NotOmeZarrError, match=r"not understood by zarr.*acme-secret"):
        store.open_array(str(tmp_path / "a"), mode="r")


def test_unwritable_places_are_output_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        store.make_group(str(tmp_path / "file" / "a.zarr"), zarr_format=3)
    url = str(tmp_path / "a.zarr")
    store.open_group(url, mode="a")
    with pytest.raises(OutputError, match="exists: give another name or use --overwrite"):
        store.create_group(url, zarr_format=3, attributes={})
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission to write; check rights"):
        store.open_group(url, mode="r+")


def test_http_is_never_written() -> None:
    with pytest.raises(OutputError, match="cannot be written over HTTP"):
        store._check_writable("https://example.org/a.zarr")


def test_unknown_locations_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="no location that fsspec knows"):
        store.exists("nonsense://a")


def test_remove_deletes_a_store_and_only_a_store(root: str) -> None:
    url = store.join(root, "a.zarr")
    store.open_group(url, mode="a").create_array("0", shape=(4,), dtype="uint8")[:] = 1
    store.write_atomic(store.join(root, "keep/me.txt"), b"")
    with pytest.raises(OutputError, match="no Zarr store, so it is not deleted"):
        store.remove(store.join(root, "keep"))
    with pytest.raises(OutputError, match="no Zarr store, so it is not deleted"):
        store.remove(store.join(root, "keep/me.txt"))
    store.remove(url)
    store.remove(url)
    assert not store.exists(url)
    assert store.exists(store.join(root, "keep/me.txt"))


def test_remove_follows_no_link_out_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_bytes(b"1")
    url = str(tmp_path / "a.zarr")
    store.open_group(url, mode="a")
    (tmp_path / "a.zarr" / "0").symlink_to(tmp_path / "precious")
    store.remove(url)
    assert (tmp_path / "precious" / "data").exists()


def test_a_removal_cut_short_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "a.zarr")
    group = store.open_group(url, mode="a")
    for name in "abc":
        group.create_array(name, shape=(4,), dtype="uint8")[:] = 1
    delete, left = store._delete, [2]

    def stop_early(fs: object, path: str, *, local: bool) -> None:
        if not left[0]:
            raise OSError(5, "Input/output error")
        left[0] -= 1
        delete(fs, path, local=local)

    monkeypatch.setattr(store, "_delete", stop_early)
    with pytest.raises(OutputError, match="cannot be deleted: Input/output error"):
        store.remove(url)
    monkeypatch.setattr(store, "_delete", delete)
    assert store.exists(store.join(url, "zarr.json"))
    store.remove(url)
    assert not store.exists(url)


def test_a_directory_of_unfinished_writes_counts_as_empty(tmp_path: Path) -> None:
    assert store.is_empty(str(tmp_path))
    (tmp_path / ".zarr.json.1234.partial").write_bytes(b"")
    assert store.is_empty(str(tmp_path))
    (tmp_path / "other").write_bytes(b"")
    assert not store.is_empty(str(tmp_path))
