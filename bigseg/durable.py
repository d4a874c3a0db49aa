"""Files that have reached the disk, whole, when a call returns.

    .<name>.<random>.partial  ──fsync──> rename to <name> ──fsync of the directory──> done

A kill at any moment leaves the old file or the new one, and perhaps a `.partial`, which
`remove_partials` finds. It knows paths of this machine only.
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import LocalStore

from bigseg.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zarr.core.buffer import Buffer

PARTIAL = ".partial"


class DurableLocalStore(LocalStore):
    """A local Zarr store whose writes have reached the disk when they return.

    zarr's own renames a file into place without `fsync`: after a power cut it can be empty.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Store `value` under `key`.

        Raises:
            OutputError: a directory of the store on the way there is a link to another place. In
                the place of the file itself a link is replaced, not followed.
        """
        self._check_writable()
        path = self.root / key
        _refuse_links(self.root, path)
        await asyncio.to_thread(write_durably, path, value.as_buffer_like())


def write_durably(path: Path, data: bytes | memoryview | Any) -> None:  # noqa: ANN401
    """Replace the file, or make it."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)


def create_durably(path: Path, data: bytes) -> bool:
    """Make the file unless there is one; whether it was made. One of several at once wins."""
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def remove_partials(
    path: Path, *, prefix: str = ".", deep: bool = True, before_s: float = math.inf
) -> int:
    """Delete what writes that were cut short left in a directory; gives how many files.

    `prefix` limits it to names that begin so, `before_s` to files that were last written before
    (seconds of the epoch). Nobody may be writing those.
    """
    n_removed = 0
    for folder, below, names in os.walk(path):
        for name in names:
            found = Path(folder, name)
            if (
                name.startswith(prefix)
                and name.endswith(PARTIAL)
                and found.lstat().st_mtime < before_s
            ):
                found.unlink(missing_ok=True)
                n_removed += 1
        if not deep:
            below.clear()
    return n_removed


def _refuse_links(root: Path, path: Path) -> None:
    for folder in path.parents:
        if folder == root:
            return
        if os.path.islink(folder):
            raise OutputError(
                f"{path} would be written through the link {folder}: bigseg follows links only to "
                "read; put a directory in its place"
            )


@contextmanager
def _written_beside(path: Path, data: bytes | memoryview | Any) -> Iterator[Path]:  # noqa: ANN401
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
