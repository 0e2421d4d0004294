"""Which files a sync transfers, in which order, and which side's version holds."""

import itertools
from pathlib import Path

import pytest
from helpers.commands import contents

from opdctl.artifacts.object_store import StoredFile, redact
from opdctl.runs.sync_plan import (
    RecordedFile,
    belongs_to_run,
    complete_files,
    decide,
    is_replaceable,
    needed_to_follow,
    refers_to_others,
    transfer_order,
)


def test_every_file_of_a_run_is_synced(finished_run: Path) -> None:
    assert [name for name in contents(finished_run) if not belongs_to_run(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "../run.json",
        "/run.json",
        "student/step-00001/../../../x",
        "student/step-00001/..",
        "student/step-00001/a\\b",
        "student/step-00001/.hidden",
        "student//step-00001/x",
        "student/step-00001/x\n",
        "analysis/\0",
        "analysis/" + "x" * 151,
        "step-00000/rollout/.part-00000-of-00001.parquet.lock",
        "step-00000/other/manifest.json",
        "heartbeats/train.json",
        "corrupt/run.json",
        "wandb/run/log",
        "plugins.py",
        "",
    ],
)
def test_other_names_are_not(name: str) -> None:
    assert not belongs_to_run(name)


def test_order_of_two_steps() -> None:
    names = [
        "recipe.toml",
        "run.json",
        "step-00000/rollout/part-00000-of-00001.parquet",
        "student/step-00001/config.json",
        "trainer/step-00001/shard.safetensors",
        "step-00000/rollout/manifest.json",
        "trainer/step-00001/digests.json",
        "eval/sort12/step-00001/summary.json",
        "step-00000/update.json",
        "step-00001/rollout/part-00000-of-00001.parquet",
        "student/step-00002/config.json",
        "step-00001/rollout/manifest.json",
        "step-00001/update.json",
        "analysis/report.html",
        "metrics.jsonl",
    ]
    assert sorted(sorted(names), key=transfer_order) == names
    assert [name for name in names if refers_to_others(name)] == [
        name for name in names if name.endswith(".json") and "config" not in name
    ]


DECISIONS = {
    # (here, there, last): send, receive, both
    ("a", "a", None): ("same", "same", "same"),
    ("a", "a", "b"): ("same", "same", "same"),
    ("a", None, None): ("send", "leave", "send"),
    ("a", None, "a"): ("send", "leave", "send"),
    (None, "a", None): ("leave", "receive", "receive"),
    (None, "a", "a"): ("leave", "receive", "leave"),
    (None, "a", "b"): ("leave", "receive", "receive"),
    ("a", "b", "b"): ("send", "leave", "send"),
    ("a", "b", "a"): ("leave", "receive", "receive"),
    ("a", "b", None): ("conflict", "conflict", "conflict"),
    ("a", "b", "c"): ("conflict", "conflict", "conflict"),
}


@pytest.mark.parametrize(
    ("case", "direction"), list(itertools.product(DECISIONS, ("send", "receive", "both"))), ids=lambda value: str(value)
)
def test_decision(case: tuple[str | None, str | None, str | None], direction: str) -> None:
    expected = DECISIONS[case][("send", "receive", "both").index(direction)]
    assert decide(*case, direction) == expected  # type: ignore[arg-type]


def test_finished_artifacts_are_not_replaceable() -> None:
    for name in ("recipe.toml", "metrics.jsonl", "student/step-00001/README.md", "eval/b/step-00001/summary.json"):
        assert is_replaceable(name)
    for name in ("step-00000/rollout/manifest.json", "step-00000/update.json", "trainer/step-00001/digests.json"):
        assert not is_replaceable(name)


def files(*names: str) -> dict[str, StoredFile]:
    return {name: StoredFile(1, "x") for name in names}


def test_artifacts_wait_for_their_record() -> None:
    part, receipt = (
        "step-00000/rollout/part-00000-of-00002.parquet",
        "step-00000/teacher/part-00000-of-00001.x.receipt.json",
    )
    other = "step-00000/rollout/part-00001-of-00002.parquet"
    student = "student/step-00001/config.json"
    stored = files(part, other, receipt, student, "student/step-00001/README.md")
    assert complete_files(stored, {part: RecordedFile("x")}, {"step-00000/teacher"}).keys() == {part}
    both = complete_files(stored, {part: RecordedFile("x"), student: RecordedFile("x")}, set())
    assert both.keys() == {part, student, receipt, "student/step-00001/README.md"}


def test_update_waits_for_its_student() -> None:
    """A directory may be listed before the student was written, and the update after it."""
    update, recorded = "step-00000/update.json", {"student/step-00001/config.json": RecordedFile("x")}
    assert not complete_files(files(update), recorded, set())
    complete = files(update, "student/step-00001/config.json")
    assert complete_files(complete, recorded, set()) == complete
    pruned = files(update, "step-00001/update.json", "student/step-00002/config.json")
    recorded |= {"student/step-00002/config.json": RecordedFile("x")}
    assert complete_files(pruned, recorded, set()) == pruned


def test_stage_elsewhere_needs_the_newest_student_and_finished_stages() -> None:
    needed = {
        "run.json",
        "step-00000/rollout/manifest.json",
        "step-00000/rollout/part-00000-of-00001.parquet",
        "step-00001/update.json",
        "student/step-00002/config.json",
    }
    others = {
        "trainer/step-00002/digests.json",
        "student/step-00001/config.json",
        "step-00002/rollout/in_progress.json",
        "step-00002/rollout/part-00000-of-00001.parquet",
        "step-00002/rollout/part-00000-of-00001.parquet.receipt.json",
        "analysis/report.html",
    }
    assert needed_to_follow(needed | others) == needed


@pytest.mark.parametrize(
    "text",
    [
        "GET https://bucket.s3.amazonaws.com/x?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2 failed",
        "s3://key:hunter2@bucket/x",
        "config: {'secret_access_key': 'hunter2'}",
        "aws_session_token=hunter2",
    ],
)
def test_credentials_are_redacted(text: str) -> None:
    assert "hunter2" not in redact(text)
