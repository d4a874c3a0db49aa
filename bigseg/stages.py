"""What one block of a stage does, in whichever process: predict a core, downsample a core.

A worker is made from the plan alone and opens everything itself. Its `run` takes block numbers and
gives small reports; voxels go storage -> worker -> storage.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from bigseg.decoding import set_codec_threads
from bigseg.grow_stages import FillStage, GrowStage, HolesStage
from bigseg.lock import check_owner
from bigseg.pipeline import Clock, Pipeline
from bigseg.plan import FILL, GROW, HOLES, PREDICT, SEEDS, STITCH, STITCH_HOLES
from bigseg.predict_stage import PredictStage
from bigseg.pyramid_stage import PyramidStage
from bigseg.reports import BlockReport, Spent, report_of
from bigseg.seed_stages import SeedsStage, StitchStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bigseg.blocks import Block, BlockGrid
    from bigseg.cost import Depth
    from bigseg.plan import Plan
    from bigseg.transform import Transform


class _LeftOut(Exception):
    """A block that was read ahead, and is not needed any more."""


class Stage(Protocol):
    """One stage of the way: a grid of blocks, each read, worked on and written."""

    grid: BlockGrid
    depth: Depth

    def read(self, block: Block) -> Any:  # noqa: ANN401 - what a stage hands on is its own
        """What the block needs, from storage."""

    def work(self, block: Block, data: Any) -> Any:  # noqa: ANN401
        """What the block writes."""

    def write(self, block: Block, result: Any) -> int:  # noqa: ANN401
        """Write it; returns its mark."""

    def take_filled(self, block: Block) -> tuple[str, ...]:
        """The chunks of the input that cannot be decoded and were filled for this block."""

    def spent(self, clock: Clock) -> Spent:
        """What was spent so far, given the times of the working thread."""


class Worker:
    """Carries out blocks of a plan's stages in this process, with `n_threads` for the network.

    `transform` is the user's function where the plan has one. `owner` holds the lock of the output:
    a worker whose run was taken for dead, and replaced, writes nothing more. Once `stopping` is
    set, blocks are left out unless the network has begun with them. A context manager that ends its
    threads.
    """

    def __init__(
        self,
        plan: Plan,
        n_threads: int,
        *,
        transform: Transform | None = None,
        owner: str | None = None,
    ) -> None:
        self.stopping = threading.Event()
        self._plan = plan
        self._owner = owner
        self._n_threads = n_threads
        self._transform = transform
        set_codec_threads(n_threads)
        self._lock = threading.Lock()
        self._stages: dict[str, tuple[Stage, Pipeline[Block, int]]] = {}
        self._said = Spent()
        self._started = time.perf_counter()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, when what they began is done."""
        for _, pipeline in self._stages.values():
            pipeline.close()
        self._stages.clear()

    def run(self, stage: str, blocks: Iterable[int]) -> Iterator[BlockReport]:
        """The reports of these blocks, in order; reading, working and writing overlap.

        Several calls may run at once, in threads: the next ones' blocks are read ahead.
        """
        current, pipeline = self._open(stage)
        wanted = itertools.takewhile(lambda _: not self.stopping.is_set(), blocks)
        for outcome in pipeline.run(current.grid[i] for i in wanted):
            filled = current.take_filled(outcome.item)
            if not isinstance(outcome.error, _LeftOut):
                yield replace(report_of(outcome), filled=filled)

    def prepare(self, stage: str) -> None:
        """Open what the stage needs.

        Raises:
            BigsegError: this worker cannot carry it out.
        """
        self._open(stage)

    def take_spent(self) -> Spent:
        """What was spent since this was last asked."""
        with self._lock:
            stage, pipeline = next(iter(self._stages.values()))
            now = replace(stage.spent(pipeline.clock), wall_s=time.perf_counter() - self._started)
            said, self._said = self._said, now
            return now - said

    def _work(self, stage: Stage, block: Block, data: Any) -> Any:  # noqa: ANN401
        if self.stopping.is_set():
            raise _LeftOut
        return stage.work(block, data)

    def _write(self, stage: Stage, block: Block, result: Any) -> int:  # noqa: ANN401
        if self._owner is not None:
            check_owner(self._plan.output.url, self._owner)
        return stage.write(block, result)

    def _open(self, name: str) -> tuple[Stage, Pipeline[Block, int]]:
        with self._lock:
            if name not in self._stages:
                self.close()
                stage = make_stage(self._plan, name, self._n_threads, self._transform)
                depth = stage.depth
                pipeline = Pipeline(
                    stage.read,
                    partial(self._work, stage),
                    partial(self._write, stage),
                    ahead=depth.ahead,
                    behind=depth.behind,
                    n_readers=depth.n_readers,
                    n_writers=depth.n_writers,
                )
                self._stages[name] = (stage, pipeline)
                self._said, self._started = Spent(), time.perf_counter()
            return self._stages[name]


def make_stage(plan: Plan, name: str, n_threads: int, transform: Transform | None = None) -> Stage:
    """The stage of this name; `pyramid-<level>` are those of the pyramid."""
    if name == PREDICT:
        return PredictStage(plan, n_threads, transform)
    n_threads = max(1, min(n_threads, plan.memory_bytes // _thread_bytes(plan, name)))
    if name == STITCH:
        return StitchStage(plan, SEEDS, n_threads)
    if name == STITCH_HOLES:
        return StitchStage(plan, HOLES, n_threads)
    if name in _OTHERS:
        return _OTHERS[name](plan, n_threads)
    return PyramidStage(plan, int(name.removeprefix("pyramid-")), n_threads)


def _thread_bytes(plan: Plan, name: str) -> int:
    """Memory that a thread of a stage without a network needs, about."""
    if name.startswith("pyramid-"):
        # What is read and compared for one block.
        return 1 << 29
    # Numbers, labels and codes of the block that is read, the one that waits and the one written.
    return 3 * 40 * math.prod(plan.core)


_OTHERS: dict[str, Callable[[Plan, int], Stage]] = {
    SEEDS: SeedsStage,
    GROW: GrowStage,
    HOLES: HolesStage,
    FILL: FillStage,
}
