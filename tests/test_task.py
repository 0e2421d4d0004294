"""The embedded task: its splits, its worked answers, and how good its models are."""

from itertools import islice

import pytest
from conftest import invoke, sets

from opdctl.config import Model
from opdctl.model import ModelDir, locate, toy_models
from opdctl.tasks import sort12


def test_a_worked_answer_by_hand():
    assert sort12.solve("cab") == "a:cb;b:c;c:;>abc"


def test_a_worked_answer_is_right_and_of_the_length_stated():
    for problem in islice(sort12.problems("train", 3), 50):
        word = problem.prompt.removesuffix("?")
        answer = sort12.solve(word)
        assert len(problem.prompt) == 13
        assert len(answer) == 115
        assert sort12.extract(answer) == problem.answer == "".join(sorted(word))


def test_the_splits_share_no_problem_whatever_the_seeds():
    train = {p.id for seed in range(3) for p in islice(sort12.problems("train", seed), 2000)}
    test = {p.id for seed in range(3) for p in islice(sort12.problems("test", seed), 2000)}
    assert not train & test
    assert len(train) > 5900


def test_a_seed_fixes_the_problems_and_another_gives_others():
    first, again, other = ([p.id for p in islice(sort12.problems("test", seed), 20)] for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(("response", "answer"), [("a:;>abc", "abc"), ("no marker", None), (">a>b", "b"), ("", None)])
def test_the_answer_follows_the_last_marker(response, answer):
    assert sort12.extract(response) == answer


def test_the_models_are_small_and_share_one_tokenizer():
    directories = [ModelDir(locate(Model(model=name), "model"), "float32") for name in toy_models()]
    assert toy_models() == ["toy:student", "toy:student-spread", "toy:teacher"]
    assert sum(f.stat().st_size for d in directories for f in d.path.iterdir()) < 4 * 2**20
    assert len({d.tokenizer_digest for d in directories}) == 1
    sizes = {name: d.parameters() for name, d in zip(toy_models(), directories, strict=True)}
    assert sizes == {"toy:student": 110_528, "toy:student-spread": 110_528, "toy:teacher": 365_664}


def test_a_character_outside_the_alphabet_is_an_error_not_another_token():
    tokenizer = ModelDir(locate(Model(model="toy:student"), "model"), "float32").tokenizer
    assert tokenizer("ab?")["input_ids"] == [2, 3, 38]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("é")


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [("toy:teacher", 0.95, 1.0), ("toy:student", 0.10, 0.40), ("toy:student-spread", 0.10, 0.40)],
)
def test_sampled_accuracy_lies_where_it_should(model, low, high, tmp_path):
    overrides = sets(f"student.model={model}", "eval.problems=256", "eval.batch_size=256")
    recipe = locate(Model(model="toy:student"), "model").parents[3] / "recipes/quickstart.toml"
    result = invoke("eval", "--recipe", recipe, *overrides, "--output", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert low <= result.json()["avg"] <= high
