"""Forward passes on this machine's GPU: the paper's own network, and the nets of the other figures.

    python benchmarks/gpu.py

Each row is the median of 20 warm passes, host to host: input in main memory, probabilities back in
main memory. `raw` is the same network and input already on the device, without the copies.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from bigseg.config import UNetSpec
from bigseg.engine import best_precision, torch_forward
from bigseg.model import UNet, footprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from bigseg.engine import Precision

CASES = {
    "paper 2-D, depth 4, 64 ... 1024, 512²": (2, 4, 64, (512, 512)),
    "2-D, depth 4, width 32, 512²": (2, 4, 32, (512, 512)),
    "3-D, depth 3, width 16, 104³": (3, 3, 16, (104,) * 3),
    "3-D, depth 3, width 16, 200³": (3, 3, 16, (200,) * 3),
    "3-D, depth 3, width 32, 200³": (3, 3, 32, (200,) * 3),
}


def main() -> None:
    """Print a table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{'network':42s} {'type':5s} {'host ms':>8s} {'raw ms':>8s} {'Mvox/s':>8s} {'TFLOP/s':>8s}"
    )
    for label, (dims, depth, width, output) in CASES.items():
        spec = UNetSpec.build(dims, out_channels=2, depth=depth, width=width)
        for precision in dict.fromkeys(["fp32", best_precision(device)]):
            print(row(label, spec, output, device, precision), flush=True)


def row(
    label: str, spec: UNetSpec, wanted: tuple[int, ...], device: torch.device, precision: Precision
) -> str:
    """One line of the table."""
    mark = footprint(spec)
    output = mark.smallest_output(wanted)
    torch.manual_seed(0)
    net = UNet(spec).eval()
    x = np.random.default_rng(0).normal(0.5, 0.3, (1, 1, *mark.input_shape(output)))
    batch = x.astype(np.float32)
    forward = torch_forward(net, device=device, precision=precision)
    host = median_s(lambda: forward(batch), device)
    raw = raw_s(net, batch, device, precision)
    voxels = float(np.prod(wanted))
    return (
        f"{label:42s} {precision:5s} {host * 1e3:8.1f} {raw * 1e3:8.1f} "
        f"{voxels / host / 1e6:8.1f} {mark.flops(output) / raw / 1e12:8.1f}"
    )


def raw_s(net: UNet, batch: np.ndarray, device: torch.device, precision: Precision) -> float:
    """Seconds of the network alone, input on the device."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if net.spec.dims == 2 else torch.channels_last_3d
    module = net.to(device=device, dtype=dtype).to(memory_format=layout)
    x = torch.from_numpy(batch).to(device, dtype).to(memory_format=layout)
    with torch.inference_mode():
        return median_s(lambda: module(x), device)


def median_s(call: Callable[[], object], device: torch.device, n: int = 20) -> float:
    """Median seconds of a call after three that warm up."""
    times = []
    for i in range(n + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
