"""From the voxels of a grown region to what is written of its core, on processors.

Three steps, for the three kinds of threads of a pipeline: `load` in a reading thread, `start` in
the working thread, `finish` in a writing thread. cuda.py has the same three for a GPU.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from bigseg.engine import build_engine
from bigseg.instances import codes_of
from bigseg.predict import predict_grown
from bigseg.statistics import normalise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.config import NormConstants
    from bigseg.engine import EngineSpec
    from bigseg.model import UNet
    from bigseg.predict import TileGeometry
    from bigseg.rules import InstanceRule


class Predictor(Protocol):
    """What a stage needs of a device; `raw` is (c, t, z, y, x) in the type of the source."""

    def load(self, raw: NDArray[Any]) -> Any:  # noqa: ANN401 - each device has its own
        """Bring a grown region to where it is computed."""

    def start(self, core: Region, loaded: Any, keep: NDArray[np.bool_] | bool) -> Any:  # noqa: ANN401
        """Compute the core; tiles of which nothing is kept may be left out."""

    def finish(self, started: Any) -> NDArray[Any]:  # noqa: ANN401
        """The core (channels, t, z, y, x) in the type of the output."""

    @property
    def busy_s(self) -> float | None:
        """Seconds that the device computed so far; None where that is the time in `start`."""


@dataclass(frozen=True)
class Encoding:
    """What is written of probabilities, in `dtype`.

    labels: the class. probabilities: each of them; uint8 holds 255 times a probability. codes:
    inside and foreground of instances by `rule`, from probabilities in 255ths.
    """

    kind: Literal["labels", "probabilities", "codes"]
    dtype: np.dtype[Any]
    rule: InstanceRule | None = None

    def __call__(self, probabilities: NDArray[np.float32]) -> NDArray[Any]:
        """(classes, ...) float32 in, (1 or classes, ...) out.

        Of classes with equal probability the first wins.
        """
        if self.kind == "labels":
            return _argmax(probabilities, self.dtype)
        if self.dtype == np.uint8:
            probabilities = np.rint(probabilities * np.float32(255.0))
        encoded: NDArray[Any] = probabilities.astype(self.dtype)
        if self.kind == "codes":
            assert self.rule is not None
            return codes_of(encoded, self.rule)[np.newaxis]
        return encoded

    def n_channels(self, n_classes: int) -> int:
        """Channels of the output of a network with so many classes."""
        return n_classes if self.kind == "probabilities" else 1


class HostPredictor:
    """Normalises, computes and encodes in main memory."""

    busy_s = None

    def __init__(
        self,
        net: UNet,
        engine: EngineSpec,
        geometry: TileGeometry,
        *,
        constants: NormConstants,
        encoding: Encoding,
        n_threads: int,
    ) -> None:
        self._geometry, self._constants, self._encoding = geometry, constants, encoding
        self._n_threads = n_threads
        self._thread: int | None = None
        shape = geometry.input_shape(net.spec.in_channels)
        self._forward = build_engine(net, engine, input_shape=shape, n_threads=n_threads)

    def load(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        """The normalised grown region."""
        return normalise(raw, self._constants)

    def start(
        self, core: Region, loaded: NDArray[np.float32], keep: NDArray[np.bool_] | bool
    ) -> NDArray[Any]:
        """The encoded core."""
        self._set_threads()
        return predict_grown(
            loaded, self._forward, self._geometry, core, encode=self._encoding, keep=keep
        )

    def finish(self, started: NDArray[Any]) -> NDArray[Any]:
        """What `start` gave."""
        return started

    def _set_threads(self) -> None:
        """OpenMP keeps the number of threads for each thread that calls it: set it in this one."""
        if self._thread != threading.get_ident():
            torch.set_num_threads(self._n_threads)
            assert torch.get_num_threads() == self._n_threads
            self._thread = threading.get_ident()


def _argmax(probabilities: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The class (1, ...) with the largest probability (classes, ...), the first of equals.

    Five times as fast as numpy's along the first axis, and without its 64-bit result.
    """
    best = probabilities[0]
    labels = np.zeros(best.shape, dtype)
    for k, challenger in enumerate(probabilities[1:], start=1):
        np.maximum(labels, (challenger > best) * dtype.type(k), out=labels)
        best = np.maximum(best, challenger)
    return labels[None]
