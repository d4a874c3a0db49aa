"""Laws of the augmentation: one map for image and target, exact where nothing changes."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from bigseg.augment import PatchFrame, augment, input_shape
from bigseg.config import AugmentConfig
from bigseg.errors import UsageError

OFF = AugmentConfig(
    flip=False,
    rotate90=False,
    rotate_degrees=0,
    tilt_degrees=0,
    scale=0,
    elastic_vox=0,
    brightness=0,
    contrast=0,
    gamma=0,
    noise=0,
    blur_vox=0,
    probability=1,
)
DEFAULT = AugmentConfig(elastic_grid_vox=12, elastic_vox=1.5, probability=1)
GEOMETRY = DEFAULT.model_copy(
    update={"brightness": 0, "contrast": 0, "gamma": 0, "noise": 0, "blur_vox": 0}
)
FRAME_2D = PatchFrame((24, 28), (12, 16))
FRAME_3D = PatchFrame((12, 14, 16), (6, 8, 10))
THIN = PatchFrame((6, 16, 16), (4, 8, 8), voxel_size=(5.0, 1.0, 1.0))


def only(**changes) -> AugmentConfig:
    return OFF.model_copy(update=changes)


def generators(n: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


def batch(n, shape, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, *shape, generator=g), torch.randint(
        0, 5, (n, *shape), generator=g
    )


def run(image, target, frame, config, seed=0, ignore=-1):
    gens = generators(len(image), seed)
    return augment(image, target, frame=frame, config=config, generators=gens, ignore=ignore)


def centre(array, shape):
    first = array.ndim - len(shape)
    for axis, n in enumerate(shape, start=first):
        array = array.narrow(axis, (array.shape[axis] - n) // 2, n)
    return array


@pytest.mark.parametrize("shape", [(24, 28), (25, 31), (40, 28)])
def test_with_everything_off_the_result_is_the_centre_crop_bit_for_bit(shape):
    image, target = batch(2, shape, channels=2)
    x, t = run(image, target, FRAME_2D, OFF)
    torch.testing.assert_close(x, centre(image, (24, 28)), rtol=0, atol=0)
    torch.testing.assert_close(t, centre(centre(target, (24, 28)), (12, 16)), rtol=0, atol=0)


def test_an_image_that_is_too_small_is_mirrored_and_its_target_ignored():
    image, target = batch(1, (6, 8))
    x, t = run(image, target, FRAME_2D, OFF)
    padded = np.pad(image[0, 0], ((9, 9), (10, 10)), mode="reflect")
    np.testing.assert_array_equal(x[0, 0], padded)
    expected = np.pad(target[0], ((3, 3), (4, 4)), constant_values=-1)
    np.testing.assert_array_equal(t[0], expected)


def test_the_warped_path_agrees_with_the_exact_one_where_it_changes_nothing():
    image, target = batch(1, (30, 34))
    barely = only(scale=1e-9)
    x, t = run(image, target, FRAME_2D, barely)
    exact, exact_target = run(image, target, FRAME_2D, OFF)
    torch.testing.assert_close(x, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(t, exact_target, rtol=0, atol=0)
    small, small_target = batch(1, (6, 8))
    for ours, theirs in zip(
        run(small, small_target, FRAME_2D, barely),
        run(small, small_target, FRAME_2D, OFF),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("probability", "n_moved"), [(0, 0), (0.5, 100), (1, 200)])
def test_patches_are_moved_with_the_probability_and_else_only_turned(probability, n_moved):
    image, target = batch(200, (30, 34))
    moving = only(rotate_degrees=180, scale=0.2, elastic_vox=1.5, probability=probability)
    x, t = run(image, target, FRAME_2D, moving)
    exact, exact_target = run(image, target, FRAME_2D, OFF)
    is_moved = (x != exact).flatten(1).any(1)
    assert int(is_moved.sum()) == pytest.approx(n_moved, abs=25 if 0 < probability < 1 else 0)
    assert torch.equal(t[~is_moved], exact_target[~is_moved])


def symmetries(frame, config, n=400):
    """All arrangements that occur, as the set of the resulting arrays."""
    n_voxels = math.prod(frame.image_shape)
    image = torch.arange(n_voxels, dtype=torch.float32).reshape(1, 1, *frame.image_shape)
    target = torch.arange(n_voxels).reshape(1, *frame.image_shape)
    found = set()
    for seed in range(n):
        x, t = run(image, target, frame, config, seed=seed)
        np.testing.assert_array_equal(x[0, 0], t[0])
        found.add(t.numpy().tobytes())
    return found, target[0].numpy()


@pytest.mark.parametrize(
    ("size", "flip", "rotate90", "n_arrangements"),
    [
        ((1, 1), True, True, 8),
        ((1, 1), False, True, 4),
        ((1, 1), True, False, 4),
        ((2, 1), False, True, 1),
        ((1, 1, 1), True, True, 48),
        ((1, 1, 1), False, True, 24),
        ((1, 1, 1), True, False, 8),
        ((5, 1, 1), True, True, 16),
        ((5, 1, 1), False, True, 4),
    ],
)
def test_flips_and_right_angles_are_the_symmetries_of_the_voxels(
    size, flip, rotate90, n_arrangements
):
    shape = (3,) * len(size)
    frame = PatchFrame(shape, shape, voxel_size=size)
    found, original = symmetries(frame, only(flip=flip, rotate90=rotate90))
    assert len(found) == n_arrangements
    equal = [a for a in range(len(size)) if size[a] == min(size)]
    allowed = set()
    for order in itertools.permutations(equal) if rotate90 else [tuple(equal)]:
        axes = list(range(len(size)))
        for axis, source in zip(equal, order, strict=True):
            axes[axis] = source
        for k in range(len(size) + 1):
            for flipped in itertools.combinations(range(len(size)), k):
                mirrored = np.linalg.det(np.eye(len(size))[axes]) * (-1) ** k < 0
                moved_z = len(equal) < len(size) and 0 in flipped
                if flip or not (mirrored or moved_z):
                    allowed.add(np.flip(original.transpose(axes), flipped).tobytes())
    assert found <= allowed


@pytest.mark.parametrize("frame", [FRAME_2D, FRAME_3D, THIN])
def test_image_and_target_go_through_one_map(frame):
    """A ramp of intensities shows where each voxel came from, the target shows the same."""
    shape = input_shape(frame, GEOMETRY)
    for axis in range(len(shape)):
        places = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))])
        places = places.expand(shape)
        x, t = run(places.float()[None, None], places[None], frame, GEOMETRY, seed=axis)
        difference = centre(x[:, 0], frame.target_shape) - t
        assert t.min() >= 0
        assert difference.abs().max() <= 0.5 + 1e-3
        assert t.unique().numel() > 3


@pytest.mark.parametrize("frame", [FRAME_2D, FRAME_3D, THIN, PatchFrame((9, 30), (9, 30))])
@pytest.mark.parametrize(
    "config",
    [
        GEOMETRY,
        only(elastic_vox=4.0, elastic_grid_vox=4.0),
        only(rotate_degrees=180, scale=0.5),
        only(tilt_degrees=60, rotate90=True),
    ],
)
def test_what_input_shape_reads_is_enough_for_every_target_voxel(frame, config):
    shape = input_shape(frame, config)
    assert all(i >= n and (i - n) % 2 == 0 for i, n in zip(shape, frame.image_shape, strict=True))
    alone = PatchFrame(frame.target_shape, frame.target_shape, frame.voxel_size)
    shape = input_shape(alone, config)
    for seed in range(8):
        _, t = run(*batch(4, shape), alone, config, seed=seed)
        assert (t >= 0).all()


def test_input_shape_adds_nothing_when_nothing_moves():
    assert input_shape(FRAME_3D, OFF) == FRAME_3D.image_shape
    assert input_shape(FRAME_2D, only(flip=True, rotate90=True)) == (28, 28)
    assert input_shape(PatchFrame((21, 21), (21, 21)), only(scale=0.5)) == (31, 31)
    assert input_shape(PatchFrame((40, 40), (8, 8)), only(rotate_degrees=180)) == (40, 40)
    assert input_shape(PatchFrame((101, 101), (101, 101)), only(rotate_degrees=180)) == (143, 143)


def test_rotation_preserves_distances_in_real_space():
    """Three coordinate ramps give the map itself; its steps have the length of a voxel."""
    frame = PatchFrame((6, 10, 10), (6, 10, 10), voxel_size=(3.0, 1.0, 1.0))
    config = only(rotate_degrees=180, tilt_degrees=30)
    shape = (40, 40, 40)
    ramps = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")).float()
    size = torch.tensor(frame.voxel_size)
    x, _ = run(ramps[None], torch.zeros(1, *shape, dtype=torch.int64), frame, config)
    place = x[0] * size.view(3, 1, 1, 1)
    for axis in range(3):
        step = place.diff(dim=axis + 1).square().sum(0).sqrt()
        torch.testing.assert_close(step, torch.full_like(step, size[axis]), atol=1e-3, rtol=0)
    tilted = torch.atan2(place[0].diff(dim=2).abs().max(), torch.tensor(1.0))
    assert tilted <= math.radians(30 / 3) + 1e-3


def test_the_interpolation_equals_scipys():
    """A rotation about the centre, mirrored outside, against ndimage.affine_transform."""
    frame = PatchFrame((15, 15), (15, 15))
    config = only(rotate_degrees=180)
    ramps = torch.stack(torch.meshgrid(torch.arange(99), torch.arange(99), indexing="ij")).float()
    zeros = torch.zeros(1, 99, 99, dtype=torch.int64)
    place, _ = run(ramps[None], zeros, frame, config)
    image, target = batch(1, (15, 15))
    x, t = run(image, target, frame, config)
    coordinates = place[0].double().numpy() - (99 - 15) / 2
    expected = ndimage.map_coordinates(
        image[0, 0].double().numpy(), coordinates, order=1, mode="mirror"
    )
    np.testing.assert_allclose(x[0, 0], expected, atol=1e-4)
    rounded = np.round(coordinates)
    outside = ((rounded < 0) | (rounded > 14)).any(axis=0)
    np.testing.assert_array_equal(t[0] == -1, outside)
    assert 0.05 < outside.mean() < 0.3


def test_elastic_displacements_are_smooth_bounded_and_of_the_size_asked_for():
    frame = PatchFrame((64, 64), (64, 64))
    config = only(elastic_vox=4.0, elastic_grid_vox=16.0)
    ramps = torch.stack(torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")).float()
    zeros = torch.zeros(20, 96, 96, dtype=torch.int64)
    x, _ = run(ramps.expand(20, 2, 96, 96), zeros, frame, config)
    shift = x - centre(ramps, (64, 64))
    assert shift.abs().max() <= 12 + 1e-3
    assert shift[:, :, ::16, ::16].std() == pytest.approx(4, rel=0.15)
    assert shift.mean().abs() < 0.6
    curvature = shift.diff(n=2, dim=2).abs().flatten()
    assert torch.quantile(curvature[::10], 0.999) < 0.35


def test_anisotropic_voxels_are_displaced_by_the_same_real_length():
    frame = PatchFrame((8, 32, 32), (8, 32, 32), voxel_size=(4.0, 1.0, 1.0))
    config = only(elastic_vox=3.0, elastic_grid_vox=8.0)
    ramps = torch.stack(
        torch.meshgrid(*(torch.arange(n) for n in (20, 52, 52)), indexing="ij")
    ).float()
    zeros = torch.zeros(6, 20, 52, 52, dtype=torch.int64)
    x, _ = run(ramps.expand(6, 3, 20, 52, 52), zeros, frame, config)
    deviations = (x - centre(ramps, (8, 32, 32)))[:, :, ::2, ::8, ::8].std(dim=(0, 2, 3, 4))
    assert (deviations * torch.tensor([4.0, 1.0, 1.0])).numpy() == pytest.approx([3, 3, 3], rel=0.2)


def test_a_sample_depends_on_its_generator_only():
    image, target = batch(3, (40, 44))
    x, t = run(image, target, FRAME_2D, DEFAULT)
    for i in reversed(range(3)):
        alone = augment(
            image[i : i + 1],
            target[i : i + 1],
            frame=FRAME_2D,
            config=DEFAULT,
            generators=[generators(3)[i]],
        )
        torch.testing.assert_close(alone[0][0], x[i], rtol=0, atol=0)
        torch.testing.assert_close(alone[1][0], t[i], rtol=0, atol=0)
    other, _ = run(image, target, FRAME_2D, DEFAULT, seed=1)
    assert not torch.equal(other, x)


def test_the_input_is_left_as_it_was():
    image, target = batch(2, (40, 44))
    before = image.clone(), target.clone()
    for config in (OFF, DEFAULT, only(noise=1, gamma=0.5)):
        run(image, target, FRAME_2D, config)
        assert torch.equal(image, before[0])
        assert torch.equal(target, before[1])


def test_switching_off_intensities_leaves_the_geometry():
    image, target = batch(2, (40, 44))
    _, t = run(image, target, FRAME_2D, DEFAULT)
    _, alone = run(image, target, FRAME_2D, GEOMETRY)
    assert torch.equal(t, alone)


def test_the_target_may_be_read_smaller_than_the_image():
    image, target = batch(2, (40, 44))
    x, t = run(image, target, FRAME_2D, GEOMETRY)
    cut = centre(target, (30, 34))
    x_cut, t_cut = run(image, cut, FRAME_2D, GEOMETRY)
    assert torch.equal(x, x_cut)
    assert torch.equal(t_cut[t_cut >= 0], t[t_cut >= 0])
    assert (t_cut >= 0).float().mean() > 0.8


def test_targets_keep_their_type_and_large_numbers():
    target = torch.full((1, 40, 44), 2**53 + 1)
    _, t = run(torch.zeros(1, 1, 40, 44), target, FRAME_2D, GEOMETRY)
    assert t.unique().tolist() == [2**53 + 1]
    _, t = run(torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4, dtype=torch.int16), FRAME_2D, GEOMETRY)
    assert t.dtype == torch.int16
    assert t.unique().tolist() == [-1, 1]


def test_axes_of_one_voxel_are_repeated():
    image, target = batch(1, (1, 30, 30))
    x, _ = run(image, target, PatchFrame((3, 8, 8), (1, 8, 8)), only(rotate_degrees=180))
    assert torch.isfinite(x).all()
    torch.testing.assert_close(x[:, :, 0], x[:, :, 2])


# What is refused.


def test_a_halo_that_differs_between_the_sides_is_refused():
    with pytest.raises(UsageError, match="larger by an even number of voxels; add the same halo"):
        PatchFrame((9, 10), (6, 6))
    with pytest.raises(UsageError, match=r"image_shape \(4, 4\) and target_shape \(6, 6\)"):
        PatchFrame((4, 4), (6, 6))


@pytest.mark.parametrize(
    ("image", "target", "n", "text"),
    [
        ((2, 1, 30, 30), (2, 30, 30), 1, "one target and one generator"),
        ((2, 30, 30), (2, 30, 30), 2, r"needs an image \(n, c, \*s\)"),
        ((2, 1, 30, 30), (2, 29, 30), 2, "differ by even numbers"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(image, target, n, text):
    with pytest.raises(UsageError, match=text):
        augment(
            torch.zeros(image),
            torch.zeros(target, dtype=torch.int64),
            frame=FRAME_2D,
            config=OFF,
            generators=generators(n),
        )
