"""The stage that computes: from the image to what the network says of a core.

read        the grown region of the core, transformed, from chunks that are kept decoded
work        forward passes, tile by tile, on whichever device
write       classes, probabilities, or the codes of instances; background where it is empty
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import scratch
from bigseg.cache import ChunkCache
from bigseg.checkpoint import load_model
from bigseg.cost import DEPTH
from bigseg.empty import EmptySpace, both, keep_of_absent
from bigseg.filling import SourceVolume
from bigseg.ledger import EMPTY_MARK, checksum_of
from bigseg.pipeline import Clock, Counter
from bigseg.plan import Plan, geometry_of
from bigseg.predict import mirrored
from bigseg.predictor import Encoding, HostPredictor, Predictor
from bigseg.reports import Spent
from bigseg.transform import Transform, TransformedVolume
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bigseg.blocks import Block, Region
    from bigseg.model import UNet
    from bigseg.predict import TileGeometry


@dataclass(frozen=True)
class _Kept:
    """What is handed on of a block: something, and the voxels of the core that are kept."""

    data: Any
    keep: NDArray[np.bool_] | bool


class PredictStage:
    """Network output of a core: classes, probabilities, or codes; background where it is empty.

    Blocks of which nothing is kept are neither read nor computed nor written.
    """

    def __init__(self, plan: Plan, n_threads: int, transform: Transform | None = None) -> None:
        net, card = load_model(plan.model.url)
        self._plan = plan
        self._geometry = geometry_of(plan, card)
        source = open_volume(plan.source.url, level=plan.source.level)
        self._source = SourceVolume.of(source, plan.on_bad_chunk)
        self._output = open_volume(scratch.predicted_url(plan))
        self._transform = transform
        self._cache = ChunkCache(self._source, plan.source.channels, budget_bytes=plan.cache_bytes)
        rule = plan.empty
        self._empty = rule and EmptySpace(rule, source, plan.source.channels)
        self._predictor = _make_predictor(plan, net, self._geometry, n_threads)
        self._written = Counter()
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


def _make_predictor(plan: Plan, net: UNet, geometry: TileGeometry, n_threads: int) -> Predictor:
    encoding = encoding_of(plan)
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


def encoding_of(plan: Plan) -> Encoding:
    """What the predict stage writes of probabilities."""
    if plan.instances is None:
        is_label = plan.output.kind == "labels"
        return Encoding("labels" if is_label else "probabilities", np.dtype(plan.output.dtype))
    if plan.instances.keep_probabilities:
        return Encoding("probabilities", np.dtype(np.uint8))
    return Encoding("codes", np.dtype(np.uint8), plan.instances.rule)
