"""Solved examples before a problem: which ones, their answers, and the form of the prompt."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from opdctl import console
from opdctl.data.messages import Chat, Message
from opdctl.data.rendering import PromptFormat
from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.evaluate import _render
from opdctl.evaluation.few_shot import Example, add_examples, read_examples, to_plain_text
from opdctl.recipe.schema import Eval

EXAMPLES = [Example("1+1?", "\\boxed{2}"), Example("2+2?", "\\boxed{4}"), Example("3+3?", "\\boxed{6}")]


def settings_of(path: Path, rows: list[dict[str, object]], **settings: object) -> Eval:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Eval(few_shot=1, few_shot_file=str(path), **settings)


@pytest.mark.parametrize(
    ("row", "boxed", "plain"),
    [
        ({"answer": 4}, "\\boxed{4}", "4"),
        ({"answer": "4", "solution": "2 and 2."}, "2 and 2.\n\\boxed{4}", "2 and 2."),
        ({"answer": "4", "solution": "So \\boxed{4}."}, "So \\boxed{4}.", "So \\boxed{4}."),
        ({"answer": "2 and 2.\n#### 4"}, "2 and 2.\n\\boxed{4}", "2 and 2.\n#### 4"),
        ({"answer": "4", "solution": None}, "\\boxed{4}", "4"),
    ],
)
def test_answer_of_an_example(row: dict[str, object], boxed: str, plain: str, tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "examples.jsonl", [{"problem": "2+2?"} | row])
    assert read_examples(settings, "box") == [Example("2+2?", boxed)]
    assert read_examples(settings, "any") == [Example("2+2?", plain)]


def test_columns_are_those_of_the_benchmark(tmp_path: Path) -> None:
    columns = {"problem_column": "q", "answer_column": "gold"}
    settings = settings_of(tmp_path / "examples.jsonl", [{"q": "2+2?", "gold": "4", "problem": "no"}], **columns)
    assert read_examples(settings, "any") == [Example("2+2?", "4")]


def test_no_examples_by_default() -> None:
    assert read_examples(Eval(), "box") == []


def test_examples_are_turns_between_the_system_turn_and_the_chat() -> None:
    system, earlier = Message("system", "Be brief."), Message("user", "Hello")
    chat = Chat("5+5? Box it.", (system, earlier, Message("assistant", "Hi")))
    found = add_examples(chat, "5+5?", EXAMPLES, Eval(few_shot=2), " Box it.")
    assert [(message.role, message.text) for message in found.messages] == [
        ("system", "Be brief."),
        ("user", "1+1? Box it."),
        ("assistant", "\\boxed{2}"),
        ("user", "2+2? Box it."),
        ("assistant", "\\boxed{4}"),
        ("user", "Hello"),
        ("assistant", "Hi"),
        ("user", "5+5? Box it."),
    ]


def test_problem_is_no_example_of_itself() -> None:
    found = add_examples(Chat("1+1?"), " 1+1?\n", EXAMPLES, Eval(few_shot=2), "")
    assert [message.text for message in found.earlier[::2]] == ["2+2?", "3+3?"]
    with pytest.raises(OpdctlError, match=r"2 examples other than the problem itself, eval\.few_shot = 3"):
        add_examples(Chat("1+1?"), "1+1?", EXAMPLES, Eval(few_shot=3, few_shot_file="e.jsonl"), "")


def test_plain_text_is_that_of_lm_evaluation_harness(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn_once.cache_clear()  # the words of another test in this process
    chat = to_plain_text(Chat("5+5?"), "5+5?", EXAMPLES, Eval(few_shot=2, stop=["Question:"]), "")
    shots = "Question: 1+1?\nAnswer: \\boxed{2}\n\nQuestion: 2+2?\nAnswer: \\boxed{4}\n\n"
    assert chat == Chat(f"{shots}Question: 5+5?\nAnswer:")
    assert capsys.readouterr().err == ""
    to_plain_text(Chat("5+5?"), "5+5?", EXAMPLES, Eval(few_shot=2), "")
    assert "eval.stop = ['Question:'] ends the response before it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("has_template", [False, True])
def test_prompt_of_a_model_with_and_without_a_chat_template(has_template: bool, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>" if has_template else None
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
    settings = settings_of(tmp_path / "examples.jsonl", rows, suffix=" Box it.", stop=["Question:"])
    model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=byte_level()), vocab_size=999)
    model.tokenizer.chat_template = template
    benchmark = find_benchmark(str(tmp_path / "examples.jsonl"), settings)
    prompts = _render(PromptFormat(), settings, benchmark, benchmark.problems(None, None), model)
    texts = [model.tokenizer.decode(prompt.prompt_ids, clean_up_tokenization_spaces=False) for prompt in prompts]
    if has_template:
        first = "<user>2+2? Box it.\n<assistant>\\boxed{4}\n<user>1+1? Box it.\n<assistant>"
    else:
        first = "Question: 2+2? Box it.\nAnswer: \\boxed{4}\n\nQuestion: 1+1? Box it.\nAnswer:"
    assert texts[0] == first
    assert "1+1?" in texts[1]
