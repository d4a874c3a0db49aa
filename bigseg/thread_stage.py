"""What stages without a network share: all of a block is done in the threads that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigseg.cost import Depth
from bigseg.pipeline import Counter
from bigseg.reports import Spent

if TYPE_CHECKING:
    from bigseg.blocks import Block, BlockGrid
    from bigseg.pipeline import Clock


class ThreadStage:
    """The parts of a stage that are the same for all of them; `read` and `write` are their own.

    There is no engine to keep busy, so blocks are done side by side in `n_threads` threads.
    """

    def __init__(self, grid: BlockGrid, n_threads: int) -> None:
        self.grid = grid
        self.depth = Depth(n_threads, n_threads, n_threads, n_threads)
        self.fetched, self.written = Counter(), Counter()

    def work(self, block: Block, data: Any) -> Any:  # noqa: ANN401 - what `read` gave
        """Nothing is left to do."""
        del block
        return data

    def take_filled(self, block: Block) -> tuple[str, ...]:
        """None, unless it reads the image."""
        del block
        return ()

    def spent(self, clock: Clock) -> Spent:
        """What was spent so far."""
        return Spent(
            busy_s=clock.work_s,
            wait_read_s=clock.wait_read_s,
            wait_write_s=clock.wait_write_s,
            idle_s=clock.idle_s,
            bytes_fetched=self.fetched.total,
            bytes_written=self.written.total,
        )
