"""How close a voxel lies to two objects: the weight map of the U-Net paper, and how it travels.

Equation 2 of Ronneberger et al. 2015 makes the network learn the gaps between objects:

    w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))² / (2 σ²))

d1 and d2 are the distances from x to the nearest and to the second nearest object, 0 inside it.
The exponential is the closeness, in percent for a row of two objects, A and B, with σ of 2 voxels:

    labels       ·   ·   ·   A   A   A   ·   B   B   B   ·   ·   ·
    closeness    0   0   1  14  32  61  61  61  32  14   1   0   0

It is kept in whole numbers of 1 / `LEVELS`, so that it can travel with the class of its voxel in
one integer, through changes that move voxels. It knows label arrays and no volumes; 2-D models get
their planes one by one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from bigseg.targets import IGNORE, INSIDE, relative_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

LEVELS = 1024
"""The closeness of a voxel that would belong to two objects."""

CLASS_BITS = 2
"""Bits for the class beside the closeness: background, inside, border."""


def closeness(
    labels: NDArray[Any],
    *,
    sigma_vox: float,
    voxel_size: Sequence[float] | None = None,
    ignore: int | None = None,
) -> NDArray[np.int16]:
    """exp(-(d1 + d2)² / (2 σ²)) of each voxel, in `LEVELS`ths, rounded.

    Args:
        labels: numbered objects, 0 is background; any number of spatial axes.
        sigma_vox: σ in voxels of the finest axis.
        voxel_size: length of a voxel along each axis in any unit; None: all the same.
        ignore: the label of voxels that were not annotated, which are no object.

    Returns:
        int16, same shape. It is exact for all voxels that are at least `closeness_margin_vox` away
        from where the labels were cut.
    """
    steps = relative_size(voxel_size or [1.0] * labels.ndim)
    margin = closeness_margin_vox(sigma_vox, steps)
    numbers = _numbered(labels, ignore)
    first, second = np.full((2, *labels.shape), np.inf)
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        near = _grown(box, margin, labels.shape)
        distance = ndimage.distance_transform_edt(numbers[near] != number, sampling=steps)
        # Of the two before and the new one, the two smallest.
        np.minimum(second[near], np.maximum(first[near], distance), out=second[near])
        np.minimum(first[near], distance, out=first[near])
    found = np.exp(-((first + second) ** 2) / (2 * sigma_vox**2))
    rounded: NDArray[np.int16] = np.rint(LEVELS * found).astype(np.int16)
    return rounded


def closeness_margin_vox(sigma_vox: float, voxel_size: Sequence[float]) -> tuple[int, ...]:
    """How many voxels around a patch decide about its closeness, for each axis.

    Objects that are farther away round to 0.
    """
    reach = sigma_vox * math.sqrt(2 * math.log(2 * LEVELS))
    return tuple(math.floor(reach / step) for step in relative_size(voxel_size))


def pack(classes: NDArray[Any], close: NDArray[np.int16]) -> NDArray[np.int16]:
    """Class and closeness of each voxel in one integer; ignored voxels stay `IGNORE`."""
    packed = (close << CLASS_BITS) | classes.astype(np.int16)
    packed[classes == IGNORE] = IGNORE
    return packed


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (same type, `IGNORE` as it is) and closeness (float32, 0 to 1) of packed voxels."""
    classes = (packed & ((1 << CLASS_BITS) - 1)).where(packed >= 0, packed)
    return classes, (packed.clamp(min=0) >> CLASS_BITS).float() / LEVELS


def extra_weights(classes: Tensor, close: Tensor, *, w0: float, where: str) -> Tensor:
    """What each voxel weighs beside its class: w0 times its closeness.

    Args:
        classes: integers of any shape: background, inside, border or `IGNORE`.
        close: float32 from 0 to 1, same shape.
        w0: the weight of a voxel that would belong to two objects.
        where: 'everywhere', or 'gaps', where voxels inside an object get 0.

    Returns:
        float32, same shape.
    """
    weights = w0 * close
    return weights * (classes != INSIDE) if where == "gaps" else weights


def _numbered(labels: NDArray[Any], ignore: int | None) -> NDArray[np.int32]:
    """The objects numbered from 1 without gaps; 0 is no object."""
    nothing = (labels == 0) if ignore is None else (labels == 0) | (labels == ignore)
    values, inverse = np.unique(labels, return_inverse=True)
    is_object = np.ones(len(values), bool)
    is_object[inverse.reshape(labels.shape)[nothing]] = False
    numbers = np.where(is_object, np.cumsum(is_object), 0).astype(np.int32)
    return numbers[inverse.reshape(labels.shape)]


def _grown(
    box: tuple[slice, ...], margin: Sequence[int], shape: Sequence[int]
) -> tuple[slice, ...]:
    return tuple(
        slice(max(0, s.start - m), min(n, s.stop + m))
        for s, m, n in zip(box, margin, shape, strict=True)
    )
