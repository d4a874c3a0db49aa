"""The volume that is segmented: what becomes of its chunks that cannot be decoded.

    set-aside   the block that needs one fails, and says which; nothing is made up
    fill        its voxels are the fill value, and whoever reads it can say which they were

That is one rule for all that is read of it: blocks, the statistics of the plan, the input of a
transform. Masks, and the level of --skip-below, are never filled: there the fill value would mean
that there is nothing to segment.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from bigseg.errors import BadChunkError
from bigseg.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.blocks import Region
    from bigseg.config import OnBadChunk
    from bigseg.damage import BadChunk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceVolume(Volume):
    """A volume with a rule for chunks that cannot be decoded; several threads may read."""

    on_bad_chunk: OnBadChunk = "set-aside"
    _filled: dict[str, BadChunk] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, volume: Volume, on_bad_chunk: OnBadChunk) -> SourceVolume:
        """The same level of the same image, with a rule."""
        values = {f.name: getattr(volume, f.name) for f in fields(Volume)}
        return cls(**values, on_bad_chunk=on_bad_chunk)

    def at(self, level: int) -> SourceVolume:
        """Another level of the same image, with the same rule."""
        return self if level == self.level else self.of(super().at(level), self.on_bad_chunk)

    def filled_in(self, region: Region, channels: Sequence[int]) -> tuple[str, ...]:
        """The chunks of a region for which the fill value was read, here or in other reads."""
        # Of what is known now: another thread may add to it.
        known = list(self._filled.values())
        boxes = [self._selection(region, c, c + 1) for c in channels] if known else []
        return tuple(self._key(bad) for bad in known if any(map(bad.touches, boxes)))

    def _meet(self, bad: BadChunk) -> None:
        if self.on_bad_chunk == "set-aside":
            raise BadChunkError(
                f"{self._sentence(bad)}: restore it from a copy, or use --on-bad-chunk fill to "
                "segment its voxels as the fill value"
            )
        if not self._filled:
            logger.warning(
                "%s: its voxels are read as the fill value, as are those of all such chunks",
                self._sentence(bad),
            )
        self._filled[bad.key] = bad
