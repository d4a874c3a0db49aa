"""How a new image is laid out: the extents of its levels, its chunks and its shards.

It knows integers and voxel sizes; no stores, no files. Shapes and factors are along t, z, y, x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bigseg.blocks import Vec, ceil_div, round_up

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LEVELS = 5
SMALL_ENOUGH = 128
SHARD_FROM_BYTES = 2**30


def plan_levels(shape: Vec, sizes: Sequence[float]) -> tuple[tuple[Vec, ...], tuple[Vec, ...]]:
    """Shapes of the levels and their factors from the finest; `sizes` of a voxel along z, y, x.

    Levels shrink by 2 until every spatial axis fits in `SMALL_ENOUGH` voxels; z waits while its
    voxels are at least twice as long as those of y and x.
    """
    shapes: list[Vec] = [shape]
    factors: list[Vec] = [(1, 1, 1, 1)]
    while len(shapes) < MAX_LEVELS and max(shapes[-1][1:]) > SMALL_ENOUGH:
        now, total = shapes[-1], factors[-1]
        z, y, x = (s * f for s, f in zip(sizes, total[1:], strict=True))
        # The same rule by which a U-Net pools z; a hair of slack for rounded voxel sizes.
        shrink_z = now[1] > 1 and z < 2 * min(y, x) * (1 - 1e-3)
        step = (1, 1 + shrink_z, 1 + (now[2] > 1), 1 + (now[3] > 1))
        shapes.append(tuple(ceil_div(n, f) for n, f in zip(now, step, strict=True)))
        factors.append(tuple(a * b for a, b in zip(total, step, strict=True)))
        if step == (1, 1, 1, 1):
            return tuple(shapes[:-1]), tuple(factors[:-1])
    return tuple(shapes), tuple(factors)


def plan_chunks(shape: Vec, voxel_bytes: int) -> tuple[Vec, Vec | None]:
    """Chunk, and shard where the image is large; `voxel_bytes` are those of all channels.

    Every chunk holds about 2^18 voxels: a cube where there is depth for it, a slab of few planes
    (which 2-D models read well) in a thin stack, one plane in 2-D. A shard is 64 of them: large
    volumes would else be millions of files.
    """
    if shape[1] >= 64:
        chunk, times = (1, 64, 64, 64), (1, 4, 4, 4)
    elif shape[1] > 1:
        chunk, times = (1, 4, 256, 256), (1, 4, 4, 4)
    else:
        chunk, times = (1, 1, 512, 512), (1, 1, 8, 8)
    if voxel_bytes * math.prod(shape) < SHARD_FROM_BYTES:
        return chunk, None
    shard = (min(c * k, round_up(n, c)) for c, k, n in zip(chunk, times, shape, strict=True))
    return chunk, tuple(shard)
