"""What the tests share: a small recipe on the embedded task, the command line in this process, and finished runs."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two busy processes with two threads each crawl on two cores
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell; tests send this signal
    signal.signal(signal.SIGINT, signal.default_int_handler)

import filelock
import hypothesis
import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke, sets, small_recipe

from opdctl import distributed
from opdctl.recipe.schema import Recipe

# No test is timed, and a run on CI must not depend on luck.
hypothesis.settings.register_profile("opdctl", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("opdctl")

SHORT = ("rollout.max_tokens=40", "eval.every_steps=1", "eval.limit=4", "eval.max_tokens=40", "train.keep_latest=9")
COLUMNS = ("rollout.entropy=true", "rollout.top_k=4", "score.entropy=true", "score.top_k=4", "score.student_top_k=true")


lost_tests: list[str] = []


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_handlecrashitem(crashitem: str) -> None:
    lost_tests.append(crashitem)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report the end of a test process, whose other tests were not run, by another exit code than failed tests."""
    if lost_tests:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


@pytest.fixture
def opdctl() -> Callable[..., Result]:
    return invoke


@pytest.fixture
def small() -> Callable[..., Recipe]:
    return small_recipe


@pytest.fixture
def stage_args(tmp_path: Path) -> Callable[..., list[object]]:
    """Return `--recipe … --set … --output …` for a small run in the test's own folder."""

    def build(*overrides: str, output: str = "run") -> list[object]:
        return ["--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / output]

    return build


@pytest.fixture(autouse=True, scope="module")
def close_process_groups() -> Iterator[None]:
    """Destroy the process group that a module's trainers or vLLM instances share: the next module's would join it."""
    yield
    distributed.destroy_process_group()
    if "helpers.vllm" in sys.modules:
        sys.modules["helpers.vllm"].destroy_process_groups()


# ── Finished runs ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run: 2 steps of 8 responses in 2 parts, every student and trainer state, evaluations of each student
    and of the teacher. Read only; all test processes share it."""
    yield from _shared_run(tmp_path_factory, "finished", *SHORT)


@pytest.fixture(scope="session")
def finished_run_with_columns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same with entropies and top-k log-probs of the student and the teacher, without evaluations. Read only."""
    yield from _shared_run(tmp_path_factory, "finished-with-columns", *SHORT, "eval.every_steps=0", *COLUMNS)


@pytest.fixture
def finished_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A private copy of `finished_run`."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def _shared_run(tmp_path_factory: pytest.TempPathFactory, name: str, *overrides: str) -> Iterator[Path]:
    """Yield a run that the first test process makes, and check at the end that no test changed it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the parent belongs to all workers
    path, complete = base / name / "run", base / name / "complete"
    with filelock.FileLock(base / f"{name}.lock"):
        if not complete.exists():
            result = invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", path)
            assert result.code == 0, result.err
            complete.touch()
    before = contents(path)
    yield path
    assert contents(path) == before, "a test changed the shared run"
