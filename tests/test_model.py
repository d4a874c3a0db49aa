"""The network against the papers, and its footprint against the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigseg.config import UNetSpec
from bigseg.errors import UsageError
from bigseg.model import UNet, footprint, valid_copy


def spec_2d(**changes) -> UNetSpec:
    return UNetSpec.build(2, out_channels=2, depth=changes.pop("depth", 2), width=4, **changes)


def test_paper_2d_572_gives_388():
    spec = UNetSpec.build(2, out_channels=2, depth=4, width=64)
    assert spec.widths == (64, 128, 256, 512, 1024)
    assert footprint(spec).output_shape((572, 572)) == (388, 388)
    assert footprint(spec).halo == (92, 92)


def test_paper_2d_network_really_computes_388():
    net = UNet(UNetSpec.build(2, out_channels=2, depth=4, width=1)).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_paper_3d_132_gives_44():
    spec = UNetSpec.build(3, out_channels=3, depth=3, width=32)
    mark = footprint(spec)
    assert mark.output_shape((132, 132, 116)) == (44, 44, 28)
    assert mark.halo == (44, 44, 44)
    assert mark.stride == (8, 8, 8)


def test_paper_3d_network_really_computes_44():
    net = UNet(UNetSpec.build(3, out_channels=3, depth=3, width=1)).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 1, 132, 132, 116)).shape == (1, 3, 44, 44, 28)


def test_paper_2d_has_as_many_parameters_as_published_implementations():
    # 31.0 million, the figure that reimplementations of the 64 ... 1024 network report.
    net = UNet(UNetSpec.build(2, out_channels=2, depth=4, width=64))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(31.03e6, rel=0.002)


specs = st.builds(
    lambda dims, n_convs, levels: UNetSpec(
        dims=dims,
        out_channels=2,
        n_convs=n_convs,
        widths=(1,) * len(levels),
        kernels=tuple(tuple(k[:dims]) for k, _ in levels),
        strides=tuple(tuple(s[:dims]) for _, s in levels[:-1]),
    ),
    st.sampled_from([2, 3]),
    st.integers(1, 2),
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([1, 3]), min_size=3, max_size=3),
            st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 9))
def test_footprint_says_what_the_network_computes(spec, at_least):
    mark = footprint(spec)
    output = mark.smallest_output((at_least,) * spec.dims)
    net = UNet(spec).eval()
    with torch.inference_mode():
        logits = net(torch.zeros(1, 1, *mark.input_shape(output)))
    assert logits.shape[2:] == output
    assert all(
        at_least
        <= o
        < at_least + mark.stride[i] + 2 * sum(k[i] for k in spec.kernels) * mark.stride[i]
        for i, o in enumerate(output)
    )


@settings(max_examples=15, deadline=None)
@given(specs)
def test_halo_is_the_receptive_field(spec):
    """A voxel at the rim of the halo changes the output or could; one beyond it never does."""
    mark = footprint(spec)
    output = mark.smallest_output(tuple(2 * s for s in mark.stride))
    net = UNet(spec.model_copy(update={"norm": "none"})).eval()
    for p in net.parameters():
        torch.nn.init.constant_(p, 0.5)  # positive everywhere: no ReLU is ever closed
    shape = mark.input_shape(output)
    x = torch.ones(1, 1, *shape, requires_grad=True)
    net(x)[(0, 0, *(0,) * spec.dims)].backward()
    reach = x.grad[0, 0].nonzero().max(dim=0).values + 1
    # Output voxel 0 lies at `halo`; it sees up to halo beyond itself, plus the pooling phase.
    for axis in range(spec.dims):
        assert reach[axis] <= 2 * mark.halo[axis] + mark.stride[axis]


def test_network_is_equivariant_at_its_stride():
    spec = spec_2d()
    mark = footprint(spec)
    net = UNet(spec).double().eval()
    output = mark.smallest_output((16, 16))
    shape = mark.input_shape(output)
    x = torch.randn(1, 1, shape[0] + mark.stride[0], shape[1], dtype=torch.float64)
    with torch.inference_mode():
        a, b = net(x[:, :, : shape[0]]), net(x[:, :, mark.stride[0] :])
    torch.testing.assert_close(a[:, :, mark.stride[0] :], b[:, :, : -mark.stride[0]])


def test_same_padding_keeps_the_size_and_shares_weights_with_valid():
    net = UNet(spec_2d(padding="same")).eval()
    mark = footprint(net.spec)
    x = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        assert net(x).shape[2:] == (64, 64)
        valid = valid_copy(net)
        output = mark.smallest_output((8, 8))
        shape = mark.input_shape(output)
        inside = valid(x[:, :, : shape[0], : shape[1]])
        # Where no padding is seen, both compute the same.
        halo = mark.halo[0]
        assert torch.allclose(inside, _whole_valid(valid, x)[:, :, : output[0], : output[1]])
        assert halo == 20


def _whole_valid(valid, x):
    mark = footprint(valid.spec)
    n = x.shape[2] - 2 * mark.halo[0]
    while not mark.fits((n, n)):
        n -= 1
    size = n + 2 * mark.halo[0]
    return valid(x[:, :, :size, :size])


def test_sizes_that_do_not_fit_are_refused_with_one_that_does():
    mark = footprint(spec_2d(depth=3))
    with pytest.raises(UsageError, match=r"cannot compute an output of \(101, 101\).*\(108, 108\)"):
        mark.input_shape((101, 101))
    with pytest.raises(UsageError, match=r"input of \(189, 189\) voxels does not fit"):
        mark.output_shape((189, 189))


def test_flops_of_one_convolution_by_hand():
    spec = UNetSpec(dims=2, out_channels=1, widths=(1,), kernels=((3, 3),), strides=(), n_convs=1)
    # 3x3 taps on 10x10 outputs, then the 1x1 head: 2 operations each.
    assert footprint(spec).flops((10, 10)) == 2 * 9 * 100 + 2 * 100


def test_mirror_images_cost_a_pass_each():
    once = UNetSpec.build(3, out_channels=2, depth=1, width=4)
    mirrored = once.model_copy(update={"mirror": True})
    a, b = footprint(once), footprint(mirrored)
    assert b.flops((8, 8, 8)) == 8 * a.flops((8, 8, 8))
    assert b.useful_flops(1000) == 8 * a.useful_flops(1000)
    assert b.flops_of_all([[8]] * 3).tolist() == (8 * a.flops_of_all([[8]] * 3)).tolist()


def test_anisotropic_voxels_are_not_pooled_along_the_coarse_axis():
    spec = UNetSpec.build(3, out_channels=2, depth=3, width=4, voxel_um=(0.04, 0.01, 0.01))
    assert spec.strides == ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert spec.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert footprint(spec).stride == (2, 8, 8)
