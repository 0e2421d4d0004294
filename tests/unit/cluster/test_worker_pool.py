from collections import Counter

import pytest
from helpers.commands import small_recipe

from opdctl.artifacts.stage_dir import Fingerprint, StageDir
from opdctl.cluster import worker_pool
from opdctl.cluster.stage_worker import WorkerProcess
from opdctl.cluster.worker_pool import Calls, Worker, WorkerPool, pool_size
from opdctl.errors import OpdctlError

GPU = ("pipeline.device=cuda", "rollout.engine=vllm", "score.engine=vllm")
TENSOR_4 = "vllm.tensor_parallel_size=4"
HERE, THERE = WorkerProcess("node-a", 11, "a"), WorkerProcess("node-b", 12, "b")


@pytest.mark.parametrize(
    ("overrides", "section", "expected"),
    [
        (("pipeline.device=cpu", "hardware.rollout_gpus=3"), "rollout", (3, 1, 0)),
        (("pipeline.device=cpu", "pipeline.threads=4"), "score", (1, 4, 0)),
        ((*GPU, "hardware.rollout_gpus=16", TENSOR_4), "rollout", (4, 1, 4)),
        (
            (*GPU, "hardware.score_gpus=8", TENSOR_4, "vllm.pipeline_parallel_size=2"),
            "score",
            (1, 1, 8),
        ),
        ((*GPU, "hardware.rollout_gpus=2", TENSOR_4), "rollout", (1, 1, 4)),
        (("pipeline.device=cuda", "rollout.engine=transformers", "hardware.rollout_gpus=8"), "rollout", (8, 1, 1)),
        (("pipeline.device=cuda", "score.engine=server", "teacher.server=http://127.0.0.1:1"), "score", (1, 1, 0)),
    ],
)
def test_the_size_of_a_pool_is_that_of_the_hardware(overrides, section, expected):
    assert pool_size(small_recipe(*overrides), section) == (*expected, ())


def test_an_engine_that_spans_nodes_has_a_bundle_for_each_of_its_processes():
    """vLLM's Ray executor takes a bundle of one GPU for each process; the worker itself has the CPU of the first."""
    spanning = (*GPU, "pipeline.launcher=ray", "hardware.gpus_per_node=2", TENSOR_4)
    size = pool_size(small_recipe(*spanning, "hardware.score_gpus=8"), "score")
    assert size == (2, 1, 0, ({"CPU": 1, "GPU": 1}, {"GPU": 1}, {"GPU": 1}, {"GPU": 1}))


def test_a_worker_without_a_call_is_idle():
    workers, calls = [Worker("rollout", object()) for _ in range(2)], Calls()
    calls.add(workers[0], "first")
    assert calls.started() == []
    workers[0].process = HERE
    assert calls.started() == ["first"]
    assert calls.find_idle(workers) is workers[1]
    calls.add(workers[1], "second")
    assert calls.find_idle(workers) is None


def test_a_dismissed_worker_gets_no_call():
    workers, calls = [Worker("rollout", object(), HERE), Worker("rollout", object())], Calls()
    for worker in workers:
        calls.add(worker, f"call of {id(worker)}")
    assert calls.cancel_waiting() == [workers[1]]
    assert list(calls.by_reference.values()) == [workers[0]]
    workers[1].is_dismissed = True
    assert calls.find_idle(workers) is None


@pytest.fixture
def pool(monkeypatch):
    """A pool without a cluster. `nodes` in it are the nodes that are alive."""
    ray = pytest.importorskip("ray", reason="needs ray, of the extra `ray`")
    made = WorkerPool.__new__(WorkerPool)
    made._losses, made.nodes = Counter(), {"a", "b"}
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": name in made.nodes} for name in ("a", "b")])
    return made


@pytest.fixture
def stage(tmp_path):
    return StageDir(
        tmp_path / "rollout", stage="rollout", num_parts=3, suffix=".parquet", fingerprint=Fingerprint({}),
        rerun_command="opdctl rollout",
    )  # fmt: skip


def lose(pool, worker, stage, parts):
    """Let the process of a worker die with parts in work, and start again."""
    worker.leases |= {f"rollout-part-{index:05d}" for index in parts}
    pool._note_loss(worker, worker.process, stage)
    pool._note_process(worker, HERE)


def test_the_third_engine_that_dies_with_a_part_names_it(pool, stage):
    workers = [Worker("rollout", None, HERE) for _ in range(3)]
    lose(pool, workers[0], stage, [0, 2])
    lose(pool, workers[1], stage, [1, 2])
    with pytest.raises(OpdctlError, match=r"part-00002-of-00003\.parquet: 3 engines") as caught:
        lose(pool, workers[2], stage, [2])
    assert caught.value.kind == "failed_engine"
    assert [worker.restarts for worker in workers] == [1, 1, 0]


def test_a_lost_node_is_no_fault_of_its_parts(pool, stage):
    pool.nodes = {"a"}
    for _ in range(5):
        worker = Worker("rollout", None, THERE)
        lose(pool, worker, stage, [2])
    assert not any(pool._losses.values())
    assert worker.process == HERE


def test_a_worker_whose_engines_only_die_ends_the_stage(pool, stage):
    worker = Worker("rollout", None, HERE)
    for part in range(2):
        lose(pool, worker, stage, [part])
    with pytest.raises(OpdctlError, match="worker process 11 on node-a died"):
        lose(pool, worker, stage, [])


def test_engines_that_die_on_a_worker_that_makes_parts_are_no_end(pool, stage):
    worker = Worker("rollout", None, HERE)
    for _ in range(4):
        lose(pool, worker, stage, [])
        worker.failures = 0  # as after a call that has made a part
    assert worker.restarts == 4


def test_a_name_of_ray_that_is_used_is_there():
    """`_quiet_raylets` and `_connect` use names that Ray does not document."""
    pytest.importorskip("ray", reason="needs ray, of the extra `ray`")
    from ray._private import worker
    from ray._private.utils import read_ray_address

    assert callable(worker.print_to_stdstream)
    assert "print_to_stdstream" in worker.listen_error_messages.__code__.co_names
    assert callable(read_ray_address)
    assert worker_pool.SECTIONS == ("rollout", "score")
