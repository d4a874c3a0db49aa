"""What a location holds, as plain data and as text: an image, its levels and labels, or a plate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bigseg import ngff, store
from bigseg.errors import InputError, NotOmeZarrError
from bigseg.units import format_um
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Mapping

    import zarr

    from bigseg.volume import Volume

MAX_LISTED = 1000


def describe(url: str) -> dict[str, Any]:
    """What is at `url`, as values that JSON can hold.

    An image: kind (image or labels), version, zarr_format, axes, units, voxel_um, dtype, channels,
    levels, labels, bytes (of all levels, uncompressed), and bigseg's own note on how it was made.
    A plate, well, collection or list of labels: kind, and the images in it.

    Raises:
        InputError: there is nothing, or nothing that bigseg knows.
    """
    url = url.rstrip("/") or url
    try:
        volume = open_volume(url)
    except NotOmeZarrError:
        found = _describe_collection(url)
        if found is None:
            raise
        return found
    levels = [_describe_level(volume.at(level)) for level in range(volume.n_levels)]
    ms = volume.multiscale
    return {
        "url": url,
        "kind": "labels" if ms.is_label else "image",
        "name": ms.name,
        "version": ms.version,
        "zarr_format": volume.array.metadata.zarr_format,
        "axes": "".join(ms.axis_names),
        "units": {axis.name: axis.unit for axis in ms.axes if axis.unit},
        "voxel_um": _list(volume.voxel_um),
        "dtype": str(volume.dtype),
        "channels": list(volume.channel_names) if "c" in ms.axis_names else [],
        "levels": levels,
        "labels": list(volume.label_names()),
        "bytes": sum(level["bytes"] for level in levels),
        "bigseg": volume.provenance,
    }


def as_text(description: Mapping[str, Any]) -> str:
    """A description as lines for people."""
    if "images" in description:
        images = description["images"]
        more = description["n_images"] - len(images)
        count = f"{description['n_images']} image{'s' * (description['n_images'] != 1)}"
        lines = [f"{description['url']}: {description['kind']} of {count}"]
        lines += [f"  {path}" for path in images]
        return "\n".join([*lines, f"  and {more} more"] if more else lines)
    size = description["voxel_um"]
    lines = [
        f"{description['url']}: {description['kind']}, OME-Zarr {description['version']} "
        f"(zarr v{description['zarr_format']})",
        f"  axes      {', '.join(description['axes'])}",
        f"  voxel     {format_um(size) if size else 'unknown (no units of length)'}",
        f"  type      {description['dtype']}",
    ]
    if description["channels"]:
        named = (f"{i} {name}" for i, name in enumerate(description["channels"]))
        lines.append(f"  channels  {', '.join(named)}")
    lines += [_level_text(i, level) for i, level in enumerate(description["levels"])]
    lines.append(f"  labels    {', '.join(description['labels']) or 'none'}")
    lines.append(f"  size      {_bytes_text(description['bytes'])} uncompressed")
    if description["bigseg"]:
        made = ", ".join(f"{k} {v}" for k, v in description["bigseg"].items())
        lines.append(f"  made by   bigseg: {made}")
    return "\n".join(lines)


def _describe_level(volume: Volume) -> dict[str, Any]:
    array = volume.array
    level = volume.multiscale.levels[volume.level]
    return {
        "path": level.path,
        "shape": _list(array.shape),
        "scale": _list(level.scale),
        "translation": _list(level.translation),
        "chunks": _list(array.chunks),
        "shards": _list(array.shards),
        "bytes": math.prod(array.shape) * array.dtype.itemsize,
    }


def _describe_collection(url: str) -> dict[str, Any] | None:
    try:
        group = store.open_group(url, mode="r")
    except NotOmeZarrError:
        return None
    attributes = group.attrs.asdict()
    ome = attributes.get("ome")
    ome = ome if isinstance(ome, dict) else attributes
    kinds = {
        "plate": "plate",
        "well": "well",
        "series": "collection",
        "bioformats2raw.layout": "collection",
        "labels": "list",
    }
    kind = next((k for key, k in kinds.items() if key in ome), None)
    if kind is None:
        return None
    paths = ngff.image_paths(attributes)
    n_images = len(paths)
    if kind == "plate":
        paths, n_images = _images_of_wells(url, paths)
    elif "bioformats2raw.layout" in ome and "series" not in ome:
        paths = _numbered_images(group)
        n_images = len(paths)
    return {"url": url, "kind": kind, "images": paths[:MAX_LISTED], "n_images": n_images}


def _images_of_wells(url: str, firsts: list[str]) -> tuple[list[str], int]:
    """The images in each well, as each well says; where it does not say, its first."""
    found: list[str] = []
    for first in firsts[:MAX_LISTED]:
        well = store.parent(first)
        try:
            group = store.open_group(store.join(url, well), mode="r")
            images = ngff.image_paths(group.attrs.asdict())
        except InputError:
            images = []
        found += [f"{well}/{path}" for path in images] or [first]
    return found, len(found) + max(0, len(firsts) - MAX_LISTED)


def _numbered_images(group: zarr.Group) -> list[str]:
    names = sorted(int(name) for name in group.group_keys() if name.isdigit())
    return [str(name) for name in names]


def _level_text(number: int, level: Mapping[str, Any]) -> str:
    shards = f", shards {_times(level['shards'])}" if level["shards"] else ""
    scale = ", ".join(f"{s:.4g}" for s in level["scale"])
    return (
        f"  level {number}   {_times(level['shape'])}, chunks {_times(level['chunks'])}{shards}, "
        f"scale {scale} (path {level['path']})"
    )


def _times(values: Any) -> str:  # noqa: ANN401
    return "×".join(map(str, values))


def _list(values: Any) -> list[Any] | None:  # noqa: ANN401
    return None if values is None else list(values)


def _bytes_text(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} PiB"
