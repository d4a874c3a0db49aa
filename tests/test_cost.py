"""Sizes that cost least within a memory, and the memory that they are said to take."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.blocks import round_up
from bigseg.config import UNetSpec
from bigseg.cost import MOST_ELEMENTS, MemoryModel, default_beam, default_tile, forward_bytes
from bigseg.model import footprint
from bigseg.predict import tile_geometry

TWO_D = UNetSpec.build(2, out_channels=2, depth=2, width=2)
WIDE_3D = UNetSpec.build(3, out_channels=2, depth=3, width=16)
WIDE_2D = UNetSpec.build(2, out_channels=2, depth=4, width=32)
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 1000, 1000),
    (3, 20_000, 1, 1),
    (1, 20_000, 30, 30),
    (1, 131, 4000, 4000),
    (1, 200, 200, 200),
    (1, 20_000, 20_000, 20_000),
]
ANISOTROPIC = UNetSpec.build(3, out_channels=2, depth=3, width=16, voxel_um=(4.0, 1.0, 1.0))


def model_of(spec, memory_bytes=6 << 30, **values):
    given = {"device": "cpu", "value_bytes": 4, "in_voxel_bytes": 1, "out_voxel_bytes": 1}
    return MemoryModel(spec=spec, memory_bytes=memory_bytes, **{**given, **values})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", [WIDE_2D, WIDE_3D, ANISOTROPIC])
def test_the_default_tile_fits_the_network_and_the_budget(shape, spec):
    model = model_of(spec)
    tile = default_tile(spec, shape, model.fits)
    output = tile_geometry(spec, tile).output
    assert model.needs(output) + model.cache_bytes <= 6 << 30
    grown = math.prod(tile_geometry(spec, tile).input)
    assert grown * spec.widths[0] <= MOST_ELEMENTS
    for n, t, stride in zip(
        shape[-spec.dims :], tile[-spec.dims :], footprint(spec).stride, strict=True
    ):
        assert t <= round_up(n, stride)


def test_the_default_tile_computes_little_more_than_a_much_finer_search():
    mark = footprint(WIDE_3D)
    for shape in [(1, 300, 700, 700)]:

        def cost(tile, shape=shape):
            n_tiles = math.prod(-(-n // t) for n, t in zip(shape[1:], tile, strict=True))
            return n_tiles * mark.flops(mark.smallest_output(tile))

        def fits(output):
            return forward_bytes(WIDE_3D, output[-3:]) <= 2 << 30

        sides = [range(64, min(n + 23, 256), 24) for n in shape[1:]]
        truth = min(
            cost(tile) for tile in itertools.product(*sides) if fits(mark.smallest_output(tile))
        )
        assert cost(default_tile(WIDE_3D, shape, fits)[1:]) <= 1.1 * truth


def test_a_network_too_large_for_the_budget_has_the_smallest_tile():
    assert default_tile(WIDE_3D, (1, 500, 500, 500), lambda _: False) == (1, 8, 8, 8)


def always(_):
    return True


def test_a_2d_network_takes_several_planes_at_once_where_there_are_any():
    assert default_tile(TWO_D, (1, 50, 64, 64), always, n_planes=8) == (1, 8, 64, 64)
    assert default_tile(TWO_D, (1, 3, 64, 64), always, n_planes=8) == (1, 3, 64, 64)


def test_every_worker_gets_a_tile_of_a_small_volume():
    model = model_of(WIDE_3D, 16 << 30)

    def n_tiles(n_workers):
        tile = default_tile(WIDE_3D, (1, 200, 200, 200), model.fits, n_workers=n_workers)
        return math.prod(-(-200 // t) for t in tile[1:])

    assert n_tiles(1) == 1
    assert n_tiles(2) == 2
    assert n_tiles(8) == 8


def test_more_memory_never_computes_more():
    mark = footprint(WIDE_3D)

    def computed(gigabytes):
        model = model_of(WIDE_3D, gigabytes << 30)
        tile = default_tile(WIDE_3D, (1, 700, 900, 1100), model.fits)
        n = math.prod(-(-a // b) for a, b in zip((700, 900, 1100), tile[1:], strict=True))
        return n * mark.flops(mark.smallest_output(tile[1:]))

    costs = [computed(g) for g in (1, 2, 4, 8, 16)]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_a_gpu_is_bounded_by_its_own_memory_and_by_32_bit_sizes():
    values = {"device": "cuda", "value_bytes": 2}
    shape = (1, 4000, 4000, 4000)

    def side(device_gigabytes):
        model = model_of(WIDE_3D, 100 << 30, device_bytes=device_gigabytes << 30, **values)
        tile = default_tile(WIDE_3D, shape, model.fits)
        return round(math.prod(tile[1:]) ** (1 / 3))

    # From 24 GiB on it is the sizes.
    assert side(4) < side(8) < side(24) == side(80)
    geometry = tile_geometry(
        WIDE_3D,
        default_tile(
            WIDE_3D, shape, model_of(WIDE_3D, 900 << 30, device_bytes=800 << 30, **values).fits
        ),
    )
    assert math.prod(geometry.input) * WIDE_3D.widths[0] <= MOST_ELEMENTS


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.integers(1, 40)] * 3),
    st.tuples(*[st.integers(0, 30)] * 3),
    st.tuples(*[st.integers(1, 50)] * 3),
    st.integers(0, 10**6),
)
def test_a_beam_keeps_within_its_memory_or_is_one_block(n, core, halo, chunk, budget):
    shape = (1, *(a * b for a, b in zip(n, core, strict=True)))
    (y, x), n_bytes = default_beam(
        (1, *n),
        (1, *core),
        (0, *halo),
        chunk=(1, *chunk),
        shape=shape,
        voxel_bytes=1,
        budget_bytes=budget,
    )
    assert 1 <= y <= n[1]
    assert 1 <= x <= n[2]
    assert n_bytes <= budget
    if (y, x) != (1, 1):
        # All that a plane of the beam's blocks reads at once fits.
        read = [
            min(k * c + 2 * h, s)
            for k, c, h, s in zip((1, y, x), core, halo, shape[1:], strict=True)
        ]
        assert math.prod(read) <= budget


def test_a_beam_covers_the_plane_where_the_memory_allows_it():
    beam, n_bytes = default_beam(
        (1, 5, 5, 5),
        (1, 100, 100, 100),
        (0, 44, 44, 44),
        chunk=(1, 64, 64, 64),
        shape=(1, 500, 500, 500),
        voxel_bytes=1,
        budget_bytes=1 << 30,
    )
    assert beam == (5, 5)
    assert n_bytes < 500 * 500 * 500
