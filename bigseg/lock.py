"""One writer for one output: a small file beside it that says who writes it.

    <parent>/.<name>.lock    owner, host, process, generation, time of the last beat, notes

The owner renews it every few seconds. A second run is refused while the owner lives. A dead owner's
lock is taken over: at once where its process is known to be gone, else when its beat has stood
still for `stale_s`. Whoever takes over writes the file anew and looks again after a moment, so of
several at once only the last goes on. An owner that was only paused finds another name in the file
at its next `check`, and stops.

Times of two machines are never compared alone: a beat that looks old is watched for a while.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigseg import store
from bigseg.errors import InputError, InputNotFoundError, LockedError, OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

logger = logging.getLogger(__name__)

BEAT_S = 10.0
STALE_S = 60.0
SETTLE_S = 1.0
MAX_LOCK_BYTES = 1 << 16


def lock_url(output_url: str) -> str:
    """Where the lock of an output lies."""
    head, slash, name = output_url.rstrip("/").rpartition("/")
    return f"{head}{slash}.{name}.lock"


@dataclass(frozen=True)
class LockState:
    """What a lock says: who owns it, when it was last renewed, and what the owner notes."""

    owner: str
    host: str
    machine: str
    pid: int
    process_start: int
    generation: int
    beat: int
    time_s: float
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def age_s(self) -> float:
        """Seconds since the last beat, by this machine's clock."""
        return time.time() - self.time_s

    @property
    def is_gone(self) -> bool:
        """Whether the owner's process is known to have ended: only its own machine knows."""
        return self.machine == _machine() and _start_of(self.pid) != self.process_start

    @property
    def is_alive(self) -> bool:
        """Whether the owner lives, as far as can be told without waiting."""
        return not self.is_gone and abs(self.age_s) < STALE_S


def read_lock(output_url: str) -> LockState | None:
    """The lock of an output; None where there is none."""
    try:
        text = store.read_bytes(lock_url(output_url), limit_bytes=MAX_LOCK_BYTES)
    except InputNotFoundError:
        return None
    try:
        return LockState(**json.loads(text))
    except (ValueError, TypeError):
        # Written whole or not at all, so this was not written by bigseg: nobody who lives.
        return LockState("", "unknown", "", 0, 0, 0, 0, 0.0)


class Lock:
    """The right to write an output, held until `release`; a context manager."""

    def __init__(self, output_url: str, state: LockState, beat_s: float) -> None:
        self._url = output_url
        self._state = state
        self._beat_s = beat_s
        self._made: str | None = None
        self._acquired_s = time.time()
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, output_url: str, *, beat_s: float = BEAT_S, stale_s: float = STALE_S) -> Self:
        """The lock of an output.

        Raises:
            LockedError: another run lives on it; names it.
            OutputError: the place cannot be written.
        """
        with _placing(output_url):
            return cls._acquire(output_url, beat_s, stale_s)

    @classmethod
    def _acquire(cls, output_url: str, beat_s: float, stale_s: float) -> Self:
        mine = _my_state()
        parent = store.parent(lock_url(output_url))
        made = not store.exists(parent)
        while True:
            there = read_lock(output_url)
            if there is None:
                if _create(output_url, mine):
                    lock = cls(output_url, mine, beat_s)
                    lock._made = parent if made else None
                    return lock
                continue
            _wait_for_its_end(output_url, there, beat_s, stale_s)
            mine = replace(mine, generation=there.generation + 1)
            _put(output_url, mine)
            time.sleep(min(SETTLE_S, stale_s))
            _refuse_others(output_url, mine)
            logger.warning(
                "took over %s from a run on %s (process %d) that ended without finishing",
                output_url,
                there.host,
                there.pid,
            )
            return cls(output_url, mine, beat_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def owner(self) -> str:
        """The name of this holder: what `check_owner` wants to find."""
        return self._state.owner

    def check(self) -> None:
        """Make sure that the output is still this run's.

        Raises:
            LockedError: another run has taken it over.
        """
        check_owner(self._url, self.owner)

    def note(self, **values: Any) -> None:  # noqa: ANN401
        """What the next beats say besides, such as how far the run is."""
        with self._writing:
            self._state = replace(self._state, notes={**self._state.notes, **values})

    def release(self) -> None:
        """Give it back; one that another run has taken over stays."""
        self._ended.set()
        self._thread.join()
        try:
            there = read_lock(self._url)
            if there is not None and there.owner == self.owner:
                store.remove_file(lock_url(self._url))
                self._sweep()
                # A run that wrote nothing leaves nothing.
                if self._made is not None and store.is_empty(self._made):
                    store.remove(self._made)
        except (InputError, OutputError) as error:
            logger.warning("the lock of %s could not be removed: %s", self._url, error)

    def _sweep(self) -> None:
        """Remove what earlier owners left that were killed while they wrote their lock."""
        place = lock_url(self._url)
        store.sweep(
            store.parent(place),
            prefix=f".{store.name_of(place)}.",
            deep=False,
            before_s=self._acquired_s,
        )

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self._beat()
            except LockedError:
                return
            except (InputError, OutputError) as error:
                # The run goes on while others do not take it for dead.
                logger.info("a heartbeat was lost: %s", error)

    def _beat(self) -> None:
        self.check()
        with self._writing:
            self._state = replace(self._state, beat=self._state.beat + 1, time_s=time.time())
            state = self._state
        if not self._ended.is_set():
            _put(self._url, state)


@contextmanager
def holding(url: str, *, patience_s: float = 60.0) -> Iterator[Lock]:
    """The lock of something that is written in a moment, as soon as others let go of it.

    Raises:
        LockedError: another run still holds it after `patience_s`.
        OutputError: the place cannot be written.
    """
    end_s = time.monotonic() + patience_s
    while True:
        try:
            lock = Lock.acquire(url)
            break
        except LockedError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.1)
    with lock:
        yield lock


def check_owner(output_url: str, owner: str) -> None:
    """Make sure that the lock of an output is still `owner`'s.

    Raises:
        LockedError: another run has taken it over, or it was removed.
    """
    there = read_lock(output_url)
    if there is None or there.owner != owner:
        who = "nobody" if there is None else f"a run on {there.host} (process {there.pid})"
        raise LockedError(
            f"{output_url} is no longer this run's, {who} has it now: this run was taken for dead "
            "and writes nothing more"
        )


@contextmanager
def _placing(output_url: str) -> Iterator[None]:
    """Say of the output, not of its lock, why it cannot be written."""
    try:
        yield
    except LockedError:
        raise
    except (InputError, OutputError) as error:
        cause = error.__cause__ or error.__context__
        reason = getattr(cause, "strerror", None) or str(cause or error)
        raise OutputError(
            f"{output_url} cannot be written: {reason}; check rights and space or give another "
            "output"
        ) from error


def _my_state() -> LockState:
    pid = os.getpid()
    return LockState(
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        process_start=_start_of(pid),
        generation=1,
        beat=0,
        time_s=time.time(),
    )


def _create(output_url: str, mine: LockState) -> bool:
    """Whether it was not there; a store that lost its answer to the first try is no other run."""
    if store.create_file(lock_url(output_url), _encode(mine)):
        return True
    there = read_lock(output_url)
    return there is not None and there.owner == mine.owner


def _wait_for_its_end(output_url: str, there: LockState, beat_s: float, stale_s: float) -> None:
    """Return when the owner is dead.

    Raises:
        LockedError: it lives.
    """
    if there.is_gone or not there.owner:
        return
    if abs(there.age_s) < stale_s:
        raise _refused(output_url, there)
    if there.machine == _machine():
        # One clock, and no beat for long: stopped, or hanging.
        return
    time.sleep(1.5 * beat_s)
    now = read_lock(output_url)
    if now is not None and (now.owner, now.beat) != (there.owner, there.beat):
        raise _refused(output_url, now)


def _refuse_others(output_url: str, mine: LockState) -> None:
    now = read_lock(output_url)
    if now is None or now.owner != mine.owner:
        raise _refused(output_url, now or mine)


def _refused(output_url: str, there: LockState) -> LockedError:
    return LockedError(
        f"{output_url} is being written by a run on {there.host} (process {there.pid}, last sign "
        f"of life {max(0.0, there.age_s):.0f} s ago): wait for its end, or stop it"
    )


def _put(output_url: str, state: LockState) -> None:
    store.write_atomic(lock_url(output_url), _encode(state))


def _encode(state: LockState) -> bytes:
    return json.dumps(asdict(state)).encode()


@lru_cache
def _machine() -> str:
    """This boot of this machine, and its namespace of processes: where a pid means the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _start_of(pid: int) -> int:
    """When a process of this machine started, in the kernel's ticks; 0 where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0 if Path("/proc/self").exists() else _is_running(pid)
    # The name in parentheses may hold anything.
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _is_running(pid: int) -> int:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except PermissionError:
        pass
    return 1
