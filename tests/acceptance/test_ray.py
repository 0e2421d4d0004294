"""A Ray cluster of four nodes on this machine, by `--launcher ray`: the artifacts of one process, and what may die."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ray_kills
from helpers.commands import QUICKSTART, artifacts, contents, invoke, sets, small_recipe
from helpers.ray_cluster import start_cluster
from safetensors.numpy import load_file

from opdctl.artifacts import leases
from opdctl.artifacts.records import sample_seed
from opdctl.cluster import connection, worker_pool
from opdctl.runs.run import Run

ray = pytest.importorskip("ray", reason="needs ray, of the extra `ray`")

PARTS = ("rollout.num_parts=4", "rollout.max_tokens=40", "eval.num_parts=4", "eval.max_tokens=40")
APART = ("pipeline.placement=apart", "hardware.rollout_gpus=2", "hardware.score_gpus=2")
RAY = ("--launcher", "ray")


@pytest.fixture(scope="module")
def cluster():
    with start_cluster() as started:
        yield started


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process, with evaluations of each student and of the teacher, and continuations."""
    path = tmp_path_factory.mktemp("whole") / "run"
    trained = invoke("train", "--recipe", QUICKSTART, *sets(*PARTS, "eval.every_steps=1"), "--output", path)
    assert trained.code == 0, trained.err
    continued = invoke("run", "continuations", path, "--set", "continuations.responses=8")
    assert continued.code == 0, continued.err
    return path


def train(path, *overrides, **options):
    """Start `opdctl train` as its own process, and return it."""
    words = ["train", "--recipe", str(QUICKSTART), *sets(*PARTS, *overrides), "--output", str(path), *RAY]
    return subprocess.Popen(
        [sys.executable, "-m", "opdctl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def without_cards(files):
    """Without model cards, which have the recipe, and continuations."""
    return {name: data for name, data in files.items() if not name.endswith("README.md") and "continu" not in name}


def live_leases(path):
    return list(leases.live_leases(path, time.time()))


def test_stages_make_the_artifacts_of_one_process(cluster, whole, tmp_path):
    run = tmp_path / "run"
    common = ["--output", run, *RAY]
    workers = sets(*PARTS, "eval.every_steps=1", "hardware.rollout_gpus=2")
    for command in ("rollout", "score-teacher"):
        result = invoke(command, "--recipe", QUICKSTART, *workers, *common, "--json")
        assert result.code == 0, result.err
        assert result.json()["parts_made"] == 4
        stage = {"rollout": "rollout", "score-teacher": "teacher"}[command]
        assert contents(run / "step-00000" / stage) == contents(whole / "step-00000" / stage)
    evaluated = invoke("eval", *common, "--bench", "sort12", "--model", "teacher")
    assert evaluated.code == 0, evaluated.err
    assert contents(run / "eval/sort12/teacher") == contents(whole / "eval/sort12/teacher")
    continued = invoke("run", "continuations", run, "--set", "continuations.responses=8")
    assert continued.code == 0, continued.err
    assert contents(run / "continuations") == contents(whole / "continuations")
    assert not live_leases(run)


def test_one_rank_gives_the_same_bits(cluster, whole, tmp_path):
    """With engines apart and evaluations. Engines of the ranks: `test_what_dies_is_started_again`."""
    result = invoke(
        "train", "--recipe", QUICKSTART, *sets(*PARTS, *APART, "eval.every_steps=1"), "--output", tmp_path, *RAY
    )
    assert result.code == 0, result.err
    assert without_cards(artifacts(tmp_path)) == without_cards(artifacts(whole))
    assert "step 1 (2 of 2)" in result.err
    assert invoke("status", tmp_path, "--verify").code == 0


def test_two_ranks_give_the_same_student_within_rounding(cluster, whole, tmp_path):
    process = train(tmp_path / "run", "hardware.train_gpus=2", "eval.every_steps=0")
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    (expected,), (found,) = (
        [load_file(path) for path in (run / "student/step-00002").glob("*.safetensors")]
        for run in (whole, tmp_path / "run")
    )
    assert expected.keys() == found.keys()
    assert all(np.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in expected)


class Place:
    """Stands in for a worker: where Ray has placed it."""

    def find(self):
        group = ray.util.get_current_placement_group()
        return ray.get_runtime_context().get_node_id(), group and list(group.bundle_specs)


def test_an_engine_that_spans_nodes_is_in_its_placement_group(cluster, monkeypatch):
    monkeypatch.setattr(worker_pool, "StageWorker", Place)
    nodes = [cluster.add_node(num_cpus=1, num_gpus=2) for _ in range(2)]
    with connection.connect(small_recipe().pipeline):
        engine = ("vllm.tensor_parallel_size=4", "hardware.gpus_per_node=2", "hardware.rollout_gpus=4")
        recipe = small_recipe(*engine, "pipeline.launcher=ray", "rollout.engine=vllm")  # of device auto
        worker = worker_pool._start_worker(worker_pool.pool_size(recipe, "rollout"), ())
        node, bundles = ray.get(worker.find.remote(), timeout=60)
        assert node in [each.node_id for each in nodes]
        assert sum(bundle["GPU"] for bundle in bundles) == 4
        assert max(bundle["GPU"] for bundle in bundles) == 1
    for each in nodes:
        cluster.remove_node(each)


# ── What may die ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("times", "code"), [(2, 0), (9, 5)])
def test_a_part_is_made_again_until_three_engines_have_died(cluster, tmp_path, monkeypatch, times, code):
    monkeypatch.chdir(tmp_path)
    Path("deadly").write_text("[0, 0]")
    common = ["--recipe", QUICKSTART, *sets(*PARTS, 'plugins=["helpers.deadly_engine"]', "rollout.engine=deadly")]
    plain = invoke("rollout", *common, "--output", "plain")
    assert plain.code == 0, plain.err
    name = Run.load(Path("plain")).samples(0)[4][0]  # of 8 responses in 4 parts: in part 2
    Path("deadly").write_text(json.dumps([sample_seed(0, name), times]))
    result = invoke("rollout", *common, "--output", "run", *RAY, "--set", "hardware.rollout_gpus=2")
    assert result.code == code, result.err
    assert "died; its parts are regenerated" in result.err
    if code == 0:
        assert contents(Path("run/step-00000/rollout")) == contents(Path("plain/step-00000/rollout"))
        assert not live_leases(Path("run"))
    else:
        assert result.kind == "failed_engine"
        assert re.search(r"Failed engine: \S+/rollout/part-00002-of-00004.parquet: 3 engines died", result.err)
        assert 9 - json.loads(Path("deadly").read_text())[1] in (3, 4)  # another worker may take the part at once


@pytest.mark.parametrize("kind", ray_kills.KINDS)
def test_what_dies_is_started_again(cluster, whole, tmp_path, kind):
    """Engines are apart from the trainer if a worker or a node dies, else colocated. One rank gives the same bits."""
    run, overrides = tmp_path / "run", APART if kind in ("worker", "node") else ()
    is_time = (run / "step-00001/rollout").exists
    generator = random.Random(kind)
    killed = ray_kills.run_with_kill(run, kind, is_time, cluster, generator.choice, *overrides, "train.steps=2")
    assert killed.startswith(kind)
    expected = {name: data for name, data in without_cards(artifacts(whole)).items() if not name.startswith("eval")}
    assert without_cards(artifacts(run)) == expected
    assert invoke("status", run, "--verify").code == 0


def test_sigterm_ends_the_command_and_releases_the_leases(cluster, whole, tmp_path):
    run = tmp_path / "run"
    process = train(run, *APART, "train.steps=40", "train.keep_latest=40", "eval.every_steps=0")
    wait_for((run / "step-00001/rollout/manifest.json").exists, process)
    both = r"cluster +step \d+, .*rollout: 2 of 2 workers run, 2 on "
    wait_for(lambda: re.search(both, invoke("status", run).out), process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=90)[0]
    assert process.returncode == 75, out
    assert "Stopped by SIGTERM: finished parts are kept" in out
    assert not live_leases(run)
    steps = ["--set", f"train.steps={Run.load(run).current_step() + 1}"]
    assert invoke("train", run, *steps, *RAY).code == 0
    trained, expected = (without_cards(contents(each / "student/step-00001")) for each in (run, whole))
    assert trained == expected


def wait_for(is_true, process):
    deadline = time.monotonic() + 900
    while not is_true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ── Errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nodes_with_other_code_are_an_error(cluster, tmp_path, monkeypatch):
    for module in (connection, worker_pool):
        monkeypatch.setattr(module, "code_identity", lambda: "0.0.1 (0123456789ab)")
    result = invoke("rollout", "--recipe", QUICKSTART, *sets(*PARTS), "--output", tmp_path / "run", *RAY)
    assert (result.code, result.kind) == (2, "version_mismatch")
    assert "0.0.1 (0123456789ab)" in result.err


def test_a_directory_that_nodes_lack_is_an_error(cluster, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr(worker_pool.Path, "cwd", lambda: tmp_path / "elsewhere")
    result = invoke("rollout", "--recipe", QUICKSTART, *sets(*PARTS), "--output", tmp_path / "run", *RAY)
    assert (result.code, result.kind) == (2, "missing_file")
    assert str(tmp_path / "elsewhere") in result.err
