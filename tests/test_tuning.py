"""Choosing a rule: its score is that of the whole algorithm, and no rule tried is better."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from bigseg import tuning
from bigseg.contingency import Contingency, disjoint_union
from bigseg.instances import Steps, codes_of, grow, segment_codes
from bigseg.metrics import average_precision, rand_error
from bigseg.rules import InstanceRule
from bigseg.targets import IGNORE, boundary
from bigseg.tuning import Judged, RuleScore, choose_rule


def cells(shape, n, *, gaps=0.3, seed=0):
    """Voronoi cells numbered from 1; some of them are background."""
    rng = np.random.default_rng(seed)
    points = np.zeros(shape, np.int64)
    points.flat[rng.choice(points.size, n, replace=False)] = np.arange(1, n + 1)
    nearest = ndimage.distance_transform_edt(
        points == 0, return_distances=False, return_indices=True
    )
    found = points[tuple(nearest)]
    found[np.isin(found, np.flatnonzero(rng.random(n + 1) < gaps))] = 0
    return np.unique(found, return_inverse=True)[1].reshape(shape) + (found.min() > 0)


def probabilities_of(objects, *, noise=0.0, seed=0):
    """What a network would say of (t, z, y, x) objects, plane by plane, with blurred noise."""
    rng = np.random.default_rng(seed)
    planes = objects.reshape(-1, *objects.shape[-2:])
    classes = np.stack([boundary(p, border_vox=2) for p in planes]).reshape(objects.shape)
    logits = [
        4.0 * (classes == k) + noise * ndimage.gaussian_filter(rng.normal(size=classes.shape), 1)
        for k in range(3)
    ]
    raised = np.exp(np.stack(logits))
    return np.rint(255 * raised / raised.sum(axis=0)).astype(np.uint8)


def part_of(shape, n, *, noise=0.0, seed=0, voxel_size=(1.0, 1.0), gaps=0.3):
    objects = cells(shape, n, seed=seed, gaps=gaps)
    return Judged(probabilities_of(objects, noise=noise, seed=seed), objects, voxel_size)


def by_definition(parts, rule):
    """The scores of whole arrays, segmented as the definition says."""
    tables = []
    for part in parts:
        codes = codes_of(part.probabilities, rule)
        labels, _ = segment_codes(codes, rule, Steps.of(part.voxel_size), dims=part.dims)
        tables.append(Contingency.of(labels, part.objects, ignore_truth=IGNORE))
    table = disjoint_union(tables)
    precision = [average_precision(table)[iou / 20] for iou in range(10, 19)]
    return float(np.mean(precision)), rand_error(table)


@pytest.mark.parametrize("voxel_size", [(1.0, 1.0), (1.0, 1.0, 1.0), (2.5, 1.0, 1.0)])
def test_the_score_is_that_of_the_definition_and_no_coarse_rule_is_better(voxel_size):
    shape = (1, 1, 48, 60) if len(voxel_size) == 2 else (1, 4, 24, 24)
    other = (1, 1, 20, 24)
    parts = [part_of(s, 18, noise=12, voxel_size=voxel_size) for s in (shape, other)]
    rule, score = choose_rule(parts)
    assert (score.average_precision, score.rand_error) == by_definition(parts, rule)
    assert score.n_objects == sum(part.objects.max() for part in parts)
    for threshold in (0.3, 0.5, 0.9):
        for erode, grow_by in ((0, 0), (0, 4), (1, 2), (2, 8), (3, 4)):
            other = InstanceRule(threshold=threshold, erode=erode, grow=grow_by)
            precision, error = by_definition(parts, other)
            # Each of three choices may take the middle of a plateau.
            assert (precision + 1 - error) / 2 <= score.score + 3 * tuning.PLATEAU
    assert choose_rule(parts) == (rule, score)


def test_what_was_learnt_counts_as_much_as_what_is_held_out():
    part = part_of((1, 1, 60, 96), 40, noise=11)
    held_out, learnt = part.objects.copy(), part.objects.copy()
    held_out[..., 32:] = IGNORE
    learnt[..., :32] = IGNORE

    def score_of(rule, objects):
        precision, error = by_definition([replace(part, objects=objects)], rule)
        return (precision + 1 - error) / 2

    rule, score = choose_rule([replace(part, objects=held_out, learnt=learnt)])
    assert score.n_objects == len(np.unique(held_out[held_out > 0]))
    assert score.n_learnt == len(np.unique(learnt[learnt > 0])) > score.n_objects
    assert score.learnt_score == score_of(rule, learnt)
    assert score.score == (score_of(rule, held_out) + score_of(rule, learnt)) / 2
    for threshold, erode, grow_by in itertools.product((0.3, 0.5, 0.9), (0, 1), (1, 2, 4)):
        other = InstanceRule(threshold=threshold, erode=erode, grow=grow_by)
        both = (score_of(other, held_out) + score_of(other, learnt)) / 2
        assert both <= score.score + 3 * tuning.PLATEAU


def test_two_learnt_objects_are_too_few_to_count():
    part = part_of((1, 1, 60, 90), 30, noise=8)
    numbers = np.unique(part.objects)[-2:]
    learnt = np.where(np.isin(part.objects, numbers), part.objects, IGNORE)
    rule, score = choose_rule([replace(part, learnt=learnt)])
    alone, score_alone = choose_rule([part])
    assert (score.learnt_score, score.n_learnt) == (None, 2)
    assert (rule, score.score) == (alone, score_alone.score)


def test_specks_that_are_no_objects_are_told_from_them_by_their_size():
    clean = part_of((1, 1, 90, 90), 9, gaps=0.5)
    specks = np.zeros(clean.objects.shape, bool)
    specks[..., 4::11, 4::11] = True
    specks &= ndimage.binary_erosion(clean.objects == 0, np.ones((1, 1, 5, 5)))
    assert specks.sum() > 10
    probabilities = np.array(clean.probabilities)
    probabilities[:, specks] = np.array([[3], [250], [2]])
    dirty = Judged(probabilities, clean.objects, clean.voxel_size)
    rule, score = choose_rule([dirty])
    assert rule.min_size > 1 or rule.erode > 0
    of_any_size = rule.model_copy(update={"min_size": 1, "erode": 0})
    precision, _ = by_definition([dirty], of_any_size)
    assert score.average_precision > precision + 0.2


def test_specks_do_not_erode_thin_objects_away():
    """Erosion removes them too, and with them twelve of sixteen objects: two voxels across."""
    objects = np.zeros((1, 1, 100, 100), np.int64)
    for number in range(16):
        y, x = 4 + 24 * (number // 4), 4 + 24 * (number % 4)
        objects[..., y : y + (2 if number % 4 else 14), x : x + 14] = number + 1
    specks = np.zeros(objects.shape, bool)
    for first in (20, 22, 24):
        specks[..., first::24, 3::7] = True
    assert not objects[specks].any()
    inside = np.where(specks | (objects > 0), 250, 0).astype(np.uint8)
    rule, score = choose_rule([Judged(np.stack([255 - inside, inside]), objects, (1.0, 1.0))])
    assert rule.erode == 0
    assert rule.min_size > 1
    assert score.average_precision == 1


def test_a_cell_half_as_large_as_those_held_out_is_not_dropped():
    """What is no cell here is nearly as large as a cell: dropping it would look best."""
    objects = np.zeros((1, 1, 60, 60), np.int64)
    inside = np.zeros(objects.shape, np.uint8)
    for number, x in enumerate((2, 17, 32, 47), start=1):
        objects[..., 5:15, x : x + 10] = number
        inside[..., 5:15, x : x + 10] = 250
        inside[..., 30:39, x : x + 9] = 250
    rule, score = choose_rule([Judged(np.stack([255 - inside, inside]), objects, (1.0, 1.0))])
    seeds = (10 - 2 * rule.erode) ** 2
    assert 2 * rule.min_size <= seeds
    assert score.average_precision == 0.5


def test_what_objects_grow_into_the_background_costs():
    """Nine objects look the same; six of them end where they are seen, three are larger."""
    objects = np.zeros((1, 1, 100, 100), np.int64)
    inside, around = np.zeros((2, *objects.shape), np.uint8)
    for number in range(9):
        y, x = 12 + 30 * (number // 3), 12 + 30 * (number % 3)
        seen = np.s_[..., y : y + 8, x : x + 8]
        fringe = np.s_[..., y - 3 : y + 11, x - 3 : x + 11]
        objects[seen if number % 3 else fringe] = number + 1
        around[fringe], around[seen], inside[seen] = 250, 0, 250
    background = 250 - inside - around
    rule, score = choose_rule([Judged(np.stack([background, inside, around]), objects, (1.0, 1.0))])
    assert (rule.erode, rule.grow) == (0, 0)
    assert score.average_precision == pytest.approx(6 / 12)


def test_objects_that_are_seen_clearly_are_found_whole():
    part = part_of((1, 1, 80, 80), 12)
    rule, score = choose_rule([part])
    assert score.score > 0.9
    # What grows has the width of the border to make up for, and of what erosion took.
    assert rule.grow >= rule.erode + 1


def test_bridges_between_objects_are_eroded():
    inside = np.zeros((1, 1, 40, 90), np.uint8)
    objects = np.zeros(inside.shape, np.int64)
    for number, x in enumerate((5, 25, 45, 65), start=1):
        objects[..., 8:26, x : x + 18] = number
    inside[..., 9:25, :] = 250 * (objects[..., 9:25, :] > 0)
    inside[..., 16:18, 10:80] = 250
    part = Judged(np.stack([255 - inside, inside]), objects, (1.0, 1.0))
    rule, score = choose_rule([part])
    assert 1 <= rule.erode <= 3
    assert score.n_objects == 4
    assert score.average_precision > 0.8


def test_a_rim_wider_than_the_grid_is_grown_over():
    objects = np.zeros((1, 1, 150, 150), np.int64)
    inside = np.zeros(objects.shape, np.uint8)
    for number, (y, x) in enumerate(((5, 5), (5, 80), (80, 5), (80, 80)), start=1):
        objects[..., y : y + 62, x : x + 62] = number
        inside[..., y + 12 : y + 50, x + 12 : x + 50] = 250
    border = np.where((objects > 0) & (inside == 0), np.uint8(250), np.uint8(0))
    part = Judged(np.stack([255 - inside - border, inside, border]), objects, (1.0, 1.0))
    rule, score = choose_rule([part])
    assert rule.grow > max(tuning.GROWTHS)
    assert score.average_precision == 1


def test_where_objects_fill_the_space_running_together_counts():
    """One voxel of a border that is missed joins two objects; few small ones tell it by AP."""
    objects = np.ones((1, 1, 60, 61), np.int64)
    objects[..., 31:] = 2
    objects[..., :2, :2] = 3
    probabilities = np.zeros((3, *objects.shape), np.uint8)
    probabilities[1] = 250
    for axis in (2, 3):
        edge = np.diff(objects, axis=axis, append=objects.max()) != 0
        probabilities[1][edge] = 10
        probabilities[2][edge] = 240
    leak = (0, 0, 30, 30)
    probabilities[(1, *leak)] = 180
    rule, score = choose_rule([Judged(probabilities, objects, (1.0, 1.0))])
    assert rule.threshold > 0.71 or rule.erode > 0
    assert score.rand_error < 0.1
    # Nothing is background, so any foreground would do: the middle one.
    assert rule.foreground == 0.5


@given(
    seeds=hnp.arrays(
        np.uint32, (1, 2, 9, 9), elements=st.integers(0, 3).map(lambda n: 0 if n < 3 else 9)
    ),
    foreground=hnp.arrays(np.bool_, (1, 2, 9, 9)),
    ratios=st.sampled_from([(1.0, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.5, 1.0, 1.3)]),
    growths=st.sampled_from([tuning.GROWTHS, tuning.COARSE_GROWTHS, (3, 5)]),
)
@settings(max_examples=20, deadline=None)
def test_growing_on_equals_growing_from_the_seeds(seeds, foreground, ratios, growths):
    steps = Steps(ratios)
    found = list(tuning._grown(seeds, foreground, growths, steps))
    for growth, labels in zip(growths, found, strict=True):
        np.testing.assert_array_equal(labels, grow(seeds, foreground, growth, steps))


def test_what_is_found_where_nothing_was_annotated_decides_nothing():
    part = part_of((1, 1, 60, 60), 20, noise=5)
    objects = part.objects.copy()
    objects[..., :30] = IGNORE
    empty = part.probabilities.copy()
    empty[..., :30] = np.reshape([255, 0, 0], (3, 1, 1, 1, 1))
    full = empty.copy()
    full[..., :26] = np.random.default_rng(1).integers(0, 85, full[..., :26].shape)
    chosen = [choose_rule([Judged(p, objects, part.voxel_size)]) for p in (empty, full)]
    assert chosen[0] == chosen[1]
    assert chosen[0][1].score > 0.5


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_objects_choose_nothing(n):
    objects = np.zeros((1, 1, 30, 30), np.int64)
    for number in range(1, n + 1):
        objects[..., 10 * number - 8 : 10 * number, 4:14] = number
    assert choose_rule([Judged(probabilities_of(objects), objects, (1.0, 1.0))]) is None


def test_of_equal_rules_the_middle_one_is_taken():
    def found(scores):
        return {
            InstanceRule(grow=growth): RuleScore(score, 1 - score, 9)
            for growth, score in enumerate(scores)
        }

    def chosen(*scores):
        return tuning._middle_of_plateau(found(scores)).grow

    assert chosen(0.1, 0.8, 0.8, 0.8, 0.3) == 2
    assert chosen(0.1, 0.8, 0.8003, 0.8, 0.8, 0.7995, 0.2) == 3
    assert chosen(0.1, 0.2, 0.9) == 2
    assert chosen(0.9, 0.2, 0.1) == 0


def test_the_numbers_of_the_card_are_plain():
    score = RuleScore(0.75, 0.25, 12, learnt_score=0.5, n_learnt=40)
    assert score.as_dict() == {
        "score": 0.625,
        "average_precision": 0.75,
        "rand_error": 0.25,
        "n_objects": 12,
        "learnt_score": 0.5,
        "n_learnt": 40,
    }
