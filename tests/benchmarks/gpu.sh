#!/usr/bin/env bash
# What only a GPU can show, in one command: correct and how fast. No network, one GPU, at most 25 minutes.
#   tests/benchmarks/gpu.sh [OUT] [--minutes N] [--small] [--parts speed profile repeats precision compile]
#   OUT        folder of gpu.md (one table, written row by row) and gpu.log (./outputs/gpu)
#   --minutes  begin nothing new after so many minutes, and cut what still runs (25)
#   --small    tiny settings, to see on a CPU that it runs
#   PYTHON     the Python with torch, torchvision, opencv, pandas, matplotlib, tqdm, PyYAML (python3)
# Weights are random and data are made here. timm, Lightning and fastai are measured where they are installed.
set -euo pipefail
out=outputs/gpu
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then out=$1; shift; fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHONUNBUFFERED=1 "${PYTHON:-python3}" tests/benchmarks/gpu.py --out "$out" "$@" 2>&1 | tee "$out/gpu.log"
