"""Model directories: finding or downloading one, its tokenizer, files, digests and size. Imports no torch."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl import console
from opdctl.artifacts.files import digest_of, sha256_file, sha256_files
from opdctl.errors import ErrorKind, OpdctlError, did_you_mean, is_out_of_memory, summarize_exception
from opdctl.models.end_of_sequence import check_ids_in_vocabulary, describe_tokens, find_eos_ids
from opdctl.models.json_files import check_model_files, read_json_object
from opdctl.models.tokenizers import TokenizerSource, load_tokenizer
from opdctl.models.weights import StoredWeights, digest_weights, read_weights
from opdctl.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
MERGE_HINT = "merge it: peft's merge_and_unload(), then save_pretrained() into an empty directory"
MAX_DETAIL_CHARS = 600
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.5}
"""Differences in nats that rounding explains, by the dtype in which a model is run."""
SETTINGS_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")


def toy_model_names() -> list[str]:
    """Return the names of the models that come with opdctl."""
    folder = resources.files("opdctl.data.toy") / "models"
    return sorted(f"toy:{entry.name}" for entry in folder.iterdir() if entry.is_dir())


def find_or_download(model: Model, key: str, *, weights: bool = True) -> Path:
    """Return the directory of a model: toy, local, or downloaded from the hub, with or without its weights.

    key: names it in errors.

    Raises:
        OpdctlError: the name is invalid, the directory is not a model's, or the download fails.
    """
    return find_local(model, key) or _download(model, key, weights=weights)


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
        _check_is_model_directory(path, key)
        return path.resolve()
    if path.exists():
        raise OpdctlError("missing_model", f"{key}: {path}: a file, not a model directory")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        detail = f"{key}: no model directory `{name}`{did_you_mean(path.name, siblings, path.parent)}"
        raise OpdctlError("missing_model", detail, hint="give a directory, a hub id or `toy:…`")
    return None


def _check_is_model_directory(path: Path, key: str) -> None:
    if (path / "config.json").exists():
        return
    if (path / "adapter_config.json").exists():
        base = read_json_object(path / "adapter_config.json").get("base_model_name_or_path")
        detail = f"{key}: {path}: an adapter of {base}, not a model directory: config.json is missing"
        raise OpdctlError("missing_model", detail, hint=MERGE_HINT)
    raise OpdctlError("missing_model", f"{key}: {path}: not a model directory: config.json is missing")


def _download(model: Model, key: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    needs_weights = weights and not model.server  # a server holds them
    patterns = [*(WEIGHT_PATTERNS if needs_weights else ()), *SETTINGS_PATTERNS]
    try:
        path = Path(snapshot_download(model.model, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises its own errors, and those of requests, httpx and the OS
        raise OpdctlError(
            "failed_download",
            f"{key}: `{model.model}` is not a local directory, and the hub request failed: "
            f"{summarize_exception(error)}",
            hint=f"correct the name; without a network, download the model elsewhere and set {key} to its directory",
        ) from error
    _check_is_model_directory(path, key)
    return path


@contextlib.contextmanager
def translate_loading_errors(path: Path, what: str, kind: ErrorKind = "unsupported_model") -> Iterator[None]:
    """Turn whatever a library raises while it loads `what` from a model directory into OpdctlError of `kind`."""
    try:
        yield
    except OpdctlError:
        raise
    except ImportError as error:
        detail = f"{path}: {what} needs a package that is not installed: {' '.join(str(error).split())}"
        raise OpdctlError("missing_package", detail, hint="install the package") from error
    except Exception as error:  # transformers, tokenizers, peft and quantizers raise exceptions of every class
        if is_out_of_memory(error):
            raise
        detail = f"{path}: {what} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        hint = "check that the directory is complete; a newer version of transformers may support it"
        raise OpdctlError(kind, detail[:MAX_DETAIL_CHARS], hint=hint) from error


@dataclass(frozen=True)
class Probe:
    """Token ids, and the trainer's log-probs of all but the first under a student that it wrote, in nats.

    An engine that has loaded the student has the same log-probs but for rounding.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class ModelDir:
    """A model directory, and how it is loaded.

    tokenizer_source, eos_token_ids: the keys `tokenizer` of the model and `rollout.eos_token_ids` of the recipe.
    shared_vocab_size: the ids that all models of a run share; None outside a run. probe: of a student that a run wrote.
    base: of a student with a LoRA adapter, the model without it; the directory has the merged weights and `adapter/`.
    """

    path: Path
    dtype: str
    trust_remote_code: bool = False
    tokenizer_source: TokenizerSource = "auto"
    eos_token_ids: tuple[int, ...] = ()
    shared_vocab_size: int | None = None
    probe: Probe | None = None
    base: "ModelDir | None" = None

    @classmethod
    def from_recipe(cls, path: Path, model: Model, recipe: Recipe, shared_vocab_size: int | None = None) -> "ModelDir":
        """Return the directory of a model, loaded with the settings of its section in the recipe."""
        eos_token_ids = tuple(recipe.rollout.eos_token_ids)
        return cls(path, model.dtype, model.trust_remote_code, model.tokenizer, eos_token_ids, shared_vocab_size)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.path, self.tokenizer_source, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer_digest(self) -> str:
        """The digest of the vocabulary: the token of each id."""
        return digest_of(self.tokenizer.get_vocab())

    @cached_property
    def num_ids(self) -> int:
        """The number of the tokenizer's ids."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids that are used: those of the tokenizer that have a row, in every model of the run.

        The matrices may have more rows. They are masked.
        """
        return self.shared_vocab_size or min(self.num_ids, self.num_embeddings)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a response.

        Raises:
            OpdctlError: the directory names none.
        """
        if not self.named_eos_ids:
            detail = f"{self.path}: neither the generation config nor the tokenizer has an end-of-sequence token"
            raise OpdctlError("unsupported_model", detail, hint="set rollout.eos_token_ids")
        return self.named_eos_ids

    def end_ids(self, stop_token_ids: Sequence[int]) -> list[int]:
        """Return the ids that end a response: the end of sequence, and those of the sampling settings.

        Raises:
            OpdctlError: there is no end of sequence; an id is outside the model's vocabulary.
        """
        check_ids_in_vocabulary("stop_token_ids", stop_token_ids, self.path, self.vocab_size)
        return list(dict.fromkeys([*self.eos_ids, *stop_token_ids]))

    @cached_property
    def named_eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids of the recipe, otherwise those of generation config and tokenizer, which may be
        none."""
        if self.eos_token_ids:
            check_ids_in_vocabulary("rollout.eos_token_ids", self.eos_token_ids, self.path, self.vocab_size)
            return self.eos_token_ids
        return find_eos_ids(self.path, self.tokenizer, self.vocab_size)

    def with_path(self, path: Path, probe: Probe | None = None, *, has_adapter: bool = False) -> "ModelDir":
        """Return the directory of this model after training; it shares the tokenizer, which is not read again."""
        trained = self._replace(path=path, probe=probe, base=self if has_adapter else None)
        vars(trained).update(named_eos_ids=self.named_eos_ids)
        return trained

    def without_code(self) -> "ModelDir":
        """Return this directory, whose code never runs."""
        return replace(self, trust_remote_code=False)

    def with_vocab_size(self, shared_vocab_size: int) -> "ModelDir":
        """Return this directory with the number of ids that all models of a run share."""
        return self._replace(shared_vocab_size=shared_vocab_size)

    def _replace(self, **changes: Any) -> "ModelDir":
        changed = replace(self, **changes)
        vars(changed).update(tokenizer=self.tokenizer)
        return changed

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_json_object(self.path / "config.json")

    @cached_property
    def full_config(self) -> "PreTrainedConfig":
        """The config as transformers reads it, with its defaults."""
        from transformers import AutoConfig

        check_model_files(self.path)
        self._check_architecture()
        with translate_loading_errors(self.path, "config.json", "invalid_model"):
            return AutoConfig.from_pretrained(self.path, **self.loading_arguments())

    @property
    def text_config(self) -> "PreTrainedConfig":
        """The part of `full_config` that describes the text model."""
        return self.full_config.get_text_config(decoder=True)

    def _check_architecture(self) -> None:
        from transformers import CONFIG_MAPPING, __version__

        architecture = self.config.get("model_type")
        if architecture in CONFIG_MAPPING or (self.trust_remote_code and "auto_map" in self.config):
            return
        detail = f"{self.path}: model type `{architecture}` is not part of transformers {__version__}"
        hint = "install a newer version of transformers"
        if "auto_map" in self.config:
            hint = f"read the code in {self.path}, then set trust_remote_code = true for this model"
        raise OpdctlError("unsupported_model", detail, hint=hint)

    @property
    def is_quantized(self) -> bool:
        return self.config.get("quantization_config") is not None

    @property
    def logprob_tolerance(self) -> float:
        """By how many nats two correct computations may differ. Quantized weights round activations, too."""
        return LOGPROB_TOLERANCE["bfloat16" if self.is_quantized else self.dtype]

    @cached_property
    def weights(self) -> StoredWeights:
        """The stored weights, by their headers."""
        return read_weights(self.path, self.config.get("transformers_weights"))

    def loading_arguments(self) -> dict[str, Any]:
        """Return the arguments of every `from_pretrained` that reads this directory."""
        return {"local_files_only": True, "trust_remote_code": self.trust_remote_code}

    def files(self) -> list[Path]:
        """Return the files that define the model: weights, configs, tokenizer, template, code."""
        files = {file for pattern in SETTINGS_PATTERNS for file in self.path.glob(pattern)}
        return sorted({file for file in files if not file.name.startswith(".")} | {*self.weights.files})

    def digest(self) -> str:
        """Return the digest of every file of the model, after checking that all weights are finite.

        Raises:
            OpdctlError: a weight is NaN or infinite.
        """
        weights = self.weights

        def sha256(file: Path) -> str:
            return digest_weights(weights, file) if file in weights.files else sha256_file(file)

        return digest_of({file.name: digest for file, digest in sha256_files(self.files(), sha256).items()})

    @property
    def num_embeddings(self) -> int:
        """The rows of the embedding and output matrix."""
        return int(self.text_config.vocab_size)


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


def warn_of_other_eos(student: ModelDir, teacher: ModelDir, name: str) -> None:
    """Warn if a teacher ends its responses with a token that ends no response of the student.

    The student learns to emit this token, and continues after it. Other differences are left to training.
    """
    ids = [id_ for id_ in teacher.named_eos_ids if id_ not in student.eos_ids]
    if ids:
        console.warn(
            f"{name} ends at {describe_tokens(ids, teacher.tokenizer)}, where responses of the student continue: "
            f"rollout.eos_token_ids = {[*student.eos_ids, *ids]} ends them there"
        )
