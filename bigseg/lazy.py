"""What Dask slices: an array that reads a Region when it is indexed. It knows no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Vec


@dataclass(frozen=True)
class LazyView:
    """An array (c, t, z, y, x) of chosen channels; `read` gets a Region and channel numbers."""

    shape: Vec
    dtype: np.dtype[Any]
    read: Callable[[Region, Sequence[int]], NDArray[Any]]
    channels: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Always 5."""
        return len(self.shape)

    def __getitem__(self, index: tuple[slice | int, ...]) -> NDArray[Any]:
        # Dask moves what users select into here: slices with any step, and integers.
        wanted = [
            range(n)[i] if isinstance(i, slice) else range(i, i + 1)
            for i, n in zip(index, self.shape, strict=True)
        ]
        start = [min(r, default=0) for r in wanted]
        stop = [max(r, default=-1) + 1 for r in wanted]
        if all(wanted):
            region = Region(tuple(start[1:]), tuple(stop[1:]))
            data = self.read(region, self.channels[start[0] : stop[0]])
        else:
            data = np.empty([b - a for a, b in zip(start, stop, strict=True)], self.dtype)
        within = (
            slice(None, None, r.step) if isinstance(i, slice) else 0
            for i, r in zip(index, wanted, strict=True)
        )
        return data[tuple(within)]
