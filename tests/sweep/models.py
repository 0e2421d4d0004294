"""Takes one tiny model through opdctl as a student and as a teacher, and judges every number.

The judge is transformers alone: one float32 forward pass over each sequence.
"""

import json
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from helpers import architectures
from helpers.commands import QUICKSTART
from torch import Tensor
from transformers import PreTrainedModel

from opdctl.artifacts.records import Ids, ScoredResponse
from opdctl.errors import OpdctlError, summarize_exception
from opdctl.pipeline.loop import run_training
from opdctl.recipe.load import load_recipe
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training import policy
from opdctl.training.trainer import Trainer

TOLERANCE = 1e-3
"""Nats, and the relative difference of a gradient norm."""
SETTINGS = (
    "name=model",
    "weight={name='uniform'}",
    "objective.rollout_correction_cap=1000.0",
    "student.dtype=float32",
    "teacher.dtype=float32",
    "prompts.limit=16",
    "prompts.max_tokens=64",
    "rollout.prompts_per_step=8",
    "rollout.max_tokens=24",
    "rollout.engine=transformers",
    "score.engine=transformers",
    "train.steps=2",
    "train.learning_rate=1e-3",
    "eval.every_steps=0",
    "pipeline.device=cpu",
)
LORA = ("lora.rank=2",)


@dataclass
class Outcome:
    """What became of a model in one use.

    outcome: `right`, `refused` (before a response was sampled), `late` (refused after that), `wrong` (a number is),
    `error` (not an OpdctlError), `not built`. differences: the largest of each kind, in nats or relative.
    """

    outcome: str = "right"
    detail: str = ""
    differences: dict[str, float] = field(default_factory=dict)


@dataclass
class Finding:
    """What became of a model when it was trained, and when it was given an adapter."""

    name: str
    training: Outcome
    lora: Outcome
    seconds: float


def examine_in_new_folder(name: str) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        return examine(name, Path(folder))


def examine(name: str, folder: Path) -> Finding:
    """Build the model `name`, and use it as student and teacher."""
    start = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        student, teacher = (_build(name, seed, folder / f"model-{seed}") for seed in (0, 1))
    except Exception as error:
        outcomes = [Outcome("not built", _describe(error))] * 2
    else:
        outcomes = [_judge(use, student, teacher, folder) for use in (_check_training, _check_adapter)]
    return Finding(name, *outcomes, time.monotonic() - start)


def _build(name: str, seed: int, folder: Path) -> Path:
    """Write a model that transformers reads as it was written."""
    model = architectures.make(name, seed)
    architectures.save(model, folder)
    difference = max_difference(model, load_plain(folder, type(model).__name__), torch.arange(3, 43)[None])
    assert difference <= TOLERANCE, f"transformers reads back another model: {difference:.2g} nats"
    return folder


def _judge(use: Callable[[Path, Path, Path], dict[str, float]], student: Path, teacher: Path, folder: Path) -> Outcome:
    try:
        differences = use(student, teacher, folder)
    except OpdctlError as error:
        sampled = any((folder / "run").glob("step-*/rollout/part-*"))
        return Outcome("late" if sampled else "refused", f"{error.message} [{error.hint}]")
    except Exception as error:
        return Outcome("error", _describe(error))
    bad = {key: value for key, value in differences.items() if not value <= TOLERANCE}
    detail = ", ".join(f"{key} {value:.2g}" for key, value in bad.items())
    return Outcome("wrong" if bad else "right", detail, differences)


def _describe(error: BaseException) -> str:
    """Return an exception with the last line of opdctl and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "opdctl" in frame.filename and "site-packages" not in frame.filename]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*own[-1:], frames[-1]])
    return f"{type(error).__name__}: {summarize_exception(error)} ({places})"


def _open(student: Path, teacher: Path, output: Path, *overrides: str) -> Run:
    prompts = output.with_suffix(".jsonl")
    texts = ["sort the letters of the word, please"[: 1 + 5 * (n % 8)] + str(n) for n in range(16)]
    prompts.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in texts))
    models = (f"student.model={student}", f"teacher.model={teacher}", f"prompts.source={prompts}")
    return open_run(load_recipe([QUICKSTART], [*SETTINGS, *models, *overrides]), output)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_training(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Train two steps and return how far each number of opdctl is from that of transformers."""
    run = _open(student, teacher, folder / "run")
    run_training(run, "cpu")
    architecture = json.loads((student / "config.json").read_text())["architectures"][0]
    judges = [load_plain(path, architecture) for path in (student, run.student_path(1), run.student_path(2), teacher)]
    differences = {}
    for step, judge in enumerate(judges[:2]):
        scored = list(read_scored(run, step))
        sampled = [(judge, each.response.response_ids, each.response.logprobs, each) for each in scored]
        scores = [(judges[3], each.response.response_ids, each.teacher.logprobs, each) for each in scored]
        differences[f"rollout {step + 1}"] = max(map(_distance, sampled))
        differences[f"score {step + 1}"] = max(map(_distance, scores))
        norm, expected = run.update(step)["metrics"]["grad_norm"], gradient_norm(judge, judges[3], scored)
        differences[f"gradient {step + 1}"] = abs(norm - expected) / expected
    assert len({len(each.response.response_ids) for each in read_scored(run, 0)}) > 2, "responses of one length"
    sequence = _sequence(scored[0])
    differences["export"] = max_difference(Trainer(run, "cpu")._model, judges[2], sequence)
    return differences


def _distance(row: tuple[PreTrainedModel, Ids, Any, ScoredResponse]) -> float:
    judge, ids, logprobs, scored = row
    with torch.no_grad():
        expected_T = response_logprobs(judge, scored)
    return float((expected_T - torch.from_numpy(logprobs)).abs().max())


def load_plain(folder: Path, architecture: str) -> PreTrainedModel:
    """Load a directory as transformers does, with the class that its model had when it was published."""
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: sorted(names) for key, names in info.items() if names}
    assert not problems, f"{folder.name} as {architecture}: {problems}"
    return model.eval()


def _sequence(scored: ScoredResponse) -> Tensor:
    return torch.tensor([[*scored.response.prompt_ids, *scored.response.response_ids]])


def logprobs(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    """Return the log-probs of all ids at every position, [T, V], by one forward pass over one sequence."""
    logits_1TV = model(input_ids=ids_1T, use_cache=False).logits
    return logits_1TV[0, :, : architectures.VOCAB].float().log_softmax(-1)


def response_logprobs(model: PreTrainedModel, scored: ScoredResponse) -> Tensor:
    """Return the log-probs of a response's tokens, [T]."""
    ids_1T, length = _sequence(scored), len(scored.response.response_ids)
    return logprobs(model, ids_1T)[-length - 1 : -1].gather(-1, ids_1T[0, -length:, None])[:, 0]


def gradient_norm(student: PreTrainedModel, teacher: PreTrainedModel, scored: Sequence[ScoredResponse]) -> float:
    """Return the norm of the gradient of reverse KL on the sampled tokens, averaged over tokens."""
    count = sum(len(each.response.response_ids) for each in scored)
    student.zero_grad()
    for each in scored:
        logp_T = response_logprobs(student, each)
        with torch.no_grad():
            advantage_T = response_logprobs(teacher, each) - logp_T
        (-(advantage_T * logp_T).sum() / count).backward()
    squares = [parameter.grad.square().sum() for parameter in student.parameters() if parameter.grad is not None]
    student.zero_grad()
    return math.sqrt(float(sum(squares)))


@torch.no_grad()
def max_difference(first: PreTrainedModel, second: PreTrainedModel, ids_1T: Tensor) -> float:
    return float((logprobs(first, ids_1T) - logprobs(second, ids_1T)).abs().max())


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_adapter(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Give the student an adapter, export it merged, and compare the result with the adapted student."""
    run = _open(student, teacher, folder / "lora", *LORA)
    model = policy.load_policy(run.student, run.recipe, "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.1)
    policy.export(model, run.student, "float32", folder / "merged")
    architecture = json.loads((student / "config.json").read_text())["architectures"][0]
    judge = load_plain(folder / "merged", architecture)
    ids_1T = torch.arange(3, 43)[None]
    assert max_difference(judge, load_plain(student, architecture), ids_1T) > 0.1, "the adapter has no effect"
    return {"merged": max_difference(model, judge, ids_1T)}
