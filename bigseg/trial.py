"""Which engine a plan takes, and at what rate it works: tried on one tile on a worker's machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bigseg.checkpoint import load_model, read_card
from bigseg.engine import candidates
from bigseg.forecast import count_tiles
from bigseg.model import footprint
from bigseg.plan import Plan, geometry_of
from bigseg.predict import TileGeometry, tile_geometry
from bigseg.probe import (
    Timing,
    choose,
    probe,
    probe_key,
    remember,
    remembered,
    time_engine,
)

if TYPE_CHECKING:
    from bigseg.blocks import Vec
    from bigseg.config import UNetSpec
    from bigseg.engine import EngineSpec

# Operations of a run from which on trying the engines costs a small part of it.
WORTH_TRYING = {"cpu": 2e13, "cuda": 1e16}
# Of the tile that is tried: a second or so on a slow processor.
MOST_FLOPS = {"cpu": 4e10, "cuda": 1e14}


@dataclass(frozen=True)
class Trial:
    """The engine that was chosen, why, what each took, and operations a second of the chosen."""

    engine: EngineSpec
    reason: str
    timings: tuple[Timing, ...]
    flops_a_second: float


def is_worth_trying(plan: Plan) -> bool:
    """Whether a run is so long that a faster engine pays for having been looked for."""
    card = read_card(plan.model.url)
    geometry = geometry_of(plan, card)
    return count_tiles(plan) * geometry.flops(card.spec) >= WORTH_TRYING[plan.engine.device]


def try_engines(plan: Plan, n_threads: int, *, only: tuple[EngineSpec, ...] = ()) -> Trial:
    """Time the engines that this machine has (or `only` these) on one tile, and choose.

    Times are remembered: a second call measures nothing.

    Raises:
        ResourceError: no engine could be built.
    """
    net, card = load_model(plan.model.url)
    geometry = _small_enough(card.spec, plan.tile, MOST_FLOPS[plan.engine.device])
    shape = geometry.input_shape(card.spec.in_channels)
    engines = only or candidates(plan.engine.device, plan.engine.precision)
    key = probe_key(card.spec, engines, input_shape=shape, n_threads=n_threads)
    timings = remembered(key)
    if timings is None:
        torch.set_num_threads(n_threads)
        timings = probe(net, engines, input_shape=shape, n_threads=n_threads)
        remember(key, timings)
    chosen, reason = choose(timings, default=plan.engine)
    return Trial(
        engine=chosen.engine,
        reason=reason,
        timings=tuple(timings),
        flops_a_second=geometry.flops(card.spec) / chosen.seconds,
    )


def time_tile(plan: Plan, n_threads: int) -> float:
    """Median seconds of the raw forward pass of one of the plan's tiles; nothing is remembered."""
    net, card = load_model(plan.model.url)
    shape = geometry_of(plan, card).input_shape(card.spec.in_channels)
    torch.set_num_threads(n_threads)
    return time_engine(net, plan.engine, input_shape=shape, n_threads=n_threads)


def _small_enough(spec: UNetSpec, tile: Vec, most_flops: float) -> TileGeometry:
    """The plan's tile, its longest side halved until one forward pass takes few operations."""
    stride = footprint(spec).stride
    sides = list(tile[-spec.dims :])
    while True:
        geometry = tile_geometry(spec, (*tile[: -spec.dims], *sides))
        smaller = [max(s, n // 2 // s * s) for n, s in zip(sides, stride, strict=True)]
        if geometry.flops(spec) <= most_flops or smaller == sides:
            return geometry
        longest = max(range(spec.dims), key=lambda axis: sides[axis] - smaller[axis])
        sides[longest] = smaller[longest]
