"""What accompanies a student when it is published: the model card, and the upload to the model hub."""

import importlib.metadata
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdctl.artifacts.directories import CARD_FILE
from opdctl.errors import OpdctlError, summarize_exception
from opdctl.recipe.data_names import is_local
from opdctl.recipe.schema import Component, Model, Recipe
from opdctl.runs.layout import step_name
from opdctl.runs.phases import TrainingPhase

CARD_METRICS = {
    "loss": "loss",
    "k1": "reverse KL to the teacher, nats per token (k1)",
    "abs_advantage": "mean |A|, nats per token",
    "entropy": "entropy, nats per token",
    "response_length": "response length, tokens",
    "truncated_fraction": "fraction of truncated responses",
    "responses": "responses",
    "tokens": "tokens of the responses",
}
"""The metrics of the last step that the card shows, with their labels."""
PHASE_COLUMNS = ("steps", "optimizer updates", "objective", "token weight", "changed settings")


def write_model_card(
    directory: Path, recipe: Recipe, step: int, metrics: Mapping[str, Any], base: Path, phases: Sequence[TrainingPhase]
) -> None:
    """Write the card of the student after `step` steps; `metrics` are those of the last step.

    base: the directory of the initial student, whose card has the licence. phases: of the steps that have a record in
    the run. The card depends on the arguments and the version of opdctl only, so it is reproducible byte for byte. The
    evaluation of the student follows later, so the card has no accuracy.
    """
    from huggingface_hub import ModelCardData

    sources = [part.source for part in recipe.prompts.parts().values() if isinstance(part.source, str)]
    front_matter = ModelCardData(
        base_model=recipe.student.model if _is_hub_id(recipe.student.model) else None,
        datasets=sorted({source for source in sources if _is_hub_id(source) and not is_local(source)}) or None,
        license=_read_license(base / CARD_FILE),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "opdctl"],
    )
    text = f"---\n{front_matter.to_yaml()}\n---\n{_card_body(recipe, step, metrics, phases)}"
    (directory / CARD_FILE).write_text(text, encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def _read_license(card: Path) -> str | None:
    """Return the licence that a card names, None without one."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.license if card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):  # no text, or invalid metadata
        return None
    return found if isinstance(found, str) else None


def _card_body(recipe: Recipe, step: int, metrics: Mapping[str, Any], phases: Sequence[TrainingPhase]) -> str:
    training = {
        "initial student": _model_name(recipe.student),
        "teacher": ", ".join(_model_name(model) for model in recipe.teacher_models().values()),
        "prompts": f"`{recipe.prompts.names}`",
        "trained": f"LoRA, rank {recipe.lora.rank}" if recipe.lora.rank else "all weights",
        "steps": f"{step:,}",
    }
    results = {label: _format(metrics[name]) for name, label in CARD_METRICS.items() if name in metrics}
    sampled_by = step - 1 - metrics.get("staleness", 0)
    return (
        f"# {recipe.name}, step {step}\n\n"
        f"Distilled on-policy by opdctl {importlib.metadata.version('opdctl')}: the student sampled responses, and the "
        "teacher scored every token.\n\n"
        f"{_table(['', ''], training.items())}\n\n"
        "The settings of the updates, by step. The first step is 0:\n\n"
        f"{_table(PHASE_COLUMNS, _phase_rows(step, phases))}\n\n"
        f"The responses of step {step - 1}, sampled by the student of step {sampled_by}:\n\n"
        f"{_table(['', ''], results.items())}\n\n"
        f"The accuracies of this student are in its run directory, `eval/*/{step_name(step)}/summary.json`, if it was "
        "evaluated.\n\n"
        f"## Recipe\n\nThat of the last step.\n\n```toml\n{recipe.to_toml()}```\n"
    )


def _phase_rows(step: int, phases: Sequence[TrainingPhase]) -> list[list[str]]:
    """Return a row under PHASE_COLUMNS for each phase, after one for the steps without a record."""
    rows = [
        [
            phase.step_range,
            f"{phase.num_updates:,}",
            _component_name(phase.objective),
            _component_name(phase.weight) + (f" × {_component_name(phase.weight.times)}" if phase.weight.times else ""),
            ", ".join(phase.describe_changes()),
        ]
        for phase in phases
    ]
    unrecorded = step - sum(len(phase.steps) for phase in phases)
    return [*([[f"{unrecorded:,} others", "", "", "", "no record in this run directory"]] * bool(unrecorded)), *rows]


def _component_name(component: Component) -> str:
    parameters = ", ".join(f"{name} = {value}" for name, value in component.params.items())
    return f"`{component.name}`" + (f" ({parameters})" if parameters else "")


def _model_name(model: Model) -> str:
    return f"`{model.model}`" + (f" at {model.revision}" if model.revision else "")


def _format(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown. A pipe in a cell would end the cell."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_repo_id(repo: str) -> None:
    """Check that `repo` is a valid hub id, OWNER/NAME, and that there is a hub token.

    Raises:
        OpdctlError: it is not, or there is none.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    hint = "give OWNER/NAME"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OpdctlError("invalid_usage", f"--push {repo}: {summarize_exception(error)}", hint=hint) from error
    if "/" not in repo:
        raise OpdctlError("invalid_usage", f"--push {repo}: the owner of the repository is missing", hint=hint)
    if get_token() is None:
        hint = "run `hf auth login`, or set HF_TOKEN to a token with write access"
        raise OpdctlError("missing_token", f"--push {repo}: no token for the hub", hint=hint)


def push_to_hub(directory: Path, repo: str, message: str) -> str:
    """Upload a model directory and return the URL of the commit. A missing repository is created as a private one.

    Raises:
        OpdctlError: the hub is unavailable or rejects the upload. The directory is unchanged.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=directory, commit_message=message).commit_url)
    except Exception as error:  # the client raises its own errors, httpx's and the system's
        command = shlex.join(["hf", "upload", repo, str(directory)])
        raise OpdctlError(
            "failed_upload",
            f"--push {repo}: {' '.join(str(error).split()) or type(error).__name__}",
            hint=f"run the same command again, or `{command}`; the student is intact",
        ) from error
