"""Random patches of annotated volumes, as batches for the training loop.

Patch i of step s on rank r depends on (seed, s, r, i) and on nothing else, so a run can go on at
any step, and how many threads read ahead changes no value. Along one axis:

    volume         |································································|
    region            [························································]   (trained on)
    target read              |<------ target ------>|        inside the region, else ignored
    image read      |<--- halo + margin of augmentation on both sides --->|  mirrored outside

The image is seen beyond the region; no label outside it, and none of the validation region, is
ever learned. Where the loss asks for it, the target carries how close each voxel lies to two
objects (weightmap.py) through the same changes.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from bigseg.augment import PatchFrame, augment, input_shape
from bigseg.blocks import Region, Vec, mirrored_axis
from bigseg.predict import read_mirrored
from bigseg.statistics import normalise
from bigseg.targets import IGNORE
from bigseg.weightmap import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from torch import Tensor

    from bigseg.annotations import Annotated
    from bigseg.config import AugmentConfig, NormConstants
    from bigseg.volume import Volume

RESIDENT_BYTES = 256 << 20
MAX_TRIES = 20


@dataclass(frozen=True)
class PatchSource:
    """One annotated image: where patches are drawn, and how their voxels are read.

    `weight` is its share among the sources, in any unit (annotated voxels). `excluded` is never
    learned, although it may lie inside `region`.
    """

    annotated: Annotated
    region: Region
    excluded: Region
    constants: NormConstants
    weight: float
    dims: int
    n_classes: int

    @property
    def volume(self) -> Volume:
        """The image."""
        return self.annotated.image

    @property
    def has_closeness(self) -> bool:
        """Whether targets carry the closeness beside the class, packed."""
        return self.annotated.config.loss.weight_map is not None

    def read_target(self, region: Region) -> NDArray[np.int16]:
        """Classes (t, z, y, x) of any region; IGNORE outside `region` and inside `excluded`."""
        target = np.full(region.shape, IGNORE, np.int16)
        inside = region.intersect(self.region)
        if not inside.n_voxels:
            return target
        classes = self.annotated.target(inside, dims=self.dims, n_classes=self.n_classes)
        if self.has_closeness:
            classes = pack(classes, self.annotated.closeness(inside, dims=self.dims))
        target[inside.relative_to(region.start).slices] = classes
        hidden = inside.intersect(self.excluded)
        target[hidden.relative_to(region.start).slices] = IGNORE
        return target


@dataclass(frozen=True)
class PatchPlan:
    """What all patches of a run have in common; shapes along (z,) y, x."""

    frame: PatchFrame
    augment: AugmentConfig
    channels: tuple[int, ...]
    batch: int
    seed: int

    @property
    def image_read(self) -> Vec:
        """Voxels of the image that are read for one patch, along t, z, y, x."""
        return _place(input_shape(self.frame, self.augment))

    @property
    def target_read(self) -> Vec:
        """Voxels of the target that augmentation can bring into one patch, along t, z, y, x."""
        alone = PatchFrame(self.frame.target_shape, self.frame.target_shape, self.frame.voxel_size)
        shape = _place(input_shape(alone, self.augment))
        return tuple(map(min, shape, self.image_read))

    @property
    def target(self) -> Vec:
        """Voxels that the network computes of one patch, along t, z, y, x."""
        return _place(self.frame.target_shape)


@dataclass(frozen=True)
class Batch:
    """Patches of one step: image (n, c, *image_shape) float32, target (n, *target_shape) int64.

    `closeness` (n, *target_shape) float32 from 0 to 1, where the loss asks for it.
    """

    step: int
    image: Tensor
    target: Tensor
    closeness: Tensor | None = None


Stream: TypeAlias = "Generator[Batch, None, None]"


@dataclass(frozen=True)
class _Raw:
    """One patch as read: image (c, *s) float32, target (*s'), and the seed of its changes."""

    image: NDArray[np.float32]
    target: NDArray[np.int16]
    seed: int


class PatchSampler:
    """Draws the batch of any step; sources that fit `budget_bytes` together are kept in memory."""

    def __init__(
        self,
        sources: Sequence[PatchSource],
        plan: PatchPlan,
        *,
        device: torch.device | None = None,
        budget_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self.plan = plan
        self._device = device or torch.device("cpu")
        self._has_closeness = any(s.has_closeness for s in sources)
        weights = np.array([s.weight for s in sources], np.float64)
        self._shares = np.cumsum(weights / weights.sum())[:-1]
        needed = sum(_resident_bytes(s, plan) for s in sources)
        self.is_resident = needed <= budget_bytes
        self._sources = [_Reader.of(s, plan, resident=self.is_resident) for s in sources]

    def batch(self, step: int, rank: int = 0) -> Batch:
        """The batch of one step on one rank.

        Raises:
            InputError: the annotations hold labels that are not allowed.
        """
        raw = [self._draw(step, rank, i) for i in range(self.plan.batch)]
        image = torch.from_numpy(np.stack([r.image for r in raw])).to(self._device)
        target = torch.from_numpy(np.stack([r.target for r in raw])).to(self._device)
        image, target = augment(
            image,
            target.long(),
            frame=self.plan.frame,
            config=self.plan.augment,
            # On the CPU, so that patches are the same whatever the device.
            generators=[torch.Generator().manual_seed(r.seed) for r in raw],
            ignore=IGNORE,
        )
        if self._has_closeness:
            return Batch(step, image, *unpack(target))
        return Batch(step, image, target)

    def stream(self, steps: range, *, rank: int = 0, n_threads: int = 1) -> Stream:
        """The batches of `steps` in order; at most `n_threads` + 1 are drawn ahead, in threads.

        An error in a thread is raised where its batch would have come.
        """
        return _ahead(lambda step: self.batch(step, rank), steps, n_threads)

    def _draw(self, step: int, rank: int, index: int) -> _Raw:
        rng = np.random.default_rng(np.random.SeedSequence([self.plan.seed, step, rank, index]))
        reader, region, target = self._draw_region(rng)
        seed = int(rng.integers(1 << 62))
        data = reader.read_image(region)
        squeezed = (len(data), *_spatial(self.plan.image_read, self.plan.frame))
        spatial = _spatial(self.plan.target_read, self.plan.frame)
        return _Raw(data.reshape(squeezed), target.reshape(spatial), seed)

    def _draw_region(self, rng: np.random.Generator) -> tuple[_Reader, Region, NDArray[np.int16]]:
        """Where a patch lies; drawn again, up to `MAX_TRIES` times, where nothing is annotated."""
        for _ in range(MAX_TRIES):
            reader = self._sources[int(np.searchsorted(self._shares, rng.random(), side="right"))]
            start = _draw_start(rng, reader.source.region, self.plan.target)
            target = reader.read_target(_around(start, self.plan.target, self.plan.target_read))
            core = Region.of_shape(self.plan.target).relative_to(
                _offset(self.plan.target, self.plan.target_read)
            )
            if (target[core.slices] != IGNORE).any():
                break
        return reader, _around(start, self.plan.target, self.plan.image_read), target


@dataclass(frozen=True)
class _Resident:
    """Part of a volume in memory, in the volume's own coordinates: what `read_mirrored` needs."""

    shape: Vec
    part: Region
    data: NDArray[Any]

    def read(self, region: Region, channels: Sequence[int]) -> NDArray[Any]:
        return self.data[(slice(None), *region.relative_to(self.part.start).slices)]


@dataclass(frozen=True)
class _Reader:
    """A source whose voxels come from memory or from Zarr; both give the same."""

    source: PatchSource
    channels: tuple[int, ...]
    image: Any
    target: _Resident | None

    @classmethod
    def of(cls, source: PatchSource, plan: PatchPlan, *, resident: bool) -> _Reader:
        if not resident:
            return cls(source, plan.channels, source.volume, None)
        part = _image_part(source, plan)
        image = _Resident(source.volume.shape, part, source.volume.read(part, plan.channels))
        target = np.empty(source.region.shape, np.int16)
        for block in source.annotated.blocks(source.region):
            inside = block.relative_to(source.region.start).slices
            target[inside] = source.read_target(block)
        known = _Resident(source.volume.shape, source.region, target[np.newaxis])
        return cls(source, plan.channels, image, known)

    def read_image(self, region: Region) -> NDArray[np.float32]:
        """Network input (c, t, z, y, x) of any region, mirrored outside the volume."""
        data = read_mirrored(self.image, region, self.channels)
        return normalise(data, self.source.constants)

    def read_target(self, region: Region) -> NDArray[np.int16]:
        """Classes (t, z, y, x) of any region; IGNORE where nothing is learned."""
        if self.target is None:
            return self.source.read_target(region)
        target = np.full(region.shape, IGNORE, np.int16)
        inside = region.intersect(self.source.region)
        if inside.n_voxels:
            target[inside.relative_to(region.start).slices] = self.target.read(inside, (0,))[0]
        return target


def _ahead(make: Callable[[int], Batch], steps: range, n_threads: int) -> Stream:
    # Each thread computes on one processor: with torch's default every one of them would start as
    # many threads as there are processors, and they would wait for those of the training loop.
    # torch takes the setting over for threads that start later, so it is put back at the end.
    n_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n_threads, "patches", torch.set_num_threads, (1,))
    waiting: deque[Future[Batch]] = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(make, step))
            if len(waiting) > n_threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(n_before)


def _draw_start(rng: np.random.Generator, region: Region, shape: Vec) -> Vec:
    """A start so that the box lies inside the region, or the region inside the box."""
    spare = [n - s for n, s in zip(region.shape, shape, strict=True)]
    bounds = [(min(0, s), max(0, s)) for s in spare]
    return tuple(
        a + int(rng.integers(low, high + 1))
        for a, (low, high) in zip(region.start, bounds, strict=True)
    )


def _offset(inner: Vec, outer: Vec) -> Vec:
    """What a box of shape `inner` is ahead of the box of shape `outer` around it, negated."""
    return tuple((i - o) // 2 for i, o in zip(inner, outer, strict=True))


def _around(start: Vec, inner: Vec, outer: Vec) -> Region:
    """The box of shape `outer` with the same centre as the box of shape `inner` at `start`."""
    first = tuple(a + d for a, d in zip(start, _offset(inner, outer), strict=True))
    return Region(first, tuple(a + n for a, n in zip(first, outer, strict=True)))


def _place(shape: Sequence[int]) -> Vec:
    """Spatial shape as (t, z, y, x)."""
    return (1,) * (4 - len(shape)) + tuple(shape)


def _spatial(shape: Vec, frame: PatchFrame) -> Vec:
    return shape[-len(frame.target_shape) :]


def _image_part(source: PatchSource, plan: PatchPlan) -> Region:
    """All voxels of the image that any patch of the source can read."""
    margin = tuple(o - i for i, o in zip(plan.target, plan.image_read, strict=True))
    spare = tuple(max(0, t - n) for t, n in zip(plan.target, source.region.shape, strict=True))
    reach = tuple(m // 2 + s for m, s in zip(margin, spare, strict=True))
    grown = source.region.grow(reach, reach)
    bounds = [
        mirrored_axis(a, b, n)[:2]
        for a, b, n in zip(grown.start, grown.stop, source.volume.shape, strict=True)
    ]
    return Region(tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def _resident_bytes(source: PatchSource, plan: PatchPlan) -> int:
    image = _image_part(source, plan).n_voxels * source.volume.dtype.itemsize * len(plan.channels)
    return image + 2 * source.region.n_voxels
