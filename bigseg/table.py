"""The table of objects of a segmentation: one Parquet file, whole or absent, of any length.

    sums of block 0, 1, 2, ...  ──a range of labels at a time──> rows in the order of labels

Objects have the labels 1 to N. What is held in memory are the sums of one range of labels; the
blocks are read again for each range, but only those that hold labels of it.
"""

from __future__ import annotations

import csv
import io
import math
import mmap
import tempfile
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import fsspec
import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from bigseg import guards, store
from bigseg.errors import BigsegError, InputError, InputNotFoundError, OutputError
from bigseg.objects import Merger
from bigseg.patience import keep_stores_brief, patiently
from bigseg.units import UNIT_TO_UM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TextIO

    from numpy.typing import NDArray

    from bigseg.blocks import Region
    from bigseg.ngff import Multiscale
    from bigseg.objects import ObjectSums

NAME = "objects.parquet"
ROWS_OF_GROUP = 1 << 16
N_READERS = 4
MEMORY_BYTES = 1 << 28
_PLACE = "tzyx"
# What goes to a remote store in one request must be bytes; s3fs cuts what is larger than 100 MB.
_SENT_WHOLE_BYTES = 1 << 27


@dataclass(frozen=True)
class TableSpec:
    """Which columns a table has, and what turns voxels into lengths.

    `region` (t, z, y, x) is what was segmented; objects at its faces touch the border, but not at
    those of an axis of one voxel. `size` and `origin` are the voxel size and the centre of voxel 0
    along `spatial_axes`, in micrometer where `is_um`, else in the image's own units: OME-Zarr
    places the centre of a voxel at index · scale + translation.
    """

    region: Region
    has_time: bool
    spatial_axes: str
    size: tuple[float, ...]
    origin: tuple[float, ...]
    is_um: bool
    channel_names: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, image: Multiscale, level: int, *, region: Region, n_times: int, channels: Iterable[str]
    ) -> TableSpec:
        """The table of objects in `region` of a level of an image with so many time points."""
        at = [image.axis_names.index(name) for name in image.spatial_axes]
        to_um = [UNIT_TO_UM.get(image.axes[i].unit or "", math.nan) for i in at]
        is_um = not any(map(math.isnan, to_um))
        factors = to_um if is_um else [1.0] * len(at)
        scale, translation = image.levels[level].scale, image.levels[level].translation
        return cls(
            region=region,
            has_time=n_times > 1,
            spatial_axes=image.spatial_axes,
            size=tuple(scale[i] * f for i, f in zip(at, factors, strict=True)),
            origin=tuple(translation[i] * f for i, f in zip(at, factors, strict=True)),
            is_um=is_um,
            channel_names=tuple(channels),
        )


def objects_url(out: str) -> str:
    """Where the table of the segmentation at `out` lies."""
    return store.join(out, NAME)


def write_table(
    url: str,
    read: Callable[[int], ObjectSums],
    *,
    n_blocks: int,
    n_objects: int,
    spec: TableSpec,
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Write the table of the objects 1 to `n_objects`, whole or not at all.

    Args:
        url: the file; what is there is replaced.
        read: the sums of a block; called in several threads, several times for a block where the
            sums of all objects have no room in `memory_bytes`.
        n_blocks: number of blocks, at least 1; floats are added in their order.
        n_objects: the largest label.
        spec: the columns.
        memory_bytes: room for sums; `N_READERS` blocks and a group of rows come on top. It changes
            no byte of the table where there is room for 2^16 objects (about 20 MB).

    Raises:
        OutputError: the file cannot be written, or what blocks have left is damaged.
    """
    like = read(0)[:0]
    assert like.n_channels == len(spec.channel_names), (like.n_channels, spec.channel_names)
    n_rows = _rows_at_once(like, memory_bytes)

    def checked(block: int) -> ObjectSums:
        return _checked(read(block), like, n_objects)

    with _spool(url) as file, _writer(file, _batch(like, spec).schema) as writer:
        for labels, blocks in _ranges(checked, n_blocks, n_objects=n_objects, n_rows=n_rows):
            for batch in _rows(checked, labels, blocks=blocks, like=like, spec=spec):
                writer.write_batch(batch)


def read_table(url: str) -> Any:  # noqa: ANN401 - pyarrow says nothing of its types
    """The whole table, a pyarrow.Table.

    label            1 to N
    n_voxels         and volume_um3, or area_um2 of images without z, where voxels have units
    AXIS_start, AXIS_stop   the smallest half-open box in voxels; t where there are several
    centroid_AXIS_um of the voxels' centres; centroid_AXIS, in units of the image, without units
    touches_border   whether a voxel lies at the end of an axis that has more than one
    intensity_mean_CHANNEL, intensity_min_CHANNEL, intensity_max_CHANNEL   null where no voxel of
                     the object has a finite intensity

    Raises:
        InputNotFoundError: there is none.
        InputError: it is no Parquet file, or cannot be read.
    """
    return pa.concat_tables(_groups(url))


def write_csv(url: str, out: TextIO) -> None:
    """Write the table at `url` as comma-separated text, a group of rows in memory at a time.

    Raises:
        InputNotFoundError: there is none.
        InputError: it is no Parquet file, or cannot be read.
    """
    groups = _groups(url)
    csv.writer(out, lineterminator="\n").writerow(next(groups).column_names)
    for group in groups:
        text = io.BytesIO()
        arrow_csv.write_csv(group, text, arrow_csv.WriteOptions(include_header=False))
        out.write(text.getvalue().decode())


def preview(url: str, *, n_rows: int = 20) -> str:
    """The first rows of the table at `url` as text to read, and how many there are in all.

    Raises:
        InputNotFoundError: there is none.
        InputError: it is no Parquet file, or cannot be read.
    """
    with _opened(url) as file:
        names, n_objects = file.schema_arrow.names, file.metadata.num_rows
        first = next(file.iter_batches(n_rows), None)
    rows = [] if first is None else [row.values() for row in first.to_pylist()]
    columns = [[name, *map(_cell, values)] for name, *values in zip(names, *rows, strict=True)]
    aligned = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    lines = ["  ".join(row) for row in zip(*aligned, strict=True)]
    return "\n".join([*lines, f"{len(rows)} of {n_objects} objects"])


def _rows_at_once(like: ObjectSums, memory_bytes: int) -> int:
    # Beside the sums, what is read of them when they are finished.
    n_rows = memory_bytes // (2 * like.n_bytes_each)
    # Whole groups, so that those in the file do not depend on the memory.
    return max(1, n_rows // ROWS_OF_GROUP * ROWS_OF_GROUP or n_rows)


def _checked(sums: ObjectSums, like: ObjectSums, n_objects: int) -> ObjectSums:
    largest = int(sums.label[-1]) if len(sums) else 0
    found, wanted = (sums.n_channels, sums.dtype), (like.n_channels, like.dtype)
    if largest > n_objects or found != wanted:
        raise OutputError(
            f"a block has left objects up to label {largest}, with {found[0]} channels of "
            f"{found[1]}, where there are {n_objects} objects, with {wanted[0]} channels of "
            f"{wanted[1]}: remove the folder scratch of the result, and the same command makes it "
            "again"
        )
    return sums


def _ranges(
    read: Callable[[int], ObjectSums], n_blocks: int, *, n_objects: int, n_rows: int
) -> Iterator[tuple[range, Iterable[int]]]:
    """The labels 1 to `n_objects`, `n_rows` at a time, with the blocks that hold some of them."""
    labels = range(1, n_objects + 1)
    if n_objects <= n_rows:
        yield labels, range(n_blocks)
        return
    blocks = [array("Q") for _ in labels[::n_rows]]
    for block, sums in enumerate(_in_order(read, range(n_blocks))):
        for i in np.unique((sums.label - np.uint64(1)) // np.uint64(n_rows)).tolist():
            blocks[i].append(block)
    for i, those in enumerate(blocks):
        yield labels[i * n_rows : (i + 1) * n_rows], those


def _rows(
    read: Callable[[int], ObjectSums],
    labels: range,
    *,
    blocks: Iterable[int],
    like: ObjectSums,
    spec: TableSpec,
) -> Iterator[Any]:
    """The rows of these labels, in batches of one group."""
    merger = Merger(np.arange(labels.start, labels.stop, dtype=np.uint64), like=like)
    for sums in _in_order(read, blocks):
        merger.add(sums.between(labels.start, labels.stop))
    found = merger.sums()
    for row in range(0, len(found), ROWS_OF_GROUP):
        yield _batch(found[row : row + ROWS_OF_GROUP], spec)


def _in_order(read: Callable[[int], ObjectSums], blocks: Iterable[int]) -> Iterator[ObjectSums]:
    """The sums of these blocks in their order, some of them read ahead."""
    with ThreadPoolExecutor(N_READERS) as pool:
        ahead: deque[Future[ObjectSums]] = deque()
        for block in blocks:
            ahead.append(pool.submit(read, block))
            if len(ahead) == N_READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _batch(sums: ObjectSums, spec: TableSpec) -> Any:  # noqa: ANN401
    """Rows as they stand in the file."""
    columns: dict[str, Any] = {"label": sums.label, "n_voxels": sums.n_voxels}
    if spec.is_um:
        name = "volume_um3" if "z" in spec.spatial_axes else "area_um2"
        columns[name] = sums.n_voxels * math.prod(spec.size)
    for axis in ("t" if spec.has_time else "") + spec.spatial_axes:
        columns[f"{axis}_start"] = sums.start[_PLACE.index(axis)]
        columns[f"{axis}_stop"] = sums.stop[_PLACE.index(axis)]
    mean = sums.mean_index()
    for axis, size, origin in zip(spec.spatial_axes, spec.size, spec.origin, strict=True):
        name = f"centroid_{axis}_um" if spec.is_um else f"centroid_{axis}"
        columns[name] = mean[_PLACE.index(axis)] * size + origin
    columns["touches_border"] = _touches_border(sums, spec)
    intensities = {"mean": sums.mean_value(), "min": sums.minimum, "max": sums.maximum}
    for c, name in enumerate(_distinct(spec.channel_names)):
        for what, values in intensities.items():
            columns[f"intensity_{what}_{name}"] = pa.array(values[c], mask=sums.n_finite[c] == 0)
    return pa.RecordBatch.from_pydict({name: pa.array(column) for name, column in columns.items()})


def _touches_border(sums: ObjectSums, spec: TableSpec) -> NDArray[np.bool_]:
    touches = np.zeros(len(sums), bool)
    for axis in map(_PLACE.index, spec.spatial_axes):
        if spec.region.shape[axis] > 1:
            touches |= sums.start[axis] == spec.region.start[axis]
            touches |= sums.stop[axis] == spec.region.stop[axis]
    return touches


def _distinct(names: tuple[str, ...]) -> list[str]:
    """Names of channels for columns: with their numbers where two channels have one name."""
    shown = [guards.printable(name) for name in names]
    return shown if len(set(shown)) == len(shown) else [f"{i}_{n}" for i, n in enumerate(shown)]


def _writer(file: BinaryIO, schema: Any) -> Any:  # noqa: ANN401
    # Nearly all values are different, so that a dictionary of them would only cost time.
    return parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=False)


@contextmanager
def _spool(url: str) -> Iterator[BinaryIO]:
    """A file without a name that becomes the file at `url` when all is well, and else vanishes."""
    try:
        with tempfile.TemporaryFile(dir=_folder(url)) as file:
            yield file
            file.flush()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                is_whole = not store.is_local(url) and len(content) <= _SENT_WHOLE_BYTES
                # What a store takes in parts, it cuts out of the mapping as bytes.
                store.write_atomic(url, content[:] if is_whole else cast("bytes", content))
    except BigsegError:
        raise
    except OSError as error:
        raise OutputError(
            f"{url} cannot be written: {error.strerror or error}; check rights and space, then run "
            "again"
        ) from error


def _folder(url: str) -> Path | None:
    """Where there is room for the table: beside it, or for temporary files where it goes far."""
    if not store.is_local(url):
        return None
    folder = Path(fsspec.core.url_to_fs(store.parent(url))[1])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """The file at `url`; for reading only, since every error is taken for one of reading."""
    guards.check_location(url)
    keep_stores_brief()
    try:
        fs, path = fsspec.core.url_to_fs(url)
        with patiently(lambda: fs.open(path, "rb")) as opened, parquet.ParquetFile(opened) as file:
            yield file
    except FileNotFoundError:
        raise InputNotFoundError(
            f"there is no table of objects at {url}: give a segmentation into instances that is "
            "complete"
        ) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{url} cannot be read as a Parquet file ({str(error)[:200]}): copy it again, or "
            "segment again"
        ) from None


def _groups(url: str) -> Iterator[Any]:
    """The table in parts, the first of them without rows."""
    with _opened(url) as file:
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(ROWS_OF_GROUP):
            yield pa.Table.from_batches([batch])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
