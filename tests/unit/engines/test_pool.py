"""Which engines have the memory of a GPU, and which process owns them."""

import pytest
from helpers.commands import small_recipe
from helpers.hosted import FaultyEngine, model

from opdctl import distributed
from opdctl.engines.base import EngineContext
from opdctl.engines.host import HostedEngine
from opdctl.engines.pool import EnginePool
from opdctl.errors import OpdctlError
from opdctl.registry import ENGINES


class Recorded(HostedEngine):
    """A hosted engine without a process. Its calls are in `log`."""

    log: list = []  # noqa: RUF012
    error = None

    def _start(self):
        self.log.append(("start", self._context.gpus))

    @property
    def logprob_metadata(self):
        self.log.append("ready")
        if self.error:
            raise self.error
        return {}

    def load_weights(self, model):
        self.log.append(("load", model.path.name))

    def release(self, *, keep_weights):
        self.log.append(("release", "sleep 1" if keep_weights else "sleep 2"))

    def close(self):
        self.log.append("close")


@pytest.fixture
def pool(monkeypatch):
    """A function that makes a pool on GPUs 0 to 7; `.log` has the calls of its engines."""
    monkeypatch.setattr(Recorded, "log", log := [])
    monkeypatch.setattr(distributed, "visible_gpus", lambda: [str(gpu) for gpu in range(8)])
    ENGINES.names()
    for name in ("vllm", "transformers"):
        monkeypatch.setitem(ENGINES._factories, name, lambda *arguments: Recorded(FaultyEngine, *arguments))

    def make(*overrides, device="cuda", rank=0):
        monkeypatch.setattr(distributed, "local_rank", lambda: rank)
        return EnginePool(small_recipe(*overrides), device)

    make.log = log
    return make


def test_other_engines_give_their_memory_back_before_one_works(pool):
    engines = pool("vllm.gpu_memory_utilization=0.8")
    student = engines.get("student", "vllm", model("0"))
    engines.get("teacher", "vllm", model("teacher"))
    assert engines.get("student", "vllm", model("1")) is student
    assert pool.log == [
        ("start", ("0",)),
        ("release", "sleep 2"),  # the student: its weights are loaded again anyway
        ("start", ("0",)),
        ("release", "sleep 1"),
        "ready",  # its weights before the load
        ("load", "1"),
    ]


def test_engines_whose_shares_fit_together_stay(pool):
    engines = pool("vllm.gpu_memory_utilization=0.45")
    for role in ("student", "teacher", "student"):
        engines.get(role, "vllm", model(role))
    assert [each for each in pool.log if each[0] == "release"] == []
    engines.release()  # before an update
    assert [each[0] for each in pool.log].count("release") == 2


def test_engines_of_a_cpu_stay(pool):
    engines = pool("vllm.gpu_memory_utilization=0.8", device="cpu")
    for role in ("student", "teacher", "student"):
        engines.get(role, "vllm", model(role))
    engines.release()
    assert pool.log == [("start", ()), ("start", ())]


def test_first_rank_of_a_group_owns_the_engine(pool):
    for rank in range(8):
        engines = pool("vllm.tensor_parallel_size=2", "vllm.pipeline_parallel_size=2", rank=rank)
        assert engines.owns("vllm") == (rank in (0, 4))
        assert engines.owns("transformers")
        assert engines.owns("server")
        engines.start({"teacher": ("vllm", model())})
    assert pool.log == [("start", ("0", "1", "2", "3")), "ready", ("start", ("4", "5", "6", "7")), "ready"]


def test_start_waits_for_all_engines_after_it_has_started_them(pool, monkeypatch):
    engines = pool("vllm.gpu_memory_utilization=0.5")
    engines.start({"teacher": ("vllm", model()), "student": ("vllm", model())})
    assert pool.log == [("start", ("0",)), ("start", ("0",)), "ready", "ready"]
    monkeypatch.setattr(Recorded, "error", OpdctlError("unsupported_model", "the teacher"))
    with pytest.raises(OpdctlError, match="the teacher"):
        engines.start({"teacher": ("vllm", model())})


def test_start_leaves_the_memory_to_the_latest_engine(monkeypatch):
    """Hosts that do not fit together: the one that has ended for another is not started again."""
    monkeypatch.setattr(distributed, "visible_gpus", lambda: ["0"])
    hosts = {}
    ENGINES.names()
    monkeypatch.setitem(
        ENGINES._factories,
        "vllm",
        lambda model, context: hosts.setdefault(str(model.path), HostedEngine(FaultyEngine, model, context)),
    )
    engines = EnginePool(small_recipe("vllm.gpu_memory_utilization=0.8"), "cuda")
    try:
        engines.start({"teacher": ("vllm", model("teacher")), "student": ("vllm", model("student"))})
        assert {name: host._process is not None for name, host in hosts.items()} == {"teacher": False, "student": True}
    finally:
        engines.close()


@pytest.mark.parametrize("name", ["vllm", "transformers"])
@pytest.mark.parametrize("sleeps", [True, False])
def test_engines_of_a_gpu_are_processes(monkeypatch, name, sleeps):
    """Only vLLM fills its batches from several parts, and can sleep."""
    monkeypatch.setattr(HostedEngine, "_start", lambda self: None)
    recipe = small_recipe(f"vllm.enable_sleep_mode={str(sleeps).lower()}")
    engine = ENGINES.get(name)(model(), EngineContext(recipe, recipe.student, "cuda", ("0",)))
    assert isinstance(engine, HostedEngine)
    assert engine.batches_across_parts == (name == "vllm")
    assert engine._can_sleep == (name == "vllm" and sleeps)
