"""Random changes to training patches, as pure functions on batches, on whichever device they are.

It knows tensors and neither volumes nor networks. One map carries image and target together:

    input   |<----------------- input_shape ------------------>|
    image         |<----------- image_shape ----------->|
    target                 |<-- target_shape -->|

All three share their centre. A voxel o of the result (counted from the centre) shows the input at
A o + d(o): A rotates and scales, d is the elastic deformation; some patches are not moved. The
image is interpolated linearly and mirrored where the map leaves the input; the target takes the
nearest voxel and is ignored there. Flips and right-angle rotations come before, and are exact.

Sample i of a batch depends on nothing but its own generator. Generators on the CPU are best: then
the numbers drawn are the same whatever the device of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bigseg.errors import UsageError
from bigseg.intensity import change_intensity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.config import AugmentConfig

N_UNIFORM = 32
ELASTIC_LIMIT = 3.0  # displacements end at this many standard deviations


@dataclass(frozen=True, slots=True)
class PatchFrame:
    """The shapes of a training patch, over its spatial axes (z,) y, x.

    `image_shape` is what the network reads, `target_shape` what it computes; they differ by an
    even number on each axis. `voxel_size` in any unit; None: the same along all axes.
    """

    image_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    voxel_size: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        pairs = list(zip(self.image_shape, self.target_shape, strict=True))
        if any(i < t or (i - t) % 2 for i, t in pairs):
            raise UsageError(
                f"image_shape {self.image_shape} and target_shape {self.target_shape}: the image "
                "must be larger by an even number of voxels; add the same halo on both sides"
            )

    @property
    def steps(self) -> tuple[float, ...]:
        """Length of a voxel along each axis, in units of the shortest."""
        size = self.voxel_size or (1.0,) * len(self.image_shape)
        return tuple(s / min(size) for s in size)


def input_shape(frame: PatchFrame, config: AugmentConfig) -> tuple[int, ...]:
    """The shape to read for one patch, at least `image_shape` and of the same parity.

    It is so large that no voxel of the target comes from outside: target_shape under every
    rotation, tilt, scaling and elastic displacement lies inside. Of the image, what scaling and
    displacement need is inside; its outer corners, which a rotation can turn out of the input,
    are mirrored: reading the full diagonal would cost twice as much for context of little weight.
    """
    grown = [(n - 1) * (1 + config.scale) for n in frame.image_shape]
    turned = _rotated_extent(frame, config)
    needed = []
    for axis, step in enumerate(frame.steps):
        margin = 2 * ELASTIC_LIMIT * config.elastic_vox / step
        needed.append(max(grown[axis], turned[axis] * (1 + config.scale)) + margin)
    for group in _axis_groups(frame.steps) if config.rotate90 else []:
        for axis in group:
            needed[axis] = max(needed[a] for a in group)
    lengths = [
        max(n, math.ceil(e - 1e-6) + 1) for n, e in zip(frame.image_shape, needed, strict=True)
    ]
    return tuple(m + (m - n) % 2 for m, n in zip(lengths, frame.image_shape, strict=True))


def augment(
    image: Tensor,
    target: Tensor,
    *,
    frame: PatchFrame,
    config: AugmentConfig,
    generators: Sequence[torch.Generator],
    ignore: int = -1,
) -> tuple[Tensor, Tensor]:
    """The batch, randomly changed, cut to the shapes of `frame`.

    Args:
        image: (n, c, *s) float32, of any spatial shape, best `input_shape`. Intensities as the
            network gets them, of order 1.
        target: (n, *s') integers; s' may differ from s by even numbers, around the same centre.
        frame: shapes of the result and size of the voxels.
        config: ranges of the changes. With all of them off this is a centre crop, bit for bit.
        generators: one for each sample, each used for that sample only.
        ignore: target value of voxels that come from outside the input.

    Returns:
        Image (n, c, *image_shape) float32 and target (n, *target_shape), same types and device.
    """
    _check_batch(image, target, frame, len(generators))
    pairs = [
        _augment_one(x, t, frame=frame, config=config, generator=g, ignore=ignore)
        for x, t, g in zip(image, target, generators, strict=True)
    ]
    return torch.stack([x for x, _ in pairs]), torch.stack([t for _, t in pairs])


def _check_batch(image: Tensor, target: Tensor, frame: PatchFrame, n_generators: int) -> None:
    shapes = f"image {tuple(image.shape)}, target {tuple(target.shape)}, {n_generators} generators"
    n_axes = len(frame.image_shape)
    if image.ndim != n_axes + 2 or target.ndim != n_axes + 1:
        raise UsageError(
            f"{shapes}: a patch of {n_axes} axes needs an image (n, c, *s) and a target (n, *s)"
        )
    if not len(image) == len(target) == n_generators:
        raise UsageError(f"{shapes}: each sample needs one image, one target and one generator")
    if any((a - b) % 2 for a, b in zip(image.shape[2:], target.shape[1:], strict=True)):
        raise UsageError(
            f"{shapes}: image and target have the same centre, so their shapes must differ by even "
            "numbers; read both with input_shape()"
        )


def _augment_one(
    image: Tensor,
    target: Tensor,
    *,
    frame: PatchFrame,
    config: AugmentConfig,
    generator: torch.Generator,
    ignore: int,
) -> tuple[Tensor, Tensor]:
    # All uniform numbers are drawn at once, so that switching one change off leaves the others.
    uniform = torch.rand(N_UNIFORM, generator=generator, device=generator.device).tolist()
    permutation, flipped = _draw_symmetry(uniform[:9], frame.steps, config)
    image = image.permute(0, *(1 + a for a in permutation)).flip([1 + a for a in flipped])
    target = target.permute(permutation).flip(flipped)
    matrix = _draw_matrix(uniform[9:13], frame.steps, config)
    # Interpolation blurs, and images that are segmented are sharp: the network sees both.
    is_moved = uniform[-1] < config.probability and (matrix is not None or config.elastic_vox > 0)
    if not is_moved:
        image, target = _centre_crop(image, frame.image_shape), _crop_target(target, frame, ignore)
    else:
        coordinates = _map(image, frame=frame, matrix=matrix, config=config, generator=generator)
        target = _sample_nearest(target, coordinates, image=image, frame=frame, ignore=ignore)
        image = _sample_linear(image, coordinates)
    image = change_intensity(
        image, uniform[13:], steps=frame.steps, config=config, generator=generator
    )
    return image, target


# Flips and right-angle rotations.


def _axis_groups(steps: Sequence[float]) -> list[list[int]]:
    """The sets of axes along which voxels have the same size, within 1 %."""
    groups: list[list[int]] = []
    for axis in reversed(range(len(steps))):
        same = (g for g in groups if abs(steps[g[0]] / steps[axis] - 1) < 0.01)
        if (group := next(same, None)) is not None:
            group.insert(0, axis)
        else:
            groups.append([axis])
    return groups


def _draw_symmetry(
    uniform: Sequence[float], steps: Sequence[float], config: AugmentConfig
) -> tuple[list[int], list[int]]:
    """An order of the axes and the axes to flip: a symmetry of the lattice of voxels.

    `flip` mirrors each axis or not. `rotate90` turns by right angles within the axes of equal
    voxel size: 4 ways in a plane, 24 in an isotropic volume. Uses 9 of the uniform numbers.
    """
    permutation, negative = list(range(len(steps))), [False] * len(steps)
    for group in _axis_groups(steps) if config.rotate90 else []:
        order = sorted(group, key=lambda axis: uniform[axis])
        for axis, source in zip(group, order, strict=True):
            permutation[axis] = source
        for axis in group[:-1]:
            negative[axis] = uniform[3 + axis] < 0.5
        # The last sign makes it a rotation: its determinant is 1.
        odd = _is_odd(order) ^ (sum(negative[axis] for axis in group[:-1]) % 2 == 1)
        negative[group[-1]] = odd
    if config.flip:
        negative = [n ^ (u < 0.5) for n, u in zip(negative, uniform[6:], strict=False)]
    return permutation, [axis for axis, n in enumerate(negative) if n]


def _is_odd(order: Sequence[int]) -> bool:
    pairs = ((i, j) for j in range(len(order)) for i in range(j))
    return sum(order[i] > order[j] for i, j in pairs) % 2 == 1


# The continuous map.


def _draw_matrix(
    uniform: Sequence[float], steps: Sequence[float], config: AugmentConfig
) -> list[list[float]] | None:
    """Rotation and scaling as a matrix on voxel coordinates; None for the identity.

    Rotation is in the y-x plane, uniform up to `rotate_degrees`. In 3-D it is followed by tilts
    about the y and the x axis, uniform up to `tilt_degrees` divided by the anisotropy: planes far
    apart say little about what lies between. Angles are those of the real, not the voxel, space.
    """
    signed = [2 * u - 1 for u in uniform]
    factor = (1 + config.scale) ** signed[0]
    turn = math.radians(config.rotate_degrees) * signed[1]
    tilts = [_tilt_limit(steps, config) * s for s in signed[2:4]]
    if not (config.scale or config.rotate_degrees or any(tilts)):
        return None
    n_axes = len(steps)
    rotation = _plane_rotation(n_axes, n_axes - 2, n_axes - 1, turn)
    if n_axes == 3:
        rotation = (
            rotation @ _plane_rotation(3, 0, 1, tilts[0]) @ _plane_rotation(3, 0, 2, tilts[1])
        )
    size = torch.tensor(steps, dtype=torch.float64)
    matrix: list[list[float]] = (factor * rotation * size[None, :] / size[:, None]).tolist()
    return matrix


def _tilt_limit(steps: Sequence[float], config: AugmentConfig) -> float:
    return math.radians(config.tilt_degrees) / steps[0] if len(steps) == 3 else 0.0


def _plane_rotation(n_axes: int, a: int, b: int, angle: float) -> Tensor:
    matrix = torch.eye(n_axes, dtype=torch.float64)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = math.sin(angle), -math.sin(angle)
    return matrix


def _rotated_extent(frame: PatchFrame, config: AugmentConfig) -> list[float]:
    """Extent of target_shape under all rotations and tilts, in voxels: an upper bound."""
    real = [(n - 1) * s for n, s in zip(frame.target_shape, frame.steps, strict=True)]
    limit = math.radians(config.rotate_degrees)
    y, x = real[-2:]
    tilt = min(_tilt_limit(frame.steps, config), math.pi / 2)
    if len(real) == 3:  # each tilt adds a part of the other axis of its plane
        z = real[0]
        z, x = z + math.sin(tilt) * x, x + math.sin(tilt) * z
        z, y = z + math.sin(tilt) * y, y + math.sin(tilt) * z
        real[0] = z
    real[-2:] = [_widest(y, x, limit), _widest(x, y, limit)]
    return [e / s for e, s in zip(real, frame.steps, strict=True)]


def _widest(along: float, across: float, limit: float) -> float:
    """The largest along·cos(angle) + across·sin(angle) for angles from 0 to `limit`."""
    angle = min(limit, math.atan2(across, along))
    return along * math.cos(angle) + across * math.sin(angle)


def _map(
    image: Tensor,
    *,
    frame: PatchFrame,
    matrix: list[list[float]] | None,
    config: AugmentConfig,
    generator: torch.Generator,
) -> list[Tensor]:
    """For each axis, where in `image` (c, *s) each voxel of image_shape lies, in voxels."""
    shape, n_axes = frame.image_shape, len(frame.image_shape)
    rows = matrix or torch.eye(n_axes).tolist()
    lines = [torch.arange(n, device=image.device).float().sub_((n - 1) / 2) for n in shape]
    shift = _draw_elastic(frame, config, generator, image.device)
    coordinates = []
    for axis in range(n_axes):
        place = _centre(image.shape[1 + axis], shape[axis]) + shift[axis]
        for other, (line, factor) in enumerate(zip(lines, rows[axis], strict=True)):
            if factor:
                place = place + _along(factor * line, other, n_axes)
        coordinates.append(place.expand(shape))
    return coordinates


def _along(line: Tensor, axis: int, n_axes: int) -> Tensor:
    """The 1-D `line` as an array of `n_axes` axes that varies along `axis` only."""
    return line.view([-1 if a == axis else 1 for a in range(n_axes)])


def _centre(n_input: int, n_result: int) -> float:
    """Centre of the crop of `n_result` voxels that starts at the integer (input - result) // 2."""
    return (n_input - n_result) // 2 + (n_result - 1) / 2


def _draw_elastic(
    frame: PatchFrame, config: AugmentConfig, generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Smooth random displacements for each axis, in voxels, over image_shape.

    As in the U-Net paper: gaussian vectors on a coarse grid, interpolated by cubic splines
    (Catmull-Rom, separable, so 2-D is bicubic and 3-D tricubic). Lengths count voxels of the
    finest axis, so that the deformation is isotropic in real space.
    """
    if not config.elastic_vox:
        return [torch.zeros((), device=device)] * len(frame.image_shape)
    splines = [
        _spline_matrix(n, config.elastic_grid_vox / step).to(device)
        for n, step in zip(frame.image_shape, frame.steps, strict=True)
    ]
    nodes = torch.randn(
        (len(splines), *(s.shape[1] for s in splines)), generator=generator, device=generator.device
    ).to(device)
    for axis, spline in enumerate(splines):
        nodes = torch.movedim(torch.tensordot(spline, nodes, dims=([1], [1 + axis])), 0, 1 + axis)
    nodes.clamp_(-ELASTIC_LIMIT, ELASTIC_LIMIT)
    return [field * (config.elastic_vox / s) for field, s in zip(nodes, frame.steps, strict=True)]


def _spline_matrix(n: int, spacing: float) -> Tensor:
    """(n, nodes): weights of the nodes `spacing` apart in n voxels (cubic, Keys 1981, a = -1/2)."""
    place = torch.arange(n, dtype=torch.float64) / spacing
    n_nodes = math.floor((n - 1) / spacing) + 4  # one before, two behind
    distance = (place[:, None] + 1 - torch.arange(n_nodes, dtype=torch.float64)).abs()
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    return weights.float()


# Sampling.


def _sample_linear(image: Tensor, coordinates: Sequence[Tensor]) -> Tensor:
    """`image` (c, *s) at the coordinates, interpolated linearly, mirrored outside."""
    scaled = [
        2 * place / max(n - 1, 1) - 1 for place, n in zip(coordinates, image.shape[1:], strict=True)
    ]
    grid = torch.stack(scaled[::-1], dim=-1).unsqueeze(0)
    # align_corners with reflection mirrors at the centre of the outermost voxel: 2 1 0 1 2.
    return functional.grid_sample(
        image.unsqueeze(0), grid, mode="bilinear", padding_mode="reflection", align_corners=True
    )[0]


def _sample_nearest(
    target: Tensor,
    coordinates: Sequence[Tensor],
    *,
    image: Tensor,
    frame: PatchFrame,
    ignore: int,
) -> Tensor:
    """`target` at the centre of the coordinates, which count voxels of `image`."""
    core = tuple(
        slice((i - t) // 2, (i - t) // 2 + t)
        for i, t in zip(frame.image_shape, frame.target_shape, strict=True)
    )
    flat: Tensor | int = 0
    inside: Tensor | None = None
    for axis, length in enumerate(target.shape):
        offset = (image.shape[1 + axis] - length) // 2
        index = coordinates[axis][core].round().to(torch.int64) - offset
        here = (index >= 0) & (index < length)
        inside = here if inside is None else inside & here
        flat = flat * length + index.clamp(0, length - 1)
    assert inside is not None
    assert isinstance(flat, Tensor)
    return torch.where(inside, target.reshape(-1)[flat], ignore)


def _centre_crop(array: Tensor, shape: Sequence[int]) -> Tensor:
    """The last axes of `array` cut to `shape` around their centre, mirrored where too short."""
    first = array.ndim - len(shape)
    for axis, n in enumerate(shape, start=first):
        length = array.shape[axis]
        start = (length - n) // 2
        if start >= 0 and length >= n:
            array = array.narrow(axis, start, n)
            continue
        period = max(1, 2 * (length - 1))
        folded = torch.arange(start, start + n, device=array.device) % period
        array = array.index_select(axis, torch.minimum(folded, period - folded))
    return array


def _crop_target(target: Tensor, frame: PatchFrame, ignore: int) -> Tensor:
    inside = torch.ones((), dtype=torch.bool, device=target.device)
    for axis, (length, n) in enumerate(zip(target.shape, frame.target_shape, strict=True)):
        index = torch.arange(n, device=target.device) + (length - n) // 2
        here = (index >= 0) & (index < length)
        inside = inside & _along(here, axis, target.ndim)
    return torch.where(inside, _centre_crop(target, frame.target_shape), ignore)
