"""TODO."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from opdctl.recipe.schema import Recipe, model_key

STAGE_DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "prompts": ("seed", "prompts.", "student."),
    "rollout": ("seed", "student.", "rollout."),
    "score": ("teacher.", "teachers.", "reference.", "score."),
    "update": ("seed", "plugins", "student.", "weight.", "objective.", "train.", "lora."),
    "eval": ("seed", "eval.", "student.dtype", "rollout.engine"),
    "continuations": ("seed", "continuations.", "student.dtype", "rollout.engine", "rollout.max_tokens"),
}
"""The keys, or beginnings of keys, that shape what a stage makes."""
MUTABLE_KEYS = (
    "name",
    "train.steps",
    "train.keep_",
    "train.save_every_steps",
    "train.cpu_offload",
    "train.max_truncated_fraction",
    "train.min_entropy",
    "eval.",
    "continuations.",
    "tracking.",
    "pipeline.",
    "vllm.",
    "server.",
    "hardware.",
)
MUTABLE_MODEL_KEYS = re.compile(r"(student|teacher|teachers\.[^.]+|reference)\.(shape|server|served_name)(\.|$)")
"""Keys, by their beginning and by what stands in them, that may change between two calls on one run directory.
Evaluations and continuations check their own."""


def is_mutable(key: str) -> bool:
    return key.startswith(MUTABLE_KEYS) or MUTABLE_MODEL_KEYS.match(key) is not None


def affected_stages(key: str) -> list[str]:
    """Return the stages that the setting `key` shapes."""
    return [stage for stage, keys in STAGE_DEPENDENCIES.items() if key.startswith(keys)]


STEP_ARTIFACTS = {"rollout": "rollouts", "score": "scores", "update": "updates"}
"""What the stages of a step make, in the order in which each builds on the one before."""
IMMUTABLE_KEYS = ("seed", "student.", "teacher.", "teachers.", "reference.", "prompts.", "lora.")
"""Keys that a run is begun with for good: what was made under others is of no use to it."""


def unaffected_stages(keys: Iterable[str]) -> list[str]:
    """Return the stages of a step whose artifacts depend on none of the settings."""
    shaped = {stage for key in keys for stage in affected_stages(key)}
    if "prompts" in shaped:
        return []
    return list(itertools.takewhile(lambda stage: stage not in shaped, STEP_ARTIFACTS))


def fingerprint_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the settings that shape `stage`, by dotted key: the fingerprint of its artifacts."""
    skip = ("eval.every_steps", "eval.bench", "eval.batch_size", "eval.allow_code_execution")
    flat = {
        k: v for k, v in recipe.flat().items() if k.startswith(STAGE_DEPENDENCIES[stage]) and not k.startswith(skip)
    }
    return {k: flat[k] for k in sorted(flat) if stage in ("eval", "continuations") or not is_mutable(k)}


def scorer_fingerprint_settings(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the settings that shape what the model `name` says of responses: its own, and those of all scorers."""
    own = ("score.", f"{model_key(name)}.")
    return {key: value for key, value in fingerprint_settings(recipe, "score").items() if key.startswith(own)}


def describe_changes(changes: Iterable[tuple[str, Any, Any]]) -> str:
    """Return one line a change: the key, old and new value, what it shapes, and what comes before that."""
    lines = []
    for key, old, new in changes:
        names = [STEP_ARTIFACTS.get(stage, stage) for stage in affected_stages(key)] or ["inputs"]
        shaped = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        free = " or ".join(STEP_ARTIFACTS[stage] for stage in unaffected_stages([key]))
        lines.append(f"{key} {old!r} → {new!r} shapes {shaped}" + (f", not {free}" if free else ""))
    return "\n".join(lines)


def as_overrides(changes: Sequence[tuple[str, Any, Any]]) -> list[str] | None:
    """Return the changes as `--set` takes them, or None where one takes a setting away, which no `--set` can say."""
    components = {key.removesuffix("name") for key, _, _ in changes if key.endswith(".name")}
    own = [(key, new) for key, _, new in changes if new is not None]
    if any(new is None and not key.startswith(tuple(components)) for key, _, new in changes):
        return None
    # A component's name comes first: it takes the parameters of the one before away.
    return [f"{key}={json.dumps(new)}" for key, new in sorted(own, key=lambda pair: not pair[0].endswith(".name"))]
