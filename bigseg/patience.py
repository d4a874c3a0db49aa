"""Which errors of a store pass by themselves, which never do, and waiting for the former.

    transient   no answer, a broken connection, 429 and 5xx, a stale network mount     tried again
    permanent   no permission (403), no space, read only                               ends the run
    other       nothing there, damaged, a bug                                          not ours

It knows errors by their type and number, and nothing of stores, images or blocks. Stores retry by
themselves, within seconds; this is for those that are away for half a minute.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec
from zarr.storage import WrapperStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACK_OFF_S = (1.0, 4.0, 12.0)
"""Mean pauses before the second, third and fourth try."""

IMPATIENT_S = 60.0
"""For so long after a store was given up, each call is tried once, until one is answered."""

_PERMANENT = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
}
_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# Of botocore and aiohttp, which are not always there.
_TRANSIENT_NAMES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionClosedError",
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseStreamingError",
}


# s3fs tries five times by itself, and botocore each of those five times, with timeouts of a minute:
# together they would keep a run waiting for half an hour before anyone hears of it.
_BRIEF = {
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 20, "retries": {"max_attempts": 1}},
    # With more, s3fs asks for the size of every object before it reads it, and where there is none
    # for a list too (2026.9). Chunks are read many at a time as it is.
    "max_concurrency": 1,
}


def keep_stores_brief() -> None:
    """Have fsspec's stores ask once and give up in good time, where the user says nothing else."""
    for protocol in ("s3", "s3a"):
        settings = fsspec.config.conf.setdefault(protocol, {})
        for name, value in _BRIEF.items():
            settings.setdefault(name, value)


def is_permanent(error: BaseException) -> bool:
    """Whether trying again is of no use to anyone: no permission, no space, read only."""
    return any(
        isinstance(e, PermissionError) or (isinstance(e, OSError) and e.errno in _PERMANENT)
        for e in _with_causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a while."""
    return not is_permanent(error) and any(map(_passes, _with_causes(error)))


def patiently(call: Callable[[], T]) -> T:
    """What `call` gives; called again after a pause where it met an error that passes."""
    for pause_s in _pauses():
        try:
            return _noted(call())
        except Exception as error:
            if not is_transient(error):
                raise
            _tell(error, pause_s)
            time.sleep(pause_s)
    with _last_try():
        return _noted(call())


class PatientStore(WrapperStore[Any]):
    """A Zarr store that waits for errors that pass."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """What is stored under a key, or a part of it."""
        return await _patiently(lambda: self._store.get(key, prototype, byte_range))

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Parts of what is stored under keys."""
        wanted = list(key_ranges)
        return await _patiently(lambda: self._store.get_partial_values(prototype, wanted))

    async def exists(self, key: str) -> bool:
        """Whether something is stored under a key."""
        return await _patiently(lambda: self._store.exists(key))

    async def set(self, key: str, value: Buffer) -> None:
        """Store a value, whole."""
        await _patiently(lambda: self._store.set(key, value))

    async def delete(self, key: str) -> None:
        """Delete what is stored under a key."""
        await _patiently(lambda: self._store.delete(key))


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    for pause_s in _pauses():
        try:
            return _noted(await call())
        except Exception as error:
            if not is_transient(error):
                raise
            _tell(error, pause_s)
            await asyncio.sleep(pause_s)
    with _last_try():
        return _noted(await call())


def _pauses() -> Iterator[float]:
    """Each other by chance, so that workers do not all come back at once.

    None where a store was given up a moment ago: many calls would each wait for it in vain.
    """
    if time.monotonic() - _away.since_s < IMPATIENT_S:
        return iter(())
    return (pause_s * random.uniform(0.5, 1.5) for pause_s in BACK_OFF_S)


class _Away:
    """When this process last gave a store up that has not answered since."""

    since_s = -math.inf


_away = _Away()


def _noted(answer: T) -> T:
    _away.since_s = -math.inf
    return answer


@contextmanager
def _last_try() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_transient(error):
            _away.since_s = time.monotonic()
        raise


def _tell(error: Exception, pause_s: float) -> None:
    logger.info("a store did not answer (%s); next try in %.1f s", error, pause_s)


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _passes(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT:
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int) and (status == 429 or status >= 500):
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)
