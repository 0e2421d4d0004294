"""Small training runs: make one, read its students, compare them."""

import shutil
from pathlib import Path

import torch
from helpers.commands import QUICKSTART, Result, invoke, sets
from safetensors.torch import load_file

from opdctl.runs.run import Run

SHORT = ("rollout.max_tokens=40", "train.keep_latest=9")
"""Settings of the students of the fixture `finished_run`."""


def train(output: Path, *overrides: str) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output, "--json")


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"student/step-{step:05d}/model.safetensors")


def max_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def copy_scored_run(finished_run: Path, path: Path) -> Run:
    """Copy a run as it was before its first update: its first step is sampled and scored."""
    shutil.copytree(finished_run, path)
    (path / "step-00000/update.json").unlink()
    for name in ("step-00001", "student", "trainer"):
        shutil.rmtree(path / name)
    return Run.load(path)
