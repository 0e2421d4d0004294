"""Ranks of one command under a launcher that only sets their variables: lost ranks, evaluation, views of files."""

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import QUICKSTART, contents, invoke, sets
from helpers.ranks import FORK, RankProcess, call_in_ranks, rank_variables, run_ranks, start_ranks
from helpers.training import SHORT, max_difference, train, weights

from opdctl import distributed, environment
from opdctl.cli.session import join_process_group
from opdctl.distributed import peers
from opdctl.engines.pool import open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.models.shards import WeightReader
from opdctl.pipeline.loop import Clock, evaluate_if_due
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import Run
from opdctl.training import checkpoint, export, writing
from opdctl.training.base_scorer import BaseScorer

SETTINGS = (*SHORT, "train.steps=2", "train.tokens_per_micro_batch=160")


def arguments(output: Path, *overrides: str) -> list[object]:
    return ["--recipe", QUICKSTART, *sets(*SETTINGS, *overrides), "--output", output]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Two steps by one process."""
    path = tmp_path_factory.mktemp("one") / "run"
    result = train(path, *SETTINGS)
    assert result.code == 0, result.err
    return path


def check_same_students(one: Path, other: Path, steps: int = 2) -> None:
    for step in range(1, steps + 1):
        assert max_difference(weights(one, step), weights(other, step)) < 1e-5
        probes = [Run.load(path).update(step - 1)["probe"] for path in (one, other)]
        assert probes[0]["ids"] == probes[1]["ids"]
        assert probes[0]["logprobs"] == pytest.approx(probes[1]["logprobs"], abs=1e-3)


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


# ── Lost ranks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_one_error(process: RankProcess, *shown: str) -> None:
    """The rank's log has one error, which begins with `Failed rank`, and no traceback."""
    log = process.log.read_text()
    assert log.count("error:") == 1, log
    assert "Failed rank: " in log
    assert "Traceback" not in log
    assert all(text in log for text in shown), log


@pytest.fixture
def training(tmp_path) -> Iterator[list[RankProcess]]:
    """Two ranks of a long training, in their second step, which notice a silent rank within ten seconds."""

    def prepare(rank: int) -> None:
        peers.BEAT_SECONDS = 1.0

    processes = start_ranks(tmp_path, 2, "train", *arguments(tmp_path / "run", "train.steps=500"), prepare=prepare)
    until((tmp_path / "run/step-00000/update.json").exists)
    yield processes
    for process in processes:
        process.kill()


def test_rank_that_is_killed_ends_the_other_with_one_error(training):
    os.kill(training[1].pid, signal.SIGKILL)
    assert training[0].wait() == ExitCode.FAILED
    check_one_error(training[0], "if it is SIGKILL, the usual cause is that memory ran out")


def test_rank_that_is_stopped_by_a_signal_ends_the_other_which_names_it(training):
    os.kill(training[1].pid, signal.SIGTERM)
    assert training[0].wait() == ExitCode.REQUEUE
    check_one_error(training[0], "rank 1 on ", "stopped by SIGTERM")
    assert training[1].wait() == ExitCode.REQUEUE


def test_rank_that_no_longer_answers_ends_the_other(training):
    """As after a loss of power, no connection closes: rank 0 would wait for a day in a collective."""
    os.kill(training[1].pid, signal.SIGSTOP)
    assert training[0].wait() == ExitCode.FAILED
    check_one_error(training[0], "rank 1 is lost")


def test_rank_that_is_killed_while_it_loads_the_student_ends_the_other(tmp_path):
    def prepare(rank: int) -> None:
        peers.BEAT_SECONDS = 1.0
        if rank == 1:
            WeightReader.read = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    processes = start_ranks(tmp_path, 2, "train", *arguments(tmp_path / "run"), prepare=prepare)
    assert processes[0].wait() == ExitCode.FAILED
    check_one_error(processes[0])
    assert processes[1].wait() == -signal.SIGKILL


def test_all_ranks_that_get_a_signal_stop_for_a_requeue_and_one_reports_it(training):
    for process in training:
        os.kill(process.pid, signal.SIGUSR1)
    assert [process.wait() for process in training] == [ExitCode.REQUEUE] * 2
    logs = "".join(process.log.read_text() for process in training)
    assert logs.count("Stopped by SIGUSR1: finished parts are kept") == 1
    assert "Traceback" not in logs


def die_at(owner: object, name: str, lost: int, call: int) -> Callable[[int], None]:
    """Return what lets rank `lost` die at its `call`-th call of a function."""
    function, calls = getattr(owner, name), itertools.count()

    def dying(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    def prepare(rank: int) -> None:
        peers.BEAT_SECONDS = 1.0
        if rank == lost:
            setattr(owner, name, dying)

    return prepare


@pytest.mark.parametrize(
    ("lost", "owner", "name", "call"),
    [
        (1, checkpoint.ShardWriter, "write_data", 0),  # in the background, during the second rollout
        (0, checkpoint, "TensorFileWriter", 1),  # the last trainer state
        (1, export.MergedWeights, "_convert", 30),  # the second student
        (0, writing, "complete_student", 1),  # its digests, in the background
        (1, writing, "complete_student", 1),
    ],
)
def test_rank_that_is_lost_while_files_are_written_leaves_a_run_that_resumes(
    one_process, tmp_path, lost, owner, name, call
):
    run = tmp_path / "run"
    processes = start_ranks(tmp_path, 2, "train", *arguments(run), prepare=die_at(owner, name, lost, call))
    assert [process.wait() for process in processes][lost] == -signal.SIGKILL
    assert processes[1 - lost].wait() == ExitCode.FAILED
    check_one_error(processes[1 - lost])
    assert Run.load(run).current_step() == 1
    run_ranks(tmp_path, 2, "train", *arguments(run))
    check_same_students(one_process, run)
    assert not list(run.rglob(".tmp-*"))
    assert invoke("status", run, "--verify").code == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_rank_that_is_lost_while_a_student_in_memory_is_copied_leaves_a_run_that_resumes(one_process, tmp_path, lost):
    run, die = tmp_path / "run", die_at(writing.HeldStudent, "copy_to", lost, 0)

    def hold_students(rank: int) -> None:
        environment.waits_for_storage = lambda path: True

    def prepare(rank: int) -> None:
        hold_students(rank)
        die(rank)

    processes = start_ranks(tmp_path, 2, "train", *arguments(run), prepare=prepare)
    assert [process.wait() for process in processes][lost] == -signal.SIGKILL
    assert processes[1 - lost].wait() == ExitCode.FAILED
    check_one_error(processes[1 - lost])
    assert Run.load(run).current_step() == 0
    run_ranks(tmp_path, 2, "train", *arguments(run), prepare=hold_students)
    check_same_students(one_process, run)
    assert not list(run.rglob(".tmp-*"))
    assert invoke("status", run, "--verify").code == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_rank_that_is_lost_while_the_reference_is_scored_leaves_a_run_that_resumes(tmp_path, lost):
    run, lora = tmp_path / "run", ("lora.rank=4", "train.extrapolation=1.5")
    prepare = die_at(BaseScorer, "_score", lost, 1)
    processes = start_ranks(tmp_path, 2, "train", *arguments(run, *lora), prepare=prepare)
    assert [process.wait() for process in processes][lost] == -signal.SIGKILL
    assert processes[1 - lost].wait() == ExitCode.FAILED
    check_one_error(processes[1 - lost])
    assert Run.load(run).current_step() == 1
    run_ranks(tmp_path, 2, "train", *arguments(run, *lora))
    assert train(tmp_path / "one", *SETTINGS, *lora).code == 0
    check_same_students(tmp_path / "one", run)


def test_ranks_of_different_commands_are_an_error(tmp_path):
    """As with `srun` over a list of independent runs."""

    def join() -> None:
        join_process_group(load_recipe([QUICKSTART], []), tmp_path / f"run-{distributed.rank()}")

    for kind, detail in call_in_ranks(join, rank_variables(2)):
        assert kind == "invalid_usage"
        assert "run-1" in detail


# ── The same results ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_groups_of_ranks_continue_a_run_of_two_ranks_and_two_ranks_theirs(one_process, tmp_path):
    """One step by two ranks, one by two groups of two, each of which holds a copy of the student, and one by two."""
    assert train(one_process, *SETTINGS, "train.steps=3").code == 0
    run = tmp_path / "run"
    for steps, ranks, *overrides in ((1, 2), (2, 4, "train.fsdp_size=2"), (3, 2)):
        run_ranks(tmp_path, ranks, "train", *arguments(run, f"train.steps={steps}", *overrides))
    check_same_students(one_process, run, steps=3)


def test_four_ranks_with_two_parts_resume_a_step_of_which_one_part_exists(one_process, tmp_path):
    """More ranks than parts: the others wait. Rank 0 alone prints a summary, and no rank leaves a lease."""
    assert train(one_process, *SETTINGS, "train.steps=3").code == 0
    run = Path(shutil.copytree(one_process, tmp_path / "run"))
    shutil.rmtree(run / "student/step-00003")
    shutil.rmtree(run / "trainer/step-00003")
    shutil.rmtree(run / "step-00002/teacher")
    (run / "step-00002/update.json").unlink()
    (run / "step-00002/rollout/part-00001-of-00002.parquet").unlink()
    ranks = run_ranks(tmp_path, 4, "train", *arguments(run, "train.steps=3"), "--json")
    logs = [process.log.read_text() for process in ranks]
    assert [log.count("\n{") for log in logs] == [1, 0, 0, 0]  # the summary
    check_same_students(one_process, run, steps=3)
    assert contents(run / "step-00002/rollout") == contents(one_process / "step-00002/rollout")
    assert not list(run.rglob("*.lock"))


def test_ranks_share_an_evaluation_and_give_the_summary_of_one(finished_run, tmp_path, monkeypatch):
    """Rank 0 waits in its first part until rank 1 makes one."""
    path, one = (Path(shutil.copytree(finished_run, tmp_path / name)) for name in ("run", "one"))
    shared, stream = FORK.Event(), TransformersEngine.stream_completions

    def stream_together(*arguments, **options):
        if distributed.is_main():
            assert distributed.world_size() == 1 or shared.wait(120)
        else:
            shared.set()
        return stream(*arguments, **options)

    monkeypatch.setattr(TransformersEngine, "stream_completions", stream_together)

    def evaluate(path: Path) -> None:
        shutil.rmtree(path / "eval", ignore_errors=True)
        distributed.init_process_group(use_gpu=False, on_peer_failure=print)
        recipe = load_recipe([path / "recipe.toml"], ["eval.num_parts=4"])
        run = Run.from_record(recipe, path)
        with open_engine_pool(run.recipe, "cpu") as engines:
            evaluate_if_due(run, 2, engines, Clock())

    evaluate(one)
    assert call_in_ranks(partial(evaluate, path), rank_variables(2)) == [None, None]
    assert contents(path / "eval") == contents(one / "eval")
    assert len(list((path / "eval/sort12/step-00002").glob("part-*"))) == 4


def test_eval_command_under_a_launcher_prints_one_summary(finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    shutil.rmtree(run / "eval")
    logs = [rank.log.read_text() for rank in run_ranks(tmp_path, 2, "eval", "--run", run, "--step", 2, "--json")]
    (line,) = [line for line in logs[0].splitlines() if line.startswith("{")]
    stored = json.loads((finished_run / "eval/sort12/step-00002/summary.json").read_text())
    assert json.loads(line)["avg"] == stored["avg"]
    assert logs[1] == ""
    assert contents(run / "eval/sort12/step-00002") == contents(finished_run / "eval/sort12/step-00002")


# ── Views of files ───────────────────────────────────────────────────────────────────────────────────────────────────

LOOKS = 3


def see_files_late(rank: int) -> None:
    """Let ranks but the first see a file that another process makes only at their fourth look, as on NFS."""
    looks: dict[Path, int] = {}
    exists = Path.exists

    def late_exists(path: Path, **options: bool) -> bool:
        if path.name not in ("run.json", "manifest.json", "update.json") or not exists(path, **options):
            return exists(path, **options)
        looks[path] = looks.get(path, 0) + 1
        return looks[path] > LOOKS

    if rank:
        Path.exists = late_exists  # type: ignore[method-assign]


def test_updates_do_not_depend_on_when_a_rank_sees_the_files(one_process, tmp_path):
    """Rank 1 would find no scores and end, and rank 0 would wait for it."""
    run = tmp_path / "run"
    assert invoke("rollout", *arguments(run)).code == 0
    assert invoke("score-teacher", *arguments(run)).code == 0
    run_ranks(tmp_path, 2, "train", "--no-fill", *arguments(run), prepare=see_files_late)
    assert Run.load(run).current_step() == 1
    check_same_students(one_process, run, steps=1)


def test_resumed_updates_do_not_depend_on_when_a_rank_sees_the_files(one_process, tmp_path):
    """Rank 1 would begin at step 0 instead of step 1, or replay other updates than rank 0."""
    run = Path(shutil.copytree(one_process, tmp_path / "run"))
    for name in ("student/step-00002", "trainer/step-00002"):
        shutil.rmtree(run / name)
    for name in ("step-00002", "student/step-00003", "trainer/step-00003"):  # if another test has trained on
        shutil.rmtree(run / name, ignore_errors=True)
    (run / "step-00001/update.json").unlink()
    run_ranks(tmp_path, 2, "train", "--no-fill", *arguments(run), prepare=see_files_late)
    check_same_students(one_process, run)
