# Sourced by the other scripts: changes to the repository's root, creates .venv if needed, and defines
#   install_requirements FILE …    installs them, once per content of the files
#   install_cuda                   installs jax's CUDA libraries on an NVIDIA machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ ! -x .venv/bin/python ]; then
  python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: found $(python3 --version) (expected Python 3.11, 3.12 or 3.13)" >&2
    exit 2
  }
  echo "creating .venv with $(python3 --version)"
  if command -v uv >/dev/null; then uv venv --quiet --seed --python "$(command -v python3)" .venv; else python3 -m venv .venv; fi
fi
PYTHON=$PWD/.venv/bin/python

install_requirements() {
  local stamp=.venv/installed-$(cat "$@" | sha256sum | cut -c1-16)
  [ -e "$stamp" ] && return
  local args=()
  for file in "$@"; do args+=(-r "$file"); done
  echo "installing ${*}"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$PYTHON" "${args[@]}"
  else
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${args[@]}"
  fi
  touch "$stamp"
}

# CUDA 13 needs driver 580 or newer, CUDA 12 driver 525.
install_cuda() {
  local driver
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1) || true
  [ -n "${driver:-}" ] || return 0
  local cuda=cuda12
  [ "$driver" -ge 580 ] && cuda=cuda13
  sed -n "s/^jax\(.*\)/jax[$cuda]\1/p" requirements.txt >.venv/requirements-cuda.txt
  install_requirements .venv/requirements-cuda.txt
}
