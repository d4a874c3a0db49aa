"""The engine that OpenVINO runs: processors only, from the host to the host.

What is compiled for one input shape is kept for the next run, which then needs neither torch's
tracing nor OpenVINO's conversion.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bigseg.errors import ResourceError
from bigseg.model import UNet, footprint, valid_copy
from bigseg.reuse import digest_of, load_entry, processor, save_entry
from bigseg.torch_engine import (
    fold_batch_norm,
    from_host,
    over_mirror_images,
    weights_digest,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.torch_engine import EngineSpec, Forward

logger = logging.getLogger(__name__)

# Of what is kept: another number makes everything that older versions kept unused.
_FORMAT = "1"

# OpenVINO's names of the types.
_TYPES = {"fp32": "f32", "bf16": "bf16"}


def openvino_forward(
    net: UNet, spec: EngineSpec, *, input_shape: Sequence[int], n_threads: int
) -> Forward:
    """The forward function of `spec` for arrays of (n, channels, *spatial) = `input_shape`.

    Raises:
        ResourceError: OpenVINO takes another precision or more threads than it was told.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": _TYPES[spec.precision],
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": 1,
        # With pinning, two actors of one thread each share one core: 0.96 times the speed of
        # one actor instead of 2.03 times (measured on two cores).
        "ENABLE_CPU_PINNING": False,
    }
    compiled = _kept_or_compiled(net, spec, tuple(input_shape), settings)
    _check(compiled, spec, n_threads)
    request = compiled.create_infer_request()

    def forward(batch: Tensor) -> Tensor:
        request.infer([np.ascontiguousarray(batch.numpy())], share_inputs=True)
        return torch.from_numpy(np.array(request.get_output_tensor(0).data, dtype=np.float32))

    return from_host(over_mirror_images(forward, net.spec), torch.device("cpu"))


def _kept_or_compiled(
    net: UNet, spec: EngineSpec, input_shape: tuple[int, ...], settings: dict[str, Any]
) -> Any:  # noqa: ANN401 - openvino has no types
    """The compiled model, from the last run where that left one.

    OpenVINO's own CACHE_DIR needs the converted model to find its entry, and the conversion is most
    of the time: 13.6 of 14.4 s for a 3-D network of width 16, against 0.6 s for all of this.
    """
    import openvino

    core = openvino.Core()
    name = _entry(net, spec, input_shape, openvino.__version__)
    kept = load_entry(name)
    if kept is not None:
        try:
            return core.import_model(kept, "CPU", settings)
        except RuntimeError as error:
            # Whole, but of a processor or library that its name does not tell apart.
            logger.warning("OpenVINO does not take %s (%s); it is made anew", name, error)
    compiled = core.compile_model(_converted(net, input_shape), "CPU", settings)
    save_entry(name, compiled.export_model().getvalue())
    return compiled


def _entry(net: UNet, spec: EngineSpec, input_shape: tuple[int, ...], version: str) -> str:
    # Threads are not in it: they are set anew whenever an entry is imported.
    parts = (_FORMAT, weights_digest(net), spec.model_dump_json(), str(input_shape), version)
    return digest_of(*parts, torch.__version__, processor()) + ".ov"


def _check(compiled: Any, spec: EngineSpec, n_threads: int) -> None:  # noqa: ANN401
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if precision != _TYPES[spec.precision]:
        raise ResourceError(
            f"OpenVINO computes in {precision} on this processor where {spec.precision} was asked "
            "for: use --precision fp32"
        )
    n_found = compiled.get_property("INFERENCE_NUM_THREADS")
    if n_found > n_threads or compiled.get_property("ENABLE_CPU_PINNING"):
        raise ResourceError(
            f"OpenVINO uses {n_found} threads where {n_threads} were set, or pins them: unset the "
            "variables of the environment that begin with OMP, TBB or OV"
        )
    if n_found < n_threads:
        logger.warning("OpenVINO uses %d threads, not %d: it sees no more", n_found, n_threads)


class _WithSoftmax(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.softmax(dim=1)


def _converted(net: UNet, input_shape: tuple[int, ...]) -> Any:  # noqa: ANN401
    import openvino

    module = _WithSoftmax(fold_batch_norm(valid_copy(net)))
    with torch.inference_mode(), warnings.catch_warnings():
        # Traced on a small input that fits: the graph does not depend on the size, and what is
        # cropped of a skip connection is the same for every size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # OpenVINO 2026.4 still traces, which torch 2.13 discourages.
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        small = torch.zeros(_smallest_input(net, input_shape))
        model = openvino.convert_model(module, example_input=small)
    model.reshape(list(input_shape))
    return model


def _smallest_input(net: UNet, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    mark = footprint(net.spec)
    spatial = mark.input_shape(mark.smallest_output((1,) * net.spec.dims))
    return (1, input_shape[1], *spatial)
