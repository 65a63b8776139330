#!/usr/bin/env bash
# Proves the project on the GPU of this machine: correctness, resume, memory, speed beside PyTorch. About 7 minutes on an H100.
#   bash benchmarks/gpu.sh [--out DIR] [--part NAME …] [--dry_run]
cd "$(dirname "$0")/.." || exit
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m benchmarks.gpu "$@"
