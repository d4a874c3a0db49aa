"""Files of other formats as one array that is read piece by piece: TIFF, PNG, HDF5, stacks.

    image.tif                 the first series of the file
    a.png b.png c.png ...     a stack: the files form the first axis
    folder/                   a stack of the images in it, ordered by the numbers in their names
    file.h5:/dataset          one dataset

No file is ever decoded whole if its format allows to decode a part: contiguous TIFFs and HDF5 are
read by slices, other TIFFs by pages, PNGs by files.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import numpy as np

from bigseg.errors import InputError, InputNotFoundError, ResourceError, UsageError
from bigseg.units import UNIT_TO_UM, canonical_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

TIFF = (".tif", ".tiff")
PNG = (".png",)
HDF5 = (".h5", ".hdf5", ".hdf")
DEFAULT_AXES = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}


class Source(Protocol):
    """An array in files; `axes` (letters of t, c, z, y, x) and voxel sizes as far as it says."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: str | None
    voxel_um: dict[str, float]

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        """The part of the array that the slices (one for each axis, step 1) select."""

    def close(self) -> None:
        """Close what is open."""


def open_source(paths: Sequence[str]) -> Source:
    """The array that these files form, in the order given.

    Raises:
        InputNotFoundError: a file is not there.
        InputError: a file is damaged or of an unknown format, or the files differ in shape.
        UsageError: no file, or HDF5 without or with a wrong dataset.
        ResourceError: the package that reads the format is not installed.
    """
    files = list(itertools.chain.from_iterable(files_of(path) for path in paths))
    if not files:
        raise UsageError("no image given: give files, or a folder with TIFF or PNG files")
    if len(files) == 1:
        return _open(files[0])
    if files != sorted(files, key=natural_order):
        log.warning("the stack goes from %s to %s as given, not by number", files[0], files[-1])
    return _Stack(files)


def files_of(path: str) -> list[str]:
    """The path itself; of a folder the images in it, by the numbers in their names.

    Raises:
        InputError: a folder without TIFF and PNG files.
    """
    if not Path(path).is_dir():
        return [path]
    found = [str(p) for p in Path(path).iterdir() if p.suffix.lower() in TIFF + PNG]
    if not found:
        raise InputError(f"folder {path} holds no TIFF or PNG files: give files or another folder")
    return sorted(found, key=natural_order)


def natural_order(path: str) -> list[tuple[int, str]]:
    """Sort key that puts image2 before image10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", path) if p]


def without_ending(path: str) -> str:
    """The name of a file without folders, dataset and ending: `a` of x/a.ome.tif, x/a.h5:/raw."""
    name = Path(_file_and_dataset(path)[0]).name
    for ending in (*TIFF, *PNG, *HDF5):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
            return name.removesuffix(".ome")
    return name


def _open(path: str) -> Source:
    file, dataset = _file_and_dataset(path)
    suffix = Path(file).suffix.lower()
    opener = next((open_ for suffixes, open_ in _FORMATS.items() if suffix in suffixes), None)
    if not Path(file).exists():
        raise InputNotFoundError(f"no such file: {file}; check the path")
    if opener is None:
        raise InputError(
            f"{path} is of a format that bigseg does not read: give TIFF, PNG, or HDF5 as "
            "file.h5:/dataset"
        )
    try:
        return opener(file, dataset)
    except ImportError as error:
        raise ResourceError(
            f"{path} needs the package {error.name}: install it with `pip install {error.name}`"
        ) from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check its rights") from None


def _file_and_dataset(path: str) -> tuple[str, str]:
    has_dataset = ".h5:" in path or ".hdf" in path
    file, _, dataset = path.partition(":") if has_dataset else (path, "", "")
    return file, dataset


class _Tiff:
    """The first series of a TIFF file."""

    def __init__(self, path: str, _: str) -> None:
        import tifffile  # slow to import, and TIFF alone needs it

        self.name = path
        try:
            self._file = tifffile.TiffFile(path)
            series = self._file.series[0]
        except (tifffile.TiffFileError, IndexError, OSError) as error:
            raise InputError(
                f"{path} is no TIFF file that can be read ({error}): save it again"
            ) from None
        self.shape: tuple[int, ...] = tuple(series.shape)
        self.dtype: np.dtype[Any] = np.dtype(series.dtype).newbyteorder("=")
        self.axes = _tiff_axes(series.axes)
        self.voxel_um = _tiff_voxels(self._file)
        self._pages = series.pages
        self._page_ndim = len(series.keyframe.shape)
        self._whole = None
        if series.dataoffset is not None:
            self._whole = tifffile.memmap(path, series=0, mode="r")
        elif math.prod(self.shape[: len(self.shape) - self._page_ndim]) != len(self._pages):
            self.close()
            raise InputError(f"{path} is a TIFF with an unusual layout: save it page by page")

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        if self._whole is not None:
            return np.asarray(self._whole[index])
        ahead = len(self.shape) - self._page_ndim
        return _fill_by_pages(self, index, ahead, lambda i: self._page(i)[index[ahead:]])

    def close(self) -> None:
        self._whole = None
        self._file.close()

    def _page(self, number: int) -> NDArray[Any]:
        page = self._pages[number]
        try:
            return np.zeros(self.shape[-self._page_ndim :]) if page is None else page.asarray()
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            reason = str(error).strip("'\"")
            hint = "install imagecodecs" if "imagecodecs" in reason else "save it again"
            raise InputError(
                f"page {number} of {self.name} cannot be read: {reason}; {hint}"
            ) from None


class _Png:
    """One PNG file; colours are a channel axis behind x."""

    def __init__(self, path: str, _: str) -> None:
        self.name = path
        self.voxel_um: dict[str, float] = {}
        # The mode is known from the header, so a stack of thousands opens fast.
        image = self._load(decode=False)
        self.shape: tuple[int, ...] = image.shape
        self.dtype: np.dtype[Any] = image.dtype
        self.axes: str | None = "yx" if image.ndim == 2 else "yxc"

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        return self._load(decode=True)[index]

    def close(self) -> None:
        pass

    def _load(self, *, decode: bool) -> NDArray[Any]:
        from PIL import Image  # slow to import

        try:
            with warnings.catch_warnings(), Image.open(self.name) as image:
                # Between one and two times the limit PIL only warns; it is refused all the same.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                if decode:
                    return np.asarray(image)
                one = np.asarray(Image.new(image.mode, (1, 1)))
                return np.broadcast_to(one[:1, :1], (image.height, image.width, *one.shape[2:]))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(
                f"{self.name} is too large for a PNG: save it as a tiled TIFF"
            ) from None
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(
                f"{self.name} is no PNG file that can be read ({error}): save it again"
            ) from None


class _Hdf5:
    """One dataset of an HDF5 file."""

    def __init__(self, path: str, dataset: str) -> None:
        import h5py  # slow to import, and HDF5 alone needs it

        self.name = f"{path}:{dataset}"
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise InputError(
                f"{path} is no HDF5 file that can be read ({error}): save it again"
            ) from None
        found = self._file.get(dataset) if dataset.strip("/") else None
        if not isinstance(found, h5py.Dataset):
            names: list[str] = []
            self._file.visititems(
                lambda name, o: (
                    names.append(f"{path}:/{name}") if isinstance(o, h5py.Dataset) else None
                )
            )
            self.close()
            there = ", ".join(names[:20]) or "none"
            raise UsageError(f"HDF5 is given as file:/dataset, not {self.name}; there are: {there}")
        self._data = found
        self.shape: tuple[int, ...] = tuple(found.shape)
        self.dtype: np.dtype[Any] = found.dtype.newbyteorder("=")
        self.axes: str | None = None
        # The attribute that ilastik, PlantSeg and others write.
        sizes = np.ravel(found.attrs.get("element_size_um", ()))
        spatial = "zyx"[-len(sizes) :] if 2 <= len(sizes) <= 3 else ""
        self.voxel_um = dict(zip(spatial, map(float, sizes), strict=False))

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        return np.asarray(self._data[index])

    def close(self) -> None:
        self._file.close()


class _Stack:
    """Files of one shape and type, as the first axis; one is open at a time."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = tuple(paths)
        self._open: tuple[int, Source] | None = None
        first = self._source(0)
        self.name = f"{paths[0]} and {len(paths) - 1} more"
        self.shape: tuple[int, ...] = (len(paths), *first.shape)
        self.dtype = first.dtype
        self.voxel_um = first.voxel_um
        self.axes = _stack_axes(first.axes)
        for i, path in enumerate(paths):
            source = self._source(i)
            if source.shape != self.shape[1:] or source.dtype != self.dtype:
                self.close()
                raise InputError(
                    f"{path} is {source.shape} {source.dtype}, {paths[0]} is {self.shape[1:]} "
                    f"{self.dtype}; the files of a stack must be alike: leave out what differs"
                )

    def read(self, index: tuple[slice, ...]) -> NDArray[Any]:
        return _fill_by_pages(self, index, 1, lambda i: self._source(i).read(index[1:]))

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _source(self, number: int) -> Source:
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = (number, _open(self._paths[number]))
        return self._open[1]


_FORMATS: dict[tuple[str, ...], Callable[[str, str], Source]] = {
    TIFF: _Tiff,
    PNG: _Png,
    HDF5: _Hdf5,
}


def _fill_by_pages(
    source: Source, index: tuple[slice, ...], ahead: int, page: Callable[[int], NDArray[Any]]
) -> NDArray[Any]:
    """The selected part, where the first `ahead` axes count pages in raster order."""
    bounds = [s.indices(n) for s, n in zip(index, source.shape, strict=True)]
    result = np.empty([max(0, b - a) for a, b, _ in bounds], source.dtype)
    for target in np.ndindex(*result.shape[:ahead]):
        at = [t + a for t, (a, _, _) in zip(target, bounds, strict=False)]
        result[target] = page(int(np.ravel_multi_index(at, source.shape[:ahead])))
    return result


def _stack_axes(axes: str | None) -> str | None:
    if axes is None:
        return None
    default = DEFAULT_AXES.get(len(axes) + 1, "")[:1]
    free = (letter for letter in (default, *"ztc") if letter and letter not in axes)
    first = next(free, None)
    return None if first is None else first + axes


def _tiff_axes(axes: str) -> str | None:
    """The axes where the file states them; Q, I and the like are unknown, S is colours."""
    letters = axes.lower().replace("s", "c")
    known = set(letters) <= set("tczyx") and len(set(letters)) == len(letters)
    if known:
        return letters
    return (
        _stack_axes(letters[1:]) if letters[0] in "qi" and set(letters[1:]) <= set("yxc") else None
    )


def _tiff_voxels(file: Any) -> dict[str, float]:  # noqa: ANN401
    if file.is_ome:
        return _ome_voxels(file.ome_metadata or "")
    if not file.is_imagej:
        # The resolution of other TIFFs is that of a printer.
        return {}
    meta, tags = file.imagej_metadata or {}, file.pages[0].tags
    factor = UNIT_TO_UM.get(canonical_unit(_unescape(str(meta.get("unit", "")))) or "")
    sizes = {"z": float(meta["spacing"])} if "spacing" in meta else {}
    for axis, tag in (("x", "XResolution"), ("y", "YResolution")):
        pixels, length = tags[tag].value if tag in tags else (0, 0)
        if pixels:
            sizes[axis] = length / pixels
    return {} if factor is None else {a: s * factor for a, s in sizes.items() if s > 0}


def _unescape(unit: str) -> str:
    """ImageJ writes the micro sign as an escape."""
    return unit.replace("\\u00B5", "µ").replace("\\u00b5", "µ")


def _ome_voxels(text: str) -> dict[str, float]:
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return {}
    pixels: Iterable[ElementTree.Element] = root.iter()
    attributes = next((e.attrib for e in pixels if e.tag.endswith("}Pixels")), {})
    sizes = {}
    for axis in "zyx":
        name = f"PhysicalSize{axis.upper()}"
        factor = UNIT_TO_UM.get(canonical_unit(attributes.get(f"{name}Unit", "um")) or "")
        try:
            size = float(attributes[name]) * (factor or 0.0)
        except (KeyError, ValueError):
            continue
        if 0 < size < math.inf:
            sizes[axis] = size
    return sizes
