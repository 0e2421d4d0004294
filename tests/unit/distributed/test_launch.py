"""The processes that a launcher started, by its variables."""

import pytest

from opdctl.distributed.launch import Launch, read_launch
from opdctl.errors import OpdctlError

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-a",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "17",
}
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-worker-0", "MASTER_PORT": "23456"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
TASK = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        BATCH_SCRIPT,
        {**BATCH_SCRIPT, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {"OMPI_COMM_WORLD_SIZE": "1", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"},
    ],
    ids=["no launcher", "one rank", "batch script", "interactive step", "one pod"],
)
def test_single_process(environment):
    assert read_launch(environment) == Launch(0, 1, 0)


def test_torchrun_in_a_job_step_leads_by_its_own_variables():
    assert read_launch(TASK | TORCHRUN) == Launch(9, 16, 1, "node-a", 29500, shares_gpus=True)


def test_pod_of_a_kubernetes_operator_is_a_rank_with_the_first_gpu():
    launch = read_launch(POD | {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "auto"})
    assert launch == Launch(1, 2, 0, "job-worker-0", 23456)


def test_tasks_of_a_job_step_meet_on_its_first_node():
    launch = read_launch(TASK)
    assert launch == Launch(5, 8, 1, "gpu007", 24711)
    assert read_launch(TASK | {"SLURM_PROCID": "6", "SLURM_LOCALID": "2"}).master_port == launch.master_port
    assert read_launch(TASK | {"SLURM_STEP_ID": "1"}).master_port != launch.master_port
    chosen = read_launch(TASK | {"MASTER_ADDR": "gpu007-ib0", "MASTER_PORT": "4000"})
    assert (chosen.master_addr, chosen.master_port) == ("gpu007-ib0", 4000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-010,021]", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-4]-node,cpu[1-2]", "rack2-node"),
        ("a-b.example,c[1-2]", "a-b.example"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert read_launch(TASK | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "3"}, "without WORLD_SIZE"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "without MASTER_ADDR and MASTER_PORT"),
        ({**POD, "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({**POD, "RANK": "-1"}, "RANK=-1"),
        ({**POD, "MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({**POD, "WORLD_SIZE": "16", "PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "PET_NNODES=2"),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE=4"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}, "SLURM_PROCID"),
        ({**TASK, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "SLURM_STEP_NODELIST"),
    ],
)
def test_several_processes_that_cannot_meet_are_an_error(environment, shown):
    """Otherwise each of them would make the complete run."""
    with pytest.raises(OpdctlError) as raised:
        read_launch(environment)
    assert raised.value.kind == "incomplete_launch"
    assert shown in raised.value.detail
    assert "torchrun" in str(raised.value.hint)
