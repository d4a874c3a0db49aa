"""For tests: OME-Zarr images written with zarr alone, metadata by hand; and foreign validators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaozarrs
import zarr
from numpy.typing import NDArray

from bigseg.blocks import Region
from bigseg.volume import OutputSpec, Volume

SIZES = {"t": 3, "c": 2, "z": 5, "y": 9, "x": 11}
TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def metadata(
    version: str,
    axes: str,
    scales: Sequence[Sequence[float]],
    *,
    translations: Sequence[Sequence[float]] | None = None,
    unit: str | None = "micrometer",
    channels: Sequence[str] = (),
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Group attributes of an image with levels 0, 1, ... of these voxel sizes."""
    named = [{"name": a, "type": TYPES[a]} for a in axes]
    for axis in named:
        if unit and axis["type"] == "space":
            axis["unit"] = unit
    datasets = []
    for i, scale in enumerate(scales):
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": list(scale)}]
        if translations is not None:
            steps.append({"type": "translation", "translation": list(translations[i])})
        if version.startswith("0.6"):
            ends = {"input": {"path": str(i)}, "output": {"name": "physical"}}
            step = steps[0] if len(steps) == 1 else {"type": "sequence", "transformations": steps}
            steps = [{**step, **ends}]
        datasets.append({"path": str(i), "coordinateTransformations": steps})
    image: dict[str, Any] = {"name": "test", "datasets": datasets}
    if version.startswith("0.6"):
        other = [{"name": f"dim_{a}", "type": "array"} for a in axes]
        image["coordinateSystems"] = [
            {"name": "array", "axes": other},
            {"name": "physical", "axes": named},
        ]
    else:
        image["axes"] = named
    ome: dict[str, Any] = {"multiscales": [image], **(extra or {})}
    if channels:
        ome["omero"] = {"channels": [{"label": c, "color": "FF0000"} for c in channels]}
    if version == "0.4":
        image["version"] = "0.4"
        return ome
    return {"ome": {"version": version, **ome}}


def write_image(
    url: str,
    levels: Sequence[NDArray[Any]],
    axes: str,
    *,
    version: str = "0.5",
    chunks: Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    attributes: dict[str, Any] | None = None,
    scale0: Sequence[float] | None = None,
    channels: Sequence[str] = (),
    big_endian: bool = False,
) -> str:
    """Write arrays as the levels of an image; voxel sizes follow from the shapes."""
    # fsspec makes no directories for file:// of its own accord.
    place = url.removeprefix("file://")
    zarr_format = 2 if version == "0.4" else 3
    first = levels[0].shape
    scale0 = scale0 or [1.0] * len(axes)
    if attributes is None:
        scales = [
            [s * round(n / m) for s, n, m in zip(scale0, first, level.shape, strict=True)]
            for level in levels
        ]
        attributes = metadata(version, axes, scales, channels=channels)
    group = zarr.open_group(place, mode="w-", zarr_format=zarr_format, attributes=attributes)
    for i, level in enumerate(levels):
        options: dict[str, Any] = {}
        if zarr_format == 2:
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        else:
            options["dimension_names"] = list(axes)
            options["shards"] = None if shards is None else tuple(shards)
        dtype = level.dtype.newbyteorder(">") if big_endian else level.dtype
        array = group.create_array(
            str(i),
            shape=level.shape,
            dtype=dtype,
            chunks=tuple(chunks or level.shape),
            fill_value=0,
            **options,
        )
        array[...] = level
    return url


def pyramid_of(data: NDArray[Any], n: int, factors: Sequence[int]) -> list[NDArray[Any]]:
    """`data` and n - 1 strided copies."""
    levels = [data]
    for _ in range(n - 1):
        levels.append(levels[-1][tuple(slice(None, None, f) for f in factors)])
    return levels


def ramp(shape: Sequence[int], dtype: str = "uint16") -> NDArray[Any]:
    """A different value in each voxel, modulo what the type holds."""
    size = int(np.prod(shape))
    values = np.arange(size)
    if np.dtype(dtype).kind in "iu":
        values = values % min(np.iinfo(dtype).max, 2**62)
    return values.astype(dtype).reshape(tuple(shape))


def canonical(data: NDArray[Any], axes: str) -> NDArray[Any]:
    """`data` with axes (c, t, z, y, x), the slow and plain way."""
    for name in "ctzyx":
        if name not in axes:
            data, axes = data[None], name + axes
    return np.einsum(f"{axes}->ctzyx", data)


def labels_spec(chunk: tuple[int, ...] = (1, 4, 4, 4), **changes: Any) -> OutputSpec:
    """An output of uint32 labels, with `changes`."""
    plain: dict[str, Any] = {
        "dtype": np.dtype("uint32"),
        "chunk": chunk,
        "shard": None,
        "channel_names": (),
        "provenance": {"version": "0"},
    }
    return OutputSpec(**{**plain, **changes})


def fill(volume: Volume, value: int = 1) -> None:
    """Write one value to every voxel of every level."""
    for level in range(volume.n_levels):
        at = volume.at(level)
        at.write(Region.of_shape(at.shape), np.full((at.n_channels, *at.shape), value, at.dtype))


def validate(url: str) -> None:
    """Both validators, on a 0.4 or 0.5 image with its labels."""
    yaozarrs.validate_zarr_store(url)
    group = zarr.open_group(url, mode="r")
    with warnings.catch_warnings():
        # ome-zarr-models builds pydantic models whose field names shadow their parents'.
        warnings.simplefilter("ignore")
        import ome_zarr_models.v04
        import ome_zarr_models.v05

        version = ome_zarr_models.v04 if group.metadata.zarr_format == 2 else ome_zarr_models.v05
        image = version.Image.from_zarr(group)
        if "labels" in group:
            labels = version.Labels.from_zarr(group["labels"])
            assert labels is not None
            for name in (
                labels.attributes.labels
                if version is ome_zarr_models.v04
                else (labels.ome_attributes.labels)
            ):
                version.ImageLabel.from_zarr(group["labels"][name])
        assert image is not None
