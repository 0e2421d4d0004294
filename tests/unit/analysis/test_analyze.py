"""analyze_run on planted artifacts: the planted numbers come back."""

import numpy as np
import pytest
from helpers.planted import plant, planted_run

from opdctl.analysis import analyze, captions
from opdctl.artifacts.files import write_json
from opdctl.errors import OpdctlError
from opdctl.registry import WEIGHTS
from opdctl.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return planted_run(tmp_path / "run")


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_planted_numbers_come_back(run):
    # two responses of ten tokens: |A| = 2 on the first three tokens, 0.5 on the others, A negative
    advantage = np.array([-2.0] * 3 + [-0.5] * 7)
    plant(run, 0, [advantage, advantage])
    analysis = analyze.analyze_run(run, "prefix_ratio:alpha=0.1:normalize=response")
    (phase,) = analysis.summary()["phases"]
    assert (phase["responses"], phase["tokens"]) == (2, 20)
    assert phase["abs_advantage"] == phase["k1"] == pytest.approx(0.95)  # (6 + 3.5) / 10
    assert phase["k3"] == pytest.approx((3 * (np.exp(-2) + 1) + 7 * (np.exp(-0.5) - 0.5)) / 10)
    assert phase["prefix_fraction"]["value"] == pytest.approx(6 / 9.5)
    found = analysis.phases[0]
    position = found.numbers.by_position()
    # gamma 1: w = 2 - F, and F is 6 / 9.5 before the fourth token
    assert position.mean("iw_opd gamma=1")[[0, 3]].tolist() == pytest.approx([2.0, 2 - 6 / 9.5])
    # log-probs of prefixes: -1 per token under the student, A more under the teacher
    assert found.cumulative_logp("student").mean_L.tolist() == pytest.approx(list(range(-1, -11, -1)))
    assert found.cumulative_logp("teacher").mean_L[[2, 9]].tolist() == pytest.approx([-3 - 6, -10 - 9.5])
    # prefix_ratio: exp(0.1 · Σ of A before), mean 1
    ratio = np.exp(0.1 * (np.cumsum(advantage) - advantage))
    np.testing.assert_allclose(
        position.mean("prefix_ratio alpha=0.1 normalize=response"), ratio / ratio.mean(), rtol=1e-6
    )


def test_responses_to_a_prompt_in_all_steps_are_one_unit(run):
    prompts = [f"prompt-{number}" for number in range(19)]
    for step in range(2):
        plant(run, step, [np.array([-1.0, -0.5])] * 38, prompts=[*prompts, *prompts])
    analysis = analyze.analyze_run(run)
    assert "19 prompts are too few" in analysis.bias.reason
    profile = analysis.all_steps.numbers.profile
    assert profile.responses_G[profile.responses_G > 0].tolist() == [4] * 19
    assert all(np.isnan(each.raw.low) for each in analysis.phases[0].correlations)


def test_entropies_and_overlap_are_analyzed_if_stored(tmp_path):
    run = planted_run(
        tmp_path / "run", "rollout.entropy=true", "score.entropy=true", "rollout.top_k=2", "score.top_k=2"
    )
    top = np.zeros((2, 2), np.float32)
    student = {"entropies": np.array([0.5, 1.5], np.float32), "top_ids": np.array([[3, 4], [3, 4]], np.int32)}
    teacher = {"entropies": np.array([0.1, 0.3], np.float32), "top_ids": np.array([[4, 3], [5, 4]], np.int32)}
    both = ({**student, "top_logprobs": top}, {**teacher, "top_logprobs": top})
    plant(run, 0, [np.array([-1.0, -1.0])] * 2, student=both[0], teacher=both[1])
    (phase,) = analyze.analyze_run(run).phases
    mean = phase.numbers.by_position().mean
    assert mean("student_entropy").tolist() == [0.5, 1.5]
    assert mean("teacher_entropy").tolist() == pytest.approx([0.1, 0.3])
    assert mean("top_k_overlap").tolist() == [1.0, 0.5]


def test_correlations_are_those_of_the_tokens_of_a_phase(run):
    # |A| rises along the response at step 0, and falls at step 1; responses of 10 tokens at least
    rising = [-np.arange(1.0, n + 1) for n in range(10, 40)]
    plant(run, 0, rising)
    plant(run, 1, [advantage[::-1] for advantage in rising])
    table = analyze.analyze_run(run).tables()["correlations"]
    rows = {(phase, name): n for n, (phase, name) in enumerate(zip(table["phase"], table["property"], strict=True))}
    first, last = rows["step 0", "position"], rows["step 1", "position"]
    assert table["correlation"][first] == pytest.approx(1.0)
    assert table["correlation"][last] < -0.3
    assert table["correlation"][rows["step 0", "teacher_logp"]] == pytest.approx(-1.0)  # A = log T - log S, S constant
    assert np.isnan(table["correlation"][rows["step 0", "student_logp"]])
    assert np.isnan(table["correlation"][rows["step 0", "token_frequency"]])  # all tokens have the same id


def test_prefix_ratios_have_quantiles_and_sample_sizes_by_position(run):
    # exp(A) of the first token is 3, 1 and 1/3: r of the second token is 27/13, 9/13 and 3/13
    plant(run, 0, [np.array([np.log(ratio), 0.0]) for ratio in (3, 1, 1 / 3)] * 10)
    table = analyze.analyze_run(run, "prefix_ratio:alpha=1,uniform").tables()["prefix_ratio"]
    assert (table["weight"], table["to_position"]) == (["prefix_ratio alpha=1"] * 2, [1, 2])
    assert table["responses"] == [30, 30]
    assert [table[name][1] for name in ("low", "median", "high")] == pytest.approx([3 / 13, 9 / 13, 27 / 13], rel=0.2)
    assert table["effective_sample_size"] == pytest.approx([1.0, 9 / (3 * (27**2 + 9**2 + 3**2) / 13**2)])
    assert table["median"][0] == pytest.approx(1.0, rel=2e-3)


def test_relative_positions_are_fractions_of_the_length(run):
    # responses of 2 and of 20 tokens: the first half of each has all the signal
    plant(run, 0, [np.array([1.0, 0.0]), np.array([1.0] * 10 + [0.0] * 10)])
    (phase,) = analyze.analyze_run(run).phases
    assert phase.cumulative_signal()[50].value == pytest.approx(1.0)
    assert phase.cumulative_signal()[25].value == pytest.approx(0.5)
    assert phase.numbers.relative.mean("abs_advantage")[10:].tolist() == [0.0] * 10


def test_first_and_last_steps_are_separate_phases(run):
    for step in range(8):
        plant(run, step, [np.full(10, -1.0 if step < 4 else -0.25)])
    analysis = analyze.analyze_run(run)
    first, last = analysis.summary()["phases"]
    assert (first["phase"], last["phase"]) == ("steps 0–1", "steps 6–7")
    assert (first["abs_advantage"], last["abs_advantage"]) == (1.0, 0.25)
    assert [step.means["k1"].value for step in analysis.steps] == [1.0] * 4 + [0.25] * 4
    assert analysis.tables()["steps"]["k1_relative"] == [1.0] * 4 + [0.25] * 4
    assert analysis.draw_commands == ()


def test_kl_relative_to_a_first_step_without_any_is_undefined(run):
    plant(run, 0, [np.zeros(3)] * 2)
    plant(run, 1, [np.full(3, -1.0)] * 2)
    assert np.isnan(analyze.analyze_run(run).tables()["steps"]["k1_relative"]).all()


def test_ends_are_the_first_step_and_the_final_student(run):
    for step in range(9):  # the last by the student after 8 updates
        plant(run, step, [np.full(10, 0.1 * step - 1.0)] * 2)
    analysis = analyze.analyze_run(run, None, "ends")
    first, last = analysis.summary()["phases"]
    assert (first["phase"], last["phase"]) == ("before training (step 0)", "after 8 updates (step 8)")
    assert (first["abs_advantage"], last["abs_advantage"]) == pytest.approx((1.0, 0.2))
    assert analysis.draw_commands == []


def test_final_student_without_responses_gets_the_commands_that_draw_them(run):
    plant(run, 0, [np.full(10, -1.0)] * 2)
    plant(run, 1, [np.full(10, -1.0)] * 2)
    write_json(run.update_path(1), {**run.update(0), "step": 1})
    analysis = analyze.analyze_run(run, None, "ends")
    assert [phase.name for phase in analysis.phases] == ["before training (step 0)", "after 1 update (step 1)"]
    assert analysis.draw_commands == [
        f"opdctl rollout {run.path} --step 2",
        f"opdctl score-teacher {run.path} --step 2",
    ]
    assert all(command in captions.figure_captions(analysis)["position"] for command in analysis.draw_commands)


def test_student_of_a_stale_step_is_the_one_that_drew_it(tmp_path):
    run = planted_run(tmp_path / "run", "pipeline.max_staleness=1")
    plant(run, 0, [np.full(10, -1.0)] * 2)
    write_json(run.step_path(1) / "rollout" / "policy_version.json", {"policy_version": 0})
    plant(run, 1, [np.full(10, -1.0)] * 2)
    analysis = analyze.analyze_run(run, None, "ends")
    assert [phase.name for phase in analysis.phases] == ["before training (step 0)", "before training (step 1)"]
    assert analysis.draw_commands == []  # step 1 cannot be drawn again


def test_numbers_do_not_depend_on_parts_and_batches(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    advantages = [rng.normal(size=n) for n in rng.integers(0, 30, 40)]
    tables = []
    for parts, budget in ((1, 10**6), (4, 50)):
        run = planted_run(tmp_path / f"run-{parts}", f"rollout.num_parts={parts}", "rollout.prompts_per_step=16")
        monkeypatch.setattr("opdctl.analysis.samples.CHUNK_TOKENS", budget)
        monkeypatch.setattr(analyze, "CHUNK_TOKENS", budget)
        plant(run, 0, advantages)
        tables.append(analyze.analyze_run(run).tables())
    for name in ("position", "cohorts", "relative", "cumulative_signal", "weights", "weights_of_long"):
        for column, values in tables[0][name].items():
            if isinstance(values[0], float):
                np.testing.assert_allclose(values, tables[1][name][column], rtol=1e-9, atol=1e-12, err_msg=column)
            else:
                assert values == tables[1][name][column]


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_table_of_weights_has_their_means_and_sample_sizes(run):
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    table = analyze.analyze_run(run, "prefix_only,uniform").weight_table()
    # the first of two tokens: half of the tokens have weight 1, so the effective sample size is a half
    assert table["weight"] == ["iw_opd gamma=1", "prefix_only", "uniform"]
    assert table["effective_sample_size"][1:] == pytest.approx([0.5, 1.0])
    assert table["mean"][1:] == pytest.approx([0.5, 1.0])
    # spread over half a response each, 0.6 of the first token's 1 nat is in the first 30%
    assert table["prefix_fraction"][1:] == pytest.approx([0.6, 0.6 / 3])


def test_weight_that_needs_the_full_step_gets_all_its_parts(tmp_path):
    run = planted_run(tmp_path / "run", "rollout.num_parts=2", "weight.name=tip", "weight.top_k=0", "weight.rho=0.25")
    entropies = {"entropies": np.zeros(2, np.float32)}
    plant(run, 0, [np.array([-4.0, -3.0])] + [np.array([-0.5, -0.5])] * 3, student=entropies)
    overall = analyze.analyze_run(run).all_steps.numbers.overall
    assert overall.mean("tip rho=0.25 top_k=0").tolist() == [0.25]  # two of eight tokens, both in the first part


def test_weight_named_like_a_quantity_does_not_replace_it(run, monkeypatch):
    monkeypatch.setitem(WEIGHTS._factories, "signal", WEIGHTS.get("suffix_only"))
    monkeypatch.setitem(WEIGHTS._sources, "signal", "")
    plant(run, 0, [np.array([-3.0, -1.0])] * 30)
    analysis = analyze.analyze_run(run, "signal")
    assert analysis.weights == ["iw_opd gamma=1", "signal (weight)"]
    assert analysis.bias.prefix_fraction.value == pytest.approx(0.6 * 3 / 4)


# ── Incomplete runs ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_with_incomplete_scores_are_skipped(run):
    plant(run, 0, [np.full(4, -1.0)] * 3)
    plant(run, 1, [np.full(4, -9.0)] * 3)
    run.score_stage(1, "teacher").manifest_path.unlink()
    assert analyze.scored_steps(run) == ([0], [1])
    summary = analyze.analyze_run(run).summary()
    assert (summary["steps"], summary["skipped"]) == ([0], [1])
    assert summary["phases"][0]["abs_advantage"] == 1.0


def test_run_without_scores_is_rejected(run):
    with pytest.raises(OpdctlError) as error:
        analyze.analyze_run(run)
    assert error.value.kind == "missing_input"
    assert run.next_command() in error.value.hint
