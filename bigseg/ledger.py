"""What is finished: the stored plan and one mark for every block of every stage.

    <output>/ledger/           attributes: plan, finished
    <output>/ledger/predict    uint32, one value a block: 0 not done, EMPTY_MARK nothing was written
                               because all is background, else a checksum of the written bytes
    <output>/ledger/pyramid-1  ...

Only the driver writes it, and only after a worker's write has returned. Blocks are idempotent, so a
lost mark costs one block computed again. On disk a block of zeros and a block never written look
the same: what is done is what the ledger says.
"""

from __future__ import annotations

import time
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from bigseg import store
from bigseg.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

MARKS_PER_CHUNK = 1 << 16
FLUSH_EVERY_S = 5.0

NOT_DONE = 0
EMPTY_MARK = 0xFFFFFFFF


def checksum_of(data: bytes | bytearray | memoryview) -> int:
    """The CRC-32 of the bytes, as a mark: never `NOT_DONE` nor `EMPTY_MARK`."""
    checksum = zlib.crc32(data)
    return {NOT_DONE: 1, EMPTY_MARK: EMPTY_MARK - 1}.get(checksum, checksum)


class Ledger:
    """The marks of one output; `create` a new one or `open` the one that is there."""

    def __init__(self, url: str, group: zarr.Group, clock: Callable[[], float]) -> None:
        self.url = url
        self._group = group
        self._clock = clock
        self._flushed_at = clock()
        self._marks: dict[str, NDArray[np.uint32]] = {}
        self._changed: set[tuple[str, int]] = set()

    @classmethod
    def create(
        cls,
        url: str,
        plan: Mapping[str, Any],
        n_blocks: Mapping[str, int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> Ledger:
        """An empty ledger at `url` for stages with these numbers of blocks.

        Raises:
            OutputError: the place cannot be written.
        """
        with _writing(url):
            # What an earlier creation, cut short, left.
            store.remove(url)
            group = store.make_group(url, zarr_format=3)
            for stage, n in n_blocks.items():
                group.create_array(
                    stage,
                    shape=(n,),
                    chunks=(min(max(n, 1), MARKS_PER_CHUNK),),
                    dtype="uint32",
                    fill_value=NOT_DONE,
                    compressors=[ZstdCodec(level=1, checksum=True)],
                )
            # Last: a ledger without a plan is one that was never finished being made.
            group.attrs["plan"] = dict(plan)
        return cls(url, group, clock)

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] = time.monotonic) -> Ledger | None:
        """The ledger at `url`, or None where there is none."""
        if not store.exists(url) or store.is_empty(url):
            return None
        group = store.open_group(url, mode="r+")
        return cls(url, group, clock) if "plan" in group.attrs else None

    def discard(self) -> None:
        """Forget everything: what is deleted after this is never taken for finished.

        Raises:
            OutputError: it cannot be deleted.
        """
        # First in one atomic write, because deleting many files can be cut short.
        with _writing(self.url):
            self._group.attrs.put({})
        store.remove(self.url)

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that the marks belong to, as it was stored."""
        plan = self._group.attrs["plan"]
        assert isinstance(plan, dict)
        return dict(plan)

    @property
    def is_finished(self) -> bool:
        """Whether every stage is complete and the result has been listed."""
        return bool(self._group.attrs.get("finished", False))

    def finish(self, record: Mapping[str, Any]) -> None:
        """Note that the output is complete, with the figures of the run."""
        self.flush()
        with _writing(self.url):
            self._group.attrs.update({"finished": True, "record": dict(record)})

    @property
    def record(self) -> dict[str, Any]:
        """The figures noted by `finish`."""
        record = self._group.attrs.get("record", {})
        assert isinstance(record, dict)
        return dict(record)

    def pending(self, stage: str) -> NDArray[np.bool_]:
        """For each block of a stage whether it is not done; a snapshot of this moment."""
        pending: NDArray[np.bool_] = self._of(stage) == NOT_DONE
        return pending

    def n_done(self, stage: str) -> int:
        """Number of finished blocks of a stage, those of which nothing was written among them."""
        return int(np.count_nonzero(self._of(stage)))

    def n_empty(self, stage: str) -> int:
        """Number of finished blocks of a stage of which nothing was written."""
        return int(np.count_nonzero(self._of(stage) == EMPTY_MARK))

    def checksum(self, stage: str, block: int) -> int:
        """The mark of a block; `NOT_DONE`, `EMPTY_MARK`, or else what `checksum_of` gave."""
        return int(self._of(stage)[block])

    def mark(self, stage: str, block: int, checksum: int) -> None:
        """Note that a block is finished; reaches the store within a few seconds or at `flush`.

        `checksum` is what `checksum_of` gives for what was written, or `EMPTY_MARK`.
        """
        assert checksum != NOT_DONE, "a finished block has a mark"
        self._of(stage)[block] = checksum
        self._changed.add((stage, block // MARKS_PER_CHUNK))
        if self._clock() - self._flushed_at >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write the chunks of marks that changed.

        Raises:
            OutputError: they cannot be written; they are kept for the next time.
        """
        with _writing(self.url):
            for stage, chunk in sorted(self._changed):
                part = slice(chunk * MARKS_PER_CHUNK, (chunk + 1) * MARKS_PER_CHUNK)
                self._array(stage)[part] = self._of(stage)[part]
        self._changed.clear()
        self._flushed_at = self._clock()

    def _of(self, stage: str) -> NDArray[np.uint32]:
        if stage not in self._marks:
            self._marks[stage] = np.asarray(self._array(stage)[:], dtype=np.uint32)
        return self._marks[stage]

    def _array(self, stage: str) -> zarr.Array[Any]:
        array = self._group[stage]
        assert isinstance(array, zarr.Array)
        return array


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"the ledger {url} cannot be written: {error.strerror or error}; check rights and "
            "space, then run again"
        ) from error
