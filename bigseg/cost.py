"""What a segmentation costs in memory and operations, and the sizes that cost least.

    memory of a worker =   the process itself
                         + one forward pass
                         + the blocks in flight (read ahead, worked on, being written)
                         + decoded chunks that the next blocks need again

Every tile reads and computes its halo anew, so larger tiles waste less; memory bounds them. The
volume decides, never a region of it, so that a part is segmented as it would be in the whole.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bigseg.blocks import Vec, ceil_div, round_up
from bigseg.model import footprint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bigseg.config import UNetSpec

LARGEST_TILE = {2: 2048, 3: 512}
CACHE_SHARE = 16
# torch, zarr, Ray and the engine's own code (measured: 0.5 to 0.6 GiB); with CUDA its libraries.
PROCESS_BYTES = {"cpu": 640 << 20, "cuda": 3 << 30}
# Beyond, kernels count in 64 bits and become several times slower, and one in torch 2.11 with
# cuDNN 9.19 read outside its memory (measured on an H100: 440³ voxels in 32 channels).
MOST_ELEMENTS = 2**31 - 1
# What allocators take beyond what is asked of them (measured 1.2 to 1.5 on CUDA, 1.05 on CPU).
SLACK = {"cpu": 1.1, "cuda": 1.5}


@dataclass(frozen=True)
class Depth:
    """Blocks of a worker that are read ahead and that are being written, and threads for each."""

    ahead: int
    behind: int
    n_readers: int
    n_writers: int

    @property
    def n_blocks(self) -> int:
        """Blocks that hold memory at a time: those, and the one that is worked on."""
        return self.ahead + 1 + self.behind


# A GPU takes a block sooner than one thread can decode it, or compress its result.
DEPTH = {"cpu": Depth(1, 1, 1, 1), "cuda": Depth(4, 4, 4, 4)}


# A size, or an array of many that are tried at once.
Size = Any


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a worker takes, as a function of what its tiles compute (t, z, y, x).

    `value_bytes` is the size of one activation; `in_voxel_bytes` and `out_voxel_bytes` count one
    voxel of the source and of the output with all channels. Sizes may be arrays that broadcast.
    """

    spec: UNetSpec
    device: Literal["cpu", "cuda"]
    value_bytes: int
    in_voxel_bytes: int
    out_voxel_bytes: int
    memory_bytes: int
    device_bytes: int | None = None

    def network(self, output: Sequence[Size]) -> Size:
        """One forward pass that computes `output`."""
        lead, spatial = output[: -self.spec.dims], output[-self.spec.dims :]
        return _product(lead) * forward_bytes(self.spec, spatial, value_bytes=self.value_bytes)

    def blocks(self, output: Sequence[Size]) -> Size:
        """The blocks in flight in main memory, for cores of about one tile."""
        core, grown = _product(output), self._grown(output)
        depth = DEPTH[self.device]
        # On processors each is normalised to float32, and cut out once more for the network.
        per_read = self.in_voxel_bytes + 4 * self.spec.in_channels * (self.device == "cpu")
        read = (depth.ahead + 1) * grown * per_read + 4 * self.spec.in_channels * grown
        written = (depth.behind + 1) * core * self.out_voxel_bytes
        return read + written + 4 * self.spec.out_channels * core

    def is_countable(self, output: Sequence[Size]) -> Size:
        """Whether the largest tensor of a plane or volume counts in 32 bits."""
        one = output[-self.spec.dims :]
        return self._grown(one) * self.spec.widths[0] <= MOST_ELEMENTS

    def slots(self, output: Sequence[Size]) -> Size:
        """The buffers of the blocks on their way to and from a GPU, there and pinned here."""
        read = self.in_voxel_bytes * self._grown(output)
        return DEPTH[self.device].n_blocks * (read + self.out_voxel_bytes * _product(output))

    def needs(self, output: Sequence[Size]) -> Size:
        """Main memory of a worker with tiles that compute `output`, without decoded chunks."""
        own = self.slots(output) if self.device == "cuda" else self.network(output)
        return PROCESS_BYTES[self.device] + SLACK["cpu"] * (own + self.blocks(output))

    def fits(self, output: Sequence[Size]) -> Size:
        """Whether a worker has the memory for tiles that compute `output`."""
        fitting = self.is_countable(output)
        if self.device == "cuda":
            assert self.device_bytes is not None
            on_device = SLACK["cuda"] * self.network(output) + self.slots(output)
            fitting = fitting & (on_device <= self.device_bytes - (1 << 30))
        return fitting & (self.needs(output) + self.cache_bytes <= self.memory_bytes)

    @property
    def cache_bytes(self) -> int:
        """Decoded chunks that a worker may keep: a part of what the process itself leaves."""
        return max(0, (self.memory_bytes - PROCESS_BYTES[self.device]) // CACHE_SHARE)

    def _grown(self, output: Sequence[Size]) -> Size:
        halo = (0,) * (len(output) - self.spec.dims) + footprint(self.spec).halo
        return _product([o + 2 * h for o, h in zip(output, halo, strict=True)])


def forward_bytes(spec: UNetSpec, output: Sequence[Size], *, value_bytes: int = 4) -> Size:
    """Bytes of the activations that are alive at the widest point of one forward pass.

    Either at the start, where the input of the second convolution and its output are alive, or at
    the end, where the whole skip connection is alive beside the merged one, its two halves, and
    the result. Measured for OpenVINO, eager torch and cuDNN: within 10 % above a few 10^6 voxels.
    """
    halo = footprint(spec).halo
    read = _product([o + 2 * h for o, h in zip(output, halo, strict=True)])
    reach = [spec.n_convs * (k - 1) for k in spec.kernels[0]]
    merged = _product([o + r for o, r in zip(output, reach, strict=True)])
    widest = np.maximum(2.1 * read, read + 3.4 * merged)
    one_pass = value_bytes * (spec.in_channels * read + spec.widths[0] * widest)
    if not spec.mirror:
        return one_pass
    # The mirror image; what it gives, twice, and that turned back; the sum so far. In float32
    # (measured for OpenVINO and eager torch, where it was 46 to 69 MiB instead of 52 in 3-D).
    return one_pass + 4 * (spec.in_channels * read + 4 * spec.out_channels * _product(output))


def default_tile(
    spec: UNetSpec,
    shape: Sequence[int],
    fits: Callable[[Sequence[Size]], Size],
    *,
    n_planes: int = 1,
    n_workers: int = 1,
) -> Vec:
    """The tile (t, z, y, x) with which `n_workers` workers are soonest done with `shape`.

    `fits` says whether there is memory for tiles that compute some output (t, z, y, x), as
    `MemoryModel.fits` does for arrays of outputs. A 2-D network takes `n_planes` planes at once.
    """
    mark = footprint(spec)
    spatial = shape[-spec.dims :]
    planes = shape[0] * (shape[1] if spec.dims == 2 else 1)
    lead = (1, min(n_planes, shape[1])) if spec.dims == 2 else (1,)
    longest = LARGEST_TILE[spec.dims]
    sides = [_candidate_sides(n, s, longest) for n, s in zip(spatial, mark.stride, strict=True)]
    outputs = [
        [mark.smallest_output((side,) * spec.dims)[axis] for side in candidates]
        for axis, candidates in enumerate(sides)
    ]
    n_tiles = _product(
        np.ix_(*([ceil_div(n, s) for s in c] for n, c in zip(spatial, sides, strict=True)))
    )
    n_tiles = n_tiles * ceil_div(planes, math.prod(lead))
    # Reading the first block and writing the last overlap with nothing.
    rounds = -(-n_tiles // n_workers) + 0.1
    cost = rounds * mark.flops_of_all(outputs)
    cost[~np.broadcast_to(fits([*lead, *np.ix_(*outputs)]), cost.shape)] = np.inf
    # Where nothing fits the budget the least memory wins, so that there is always a tile.
    best = np.unravel_index(np.argmin(cost), cost.shape)
    if not np.isfinite(cost[best]):
        best = tuple(n - 1 for n in cost.shape)
    return (*lead, *(candidates[i] for candidates, i in zip(sides, best, strict=True)))


def default_beam(
    n_blocks: Sequence[int],
    core: Sequence[int],
    halo: Sequence[int],
    *,
    chunk: Sequence[int],
    shape: Sequence[int],
    voxel_bytes: int,
    budget_bytes: int,
) -> tuple[tuple[int, int], int]:
    """The blocks along y and x of a beam whose decoded chunks fit the budget, and their bytes.

    Blocks are taken beam by beam, along z; inside a beam every chunk is decoded once. All other
    arguments are along t, z, y, x. A beam is at least one block.
    """

    def kept(axis: int, n: int) -> int:
        """Voxels of the chunks that `n` blocks in a row touch."""
        reach = n * core[axis] + 2 * halo[axis]
        chunks = ceil_div(reach, chunk[axis]) + 1
        return min(chunks * chunk[axis], round_up(shape[axis], chunk[axis]))

    depth = kept(1, 1) * voxel_bytes

    def n_bytes(y: int, x: int) -> int:
        return depth * kept(2, y) * kept(3, x)

    def refetched(y: int, x: int) -> float:
        factors = (
            1.0 if n == n_blocks[axis] else 1 + 2 * halo[axis] / (n * core[axis])
            for axis, n in ((2, y), (3, x))
        )
        return math.prod(factors)

    best = (1, 1)
    x = n_blocks[3]
    for y in range(1, n_blocks[2] + 1):
        while x > 1 and n_bytes(y, x) > budget_bytes:
            x -= 1
        if n_bytes(y, x) > budget_bytes:
            break
        best = min(best, (y, x), key=lambda beam: refetched(*beam))
    return best, min(budget_bytes, n_bytes(*best))


def _candidate_sides(length: int, stride: int, longest: int) -> list[int]:
    """Sides that cut an axis into equal parts, from the longest to a single stride by twelfths."""
    sides: list[int] = []
    wanted = min(round_up(length, stride), round_up(longest, stride))
    while True:
        n_parts = ceil_div(length, wanted)
        # Sides of several tiles are multiples of four, so that they are cut into equal chunks,
        # unless the stride is odd, and the axis needs no cutting at all where one tile covers it.
        unit = stride if n_parts == 1 else math.lcm(stride, 4)
        side = round_up(ceil_div(length, n_parts), unit)
        if side not in sides:
            sides.append(side)
        if wanted <= unit:
            break
        wanted = max(unit, wanted * 11 // 12)
    return sides


def _product(sizes: Sequence[Size]) -> Size:
    return functools.reduce(operator.mul, sizes, 1)
