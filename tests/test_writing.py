"""What is written is what is read; units that hold nothing leave nothing behind."""

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigseg.writing import UnitWriter


def keys(array):
    group = array.store_path
    return {
        str(p.relative_to(group.store.root / group.path))
        for p in (group.store.root / group.path).rglob("*")
        if p.is_file() and p.name not in ("zarr.json", ".zarray", ".zattrs")
    }


@pytest.mark.parametrize("zarr_format", [2, 3])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_units_with_values_are_stored_and_no_others(tmp_path_factory, zarr_format, data):
    chunks = (2, 3, 4)
    shards = data.draw(st.sampled_from([None, (4, 3, 8)])) if zarr_format == 3 else None
    unit = shards or chunks
    shape = tuple(data.draw(st.integers(1, 3 * u)) for u in unit)
    array = zarr.create_array(
        tmp_path_factory.mktemp("a") / "a.zarr",
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype="uint8",
        zarr_format=zarr_format,
        fill_value=0,
    )
    truth = np.zeros(shape, np.uint8)
    for _ in range(3):
        first = [data.draw(st.integers(0, (n - 1) // u)) for n, u in zip(shape, unit, strict=True)]
        last = [
            data.draw(st.integers(f, (n - 1) // u))
            for f, n, u in zip(first, shape, unit, strict=True)
        ]
        place = tuple(
            slice(f * u, min((g + 1) * u, n))
            for f, g, u, n in zip(first, last, unit, shape, strict=True)
        )
        size = truth[place].shape
        seed = data.draw(st.integers(0, 9))
        values = np.random.default_rng(seed).integers(1, 9, size).astype(np.uint8)
        if seed % 2:
            values[
                : data.draw(st.integers(0, size[0])), :, : data.draw(st.integers(0, size[2]))
            ] = 0
        UnitWriter(array).write([s.start for s in place], values)
        truth[place] = values
    np.testing.assert_array_equal(array[:], truth)
    blocks = np.ndindex(*(-(-n // u) for n, u in zip(shape, unit, strict=True)))
    with_values = sum(
        bool(truth[tuple(slice(i * u, (i + 1) * u) for i, u in zip(b, unit, strict=True))].any())
        for b in blocks
    )
    assert len(keys(array)) == with_values
