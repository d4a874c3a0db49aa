"""One forward function per device and precision, behind one small interface.

A forward takes (n, channels, *spatial) float32 and returns (n, classes, *smaller) float32
probabilities. The network runs in valid mode with batch norm folded into its convolutions. An
`EngineSpec` says which forward; it is resolved once, when the plan is made, and stored there: a
worker that cannot build exactly that engine refuses to work, because the engine decides the bytes.

    engine      processors                  GPUs
    torch       the reference               the reference, and the default
    compiled    with a C++ compiler         with triton and a C compiler
    openvino    where it is installed: the default      –
    tensorrt    –                           where it is installed
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch

from bigseg.errors import BigsegError, ResourceError, UsageError
from bigseg.openvino_engine import openvino_forward
from bigseg.torch_engine import (
    Device,
    DeviceForward,
    EngineName,
    EngineSpec,
    Forward,
    Precision,
    device_forward,
    from_host,
    torch_forward,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.model import UNet

__all__ = [
    "Device",
    "DeviceForward",
    "EngineName",
    "EngineSpec",
    "Forward",
    "Precision",
    "available_cpus",
    "best_precision",
    "build_engine",
    "candidates",
    "check_engine",
    "device_forward",
    "pick_device",
    "resolve_engine",
    "torch_forward",
]

logger = logging.getLogger(__name__)

# The order of preference of what the default is chosen from, then of what else there is.
_NAMES: dict[Device, tuple[EngineName, ...]] = {
    "cpu": ("openvino", "compiled", "torch"),
    "cuda": ("torch", "compiled", "tensorrt"),
}
_HARDWARE = {"cpu": "processors", "cuda": "GPUs"}
# The distribution whose version decides the bytes, and what pip is told to install.
_PACKAGES = {"openvino": ("openvino",) * 2, "tensorrt": ("torch-tensorrt", "'bigseg[tensorrt]'")}


def resolve_engine(
    name: EngineName | Literal["auto"],
    precision: Precision | Literal["auto"],
    *,
    device: Device,
) -> EngineSpec:
    """The engine for these wishes on this kind of device.

    `auto` is OpenVINO on processors where it is installed (on 2 cores with AMX it is eight to
    fifteen times as fast as eager torch; where it is not, torch, with a warning) and torch on GPUs.

    Raises:
        UsageError: the engine or the precision does not run on this kind of device.
        ResourceError: what the engine needs is not installed, or this processor lacks it.
    """
    if name == "auto":
        name = _default(device)
    if name not in _NAMES[device]:
        other: Device = "cpu" if device == "cuda" else "cuda"
        raise UsageError(
            f"engine {name} runs on {_HARDWARE[other]}, not on {_HARDWARE[device]}: "
            "use --engine torch"
        )
    if precision == "fp16" and device == "cpu":
        raise UsageError("precision fp16 runs on GPUs, not on processors: use bf16 or fp32")
    if precision == "auto":
        precision = best_precision(device)
    _check_needs(name, precision, device)
    isa = "cuda" if device == "cuda" else _cpu_isa(precision)
    # Without what follows the +: a driver without a GPU has another build than its workers.
    package, _ = _PACKAGES.get(name, ("torch", "torch"))
    package_version = version(package).partition("+")[0]
    return EngineSpec(
        name=name, device=device, precision=precision, version=package_version, isa=isa
    )


def candidates(device: Device, precision: Precision | Literal["auto"]) -> tuple[EngineSpec, ...]:
    """The engines that can be built here in this precision, the default first."""
    default = _default(device)
    found = []
    for name in (default, *(other for other in _NAMES[device] if other != default)):
        try:
            engine = resolve_engine(name, precision, device=device)
            # Compiling for processors that emulate bf16 takes minutes, and computing longer.
            slow = device == "cpu" and engine.precision not in ("fp32", best_precision(device))
            if not (slow and name == "compiled"):
                found.append(engine)
        except BigsegError as error:
            logger.info("engine %s is left out: %s", name, error)
    return tuple(found)


def build_engine(
    net: UNet, spec: EngineSpec, *, input_shape: Sequence[int], n_threads: int
) -> Forward:
    """The forward function of `spec` for inputs of (n, channels, *spatial) = `input_shape`.

    `n_threads` is for OpenVINO; torch has those of its process (`cluster.set_worker_threads`).

    Raises:
        ResourceError: this machine cannot run it: no GPU, another version, another processor.
    """
    check_engine(spec)
    if spec.name == "openvino":
        return openvino_forward(net, spec, input_shape=input_shape, n_threads=n_threads)
    device = pick_device(spec.device)
    return from_host(device_forward(net, spec, input_shape=input_shape, device=device), device)


def check_engine(spec: EngineSpec) -> None:
    """Refuse to work with another engine than the plan's.

    Raises:
        ResourceError: this machine has another version, or another processor.
    """
    here = resolve_engine(spec.name, spec.precision, device=spec.device)
    if here != spec:
        raise ResourceError(
            f"the plan asks for {spec}, this worker has {here}: results would differ in the last "
            "bits; run all workers in one environment on one kind of processor"
        )


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
        return "bf16" if not torch.cuda.is_available() or _multiplies_in_bf16() else "fp32"
    return "bf16" if {"amx_bf16", "avx512_bf16"} & _cpu_flags() else "fp32"


def _multiplies_in_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default(device: Device) -> EngineName:
    if device == "cuda":
        return "torch"
    if _installed("openvino"):
        return "openvino"
    _warn_once("openvino is not installed, torch is used, which is slower: pip install openvino")
    return "torch"


@lru_cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check_needs(name: EngineName, precision: Precision, device: Device) -> None:
    package, wanted = _PACKAGES.get(name, (None, None))
    if package is not None and not _installed(package):
        raise ResourceError(f"engine {name} is not installed: pip install {wanted}")
    if name == "openvino" and precision == "bf16" and best_precision("cpu") != "bf16":
        # OpenVINO would compute in float32 and say nothing (2026.4).
        raise ResourceError(
            "engine openvino has no bf16 on this processor: use --precision fp32, or --engine "
            "torch, which emulates it slowly"
        )
    if name == "compiled":
        _check_compiler(device)


def _check_compiler(device: Device) -> None:
    if device == "cpu" and not _found("CXX", "clang++" if platform.system() == "Darwin" else "g++"):
        raise ResourceError(
            "engine compiled needs a C++ compiler and there is none: install g++, or name one in "
            "CXX"
        )
    # A driver without a GPU compiles nothing, and cannot say what its workers have.
    if device == "cpu" or not torch.cuda.is_available():
        return
    if find_spec("triton") is None:
        raise ResourceError("engine compiled needs triton on GPUs: pip install triton")
    if not _found("CC", "gcc", "clang", "cc"):
        raise ResourceError(
            "engine compiled needs a C compiler and there is none: install gcc, or name one in CC"
        )


def _found(variable: str, *programs: str) -> bool:
    named = os.environ.get(variable)
    return any(shutil.which(program) for program in ([named] if named else programs))


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
