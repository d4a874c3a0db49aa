#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests of the CUDA engines, then the figures of the
# network by itself and from Zarr to Zarr.
#     bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m pytest -q -m gpu tests/test_gpu.py tests/test_cuda.py
python3 benchmarks/gpu.py
python3 benchmarks/gpu_pipeline.py
