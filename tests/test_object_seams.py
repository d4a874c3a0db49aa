"""Wrong objects are found at small places by what probabilities say, and right ones never are."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from planting import (
    BACKGROUND,
    BORDER,
    INSIDE,
    codes_of_painting,
    config_for,
    labels_at,
    planted_shapes,
    truth_of,
    write_planting_model,
)

from bigseg.blocks import Region
from bigseg.instances import INSIDE_BIT, segment_codes
from bigseg.ledger import Ledger, checksum_of
from bigseg.object_seams import fault_of_kept
from bigseg.plan import GROW, PREDICT, InstancePlan
from bigseg.progress import NullProgress
from bigseg.results import begun_plan, ledger_url
from bigseg.rules import InstanceRule
from bigseg.segment import segment_serially
from bigseg.steps import Steps, erode, grow
from bigseg.verify import verify
from bigseg.volume import open_volume

STEPS = Steps((1.0, 1.0, 1.0))


def segmented(planted, out, rule, **options):
    """Settings of a run that has ended."""
    image, model = planted
    config = config_for(image, model, out, rule, **{"block": (8, 16, 16), **options})
    assert segment_serially(config, NullProgress()).is_complete
    return config


def look(out):
    return verify(str(out), n_seams=40, n_chunks=0, progress=NullProgress())


def forge(out, change):
    """Write other labels of each block, with marks to match, as a run that goes wrong would."""
    before = labels_at(out)
    ledger = Ledger.open(ledger_url(str(out)))
    plan = begun_plan(ledger, str(out))
    volume = open_volume(str(out))
    for block in plan.grid:
        labels = volume.read(block.core)
        changed = change(block, labels[0]).astype(labels.dtype)[np.newaxis]
        volume.write(block.core, changed)
        mark = checksum_of(np.ascontiguousarray(changed).data)
        ledger.mark(plan.finest_stage, block.index, mark)
    ledger.flush()
    assert (labels_at(out) != before).any()


def by_other_numbers(block, labels):
    return labels + (block.index % 2) * (labels > 0)


def elsewhere(block, labels):
    del block
    return np.roll(labels, 4, axis=3)


def without_the_largest(block, labels):
    del block
    return labels * (labels != largest())


@cache
def largest():
    truth, _ = truth_of(planted_shapes(), {"erode": 1, "grow": 3, "min_size": 30})
    return 1 + np.bincount(truth.ravel().astype(int))[1:].argmax()


def grown_alone(block, labels):
    """Without what grows into the block from its neighbours."""
    del labels
    numbers, foreground = true_seeds()
    at = block.core.slices
    return grow(numbers[at], foreground[at], 3, STEPS)


@cache
def true_seeds():
    painting = planted_shapes()
    truth, _ = truth_of(painting, {"erode": 1, "grow": 3})
    return truth * erode((painting == INSIDE)[np.newaxis], 1, STEPS), painting[np.newaxis] > 0


@pytest.mark.parametrize(
    ("change", "min_size"),
    [(by_other_numbers, 1), (elsewhere, 30), (grown_alone, 1), (without_the_largest, 30)],
)
def test_verify_finds_wrong_labels_although_kept_probabilities_are_right(
    planted, tmp_path, change, min_size
):
    out = tmp_path / "out.zarr"
    rule = {"erode": 1, "grow": 3, "min_size": min_size}
    config = segmented(planted, out, rule, block=(8, 16, 8), keep_probabilities=True)
    forge(out, change)
    found = look(out)
    assert {check.name for check in found.checks if check.findings} == {"seams"}
    assert {finding.stage for finding in found.findings} == {GROW}
    assert "than the kept probabilities give" in str(found.findings[0])
    assert found.n_taken_back
    assert segment_serially(config, NullProgress()).is_complete
    np.testing.assert_array_equal(labels_at(out), truth_of(planted_shapes(), rule)[0])
    assert look(out).is_right


def test_verify_finds_that_an_object_is_gone_also_where_small_seeds_do_not_count(planted, tmp_path):
    out = tmp_path / "out.zarr"
    segmented(planted, out, {"erode": 1, "grow": 3, "min_size": 30})
    forge(out, without_the_largest)
    found = look(out)
    assert {check.name for check in found.checks if check.findings} == {"seams"}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ({"erode": 1, "grow": 3, "min_size": 30}, {}),
        ({"erode": 0, "grow": 9, "connectivity": 3}, {}),
        ({"erode": 1, "grow": 1, "min_size": 30, "fill_holes": True}, {}),
        ({"erode": 1, "grow": 3, "min_size": 4}, {"region": "3:20,5:37,2:43"}),
    ],
)
def test_right_objects_are_found_right(planted, tmp_path, keep, rule, options):
    out = tmp_path / "out.zarr"
    segmented(planted, out, rule, keep_probabilities=keep, **options)
    found = look(out)
    assert found.is_right, found.as_text()


@pytest.mark.parametrize("keep", [False, True])
def test_right_objects_of_linked_planes_are_found_right(tmp_path, keep):
    image = write_image(tmp_path / "image.zarr", planted_shapes(), chunks=(8, 16, 16))
    model = write_planting_model(tmp_path / "model.safetensors", dims=2)
    rule = {"erode": 0, "grow": 2, "connectivity": 2, "link": "z", "min_size": 12}
    options = {"tile": (8, 8), "block": (5, 16, 16), "keep_probabilities": keep}
    segmented((image, model), tmp_path / "out.zarr", rule, **options)
    found = look(tmp_path / "out.zarr")
    assert found.is_right, found.as_text()


@pytest.mark.parametrize("keep", [False, True])
def test_a_seed_too_small_to_count_may_lie_in_two_objects(tmp_path, keep):
    painting = np.zeros((8, 8, 32), np.uint8)
    painting[..., :26] = INSIDE
    painting[..., 10:16] = BORDER
    painting[4, 4, 12:14] = INSIDE
    image = write_image(tmp_path / "image.zarr", painting, chunks=(8, 8, 16))
    model = write_planting_model(tmp_path / "model.safetensors")
    out, rule = tmp_path / "out.zarr", {"erode": 0, "grow": 3, "min_size": 3}
    segmented((image, model), out, rule, block=(8, 8, 8), keep_probabilities=keep)
    assert labels_at(out)[0, 4, 4, 12:14].tolist() == [1, 2]
    found = look(out)
    assert found.is_right, found.as_text()


def boxes(shape):
    """Boxes that are not empty."""
    ends = [st.sampled_from([(a, b) for a in range(n) for b in range(a + 1, n + 1)]) for n in shape]
    return st.tuples(*ends).map(lambda e: Region(*zip(*e, strict=True)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_labels_are_right_where_their_own_seeds_give_them_and_wrong_elsewhere(data):
    dims = data.draw(st.sampled_from([2, 3]), label="dims")
    shape = data.draw(st.tuples(*(st.integers(1, n) for n in (2, 5, 9, 9))), label="shape")
    painting = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2)), label="painting")
    rule = InstanceRule(
        erode=data.draw(st.integers(0, 2), label="erode"),
        grow=data.draw(st.integers(0, 3), label="grow"),
        min_size=data.draw(st.integers(1, 4), label="min_size"),
        connectivity=data.draw(st.integers(1, dims), label="connectivity"),
        link=data.draw(st.sampled_from([None, "t", "z"][: 5 - dims]), label="link"),
        fill_holes=data.draw(st.booleans(), label="fill_holes"),
    )
    ratios = data.draw(st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.5, 1.0)]), label="ratios")[-dims:]
    region = data.draw(boxes(shape), label="region")
    box = data.draw(boxes(shape), label="box")
    codes, labels = codes_of_painting(painting), np.zeros(shape, np.uint64)
    inner = segment_codes(codes[region.slices], rule, Steps(ratios), dims=dims)[0]
    labels[region.slices] = inner
    probabilities = np.zeros((3, *shape), np.uint8)
    for channel, value in enumerate((BACKGROUND, INSIDE, BORDER)):
        in_region = (channel, *region.slices)
        probabilities[in_region] = 255 * (painting[region.slices] == value)
    stored = {PREDICT: probabilities, GROW: labels[np.newaxis]}
    instances = InstancePlan(
        rule=rule, dims=dims, ratios=ratios, keep_probabilities=True, chunk=(1, 1, 1, 1)
    )
    plan = SimpleNamespace(
        instances=instances, finest_stage=GROW, region=region, source=SimpleNamespace(shape=shape)
    )

    def fault():
        return fault_of_kept(
            plan,
            box,
            read=lambda stage, part: stored[stage][(slice(None), *part.slices)],
            is_right=lambda *_: True,
        )

    assert fault() is None
    seeds = np.zeros(shape, np.bool_)
    mask = (codes[region.slices] & INSIDE_BIT) != 0
    seeds[region.slices] = erode(mask, rule.erode, Steps(ratios))
    at = tuple(data.draw(st.integers(s.start, s.stop - 1), label="at") for s in box.slices)
    other = data.draw(st.integers(0, 4), label="other")
    is_inside = all(a <= i < b for i, a, b in zip(at, region.start, region.stop, strict=True))
    # Of a seed of one voxel only the others could tell the number.
    is_known = other == 0 or not seeds[at]
    is_exact = rule.min_size == 1 and not rule.fill_holes
    if other != labels[at] and (not is_inside or (is_exact and is_known)):
        labels[at] = other
        assert fault() is not None
