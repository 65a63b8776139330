"""How processes find each other, and which GPUs are whose."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mateconv_jax.errors import UserError
from mateconv_jax.runtime import distributed
from mateconv_jax.runtime.distributed import Place

ROOT = Path(__file__).parents[2]
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "3", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "3",
}  # fmt: skip
PACKED = SLURM | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        (BY_HAND, Place(2, 1, "deactivate")),
        (BY_HAND | SLURM, Place(2, 1, "deactivate")),
        (SLURM, Place(4, 3, "slurm")),
        (PACKED, Place(4, 2, "slurm", 3, 2)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, Place(4, 3, "slurm", 2, 0)),
        (without(PACKED, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID"), Place(4, 2, "slurm", 3, 2)),
        (PACKED | {"SLURM_GPUS_PER_TASK": "1"}, Place(4, 2, "slurm", 3, 2, True)),
        (PACKED | {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"}, Place(4, 2, "slurm", 3, 2, True)),
        (PACKED | {"SLURM_GPU_BIND": "single:1"}, Place(4, 2, "slurm", 3, 2, True)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (BATCH_SCRIPT, None),
        (without(BATCH_SCRIPT, "SLURM_PROCID"), None),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell of a job of four
        (OPEN_MPI, Place(2, 1, "ompi", 2, 1)),
        (OPEN_MPI | SLURM, Place(2, 1, "ompi", 2, 1)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), Place(2, 1, "prrte", 2, 1)),
    ],
)
def test_what_the_environment_says(environment, place):
    assert distributed.find_place(environment) == place


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS: 'a:1' requires JAX_NUM_PROCESSES"),
        (BY_HAND | {"JAX_PROCESS_ID": "first"}, "requires JAX_NUM_PROCESSES and JAX_PROCESS_ID .expected two integers"),
        (BY_HAND | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2 of 2 processes .expected 0 to 1"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_PROCID: 3 of 4, but SLURM_STEP_NODELIST is missing"),
        (SLURM | {"SLURM_NTASKS": "4(x2)"}, r"SLURM_NTASKS: '4\(x2\)' .expected an integer"),
    ],
)
def test_what_is_half_set_is_one_clear_error(environment, message):
    with pytest.raises(UserError, match=message):
        distributed.find_place(environment)


def test_open_mpi_5_without_an_address_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(os, "environ", without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri") | {"PRTE_LAUNCHED": "1"})
    with pytest.raises(UserError, match="cannot join the other processes .*expected srun"):
        distributed.initialize()


def test_a_batch_script_without_srun_trains_alone_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", BATCH_SCRIPT)
    distributed.initialize()
    assert "SLURM_NTASKS is 4, but srun did not start this process: it trains alone" in capsys.readouterr().err


REPORT = """
import jax
from mateconv_jax.runtime import distributed
distributed.initialize()
config = jax.config.read("jax_cuda_visible_devices")
print(jax.process_index(), jax.process_count(), config, flush=True)
"""


def both(environments, visible="0,1,2,3,4,5,6,7"):
    """What each of two joined processes says: its index, how many they are, and the GPUs that jax may use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": visible}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT], env=common | environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )
        for environment in environments
    ]  # fmt: skip
    return [process.communicate(timeout=100)[0].split()[-3:] for process in processes]


@pytest.mark.parametrize(
    "tasks, localid, extra, gpus",
    [
        ("1(x2)", ("0", "0"), {}, ("all", "all")),
        ("2", ("0", "1"), {}, ("0,1,2,3", "4,5,6,7")),
        ("2", ("0", "1"), {"SLURM_GPUS_PER_TASK": "4"}, ("all", "all")),
    ],
    ids=["a task a node", "two tasks a node", "two tasks with GPUs of their own"],
)
def test_every_gpu_of_a_slurm_job_is_used(tasks, localid, extra, gpus):
    """Two processes that really join, and the devices that jax ends up with."""
    slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": tasks}
    environments = [
        slurm
        | {"SLURM_PROCID": str(i), "SLURM_LOCALID": localid[i], "SLURM_NODEID": str(i if localid == ("0", "0") else 0)}
        | extra
        for i in range(2)
    ]
    assert both(environments) == [["0", "2", gpus[0]], ["1", "2", gpus[1]]]


def test_an_address_by_hand_inside_a_slurm_job_takes_all_gpus():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    slurm = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    hand = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    environments = [slurm | hand | {"SLURM_PROCID": str(i), "JAX_PROCESS_ID": str(i)} for i in range(2)]
    assert both(environments) == [["0", "2", "all"], ["1", "2", "all"]]


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": "0,1"})
    with pytest.raises(UserError, match="3 processes on a machine with 2 GPUs"):
        distributed.gpu_indices(Place(4, 2, "slurm", 3, 2))


@pytest.mark.parametrize(
    "environment, visible, local_devices, idle",
    [
        ({}, "0,1,2,3", 4, 0),
        (SLURM, "0,1,2,3", 1, 3),
        (PACKED, "0,1,2,3", 1, 1),
        (PACKED | {"SLURM_GPUS_PER_TASK": "1"}, "0", 1, 0),
    ],
)
def test_idle_gpus_are_counted(monkeypatch, environment, visible, local_devices, idle):
    monkeypatch.setattr(os, "environ", environment | {"CUDA_VISIBLE_DEVICES": visible})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: local_devices)
    assert distributed.idle_gpus() == idle
