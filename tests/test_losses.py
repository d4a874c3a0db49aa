"""Laws of the losses: what is ignored has no influence, and the sums are the textbook's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from bigseg import losses, targets
from bigseg.errors import InputError
from bigseg.losses import IGNORE, balanced_weights, segmentation_loss


def batch(seed: int, n_classes: int = 3, shape: tuple[int, ...] = (2, 5, 7)):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(shape[0], n_classes, *shape[1:])).astype(np.float32)
    target = rng.integers(-1, n_classes, size=shape)
    return torch.from_numpy(logits), torch.from_numpy(target)


def reference(logits, target, dice, weights, extra=None):
    """The loss in float64, voxel by voxel."""
    logits, target = logits.double().numpy(), target.numpy()
    k = logits.shape[1]
    rows, classes = np.moveaxis(logits, 1, -1).reshape(-1, k), target.reshape(-1)
    counted = classes >= 0
    rows, classes = rows[counted], classes[counted]
    p = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    w = np.ones(k) if weights is None else weights.double().numpy()
    voxel_weights = w[classes]
    if extra is not None:
        voxel_weights = voxel_weights + extra.double().numpy().reshape(-1)[counted]
    ce = -(voxel_weights * np.log(p[np.arange(len(p)), classes])).sum() / voxel_weights.sum()
    scores = [
        2 * p[classes == c, c].sum() / (p[:, c].sum() + (classes == c).sum())
        for c in range(k)
        if (classes == c).any()
    ]
    return ce + dice * (1 - np.mean(scores))


@given(
    seed=st.integers(0, 1000),
    dice=st.sampled_from([0.0, 0.5, 2.0]),
    weighted=st.booleans(),
    mapped=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_loss_equals_the_formula_written_out(seed, dice, weighted, mapped):
    logits, target = batch(seed)
    weights = torch.tensor([0.5, 1.0, 3.0]) if weighted else None
    extra = 10 * torch.rand(target.shape, generator=torch.manual_seed(seed)) if mapped else None
    loss = segmentation_loss(logits, target, dice=dice, class_weights=weights, extra_weights=extra)
    expected = reference(logits, target, dice, weights, extra)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_an_extra_weight_of_nothing_changes_nothing(weights):
    logits, target = batch(8)
    nothing = torch.zeros(target.shape)
    plain = segmentation_loss(logits, target, class_weights=weights)
    found = segmentation_loss(logits, target, class_weights=weights, extra_weights=nothing)
    torch.testing.assert_close(found, plain)


def test_extra_weights_of_ignored_voxels_have_no_influence():
    logits, target = batch(9)
    extra = torch.rand(target.shape)
    other = torch.where(target == IGNORE, 99.0, extra)
    found = [segmentation_loss(logits, target, extra_weights=e) for e in (extra, other)]
    assert torch.equal(*found)


def test_three_dimensional_batches_give_the_same_loss_as_their_flattened_voxels():
    logits, target = batch(1, shape=(1, 3, 4, 5))
    flat = segmentation_loss(logits.reshape(1, 3, 12, 5), target.reshape(1, 12, 5))
    torch.testing.assert_close(segmentation_loss(logits, target), flat)


def test_ignored_voxels_have_no_influence_and_no_gradient():
    logits, target = batch(2)
    ignored = (target == IGNORE).unsqueeze(1)
    assert ignored.any()
    changed = torch.where(ignored, 50.0, logits).requires_grad_()
    loss = segmentation_loss(changed, target)
    loss.backward()
    torch.testing.assert_close(loss.detach(), segmentation_loss(logits, target))
    assert torch.all(changed.grad[ignored.expand_as(changed)] == 0)


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_a_batch_that_is_ignored_wholly_has_loss_and_gradient_zero(weights):
    logits, target = batch(3)
    logits.requires_grad_()
    loss = segmentation_loss(logits, torch.full_like(target, IGNORE), class_weights=weights)
    loss.backward()
    assert loss.item() == 0
    assert torch.all(logits.grad == 0)
    ignored, extra = torch.full_like(target, IGNORE), torch.ones(target.shape)
    assert segmentation_loss(logits, ignored, extra_weights=extra).item() == 0


def test_the_gradient_is_finite_for_extreme_logits():
    logits, target = batch(4)
    logits = (logits * 1e4).requires_grad_()
    segmentation_loss(logits, target).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_perfect_prediction_has_loss_zero_even_where_classes_are_absent():
    target = torch.tensor([[[0, 1], [1, 0]]])
    logits = 100.0 * functional.one_hot(target, 4).movedim(-1, 1).float()
    assert segmentation_loss(logits, target, dice=1.0).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_logits_are_computed_in_single():
    logits, target = batch(5)
    half = logits.bfloat16()
    loss = segmentation_loss(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segmentation_loss(half.float(), target))


def test_the_ignored_value_can_be_a_class_number():
    logits, target = batch(6)
    as_two = torch.where(target == 2, IGNORE, target)
    torch.testing.assert_close(
        segmentation_loss(logits, torch.where(as_two == IGNORE, 2, as_two), ignore=2),
        segmentation_loss(logits, as_two),
    )


def test_gradients_equal_finite_differences():
    logits, target = batch(7, shape=(1, 2, 3))
    logits = logits.double().requires_grad_()
    target[0, 0, 0] = IGNORE

    def loss(x):
        return losses.soft_dice_loss(x, target) + losses.cross_entropy(x, target)

    assert torch.autograd.gradcheck(loss, logits)


def test_balanced_weights_are_inverse_roots_and_average_one():
    counts = [900, 100, 0]
    weights = balanced_weights(counts)
    assert weights[1] / weights[0] == pytest.approx(3)
    assert weights[2] == weights[1]
    assert (torch.tensor([0.9, 0.1, 0.0]) * weights).sum() == pytest.approx(1)


@pytest.mark.parametrize("counts", [[0, 0], [], [3, -1]])
def test_weights_of_nothing_are_refused(counts):
    with pytest.raises(InputError, match="check the labels and the region"):
        balanced_weights(counts)


def test_losses_and_targets_agree_on_what_ignored_means():
    assert losses.IGNORE == targets.IGNORE
