#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests of the CUDA engine, then the figures.
#     bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m pytest -q -m gpu tests/test_gpu.py
python3 benchmarks/gpu.py
