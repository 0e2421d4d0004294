"""The toy tasks: splits and worked answers, and the files of the toy models."""

from itertools import islice

import pytest

from opdctl.data.toy import TASKS, calc, perm, perm4, sort12
from opdctl.data.toy.calculating import calculate
from opdctl.models.directory import ModelDir, find_or_download, toy_model_names
from opdctl.recipe.schema import Model

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def test_worked_answers_by_hand():
    assert sort12.solve("cab?") == "a:cb;b:c;c:;>abc"
    assert perm.solve("abcde:0134?") == "01bacde;34baced;>baced"
    assert calc.solve("37+48-15-90?") == "37+48=85;85-15=70;70-90=-20;>-20"


def test_worked_answers_are_correct_and_have_the_documented_length():
    for problem in islice(sort12.problems("train", 3), 50):
        word = problem.prompt.removesuffix("?")
        answer = sort12.solve(word)
        assert len(problem.prompt) == 13
        assert len(answer) == 115
        assert sort12.extract(answer) == problem.answer == "".join(sorted(word))
    for problem in islice(perm.problems("train", 3), 50):
        assert len(problem.prompt) == 31
        assert len(perm.solve(problem.prompt)) == 102
        assert followed(problem.prompt) == problem.answer
    for problem in islice(calc.problems("train", 3), 50):
        assert len(problem.prompt) == 18
        worked = calc.solve(problem.prompt)
        assert worked.count("=") == 5
        assert calc.extract(worked) == problem.answer == str(eval(problem.prompt.removesuffix("?")))


def followed(prompt: str) -> str:
    """Return where the letters of a perm prompt end, following each letter separately."""
    cells, _, digits = prompt.removesuffix("?").partition(":")
    places = dict(zip(cells, range(5), strict=True))
    for one, other in zip(map(int, digits[::2]), map(int, digits[1::2]), strict=True):
        places = {letter: {one: other, other: one}.get(place, place) for letter, place in places.items()}
    return "".join(sorted(places, key=places.__getitem__))


def test_perm4_has_fewer_swaps():
    problem = next(perm4.problems("test", 0))
    assert problem.id.startswith("perm4-")
    assert len(problem.prompt) == 15
    assert followed(problem.prompt) == problem.answer


@pytest.mark.parametrize(
    ("call", "output"),
    [("37+48=", "85;"), ("-5+6=", "1;"), ("12-40=", "-28;"), ("0+00=", "0;"), ("999999+1=", "1000000;")]
    + [(call, "?;") for call in ("", "=", "3=", "3+=", "3a+4=", "3+4", "3+4+5=", "3+4==", "1234567+1=", "٣+4=")],
)
def test_calculator_answers_every_call(call, output):
    assert calculate(call) == output


def test_outputs_of_the_tool_are_found_in_a_worked_answer():
    worked = "37+48=85;85-90=-5;>-5"
    assert calc.tool is not None
    assert ["".join(worked[i] for i in span) for span in calc.tool.outputs(worked)] == ["85;", "-5;"]
    assert list(calc.tool.outputs(">-5")) == []


@pytest.mark.parametrize("task", [sort12, perm, calc], ids=["sort12", "perm", "calc"])
def test_splits_are_disjoint_for_all_seeds(task):
    train = {p.id for seed in range(3) for p in islice(task.problems("train", seed), 2000)}
    test = {p.id for seed in range(3) for p in islice(task.problems("test", seed), 2000)}
    assert not train & test
    assert len(train) > 5900


@EVERY_TASK
def test_seed_determines_the_problems(task):
    first, again, other = ([p.id for p in islice(task.problems("test", seed), 20)] for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)


@EVERY_TASK
def test_prefix_is_on_track_until_its_first_wrong_step(task):
    problem = next(task.problems("test", 0))
    worked = task.solve(problem.prompt)
    assert all(task.on_track(problem.prompt, worked[:n]) for n in range(len(worked) + 1))
    assert not task.on_track(problem.prompt, worked[:20] + "?")
    assert not task.on_track(problem.prompt, worked + "x")


@pytest.mark.parametrize(("response", "answer"), [("a:;>abc", "abc"), ("no marker", None), (">a>b", "b"), ("", None)])
def test_answer_follows_the_last_marker(response, answer):
    assert sort12.extract(response) == answer


def test_toy_models_are_small_and_share_one_tokenizer():
    directories = [ModelDir(find_or_download(Model(model=name), "model"), "float32") for name in toy_model_names()]
    names = ["calc-student", "calc-teacher", "perm-student", "perm-teacher", "student", "student-spread", "teacher"]
    assert toy_model_names() == [f"toy:{name}" for name in names]
    assert sum(f.stat().st_size for d in directories for f in d.path.iterdir()) < 6 * 2**20
    assert len({d.tokenizer_digest for d in directories}) == 1
    sizes = {name: d.weights.num_parameters for name, d in zip(toy_model_names(), directories, strict=True)}
    small = {"toy:student", "toy:student-spread", "toy:calc-student", "toy:calc-teacher"}
    assert sizes == {name: 110_528 if name in small else 365_664 for name in toy_model_names()}


def test_unknown_character_is_an_error():
    tokenizer = ModelDir(find_or_download(Model(model="toy:student"), "model"), "float32").tokenizer
    assert tokenizer("ab?")["input_ids"] == [2, 3, 38]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("é")
