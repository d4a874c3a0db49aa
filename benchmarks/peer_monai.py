"""MONAI's SlidingWindowInferer on a volume in memory, labels in memory; no storage is touched.

Windows of `--side`, overlap 0.25, Gaussian weights. `--engine shipped` is the torch network as
MONAI's users have it (float32, channels first); `--engine ours` puts bigseg's engine and precision
inside, compiled with padding 'same' for the window. That is the fairest to MONAI: bigseg's own
valid network would compute a halo around each window, which blending is there to avoid.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import zarr
from monai.inferers import SlidingWindowInferer
from setting import (
    contestant_parser,
    fastest_same,
    median_s,
    normalise,
    read_network,
    report,
    set_threads,
    timed_s,
)

N_CLASSES = 2


def main() -> None:
    """Time one pass over the volume; after it, one window."""
    options = contestant_parser(__doc__).parse_args()
    set_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    volume = zarr.open_array(str(options.image / "0"), mode="r")[:]
    data = torch.from_numpy(normalise(volume))[None, None]
    net = read_network(options.folder)
    window = (1, 1, *(min(options.side, n) for n in volume.shape))
    if options.engine == "shipped":
        predictor = net.to(device)
    else:
        predictor = fastest_same(net, window, n_threads=options.threads)
    inferer = SlidingWindowInferer(
        roi_size=window[2:], sw_batch_size=1, overlap=0.25, mode="gaussian", sw_device=device
    )
    calls = 0

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return predictor(x)

    one = torch.zeros(window).to(device)
    labels = torch.empty(0)

    def whole() -> None:
        nonlocal labels
        scores = inferer(data, counted)
        assert isinstance(scores, torch.Tensor)
        assert scores.shape[1] == N_CLASSES
        labels = scores.argmax(dim=1)

    with torch.inference_mode(), warnings.catch_warnings():
        # MONAI (1.6) indexes tensors with lists, which torch discourages.
        warnings.simplefilter("ignore")
        predictor(one)
        seconds = timed_s(whole)
        after = median_s(lambda: predictor(one))
    np.save(options.out, labels[0].to("cpu", torch.uint8).numpy())
    report(seconds=seconds, forward_s=calls * after, n_forwards=calls)


if __name__ == "__main__":
    main()
