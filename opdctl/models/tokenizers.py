"""Loading a tokenizer, and checking that it reads text like its tokenizer.json. Imports no torch.

The file tokenizer.json defines a tokenizer completely. transformers' class of a tokenizer may ignore parts of the file:
its splitting of spaces and newlines, for example. The training of the model saw the ids of one of the two. Therefore
both read the same texts. A directory without tokenizer.json has its class only.
"""

import codecs
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opdctl import console
from opdctl.errors import OpdctlError, is_panic, summarize_exception
from opdctl.models.json_files import check_model_files, read_json_object, read_model_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TokenizerSource = Literal["auto", "file", "class"]
JSON_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
VOCABULARY_PATTERNS = ("tokenizer.json", "*.model", "*.model.*", "tekken.json", "vocab*", "*.tiktoken", "*.tokenizer")
"""Files of which a tokenizer has at least one, unless its code is in the directory."""
TEXTS = (
    "What is 1 + 2? Please reason step by step, and put your final answer within \\boxed{}.",
    "  two spaces,\ta tab \n\n two lines\r\n   ",
    "0123456789 3.14 1,000,000 x1y22z333",
    "def f(x):\n    if x > 0:\n        return {'a': x[0]}\n\n",
    "camelCase HTTPServer don't DON'T a/b//c\\d #$%&*~`^_|<>",
    "Grüße, naïve café — “quotes” … 你好，世界 नमस्ते мир 🙂 e\u0301",
)
"""Texts that class and file must read identically: words, spaces, newlines, digits, code, other scripts."""
MAX_SHOWN_TOKENS = 8


def load_tokenizer(path: Path, source: TokenizerSource, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model directory.

    source: `file` is tokenizer.json, `class` is the class that transformers selects. `auto` is the class if it reads
    like the file, and the file if the class loses text that the file keeps.

    Raises:
        OpdctlError: the directory has no tokenizer, or an invalid one, or one that needs code that is not trusted; or
            class and file differ, and neither is chosen.
    """
    check_model_files(path)
    files = sorted(file for file in path.iterdir() if file.is_file())
    versions = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _load_once(path, source, trust_remote_code, versions)


@functools.lru_cache(maxsize=8)
def _load_once(
    path: Path, source: TokenizerSource, trust_remote_code: bool, versions: tuple[tuple[str, int, int], ...]
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer once for each version of the files: it takes seconds, and is needed several times."""
    if not trust_remote_code and not any(any(path.glob(pattern)) for pattern in VOCABULARY_PATTERNS):
        hint = "copy the tokenizer's files of the model into the directory, such as tokenizer.json"
        raise OpdctlError("missing_file", f"{path}: no tokenizer in this directory", hint=hint)
    try:
        tokenizer = _load_file(path) if source == "file" else _load_class(path, trust_remote_code=trust_remote_code)
        if source == "auto" and (path / "tokenizer.json").exists():
            tokenizer = _choose(tokenizer, path)
        elif source == "auto":
            _check_sentencepiece(tokenizer, path)
    except BaseException as error:
        if not is_panic(error):
            raise
        detail = f"{path}: the tokenizer fails: {summarize_exception(error)}"
        raise OpdctlError("invalid_model", detail, hint="correct the patterns in tokenizer.json") from None
    tokenizer.clean_up_tokenization_spaces = False  # decoding gives the text, not a tidier one
    template = path / "chat_template.json"  # of older multimodal models; transformers reads it for processors only
    if not tokenizer.chat_template and template.exists():
        tokenizer.chat_template = read_json_object(template).get("chat_template")
    return tokenizer


def _choose(tokenizer: "PreTrainedTokenizerBase", path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer if it reads like its file, or the file if it is the directory's tokenizer without doubt."""
    from transformers import PreTrainedTokenizerFast

    file = _read_file(path)
    name, differences = type(tokenizer).__name__, list(_find_differences(tokenizer, _reading_of(file)))
    is_unnamed = PreTrainedTokenizerFast in type(tokenizer).__mro__[1:] and _names_no_class(path)
    if not differences:
        if not is_unnamed or len(tokenizer) == file.get_vocab_size():
            return tokenizer
        console.info_once(
            f"{path}: tokenizer.json is used: tokenizer_config.json does not name {name}, which adds tokens"
        )
        return _load_file(path)
    readings = differences[0].describe()
    if all(each.is_loss for each in differences):
        tokenizer = _load_file(path)
        console.warn_once(f"{path}: tokenizer.json is used: {name} loses text that the file keeps\n{readings}")
    elif is_unnamed:
        tokenizer = _load_file(path)
        console.info_once(f"{path}: tokenizer.json is used: tokenizer_config.json does not name {name}, which differs")
    else:
        raise OpdctlError(
            "unsupported_model",
            f"{path}: {name} reads text differently from tokenizer.json\n{readings}",
            hint="set the key `tokenizer` of this model, such as student.tokenizer, to the reading of its training: "
            '"file" is that of transformers 4, "class" that of transformers 5',
        )
    return tokenizer


def _check_sentencepiece(tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    """Raise OpdctlError if a directory has a sentencepiece file only, and its class reads text differently.

    The classes of transformers 5 read some of these files as another kind of vocabulary, or their spaces otherwise.
    """
    for file in sorted(path.glob("*.model")):
        reading = _read_sentencepiece(file, tokenizer)
        for difference in _find_differences(tokenizer, reading) if reading else ():
            name = type(tokenizer).__name__
            raise OpdctlError(
                "unsupported_model",
                f"{file}: {name} reads text differently from sentencepiece\n{difference.describe()}",
                hint="add the tokenizer.json of this model, or set its key `tokenizer`, such as student.tokenizer, to "
                '"class" if it was trained with this class',
            )


# ── The class and the file ───────────────────────────────────────────────────────────────────────────────────────────


def _load_class(path: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    _check_code(path, trust_remote_code=trust_remote_code)
    # Otherwise the installed package mistral-common would decide the class, which ignores chat templates.
    arguments = {"local_files_only": True, "trust_remote_code": trust_remote_code, "mistral_format": False}
    try:
        return AutoTokenizer.from_pretrained(path, **arguments)
    except Exception as error:  # tokenizers raises bare Exception, a tokenizer's code any exception
        raise _loading_error(path, error) from error


def _load_file(path: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of tokenizer.json, with special tokens and chat template of tokenizer_config.json."""
    from transformers import PreTrainedTokenizerFast

    if not (path / "tokenizer.json").exists():
        raise OpdctlError("missing_file", f"{path}: no tokenizer.json", hint='set `tokenizer` of this model to "class"')
    try:
        # These settings of tokenizer_config.json would change what the file reads.
        plain = {"fix_mistral_regex": False, "split_special_tokens": False}
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, **plain)
    except Exception as error:
        raise _loading_error(path, error) from error
    for difference in _find_differences(tokenizer, _reading_of(_read_file(path))):
        raise OpdctlError(
            "unsupported_model",
            f"{path}: settings in tokenizer_config.json change what tokenizer.json reads\n{difference.describe()}",
            hint='remove them, or set `tokenizer` of this model to "class"',
        )
    return tokenizer


def _names_no_class(path: Path) -> bool:
    """Whether tokenizer_config.json names the general class of all tokenizer.json files."""
    config = path / "tokenizer_config.json"
    settings = read_json_object(config) if config.exists() else {}
    is_general = settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    return is_general and "auto_map" not in settings


def _check_code(path: Path, *, trust_remote_code: bool) -> None:
    """Check that a tokenizer needs no code of its directory, or that the code is trusted."""
    config = path / "tokenizer_config.json"
    code = read_json_object(config).get("auto_map") if config.exists() else None
    if code and not trust_remote_code and (not isinstance(code, dict) or "AutoTokenizer" in code):
        alternative = ', or set `tokenizer` of it to "file"' if (path / "tokenizer.json").exists() else ""
        raise OpdctlError(
            "unsupported_model",
            f"{config}: the tokenizer is code of this directory, which is not trusted",
            hint=f"set trust_remote_code of this model after reading that code{alternative}",
        )


def _loading_error(path: Path, error: Exception) -> OpdctlError:
    """Return the error for a tokenizer that a library cannot load: of a corrupt file if there is one."""
    for file in (path / name for name in JSON_FILES if (path / name).exists()):
        read_json_object(file)
        if read_model_file(file).startswith(codecs.BOM_UTF8):
            hint = "save it as UTF-8 without the mark"
            return OpdctlError("invalid_model", f"{file}: starts with a byte order mark", hint=hint)
    return OpdctlError(
        "unsupported_model",
        f"{path}: the tokenizer cannot be loaded: {summarize_exception(error)}",
        hint="update the packages transformers and tokenizers: the model may be newer than they are",
    )


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reading:
    """How a file's own library reads text, in the ids of the tokenizer. texts: those to compare."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    token: Callable[[int], str]
    texts: tuple[str, ...] = TEXTS


@dataclass(frozen=True)
class Difference:
    """A text that tokenizer and file read differently: as tokens, from the first that differs.

    is_loss: the text is lost by the tokenizer and kept by the file.
    """

    text: str
    tokens: str
    file_tokens: str
    is_loss: bool

    def describe(self) -> str:
        """Return both readings, one a line."""
        return f"  {self.text[:60]!r}\n  class: … {self.tokens}\n  file:  … {self.file_tokens}"


def _find_differences(tokenizer: "PreTrainedTokenizerBase", reading: Reading) -> Iterator[Difference]:
    """Yield the texts that a tokenizer reads differently from its file."""
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    for text in reading.texts:
        ids, is_kept = _read(text, encode, decode)
        file_ids, is_kept_by_file = _read(text, reading.encode, reading.decode)
        if ids != file_ids:
            tokens = _show_tokens(ids, file_ids, lambda id_: str(tokenizer.convert_ids_to_tokens(id_)))
            file_tokens = _show_tokens(file_ids, ids, reading.token)
            yield Difference(text, tokens, file_tokens, is_kept_by_file and not is_kept)


def _reading_of(file: "Tokenizer") -> Reading:
    # The special tokens of the file frame the turns of a chat template. The tokenizer may have further ones.
    frame = "".join(f"{token.content}user\n1 + 2" for _, token in sorted(file.get_added_tokens_decoder().items()))
    return Reading(
        encode=lambda text: list(file.encode(text, add_special_tokens=False).ids),
        decode=functools.partial(file.decode, skip_special_tokens=False),
        token=lambda id_: str(file.id_to_token(id_)),
        texts=(*TEXTS, frame),
    )


def _read_sentencepiece(file: Path, tokenizer: "PreTrainedTokenizerBase") -> Reading | None:
    """Return how sentencepiece reads text by a file; None if it is a file of another library, such as tiktoken."""
    try:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(file))
    except (ImportError, RuntimeError):  # without the package, the class could not have read a file of sentencepiece
        return None

    def encode(text: str) -> list[int]:
        return [int(tokenizer.convert_tokens_to_ids(piece)) for piece in processor.encode(text, out_type=str)]

    def token(id_: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(id_))

    return Reading(encode, lambda ids: str(processor.decode([token(id_) for id_ in ids])), token)


def _read_file(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        file = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise _loading_error(path, error) from error
    file.no_truncation()
    file.no_padding()
    return file


def _read(
    text: str, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> tuple[list[int] | None, bool]:
    """Return the ids of a text, and whether they give the text back. None: a character of it has no token."""
    try:
        ids = encode(text)
        return ids, decode(ids) == text
    except Exception:  # tokenizers raises bare Exception
        return None, False


def _show_tokens(ids: list[int] | None, others: list[int] | None, token: Callable[[int], str]) -> str:
    """Return the first tokens of `ids` from where they differ from `others`."""
    if ids is None:
        return "cannot be read"
    start = next((i for i, pair in enumerate(zip(ids, others or (), strict=False)) if pair[0] != pair[1]), 0)
    return " ".join(repr(token(id_)) for id_ in ids[start : start + MAX_SHOWN_TOKENS]) or "nothing"
