"""What instances need until they are done, beside the output: arrays, and small files of blocks.

    OUT/
      probabilities/        an image, in 255ths; only where they are kept
      scratch/              goes when the result is finished
        codes/              inside and foreground; where no probabilities are kept
        ids/                seeds, numbered in each block by itself
        grown/ gaps/        where holes are filled: labels before that, and the background by itself
        seeds/ pairs/ ...   a file for each block

Each array has one level, in shards of a core, so that a block is one object, and small chunks, so
that a neighbour that reads a margin decodes little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bigseg import layout, store
from bigseg.errors import BadChunkError, InputNotFoundError, NotOmeZarrError, OutputError
from bigseg.layout import OutputSpec
from bigseg.volume import Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.plan import Plan

Parsed = TypeVar("Parsed")

CODES, IDS, GROWN, GAPS = "codes", "ids", "grown", "gaps"
# Directories of more files than this become slow to list and to write.
FILES_A_FOLDER = 1000
MAX_FILE_BYTES = 4 << 30


def scratch_at(output_url: str) -> str:
    """Where the scratch space of an output lies."""
    return store.join(output_url, "scratch")


def scratch_url(plan: Plan) -> str:
    """Where the scratch space of a plan lies."""
    return scratch_at(plan.output.url)


def array_url(plan: Plan, name: str) -> str:
    """Where one of its arrays lies."""
    return store.join(scratch_url(plan), name)


def predicted_url(plan: Plan) -> str:
    """Where the predict stage writes: the output itself, or what instances are made from."""
    if plan.instances is None:
        return plan.output.url
    if plan.instances.keep_probabilities:
        return store.join(plan.output.url, "probabilities")
    return array_url(plan, CODES)


def create_scratch(plan: Plan) -> None:
    """The arrays that the stages before growing write, empty; those that are there stay.

    Raises:
        OutputError: they cannot be written.
    """
    assert plan.instances is not None
    # A creation that was cut off can have left the folder alone, which nobody could remove later.
    if not store.exists(store.join(scratch_url(plan), "zarr.json")):
        store.make_group(scratch_url(plan), zarr_format=3)
    names = plan.output.class_names if plan.instances.keep_probabilities else ()
    create_array(plan, predicted_url(plan), "uint8", channel_names=names)
    create_array(plan, array_url(plan, IDS), "uint32")


def create_array(
    plan: Plan, url: str, dtype: str, *, channel_names: tuple[str, ...] = ()
) -> Volume:
    """One array with the extent of the segmented level; one of this type that is there stays.

    Raises:
        OutputError: it cannot be written.
    """
    there = _opened(url)
    if there is not None and there.dtype == np.dtype(dtype):
        return there
    if store.parent(url) == scratch_url(plan):
        # Of a number of objects that was taken back with what they were made from.
        store.remove(url)
    assert plan.instances is not None
    source = open_volume(plan.source.url, level=plan.source.level)
    provenance = {"fingerprint": plan.fingerprint}
    spec = OutputSpec(np.dtype(dtype), plan.instances.chunk, plan.core, channel_names, provenance)
    ms = layout.output_multiscale(
        source.multiscale, spec, name=store.name_of(url), first_level=source.level
    )
    ms = replace(ms, version="0.5", levels=ms.levels[:1])
    layout.create_image(url, ms, [source.shape], spec, source=None)
    return open_volume(url)


def _opened(url: str) -> Volume | None:
    """An array, None where it is not there as a whole: its creation or removal was cut off."""
    try:
        return open_volume(url)
    except (InputNotFoundError, NotOmeZarrError):
        return None


def has_scratch(plan: Plan) -> bool:
    """Whether there is scratch space with all arrays that the stages before growing write."""
    return all(_opened(url) for url in (predicted_url(plan), array_url(plan, IDS)))


def remove_scratch(output_url: str) -> None:
    """Delete that of an output; probabilities that are kept stay, and so does everything else.

    Raises:
        OutputError: it cannot be deleted.
    """
    # What a removal that is cut short leaves must not pass for scratch space: what is missing of an
    # array reads as zeros.
    store.remove_file(store.join(scratch_at(output_url), IDS, "zarr.json"))
    store.remove(scratch_at(output_url))


def open_array(plan: Plan, url: str) -> Volume:
    """One of the arrays, which an earlier stage or the driver has made.

    Raises:
        OutputError: it is gone or damaged; says how it is made again.
    """
    there = _opened(url)
    if there is None:
        raise OutputError(f"{url} is gone or damaged: {_way_out(plan, url)}")
    return there


def read_array(
    plan: Plan, volume: Volume, region: Region, channels: Sequence[int] = (0,)
) -> NDArray[Any]:
    """The voxels (c, t, z, y, x) of a region of one of the arrays.

    Raises:
        OutputError: a chunk is damaged; says how it is made again.
    """
    try:
        return volume.read(region, channels)
    except BadChunkError as error:
        fault = str(error).removesuffix(": restore it from a copy")
        raise OutputError(f"{fault}: {_way_out(plan, volume.url)}") from error


def lost(plan: Plan, url: str, core: Region) -> OutputError:
    """The error that says that an array does not hold what a finished block had written."""
    return OutputError(
        f"{url} does not hold what a finished block wrote at {core}, it was deleted or changed: "
        f"{_way_out(plan, url)}"
    )


def _way_out(plan: Plan, url: str) -> str:
    if store.parent(url) == scratch_url(plan):
        return f"remove {scratch_url(plan)}, and the same command makes it again"
    return (
        f"`bigseg verify {plan.output.url}` takes it back, and the same `bigseg segment` command "
        "makes it again"
    )


@dataclass(frozen=True)
class BlockFiles:
    """A small file for each block of a stage."""

    url: str

    @classmethod
    def of(cls, plan: Plan, kind: str) -> BlockFiles:
        """Those of a plan, of one kind."""
        return cls(store.join(scratch_url(plan), kind))

    def write(self, block: int, data: bytes) -> None:
        """Write the file of a block, whole and durably.

        Raises:
            OutputError: it cannot be written.
        """
        store.write_atomic(self.place(block), data)

    def read(self, block: int) -> bytes:
        """What was written for a block.

        Raises:
            OutputError: it is gone.
        """
        try:
            return store.read_bytes(self.place(block), limit_bytes=MAX_FILE_BYTES)
        except InputNotFoundError:
            raise OutputError(
                f"{self.place(block)} is gone, which a finished block had written: remove "
                f"{store.parent(self.url)}, and the same command makes it again"
            ) from None

    def load(self, block: int, parse: Callable[[bytes], Parsed]) -> Parsed:
        """What was written for a block, as `parse` gives it.

        Raises:
            OutputError: it is gone or damaged; says where it lay.
        """
        data = self.read(block)
        try:
            return parse(data)
        except OutputError as error:
            raise OutputError(f"{self.place(block)}: {error}") from None

    def place(self, block: int) -> str:
        """Where the file of a block lies."""
        return store.join(self.url, str(block // FILES_A_FOLDER), str(block))
