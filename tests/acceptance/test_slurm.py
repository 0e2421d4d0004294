"""The scripts of docs/slurm, with replacements of Slurm's commands: the GPUs of each job, signals, and the students."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, ROOT, SMALL, invoke
from helpers.training import max_difference, weights

from opdctl.errors import ExitCode
from opdctl.recipe.load import load_recipe

SCRIPTS = ROOT / "docs/slurm"
CROSS_SCALE = ROOT / "recipes/cross_scale.toml"
COMMANDS = {
    "opdctl": f'exec {sys.executable} -m opdctl "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    # Records the job: options, script and arguments, one line.
    "sbatch": 'printf "%q " "$@" >> jobs; echo >> jobs; echo 17',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> requeued; fi',
    # Runs the command once for each node of the job, passes USR1 and TERM on, and returns the highest exit code.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & done
        trap 'kill -USR1 $(jobs -p)' USR1
        trap 'kill -TERM $(jobs -p)' TERM
        highest=0
        for pid in $(jobs -p); do
          while :; do
            wait $pid && code=0 || code=$?
            kill -0 $pid 2>/dev/null || break
          done
          ((code > highest)) && highest=$code
        done
        exit $highest""",
}
RUN_ARRAY = """
    options=() count=1
    while [[ $1 == -* ]]; do
      case $1 in --array=0-*) count=$(( ${1#--array=0-} + 1 ));; esac
      shift
    done
    for ((task = 0; task < count; task++)); do SLURM_ARRAY_TASK_ID=$task bash "$@" >&2 & done
    for job in $(jobs -p); do wait "$job" || exit 1; done
    echo "$RANDOM;cluster" """
"""Of sbatch: runs the job at once, as Slurm would, all tasks of an array at the same time."""


ON_TOY_MODELS = (
    *("student.model=toy:student", "teacher.model=toy:teacher", "prompts.source=toy:sort12", "prompts.suffix="),
    *("prompts.limit=1024", 'eval.bench=["sort12"]'),
)
"""What lets a recipe of large models be planned without a network."""


class Cluster:
    """A directory in which the scripts are submitted, with the commands of Slurm."""

    def __init__(self, path: Path, **commands: str):
        self.path = path
        for name, body in {**COMMANDS, **commands}.items():
            (path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (path / name).chmod(0o755)
        overrides = ("rollout.num_parts=4", "train.steps=2", "rollout.max_tokens=40", "train.keep_latest=9")
        (path / "small.toml").write_text(load_recipe([QUICKSTART], [*SMALL, *overrides]).to_toml())
        (path / "large.toml").write_text(load_recipe([CROSS_SCALE], ON_TOY_MODELS).to_toml())
        self.environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "17"}

    def submit(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        command, environment = ["bash", str(SCRIPTS / script), *arguments], {**self.environment, **variables}
        options = {"cwd": self.path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(command, check=False, **options)

    def jobs(self) -> list[list[str]]:
        """Return the words of each job that was submitted."""
        return [shlex.split(line) for line in (self.path / "jobs").read_text().splitlines()]

    def start(self, job: list[str], nodes: int = 1) -> subprocess.Popen:
        """Run a job as on its allocation."""
        environment = {**self.environment, "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]"}
        words = job[[word.startswith("-") for word in job].index(False) :]
        return subprocess.Popen(["bash", *words], cwd=self.path, env=environment, start_new_session=True)

    def requeued(self) -> str:
        return (self.path / "requeued").read_text() if (self.path / "requeued").exists() else ""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process."""
    cluster = Cluster(tmp_path_factory.mktemp("alone"))
    assert invoke("train", "--recipe", cluster.path / "small.toml", "--output", cluster.path / "run").code == 0
    return cluster.path / "run"


RAY = {
    "ray": f"""
        echo "$@" >> rays
        [[ $3 != --head ]] || exec {sys.executable} -m http.server --bind 127.0.0.1 "${{4#--port=}}" 2> /dev/null
        exec sleep 600""",
    "python3": "wc -l < rays",
    "opdctl": """
        if [[ $1 == status ]]; then echo '"is_finished": false'; exit; fi
        wc -l < rays > nodes_at_start
        trap 'exit 75' USR1
        echo "$RAY_ADDRESS $*" > command.part; mv command.part command
        while :; do sleep 0.1; done""",
}
"""Of Ray: nodes that do nothing, their number, and a driver that waits for a signal."""


def check_same_student(run: Path, alone: Path, step: int = 2) -> None:
    """Rollouts are equal bit for bit on CPUs; two trainers sum in another order than one."""
    assert max_difference(weights(run, step), weights(alone, step)) < 1e-5


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", SCRIPTS / script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("colocated.sh", (), {"train": ["--nodes=4", "--gpus-per-node=8", "8"]}),
        (
            "ray.sh",
            ("--set", "pipeline.placement=apart"),
            {
                "train": [
                    *("--nodes=4", "--gpus-per-node=8", "--launcher", "hardware.train_gpus=32"),
                    *("hardware.gpus_per_node=8", "pipeline.placement=apart", "ray"),
                ]
            },
        ),
        (
            "follow.sh",
            (),
            {
                "rollout": ["--nodes=1", "--gpus=4", "--array=0-1", "0"],
                "score-teacher": ["--nodes=1", "--gpus=4", "--array=0-1", "0"],
                "train": ["--nodes=4", "--gpus-per-node=8", "8"],
            },
        ),
        (
            "chain.sh",
            ("0", "0"),
            {
                "rollout": ["--nodes=1", "--gpus=4", "--array=0-1", "0"],
                "score-teacher": ["--nodes=1", "--gpus=4", "--dependency=afterok:17", "0"],
                "train": ["--nodes=4", "--gpus-per-node=8", "--dependency=afterok:17", "8"],
            },
        ),
    ],
)
def test_jobs_have_the_gpus_of_the_recipe(tmp_path, script, arguments, expected):
    """large.toml, like cross_scale, has engines of four GPUs. The last word is the launcher."""
    cluster = Cluster(tmp_path)
    done = cluster.submit(script, "large.toml", "run", *arguments, NODES="4", GPUS="8", WORKERS="2")
    assert done.returncode == 0, done.stderr
    jobs = {job[job.index("run") + 2]: job for job in cluster.jobs()}
    assert list(jobs) == list(expected)
    for name, words in expected.items():
        job = jobs[name]
        assert set(words[:-1]) <= set(job)
        assert job[job.index("run") + 1] == words[-1]
        assert {"--signal=B:USR1@120", "--requeue"} <= set(job)


@pytest.mark.parametrize("script", ["colocated.sh", "ray.sh"])
def test_engine_that_is_no_part_of_a_node_is_refused(tmp_path, script):
    cluster = Cluster(tmp_path)
    done = cluster.submit(script, "large.toml", "run", GPUS="6")
    assert done.returncode == 2
    assert "GPUS=6" in done.stderr
    assert not (tmp_path / "jobs").exists()


def test_colocated_job_on_two_nodes_is_requeued_after_a_signal_and_makes_the_student_of_one_process(tmp_path, alone):
    """torchrun runs on each node, and the nodes meet. It turns the exit code of a signal, 75, into 1."""
    cluster = Cluster(tmp_path)
    done = cluster.submit("colocated.sh", "small.toml", "run", NODES="2", GPUS="1")
    assert done.returncode == 0, done.stderr
    (job,) = cluster.jobs()
    running = cluster.start(job, nodes=2)
    wait_for(tmp_path / "run/step-00000/rollout/manifest.json", running)
    running.send_signal(signal.SIGUSR1)
    assert running.wait() == 1
    assert cluster.requeued() == "requeue 17\n"
    assert not list((tmp_path / "run").rglob(".*.lock"))
    assert cluster.start(job, nodes=2).wait() == 0
    assert cluster.requeued() == "requeue 17\n"
    check_same_student(tmp_path / "run", alone)


def wait_for(path: Path, job: subprocess.Popen) -> None:
    while not path.exists():
        assert job.poll() is None
        time.sleep(0.05)


def test_job_with_ray_starts_a_cluster_of_its_nodes_and_the_command_on_the_first(tmp_path):
    """A signal stops the command, not the cluster, which ends with the job."""
    cluster = Cluster(tmp_path, **RAY)
    running = cluster.start([str(SCRIPTS / "job.sh"), "run", "ray", "train", "--launcher", "ray"], nodes=3)
    wait_for(tmp_path / "command", running)
    assert (tmp_path / "command").read_text() == "localhost:20017 train --launcher ray\n"
    assert int((tmp_path / "nodes_at_start").read_text()) == 3
    head, *others = (tmp_path / "rays").read_text().splitlines()
    assert head == "start --block --head --port=20017 --disable-usage-stats"
    assert others == ["start --block --address=localhost:20017"] * 2
    running.send_signal(signal.SIGUSR1)
    assert running.wait() == ExitCode.REQUEUE
    assert cluster.requeued() == "requeue 17\n"
    with pytest.raises(ProcessLookupError):  # the nodes are processes of the job's group
        os.killpg(running.pid, 0)


def test_job_whose_ray_cluster_does_not_start_ends_without_the_command(tmp_path):
    cluster = Cluster(tmp_path, **{**RAY, "ray": "exit 1"})
    assert cluster.start([str(SCRIPTS / "job.sh"), "run", "ray", "train"], nodes=1).wait() == 1
    assert not (tmp_path / "command").exists()
    assert not cluster.requeued()


def test_chain_of_jobs_makes_the_student_of_one_process(tmp_path, alone):
    cluster = Cluster(tmp_path, sbatch=RUN_ARRAY)
    cluster.environment |= {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    done = cluster.submit("chain.sh", "small.toml", "run", "0", "0", WORKERS="2", GPUS="1")
    assert done.returncode == 0, done.stderr
    check_same_student(tmp_path / "run", alone, step=1)
