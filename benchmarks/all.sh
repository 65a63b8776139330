#!/usr/bin/env bash
# All benchmarks at modest settings, one after the other, about an hour on two CPU cores; each prints its table and ends in one
# JSON line, which is also kept in OUT. Needs requirements-dev.txt and the quickstart's data/demo.jsonl and data/demo.
#   bash benchmarks/all.sh [OUT, default benchmarks/results.jsonl]
source "$(dirname "$0")/../launch/venv.sh"
out=${1:-benchmarks/results.jsonl}
: > "$out"

benchmark() { # NAME ARGUMENTS …
  local printed
  printf '\n==== python -m benchmarks.%s\n' "$*"
  printed=$("$PYTHON" -m "benchmarks.$1" "${@:2}" | tee >(cat >&2)) # set -e: the first that fails ends it all
  printf '{"command": "python -m benchmarks.%s", "result": %s}\n' "$*" "$(tail -n 1 <<< "$printed")" >> "$out"
}

benchmark startup
benchmark input_pipeline --seconds 5
benchmark input_pipeline --seconds 5 --batch_size 256 --shards 16 --pace 20e6
grep '^{"text"' data/demo.jsonl > data/demo_texts.jsonl
benchmark prepare --input data/demo_texts.jsonl --times 10 --flags "--dedup none" --tokenizer data/demo/tokenizer --repeat 2
benchmark checkpoint
benchmark decode --batch_sizes 1 16 --repeat 3
benchmark serve --repeat 1 --waves 1
benchmark train
benchmark time_to_loss
benchmark growth
benchmark plan_matrix # needs jax-cuda13-pjrt, which launch/test.sh installs
