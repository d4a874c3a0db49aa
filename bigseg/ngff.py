"""OME-Zarr metadata as frozen values: versions 0.4, 0.5 and 0.6 in, 0.4 and 0.5 out.

    0.4   .zattrs                   multiscales[0].axes, datasets[].coordinateTransformations
    0.5   zarr.json attributes.ome  the same
    0.6   zarr.json attributes.ome  coordinateSystems instead of axes; a level holds one `scale`,
                                    `identity` or `sequence` of a scale and a translation

Everything here is pure: attributes in, values out. It opens nothing and knows no arrays.
"""

from __future__ import annotations

import colorsys
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigseg.errors import InputError, NotOmeZarrError
from bigseg.groups import explain_group
from bigseg.groups import image_paths as image_paths
from bigseg.groups import listed_labels as listed_labels
from bigseg.guards import shown
from bigseg.store import join
from bigseg.units import UNIT_TO_UM as UNIT_TO_UM
from bigseg.units import canonical_unit

log = logging.getLogger(__name__)

AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
SPATIAL = "zyx"
# Each level halves the one before it, and no axis has 2^64 voxels.
MAX_LEVELS = 64
MAX_CHANNELS = 1 << 16
MAX_NESTING = 8

_VERSION = re.compile(r"0\.([456])(\.\d+)?(-?(rc|dev|a|b)\d*)?$")


@dataclass(frozen=True)
class Axis:
    """One axis of the stored arrays; `unit` is a name of the specification where one is known."""

    name: str
    type: str | None
    unit: str | None


@dataclass(frozen=True)
class Level:
    """One resolution: where its array is, and for each stored axis voxel size and offset."""

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True)
class Multiscale:
    """What a multiscale image says of itself; axes in the order in which they are stored."""

    version: str
    name: str | None
    axes: tuple[Axis, ...]
    levels: tuple[Level, ...]
    channels: tuple[str, ...]
    is_label: bool

    @property
    def axis_names(self) -> tuple[str, ...]:
        """For example ('c', 'z', 'y', 'x')."""
        return tuple(axis.name for axis in self.axes)

    @property
    def spatial_axes(self) -> str:
        """'zyx' or 'yx'."""
        return "".join(name for name in SPATIAL if name in self.axis_names)

    def along(self, name: str, values: Sequence[float], *, absent: float) -> float:
        """The entry of `values` (one for each stored axis) of the axis called `name`."""
        return values[self.axis_names.index(name)] if name in self.axis_names else absent

    def voxel_um(self, level: int) -> tuple[float, ...] | None:
        """Voxel size along `spatial_axes` in micrometer; None where a unit of length is missing."""
        sizes = {
            axis.name: scale * UNIT_TO_UM.get(axis.unit or "", math.nan)
            for axis, scale in zip(self.axes, self.levels[level].scale, strict=True)
        }
        found = tuple(sizes[name] for name in self.spatial_axes)
        return None if any(map(math.isnan, found)) else found

    def without_channels(self) -> Multiscale:
        """The same image with its channel axis dropped."""
        keep = [i for i, name in enumerate(self.axis_names) if name != "c"]
        return replace(
            self,
            axes=tuple(self.axes[i] for i in keep),
            levels=tuple(
                Level(
                    v.path, tuple(v.scale[i] for i in keep), tuple(v.translation[i] for i in keep)
                )
                for v in self.levels
            ),
            channels=(),
        )

    def with_channels(self, names: Sequence[str]) -> Multiscale:
        """The same image with channels of these names, in an axis after time."""
        plain = self.without_channels()
        at = 1 if "t" in plain.axis_names else 0

        def insert(values: tuple[float, ...], value: float) -> tuple[float, ...]:
            return (*values[:at], value, *values[at:])

        return replace(
            plain,
            axes=(*plain.axes[:at], Axis("c", "channel", None), *plain.axes[at:]),
            levels=tuple(
                Level(v.path, insert(v.scale, 1.0), insert(v.translation, 0.0))
                for v in plain.levels
            ),
            channels=tuple(names),
        )


def parse_multiscale(attributes: Mapping[str, Any], *, where: str) -> Multiscale:
    """The image that a group's attributes describe; `where` is its location, for messages.

    Raises:
        NotOmeZarrError: the group is a plate, a well, a collection or no image at all (names what
            to give instead), its version is not 0.4, 0.5 or 0.6, or its axes are not a subset of
            t, c, z, y, x with y and x.
        InputError: a scale is not positive, a path leaves the store, or a transformation is of a
            kind that a level must not have; or there are more levels than any image has.
    """
    ome = attributes.get("ome")
    ome = ome if isinstance(ome, Mapping) else attributes
    found = ome.get("multiscales")
    if not isinstance(found, Sequence) or not found or not isinstance(found[0], Mapping):
        raise explain_group(attributes, where)
    try:
        return _parse(found[0], ome, namespaced=ome is not attributes, where=where)
    except (LookupError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise NotOmeZarrError(
            f"the OME-Zarr metadata of {where} is damaged ({type(error).__name__}: "
            f"{str(error)[:200]}): repair it, for example by writing the image again"
        ) from None


def multiscale_attributes(
    ms: Multiscale,
    *,
    downsampling: str,
    source: str | None = None,
    class_names: Sequence[str] = (),
    windows: Sequence[tuple[float, float]] = (),
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The group attributes to write for an image of version 0.4 or 0.5.

    `source` is the relative path from a label image to its image, `class_names` name the label
    values 0, 1, ...; `windows` are the channels' displayed ranges, `extra` top-level keys.
    """
    assert ms.version in ("0.4", "0.5"), ms.version
    multiscale: dict[str, Any] = {"name": ms.name} if ms.name else {}
    multiscale["axes"] = [_axis_dict(axis) for axis in ms.axes]
    multiscale["datasets"] = [_level_dict(level) for level in ms.levels]
    multiscale["type"] = downsampling
    versioned = {"version": "0.4"} if ms.version == "0.4" else {}
    ome: dict[str, Any] = {"multiscales": [{**versioned, **multiscale}]}
    if ms.is_label:
        ome["image-label"] = {**versioned, **_label_dict(source, class_names)}
    if ms.channels:
        named = zip(ms.channels, windows, strict=True)
        ome["omero"] = {"channels": [_channel_dict(name, window) for name, window in named]}
    if ms.version == "0.4":
        return {**ome, **(extra or {})}
    return {"ome": {"version": ms.version, **ome}, **(extra or {})}


def labels_attributes(names: Sequence[str], *, version: str) -> dict[str, Any]:
    """The attributes of a `labels` group that lists these label images.

    0.5 demands the version beside the list; without it other programs reject the whole image.
    """
    if version == "0.4":
        return {"labels": list(names)}
    return {"ome": {"version": version, "labels": list(names)}}


def _parse(
    ms: Mapping[str, Any], ome: Mapping[str, Any], *, namespaced: bool, where: str
) -> Multiscale:
    version = _version(ome, ms, namespaced=namespaced, where=where)
    datasets = ms["datasets"]
    if not datasets:
        raise NotOmeZarrError(f"{where} lists no resolution level: write the image again")
    if len(datasets) > MAX_LEVELS:
        raise InputError(
            f"{where} lists {len(datasets)} levels, more than the {MAX_LEVELS} that an image can "
            "have: write the image again"
        )
    axes = _axes(_raw_axes(ms, version), where)
    outer = [] if version == "0.6" else ms.get("coordinateTransformations") or []
    levels, has_scale = [], True
    for dataset in datasets:
        inner = dataset.get("coordinateTransformations") or []
        has_scale = has_scale and (version == "0.6" or any(t.get("type") == "scale" for t in inner))
        scale, translation = _fold([*inner, *outer], len(axes), where)
        # Also what several finite numbers multiply to.
        scale = _vector(scale, len(axes), "scale", where)
        translation = _vector(translation, len(axes), "translation", where)
        levels.append(Level(_level_path(dataset["path"], where), scale, translation))
    if not has_scale:
        log.warning("%s has levels without a scale: voxel size taken as 1 without unit", where)
        axes = tuple(replace(a, unit=None) if a.name in SPATIAL else a for a in axes)
    name = ms.get("name")
    return Multiscale(
        version=version,
        name=str(name) if name else None,
        axes=axes,
        levels=tuple(levels),
        channels=_channels(ome),
        is_label="image-label" in ome,
    )


def _version(ome: Mapping[str, Any], ms: Mapping[str, Any], *, namespaced: bool, where: str) -> str:
    stated = ome.get("version") if namespaced else None
    text = str(stated or ms.get("version") or ("0.5" if namespaced else "0.4"))
    match = _VERSION.match(text)
    if match is None:
        raise NotOmeZarrError(
            f"{where} is of OME-Zarr version {text[:40]}; bigseg reads 0.4, 0.5 and 0.6: "
            "convert it to 0.5"
        )
    return f"0.{match[1]}"


def _raw_axes(ms: Mapping[str, Any], version: str) -> Sequence[Mapping[str, Any]]:
    axes: Sequence[Mapping[str, Any]]
    if version != "0.6":
        axes = ms["axes"]
        return axes
    # The system that every level maps to is the image's own.
    name = ms["datasets"][0]["coordinateTransformations"][0]["output"]["name"]
    axes = next(s["axes"] for s in ms["coordinateSystems"] if s["name"] == name)
    return axes


def _axes(raw: Sequence[Mapping[str, Any]], where: str) -> tuple[Axis, ...]:
    axes = []
    for entry in raw:
        name, kind, unit = str(entry["name"]), entry.get("type"), entry.get("unit")
        if name not in AXIS_TYPES or kind not in (None, AXIS_TYPES[name]):
            raise NotOmeZarrError(
                f"{where} has an axis {shown(name)} of type {shown(kind)}; bigseg reads time t, "
                "channel c and space z, y, x: write the image with those axes only"
            )
        axes.append(Axis(name, kind, canonical_unit(str(unit)) if unit else None))
    names = "".join(a.name for a in axes)
    rank = ["tc".find(n) % 3 for n in names]
    if len(set(names)) != len(names) or not {"y", "x"} <= set(names) or rank != sorted(rank):
        raise NotOmeZarrError(
            f"{where} has the axes {','.join(names[:20])}; they must be different, in the order "
            "time, channel, space, and hold y and x: write the image with such axes"
        )
    return tuple(axes)


def _fold(
    transformations: Sequence[Mapping[str, Any]], n: int, where: str, depth: int = 0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """One scale and one translation that do what the list does, in order."""
    scale, translation = (1.0,) * n, (0.0,) * n
    for entry in transformations:
        kind = entry["type"]
        if kind == "identity":
            continue
        s, t = (1.0,) * n, (0.0,) * n
        if kind == "sequence" and depth < MAX_NESTING:
            s, t = _fold(entry["transformations"], n, where, depth + 1)
        elif kind == "scale" and "scale" in entry:
            s = _vector(entry["scale"], n, "scale", where)
        elif kind == "translation" and "translation" in entry:
            t = _vector(entry["translation"], n, "translation", where)
        else:
            raise InputError(
                f"{where} places a level by a transformation {shown(kind)}; a level may have a "
                "scale and a translation: write the image with those"
            )
        scale = tuple(a * b for a, b in zip(scale, s, strict=True))
        translation = tuple(a * b + c for a, b, c in zip(translation, s, t, strict=True))
    return scale, translation


def _vector(values: Sequence[Any], n: int, kind: str, where: str) -> tuple[float, ...]:
    try:
        vector = tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        vector = (math.nan,)
    bad = any(not math.isfinite(v) or (kind == "scale" and v <= 0) for v in vector)
    if len(vector) != n or bad:
        rule = "positive numbers" if kind == "scale" else "finite numbers"
        raise InputError(
            f"{where} has the {kind} {shown(values)}; it must be {n} {rule}, one "
            "for each axis: correct the metadata"
        )
    return vector


def _level_path(path: object, where: str) -> str:
    text = str(path).rstrip("/")  # some writers give an integer
    join(where, text)
    return text


def _channels(ome: Mapping[str, Any]) -> tuple[str, ...]:
    omero = ome.get("omero")
    entries = omero.get("channels") if isinstance(omero, Mapping) else None
    if not isinstance(entries, Sequence):
        return ()
    return tuple(
        str(entry.get("label") or i) if isinstance(entry, Mapping) else str(i)
        for i, entry in enumerate(entries[:MAX_CHANNELS])
    )


def _axis_dict(axis: Axis) -> dict[str, str]:
    found = {"name": axis.name, "type": AXIS_TYPES[axis.name]}
    return {**found, "unit": axis.unit} if axis.unit else found


def _level_dict(level: Level) -> dict[str, Any]:
    transformations: list[dict[str, Any]] = [{"type": "scale", "scale": list(level.scale)}]
    if any(level.translation):
        moved = {"type": "translation", "translation": list(level.translation)}
        transformations.append(moved)
    return {"path": level.path, "coordinateTransformations": transformations}


def _label_dict(source: str | None, class_names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if class_names:
        # Without a colour for each object: one for each of 10^8 cells would be no metadata.
        values = range(len(class_names))
        found["colors"] = [{"label-value": v, "rgba": class_color(v)} for v in values]
        found["properties"] = [{"label-value": v, "name": str(class_names[v])} for v in values]
    if source is not None:
        found["source"] = {"image": source}
    return found


def class_color(value: int) -> list[int]:
    """RGBA (0..255) for a class; hues a golden angle apart, background transparent."""
    hue = (value - 1) * 0.618_033_988_749_895 % 1.0
    rgb = colorsys.hsv_to_rgb(hue, 0.7, 1.0)
    return [*(round(255 * v) for v in rgb), 255] if value else [0, 0, 0, 0]


def _channel_dict(name: str, window: tuple[float, float]) -> dict[str, Any]:
    low, high = window
    shown = {"min": low, "max": high, "start": low, "end": high}
    return {"label": name, "color": "FFFFFF", "active": True, "window": shown}
