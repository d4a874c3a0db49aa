"""What earlier stages wrote, read only where it is still there.

An object that is gone reads as zeros, and would pass for a place where there is nothing:

    its own core      is all compared with what its block left: a mark, or a number of components
    around it         is asked about where an array has nothing but zeros, and no object

So what was deleted between two stages, or between two runs, ends in an error and not in a result.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import store
from bigseg.borders import touching
from bigseg.ledger import EMPTY_MARK, NOT_DONE, Ledger, checksum_of
from bigseg.presence import Presence
from bigseg.scratch import array_url, lost, open_array, read_array

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.plan import Plan

# Blocks that were compared because of a doubt, and need not be again.
REMEMBERED = 4096


class IntactVolume:
    """One of the arrays of a plan; safe in several threads.

    `holds` says whether a block wrote anything, `is_whole` whether that is what all channels of its
    core (c, t, z, y, x) hold.
    """

    def __init__(
        self,
        plan: Plan,
        url: str,
        *,
        holds: Callable[[int], bool],
        is_whole: Callable[[int, NDArray[Any]], bool],
    ) -> None:
        self._plan, self._grid, self._volume = plan, plan.grid, open_array(plan, url)
        self._channels = range(self._volume.n_channels)
        self._presences = [Presence(self._volume, (c,)) for c in self._channels]
        self._holds, self._is_whole = holds, is_whole
        self._resolve = functools.lru_cache(REMEMBERED)(self._compare_all)

    def read(self, region: Region, block: int) -> NDArray[Any]:
        """All channels (c, t, z, y, x) of a region that holds a block's part of the plan's region.

        Raises:
            OutputError: what blocks wrote there was deleted, changed or damaged.
        """
        values = self._read(region)
        for number in touching(self._grid, region):
            core = self._grid[number].core
            place = core.intersect(region)
            part = values[(slice(None), *place.relative_to(region.start).slices)]
            if number == block:
                self._compare(number, _widened(part, place, core))
            elif self._leaves_doubt(number, part, place):
                self._resolve(number)
        return values

    def _leaves_doubt(self, number: int, part: NDArray[Any], place: Region) -> bool:
        blank = [p for p, values in zip(self._presences, part, strict=True) if not values.any()]
        return (
            bool(blank)
            and self._holds(number)
            and any(presence.absent([place], []) for presence in blank)
        )

    def _compare_all(self, number: int) -> None:
        self._compare(number, self._read(self._grid[number].core))

    def _compare(self, number: int, values: NDArray[Any]) -> None:
        if not self._is_whole(number, values):
            raise lost(self._plan, self._volume.url, self._grid[number].core)

    def _read(self, region: Region) -> NDArray[Any]:
        return read_array(self._plan, self._volume, region, self._channels)


def marked(plan: Plan, stage: str, url: str) -> IntactVolume:
    """What a stage wrote whose marks are the checksums of its voxels."""
    ledger = Ledger.open(store.join(plan.output.url, "ledger"), read_only=True)

    def mark_of(block: int) -> int:
        return NOT_DONE if ledger is None else ledger.checksum(stage, block)

    def is_whole(block: int, values: NDArray[Any]) -> bool:
        mark = mark_of(block)
        if mark == EMPTY_MARK:
            return not values.any()
        return mark in (NOT_DONE, checksum_of(np.ascontiguousarray(values).data))

    return IntactVolume(
        plan, url, holds=lambda b: mark_of(b) not in (NOT_DONE, EMPTY_MARK), is_whole=is_whole
    )


def numbered(plan: Plan, name: str, count: Callable[[int], int]) -> IntactVolume:
    """Components, numbered 1 to `count` in each block."""
    return IntactVolume(
        plan,
        array_url(plan, name),
        holds=lambda block: count(block) > 0,
        is_whole=lambda block, values: int(values.max(initial=0)) == count(block),
    )


def _widened(part: NDArray[Any], place: Region, core: Region) -> NDArray[Any]:
    """A part (c, t, z, y, x) of a core as the whole of it, 0 beside it."""
    if place == core:
        return part
    whole = np.zeros((len(part), *core.shape), part.dtype)
    whole[(slice(None), *place.relative_to(core.start).slices)] = part
    return whole
