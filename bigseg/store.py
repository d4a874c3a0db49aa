"""Bytes and Zarr nodes on any store: a local path or any fsspec URL. It knows no OME metadata.

What is opened was written by others: what must not be used of it is refused (guards.py). What is
written locally is durable when the call returns, and a kill leaves the old bytes or the new ones.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec
import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore, StorePath

from bigseg import durable, frames, guards
from bigseg.decoding import decode_fast
from bigseg.durable import PARTIAL
from bigseg.errors import (
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.patience import PatientStore, keep_stores_brief, patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    from zarr.abc.store import Store

Mode = Literal["r", "r+", "a"]

CONVERTIBLE = (".tif", ".tiff", ".png", ".h5", ".hdf5")


def join(url: str, *parts: str) -> str:
    """`url` with path components appended; each part may hold several, separated by '/'.

    Raises:
        InputError: a part is empty, absolute, has a scheme, or climbs with '..'.
    """
    for part in parts:
        guards.check_part(part, url)
        base = url if url == "/" or url.endswith("://") else f"{url.rstrip('/')}/"
        url = base + part.rstrip("/")
    return url


def parent(url: str) -> str:
    """The location that holds `url`."""
    head, _, _ = url.rstrip("/").rpartition("/")
    if head.endswith(":/"):
        return f"{head}/"
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


def read_start(url: str, n_bytes: int) -> bytes:
    """The first bytes of one file or object, all of them where it has fewer.

    Raises:
        InputNotFoundError: there is none.
        InputError: it cannot be read.
    """
    fs, path = _filesystem(url)
    try:
        return patiently(lambda: _read_at_most(fs, path, n_bytes))
    except FileNotFoundError:
        raise InputNotFoundError(f"no such file: {url}; check the path") from None
    except OSError as error:
        raise InputError(f"{url} cannot be read: {_reason(error)}; give a readable file") from None


def read_bytes(url: str, *, limit_bytes: int) -> bytes:
    """The content of one file or object.

    Raises:
        InputNotFoundError: there is none.
        InputError: it is larger than `limit_bytes`, or cannot be read.
    """
    data = read_start(url, limit_bytes + 1)
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
    guards.check_no_links_above(path if is_local(url) else "/")
    try:
        if is_local(url):
            durable.write_durably(Path(path), data)
        else:
            patiently(lambda: fs.pipe_file(path, data))
    except (OSError, NotImplementedError) as error:
        raise _unwritable(url, error) from None


def create_file(url: str, data: bytes) -> bool:
    """Write one file or object unless it is there; whether it was written.

    Of several calls at once one wins, where the store can tell (local files, S3).

    Raises:
        OutputError: it cannot be written.
    """
    fs, path = _filesystem(url)
    guards.check_no_links_above(path if is_local(url) else "/")
    try:
        if is_local(url):
            return durable.create_durably(Path(path), data)
        fs.invalidate_cache(parent(path))
        patiently(lambda: fs.pipe_file(path, data, mode="create"))
    except FileExistsError:
        return False
    except (OSError, NotImplementedError) as error:
        raise _unwritable(url, error) from None
    return True


def remove_file(url: str) -> None:
    """Delete one file or object; no error where there is none.

    Raises:
        OutputError: it cannot be deleted.
    """
    fs, path = _filesystem(url)
    try:
        patiently(lambda: fs.rm_file(path))
    except FileNotFoundError:
        pass
    except (OSError, NotImplementedError) as error:
        raise _unwritable(url, error) from None


def sweep(url: str, **only: Any) -> int:  # noqa: ANN401 - the limits of `remove_partials`
    """Delete what writes that were cut short left under `url`; gives how many files.

    Nobody may be writing there. Only local stores have such leftovers.
    """
    return durable.remove_partials(Path(_filesystem(url)[1]), **only) if is_local(url) else 0


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
        NotOmeZarrError: there is something else, Zarr cannot decode it, or it would run code.
        InputError: it or its chunks are larger than anything honest.
        OutputError: it cannot be written (r+, a).
    """
    array = _open(url, "r" if mode == "r" else "r+", zarr.open_array)
    assert isinstance(array, zarr.Array)
    guards.check_array(array, url)
    return decode_fast(array, frames.check_of) if mode == "r" else array


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
    check_no_links(url)
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
    check_no_links(url)
    if not fs.exists(path):
        return
    if not is_empty(url) and not any(exists(join(url, name)) for name in guards.METADATA_NAMES):
        raise OutputError(
            f"{url} is no Zarr store, so it is not deleted: delete it yourself or give another name"
        )
    entries = sorted(fs.ls(path, detail=False), key=lambda e: name_of(e) in guards.METADATA_NAMES)
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


def check_no_links(url: str) -> None:
    """Refuse to write or delete at a link, or behind one inside a store.

    Raises:
        OutputError: there is one.
    """
    if is_local(url):
        guards.check_no_links(_filesystem(url)[1])


def _filesystem(url: str) -> tuple[Any, str]:
    guards.check_location(url)
    keep_stores_brief()
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
        return LocalStore(path, read_only=True) if mode == "r" else durable.DurableLocalStore(path)
    return PatientStore(FsspecStore.from_url(url, read_only=mode == "r"))


def _durable(store: Store) -> Store:
    if isinstance(store, LocalStore):
        guards.check_no_links(str(store.root))
        return durable.DurableLocalStore(store.root)
    return store.with_read_only(read_only=False)


def _open(
    url: str, mode: Mode, opener: Callable[..., zarr.Group | zarr.Array[Any]]
) -> zarr.Group | zarr.Array[Any]:
    zarr_format = _format_of(url)
    if mode != "r":
        _check_writable(url)
    options: dict[str, Any] = {"mode": "r" if mode == "r" else "r+", "zarr_format": zarr_format}
    if opener is zarr.open_group:
        options["use_consolidated"] = False
    try:
        return opener(_zarr_store(url, mode), **options)
    except PermissionError as error:
        raise InputError(f"{url} cannot be read: {_reason(error)}; check its rights") from None
    except (FileNotFoundError, ContainsArrayError, ContainsGroupError):
        raise _explain_absence(url) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotOmeZarrError(
            f"{url} is damaged or not understood by zarr {zarr.__version__}: {_reason(error)}; "
            "check its metadata"
        ) from None


def _format_of(url: str) -> Literal[2, 3] | None:
    fs, path = _filesystem(url)
    try:
        return guards.format_of(lambda name: fs.info(f"{path.rstrip('/')}/{name}"), url)
    except OSError as error:
        raise InputError(f"{url} cannot be read: {_reason(error)}; check its rights") from None


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
    check_no_links(url)
    _, path = _filesystem(url)
    if is_local(url) and os.path.exists(path) and not os.access(path, os.W_OK):
        raise _unwritable(url, PermissionError("no permission to write"))


def _read_at_most(fs: Any, path: str, n_bytes: int) -> bytes:  # noqa: ANN401
    # In pieces: a read allocates what it is asked for, and small machines refuse to give it.
    pieces = []
    # A cached listing of a remote store would hide what others have written.
    fs.invalidate_cache(parent(path))
    with fs.open(path, "rb") as file:
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
    return guards.without_secrets(" ".join(str(text).split())[:300])


def _delete(fs: Any, path: str, *, local: bool) -> None:  # noqa: ANN401
    if not local:
        fs.rm(path, recursive=True)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
