#!/usr/bin/env bash
# All that is to be known of a GPU, in at most ten minutes: tests/cuda with one line a test, then figures.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--seconds 570] [--only NAME[,NAME]] [--installed]
#
# It works from a fresh checkout and needs no network: the wheel is built here, with its kernels. See gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
