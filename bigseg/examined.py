"""A result under examination: which of its blocks are done, and which turn out to be wrong.

    predict     |     |wrong|     |     |
    pyramid-1   |   wrong   |           |      made from it
    pyramid-2   |         wrong         |

Samples are drawn among blocks against which nothing is known, so that one fault is told once. In
the end all that is wrong is taken back in the ledger, under the lock of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import BlockGrid, Region
from bigseg.borders import draw_place, scaled, touching
from bigseg.errors import InputNotFoundError, LockedError
from bigseg.ledger import EMPTY_MARK, NOT_DONE, Ledger
from bigseg.lock import Lock
from bigseg.plan import NUMBER, PREDICT, stage_grids
from bigseg.results import erase_condemned, ledger_url
from bigseg.scratch import predicted_url
from bigseg.volume import open_volume, unlist_label

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.borders import Place
    from bigseg.plan import Plan
    from bigseg.volume import Volume

# How often something is drawn for each one that is wanted, where blocks are missing or wrong.
DRAWS = 8
# Of four places two lie across a face, one across an edge, one across a corner.
N_AXES = (1, 2, 1, 3)


@dataclass(frozen=True)
class Examined:
    """The blocks of each stage, their levels, and their marks as they were read.

    `plan` is for where the result lies now, and `image` the image that lists it, if any. `wrong`
    are the blocks to be made again, by stage; `condemned` are those of them of which nothing can
    stay.
    """

    plan: Plan
    image: str | None
    stored_plan: dict[str, Any]
    grids: dict[str, BlockGrid]
    levels: dict[str, Volume]
    marks: dict[str, NDArray[np.uint32]]
    wrong: dict[str, set[int]] = field(default_factory=dict)
    condemned: dict[str, set[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, ledger: Ledger, image: str | None) -> Examined:
        """The result of a plan, whose metadata were found right; it may have no labels yet."""
        levels = {PREDICT: _probabilities(plan)} if plan.keeps_probabilities else {}
        if plan.instances is None or ledger.n_done(NUMBER):
            finest = open_volume(plan.output.url)
            names = [plan.finest_stage, *(f"pyramid-{k}" for k in range(1, finest.n_levels))]
            levels |= {stage: finest.at(k) for k, stage in enumerate(names)}
        every = stage_grids(plan)
        grids = {stage: every[stage] for stage in levels}
        marks = {
            stage: np.fromiter(
                (ledger.checksum(stage, i) for i in range(len(grid))), np.uint32, len(grid)
            )
            for stage, grid in grids.items()
        }
        return cls(plan, image, ledger.plan, grids, levels, marks)

    @property
    def seam_stage(self) -> str:
        """The stage whose voxels are compared with one forward pass."""
        return next(iter(self.grids))

    def _finer_than(self, stage: str) -> str:
        """The stage that wrote the level below."""
        finer = self.levels[stage].level - 1
        return f"pyramid-{finer}" if finer else self.plan.finest_stage

    def read(self, stage: str, region: Region) -> NDArray[Any]:
        """What is stored at a region of the level that a stage made (c, t, z, y, x)."""
        level = self.levels[stage]
        return level.read(region, range(level.n_channels))

    def blame(self, stage: str, blocks: Iterable[int]) -> None:
        """Note blocks as wrong, and those of all coarser levels that were made from them."""
        if stage == PREDICT and self.plan.instances is not None:
            self._blame_all(blocks)
            return
        stages = list(self.grids)
        coarser = stages[stages.index(stage) + 1 :]
        shape = self.levels[stage].shape
        for block in blocks:
            self.wrong.setdefault(stage, set()).add(block)
            core = self.grids[stage][block].core
            for other in coarser:
                above = scaled(core, shape, self.levels[other].shape)
                done = (i for i in touching(self.grids[other], above) if self._is_done(other, i))
                self.wrong.setdefault(other, set()).update(done)

    def _blame_all(self, blocks: Iterable[int]) -> None:
        """Note blocks of probabilities as wrong, and with them every object: any can reach far."""
        self.wrong.setdefault(PREDICT, set()).update(blocks)
        for stage, grid in self.grids.items():
            if stage != PREDICT:
                done = (i for i in range(len(grid)) if self._is_done(stage, i))
                self.wrong.setdefault(stage, set()).update(done)

    def condemn(self, stage: str, block: int) -> None:
        """Blame a block of which what lies there must go before it is made again.

        Why it must is said in `erase_condemned`.
        """
        self.condemned.setdefault(stage, set()).add(block)
        self.blame(stage, [block])

    def is_right(self, stage: str, region: Region) -> bool:
        """Whether all blocks that touch a region are done, and nothing is known against them."""
        wrong = self.wrong.get(stage, ())
        blocks = touching(self.grids[stage], region)
        return all(self._is_done(stage, i) and i not in wrong for i in blocks)

    def draw_chunks(self, n: int, rng: np.random.Generator) -> list[tuple[str, int, Region]]:
        """Different chunks of coarser levels: stage, block, and the chunk's region of the level.

        Their blocks, and those below, are right so far.
        """
        drawn: dict[tuple[str, Region], int] = {}
        for stage, block, chunk in self._candidates(n, rng):
            if len(drawn) == n:
                break
            level, finer = self.levels[stage], self._finer_than(stage)
            below = scaled(chunk, level.shape, self.levels[finer].shape)
            if self.is_right(stage, chunk) and self.is_right(finer, below):
                drawn[stage, chunk] = block
        return [(stage, block, chunk) for (stage, chunk), block in drawn.items()]

    def draw_places(self, n: int, sides: Sequence[int], rng: np.random.Generator) -> list[Place]:
        """Different boxes across borders of blocks that hold something; all blocks right so far."""
        stage = self.seam_stage
        grid, marks = self.grids[stage], self.marks[stage]
        holding = np.flatnonzero((marks != NOT_DONE) & (marks != EMPTY_MARK))
        drawn: dict[Region, Place] = {}
        for _ in range(DRAWS * n if len(holding) else 0):
            if len(drawn) == n:
                break
            block = grid[int(rng.choice(holding))]
            n_axes = N_AXES[len(drawn) % len(N_AXES)]
            place = draw_place(grid, block, sides, n_axes=n_axes, rng=rng)
            if self.is_right(stage, place.box):
                drawn[place.box] = place
        return list(drawn.values())

    def take_back(self) -> int:
        """Let what is wrong be made again by the next run; gives how many blocks.

        Raises:
            LockedError: a run has begun in the meantime, or has changed what was examined.
            OutputError: it cannot be written.
        """
        if not self.wrong:
            return 0
        url = self.plan.output.url
        with Lock.acquire(url) as lock:
            ledger = Ledger.open(ledger_url(url), guard=lock.check)
            if ledger is None or ledger.plan != self.stored_plan or not self._is_as_read(ledger):
                raise LockedError(
                    f"{url} was changed by another run while it was verified: verify it again"
                )
            if self.image is not None:
                unlist_label(self.image, self.plan.output.name)
            wrong = {stage: sorted(blocks) for stage, blocks in self.wrong.items()}
            if PREDICT in self.wrong:
                for stage in ledger.stages.keys() - self.grids.keys():
                    wrong[stage] = np.flatnonzero(~ledger.pending(stage)).tolist()
            ledger.take_back(wrong, self.condemned)
            erase_condemned(self.plan, ledger)
        return sum(map(len, wrong.values()))

    def _is_done(self, stage: str, block: int) -> bool:
        return bool(self.marks[stage][block] != NOT_DONE)

    def _is_as_read(self, ledger: Ledger) -> bool:
        return all(
            ledger.checksum(stage, block) == self.marks[stage][block]
            for stage, blocks in self.wrong.items()
            if stage in self.marks
            for block in blocks
        )

    def _candidates(self, n: int, rng: np.random.Generator) -> Iterator[tuple[str, int, Region]]:
        """Chunks of blocks of coarser levels that are done: all in any order, or many draws."""
        done = [
            (stage, int(block))
            for stage, marks in self.marks.items()
            if self.levels[stage].level
            for block in np.flatnonzero(marks != NOT_DONE)
        ]
        if len(done) <= n:
            every = [(*at, chunk.core) for at in done for chunk in self._chunks_of(*at)]
            yield from (every[i] for i in rng.permutation(len(every)))
            return
        for _ in range(DRAWS * n):
            at = done[int(rng.integers(len(done)))]
            chunks = self._chunks_of(*at)
            yield (*at, chunks[int(rng.integers(len(chunks)))].core)

    def _chunks_of(self, stage: str, block: int) -> BlockGrid:
        return BlockGrid(self.grids[stage][block].core, self.levels[stage].chunk_shape)


def _probabilities(plan: Plan) -> Volume:
    """Those that were kept beside the labels."""
    try:
        return open_volume(predicted_url(plan))
    except InputNotFoundError:
        raise InputNotFoundError(
            f"{predicted_url(plan)} is gone, from which the labels were made: bring it back from a "
            "copy, or segment anew with --overwrite"
        ) from None
