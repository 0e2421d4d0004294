"""Reads prompts with tokenizers of every kind through opdctl.

The judge is the tokenizer's file, read by the library that defines it: tokenizer.json by tokenizers, tokenizer.model by
sentencepiece.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from helpers import architectures
from helpers.architectures import CORPUS, SPECIAL, TEMPLATE
from sweep.models import PROMPTS, open_sweep_run
from sweep.outcomes import Outcome, judge
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from opdctl.runs.run import Run

TEXTS = [*CORPUS, *PROMPTS]
PARTS_TEMPLATE = TEMPLATE.replace("m['content']", "m['content'][0]['text']")
SPECIAL_NAMES = {"pad_token": SPECIAL[0], "bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
WORDS = ["[UNK]", *SPECIAL]


def byte_level(**settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = settings.get("split", Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return train(tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))


def train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    trainer.show_progress = False
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace(model: Any, trainer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return train(tokenizer, trainer)


def metaspace_bpe() -> Tokenizer:
    """As Llama 2: spaces are ▁, and unknown characters are bytes."""
    words = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=words)
    tokenizer = metaspace(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def unigram() -> Tokenizer:
    return metaspace(models.Unigram(), trainers.UnigramTrainer(vocab_size=64, special_tokens=WORDS, unk_token="[UNK]"))


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return train(tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=WORDS))


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(tokenizer, trainers.WordLevelTrainer(special_tokens=WORDS))


def appending_end() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[2]}", special_tokens=[(SPECIAL[2], 2)]
    )
    return tokenizer


# ── Directories ──────────────────────────────────────────────────────────────────────────────────────────────────────

Encode = Callable[[str], list[int]]
Write = Callable[[Path], Encode]
"""Write the files of a tokenizer, and return how the library of its file encodes a text."""


def write(folder: Path, tokenizer: Tokenizer | None, template: str = TEMPLATE, **config: Any) -> Encode:
    """Write tokenizer.json and tokenizer_config.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **SPECIAL_NAMES, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokenizer is None:
        return lambda text: []
    tokenizer.save(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def write_sentencepiece(folder: Path, model_type: str) -> Encode:
    """Write tokenizer.model alone, as older models have it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type=model_type,
        vocab_size=318,
        byte_fallback=True,
        user_defined_symbols=SPECIAL,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # HF classes and sentencepiece disagree about it before a special token
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write(folder, None, tokenizer_class="LlamaTokenizer", legacy=False, add_prefix_space=False)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return lambda text: list(processor.encode(text))


def write_vocabulary_and_merges(folder: Path) -> Encode:
    """Write vocab.json and merges.txt alone, as GPT-2 has them."""
    tokenizer = byte_level(split=Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"))
    model = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in model["merges"]))
    special = {str(i): {"content": token, "special": True} for i, token in enumerate(SPECIAL)}
    write(folder, None, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=special, unk_token=SPECIAL[2])
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def write_code(folder: Path) -> Encode:
    (folder / "own_tokenizer.py").write_text(
        "from transformers import Qwen2Tokenizer\n\nclass Own(Qwen2Tokenizer):\n    pass\n"
    )
    auto_map = {"AutoTokenizer": ["own_tokenizer.Own", None]}
    return write(folder, byte_level(), tokenizer_class="Own", auto_map=auto_map)


KINDS: dict[str, Write] = {
    "byte-level BPE": lambda folder: write(folder, byte_level()),
    "byte-level BPE, digits one by one": lambda folder: write(folder, byte_level(split=Regex(r"\p{N}|\P{N}+"))),
    "byte-level BPE, class LlamaTokenizerFast": lambda folder: write(
        folder, byte_level(), tokenizer_class="LlamaTokenizerFast"
    ),
    "byte-level BPE, class Qwen2Tokenizer, other regular expression": lambda folder: write(
        folder, byte_level(), tokenizer_class="Qwen2Tokenizer"
    ),
    "byte-level BPE, class GPT2Tokenizer, other regular expression": lambda folder: write(
        folder, byte_level(), tokenizer_class="GPT2Tokenizer"
    ),
    "byte-level BPE, an end token is appended": lambda folder: write(folder, appending_end()),
    "byte-level BPE, a template for lists of parts": lambda folder: write(folder, byte_level(), PARTS_TEMPLATE),
    "metaspace BPE": lambda folder: write(folder, metaspace_bpe()),
    "metaspace BPE, class LlamaTokenizerFast": lambda folder: write(
        folder, metaspace_bpe(), tokenizer_class="LlamaTokenizerFast", legacy=False
    ),
    "Unigram": lambda folder: write(folder, unigram()),
    "WordPiece": lambda folder: write(folder, word_piece()),
    "WordPiece, class BertTokenizerFast": lambda folder: write(
        folder, word_piece(), tokenizer_class="BertTokenizerFast"
    ),
    "WordLevel": lambda folder: write(folder, word_level()),
    "sentencepiece BPE, without tokenizer.json": lambda folder: write_sentencepiece(folder, "bpe"),
    "sentencepiece Unigram, without tokenizer.json": lambda folder: write_sentencepiece(folder, "unigram"),
    "vocab.json and merges.txt, without tokenizer.json": write_vocabulary_and_merges,
    "code of the directory": write_code,
    "none": lambda folder: write(folder, None),
}


def examine_tokenizer(name: str, folder: Path) -> Outcome:
    """Tokenize the prompts of a run by a student's tokenizer, and compare their ids with those of its file."""
    student, teacher = (
        architectures.save(architectures.make("llama", seed), folder / role)
        for seed, role in enumerate(("student", "teacher"))
    )
    (folder / "tokenizer").mkdir()
    encode = KINDS[name](folder / "tokenizer")
    for path in (student, teacher):
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (path / file).unlink(missing_ok=True)
        shutil.copytree(folder / "tokenizer", path, dirs_exist_ok=True)

    def read_prompts(run_path: Path) -> dict[str, float]:
        run = open_sweep_run(student, teacher, run_path)
        return {"prompts that differ": sum(_is_different(run, encode))}

    return judge(read_prompts, folder / "run")


def _is_different(run: Run, encode: Encode) -> Iterator[bool]:
    """Yield for each prompt whether its ids differ from those of its text in the file's own reading."""
    expected = {tuple(encode(f"<|start|>{text}<|end|><|start|>")) for text in PROMPTS}
    yield from (tuple(prompt.prompt_ids.tolist()) not in expected for prompt in run.prompts)
