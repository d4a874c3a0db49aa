"""The engines that torch runs: eager, compiled, and TensorRT, on the device and from the host.

All three start from the same module: valid, batch norm folded into the convolutions, channels last,
in the type of the precision. They end in logits; the softmax over classes is the same code after
each of them, in float32, and so is the mean over mirror images.

    torch      eager; in fp32 the truth that every other engine is held against
    compiled   on processors one library, compiled ahead of time and kept for the next run;
               on GPUs torch.compile, with its own folder for the next run
    tensorrt   GPUs only; kept for the next run too
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bigseg.errors import ResourceError, UsageError
from bigseg.model import ConvBlock, UNet, valid_copy
from bigseg.reuse import cache_dir, digest_of, load_entry, processor, save_entry
from bigseg.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from bigseg.config import UNetSpec

logger = logging.getLogger(__name__)

Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]
DeviceForward = Callable[[Tensor], Tensor]
EngineName = Literal["torch", "compiled", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["cpu", "cuda"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Of what is kept: another number makes everything that older versions kept unused.
_FORMAT = "1"


class EngineSpec(Settings):
    """Which forward function: all of it decides the bytes of the result."""

    name: EngineName
    device: Device
    precision: Precision
    version: str
    isa: str

    def __str__(self) -> str:
        return f"{self.name} {self.version} on {self.device} in {self.precision} ({self.isa})"


def device_forward(
    net: UNet, spec: EngineSpec, *, input_shape: Sequence[int], device: torch.device
) -> DeviceForward:
    """Probabilities on the device, in float32, of a batch of `input_shape` on the device.

    The function takes (n, in_channels, *spatial) float32 in any layout and returns (n, classes,
    *smaller) float32. On CUDA it returns before the work is done, which goes to the current stream;
    the result usually lies channels last in memory, and is an inference tensor: change it within
    `torch.inference_mode` only. On processors the result is contiguous. No result is written to by
    a later call. A compiled engine and TensorRT accept batches of `input_shape` only.

    Raises:
        ResourceError: the engine cannot be built here; says why.
    """
    shape = tuple(input_shape)
    module = _on_device(net, device, spec.precision)
    example = _as_input(torch.zeros(shape, device=device), spec.precision)
    if spec.name == "torch":
        return _probabilities(module, spec.precision, net.spec)
    if spec.name == "compiled":
        built = _compiled(module, example, _key(net, spec, shape))
    elif spec.name == "tensorrt":
        built = _tensorrt(module, example, _key(net, spec, shape))
    else:
        raise UsageError(f"engine {spec.name} has no forward function on {device}: use the host's")
    return _of_one_shape(_probabilities(built, spec.precision, net.spec), shape)


def torch_forward(net: UNet, *, device: torch.device, precision: Precision) -> Forward:
    """The reference forward: eager torch, from the host to the host, for batches of any shape."""
    module = _on_device(net, device, precision)
    return from_host(_probabilities(module, precision, net.spec), device)


def over_mirror_images(forward: DeviceForward, spec: UNetSpec) -> DeviceForward:
    """The mean of `forward` over all mirror images, where the network asks for it, else itself.

    Valid mode keeps the lattice of the pooling: each of them divides what it is given, so that its
    windows are the same ones from either end. So a tile gives what the whole volume gives.
    """
    if not spec.mirror:
        return forward
    axes = range(2, 2 + spec.dims)
    flips = [f for n in range(1, spec.dims + 1) for f in itertools.combinations(axes, n)]

    def mean(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            # Not in place: nobody knows whose memory it is.
            total = 1.0 * forward(batch)
            for flipped in flips:
                total += forward(batch.flip(flipped)).flip(flipped)
            total *= 1 / spec.n_passes
            return total

    return mean


def from_host(forward: DeviceForward, device: torch.device) -> Forward:
    """The same function of arrays in main memory."""

    def on_host(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = forward(torch.from_numpy(batch).to(device)).cpu().numpy()
        return found

    return on_host


def fold_batch_norm(net: UNet) -> UNet:
    """Batch norm multiplied into the convolution before it; in place, for evaluation only."""
    for block in net.modules():
        if not isinstance(block, ConvBlock):
            continue
        for i in range(len(block) - 1):
            conv, norm = block[i], block[i + 1]
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
                assert isinstance(conv, nn.Conv2d | nn.Conv3d)
                block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return net


def weights_digest(net: UNet) -> str:
    """A name for the network: its layers and every bit of its weights."""
    state = sorted(net.state_dict().items())
    arrays = (v.detach().cpu().contiguous().numpy().tobytes() for _, v in state)
    return digest_of(net.spec.model_dump_json(), *(k for k, _ in state), *arrays)


def _key(net: UNet, spec: EngineSpec, shape: tuple[int, ...]) -> str:
    machine = torch.cuda.get_device_name() if spec.device == "cuda" else processor()
    what = (weights_digest(net), spec.model_dump_json(), str(shape))
    return digest_of(_FORMAT, *what, torch.__version__, machine)


def _on_device(net: UNet, device: torch.device, precision: Precision) -> nn.Module:
    layout: Any = torch.channels_last if net.spec.dims == 2 else torch.channels_last_3d
    module = fold_batch_norm(valid_copy(net))
    if device.type == "cpu":
        module.head = _steady_head(module.head)
    module = module.requires_grad_(False).to(device=device, dtype=DTYPES[precision])
    return module.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


def _as_input(batch: Tensor, precision: Precision) -> Tensor:
    layout = torch.channels_last if batch.ndim == 4 else torch.channels_last_3d
    return batch.to(DTYPES[precision]).to(memory_format=layout)


def _probabilities(
    logits: Callable[[Tensor], Tensor], precision: Precision, spec: UNetSpec
) -> DeviceForward:
    def forward(batch: Tensor) -> Tensor:
        with torch.inference_mode(), _repeatable():
            return _softmax(logits(_as_input(batch, precision))[:, : spec.out_channels].float())

    return over_mirror_images(forward, spec)


def _of_one_shape(forward: DeviceForward, shape: tuple[int, ...]) -> DeviceForward:
    """Compiled code does not look at what it is given: another shape would read foreign memory."""

    def checked(batch: Tensor) -> Tensor:
        if tuple(batch.shape) != shape:
            raise UsageError(
                f"a batch of {tuple(batch.shape)} was given to an engine that is built for {shape} "
                "only: build one for each shape"
            )
        return forward(batch)

    return checked


def _repeatable() -> AbstractContextManager[None]:
    """CuDNN neither times algorithms against each other nor uses ones that differ when repeated.

    So every worker gives the same bytes; fp32 is fp32, not TF32.
    """
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over axis 1, the same bytes for any number of threads."""
    if logits.is_cuda:
        return logits.softmax(dim=1)
    # torch's own takes another exp for the ends of what each thread gets (2.13); numpy is as fast.
    result: NDArray[np.float32] = logits.contiguous().numpy()
    result -= result.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=1, keepdims=True)
    return torch.from_numpy(result)


def _steady_head(head: nn.Conv2d | nn.Conv3d) -> nn.Conv2d | nn.Conv3d:
    """The 1x1 convolution so that its bytes do not depend on the number of threads.

    torch leaves 1x1 convolutions to another library on one thread than on several, unless they are
    dilated (which for one tap means nothing); oneDNN takes another algorithm for some odd numbers
    of output channels. Measured with torch 2.13: without this 2-D networks differ in the last bit.
    """
    assert head.bias is not None, head
    n = head.out_channels + -head.out_channels % 8
    steady = type(head)(head.in_channels, n, 1, dilation=2)
    weight, bias = torch.zeros_like(steady.weight), torch.zeros(n)
    weight[: head.out_channels] = head.weight.detach()
    bias[: head.out_channels] = head.bias.detach()
    steady.weight, steady.bias = nn.Parameter(weight), nn.Parameter(bias)
    return steady.eval()


def _exported(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    with _folders_restored(), torch.no_grad():
        return torch.export.export(module, (example,))


def _compiled(module: nn.Module, example: Tensor, key: str) -> Callable[[Tensor], Tensor]:
    try:
        if example.is_cuda:
            return _compiled_on_first_call(_exported(module, example).module(), example)
        return _compiled_ahead(module, example, key)
    except RuntimeError as error:
        raise ResourceError(
            f"the network could not be compiled ({_first_line(error)}): check the C++ compiler, or "
            "use --engine torch"
        ) from error


def _compiled_ahead(module: nn.Module, example: Tensor, key: str) -> Callable[[Tensor], Tensor]:
    """One library with the weights in it: the next run loads it in a second, without a compiler.

    Nothing is timed, so equal inputs give equal programs. The number of threads is read when it
    runs: what is generated works voxel by voxel, and the convolutions are those of eager torch with
    packed weights, so their number changes no byte (tested for 1 and 2).
    """
    name = f"{key}.pt2"
    kept = load_entry(name)
    if kept is not None:
        try:
            return _loaded(kept)
        except RuntimeError as error:
            logger.warning("torch does not take %s (%s); it is made anew", name, error)
    package = _compile_ahead(module, example)
    save_entry(name, package)
    return _loaded(package)


def _loaded(package: bytes) -> Callable[[Tensor], Tensor]:
    with tempfile.TemporaryDirectory() as folder, _inductor_keeps_in(folder):
        return torch._inductor.aoti_load_package(io.BytesIO(package))


def _compile_ahead(module: nn.Module, example: Tensor) -> bytes:
    settings = {
        "freezing": True,
        "cpp.dynamic_threads": True,
        "compile_threads": 1,
        "max_autotune": False,
    }
    program, package = _exported(module, example), io.BytesIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        _inductor_keeps_in(folder),
        torch._inductor.config.patch(settings),
    ):
        torch._inductor.aoti_compile_and_package(program, package_path=package)
    return package.getvalue()


def _compiled_on_first_call(module: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """torch.compile of an exported module, whose first call happens here.

    An exported module has code of its own; UNet.forward would be compiled again for each engine of
    a process, until torch gives up. `max_autotune` and the like time kernels against each other and
    may take another one in the next worker, so they are off; `deterministic` also leaves out what
    torch itself times. Graphs of CUDA would hold a second copy of the activations of a 3-D tile.
    """
    options: dict[str, Any] = {
        "max_autotune": False,
        "coordinate_descent_tuning": False,
        "triton.cudagraphs": False,
        "deterministic": True,
    }
    kept = cache_dir()
    with tempfile.TemporaryDirectory() as temporary:
        # Inductor does not quote the paths that it gives to compilers (torch 2.13).
        folder = temporary if kept is None or " " in str(kept) else str(kept / "inductor")
        with _inductor_keeps_in(folder), torch.inference_mode(), _repeatable():
            compiled = torch.compile(module, fullgraph=True, dynamic=False, options=options)
            compiled(example)
    return compiled


@contextmanager
def _inductor_keeps_in(folder: str) -> Iterator[None]:
    """Inductor and Triton know their folders from the environment only (torch 2.13).

    The warnings are of how torch uses itself; what fails is raised.
    """
    with _folders_restored(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.pop("TRITON_CACHE_DIR", None)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


@contextmanager
def _folders_restored() -> Iterator[None]:
    """Once inductor is loaded, by an export or a compilation, it names its folder (torch 2.13)."""
    before = {n: os.environ.get(n) for n in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _tensorrt(module: nn.Module, example: Tensor, key: str) -> Callable[[Tensor], Tensor]:
    """The network as one TensorRT engine, in exactly the types of the module.

    TensorRT times kernels against each other while it builds and offers no other way: two workers
    that build by themselves may differ in the last bits. What one has built is kept, and the others
    of the machine take that.
    """
    import torch_tensorrt  # type: ignore[import-not-found, unused-ignore]

    try:
        program = _kept_program(torch_tensorrt, f"{key}.ep")
        if program is not None:
            return program
        with torch.no_grad():
            built = torch_tensorrt.dynamo.compile(
                _exported(module, example),
                arg_inputs=[example],
                disable_tf32=True,
                # A part that torch ran instead would be slow, and not what was asked for.
                require_full_compilation=True,
                min_block_size=1,
            )
        _keep_program(torch_tensorrt, built, example, f"{key}.ep")
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ResourceError(
            f"TensorRT could not build the network ({_first_line(error)}): use --engine compiled"
        ) from error
    result: Callable[[Tensor], Tensor] = built
    return result


def _kept_program(torch_tensorrt: Any, name: str) -> Callable[[Tensor], Tensor] | None:  # noqa: ANN401 - has no types
    data = load_entry(name)
    if data is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".ep") as file:
        file.write(data)
        file.flush()
        loaded: Callable[[Tensor], Tensor] = torch_tensorrt.load(file.name).module()
    return loaded


def _keep_program(torch_tensorrt: Any, built: Any, example: Tensor, name: str) -> None:  # noqa: ANN401
    if cache_dir() is None:
        return
    with tempfile.NamedTemporaryFile(suffix=".ep") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_tensorrt.save(built, file.name, arg_inputs=[example])
        save_entry(name, file.read())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
