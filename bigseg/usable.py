"""Whether what was opened can be read as a level of an image, and what to give instead.

It looks at arrays and metadata that are open already, and reads no voxel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigseg import ngff, store
from bigseg.errors import InputError, NotOmeZarrError

if TYPE_CHECKING:
    import zarr

    from bigseg.ngff import Multiscale


def check_array(array: zarr.Array[Any], multiscale: Multiscale, path: str) -> None:
    """Refuse an array that is no level of its image, or holds what bigseg cannot read.

    Raises:
        InputError: says what is wrong with the array at `path`.
    """
    names = ",".join(multiscale.axis_names)
    if array.ndim != len(multiscale.axes):
        raise InputError(
            f"{path} has {array.ndim} axes, its image states {names}: correct the metadata"
        )
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise InputError(
            f"{path} holds values of type {array.dtype}; bigseg reads integers, booleans and "
            "floating-point numbers up to 64 bits: convert it first"
        )
    if (n := int(multiscale.along("c", array.shape, absent=1))) > ngff.MAX_CHANNELS:
        raise InputError(
            f"{path} has {n} channels, more than {ngff.MAX_CHANNELS}: check the order of its axes"
        )
    if 0 in array.shape:
        raise InputError(f"{path} is empty, its shape ({names}) is {array.shape}: copy it again")


def refuse_level(url: str) -> None:
    """Say which image and level it is when `url` is the array of a level; else do nothing.

    Raises:
        NotOmeZarrError: it is.
    """
    holder = url
    for _ in range(3):
        holder = store.parent(holder)
        try:
            attributes = store.open_group(holder, mode="r").attrs.asdict()
            levels = ngff.parse_multiscale(attributes, where=holder).levels
        except InputError:
            continue
        for i, level in enumerate(levels):
            if store.join(holder, level.path) == url:
                raise NotOmeZarrError(
                    f"{url} is level {i} of an image: give {holder} with `--level {i}`"
                ) from None
