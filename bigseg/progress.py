"""How far a long loop is: a live bar on a terminal, a plain line now and then elsewhere.

The library gets a `Progress` injected and never chooses one; `NullProgress` says nothing. Units
are whatever the loop counts (blocks, steps); voxels, where they are told, give the rate. What was
done before the loop began (`done`) counts as done, but not in the rate. While the loop runs, the
rate and the time left are of the recent past, and what the loop says of itself stands behind them;
its last line has the rate of the whole.

    segment  412/1331 blocks  31 %  18.4 Mvox/s  busy 97 %  left 0:04:10
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, TextIO

from bigseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import rich.console
    import rich.progress

Kind = Literal["auto", "rich", "plain", "none"]

INTERVAL_S = 10.0
# The recent past is the last 30 s, or the last 20 seconds in which something was done where such
# seconds are rare: large blocks come in long and uneven intervals.
RECENT_S = 30.0
RECENT_COUNTS = 20
COUNT_EVERY_S = 1.0


class Task(Protocol):
    """One running loop."""

    def advance(self, n: int = 1, *, voxels: int = 0, note: str = "") -> None:
        """Note that `n` more units, with `voxels` voxels in them, are done.

        `note` is a short text about the loop as it is now; it is shown until the next one comes.
        """


class Progress(Protocol):
    """Where loops report."""

    def task(
        self, label: str, *, total: int, unit: str, done: int = 0
    ) -> AbstractContextManager[Task]:
        """A loop over `total` units begins, of which `done` were done earlier."""


class Display(Progress, Protocol):
    """A `Progress` that is also a context manager, and gives itself."""

    def __enter__(self) -> Progress:
        """Itself."""

    def __exit__(self, *error: object) -> None:
        """Nothing is left to close: each task closes what it opened."""


def make_progress(
    stream: TextIO,
    *,
    kind: Kind = "auto",
    clock: Callable[[], float] = time.monotonic,
    interval_s: float = INTERVAL_S,
) -> Display:
    """A progress display on `stream`; `auto` is `rich` on a terminal and `plain` elsewhere.

    `plain` writes a first line, one every `interval_s` seconds, and a last one.

    Raises:
        UsageError: unknown kind.
    """
    if kind == "auto":
        kind = "rich" if stream.isatty() else "plain"
    if kind == "rich":
        return _RichProgress(stream, clock)
    if kind == "plain":
        return _PlainProgress(stream, clock, interval_s)
    if kind == "none":
        return NullProgress()
    raise UsageError(f"progress {kind!r} is not known: choose auto, rich, plain or none")


class _Closing:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class NullProgress(_Closing):
    """Reports nothing."""

    @contextmanager
    def task(self, label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """Yields a task that ignores what it is told."""
        yield _NullTask()


class _NullTask:
    def advance(self, n: int = 1, *, voxels: int = 0, note: str = "") -> None:
        pass


@dataclass(frozen=True)
class _Count:
    """What the loop had done at a time."""

    time_s: float
    n_units: int = 0
    n_voxels: int = 0


@dataclass
class _Meter:
    """Counts, and the words for them."""

    label: str
    total: int
    unit: str
    done: int
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.start = self.now = _Count(self.clock())
        self.recent = deque([self.start])
        self.note = ""

    def add(self, n: int, voxels: int, note: str) -> None:
        self.done += n
        self.now = _Count(self.clock(), self.now.n_units + n, self.now.n_voxels + voxels)
        self.note = note or self.note
        # Loops can report far oftener than anyone looks.
        if self.now.time_s - self.recent[-1].time_s >= COUNT_EVERY_S:
            self.recent.append(self.now)
        while len(self.recent) > RECENT_COUNTS and self._is_long_ago(self.recent[1]):
            self.recent.popleft()

    def _is_long_ago(self, count: _Count) -> bool:
        return self.now.time_s - count.time_s >= RECENT_S

    def line(self, ending: str | None = None) -> str:
        """All that is known; `ending` (such as 'in') gives the time passed instead of left."""
        percent = 100
        if self.done < self.total:
            percent = min(99, round(100 * self.done / self.total))
        parts = [self.label, f"{self.done}/{self.total} {self.unit}", f"{percent} %"]
        return "  ".join([*parts, *self.tail(ending)])

    def tail(self, ending: str | None = None) -> list[str]:
        """The rate, the note and the time left, as far as they are known."""
        if ending is None:
            since, passed = self.recent[0], self.now.time_s - self.recent[0].time_s
        else:
            since, passed = self.start, self.clock() - self.start.time_s
        n_units, n_voxels = self.now.n_units - since.n_units, self.now.n_voxels - since.n_voxels
        parts = []
        if n_units and passed > 0:
            what, n = ("vox", n_voxels) if self.now.n_voxels else (self.unit, n_units)
            parts.append(_rate(n / passed, what))
        if self.note:
            parts.append(self.note)
        if ending is not None:
            parts.append(f"{ending} {_hours(passed)}")
        elif n_units:
            parts.append(f"left {_hours(passed / n_units * (self.total - self.done))}")
        return parts


@dataclass
class _PlainTask:
    meter: _Meter
    stream: TextIO
    interval_s: float

    def __post_init__(self) -> None:
        self.next_s = self.meter.start.time_s + self.interval_s

    def advance(self, n: int = 1, *, voxels: int = 0, note: str = "") -> None:
        self.meter.add(n, voxels, note)
        now = self.meter.clock()
        if now >= self.next_s:
            self.next_s = now + self.interval_s
            self.say()

    def say(self, ending: str | None = None) -> None:
        self.stream.write(self.meter.line(ending) + "\n")
        self.stream.flush()


@dataclass(frozen=True)
class _PlainProgress(_Closing):
    stream: TextIO
    clock: Callable[[], float]
    interval_s: float

    @contextmanager
    def task(self, label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        task = _PlainTask(
            _Meter(label, total, unit, done, self.clock), self.stream, self.interval_s
        )
        task.say()
        try:
            yield task
        except BaseException:
            task.say("stopped after")
            raise
        task.say("in")


@dataclass(frozen=True)
class _RichTask:
    meter: _Meter
    display: rich.progress.Progress
    task_id: rich.progress.TaskID

    def advance(self, n: int = 1, *, voxels: int = 0, note: str = "") -> None:
        self.meter.add(n, voxels, note)
        self.show()

    def show(self, ending: str | None = None) -> None:
        tail = "  ".join(self.meter.tail(ending))
        self.display.update(self.task_id, completed=self.meter.done, tail=tail)


class _RichProgress(_Closing):
    """One live display for all tasks that run at a time; finished ones stay on the screen."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console

        self._console = Console(file=stream)
        self._clock = clock
        self._display: rich.progress.Progress | None = None
        self._n_running = 0

    @contextmanager
    def task(self, label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        display = self._started()
        # A total of zero would pulse for ever.
        task_id = display.add_task(
            label, total=max(total, 1), completed=done if total else 1, unit=unit, tail=""
        )
        task = _RichTask(_Meter(label, total, unit, done, self._clock), display, task_id)
        ending = "stopped after"
        try:
            yield task
            ending = "in"
        finally:
            task.show(ending)
            self._stop(display)

    def _started(self) -> rich.progress.Progress:
        if self._display is None:
            self._display = _bars(self._console)
            self._display.start()
        self._n_running += 1
        return self._display

    def _stop(self, display: rich.progress.Progress) -> None:
        self._n_running -= 1
        if not self._n_running:
            self._display = None
            display.stop()


def _bars(console: rich.console.Console) -> rich.progress.Progress:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        progress.TextColumn("{task.percentage:>3.0f} %"),
        # A note is text: brackets in it are no markup.
        progress.TextColumn("{task.fields[tail]}", markup=False),
        console=console,
        refresh_per_second=4,
    )


def _rate(per_second: float, what: str) -> str:
    """Three digits with a decimal prefix ('18.4 Mvox/s'); slow ones by hour ('90.0 steps/h')."""
    if per_second < 0.1:
        return f"{per_second * 3600:.1f} {what}/h"
    prefix = min(4, max(0, int(math.log10(per_second) / 3 + 1e-9)))
    value = per_second / 1000**prefix
    digits = max(0, 2 - max(0, math.floor(math.log10(value) + 1e-9)))
    return f"{value:.{digits}f} {['', 'k', 'M', 'G', 'T'][prefix]}{what}/s"


def _hours(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
