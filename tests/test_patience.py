"""Errors that pass are waited for; those that do not are told at once."""

import errno

import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore, WrapperStore

from bigseg import patience as room
from bigseg.errors import InputError, OutputError
from bigseg.patience import PatientStore, is_permanent, is_transient, patiently


class EndpointConnectionError(Exception):
    """Like botocore's: told by the name of a base."""


class ClientConnectionError(Exception):
    """Like aiohttp's."""


class ServerDisconnectedError(ClientConnectionError):
    pass


class ClientResponseError(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


TRANSIENT = [
    TimeoutError("no answer"),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.EBUSY, "SlowDown"),
    ServerDisconnectedError("gone"),
    ClientResponseError(503),
    ClientResponseError(429),
]
PERMANENT = [
    PermissionError("Forbidden"),
    OSError(errno.ENOSPC, "no space left"),
    OSError(errno.EDQUOT, "quota"),
    OSError(errno.EROFS, "read only"),
    OSError(errno.EFBIG, "file too large"),
]
OTHER = [
    FileNotFoundError("no such key"),
    ValueError("damaged"),
    RuntimeError("damaged"),
    ClientResponseError(404),
    KeyError("x"),
    OSError("without a number"),
]


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(room, "BACK_OFF_S", (0.001, 0.001, 0.001))
    monkeypatch.setattr(room, "_away", room._Away())


@pytest.mark.parametrize("error", TRANSIENT + PERMANENT + OTHER, ids=repr)
def test_each_error_has_one_kind(error):
    assert is_transient(error) == (error in TRANSIENT)
    assert is_permanent(error) == (error in PERMANENT)


def wrapped(error):
    try:
        try:
            raise error
        except Exception as inner:
            raise OutputError("block 7 cannot be written") from inner
    except OutputError as outer:
        return outer


def hidden(error):
    try:
        try:
            raise error
        except Exception:
            raise InputError("cannot be read") from None
    except InputError as outer:
        return outer


@pytest.mark.parametrize("wrap", [wrapped, hidden])
def test_the_cause_decides_also_behind_our_own_errors(wrap):
    assert is_permanent(wrap(OSError(errno.ENOSPC, "no space")))
    assert is_transient(wrap(TimeoutError()))
    assert not is_transient(wrap(ValueError("damaged")))
    # Who sees both is not to wait.
    both = wrap(OSError(errno.EROFS, "read only"))
    both.__cause__ = both.__context__
    both.__context__.__context__ = TimeoutError()
    assert is_permanent(both)
    assert not is_transient(both)


def failing(errors, value="there"):
    left = list(errors)

    def call():
        if left:
            raise left.pop(0)
        return value

    return call


@pytest.mark.parametrize("n", [0, 1, 3])
def test_what_passes_is_tried_again_up_to_three_times(n):
    assert patiently(failing([TimeoutError()] * n)) == "there"


def test_what_does_not_pass_in_time_is_raised():
    with pytest.raises(TimeoutError):
        patiently(failing([TimeoutError()] * 4))


def test_a_store_that_was_given_up_is_asked_once_until_it_answers():
    with pytest.raises(TimeoutError):
        patiently(failing([TimeoutError()] * 4))
    call = failing([TimeoutError()] * 2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            patiently(call)
    assert patiently(call) == "there"
    assert patiently(failing([TimeoutError()] * 3)) == "there"


@pytest.mark.parametrize("error", PERMANENT + OTHER, ids=repr)
def test_other_errors_are_raised_at_once(error):
    call = failing([error])
    with pytest.raises(type(error)):
        patiently(call)
    assert call() == "there"


class Flaky(WrapperStore):
    """Fails the first calls on each key."""

    def __init__(self, store, error, n):
        super().__init__(store)
        self.error, self.n, self.calls = error, n, {}

    def _with_store(self, store):
        return type(self)(store, self.error, self.n)

    def _fail(self, what):
        self.calls[what] = self.calls.get(what, 0) + 1
        if self.calls[what] <= self.n:
            raise self.error

    async def get(self, key, prototype, byte_range=None):
        self._fail(("get", key, str(byte_range)))
        return await super().get(key, prototype, byte_range)

    async def set(self, key, value):
        self._fail(("set", key))
        await super().set(key, value)

    async def exists(self, key):
        self._fail(("exists", key))
        return await super().exists(key)

    async def delete(self, key):
        self._fail(("delete", key))
        await super().delete(key)


@pytest.mark.parametrize("shards", [None, (8, 8)])
def test_an_array_on_a_flaky_store_is_read_and_written_whole(shards):
    flaky = Flaky(MemoryStore(), TimeoutError("no answer"), 2)
    store = PatientStore(flaky)
    data = np.arange(256, dtype="uint16").reshape(16, 16)
    zarr.create_array(store, data=data, chunks=(4, 4), shards=shards)
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[:], data)
    np.testing.assert_array_equal(zarr.open_array(store, mode="r")[3:9, 2:11], data[3:9, 2:11])
    assert max(flaky.calls.values()) > 2
    assert store.with_read_only(True).read_only


def test_a_forbidden_store_is_asked_once():
    flaky = Flaky(MemoryStore(), PermissionError("Forbidden"), 100)
    with pytest.raises(PermissionError):
        zarr.create_array(PatientStore(flaky), shape=(4,), chunks=(4,), dtype="u1")
    assert set(flaky.calls.values()) == {1}


def test_stores_ask_once_for_an_object_unless_the_user_says_otherwise(monkeypatch):
    conf = {"s3": {"max_concurrency": 4, "anon": True}}
    monkeypatch.setattr(room.fsspec.config, "conf", conf)
    room.keep_stores_brief()
    room.keep_stores_brief()
    assert conf["s3"]["max_concurrency"] == 4
    assert conf["s3"]["anon"]
    assert conf["s3a"]["max_concurrency"] == 1
    assert conf["s3"]["config_kwargs"] == conf["s3a"]["config_kwargs"]
