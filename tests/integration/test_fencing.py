"""A training process that was suspended past its lease, at every kind of file that it publishes: it changes nothing."""

import shutil
from pathlib import Path

import pytest
from helpers.commands import contents, invoke

from opdctl.artifacts import files, leases
from opdctl.errors import ExitCode

PUBLISHED = {
    "student": "student/step-00001",
    "record of the update": "step-00000/update.json",
    "trainer state in the background": "trainer/step-00001",
    "last trainer state": "trainer/step-00002",
    "last record": "step-00001/update.json",
}


@pytest.mark.parametrize("name", PUBLISHED.values(), ids=PUBLISHED)
def test_trainer_that_slept_past_its_lease_changes_nothing(finished_copy: Path, monkeypatch, name: str) -> None:
    """It sleeps before the rename of the file, until another process has the run's lease."""
    run, wanted, flush, seen = finished_copy, finished_copy / name, files.fsync_path, {}
    for path in (*run.glob("*/step-0000[12]"), run / "step-00000/update.json", run / "step-00001/update.json"):
        if path.is_dir() and path.parent.name in ("student", "trainer"):
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()

    def flush_and_sleep(path: Path) -> None:
        flush(path)
        if not seen and path.parent == wanted.parent and path.name.endswith(f"-{wanted.name}"):
            (run / ".train.lock").unlink()  # as the acquisition of a stale lease does
            assert heir.acquire()
            seen.update(contents(run))

    heir = leases.Lease(run, "train")
    monkeypatch.setattr(files, "fsync_path", flush_and_sleep)
    result = invoke("train", "--output", run, "--set", "eval.every_steps=0")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "lost_lease"), result.err
    assert contents(run) == {each: data for each, data in seen.items() if "/.tmp-" not in each}
    assert heir.is_held()
    heir.release()
