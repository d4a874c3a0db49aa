"""TIFF, PNG and HDF5 to OME-Zarr, in pieces that fit a memory.

    convert(["stack.tif"], "image.ome.zarr")                        an image with a mean pyramid
    convert(["cells.tif"], "image.ome.zarr", labels="cells")        labels beside it, by majority

The metadata are written last, so an image cut short is no image, and the next conversion replaces
it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

import bigseg
from bigseg import layout, store
from bigseg.blocks import BlockGrid, Region, Vec, ceil_div
from bigseg.errors import InputError, OutputError, UsageError
from bigseg.levels import plan_chunks, plan_levels
from bigseg.ngff import AXIS_TYPES, UNIT_TO_UM, Axis, Level, Multiscale
from bigseg.progress import NullProgress
from bigseg.pyramid import downsample, level_rule, source_region
from bigseg.sources import DEFAULT_AXES, Source, open_source
from bigseg.units import canonical_unit
from bigseg.volume import CANONICAL, OutputSpec, Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from bigseg.progress import Progress
    from bigseg.pyramid import Method

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**29


@dataclass(frozen=True)
class Conversion:
    """What the user says about a conversion; None leaves it to the files.

    `axes` name the axes of the array that the files form (`zyx`); without, the files' metadata
    do, else their number does (yx, zyx, czyx, tczyx). `voxel_size` is along the spatial axes, in
    `unit`; without, the files' metadata say it, if they do. With `labels`, what is made are labels
    of this name beside an image that is there.
    """

    labels: str | None = None
    axes: str | None = None
    voxel_size: Sequence[float] | None = None
    unit: str = "micrometer"
    version: Literal["0.4", "0.5"] = "0.5"
    overwrite: bool = False


def convert(
    sources: Sequence[str],
    out: str,
    *,
    labels: str | None = None,
    axes: str | None = None,
    voxel_size: Sequence[float] | None = None,
    unit: str = "micrometer",
    version: Literal["0.4", "0.5"] = "0.5",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Volume:
    """The image that the files form, at `out`; with `labels`, labels of the image that is there.

    The options are those of `Conversion`; raises like `convert_as`.
    """
    wanted = Conversion(labels, axes, voxel_size, unit, version, overwrite)
    return convert_as(wanted, sources, out, progress=progress)


def warn_without_size(name: str) -> None:
    """Say that a file states no voxel size."""
    log.warning("%s states no voxel size: give one with --voxel-size", name)


def convert_as(
    wanted: Conversion,
    sources: Sequence[str],
    out: str,
    *,
    progress: Progress | None = None,
    without_size: Callable[[str], None] = warn_without_size,
) -> Volume:
    """The image, or labels, that the files form; `without_size` hears of an unknown voxel size.

    Raises:
        InputError: a file cannot be used, or labels are no integers or of another shape than the
            image.
        UsageError: axes, voxel size or unit make no sense.
        OutputError: `out` exists, or was not made by bigseg, or cannot be written.
    """
    source = open_source(sources)
    try:
        placed = _Placed(source, _resolve_axes(source, wanted.axes))
        _check_type(placed)
        if wanted.labels is None:
            scale = _resolve_scale(placed, wanted.voxel_size, wanted.unit)
            if scale[1] is None:
                without_size(placed.name)
            job = _image_job(placed, out.rstrip("/"), scale, wanted.version)
        elif wanted.voxel_size is not None:
            raise UsageError("labels have the voxel size of their image: leave out --voxel-size")
        else:
            job = _labels_job(placed, out.rstrip("/"), wanted.labels)
        return _carry_out(job, placed, overwrite=wanted.overwrite, progress=progress)
    finally:
        source.close()


@dataclass(frozen=True)
class _Placed:
    """A source seen as (c, t, z, y, x)."""

    source: Source
    axes: str

    @property
    def shape(self) -> Vec:
        """Along t, z, y, x."""
        return tuple(self._length(name) for name in layout.PLACE)

    @property
    def n_channels(self) -> int:
        return self._length("c")

    @property
    def name(self) -> str:
        return self.source.name

    def read(self, region: Region) -> NDArray[Any]:
        by_name = dict(zip(layout.PLACE, region.slices, strict=True), c=slice(0, self.n_channels))
        data = self.source.read(tuple(by_name[name] for name in self.axes))
        data = data.transpose([self.axes.index(n) for n in CANONICAL if n in self.axes])
        absent = [i for i, n in enumerate(CANONICAL) if n not in self.axes]
        return np.expand_dims(data, absent)

    def _length(self, name: str) -> int:
        return self.source.shape[self.axes.index(name)] if name in self.axes else 1


@dataclass(frozen=True)
class _Job:
    """All that is decided before the first voxel is read."""

    url: str
    multiscale: Multiscale
    shapes: tuple[Vec, ...]
    spec: OutputSpec
    method: Method
    image_url: str | None  # of the image that labels belong to
    label_name: str = ""


def _image_job(
    placed: _Placed,
    out: str,
    scale: tuple[dict[str, float], str | None],
    version: Literal["0.4", "0.5"],
) -> _Job:
    sizes, unit = scale
    axes = "".join(name for name in "tczyx" if name in placed.axes)
    shapes, factors = plan_levels(placed.shape, [sizes.get(a, 1.0) for a in "zyx"])
    levels = []
    for i, factor in enumerate(factors):
        f = dict(zip(layout.PLACE, factor, strict=True))
        steps = [sizes.get(a, 1.0) * f.get(a, 1) for a in axes]
        # The centre of a coarse voxel is the centre of the fine ones that it is the mean of.
        offsets = [(f.get(a, 1) - 1) / 2 * sizes.get(a, 1.0) for a in axes]
        levels.append(Level(str(i), tuple(steps), tuple(offsets)))
    channels = tuple(map(str, range(placed.n_channels))) if "c" in axes else ()
    named = (Axis(a, AXIS_TYPES[a], unit if a in "zyx" else None) for a in axes)
    name = store.name_of(out).removesuffix(".zarr").removesuffix(".ome")
    multiscale = Multiscale(version, name, tuple(named), tuple(levels), channels, is_label=False)
    dtype = np.dtype("uint8") if placed.source.dtype.kind == "b" else placed.source.dtype
    chunk, shard = plan_chunks(placed.shape, placed.n_channels * dtype.itemsize)
    spec = OutputSpec(
        dtype, chunk, shard if version == "0.5" else None, channels, _provenance(placed)
    )
    return _Job(out, multiscale, shapes, spec, "mean", None)


def _labels_job(placed: _Placed, image_url: str, name: str) -> _Job:
    image = open_volume(image_url)
    if placed.n_channels != 1 or placed.shape != image.shape:
        raise InputError(
            f"labels {placed.name} have the shape {_shape_text(placed.shape, placed.n_channels)}, "
            f"image {image_url} has {_shape_text(image.shape)}; they must be equal: give the "
            "labels of this image, or name their axes with --axes"
        )
    shapes = tuple(image.at(level).shape for level in range(image.n_levels))
    dtype = _label_type(placed)
    chunk, shard = plan_chunks(placed.shape, placed.n_channels * dtype.itemsize)
    shard = None if image.multiscale.version == "0.4" else shard
    spec = OutputSpec(dtype, chunk, shard, (), _provenance(placed))
    multiscale = layout.output_multiscale(image.multiscale, spec, name=name, first_level=0)
    url = store.join(image_url, "labels", name)
    return _Job(url, multiscale, shapes, spec, "mode", image_url, name)


def _carry_out(job: _Job, placed: _Placed, *, overwrite: bool, progress: Progress | None) -> Volume:
    if overwrite:
        _make_room(job)
    array = layout.create_arrays(job.url, job.multiscale, job.shapes, job.spec)
    volume = Volume(job.url, job.multiscale, 0, array)
    grids = [_blocks(volume.at(level)) for level in range(volume.n_levels)]
    total = sum(map(len, grids))
    with (progress or NullProgress()).task("convert", total=total, unit="blocks") as task:
        for level, grid in enumerate(grids):
            for _ in _fill_level(volume, level, grid, placed, job):
                task.advance()
    beside = None if job.image_url is None else layout.path_to_image(job.image_url, job.url)
    windows = _windows(volume) if volume.multiscale.channels else ()
    layout.publish(job.url, job.multiscale, job.spec, source=beside, windows=windows)
    if job.image_url is not None:
        layout.list_label(job.image_url, job.label_name)
    return open_volume(job.url)


def _fill_level(
    volume: Volume, level: int, grid: BlockGrid, placed: _Placed, job: _Job
) -> Iterator[None]:
    """Write one level, from the source or from the level before; yields after each block."""
    target = volume.at(level)
    fine = volume.at(level - 1) if level else target
    lengths: dict[str, Any] = {"fine_shape": fine.shape, "coarse_shape": target.shape}
    lengths["rule"] = level_rule(
        fine.shape, target.shape, fine_scale=fine.scale, coarse_scale=target.scale
    )
    for block in grid:
        if level:
            needed = source_region(block.core, **lengths)
            data = fine.read(needed, range(fine.n_channels))
            data = downsample(data, block.core, **lengths, method=job.method)
        else:
            data = placed.read(block.core).astype(target.dtype, copy=False)
        target.write(block.core, data)
        yield


def _blocks(volume: Volume) -> BlockGrid:
    """Blocks of whole write units, grown along x, then y, as far as memory allows.

    Whole planes first, because pages of most files can only be decoded whole.
    """
    core = list(volume.write_unit)
    n_bytes = volume.dtype.itemsize * volume.n_channels
    for n in core:
        n_bytes *= n
    for axis in (3, 2):
        units = ceil_div(volume.shape[axis], core[axis])
        times = max(1, min(units, BLOCK_BYTES // n_bytes))
        core[axis] *= times
        n_bytes *= times
    return BlockGrid(Region.of_shape(volume.shape), tuple(core))


def _resolve_axes(source: Source, axes: str | None) -> str:
    n = len(source.shape)
    found = axes if axes is not None else source.axes or DEFAULT_AXES.get(n, "")
    found = found.lower()
    if not axes and len(found) != n:
        raise UsageError(
            f"{source.name} has the shape {source.shape}, whose axes are unknown: name them with "
            "--axes, such as zyx"
        )
    wrong = len(found) != n or len(set(found)) != n or not {"y", "x"} <= set(found) <= set("tczyx")
    if wrong:
        raise UsageError(
            f"axes {found!r} do not fit {source.name} of shape {source.shape}: give {n} different "
            "letters of t, c, z, y, x, with y and x among them"
        )
    return found


def _check_type(placed: _Placed) -> None:
    dtype = placed.source.dtype
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or 0 in placed.source.shape:
        raise InputError(
            f"{placed.name} is {placed.source.shape} {dtype}; bigseg takes integers, booleans and "
            "floating-point numbers up to 64 bits, not empty: convert it first"
        )


def _resolve_scale(
    placed: _Placed, voxel_size: Sequence[float] | None, unit: str
) -> tuple[dict[str, float], str | None]:
    """Voxel size of each spatial axis, and their unit; ones without unit where nothing is known."""
    spatial = [name for name in "zyx" if name in placed.axes]
    if voxel_size is None:
        found = {a: s for a, s in placed.source.voxel_um.items() if a in spatial}
        if len(found) == len(spatial):
            return found, "micrometer"
        return {}, None
    named = canonical_unit(unit)
    if named not in UNIT_TO_UM:
        raise UsageError(f"unit {unit!r} is no unit of length: give one such as micrometer")
    if len(voxel_size) != len(spatial) or not all(0 < s < float("inf") for s in voxel_size):
        raise UsageError(
            f"voxel size {tuple(voxel_size)} for {placed.name}: give {len(spatial)} positive "
            f"numbers, along {', '.join(spatial)}"
        )
    return dict(zip(spatial, map(float, voxel_size), strict=True)), named


def _label_type(placed: _Placed) -> np.dtype[Any]:
    """Unsigned types stay; bool becomes uint8, signed the smallest unsigned type that fits."""
    dtype = placed.source.dtype
    if dtype.kind == "b":
        return np.dtype("uint8")
    if dtype.kind == "u":
        return dtype
    if dtype.kind != "i":
        raise InputError(
            f"labels {placed.name} are {dtype}; labels are integers: round them, or convert them "
            "as an image"
        )
    low = high = 0
    for block in BlockGrid(Region.of_shape(placed.shape), (1, 1, *placed.shape[2:])):
        data = placed.read(block.core)
        low, high = min(low, int(data.min())), max(high, int(data.max()))
    if low < 0:
        raise InputError(
            f"labels {placed.name} hold {low}; labels are not negative: give the voxels to leave "
            "out a number of their own"
        )
    return np.min_scalar_type(high)


def _make_room(job: _Job) -> None:
    """Delete an earlier result at the same place, if bigseg made all of it."""
    if not store.exists(job.url) or store.is_empty(job.url):
        return
    attributes = store.open_group(job.url, mode="r").attrs.asdict()
    if layout.PROVENANCE not in attributes:
        raise OutputError(
            f"{job.url} was not made by bigseg, so it is not overwritten: delete it yourself or "
            "give another name"
        )
    within = layout.listed_labels(job.url)
    if within:
        raise OutputError(
            f"{job.url} holds the labels {', '.join(within)}, which would be lost: delete it "
            "yourself or give another name"
        )
    if job.image_url is not None:
        layout.unlist_label(job.image_url, job.label_name)
    store.remove(job.url)


def _windows(volume: Volume) -> list[tuple[float, float]]:
    """What viewers show of each channel: its central 99.8 % in the middle of the coarsest level."""
    coarse = volume.at(volume.n_levels - 1)
    start = tuple(max(0, n // 2 - 128) for n in coarse.shape)
    stop = tuple(min(n, a + 256) for n, a in zip(coarse.shape, start, strict=True))
    region = Region((0, *start[1:]), (1, *stop[1:]))
    found = []
    for channel in range(coarse.n_channels):
        data = coarse.read(region, (channel,)).astype(np.float64)
        data = data[np.isfinite(data)]
        low, high = np.percentile(data, [0.1, 99.9]) if data.size else (0.0, 1.0)
        found.append((float(low), float(high) if high > low else float(low) + 1))
    return found


def _provenance(placed: _Placed) -> dict[str, Any]:
    return {
        "version": bigseg.__version__,
        "command": "convert",
        "source": store.name_of(placed.name),
    }


def _shape_text(shape: Vec, n_channels: int = 1) -> str:
    """Without leading ones: 24×512×512."""
    kept = list(shape)
    while len(kept) > 2 and kept[0] == 1:
        kept.pop(0)
    return "×".join(map(str, kept)) + (f" with {n_channels} channels" if n_channels > 1 else "")
