"""A picture of one plane to judge a result by: raw | truth | result | both, side by side, as PNG.

Objects get a colour that depends on their number alone, so that the same object looks the same in
every picture; classes get the colours of a fixed palette; probabilities go from dark to yellow.
Background is black in a panel and transparent over the raw image.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bigseg import store
from bigseg.blocks import BlockGrid, Region, ceil_div
from bigseg.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bigseg.blocks import Vec
    from bigseg.volume import Volume

    Pixels = NDArray[np.uint8]  # (y, x, 3)

Kind = Literal["auto", "objects", "classes", "probability"]

LARGEST_PX = 2048  # of the picture along an axis
SMALLEST_PANEL_PX = 512
GAP_PX = 8
CAPTION_PX = 18
RESULT_PANELS = 3  # raw, result, overlay
CONTRAST = (1.0, 99.8)  # percentiles shown as black and white
OPACITY = 0.45
PIECE_VOXELS = 1 << 24  # decoded at a time, or one chunk
SUFFIXES = (".ome.zarr", ".zarr")

# Okabe & Ito 2008, told apart by colour-blind people too; class 0 is background.
PALETTE = np.array(
    [
        (0, 0, 0),
        (0, 158, 115),
        (230, 159, 0),
        (86, 180, 233),
        (213, 94, 0),
        (204, 121, 167),
        (240, 228, 66),
        (0, 114, 178),
        (255, 255, 255),
    ],
    np.uint8,
)


def save_overlay(
    path: str,
    raw: NDArray[Any],
    result: NDArray[Any],
    truth: NDArray[Any] | None = None,
    *,
    kind: Kind = "auto",
) -> None:
    """A PNG at `path` (any location) with the planes `raw`, `truth`, `result`, all (y, x).

    `kind` says what `result` is. `auto`: floats are probabilities, and so are bytes above 8; other
    integers are classes up to 8 and objects above. Small planes are enlarged, large ones reduced.

    Raises:
        UsageError: a plane is not two-dimensional, or their shapes differ.
        OutputError: it cannot be written.
    """
    planes = {"raw": raw, "truth": truth, "result": result}
    given = {name: plane for name, plane in planes.items() if plane is not None}
    _check_shapes(given)
    step = _step(raw.shape, n_panels=len(given) + 1)
    thinned = {name: plane[::step, ::step] for name, plane in given.items()}
    kind = _kind_of(result, kind)
    panels = {"raw": _grey(thinned["raw"])}
    if truth is not None:
        many = truth.max(initial=0) >= len(PALETTE)
        panels["truth"] = _coloured(thinned["truth"], "objects" if many else "classes")
    panels[f"result ({kind})"] = coloured = _coloured(thinned["result"], kind)
    panels["overlay"] = _blend(panels["raw"], coloured)
    buffer = io.BytesIO()
    _side_by_side(panels).save(buffer, format="PNG")
    store.write_atomic(path, buffer.getvalue())


def save_result_picture(
    source: Volume, result: Volume, region: Region, *, channel: int, kind: Kind
) -> str:
    """A PNG of the plane in the middle of `region` (t, z, y, x): raw, result, overlay.

    It lies beside the image and carries the result's name (or beside the result, where that is a
    store of its own); for remote stores in the working directory. Returns its location. Of several
    result channels the second is shown: the first is background.

    Both volumes have the same extent. Of planes with many more voxels than the picture has pixels a
    coarser level is read where both have it, and of that every so many voxels, so that memory is
    bounded: `PIECE_VOXELS` decoded voxels, and of each volume less than 8 million that are shown.
    """
    source, result, plane = _for_picture(source, result, region)
    shown = min(1, result.n_channels - 1)
    path = _picture_path(source.url, result.url)
    save_overlay(
        path, _read_thinned(source, plane, channel), _read_thinned(result, plane, shown), kind=kind
    )
    return path


def _for_picture(source: Volume, result: Volume, region: Region) -> tuple[Volume, Volume, Region]:
    """The coarsest level with two voxels for each pixel, and the plane there that is shown."""
    finest = source.shape
    plane = _middle_of(region)
    while _step(plane.shape[-2:], n_panels=RESULT_PANELS) > 1:
        if min(v.n_levels - v.level for v in (source, result)) == 1:
            break
        coarser = source.at(source.level + 1), result.at(result.level + 1)
        smaller = _at_level(_middle_of(region), finest, coarser[0].shape)
        if coarser[0].shape != coarser[1].shape or not _is_enough(smaller.shape[-2:]):
            break
        (source, result), plane = coarser, smaller
    return source, result, plane


def _middle_of(region: Region) -> Region:
    """Its plane (y, x) in the middle of t and z."""
    t, z = ((a + b) // 2 for a, b in zip(region.start[:2], region.stop[:2], strict=True))
    return Region((t, z, *region.start[2:]), (t + 1, z + 1, *region.stop[2:]))


def _at_level(plane: Region, shape: Vec, coarser: Vec) -> Region:
    """Where a plane of a level of `shape` lies in a coarser one."""
    lengths = list(zip(shape, coarser, strict=True))
    start = tuple(a * m // n for a, (n, m) in zip(plane.start, lengths, strict=True))
    stop = (ceil_div(b * m, n) for b, (n, m) in zip(plane.stop[2:], lengths[2:], strict=True))
    return Region(start, (start[0] + 1, start[1] + 1, *stop))


def _read_thinned(volume: Volume, plane: Region, channel: int) -> NDArray[Any]:
    """The voxels (y, x) of a plane that a picture shows: all, or every so many of a large one."""
    step = _step(plane.shape[2:], n_panels=RESULT_PANELS)
    thinned = np.zeros([ceil_div(n, step) for n in plane.shape[2:]], volume.dtype)
    for piece in BlockGrid(plane, _piece(volume, plane)):
        before = [a - b for a, b in zip(piece.core.start[2:], plane.start[2:], strict=True)]
        y, x = (-n % step for n in before)
        chosen = volume.read(piece.core, (channel,))[0, 0, 0, y::step, x::step]
        first = [ceil_div(n, step) for n in before]
        thinned[tuple(slice(a, a + n) for a, n in zip(first, chosen.shape, strict=True))] = chosen
    return thinned


def _piece(volume: Volume, plane: Region) -> Vec:
    """The whole chunks along y and x that are read together, as voxels (t, z, y, x)."""
    *_, y, x = volume.chunk_shape
    n_chunks = max(1, PIECE_VOXELS // math.prod(volume.array.chunks))
    # One more than the plane is long, because it can begin anywhere in a chunk.
    n_in_row = min(n_chunks, ceil_div(plane.shape[3], x) + 1)
    return (1, 1, y * (n_chunks // n_in_row), x * n_in_row)


def _picture_path(source_url: str, result_url: str) -> str:
    def stem(url: str) -> str:
        name = store.name_of(url)
        return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)

    if result_url.startswith(source_url):
        base, name = source_url, f"{stem(source_url)}.{store.name_of(result_url)}.png"
    else:
        base, name = result_url, f"{stem(result_url)}.png"
    return store.join(store.parent(base), name) if store.is_local(base) else name


def middle_plane(volume: Volume, *, channel: int = 0, most_px: int = 4096) -> NDArray[Any]:
    """The plane (y, x) in the middle of z and of time.

    From the finest level, beginning with that of `volume`, whose planes have at most `most_px`
    voxels along each axis; else from the coarsest.
    """
    while max(volume.shape[-2:]) > most_px and volume.level + 1 < volume.n_levels:
        volume = volume.at(volume.level + 1)
    t, z, y, x = volume.shape
    region = Region((t // 2, z // 2, 0, 0), (t // 2 + 1, z // 2 + 1, y, x))
    return np.asarray(volume.read(region, (channel,))[0, 0, 0])


def _check_shapes(planes: dict[str, NDArray[Any]]) -> None:
    shapes = {name: plane.shape for name, plane in planes.items()}
    raw = shapes["raw"]
    if len(raw) != 2 or 0 in raw or any(shape != raw for shape in shapes.values()):
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UsageError(
            f"planes {shown} do not lie on each other: give planes (y, x) of one shape"
        )


def _step(shape: tuple[int, ...], *, n_panels: int) -> int:
    """Take every how many-th voxel, so that at least two for each pixel are left to average."""
    panel = min(_panel_limit(n_panels))
    return max(1, max(shape) // (2 * panel))


def _is_enough(shape: tuple[int, ...]) -> bool:
    """Whether a result has two voxels for each pixel of its panel, along the longer axis."""
    return max(shape) >= 2 * min(_panel_limit(RESULT_PANELS))


def _panel_limit(n_panels: int) -> tuple[int, int]:
    """The largest height and width of a panel."""
    return LARGEST_PX - CAPTION_PX, (LARGEST_PX - GAP_PX * (n_panels - 1)) // n_panels


def _grey(raw: NDArray[Any]) -> Pixels:
    values = raw.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, CONTRAST) if finite.size else (0.0, 0.0)
    scaled = (np.nan_to_num(values, nan=low) - low) / max(float(high - low), 1e-12)
    grey = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _kind_of(plane: NDArray[Any], kind: Kind) -> Kind:
    if kind != "auto":
        return kind
    if plane.dtype.kind == "f":
        return "probability"
    if plane.max(initial=0) < len(PALETTE):
        return "classes"
    return "probability" if plane.dtype == np.uint8 else "objects"


def _coloured(plane: NDArray[Any], kind: Kind) -> Pixels:
    if kind == "probability":
        return _heat(plane)
    values, inverse = np.unique(plane, return_inverse=True)
    colours = _of_objects(values) if kind == "objects" else PALETTE[values % len(PALETTE)]
    colours[values == 0] = 0
    return np.asarray(colours[inverse.reshape(plane.shape)], np.uint8)


def _of_objects(numbers: NDArray[Any]) -> Pixels:
    """A bright colour for each number; the hues of consecutive numbers are far apart."""
    hashed = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio
    hue = (hashed >> np.uint64(40)) / 2.0**24 * 6
    bright = 0.75 + 0.25 * ((hashed >> np.uint64(20)) & np.uint64(3)) / 3.0
    pale = 0.35 * ((hashed >> np.uint64(22)) & np.uint64(3)) / 3.0
    distance = np.abs((hue[:, None] - np.array([0, 2, 4])) % 6 - 3)  # from the opposite hue
    pure = np.clip(distance - 1, 0, 1)
    mixed = bright[:, None] * (pale[:, None] + (1 - pale[:, None]) * pure)
    return np.asarray(np.rint(255 * mixed), np.uint8)


def _heat(plane: NDArray[Any]) -> Pixels:
    """Probabilities 0..1 (or bytes 0..255) from black over red to yellow."""
    p = plane / 255 if plane.dtype.kind in "iu" else np.nan_to_num(plane.astype(np.float32))
    ramps = np.stack([1.6 * p, 1.6 * p - 0.6, 0.25 * p], axis=-1)
    return np.asarray(np.rint(255 * np.clip(ramps, 0, 1)), np.uint8)


def _blend(grey: Pixels, coloured: Pixels) -> Pixels:
    """The colours over the image, background left out."""
    opacity = OPACITY * (coloured.max(axis=-1, keepdims=True) > 0)
    return np.asarray(np.rint(grey * (1 - opacity) + coloured * opacity), np.uint8)


def _side_by_side(panels: dict[str, Pixels]) -> Image.Image:
    images = [_fitted(Image.fromarray(p), len(panels)) for p in panels.values()]
    width, height = images[0].size
    sheet = Image.new("RGB", (len(panels) * (width + GAP_PX) - GAP_PX, height + CAPTION_PX))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (name, image) in enumerate(zip(panels, images, strict=True)):
        left = i * (width + GAP_PX)
        draw.text((left + 2, 2), name, fill=(255, 255, 255), font=font)
        sheet.paste(image, (left, CAPTION_PX))
    return sheet


def _fitted(image: Image.Image, n_panels: int) -> Image.Image:
    """Enlarged by a whole factor where it is tiny, reduced by averaging where it is too large."""
    height, width = _panel_limit(n_panels)
    scale = min(width / image.width, height / image.height)
    if scale < 1:
        size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
        return image.resize(size, Image.Resampling.BOX)
    factor = min(int(scale), max(1, SMALLEST_PANEL_PX // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
