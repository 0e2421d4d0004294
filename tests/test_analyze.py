"""analyze-position on planted artifacts: what was put in comes out."""

import csv
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import invoke
from helpers.planted import plant, planted_run

from opdctl.analysis import analyze
from opdctl.artifacts import files
from opdctl.registry import WEIGHTS
from opdctl.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return planted_run(tmp_path / "run")


def summary(run: Run, **options) -> dict:
    return analyze.analyze_run(run, **options).summary()


# ── Planted numbers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_planted_numbers_come_back(run):
    # two responses of ten tokens: |A| = 2 on the first three tokens, 0.5 on the rest, A negative
    advantage = np.array([-2.0] * 3 + [-0.5] * 7)
    plant(run, 0, [advantage, advantage])
    found = analyze.analyze_run(run)
    (phase,) = found.summary()["phases"]
    assert (phase["responses"], phase["tokens"]) == (2, 20)
    assert phase["abs_advantage"] == phase["k1"] == pytest.approx(0.95)  # (6 + 3.5) / 10
    assert phase["k3"] == pytest.approx((3 * (np.exp(-2) + 1) + 7 * (np.exp(-0.5) - 0.5)) / 10)
    assert phase["share_of_first_30_percent"]["value"] == pytest.approx(6 / 9.5)
    position = found.phases[0].numbers.position
    # gamma 1: w = 2 - spent; before the fourth token 6 / 9.5 are spent
    assert position.mean("iw_opd gamma=1.0")[[0, 3]].tolist() == pytest.approx([2.0, 2 - 6 / 9.5])
    # log-probs of prefixes: -1 a token under the student, A more under the teacher
    assert position.mean("student_prefix_logp").tolist() == pytest.approx(list(range(-1, -11, -1)))
    assert position.mean("teacher_prefix_logp")[[2, 9]].tolist() == pytest.approx([-3 - 6, -10 - 9.5])
    # prefix_ratio: exp(0.1 · Σ of A before), mean 1
    ratio = np.exp(0.1 * (np.cumsum(advantage) - advantage))
    np.testing.assert_allclose(position.mean("prefix_ratio alpha=0.1"), ratio / ratio.mean(), rtol=1e-6)


def test_entropies_and_overlap_are_there_where_they_are_stored(tmp_path):
    run = planted_run(
        tmp_path / "run", "rollout.entropy=true", "score.entropy=true", "rollout.top_k=2", "score.top_k=2"
    )
    top = np.zeros((2, 2), np.float32)
    student = {"entropies": np.array([0.5, 1.5], np.float32), "top_ids": np.array([[3, 4], [3, 4]], np.int32)}
    teacher = {"entropies": np.array([0.1, 0.3], np.float32), "top_ids": np.array([[4, 3], [5, 4]], np.int32)}
    both = ({**student, "top_logprobs": top}, {**teacher, "top_logprobs": top})
    plant(run, 0, [np.array([-1.0, -1.0])] * 2, student=both[0], teacher=both[1])
    (phase,) = analyze.analyze_run(run).phases
    mean = phase.numbers.position.mean
    assert mean("student_entropy").tolist() == [0.5, 1.5]
    assert mean("teacher_entropy").tolist() == pytest.approx([0.1, 0.3])
    assert mean("top_k_overlap").tolist() == [1.0, 0.5]


def test_positions_are_fractions_of_the_real_length(run):
    # a response of 2 and one of 20 tokens: the first half of each holds all the signal
    plant(run, 0, [np.array([1.0, 0.0]), np.array([1.0] * 10 + [0.0] * 10)])
    (phase,) = analyze.analyze_run(run).phases
    assert phase.spent()[50].value == pytest.approx(1.0)
    assert phase.spent()[25].value == pytest.approx(0.5)
    assert phase.numbers.relative.mean("abs_advantage")[10:].tolist() == [0.0] * 10


def test_early_and_late_steps_are_told_apart(run):
    for step in range(8):
        plant(run, step, [np.full(10, -1.0 if step < 4 else -0.25)])
    found = analyze.analyze_run(run)
    early, late = found.summary()["phases"]
    assert (early["phase"], late["phase"]) == ("steps 0–1", "steps 6–7")
    assert (early["abs_advantage"], late["abs_advantage"]) == (1.0, 0.25)
    assert [step.means["k1"].value for step in found.steps] == [1.0] * 4 + [0.25] * 4


def test_the_numbers_do_not_depend_on_how_the_responses_are_cut_into_parts_and_batches(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    advantages = [rng.normal(size=n) for n in rng.integers(0, 30, 40)]
    found = []
    for parts, budget in ((1, 10**6), (4, 50)):
        run = planted_run(tmp_path / f"run-{parts}", f"rollout.num_parts={parts}", "rollout.prompts_per_step=16")
        monkeypatch.setattr("opdctl.analysis.samples.CHUNK_TOKENS", budget)
        monkeypatch.setattr(analyze, "CHUNK_TOKENS", budget)
        plant(run, 0, advantages)
        found.append(analyze.analyze_run(run).tables())
    for name in ("position", "relative", "spent", "weights"):
        for column, values in found[0][name].items():
            if isinstance(values[0], float):
                np.testing.assert_allclose(values, found[1][name][column], rtol=1e-9, atol=1e-12, err_msg=column)
            else:
                assert values == found[1][name][column]


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_can_be_chosen_and_the_recipe_s_own_comes_first(run):
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    assert list(analyze.chosen_weights(run)) == [
        "iw_opd gamma=1.0",
        "iw_opd",
        "linear_decay",
        *(f"prefix_ratio alpha={alpha}" for alpha in (0.02, 0.1, 0.5)),
    ]
    assert list(analyze.chosen_weights(run, ["suffix_only"])) == ["iw_opd gamma=1.0", "suffix_only"]
    every = analyze.chosen_weights(run, ["all"])
    assert {"uniform", "teacher_confidence", "prefix_curriculum"} < set(every)
    assert not {"tip", "fire", "prune"} & set(every)  # they need what this run did not store
    table = analyze.analyze_run(run, ["prefix_only", "uniform"]).weight_table()
    # the first of two tokens: half of the tokens weigh 1, so the effective sample is a half
    assert table["weight"] == ["iw_opd gamma=1.0", "prefix_only", "uniform"]
    assert table["effective_sample"][1:] == pytest.approx([0.5, 1.0])
    assert table["mean"][1:] == pytest.approx([0.5, 1.0])
    # spread over half a response each, 0.6 of the first token's 1 nat lie in the first 30 %
    assert table["share_of_first_30_percent"][1:] == pytest.approx([0.6, 0.6 / 3])


def test_a_weight_that_ranks_the_step_sees_all_its_parts(tmp_path):
    run = planted_run(tmp_path / "run", "rollout.num_parts=2", "weight.name=tip", "weight.top_k=0", "weight.rho=0.25")
    entropies = {"entropies": np.zeros(2, np.float32)}
    plant(run, 0, [np.array([-4.0, -3.0])] + [np.array([-0.5, -0.5])] * 3, student=entropies)
    whole = analyze.analyze_run(run).whole.numbers.whole
    assert whole.mean("tip rho=0.25 top_k=0").tolist() == [0.25]  # the two of eight tokens, both in the first part


def test_a_weight_that_is_called_like_a_quantity_does_not_take_its_place(run, monkeypatch):
    monkeypatch.setitem(WEIGHTS._factories, "signal", WEIGHTS.get("suffix_only"))
    monkeypatch.setitem(WEIGHTS._sources, "signal", "")
    plant(run, 0, [np.array([-3.0, -1.0])] * 30)
    found = analyze.analyze_run(run, ["signal"])
    assert found.weights == ["iw_opd gamma=1.0", "signal (weight)"]
    assert found.verdict.share.value == pytest.approx(0.6 * 3 / 4)


def test_a_wrong_weight_is_refused_with_the_nearest_name(run):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("analyze-position", run.path, "--weights", "linear_decai")
    assert (result.code, "did you mean `linear_decay`?" in result.err) == (2, True)
    result = invoke("analyze-position", run.path, "--weights", "fire")
    assert (result.code, "score.entropy = true" in result.err) == (4, True)


# ── Partial and odd runs ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_without_scores_names_the_next_command(run):
    result = invoke("analyze-position", run.path)
    assert result.code == 1
    assert "opdctl rollout" in result.err


ODD = {
    "one response": [np.array([-1.0, -2.0, 0.5])],
    "one token": [np.array([-1.0])],
    "all of length 1": [np.array([-1.0])] * 30,
    "an empty one among others": [np.zeros(0), np.array([-1.0])],
    "all empty": [np.zeros(0)] * 3,
    "no signal": [np.zeros(5)] * 30,
}


@pytest.mark.parametrize("advantages", ODD.values(), ids=ODD)
def test_odd_runs_give_a_report_without_a_verdict(run, advantages):
    plant(run, 0, advantages)
    result = invoke("analyze-position", run.path, "--json")
    assert result.code == 0, result.err
    said = result.json()["summary"]
    assert said["verdict"]["bias"] == "unknown"
    assert said["phases"][0]["responses"] == len(advantages)
    assert "No verdict" in result.err
    page = re.sub(r"base64,[^\"]*", "", Path(result.json()["report"]).read_text())
    assert said["verdict"]["reason"] in page
    assert not re.search(r"\bnan\b|\binf\b", page + result.err)


def test_steps_that_are_not_wholly_scored_are_left_out_and_named(run):
    plant(run, 0, [np.full(4, -1.0)] * 3)
    plant(run, 1, [np.full(4, -9.0)] * 3)
    run.score_stage(1, "teacher").manifest_path.unlink()
    result = invoke("analyze-position", run.path, "--json")
    assert result.code == 0
    assert "left out, since not wholly scored: steps 1" in result.err
    assert result.json()["summary"]["steps"] == [0]
    assert result.json()["summary"]["phases"][0]["abs_advantage"] == 1.0


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_part_is_named_with_the_command_that_mends_it(run, damage):
    plant(run, 0, [np.full(4, -1.0)] * 3)
    part = run.score_stage(0, "teacher").path / run.score_stage(0, "teacher").names[0]
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] + b"\0")
    result = invoke("analyze-position", run.path)
    assert result.code == 3
    assert f"score-teacher --output {run.path} --step 0 --only teacher --repair" in result.err
    assert not (run.path / "analysis").exists()


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tables_and_figures_are_written_each_in_both_forms(run):
    for step in range(2):
        plant(run, step, [np.array([-1.0, -3.0]), np.array([-3.0])])
    found = invoke("analyze-position", run.path, "--json").json()
    folder = run.path / "analysis"
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        *("position", "spent", "steps", "heat", "prefix_logp", "weights", "prefix_ratio", "one_response")
    }
    for path in map(Path, found["figures"]):
        assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    for name in ("position", "relative", "spent", "steps", "steps_relative", "weights"):
        with (folder / "tables" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        table = pq.read_table(folder / "tables" / f"{name}.parquet")
        assert rows[0] == table.column_names
        assert len(rows) == table.num_rows + 1
    rows = pq.read_table(folder / "tables" / "position.parquet").to_pylist()
    assert [row["tokens"] for row in rows] == [2, 1, 2, 1]
    assert rows[0]["abs_advantage"] == 2.0
    assert rows[1]["abs_advantage_low"] is None  # a single response has no interval
    assert files.read_json(folder / "summary.json") == found["summary"]


def test_a_second_analysis_is_the_same_bit_by_bit_and_leaves_nothing_of_the_first(run):
    plant(run, 0, [np.linspace(-1, 0, 10)] * 3)
    assert invoke("analyze-position", run.path).code == 0
    first = {path.name: path.read_bytes() for path in (run.path / "analysis").rglob("*") if path.is_file()}
    (run.path / "analysis" / "figures" / "old.png").write_bytes(b"")
    assert invoke("analyze-position", run.path).code == 0
    second = {path.name: path.read_bytes() for path in (run.path / "analysis").rglob("*") if path.is_file()}
    assert first == second


def test_a_dry_run_writes_nothing(run):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("analyze-position", run.path, "--dry-run", "--json")
    assert result.json()["steps"] == [0]
    assert not (run.path / "analysis").exists()


# ── One response in the terminal ─────────────────────────────────────────────────────────────────────────────────────


def test_one_response_is_shown_with_its_numbers(run):
    plant(run, 0, [np.array([-1.0, -2.0]), np.array([-0.5])])
    result = invoke("analyze-position", run.path, "--sample", "planted/00000/0", "--json")
    assert result.code == 0
    said = result.json()
    assert said["advantage"] == [-1.0, -2.0]
    assert said["iw_opd gamma=1.0"] == pytest.approx([2.0, 1 + 2 / 3])
    assert len(said["tokens"]) == 2
    assert "-2.000" in result.err


@pytest.mark.parametrize("name", ["planted/00000/7", "planted/00003/0", "nonsense", "a/b/c"])
def test_a_response_that_there_is_not_is_refused_with_an_example(run, name):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("analyze-position", run.path, "--sample", name)
    assert result.code == 2
    assert "such as planted/00000/0" in result.err
