"""The U-Net in 2-D and 3-D, and its footprint: stride, halo, and the sizes that fit.

    level 0   conv conv ─────────────────── crop ──> concat conv conv ── 1×1 ──> logits
                    └ pool                     up ┘
    level 1         conv conv ──── crop ──> concat conv conv
                            └ pool   up ┘
    level 2                 conv conv                (depth 2 drawn)

Ronneberger, Fischer, Brox 2015 (2-D; arXiv 1505.04597); Cicek et al. 2016 (3-D; arXiv 1606.06650).
In valid mode every convolution computes only what lies fully inside its input, so the output is
smaller than the input by the halo on each side and no voxel has seen padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bigseg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bigseg.config import UNetSpec

Vec = tuple[int, ...]

# Typed loosely: the two- and three-dimensional layers take tuples of different lengths.
_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvBlock(nn.Sequential):
    """`n_convs` times convolution, norm, ReLU at one level."""

    def __init__(self, spec: UNetSpec, level: int, in_channels: int) -> None:
        width, kernel = spec.widths[level], spec.kernels[level]
        padding = tuple(k // 2 for k in kernel) if spec.padding == "same" else (0,) * spec.dims
        layers: list[nn.Module] = []
        for i in range(spec.n_convs):
            channels = in_channels if i == 0 else width
            # A bias before batch norm is subtracted by it again.
            bias = spec.norm == "none"
            layers.append(_CONV[spec.dims](channels, width, kernel, padding=padding, bias=bias))
            if spec.norm == "batch":
                layers.append(_BATCH_NORM[spec.dims](width))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class UNet(nn.Module):
    """The network that a `UNetSpec` describes.

    `forward` takes (n, in_channels, *spatial) and returns logits (n, out_channels, *smaller), where
    `smaller` equals `spatial` with padding 'same' and `footprint(spec).output_shape(spatial)` with
    'valid'. Weights do not depend on the padding.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths, depth = spec.widths, spec.depth
        inputs = [spec.in_channels, *widths[:-1]]
        self.down = nn.ModuleList(ConvBlock(spec, i, inputs[i]) for i in range(depth + 1))
        self.pool = nn.ModuleList(_POOL[spec.dims](s, stride=s) for s in spec.strides)
        self.up = nn.ModuleList(
            _UP[spec.dims](widths[i + 1], widths[i], spec.strides[i], stride=spec.strides[i])
            for i in range(depth)
        )
        self.merge = nn.ModuleList(ConvBlock(spec, i, 2 * widths[i]) for i in range(depth))
        self.head = _CONV[spec.dims](widths[0], spec.out_channels, 1)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for a batch; see the class for shapes."""
        skips = []
        for block, pool in zip(self.down[:-1], self.pool, strict=True):
            x = block(x)
            skips.append(x)
            x = pool(x)
        x = self.down[-1](x)
        for level in reversed(range(self.spec.depth)):
            x = self.up[level](x)
            x = self.merge[level](torch.cat([_crop_centre(skips.pop(), x), x], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _initialise(module: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / N), as in the U-Net paper."""
    # Without memory there is nothing to set, and torch would load its compiler to do so (2.13),
    # which takes every worker a second.
    if isinstance(module, nn.Conv2d | nn.Conv3d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _crop_centre(skip: Tensor, like: Tensor) -> Tensor:
    for axis in range(2, skip.ndim):
        excess = skip.shape[axis] - like.shape[axis]
        if excess:
            skip = skip.narrow(axis, excess // 2, like.shape[axis])
    return skip


def valid_copy(net: UNet) -> UNet:
    """The same weights without padding, in evaluation mode: the network as it segments."""
    copy = UNet(net.spec.model_copy(update={"padding": "valid"}))
    copy.load_state_dict(net.state_dict())
    return copy.eval()


@dataclass(frozen=True)
class Footprint:
    """What a valid U-Net reads and computes along each axis, derived from its layers.

    `stride` is the product of the poolings, the period at which the network is translation
    equivariant; `halo` is the number of voxels that it reads beyond its output on each side.
    """

    spec: UNetSpec
    stride: Vec
    halo: Vec

    def input_shape(self, output: Sequence[int]) -> Vec:
        """The input that gives `output`.

        Raises:
            UsageError: no input gives it; names the smallest larger output that fits.

        """
        shape = tuple(o + 2 * h for o, h in zip(output, self.halo, strict=True))
        if not self.fits(output):
            fitting = self.smallest_output(output)
            raise UsageError(
                f"the network cannot compute an output of {tuple(output)} voxels: its poolings "
                f"need other sizes; the next that fits is {fitting}"
            )
        return shape

    def output_shape(self, input_shape: Sequence[int]) -> Vec:
        """The output that an input of this shape gives.

        Raises:
            UsageError: a pooling does not divide, or nothing is left.

        """
        output = tuple(i - 2 * h for i, h in zip(input_shape, self.halo, strict=True))
        if not self.fits(output):
            raise UsageError(
                f"an input of {tuple(input_shape)} voxels does not fit the network; "
                f"{self.input_shape(self.smallest_output(output))} does"
            )
        return output

    def fits(self, output: Sequence[int]) -> bool:
        """Whether there is an input that gives exactly `output`."""
        return all(
            _sizes(self.spec, axis, o + 2 * h) is not None
            for axis, (o, h) in enumerate(zip(output, self.halo, strict=True))
        )

    def smallest_output(self, at_least: Sequence[int]) -> Vec:
        """The smallest output that fits and has at least this many voxels on every axis."""
        result = []
        for axis, (least, halo) in enumerate(zip(at_least, self.halo, strict=True)):
            size = max(1, least)
            while _sizes(self.spec, axis, size + 2 * halo) is None:
                size += 1
            result.append(size)
        return tuple(result)

    def flops(self, output: Sequence[int]) -> int:
        """Floating-point operations of the convolutions for one output; 2 per multiply-add."""
        shape = self.input_shape(output)
        levels = [_sizes(self.spec, axis, n) for axis, n in enumerate(shape)]
        return self.spec.n_passes * sum(
            _conv_flops(self.spec, step, [lv[i] for lv in levels if lv is not None])
            for i, step in enumerate(_steps(self.spec))
        )

    def flops_of_all(self, outputs: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`flops` for every combination of these outputs along each axis, all of which must fit."""
        steps = _steps(self.spec)
        one_voxel = np.array([_conv_flops(self.spec, step, [1]) for step in steps], np.float64)
        total = one_voxel
        for axis, (sizes, halo) in enumerate(zip(outputs, self.halo, strict=True)):
            of_steps = [_sizes(self.spec, axis, size + 2 * halo) for size in sizes]
            table = np.array([[1] if n is None else n for n in of_steps], np.float64)
            total = total[..., np.newaxis, :] * table
        return np.asarray(self.spec.n_passes * total.sum(axis=-1))

    def useful_flops(self, n_voxels: int) -> int:
        """Operations for `n_voxels` voxels of output without any halo, as in an endless volume."""
        total = 0.0
        for step in _steps(self.spec):
            voxels = n_voxels / math.prod(math.prod(s) for s in self.spec.strides[: step.level])
            total += _conv_flops(self.spec, step, [1]) * voxels
        return round(self.spec.n_passes * total)


def footprint(spec: UNetSpec) -> Footprint:
    """Stride and halo of the network.

    The halo is, for each axis, the sum over the levels of the voxels that their convolutions
    consume on one side, times the stride down to that level; levels above the bottom count twice.
    For 3-wide kernels, n convolutions a level and depth d: sum over l < d of 2n·2^l, plus n·2^d.
    """
    stride = [1] * spec.dims
    halo = [0] * spec.dims
    for level, kernel in enumerate(spec.kernels):
        passes = 1 if level == spec.depth else 2
        for axis, k in enumerate(kernel):
            halo[axis] += passes * spec.n_convs * (k // 2) * stride[axis]
        if level < spec.depth:
            stride = [s * f for s, f in zip(stride, spec.strides[level], strict=True)]
    return Footprint(spec, tuple(stride), tuple(halo))


@dataclass(frozen=True)
class _Step:
    kind: str
    level: int
    in_channels: int
    out_channels: int


def _steps(spec: UNetSpec) -> list[_Step]:
    """The layers that change sizes, in order of execution."""
    widths = spec.widths
    steps = []

    def convs(level: int, first: int) -> None:
        for i in range(spec.n_convs):
            steps.append(_Step("conv", level, first if i == 0 else widths[level], widths[level]))

    for level in range(spec.depth + 1):
        convs(level, spec.in_channels if level == 0 else widths[level - 1])
        if level < spec.depth:
            steps.append(_Step("pool", level, widths[level], widths[level]))
    for level in reversed(range(spec.depth)):
        steps.append(_Step("up", level, widths[level + 1], widths[level]))
        convs(level, 2 * widths[level])
    steps.append(_Step("head", 0, widths[0], spec.out_channels))
    return steps


def _sizes(spec: UNetSpec, axis: int, size: int) -> list[int] | None:
    """The size after each step along one axis, or None where the input does not fit."""
    sizes = []
    for step in _steps(spec):
        if step.kind == "conv":
            size -= spec.kernels[step.level][axis] - 1
        elif step.kind == "pool":
            if size % spec.strides[step.level][axis]:
                return None
            size //= spec.strides[step.level][axis]
        elif step.kind == "up":
            size *= spec.strides[step.level][axis]
        if size < 1:
            return None
        sizes.append(size)
    return sizes


def _conv_flops(spec: UNetSpec, step: _Step, shape: Sequence[int]) -> int:
    taps = {
        "conv": math.prod(spec.kernels[step.level]),
        "pool": 0,
        "up": 1,
        "head": 1,
    }[step.kind]
    return 2 * taps * step.in_channels * step.out_channels * math.prod(shape)
