"""What a plan will cost: blocks, operations, bytes, memory, and time where a rate is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigseg.blocks import Region, round_up
from bigseg.cache import predicted_fetch_bytes
from bigseg.checkpoint import read_card
from bigseg.model import footprint
from bigseg.plan import SMALLEST, Plan, geometry_of, memory_model
from bigseg.predict import region_inside
from bigseg.units import format_bytes
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bigseg.blocks import BlockGrid
    from bigseg.predict import TileGeometry

# Blocks whose reading is followed chunk by chunk; of more, this many from every worker's part.
MOST_FOLLOWED = 4096


@dataclass(frozen=True)
class Forecast:
    """The cost of a plan on `n_workers` workers.

    `useful_flops` are those of the network on each voxel of the region once; `computed_flops` also
    count halos and what lies beyond the region. `fetched_bytes` are decoded bytes of chunks, each
    time they are fetched; `volume_bytes` those of the region once. `written_bytes` are before
    compression, and so are `scratch_bytes`, which are deleted in the end. `table_bytes` are decoded
    a second time, for the intensities of objects. `seconds` is None where no rate is known.
    """

    plan: Plan
    n_workers: int
    n_blocks: int
    n_tiles: int
    useful_flops: int
    computed_flops: int
    volume_bytes: int
    fetched_bytes: int
    written_bytes: int
    scratch_bytes: int
    table_bytes: int
    memory_bytes: int
    seconds: float | None = None

    @property
    def useful_share(self) -> float:
        """Useful operations out of those computed."""
        return self.useful_flops / self.computed_flops

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {key: value for key, value in vars(self).items() if key != "plan"}
        return {**values, "useful_share": round(self.useful_share, 4)}

    def as_text(self) -> str:
        """A few lines for people."""
        plan = self.plan
        times = self.fetched_bytes / max(1, self.volume_bytes)
        lines = {
            "image": f"{plan.source.url}, level {plan.source.level}, {_sides(plan.source.shape)} "
            f"{plan.source.dtype}",
            "output": f"{plan.output.url}, {plan.output.kind} in {_type(plan)}, chunks "
            f"{_sides(plan.output.chunk)}"
            + (f" in shards {_sides(plan.output.shard)}" if plan.output.shard else ""),
            "engine": str(plan.engine),
            "blocks": f"{self.n_blocks} of {_sides(plan.core)} voxels, {self.n_tiles} tiles of "
            f"{_sides(plan.tile)}, beams of {plan.beam[0]} × {plan.beam[1]}",
            "compute": f"{_flops(self.computed_flops)}, of which {self.useful_share:.0%} are "
            "useful: the rest are halos".replace("%", " %"),
            "read": f"{format_bytes(self.fetched_bytes)} decoded, each byte {times:.2f} times",
            "written": f"{format_bytes(self.written_bytes)} before compression",
            **self._instances_lines(),
            "memory": f"{format_bytes(self.memory_bytes)} for each of {self.n_workers} workers, "
            f"{format_bytes(plan.cache_bytes)} of it for decoded chunks",
        }
        if self.seconds is not None:
            lines["time"] = _time(self.seconds)
        return "\n".join(f"{name:8s} {text}" for name, text in lines.items())

    def _instances_lines(self) -> dict[str, str]:
        if self.plan.instances is None:
            return {}
        rule = self.plan.instances.rule
        holes = ", holes filled" if rule.fill_holes else ""
        link = f", linked along {rule.link}" if rule.link else ""
        return {
            "scratch": f"{format_bytes(self.scratch_bytes)} before compression, deleted in the end",
            "objects": f"inside ≥ {rule.threshold:g}, eroded by {rule.erode} steps, grown by "
            f"{rule.grow} where background ≤ {1 - rule.foreground:g}, seeds of at least "
            f"{rule.min_size} voxels{link}{holes}",
            "table": f"{format_bytes(self.table_bytes)} decoded for the intensities of objects",
        }


def make_forecast(plan: Plan, *, n_workers: int, flops_a_second: float | None = None) -> Forecast:
    """The cost of a plan; `flops_a_second` is the measured rate of one worker, else the plan's.

    Empty space is not foreseen: what is skipped makes it cheaper.
    """
    card = read_card(plan.model.url)
    geometry, mark = geometry_of(plan, card), footprint(card.spec)
    n_tiles = count_tiles(plan)
    computed = n_tiles * geometry.flops(card.spec)
    memory = memory_model(plan, card.spec)
    of_one = flops_a_second or plan.flops_a_second
    rate = None if of_one is None else of_one * min(n_workers, len(plan.grid))
    return Forecast(
        plan=plan,
        n_workers=n_workers,
        n_blocks=len(plan.grid),
        n_tiles=n_tiles,
        useful_flops=mark.useful_flops(plan.region.n_voxels),
        computed_flops=computed,
        volume_bytes=plan.region.n_voxels * plan.source.voxel_bytes,
        fetched_bytes=_fetched(plan, geometry, n_workers),
        written_bytes=plan.region.n_voxels * (plan.output.voxel_bytes + _kept_bytes(plan)),
        scratch_bytes=plan.region.n_voxels * _scratch_bytes(plan),
        table_bytes=_table_bytes(plan) if plan.instances else 0,
        memory_bytes=int(memory.needs(geometry.output)) + plan.cache_bytes,
        seconds=None if rate is None else computed / rate,
    )


def _kept_bytes(plan: Plan) -> int:
    """Bytes a voxel of probabilities that stay beside the labels."""
    return plan.predicted_voxel_bytes if plan.keeps_probabilities else 0


def _scratch_bytes(plan: Plan) -> int:
    """Bytes a voxel of scratch space, at most."""
    if plan.instances is None:
        return 0
    # Codes, seeds; where holes are filled the labels before, and the background in pieces.
    codes = 0 if plan.instances.keep_probabilities else 1
    return codes + 4 + (8 + 4 if plan.instances.rule.fill_holes else 0)


def _table_bytes(plan: Plan) -> int:
    """Decoded bytes of all channels that blocks read once more, each for itself."""
    source = open_volume(plan.source.url, level=plan.source.level)
    n_bytes = source.n_channels * source.dtype.itemsize
    grid = plan.clipped_grid
    # Along each axis by itself: blocks and chunks are products of intervals.
    for a, lengths, c, n in zip(
        plan.region_start, grid.chunks, source.chunk_shape, source.shape, strict=True
    ):
        cuts = itertools.pairwise(itertools.accumulate(lengths, initial=a))
        n_bytes *= sum(min(n, round_up(stop, c)) - start // c * c for start, stop in cuts)
    return n_bytes


def _type(plan: Plan) -> str:
    if plan.output.dtype == SMALLEST:
        return "the smallest type that holds their number"
    return plan.output.dtype


def count_tiles(plan: Plan, region: Region | None = None) -> int:
    """Forward passes for a region (the plan's by default): all tiles of each block that touch it.

    A tile that two blocks share is computed by both.
    """
    region = region or plan.region
    # Along each axis by itself: blocks and tiles are products of intervals.
    counts = []
    for a, b, c, t in zip(region.start, region.stop, plan.core, plan.tile, strict=True):
        cuts = [max(a, k * c) for k in range(a // c, -(-b // c))] + [b]
        counts.append(sum(-(-stop // t) - start // t for start, stop in itertools.pairwise(cuts)))
    return math.prod(counts)


def _fetched(plan: Plan, geometry: TileGeometry, n_workers: int) -> int:
    """Decoded bytes that the workers fetch, each in its part of the blocks."""
    source = open_volume(plan.source.url, level=plan.source.level)
    grid, n = plan.grid, len(plan.grid)
    n_workers = min(n_workers, n)
    followed = max(2, MOST_FOLLOWED // n_workers)

    def fetched(first: int, last: int) -> int:
        return predicted_fetch_bytes(
            _read_regions(plan, grid, geometry, first, last),
            shape=plan.source.shape,
            chunk=source.chunk_shape,
            bytes_per_voxel=plan.source.voxel_bytes,
            budget_bytes=plan.cache_bytes,
        )

    total = 0.0
    for k in range(n_workers):
        first, stop = k * n // n_workers, (k + 1) * n // n_workers
        last = min(stop, first + followed)
        total += fetched(first, last)
        if last < stop:
            # As it goes on after the first, which find nothing decoded.
            half = first + followed // 2
            steady = fetched(first, last) - fetched(first, half)
            total += steady * (stop - last) / (last - half)
    return int(total)


def _read_regions(
    plan: Plan, grid: BlockGrid, geometry: TileGeometry, first: int, last: int
) -> Iterator[Region]:
    depth = plan.transform.depth if plan.transform else (0,) * 4
    whole = Region.of_shape(plan.source.shape)
    for i in range(first, last):
        inside = grid[i].core.intersect(plan.region)
        region = region_inside(geometry.grown(inside), plan.source.shape)
        yield region.grow(depth, depth).intersect(whole)


def _sides(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[1:] if shape[0] == 1 else shape))


def _flops(n: float) -> str:
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"):
        if n < 1000 or unit == "EFLOP":
            break
        n /= 1000
    return f"{n:.3g} {unit}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
