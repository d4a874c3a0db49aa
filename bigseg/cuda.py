"""From the voxels of a grown region to what is written of its core, on a GPU that never waits.

    reading threads    raw ─copy─> pinned slot ─┐ H2D
    copy-in stream                              └──────> slot on the device
    compute stream           normalise ▸ forward ▸ softmax ▸ crop ▸ encode, tile by tile ─┐
    copy-out stream                                                      pinned slot <─D2H┘
    writing threads    <─copy─ pinned slot

Only the source's own type goes up and only the encoded core comes down. The slots are allocated
once; events order the streams, and nothing but a writing thread waits for the device. Pinned
copies move 53 GB/s where pageable ones move 12 to 18 (measured, H100).
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigseg.blocks import Region
from bigseg.engine import check_engine, device_forward
from bigseg.errors import ResourceError
from bigseg.instances import FOREGROUND_BIT, INSIDE_BIT
from bigseg.predict import kept_tiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bigseg.config import NormConstants
    from bigseg.engine import EngineSpec
    from bigseg.model import UNet
    from bigseg.predict import TileGeometry
    from bigseg.predictor import Encoding
    from bigseg.rules import InstanceRule

logger = logging.getLogger(__name__)

# What torch turns into float32 on the device with numpy's result; others are converted before.
_TORCH = {
    np.dtype(name): getattr(torch, name)
    for name in ("uint8", "int8", "uint16", "int16", "int32", "float16", "float32")
}


def gpu_memory() -> int:
    """Bytes of memory of this process' GPU."""
    return int(torch.cuda.mem_get_info()[1])


def n_gpus() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count()


class _Slot:
    """The same number of bytes in pinned memory and on the device."""

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self.host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def views(self, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[Tensor, Tensor]:
        """An array of `shape` in main memory and on the device."""
        n_bytes = math.prod(shape) * dtype.itemsize
        host, device = (
            part[:n_bytes].view(_TORCH[dtype]).view(tuple(shape))
            for part in (self.host, self.device)
        )
        return host, device


@dataclass(frozen=True)
class _Loaded:
    slot: _Slot
    data: Tensor
    ready: Any


@dataclass(frozen=True)
class _Started:
    slot: _Slot
    result: Tensor
    began: Any
    computed: Any
    done: Any
    loaded: _Loaded


class CudaPredictor:
    """Normalises, computes and encodes on the GPU; `n_slots` blocks may be under way at a time.

    Raises:
        ResourceError: there is no such GPU, or its memory does not hold one tile.
    """

    def __init__(
        self,
        net: UNet,
        engine: EngineSpec,
        geometry: TileGeometry,
        *,
        constants: NormConstants,
        encoding: Encoding,
        core: Sequence[int],
        raw_dtype: np.dtype[Any],
        n_slots: int,
    ) -> None:
        check_engine(engine)
        self._device = torch.device("cuda")
        self._geometry, self._encoding = geometry, encoding
        self._n_classes = net.spec.out_channels
        self._raw_dtype = raw_dtype if raw_dtype in _TORCH else np.dtype(np.float32)
        shape = geometry.input_shape(net.spec.in_channels)

        def build(n_planes: int) -> Callable[[Tensor], Tensor]:
            return device_forward(
                net, engine, input_shape=(n_planes, *shape[1:]), device=self._device
            )

        self._forward = _Halving(build, shape[0])
        columns = (-1, 1, 1, 1, 1)
        self._offset = torch.tensor(constants.offset, device=self._device).reshape(columns)
        factor = (1.0 / np.asarray(constants.scale, np.float64)).astype(np.float32)
        self._factor = torch.from_numpy(factor).to(self._device).reshape(columns)
        grown = geometry.grown(Region.of_shape(core))
        n_in = net.spec.in_channels * grown.n_voxels * self._raw_dtype.itemsize
        n_out = encoding.n_channels(self._n_classes) * math.prod(core) * encoding.dtype.itemsize
        self._in, self._compute, self._out = (_stream() for _ in range(3))
        self._lock = threading.Lock()
        self._busy_s = 0.0
        try:
            self._inputs = _slots(n_in, n_slots, self._device)
            self._outputs = _slots(n_out, n_slots, self._device)
            self._warm_up(shape)
        except torch.OutOfMemoryError:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
            raise ResourceError(
                f"a tile of {geometry.tile[1:]} voxels and {n_slots} blocks of {tuple(core[1:])} "
                f"do not fit the GPU, which has {free:.1f} of {total:.1f} GiB free: use a smaller "
                "--tile or --block, or end what else runs on it"
            ) from None

    @property
    def busy_s(self) -> float:
        """Seconds that the GPU computed for the blocks that were finished."""
        with self._lock:
            return self._busy_s

    def load(self, raw: NDArray[Any]) -> _Loaded:
        """Begin the copy of a grown region to the device."""
        raw = raw if raw.dtype == self._raw_dtype else raw.astype(self._raw_dtype)
        slot = self._inputs.get()
        try:
            host, device = slot.views(raw.shape, self._raw_dtype)
            host.numpy()[...] = raw
            ready = _event()
            with torch.cuda.stream(self._in):
                device.copy_(host, non_blocking=True)
                ready.record(self._in)
        except BaseException:
            # A slot that is not given back is waited for by a later block, for ever.
            self._inputs.put(slot)
            raise
        return _Loaded(slot, device, ready)

    def start(self, core: Region, loaded: _Loaded, keep: NDArray[np.bool_] | bool) -> _Started:
        """Queue the work on the device; returns at once."""
        slot = self._outputs.get()
        try:
            return self._start(core, loaded, keep, slot)
        except BaseException:
            self._inputs.put(loaded.slot)
            self._outputs.put(slot)
            raise

    def finish(self, started: _Started) -> NDArray[Any]:
        """Wait for the core and take it."""
        try:
            started.done.synchronize()
            with self._lock:
                self._busy_s += started.began.elapsed_time(started.computed) / 1e3
            result: NDArray[Any] = started.result.numpy().copy()
        finally:
            self._inputs.put(started.loaded.slot)
            self._outputs.put(started.slot)
        return result

    def _start(
        self, core: Region, loaded: _Loaded, keep: NDArray[np.bool_] | bool, slot: _Slot
    ) -> _Started:
        began, computed = (_event(timed=True) for _ in range(2))
        done = _event()
        shape = (self._encoding.n_channels(self._n_classes), *core.shape)
        host, device = slot.views(shape, self._encoding.dtype)
        origin = self._geometry.grown(core).start
        with torch.inference_mode(), torch.cuda.stream(self._compute):
            self._compute.wait_event(loaded.ready)
            began.record(self._compute)
            if not isinstance(keep, bool):
                device.zero_()
            for part in kept_tiles(core, self._geometry.tile, keep):
                grown = self._geometry.grown(part.tile).relative_to(origin)
                x = self._normalise(loaded.data[(slice(None), *grown.slices)])
                probabilities = self._predict(x)
                inside = part.inside.relative_to(part.tile.start)
                kept = probabilities[(slice(None), *inside.slices)]
                where = (slice(None), *part.inside.relative_to(core.start).slices)
                device[where] = self._encode(kept)
            computed.record(self._compute)
        with torch.cuda.stream(self._out):
            self._out.wait_event(computed)
            host.copy_(device, non_blocking=True)
            done.record(self._out)
        return _Started(slot, host, began, computed, done, loaded)

    def _normalise(self, raw: Tensor) -> Tensor:
        """As `statistics.normalise`, operation by operation."""
        x = (raw.to(torch.float32) - self._offset) * self._factor
        if raw.dtype.is_floating_point:
            x = torch.where(torch.isfinite(x), x, torch.zeros((), device=x.device))
        return x

    def _predict(self, data: Tensor) -> Tensor:
        """(c, t, z, y, x) normalised in, (classes, t, z, y, x) probabilities of the output out."""
        c, t, z, y, x = data.shape
        if self._geometry.dims == 3:
            return self._forward(data.transpose(0, 1)).transpose(0, 1)
        planes = self._forward(data.permute(1, 2, 0, 3, 4).reshape(t * z, c, y, x))
        n_classes, out_y, out_x = planes.shape[1:]
        return planes.transpose(0, 1).reshape(n_classes, t, z, out_y, out_x)

    def _encode(self, probabilities: Tensor) -> Tensor:
        """As `predictor.Encoding`, operation by operation."""
        dtype = _TORCH[self._encoding.dtype]
        if self._encoding.kind != "labels":
            if dtype == torch.uint8:
                probabilities = torch.round(probabilities * 255.0)
            if self._encoding.rule is not None:
                return _codes(probabilities.to(torch.int32), self._encoding.rule)[None]
            return probabilities.to(dtype)
        best = probabilities[0]
        labels = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
        for k, challenger in enumerate(probabilities[1:], start=1):
            labels = torch.where(challenger > best, k, labels)
            best = torch.maximum(best, challenger)
        return labels.to(dtype)[None]

    def _warm_up(self, shape: Sequence[int]) -> None:
        """One forward pass: what does not fit or must be compiled shows before any block."""
        with torch.inference_mode():
            self._forward(torch.zeros(tuple(shape), device=self._device))
        torch.cuda.synchronize()


def _codes(probabilities: Tensor, rule: InstanceRule) -> Tensor:
    """As `instances.codes_of`, operation by operation."""
    inside = probabilities[1] >= rule.inside_at
    foreground = probabilities[1:].sum(0) >= rule.foreground_at
    return inside.to(torch.uint8) * INSIDE_BIT + foreground.to(torch.uint8) * FOREGROUND_BIT


class _Halving:
    """A forward pass that halves the number of planes at once when the device is out of memory.

    Never the tile itself: what a voxel sees stays the same, and so does the result, but for the
    rounding of kernels that another number of planes gets (in fp32 mostly none; measured on an
    H100, bf16 and two halves of 8 planes: 0.1 % of argmax). The plan's number fits by its own
    account, so this happens where others use the device. `build` makes the pass for so many
    planes.
    """

    def __init__(
        self,
        build: Callable[[int], Callable[[Tensor], Tensor]],
        n_planes: int,
        free_memory: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self._build, self._free_memory = build, free_memory
        self._n, self._forward = n_planes, build(n_planes)

    def __call__(self, batch: Tensor) -> Tensor:
        """The probabilities of all planes (n, classes, ...)."""
        while True:
            try:
                if self._n == len(batch):
                    return self._forward(batch)
                return torch.cat([self._forward(part) for part in torch.split(batch, self._n)])
            except torch.OutOfMemoryError:
                if self._n == 1:
                    raise
                # All parts have one shape, which compiled engines need.
                fewer = max(n for n in range(1, self._n // 2 + 1) if len(batch) % n == 0)
                logger.warning(
                    "the GPU is out of memory: it computes %d planes at a time, not %d",
                    fewer,
                    self._n,
                )
                self._free_memory()
                self._n, self._forward = fewer, self._build(fewer)


def _slots(n_bytes: int, n: int, device: torch.device) -> queue.SimpleQueue[_Slot]:
    slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
    for _ in range(n):
        slots.put(_Slot(n_bytes, device))
    return slots


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own omission


def _event(*, timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
