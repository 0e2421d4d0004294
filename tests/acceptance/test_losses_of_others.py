"""The lines of docs/artifacts.md: the losses of TRL and verl, fed from our scores, have the gradient of an update."""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import ROOT, invoke
from helpers.documents import code_blocks
from helpers.training import copy_scored_run

from opdctl.models.directory import find_local
from opdctl.recipe.schema import Model, WeightSettings
from opdctl.runs.scored_responses import read_scored
from opdctl.training.trainer import Trainer

READ, COLLATE, TRL, VERL = code_blocks(ROOT / "docs" / "artifacts.md", "python")
Gradients = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def expected(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    """The gradient of the first update by policy gradient without weights, of 8 responses."""
    run = copy_scored_run(finished_run, tmp_path_factory.mktemp("scored") / "run")
    recipe = run.recipe.model_copy(update={"weight": WeightSettings(name="uniform")})
    samples = [*read_scored(run, 0)]
    trainer = Trainer(dataclasses.replace(run, recipe=recipe), "cpu")
    for batch in trainer.make_micro_batches(0, samples):
        trainer._backward(batch)
    return {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


@pytest.fixture
def names(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the first two blocks define, in a folder with the scores of the first step and its student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert invoke("run", "export", finished_run, "exported.parquet", "--step", 0).code == 0
    words = ["--input", "exported.parquet", "--teacher", "toy:teacher", "--output", "scored"]
    settings = ["--set", "teacher.dtype=float32", "--set", "score.engine=transformers"]
    assert invoke("score-teacher", *words, *settings).code == 0
    Path("student").symlink_to(find_local(Model(model="toy:student"), "student") or "")
    defined: dict[str, Any] = {}
    exec(READ + COLLATE, defined)
    return defined


def check_same(model: torch.nn.Module, expected: Gradients) -> None:
    """Compare the gradients of all weights, relative to the norm of each."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_loss_of_trl_has_the_gradient_of_an_update(names: dict[str, Any], expected: Gradients) -> None:
    before, line, _ = TRL.rpartition("trainer.train()\n")
    assert line
    exec(before.replace("bf16=False", "bf16=False, use_cpu=True, report_to=[], save_strategy='no'"), names)
    trainer = names["trainer"]
    trainer.model.eval()  # the trainer divides by the accumulation steps of its loop otherwise
    trainer.compute_loss(trainer.model, names["collate"]([*names["scored"]])).backward()
    check_same(trainer.model, expected)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    exec(line, names)
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
def test_loss_of_verl_has_the_gradient_of_an_update(names: dict[str, Any], expected: Gradients) -> None:
    exec(VERL, names)
    check_same(names["model"], expected)
