"""The prompts of a run: read from their sources, tokenized, and kept in the run directory."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts import files, tables
from opdctl.artifacts.records import Prompt
from opdctl.data.formats import chat_template_files, read_chat_template, teacher_formats, training_format
from opdctl.data.prompts import Problem, load_problems, split_held_out, tokenize
from opdctl.data.rendering import PromptRenderer
from opdctl.data.sources import find_files
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.prompts import source_key
from opdctl.recipe.schema import Recipe, model_key
from opdctl.runs.layout import HELD_OUT_FILE, PROMPTS_FILE
from opdctl.runs.run import Run, read_run_record

MANY_DROPPED_FRACTION = 0.05
"""Of the prompts. The longest prompts of a data set are often its hardest."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run. num_dropped: longer than the limit. held_out: the text of held_out.jsonl, None without it.
    is_kept: they are those of a run whose record was lost, whatever their sources have now."""

    training: list[Prompt]
    num_dropped: int = 0
    held_out: str | None = None
    is_kept: bool = False


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_prompts(recipe: Recipe, student: ModelDir, templates: Mapping[str, str]) -> PromptSet:
    """Return the prompts of the recipe's sources. templates: texts by `read_chat_templates`.

    Raises:
        OpdctlError: a source or a prompt is invalid, a download fails, or there are too few prompts.
    """
    problems = load_problems(recipe.prompts, keep_rows=bool(recipe.rollout.environment))
    prompts = prepare_prompts(recipe, problems, student, templates)
    if prompts.num_dropped:
        fraction = prompts.num_dropped / len(problems)
        remedy = "; the longest prompts are often the hardest: raise it" if fraction > MANY_DROPPED_FRACTION else ""
        console.warn(
            f"dropped {prompts.num_dropped} of {len(problems)} prompts: longer than prompts.max_tokens = "
            f"{recipe.prompts.max_tokens}{remedy}"
        )
    return prompts


def prepare_prompts(
    recipe: Recipe, problems: Sequence[Problem], student: ModelDir, templates: Mapping[str, str]
) -> PromptSet:
    """Return the prompts as token ids, and those that are held out. templates: texts by `read_chat_templates`.

    Raises:
        OpdctlError: a prompt is invalid, or fewer are left than one step needs.
    """
    renderer = PromptRenderer(student.tokenizer, student.vocab_size, training_format(recipe, templates))
    own = {
        name: PromptRenderer(student.tokenizer, student.vocab_size, form, model_key(name))
        for name, form in teacher_formats(recipe, templates).items()
    }
    training, held_out = split_held_out(problems, recipe.prompts.held_out)
    teachers = {name: own.get(name) for name in recipe.teacher_models()}
    prompts, dropped = tokenize(training, renderer, recipe.prompts, teachers)
    _warn_of_repeated_start(prompts, student)
    _warn_of_settings_without_effect(prompts, own)
    needed = recipe.prompts.split_step(recipe.rollout.prompts_per_step) or {"": recipe.rollout.prompts_per_step}
    for name, per_step in needed.items():
        if (rows := _count(prompts, name)) < per_step:
            location = f"[{source_key(name)}]" if name else recipe.prompts.names
            share = f"its share of rollout.prompts_per_step is {per_step}" if name else ""
            raise OpdctlError(
                "invalid_data",
                f"{location}: {rows} prompts, {share or f'rollout.prompts_per_step = {per_step}'}",
                hint="lower rollout.prompts_per_step, or provide more prompts",
            )
    return PromptSet(prompts, dropped, _format_held_out(held_out) if recipe.prompts.held_out else None)


def _warn_of_repeated_start(prompts: Sequence[Prompt], student: ModelDir) -> None:
    """Warn if prompts start with two begin-of-sequence tokens: the template's and that of a text, for example."""
    start = student.tokenizer.bos_token_id
    repeated = [prompt.prompt_id for prompt in prompts if prompt.prompt_ids[:2].tolist() == [start, start]]
    if start is not None and repeated:
        console.warn(
            f"{len(repeated)} of {len(prompts)} prompts start with two {student.tokenizer.bos_token}, the first is "
            f"`{repeated[0]}`: remove it from the chat template or the data"
        )


def _warn_of_settings_without_effect(prompts: Sequence[Prompt], teachers: Collection[str]) -> None:
    """Warn of a teacher whose settings change no prompt: a template ignores an unknown argument."""
    for name in teachers:
        pairs = [(each.prompt_ids, each.teacher_prompt_ids) for each in prompts if each.teacher == name]
        if pairs and all(ids is not None and np.array_equal(ids, student_ids) for student_ids, ids in pairs):
            key = model_key(name)
            console.warn(
                f"{key}: its system turn, chat template and template arguments change no prompt: it reads what the "
                f"student reads"
            )


def _count(prompts: Sequence[Prompt], source: str) -> int:
    """Return the number of prompts of a source, of all sources for ""."""
    return sum(prompt.prompt_id.startswith(f"{source}/") for prompt in prompts) if source else len(prompts)


def _format_held_out(problems: Sequence[Problem]) -> str:
    """Return held-out prompts as the lines of a benchmark file."""
    rows = []
    for problem in problems:
        messages = [{"role": each.role, "content": each.text, **each.extra} for each in problem.chat.messages]
        prompt = messages if len(messages) > 1 else problem.text
        rows.append({"id": problem.id, "prompt": prompt, "answer": problem.answer})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ── The run directory ────────────────────────────────────────────────────────────────────────────────────────────────


def read_kept_prompts(path: Path) -> PromptSet | None:
    """Return the prompts of a run whose record was lost, or None if they are lost, too."""
    stored, held_out = path / PROMPTS_FILE, path / HELD_OUT_FILE
    if not stored.exists():
        return None
    text = files.read_text(held_out) if held_out.exists() else None
    return PromptSet(tables.read_rows(stored, Prompt), held_out=text, is_kept=True)


def store_prompts(path: Path, prompts: PromptSet) -> None:
    """Write the prompts into the run directory `path`."""
    for name in [PROMPTS_FILE, *([HELD_OUT_FILE] if prompts.held_out is not None else [])]:
        _write_file(path / name, prompts)


def _write_file(path: Path, prompts: PromptSet) -> None:
    if path.name == PROMPTS_FILE:
        tables.write_prompts(path, prompts.training)
    else:
        files.write_text(path, prompts.held_out or "")


def describe_prompts(recipe: Recipe, path: Path, prompts: PromptSet, templates: Mapping[str, str]) -> dict[str, Any]:
    """Return the entry of the prompts in run.json."""
    shares = recipe.prompts.split_step(recipe.rollout.prompts_per_step)
    sources = {name: {"rows": _count(prompts.training, name), "per_step": size} for name, size in shares.items()}
    parts = recipe.prompts.parts().items()
    source_files = (
        [file for name, part in parts for file in find_files(part, source_key(name))] if not prompts.is_kept else []
    )
    return {
        "rows": len(prompts.training),
        "dropped": prompts.num_dropped,
        "sha256": files.sha256_file(path / PROMPTS_FILE),
        "source_files": {str(file): digest for file, digest in files.sha256_files(source_files).items()},
        "order": "random_sampler",
        **({"chat_templates": {**templates}} if templates else {}),
        **({"sources": sources} if sources else {}),
        **({"held_out": files.sha256_file(path / HELD_OUT_FILE)} if prompts.held_out is not None else {}),
    }


def check_source_files(recipe: Recipe, path: Path) -> None:
    """Check that the files that the prompts of a run came from are unchanged, those that still exist.

    Raises:
        OpdctlError: a file has other contents.
    """
    record = read_run_record(path)["prompts"]
    single = record.get("source_sha256")
    digests = record.get("source_files", {}) or ({recipe.prompts.location: single} if single else {})
    present = [Path(name) for name in digests if Path(name).is_file()]
    for source, digest in files.sha256_files(present).items():
        if digest != digests[str(source)]:
            raise OpdctlError(
                "source_mismatch",
                f"{source} changed after the run {path} read its prompts from it",
                hint="restore the file, delete it (the run has a copy of its prompts), or use another --output",
            )


def check_chat_templates(recipe: Recipe, path: Path) -> None:
    """Check that the files of chat templates are unchanged, as far as they still exist: the run has their texts.

    Raises:
        OpdctlError: a file has another text.
    """
    templates = read_run_record(path)["prompts"].get("chat_templates", {})
    for section, file in chat_template_files(recipe).items():
        if file.exists() and read_chat_template(file, section) != templates.get(section):
            raise OpdctlError(
                "source_mismatch",
                f"{file}: {section}.chat_template changed after the start of the run {path}",
                hint="restore the file, delete it (the run has its text), or use another --output",
            )


def restore_prompts(run: Run) -> None:
    """Write lost prompts of a run again from their sources.

    Raises:
        OpdctlError: the sources have other prompts now.
    """
    record = read_run_record(run.path)["prompts"]
    digests = {PROMPTS_FILE: record["sha256"], HELD_OUT_FILE: record.get("held_out")}
    missing = [run.path / name for name, digest in digests.items() if digest and not (run.path / name).exists()]
    if not missing:
        return
    prompts, sources = read_prompts(run.recipe, run.student, run.chat_templates), run.recipe.prompts.names
    for path in missing:
        _write_file(path, prompts)
        if files.sha256_file(path) != digests[path.name]:
            files.discard(path)
            why = f"is missing, and {sources} has other prompts than at the start of the run"
            raise files.corrupt_artifact(path, why, "restore it from a copy, or restore the source of the prompts")
        console.warn(f"{path} was missing: written again from {sources}")
