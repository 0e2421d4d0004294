"""Which stages depend on which settings: fingerprints of artifacts, and the effect of a changed setting."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from opdctl.recipe.schema import AUTO, Eval, Recipe, model_key

STAGE_DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "prompts": ("seed", "prompts.", "student."),
    "rollout": ("seed", "student.", "rollout."),
    "score": ("teacher.", "teachers.", "reference.", "score."),
    "update": ("seed", "plugins", "student.", "weight.", "objective.", "train.", "lora."),
    "eval": ("seed", "eval.", "student.dtype", "student.tokenizer", "rollout.engine", "rollout.eos_token_ids"),
    "continuations": (
        *("seed", "continuations.", "student.dtype", "student.tokenizer"),
        *("rollout.engine", "rollout.eos_token_ids", "rollout.max_tokens", "rollout.stop"),
    ),
}
"""Each stage with the settings that its artifacts depend on, as keys or prefixes of keys."""
STEP_ARTIFACTS = {"rollout": "rollouts", "score": "scores", "update": "updates"}
"""The stages of a step with the plural of their artifacts, in order: each stage depends on the previous one."""
MUTABLE_KEYS = (
    "name",
    "train.steps",
    "train.save_every_steps",
    "train.keep_every_steps",
    "train.keep_latest",
    "train.packing",
    "train.checkpoint_every_n_layers",
    "train.compile",
    "train.cpu_offload",
    "train.fsdp_size",
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
"""Keys, or prefixes of keys, that may change in a started run: its rollouts, scores and updates do not depend on them.
Evaluations and continuations have separate fingerprints."""
MUTABLE_MODEL_KEYS = re.compile(r"(student|teacher|teachers\.[^.]+|reference)\.(shape|server|served_name)(\.|$)")
"""The same for the keys of any model."""
ADDED_KEYS: dict[str, Any] = {
    r"rollout\.eos_token_ids": [],
    r"(student|teacher|teachers\.[^.]+|reference)\.tokenizer": AUTO,
    r"(teacher|teachers\.[^.]+)\.(system|chat_template|template_arguments)": None,
    r"eval\.system": None,
    r"rollout\.routed_experts": False,
    r"rollout\.environment": "",
    r"rollout\.environment_timeout_seconds": 600.0,
    r"rollout\.max_environments": 64,
    r"rollout\.sampling_top_k|eval\.top_k": 0,
    r"(rollout|eval)\.(min_p|(presence|frequency)_penalty)": 0.0,
    r"(rollout|eval)\.repetition_penalty": 1.0,
    r"(rollout|eval)\.(stop|stop_token_ids)": [],
    r"eval\.(max_thinking_tokens|few_shot_file)": None,
    r"eval\.few_shot": 0,
    r"eval\.end_thinking": Eval().end_thinking,
    r"train\.router_replay": False,
    r"train\.denominator": "all",
    r"train\.decay_vectors": False,
    r"train\.master_dtype": "float32",
    r"weight\.logprobs": "rollout",
    r"weight\.modulates": "loss",
    r"continuations\.max_tokens": None,
    r"continuations\.prefix_percents": list(range(0, 100, 10)),
    r"continuations\.prefix_tokens": [],
}
"""Patterns of the keys that were added to version 5 of the artifacts, with the values by which older artifacts were
made. A fingerprint contains them only if they have another value, so that older artifacts keep theirs."""
ADDED_PARAMETERS: dict[str, dict[str, Any]] = {
    "iw_opd": {"floor": 1.0},
    "prefix_ratio": {"floor": 0.0, "gamma": 1.0, "normalize": "response"},
}
"""Parameters that were added to token weights since version 5, with the values that older runs used. A recorded recipe
without them has these values, and a fingerprint contains them only if they differ."""
BENCHMARK_KEYS = ("eval.split", "eval.release_version", "eval.start_date", "eval.end_date")
"""Settings that select the problems of some benchmarks, whose fingerprints contain them: see `Benchmark.selection`."""
IMMUTABLE_KEYS = ("seed", "student.", "teacher.", "teachers.", "reference.", "prompts.", "lora.")
"""Keys that no fork of a run can change: every artifact of the run depends on them. The remaining keys can change in a
fork."""


def is_mutable(key: str) -> bool:
    """Whether a started run accepts another value of the setting."""
    return key.startswith(MUTABLE_KEYS) or MUTABLE_MODEL_KEYS.match(key) is not None


def affected_stages(key: str) -> list[str]:
    """Return the stages whose artifacts depend on the setting `key`."""
    return [stage for stage, keys in STAGE_DEPENDENCIES.items() if key.startswith(keys)]


def unaffected_stages(keys: Iterable[str]) -> list[str]:
    """Return the stages of a step whose artifacts depend on none of the settings."""
    affected = {stage for key in keys for stage in affected_stages(key)}
    if "prompts" in affected:
        return []
    return list(itertools.takewhile(lambda stage: stage not in affected, STEP_ARTIFACTS))


def fingerprint_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Return the settings in the fingerprint of a stage's artifacts, by dotted key."""
    excluded = ("eval.every_steps", "eval.bench", "eval.batch_size", "eval.allow_code_execution", *BENCHMARK_KEYS)
    flat = recipe.flat()
    keys = sorted(key for key in flat if key.startswith(STAGE_DEPENDENCIES[stage]))
    if stage not in ("eval", "continuations"):
        keys = [key for key in keys if not is_mutable(key)]
    unset = [key for key in keys if _is_as_before(key, flat)]
    return {key: flat[key] for key in keys if not key.startswith(excluded) and key not in unset}


def _is_as_before(key: str, flat: Mapping[str, Any]) -> bool:
    """Whether a setting was added later and has the value by which older artifacts were made."""
    section, _, name = key.rpartition(".")
    parameters = ADDED_PARAMETERS.get(flat[f"{section}.name"], {}) if section in ("weight", "weight.times") else {}
    return flat[key] in _values_before(key) or (name in parameters and parameters[name] == flat[key])


@cache
def _values_before(key: str) -> tuple[Any, ...]:
    """Return the value by which older artifacts were made, if the setting was added later."""
    return tuple(before for pattern, before in ADDED_KEYS.items() if re.fullmatch(pattern, key))


def restore_omitted_settings(settings: Mapping[str, Any], keys: Iterable[str], stage: str) -> dict[str, Any]:
    """Return the settings in the fingerprint of a stage, by dotted key, together with those that it omits: settings
    that were added later and have the value by which older artifacts were made. keys: the keys of a recipe."""
    stage_keys = [key for key in keys if key.startswith(STAGE_DEPENDENCIES[stage])]
    omitted = {key: value for key in stage_keys for value in _values_before(key)}
    for section in ("weight", "weight.times"):
        parameters = ADDED_PARAMETERS.get(str(settings.get(f"{section}.name")), {})
        omitted |= {f"{section}.{name}": value for name, value in parameters.items()}
    return {**omitted, **settings}


def scorer_settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of `score` on which the scores of the model `name` depend: [score] and the model's."""
    prefixes = ("score.", f"{model_key(name)}.")
    return {key: value for key, value in settings.items() if key.startswith(prefixes)}


def describe_changes(changes: Iterable[tuple[str, Any, Any]]) -> str:
    """Return one line for each change (key, old, new), with the artifacts that it affects and those it does not.

    describe_changes([("weight.gamma", 0.5, 0.7)])
    # weight.gamma 0.5 → 0.7 affects updates; rollouts and scores can be reused
    """
    lines = []
    for key, old, new in changes:
        affected = _enumerate([STEP_ARTIFACTS.get(stage, stage) for stage in affected_stages(key)] or ["inputs"])
        reusable = _enumerate([STEP_ARTIFACTS[stage] for stage in unaffected_stages([key])])
        lines.append(
            f"{key} {old!r} → {new!r} affects {affected}" + (f"; {reusable} can be reused" if reusable else "")
        )
    return "\n".join(lines)


def _enumerate(names: Sequence[str]) -> str:
    """Return "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def as_overrides(changes: Sequence[tuple[str, Any, Any]]) -> list[str] | None:
    """Return the changes (key, old, new) as arguments of `--set`, or None if one removes a setting: `--set` cannot."""
    components = {key.removesuffix("name") for key, _, _ in changes if key.endswith(".name")}
    if any(new is None and not key.startswith(tuple(components)) for key, _, new in changes):
        return None
    values = [(key, new) for key, _, new in changes if new is not None]
    # The name of a component comes first, because it removes the parameters of the previous component.
    return [
        f"{key}={json.dumps(new, ensure_ascii=False)}"
        for key, new in sorted(values, key=lambda pair: not pair[0].endswith(".name"))
    ]
