"""The table of exit codes in docs/run-directory.md, row by row. `invoke` checks that a command ends with one of it."""

import re
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, ROOT, invoke, sets

from opdctl.artifacts import leases
from opdctl.errors import ExitCode
from opdctl.runs import status


def patch(stack: ExitStack) -> pytest.MonkeyPatch:
    return stack.enter_context(pytest.MonkeyPatch.context())


def finished(run: Path, stack: ExitStack) -> list[object]:
    return ["status", run, "--verify"]


def without_scores(run: Path, stack: ExitStack) -> list[object]:
    return ["train", "--no-fill", "--output", run, "--set", "train.steps=3"]


def unknown_setting(run: Path, stack: ExitStack) -> list[object]:
    return ["train", "--output", run, "--set", "train.stepps=3"]


def unknown_option(run: Path, stack: ExitStack) -> list[object]:
    return ["train", "--outputt", run]


def corrupt_part(run: Path, stack: ExitStack) -> list[object]:
    next((run / "step-00001/rollout").glob("part-*")).write_bytes(b"")
    return ["status", run, "--verify"]


def other_recipe(run: Path, stack: ExitStack) -> list[object]:
    return ["train", "--recipe", QUICKSTART, *sets("seed=9"), "--output", run]


def model_out_of_reach(run: Path, stack: ExitStack) -> list[object]:
    shutil.rmtree(run)
    return ["train", "--recipe", QUICKSTART, *sets("student.model=nobody/nothing"), "--output", run]


def lease_of_another(run: Path, stack: ExitStack) -> list[object]:
    patch(stack).setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    stack.enter_context(leases.hold_lease(run, "train"))
    return ["train", "--output", run]


def stopped(number: int) -> Callable[[Path, ExitStack], list[object]]:
    def during_the_work(run: Path, stack: ExitStack) -> list[object]:
        patch(stack).setattr(status, "collect_status", lambda run, verify: signal.raise_signal(number))
        return ["status", run]

    return during_the_work


ROWS = {
    ExitCode.DONE: [finished],
    ExitCode.FAILED: [without_scores],
    ExitCode.USAGE: [unknown_setting, unknown_option],
    ExitCode.BAD_DATA: [corrupt_part],
    ExitCode.RECIPE_MISMATCH: [other_recipe],
    ExitCode.UNAVAILABLE: [model_out_of_reach, lease_of_another],
    ExitCode.REQUEUE: [stopped(signal.SIGTERM), stopped(signal.SIGUSR1)],
    ExitCode.INTERRUPTED: [stopped(signal.SIGINT)],
}


@pytest.mark.parametrize(("code", "prepare"), [(code, each) for code, cases in ROWS.items() for each in cases])
def test_command_ends_with_the_code_of_the_table(finished_copy: Path, code: int, prepare) -> None:
    with ExitStack() as stack:
        result = invoke(*prepare(finished_copy, stack))
    assert result.code == code, result.err


def test_every_row_of_the_table_is_tested() -> None:
    section = (ROOT / "docs/run-directory.md").read_text().partition("## Exit codes")[2]
    rows = [int(code) for code in re.findall(r"^\| (\d+) \|", section, flags=re.MULTILINE)]
    assert rows == list(ROWS) == list(ExitCode)
