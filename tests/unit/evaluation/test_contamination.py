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
        ("one two three four five six seven eight and no more", 8 / 10),
        ("zero one two three four five six seven eight nine", 9 / 10),
        ("one two three four five six seven", 0),
        ("ten nine eight seven six five four three two one", 0),
        ("", 0),
    ],
)
def test_fraction_of_words_in_shared_8_grams(prompt: str, fraction: float) -> None:
    assert ngram_overlap({"a": TEN}, [prompt]) == {"a": pytest.approx(fraction)}


def numbered(start: int, stop: int) -> str:
    """Return consecutive words of a problem whose words all differ."""
    return " ".join(f"w{number}" for number in range(start, stop))


def runs_of_eight(*starts: int) -> str:
    return " other ".join(numbered(start, start + 8) for start in starts)


@pytest.mark.parametrize(
    ("prompts", "overlap", "contaminated"),
    [
        ([numbered(0, 22)], 22 / 40, 1),  # 15 of the 33 8-grams
        ([runs_of_eight(0, 12, 24)], 24 / 40, 1),  # 3 of the 33
        ([numbered(start, start + 12) for start in range(0, 32, 4)], 12 / 40, 0),  # together, all 33
        ([numbered(0, 20)], 20 / 40, 0),  # exactly half
    ],
)
def test_rule_is_the_greatest_overlap_with_one_prompt(prompts: list[str], overlap: float, contaminated: int) -> None:
    found = measure_contamination({"a": numbered(0, 40)}, prompts)
    assert (found["fractions"], found["contaminated"]) == ({"a": pytest.approx(overlap)}, contaminated)


def test_8_grams_of_several_prompts_do_not_add_up() -> None:
    first, last = "one two three four five six seven eight", "three four five six seven eight nine ten"
    assert ngram_overlap({"a": TEN}, [first, last]) == {"a": pytest.approx(8 / 10)}


def test_short_problem_must_occur_completely_and_in_order() -> None:
    problems = {"short": "What is 2+2?", "word": "qkbz?"}
    assert ngram_overlap(problems, ["Tell me: what is 2 + 2? Please."]) == {"short": 1, "word": 0}
    assert ngram_overlap(problems, ["what is 2 and 2", "qkb", "qkbza"]) == {"short": 0, "word": 0}
    assert ngram_overlap(problems, ["qkbz?"]) == {"short": 0, "word": 1}


def test_scripts_without_spaces_are_split_by_character() -> None:
    assert ngram_overlap({"a": "求所有正整数使得成立"}, ["请求所有正整数使得吗"]) == {"a": pytest.approx(8 / 10)}


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
        "fractions": {"all": 1.0, "some": pytest.approx(10 / 12)},
    }
    assert list(found["fractions"]) == ["all", "some"]


words = st.lists(st.sampled_from("abc"), min_size=1, max_size=24).map(" ".join)


@given(words, st.lists(words, max_size=4))
def test_overlap_agrees_with_a_search_for_each_8_gram(problem: str, prompts: list[str]) -> None:
    words = problem.split()
    size = min(NGRAM_WORDS, len(words))
    overlaps = [0.0]
    for prompt in prompts:
        starts = [i for i in range(len(words) - size + 1) if f" {' '.join(words[i : i + size])} " in f" {prompt} "]
        overlaps.append(len({i + k for i in starts for k in range(size)}) / len(words))
    assert ngram_overlap({"a": problem}, prompts)["a"] == pytest.approx(max(overlaps))
