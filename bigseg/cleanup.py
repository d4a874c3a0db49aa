"""Removing what a run that ended before its time left behind, and nothing else.

    finished result     temporary files of writes that were cut off, the lock of a dead run, scratch
    unfinished result   the whole of it: taken out of the list first, then deleted

Nothing is removed while a run lives, nor what `bigseg segment` did not make.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigseg import durable, store
from bigseg.errors import InputError, InputNotFoundError, LockedError, OutputError
from bigseg.lock import Lock, lock_url, read_lock
from bigseg.results import remove_result
from bigseg.scratch import remove_scratch, scratch_at
from bigseg.status import Status, image_of, open_result, read_status

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Leftovers:
    """What would be removed at `url`.

    `status` is None where there is no result (any more); `deletes_result` says that it is deleted
    whole, `has_scratch` that scratch space of instances lies in a finished one. `n_partials` are
    temporary files of writes that were cut off, which local stores have. `n_bytes` is what all that
    takes, None on other stores.
    """

    url: str
    status: Status | None
    deletes_result: bool
    has_scratch: bool
    has_lock: bool
    n_partials: int
    n_bytes: int | None

    @property
    def is_nothing(self) -> bool:
        """Whether there is nothing to remove."""
        found = (self.deletes_result, self.has_scratch, self.has_lock, self.n_partials)
        return not any(found)

    @property
    def question(self) -> str:
        """What the user is asked before a result is deleted."""
        if self.status is None or not self.status.stages:
            return f"delete {self.url}, which was begun and holds nothing yet?"
        stages = ", ".join(
            f"{s.name} {s.n_done} of {s.n_blocks} blocks" for s in self.status.stages
        )
        return f"delete {self.url}, which is not finished ({stages})?"

    @property
    def _things(self) -> list[str]:
        parts = []
        if self.deletes_result:
            parts.append("the unfinished result")
        elif self.n_partials:
            parts.append(f"{self.n_partials} files of writes that were cut off")
        if self.has_scratch:
            parts.append("scratch space")
        return [*parts, "the lock of a run that ended"] if self.has_lock else parts

    def as_text(self) -> str:
        """What was removed, once it has been."""
        if self.is_nothing:
            return f"{self.url}: nothing to remove"
        size = "" if self.n_bytes is None else f", {self.n_bytes} bytes"
        return f"{self.url}: removed {' and '.join(self._things)}{size}"


def find_leftovers(url: str) -> Leftovers:
    """What a run that ended before its time left at `url`; reads only.

    Raises:
        InputNotFoundError: there is nothing.
        LockedError: a run lives.
        OutputError: `bigseg segment` did not make what is there.
    """
    url = url.rstrip("/") or url
    lock = read_lock(url)
    if lock is not None and lock.is_alive:
        raise LockedError(
            f"{url} is being written by a run on {lock.host} (process {lock.pid}): wait for its "
            "end, or stop it, then clean"
        )
    if not store.exists(url) and lock is None:
        raise InputNotFoundError(f"no such result: {url}; check the path")
    partials, of_lock = list(_partials(url)), list(_partials_of_lock(url))
    is_begun = store.exists(url)
    if is_begun:
        _refuse_foreign(url, n_partials=len(partials))
    status = read_status(url) if is_begun and not store.is_empty(url) else None
    deletes_result = is_begun and not _is_finished(url)
    # In a finished result it is of no use.
    has_scratch = is_begun and not deletes_result and store.exists(scratch_at(url))
    whole = [url] if deletes_result else [scratch_at(url)] if has_scratch else []
    files = {*of_lock, *partials, *(file for place in whole for file in _files(place))}
    return Leftovers(
        url=url,
        status=status,
        deletes_result=deletes_result,
        has_scratch=has_scratch,
        has_lock=lock is not None,
        n_partials=len(partials) + len(of_lock),
        n_bytes=sum(map(_size_of, files)) if store.is_local(url) else None,
    )


def remove_leftovers(leftovers: Leftovers) -> None:
    """Remove it, with the lock of the result held.

    Raises:
        LockedError: a run has begun in the meantime.
        OutputError: it cannot be removed.
    """
    url = leftovers.url
    store.check_no_links(url)
    with Lock.acquire(url) as lock:
        for partial in [*_partials_of_lock(url), *_partials(url)]:
            partial.unlink(missing_ok=True)
        # A run may have finished it since, or taken it up again.
        if leftovers.has_scratch and _is_finished(url):
            remove_scratch(url)
        if not leftovers.deletes_result or _is_finished(url):
            return
        if store.is_empty(url):
            store.remove(url)
        else:
            remove_result(url, image=image_of(url), guard=lock.check)


def _refuse_foreign(url: str, *, n_partials: int) -> None:
    if store.is_empty(url) and n_partials:
        return
    try:
        open_result(url)
    except InputError as error:
        raise OutputError(f"{error}; nothing is removed") from None


def _is_finished(url: str) -> bool:
    """Whether the ledger says so; what cannot be read is not finished."""
    ledger = None if store.is_empty(url) else open_result(url)
    return ledger is not None and ledger.is_finished


def _partials(url: str) -> Iterator[Path]:
    """Temporary files of writes to the result; only local stores have them."""
    return (path for path in _files(url) if path.name.endswith(durable.PARTIAL))


def _partials_of_lock(url: str) -> Iterator[Path]:
    if not store.is_local(url):
        return
    lock = _path_of(lock_url(url))
    for entry in os.scandir(lock.parent):
        if entry.name.startswith(f".{lock.name}.") and entry.name.endswith(durable.PARTIAL):
            yield Path(entry.path)


def _files(url: str) -> Iterator[Path]:
    """The files below a local location; none elsewhere."""
    if store.is_local(url):
        for folder, _, names in os.walk(_path_of(url)):
            yield from (Path(folder, name) for name in names)


def _path_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


def _size_of(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
