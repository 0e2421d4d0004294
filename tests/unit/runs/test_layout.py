import os
from pathlib import Path

import pytest

from opdctl.errors import OpdctlError
from opdctl.runs.layout import list_steps, newest_run, parse_step, run_path, step_name


def test_step_names():
    assert step_name(3) == "step-00003"
    assert [parse_step(step_name(step)) for step in (0, 7, 123456)] == [0, 7, 123456]
    assert [parse_step(name) for name in ("step-", "step-x", "3", "step-3a", "student", "step--1")] == [None] * 6


def test_steps_are_listed_in_order_without_other_names(tmp_path):
    for name in ("step-00010", "step-00002", "step-x", "student", ".step-00001"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == {2: tmp_path / "step-00002", 10: tmp_path / "step-00010"}
    assert list(list_steps(tmp_path)) == [2, 10]
    assert list_steps(tmp_path / "nowhere") == {}


def test_run_path(small):
    assert run_path(small(), None) == Path("runs/quickstart")
    assert run_path(small(), Path("here")) == Path("here")


def test_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpdctlError) as caught:
        newest_run()
    assert caught.value.kind == "missing_run"
    for age, name in enumerate(("new", "old", "not-a-run")):
        path = Path("runs") / name
        path.mkdir(parents=True)
        (path / ("run.json" if name != "not-a-run" else "notes")).write_text("")
        os.utime(path, (1e9 - age,) * 2)
    assert newest_run() == Path("runs/new")
