#!/usr/bin/env bash
# Train on all GPUs of this machine. Ctrl-C or SIGTERM saves a checkpoint and exits with 75; the same command resumes.
#   bash launch/train_node.sh --config=configs/base.py --config.data.train_data_path=data/zh --config.training.out_dir=out
source "$(dirname "$0")/venv.sh"
install_requirements requirements.txt
install_cuda
take_gpu_memory
exec "$PYTHON" -m mateconv_jax.train "$@"
