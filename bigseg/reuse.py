"""What one run leaves for the next: a private folder of entries that are whole or absent.

    <folder>/<name>    32 bytes SHA-256 of what follows, then the bytes

Entries hold compiled networks and measured times: they save seconds and may go at any time. They
are run as code, so the folder must belong to this user and be writable to nobody else. Several
processes may write the same entry at once; a damaged one reads as absent and is written anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import stat
import tempfile
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_BYTES = 4 << 30
"""Above this the entries that were used least recently go."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_dir() -> Path | None:
    """$BIGSEG_CACHE, else $XDG_CACHE_HOME/bigseg, else ~/.cache/bigseg, made where it is missing.

    None where it cannot be used; a warning, given once, says why.
    """
    given, base = os.environ.get("BIGSEG_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return _usable(given or os.path.join(base or os.path.join("~", ".cache"), "bigseg"))


def load_entry(name: str) -> bytes | None:
    """The bytes that `save_entry` kept under this name; None where there are none, whole."""
    folder = cache_dir()
    if folder is None:
        return None
    path = folder / name
    try:
        content = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    data = content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        logger.warning("%s is damaged and is not used; it is made anew", path)
        return None
    return data


def save_entry(name: str, data: bytes) -> None:
    """Keep these bytes for later runs; where that fails a warning says so, and nothing is kept."""
    folder = cache_dir()
    if folder is None:
        return
    try:
        _write_whole(folder / name, hashlib.sha256(data).digest() + data)
        _drop_oldest(folder, MOST_BYTES)
    except OSError as error:
        logger.warning("%s could not be kept for the next run: %s", folder / name, error)


def digest_of(*parts: bytes | str) -> str:
    """A name for these parts, in this order: equal only for equal parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:40]


@lru_cache
def processor() -> str:
    """What this processor is and can do: compiled code of another one may crash here."""
    found = [platform.machine(), platform.processor()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            told = ("model name", "flags", "Features", "CPU part")
            found += sorted({line for line in lines if line.startswith(told)})
    except OSError:
        # Where a system does not say, entries are for one machine only.
        found.append(platform.node())
    return "\n".join(found)


@lru_cache
def _usable(wanted: str) -> Path | None:
    try:
        folder = Path(wanted).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError) as error:
        logger.warning(
            "%s cannot keep compiled networks (%s): every run compiles anew; set BIGSEG_CACHE to a "
            "folder of your own",
            wanted,
            error,
        )
        return None


def _check_private(folder: Path) -> None:
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise PermissionError("it belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others may write to it")


def _write_whole(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _drop_oldest(folder: Path, most_bytes: int) -> None:
    entries = []
    for path in folder.iterdir():
        # Another process may have dropped it.
        with_size = _age_and_size(path)
        if with_size is not None:
            entries.append((*with_size, path))
    n_bytes = 0
    for _, size, path in sorted(entries, reverse=True):
        n_bytes += size
        if n_bytes > most_bytes:
            path.unlink(missing_ok=True)


def _age_and_size(path: Path) -> tuple[float, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_mtime, found.st_size) if stat.S_ISREG(found.st_mode) else None
