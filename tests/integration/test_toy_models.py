"""The accuracy of the toy models, measured by `opdctl eval`, or with the tool of their task."""

import pytest
from helpers.commands import QUICKSTART, invoke, sets
from transformers import Qwen3ForCausalLM

from opdctl.data.toy import calc
from opdctl.data.toy.train_models import measure_accuracy, write_responses
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model


@pytest.mark.parametrize(
    ("benchmark", "model", "low", "high"),
    [
        ("sort12", "toy:teacher", 0.95, 1.0),
        ("sort12", "toy:student", 0.10, 0.40),
        ("sort12", "toy:student-spread", 0.10, 0.40),
        ("perm", "toy:perm-teacher", 0.90, 1.0),
        ("perm", "toy:perm-student", 0.10, 0.40),
    ],
)
def test_sampled_accuracy_is_in_range(benchmark, model, low, high, tmp_path):
    overrides = sets(f"student.model={model}", "eval.limit=256", "eval.batch_size=256", f'eval.bench=["{benchmark}"]')
    result = invoke("eval", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert low <= result.json()["avg"] <= high


@pytest.mark.parametrize(("name", "low", "high"), [("calc-teacher", 0.95, 1.0), ("calc-student", 0.10, 0.40)])
def test_accuracy_with_the_calculator_is_in_range(name, low, high):
    directory = ModelDir(find_or_download(Model(model=f"toy:{name}"), "model"), "float32")
    model = Qwen3ForCausalLM.from_pretrained(directory.path)
    assert low <= measure_accuracy(model, directory.tokenizer, calc, sample=True) <= high
    prompts = ["10+20-30+40-50+60?", "98+87+76+65+54+43?"]
    texts = write_responses(model, directory.tokenizer, calc, prompts, do_sample=False)
    assert texts == [calc.solve(prompt) for prompt in prompts]
