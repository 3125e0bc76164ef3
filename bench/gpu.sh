#!/usr/bin/env bash
# For a computer with an NVIDIA GPU that may soon be gone. Needs PyTorch, CuPy, NVRTC and what builds fusedrnn, but no
# network. Without arguments it lists what it can do.
set -eu
cd "$(dirname "$0")/.."
# What NVRTC makes; carried along in the checkout, nothing of it is compiled again.
export FUSEDRNN_CACHE=${FUSEDRNN_CACHE:-$PWD/out/gpu-cache} OUT=${OUT:-$PWD/out/gpu}
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
exec "${PYTHON:-python3}" bench/gpu.py "$@"
