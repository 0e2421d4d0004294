"""Model directories: finding or downloading one, its tokenizer, files, digests and size. Imports no torch."""

import json
import math
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl.artifacts.files import digest_of, sha256_file
from opdctl.errors import OpdctlError, did_you_mean, summarize_exception
from opdctl.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
MODEL_FILE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def toy_model_names() -> list[str]:
    """Return the names of the models that come with opdctl."""
    folder = resources.files("opdctl.data.toy") / "models"
    return sorted(f"toy:{entry.name}" for entry in folder.iterdir() if entry.is_dir())


def find_or_download(model: Model, key: str) -> Path:
    """Return the directory of a model: toy, local, or downloaded from the hub. `key` names it in errors.

    Raises:
        OpdctlError: the name is invalid, the directory is not a model's, or the download fails.
    """
    return find_local(model, key) or _download(model, key)


def find_local(model: Model, key: str) -> Path | None:
    """Return the directory of a toy or local model, or None for a hub id.

    Raises:
        OpdctlError: the name is invalid, or the directory is not a model's.
    """
    name = model.model
    if name.startswith("toy:"):
        if name not in toy_model_names():
            suggestion = did_you_mean(name, toy_model_names())
            raise OpdctlError("unknown_name", f"{key}: no toy model `{name}`{suggestion}")
        return Path(str(resources.files("opdctl.data.toy"))) / "models" / name.removeprefix("toy:")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise OpdctlError("missing_model", f"{key}: {path}: not a model directory: config.json is missing")
        return path.resolve()
    if path.exists():
        raise OpdctlError("missing_model", f"{key}: {path}: a file, not a model directory")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        detail = f"{key}: no model directory `{name}`{did_you_mean(str(path), siblings)}"
        raise OpdctlError("missing_model", detail, hint="give a directory, a hub id or `toy:…`")
    return None


def _download(model: Model, key: str) -> Path:
    from huggingface_hub import snapshot_download

    without = WEIGHT_PATTERNS if model.server else ()  # a server holds the weights
    patterns = [pattern for pattern in MODEL_FILE_PATTERNS if pattern not in without]
    try:
        return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises its own errors, and those of requests, httpx and the OS
        raise OpdctlError(
            "failed_download",
            f"{key}: `{model.model}` is not a local directory, and the hub request failed: "
            f"{summarize_exception(error)}",
            hint=f"correct the name; without a network, download the model elsewhere and set {key} to its directory",
        ) from error


@dataclass(frozen=True)
class ModelDir:
    """A model directory, and the dtype and trust with which it is loaded."""

    path: Path
    dtype: str
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise OpdctlError("unsupported_model", f"{self.path}: the tokenizer cannot be loaded: {error}") from error

    @cached_property
    def tokenizer_digest(self) -> str:
        """The digest of the vocabulary: the token of each id."""
        return digest_of(self.tokenizer.get_vocab())

    @cached_property
    def vocab_size(self) -> int:
        """The number of the tokenizer's ids. The output matrix may be padded to more rows, which are masked."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response: those of the generation config, otherwise the tokenizer's."""
        path = self.path / "generation_config.json"
        eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids = eos if isinstance(eos, list) else [eos if eos is not None else self.tokenizer.eos_token_id]
        if None in ids:
            detail = f"{self.path}: neither the generation config nor the tokenizer has an end-of-sequence token"
            raise OpdctlError("unsupported_model", detail)
        return tuple(ids)

    def with_path(self, path: Path) -> "ModelDir":
        """Return the directory of this model after training; it shares the tokenizer, which is not read again."""
        trained = ModelDir(path, self.dtype, self.trust_remote_code)
        vars(trained).update(tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        return trained

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    def files(self) -> list[Path]:
        """Return the files that define the model: weights, configs, tokenizer, template, code."""
        files = {file for pattern in MODEL_FILE_PATTERNS for file in self.path.glob(pattern)}
        return sorted(file for file in files if not file.name.startswith("."))

    def digest(self) -> str:
        """Return the digest of every file of the model."""
        return digest_of({file.name: sha256_file(file) for file in self.files()})

    def copy_settings(self, folder: Path) -> None:
        """Copy all files but weights and config.json to `folder`, so that its generation stops identically."""
        (folder / "generation_config.json").unlink(missing_ok=True)
        for file in self.files():
            if file.name != "config.json" and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
                shutil.copyfile(file, folder / file.name)

    def num_embeddings(self) -> int:
        """Return the rows of the output matrix according to the config, 0 if it does not state them."""
        return self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size") or 0

    def hidden_size(self) -> int | None:
        """Return the size of the hidden states according to the config."""
        return self.config.get("hidden_size") or self.config.get("text_config", {}).get("hidden_size")

    def parameters(self) -> int:
        """Return the number of stored parameters, from the safetensors headers."""
        from safetensors import safe_open

        count = 0
        for file in self.path.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        return count


def check_same_tokenizer(student: ModelDir, scorer: ModelDir, name: str) -> None:
    """Raise OpdctlError unless both map the same tokens to the same ids: the scorer receives the student's ids."""
    student_vocab, scorer_vocab = student.tokenizer.get_vocab(), scorer.tokenizer.get_vocab()
    if student_vocab == scorer_vocab:
        return
    student_tokens, scorer_tokens = ({i: token for token, i in v.items()} for v in (student_vocab, scorer_vocab))
    ids = [i for i in sorted({*student_tokens, *scorer_tokens}) if student_tokens.get(i) != scorer_tokens.get(i)]
    lines = [f"  id {i}: student {student_tokens.get(i)!r}, {name} {scorer_tokens.get(i)!r}" for i in ids[:5]]
    raise OpdctlError(
        "incompatible_tokenizer",
        "\n".join([f"student and {name}: {len(ids)} token ids differ, the first of them", *lines]),
        hint="use models of one tokenizer family: the teacher scores the student's token ids",
    )
