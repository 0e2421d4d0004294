"""The tokens that end a response. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl import console
from opdctl.errors import OpdctlError
from opdctl.models.json_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def find_eos_ids(path: Path, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a response: those of the generation config, then the tokenizer's; empty without any.

    Ids outside the vocabulary, -1 and null name no token. Where the ids come from is reported unless one of the two
    sources names all of them.

    Raises:
        OpdctlError: the generation config is invalid.
    """
    named = {"generation_config.json": _read_generation_config(path), "the tokenizer": [tokenizer.eos_token_id]}
    valid = {source: [id_ for id_ in ids if id_ in range(vocab_size)] for source, ids in named.items()}
    eos_ids = tuple(dict.fromkeys(id_ for ids in valid.values() for id_ in ids))
    ignored = [id_ for ids in named.values() for id_ in ids if id_ is not None and id_ not in eos_ids]
    if eos_ids and (ignored or not any({*ids} == {*eos_ids} for ids in valid.values())):
        console.info_once(f"{path}: a response ends at {_describe(valid, ignored, tokenizer)}")
    return eos_ids


def check_ids_in_vocabulary(key: str, ids: Sequence[int], path: Path, vocab_size: int) -> None:
    """Raise OpdctlError if an id that the recipe's key chooses is outside the model's vocabulary."""
    if outside := [id_ for id_ in ids if id_ >= vocab_size]:
        detail = f"{key}: {outside[0]} is outside the vocabulary of {path}, {vocab_size} ids"
        raise OpdctlError("unsupported_setting", detail)


def _read_generation_config(path: Path) -> list[int | None]:
    """Return what the generation config names as the end of sequence, empty without the file."""
    file = path / "generation_config.json"
    named: Any = read_json_object(file).get("eos_token_id") if file.exists() else []
    ids: list[int | None] = named if isinstance(named, list) else [named]
    if any(isinstance(id_, bool) or not isinstance(id_, int | None) for id_ in ids):
        raise OpdctlError(
            "invalid_model",
            f"{file}: eos_token_id is {named!r}, not a token id or a list of ids",
            hint="correct it, or remove it: the tokenizer's end-of-sequence token is then used",
        )
    return ids


def _describe(
    valid: Mapping[str, Sequence[int]], ignored: Sequence[int | None], tokenizer: "PreTrainedTokenizerBase"
) -> str:
    sources = [f"{describe_tokens(ids, tokenizer)} of {source}" for source, ids in valid.items() if ids]
    outside = f"; not in the vocabulary: {', '.join(map(str, ignored))}" if ignored else ""
    return " and ".join(sources) + outside


def describe_tokens(ids: Collection[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return ids with their tokens, as text."""
    return ", ".join(f"{id_} `{tokenizer.convert_ids_to_tokens(id_)}`" for id_ in ids)
