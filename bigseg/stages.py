"""What one block of a stage does, in whichever process: predict a core, downsample a core.

A worker is made from the plan alone and opens everything itself. Its `run` takes block numbers and
gives small reports; voxels go storage -> worker -> storage.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bigseg.cache import ChunkCache
from bigseg.checkpoint import load_model
from bigseg.cost import DEPTH, Depth
from bigseg.decoding import set_codec_threads
from bigseg.empty import EmptySpace, both, keep_of_absent
from bigseg.errors import BadChunkError
from bigseg.filling import SourceVolume
from bigseg.ledger import EMPTY_MARK, checksum_of
from bigseg.lock import check_owner
from bigseg.pipeline import Clock, Pipeline
from bigseg.plan import PREDICT, Plan, geometry_of, pyramid_grid
from bigseg.predict import mirrored
from bigseg.predictor import Encoding, HostPredictor, Predictor
from bigseg.pyramid import downsample, level_rule, source_region
from bigseg.reports import BlockReport, Spent, report_of
from bigseg.transform import Transform, TransformedVolume
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from bigseg.blocks import Block, BlockGrid, Region
    from bigseg.model import UNet
    from bigseg.predict import TileGeometry
    from bigseg.pyramid import Method


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
    """The stage called `predict` or `pyramid-<level>`."""
    if name == PREDICT:
        return PredictStage(plan, n_threads, transform)
    # What a thread reads and compares for one block takes up to half a GiB.
    n_threads = max(1, min(n_threads, plan.memory_bytes >> 29))
    return PyramidStage(plan, int(name.removeprefix("pyramid-")), n_threads)


def stage_grids(plan: Plan) -> dict[str, BlockGrid]:
    """The stages of a plan whose output has been created, in order, with their blocks."""
    finest = open_volume(plan.output.url)
    grids = {PREDICT: plan.grid}
    for k in range(1, finest.n_levels):
        grids[f"pyramid-{k}"] = pyramid_grid(finest.at(k), plan.source.shape, plan.region)
    return grids


@dataclass(frozen=True)
class _Kept:
    """What is handed on of a block: something, and the voxels of the core that are kept."""

    data: Any
    keep: NDArray[np.bool_] | bool


class PredictStage:
    """Network output of a core: labels by argmax, or probabilities; background where it is empty.

    Blocks of which nothing is kept are neither read nor computed nor written.
    """

    def __init__(self, plan: Plan, n_threads: int, transform: Transform | None = None) -> None:
        net, card = load_model(plan.model.url)
        self._plan = plan
        self._geometry = geometry_of(plan, card)
        source = open_volume(plan.source.url, level=plan.source.level)
        self._source = SourceVolume.of(source, plan.on_bad_chunk)
        self._output = open_volume(plan.output.url)
        self._transform = transform
        self._cache = ChunkCache(self._source, plan.source.channels, budget_bytes=plan.cache_bytes)
        rule = plan.empty
        self._empty = rule and EmptySpace(rule, source, plan.source.channels)
        self._predictor = _make_predictor(plan, net, self._geometry, n_threads)
        self._written = _Counter()
        self._filled: dict[int, tuple[str, ...]] = {}
        self.grid, self.depth = plan.grid, DEPTH[plan.engine.device]

    def read(self, block: Block) -> _Kept | None:
        """The grown region of what the block predicts, brought to where it is computed."""
        inside = self._inside(block)
        keep = self._empty.keep(inside) if self._empty else True
        if keep is False:
            return None
        absent: list[Region] = []
        filled: set[str] = set()
        read = self._reader(absent, filled)
        raw = mirrored(read, self._source.shape, self._geometry.grown(inside))
        self._filled[block.index] = tuple(sorted(filled))
        keep = both(keep, keep_of_absent(inside, absent))
        return None if keep is False else _Kept(self._predictor.load(raw), keep)

    def work(self, block: Block, data: _Kept | None) -> _Kept | None:
        """The core, perhaps not computed yet."""
        if data is None:
            return None
        started = self._predictor.start(self._inside(block), data.data, data.keep)
        return _Kept(started, data.keep)

    def write(self, block: Block, result: _Kept | None) -> int:
        """Write the core; background outside the region asked for and where it is empty."""
        if result is None:
            return EMPTY_MARK
        inside = self._inside(block)
        values = self._predictor.finish(result.data)
        if not isinstance(result.keep, bool):
            values *= result.keep
        if inside != block.core:
            whole = np.zeros((len(values), *block.core.shape), values.dtype)
            whole[(slice(None), *inside.relative_to(block.core.start).slices)] = values
            values = whole
        self._output.write(block.core, values)
        self._written.add(values.nbytes)
        return checksum_of(np.ascontiguousarray(values).data)

    def spent(self, clock: Clock) -> Spent:
        """What was spent so far."""
        busy_s = self._predictor.busy_s
        return Spent(
            busy_s=clock.work_s if busy_s is None else busy_s,
            wait_read_s=clock.wait_read_s,
            wait_write_s=clock.wait_write_s,
            idle_s=clock.idle_s,
            bytes_fetched=self._cache.n_bytes_fetched,
            bytes_written=self._written.total,
        )

    def take_filled(self, block: Block) -> tuple[str, ...]:
        """The chunks of the input that were filled for a block, told once."""
        return self._filled.pop(block.index, ())

    def _inside(self, block: Block) -> Region:
        return block.core.intersect(self._plan.region)

    def _reader(self, absent: list[Region], filled: set[str]) -> Callable[[Region], NDArray[Any]]:
        """Reads a region inside the volume, transformed; notes what is not stored or was filled."""

        def read(region: Region) -> NDArray[Any]:
            reading = self._cache.read(region)
            absent.extend(reading.absent)
            filled.update(self._source.filled_in(region, self._plan.source.channels))
            return reading.data

        if self._transform is None or self._plan.transform is None:
            return read
        changed = TransformedVolume(
            read, self._source, self._plan.source.channels, self._transform, self._plan.transform
        )
        return lambda region: changed.read(region, range(changed.n_channels))


class PyramidStage:
    """A core of a coarser level from the level below: mode of labels, mean of probabilities.

    There is no engine to keep busy, so all of it is done in the reading threads, side by side.
    """

    def __init__(self, plan: Plan, level: int, n_threads: int) -> None:
        self._fine = open_volume(plan.output.url, level=level - 1)
        self._coarse = open_volume(plan.output.url, level=level)
        self._method: Method = "mode" if plan.output.kind == "labels" else "mean"
        self._rule = level_rule(
            self._fine.shape,
            self._coarse.shape,
            fine_scale=self._fine.scale,
            coarse_scale=self._coarse.scale,
        )
        self._fetched, self._written = _Counter(), _Counter()
        self.depth = Depth(n_threads, n_threads, n_threads, n_threads)
        self.grid = pyramid_grid(self._coarse, plan.source.shape, plan.region)

    def read(self, block: Block) -> NDArray[Any]:
        """The core, downsampled from the voxels of the finer level."""
        needed = source_region(
            block.core,
            fine_shape=self._fine.shape,
            coarse_shape=self._coarse.shape,
            rule=self._rule,
        )
        try:
            data = self._fine.read(needed, range(self._fine.n_channels))
        except BadChunkError as error:
            raise BadChunkError(
                f"{error}, or let `bigseg verify {self._fine.url}` find what must be made again"
            ) from error
        self._fetched.add(data.nbytes)
        return downsample(
            data,
            block.core,
            fine_shape=self._fine.shape,
            coarse_shape=self._coarse.shape,
            rule=self._rule,
            method=self._method,
        )

    def take_filled(self, block: Block) -> tuple[str, ...]:
        """None: what it reads is the result itself."""
        del block
        return ()

    def work(self, block: Block, data: NDArray[Any]) -> NDArray[Any]:
        """Nothing is left to do."""
        del block
        return data

    def write(self, block: Block, result: NDArray[Any]) -> int:
        """Write the core; returns its checksum."""
        self._coarse.write(block.core, result)
        self._written.add(result.nbytes)
        return checksum_of(np.ascontiguousarray(result).data)

    def spent(self, clock: Clock) -> Spent:
        """What was spent so far."""
        return Spent(
            busy_s=clock.work_s,
            wait_read_s=clock.wait_read_s,
            wait_write_s=clock.wait_write_s,
            idle_s=clock.idle_s,
            bytes_fetched=self._fetched.total,
            bytes_written=self._written.total,
        )


class _Counter:
    """A sum to which several threads add."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, n: int) -> None:
        """Add `n`."""
        with self._lock:
            self.total += n


def _make_predictor(plan: Plan, net: UNet, geometry: TileGeometry, n_threads: int) -> Predictor:
    encoding = Encoding(plan.output.kind == "labels", np.dtype(plan.output.dtype))
    if plan.engine.device == "cpu":
        return HostPredictor(
            net,
            plan.engine,
            geometry,
            constants=plan.constants,
            encoding=encoding,
            n_threads=n_threads,
        )
    from bigseg.cuda import CudaPredictor

    dtype = plan.transform.dtype if plan.transform else plan.source.dtype
    return CudaPredictor(
        net,
        plan.engine,
        geometry,
        constants=plan.constants,
        encoding=encoding,
        core=plan.core,
        raw_dtype=np.dtype(dtype),
        n_slots=DEPTH["cuda"].n_blocks,
    )
