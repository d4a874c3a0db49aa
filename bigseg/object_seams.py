"""What probabilities say of the objects at a small box, whatever lies beyond it.

Which seeds are one, and how far they grow, can depend on voxels far away. But with probabilities
that are known within a bound, at every place of the box:

    surely a seed               it has a label, and the same as a face neighbour that surely is one
    surely neither a seed       it has none
    nor foreground

A box across the border of blocks, of which one was made from other context or by other numbers than
its neighbour, breaks one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg.steps import Steps, erode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.plan import InstancePlan


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
    rule = instances.rule
    wrong = np.zeros(labels.shape, bool)
    if rule.min_size == 1:
        wrong |= known.sure & (labels == 0)
    if not rule.fill_holes:
        wrong |= ~known.possible & (labels != 0)
    for axis in range(4 - instances.dims, 4):
        front = tuple(slice(None, -1) if i == axis else slice(None) for i in range(4))
        back = tuple(slice(1, None) if i == axis else slice(None) for i in range(4))
        wrong[back] |= known.sure[front] & known.sure[back] & (labels[front] != labels[back])
    return int(np.count_nonzero(wrong))
