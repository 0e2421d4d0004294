"""The model card of a run with several phases: every number is counted again from the artifacts."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import invoke
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from opdctl.artifacts.records import ScoredResponse
from opdctl.recipe.load import load_recipe
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training.publish import CARD_FILE

EDITS = (
    ("weight.name=uniform", "train.updates_per_step=2", "train.learning_rate=0.0001", "train.steps=3"),
    ("train.updates_per_step=1", "train.steps=4"),
)


@pytest.fixture(scope="module")
def changed_run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose recipe.toml was edited by hand before each of two further steps. Read only."""
    path = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("changed") / "run"))
    for overrides in EDITS:
        (path / "recipe.toml").write_text(load_recipe([path / "recipe.toml"], overrides).to_toml())
        result = invoke("train", path, "--set", "eval.every_steps=0")
        assert result.code == 0, result.err
    return path


def read_tables(card: Path) -> list[list[list[str]]]:
    """Return the rows of cells of each table of a rendered card, without the empty ones, in which labels are text."""
    text = card.read_text().split("---\n", 2)[2]
    html = MarkdownIt("commonmark").enable("table").render(text)
    tables = []
    for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL):
        rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)]
        tables.append([[re.sub("</?code>", "", cell) for cell in row] for row in rows if any(row)])
    return tables


def measure(run: Run, step: int) -> tuple[list[ScoredResponse], np.ndarray, np.ndarray]:
    """Return a step's responses, and log-probs and entropies of all tokens by a forward pass of the student before."""
    model = AutoModelForCausalLM.from_pretrained(run.student_path(step), dtype=torch.float32)
    scored, logps, entropies = list(read_scored(run, step)), [], []
    for sample in scored:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        logps.append(logp.gather(-1, ids[len(prompt) :, None])[:, 0].numpy())
        entropies.append(-(logp.exp() * logp).sum(-1).numpy())
    return scored, np.concatenate(logps), np.concatenate(entropies)


def test_every_number_of_the_card_is_that_of_the_artifacts(changed_run):
    run = Run.load(changed_run)
    training, phases, results = read_tables(run.student_path(4) / CARD_FILE)
    assert dict(training) | {"steps": "4", "trained": "all weights"} == dict(training)
    updates = [1, 1, 2, 1]
    assert [row[:2] for row in phases[1:]] == [["0–1", str(sum(updates[:2]))], ["2", str(updates[2])], ["3", "1"]]
    assert [row[3].partition(" ")[0] for row in phases[1:]] == ["iw_opd", "uniform", "uniform"]
    assert phases[1][4] == ""
    for change in (
        "train.learning_rate 0.0002 → 0.0001",
        "train.updates_per_step 1 → 2",
        "weight.name iw_opd → uniform",
    ):
        assert change in phases[2][4]
    assert phases[3][4] == "train.updates_per_step 2 → 1"

    scored, logp_N, entropy_N = measure(run, 3)
    lengths = [len(sample.response.response_ids) for sample in scored]
    advantage_N = np.concatenate([sample.teacher.logprobs for sample in scored]) - logp_N
    truncated = [sample.response.finish_reason == "length" for sample in scored]
    expected = {
        "loss": -advantage_N.mean(),  # of weight 1 and ratio 1
        "reverse KL to the teacher, nats per token (k1)": -advantage_N.mean(),
        "mean |A|, nats per token": np.abs(advantage_N).mean(),
        "entropy, nats per token": entropy_N.mean(),
        "response length, tokens": np.mean(lengths),
        "fraction of truncated responses": np.mean(truncated),
        "responses": len(scored),
        "tokens of the responses": sum(lengths),
    }
    shown = {label: float(value.replace(",", "")) for label, value in results}
    assert shown == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert shown.keys() == expected.keys()
    text = (run.student_path(4) / CARD_FILE).read_text()
    assert "The responses of step 3, sampled by the student of step 3:" in text
    assert "`eval/*/step-00004/summary.json`" in text


def test_card_is_written_again_byte_for_byte(changed_run, tmp_path):
    path = shutil.copytree(changed_run, tmp_path / "run")
    shutil.rmtree(path / "student/step-00004")
    assert invoke("train", path).code == 0
    card = Path("student/step-00004") / CARD_FILE
    assert (path / card).read_bytes() == (changed_run / card).read_bytes()


def test_card_counts_the_steps_without_a_record(changed_run, tmp_path):
    """The first updates were removed, as those before a fork are in another run."""
    path = shutil.copytree(changed_run, tmp_path / "run")
    for step in range(2):
        shutil.rmtree(path / f"step-0000{step}")
    shutil.rmtree(path / "student/step-00004")
    assert invoke("train", path).code == 0
    training, phases, _ = read_tables(path / "student/step-00004" / CARD_FILE)
    assert dict(training)["steps"] == "4"
    assert [row[:2] for row in phases[1:]] == [["2 others", ""], ["2", "2"], ["3", "1"]]


def test_status_has_the_phases(changed_run):
    result = invoke("status", changed_run, "--json")
    phases = result.json()["phases"]
    assert [phase["steps"] for phase in phases] == [[0, 1], [2], [3]]
    assert [phase["weight"]["name"] for phase in phases] == ["iw_opd", "uniform", "uniform"]
    assert phases[2]["changes"] == [["train.updates_per_step", 2, 1]]
    lines = [" ".join(line.split()) for line in invoke("status", changed_run).out.splitlines()]
    assert "phase steps 0–1 weight iw_opd, objective policy_gradient" in lines
    assert "phase step 3 train.updates_per_step 2 → 1" in lines
