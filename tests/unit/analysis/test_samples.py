"""Single responses: their text, their shades, and responses that do not exist."""

import numpy as np
import pytest
from helpers.planted import plant, planted_run

from opdctl.analysis import analyze, samples
from opdctl.analysis.samples import Sample
from opdctl.analysis.shown_weights import chosen_weights
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import ResponseTokens
from opdctl.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return planted_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b", "a b"), ("\n", "↵\n"), ("\x1b[31m", r"\x1b[31m"), ("\u202e", r"\u202e"), ("", "∅"), ("é🎉", "é🎉")],
)
def test_invisible_characters_are_shown(text, shown):
    assert samples.printable(text) == shown


def test_tokens_are_decoded_one_by_one(run):
    ids = run.student.tokenizer("abc?x")["input_ids"]
    assert samples.token_decoder(run)(ids) == list("abc?x")


def test_ids_are_shown_without_a_tokenizer(run, tmp_path):
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    (tmp_path / "empty").mkdir()
    models = {**run.models, "student": type(run.student)(tmp_path / "empty", "float32")}
    run = type(run)(run.recipe, run.path, models, run.digests)
    assert analyze.analyze_run(run).samples[0].pieces == ["⟨3⟩", "⟨3⟩"]


def test_shades_cover_the_range_of_all_samples():
    a_T = np.linspace(-1, 0, 101)
    sample = Sample("s", 0, "", ["x"] * 101, ResponseTokens(a_T, a_T, a_T), {"w": 1 - a_T}, "stop", None)
    assert samples.shade_range([sample], "signal") == (0.0, pytest.approx(0.95))
    assert samples.shade_range([sample], "weight") == (1.0, 2.0)
    assert samples.shade_range([], "signal") == (0.0, 0.0)
    np.testing.assert_allclose(sample.shade("signal", (0.0, 0.5))[[0, 75, 100]], [1.0, 0.5, 0.0])


def test_representative_samples_have_the_median_and_the_greatest_signal(run):
    plant(run, 0, [np.array([-3.0]), np.array([-1.0]), np.zeros(0), np.array([-2.0])])
    reasons = samples.representative_ids(run, 0)
    assert list(reasons) == ["planted/00000/3", "planted/00000/0"]
    assert reasons["planted/00000/0"] == "step 0: greatest mean |A|, greatest |A| of a token"
    (first, _) = samples.load_samples(run, 0, reasons, chosen_weights(run).at(0))
    assert first.reason == "step 0: median of the mean |A|, longest"


def test_candidates_of_both_models_are_decoded(run):
    ids, logprobs = np.array([[3, 4], [5, 6]], np.int32), np.array([[-0.5, -1.5], [-0.25, -2.0]], np.float32)
    columns = {"top_ids": ids, "top_logprobs": logprobs}
    plant(run, 0, [np.array([-1.0, -2.0])], student=columns, teacher={**columns, "top_ids": ids[::-1]})
    (sample,) = samples.load_samples(run, 0, ["planted/00000/0"], chosen_weights(run).at(0))
    texts = [samples.token_decoder(run)([token])[0] for token in (3, 4, 5, 6)]
    assert sample.candidates["student"][1] == [(texts[2], -0.25), (texts[3], -2.0)]
    assert sample.candidates["teacher"][1] == [(texts[0], -0.25), (texts[1], -2.0)]


def test_log_ratio_accumulates_what_the_teacher_finds_less_probable():
    student_T, teacher_T = np.array([-1.0, -1.0, -3.0]), np.array([-2.0, -0.5, -5.0])
    tokens = ResponseTokens(student_T, teacher_T, teacher_T - student_T)
    sample = Sample("s", 0, "", list("abc"), tokens, {"w": student_T}, "stop", None)
    assert sample.log_ratios().tolist() == [-1.0, -0.5, -2.5]
    assert sample.values("log_ratio").tolist() == [1.0, 0.5, 2.5]
    assert sample.shades() == ["signal", "weight", "log_ratio"]  # no entropy is stored


@pytest.mark.parametrize("name", ["planted/00000/7", "planted/00003/0", "nonsense", "a/b/c"])
def test_unknown_sample_is_rejected_with_an_example(run, name):
    plant(run, 0, [np.array([-1.0])])
    with pytest.raises(OpdctlError) as error:
        samples.load_sample(run, name, [0], chosen_weights(run))
    assert error.value.kind == "unknown_name"
    assert f"`{name}`" in error.value.message
    assert "planted/00000/0" in error.value.hint


def test_tokens_that_the_student_only_read_have_no_numbers():
    a_T = np.array([-1.0, -2.0])
    mask = np.array([True, False, True])
    sample = Sample("s", 0, "", list("abc"), ResponseTokens(a_T, a_T, a_T), {"w": -a_T}, "stop", None, mask)
    assert [*sample.numbered_pieces()] == [("a", 0), ("b", None), ("c", 1)]
    assert sample.own_pieces() == ["a", "c"]
    assert sample.title() == "s, step 0: 2 tokens and 1 that it read, stop"
    values = sample.as_dict()
    assert (values["advantage"], values["w"]) == ([-1.0, None, -2.0], [1.0, None, 2.0])
    assert values["loss_mask"] == [True, False, True]
