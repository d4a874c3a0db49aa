"""For tests: a local store that notes what is read from it, and a volume on such a store."""

import dataclasses
import time
from pathlib import Path

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from bigseg.volume import Volume


class CountingStore(LocalStore):
    """Notes each object read and the bytes got; can be slow, or fail once."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.got: list[str] = []
        self.asked: list[str] = []
        self.n_bytes = 0
        self.delay_s = 0.0
        self.failures: list[Exception] = []

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        self.got.append(key)
        time.sleep(self.delay_s)
        if self.failures:
            raise self.failures.pop()
        value = await super().get(key, prototype, byte_range)
        self.n_bytes += 0 if value is None else len(value)
        return value

    async def exists(self, key: str) -> bool:
        self.asked.append(key)
        return await super().exists(key)


def counted(volume: Volume) -> tuple[Volume, CountingStore]:
    """The same volume on a store that counts."""
    path = volume.array.store_path
    store = CountingStore(str(path.store.root), read_only=True)
    array = zarr.open_array(store=store, path=path.path, mode="r")
    store.got.clear()
    store.n_bytes = 0
    return dataclasses.replace(volume, array=array), store
