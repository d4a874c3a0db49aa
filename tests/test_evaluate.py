"""Laws of the evaluation: blocks decide nothing, and what cannot be compared is refused."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import skimage.metrics
import zarr
from hypothesis import given
from hypothesis import strategies as st

from bigseg import evaluate as evaluation
from bigseg.blocks import Region
from bigseg.errors import InputError, InputNotFoundError, UsageError
from bigseg.evaluate import evaluate, evaluate_urls, scores
from bigseg.metrics import Contingency, adapted_rand_error, variation_of_information
from bigseg.volume import open_volume

BODIES = Path(__file__).parents[2] / "shared" / "data" / "fib25" / "bodies.tif"


def store(path, data, *, axes="zyx", chunk=None):
    """An OME-Zarr 0.5 image of one level holding `data`."""
    kinds = {"t": "time", "c": "channel"}
    group = zarr.create_group(path, zarr_format=3)
    array = group.create_array(
        "0", shape=data.shape, chunks=chunk or data.shape, dtype=data.dtype, dimension_names=axes
    )
    array[...] = data
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {
                "axes": [{"name": a, "type": kinds.get(a, "space")} for a in axes],
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": [1.0] * len(axes)}
                        ],
                    }
                ],
            }
        ],
    }
    return open_volume(str(path))


def labels(shape, seed, n=6):
    """Blocky random labels, so that objects are larger than a voxel."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, n, [math.ceil(s / 3) for s in shape]).astype(np.uint16)
    for axis, length in enumerate(shape):
        coarse = np.repeat(coarse, 3, axis=axis).take(range(length), axis=axis)
    return coarse


@pytest.mark.parametrize("limit", [60, 500, 2**24])
def test_scores_do_not_depend_on_blocks_or_chunks(tmp_path, monkeypatch, limit):
    truth = labels((7, 13, 11), 0)
    pred = np.where(labels(truth.shape, 1, n=9) == 0, 3, truth)
    monkeypatch.setattr(evaluation, "MAX_BLOCK_VOXELS", limit)
    found = evaluate(
        store(tmp_path / "p", pred, chunk=(7, 3, 4)), store(tmp_path / "t", truth, chunk=(2, 5, 4))
    )
    assert found == scores([Contingency.of(pred, truth)])
    assert found.rand.error == pytest.approx(skimage.metrics.adapted_rand_error(truth, pred)[0])
    assert found.pixel_accuracy == pytest.approx(np.mean(pred == truth))


@given(
    chunk=st.tuples(*[st.integers(1, 5000)] * 4),
    shape=st.tuples(*[st.integers(1, 5000)] * 4),
    limit=st.integers(8, 10**6),
)
def test_blocks_are_whole_chunks_where_they_fit_the_limit(chunk, shape, limit):
    block = evaluation._block_shape(chunk, shape, limit=limit)
    assert block[0] == 1
    assert all(b >= 1 for b in block)
    assert math.prod(block) <= limit
    clipped = [min(c, n) for c, n in zip(chunk[1:], shape[1:], strict=True)]
    if math.prod(clipped) <= limit:
        assert all(b % c == 0 for b, c in zip(block[1:], clipped, strict=True))


def test_a_region_is_judged_alone(tmp_path):
    truth, pred = labels((6, 9, 9), 0), labels((6, 9, 9), 1)
    region = Region((0, 1, 2, 3), (1, 5, 9, 8))
    found = evaluate(
        store(tmp_path / "p", pred), store(tmp_path / "t", truth, chunk=(4, 4, 4)), region=region
    )
    cut = region.slices[1:]
    assert found == scores([Contingency.of(pred[cut], truth[cut])])
    with pytest.raises(UsageError, match="is not inside"):
        evaluate(
            open_volume(str(tmp_path / "p")),
            open_volume(str(tmp_path / "t")),
            region=Region((0, 0, 0, 0), (1, 7, 9, 9)),
        )


def test_a_written_region_holds_for_all_time_points(tmp_path):
    truth, pred = labels((2, 9, 9), 0), labels((2, 9, 9), 1)
    urls = [str(tmp_path / name) for name in "pt"]
    for url, data in zip(urls, (pred, truth), strict=True):
        store(url, data, axes="tyx")
    found = evaluate_urls(*urls, region="2:,-4:8", ignore=3)
    tables = [
        Contingency.of(p[2:, 5:8], t[2:, 5:8], ignore_truth=3)
        for p, t in zip(pred, truth, strict=True)
    ]
    assert found == scores(tables)
    assert evaluate_urls(*urls) == scores(
        [Contingency.of(p, t) for p, t in zip(pred, truth, strict=True)]
    )
    with pytest.raises(UsageError, match=r"region '1:2' has 1 axes, the volume has 2"):
        evaluate_urls(*urls, region="1:2")
    with pytest.raises(InputNotFoundError, match="no such image"):
        evaluate_urls(urls[0], str(tmp_path / "absent"))


def test_ignored_voxels_count_nowhere(tmp_path):
    truth, pred = labels((4, 9, 9), 0), labels((4, 9, 9), 1)
    found = evaluate(store(tmp_path / "p", pred), store(tmp_path / "t", truth), ignore=4)
    keep = truth != 4
    assert found == scores([Contingency.of(pred[keep], truth[keep])])
    assert found.n_voxels == np.count_nonzero(keep)


def test_an_id_at_two_time_points_is_two_objects(tmp_path):
    truth = np.ones((3, 4, 4), np.uint8)
    pred = truth * np.arange(1, 4, dtype=np.uint8)[:, None, None]
    found = evaluate(
        store(tmp_path / "p", pred, axes="tyx"), store(tmp_path / "t", truth, axes="tyx")
    )
    assert (found.n_pred_objects, found.n_truth_objects) == (3, 3)
    assert found.rand.error == 0
    assert found.seg == 1
    assert found.classes[1].n_both == 16
    flat = evaluate(store(tmp_path / "pz", pred), store(tmp_path / "tz", truth))
    assert (flat.n_pred_objects, flat.n_truth_objects) == (3, 1)


def test_what_is_predicted_on_background_changes_neither_rand_nor_voi():
    truth = np.array([0, 0, 0, 1, 1, 2, 2])
    found = scores([Contingency.of(np.array([1, 2, 0, 1, 1, 2, 2]), truth)])
    assert (found.rand.error, found.voi.total) == (0, 0)
    assert found.seg < 1
    assert found.foreground.n_pred == 6


def test_class_scores_are_left_out_for_many_objects(tmp_path):
    ids = np.arange(1, 2 * 20 * 20 + 1, dtype=np.uint32).reshape(2, 20, 20)
    found = evaluate(store(tmp_path / "p", ids), store(tmp_path / "t", ids))
    assert found.classes is None
    assert found.pixel_accuracy is None
    assert math.isnan(found.mean_dice)
    assert "classes" not in found.as_dict()
    assert "classes" not in found.as_text()
    assert scores([Contingency.of(ids.ravel()[:256], ids.ravel()[:256])]).classes is not None
    assert scores([Contingency.of(ids.ravel()[:257], ids.ravel()[:257])]).classes is None


def test_validation_counts_classes_by_region_and_rank():
    """What training does: tables of arg max against the target, summed, then scored."""
    rng = np.random.default_rng(0)
    target = rng.integers(-1, 3, (4, 10, 10))
    predicted = rng.integers(0, 3, target.shape)
    tables = [Contingency.of(p, t, ignore_truth=-1) for p, t in zip(predicted, target, strict=True)]
    summed = Contingency.from_dense(sum(table.dense(3) for table in tables))
    found = scores([summed])
    known = target >= 0
    assert found.pixel_accuracy == pytest.approx(np.mean(predicted[known] == target[known]))
    both = (predicted == 2) & (target == 2) & known
    either = ((predicted == 2) | (target == 2)) & known
    assert found.classes[2].iou == pytest.approx(both.sum() / either.sum())
    assert found.mean_iou == pytest.approx(np.mean([found.classes[i].iou for i in range(3)]))


def test_scores_are_plain_json_and_a_page_of_text():
    truth = np.array([0, 1, 1, 2, 2, 2])
    found = scores([Contingency.of(np.array([0, 1, 1, 2, 2, 1]), truth)])
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["adapted_rand_error"]["error"] == found.rand.error
    assert values["average_precision"]["0.50"] == found.average_precision[0.5]
    assert values["panoptic_quality"]["pq"] == found.panoptic.sq * found.panoptic.rq > 0
    assert values["classes"]["2"]["dice"] == pytest.approx(0.8)
    text = found.as_text()
    assert f"adapted Rand error    {found.rand.error:.4f}" in text
    assert f"PQ                    {found.panoptic.pq:.4f} (SQ " in text
    assert "pixel accuracy        0.8333" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seg = 1.0


def test_what_could_not_be_judged_is_null_in_json():
    values = scores([Contingency.of(np.zeros(3, int), np.zeros(3, int))]).as_dict()
    assert values["seg"] is None
    assert values["panoptic_quality"] == {"pq": None, "sq": None, "rq": None}
    assert values["adapted_rand_error"] == {"error": None, "precision": None, "recall": None}
    assert "nan" not in json.dumps(values).lower()


def test_many_classes_are_shortened_in_the_text():
    ids = np.arange(1, 40)
    assert "and 23 more" in scores([Contingency.of(ids, ids)]).as_text()


def test_shapes_that_differ_are_refused_with_both(tmp_path):
    pred, truth = (
        store(tmp_path / "p", labels((4, 4, 4), 0)),
        store(tmp_path / "t", labels((4, 4, 5), 0)),
    )
    with pytest.raises(InputError, match=r"p has shape \(1, 4, 4, 4\).*t has \(1, 4, 4, 5\)"):
        evaluate(pred, truth)


def test_probabilities_are_refused_with_the_way_out(tmp_path):
    truth = store(tmp_path / "t", labels((4, 4, 4), 0))
    channels = store(tmp_path / "c", np.zeros((3, 4, 4, 4), np.uint8), axes="czyx")
    with pytest.raises(InputError, match=r"has 3 channels, .* give a label image \(IMAGE/labels/"):
        evaluate(channels, truth)
    with pytest.raises(InputError, match="values of type float32, but labels are integers"):
        evaluate(truth, store(tmp_path / "f", np.zeros((4, 4, 4), np.float32)))


@pytest.mark.realdata
@pytest.mark.skipif(not BODIES.exists(), reason=f"the real data {BODIES} are not here")
def test_scores_of_real_bodies_equal_the_reference():
    tifffile = pytest.importorskip("tifffile")
    bodies = tifffile.imread(BODIES)[:40, :120, :120]
    shifted = np.roll(bodies, 2, axis=2)
    table = Contingency.of(shifted, bodies)
    error = skimage.metrics.adapted_rand_error(bodies, shifted)[0]
    assert adapted_rand_error(table).error == pytest.approx(error)
    assert error > 0.01
    split, merge = skimage.metrics.variation_of_information(bodies, shifted)
    found = variation_of_information(table)
    assert (found.split, found.merge) == pytest.approx((split, merge))
