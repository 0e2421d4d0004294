"""The overlap of training prompts with a benchmark, counted by hand and by brute force."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.evaluation.contamination import NGRAM_WORDS, measure_contamination, ngram_overlap

TEN = "one two three four five six seven eight nine ten"  # three 8-grams


@pytest.mark.parametrize(
    ("prompt", "fraction"),
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
def test_fraction_of_8_grams_in_a_prompt(prompt: str, fraction: float) -> None:
    assert ngram_overlap({"a": TEN}, [prompt]) == {"a": pytest.approx(fraction)}


def test_8_grams_of_several_prompts() -> None:
    first, last = "one two three four five six seven eight", "three four five six seven eight nine ten"
    assert ngram_overlap({"a": TEN}, [first, last]) == {"a": pytest.approx(2 / 3)}


def test_short_problem_must_occur_completely_and_in_order() -> None:
    problems = {"short": "What is 2+2?", "word": "qkbz?"}
    assert ngram_overlap(problems, ["Tell me: what is 2 + 2? Please."]) == {"short": 1, "word": 0}
    assert ngram_overlap(problems, ["what is 2 and 2", "qkb", "qkbza"]) == {"short": 0, "word": 0}
    assert ngram_overlap(problems, ["qkbz?"]) == {"short": 0, "word": 1}


def test_scripts_without_spaces_are_split_by_character() -> None:
    assert ngram_overlap({"a": "求所有正整数使得成立"}, ["请求所有正整数使得吗"]) == {"a": pytest.approx(1 / 3)}


def test_problem_without_words_is_left_out() -> None:
    assert ngram_overlap({"a": "?!", "b": ""}, ["?!"]) == {}


def test_contaminated_problems_are_counted_and_sorted() -> None:
    eleven = f"{TEN} eleven twelve"
    found = measure_contamination(
        {"some": eleven, "all": TEN, "none": "nothing of this"}, ["one two three four five six seven eight", TEN]
    )
    assert found == {
        "ngram": NGRAM_WORDS,
        "prompts": 2,
        "problems": 3,
        "overlapping": 2,
        "contaminated": 2,
        "fractions": {"all": 1.0, "some": pytest.approx(3 / 5)},
    }
    assert list(found["fractions"]) == ["all", "some"]


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=24).map(" ".join)


@given(words, st.lists(words, max_size=4))
def test_overlap_agrees_with_a_search_for_each_8_gram(problem: str, prompts: list[str]) -> None:
    size = min(NGRAM_WORDS, len(problem.split()))
    grams = {tuple(problem.split()[i : i + size]) for i in range(len(problem.split()) - size + 1)}
    held = [gram for gram in grams if any(f" {' '.join(gram)} " in f" {prompt} " for prompt in prompts)]
    assert ngram_overlap({"a": problem}, prompts)["a"] == pytest.approx(len(held) / len(grams))
