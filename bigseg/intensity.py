"""Random changes of the intensities of one image: blur, noise, contrast, brightness, gamma.

It knows one image (c, *s) and random numbers; no geometry, no targets.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bigseg.config import AugmentConfig

N_UNIFORM = 10
"""How many uniform numbers `change_intensity` uses."""


def change_intensity(
    image: Tensor,
    uniform: Sequence[float],
    *,
    steps: Sequence[float],
    config: AugmentConfig,
    generator: torch.Generator,
) -> Tensor:
    """Blur, noise, contrast, brightness and gamma, each with `probability`, on (c, *s)."""
    happens = [u < config.probability for u in uniform[:5]]
    amount = list(uniform[5:10])
    signed = [2 * u - 1 for u in amount]
    if config.blur_vox and happens[0]:
        image = _blur(image, [config.blur_vox * amount[0] / s for s in steps])
    if config.noise and happens[1]:
        noise = torch.randn(image.shape, generator=generator, device=generator.device)
        image = image + noise.to(image.device) * (config.noise * amount[1])
    axes = list(range(1, image.ndim))
    if config.contrast and happens[2]:
        mean = image.mean(axes, keepdim=True)
        image = (image - mean) * (1 + config.contrast * signed[2]) + mean
    if config.brightness and happens[3]:
        image = image + config.brightness * signed[3]
    if config.gamma and happens[4]:
        image = _gamma(image, (1 + config.gamma) ** signed[4])
    return image


def _gamma(image: Tensor, exponent: float) -> Tensor:
    """x^exponent on each channel's range mapped to [0, 1] and back; negatives are no problem."""
    axes = list(range(1, image.ndim))
    low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
    span = (high - low).clamp(min=1e-6)
    return ((image - low) / span).clamp_(0, 1).pow_(exponent) * span + low


def _blur(image: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian blur, axis by axis, edges repeated; an axis with sigma under 0.2 is left."""
    for axis, sigma in enumerate(sigmas, start=1):
        if sigma < 0.2 or image.shape[axis] == 1:
            continue
        radius = math.ceil(3 * sigma)
        weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
        total = weights[0] + 2 * sum(weights[1:])
        n = image.shape[axis]
        index = torch.arange(n, device=image.device)
        blurred = image * (weights[0] / total)
        for k in range(1, radius + 1):
            behind = image.index_select(axis, (index - k).clamp(min=0))
            ahead = image.index_select(axis, (index + k).clamp(max=n - 1))
            blurred += (behind + ahead) * (weights[k] / total)
        image = blurred
    return image
