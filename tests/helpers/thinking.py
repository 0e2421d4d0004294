"""A toy model with the tokens of thinking."""

import json
import shutil
from pathlib import Path

from helpers.engines import directory

THINK, END_OF_THINK = 52, 53
"""Ids that the toy task does not use."""


def save_thinking_model(path: Path) -> Path:
    """Write the toy student with `<think>`, which its template puts after the prompt, and `</think>` as tokens."""
    shutil.copytree(directory("toy:student").path, path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokens = {id_: token for token, id_ in tokenizer["model"]["vocab"].items()}
    for id_, token in ((THINK, "<think>"), (END_OF_THINK, "</think>")):
        tokens[id_] = token
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": id_, "content": token, "special": False})
    tokenizer["model"]["vocab"] = {token: id_ for id_, token in tokens.items()}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = path / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>{% endif %}")
    return path
