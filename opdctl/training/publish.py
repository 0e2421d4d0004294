"""Students to the model hub, when a command asks for it by name."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Model, Recipe


def check_repo_id(repo: str) -> None:
    """Raise OpdctlError unless `repo` can name a model on the hub, OWNER/NAME, and there is a token to write with."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OpdctlError(f"--push {repo}: {str(error).splitlines()[0]}", hint="give OWNER/NAME") from error
    if "/" not in repo:
        raise OpdctlError(f"--push {repo}: whose repository?", hint="give OWNER/NAME")
    if get_token() is None:
        hint = "`hf auth login`, or put a token that may write into HF_TOKEN"
        raise OpdctlError(f"--push {repo}: there is no token for the hub", hint=hint, code=ExitCode.UNAVAILABLE)


def push_to_hub(folder: Path, repo: str, message: str) -> str:
    """Upload a model directory with its card, and return the commit's address. A repository that is not there is made,
    private. Raises OpdctlError (code 5) where the hub is out of reach or refuses; the directory is not touched."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # the hub's client raises its own, httpx' and OS errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OpdctlError(
            f"--push {repo}: the hub did not take it: {reason}",
            hint=f"the student is whole, {folder}; the same command tries again, so does `hf upload {repo} {folder}`",
            code=ExitCode.UNAVAILABLE,
        ) from error


CARD_FILE = "README.md"
CARD_METRICS = {
    "loss": "loss",
    "k1": "reverse KL to the teacher, nats a token (k1)",
    "abs_advantage": "mean |A|, nats a token",
    "entropy": "entropy, nats a token",
    "response_length": "response length, tokens",
    "truncated_fraction": "share of truncated responses",
}


def write_model_card(folder: Path, recipe: Recipe, step: int, metrics: Mapping[str, Any]) -> None:
    """Write the card of the student that has seen `step` updates; the metrics are those of the last."""
    from huggingface_hub import ModelCardData

    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.student.model)
    head = ModelCardData(
        base_model=recipe.student.model if hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "opdctl"],
    )
    (folder / CARD_FILE).write_text(f"---\n{head.to_yaml()}\n---\n{_body(recipe, step, metrics)}", encoding="utf-8")


def _body(recipe: Recipe, step: int, metrics: Mapping[str, Any]) -> str:
    teachers = ", ".join(_named(model) for model in recipe.teacher_models().values())
    weight = recipe.weight.name + (f" × {recipe.weight.times.name}" if recipe.weight.times else "")
    rows = {
        "student before": _named(recipe.student),
        "teacher": teachers,
        "prompts": f"`{recipe.prompts.source}`",
        "method": f"objective `{recipe.objective.name}`, token weight `{weight}`",
        "trained": f"LoRA, rank {recipe.lora.rank}" if recipe.lora.rank else "all weights",
        "updates": f"{step * recipe.train.updates_per_step:,}",
        "responses": f"{step * recipe.responses_per_step():,}",
    }
    results = {text: f"{metrics[name]:.4g}" for name, text in CARD_METRICS.items() if name in metrics}
    version = importlib.metadata.version("opdctl")
    return (
        f"# {recipe.name}, step {step}\n\n"
        f"Distilled on-policy by opdctl {version}: on the student's own responses, scored token by token.\n\n"
        f"{_table(rows)}\n\n"
        "On the responses that the last update learned from, drawn by the student before it:\n\n"
        f"{_table(results)}\n\n"
        "Accuracies lie in the run directory, `eval/`.\n\n"
        f"## Recipe\n\n```toml\n{recipe.to_toml()}```\n"
    )


def _named(model: Model) -> str:
    return f"`{model.model}`" + (f" at {model.revision}" if model.revision else "")


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows.items())])
