"""The acceptance run of `make test-gpu`, on a CPU with the toy models and the transformers engine."""

import re
import subprocess
import sys
from pathlib import Path

from gpu.checks import list_checks
from gpu.pairs import toy_pair
from gpu.workspace import Place
from helpers.commands import ROOT

PAGE = (ROOT / "docs/gpu.md").read_text()


def run(out: Path, *options: str) -> tuple[int, list[list[str]]]:
    """Return the exit code and the cells of the table."""
    command = [sys.executable, ROOT / "tests/gpu", "--device", "cpu", "--tiny", "--out", out, *options]
    code = subprocess.run(command, capture_output=True, check=False).returncode
    lines = [line for line in (out / "results.md").read_text().splitlines() if line.startswith("|")]
    return code, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_check_passes_on_a_cpu(tmp_path):
    code, rows = run(tmp_path)
    assert {row[0]: row[2] for row in rows} == {
        "parity, transformers and transformers": "pass",
        "kills": "pass",
        "stages": "pass",
        "update": "pass",
        "torchrun": "skipped",
        "follow": "skipped",
    }
    assert code == 0


def test_check_that_fails_fails_the_run(tmp_path):
    """Without time a command is stopped, and later checks are not started."""
    code, rows = run(tmp_path, "--minutes", "0.001", "--only", "parity,kills")
    assert [row[2] for row in rows] == ["FAIL", "FAIL"]
    assert code == 1


def test_page_lists_the_checks():
    section = PAGE.partition("## Test a machine")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("|")][2:]
    listed = {row[1].strip(): int(row[3]) for row in rows}
    places = [Place(Path(), "cuda", [*map(str, range(count))], "vllm", False, 0.0) for count in (1, 8)]
    checks = {check.name: check.gpus for place in places for check in list_checks(place, toy_pair(), [toy_pair()])}
    assert {name: gpus for name, gpus in checks.items() if not name.startswith(("parity, ", "train, TP"))} == {
        name: gpus for name, gpus in listed.items() if name != "parity"
    }


def test_tests_that_the_page_names_exist():
    names = re.findall(r"`(?:tests/)?((?:unit|integration|acceptance)/[\w/]+\.py)`", PAGE)
    assert names
    assert not [name for name in names if not (ROOT / "tests" / name).exists()]
