"""Laws of the table of objects: equal to the reference, whole or absent, in bounded memory."""

import csv
import io
import os
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import skimage.measure
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from bigseg import store, table
from bigseg.blocks import BlockGrid, Region
from bigseg.errors import InputError, InputNotFoundError, OutputError
from bigseg.ngff import Axis, Level, Multiscale
from bigseg.objects import ObjectSums, sums_of
from bigseg.table import TableSpec, objects_url, preview, read_table, write_csv, write_table


def spec_of(shape, **changes):
    """A table of micrometers of a volume that begins at its own origin."""
    defaults = {
        "region": Region.of_shape(shape),
        "has_time": shape[0] > 1,
        "spatial_axes": "zyx",
        "size": (2.0, 0.5, 0.25),
        "origin": (100.0, 0.0, -3.0),
        "is_um": True,
        "channel_names": ("raw",),
    }
    return TableSpec(**{**defaults, **changes})


def labels_and_image(shape, *, n=9, seed=0, dtype=np.uint16):
    """Labels 1 to n without gaps, and an image of one channel."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n + 1, shape).astype(np.uint32)
    labels.reshape(-1)[rng.permutation(labels.size)[:n]] = np.arange(1, n + 1)
    return labels, rng.integers(0, 200, (1, *shape)).astype(dtype)


def blocks_of(labels, image, core=(1, 2, 3, 4)):
    grid = BlockGrid(Region.of_shape(labels.shape), core)
    return [
        sums_of(labels[b.core.slices], image[(slice(None), *b.core.slices)], b.core) for b in grid
    ]


def written(path, blocks, spec, **options):
    """The table of these blocks, written and read."""
    url = str(path)
    n_objects = max((int(b.label[-1]) for b in blocks if len(b)), default=0)
    write_table(
        url, blocks.__getitem__, n_blocks=len(blocks), n_objects=n_objects, spec=spec, **options
    )
    return read_table(url)


@given(
    shape=st.tuples(st.just(1), *[st.integers(2, 7)] * 3),
    n=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_rows_are_the_properties_of_the_whole_array(tmp_path_factory, shape, n, seed):
    labels, image = labels_and_image(shape, n=n, seed=seed)
    path = tmp_path_factory.mktemp("t") / "objects.parquet"
    found = written(path, blocks_of(labels, image), spec_of(shape)).to_pydict()
    expected = skimage.measure.regionprops_table(
        labels[0],
        image[0, 0].astype(np.float64),
        spacing=(2.0, 0.5, 0.25),
        properties=[
            *("label", "num_pixels", "area", "bbox", "centroid"),
            *("intensity_mean", "intensity_min", "intensity_max"),
        ],
    )
    same = {"label": "label", "n_voxels": "num_pixels", "volume_um3": "area"}
    for i, axis in enumerate("zyx"):
        same |= {f"{axis}_start": f"bbox-{i}", f"{axis}_stop": f"bbox-{i + 3}"}
        origin = (100.0, 0.0, -3.0)[i]
        np.testing.assert_allclose(
            found[f"centroid_{axis}_um"], expected[f"centroid-{i}"] + origin, rtol=1e-13, atol=1e-13
        )
    for what in ("mean", "min", "max"):
        same[f"intensity_{what}_raw"] = f"intensity_{what}"
    for ours, theirs in same.items():
        np.testing.assert_array_equal(found[ours], expected[theirs])
    border = [
        any(
            edge.any()
            for axis in range(3)
            for edge in np.take(labels[0] == i, [0, -1], axis=axis).swapaxes(0, axis)
        )
        for i in found["label"]
    ]
    assert found["touches_border"] == border


def test_the_bytes_do_not_depend_on_how_many_ranges_were_needed(tmp_path, monkeypatch):
    labels, image = labels_and_image((2, 9, 10, 11), n=400)
    blocks, spec = blocks_of(labels, image), spec_of(labels.shape)
    whole = written(tmp_path / "whole", blocks, spec)
    assert whole["label"].to_pylist() == list(range(1, 401))
    monkeypatch.setattr(table, "ROWS_OF_GROUP", 50)
    n_reads = [0] * len(blocks)

    def read(block):
        n_reads[block] += 1
        return blocks[block]

    contents = []
    for i, n_rows in enumerate((50, 100, 1000)):
        url, memory_bytes = str(tmp_path / str(i)), 2 * n_rows * blocks[0].n_bytes_each
        write_table(
            url, read, n_blocks=len(blocks), n_objects=400, spec=spec, memory_bytes=memory_bytes
        )
        assert read_table(url).equals(whole)
        contents.append((tmp_path / str(i)).read_bytes())
        assert parquet.ParquetFile(url).num_row_groups == 8
    assert contents[0] == contents[1] == contents[2]
    few = written(tmp_path / "few", blocks, spec, memory_bytes=2 * 37 * blocks[0].n_bytes_each)
    assert few.equals(whole)


def test_a_range_reads_only_the_blocks_that_hold_its_labels(tmp_path):
    """Objects of their own in every block: two passes, whatever the number of ranges."""
    labels = np.repeat(np.arange(1, 65, dtype=np.uint32), 4).reshape(1, 1, 64, 4)
    blocks = blocks_of(labels, labels[None].astype(np.uint8), core=(1, 1, 8, 4))
    n_reads = [0] * len(blocks)

    def read(block):
        n_reads[block] += 1
        return blocks[block]

    write_table(
        str(tmp_path / "t"),
        read,
        n_blocks=8,
        n_objects=64,
        spec=spec_of(labels.shape),
        memory_bytes=2 * 8 * blocks[0].n_bytes_each,
    )
    assert n_reads == [3, *[2] * 7]  # the first once more, for the type of the image
    assert read_table(str(tmp_path / "t")).num_rows == 64


def test_memory_is_bounded_by_what_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS_OF_GROUP", 1000)
    n_blocks, each = 60, 1000
    labels = np.arange(1, each + 1, dtype=np.uint32).reshape(1, 1, 1, each)
    core = Region.of_shape(labels.shape)

    def read(block):
        return sums_of(labels + np.uint32(block * each), labels[None], core)

    spec, n_objects = spec_of((1, 1, 1, each)), n_blocks * each
    memory_bytes = 2 * 2000 * read(0).n_bytes_each
    write_table(str(tmp_path / "warm"), read, n_blocks=1, n_objects=each, spec=spec)
    tracemalloc.start()
    try:
        write_table(
            str(tmp_path / "t"),
            read,
            n_blocks=n_blocks,
            n_objects=n_objects,
            spec=spec,
            memory_bytes=memory_bytes,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What is read ahead and what is copied of a group come on top; all rows would take 10 MB.
    assert peak < 2 * memory_bytes + 1e6 < n_objects * read(0).n_bytes_each / 2


def test_sums_of_floats_do_not_depend_on_the_ranges(tmp_path):
    labels, _ = labels_and_image((1, 8, 8, 8), n=30)
    image = np.random.default_rng(1).normal(size=(1, *labels.shape)).astype(np.float32)
    blocks, spec = blocks_of(labels, image), spec_of(labels.shape)
    one = written(tmp_path / "a", blocks, spec)
    many = written(tmp_path / "b", blocks, spec, memory_bytes=2 * 7 * blocks[0].n_bytes_each)
    assert one.equals(many)


# Columns.


def test_time_has_columns_where_there_is_any(tmp_path):
    labels, image = labels_and_image((3, 1, 4, 4), n=3)
    found = written(tmp_path / "t", blocks_of(labels, image), spec_of(labels.shape))
    for row, label in enumerate(found["label"].to_pylist()):
        times = np.flatnonzero((labels == label).any(axis=(1, 2, 3)))
        assert found["t_start"][row].as_py() == times[0]
        assert found["t_stop"][row].as_py() == times[-1] + 1
    frame = written(tmp_path / "f", blocks_of(labels[:1], image[:, :1]), spec_of((1, 1, 4, 4)))
    assert not {"t_start", "t_stop"} & set(frame.column_names)


def test_the_names_of_columns_say_what_they_are(tmp_path):
    labels, image = labels_and_image((1, 1, 4, 4), n=3)
    planes = {"spatial_axes": "yx", "size": (0.5, 2.0), "origin": (0.0, 0.0)}
    blocks = blocks_of(labels, np.concatenate([image, image]))
    spec = spec_of(labels.shape, **planes, channel_names=("a", "b"))
    found = written(tmp_path / "a", blocks, spec)
    assert found.column_names == [
        *("label", "n_voxels", "area_um2", "y_start", "y_stop", "x_start", "x_stop"),
        *("centroid_y_um", "centroid_x_um", "touches_border"),
        *("intensity_mean_a", "intensity_min_a", "intensity_max_a"),
        *("intensity_mean_b", "intensity_min_b", "intensity_max_b"),
    ]
    assert found["area_um2"].to_pylist() == found["n_voxels"].to_pylist()
    spec = spec_of(labels.shape, **planes, is_um=False, channel_names=("a", "a"))
    unnamed = written(tmp_path / "b", blocks, spec).column_names
    assert not any("um" in name for name in unnamed)
    assert {"centroid_y", "intensity_mean_0_a", "intensity_mean_1_a"} <= set(unnamed)
    bare = [sums_of(labels, None, Region.of_shape(labels.shape))]
    spec = spec_of(labels.shape, channel_names=())
    assert written(tmp_path / "c", bare, spec).column_names[-1] == "touches_border"


def test_no_image_is_needed(tmp_path):
    labels = np.zeros((1, 2, 3, 8), np.uint16)
    labels[0, 1, :, :2] = 1
    grid = BlockGrid(Region.of_shape(labels.shape), (1, 2, 3, 4))
    blocks = [sums_of(labels[b.core.slices], None, b.core) for b in grid]
    assert [len(b) for b in blocks] == [1, 0]
    found = written(tmp_path / "t", blocks, spec_of(labels.shape, channel_names=()))
    assert found["n_voxels"].to_pylist() == [6]


def test_names_of_channels_cannot_break_the_table(tmp_path):
    labels, image = labels_and_image((1, 1, 4, 4), n=3)
    odd = 'a,"b"\n\ud800\x1b[2J'
    spec = spec_of(labels.shape, channel_names=(odd,))
    written(tmp_path / "t", blocks_of(labels, image), spec)
    text = io.StringIO()
    write_csv(str(tmp_path / "t"), text)
    rows = list(csv.reader(io.StringIO(text.getvalue())))
    assert {len(row) for row in rows} == {len(rows[0])}
    assert rows[0][-1].startswith('intensity_max_a,"b"\n')
    assert "\x1b" not in text.getvalue()


def test_the_border_is_that_of_what_was_segmented(tmp_path):
    labels = np.zeros((1, 1, 6, 6), np.uint8)
    labels[0, 0, 2:4, 2:4] = 1
    labels[0, 0, 4, 3] = 2
    core = Region((0, 0, 10, 10), (1, 1, 16, 16))
    blocks = [sums_of(labels, labels[None], core)]
    inner = spec_of(labels.shape, region=core)
    assert written(tmp_path / "a", blocks, inner)["touches_border"].to_pylist() == [False, False]
    cut = spec_of(labels.shape, region=Region((0, 0, 10, 10), (1, 1, 15, 16)))
    assert written(tmp_path / "b", blocks, cut)["touches_border"].to_pylist() == [False, True]


def test_a_mean_of_nothing_is_absent(tmp_path):
    labels = np.array([[[[1, 1, 2, 2]]]], np.uint8)
    image = np.array([[[[[np.nan, np.inf, 3, np.nan]]]]], np.float32)
    found = written(tmp_path / "t", blocks_of(labels, image), spec_of(labels.shape))
    for what in ("mean", "min", "max"):
        assert found[f"intensity_{what}_raw"].to_pylist() == [None, 3.0]


def test_places_and_sizes_come_from_the_metadata():
    image = Multiscale(
        version="0.5",
        name=None,
        axes=(
            Axis("t", "time", "second"),
            Axis("c", "channel", None),
            Axis("y", "space", "nanometer"),
            Axis("x", "space", "micrometer"),
        ),
        levels=(Level("0", (1, 1, 8, 9), (0, 0, 0, 0)), Level("1", (1, 1, 500, 2), (5, 0, 250, 1))),
        channels=("raw",),
        is_label=False,
    )
    region = Region.of_shape((2, 1, 5, 5))
    found = TableSpec.of(image, 1, region=region, n_times=2, channels=["raw"])
    assert found == TableSpec(
        region=region,
        has_time=True,
        spatial_axes="yx",
        size=(0.5, 2.0),
        origin=(0.25, 1.0),
        is_um=True,
        channel_names=("raw",),
    )
    unnamed = image.without_channels()
    axes = (unnamed.axes[0], Axis("y", "space", None), unnamed.axes[2])
    plain = TableSpec.of(
        Multiscale("0.5", None, axes, unnamed.levels, (), False),
        1,
        region=region,
        n_times=1,
        channels=[],
    )
    assert (plain.is_um, plain.size, plain.origin) == (False, (500, 2), (250, 1))


# Files.


def test_a_table_without_objects_has_all_columns(tmp_path):
    labels = np.zeros((1, 2, 3, 4), np.uint8)
    blocks = blocks_of(labels, labels[None].astype(np.int16))
    found = written(tmp_path / "t", blocks, spec_of(labels.shape))
    assert found.num_rows == 0
    assert found.schema.field("intensity_min_raw").type == pa.int64()
    text = io.StringIO()
    write_csv(str(tmp_path / "t"), text)
    assert text.getvalue() == ",".join(found.column_names) + "\n"


def test_text_has_the_same_values(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROWS_OF_GROUP", 7)
    labels, image = labels_and_image((1, 5, 6, 7), n=20, dtype=np.float32)
    url = str(tmp_path / "t")
    found = written(url, blocks_of(labels, image), spec_of(labels.shape))
    text = io.StringIO()
    write_csv(url, text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert len(rows) == 20
    for name in found.column_names:
        values = found[name].to_pylist()
        if isinstance(values[0], bool):
            assert [r[name] for r in rows] == [str(v).lower() for v in values]
        else:
            assert [float(r[name]) for r in rows] == values


def test_a_preview_shows_the_first_rows_and_how_many_there_are(tmp_path):
    labels, image = labels_and_image((1, 5, 6, 7), n=20)
    url = str(tmp_path / "t")
    found = written(url, blocks_of(labels, image), spec_of(labels.shape))
    names, *rows, count = preview(url, n_rows=3).splitlines()
    assert (len(rows), count) == (3, "3 of 20 objects")
    assert names.split() == found.column_names
    for i, row in enumerate(rows):
        values = [column[i].as_py() for column in found.columns]
        assert row.split() == [f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]
    assert {len(row) for row in rows} == {len(names)}
    empty = blocks_of(np.zeros_like(labels), image)
    written(url, empty, spec_of(labels.shape))
    assert preview(url).splitlines()[1:] == ["0 of 0 objects"]


def test_a_failure_leaves_what_was_there(tmp_path):
    labels, image = labels_and_image((1, 4, 6, 4), n=20)
    blocks, spec = blocks_of(labels, image), spec_of(labels.shape)
    url = str(tmp_path / "objects.parquet")
    before = written(url, blocks, spec)

    def breaking(block):
        if block == len(blocks) - 1:
            raise OutputError("damaged")
        return blocks[block]

    with pytest.raises(OutputError, match="damaged"):
        write_table(url, breaking, n_blocks=len(blocks), n_objects=20, spec=spec)
    assert read_table(url).equals(before)
    with pytest.raises(OutputError, match=r"up to label \d+, .* where there are 5 objects"):
        write_table(url, blocks.__getitem__, n_blocks=len(blocks), n_objects=5, spec=spec)
    assert read_table(url).equals(before)
    assert os.listdir(tmp_path) == ["objects.parquet"]


def test_blocks_of_another_image_are_refused(tmp_path):
    labels, image = labels_and_image((1, 2, 3, 4), n=3)
    blocks = blocks_of(labels, image) + blocks_of(labels, image.astype(np.float32))
    with pytest.raises(OutputError, match="with 1 channels of float64, where"):
        written(tmp_path / "t", blocks, spec_of(labels.shape))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    blocks = [ObjectSums.empty(1)]
    with pytest.raises(OutputError, match=r"file/t cannot be written: .*; check rights and space"):
        written(tmp_path / "file" / "t", blocks, spec_of((1, 1, 1, 1)))


def test_tables_lie_in_any_store():
    labels, image = labels_and_image((1, 4, 6, 4), n=20)
    url = objects_url("memory://results/cells")
    assert url == "memory://results/cells/objects.parquet"
    found = written(url, blocks_of(labels, image), spec_of(labels.shape))
    assert found.num_rows == 20
    fsspec.filesystem("memory").rm("/results", recursive=True)


def test_a_table_larger_than_a_request_reaches_the_store(monkeypatch):
    monkeypatch.setattr(table, "_SENT_WHOLE_BYTES", 10)
    sent = []
    monkeypatch.setattr(store, "write_atomic", lambda url, data: sent.append((url, data[:4])))
    labels, image = labels_and_image((1, 4, 6, 4), n=20)
    blocks = blocks_of(labels, image)
    write_table(
        "memory://t",
        blocks.__getitem__,
        n_blocks=len(blocks),
        n_objects=20,
        spec=spec_of(labels.shape),
    )
    assert sent == [("memory://t", b"PAR1")]


def test_what_is_no_table_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(InputNotFoundError, match="there is no table of objects at"):
        read_table(str(tmp_path / "none"))
    labels, image = labels_and_image((1, 4, 6, 4), n=20)
    path = tmp_path / "t"
    written(path, blocks_of(labels, image), spec_of(labels.shape))
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:-9], data[: len(data) // 2] + data[:9], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read as a Parquet file"):
            read_table(str(path))
        with pytest.raises(InputError, match="cannot be read as a Parquet file"):
            write_csv(str(path), io.StringIO())
        with pytest.raises(InputError, match="cannot be read as a Parquet file"):
            preview(str(path))
