"""Ids of blocks become the numbers of their objects, whatever the layout of the arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bigseg import grow_stages
from bigseg.grow_stages import renumber

shapes = st.tuples(*[st.integers(1, n) for n in (2, 5, 4, 6)])


@st.composite
def numbers_and_ids(draw):
    dtype = np.dtype(draw(st.sampled_from(["u1", "u2", "u4", "u8"])))
    values = st.integers(0, np.iinfo(dtype).max)
    numbers = draw(arrays(dtype, st.integers(0, 6), elements=values))
    id_type = draw(st.sampled_from([np.uint16, np.uint32]))
    ids = draw(arrays(id_type, draw(shapes), elements=st.integers(0, len(numbers))))
    return numbers, ids


@settings(max_examples=200, deadline=None)
@given(numbers_and_ids(), st.booleans(), st.sampled_from([1, 7, 1 << 16]))
def test_ids_become_the_numbers_of_their_components(drawn, is_part, n_cached):
    numbers, ids = drawn
    expected = np.concatenate([np.zeros(1, numbers.dtype), numbers])[ids]
    if is_part:
        ids = np.pad(ids, 1, constant_values=99)[1:-1, 1:-1, 1:-1, 1:-1]
        out = np.full([n + 2 for n in ids.shape], 99, numbers.dtype)[1:-1, 1:-1, 1:-1, 1:-1]
    else:
        out = np.empty(ids.shape, numbers.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow_stages, "_CACHED_VOXELS", n_cached)
        renumber(ids, numbers, out=out)
    np.testing.assert_array_equal(out, expected)


def test_an_id_without_a_number_is_an_error():
    ids = np.full((1, 1, 1, 1), 3, np.uint32)
    with pytest.raises(IndexError):
        renumber(ids, np.ones(2, np.uint64), out=np.empty(ids.shape, np.uint64))
