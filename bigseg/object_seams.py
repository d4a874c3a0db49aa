"""What probabilities say of the objects at a small box, whatever lies beyond it.

Which seeds are one, and how far they grow, can depend on voxels far away. But with probabilities
that are known within a bound, at every place of the box:

    surely a seed               where such seeds alone are large enough to count: it has a label,
                                and the same as a face neighbour that is one of them
    surely neither a seed       it has none
    nor foreground

Where the very probabilities were kept of which the objects were made, the seeds are known, and only
their numbers come from far away. Those are taken from the labels themselves: each component has one
number, and grown again they must give every label of the box.

    labels                     [ growth |  the box  | growth ]
    probabilities    [ erosion |        |           |        | erosion ]

A box across the border of blocks, of which one was made from other context or by other numbers than
its neighbour, breaks one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.blocks import Region
from bigseg.faces import Adjacency
from bigseg.findings import Finding
from bigseg.instances import FOREGROUND_BIT, INSIDE_BIT, codes_of, components
from bigseg.plan import PREDICT
from bigseg.steps import Steps, erode, grow

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bigseg.plan import InstancePlan, Plan


@dataclass(frozen=True)
class Expected:
    """Where the seeds of a box surely are and can be, and what can be an object; (t, z, y, x)."""

    sure: NDArray[np.bool_]
    possible: NDArray[np.bool_]


def expected(
    instances: InstancePlan,
    probabilities: NDArray[np.float32],
    keep: NDArray[np.bool_],
    bound: float,
    inner: Region,
) -> Expected:
    """What is known at `inner`, from (classes, t, z, y, x) at the box with the margin of erosion.

    `bound` is how far the probabilities of the blocks can lie from these.
    """
    rule, steps = instances.rule, Steps(instances.ratios)
    inside = 255 * probabilities[1]
    foreground = 255 * probabilities[1:].sum(axis=0)
    n_summed = len(probabilities) - 1
    # Half a 255th is what rounding moves each of them by.
    sure = keep & (inside - 255 * bound >= rule.inside_at + 0.5)
    possible = keep & (inside + 255 * bound >= rule.inside_at - 0.5)
    reached = keep & (foreground + n_summed * (255 * bound + 0.5) >= rule.foreground_at)
    cut = inner.slices
    seeds = erode(possible, rule.erode, steps)[cut]
    return Expected(erode(sure, rule.erode, steps)[cut], seeds | reached[cut])


def n_impossible(instances: InstancePlan, known: Expected, labels: NDArray[Any]) -> int:
    """How many voxels of a box have labels (t, z, y, x) that cannot be."""
    # What is too small here may be a part of a seed that counts, or of one that others grow over.
    counted = _Seeds.of(instances, known.sure).counted
    wrong = counted & (labels == 0)
    if not instances.rule.fill_holes:
        wrong |= ~known.possible & (labels != 0)
    for axis in range(4 - instances.dims, 4):
        front = tuple(slice(None, -1) if i == axis else slice(None) for i in range(4))
        back = tuple(slice(1, None) if i == axis else slice(None) for i in range(4))
        wrong[back] |= counted[front] & counted[back] & (labels[front] != labels[back])
    return int(np.count_nonzero(wrong))


def fault_of_kept(
    plan: Plan,
    box: Region,
    *,
    read: Callable[[str, Region], NDArray[Any]],
    is_right: Callable[[str, Region], bool],
) -> Finding | None:
    """What is wrong with the labels of a box where their probabilities were kept, if anything.

    `read` gives what a stage wrote at a region (c, t, z, y, x). Nothing is said where `is_right`
    says of a stage and a region that it is not all there, or known to be wrong. The region that is
    found is what was looked at: which of the labels in it are the wrong ones nobody can tell.
    """
    instances, stage = plan.instances, plan.finest_stage
    if instances is None or not instances.keep_probabilities:
        return None
    rule, steps = instances.rule, Steps(instances.ratios)
    around = _grown(box, steps.reach_vox(rule.grow), Region.of_shape(plan.source.shape))
    inside = around.intersect(plan.region)
    beyond = _grown(inside, steps.reach_vox(rule.erode), plan.region)
    if not (is_right(stage, around) and is_right(PREDICT, beyond)):
        return None
    labels = read(stage, around)[0]
    wrong = labels != 0
    if inside.n_voxels:
        codes = codes_of(read(PREDICT, beyond), rule)
        cut = inside.relative_to(beyond.start).slices
        seeds = erode((codes & INSIDE_BIT) != 0, rule.erode, steps)[cut]
        at = inside.relative_to(around.start).slices
        wrong[at] = _unlike(
            instances,
            labels[at],
            _Seeds.of(instances, seeds, ends=_open_ends(instances, inside, plan.region)),
            foreground=((codes & FOREGROUND_BIT) != 0)[cut],
        )
    n_wrong = int(np.count_nonzero(wrong[box.relative_to(around.start).slices]))
    if not n_wrong:
        return None
    return Finding(
        stage, None, around, f"{n_wrong} voxels have other labels than the kept probabilities give"
    )


@dataclass(frozen=True)
class _Seeds:
    """Seeds of an array (t, z, y, x): their components 1..n, and which of those surely count.

    Of those in `doubt` the array does not tell: they are too small in it, and go on beyond it.
    """

    ids: NDArray[np.unsignedinteger[Any]]
    counts: NDArray[np.bool_]
    doubt: NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        instances: InstancePlan,
        mask: NDArray[np.bool_],
        *,
        ends: frozenset[tuple[int, int]] = frozenset(),
    ) -> _Seeds:
        """Those of a mask; at `ends` (axis, 0 or 1) of the array they can go on."""
        rule = instances.rule
        ids, first = components(
            np.ascontiguousarray(mask),
            dims=instances.dims,
            connectivity=rule.connectivity,
            link=rule.link,
        )
        counts = np.bincount(ids.ravel(), minlength=len(first) + 1) >= rule.min_size
        goes_on = np.zeros(len(counts), np.bool_)
        for axis, side in ends:
            goes_on[ids.take(-side, axis=axis)] = True
        # Number 0 is what is no seed.
        counts[0] = goes_on[0] = False
        return cls(ids, counts, goes_on & ~counts)

    @property
    def counted(self) -> NDArray[np.bool_]:
        """Where a seed is that surely counts."""
        counted: NDArray[np.bool_] = self.counts[self.ids]
        return counted

    def numbers(self, labels: NDArray[Any]) -> NDArray[Any]:
        """The label of the first voxel of each that surely counts, everywhere in it."""
        present, first = np.unique(self.ids, return_index=True)
        number_of = np.zeros(len(self.counts), labels.dtype)
        number_of[present] = labels.flat[first]
        numbers: NDArray[Any] = (number_of * self.counts)[self.ids]
        return numbers


def _unlike(
    instances: InstancePlan, labels: NDArray[Any], seeds: _Seeds, *, foreground: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Where labels (t, z, y, x) are not what their own seeds, grown again, give.

    It holds for voxels that growth does not reach from where the array was cut off.
    """
    rule, steps = instances.rule, Steps(instances.ratios)
    grown = grow(seeds.numbers(labels), foreground, rule.grow, steps)
    wrong: NDArray[np.bool_] = grown != labels
    if rule.fill_holes:
        # Whose a hole is depends on all of it.
        wrong &= grown != 0
    if seeds.doubt.any():
        # A seed changes nothing beyond its own reach.
        doubtful = seeds.doubt[seeds.ids]
        near = grow(doubtful.astype(np.uint8), ~doubtful, rule.grow, steps) != 0
        wrong &= seeds.counted | ~near
    wrong |= seeds.counted & (labels == 0)
    return wrong


def _grown(region: Region, margin: tuple[int, ...], within: Region) -> Region:
    return region.grow(margin, margin).intersect(within)


def _open_ends(
    instances: InstancePlan, region: Region, whole: Region
) -> frozenset[tuple[int, int]]:
    """The sides (axis, 0 or 1) on which seeds of a region can go on beyond it."""
    rule = instances.rule
    axes = Adjacency(instances.dims, rule.connectivity, rule.link).axes
    starts = {(axis, 0) for axis in axes if region.start[axis] > whole.start[axis]}
    stops = {(axis, 1) for axis in axes if region.stop[axis] < whole.stop[axis]}
    return frozenset(starts | stops)
