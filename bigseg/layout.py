"""What lies on disk for an output: empty pyramids to be filled by blocks, and the list of labels.

    IMAGE/                    the image that was segmented
      labels/                 lists the finished label images
        NAME/                 group: multiscales, image-label, and `bigseg` (how it was made)
          0  1  2 ...         one array a level, as many as the image has

A creation killed half-way leaves a group that has `bigseg` but no `multiscales`: nobody takes it
for an image, and the next creation replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.codecs import ZstdCodec

from bigseg import ngff, store
from bigseg.blocks import round_up
from bigseg.errors import InputNotFoundError, NotOmeZarrError, OutputError, UsageError
from bigseg.lock import holding
from bigseg.ngff import Level

if TYPE_CHECKING:
    from collections.abc import Sequence

    import zarr

    from bigseg.blocks import Vec
    from bigseg.ngff import Multiscale

PLACE = "tzyx"
PROVENANCE = "bigseg"


@dataclass(frozen=True)
class OutputSpec:
    """What to create for an image; `chunk` and `shard` along t, z, y, x.

    Without `channel_names` it is a label image, without channel axis; `class_names` then name its
    values 0, 1, ... With them each channel has chunks of its own. `provenance` goes into the
    group's attributes under `bigseg`.
    """

    dtype: np.dtype[Any]
    chunk: Vec
    shard: Vec | None
    channel_names: tuple[str, ...]
    provenance: dict[str, Any]
    class_names: tuple[str, ...] = ()


def output_multiscale(
    source: Multiscale, spec: OutputSpec, *, name: str, first_level: int
) -> Multiscale:
    """The image to create: the source's axes and levels from `first_level` on, paths 0, 1, ...

    Raises:
        UsageError: a label image of another type than an integer.
    """
    is_label = not spec.channel_names
    if is_label and np.dtype(spec.dtype).kind not in "iu":
        raise UsageError(
            f"labels of type {np.dtype(spec.dtype)}: OME-Zarr labels are integers; choose an "
            "integer type"
        )
    plain = source.without_channels() if is_label else source.with_channels(spec.channel_names)
    return replace(
        plain,
        version="0.4" if source.version == "0.4" else "0.5",
        name=name,
        levels=tuple(
            Level(str(i), level.scale, level.translation)
            for i, level in enumerate(plain.levels[first_level:])
        ),
        is_label=is_label,
    )


def create_image(
    url: str, ms: Multiscale, shapes: Sequence[Vec], spec: OutputSpec, *, source: str | None
) -> zarr.Array[Any]:
    """The arrays and metadata of an empty image; `shapes` (t, z, y, x) of its levels.

    `source` is the relative path to the segmented image. Gives the array of the first level.

    Raises:
        OutputError: there is something at `url`, or it cannot be written.
    """
    array = create_arrays(url, ms, shapes, spec)
    publish(url, ms, spec, source=source)
    return array


def begin_image(url: str, *, like: Multiscale, spec: OutputSpec) -> None:
    """The group of an image of which no more is known yet: `complete_image` makes it one.

    Raises:
        OutputError: there is something else at `url`, or it cannot be written.
    """
    _clear_leftover(url)
    store.create_group(
        url,
        zarr_format=2 if like.version == "0.4" else 3,
        attributes={PROVENANCE: spec.provenance},
    )


def complete_image(
    url: str, ms: Multiscale, shapes: Sequence[Vec], spec: OutputSpec, *, source: str | None
) -> None:
    """The arrays and metadata of an image that was begun; what else lies in its group stays.

    Raises:
        OutputError: it cannot be written.
    """
    group = store.open_group(url, mode="r+")
    try:
        for level, shape in zip(ms.levels, shapes, strict=True):
            # What an earlier call, cut short, left.
            store.remove(store.join(url, level.path))
            _create_level(group, ms, level.path, shape, spec)
    except OSError as error:
        raise OutputError(f"{url} cannot be written: {error}; check rights and space") from error
    publish(url, ms, spec, source=source)


def take_back_image(url: str, spec: OutputSpec) -> None:
    """Remove the metadata and arrays that `complete_image` made; nothing is fine.

    Raises:
        OutputError: it cannot be written.
    """
    group = store.open_group(url, mode="r+")
    try:
        levels = ngff.parse_multiscale(group.attrs.asdict(), where=url).levels
    except NotOmeZarrError:
        levels = ()
    group.attrs.put({PROVENANCE: spec.provenance})
    for level in levels:
        store.remove(store.join(url, level.path))


def create_arrays(
    url: str, ms: Multiscale, shapes: Sequence[Vec], spec: OutputSpec
) -> zarr.Array[Any]:
    """The arrays of an image that is no image yet: `publish` makes it one.

    Raises:
        OutputError: there is something at `url`, or it cannot be written.
    """
    _clear_leftover(url)
    group = store.create_group(
        url,
        zarr_format=2 if ms.version == "0.4" else 3,
        attributes={PROVENANCE: spec.provenance},
    )
    try:
        arrays = [
            _create_level(group, ms, level.path, shape, spec)
            for level, shape in zip(ms.levels, shapes, strict=True)
        ]
    except OSError as error:
        raise OutputError(f"{url} cannot be written: {error}; check rights and space") from error
    return arrays[0]


def publish(
    url: str,
    ms: Multiscale,
    spec: OutputSpec,
    *,
    source: str | None = None,
    windows: Sequence[tuple[float, float]] = (),
) -> None:
    """Write the metadata that make the arrays at `url` an image; `windows` are display ranges.

    Raises:
        OutputError: they cannot be written.
    """
    attributes = ngff.multiscale_attributes(
        ms,
        downsampling="mode" if ms.is_label else "mean",
        source=source,
        class_names=spec.class_names,
        windows=windows or [_window(np.dtype(spec.dtype))] * len(ms.channels),
        extra={PROVENANCE: spec.provenance},
    )
    try:
        store.open_group(url, mode="r+").attrs.put(attributes)
    except OSError as error:
        raise OutputError(f"{url} cannot be written: {error}; check rights and space") from error


def units_of(chunk: Vec, shard: Vec | None, shape: Vec) -> tuple[Vec, Vec | None]:
    """The chunk and the shard of an array of `shape`, which none of them exceeds by a chunk."""
    chunk = tuple(map(min, chunk, shape))
    if shard is None:
        return chunk, None
    return chunk, tuple(
        min(round_up(s, c), round_up(n, c)) for s, c, n in zip(shard, chunk, shape, strict=True)
    )


def path_to_image(image_url: str, url: str) -> str | None:
    """The relative path from a label image to its image; None unless it lies in its `labels`."""
    inside = url.removeprefix(f"{image_url.rstrip('/')}/labels/")
    return None if inside == url else "../" * (inside.strip("/").count("/") + 2)


def listed_labels(image_url: str) -> tuple[str, ...]:
    """The label images that the image's `labels` group lists."""
    try:
        group = store.open_group(store.join(image_url, "labels"), mode="r")
    except (InputNotFoundError, NotOmeZarrError):
        return ()
    return ngff.listed_labels(group.attrs.asdict())


def list_label(image_url: str, name: str) -> None:
    """Name a finished label image in the image's `labels` group; other entries stay.

    Of several calls at once each waits for the one before, so that no entry is lost.

    Raises:
        OutputError: the group cannot be written.
    """
    if name not in listed_labels(image_url):
        with holding(store.join(image_url, "labels")):
            names = listed_labels(image_url)
            if name not in names:
                _put_labels(image_url, (*names, name))


def unlist_label(image_url: str, name: str) -> None:
    """Take a label image out of the image's `labels` group; the label image itself stays.

    Raises:
        OutputError: the group cannot be written.
    """
    if name in listed_labels(image_url):
        with holding(store.join(image_url, "labels")):
            names = listed_labels(image_url)
            _put_labels(image_url, tuple(n for n in names if n != name))


def _put_labels(image_url: str, names: Sequence[str]) -> None:
    image = store.open_group(image_url, mode="r")
    attributes = image.attrs.asdict()
    version = ngff.parse_multiscale(attributes, where=image_url).version
    zarr_format = image.metadata.zarr_format
    url = store.join(image_url, "labels")
    # Whoever writes the list holds its lock: these are of runs that were killed.
    store.sweep(url, prefix=".z", deep=False)
    labels = _open_labels(url, zarr_format)
    old = labels.attrs.asdict()
    new = ngff.labels_attributes(names, version=version)
    if "ome" in new:
        # Other keys stay; so does a version that is there, which others may have chosen.
        present = old.get("ome")
        new = {"ome": {**new["ome"], **(present if isinstance(present, dict) else {})}}
        new["ome"]["labels"] = list(names)
    try:
        labels.attrs.put({**old, **new})
    except OSError as error:
        raise OutputError(
            f"the list of labels of {image_url} cannot be written: {error}; check rights and space"
        ) from error


def _open_labels(url: str, zarr_format: int) -> zarr.Group:
    try:
        return store.open_group(url, mode="r+")
    except (InputNotFoundError, NotOmeZarrError):
        # Label images are there before the group that lists them.
        return store.make_group(url, zarr_format=2 if zarr_format == 2 else 3)


def _clear_leftover(url: str) -> None:
    """Remove what a creation that was cut short left at `url`, and nothing else."""
    if not store.exists(url):
        return
    try:
        group = store.open_group(url, mode="r")
    except (InputNotFoundError, NotOmeZarrError):
        if store.is_empty(url):
            store.remove(url)
        return
    attributes = group.attrs.asdict()
    unfinished = PROVENANCE in attributes and not ({"multiscales", "ome"} & set(attributes))
    if unfinished or (not attributes and not group.nmembers()):
        store.remove(url)


def _create_level(
    group: zarr.Group, ms: Multiscale, path: str, shape: Vec, spec: OutputSpec
) -> zarr.Array[Any]:
    # Version 0.4 has no shards.
    chunk, shard = units_of(spec.chunk, None if ms.version == "0.4" else spec.shard, shape)
    names = ms.axis_names
    n_channels = len(spec.channel_names)
    options: dict[str, Any] = {
        "shape": _stored(shape, names, n_channels),
        "chunks": _stored(chunk, names, 1),
        "dtype": spec.dtype,
        "fill_value": 0,
    }
    if ms.version == "0.4":
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        options["compressors"] = {"id": "zstd", "level": 1, "checksum": True}
    else:
        options["dimension_names"] = names
        options["compressors"] = ZstdCodec(level=1, checksum=True)
        if shard is not None:
            options["shards"] = _stored(shard, names, 1)
    return group.create_array(path, **options)


def _stored(place: Vec, names: Sequence[str], channels: int) -> tuple[int, ...]:
    by_name = dict(zip(PLACE, place, strict=True), c=channels)
    return tuple(by_name[name] for name in names)


def _window(dtype: np.dtype[Any]) -> tuple[float, float]:
    if dtype.kind not in "iu":
        return 0.0, 1.0
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)
