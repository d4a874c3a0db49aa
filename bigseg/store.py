"""Bytes and Zarr nodes on any store: a local path or any fsspec URL. It knows no OME metadata.

What is opened was written by others: names that leave the store, metadata documents too large to
be one and chunks too large for a memory are refused before Zarr sees them. What is written locally
is durable when the call returns, and a kill at any moment leaves the old bytes or the new ones.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore, StorePath

from bigseg.decoding import decode_fast
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store
    from zarr.core.buffer import Buffer

Mode = Literal["r", "r+", "a"]

MAX_METADATA_BYTES = 16 * 2**20
MAX_CHUNK_BYTES = 2**34
METADATA_NAMES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
PARTIAL = ".partial"
CONVERTIBLE = (".tif", ".tiff", ".png", ".h5", ".hdf5")


def join(url: str, *parts: str) -> str:
    """`url` with path components appended; each part may hold several, separated by '/'.

    Raises:
        InputError: a part is empty, absolute, has a scheme, or climbs with '..'.
    """
    for part in parts:
        pieces = part.strip("/").split("/") if not part.startswith("/") else [""]
        if (
            any(p in ("", ".", "..") for p in pieces)
            or ":" in pieces[0]
            or set(part) & {"\\", "\0"}
        ):
            raise InputError(
                f"path {part!r} in {url} leaves the store or is empty: "
                "paths inside a store are relative, such as 'labels/cells'"
            )
        base = url if url == "/" or url.endswith("://") else f"{url.rstrip('/')}/"
        url = base + "/".join(pieces)
    return url


def parent(url: str) -> str:
    """The location that holds `url`."""
    head, _, _ = url.rstrip("/").rpartition("/")
    return head or ("/" if url.startswith("/") else ".")


def name_of(url: str) -> str:
    """The last component of `url`."""
    return url.rstrip("/").rpartition("/")[2]


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine's file system."""
    return ("://" not in url and "::" not in url) or url.startswith("file://")


def exists(url: str) -> bool:
    """Whether there is a file, directory or object (or a prefix of objects) at `url`."""
    fs, path = _filesystem(url)
    return bool(fs.exists(path))


def read_bytes(url: str, *, limit_bytes: int) -> bytes:
    """The content of one file or object.

    Raises:
        InputNotFoundError: there is none.
        InputError: it is larger than `limit_bytes`, or cannot be read.
    """
    fs, path = _filesystem(url)
    try:
        with fs.open(path, "rb") as file:
            data = _read_at_most(file, limit_bytes + 1)
    except FileNotFoundError:
        raise InputNotFoundError(f"no such file: {url}; check the path") from None
    except OSError as error:
        raise InputError(f"{url} cannot be read: {_reason(error)}; give a readable file") from None
    if len(data) > limit_bytes:
        raise InputError(
            f"{url} has more than the {limit_bytes} bytes allowed: give a smaller file"
        )
    return data


def write_atomic(url: str, data: bytes) -> None:
    """Write one file or object: after a kill it holds the old bytes or the new ones, whole.

    Raises:
        OutputError: it cannot be written.
    """
    fs, path = _filesystem(url)
    try:
        if is_local(url):
            _write_durably(Path(path), data)
        else:
            fs.pipe_file(path, data)
    except (OSError, NotImplementedError) as error:
        raise _unwritable(url, error) from None


def open_group(url: str, *, mode: Mode, zarr_format: Literal[2, 3] = 3) -> zarr.Group:
    """The Zarr group at `url`: read only (r), to be changed (r+), or made if absent (a).

    Raises:
        InputNotFoundError: there is nothing (r, r+).
        NotOmeZarrError: there is something else; says what and the way out.
        OutputError: it cannot be written (r+, a).
    """
    if mode == "a" and not exists(url):
        return make_group(url, zarr_format=zarr_format)
    group = _open(url, mode, zarr.open_group)
    assert isinstance(group, zarr.Group)
    return group


def open_array(url: str, *, mode: Mode) -> zarr.Array[Any]:
    """The Zarr array at `url`, which must exist; one that is only read (r) decodes fast.

    Raises:
        InputNotFoundError: there is nothing.
        NotOmeZarrError: there is something else, or Zarr cannot decode it.
        InputError: its chunks are larger than `MAX_CHUNK_BYTES`.
        OutputError: it cannot be written (r+, a).
    """
    array = _open(url, "r" if mode == "r" else "r+", zarr.open_array)
    assert isinstance(array, zarr.Array)
    n_bytes = array.dtype.itemsize
    for n in array.chunks:
        n_bytes *= n
    if n_bytes > MAX_CHUNK_BYTES:
        raise InputError(
            f"the chunks {tuple(array.chunks)} of {url} take {n_bytes} bytes each, more than "
            f"{MAX_CHUNK_BYTES}: write it with smaller chunks"
        )
    return decode_fast(array) if mode == "r" else array


def writable(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The same array with writes allowed and durable; reads nothing from the store.

    Chunks that hold nothing but the fill value are stored too.
    """
    inner = array.async_array
    path = StorePath(_durable(inner.store_path.store), inner.store_path.path)
    config = replace(inner.config, write_empty_chunks=True)
    return zarr.Array(type(inner)(inner.metadata, path, config))


def create_group(url: str, *, zarr_format: Literal[2, 3], attributes: dict[str, Any]) -> zarr.Group:
    """A new group at `url`, where there must be nothing.

    Raises:
        OutputError: there is something, or it cannot be written.
    """
    if exists(url):
        raise OutputError(f"{url} exists: give another name or use --overwrite")
    return make_group(url, zarr_format=zarr_format, attributes=attributes)


def make_group(
    url: str, *, zarr_format: Literal[2, 3], attributes: dict[str, Any] | None = None
) -> zarr.Group:
    """A new group at `url`, also where other groups already lie below it.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        return zarr.create_group(
            _zarr_store(url, "a"), zarr_format=zarr_format, attributes=attributes
        )
    except (OSError, NotImplementedError) as error:
        raise _unwritable(url, error) from None


def remove(url: str) -> None:
    """Delete the Zarr store at `url` with all it holds; no error where there is nothing.

    Its own metadata goes last, so that a removal cut short can be repeated.

    Raises:
        OutputError: it is no Zarr store, or cannot be deleted.
    """
    fs, path = _filesystem(url)
    if not fs.exists(path):
        return
    if not is_empty(url) and not any(exists(join(url, name)) for name in METADATA_NAMES):
        raise OutputError(
            f"{url} is no Zarr store, so it is not deleted: delete it yourself or give another name"
        )
    entries = sorted(fs.ls(path, detail=False), key=lambda e: name_of(e) in METADATA_NAMES)
    try:
        for entry in entries:
            _delete(fs, entry, local=is_local(url))
        if is_local(url):
            Path(path).rmdir()
    except OSError as error:
        raise OutputError(f"{url} cannot be deleted: {_reason(error)}; check its rights") from None


def is_empty(url: str) -> bool:
    """Whether `url` is a directory with nothing in it but writes that were cut short."""
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)
    return bool(fs.isdir(path)) and all(e.endswith(PARTIAL) for e in fs.ls(path, detail=False))


def total_bytes(url: str) -> int:
    """Bytes stored under `url`, by listing it."""
    fs, path = _filesystem(url)
    return int(fs.du(path, total=True)) if fs.exists(path) else 0


class DurableLocalStore(LocalStore):
    """A local Zarr store whose writes have reached the disk when they return.

    zarr's own renames a file into place without `fsync`: after a power cut it can be empty.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Store `value` under `key`."""
        self._check_writable()
        await asyncio.to_thread(_write_durably, self.root / key, value.as_buffer_like())


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"{url} needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{url} is no location that fsspec knows: {error}; check it") from None
    return fs, path


def _zarr_store(url: str, mode: Mode) -> Store:
    _, path = _filesystem(url)
    if is_local(url):
        return LocalStore(path, read_only=True) if mode == "r" else DurableLocalStore(path)
    return FsspecStore.from_url(url, read_only=mode == "r")


def _durable(store: Store) -> Store:
    if isinstance(store, LocalStore):
        return DurableLocalStore(store.root)
    return store.with_read_only(read_only=False)


def _open(
    url: str, mode: Mode, opener: Callable[..., zarr.Group | zarr.Array[Any]]
) -> zarr.Group | zarr.Array[Any]:
    _check_metadata(url)
    if mode != "r":
        _check_writable(url)
    options = {"use_consolidated": False} if opener is zarr.open_group else {}
    try:
        return opener(_zarr_store(url, mode), mode="r" if mode == "r" else "r+", **options)
    except PermissionError as error:
        raise InputError(f"{url} cannot be read: {_reason(error)}; check its rights") from None
    except (FileNotFoundError, ContainsArrayError, ContainsGroupError):
        raise _explain_absence(url) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotOmeZarrError(
            f"{url} is damaged or not understood by zarr {zarr.__version__}: {_reason(error)}; "
            "check its metadata"
        ) from None


def _check_metadata(url: str) -> None:
    """Refuse documents that no honest writer makes, before a JSON parser sees them."""
    fs, path = _filesystem(url)
    for name in METADATA_NAMES:
        try:
            size = fs.info(f"{path.rstrip('/')}/{name}").get("size") or 0
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(f"{url} cannot be read: {_reason(error)}; check its rights") from None
        if size > MAX_METADATA_BYTES:
            raise InputError(
                f"{name} of {url} has {size} bytes, more than the {MAX_METADATA_BYTES} allowed for "
                "metadata: remove what does not belong there"
            )


def _explain_absence(url: str) -> InputError:
    fs, path = _filesystem(url)
    if not fs.exists(path):
        return InputNotFoundError(f"no such store: {url}; check the path")
    if fs.isfile(path):
        way_out = "give the directory of an OME-Zarr image"
        if path.lower().endswith(CONVERTIBLE):
            way_out = f"convert it first with `bigseg convert {url} OUT.ome.zarr`"
        return NotOmeZarrError(f"{url} is a file, not an OME-Zarr image: {way_out}")
    names = {name_of(e) for e in fs.ls(path, detail=False)}
    if names & {".zarray", "zarr.json"}:
        return NotOmeZarrError(f"{url} is a single Zarr array: give the image that holds it")
    if ".zgroup" in names:
        return NotOmeZarrError(f"{url} is a Zarr group, where an array is needed: check the path")
    inside = sorted(n for n in names if n.endswith(".zarr"))[:5]
    hint = f"give one of {', '.join(inside)} in it" if inside else "check the path"
    return NotOmeZarrError(f"{url} is a directory without Zarr metadata: {hint}")


def _check_writable(url: str) -> None:
    if url.startswith(("http://", "https://")):
        raise OutputError(f"{url} cannot be written over HTTP: give an output that can be written")
    _, path = _filesystem(url)
    if is_local(url) and os.path.exists(path) and not os.access(path, os.W_OK):
        raise _unwritable(url, PermissionError("no permission to write"))


def _read_at_most(file: Any, n_bytes: int) -> bytes:  # noqa: ANN401 - fsspec's files have no type
    # In pieces: a read allocates what it is asked for, and small machines refuse to give it.
    pieces = []
    while n_bytes > 0 and (piece := file.read(min(n_bytes, 1 << 24))):
        pieces.append(piece)
        n_bytes -= len(piece)
    return b"".join(pieces)


def _unwritable(url: str, error: Exception) -> OutputError:
    return OutputError(
        f"{url} cannot be written: {_reason(error)}; check rights and space or give another output"
    )


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]


def _delete(fs: Any, path: str, *, local: bool) -> None:  # noqa: ANN401
    if not local:
        fs.rm(path, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _write_durably(path: Path, data: bytes | memoryview | Any) -> None:  # noqa: ANN401
    """Temporary file, fsync, rename, fsync of the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
