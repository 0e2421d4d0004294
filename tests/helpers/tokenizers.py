"""Byte-level tokenizers in model directories without weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
NUM_IDS = len(SPECIAL) + 256


def byte_level(merges: Sequence[tuple[str, str]] = (), special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Return a tokenizer with the special tokens, one id for each byte, and one for each merge."""
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def surround(tokenizer: Tokenizer, single: str) -> Tokenizer:
    """Add a post-processor, such as "<|endoftext|> $A"."""
    tokens = [(token, tokenizer.token_to_id(token)) for token in single.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    model_type: str = "llama",
    rows: int = NUM_IDS,
    template: str | None = CHATML,
    generation: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write config.json and the files of a tokenizer. config: keys of tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": rows, **no_ids}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
