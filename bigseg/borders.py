"""Which blocks of a grid touch a region, and small boxes across their borders. It knows integers.

    cores   |     |     |     |
            |    [#|#]  |     |      across a face
            |-----+-----+-----|
            |     |   [##|##] |      across an edge (in three axes also across corners)
            |-----+---[##|##]-|
            |     |     |     |

The numbers of blocks follow from their places without a look at the others, so nothing here grows
with the grid.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bigseg.blocks import Region, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from bigseg.blocks import Block, BlockGrid


@dataclass(frozen=True)
class Place:
    """A small box of voxels, and the number of axes along which it lies across a border."""

    box: Region
    n_axes: int


def touching(grid: BlockGrid, region: Region) -> list[int]:
    """The numbers of the blocks that have a voxel of `region`, in order."""
    inside = region.intersect(grid.region)
    if not inside.n_voxels:
        return []
    axes = [
        range(a // c - f, ceil_div(b, c) - f)
        for a, b, c, f in zip(inside.start, inside.stop, grid.core_shape, grid.first, strict=True)
    ]
    numbers = map(grid.number_at, itertools.product(*axes))
    return sorted(number for number in numbers if number is not None)


def scaled(region: Region, shape: Sequence[int], other_shape: Sequence[int]) -> Region:
    """What a region of a level of `shape` can touch of a level of `other_shape`, finer or coarser.

    It is wider than that by up to a window of the pyramid on each side, whatever the rounding of
    the levels' sizes.
    """
    start, stop = [], []
    for a, b, n, m in zip(region.start, region.stop, shape, other_shape, strict=True):
        window = ceil_div(m, n)
        start.append(max(0, a * m // n - window))
        stop.append(min(m, ceil_div(b * m, n) + window))
    return Region(tuple(start), tuple(stop))


def draw_place(
    grid: BlockGrid, block: Block, sides: Sequence[int], *, n_axes: int, rng: np.random.Generator
) -> Place:
    """A random box across borders of a block, clipped at the grid's region.

    It has `sides` voxels, half of them on each side of a border, along `n_axes` axes of space: as
    many of those as there are axes with a neighbour. Along the others it lies inside the core.
    """
    position = grid.position_of(block)
    crossable = [i for i in range(1, len(sides)) if grid.shape[i] > 1]
    chosen = rng.permutation(crossable)[:n_axes].tolist()
    start, stop = [], []
    for i, (a, b, side) in enumerate(zip(block.core.start, block.core.stop, sides, strict=True)):
        if i in chosen:
            at_end = position[i] == 0 or (position[i] < grid.shape[i] - 1 and rng.random() < 0.5)
            border = b if at_end else a
            start.append(border - max(1, side // 2))
            stop.append(border + max(1, side // 2))
        else:
            start.append(int(rng.integers(a, max(a, b - side) + 1)))
            stop.append(min(b, start[-1] + side))
    return Place(Region(tuple(start), tuple(stop)).intersect(grid.region), len(chosen))
