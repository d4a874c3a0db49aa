"""The CUDA engine against float32 on the processor."""

import numpy as np
import pytest
import torch
from helpers import config_of, noise, write_image, write_model

from bigseg.config import UNetSpec
from bigseg.engine import build_engine, resolve_engine, torch_forward
from bigseg.model import UNet, footprint
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
