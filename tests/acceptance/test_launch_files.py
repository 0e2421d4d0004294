"""The launch files of docs/kubernetes and docs/skypilot: their schemas, their shell, their GPUs, and what they run.

The package kubernetes-validate has the schemas of Kubernetes, and of the pods of a RayJob. The classes below have the
fields around them that the file uses, as in the API reference of KubeRay 1.4, and those of a task of SkyPilot 0.14.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import kubernetes_validate
import pytest
import yaml
from helpers.commands import ROOT, check_options, split_launcher
from pydantic import BaseModel, ConfigDict, Field

from opdctl.recipe.load import load_recipe

DOCS = ROOT / "docs"
KUBERNETES_VERSION = "1.31"
"""In which all fields that the files use are stable."""


class Fields(BaseModel):
    """A mapping without other keys, and without conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Group(Fields):
    """The nodes of a kind in a RayCluster. Ray's own options are strings, whatever they mean."""

    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(Group):
    groupName: str
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]


class AutoscalerOptions(Fields):
    idleTimeoutSeconds: int


class RayCluster(Fields):
    rayVersion: str
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Fields):
    entrypoint: str
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    rayClusterSpec: RayCluster


class Metadata(Fields):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]


class RayJob(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class JobRecovery(Fields):
    strategy: Literal["EAGER_NEXT_REGION", "FAILOVER"]
    max_restarts_on_errors: Annotated[int, Field(ge=0)]


class Resources(Fields):
    accelerators: Annotated[str, Field(pattern=r"^[A-Z0-9-]+:\d+$")]
    use_spot: bool
    disk_size: int
    job_recovery: JobRecovery


class SkyPilotTask(Fields):
    name: str
    envs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str | None]
    num_nodes: int
    resources: Resources
    setup: str
    run: str


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCS / name).read_text()))


def ray_job() -> RayJob:
    (document,) = documents("kubernetes/rayjob.yaml")
    return RayJob.model_validate(document)


def spot_task() -> SkyPilotTask:
    (document,) = documents("skypilot/spot.yaml")
    return SkyPilotTask.model_validate(document)


def pods() -> list[dict[str, Any]]:
    """Return the spec of every pod of the files for Kubernetes: of the head, of the workers, and of torchrun."""
    cluster = ray_job().spec.rayClusterSpec
    _, job = documents("kubernetes/job.yaml")
    templates = [group.template for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]
    return [template["spec"] for template in [*templates, job["spec"]["template"]]]


def gpus_of(pod: dict[str, Any]) -> int:
    """Return the GPUs of a pod. Kubernetes has no requests of GPUs without an equal limit."""
    (container,) = pod["containers"]
    requests, limits = (container["resources"][kind].get("nvidia.com/gpu", 0) for kind in ("requests", "limits"))
    assert requests == limits
    return requests


def torchrun_command() -> str:
    _, job = documents("kubernetes/job.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return shlex.join(container["command"])


def scripts() -> list[str]:
    """Return the shell in the files."""
    hook = ray_job().spec.rayClusterSpec.headGroupSpec.template["spec"]["containers"][0]["lifecycle"]["preStop"]
    program, option, script = hook["exec"]["command"]
    assert (program, option) == ("bash", "-c")
    return [script, ray_job().spec.entrypoint, spot_task().setup, spot_task().run]


@pytest.mark.parametrize("script", scripts(), ids=["hook", "entrypoint", "setup", "run"])
def test_shell_is_valid_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("document", documents("kubernetes/job.yaml"), ids=lambda document: document["kind"])
def test_kinds_of_kubernetes_follow_their_schemas(document):
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("pod", pods(), ids=["head", "worker", "torchrun"])
def test_pods_follow_the_schema_and_mount_what_they_have(pod):
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": {"spec": pod}}
    kubernetes_validate.validate(template, KUBERNETES_VERSION, strict=True)
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
    volumes = {volume.pop("name"): volume for volume in json.loads(json.dumps(pod["volumes"]))}
    assert volumes.keys() == mounts.keys()
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert all(entry["value"].startswith("/shared/") for entry in container["env"])


def test_nodes_have_the_gpus_of_the_recipe():
    """cross_scale is trained on 32 GPUs, 8 on a node. Only workers of the Ray cluster have GPUs."""
    hardware = load_recipe([ROOT / "recipes/cross_scale.toml"]).hardware
    assert [gpus_of(pod) for pod in pods()] == [0, hardware.gpus_per_node, hardware.gpus_per_node]
    (workers,) = ray_job().spec.rayClusterSpec.workerGroupSpecs
    assert workers.maxReplicas * hardware.gpus_per_node == hardware.train_gpus
    _, job = documents("kubernetes/job.yaml")
    launch = split_launcher(torchrun_command())
    assert launch[:2] == (job["spec"]["completions"], hardware.gpus_per_node)
    assert launch.processes == hardware.train_gpus
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


def test_pods_of_the_job_meet_at_the_name_of_the_first_one():
    service, job = documents("kubernetes/job.yaml")
    name = service["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{name}:" in torchrun_command()


@pytest.mark.parametrize("command", [ray_job().spec.entrypoint, torchrun_command()], ids=["ray", "torchrun"])
def test_commands_have_such_options(command):
    check_options(split_launcher(command).words)


def test_runs_are_on_the_shared_volume():
    for command in (ray_job().spec.entrypoint, torchrun_command()):
        words = command.replace("=", " ").split()
        assert words[words.index("--output") + 1].startswith("/shared/")


def test_skypilot_accepts_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed")
    values = [("BUCKET", "s3://bucket/run"), ("RECIPE", "cross_scale")]
    (document,) = documents("skypilot/spot.yaml")
    (resources,) = sky.Task.from_yaml_config(document, env_overrides=values).resources
    assert (resources.use_spot, resources.accelerators) == (True, {"H100": 8})


# ── The script of the task, run here with stand-ins ──────────────────────────────────────────────────────────────────

STAND_INS = {
    # A sync lists itself, copies the run, and with --follow waits for a signal.
    "opdctl": """
        echo "$*" >> calls
        case "$*" in
          "run sync s3://"*) [[ -e bucket ]] || exit 2; mkdir -p "$(dirname "$4")"; cp -r bucket "$4" ;;
          "run sync --follow"*) trap "exit 75" TERM; while :; do sleep 0.05; done ;;
          "run sync "*) [[ ! -e unreachable ]] || exit 5; rm -rf bucket; cp -r "$3" bucket ;;
        esac""",
    "torchrun": """
        echo "torchrun $*" >> calls
        mkdir -p "$RUN"
        trap 'echo stopped >> "$RUN/steps"; exit 1' TERM
        echo step >> "$RUN/steps"
        touch started
        while [[ ! -e finish ]]; do sleep 0.05; done""",
}


class Instance:
    """A directory in which the script of the task runs, with the variables that SkyPilot sets on one of some nodes."""

    def __init__(self, path: Path, rank: int = 0):
        self.path = path
        for name, body in STAND_INS.items():
            (path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (path / name).chmod(0o755)
        variables = {name: value for name, value in spot_task().envs.items() if value is not None}
        variables |= {"BUCKET": "s3://bucket/run", "RECIPE": "cross_scale", "SKYPILOT_NODE_RANK": str(rank)}
        variables |= {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.1"}
        path_variable = f"{path}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **variables, "PATH": path_variable}

    def start(self) -> subprocess.Popen:
        """Start the script, and return when the stage works."""
        (self.path / "started").unlink(missing_ok=True)
        script = ["bash", "-c", spot_task().run]
        running = subprocess.Popen(script, cwd=self.path, env=self.environment, start_new_session=True)
        while not (self.path / "started").exists():
            assert running.poll() is None
            time.sleep(0.02)
        return running

    def finish(self, running: subprocess.Popen) -> int:
        (self.path / "finish").touch()
        return running.wait()

    def calls(self) -> list[str]:
        return (self.path / "calls").read_text().splitlines()


def test_spot_instance_continues_what_the_bucket_has(tmp_path):
    """The first instance is stopped, the second finds its steps."""
    first = Instance(tmp_path)
    running = first.start()
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 1
    assert (tmp_path / "bucket/steps").read_text() == "step\nstopped\n"
    fetch, *beside, upload = first.calls()
    assert (fetch, upload) == ("run sync s3://bucket/run runs/run", "run sync runs/run s3://bucket/run")
    follow, stage = sorted(beside)
    for call in (fetch, follow, upload):
        check_options(shlex.split(call))
    assert follow == "run sync --follow runs/run s3://bucket/run"
    assert split_launcher(stage) == (1, 8, ["train", "--recipe", "cross_scale", "--output", "runs/run"])
    subprocess.run(["rm", "-r", "runs", "calls"], cwd=tmp_path, check=True)
    second = Instance(tmp_path)
    assert second.finish(second.start()) == 0
    assert (tmp_path / "bucket/steps").read_text() == "step\nstopped\nstep\n"
    with pytest.raises(ProcessLookupError):  # the sync that follows has ended, too
        os.killpg(running.pid, 0)


def test_stage_that_was_not_uploaded_is_no_success(tmp_path):
    instance = Instance(tmp_path)
    running = instance.start()
    (tmp_path / "unreachable").touch()
    assert instance.finish(running) == 1


def test_only_the_first_of_several_nodes_transfers(tmp_path):
    instance = Instance(tmp_path, rank=1)
    assert instance.finish(instance.start()) == 0
    (call,) = instance.calls()
    assert call.startswith("torchrun ")
