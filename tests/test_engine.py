"""Every engine computes the same network, in valid mode, and says which it is."""

import warnings

import numpy as np
import pytest
import torch
from helpers import write_model

from bigseg import engine
from bigseg.config import UNetSpec
from bigseg.engine import (
    EngineSpec,
    best_precision,
    build_engine,
    pick_device,
    resolve_engine,
    torch_forward,
)
from bigseg.errors import ResourceError, UsageError
from bigseg.model import ConvBlock, footprint, valid_copy

CPU = torch.device("cpu")
SPECS = {
    "2-D": UNetSpec.build(2, out_channels=3, depth=2, width=8),
    "2-D, seven classes, two channels": UNetSpec.build(
        2, out_channels=7, depth=1, width=8, in_channels=2
    ),
    "3-D": UNetSpec.build(3, out_channels=2, depth=1, width=8),
    "3-D, anisotropic, five classes, padded": UNetSpec.build(
        3, out_channels=5, depth=2, width=4, voxel_um=(3.0, 1.0, 1.0), padding="same"
    ),
    "3-D, no norm, no pooling": UNetSpec(
        dims=3, out_channels=2, widths=(4,), kernels=((1, 3, 3),), strides=(), norm="none"
    ),
}
HAS_BF16 = bool({"amx_bf16", "avx512_bf16"} & engine._cpu_flags())
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor does not multiply in bf16")


def batch_for(spec, *, n=1, extra=0, seed=0):
    mark = footprint(spec)
    least = tuple(s + 4 + extra for s in mark.stride)
    shape = (n, spec.in_channels, *mark.input_shape(mark.smallest_output(least)))
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(net, batch):
    """The U-Net as it was trained, without padding, batch norm where it stands."""
    with torch.inference_mode():
        return valid_copy(net)(torch.from_numpy(batch)).softmax(1).numpy()


def engine_of(name, precision, net, batch, n_threads=1):
    spec = resolve_engine(name, precision, device="cpu")
    return build_engine(net, spec, input_shape=batch.shape, n_threads=n_threads)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", SPECS)
def test_torch_in_float32_is_the_plain_network(case, tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS[case])
    batch = batch_for(SPECS[case], n=2)
    found = torch_forward(net, device=CPU, precision="fp32")(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(net, batch), atol=1e-6, rtol=0)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in SPECS if case not in ("2-D", "3-D")])
def test_openvino_in_float32_is_torch_at_any_size(case, tmp_path):
    spec = SPECS[case]
    net, _ = write_model(tmp_path / "m.safetensors", spec)
    # Far from the size on which the network is traced, and as several planes where it is 2-D.
    batch = batch_for(spec, n=3 if spec.dims == 2 else 1, extra=13)
    truth = torch_forward(net, device=CPU, precision="fp32")(batch)
    found = engine_of("openvino", "fp32", net, batch)(batch)
    assert (found.shape, found.dtype) == (truth.shape, np.float32)
    np.testing.assert_allclose(found, truth, atol=1e-4, rtol=0)


@needs_bf16
@pytest.mark.parametrize("name", ["torch", "openvino"])
@pytest.mark.parametrize("case", ["2-D", "3-D"])
def test_bf16_is_near_float32(case, name, tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS[case])
    batch = batch_for(SPECS[case], extra=9)
    found = engine_of(name, "bf16", net, batch)(batch)
    np.testing.assert_allclose(found, plain(net, batch), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("name", "case"),
    [*(("torch", case) for case in SPECS), ("openvino", "2-D, seven classes, two channels")],
)
def test_the_number_of_threads_does_not_change_a_byte(name, case, tmp_path, set_threads):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS[case])
    batch = batch_for(SPECS[case], extra=20)
    results = []
    for n_threads in (1, 2):
        set_threads(n_threads)
        results.append(engine_of(name, "fp32", net, batch, n_threads)(batch))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_result_is_not_overwritten_by_the_next(name, tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    one, two = batch_for(SPECS["2-D"], seed=1), batch_for(SPECS["2-D"], seed=2)
    forward = engine_of(name, "fp32", net, one)
    first = forward(one)
    kept = first.copy()
    assert not np.array_equal(forward(two), first)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(forward(one), kept)


def test_batch_norm_is_folded_into_the_convolutions(tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["3-D"])
    folded = engine._fold_batch_norm(valid_copy(net))
    kinds = {type(m).__name__ for b in folded.modules() if isinstance(b, ConvBlock) for m in b}
    assert kinds == {"Conv3d", "Identity", "ReLU"}
    x = torch.from_numpy(batch_for(SPECS["3-D"]))
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), valid_copy(net)(x), atol=1e-5, rtol=0)


def test_building_an_engine_leaves_the_network_and_the_warnings_alone(tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    filters = list(warnings.filters)
    batch = batch_for(SPECS["2-D"])
    for name in ("torch", "openvino"):
        engine_of(name, "fp32", net, batch)(batch)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert warnings.filters == filters


@pytest.mark.parametrize(
    "change", [{"version": "0.1"}, {"isa": "sse2"}, {"version": "0.1", "name": "torch"}]
)
def test_an_engine_that_this_worker_does_not_have_is_refused(change, tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    here = resolve_engine("openvino", "fp32", device="cpu")
    other = here.model_copy(update=change)
    with pytest.raises(ResourceError) as caught:
        build_engine(net, other, input_shape=(1, 1, 32, 32), n_threads=1)
    assert f"the plan asks for {other}, this worker has " in str(caught.value)
    assert "run all workers in one environment on one kind of processor" in str(caught.value)


def test_openvino_on_a_gpu_is_refused():
    with pytest.raises(UsageError) as caught:
        resolve_engine("openvino", "auto", device="cuda")
    assert str(caught.value) == (
        "engine openvino runs on processors, not on GPUs: use --engine torch"
    )


def test_openvino_that_is_not_installed_is_refused_and_auto_takes_torch(monkeypatch):
    monkeypatch.setattr(engine, "_installed", lambda package: False)
    with pytest.raises(ResourceError, match=r"not installed: pip install openvino"):
        resolve_engine("openvino", "auto", device="cpu")
    assert resolve_engine("auto", "fp32", device="cpu").name == "torch"


def test_auto_takes_openvino_on_processors_and_torch_on_gpus():
    on_cpu = resolve_engine("auto", "auto", device="cpu")
    assert (on_cpu.name, on_cpu.device) == ("openvino", "cpu")
    on_gpu = resolve_engine("auto", "fp32", device="cuda")
    assert (on_gpu.name, on_gpu.device, on_gpu.isa) == ("torch", "cuda", "cuda")
    # Without the build: a driver without a GPU has another than its workers.
    assert on_gpu.version == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("flags", "precision", "isa"),
    [
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, "bf16", "amx_bf16"),
        ({"avx2", "avx512f", "avx512_bf16"}, "bf16", "avx512_bf16"),
        ({"avx2", "avx512f"}, "fp32", "avx512f"),
        ({"avx2"}, "fp32", "avx2"),
    ],
)
def test_the_precision_follows_the_processor(flags, precision, isa, monkeypatch):
    monkeypatch.setattr(engine, "_cpu_flags", lambda: frozenset(flags))
    best_precision.cache_clear()
    spec = resolve_engine("torch", "auto", device="cpu")
    best_precision.cache_clear()
    assert (spec.precision, spec.isa) == (precision, isa)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ResourceError, match="a GPU was asked for, torch sees none"):
        pick_device("cuda")
    assert pick_device() == CPU


def test_an_engine_is_described_in_one_line():
    spec = EngineSpec(name="torch", device="cpu", precision="fp32", version="2.13", isa="avx2")
    assert str(spec) == "torch 2.13 on cpu in fp32 (avx2)"
