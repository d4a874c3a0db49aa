"""Small annotated images for the training tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr_images import write_image


def write_annotated(
    url: str,
    image: NDArray[Any],
    labels: NDArray[Any],
    axes: str,
    *,
    scale: Sequence[float] | None = None,
    name: str = "cells",
    chunks: Sequence[int] | None = None,
) -> str:
    """An image and its labels, whose axes are the image's without c."""
    write_image(url, [image], axes, scale0=scale, chunks=chunks)
    kept = [i for i, axis in enumerate(axes) if axis != "c"]
    group = zarr.open_group(f"{url}/labels", mode="w", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "labels": [name]}
    write_image(
        f"{url}/labels/{name}",
        [labels],
        "".join(axes[i] for i in kept),
        scale0=None if scale is None else [scale[i] for i in kept],
        chunks=None if chunks is None else [chunks[i] for i in kept],
    )
    return url


def blobs(shape: Sequence[int], seed: int = 0, n: int = 12) -> tuple[NDArray[Any], NDArray[Any]]:
    """A noisy image (uint8) of bright balls and their numbers (uint16), 1..n; some may touch."""
    rng = np.random.default_rng(seed)
    places = np.indices(shape)
    labels = np.zeros(shape, np.uint16)
    for number in range(1, n + 1):
        centre = [rng.uniform(0, s) for s in shape]
        radius = rng.uniform(3, 6)
        distance = sum((p - c) ** 2 for p, c in zip(places, centre, strict=True))
        labels[(distance < radius**2) & (labels == 0)] = number
    image = 60 + 90 * (labels > 0) + rng.normal(0, 12, shape)
    return image.clip(0, 255).astype(np.uint8), labels
