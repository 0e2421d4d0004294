"""The overlap of training prompts with a benchmark, by hand-worked counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.evaluation.contamination import N, overlap, report

TEN = "one two three four five six seven eight nine ten"  # three 8-grams


@pytest.mark.parametrize(
    ("prompt", "share"),
    [
        (TEN, 1),
        (f"Solve this: {TEN.upper()}! And that.", 1),
        ("one two three four five six seven eight and no more", 1 / 3),
        ("zero one two three four five six seven eight nine", 2 / 3),
        ("one two three four five six seven", 0),
        ("ten nine eight seven six five four three two one", 0),
        ("", 0),
    ],
)
def test_the_share_of_a_problem_s_8_grams_that_a_prompt_holds(prompt: str, share: float) -> None:
    assert overlap({"a": TEN}, [prompt]) == {"a": pytest.approx(share)}


def test_8_grams_may_come_from_several_prompts() -> None:
    first, last = "one two three four five six seven eight", "three four five six seven eight nine ten"
    assert overlap({"a": TEN}, [first, last]) == {"a": pytest.approx(2 / 3)}


def test_a_problem_of_fewer_words_must_occur_whole_and_in_order() -> None:
    problems = {"short": "What is 2+2?", "word": "qkbz?"}
    assert overlap(problems, ["Tell me: what is 2 + 2? Please."]) == {"short": 1, "word": 0}
    assert overlap(problems, ["what is 2 and 2", "qkb", "qkbza"]) == {"short": 0, "word": 0}
    assert overlap(problems, ["qkbz?"]) == {"short": 0, "word": 1}


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert overlap({"a": "求所有正整数使得成立"}, ["请求所有正整数使得吗"]) == {"a": pytest.approx(1 / 3)}


def test_a_problem_without_words_overlaps_with_nothing() -> None:
    assert overlap({"a": "?!", "b": ""}, ["?!"]) == {}


def test_the_report_counts_problems_seen_by_half_and_names_the_worst_first() -> None:
    eleven = f"{TEN} eleven twelve"
    found = report(
        {"some": eleven, "all": TEN, "none": "nothing of this"}, ["one two three four five six seven eight", TEN]
    )
    assert found == {
        "ngram": N,
        "prompts": 2,
        "problems": 3,
        "overlapping": 2,
        "seen": 2,
        "shares": {"all": 1.0, "some": pytest.approx(3 / 5)},
    }
    assert list(found["shares"]) == ["all", "some"]


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=24).map(" ".join)


@given(words, st.lists(words, max_size=4))
def test_it_agrees_with_looking_for_each_8_gram(problem: str, prompts: list[str]) -> None:
    size = min(N, len(problem.split()))
    grams = {tuple(problem.split()[i : i + size]) for i in range(len(problem.split()) - size + 1)}
    held = [gram for gram in grams if any(f" {' '.join(gram)} " in f" {prompt} " for prompt in prompts)]
    assert overlap({"a": problem}, prompts)["a"] == pytest.approx(len(held) / len(grams))
