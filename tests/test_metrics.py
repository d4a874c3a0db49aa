"""Laws of the scores: equal to the reference libraries and to brute force, and sums of blocks."""

import functools
import math
import pickle

import numpy as np
import pytest
import scipy.optimize
import skimage.metrics
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bigseg import contingency
from bigseg.errors import InputError
from bigseg.metrics import (
    Contingency,
    PanopticQuality,
    adapted_rand_error,
    average_precision,
    class_overlaps,
    disjoint_union,
    foreground_overlap,
    n_objects,
    panoptic_quality,
    pixel_accuracy,
    rand_error,
    seg_score,
    variation_of_information,
)

THRESHOLDS = [t / 20 for t in range(10, 20)]


@st.composite
def pairs(draw, max_id=4):
    """Two label arrays of one shape; half of the time the prediction is nearly the truth."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=8))
    ids = st.integers(0, max_id)
    truth = draw(hnp.arrays(np.uint16, shape, elements=ids, fill=st.integers(0, max_id)))
    pred = draw(hnp.arrays(np.uint32, shape, elements=ids, fill=st.integers(0, max_id)))
    if draw(st.booleans()):
        changed = draw(hnp.arrays(bool, shape, fill=st.just(False)))
        pred = np.where(changed, pred, truth)
    return pred, truth


def rows(table):
    return list(zip(table.pred.tolist(), table.truth.tolist(), table.count.tolist(), strict=True))


def equal(a, b):
    return rows(a) == rows(b)


# The table.


@given(
    arrays=pairs(),
    ignore=st.sampled_from([None, 0, 2]),
    # Never, where ids are few, and always by places instead of sorting.
    places_each=st.sampled_from([0, contingency.PLACES_EACH, 10**6]),
)
@settings(max_examples=120, deadline=None)
def test_the_table_counts_each_pair_in_order(arrays, ignore, places_each):
    pred, truth = arrays
    counts = {}
    for p, t in zip(pred.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t != ignore:
            counts[p, t] = counts.get((p, t), 0) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contingency, "PLACES_EACH", places_each)
        table = Contingency.of(pred, truth, ignore_truth=ignore)
    assert rows(table) == [(*pair, n) for pair, n in sorted(counts.items())]
    assert table.n_voxels == sum(counts.values())
    columns = table.pred, table.truth, table.count
    assert [column.dtype for column in columns] == [np.uint64, np.uint64, np.int64]


@given(arrays=pairs(), n_parts=st.integers(1, 9), order=st.randoms())
@settings(max_examples=60, deadline=None)
def test_tables_of_parts_add_up_to_the_table_of_the_whole(arrays, n_parts, order):
    pred, truth = (a.ravel() for a in arrays)
    parts = [
        Contingency.of(p, t)
        for p, t in zip(np.array_split(pred, n_parts), np.array_split(truth, n_parts), strict=True)
    ]
    order.shuffle(parts)
    whole = Contingency.of(pred, truth)
    assert equal(Contingency.merged(iter(parts)), whole)
    assert equal(functools.reduce(lambda a, b: a + b, parts), whole)


def test_merging_many_tables_stays_cheap(monkeypatch):
    """Each pair is sorted about log(n) times, not n times."""
    add, n_sorted = Contingency.__add__, []

    def counted(self, other):
        n_sorted.append(len(self) + len(other))
        return add(self, other)

    monkeypatch.setattr(Contingency, "__add__", counted)
    tables = (Contingency.of(np.array([i]), np.array([i])) for i in range(300))
    assert len(Contingency.merged(tables)) == 300
    assert sum(n_sorted) < 300 * 2 * math.log2(300)


@given(arrays=pairs())
@settings(max_examples=30, deadline=None)
def test_large_ids_are_counted_like_small_ones(arrays):
    pred, truth = (a.astype(np.uint64) for a in arrays)
    large = Contingency.of(pred + 2**40, truth + 2**50)
    small = Contingency.of(pred, truth)
    assert rows(large) == [(p + 2**40, t + 2**50, n) for p, t, n in rows(small)]


def test_the_empty_table_changes_nothing():
    table = Contingency.of(np.array([1, 2]), np.array([1, 1]))
    assert equal(Contingency.empty() + table, table)
    assert equal(Contingency.merged([]), Contingency.empty())
    assert equal(Contingency.of(np.zeros((0, 3), int), np.zeros((0, 3), int)), Contingency.empty())


def test_the_largest_ids_are_told_apart():
    top = 2**64 - 1
    table = Contingency.of(np.array([top, top - 1], np.uint64), np.array([top, top], np.uint64))
    assert rows(table) == [(top - 1, top, 1), (top, top, 1)]


def test_a_table_travels_between_workers():
    table = Contingency.of(np.array([1, 2]), np.array([1, 1]))
    assert equal(pickle.loads(pickle.dumps(table)), table)


@given(arrays=pairs())
@settings(max_examples=30, deadline=None)
def test_the_dense_table_is_the_confusion_matrix(arrays):
    table = Contingency.of(*arrays)
    dense = table.dense(5)
    for p, t in np.ndindex(5, 5):
        assert dense[p, t] == np.count_nonzero((arrays[0] == p) & (arrays[1] == t))
    assert equal(Contingency.from_dense(dense), table)


# Scores against the reference library.


@given(arrays=pairs())
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # skimage divides 0 by 0
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_rand_error_equals_skimage_on_the_foreground(arrays):
    pred, truth = arrays
    assume(truth.any())
    found = adapted_rand_error(Contingency.of(pred, truth))
    error, over_true, over_found = skimage.metrics.adapted_rand_error(truth, pred)
    # scikit-image 0.26 names them the other way round: its first part divides by the truth.
    for ours, theirs in [
        (found.error, error),
        (found.recall, over_true),
        (found.precision, over_found),
    ]:
        assert math.isnan(theirs) or ours == pytest.approx(theirs, abs=1e-12)


@given(arrays=pairs())
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # skimage divides 0 by 0
def test_rand_error_of_all_voxels_equals_skimage(arrays):
    pred, truth = arrays
    expected, *_ = skimage.metrics.adapted_rand_error(truth, pred, ignore_labels=())
    # One voxel has no pair, and singles none that is the same: nothing is wrong then.
    found = rand_error(Contingency.of(pred, truth))
    assert found == pytest.approx(0.0 if math.isnan(expected) else expected, abs=1e-12)


def test_rand_precision_falls_with_mergers_and_recall_with_splits():
    truth, merged = np.array([1, 1, 2, 2]), np.array([3, 3, 3, 3])
    run_together = adapted_rand_error(Contingency.of(merged, truth))
    assert (run_together.precision, run_together.recall) == (pytest.approx(1 / 3), 1.0)
    cut_apart = adapted_rand_error(Contingency.of(truth, merged))
    assert (cut_apart.precision, cut_apart.recall) == (1.0, pytest.approx(1 / 3))


def test_rand_error_ignores_what_is_predicted_on_background():
    truth = np.array([0, 0, 1, 1, 2, 2])
    scores = {
        adapted_rand_error(Contingency.of(np.array([*x, 1, 1, 2, 2]), truth))
        for x in [(0, 0), (1, 9)]
    }
    assert [s.error for s in scores] == [0.0]


@given(arrays=pairs())
@settings(max_examples=80, deadline=None)
def test_variation_of_information_equals_skimage(arrays):
    pred, truth = arrays
    table = Contingency.of(pred, truth)
    found = variation_of_information(table)
    split, merge = skimage.metrics.variation_of_information(truth, pred)
    assert found.split == pytest.approx(split, abs=1e-9)
    assert found.merge == pytest.approx(merge, abs=1e-9)
    assert found.total == found.split + found.merge
    assume(truth.any())
    split, merge = skimage.metrics.variation_of_information(truth, pred, ignore_labels=(0,))
    restricted = variation_of_information(table.foreground())
    assert (restricted.split, restricted.merge) == pytest.approx((split, merge), abs=1e-9)


def test_split_and_merge_are_one_bit_for_objects_cut_in_halves():
    halves, whole = np.array([1, 2] * 8), np.full(16, 5)
    cut = variation_of_information(Contingency.of(halves, whole))
    assert (cut.split, cut.merge) == (1.0, 0.0)
    merged = variation_of_information(Contingency.of(whole, halves))
    assert (merged.split, merged.merge) == (0.0, 1.0)


# Scores against brute force.


def masks(labels):
    return {i: labels == i for i in np.unique(labels).tolist() if i}


def iou(a, b):
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


def overlaps(pred, truth):
    """Intersections and unions of all objects, as two matrices (pred, truth)."""
    pred, truth = masks(pred), masks(truth)
    shape = (len(pred), len(truth))
    both = [np.count_nonzero(p & t) for p in pred.values() for t in truth.values()]
    either = [np.count_nonzero(p | t) for p in pred.values() for t in truth.values()]
    return np.reshape(both, shape).astype(int), np.reshape(either, shape).astype(int)


def n_assigned(is_met):
    """The most pairs that a matrix allows, no row and no column twice."""
    return int(is_met[scipy.optimize.linear_sum_assignment(is_met, maximize=True)].sum())


@given(arrays=st.one_of(pairs(), pairs(max_id=9)))
@settings(max_examples=150)
def test_average_precision_is_that_of_the_best_assignment(arrays):
    both, either = overlaps(*arrays)
    found = average_precision(Contingency.of(*arrays))
    assert list(found) == THRESHOLDS
    for twentieths in range(10, 20):
        met = n_assigned(20 * both >= twentieths * either)
        n_all = sum(both.shape) - met
        if n_all:
            assert found[twentieths / 20] == met / n_all
        else:
            assert math.isnan(found[twentieths / 20])


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_halves_of_an_object_one_meets_it(swapped):
    whole = np.array([1, 1, 1, 1, 2, 2, 3, 0])
    halves = np.array([4, 4, 5, 5, 6, 0, 7, 7])
    sides = (halves, whole) if swapped else (whole, halves)
    found = average_precision(Contingency.of(*sides))
    # Met at 0.5: 1 by one of its halves, 2 by half of it, 3 by 7, which is twice as large.
    assert found[0.5] == 3 / (3 + 4 - 3)
    assert found[0.55] == 0
    assert panoptic_quality(Contingency.of(*sides)).rq == 0


def test_an_overlap_of_exactly_the_threshold_is_a_match():
    truth, pred = np.ones(20, int), np.array([1] * 11 + [0] * 9)
    found = average_precision(Contingency.of(pred, truth))
    assert (found[0.5], found[0.55], found[0.6]) == (1.0, 1.0, 0.0)


@given(arrays=st.one_of(pairs(), pairs(max_id=9)))
@settings(max_examples=80)
def test_panoptic_quality_equals_its_formula(arrays):
    both, either = overlaps(*arrays)
    found = panoptic_quality(Contingency.of(*arrays))
    if not sum(both.shape):
        assert all(map(math.isnan, (found.pq, found.sq, found.rq)))
        return
    met = 2 * both > either
    assert n_assigned(met) == met.sum()
    ious = both[met] / either[met]
    n_missed = sum(both.shape) - 2 * len(ious)
    assert found.pq == pytest.approx(ious.sum() / (len(ious) + n_missed / 2))
    assert found.rq == pytest.approx(len(ious) / (len(ious) + n_missed / 2))
    assert found.sq == pytest.approx(ious.mean() if len(ious) else 0)


@given(arrays=pairs())
@settings(max_examples=60, deadline=None)
def test_seg_equals_the_definition(arrays):
    pred, truth = (masks(a) for a in arrays)
    found = seg_score(Contingency.of(*arrays))
    per_object = [
        max(
            (iou(p, t) for p in pred.values() if 2 * np.count_nonzero(p & t) > np.count_nonzero(t)),
            default=0.0,
        )
        for t in truth.values()
    ]
    if per_object:
        assert found == pytest.approx(np.mean(per_object))
    else:
        assert math.isnan(found)


@given(arrays=pairs())
@settings(max_examples=60, deadline=None)
def test_class_scores_equal_their_formulas(arrays):
    pred, truth = arrays
    table = Contingency.of(pred, truth)
    assert pixel_accuracy(table) == pytest.approx(np.mean(pred == truth))
    by_class = class_overlaps(table)
    assert set(by_class) == set(np.unique(pred).tolist()) | set(np.unique(truth).tolist())
    for i, overlap in by_class.items():
        p, t = pred == i, truth == i
        assert overlap.iou == pytest.approx(iou(p, t))
        assert overlap.dice == pytest.approx(2 * np.sum(p & t) / (np.sum(p) + np.sum(t)))
    fore = foreground_overlap(table)
    assert (fore.n_pred, fore.n_truth, fore.n_both) == (
        np.count_nonzero(pred),
        np.count_nonzero(truth),
        np.count_nonzero((pred > 0) & (truth > 0)),
    )
    assert n_objects(table) == (len(masks(pred)), len(masks(truth)))


@given(arrays=st.lists(pairs(max_id=2), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_disjoint_union_is_the_table_of_ids_made_different(arrays):
    tables = [Contingency.of(p, t) for p, t in arrays]
    shifted = [
        (np.where(p, p.astype(int) + 10 * i, 0), np.where(t, t.astype(int) + 10 * i, 0))
        for i, (p, t) in enumerate(arrays)
    ]
    expected = Contingency.merged(Contingency.of(p, t) for p, t in shifted)
    found = disjoint_union(tables)
    assert n_objects(found) == n_objects(expected)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(found.truth == 0, expected.truth == 0)
    assert seg_score(found) == pytest.approx(seg_score(expected), nan_ok=True)


# Limits.


def test_a_perfect_prediction_scores_best():
    labels = np.array([[0, 1, 1, 2], [0, 1, 3, 3]])
    table = Contingency.of(labels * 7, labels)
    rand, voi = adapted_rand_error(table), variation_of_information(table)
    assert (rand.error, rand.precision, rand.recall) == (0, 1, 1)
    assert voi.total == pytest.approx(0, abs=1e-12)
    assert seg_score(table) == 1
    assert set(average_precision(table).values()) == {1.0}
    assert panoptic_quality(table) == PanopticQuality(sq=1.0, rq=1.0)


def test_objects_of_one_voxel_have_no_pairs_and_no_error():
    singles = np.arange(1, 5)
    assert adapted_rand_error(Contingency.of(singles, singles)).error == 0


def test_nothing_to_judge_gives_nan():
    nothing = Contingency.of(np.zeros(4, int), np.zeros(4, int))
    assert math.isnan(adapted_rand_error(nothing).error)
    assert math.isnan(seg_score(nothing))
    assert math.isnan(panoptic_quality(nothing).pq)
    assert all(math.isnan(v) for v in average_precision(nothing).values())
    assert math.isnan(variation_of_information(Contingency.empty()).total)
    assert math.isnan(pixel_accuracy(Contingency.empty()))
    assert math.isnan(foreground_overlap(nothing).iou)


def test_pairs_of_huge_objects_do_not_overflow():
    huge = Contingency(
        np.array([1, 2], np.uint64), np.array([1, 2], np.uint64), np.array([2**50, 2**50])
    )
    rand = adapted_rand_error(huge + huge)
    assert (rand.error, rand.precision) == (0, 1)
    assert average_precision(huge)[0.95] == 1.0
    assert panoptic_quality(huge).pq == 1.0


def test_arrays_that_are_no_labels_are_refused():
    ids = np.array([1, 2])
    with pytest.raises(InputError, match=r"shape \(2,\), the truth \(3,\)"):
        Contingency.of(ids, np.array([1, 2, 3]))
    with pytest.raises(InputError, match="ids of type float64 cannot be counted"):
        Contingency.of(ids * 0.5, ids)
    with pytest.raises(InputError, match="the truth holds the id -1, but ids are at least 0"):
        Contingency.of(ids, np.array([-1, 2]))
    assert Contingency.of(ids, np.array([-1, 2]), ignore_truth=-1).n_voxels == 1
    with pytest.raises(InputError, match="id 2 does not fit a table of 2 classes"):
        Contingency.of(ids, ids).dense(2)
