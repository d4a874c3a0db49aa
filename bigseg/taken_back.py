"""Which blocks were taken back, as one note: all of them at once, whatever is killed when.

    wrong        to be made again
    condemned    of those: what lies there must be erased first

Blocks are noted as half-open ranges of their numbers, [[3, 4], [7, 9]] for 3, 7 and 8. It knows
neither the ledger, which keeps the note, nor what blocks hold.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    Ranges = list[list[int]]
    Blocks = Mapping[str, Iterable[int]]

# No ledger has more.
MAX_BLOCKS = 1 << 28
# Of a stage. With all its stages the note stays within the 16 MB that metadata may have.
MOST_RANGES = 10_000


@dataclass(frozen=True)
class TakenBack:
    """Ranges of blocks by stage."""

    wrong: dict[str, Ranges] = field(default_factory=dict)
    condemned: dict[str, Ranges] = field(default_factory=dict)

    @classmethod
    def of(cls, wrong: Blocks, condemned: Blocks) -> TakenBack:
        """The note of these blocks; where they are scattered too much, of all between them, too.

        What is condemned is wrong as well. A block that was right is made again as it was.
        """
        erased = {stage: _ranges_of(blocks) for stage, blocks in condemned.items()}
        stages = sorted(wrong.keys() | erased.keys())
        again = {
            stage: _ranges_of([*wrong.get(stage, ()), *blocks_in(erased.get(stage, []))])
            for stage in stages
        }
        return cls(again, erased)

    @classmethod
    def from_json(cls, note: Any) -> TakenBack:  # noqa: ANN401 - whatever the store holds
        """The note that `as_json` gave; nothing taken back where there is none.

        Raises:
            ValueError, TypeError, KeyError: it is no such note.
        """
        return cls(_checked(note["wrong"]), _checked(note["condemned"])) if note else cls()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"wrong": self.wrong, "condemned": self.condemned}

    def joined(self, wrong: Blocks, condemned: Blocks) -> TakenBack:
        """The note of these blocks and of those that it has."""
        return TakenBack.of(_joined(self.wrong, wrong), _joined(self.condemned, condemned))


def blocks_in(ranges: Ranges) -> Iterator[int]:
    """The numbers in ranges."""
    return itertools.chain.from_iterable(range(start, stop) for start, stop in ranges)


def _checked(noted: Any) -> dict[str, Ranges]:  # noqa: ANN401
    ranges = {
        str(stage): [[int(a), int(b)] for a, b in part] for stage, part in dict(noted).items()
    }
    if not all(0 <= a < b <= MAX_BLOCKS for part in ranges.values() for a, b in part):
        raise ValueError("it notes blocks that cannot be")
    return ranges


def _joined(ranges: Mapping[str, Ranges], blocks: Blocks) -> dict[str, list[int]]:
    stages = sorted(ranges.keys() | blocks.keys())
    return {s: [*blocks_in(ranges.get(s, [])), *blocks.get(s, ())] for s in stages}


def _ranges_of(blocks: Iterable[int]) -> Ranges:
    """The ranges that hold these numbers: exactly, or one of all where that would be too many."""
    numbers = np.unique(np.fromiter(blocks, np.int64))
    if not len(numbers):
        return []
    gaps = np.flatnonzero(np.diff(numbers) > 1)
    if len(gaps) >= MOST_RANGES:
        gaps = gaps[:0]
    starts = numbers[np.concatenate([[0], gaps + 1])]
    stops = numbers[np.concatenate([gaps, [len(numbers) - 1]])] + 1
    ranges: Ranges = np.stack([starts, stops], axis=1).tolist()
    return ranges
