"""What all contestants of peers.py share: network, volume, and forwards of equal precision.

    folder/model.safetensors     3-D U-Net, 2 classes, random weights; width 16, depth 3 in earnest
    folder/image-Z-Y-X.zarr      uint8 membranes and noise, OME-Zarr 0.5, chunks of 64³, zstd

The weights serve with padding 'same' (what peers run) and 'valid' (what bigseg runs): far enough
from any border both give the same class.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import zarr
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigseg.checkpoint import load_model, save_model
from bigseg.config import ModelCard, NormRule, UNetSpec
from bigseg.engine import best_precision, build_engine, pick_device, resolve_engine
from bigseg.model import ConvBlock, UNet, footprint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

OFFSET, SCALE = 110.0, 40.0
CHUNK = 64
LONG_S = 5.0


def write_volume(folder: Path, shape: Sequence[int], *, n_repeats: int = 1) -> Path:
    """The OME-Zarr image of this shape (z, y, x), so many times in a row along z; made once."""
    path = folder / f"image-{'-'.join(map(str, shape))}-{n_repeats}.zarr"
    if path.exists():
        return path
    group = zarr.create_group(str(path), zarr_format=3)
    array = group.create_array(
        "0",
        shape=(n_repeats * shape[0], *shape[1:]),
        chunks=tuple(min(CHUNK, n) for n in shape),
        dtype="uint8",
        compressors=zarr.codecs.ZstdCodec(level=3),
        dimension_names=["z", "y", "x"],
    )
    array[:] = np.concatenate([membranes(shape)] * n_repeats)
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    level = {"path": "0", "coordinateTransformations": scale}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    return path


def membranes(shape: Sequence[int]) -> NDArray[np.uint8]:
    """Bright cells, dark membranes and noise, as electron microscopes give them."""
    rng = np.random.default_rng(0)
    coarse = tuple(-(-n // 8) + 3 for n in shape)
    field = torch.from_numpy(rng.standard_normal(coarse, np.float32))[None, None]
    size = tuple(8 * n for n in coarse)
    smooth = nn.functional.interpolate(field, size=size, mode="trilinear", align_corners=False)
    cells = smooth[0, 0, 8 : 8 + shape[0], 8 : 8 + shape[1], 8 : 8 + shape[2]].numpy()
    image = 150.0 - 90.0 * np.exp(-((cells / 0.12) ** 2))
    image += 12.0 * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_network(folder: Path, *, width: int, depth: int) -> Path:
    """The model file; made once. On membranes both classes are as frequent."""
    path = folder / "model.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    spec = UNetSpec.build(3, out_channels=2, depth=depth, width=width, padding="same")
    net = UNet(spec).eval()
    halo = halo_of(net)
    patch = torch.from_numpy(normalise(membranes((96, 96, 96))))[None, None]
    with torch.inference_mode():
        inner = net(patch)[0, :, halo:-halo, halo:-halo, halo:-halo]
    assert net.head.bias is not None
    with torch.no_grad():
        net.head.bias[0] += (inner[1] - inner[0]).median()
    norm = NormRule(kind="fixed", offset=OFFSET, scale=SCALE)
    card = ModelCard(spec=spec, classes=("cell", "membrane"), norm=norm)
    save_model(str(path), net, card)
    return path


def read_network(folder: Path) -> UNet:
    """The network with padding 'same', in evaluation mode."""
    net, _ = load_model(str(folder / "model.safetensors"))
    assert net.spec.padding == "same"
    return net


def halo_of(net: UNet) -> int:
    """Voxels that the network reads beyond its output, the same on every side."""
    (halo,) = set(footprint(net.spec).halo)
    return halo


def normalise(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Network input: fixed constants, so that all contestants compute from the same numbers."""
    return (data.astype(np.float32) - np.float32(OFFSET)) / np.float32(SCALE)


def classes_of(scores: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The class (z, y, x) from the scores (2, z, y, x): the first of equals."""
    return (scores[1] > scores[0]).astype(np.uint8)


class ValidForward:
    """bigseg's own engine for grown blocks (z, y, x) of any size: core plus halo on each side.

    What does not fit the network is padded behind the block and cropped from the result, which
    leaves the scores of the core as they are. For one thread at a time, and not built in two
    threads at once: OpenVINO traces the network.
    """

    def __init__(self, net: UNet, *, n_threads: int) -> None:
        self._net = net
        self._n_threads = n_threads
        self._forwards: dict[
            tuple[int, ...], Callable[[NDArray[np.float32]], NDArray[np.float32]]
        ] = {}

    def __call__(self, grown: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities (2, z, y, x) of the core."""
        core = tuple(n - 2 * halo_of(self._net) for n in grown.shape)
        fitting = footprint(self._net.spec).smallest_output(core)
        padding = [(0, f - c) for f, c in zip(fitting, core, strict=True)]
        batch = np.pad(grown, padding)[None, None]
        if batch.shape not in self._forwards:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            spec = resolve_engine("auto", "auto", device=device)
            self._forwards[batch.shape] = build_engine(
                self._net, spec, input_shape=batch.shape, n_threads=self._n_threads
            )
        scores = self._forwards[batch.shape](batch)[0]
        return scores[:, : core[0], : core[1], : core[2]]


def fastest_same(
    net: UNet, input_shape: tuple[int, ...], *, n_threads: int
) -> Callable[[Tensor], Tensor]:
    """Padding 'same' in bigseg's engine and precision: (n, 1, z, y, x) to logits (n, 2, z, y, x).

    For blending peers, which need an output as large as the input.
    """
    device = pick_device()
    precision = best_precision(device)
    folded = _fold_batch_norm(net)
    if device.type == "cpu":
        return _openvino_same(folded, input_shape, precision, n_threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = folded.to(device=device, dtype=dtype).to(memory_format=torch.channels_last_3d)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = module(x.to(device, dtype).to(memory_format=torch.channels_last_3d))
        return y.float()

    return forward


def _openvino_same(
    net: UNet, input_shape: tuple[int, ...], precision: str, n_threads: int
) -> Callable[[Tensor], Tensor]:
    import openvino

    with torch.inference_mode(), warnings.catch_warnings():
        # The same two as in bigseg's own engine.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        model = openvino.convert_model(net, example_input=torch.zeros(input_shape))
    model.reshape(list(input_shape))
    properties = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()

    def forward(x: Tensor) -> Tensor:
        request.infer([np.ascontiguousarray(x.numpy())], share_inputs=True)
        return torch.from_numpy(np.array(request.get_output_tensor(0).data, dtype=np.float32))

    return forward


def _fold_batch_norm(net: UNet) -> UNet:
    for block in net.modules():
        if isinstance(block, ConvBlock):
            for i, (conv, norm) in enumerate(zip(list(block), list(block)[1:], strict=False)):
                if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
                    block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return net


def set_threads(n_threads: int) -> None:
    """Give torch this many threads, and make sure that it took them."""
    torch.set_num_threads(n_threads)
    assert torch.get_num_threads() == n_threads, torch.get_num_threads()


def timed_s(call: Callable[[], object]) -> float:
    """Seconds of one call, with the device's work done."""
    _synchronise()
    started = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - started


def median_s(call: Callable[[], object], n: int = 3) -> float:
    """Median seconds of a warm call; of one that takes long the seconds of that one."""
    first = timed_s(call)
    if first > LONG_S:
        return first
    return statistics.median([first, *(timed_s(call) for _ in range(n - 1))])


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(**figures: float | str) -> None:
    """The figures of this process as one line of JSON, with its largest memory so far."""
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    print(json.dumps({**figures, "peak_gib": round(peak_gib, 2)}), flush=True)


def contestant_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that peers.py gives to every contestant."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--engine", choices=["shipped", "ours"], required=True)
    parser.add_argument("--side", type=int, required=True)
    return parser
