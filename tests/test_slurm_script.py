"""launch/slurm.sbatch with stand-ins for SLURM's commands, and what the launch scripts export."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (2, False)])
def test_the_processes_get_their_cores_and_a_preempted_job_is_requeued(code, requeued, tmp_path):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "launch")
    (tmp_path / "launch" / "venv.sh").write_text(
        "set -euo pipefail\nPYTHON=python\ninstall_requirements() { :; }\ninstall_cuda() { :; }\ntake_gpu_memory() { :; }\n"
    )
    commands = {"srun": f'echo "$SRUN_CPUS_PER_TASK cores: $*"; exit {code}', "scontrol": 'echo "scontrol $*"'}
    for name, script in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "77"}
    done = subprocess.run(
        ["bash", "launch/slurm.sbatch", "--config=x.py"], cwd=tmp_path, env=environment | {"SLURM_CPUS_PER_TASK": "32"},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = ["32 cores: python -m mateconv_jax.train --config=x.py"] + ["scontrol requeue 77"] * requeued
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (code, lines, "")


@pytest.mark.parametrize("given, expected", [({}, "0.9"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "0.5")])
def test_training_gets_the_gpus_memory_unless_the_user_says_otherwise(given, expected, tmp_path):
    (tmp_path / "launch").mkdir()
    for name in ("train_node.sh", "venv.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    (tmp_path / "requirements.txt").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$XLA_PYTHON_CLIENT_MEM_FRACTION $*"\n')
    python.chmod(0o755)
    # What the requirements' stamp is called.
    digest = hashlib.sha256(b"").hexdigest()[:16]
    (tmp_path / ".venv" / f"installed-{digest}").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")} | given
    done = subprocess.run(["bash", "launch/train_node.sh", "-x"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{expected} -m mateconv_jax.train -x", done.stderr
