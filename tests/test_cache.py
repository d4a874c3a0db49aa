"""Regions read through the cache, against the volume itself and a store that counts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from counting import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr_images import ramp, write_image

from bigseg.blocks import BlockGrid, Region
from bigseg.cache import ChunkCache, boxes_of, predicted_fetch_bytes
from bigseg.errors import UsageError
from bigseg.volume import Volume, open_volume

SHAPE, CHUNK = (2, 9, 14, 17), (1, 4, 4, 5)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    data = ramp((2, 2, 9, 14, 17))
    url = str(tmp_path_factory.mktemp("cache") / "a")
    write_image(url, [data], "tczyx", chunks=(1, 1, 4, 4, 5))
    # Written again without compression, so that bytes in the store are bytes of voxels.
    zarr.create_array(
        f"{url}/0", data=data, chunks=(1, 1, 4, 4, 5), compressors=None, overwrite=True
    )
    return open_volume(url)


@st.composite
def regions_within(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Region(tuple(a for a, _ in ends), tuple(b for _, b in ends))


@settings(deadline=None, max_examples=40)
@given(
    regions=st.lists(regions_within(SHAPE), min_size=1, max_size=6),
    budget=st.sampled_from([0, 1, 500, 3000, 10**9]),
    channels=st.sampled_from([(0,), (1,), (1, 0), (0, 1)]),
)
def test_whatever_the_budget_regions_are_what_the_volume_holds(
    volume: Volume, regions: list[Region], budget: int, channels: tuple[int, ...]
) -> None:
    cache = ChunkCache(volume, channels, budget_bytes=budget)
    for region in regions:
        reading = cache.read(region)
        np.testing.assert_array_equal(reading.data, volume.read(region, channels))
        assert reading.data.dtype == volume.dtype
        assert reading.data.flags.c_contiguous
        assert reading.absent == ()
        assert cache.n_bytes_kept <= budget
        reading.data[...] = 9  # what was handed out is the caller's own
    assert cache.n_bytes_read == sum(2 * r.n_voxels * len(channels) for r in regions)
    assert cache.n_bytes_fetched == predicted_fetch_bytes(
        regions, shape=SHAPE, chunk=CHUNK, bytes_per_voxel=2 * len(channels), budget_bytes=budget
    )


@st.composite
def volumes_and_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[Region]]:
    shape = tuple(draw(st.integers(1, n)) for n in (3, 8, 12, 12))
    chunk = tuple(draw(st.integers(1, n + 2)) for n in shape)
    return shape, chunk, draw(st.lists(regions_within(shape), min_size=1, max_size=8))


@settings(deadline=None, max_examples=200)
@given(case=volumes_and_regions(), budget=st.integers(0, 3000), bytes_per_voxel=st.integers(1, 8))
def test_the_prediction_is_what_a_plain_least_recently_used_cache_fetches(
    case: tuple[tuple[int, ...], tuple[int, ...], list[Region]], budget: int, bytes_per_voxel: int
) -> None:
    shape, chunk, regions = case
    kept: list[tuple[tuple[int, ...], int]] = []
    wanted = 0
    for region in regions:
        for core in BlockGrid(Region.of_shape(shape), chunk):
            if core.core.intersect(region).n_voxels:
                entry = (core.core.start, core.core.n_voxels * bytes_per_voxel)
                wanted += 0 if entry in kept else entry[1]
                kept = [e for e in kept if e != entry] + [entry]
        while sum(size for _, size in kept) > budget:
            kept.pop(0)
    assert wanted == predicted_fetch_bytes(
        regions, shape=shape, chunk=chunk, bytes_per_voxel=bytes_per_voxel, budget_bytes=budget
    )


@settings(deadline=None, max_examples=25)
@given(case=volumes_and_regions(), budget=st.sampled_from([0, 200, 1500, 10**6]))
def test_the_prediction_is_what_the_cache_fetches(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, ...], tuple[int, ...], list[Region]],
    budget: int,
) -> None:
    shape, chunk, regions = case
    url = str(tmp_path_factory.mktemp("a") / "a")
    small = open_volume(write_image(url, [ramp(shape) + 1], "tzyx", chunks=chunk))
    cache = ChunkCache(small, (0,), budget_bytes=budget)
    for region in regions:
        np.testing.assert_array_equal(cache.read(region).data, small.read(region))
    assert cache.n_bytes_fetched == predicted_fetch_bytes(
        regions, shape=shape, chunk=chunk, bytes_per_voxel=2, budget_bytes=budget
    )


def test_regions_are_clipped_at_the_volume_in_the_prediction() -> None:
    grown = [Region((0, -3, -3, -3), (1, 40, 5, 5))]
    n_bytes = predicted_fetch_bytes(
        grown, shape=(1, 10, 10, 10), chunk=(1, 4, 4, 4), bytes_per_voxel=1, budget_bytes=0
    )
    assert n_bytes == 10 * 8 * 8


def test_a_hundred_thousand_chunks_are_predicted_in_half_a_second_of_work() -> None:
    # Regions of 125 chunks each.
    grid = BlockGrid(Region.of_shape((1, 2000, 2000, 2000)), (1, 200, 200, 200))
    regions = [block.core.grow((0, 44, 44, 44), (0, 44, 44, 44)) for block in grid][:800]
    started = time.process_time()
    predicted_fetch_bytes(
        regions,
        shape=(1, 2000, 2000, 2000),
        chunk=(1, 64, 64, 64),
        bytes_per_voxel=1,
        budget_bytes=2**28,
    )
    assert time.process_time() - started < 0.5


def grown_blocks(volume: Volume, core: int, halo: int) -> list[Region]:
    """Grown regions of cubic cores, clipped."""
    whole = Region.of_shape(volume.shape)
    margin = (0, halo, halo, halo)
    grid = BlockGrid(whole, (1, core, core, core))
    return [block.core.grow(margin, margin).intersect(whole) for block in grid]


def test_each_chunk_is_got_from_the_store_once_when_the_budget_suffices(volume: Volume) -> None:
    watched, store = counted(volume)
    cache = ChunkCache(watched, (0, 1), budget_bytes=10**6)
    regions = grown_blocks(volume, 5, 3)
    for region in regions:
        cache.read(region)
    assert len(store.got) == len(set(store.got)) == 2 * 2 * 3 * 4 * 4
    # Chunks are stored whole, also those at the volume's end.
    assert store.n_bytes == len(store.got) * 4 * 4 * 5 * 2
    assert cache.n_bytes_fetched == 2 * 2 * 9 * 14 * 17 * 2
    assert cache.n_bytes_read > 3 * cache.n_bytes_fetched

    straight, store = counted(volume)
    for region in regions:
        straight.read(region, (0, 1))
    assert len(store.got) > 3 * len(set(store.got))


def test_a_small_budget_keeps_what_was_touched_last(volume: Volume) -> None:
    one = 4 * 4 * 5 * 2
    watched, store = counted(volume)
    cache = ChunkCache(watched, (0,), budget_bytes=2 * one)
    row = [Region((0, 0, 0, x), (1, 4, 4, x + 5)) for x in (0, 5, 10)]
    for region in (row[0], row[1], row[0], row[2], row[0]):
        cache.read(region)
    assert len(store.got) == 3
    cache.read(row[1])
    assert len(store.got) == 4
    assert cache.n_bytes_kept == 2 * one


def test_what_is_missing_is_read_in_few_boxes(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[Region] = []
    read = Volume.read

    def note(self: Volume, region: Region, channels: object = (0,)) -> object:
        boxes.append(region)
        return read(self, region, channels)

    monkeypatch.setattr(Volume, "read", note)
    cache = ChunkCache(volume, (0,), budget_bytes=10**6)
    cache.read(Region((0, 1, 5, 3), (1, 6, 9, 12)))
    cache.read(Region((0, 1, 5, 3), (1, 6, 9, 16)))
    cache.read(Region((0, 1, 5, 3), (1, 6, 9, 16)))
    assert boxes == [Region((0, 0, 4, 0), (1, 8, 12, 15)), Region((0, 0, 4, 15), (1, 8, 12, 17))]
    boxes.clear()
    ChunkCache(volume, (0,), budget_bytes=0).read(Region((0, 1, 5, 3), (1, 6, 9, 12)))
    assert boxes == [Region((0, 1, 5, 3), (1, 6, 9, 12))]


@given(
    st.sets(st.tuples(*(st.integers(0, 3) for _ in range(4))), max_size=40),
    regions_within((4, 4, 4, 4)),
)
def test_boxes_hold_every_position_exactly_once(
    positions: set[tuple[int, ...]], whole: Region
) -> None:
    held = [
        tuple(int(i) for i in np.add(box.start, index))
        for box in boxes_of(sorted(positions))
        for index in np.ndindex(box.shape)
    ]
    assert sorted(held) == sorted(positions)
    full = [tuple(int(i) for i in np.add(whole.start, index)) for index in np.ndindex(whole.shape)]
    assert boxes_of(full) == ([whole] if full else [])


def test_threads_share_what_they_fetch(volume: Volume) -> None:
    watched, store = counted(volume)
    store.delay_s = 0.002
    cache = ChunkCache(watched, (0,), budget_bytes=10**6)
    regions = grown_blocks(volume, 5, 3)
    with ThreadPoolExecutor(4) as pool:
        for region, reading in zip(regions, pool.map(cache.read, regions), strict=True):
            np.testing.assert_array_equal(reading.data, volume.read(region))
    assert len(store.got) == len(set(store.got))
    assert cache.n_bytes_fetched == 2 * 9 * 14 * 17 * 2
    assert cache.n_bytes_read == sum(2 * r.n_voxels for r in regions)


def test_threads_with_a_small_budget_read_what_the_volume_holds(volume: Volume) -> None:
    budget = 5 * 4 * 4 * 5 * 2
    cache = ChunkCache(volume, (0,), budget_bytes=budget)
    regions = grown_blocks(volume, 5, 3) * 2
    with ThreadPoolExecutor(4) as pool:
        for region, reading in zip(regions, pool.map(cache.read, regions), strict=True):
            np.testing.assert_array_equal(reading.data, volume.read(region))
    assert 0 < cache.n_bytes_kept <= budget


def test_a_chunk_is_fetched_once_by_threads_that_overlap_even_without_room_to_keep_it(
    volume: Volume,
) -> None:
    watched, store = counted(volume)
    store.delay_s = 0.2
    cache = ChunkCache(watched, (0,), budget_bytes=1)
    region = Region((0, 0, 0, 0), (1, 4, 4, 5))
    with ThreadPoolExecutor(2) as pool:
        readings = list(pool.map(cache.read, [region, region]))
    np.testing.assert_array_equal(readings[0].data, readings[1].data)
    assert len(store.got) == 1
    assert cache.n_bytes_kept == 0


def test_a_chunk_that_failed_is_an_error_for_all_who_wait_and_is_tried_again(
    volume: Volume,
) -> None:
    watched, store = counted(volume)
    cache = ChunkCache(watched, (0,), budget_bytes=10**6)
    region = Region((0, 0, 0, 0), (1, 4, 4, 5))
    both = threading.Barrier(2)

    def read() -> object:
        both.wait()
        try:
            return cache.read(region).data
        except OSError as error:
            return str(error)

    store.delay_s = 0.2
    store.failures = [ConnectionError("unreachable")]
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(read) for _ in range(2)]
        assert [f.result() for f in futures] == ["unreachable"] * 2
    assert cache.n_bytes_kept == 0
    np.testing.assert_array_equal(cache.read(region).data, volume.read(region))


def test_a_region_outside_is_refused(volume: Volume) -> None:
    for budget in (0, 10**6):
        cache = ChunkCache(volume, (0,), budget_bytes=budget)
        with pytest.raises(UsageError, match=r"is not inside .* \(2, 9, 14, 17\)"):
            cache.read(Region((0, 0, 0, 0), (1, 9, 14, 18)))
        with pytest.raises(UsageError, match="channels"):
            ChunkCache(volume, (2,), budget_bytes=budget).read(Region.of_shape(volume.shape))
