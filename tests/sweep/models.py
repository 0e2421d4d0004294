"""Takes one tiny model through opdctl as a student and as a teacher, and judges every number.

The judge is transformers alone: one float32 forward pass over each sequence.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from helpers import architectures
from helpers.commands import QUICKSTART
from sweep.outcomes import TOLERANCE, Outcome, describe, judge
from torch import Tensor
from transformers import PreTrainedModel

from opdctl.artifacts.records import Logprobs, ScoredResponse
from opdctl.pipeline.loop import run_training
from opdctl.recipe.load import load_recipe
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training import policy, sharding
from opdctl.training.export import StudentExporter
from opdctl.training.trainer import Trainer

SETTINGS = (
    "name=model",
    "seed=1",  # with 0, the gradient of mamba2 is 4e14: the reference in float32 is wrong by 0.8%, opdctl is not
    "weight={name='uniform'}",
    "objective={name='reverse_kl',support='full'}",
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
VLLM = (
    "rollout.engine=vllm",
    "score.engine=vllm",
    "vllm.enforce_eager=true",
    "objective={name='policy_gradient'}",
)
VLLM_SIZES = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Other sizes: the kernels of vLLM for CPUs need heads of at least 32."""
PROMPTS = tuple(f"sort  the letters\nof {n} words, please"[: 1 + 5 * (n % 8)] + str(n) for n in range(16))
"""Texts of different lengths, with spaces, newlines and digits."""


def examine_model(name: str, folder: Path, uses: Collection[str]) -> dict[str, Outcome]:
    """Build the model `name`, and use it as student and teacher."""
    return {use: _examine_use(name, folder, use) for use in uses}


def _examine_use(name: str, folder: Path, use: str) -> Outcome:
    models, sizes = (folder / "vllm-models", VLLM_SIZES) if use == "vllm" else (folder / "models", {})
    try:
        student, teacher = (
            _build(name, seed, models / role, sizes) for seed, role in enumerate(("student", "teacher"))
        )
    except Exception as error:
        return Outcome("not built", describe(error))
    return judge(partial(USES[use], student, teacher), folder / use)


def _build(name: str, seed: int, folder: Path, sizes: Mapping[str, int]) -> Path:
    """Write a model that transformers reads as it was written, unless it exists."""
    if folder.exists():
        return folder
    model = architectures.make(name, seed, sizes)
    architectures.save(model, folder)
    difference = max_difference(model, load_plain(folder), torch.arange(3, 43)[None])
    assert difference <= TOLERANCE, f"transformers reads back another model: {difference:.2g} nats"
    return folder


def open_sweep_run(student: Path, teacher: Path, output: Path, *overrides: str) -> Run:
    """Do what `opdctl train` does before anything is sampled."""
    source = output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in PROMPTS))
    models = (f"student.model={student}", f"teacher.model={teacher}", f"prompts.source={source}")
    return open_run(load_recipe([QUICKSTART], [*SETTINGS, *models, *overrides]), output)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_training(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Train two steps and return how far each number of opdctl is from that of transformers."""
    run = _train(student, teacher, folder)
    differences = {}
    for step, path in enumerate((student, run.student_path(1))):
        scored = list(read_scored(run, step))
        reference, teacher_reference = load_plain(path, student), load_plain(teacher)
        differences |= _engine_differences(run, step, reference, teacher_reference)
        metrics, (loss, norm) = (
            run.update(step)["metrics"],
            loss_and_gradient_norm(reference, teacher_reference, scored),
        )
        differences[f"loss {step + 1}"] = abs(metrics["loss"] - loss)
        differences[f"gradient {step + 1}"] = abs(metrics["grad_norm"] - norm) / norm
    model, exported = Trainer(run, "cpu")._model, load_plain(run.student_path(2), student)
    with sharding.complete_forward_pass(model, run.recipe):
        return differences | {"export": max_difference(model, exported, _sequence(scored[0]))}


def check_vllm(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Train two steps on responses and scores of vLLM, and return how far these are from those of transformers."""
    run = _train(student, teacher, folder, *VLLM)
    references = [load_plain(path, student) for path in (student, run.student_path(1))]
    differences = [_engine_differences(run, step, each, load_plain(teacher)) for step, each in enumerate(references)]
    return differences[0] | differences[1]


def score_differences(student: Path, teacher: Path, reference: PreTrainedModel, folder: Path) -> dict[str, float]:
    """Let a teacher score the student's responses, and return how far its log-probs are from those of `reference`."""
    run = _train(student, teacher, folder, "train.steps=1")
    return {"score": max(_distance(reference, each, each.teacher.logprobs) for each in read_scored(run, 0))}


def _train(student: Path, teacher: Path, folder: Path, *overrides: str) -> Run:
    run = open_sweep_run(student, teacher, folder, *overrides)
    run_training(run, "cpu")
    lengths = {len(each.response.response_ids) for each in read_scored(run, 0)}
    assert len(lengths) > 2, f"all responses of step 1 have length {' or '.join(map(str, lengths))}"
    return run


def _engine_differences(run: Run, step: int, student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, float]:
    scored = list(read_scored(run, step))
    return {
        f"rollout {step + 1}": max(_distance(student, each, each.response.logprobs) for each in scored),
        f"score {step + 1}": max(_distance(teacher, each, each.teacher.logprobs) for each in scored),
    }


@torch.no_grad()
def _distance(reference: PreTrainedModel, scored: ScoredResponse, logp_T: Logprobs) -> float:
    """Return the largest difference between log-probs of a response's tokens and those of `reference`."""
    ids_T1 = torch.from_numpy(scored.response.response_ids.astype(np.int64))[:, None]
    expected_T = response_logprobs(reference, scored).gather(-1, ids_T1)[:, 0]
    return float((expected_T - torch.from_numpy(logp_T)).abs().max())


def load_plain(folder: Path, original: Path | None = None) -> PreTrainedModel:
    """Load a directory as transformers does, with the class of `original`; every tensor must be in place."""
    config = json.loads(((original or folder) / "config.json").read_text())
    architecture = getattr(transformers, config["architectures"][0])
    model, info = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {key: sorted(names) for key, names in info.items() if names}
    assert not problems, f"{folder.name} as {architecture.__name__}: {problems}"
    return model.eval()


def _sequence(scored: ScoredResponse) -> Tensor:
    return torch.tensor([[*scored.response.prompt_ids, *scored.response.response_ids]])


def logprobs(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    """Return the log-probs of all ids at every position, [T, V], by one forward pass over one sequence."""
    logits_1TV = model(input_ids=ids_1T, use_cache=False).logits
    return logits_1TV[0, :, : architectures.VOCAB].float().log_softmax(-1)


def response_logprobs(model: PreTrainedModel, scored: ScoredResponse) -> Tensor:
    """Return the log-probs of all ids at each token of a response, [T, V]."""
    return logprobs(model, _sequence(scored))[-len(scored.response.response_ids) - 1 : -1]


def loss_and_gradient_norm(
    student: PreTrainedModel, teacher: PreTrainedModel, scored: Sequence[ScoredResponse]
) -> tuple[float, float]:
    """Return the mean over tokens of KL(student || teacher), and the norm of its gradient."""
    count = sum(len(each.response.response_ids) for each in scored)
    losses = []
    for each in scored:
        logp_TV = response_logprobs(student, each)
        with torch.no_grad():
            teacher_logp_TV = response_logprobs(teacher, each)
        loss = (logp_TV.exp() * (logp_TV - teacher_logp_TV)).sum() / count
        loss.backward()
        losses.append(float(loss))
    squares = [parameter.grad.square().sum() for parameter in student.parameters() if parameter.grad is not None]
    student.zero_grad()
    return sum(losses), math.sqrt(float(sum(squares)))


@torch.no_grad()
def max_difference(first: PreTrainedModel, second: PreTrainedModel, ids_1T: Tensor) -> float:
    return float((logprobs(first, ids_1T) - logprobs(second, ids_1T)).abs().max())


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_adapter(student: Path, teacher: Path, folder: Path) -> dict[str, float]:
    """Give the student an adapter, export it merged, and compare the result with the adapted student."""
    run = open_sweep_run(student, teacher, folder, *LORA)
    model = policy.load_policy(run.student, run.recipe, "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.05)
    folder.with_name("merged").mkdir()
    StudentExporter(model, run.student, "float32").export(folder.with_name("merged"))
    merged = load_plain(folder.with_name("merged"), student)
    ids_1T = torch.arange(3, 43)[None]
    assert max_difference(merged, load_plain(student), ids_1T) > 0.1, "the adapter has no effect"
    return {"merged": max_difference(model, merged, ids_1T)}


USES = {"training": check_training, "lora": check_adapter, "vllm": check_vllm}
"""What a model is used for: student, teacher and directory of the run → differences."""
