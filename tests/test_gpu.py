"""The CUDA engines against float32 on the processor, and against each other."""

import numpy as np
import pytest
import torch
from helpers import config_of, noise, write_image, write_model
from torch.nn import functional

from bigseg.config import UNetSpec
from bigseg.engine import (
    build_engine,
    candidates,
    device_forward,
    resolve_engine,
    torch_forward,
)
from bigseg.model import UNet, footprint
from bigseg.probe import choose, probe
from bigseg.progress import NullProgress
from bigseg.segment import segment_serially
from bigseg.volume import open_volume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPECS = {
    "2-D": UNetSpec.build(2, out_channels=3, depth=4, width=32),
    "3-D": UNetSpec.build(3, out_channels=3, depth=3, width=16),
}


def forwards(spec, precision, output):
    torch.manual_seed(0)
    net = UNet(spec).eval()
    shape = (1, 1, *footprint(spec).input_shape(footprint(spec).smallest_output(output)))
    x = np.random.default_rng(0).normal(0.5, 0.3, shape).astype(np.float32)
    engine = resolve_engine("torch", precision, device="cuda")
    cuda = build_engine(net, engine, input_shape=shape, n_threads=1)
    cpu = torch_forward(net, device=torch.device("cpu"), precision="fp32")
    return cuda, cpu, x


@pytest.mark.parametrize("name", SPECS)
def test_fp32_on_cuda_is_fp32_and_not_tf32(name):
    cuda, cpu, x = forwards(SPECS[name], "fp32", (64,) * SPECS[name].dims)
    np.testing.assert_allclose(cuda(x), cpu(x), atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_bf16_stays_near_fp32(name):
    cuda, cpu, x = forwards(SPECS[name], "bf16", (64,) * SPECS[name].dims)
    assert np.abs(cuda(x) - cpu(x)).max() < 0.06


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_cuda_repeats_itself_bit_for_bit(name, precision):
    cuda, _, x = forwards(SPECS[name], precision, (96,) * SPECS[name].dims)
    first = cuda(x)
    for _ in range(3):
        np.testing.assert_array_equal(cuda(x), first)


def test_large_bf16_convolutions_are_right():
    """CuDNN 9.10 gave silently wrong results here (pytorch issue 163539)."""
    spec = SPECS["3-D"]
    torch.manual_seed(0)
    net = UNet(spec).eval()
    shape = (1, 1, *footprint(spec).input_shape(footprint(spec).smallest_output((200,) * 3)))
    x = np.random.default_rng(0).normal(0.5, 0.3, shape).astype(np.float32)
    device = torch.device("cuda")
    half = torch_forward(net, device=device, precision="bf16")(x)
    full = torch_forward(net, device=device, precision="fp32")(x)
    assert np.abs(half - full).max() < 0.06


@pytest.mark.parametrize("dims", [2, 3])
def test_every_block_size_gives_the_same_bytes_on_cuda(dims, tmp_path):
    spec = UNetSpec.build(dims, out_channels=2, depth=2, width=8)
    image = write_image(tmp_path / "image.zarr", noise((20, 90, 77)), chunks=(8, 32, 32))
    _, model = write_model(tmp_path / "model.safetensors", spec)
    results = []
    for i, block in enumerate([(8, 32, 32), (16, 64, 96)]):
        out = tmp_path / f"{i}.zarr"
        config = config_of(
            image, model, out, tile=(8, 32, 32), block=block, precision="bf16", prob_dtype="float32"
        )
        assert segment_serially(config, NullProgress()).is_complete
        results.append(open_volume(str(out)).array[:])
    np.testing.assert_array_equal(*results)


# Every engine but the reference, in every precision. TensorRT where it is installed.
ENGINES = [
    (name, p) for name in ("torch", "compiled", "tensorrt") for p in ("fp32", "bf16", "fp16")
]
# The largest difference of a probability, and the share of voxels whose class may differ.
PROBABILITIES = {"fp32": 1e-4, "bf16": 0.06, "fp16": 0.01}
CLASSES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGSEG_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


def blurred_balls(shape, n, seed):
    """Noisy images (n, 1, *shape) of smooth foreground, and its classes (n, *shape)."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    field = torch.randn((n, 1, *shape), generator=generator, device=CUDA)
    blur = functional.avg_pool2d if len(shape) == 2 else functional.avg_pool3d
    for _ in range(3):
        field = blur(field, 7, stride=1, padding=3)
    truth = (field > 0).squeeze(1).long()
    return truth[:, None] + 0.7 * torch.randn(field.shape, generator=generator, device=CUDA), truth


@pytest.fixture(scope="module", params=[2, 3], ids=["2-D", "3-D"])
def trained(request):
    """A network after seconds of training: its classes mean something."""
    torch.manual_seed(0)
    dims = request.param
    net = UNet(UNetSpec.build(dims, out_channels=2, depth=2, width=16)).to(CUDA).train()
    halo = footprint(net.spec).halo
    side = footprint(net.spec).input_shape(footprint(net.spec).smallest_output((24,) * dims))
    inner = tuple(slice(h, n - h) for h, n in zip(halo, side, strict=True))
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(150):
        image, truth = blurred_balls(side, 4, step)
        loss = functional.cross_entropy(net(image), truth[(slice(None), *inner)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.3, "the network has not learned"
    return net.cpu().eval()


def batch_of(net, n, seed=1000):
    mark = footprint(net.spec)
    side = mark.input_shape(
        mark.smallest_output((96 if net.spec.dims == 2 else 48,) * mark.spec.dims)
    )
    return blurred_balls(side, n, seed)[0]


def on_device(net, engine, shape):
    name, precision = engine
    if name not in {spec.name for spec in candidates("cuda", precision)}:
        pytest.skip(f"{name} is not installed")
    spec = resolve_engine(name, precision, device="cuda")
    return device_forward(net, spec, input_shape=shape, device=CUDA)


@pytest.mark.parametrize("engine", ENGINES, ids="-".join)
def test_every_engine_finds_the_classes_of_float32(engine, trained):
    batch = batch_of(trained, 2)
    truth = on_device(trained, ("torch", "fp32"), batch.shape)(batch)
    found = on_device(trained, engine, batch.shape)(batch)
    assert (found.dtype, found.device.type) == (torch.float32, "cuda")
    assert (found - truth).abs().max() <= PROBABILITIES[engine[1]]
    share = (found.argmax(1) != truth.argmax(1)).float().mean()
    assert share <= CLASSES[engine[1]]


@pytest.mark.parametrize("engine", ENGINES, ids="-".join)
def test_a_batch_is_its_parts_within_rounding(engine, trained):
    """So halving a batch where memory does not suffice changes no more than rounding.

    cuDNN takes other kernels for other batches: in bf16 and fp16 bits differ (H100, cuDNN 9.19).
    """
    batch = batch_of(trained, 4)
    whole = on_device(trained, engine, batch.shape)(batch)
    for n in (1, 2):
        alone = on_device(trained, engine, (n, *batch.shape[1:]))
        parts = torch.cat([alone(batch[i : i + n]) for i in range(0, 4, n)])
        assert (parts - whole).abs().max() <= PROBABILITIES[engine[1]]
        share = (parts.argmax(1) != whole.argmax(1)).float().mean()
        assert share <= CLASSES[engine[1]]


@pytest.mark.parametrize("engine", ENGINES, ids="-".join)
def test_an_engine_repeats_itself_and_is_the_same_when_built_again(engine, trained):
    batch, other = batch_of(trained, 1), batch_of(trained, 1, seed=2000)
    forward = on_device(trained, engine, batch.shape)
    first = forward(batch)
    copy = first.clone()
    assert not torch.equal(forward(other), copy)
    assert torch.equal(first, copy), "a later call wrote to an earlier result"
    assert torch.equal(forward(batch), copy)
    assert torch.equal(on_device(trained, engine, batch.shape)(batch), copy)


def test_the_host_gets_the_bytes_of_the_device(trained):
    batch = batch_of(trained, 1)
    spec = resolve_engine("compiled", "bf16", device="cuda")
    on_host = build_engine(trained, spec, input_shape=batch.shape, n_threads=1)
    there = on_device(trained, ("compiled", "bf16"), batch.shape)(batch)
    np.testing.assert_array_equal(on_host(batch.cpu().numpy()), there.cpu().numpy())


def test_engines_are_timed_on_the_device(trained):
    engines = candidates("cuda", "bf16")
    shape = tuple(batch_of(trained, 1).shape)
    timings = probe(trained, engines, input_shape=shape, n_threads=1)
    assert [t.engine for t in timings] == list(engines)
    assert all(t.largest_difference <= PROBABILITIES["bf16"] for t in timings)
    chosen, sentence = choose(timings, default=engines[0])
    assert chosen.engine.name in sentence
