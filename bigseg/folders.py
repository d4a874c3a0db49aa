"""Folders of images of different sizes: many files, each an OME-Zarr of its own.

A pattern says what of a file's name, its ending left out, names the image:

    a_image.tif   b_image.tif      {name}_image      images/a.zarr      images/b.zarr
    a_nuclei.tif  b_nuclei.tif     {name}_nuclei     the same images, each with its labels

So labels find their images by name. Nothing is written before every file has its place.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from bigseg import store
from bigseg.convert import convert_as
from bigseg.errors import InputError, InputNotFoundError, NotOmeZarrError, OutputError, UsageError
from bigseg.guards import METADATA_NAMES
from bigseg.progress import NullProgress
from bigseg.sources import files_of, natural_order, without_ending
from bigseg.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bigseg.convert import Conversion
    from bigseg.progress import Progress

log = logging.getLogger(__name__)

NAME = "{name}"


def convert_files(
    wanted: Conversion,
    sources: Sequence[str],
    out: str,
    *,
    each: str | None = None,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Where the images (or labels) are that were made of the files.

    Without `each` the files form one image, at `out`; else `each` is the pattern by which every
    file becomes an image of its own in the folder `out`, or the labels of one that is there.

    Raises:
        UsageError: the pattern has not one {name}, a file does not fit it, or two files fit the
            same image.
        InputError: labels without their image; and what `convert_as` raises.
        OutputError: some of the images or labels exist; and what `convert_as` raises.
    """
    if each is None:
        return (convert_as(wanted, sources, out, progress=progress).url,)
    places = destinations(sources, out, pattern=each)
    _check_images(places, labels=wanted.labels)
    if not wanted.overwrite:
        _check_free(places, labels=wanted.labels)
    unsized: list[str] = []
    made = []
    with (progress or NullProgress()).task("convert", total=len(places), unit="files") as task:
        for url, file in places.items():
            volume = convert_as(wanted, (file,), url, without_size=unsized.append)
            made.append(volume.url)
            task.advance()
    if unsized:
        log.warning(
            "%d of %d files state no voxel size, such as %s: give one with --voxel-size",
            *(len(unsized), len(places), unsized[0]),
        )
    return tuple(made)


def destinations(sources: Sequence[str], out: str, *, pattern: str) -> dict[str, str]:
    """Image location -> file, in the order of the files.

    Of a folder among the sources those files are taken that fit the pattern.

    Raises:
        UsageError: as `convert_files` says, or no file of a folder fits.
        InputError: a folder without TIFF and PNG files.
    """
    name_in = _matcher(pattern)
    places: dict[str, str] = {}
    for file in _fitting(sources, name_in, pattern):
        url = store.join(out, f"{_name(file, name_in)}.zarr")
        if url in places:
            raise UsageError(
                f"{places[url]} and {file} would both become {url}: give one of them, or a pattern "
                "that tells them apart"
            )
        places[url] = file
    return places


def images_in(urls: Iterable[str]) -> tuple[str, ...]:
    """The same locations; instead of a local folder that is no OME-Zarr the *.zarr in it."""
    return tuple(image for url in urls for image in _images_in(url))


def _images_in(url: str) -> Sequence[str]:
    folder = Path(url)
    if not store.is_local(url) or not folder.is_dir() or folder.suffix == ".zarr":
        return (url,)
    if any((folder / name).exists() for name in METADATA_NAMES):
        return (url,)
    found = [str(p) for p in folder.iterdir() if p.suffix == ".zarr"]
    # An empty answer would hide the mistake; opening the folder explains it.
    return sorted(found, key=natural_order) or (url,)


def _matcher(pattern: str) -> re.Pattern[str]:
    if pattern.count(NAME) != 1:
        raise UsageError(
            f"pattern {pattern!r} must hold {NAME} once, where a file's name names its image: give "
            "one such as '{name}_image', or '{name}' for the whole name"
        )
    return re.compile("(.+)".join(map(re.escape, without_ending(pattern).split(NAME))))


def _fitting(sources: Sequence[str], name_in: re.Pattern[str], pattern: str) -> Iterable[str]:
    for source in sources:
        files = files_of(source)
        fitting = [file for file in files if _name(file, name_in) is not None]
        is_folder = files != [source]
        if not fitting or not (is_folder or fitting == files):
            raise UsageError(
                f"{'no file in ' if is_folder else ''}{source} fits the pattern {pattern!r}, by "
                "which files name their images: give the files that do, or another pattern"
            )
        yield from fitting


def _name(file: str, name_in: re.Pattern[str]) -> str | None:
    found = name_in.fullmatch(without_ending(file))
    return None if found is None else found[1]


def _check_images(places: dict[str, str], *, labels: str | None) -> None:
    if labels is None:
        return
    for url, file in places.items():
        if not store.exists(url):
            raise InputNotFoundError(
                f"labels {file} belong to {url} by their name, and there is no such image: convert "
                "the images first, or give the pattern of the labels, such as '{name}_nuclei'"
            )


def _check_free(places: dict[str, str], *, labels: str | None) -> None:
    wanted = [url if labels is None else store.join(url, "labels", labels) for url in places]
    there = [url for url in wanted if _is_made(url)]
    if there:
        raise OutputError(
            f"{len(there)} of {len(wanted)} outputs exist, such as {there[0]}: give another name "
            "or use --overwrite"
        )


def _is_made(url: str) -> bool:
    """Whether a whole image or label is there; one that was cut short is made anew."""
    try:
        open_volume(url)
    except (InputNotFoundError, NotOmeZarrError):
        return False
    except InputError:
        return True
    return True
