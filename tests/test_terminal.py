"""What a person at a terminal has besides: completion by the shell, and a table that grows while training."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from helpers.commands import QUICKSTART, ROOT, sets

from opdctl import console
from opdctl.cli import completion
from opdctl.recipe.load import load_recipe
from opdctl.registry import BENCHMARKS, OBJECTIVES, WEIGHTS


def complete(line: str, folder=ROOT) -> list[str]:
    """Return what bash is told for a line whose last word is in work, cut into words as bash cuts it."""
    words = [word for word in re.split(r"(=)| ", line) if word is not None]
    words = [word for at, word in enumerate(words) if word or at == len(words) - 1]
    if words[-1] == "" and words[-2] == "=":  # behind a sign, bash names the sign as the word in work
        words.pop()
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_OPDCTL_COMPLETE": "complete_bash"}
    code = "import sys, opdctl.cli.main; sys.argv = ['opdctl']; opdctl.cli.main.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, cwd=folder, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_is_told_what_stands_behind_the_sign():
    assert complete("opdctl train --set weight.na") == [f"weight.name={name}" for name in WEIGHTS.names()]
    assert complete("opdctl train --set weight.name=") == WEIGHTS.names()
    assert complete("opdctl train --set train.steps=4 --set weight.name=pref") == [
        name for name in WEIGHTS.names() if name.startswith("pref")
    ]
    assert complete("opdctl train --set objective.name=reverse") == ["reverse_kl"]


def test_benchmarks_are_completed_one_after_another():
    assert complete("opdctl eval --bench sort12,ma") == ["sort12,math500"]
    rest = [name for name in BENCHMARKS.names() if name != "sort12"]
    assert completion.benches("sort12,") == [f"sort12,{name}" for name in rest]


def test_recipes_and_runs_are_found_by_what_they_hold(tmp_path, monkeypatch):
    assert "recipes/quickstart.toml" in complete("opdctl train --recipe re")
    monkeypatch.chdir(tmp_path)
    for file in ("runs/one/recipe.toml", "runs/two/recipe.toml", "runs/three/other.toml", "[odd]/a.toml"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert complete("opdctl status ru", tmp_path) == ["runs/one", "runs/two"]
    assert completion.runs("runs/o") == ["runs/one"]
    assert completion.recipes("[o") == ["[odd]/a.toml"]


def test_every_key_and_value_that_is_offered_is_accepted():
    keys = [each.removesuffix("=") for each in completion.settings("")]
    assert {"train.learning_rate", "teacher.model", "weight.gamma", "rollout.engine", "eval.grader"} <= set(keys)
    alone = [
        key for key in keys if not key.startswith("reference.") and ".shape." not in key
    ]  # others want a whole table
    offered = {each for key in alone for each in completion.settings(f"{key}=")}
    assert {"objective.name=jsd", "train.lr_scheduler_type=cosine", "rollout.entropy=true", "seed=0"} <= offered
    own = {key for kind in (WEIGHTS, OBJECTIVES) for entry in kind.entries() for key in entry.parameters}
    for setting in offered:
        section, _, key = setting.partition("=")[0].partition(".")
        needs = ["train.decay_steps=9"] if setting.startswith("train.lr_scheduler_type") else []
        if section not in ("weight", "objective") or key not in own:
            load_recipe([QUICKSTART], [*needs, setting])


def test_other_shells_hand_over_the_whole_word():
    assert completion.settings("weight.name=") == [f"weight.name={name}" for name in WEIGHTS.names()]
    assert completion.settings("train.learning_r") == ["train.learning_rate=1e-05"]
    assert completion.settings("train.no_such") == []


def test_completion_imports_no_torch():
    code = (
        "import sys; from opdctl.cli import completion; completion.benches(''), completion.settings('');"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def at_terminal(*words: str) -> str:
    """Run Python with a terminal of 100 columns for its stderr, and return all that it wrote there."""
    ours, theirs = pty.openpty()
    variables = os.environ | {"COLUMNS": "100", "LINES": "40", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, *words], stderr=theirs, stdout=subprocess.DEVNULL, env=variables) as process:
        os.close(theirs)
        written = b""
        try:
            while piece := os.read(ours, 4096):
                written += piece
        except OSError:  # how Linux says that the other end was closed
            pass
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


@pytest.fixture
def twenty_rows() -> str:
    return growing("lambda: [str(n), f'{n}.5']")


def growing(make_row: str) -> str:
    """Return a program that shows twenty rows, each made so."""
    rows = f"[show({make_row}, f'step {{n}}') for n in range(1, 21)]"
    return f"from opdctl import console\nwith console.live_table('a run', ('step', 'loss')) as show: {rows}"


def test_a_terminal_has_a_table_of_the_last_rows_and_no_lines(twenty_rows):
    said = at_terminal("-c", twenty_rows)
    last = said.rpartition("a run")[2]
    assert re.findall(r"│ +(\d+) │", last) == [str(n) for n in range(21 - console.MAX_TABLE_ROWS, 21)]
    assert "step 20" not in said


def test_elsewhere_there_are_lines_and_no_row_is_made():
    code = growing("lambda: exit('a row was made')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"step {n}" for n in range(1, 21)]


def test_training_at_a_terminal_shows_step_loss_accuracy_speed_and_time_left(tmp_path):
    settings = sets("train.steps=2", "eval.every_steps=1")
    said = at_terminal(
        "-m", "opdctl", "train", "--recipe", str(QUICKSTART), *settings, "--output", str(tmp_path / "run")
    )
    last = [line for line in said.splitlines() if "2/2 │" in line][-1]
    step, loss, gap, truncated, accuracy, speed, left = (c.strip() for c in last.split("│")[1:-1])
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    summary = json.loads((tmp_path / "run" / "eval" / "sort12" / "step-00001" / "summary.json").read_text())
    seconds = sum(metrics[f"{stage}_seconds"] for stage in ("rollout", "score", "update"))
    assert (step, loss, gap) == ("2/2", f"{metrics['loss']:+.4f}", f"{metrics['abs_advantage']:.4f}")
    assert truncated == f"{metrics['truncated_fraction']:.0%}"
    assert (accuracy, left) == (f"{summary['avg']:.1%} @1", "0:00:00")
    assert speed == f"{metrics['tokens'] / seconds:,.0f}"
