"""Which rule makes the best objects of the probabilities of a network: tried on what is annotated.

    probabilities ──threshold, erode, size──> seeds ──grow in foreground──> objects ──> score
                       (coarse, then fine around the best)       (every growth)

What is held out counts half, what was learnt the other half. Few objects are held out, and one
image of them can ask for a rule that does not suit the others; what the network learnt says more,
or, where it knows that by heart, the same of all rules that are any good.

The score of either is the mean of two: the average precision at IoU 0.5 to 0.9, which counts
objects, and 1 minus the Rand error of all voxels, which counts pairs. (The adapted Rand error looks
only where the truth is an object: outlines that are too wide cost nothing in it.) Where most is
background, all rules have nearly the same Rand error; where objects fill the space, few of them are
met whole, and it is the Rand error that sees whether large ones run together, and what growth has
not reached. It knows arrays, and neither networks nor volumes.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bigseg.contingency import Contingency, disjoint_union
from bigseg.instances import FOREGROUND_BIT, INSIDE_BIT, Steps, codes_of, components, erode, grow
from bigseg.metrics import average_precision, met_objects, rand_error
from bigseg.rules import InstanceRule
from bigseg.targets import IGNORE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

FEWEST_OBJECTS = 3
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99)
COARSE_THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.975)
EROSIONS = (0, 1, 2, 3)
GROWTHS = tuple(range(9))
COARSE_GROWTHS = (0, 4, 8)
FOREGROUNDS = (0.3, 0.4, 0.5, 0.6, 0.7)
COARSE_FOREGROUNDS = FOREGROUNDS[::2]
SIZES = tuple(2**power for power in range(11))
FEW = 0.05
"""The share of the objects found that smallest seeds need not spare."""
MOST_EROSION, MOST_GROWTH, LOWEST_FOREGROUND = 8, 16, 0.2
"""Beyond these nothing is tried, nor foregrounds as near to 1."""
STRICTEST_IOU = 0.9
PLATEAU = 1e-3
"""Scores that differ by less are equal: a rule in the middle of many good ones is taken."""


@dataclass(frozen=True, eq=False)
class Judged:
    """An annotated region: what the network says of it, and what is true.

    `probabilities` (classes, t, z, y, x) in 255ths; `objects` (t, z, y, x) numbered from 1, 0 for
    background, IGNORE where not held out or not annotated; `voxel_size` along the axes that the
    network sees. `learnt` are the objects of what was learnt, in the same way. Either may be None.
    """

    probabilities: NDArray[np.uint8]
    objects: NDArray[np.int64] | None
    voxel_size: tuple[float, ...]
    learnt: NDArray[np.int64] | None = None

    @property
    def dims(self) -> int:
        """Axes that the network sees."""
        return len(self.voxel_size)

    @property
    def steps(self) -> Steps:
        """How seeds shrink and grow."""
        return Steps.of(self.voxel_size)

    @cached_property
    def n_objects(self) -> int:
        """The number of true objects that are held out."""
        return 0 if self.objects is None else _count(self.objects)

    @cached_property
    def n_learnt(self) -> int:
        """The number of true objects that were learnt."""
        return 0 if self.learnt is None else _count(self.learnt)


def _count(objects: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(np.bincount(objects[objects > 0])))


@dataclass(frozen=True)
class RuleScore:
    """How well a rule does: `average_precision` at IoU 0.5 to 0.9, `rand_error`, both 0 to 1.

    `rand_error` is that of `metrics.rand_error`. They are those of the `n_objects` held out;
    `learnt_score` is that of the `n_learnt` learnt ones, None where these are too few.
    """

    average_precision: float
    rand_error: float
    n_objects: int
    learnt_score: float | None = None
    n_learnt: int = 0

    @property
    def score(self) -> float:
        """What rules are chosen by, 0 to 1."""
        held_out = _score(self.average_precision, self.rand_error)
        return held_out if self.learnt_score is None else (held_out + self.learnt_score) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the card of a model."""
        return {"score": self.score, **asdict(self)}


def _score(average_precision: float, rand_error: float) -> float:
    return (average_precision + 1 - rand_error) / 2


def choose_rule(parts: Sequence[Judged]) -> tuple[InstanceRule, RuleScore] | None:
    """The rule with the best score over all regions; None for fewer than three held-out objects.

    The same regions give the same rule. Of rules that are equally good the middle one is taken, of
    smallest seeds the smallest, and none above half of what finds small objects here.
    """
    if sum(part.n_objects for part in parts) < FEWEST_OBJECTS:
        return None
    coarse = _Grid(COARSE_THRESHOLDS, EROSIONS, COARSE_GROWTHS, COARSE_FOREGROUNDS)
    best = _middle_of_plateau(_try_with_sizes(parts, coarse), tolerance=0.0)
    thresholds = [t for t in THRESHOLDS if abs(t - best.threshold) < 0.15]
    erosions = [e for e in EROSIONS if abs(e - best.erode) <= 1]
    fine = _Grid(thresholds, erosions, GROWTHS, [best.foreground])
    best = _middle_of_plateau(_try_with_sizes(parts, fine))
    foregrounds = [f for f in FOREGROUNDS if abs(f - best.foreground) < 0.15]
    found = _try(parts, replace(_Grid.of(best), growths=GROWTHS, foregrounds=foregrounds))
    best = _beyond_the_grid(parts, _middle_of_plateau(found))
    found = _try(parts, replace(_Grid.of(best), sizes=_sizes_to_try(parts, best)))
    # What one object more or less makes of the score says nothing about the next volume.
    highest = max(found.values(), key=lambda of: of.score)
    one_object = 0.5 / highest.n_objects
    if highest.learnt_score is not None:
        one_object = 0.25 / min(highest.n_objects, highest.n_learnt)
    enough = highest.score - max(PLATEAU, one_object)
    # Of sizes that are equally good the smallest: small objects may be missing here by chance.
    best = min((r for r, of in found.items() if of.score >= enough), key=lambda r: r.min_size)
    return best, found[best]


_Tables: TypeAlias = "tuple[Contingency, Contingency]"
"""Found against true objects: held out, and learnt."""


@dataclass(frozen=True)
class _Grid:
    """The rules to try: all combinations."""

    thresholds: Sequence[float]
    erosions: Sequence[int]
    growths: Sequence[int]
    foregrounds: Sequence[float]
    sizes: Sequence[int] = (1,)

    @staticmethod
    def of(rule: InstanceRule) -> _Grid:
        """The one rule."""
        return _Grid(
            thresholds=[rule.threshold],
            erosions=[rule.erode],
            growths=[rule.grow],
            foregrounds=[rule.foreground],
            sizes=[rule.min_size],
        )

    @property
    def seeds(self) -> Iterator[InstanceRule]:
        """The rules that differ in their seeds."""
        for threshold, erosion, size in itertools.product(
            self.thresholds, self.erosions, self.sizes
        ):
            yield InstanceRule(threshold=threshold, erode=erosion, min_size=size)


def _try(parts: Sequence[Judged], grid: _Grid) -> dict[InstanceRule, RuleScore]:
    """The scores of all rules of a grid; seeds are made once for all that share them."""
    found: dict[InstanceRule, RuleScore] = {}
    for of_seeds in grid.seeds:
        seeds = [_seeds(part, of_seeds) for part in parts]
        for foreground in grid.foregrounds:
            rule = of_seeds.model_copy(update={"foreground": foreground})
            tables = [_tables(p, s, rule, grid.growths) for p, s in zip(parts, seeds, strict=True)]
            for growth, of_parts in zip(grid.growths, zip(*tables, strict=True), strict=True):
                found[rule.model_copy(update={"grow": growth})] = _judge(parts, of_parts)
    return found


def _try_with_sizes(parts: Sequence[Judged], grid: _Grid) -> dict[InstanceRule, RuleScore]:
    """The scores of all rules of a grid, with seeds of all sizes and without the smallest.

    Without that, erosion would be chosen for removing specks, which sizes do at no cost.
    """
    found: dict[InstanceRule, RuleScore] = {}
    for seeds in grid.seeds:
        one = replace(grid, thresholds=[seeds.threshold], erosions=[seeds.erode])
        of_any_size = _try(parts, one)
        found |= of_any_size
        largest = _sizes_to_try(parts, _middle_of_plateau(of_any_size, tolerance=0.0))[-1]
        if largest > 1:
            found |= _try(parts, replace(one, sizes=[largest]))
    return found


def _beyond_the_grid(parts: Sequence[Judged], best: InstanceRule) -> InstanceRule:
    """The best rule, with what lies beyond the grid tried while it lies on an end of it."""
    while (grid := _next_grid(best)) is not None:
        found = _try(parts, grid)
        next_best = _middle_of_plateau(found, tolerance=0.0)
        if found[next_best].score <= found[best].score + PLATEAU:
            break
        best = next_best
    return best


def _next_grid(best: InstanceRule) -> _Grid | None:
    """This rule and what follows it beyond the ends on which it lies; None where on none."""
    erosions, growths, foregrounds = [best.erode], [best.grow], [best.foreground]
    if best.erode >= EROSIONS[-1]:
        erosions += range(best.erode + 1, min(best.erode + 2, MOST_EROSION) + 1)
    # What is eroded by more has to grow by more.
    if best.grow >= GROWTHS[-1] or len(erosions) > 1:
        growths += range(best.grow + 1, min(best.grow + 4, MOST_GROWTH) + 1)
    if LOWEST_FOREGROUND < best.foreground <= FOREGROUNDS[0]:
        foregrounds += [best.foreground - 0.1]
    if FOREGROUNDS[-1] <= best.foreground < 1 - LOWEST_FOREGROUND:
        foregrounds += [best.foreground + 0.1]
    if len(erosions) + len(growths) + len(foregrounds) == 3:
        return None
    rounded = [round(f, 2) for f in foregrounds]
    return replace(_Grid.of(best), erosions=erosions, growths=growths, foregrounds=rounded)


def _sizes_to_try(parts: Sequence[Judged], rule: InstanceRule) -> list[int]:
    """Smallest seeds, at most half as large as nearly all seeds that find an object, ascending.

    Few objects are held out, so that others will be smaller than the smallest of them.
    """
    rule = rule.model_copy(update={"min_size": 1})
    finders = [np.zeros(0, np.int64)]
    for part in parts:
        seeds = _seeds(part, rule)
        sizes_of = np.bincount(seeds.ravel())
        for tables in _tables(part, seeds, rule, [rule.grow]):
            finders += [sizes_of[met_objects(table)] for table in tables]
    sizes = np.concatenate(finders)
    if not len(sizes):
        return [1]
    small = np.quantile(sizes, FEW, method="lower")
    return [size for size in SIZES if size == 1 or 2 * size <= small]


def _seeds(part: Judged, rule: InstanceRule) -> NDArray[np.unsignedinteger[Any]]:
    inside = (codes_of(part.probabilities, rule) & INSIDE_BIT) != 0
    eroded = erode(inside, rule.erode, part.steps)
    seeds, first = components(eroded, dims=part.dims, connectivity=rule.connectivity)
    large = np.bincount(seeds.ravel(), minlength=len(first) + 1) >= rule.min_size
    return np.where(large[seeds], seeds, seeds.dtype.type(0))


def _tables(
    part: Judged,
    seeds: NDArray[np.unsignedinteger[Any]],
    rule: InstanceRule,
    growths: Sequence[int],
) -> list[_Tables]:
    """Objects against truth, held out and learnt, after each of `growths`, which ascend."""
    foreground = (codes_of(part.probabilities, rule) & FOREGROUND_BIT) != 0
    return [
        (_against(part.objects, labels), _against(part.learnt, labels))
        for labels in _grown(seeds, foreground, growths, part.steps)
    ]


def _against(truth: NDArray[np.int64] | None, labels: NDArray[Any]) -> Contingency:
    if truth is None:
        return Contingency.empty()
    return Contingency.of(labels, truth, ignore_truth=IGNORE)


def _grown(
    seeds: NDArray[np.unsignedinteger[Any]],
    foreground: NDArray[np.bool_],
    growths: Sequence[int],
    steps: Steps,
) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """The seeds grown by each number of steps.

    Steps repeat, mostly every second one: then growing goes on from what has been grown already.
    """
    done, labels = 0, seeds
    for growth in growths:
        if list(steps.moves(growth))[done:] == list(steps.moves(growth - done)):
            result = grow(labels, foreground, growth - done, steps)
        else:
            result = grow(seeds, foreground, growth, steps)
        if growth % 2 == 0:
            done, labels = growth, result
        yield result


def _judge(parts: Sequence[Judged], tables: Sequence[_Tables]) -> RuleScore:
    """The scores of all regions together; their objects are different ones."""
    held_out, learnt = (disjoint_union(column) for column in zip(*tables, strict=True))
    n_learnt = sum(part.n_learnt for part in parts)
    precision, error = _precision_and_error(held_out)
    return RuleScore(
        average_precision=precision,
        rand_error=error,
        n_objects=sum(part.n_objects for part in parts),
        learnt_score=_score(*_precision_and_error(learnt)) if n_learnt >= FEWEST_OBJECTS else None,
        n_learnt=n_learnt,
    )


def _precision_and_error(table: Contingency) -> tuple[float, float]:
    """The average precision up to `STRICTEST_IOU`, and the Rand error."""
    precision = [p for iou, p in average_precision(table).items() if iou <= STRICTEST_IOU]
    return float(np.mean(precision)), rand_error(table)


def _middle_of_plateau(
    found: dict[InstanceRule, RuleScore], *, tolerance: float = PLATEAU
) -> InstanceRule:
    """Of the rules that are as good as the best, the one nearest to their mean."""
    enough = max(of.score for of in found.values()) - tolerance
    plateau = [rule for rule, of in found.items() if of.score >= enough]
    places = np.array([(10 * r.threshold, r.erode, r.grow, 10 * r.foreground) for r in plateau])
    distances = ((places - places.mean(axis=0)) ** 2).sum(axis=1).round(6)
    return plateau[int(distances.argmin())]
