"""The study with all of its code, in its smallest version."""

import subprocess
import sys

from helpers.commands import ROOT


def test_quick_study_writes_the_page_and_measures_nothing_twice(tmp_path) -> None:
    command = [sys.executable, ROOT / "tests" / "study", "--quick", "--workers", "1"]
    command += ["--out", tmp_path / "docs", "--work", tmp_path / "work"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-2000:]
    page = (tmp_path / "docs/study.md").read_text()
    assert "nan" not in page
    images = {f"{name}.png" for name in ("study-accuracy", "study-differences", "study-prefixes", "study-conditions")}
    assert {path.name for path in (tmp_path / "docs/images").iterdir()} == images
    assert all(f"images/{name}" in page for name in images)
    measured = (tmp_path / "work/measured.jsonl").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "work/measured.jsonl").read_text() == measured
    assert (tmp_path / "docs/study.md").read_text() == page
