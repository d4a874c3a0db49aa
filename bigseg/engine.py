"""One forward function per device and precision, behind one small interface.

A forward takes (n, channels, *spatial) float32 and returns (n, classes, *smaller) float32
probabilities. The network runs in valid mode with batch norm folded into its convolutions. An
`EngineSpec` says which forward; it is resolved once, when the plan is made, and stored there: a
worker that cannot build exactly that engine refuses to work, because the engine decides the bytes.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigseg.config import Settings
from bigseg.errors import ResourceError, UsageError
from bigseg.model import ConvBlock, UNet, valid_copy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Precision = Literal["fp32", "bf16"]
Device = Literal["cpu", "cuda"]


class EngineSpec(Settings):
    """Which forward function: all of it decides the bytes of the result."""

    name: Literal["torch", "openvino"]
    device: Device
    precision: Precision
    version: str
    isa: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} on {self.device} in {self.precision} ({self.isa})"


def resolve_engine(
    name: Literal["auto", "torch", "openvino"],
    precision: Literal["auto", "fp32", "bf16"],
    *,
    device: Device,
) -> EngineSpec:
    """The engine for these wishes on this kind of device.

    `auto` is OpenVINO on processors where it is installed (on 2 cores with AMX it is eight to
    fifteen times as fast as eager torch) and torch on GPUs.

    Raises:
        UsageError: OpenVINO was asked for on a GPU.
        ResourceError: OpenVINO was asked for and is not installed.
    """
    if name == "auto":
        name = "openvino" if device == "cpu" and _installed("openvino") else "torch"
    if name == "openvino" and device == "cuda":
        raise UsageError("engine openvino runs on processors, not on GPUs: use --engine torch")
    if name == "openvino" and not _installed("openvino"):
        raise ResourceError("engine openvino is not installed: pip install openvino")
    if precision == "auto":
        precision = best_precision(device)
    isa = "cuda" if device == "cuda" else _cpu_isa(precision)
    # Without what follows the +: a driver without a GPU has another build than its workers.
    package_version = version(name).partition("+")[0]
    return EngineSpec(
        name=name, device=device, precision=precision, version=package_version, isa=isa
    )


def build_engine(
    net: UNet, spec: EngineSpec, *, input_shape: Sequence[int], n_threads: int
) -> Forward:
    """The forward function of `spec` for inputs of (n, channels, *spatial) = `input_shape`.

    Raises:
        ResourceError: this machine cannot run it: no GPU, another version, another processor.
    """
    here = resolve_engine(spec.name, spec.precision, device=spec.device)
    if here != spec:
        raise ResourceError(
            f"the plan asks for {spec}, this worker has {here}: results would differ in the last "
            "bits; run all workers in one environment on one kind of processor"
        )
    if spec.name == "openvino":
        return _openvino_forward(net, spec.precision, tuple(input_shape), n_threads)
    return torch_forward(net, device=pick_device(spec.device), precision=spec.precision)


def pick_device(device: Device | None = None) -> torch.device:
    """The torch device asked for; without a wish a GPU where there is one.

    Raises:
        ResourceError: a GPU was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("a GPU was asked for, torch sees none: check the driver or use CPU")
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@lru_cache
def best_precision(device: Device | torch.device) -> Precision:
    """bf16 where the device multiplies matrices in it, else fp32."""
    kind = device if isinstance(device, str) else device.type
    if kind == "cuda":
        # Ampere and later; a cluster's driver may have no GPU to ask.
        return "bf16" if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & _cpu_flags() else "fp32"


def torch_forward(net: UNet, *, device: torch.device, precision: Precision) -> Forward:
    """The reference forward: eager torch, channels last.

    cuDNN neither times algorithms against each other nor uses ones that do not repeat themselves,
    so that every worker gives the same bytes; fp32 is fp32, not TF32.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout: Any = torch.channels_last if net.spec.dims == 2 else torch.channels_last_3d
    module = _fold_batch_norm(valid_copy(net))
    if device.type == "cpu":
        module.head = _steady_head(module.head)
    module = module.to(device=device, dtype=dtype)
    module = module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's own omission

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode(), _repeatable():
            x = torch.from_numpy(batch).to(device, dtype).to(memory_format=layout)
            return _probabilities(module(x)[:, : net.spec.out_channels].float())

    return forward


def _repeatable() -> AbstractContextManager[None]:
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def _probabilities(logits: Tensor) -> NDArray[np.float32]:
    """Softmax over axis 1, the same bytes for any number of threads."""
    if logits.is_cuda:
        on_gpu: NDArray[np.float32] = logits.softmax(dim=1).cpu().numpy()
        return on_gpu
    # torch's own takes another exp for the ends of what each thread gets (2.13); numpy is as fast.
    result: NDArray[np.float32] = logits.contiguous().numpy()
    result -= result.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=1, keepdims=True)
    return result


def _steady_head(head: nn.Conv2d | nn.Conv3d) -> nn.Conv2d | nn.Conv3d:
    """The 1x1 convolution so that its bytes do not depend on the number of threads.

    torch leaves 1x1 convolutions to another library on one thread than on several, unless they are
    dilated (which for one tap means nothing); oneDNN takes another algorithm for some odd numbers
    of output channels. Measured with torch 2.13: without this 2-D networks differ in the last bit.
    """
    assert head.bias is not None, head
    n = head.out_channels + -head.out_channels % 8
    steady = type(head)(head.in_channels, n, 1, dilation=2)
    weight, bias = torch.zeros_like(steady.weight), torch.zeros(n)
    weight[: head.out_channels] = head.weight.detach()
    bias[: head.out_channels] = head.bias.detach()
    steady.weight, steady.bias = nn.Parameter(weight), nn.Parameter(bias)
    return steady.eval()


class _WithSoftmax(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.softmax(dim=1)


def _openvino_forward(
    net: UNet, precision: Precision, input_shape: tuple[int, ...], n_threads: int
) -> Forward:
    import openvino

    module = _WithSoftmax(_fold_batch_norm(valid_copy(net)))
    with torch.inference_mode(), warnings.catch_warnings():
        # Traced on a small input that fits: the graph does not depend on the size, and what is
        # cropped of a skip connection is the same for every size.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # OpenVINO 2026.4 still traces, which torch 2.13 discourages.
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        small = _smallest_input(net, input_shape)
        model = openvino.convert_model(module, example_input=torch.zeros(small))
    model.reshape(list(input_shape))
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": n_threads,
            "NUM_STREAMS": 1,
            # With pinning, two actors of one thread each share one core: 0.96 times the speed of
            # one actor instead of 2.03 times (measured on two cores).
            "ENABLE_CPU_PINNING": False,
        },
    )
    request = compiled.create_infer_request()

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer([np.ascontiguousarray(batch)], share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    return forward


def _smallest_input(net: UNet, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    from bigseg.model import footprint

    mark = footprint(net.spec)
    spatial = mark.input_shape(mark.smallest_output((1,) * net.spec.dims))
    return (1, input_shape[1], *spatial)


def _fold_batch_norm(net: UNet) -> UNet:
    """Batch norm multiplied into the convolution before it; in place, for evaluation only."""
    for block in net.modules():
        if not isinstance(block, ConvBlock):
            continue
        for i in range(len(block) - 1):
            conv, norm = block[i], block[i + 1]
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
                assert isinstance(conv, nn.Conv2d | nn.Conv3d)
                block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return net


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


@lru_cache
def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def _cpu_isa(precision: Precision) -> str:
    """The instruction set that decides how sums are rounded."""
    wanted = ["amx_bf16", "avx512_bf16"] if precision == "bf16" else []
    for flag in (*wanted, "avx512f", "avx2"):
        if flag in _cpu_flags():
            return flag
    return platform.machine() or "unknown"
