"""The section [prompts]: where prompts come from, and how they are read. Imports no torch."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from opdctl.recipe.conditions import Condition
from opdctl.recipe.section import Section

IMPORTED = "imported"
"""The source of a run whose prompts are those of the trajectories that were imported first."""
FinalAssistant = Literal["drop", "continue", "error"]
SpecialTokensInText = Literal["error", "split"]
SOURCE_OPTIONS = ("subset", "revision", "data_files")
"""Keys that belong to one `source`."""


def source_key(name: str) -> str:
    """Return the recipe key of a source by its name in `Prompts.parts`, such as `prompts.sources.math`."""
    return f"prompts.sources.{name}" if name else "prompts"


class PromptSource(Section):
    """Where prompts come from, and what the columns of their rows are."""

    source: str | list[str] = ""
    """`toy:sort12`, `toy:perm`, `toy:calc`, a hub data set, or local data: a `.jsonl`, `.json`, `.csv`, `.tsv` or
    `.parquet` file (text also as `.gz` or `.zst`), a folder of such files, a folder saved by `datasets`, a pattern such
    as `data/*.parquet`, or a list of these. `imported` is the prompts of the responses with which `opdctl run import`
    starts the run. A later file or `--set` with another source also removes `subset`, `revision` and `data_files`,
    which belong to the previous one."""
    subset: str | None = None
    """The subset (configuration) of the hub data set, such as `main` of `openai/gsm8k`."""
    split: str = "train"
    """The split of a toy task, a hub data set or a folder. A folder without splits is read whole."""
    revision: str | None = None
    """The revision of the hub data set."""
    data_files: str | None = None
    """A file of the hub data set, such as `math/train.parquet`. If unset, the data set decides which files are read. A
    file without a split is the split `train`."""
    limit: int | None = Field(default=None, gt=0)
    """Use the first N prompts; all if unset. A toy task is an infinite stream and requires a limit."""
    id_column: str | None = None
    """Column of unique prompt ids; the row number if unset. As in all columns, a dot leads to a field of a column:
    `extra_info.index`."""
    prompt_column: str | None = None
    """Column of the prompt: a text, or a list of messages `{"role": …, "content": …}`. If unset, it is the first of
    `prompt`, `messages`, `conversations`, `problem`, `question` and `instruction` that is not null; a non-empty `input`
    beside `instruction` follows it in a paragraph below."""
    answer_column: str | None = None
    """Column of the gold answer, which is copied into the run."""
    teacher_column: str | None = None
    """Column with the name of the teacher of each prompt, one of [teachers]."""
    teacher_prompt_column: str | None = None
    """Column of a separate prompt for the teacher, for example one that contains the solution."""
    tools_column: str | None = None
    """Column of the schemas of tools that the chat template describes: a list, or its text in JSON."""
    final_assistant: FinalAssistant = "drop"
    """What to do with an assistant's message at the end of a chat: `drop` it as the answer, `continue` it, so that it
    starts every response, or refuse it (`error`)."""
    where: dict[str, Condition] = {}
    """Use only rows that satisfy all of these conditions on columns, such as
    `{ difficulty = ">= 6", source = ["a", "b"] }`: a value, one of several values, or a comparison (`>=`, `>`, `<=`,
    `<`, `==`, `!=`). Null satisfies none."""
    suffix: str = ""
    """Text that is appended to every prompt, of a chat to the user's last message, unless it has this text at its end
    already, white space aside. With the suffix of the evaluation, training and evaluation ask for the answer alike."""

    @model_validator(mode="before")
    @classmethod
    def _read_min_values(cls, values: Any) -> Any:
        """Read a key of earlier versions: the least value of columns."""
        if not isinstance(values, Mapping) or not isinstance(values.get("min_values"), Mapping):
            return values
        conditions = {column: f">= {least!r}" for column, least in values["min_values"].items()}
        others = {key: value for key, value in values.items() if key != "min_values"}
        return others | ({"where": {**values.get("where", {}), **conditions}} if conditions else {})

    @property
    def location(self) -> str:
        """The source with the file in it, for errors."""
        name = self.source if isinstance(self.source, str) else ", ".join(self.source)
        return f"{name}/{self.data_files}" if self.data_files else name

    @property
    def paths(self) -> list[str]:
        """What the source consists of, each with one name."""
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def is_toy(self) -> bool:
        return isinstance(self.source, str) and self.source.startswith("toy:")

    @property
    def is_imported(self) -> bool:
        return self.source == IMPORTED


class MixedSource(PromptSource):
    """One source of several. A key that is unset has the value of [prompts]."""

    weight: float | None = Field(default=None, gt=0)
    """The share of the source in every step, relative to the weights of the others. Either all sources have a weight or
    none: then the prompts of all are one set."""
    teacher: str | None = None
    """The teacher of all prompts of the source, one of [teachers]."""


class Prompts(PromptSource):
    """The prompts and their columns."""

    sources: dict[str, MixedSource] = {}
    """Several sources by name, with the keys of [prompts] that differ, and `weight` and `teacher`. The ids of their
    prompts begin with the name."""
    shuffle_seed: int | None = Field(default=None, ge=0)
    """Shuffle the rows of each source with this seed before `limit`; if unset, their order is that of the files. The
    order in training is always random, by `seed`."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts that training does not use, for an evaluation on prompts of the same kind: held_out.jsonl of
    the run has them. The text of a prompt decides, so that equal prompts are on the same side."""
    template_arguments: dict[str, bool | int | str] = {}
    """Arguments of the chat template, such as `enable_thinking = false`."""
    system: str | None = None
    """The system turn of every prompt, in place of that of the data; "" removes it. If unset, it is that of the
    data."""
    chat_template: str | None = None
    """A Jinja file: the chat template in place of the tokenizer's, in training and evaluations. The run keeps its text,
    and the students that it writes have it."""
    special_tokens_in_text: SpecialTokensInText = "error"
    """What to do with a prompt whose text spells a special token, such as `<|im_end|>`: refuse it (`error`), or read it
    as other text (`split`). It is never read as this token, in training and evaluations."""
    max_tokens: int = Field(default=2048, gt=0)
    """Maximum length of a prompt in tokens, chat template included."""
    on_too_long: Literal["drop", "error"] = "error"
    """What to do with a longer prompt. Prompts are never truncated."""

    @model_validator(mode="before")
    @classmethod
    def _complete_sources(cls, values: Any) -> Any:
        """Give the keys of [prompts] to each source that does not have them."""
        if not isinstance(values, Mapping) or not isinstance(values.get("sources"), Mapping):
            return values
        common = {key: value for key, value in values.items() if key in MixedSource.model_fields}
        return {**values, "sources": {name: _complete(source, common) for name, source in values["sources"].items()}}

    def parts(self) -> dict[str, PromptSource]:
        """Return the sources by name; a single one has the name ""."""
        return dict(self.sources) if self.sources else {"": self}

    @property
    def names(self) -> str:
        """The sources, for errors and model cards."""
        return ", ".join(dict.fromkeys(part.location for part in self.parts().values()))

    def split_step(self, prompts_per_step: int) -> dict[str, int]:
        """Return how many prompts of a step each source with a weight gives: by the largest remainders."""
        weights = {name: source.weight for name, source in self.sources.items() if source.weight is not None}
        quotas = {name: prompts_per_step * weight / sum(weights.values()) for name, weight in weights.items()}
        counts = {name: int(quota) for name, quota in quotas.items()}
        most_cut = sorted(counts, key=lambda name: counts[name] - quotas[name])
        for name in most_cut[: prompts_per_step - sum(counts.values())]:
            counts[name] += 1
        return counts

    @property
    def num_rows(self) -> int | None:
        """The greatest number of prompts, None if it is unknown without the data."""
        limits = [part.limit for part in self.parts().values()]
        return sum(filter(None, limits)) if all(limits) else None


def _complete(source: Any, common: Mapping[str, Any]) -> Any:
    """Return the keys of one source of several with those of [prompts]."""
    if not isinstance(source, Mapping):
        return source
    is_other = source.get("source", common.get("source")) != common.get("source")
    return {key: value for key, value in common.items() if not (is_other and key in SOURCE_OPTIONS)} | {**source}
