"""A kill at each of the moments at which a process changes what lies on disk."""

import itertools

from zarr.storage import LocalStore

from bigseg import durable


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at_write(patch, n):
    """Before the n-th file from now on is written, or deleted by Zarr, `Killed` is raised.

    Locks do not count: their beats come at any time.
    """
    numbers = itertools.count(1)
    write, delete = durable.write_durably, LocalStore.delete

    def strike(path):
        if path.suffix != ".lock" and next(numbers) == n:
            raise Killed

    def write_or_die(path, data):
        strike(path)
        write(path, data)

    async def delete_or_die(self, key):
        strike(self.root / key)
        await delete(self, key)

    patch.setattr(durable, "write_durably", write_or_die)
    patch.setattr(LocalStore, "delete", delete_or_die)
