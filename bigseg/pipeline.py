"""Read ▸ work ▸ write with bounded queues; knows neither network nor Zarr.

    reader thread   read 3 ──┐
    this thread              └── work 2 ──┐
    writer thread                         └── write 1

With `depth` 1 at most four items are in memory: one read ahead and one being read, one worked on,
one being written. A failure belongs to its item: the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Read = TypeVar("Read")
Worked = TypeVar("Worked")
Written = TypeVar("Written")


@dataclass(frozen=True)
class Outcome(Generic[Item, Written]):
    """What became of one item: `written`, or the error that it met."""

    item: Item
    written: Written | None = None
    error: Exception | None = None


@dataclass
class Clock:
    """Seconds that the working thread spent at work and waiting, summed over items."""

    work_s: float = 0.0
    wait_read_s: float = 0.0
    wait_write_s: float = 0.0


def run_pipeline(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Worked],
    write: Callable[[Item, Worked], Written],
    *,
    depth: int = 1,
    clock: Clock | None = None,
) -> Iterator[Outcome[Item, Written]]:
    """Each item read, worked on and written, in order; the three steps of neighbours overlap.

    `work` runs in the calling thread. When the generator is closed early, the items in flight are
    finished.
    """
    clock = clock or Clock()
    source = iter(items)
    reads: deque[tuple[Item, Future[Read]]] = deque()
    writes: deque[tuple[Item, Future[Written]]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:

        def read_ahead() -> None:
            for item in islice(source, depth + 1 - len(reads)):
                reads.append((item, reader.submit(read, item)))

        read_ahead()
        while reads:
            item, fetched = reads.popleft()
            read_ahead()
            started = time.perf_counter()
            try:
                data = fetched.result()
                clock.wait_read_s += time.perf_counter() - started
                started = time.perf_counter()
                value = work(item, data)
            except Exception as error:
                yield Outcome(item, error=error)
                continue
            del data
            clock.work_s += time.perf_counter() - started
            writes.append((item, writer.submit(write, item, value)))
            while writes and (len(writes) > depth or writes[0][1].done()):
                yield _finished(*writes.popleft(), clock)
        while writes:
            yield _finished(*writes.popleft(), clock)


def _finished(item: Item, future: Future[Written], clock: Clock) -> Outcome[Item, Written]:
    started = time.perf_counter()
    try:
        return Outcome(item, written=future.result())
    except Exception as error:
        return Outcome(item, error=error)
    finally:
        clock.wait_write_s += time.perf_counter() - started
