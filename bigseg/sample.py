"""A labelled sample to try everything on: synthetic tissue as an OME-Zarr image of any size.

    URL/                 uint8, axes z,y,x or y,x, micrometer, with a mean pyramid
      labels/cells/      the true cells (0 is background), with a majority pyramid
      labels/tissue/     0 background, 1 inside of a cell, 2 border between or around cells

The tissue is rendered core by core, so memory does not grow with the volume, and the same seed,
shape and voxel size give the same bytes. `labels` lists `cells` when everything is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bigseg import layout, ngff, store
from bigseg.blocks import BlockGrid, Region, ceil_div
from bigseg.errors import InputError, OutputError, UsageError
from bigseg.progress import NullProgress
from bigseg.pyramid import downsample, level_rule, source_region
from bigseg.targets import boundary, boundary_margin_vox, class_names
from bigseg.tissue import Tissue
from bigseg.volume import OutputSpec, Volume, create_pyramid, list_label, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bigseg.blocks import Vec
    from bigseg.progress import Progress, Task
    from bigseg.pyramid import Method

CELLS = "cells"
TISSUE = "tissue"
BORDER_VOX = 2.0
SHAPE: Vec = (64, 256, 256)
VOXEL_UM = {3: (1.0, 0.5, 0.5), 2: (0.5, 0.5)}

CHUNK = {3: (64, 64, 64), 2: (1, 256, 256)}
CORE = {3: (64, 128, 128), 2: (1, 512, 512)}  # voxels rendered at a time; whole chunks
COARSEST = 128  # the longest axis of the coarsest level is not longer,
MAX_LEVELS = 5  # unless that takes more levels than these
SMALLEST = 8  # voxels along an axis; smaller samples show nothing


def make_sample(
    url: str,
    *,
    shape: Sequence[int] = SHAPE,
    seed: int = 0,
    voxel_um: Sequence[float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Volume:
    """The image of synthetic cells written to `url`, with its labels 'cells' beside it.

    `shape` and `voxel_um` (default 1 × 0.5 × 0.5 micrometer) go along z, y, x, or y, x for a
    single section. `overwrite` replaces an earlier sample, and nothing else.

    Raises:
        UsageError: a shape, voxel size or seed that no sample can have.
        OutputError: there is something at `url`, or it cannot be written.
    """
    shape, voxel_um = _checked(shape, voxel_um, seed)
    if overwrite:
        _remove_sample(url)
    tissue = _tissue(seed, shape, voxel_um)
    image = _create_image(url, tissue, shape, voxel_um)
    labels = _create_labels(image, CELLS, tissue.label_dtype)
    classes = _create_labels(image, TISSUE, np.dtype(np.uint8), class_names("instances"))
    shapes = [image.at(level).shape for level in range(image.n_levels)]
    grids = [_grid(level_shape, len(shape)) for level_shape in shapes]
    progress = progress or NullProgress()
    with progress.task("sample", total=3 * sum(map(len, grids)), unit="blocks") as task:
        _render(tissue, grids[0], image=image, labels=labels, task=task)
        for level, grid in enumerate(grids[1:], start=1):
            _fill_level(image, level, grid, method="mean", task=task)
            _fill_level(labels, level, grid, method="mode", task=task)
        _classify(labels, classes, grids[0], voxel_um, task=task)
        for level, grid in enumerate(grids[1:], start=1):
            _fill_level(classes, level, grid, method="mode", task=task)
    list_label(image.url, CELLS)
    list_label(image.url, TISSUE)
    return open_volume(image.url)


def _checked(
    shape: Sequence[int], voxel_um: Sequence[float] | None, seed: int
) -> tuple[Vec, tuple[float, ...]]:
    if len(shape) not in VOXEL_UM or min(shape) < SMALLEST:
        raise UsageError(
            f"shape {tuple(shape)} makes no sample: give 3 numbers (z, y, x) or 2 (y, x) of at "
            f"least {SMALLEST} voxels"
        )
    size = VOXEL_UM[len(shape)] if voxel_um is None else voxel_um
    if len(size) != len(shape) or not all(0.05 <= s <= 5 for s in size):
        raise UsageError(
            f"voxel size {tuple(size)} does not fit shape {tuple(shape)}: give {len(shape)} "
            "numbers from 0.05 to 5 micrometer; the cells are about 10 micrometer wide"
        )
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed} is not from 0 to 2**32 - 1: choose one that is")
    return tuple(map(int, shape)), tuple(map(float, size))


def _remove_sample(url: str) -> None:
    if not store.exists(url):
        return
    try:
        provenance = store.open_group(url, mode="r").attrs.asdict().get(layout.PROVENANCE)
    except InputError:
        provenance = None
    if not isinstance(provenance, dict) or "sample" not in provenance:
        raise OutputError(f"{url} exists and is no sample of bigseg's: give another name")
    store.remove(url)


def _tissue(seed: int, shape: Vec, voxel_um: tuple[float, ...]) -> Tissue:
    """The tissue of a volume, or of one section of it."""
    z, z_um = (shape[0], voxel_um[0]) if len(shape) == 3 else (1, min(voxel_um))
    return Tissue(seed, (z, shape[-2], shape[-1]), (z_um, voxel_um[-2], voxel_um[-1]))


def _create_image(url: str, tissue: Tissue, shape: Vec, voxel_um: tuple[float, ...]) -> Volume:
    factors = _pyramid_factors(shape, voxel_um)
    axes = tuple(ngff.Axis(a, "space", "micrometer") for a in "zyx"[-len(shape) :])
    levels = tuple(_level(i, voxel_um, f) for i, f in enumerate(factors))
    ms = ngff.Multiscale(
        version="0.5", name="sample", axes=axes, levels=levels, channels=(), is_label=False
    )
    shapes = [(1,) * (4 - len(shape)) + _coarse(shape, f) for f in factors]
    made = {"sample": {"seed": tissue.seed, "shape": shape, "voxel_um": voxel_um}}
    spec = _spec(np.dtype(np.uint8), len(shape), made)
    array = layout.create_image(url.rstrip("/"), ms, shapes, spec, source=None)
    return Volume(url.rstrip("/"), ms, 0, array)


def _create_labels(
    image: Volume, name: str, dtype: np.dtype[Any], classes: tuple[str, ...] = ()
) -> Volume:
    made = {"sample": {"truth": True}}
    spec = _spec(dtype, len(image.spatial_axes), made, classes)
    return create_pyramid(image, store.join(image.url, "labels", name), spec, name=name)


def _spec(
    dtype: np.dtype[Any], dims: int, made: dict[str, Any], classes: tuple[str, ...] = ()
) -> OutputSpec:
    chunk = (1,) * (4 - len(CHUNK[dims])) + CHUNK[dims]
    return OutputSpec(
        dtype=dtype,
        chunk=chunk,
        shard=None,
        channel_names=(),
        provenance=made,
        class_names=classes,
    )


def _pyramid_factors(shape: Vec, voxel_um: tuple[float, ...]) -> list[Vec]:
    """For each level how many voxels of level 0 one of its voxels spans along each axis.

    An axis is halved when its voxels are shorter than twice the shortest.
    """
    factors: list[Vec] = [(1,) * len(shape)]
    while len(factors) < MAX_LEVELS and max(_coarse(shape, factors[-1])) > COARSEST:
        size = [v * f for v, f in zip(voxel_um, factors[-1], strict=True)]
        halved = [s < 2 * min(size) * (1 - 1e-3) for s in size]
        factors.append(tuple(f * (1 + h) for f, h in zip(factors[-1], halved, strict=True)))
    return factors


def _coarse(shape: Vec, factors: Vec) -> Vec:
    return tuple(ceil_div(n, f) for n, f in zip(shape, factors, strict=True))


def _level(index: int, voxel_um: tuple[float, ...], factors: Vec) -> ngff.Level:
    """A level whose first voxel is centred on the middle of the window that it averages."""
    scale = tuple(v * f for v, f in zip(voxel_um, factors, strict=True))
    offset = tuple(v * (f - 1) / 2 for v, f in zip(voxel_um, factors, strict=True))
    return ngff.Level(str(index), scale, offset)


def _grid(shape: Vec, dims: int) -> BlockGrid:
    return BlockGrid(Region.of_shape(shape), (1,) * (4 - len(CORE[dims])) + CORE[dims])


def _render(tissue: Tissue, grid: BlockGrid, *, image: Volume, labels: Volume, task: Task) -> None:
    for block in grid:
        core = block.core
        light, cells = tissue.render(Region(core.start[1:], core.stop[1:]))
        image.write(core, light[None, None])
        labels.write(core, cells[None, None])
        task.advance(2, voxels=core.n_voxels)


def _classify(
    cells: Volume, classes: Volume, grid: BlockGrid, voxel_um: tuple[float, ...], *, task: Task
) -> None:
    """Background, inside and border of the cells; each block sees as far as a border reaches."""
    dims = len(voxel_um)
    margin = (0,) * (4 - dims) + boundary_margin_vox(BORDER_VOX, voxel_um)
    for block in grid:
        grown = block.core.grow(margin, margin).intersect(Region.of_shape(cells.shape))
        around = cells.read(grown)[0, 0].reshape(grown.shape[-dims:])
        found = boundary(around, border_vox=BORDER_VOX, voxel_size=voxel_um).reshape(grown.shape)
        core = found[block.core.relative_to(grown.start).slices].astype(np.uint8)
        classes.write(block.core, core[None])
        task.advance(voxels=block.core.n_voxels)


def _fill_level(volume: Volume, level: int, grid: BlockGrid, *, method: Method, task: Task) -> None:
    fine, coarse = volume.at(level - 1), volume.at(level)
    rule = level_rule(fine.shape, coarse.shape, fine_scale=fine.scale, coarse_scale=coarse.scale)
    for block in grid:
        source = source_region(
            block.core, fine_shape=fine.shape, coarse_shape=coarse.shape, rule=rule
        )
        data = downsample(
            fine.read(source),
            block.core,
            fine_shape=fine.shape,
            coarse_shape=coarse.shape,
            rule=rule,
            method=method,
        )
        coarse.write(block.core, data)
        task.advance()
