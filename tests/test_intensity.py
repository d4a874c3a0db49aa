"""Laws of the intensity changes, with probability 1 and one change at a time."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bigseg.config import AugmentConfig
from bigseg.intensity import N_UNIFORM, change_intensity

OFF = {"brightness": 0, "contrast": 0, "gamma": 0, "noise": 0, "blur_vox": 0, "probability": 1}


def images(n, shape, channels=1):
    return torch.rand(n, channels, *shape, generator=torch.Generator().manual_seed(0))


def intensity(batch, *, seed=0, steps=None, **changes):
    """Each image of `batch` changed by a generator of its own."""
    config = AugmentConfig.model_validate({**OFF, **changes})
    changed = []
    for i, image in enumerate(batch):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        uniform = torch.rand(N_UNIFORM, generator=generator).tolist()
        changed.append(
            change_intensity(
                image,
                uniform,
                steps=steps or (1.0,) * (image.ndim - 1),
                config=config,
                generator=generator,
            )
        )
    return torch.stack(changed)


def test_brightness_adds_a_constant_within_its_range():
    image = images(8, (16, 16))
    shift = intensity(image, brightness=0.3) - image
    torch.testing.assert_close(shift.amin((1, 2, 3)), shift.amax((1, 2, 3)), atol=1e-6, rtol=0)
    assert shift.abs().max() <= 0.3 + 1e-6
    assert shift.std() > 0.05


def test_contrast_scales_about_the_mean_of_each_channel():
    image = images(8, (16, 16), channels=2)
    changed = intensity(image, contrast=0.5)
    torch.testing.assert_close(changed.mean((2, 3)), image.mean((2, 3)))
    ratio = changed.std((2, 3)) / image.std((2, 3))
    assert ((ratio >= 0.5 - 1e-4) & (ratio <= 1.5 + 1e-4)).all()
    assert ratio.std() > 0.1


@pytest.mark.parametrize("offset", [0.0, -0.5, -20.0])
def test_gamma_keeps_order_and_range_also_of_negative_values(offset):
    image = images(4, (16, 16))
    image = image + offset
    changed = intensity(image, gamma=0.9)
    assert torch.isfinite(changed).all()
    torch.testing.assert_close(changed.amax((1, 2, 3)), image.amax((1, 2, 3)))
    torch.testing.assert_close(changed.amin((1, 2, 3)), image.amin((1, 2, 3)))
    order = image.flatten(1).argsort()
    assert (changed.flatten(1).gather(1, order).diff() >= 0).all()
    assert not torch.allclose(changed, image)


def test_gamma_leaves_a_constant_image():
    image = torch.full((1, 1, 8, 8), 0.25)
    assert torch.equal(intensity(image, gamma=0.9), image)


def test_noise_is_gaussian_up_to_its_deviation():
    deviations = intensity(torch.zeros(20, 1, 32, 32), noise=0.1).std((1, 2, 3))
    assert deviations.max() < 0.11
    assert deviations.mean() == pytest.approx(0.05, rel=0.4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_blur_equals_scipys_gaussian(seed):
    step = torch.zeros(1, 1, 41, 41)
    step[0, 0, 20, 20] = 1.0
    profile = intensity(step, seed=seed, blur_vox=2.0)[0, 0].sum(0).double().numpy()
    # Two weights of a gaussian give its sigma: w1 / w0 = exp(-1 / (2 sigma^2)).
    sigma = math.sqrt(-0.5 / math.log(profile[21] / profile[20]))
    assert 0.2 < sigma < 2
    image = images(1, (21, 21))
    expected = ndimage.gaussian_filter(
        image[0, 0].double().numpy(), sigma, mode="nearest", radius=math.ceil(3 * sigma)
    )
    found = intensity(image, seed=seed, blur_vox=2.0)[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blur_keeps_constants_and_skips_far_planes():
    constant = torch.ones(1, 1, 4, 12, 12)
    torch.testing.assert_close(intensity(constant, blur_vox=2.0), constant)
    image = images(1, (6, 16, 16))
    image[:, :, :3] = 0
    x = intensity(image, steps=(5.0, 1.0, 1.0), seed=1, blur_vox=0.9)
    assert (x[:, :, :3] == 0).all()
    assert not torch.equal(x, image)


def test_probability_decides_how_often():
    image = images(200, (4, 4))
    x = intensity(image, brightness=0.3, probability=0.25)
    assert (x != image).any((1, 2, 3)).float().mean() == pytest.approx(0.25, abs=0.1)
    assert torch.equal(intensity(image, noise=1.0, contrast=0.5, probability=0.0), image)


def test_the_image_given_is_left_as_it_was():
    image = images(2, (12, 12))
    before = image.clone()
    intensity(image, blur_vox=1.0, noise=1.0, contrast=0.5, brightness=1.0, gamma=0.5)
    assert torch.equal(image, before)
