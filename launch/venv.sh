# Sourced by the other scripts: changes to the repository's root, creates .venv if needed, and defines
#   install_requirements FILE …    installs them, once per content of the files
#   install_cuda                   installs jax's CUDA libraries on an NVIDIA machine
#   take_gpu_memory                gives training the GPUs' memory
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# One process at a time, on several hosts too where .venv lies on a shared disk. The lock goes with the process that holds it.
locked() { # COMMAND …
  if command -v flock >/dev/null; then (flock 9 && "$@") 9>.venv-lock; else "$@"; fi
}

venv_works() {
  .venv/bin/python -c '' 2>/dev/null && { command -v uv || .venv/bin/python -m pip --version; } >/dev/null 2>&1
}

make_venv() {
  venv_works && return
  python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: found $(python3 --version) (expected Python 3.11, 3.12 or 3.13)" >&2
    exit 2
  }
  if [ -e .venv ] || [ -L .venv ]; then
    [ -f .venv/pyvenv.cfg ] && [ ! -L .venv ] || {
      echo "error: .venv is not a virtual environment with pip (remove .venv, or move it away)" >&2
      exit 2
    }
    echo "making .venv anew: its python or its pip does not run"
    rm -rf .venv
  fi
  echo "creating .venv with $(python3 --version)"
  if command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$(command -v python3)" .venv
  else
    python3 -m venv .venv || {
      rm -rf .venv
      echo "error: python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2
      exit 2
    }
  fi
}

venv_works || locked make_venv
PYTHON=$PWD/.venv/bin/python

install_requirements() { # FILE …
  local stamp=.venv/installed-$(cat "$@" | sha256sum | cut -c1-16)
  [ -e "$stamp" ] || locked install_once "$stamp" "$@"
}

install_once() { # STAMP FILE …
  local stamp=$1 args=()
  shift
  [ ! -e "$stamp" ] || return 0 # another process has done it
  for file in "$@"; do args+=(-r "$file"); done
  echo "installing ${*}"
  if command -v uv >/dev/null; then
    use_pips_mirror
    uv pip install --quiet --python "$PYTHON" "${args[@]}"
  else
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${args[@]}"
  fi
  touch "$stamp"
}

# uv reads neither PIP_INDEX_URL nor pip.conf. As for pip, all indexes count the same.
use_pips_mirror() {
  local index extra
  index=${PIP_INDEX_URL:-$("$PYTHON" -m pip config get global.index-url 2>/dev/null || true)}
  extra=${PIP_EXTRA_INDEX_URL:-$("$PYTHON" -m pip config get global.extra-index-url 2>/dev/null || true)}
  [ -z "$index" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$index}}
  [ -z "$extra" ] || export UV_INDEX=${UV_INDEX:-$extra} UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
}

# CUDA 13 needs driver 580 or newer and a GPU of Turing (compute capability 7.5) or newer; CUDA 12 driver 525.
install_cuda() {
  local gpus cuda
  gpus=$(nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader 2>/dev/null) || return 0
  cuda=$(awk -F '[ ,.]+' '{ if ($1 * 10 + $2 < 75 || $3 < 580) old = 1 } END { print old ? "cuda12" : "cuda13" }' <<<"$gpus")
  sed -n "s/^jax\(.*\)/jax[$cuda]\1/p" requirements.txt >.venv/requirements-cuda.txt
  install_requirements .venv/requirements-cuda.txt
}

# XLA takes 75 % of a GPU's memory by default, for others to have some. Here training has the GPU alone; the rest is for what XLA
# does not count: the CUDA context, cuDNN and NCCL, 1 to 2 GB, and what a block between others cannot use.
take_gpu_memory() {
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
}
