"""What a result must be at a small box, from one forward pass that knows no blocks and no tiles.

    blocks                |         |         |
    the box                       [###]                  across their border
    read            [   halo   |  [###] |   halo   ]     one pass, float32 in eager torch

The pass begins at a multiple of the network's stride, as all tiles do: that decides what its
poolings take together, so that in exact arithmetic the values are those of the blocks. In floating
point the probabilities of the plan's engine lie within a bound of them. In float32 that is a fixed
number. In 16 bits it depends on how steep the network is, so a second pass that rounds as they do
is made at the same place: its largest difference, times `MARGIN`, is the bound where that is larger
than the fixed number. Hence, with p the values of the pass, b the bound and s what the quantisation
of the output moves a value by at most:

    probabilities   a stored value differs from p by at most b + s
    labels          the class that was written had the largest probability there, q of the engine:
                    q[k] >= q[i] for all i, thus p[k] >= max p - 2b
    background      where nothing is kept, exactly 0
    instances       what object_seams.py says of them

A voxel that breaks this was not computed from its whole context: no share of wrong ones is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bigseg.blocks import Region, round_up
from bigseg.cache import ChunkCache
from bigseg.checkpoint import hash_model, load_model
from bigseg.empty import EmptySpace, both, identity_of, keep_of_absent
from bigseg.engine import torch_forward
from bigseg.errors import InputError, ModelFileError, UsageError
from bigseg.filling import SourceVolume
from bigseg.model import footprint
from bigseg.object_seams import expected, n_impossible
from bigseg.predict import mirrored, predict_grown, tile_geometry
from bigseg.statistics import normalise
from bigseg.steps import Steps
from bigseg.transform import Transform, TransformedVolume
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bigseg.blocks import Vec
    from bigseg.config import ModelCard
    from bigseg.engine import Forward
    from bigseg.model import UNet
    from bigseg.plan import InstancePlan, Plan

BOUND = {"fp32": 1e-4, "bf16": 0.06, "fp16": 0.01}
"""The largest difference of a probability to float32 in eager torch, by the engine's precision.

The same numbers to which the tests hold every engine, on processors and GPUs, with trained networks
on electron microscopy (measured there: 4e-7 in fp32, 0.014 in bf16).
"""

MARGIN = {"bf16": 4.0, "fp16": 4.0 / 2**3}
"""By what the largest difference of eager torch in bf16 is multiplied, at the same place.

Two ways to compute in bf16 that round at other steps had largest differences of which one was up to
3.0 times the other, and 1.3 times in the median (24 places of a network trained on electron
microscopy). fp16 has three bits more.
"""

SIDE_VOX = 16
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Difference:
    """How a box differs from the truth: voxels that are wrong, and the largest excess of one."""

    n_wrong: int
    n_voxels: int
    largest: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"{self.n_wrong} of {self.n_voxels} voxels are not what one forward pass gives, by up "
            f"to {self.largest:.3g} of a probability, where {self.allowed:.3g} is allowed"
        )


class Reference:
    """The truth of a plan at any box, and comparison with it.

    `image` is where the segmented image lies; `transform` the user's function where the plan has
    one.

    Raises:
        InputError: the image, the mask or the model is gone, or not the one of the plan.
        UsageError: the plan's transform is not given, or another one.
    """

    def __init__(self, plan: Plan, *, image: str, transform: Transform | None) -> None:
        self._plan = plan
        self._net, self._card = _load(plan)
        volume = open_volume(image, level=plan.source.level)
        self._source = SourceVolume.of(volume, plan.on_bad_chunk)
        if identity_of(self._source) != plan.source.identity:
            raise InputError(
                f"{image} is not the image that was segmented, its type, shape or voxel size "
                "changed: bring the old one back"
            )
        if plan.transform is not None and transform is None:
            raise UsageError(
                f"the image was transformed by {plan.transform.name} before the network: give it "
                "with --transform FILE.py:FUNCTION"
            )
        self._transform = transform
        self._cache = ChunkCache(self._source, plan.source.channels, budget_bytes=0)
        self._empty = plan.empty and EmptySpace(plan.empty, self._source, plan.source.channels)
        self._reader([])
        self._forward = torch_forward(self._net, device=_HOST, precision="fp32")
        self._rounding: Forward | None = None
        if plan.engine.precision in MARGIN:
            self._rounding = torch_forward(self._net, device=_HOST, precision="bf16")

    @property
    def sides(self) -> Vec:
        """A small box (t, z, y, x): a few voxels along the axes of the network, else two planes."""
        dims = self._card.spec.dims
        return (1,) + (2,) * (3 - dims) + (SIDE_VOX,) * dims

    def compare(self, box: Region, stored: NDArray[Any]) -> Difference | str | None:
        """How the voxels (c, t, z, y, x) that are stored at a box differ; None where they do not.

        Of instances they are the probabilities, where those were kept: what labels follow from them
        object_seams.py says.

        Raises:
            BigsegError: the image cannot be read there.
        """
        instances = self._plan.instances
        if instances is not None and not instances.keep_probabilities:
            return self._compare_objects(instances, box, stored[0])
        keep, probabilities, bound = self._truth(box)
        if self._plan.output.kind == "labels":
            excess, allowed = _label_excess(stored[0], probabilities), 2 * bound
        else:
            excess, allowed = _value_excess(stored, probabilities), bound + _step(stored.dtype)
        # Also of values that are not finite.
        wrong = ~(excess <= allowed)
        background = stored.any(axis=0)
        wrong = np.where(keep, wrong, background)
        if not wrong.any():
            return None
        largest = float(np.max(np.where(keep, excess, background), where=wrong, initial=0.0))
        return Difference(int(wrong.sum()), box.n_voxels, largest, allowed)

    def _compare_objects(
        self, instances: InstancePlan, box: Region, labels: NDArray[Any]
    ) -> str | None:
        margin = Steps(instances.ratios).reach_vox(instances.rule.erode)
        inside = box.intersect(self._plan.region)
        grown = inside.grow(margin, margin).intersect(self._plan.region)
        keep, probabilities, bound = self._truth(grown)
        inner = inside.relative_to(grown.start)
        known = expected(instances, probabilities, keep, bound, inner)
        part = labels[inside.relative_to(box.start).slices]
        n_wrong = n_impossible(instances, known, part)
        n_wrong += int(np.count_nonzero(labels)) - int(np.count_nonzero(part))
        if not n_wrong:
            return None
        return (
            f"{n_wrong} of {box.n_voxels} voxels have labels that one forward pass does not allow"
        )

    def _truth(self, box: Region) -> tuple[NDArray[np.bool_], NDArray[np.float32], float]:
        """What is kept of a box, its probabilities (classes, t, z, y, x), and their bound.

        Where nothing is kept nothing is computed.
        """
        keep = np.zeros(box.shape, np.bool_)
        inside = box.intersect(self._plan.region)
        kept = self._empty.keep(inside) if self._empty else True
        if kept is False or not inside.n_voxels:
            return keep, np.zeros((self._card.spec.out_channels, *box.shape), np.float32), 0.0
        absent: list[Region] = []
        probabilities, bound = self._forward_at(box, absent)
        keep[inside.relative_to(box.start).slices] = both(kept, keep_of_absent(inside, absent))
        return keep, probabilities, bound

    def _forward_at(self, box: Region, absent: list[Region]) -> tuple[NDArray[np.float32], float]:
        spec = self._card.spec
        stride = (1,) * (4 - spec.dims) + footprint(spec).stride
        start = tuple(a // s * s for a, s in zip(box.start, stride, strict=True))
        sides = tuple(round_up(b - a, s) for a, b, s in zip(start, box.stop, stride, strict=True))
        geometry, whole = tile_geometry(spec, sides), Region.of_shape(sides)
        grown = geometry.grown(whole).relative_to(tuple(-a for a in start))
        raw = mirrored(self._reader(absent), self._source.shape, grown)
        data = normalise(raw, self._plan.constants)
        cut = (slice(None), *box.relative_to(start).slices)

        def passed(forward: Forward) -> NDArray[np.float32]:
            computed: NDArray[np.float32] = predict_grown(
                data, forward, geometry, whole, encode=lambda p: p
            )
            return computed[cut]

        probabilities, precision = passed(self._forward), self._plan.engine.precision
        bound = BOUND[precision]
        if self._rounding is not None:
            moved = float(np.abs(passed(self._rounding) - probabilities).max())
            bound = max(bound, MARGIN[precision] * moved)
        return probabilities, bound

    def _reader(self, absent: list[Region]) -> Callable[[Region], NDArray[Any]]:
        """Reads a region inside the volume, transformed; notes what the store does not have."""

        def read(region: Region) -> NDArray[Any]:
            reading = self._cache.read(region)
            absent.extend(reading.absent)
            return reading.data

        plan = self._plan
        if plan.transform is None or self._transform is None:
            return read
        changed = TransformedVolume(
            read, self._source, plan.source.channels, self._transform, plan.transform
        )
        return lambda region: changed.read(region, range(changed.n_channels))


def _load(plan: Plan) -> tuple[UNet, ModelCard]:
    if hash_model(plan.model.url) != plan.model.sha256:
        raise ModelFileError(
            f"{plan.model.url} is not the model that segmented, its hash is another: bring the old "
            "one back"
        )
    return load_model(plan.model.url)


def _label_excess(labels: NDArray[Any], probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far the probability of each class that was written lies below the largest one."""
    known = labels < len(probabilities)
    chosen = np.where(known, labels, 0).astype(np.intp)
    written = np.take_along_axis(probabilities, chosen[None], axis=0)[0]
    excess: NDArray[np.float32] = np.where(known, probabilities.max(axis=0) - written, np.inf)
    return excess


def _value_excess(stored: NDArray[Any], probabilities: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest difference of any class, in each voxel."""
    values = stored.astype(np.float32) / (255 if stored.dtype == np.uint8 else 1)
    difference: NDArray[np.float32] = np.abs(values - probabilities).max(axis=0)
    return difference


def _step(dtype: np.dtype[Any]) -> float:
    """What rounding to the type of the output moves a probability by, at most."""
    return 0.5 / 255 if dtype == np.uint8 else float(np.finfo(dtype).eps) / 2
