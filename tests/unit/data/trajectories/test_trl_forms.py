"""Data that TRL's own tools convert and `datasets` writes become the ids that TRL's chat template gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.tokenizers import write_tokenizer

from opdctl.data.prompts import load_problems
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.models.directory import ModelDir
from opdctl.recipe.prompts import Prompts

data_utils = pytest.importorskip("trl.data_utils", reason="trl is not installed")

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What colour is the sky?"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("It is blue.", "Green."))


def preferences() -> Dataset:
    return Dataset.from_list([{"chosen": CHAT + GOOD, "rejected": CHAT + BAD}]).map(data_utils.extract_prompt)


def unpaired() -> Dataset:
    return data_utils.maybe_unpair_preference_dataset(preferences())


def converted_from_sharegpt() -> Dataset:
    turns = [{"from": each["role"], "value": each["content"]} for each in CHAT + GOOD]
    rows = Dataset.from_list([{"conversations": turns}])
    return rows.map(data_utils.maybe_convert_to_chatml, remove_columns="conversations")


def converted_from_conversations() -> Dataset:
    return Dataset.from_list([{"conversations": CHAT + GOOD}]).map(data_utils.maybe_convert_to_chatml)


WRITERS: dict[str, Callable[[Dataset, str], Any]] = {
    "data.parquet": Dataset.to_parquet,
    "data.jsonl": Dataset.to_json,
    "saved": Dataset.save_to_disk,
}


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize(
    ("make", "columns", "count"),
    [
        (preferences, {"prompt", "chosen", "rejected"}, 1),
        (unpaired, {"prompt", "completion", "label"}, 2),
        (converted_from_sharegpt, {"messages"}, 1),
        (converted_from_conversations, {"messages"}, 1),
    ],
)
def test_data_of_trl(make: Callable[[], Dataset], columns: set[str], count: int, file: str, tmp_path: Path) -> None:
    model = ModelDir(write_tokenizer(tmp_path / "model"), "float32")
    made = make()
    assert {*made.column_names} == columns
    WRITERS[file](made, str(tmp_path / file))
    text = data_utils.apply_chat_template({"prompt": CHAT}, model.tokenizer)["prompt"]
    expected = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat())
    problems = load_problems(Prompts(source=str(tmp_path / file)))
    assert [renderer.token_ids(problem.chat, str(problem)).tolist() for problem in problems] == [expected] * count
