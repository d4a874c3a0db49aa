"""What training minimises: cross-entropy and soft Dice, both with an ignore label.

It knows logits and class numbers, neither networks nor annotations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from bigseg.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IGNORE = -1
"""The class number of voxels that say nothing; the same value as in targets.py."""


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore: int = IGNORE,
    dice: float = 1.0,
    class_weights: Tensor | None = None,
    extra_weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy plus `dice` times the soft Dice loss, over the voxels not ignored.

    Args:
        logits: (n, k, *s), any float type; the loss is computed in float32.
        target: (n, *s) int64, values 0..k-1 or `ignore`.
        ignore: the target value of voxels that count nowhere.
        dice: weight of the Dice term; 0 leaves it out.
        class_weights: (k,), weights of the cross-entropy; Dice weighs classes by itself.
        extra_weights: (n, *s) at least 0, added to the weight of each voxel in the cross-entropy.

    Returns:
        A float32 scalar. Where every voxel is ignored it is 0 and so is its gradient.
    """
    logits = logits.float()
    loss = cross_entropy(
        logits, target, ignore=ignore, class_weights=class_weights, extra_weights=extra_weights
    )
    return loss + dice * soft_dice_loss(logits, target, ignore=ignore) if dice else loss


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore: int = IGNORE,
    class_weights: Tensor | None = None,
    extra_weights: Tensor | None = None,
) -> Tensor:
    """Weighted mean cross-entropy of the voxels not ignored; 0 where there are none.

    A voxel weighs 1, or the weight of its class, plus its extra weight. The mean divides by the
    sum of the weights of the voxels, as in torch.
    """
    counted = target != ignore
    if class_weights is not None:
        class_weights = class_weights.to(logits)
    if extra_weights is not None:
        loss = functional.cross_entropy(logits, target, ignore_index=ignore, reduction="none")
        base = 1.0 if class_weights is None else class_weights[target.clamp(min=0) * counted]
        weights = (base + extra_weights.to(logits)) * counted
        total, weight = (weights * loss).sum(), weights.sum()
    else:
        total = functional.cross_entropy(
            logits, target, weight=class_weights, ignore_index=ignore, reduction="sum"
        )
        if class_weights is None:
            weight = counted.sum().to(logits)
        else:
            weight = (class_weights[target.clamp(min=0)] * counted).sum()
    return total / torch.where(weight > 0, weight, 1.0)


def soft_dice_loss(logits: Tensor, target: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """1 minus the soft Dice score, averaged over the classes present in the target.

    The sums run over all voxels of the batch (batch Dice), so that a class that is absent from
    one sample does not make its score jump between 0 and 1. Dice = 2 Σ p·t / (Σ p + Σ t), with p
    the softmax and t the target as 0 or 1 (Milletari et al. 2016, without the squares).
    """
    n_classes = logits.shape[1]
    counted = (target != ignore).unsqueeze(1)
    classes = torch.arange(n_classes, device=target.device).view(1, -1, *[1] * (target.ndim - 1))
    member = (target.unsqueeze(1) == classes) & counted
    probability = logits.softmax(dim=1)
    axes = [0, *range(2, logits.ndim)]
    overlap = torch.where(member, probability, 0.0).sum(axes)
    predicted = torch.where(counted, probability, 0.0).sum(axes)
    actual = member.sum(axes)
    present = actual > 0
    # An absent class has no actual voxels: its denominator is replaced, since it does not count.
    missing = 1.0 - 2.0 * overlap / torch.where(present, predicted + actual, 1.0)
    return torch.where(present, missing, 0.0).sum() / present.sum().clamp(min=1)


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """(k,) float32: each class weighs the inverse square root of its share of the voxels.

    They are scaled so that the average voxel weighs 1. A class without voxels weighs as much as
    the rarest class that has some.

    Raises:
        InputError: no class has a voxel, or a count is negative.
    """
    total = sum(counts)
    if total <= 0 or min(counts) < 0:
        raise InputError(
            f"the voxel counts of the classes are {list(counts)}, but weights need counts of at "
            "least 0 that are not all 0: check the labels and the region"
        )
    rarest = min(count for count in counts if count)
    shares = [max(count, rarest) / total for count in counts]
    mean = sum(count / total / math.sqrt(s) for count, s in zip(counts, shares, strict=True))
    return torch.tensor([1.0 / math.sqrt(s) / mean for s in shares], dtype=torch.float32)
