#!/usr/bin/env bash
# Checks the project on this machine's GPU: correctness, resuming, memory, speed against PyTorch. About 12 minutes on an H100.
#   bash benchmarks/gpu.sh [--out DIR] [--part NAME …] [--record [FILE]] [--dry_run]
cd "$(dirname "$0")/.." || exit
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu "$@"
