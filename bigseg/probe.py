"""How long each engine takes for one tile here, how far it is from the truth, and which to take.

The truth is eager torch in float32. Times differ from run to run, so what is chosen goes into the
plan, and measured times are remembered: the next run on the same machine measures nothing.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigseg.engine import EngineSpec, build_engine, device_forward, pick_device, torch_forward
from bigseg.errors import BigsegError, ResourceError
from bigseg.reuse import digest_of, load_entry, processor, save_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigseg.config import UNetSpec
    from bigseg.model import UNet

logger = logging.getLogger(__name__)

WORTH = 0.9
"""Another engine than the default is taken when it needs at most this share of its time."""


@dataclass(frozen=True)
class Timing:
    """One engine on one tile: the median of its warm passes, and what building it took.

    `largest_difference` is that of any probability to float32 in eager torch, from 0 to 1.
    """

    engine: EngineSpec
    seconds: float
    build_s: float
    largest_difference: float


def probe(
    net: UNet,
    engines: Sequence[EngineSpec],
    *,
    input_shape: Sequence[int],
    n_threads: int,
    repeats: int = 3,
) -> list[Timing]:
    """The timings of these engines on a batch of `input_shape`, in their order.

    On GPUs the input and the result stay on the device. Passes of all engines take turns, so that
    what else the machine does falls on all of them. An engine that cannot be built or run is left
    out, and a warning says why.
    """
    batch = _batch(input_shape)
    runs = [_tried(net, engine, batch, n_threads) for engine in engines]
    built = [run for run in runs if run is not None]
    if not built:
        return []
    device = torch.device(built[0].engine.device)
    truth = torch_forward(net, device=device, precision="fp32")(batch)
    passes = [[_seconds(run.again) for run in built] for _ in range(repeats)]
    return [
        Timing(
            engine=run.engine,
            seconds=statistics.median(seconds[i] for seconds in passes),
            build_s=run.build_s,
            largest_difference=float(np.abs(run.result - truth).max()),
        )
        for i, run in enumerate(built)
    ]


def time_engine(
    net: UNet,
    engine: EngineSpec,
    *,
    input_shape: Sequence[int],
    n_threads: int,
    repeats: int = 3,
) -> float:
    """Median seconds of warm passes of one engine, compared with nothing.

    Raises:
        ResourceError: it cannot be built or run here.
    """
    run = _tried(net, engine, _batch(input_shape), n_threads)
    if run is None:
        raise ResourceError(f"engine {engine} does not run here: see the warning above")
    return statistics.median(_seconds(run.again) for _ in range(repeats))


def choose(timings: Sequence[Timing], *, default: EngineSpec) -> tuple[Timing, str]:
    """The fastest, but the default where no other is a tenth faster; and a sentence that says why.

    Raises:
        ResourceError: no engine could be built.
    """
    if not timings:
        raise ResourceError("no engine could be built here: see the warnings above for the reasons")
    fastest = min(timings, key=lambda timing: timing.seconds)
    usual = next((timing for timing in timings if timing.engine == default), fastest)
    chosen = fastest if fastest.seconds <= WORTH * usual.seconds else usual
    figures = ", ".join(f"{t.engine.name} {t.seconds:.3g} s" for t in timings)
    if chosen is not usual:
        reason = f"the fastest, {usual.seconds / chosen.seconds:.2g} times as fast as the default"
    elif chosen is fastest:
        reason = "the fastest"
    else:
        reason = f"the default; {fastest.engine.name} is less than a tenth faster"
    return chosen, (
        f"{chosen.engine.name} in {chosen.engine.precision}: {reason} (one tile: {figures})"
    )


def probe_key(
    spec: UNetSpec,
    engines: Sequence[EngineSpec],
    *,
    input_shape: Sequence[int],
    n_threads: int,
) -> str:
    """What timings are remembered under: the layers, the engines, the tile, and this machine."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return digest_of(
        spec.model_dump_json(),
        *(engine.model_dump_json() for engine in engines),
        str(tuple(input_shape)),
        str(n_threads),
        torch.__version__,
        platform.node(),
        machine,
    )


def remember(key: str, timings: Sequence[Timing]) -> None:
    """Keep timings for later runs."""
    rows = [
        {
            "engine": t.engine.model_dump(),
            "seconds": t.seconds,
            "build_s": t.build_s,
            "largest_difference": t.largest_difference,
        }
        for t in timings
    ]
    save_entry(_name(key), json.dumps(rows).encode())


def remembered(key: str) -> list[Timing] | None:
    """The timings that were kept under this key, None where there are none."""
    data = load_entry(_name(key))
    if data is None:
        return None
    try:
        return [_timing(row) for row in json.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("the remembered timings of %s are not used: %s", key, error)
        return None


@dataclass(frozen=True, eq=False)
class _Run:
    engine: EngineSpec
    again: Callable[[], object]
    result: NDArray[np.float32]
    build_s: float


def _tried(
    net: UNet, engine: EngineSpec, batch: NDArray[np.float32], n_threads: int
) -> _Run | None:
    started = time.perf_counter()
    try:
        if engine.device == "cuda":
            again, result = _on_gpu(net, engine, batch)
        else:
            again, result = _on_processor(net, engine, batch, n_threads)
    # What compilers and drivers raise, memory that does not suffice among it.
    except (BigsegError, RuntimeError) as error:
        logger.warning("engine %s is left out: %s", engine, error)
        return None
    return _Run(engine, again, result, time.perf_counter() - started)


def _on_processor(
    net: UNet, engine: EngineSpec, batch: NDArray[np.float32], n_threads: int
) -> tuple[Callable[[], object], NDArray[np.float32]]:
    forward = build_engine(net, engine, input_shape=batch.shape, n_threads=n_threads)
    return lambda: forward(batch), forward(batch)


def _on_gpu(
    net: UNet, engine: EngineSpec, batch: NDArray[np.float32]
) -> tuple[Callable[[], object], NDArray[np.float32]]:
    device = pick_device("cuda")
    forward = device_forward(net, engine, input_shape=batch.shape, device=device)
    there = torch.from_numpy(batch).to(device)

    def again() -> object:
        result = forward(there)
        torch.cuda.synchronize(device)
        return result

    return again, forward(there).cpu().numpy()


def _batch(shape: Sequence[int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(0.5, 0.3, tuple(shape)).astype(np.float32)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _name(key: str) -> str:
    return f"{key}.timings.json"


def _timing(row: dict[str, Any]) -> Timing:
    return Timing(
        engine=EngineSpec.model_validate(row["engine"]),
        seconds=float(row["seconds"]),
        build_s=float(row["build_s"]),
        largest_difference=float(row["largest_difference"]),
    )
