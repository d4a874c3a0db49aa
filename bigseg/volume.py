"""One level of an OME-Zarr image, seen as (t, z, y, x) with channels in front.

    stored axes      any legal subset of t, c, z, y, x, for example  c,z,y,x
    a Region         always four axes (t, z, y, x); absent axes have length 1
    what read gives  always five axes (c, t, z, y, x), native byte order

Reading goes through the chunks that it touches only. Writing goes in whole write units (shards
where there are any, else chunks), so that two writers never touch one object and need no lock.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import layout, ngff, store
from bigseg.damage import read_box
from bigseg.errors import (
    BadChunkError,
    InputError,
    InputNotFoundError,
    NotOmeZarrError,
    OutputError,
    UsageError,
)
from bigseg.layout import OutputSpec, list_label, unlist_label
from bigseg.lazy import LazyView
from bigseg.units import format_um, nearest_size
from bigseg.usable import check_array, refuse_level
from bigseg.writing import UnitWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

    import dask.array as da
    import zarr
    from numpy.typing import NDArray

    from bigseg.blocks import Region, Vec
    from bigseg.damage import BadChunk
    from bigseg.ngff import Multiscale

__all__ = [
    "OutputSpec",
    "Volume",
    "create_pyramid",
    "list_label",
    "nearest_level",
    "open_volume",
    "unlist_label",
]

CANONICAL = "ctzyx"


@dataclass(frozen=True)
class Volume:
    """One level of an image. `url` is the image's group; pickles, and reopens from `location`."""

    url: str
    multiscale: Multiscale
    level: int
    array: zarr.Array[Any] = field(compare=False, repr=False)

    @property
    def location(self) -> tuple[str, int]:
        """What `open_volume(url, level=level)` needs to open it again anywhere."""
        return self.url, self.level

    @property
    def shape(self) -> Vec:
        """Voxels along t, z, y, x."""
        return self._place(self.array.shape)

    @property
    def n_channels(self) -> int:
        """Number of channels; 1 without a channel axis."""
        return int(self.multiscale.along("c", self.array.shape, absent=1))

    @property
    def channel_names(self) -> tuple[str, ...]:
        """A name for each channel: the image's, else its number."""
        named = self.multiscale.channels
        return tuple(named[i] if i < len(named) else str(i) for i in range(self.n_channels))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels in native byte order."""
        return self.array.dtype.newbyteorder("=")

    @property
    def spatial_axes(self) -> str:
        """'zyx' or 'yx'."""
        return self.multiscale.spatial_axes

    @property
    def n_levels(self) -> int:
        """Number of levels of the image."""
        return len(self.multiscale.levels)

    @property
    def scale(self) -> tuple[float, ...]:
        """Voxel size along t, z, y, x in the image's own units; 1 where there is no axis."""
        return self._scale_of(self.level)

    @property
    def voxel_um(self) -> tuple[float, ...] | None:
        """Voxel size along `spatial_axes` in micrometer; None without units of length."""
        return self.multiscale.voxel_um(self.level)

    @property
    def chunk_shape(self) -> Vec:
        """The smallest box that is decoded at once, along t, z, y, x."""
        return self._place(self.array.chunks)

    @property
    def write_unit(self) -> Vec:
        """The box stored as one object, along t, z, y, x: the shard, else the chunk."""
        return self._place(self.array.shards or self.array.chunks)

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What bigseg wrote about how this image was made; None where it did not make it."""
        found = store.open_group(self.url, mode="r").attrs.asdict().get(layout.PROVENANCE)
        return dict(found) if isinstance(found, dict) else None

    def at(self, level: int) -> Volume:
        """Another level of the same image.

        Raises:
            InputError: there is no such level.
        """
        return self if level == self.level else _open_level(self.url, self.multiscale, level)

    def read(self, region: Region, channels: Sequence[int] = (0,)) -> NDArray[Any]:
        """The voxels of `region` (t, z, y, x), which must lie inside: shape (c, t, z, y, x).

        Raises:
            UsageError: the region or a channel lies outside.
            BadChunkError: a chunk cannot be decoded; names it.
            OSError: the store does not let it be read.
        """
        self.check_inside(region)
        self._check_channels(channels)
        first, stop = min(channels), max(channels) + 1
        if list(channels) == list(range(first, stop)):
            return self._read_run(region, first, stop)
        return np.concatenate([self._read_run(region, c, c + 1) for c in channels])

    def check_inside(self, region: Region) -> None:
        """Refuse a region that is not a box of voxels of this volume.

        Raises:
            UsageError: it has other axes, lies outside, or ends before it starts.
        """
        inside = len(region.start) == 4 and all(
            0 <= a <= b <= n for a, b, n in zip(region.start, region.stop, self.shape, strict=True)
        )
        if not inside:
            raise UsageError(
                f"region {region} is not inside {self.url}, whose shape (t, z, y, x) is "
                f"{self.shape}: give a region inside it"
            )

    def write(self, region: Region, data: NDArray[Any]) -> None:
        """Store `data` (c, t, z, y, x; all channels, the exact dtype) at `region`, durably.

        Raises:
            OutputError: the region cuts through a write unit, dtype or shape differ from the
                array's, or the store cannot be written.
        """
        self.check_inside(region)
        self._check_write(region, data)
        try:
            start = [s.start for s in self._selection(region, 0, self.n_channels)]
            self._writer.write(start, self._as_stored(data))
        except OSError as error:
            raise OutputError(
                f"block {region} of {self.url} cannot be written: {error.strerror or error}; "
                "check rights and space, then run again"
            ) from error

    def dask(self, channels: Sequence[int] | None = None) -> da.Array:
        """A lazy view (c, t, z, y, x) of some channels, all by default.

        Its chunks are write units; in what bigseg segmented the cores of the blocks, whole write
        units too.
        """
        import dask.array as da  # half a second that commands without Dask save

        chosen = tuple(range(self.n_channels) if channels is None else channels)
        self._check_channels(chosen)
        unit = (len(chosen), *(self._core or self.write_unit))
        view = LazyView((len(chosen), *self.shape), self.dtype, self.read, chosen)
        return da.from_array(view, chunks=unit, name=False, asarray=False, fancy=False)

    def label_names(self) -> tuple[str, ...]:
        """The label images that the image lists: the finished ones."""
        return layout.listed_labels(self.url)

    def label(self, name: str) -> Volume:
        """The label image `name`, at its level of the same extent as this one.

        Raises:
            InputError: it is not listed; names those that are.
        """
        names = self.label_names()
        if name not in names:
            listed = f"there are: {', '.join(names)}" if names else "there are none"
            raise InputError(
                f"labels {name!r} not found in {self.url}; {listed}: give one of those"
            )
        label = open_volume(store.join(self.url, "labels", name))
        order = sorted(range(label.n_levels), key=lambda i: i != self.level)
        same = (i for i in order if label.at(i).shape[1:] == self.shape[1:])
        return label.at(next(same, min(self.level, label.n_levels - 1)))

    @property
    def _core(self) -> Vec | None:
        """The core of the blocks that wrote this level, where its maker says so."""
        core = (self.provenance or {}).get("core") if self.level == 0 else None
        fits = (
            isinstance(core, list)
            and len(core) == len(self.write_unit)
            and all(
                isinstance(c, int) and c > 0 and (c % u == 0 or c >= n)
                for c, u, n in zip(core, self.write_unit, self.shape, strict=True)
            )
        )
        return tuple(core) if fits and core else None

    @functools.cached_property
    def _writer(self) -> UnitWriter:
        return UnitWriter(self.array)

    def _place(self, values: Sequence[int]) -> Vec:
        return tuple(int(self.multiscale.along(name, values, absent=1)) for name in layout.PLACE)

    def _scale_of(self, level: int) -> tuple[float, ...]:
        scale = self.multiscale.levels[level].scale
        return tuple(self.multiscale.along(name, scale, absent=1.0) for name in layout.PLACE)

    def _selection(self, region: Region, first: int, stop: int) -> tuple[slice, ...]:
        by_name = dict(zip(layout.PLACE, region.slices, strict=True), c=slice(first, stop))
        return tuple(by_name[name] for name in self.multiscale.axis_names)

    def _read_run(self, region: Region, first: int, stop: int) -> NDArray[Any]:
        stored = read_box(self.array, self._selection(region, first, stop), self._meet)
        names = self.multiscale.axis_names
        data = stored.transpose([names.index(n) for n in CANONICAL if n in names])
        absent = [i for i, n in enumerate(CANONICAL) if n not in names]
        return np.ascontiguousarray(np.expand_dims(data, absent), dtype=self.dtype)

    def _meet(self, bad: BadChunk) -> None:
        raise BadChunkError(f"{self._sentence(bad)}: restore it from a copy")

    def _sentence(self, bad: BadChunk) -> str:
        return f"chunk {self._key(bad)} of {self.url} cannot be decoded ({bad.reason})"

    def _key(self, bad: BadChunk) -> str:
        return f"{self.multiscale.levels[self.level].path}/{bad.key}"

    def _as_stored(self, data: NDArray[Any]) -> NDArray[Any]:
        names = self.multiscale.axis_names
        present = [n for n in CANONICAL if n in names]
        data = data[tuple(slice(None) if n in names else 0 for n in CANONICAL)]
        return data.transpose([present.index(n) for n in names])

    def _check_channels(self, channels: Sequence[int]) -> None:
        if not channels or not all(0 <= c < self.n_channels for c in channels):
            named = ", ".join(f"{i} ({n})" for i, n in enumerate(self.channel_names[:20]))
            raise UsageError(
                f"channels {tuple(channels)} are not all in {self.url}; it has {named}: "
                "choose among those"
            )

    def _check_write(self, region: Region, data: NDArray[Any]) -> None:
        aligned = all(
            a % u == 0 and (b % u == 0 or b == n)
            for a, b, u, n in zip(
                region.start, region.stop, self.write_unit, self.shape, strict=True
            )
        )
        if not aligned:
            raise OutputError(
                f"block {region} cuts through write units {self.write_unit} of {self.url}; two "
                "writers would share an object: write whole units"
            )
        wanted = (self.n_channels, *region.shape)
        if data.shape != wanted or data.dtype != self.dtype:
            raise OutputError(
                f"data of shape {data.shape} and type {data.dtype} do not fit block {region} of "
                f"{self.url}, which takes {wanted} and {self.dtype}: convert them first"
            )


def open_volume(url: str, *, level: int = 0) -> Volume:
    """The image at `url` (or a label image, URL/labels/NAME) at one of its levels, to be read.

    Raises:
        InputNotFoundError: there is nothing.
        NotOmeZarrError: there is something else; says what, and what to give instead.
        InputError: there is no such level, or its array cannot be used.
    """
    url = url.rstrip("/") or url
    try:
        group = store.open_group(url, mode="r")
    except InputNotFoundError:
        raise InputNotFoundError(f"no such image: {url}; check the path") from None
    except NotOmeZarrError:
        refuse_level(url)
        raise
    return _open_level(url, ngff.parse_multiscale(group.attrs.asdict(), where=url), level)


def nearest_level(volume: Volume, voxel_um: Sequence[float], *, tolerance: float = 1.5) -> int:
    """The level whose voxels are nearest to `voxel_um` (along z, y, x or y, x).

    Raises:
        InputError: the image has no units of length, or its nearest level is more than a factor
            `tolerance` away along some axis.
    """
    sizes = [volume.multiscale.voxel_um(level) for level in range(volume.n_levels)]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        raise InputError(
            f"{volume.url} has no voxel size in units of length, the model has "
            f"{format_um(voxel_um)}: choose a level with `--level`"
        )
    return nearest_size(known, voxel_um, tolerance=tolerance, where=volume.url)


def create_pyramid(source: Volume, url: str, spec: OutputSpec, *, name: str) -> Volume:
    """An empty image at `url` with the extent of `source` at its level and all coarser ones.

    Shapes, scales, offsets and units are the source's. Version 0.4 beside a 0.4 image, else 0.5.
    It is not listed in `labels`. What an earlier creation, killed half-way, left is replaced.

    Raises:
        OutputError: there is something at `url`, or it cannot be written.
        UsageError: a label image beside the image would have fewer levels than the image.
    """
    url = url.rstrip("/")
    beside = layout.path_to_image(source.url, url)
    if beside is not None and source.level:
        raise UsageError(
            f"labels from level {source.level} cannot lie in {source.url}, where they must have "
            "all its levels: give an output of their own"
        )
    volumes = [source.at(level) for level in range(source.level, source.n_levels)]
    ms = layout.output_multiscale(source.multiscale, spec, name=name, first_level=source.level)
    array = layout.create_image(url, ms, [v.shape for v in volumes], spec, source=beside)
    return Volume(url, ms, 0, array)


def _open_level(url: str, multiscale: Multiscale, level: int) -> Volume:
    if not 0 <= level < len(multiscale.levels):
        there = ", ".join(map(str, range(len(multiscale.levels))))
        raise InputError(f"{url} has no level {level}; it has {there}: choose one with `--level`")
    path = store.join(url, multiscale.levels[level].path)
    try:
        array = store.open_array(path, mode="r")
    except InputNotFoundError:
        raise InputNotFoundError(
            f"level {level} of {url} is listed, but its array {path} is missing: copy the image "
            "again"
        ) from None
    check_array(array, multiscale, path)
    return Volume(url, multiscale, level, array)
