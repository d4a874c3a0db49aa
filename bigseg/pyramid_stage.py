"""The stages of the pyramid: a coarser level from the level below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.errors import BadChunkError
from bigseg.ledger import checksum_of
from bigseg.plan import Plan, planned_level, pyramid_grid
from bigseg.pyramid import downsample, level_rule, source_region
from bigseg.thread_stage import ThreadStage
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.blocks import Block
    from bigseg.pyramid import Method


class PyramidStage(ThreadStage):
    """A core of a coarser level: mode of labels, mean of probabilities."""

    def __init__(self, plan: Plan, level: int, n_threads: int) -> None:
        self._fine = open_volume(plan.output.url, level=level - 1)
        self._coarse = open_volume(plan.output.url, level=level)
        coarse = planned_level(plan, self._coarse.shape) if plan.instances else self._coarse
        super().__init__(pyramid_grid(coarse, plan.source.shape, plan.region), n_threads)
        self._method: Method = "mean" if plan.output.kind == "probabilities" else "mode"
        self._rule = level_rule(
            self._fine.shape,
            self._coarse.shape,
            fine_scale=self._fine.scale,
            coarse_scale=self._coarse.scale,
        )

    def read(self, block: Block) -> NDArray[Any]:
        """The core, downsampled from the voxels of the finer level."""
        needed = source_region(
            block.core,
            fine_shape=self._fine.shape,
            coarse_shape=self._coarse.shape,
            rule=self._rule,
        )
        try:
            data = self._fine.read(needed, range(self._fine.n_channels))
        except BadChunkError as error:
            raise BadChunkError(
                f"{error}, or let `bigseg verify {self._fine.url}` find what must be made again"
            ) from error
        self.fetched.add(data.nbytes)
        return downsample(
            data,
            block.core,
            fine_shape=self._fine.shape,
            coarse_shape=self._coarse.shape,
            rule=self._rule,
            method=self._method,
        )

    def write(self, block: Block, result: NDArray[Any]) -> int:
        """Write the core; returns its checksum."""
        self._coarse.write(block.core, result)
        self.written.add(result.nbytes)
        return checksum_of(np.ascontiguousarray(result).data)
