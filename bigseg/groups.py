"""What a Zarr group holds that is no image itself: the images of a plate, a well, a collection.

Pure, as ngff.py: attributes in, names out. The names are as others wrote them; `store.join` refuses
those that lead out of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigseg.errors import NotOmeZarrError


def listed_labels(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The label images that the attributes of a `labels` group list."""
    ome = attributes.get("ome")
    found = (ome if isinstance(ome, Mapping) else attributes).get("labels")
    return _strings(found)


def image_paths(attributes: Mapping[str, Any]) -> list[str]:
    """Where in a plate, a well, a collection or a `labels` group images are, at least the first.

    Of each well of a plate the first image is named, '<well>/0'.
    """
    ome = attributes.get("ome")
    ome = ome if isinstance(ome, Mapping) else attributes
    try:
        if "plate" in ome:
            wells = _strings([well["path"] for well in ome["plate"]["wells"]])
            return [f"{path}/0" for path in wells]
        if "well" in ome:
            return list(_strings([image["path"] for image in ome["well"]["images"]]))
        if "series" in ome:
            return list(_strings(ome["series"]))
    except (KeyError, TypeError):
        return []
    return ["0"] if "bioformats2raw.layout" in ome else list(listed_labels(attributes))


def explain_group(attributes: Mapping[str, Any], where: str) -> NotOmeZarrError:
    """The error for a group that is no image: says what it is, and what to give instead."""
    ome = attributes.get("ome")
    ome = ome if isinstance(ome, Mapping) else attributes
    paths = image_paths(attributes)
    examples = " or ".join(f"{where}/{p[:200]}" for p in paths[:3])
    if "plate" in ome:
        return NotOmeZarrError(f"{where} is a plate of {len(paths)} wells: give {examples}")
    if "well" in ome:
        return NotOmeZarrError(f"{where} is a well of {len(paths)} images: give {examples}")
    if "bioformats2raw.layout" in ome or "series" in ome:
        return NotOmeZarrError(f"{where} is a collection of images: give {examples}")
    if "labels" in ome:
        return NotOmeZarrError(f"{where} is a list of label images: give {examples}")
    if "scene" in ome:
        return NotOmeZarrError(f"{where} is a scene of several images: give one of them")
    return NotOmeZarrError(
        f"{where} is a Zarr group without OME-Zarr metadata (multiscales): check the path, or "
        "convert the image with `bigseg convert`"
    )


def _strings(found: object) -> tuple[str, ...]:
    """The names in a list; some writers give numbers."""
    names = found if isinstance(found, list | tuple) else ()
    return tuple(str(name) for name in names if isinstance(name, str | int))
