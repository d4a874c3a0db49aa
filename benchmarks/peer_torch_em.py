"""torch-em's predict_with_halo_pipelined, from the Zarr array to a Zarr array of labels.

Blocks of `--side` with `--halo` around. `--engine shipped` is the torch network with padding
'same' (float32, channels first); `--engine ours` puts bigseg's own forward inside. The output has
chunks that divide the blocks, and the normalisation is bigseg's fixed one, not torch-em's per-block
`standardize`: both are in torch-em's favour, and its labels can be compared.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr
from setting import (
    ValidForward,
    classes_of,
    contestant_parser,
    halo_of,
    median_s,
    normalise,
    read_network,
    report,
    set_threads,
    timed_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def main() -> None:
    """Time one pass over the volume; after it, one block."""
    parser = contestant_parser(__doc__)
    parser.add_argument("--halo", type=int, help="default: the exact one")
    options = parser.parse_args()
    set_threads(options.threads)
    predict = import_prediction()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image = zarr.open_array(str(options.image / "0"), mode="r")
    block = tuple(min(options.side, n) for n in image.shape)
    net = read_network(options.folder).to(device)
    exact = halo_of(net)
    halo = exact if options.halo is None else options.halo
    function = None
    if options.engine == "ours":
        assert halo == exact, (halo, exact)
        function = embedded(ValidForward(net, n_threads=options.threads), halo)
    labels = create_labels(options.out, image, block)
    one = torch.zeros((1, 1, *(b + 2 * halo for b in block)), device=device)
    n_blocks = int(np.prod([-(-n // b) for n, b in zip(image.shape, block, strict=True)]))

    def forward() -> None:
        with torch.no_grad():
            (net(one) if function is None else function(net, one)).cpu()

    def whole() -> None:
        predict(
            image,
            net,
            gpu_ids=[device],
            block_shape=block,
            halo=(halo,) * 3,
            output=labels,
            preprocess=normalise,
            postprocess=classes_of,
            prediction_function=function,
            disable_tqdm=True,
        )

    forward()
    seconds = timed_s(whole)
    after = median_s(forward)
    report(seconds=seconds, forward_s=n_blocks * after, n_forwards=n_blocks)


def import_prediction() -> Callable[..., Any]:
    """The function, from its own unchanged file, without what only training with torch-em needs.

    `import torch_em` would load datasets, trainers and torchvision; here its packages are opened
    without their __init__, and torchvision, of which the file uses nothing, may be missing.
    """
    spec = importlib.util.find_spec("torch_em")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("torch-em is not installed: see requirements-peers.txt")
    root = Path(spec.submodule_search_locations[0])
    for name in ("torch_em", "torch_em.util", "torch_em.transform"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    if importlib.util.find_spec("torchvision") is None:
        stand_in: Any = types.ModuleType("torchvision")
        stand_in.transforms = types.ModuleType("torchvision.transforms")
        sys.modules["torchvision"] = stand_in
    from torch_em.util.prediction import predict_with_halo_pipelined

    predict: Callable[..., Any] = predict_with_halo_pipelined
    return predict


def embedded(forward: ValidForward, halo: int) -> Callable[[torch.nn.Module, Tensor], Tensor]:
    """Bigseg's forward for torch-em, which wants the halo back and crops it."""

    def predict(_: torch.nn.Module, batch: Tensor) -> Tensor:
        scores = forward(batch[0, 0].cpu().numpy())
        whole = np.empty((1, len(scores), *batch.shape[2:]), np.float32)
        core = tuple(slice(halo, halo + n) for n in scores.shape[1:])
        whole[(0, slice(None), *core)] = scores
        return torch.from_numpy(whole)

    return predict


def create_labels(out: Path, image: zarr.Array, block: tuple[int, ...]) -> zarr.Array:
    """An empty array of labels that blocks can write without touching each other's chunks."""
    n_cuts = [next(k for k in range(1, b + 1) if b % k == 0 and b // k <= 128) for b in block]
    return zarr.create_array(
        str(out),
        shape=image.shape,
        chunks=tuple(b // k for b, k in zip(block, n_cuts, strict=True)),
        dtype="uint8",
        compressors=zarr.codecs.ZstdCodec(level=3),
        overwrite=True,
    )


if __name__ == "__main__":
    main()
