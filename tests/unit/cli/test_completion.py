"""Shell completion: recipes, runs, keys, values and benchmarks."""

import os
import re
import subprocess
import sys

from helpers.commands import QUICKSTART, ROOT

from opdctl.cli import completion
from opdctl.recipe.load import load_recipe
from opdctl.registry import BENCHMARKS, OBJECTIVES, WEIGHTS


def complete(line: str, folder=ROOT) -> list[str]:
    """Return the completions that bash gets for a line, split into words as bash splits it."""
    words = [word for word in re.split(r"(=)| ", line) if word is not None]
    words = [word for at, word in enumerate(words) if word or at == len(words) - 1]
    if words[-1] == "" and words[-2] == "=":  # after `=`, bash passes `=` as the current word
        words.pop()
    variables = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_OPDCTL_COMPLETE": "complete_bash"}
    code = "import sys, opdctl.cli.main; sys.argv = ['opdctl']; opdctl.cli.main.main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, cwd=folder, capture_output=True, text=True
    )
    assert result.stderr == ""
    return result.stdout.split()


def test_bash_completes_keys_with_their_values():
    assert complete("opdctl train --set weight.na") == [f"weight.name={name}" for name in WEIGHTS.names()]
    assert complete("opdctl train --set train.steps=4 --set weight.na") == [
        f"weight.name={name}" for name in WEIGHTS.names()
    ]
    assert "objective.name=" in complete("opdctl train --set objective.")


def test_benchmarks_are_completed_in_a_list():
    assert complete("opdctl eval --bench sort12,ma") == ["sort12,math500"]
    rest = [name for name in BENCHMARKS.names() if name != "sort12"]
    assert completion.complete_benchmarks("sort12,") == [f"sort12,{name}" for name in rest]


def test_recipes_and_runs_are_completed_by_content(tmp_path, monkeypatch):
    assert "recipes/quickstart.toml" in complete("opdctl train --recipe re")
    assert complete("opdctl train --recipe quick") == ["quickstart"]
    monkeypatch.chdir(tmp_path)
    for file in ("runs/one/recipe.toml", "runs/two/recipe.toml", "runs/three/other.toml", "[odd]/a.toml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert complete("opdctl status ru", tmp_path) == ["runs/one", "runs/two"]
    assert completion.complete_runs("runs/o") == ["runs/one"]
    assert completion.complete_recipes("[o") == ["[odd]/a.toml"]


def test_completed_settings_are_valid():
    keys = [each.removesuffix("=") for each in completion.complete_settings("")]
    assert {"train.learning_rate", "teacher.model", "weight.gamma", "rollout.engine", "eval.grader"} <= set(keys)
    alone = [
        key for key in keys if not key.startswith("reference.") and ".shape." not in key
    ]  # the others need a complete table
    offered = {each for key in alone for each in completion.complete_settings(f"{key}=")}
    assert {"objective.name=jsd", "train.lr_scheduler_type=cosine", "rollout.entropy=true", "seed=0"} <= offered
    own = {key for kind in (WEIGHTS, OBJECTIVES) for entry in kind.entries() for key in entry.parameters}
    for setting in offered:
        section, _, key = setting.partition("=")[0].partition(".")
        needs = ["train.decay_steps=9"] if setting.startswith("train.lr_scheduler_type") else []
        needs += ["train.extrapolation=1.25"] if setting.startswith("weight.modulates") else []
        needs += ["student.dtype=bfloat16"] if setting == "train.master_dtype=bfloat16" else []
        needs += ["lora.rank=4"] if setting == "vllm.enable_lora=true" else []
        if section not in ("weight", "objective") or key not in own:
            load_recipe([QUICKSTART], [*needs, setting])


def test_other_shells_pass_the_complete_word():
    assert completion.complete_settings("weight.name=") == [f"weight.name={name}" for name in WEIGHTS.names()]
    assert completion.complete_settings("train.learning_r") == ["train.learning_rate=1e-05"]
    assert completion.complete_settings("train.no_such") == []


def test_completion_imports_no_torch():
    code = (
        "import sys; from opdctl.cli import completion;"
        "completion.complete_benchmarks(''), completion.complete_settings('');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
