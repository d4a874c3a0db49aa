"""Read ▸ work ▸ write with bounded queues; knows neither network nor Zarr.

    reader threads   read 4  read 3 ──┐
    working thread                    └── work 2 ──┐
    writer threads                                 └── write 1  write 0

The working thread is what the machine is paid for: it should never wait. A pipeline stays open
between two calls of `run`, and several may run at once (in threads of their own): the first items
of the next call are read while the last ones of this call are worked on and written.

At most `ahead` items are read or being read, one is worked on, and `behind` are being written. A
failure belongs to its item: the others go on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Written = TypeVar("Written")


@dataclass(frozen=True)
class Outcome(Generic[Item, Written]):
    """What became of one item: `written`, or the error that it met."""

    item: Item
    written: Written | None = None
    error: Exception | None = None


@dataclass
class Clock:
    """Seconds of the working thread: at work, and waiting for a read, a write, or an item."""

    work_s: float = 0.0
    wait_read_s: float = 0.0
    wait_write_s: float = 0.0
    idle_s: float = 0.0


@dataclass(frozen=True)
class _Job(Generic[Item]):
    item: Item
    deliver: Callable[[Outcome[Item, Any]], None]
    data: Future[Any] = field(default_factory=Future)


class Pipeline(Generic[Item, Written]):
    """Three steps that overlap; a context manager that ends its threads."""

    def __init__(
        self,
        read: Callable[[Item], Any],
        work: Callable[[Item, Any], Any],
        write: Callable[[Item, Any], Written],
        *,
        ahead: int = 1,
        behind: int = 1,
        n_readers: int = 1,
        n_writers: int = 1,
    ) -> None:
        self.clock = Clock()
        self._read, self._work, self._write = read, work, write
        self._ahead, self._behind = max(1, ahead), max(1, behind)
        self._todo: queue.SimpleQueue[_Job[Item] | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[_Job[Item] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(self._ahead)
        self._in_order = threading.Lock()
        self._announcing = threading.Lock()
        self._writers = ThreadPoolExecutor(n_writers, "writer")
        self._threads = [
            threading.Thread(target=self._keep_reading, name=f"reader_{i}", daemon=True)
            for i in range(n_readers)
        ]
        self._threads.append(threading.Thread(target=self._keep_working, name="work", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def most_items(self) -> int:
        """The number of items that hold memory at a time, at most."""
        return self._ahead + 1 + self._behind

    def __enter__(self) -> Pipeline[Item, Written]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self._todo.put(None)
        for thread in self._threads:
            thread.join()
        self._writers.shutdown()

    def run(self, items: Iterable[Item]) -> Iterator[Outcome[Item, Written]]:
        """The outcome of each item as it is written; items are taken as they are needed.

        When the generator is closed early, the items in flight are finished.
        """
        done: queue.SimpleQueue[Outcome[Item, Written]] = queue.SimpleQueue()
        flying = 0
        try:
            # One call after the other, so that items are worked on in the order of the calls.
            with self._announcing:
                for item in items:
                    self._todo.put(_Job(item, done.put))
                    flying += 1
                    while flying > self.most_items or not done.empty():
                        outcome = done.get()
                        flying -= 1
                        yield outcome
            while flying:
                outcome = done.get()
                flying -= 1
                yield outcome
        finally:
            for _ in range(flying):
                done.get()

    def _keep_reading(self) -> None:
        """A reading thread: the order in which jobs are begun is the order of their work."""
        while True:
            with self._in_order:
                self._room.acquire()
                job = self._todo.get()
                self._begun.put(job)
                if job is None:
                    # For the other readers, and for the working thread when this was the last.
                    self._todo.put(None)
                    self._room.release()
                    return
            try:
                job.data.set_result(self._read(job.item))
            # Also what is no Exception: nobody else would hear of it.
            except BaseException as error:
                job.data.set_exception(error)

    def _keep_working(self) -> None:
        writes: deque[Future[None]] = deque()
        while (job := self._next()) is not None:
            try:
                value = self._worked(job)
            except BaseException as error:
                job.deliver(Outcome(job.item, error=_as_exception(error)))
                continue
            self._make_room(writes)
            writes.append(self._writers.submit(self._finish, job, value))
            del job, value
        for write in writes:
            write.result()

    def _next(self) -> _Job[Item] | None:
        started = time.perf_counter()
        job = self._begun.get()
        self.clock.idle_s += time.perf_counter() - started
        self._room.release()
        return job

    def _worked(self, job: _Job[Item]) -> Any:  # noqa: ANN401 - what `work` gives is its own
        started = time.perf_counter()
        data = job.data.result()
        read_at = time.perf_counter()
        self.clock.wait_read_s += read_at - started
        value = self._work(job.item, data)
        self.clock.work_s += time.perf_counter() - read_at
        return value

    def _make_room(self, writes: deque[Future[None]]) -> None:
        """Wait until fewer than `behind` items are being written."""
        started = time.perf_counter()
        while writes and writes[0].done():
            writes.popleft()
        while len(writes) >= self._behind:
            writes.popleft().result()
        self.clock.wait_write_s += time.perf_counter() - started

    def _finish(self, job: _Job[Item], value: Any) -> None:  # noqa: ANN401
        try:
            outcome = Outcome(job.item, written=self._write(job.item, value))
        except BaseException as error:
            outcome = Outcome(job.item, error=_as_exception(error))
        job.deliver(outcome)


def _as_exception(error: BaseException) -> Exception:
    """What ends a thread, such as SystemExit in a user's code, ends one item only."""
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


class Counter:
    """A sum to which several threads add."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """Add `n`."""
        with self._lock:
            self.total += n
