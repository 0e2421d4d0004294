"""Models: where a name leads, loading from safetensors, tokenizers, digests, size. Knows no stage."""

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
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
MODEL_FILE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def toy_model_names() -> list[str]:
    """Return the names of the embedded models."""
    folder = resources.files("opdctl.data.toy") / "models"
    return sorted(f"toy:{entry.name}" for entry in folder.iterdir() if entry.is_dir())


def find_or_download(model: Model, key: str) -> Path:
    """Return the directory of a model: embedded, local, or fetched from the hub. `key` names it in errors.

    Raises OpdctlError when there is none (code 2) or the hub cannot be reached (code 5).
    """
    return find_local(model, key) or _from_hub(model, key)


def find_local(model: Model, key: str) -> Path | None:
    """Return the directory of an embedded or local model, or None for a hub id. Raises OpdctlError as `locate` does."""
    name = model.model
    if name.startswith("toy:"):
        if name not in toy_model_names():
            raise OpdctlError(f"{key}: no embedded model `{name}`{did_you_mean(name, toy_model_names())}")
        return Path(str(resources.files("opdctl.data.toy"))) / "models" / name.removeprefix("toy:")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise OpdctlError(f"{key}: {path}: no config.json, so this is no model directory")
        return path.resolve()
    if path.exists():
        raise OpdctlError(f"{key}: {path}: a file, not a model directory")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = did_you_mean(str(path), beside)
        raise OpdctlError(f"{key}: no model directory `{name}`{near}", hint="give a directory, a hub id or `toy:…`")
    return None


def _from_hub(model: Model, key: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [
        pattern for pattern in MODEL_FILE_PATTERNS if not (model.server and pattern in WEIGHT_PATTERNS)
    ]  # a server has its own
    try:
        return Path(snapshot_download(model.model, revision=model.revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises its own, requests', httpx' and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OpdctlError(
            f"{key}: `{model.model}` is no local directory, and the hub did not give it: {reason}",
            hint=f"correct the name, or download it where there is a network and set {key} to its directory",
            code=ExitCode.UNAVAILABLE,
        ) from error


@dataclass(frozen=True)
class ModelDir:
    """A model directory and how to load it."""

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
            raise OpdctlError(f"{self.path}: its tokenizer cannot be loaded: {error}") from error

    @cached_property
    def tokenizer_digest(self) -> str:
        """The digest of what each id stands for, and of nothing else."""
        return digest_of(self.tokenizer.get_vocab())

    @cached_property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows; a model's matrix may be padded to more rows, which are masked."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: the generation config's, which may list several, else the tokenizer's."""
        path = self.path / "generation_config.json"
        listed = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids = listed if isinstance(listed, list) else [listed if listed is not None else self.tokenizer.eos_token_id]
        if None in ids:
            raise OpdctlError(f"{self.path}: neither its generation config nor its tokenizer names an end of sequence")
        return tuple(ids)

    def with_path(self, path: Path) -> "ModelDir":
        """Return what training has made of this model, in `path`: its tokenizer is the same, and not read again."""
        other = ModelDir(path, self.dtype, self.trust_remote_code)
        vars(other).update(tokenizer=self.tokenizer, vocab_size=self.vocab_size)
        return other

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())

    def files(self) -> list[Path]:
        """Return the files that make the model what it is: weights, configs, tokenizer, template, code."""
        return sorted(
            {
                file
                for pattern in MODEL_FILE_PATTERNS
                for file in self.path.glob(pattern)
                if not file.name.startswith(".")
            }
        )

    def digest(self) -> str:
        """Return the digest of every file of the model."""
        return digest_of({file.name: sha256_file(file) for file in self.files()})

    def copy_settings(self, folder: Path) -> None:
        """Make all files of `folder` but its weights and config.json those of this model: what it makes ends alike."""
        (folder / "generation_config.json").unlink(missing_ok=True)
        for file in self.files():
            if file.name != "config.json" and not any(file.match(pattern) for pattern in WEIGHT_PATTERNS):
                shutil.copyfile(file, folder / file.name)

    def num_embeddings(self) -> int:
        """Rows of the output matrix, as the config names them; 0 where it does not."""
        return self.config.get("vocab_size") or self.config.get("text_config", {}).get("vocab_size") or 0

    def hidden_size(self) -> int | None:
        """Size of the hidden states, as the config names it."""
        return self.config.get("hidden_size") or self.config.get("text_config", {}).get("hidden_size")

    def parameters(self) -> int:
        """Number of parameters stored, read from the safetensors headers alone."""
        from safetensors import safe_open

        count = 0
        for file in self.path.glob("*.safetensors"):
            with safe_open(file, "np") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        return count


def check_same_tokenizer(student: ModelDir, other: ModelDir, name: str) -> None:
    """Raise OpdctlError unless both map the same tokens to the same ids: a scorer is sent the student's ids."""
    ours, theirs = student.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours == theirs:
        return
    by_id = [{i: token for token, i in vocab.items()} for vocab in (ours, theirs)]
    differing = [i for i in sorted({*by_id[0], *by_id[1]}) if by_id[0].get(i) != by_id[1].get(i)]
    shown = "\n".join(f"  id {i}: student {by_id[0].get(i)!r}, {name} {by_id[1].get(i)!r}" for i in differing[:5])
    raise OpdctlError(
        f"student and {name} have different tokenizers: {len(differing)} ids differ, the first of them\n{shown}",
        hint="distil on-policy within one tokenizer family: the teacher scores the student's own token ids",
    )
