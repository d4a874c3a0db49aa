"""What is refused before it is used, because others wrote it, or others will read it.

    locations   that carry a password or a signature: they would reach logs, plans and results
    parts       of paths in metadata that lead out of their store
    links       that a write or a deletion would go through
    sizes       that no honest writer makes and no memory holds
    codecs      that run what they decode
    texts       with codes that a terminal would obey

Links are followed where something is read, as by every program: what a location holds, its owner
put there. Nothing is written or deleted through a link that lies inside an image or an output, and
an output is never a link itself. Links above it belong to the user's own way to it.
"""

from __future__ import annotations

import math
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bigseg.errors import InputError, NotOmeZarrError, OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

METADATA_NAMES = ("zarr.json", ".zgroup", ".zarray", ".zattrs")
MAX_METADATA_BYTES = 16 * 2**20
MAX_CHUNK_BYTES = 2**34
# Dask counts the chunks of each axis; an axis has as many as it is long, at most.
MAX_CHUNKS_OF_AXIS = 2**24
# What is computed with numbers of voxels and bytes stays within 64 bits.
MAX_ARRAY_BYTES = 2**62
# The index of a shard is read whole, 16 bytes for each chunk in it.
MAX_CHUNKS_OF_SHARD = 2**24

# How deep an image can lie in a plate, with labels, levels and a ledger below it.
_MAX_DEPTH = 10
# In the addresses of these stores a name before the host is no secret: a user or a container.
_NAMED = {
    *("abfs", "abfss", "adl", "az", "ftp", "hdfs", "sftp", "smb", "ssh"),
    *("wasb", "wasbs", "webhdfs"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_UNSAFE_CODECS = {"pickle", "numcodecs.pickle"}
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 100


def check_location(location: str) -> str:
    """The location itself, when it holds no secret; the message repeats nothing that may be one.

    Raises:
        UsageError: it is an URL with a user name, a password or a query.
    """
    # Not inside brackets, where an address of IPv6 has two colons.
    for piece in re.split(r"::(?![^\[]*\])", location):
        scheme, found, rest = piece.partition("://")
        if found and _holds_secret(scheme.lower(), rest):
            raise UsageError(
                f"a location that begins with {scheme[:20]}:// holds a user name, a password or a "
                "query, which would be written into logs and results: leave them out, and give "
                "credentials by the store's own profile or environment, such as AWS_PROFILE"
            )
    return location


def _holds_secret(scheme: str, rest: str) -> bool:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, host = authority.rpartition("@")
    # What looks like a port and is none can be the password of a name that was cut at a slash.
    named_port = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", host) is None
    is_secret_user = bool(at) and (":" in user or scheme not in _NAMED)
    return is_secret_user or named_port or ("?" in rest and scheme != "file")


def without_secrets(text: str) -> str:
    """A text, such as an error of a store, without what locations in it could hold of secrets."""
    text = re.sub(r"(?<=://)[^/\s'\"@]+@", "…@", text)
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1?…", text)


def printable(text: str) -> str:
    r"""The text with everything that a terminal would obey or not show written as \x1b."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def shown(value: object) -> str:
    """A value out of metadata for a message: short, whatever it is."""
    try:
        return _SHOWN.repr(value)
    except (RecursionError, ValueError):  # Python shows no integers of thousands of digits.
        return type(value).__name__


def check_part(part: str, where: str) -> None:
    """Refuse a path from metadata that leads out of the store at `where`.

    Raises:
        InputError: it is empty, absolute, has a scheme, climbs with '..', or holds characters that
            no file should have in its name.
    """
    pieces = part.strip("/").split("/") if not part.startswith("/") else [""]
    if (
        any(p in ("", ".", "..") for p in pieces)
        or ":" in pieces[0]
        or "::" in part
        or "\\" in part
        or _CONTROL.search(part)
        or set(part) & set("\t\n")
    ):
        raise InputError(
            f"path {shown(part)} in {where} leaves the store or is empty: "
            "paths inside a store are relative, such as 'labels/cells'"
        )


def check_no_links(path: str) -> None:
    """Refuse to write or delete at a place of this machine that is a link, or behind one.

    Raises:
        OutputError: it is one, or `check_no_links_above` finds one.
    """
    _refuse_link(Path(path), path)
    check_no_links_above(path)


def check_no_links_above(path: str) -> None:
    """Refuse to write behind a link that lies inside an image or another store.

    Raises:
        OutputError: a directory between the place and the outermost Zarr group around it is one.
    """
    above = list(Path(path).parents)[:_MAX_DEPTH]
    groups = [i for i, folder in enumerate(above) if _is_zarr(folder)]
    for folder in above[: max(groups, default=0)]:
        _refuse_link(folder, path)


def _is_zarr(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in METADATA_NAMES)


def _refuse_link(folder: Path, path: str) -> None:
    if os.path.islink(folder):
        raise OutputError(
            f"{path} would be written or deleted through the link {folder}: bigseg follows links "
            f"only to read; name the place itself, {os.path.realpath(folder)}, or remove the link"
        )


def format_of(info_of: Callable[[str], Mapping[str, Any]], where: str) -> Literal[2, 3] | None:
    """The Zarr format of a node, if it is one; `info_of` gives fsspec's info of a document.

    Knowing it spares every opening a dozen questions, each of them a remote store's whole latency.

    Raises:
        InputError: a document is too large, or no file but a device or a pipe, which never end.
    """
    found: Literal[2, 3] | None = None
    for name in METADATA_NAMES:
        try:
            _check_document(name, info_of(name), where)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if name == "zarr.json":
            return 3
        found = 2
    return found


def _check_document(name: str, info: Mapping[str, Any], where: str) -> None:
    n_bytes = info.get("size") or 0
    if info.get("type") == "other":
        raise InputError(f"{name} of {where} is a device or a pipe: put a file in its place")
    if n_bytes > MAX_METADATA_BYTES:
        raise InputError(
            f"{name} of {where} has {n_bytes} bytes, more than the {MAX_METADATA_BYTES} allowed "
            "for metadata: remove what does not belong there"
        )


def check_array(array: Any, where: str) -> None:  # noqa: ANN401 - a Zarr array; it opens none
    """Refuse an array, by its metadata alone, that is not safe to read.

    Raises:
        NotOmeZarrError: it holds Python objects, a codec of it runs what it decodes, or it is cut
            into chunks of no size.
        InputError: it, its chunks or their number are larger than anything honest.
    """
    if array.dtype.hasobject or (unsafe := _UNSAFE_CODECS & set(_codecs(array.metadata))):
        what = "objects" if array.dtype.hasobject else f"values of the codec {min(unsafe)!r}"
        raise NotOmeZarrError(
            f"{where} holds Python {what}, which can run code when they are read, so bigseg never "
            "reads them: write it with numbers and a codec such as zstd"
        )
    shape, chunks = tuple(array.shape), tuple(array.chunks)
    if any(n < 1 for n in chunks):
        raise NotOmeZarrError(f"{where} has chunks of {chunks} voxels: correct its metadata")
    _check_chunks(shape, chunks, tuple(array.shards or chunks), array.dtype.itemsize, where)


def _check_chunks(
    shape: Sequence[int], chunks: Sequence[int], shards: Sequence[int], itemsize: int, where: str
) -> None:
    if (n_bytes := math.prod(chunks) * itemsize) > MAX_CHUNK_BYTES:
        raise InputError(
            f"the chunks {tuple(chunks)} of {where} take {n_bytes} bytes each, more than "
            f"{MAX_CHUNK_BYTES}: write it with smaller chunks"
        )
    if (n_inner := math.prod(s // c for s, c in zip(shards, chunks, strict=True))) > (
        MAX_CHUNKS_OF_SHARD
    ):
        raise InputError(
            f"the shards {tuple(shards)} of {where} hold {n_inner} chunks each, more than "
            f"{MAX_CHUNKS_OF_SHARD}: write it with smaller shards"
        )
    longest = max((-(-n // c) for n, c in zip(shape, chunks, strict=True)), default=0)
    if longest > MAX_CHUNKS_OF_AXIS or math.prod(shape) * itemsize > MAX_ARRAY_BYTES:
        raise InputError(
            f"{where} of shape {tuple(shape)} in chunks of {tuple(chunks)} is larger than any "
            "volume: correct its metadata"
        )


def _codecs(metadata: Any) -> Iterable[str]:  # noqa: ANN401 - of Zarr 2 or 3
    if metadata.zarr_format == 2:
        found = (*(metadata.filters or ()), *filter(None, [metadata.compressor]))
        return [str(getattr(codec, "codec_id", "")) for codec in found]
    return list(_names(metadata.to_dict()["codecs"]))


def _names(codecs: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Also those inside shards."""
    for codec in codecs:
        yield str(codec["name"])
        inner = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            yield from _names(inner.get(key, ()))
