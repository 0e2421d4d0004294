"""Data in the forms of verl, TRL, OpenAI, ShareGPT and Alpaca, written by the libraries of their users, become the ids
that the tokenizer's own chat template gives."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset
from helpers.tokenizers import write_tokenizer

from opdctl.data.prompts import load_problems, tokenize
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.models.directory import ModelDir
from opdctl.recipe.prompts import Prompts

Rows = list[dict[str, Any]]
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, rows: Rows) -> None:
    path.write_text(json.dumps(rows, indent=2))


def write_by_pandas(path: Path, rows: Rows) -> None:
    pandas.DataFrame(rows).to_parquet(path)


def write_by_datasets(path: Path, rows: Rows) -> None:
    Dataset.from_list(rows).to_parquet(path)


def write_mixed_types(path: Path, rows: Rows) -> None:
    """Contents are texts and lists of parts: `datasets` stores them as JSON."""
    Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(path)


@dataclass(frozen=True)
class Form:
    """Rows in one form, and the chats that they are.

    write: by extension. expected: the messages of each prompt. tools: of all. settings: of [prompts].
    """

    rows: Rows
    expected: list[list[dict[str, Any]]]
    write: dict[str, Callable[[Path, Rows], None]]
    settings: dict[str, Any] = field(default_factory=dict)
    tools: Any = None
    answers: list[str] | None = None
    ids: list[str] | None = None


JSONL = {".jsonl": write_jsonl}
PARQUET = {".parquet": write_by_datasets}
ADD = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"a": "int"}}}
ARGUMENTS = '{"a": 1, "b": 1}'
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
READ_CALL = {**CALL, "function": {"name": "add", "arguments": json.loads(ARGUMENTS)}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "2"}

FORMS = {
    # verl, examples/data_preprocess/gsm8k.py: make_map_fn, then to_parquet of `datasets`
    "verl": Form(
        [
            {
                "data_source": "openai/gsm8k",
                "prompt": [user(f"{n}+1?")],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
                "extra_info": {"split": "train", "index": 10 + n, "answer": "x", "question": "y"},
            }
            for n in range(2)
        ],
        [[user("0+1?")], [user("1+1?")]],
        PARQUET | {".pandas.parquet": write_by_pandas},
        {"answer_column": "reward_model.ground_truth", "id_column": "extra_info.index"},
        answers=["1", "2"],
        ids=["10", "11"],
    ),
    # The dataset formats of TRL: prompt-only, prompt-completion and language modeling, standard and conversational
    "TRL prompt": Form([{"prompt": "1+1?"}, {"prompt": "2+2?"}], [[user("1+1?")], [user("2+2?")]], JSONL | PARQUET),
    "TRL conversational prompt": Form(
        [{"prompt": [user("1+1?")]}, {"prompt": [SYSTEM, user("2+2?")]}],
        [[user("1+1?")], [SYSTEM, user("2+2?")]],
        JSONL | PARQUET,
    ),
    "TRL prompt and completion": Form(
        [{"prompt": [user("1+1?")], "completion": [assistant("2")]}], [[user("1+1?")]], JSONL | PARQUET
    ),
    "TRL preference": Form(
        [{"prompt": [user("1+1?")], "chosen": [assistant("2")], "rejected": [assistant("3")]}],
        [[user("1+1?")]],
        JSONL | PARQUET,
    ),
    "TRL messages": Form(
        [{"messages": [user("1+1?"), assistant("2"), user("2+2?"), assistant("4")]}, {"messages": [SYSTEM, user("a")]}],
        [[user("1+1?"), assistant("2"), user("2+2?")], [SYSTEM, user("a")]],
        JSONL | PARQUET | {".json": write_json},
    ),
    "TRL tools": Form(
        [
            {"messages": [user("1+1?"), assistant(None, tool_calls=[CALL]), RESULT], "tools": [ADD]},
            {"messages": [user("2+2?")], "tools": [ADD]},  # its tool_calls are null in Parquet
        ],
        [[user("1+1?"), assistant("", tool_calls=[READ_CALL]), RESULT], [user("2+2?")]],
        JSONL | PARQUET,
        {"tools_column": "tools"},
        tools=[ADD],
    ),
    "tools as JSON text": Form(
        [{"messages": [user("1+1?")], "tools": json.dumps([ADD])}],
        [[user("1+1?")]],
        JSONL | PARQUET,
        {"tools_column": "tools"},
        tools=[ADD],
    ),
    # OpenAI's fine-tuning: content as parts, `name`, `weight`, arguments as text
    "OpenAI": Form(
        [
            {
                "messages": [
                    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
                    {"role": "user", "name": "Ann", "content": [{"type": "text", "text": "1+1?"}]},
                    assistant("2", weight=0),
                    user("2+2?"),
                    assistant("4", weight=1),
                ],
                "parallel_tool_calls": False,
            }
        ],
        [[{"role": "developer", "content": "Be brief."}, user("1+1?"), assistant("2"), user("2+2?")]],
        JSONL | {".parquet": write_mixed_types},
    ),
    "ShareGPT": Form(
        [
            {
                "id": "x_0",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "1+1?"},
                    {"from": "gpt", "value": "2"},
                    {"from": "human", "value": "2+2?"},
                    {"from": "gpt", "value": "4"},
                ],
            }
        ],
        [[SYSTEM, user("1+1?"), assistant("2"), user("2+2?")]],
        {".json": write_json} | PARQUET,
        {"id_column": "id"},
        ids=["x_0"],
    ),
    "Alpaca": Form(
        [{"instruction": "Add.", "input": "1, 1", "output": "2"}, {"instruction": "1+1?", "input": "", "output": "2"}],
        [[user("Add.\n\n1, 1")], [user("1+1?")]],
        {".json": write_json, ".parquet": write_by_pandas},
        {"answer_column": "output"},
        answers=["2", "2"],
    ),
}
CASES = [(name, ending) for name, form in FORMS.items() for ending in form.write]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    return ModelDir(write_tokenizer(tmp_path_factory.mktemp("model"), template=TEMPLATE), "float32")


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_data_become_the_ids_of_their_chats(tmp_path: Path, model: ModelDir, name: str, ending: str) -> None:
    form, path = FORMS[name], tmp_path / f"data{ending}"
    form.write[ending](path, form.rows)
    settings = Prompts(source=str(path), **form.settings)
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat())
    prompts, _ = tokenize(load_problems(settings), renderer, settings)
    expected = [
        model.tokenizer.apply_chat_template(chat, tools=form.tools, add_generation_prompt=True)["input_ids"]
        for chat in form.expected
    ]
    assert [prompt.prompt_ids.tolist() for prompt in prompts] == expected
    assert [prompt.answer for prompt in prompts] == (form.answers or [None] * len(prompts))
    assert [prompt.prompt_id for prompt in prompts] == (form.ids or [str(n) for n in range(len(prompts))])
