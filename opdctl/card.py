"""The model card of a student: what made it, in words and as the recipe. It depends on the run alone, to the byte."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdctl.config import Model, Recipe

FILE = "README.md"
SHOWN = {
    "loss": "loss",
    "k1": "reverse KL to the teacher, nats a token (k1)",
    "abs_advantage": "mean |A|, nats a token",
    "entropy": "entropy, nats a token",
    "response_length": "response length, tokens",
    "truncated_share": "share of truncated responses",
}


def write(folder: Path, recipe: Recipe, step: int, metrics: Mapping[str, Any]) -> None:
    """Write the card of the student that has seen `step` updates; the metrics are those of the last."""
    from huggingface_hub import ModelCardData

    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.student.model)
    head = ModelCardData(
        base_model=recipe.student.model if hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "opdctl"],
    )
    (folder / FILE).write_text(f"---\n{head.to_yaml()}\n---\n{_body(recipe, step, metrics)}", encoding="utf-8")


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
    results = {text: f"{metrics[name]:.4g}" for name, text in SHOWN.items() if name in metrics}
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
