"""What is finished: the stored plan and one mark for every block of every stage.

    <output>/ledger/           attributes: stages, plan, finished, record, taken_back
    <output>/ledger/troubles.json  why blocks failed, and chunks of the input that were filled
    <output>/ledger/predict    uint32, one value a block: 0 not done, EMPTY_MARK nothing was written
                               because all is background, else a checksum of the written bytes
    <output>/ledger/pyramid-1  ...

Only the driver writes it, and only after a worker's write has returned; before each write it makes
sure that the output is still its own (`guard`). Blocks are idempotent, so a lost mark costs one
block computed again. On disk a block of zeros and a block never written look
the same: what is done is what the ledger says.
"""

from __future__ import annotations

import json
import time
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from bigseg import store
from bigseg.errors import InputNotFoundError, OutputError
from bigseg.guards import check_array
from bigseg.taken_back import TakenBack, blocks_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bigseg.taken_back import Blocks

MARKS_PER_CHUNK = 1 << 16
# Their marks take a gigabyte of memory.
MAX_BLOCKS = 1 << 28
FLUSH_EVERY_S = 5.0
MAX_TROUBLES_BYTES = 64 << 20

NOT_DONE = 0
EMPTY_MARK = 0xFFFFFFFF


def checksum_of(data: bytes | bytearray | memoryview) -> int:
    """The CRC-32 of the bytes, as a mark: never `NOT_DONE` nor `EMPTY_MARK`."""
    checksum = zlib.crc32(data)
    return {NOT_DONE: 1, EMPTY_MARK: EMPTY_MARK - 1}.get(checksum, checksum)


def _nothing() -> None:
    """The guard of who holds no lock."""


class Ledger:
    """The marks of one output; `create` a new one or `open` the one that is there.

    `guard` is called before everything that is written, and raises where that is not allowed.
    """

    def __init__(
        self, url: str, group: zarr.Group, guard: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self.url = url
        self._group = group
        self._guard = guard
        self._clock = clock
        self._flushed_at = clock()
        self._troubles: dict[str, dict[str, Any]] | None = None
        self._troubles_changed = False
        self._marks: dict[str, NDArray[np.uint32]] = {}
        self._changed: set[tuple[str, int]] = set()
        self.is_new = False

    @classmethod
    def create(
        cls,
        url: str,
        plan: Mapping[str, Any],
        n_blocks: Mapping[str, int],
        *,
        guard: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic,
    ) -> Ledger:
        """An empty ledger at `url` for stages with these numbers of blocks.

        Raises:
            OutputError: the place cannot be written.
        """
        guard()
        with _writing(url):
            # What an earlier creation, cut short, left.
            store.remove(url)
            group = store.make_group(url, zarr_format=3)
            for stage, n in n_blocks.items():
                _create_marks(group, stage, n)
            # Last: a ledger without a plan is one that was never finished being made.
            group.attrs.put({"stages": dict(n_blocks), "plan": dict(plan)})
        ledger = cls(url, group, guard, clock)
        ledger.is_new = True
        return ledger

    @classmethod
    def open(
        cls,
        url: str,
        *,
        guard: Callable[[], None] = _nothing,
        clock: Callable[[], float] = time.monotonic,
        read_only: bool = False,
    ) -> Ledger | None:
        """The ledger at `url`, or None where there is none."""
        if not store.exists(url) or store.is_empty(url):
            return None
        group = store.open_group(url, mode="r" if read_only else "r+")
        return cls(url, group, guard, clock) if "plan" in group.attrs else None

    def discard(self) -> None:
        """Forget everything: what is deleted after this is never taken for finished.

        Raises:
            OutputError: it cannot be deleted.
        """
        self._guard()
        # First in one atomic write, because deleting many files can be cut short.
        with _writing(self.url):
            self._group.attrs.put({})
        store.remove(self.url)

    def replan(self, plan: Mapping[str, Any], n_blocks: Mapping[str, int]) -> None:
        """Go on with another plan, in whose stages what is marked stays done.

        Raises:
            OutputError: it cannot be written; the plan is the old one then.
        """
        self.flush()
        with _writing(self.url):
            # One by one: a listing of the group warns of the file that is no Zarr node.
            for stage in [s for s in n_blocks if s not in self._group]:
                _create_marks(self._group, stage, n_blocks[stage])
            # In one write: the ledger is that of the one plan or the other.
            self._group.update_attributes({"stages": dict(n_blocks), "plan": dict(plan)})

    @property
    def plan(self) -> dict[str, Any]:
        """The plan that the marks belong to, as it was stored."""
        plan = self._group.attrs["plan"]
        assert isinstance(plan, dict)
        return dict(plan)

    @property
    def stages(self) -> dict[str, int]:
        """The stages in order, with their numbers of blocks."""
        stages = self._group.attrs.get("stages")
        if isinstance(stages, dict):
            return {str(name): int(n) for name, n in stages.items()}
        # Of a ledger that is older than this attribute: their names sort in their order.
        return {
            name: self._array(name).shape[0] for name in sorted(self._group.array_keys(), key=_rank)
        }

    @property
    def is_finished(self) -> bool:
        """Whether every stage is complete and the result has been listed."""
        return bool(self._group.attrs.get("finished", False))

    def finish(self, record: Mapping[str, Any]) -> None:
        """Note that the output is complete, with the figures of the run."""
        self.flush()
        self._guard()
        with _writing(self.url):
            self._group.update_attributes({"finished": True, "record": dict(record)})

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
        for kind in ("failures", "filled"):
            troubles = self._troubles_of(kind)
            # Mostly there are none, and this is done for every block.
            if troubles and troubles.pop(_key(stage, block), None) is not None:
                self._troubles_changed = True
        if self._clock() - self._flushed_at >= FLUSH_EVERY_S:
            self.flush()

    def unmark(self, stage: str, blocks: Iterable[int]) -> None:
        """Note that blocks are to be done again, and hence that the output is not finished.

        Raises:
            OutputError: it cannot be noted.
        """
        for block in blocks:
            self._of(stage)[block] = NOT_DONE
            self._changed.add((stage, block // MARKS_PER_CHUNK))
        self._guard()
        with _writing(self.url):
            self._group.update_attributes({"finished": False})
        self.flush()

    def take_back(self, wrong: Blocks, condemned: Blocks) -> None:
        """Let blocks of several stages be done again, and the output be unfinished, in one write.

        The `condemned` among them must be erased before; they are known until `settle` is called.

        Raises:
            OutputError: it cannot be noted.
        """
        note = self._taken_back.joined(wrong, condemned)
        self._guard()
        with _writing(self.url):
            self._group.update_attributes({"finished": False, "taken_back": note.as_json()})
        self._unmark_taken_back()

    @property
    def condemned(self) -> dict[str, list[int]]:
        """The blocks, by stage, that were taken back and must be erased before they are done."""
        return {s: list(blocks_in(ranges)) for s, ranges in self._taken_back.condemned.items()}

    def settle(self) -> None:
        """Note that what was condemned is erased, so that what was taken back can be done again."""
        if self._taken_back.wrong:
            self._unmark_taken_back()
            left = {k: v for k, v in self._group.attrs.items() if k != "taken_back"}
            with _writing(self.url):
                self._group.attrs.put(left)

    def check(self) -> None:
        """Make sure that what the marks speak of may be written.

        Raises:
            LockedError: the output is no longer this run's.
        """
        self._guard()

    def fail(self, stage: str, block: int, reason: str) -> None:
        """Note why a block was set aside; forgotten when it is marked."""
        self._troubles_of("failures")[_key(stage, block)] = reason
        self._troubles_changed = True

    @property
    def failures(self) -> dict[tuple[str, int], str]:
        """Why blocks were set aside, by stage and block."""
        return {_stage_and_block(k): str(v) for k, v in self._troubles_of("failures").items()}

    def note_filled(self, stage: str, block: int, keys: Sequence[str]) -> None:
        """Note chunks of the input for which a block read fill values; called after `mark`."""
        self._troubles_of("filled")[_key(stage, block)] = list(keys)
        self._troubles_changed = True

    @property
    def filled(self) -> list[str]:
        """The chunks of the input that were filled for some block."""
        return sorted({str(key) for keys in self._troubles_of("filled").values() for key in keys})

    def flush(self) -> None:
        """Write the chunks of marks that changed.

        Raises:
            OutputError: they cannot be written; they are kept for the next time.
            LockedError: the output is no longer this run's.
        """
        self._guard()
        with _writing(self.url):
            if self._troubles_changed:
                text = json.dumps(self._troubles, ensure_ascii=False)
                store.write_atomic(store.join(self.url, "troubles.json"), text.encode())
                self._troubles_changed = False
            for stage, chunk in sorted(self._changed):
                part = slice(chunk * MARKS_PER_CHUNK, (chunk + 1) * MARKS_PER_CHUNK)
                self._array(stage)[part] = self._of(stage)[part]
        self._changed.clear()
        self._flushed_at = self._clock()

    def _troubles_of(self, kind: str) -> dict[str, Any]:
        if self._troubles is None:
            self._troubles = _read_troubles(store.join(self.url, "troubles.json"))
        return self._troubles.setdefault(kind, {})

    def _of(self, stage: str) -> NDArray[np.uint32]:
        if stage not in self._marks:
            self._marks[stage] = np.asarray(self._array(stage)[:], dtype=np.uint32)
            self._clear(stage)
        return self._marks[stage]

    @property
    def _taken_back(self) -> TakenBack:
        return TakenBack.from_json(self._group.attrs.get("taken_back"))

    def _unmark_taken_back(self) -> None:
        for stage in self._taken_back.wrong.keys() & self.stages.keys():
            self._clear(stage)
        self.flush()

    def _clear(self, stage: str) -> None:
        """Unmark what was taken back of a stage: a kill can have left the marks of it."""
        marks = self._of(stage)
        for start, stop in self._taken_back.wrong.get(stage, []):
            left = start + np.flatnonzero(marks[start:stop])
            marks[left] = NOT_DONE
            chunks = np.unique(left // MARKS_PER_CHUNK).tolist()
            self._changed.update((stage, chunk) for chunk in chunks)

    def _array(self, stage: str) -> zarr.Array[Any]:
        try:
            array = self._group[stage]
            assert isinstance(array, zarr.Array)
            check_array(array, f"{self.url}/{stage}")
            if array.ndim != 1 or array.shape[0] > MAX_BLOCKS or array.dtype != np.uint32:
                raise ValueError(f"its shape is {array.shape}, its type {array.dtype}")
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{self.url}/{stage} is damaged or no ledger of bigseg's ({str(error)[:200]}): "
                "start anew with --overwrite, or choose another place"
            ) from None
        return array


def _create_marks(group: zarr.Group, stage: str, n: int) -> None:
    group.create_array(
        stage,
        shape=(n,),
        chunks=(min(max(n, 1), MARKS_PER_CHUNK),),
        dtype="uint32",
        fill_value=NOT_DONE,
        compressors=[ZstdCodec(level=1, checksum=True)],
    )


def _key(stage: str, block: int) -> str:
    return f"{stage}/{block}"


def _stage_and_block(key: str) -> tuple[str, int]:
    stage, _, block = key.partition("/")
    return stage, int(block)


def _rank(stage: str) -> tuple[bool, int]:
    """`predict` first, then the levels by their number."""
    level = stage.partition("-")[2]
    return stage != "predict", int(level) if level.isdecimal() else 0


def _read_troubles(url: str) -> dict[str, dict[str, Any]]:
    try:
        text = store.read_bytes(url, limit_bytes=MAX_TROUBLES_BYTES)
    except InputNotFoundError:
        return {}
    try:
        troubles = json.loads(text)
    except ValueError:
        # Only what is said of failures depends on it, and those are found again.
        return {}
    return troubles if isinstance(troubles, dict) else {}


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
