"""Every engine computes the same network, in valid mode, and says which it is."""

import itertools
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from helpers import write_model

from bigseg import engine, openvino_engine, torch_engine
from bigseg.config import UNetSpec
from bigseg.engine import (
    EngineSpec,
    best_precision,
    build_engine,
    candidates,
    device_forward,
    pick_device,
    resolve_engine,
    torch_forward,
)
from bigseg.errors import ResourceError, UsageError
from bigseg.model import ConvBlock, footprint, valid_copy
from bigseg.reuse import save_entry

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


# One or two levels without poolings: compiling takes seconds for each layer.
COMPILED = {
    "2-D": UNetSpec(
        dims=2, out_channels=7, in_channels=2, widths=(8,), kernels=((3, 3),), strides=()
    ),
    "3-D": UNetSpec.build(3, out_channels=3, depth=1, width=4),
}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """A folder for compiled networks that all tests of this file share."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(folder))
        yield folder


@pytest.fixture
def nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGSEG_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(scope="module", params=COMPILED)
def compiled_net(request, tmp_path_factory):
    """A network with a batch and what its engine gave when it was compiled, not loaded."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    net, _ = write_model(path, COMPILED[request.param])
    batch = batch_for(COMPILED[request.param], n=2 if request.param == "2-D" else 1, extra=20)
    return net, batch, engine_of("compiled", "fp32", net, batch)(batch)


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


@pytest.mark.parametrize(
    ("case", "names"), [("2-D", ["torch", "openvino", "compiled"]), ("3-D", ["torch", "openvino"])]
)
def test_mirror_images_are_averaged_by_every_engine(case, names, tmp_path, nothing_kept):
    spec = SPECS[case].model_copy(update={"mirror": True})
    net, _ = write_model(tmp_path / "m.safetensors", spec)
    batch = batch_for(spec, n=2 if spec.dims == 2 else 1, extra=5)
    axes = range(2, batch.ndim)
    sides = [s for n in range(len(axes) + 1) for s in itertools.combinations(axes, n)]
    assert len(sides) == spec.n_passes == 2**spec.dims
    images = [np.flip(plain(net, np.flip(batch, s).copy()), s) for s in sides]
    truth = np.mean(images, axis=0)
    assert np.abs(images[-1] - images[0]).max() > 1e-3
    forwards = [engine_of(name, "fp32", net, batch) for name in names]
    for forward in (torch_forward(net, device=CPU, precision="fp32"), *forwards):
        found = forward(batch)
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
    folded = torch_engine.fold_batch_norm(valid_copy(net))
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


def test_openvino_that_is_not_installed_is_refused_and_auto_takes_torch(monkeypatch, caplog):
    monkeypatch.setattr(engine, "_installed", lambda package: False)
    with pytest.raises(ResourceError, match=r"not installed: pip install openvino"):
        resolve_engine("openvino", "auto", device="cpu")
    engine._warn_once.cache_clear()
    for _ in range(2):
        assert resolve_engine("auto", "fp32", device="cpu").name == "torch"
    assert [record.message for record in caplog.records] == [
        "openvino is not installed, torch is used, which is slower: pip install openvino"
    ]


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


def test_compiled_in_float32_is_torch(compiled_net):
    net, batch, found = compiled_net
    truth = torch_forward(net, device=CPU, precision="fp32")(batch)
    assert (found.shape, found.dtype) == (truth.shape, np.float32)
    np.testing.assert_allclose(found, truth, atol=1e-5, rtol=0)


def test_what_was_compiled_is_loaded_the_next_time_and_gives_the_same_bytes(
    compiled_net, monkeypatch, set_threads
):
    net, batch, first = compiled_net
    # Whoever compiles now fails, so what follows was kept.
    monkeypatch.setattr(torch_engine, "_compile_ahead", None)
    for n_threads in (1, 2):
        set_threads(n_threads)
        again = engine_of("compiled", "fp32", net, batch, n_threads)
        np.testing.assert_array_equal(again(batch), first)
        np.testing.assert_array_equal(again(batch), first)


def test_the_threads_while_compiling_change_no_byte(compiled_net, nothing_kept, set_threads):
    net, batch, first = compiled_net
    set_threads(1 if torch.get_num_threads() > 1 else 2)
    np.testing.assert_array_equal(engine_of("compiled", "fp32", net, batch)(batch), first)


def test_an_engine_for_one_shape_refuses_others(compiled_net):
    net, batch, _ = compiled_net
    forward = engine_of("compiled", "fp32", net, batch)
    with pytest.raises(UsageError, match=r"was given to an engine that is built for .* only"):
        forward(batch[..., :-1])


def environment():
    # What begins with an underscore is torch's own, set when inductor is imported.
    return {name: value for name, value in os.environ.items() if not name.startswith("_TORCH")}


def test_compiling_leaves_the_environment_and_the_warnings_alone(compiled_net):
    net, batch, _ = compiled_net
    before, filters = environment(), list(warnings.filters)
    engine_of("compiled", "fp32", net, batch)(batch)
    assert environment() == before
    assert warnings.filters == filters


def test_openvino_loads_what_it_kept_and_gives_the_same_bytes(tmp_path, nothing_kept, monkeypatch):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["3-D"])
    batch = batch_for(SPECS["3-D"])
    first = engine_of("openvino", "fp32", net, batch)(batch)
    monkeypatch.setattr(openvino_engine, "_converted", None)
    for n_threads in (1, 2):
        again = engine_of("openvino", "fp32", net, batch, n_threads)
        np.testing.assert_array_equal(again(batch), first)
    other, _ = write_model(tmp_path / "other.safetensors", SPECS["3-D"], seed=1)
    with pytest.raises(TypeError):
        engine_of("openvino", "fp32", other, batch)


@pytest.mark.parametrize("harm", ["a bit", "all of it", "foreign"])
def test_a_damaged_entry_is_made_anew(harm, tmp_path, nothing_kept, caplog):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    batch = batch_for(SPECS["2-D"])
    first = engine_of("openvino", "fp32", net, batch)(batch)
    (entry,) = nothing_kept.iterdir()
    whole = entry.read_bytes()
    if harm == "foreign":
        save_entry(entry.name, b"not what OpenVINO wrote")
    else:
        entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if harm == "a bit" else b"")
    np.testing.assert_array_equal(engine_of("openvino", "fp32", net, batch)(batch), first)
    assert "made anew" in caplog.text
    assert len(entry.read_bytes()) == len(whole)


def test_a_library_that_torch_does_not_take_is_made_anew(compiled_net, monkeypatch, caplog):
    net, batch, first = compiled_net
    package = torch_engine.load_entry(_name_of_package(net, batch))
    save_entry(_name_of_package(net, batch), b"not a library")
    monkeypatch.setattr(torch_engine, "_compile_ahead", lambda module, example: package)
    np.testing.assert_array_equal(engine_of("compiled", "fp32", net, batch)(batch), first)
    assert "it is made anew" in caplog.text


def _name_of_package(net, batch):
    spec = resolve_engine("compiled", "fp32", device="cpu")
    return torch_engine._key(net, spec, batch.shape) + ".pt2"


def test_without_a_folder_engines_are_built_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIGSEG_CACHE", str(tmp_path / "file" / "folder"))
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    batch = batch_for(SPECS["2-D"])
    for _ in range(2):
        engine_of("openvino", "fp32", net, batch)(batch)
    assert len(caplog.records) == 1
    assert "every run compiles anew; set BIGSEG_CACHE to a folder of your own" in caplog.text


def test_openvino_that_takes_more_threads_or_another_precision_is_refused():
    class Compiled:
        def __init__(self, **properties):
            self.properties = properties

        def get_property(self, name):
            return self.properties[name]

    import openvino

    spec = EngineSpec(name="openvino", device="cpu", precision="fp32", version="1", isa="avx2")
    taken = {
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
        "INFERENCE_NUM_THREADS": 2,
        "ENABLE_CPU_PINNING": False,
    }
    openvino_engine._check(Compiled(**taken), spec, 2)
    with pytest.raises(ResourceError, match="OpenVINO uses 2 threads where 1 were set"):
        openvino_engine._check(Compiled(**taken), spec, 1)
    with pytest.raises(ResourceError, match="or pins them"):
        openvino_engine._check(Compiled(**taken | {"ENABLE_CPU_PINNING": True}), spec, 2)
    wish = spec.model_copy(update={"precision": "bf16"})
    with pytest.raises(ResourceError, match="computes in f32 on this processor where bf16"):
        openvino_engine._check(Compiled(**taken), wish, 2)


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx2", "avx512f"}])
def test_openvino_in_bf16_is_refused_where_it_would_compute_in_float32(flags, monkeypatch):
    monkeypatch.setattr(engine, "_cpu_flags", lambda: frozenset(flags))
    best_precision.cache_clear()
    try:
        with pytest.raises(ResourceError, match="has no bf16 on this processor: use --precision"):
            resolve_engine("openvino", "bf16", device="cpu")
        assert resolve_engine("torch", "bf16", device="cpu").precision == "bf16"
    finally:
        best_precision.cache_clear()


def test_what_runs_on_gpus_only_is_refused_on_processors():
    with pytest.raises(UsageError) as caught:
        resolve_engine("tensorrt", "auto", device="cpu")
    assert str(caught.value) == (
        "engine tensorrt runs on GPUs, not on processors: use --engine torch"
    )
    with pytest.raises(UsageError, match="precision fp16 runs on GPUs, not on processors"):
        resolve_engine("torch", "fp16", device="cpu")


def test_tensorrt_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(engine, "_installed", lambda package: package != "torch-tensorrt")
    with pytest.raises(ResourceError) as caught:
        resolve_engine("tensorrt", "fp16", device="cuda")
    assert str(caught.value) == ("engine tensorrt is not installed: pip install 'bigseg[tensorrt]'")


def test_without_a_compiler_compiled_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=r"needs a C\+\+ compiler .* install g\+\+"):
        resolve_engine("compiled", "fp32", device="cpu")


def names(found):
    return [spec.name for spec in found]


def test_candidates_are_what_can_be_built_the_default_first(tmp_path, monkeypatch):
    assert names(candidates("cpu", "fp32")) == ["openvino", "compiled", "torch"]
    assert candidates("cpu", "fp32")[0] == resolve_engine("auto", "fp32", device="cpu")
    assert names(candidates("cpu", "fp16")) == []
    emulated = best_precision("cpu") != "bf16"
    assert ("compiled" in names(candidates("cpu", "bf16"))) != emulated
    assert names(candidates("cuda", "fp16"))[:2] == ["torch", "compiled"]
    monkeypatch.setattr(engine, "_installed", lambda package: False)
    assert names(candidates("cpu", "fp32")) == ["torch", "compiled"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names(candidates("cpu", "fp32")) == ["torch"]


def test_on_the_device_an_engine_gives_the_bytes_of_the_host(compiled_net):
    net, batch, on_host = compiled_net
    spec = resolve_engine("compiled", "fp32", device="cpu")
    on_device = device_forward(net, spec, input_shape=batch.shape, device=CPU)
    found = on_device(torch.from_numpy(batch))
    assert (found.dtype, found.device) == (torch.float32, CPU)
    np.testing.assert_array_equal(found.numpy(), on_host)


def test_openvino_has_no_function_on_the_device(tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", SPECS["2-D"])
    spec = resolve_engine("openvino", "fp32", device="cpu")
    with pytest.raises(UsageError, match="engine openvino has no forward function on cpu"):
        device_forward(net, spec, input_shape=(1, 1, 32, 32), device=CPU)


def prepared(spec, tmp_path):
    net, _ = write_model(tmp_path / "m.safetensors", spec)
    batch = batch_for(spec)
    module = torch_engine._on_device(net, CPU, "fp32")
    example = torch_engine._as_input(torch.zeros(batch.shape), "fp32")
    truth = torch_forward(net, device=CPU, precision="fp32")(batch)

    def probabilities(logits):
        forward = torch_engine._probabilities(logits, "fp32", spec)
        return forward(torch.from_numpy(batch)).numpy()

    return module, example, probabilities, truth


def test_what_gpus_compile_on_the_first_call_is_torch(tmp_path, nothing_kept):
    """On this processor; nothing of it asks for a GPU."""
    module, example, probabilities, truth = prepared(COMPILED["2-D"], tmp_path)
    before = environment()
    exported = torch_engine._exported(module, example).module()
    compiled = torch_engine._compiled_on_first_call(exported, example)
    assert environment() == before
    np.testing.assert_allclose(probabilities(compiled), truth, atol=1e-5, rtol=0)
    assert any((nothing_kept / "inductor").iterdir())


class FakeTensorRT(types.SimpleNamespace):
    """Its interface, over exported programs; the real one needs a GPU."""

    def __init__(self):
        super().__init__(n_built=0, error=None, settings=None, dynamo=self)

    def compile(self, program, *, arg_inputs, **settings):
        if self.error is not None:
            raise self.error
        self.n_built += 1
        self.settings = settings
        return program.module()

    def save(self, built, path, *, arg_inputs):
        with torch.no_grad():
            torch.export.save(torch.export.export(built, tuple(arg_inputs)), path)

    def load(self, path):
        return torch.export.load(path)


@pytest.fixture
def tensorrt(monkeypatch):
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    return fake


def test_what_tensorrt_built_is_kept_and_loaded(tensorrt, tmp_path, nothing_kept):
    module, example, probabilities, truth = prepared(COMPILED["2-D"], tmp_path)
    for _ in range(2):
        built = torch_engine._tensorrt(module, example, "key")
        np.testing.assert_allclose(probabilities(built), truth, atol=1e-6, rtol=0)
    assert tensorrt.n_built == 1
    # Nothing falls back to torch, no type is chosen by TensorRT, TF32 is off.
    assert tensorrt.settings == {
        "disable_tf32": True,
        "require_full_compilation": True,
        "min_block_size": 1,
    }


def test_what_tensorrt_cannot_build_is_said(tensorrt, tmp_path, nothing_kept):
    module, example, _, _ = prepared(COMPILED["2-D"], tmp_path)
    tensorrt.error = RuntimeError("no kernel fits\nat length")
    with pytest.raises(ResourceError) as caught:
        torch_engine._tensorrt(module, example, "key")
    assert str(caught.value) == (
        "TensorRT could not build the network (no kernel fits): use --engine compiled"
    )


def test_a_compiler_that_fails_is_said(compiled_net, nothing_kept, monkeypatch):
    net, batch, _ = compiled_net

    def fail(module, example):
        raise RuntimeError("g++ crashed\nat length")

    monkeypatch.setattr(torch_engine, "_compile_ahead", fail)
    with pytest.raises(ResourceError, match=r"could not be compiled \(g\+\+ crashed\): check the"):
        engine_of("compiled", "fp32", net, batch)
