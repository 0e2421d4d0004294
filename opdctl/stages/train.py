"""train, one step of it: responses and teacher scores in, the next student out.

Shapes: N response tokens of a micro-batch.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import SCHEMA_VERSION, checkpoint, store
from opdctl.batches import Padded, by_token_budget, pad
from opdctl.config import Train, settings_of
from opdctl.errors import ExitCode, OpdctlError
from opdctl.logprobs import response_logprobs
from opdctl.model import load
from opdctl.objectives import Objective
from opdctl.records import Scored
from opdctl.registry import OBJECTIVES, WEIGHTS
from opdctl.run import Run
from opdctl.scored import read_scored
from opdctl.store import Fingerprint
from opdctl.weights import Weight

OF_THE_UPDATE = ("loss", "ratio", "clip_share", "dual_clip_share")


@dataclass(frozen=True)
class MicroBatch:
    """Whole responses, padded, with what is stored of each of their N tokens."""

    samples: list[Scored]
    padded: Padded
    rollout_logp_N: Tensor
    teacher_logp_N: Tensor
    weight_N: Tensor


class Trainer:
    """The student in training; goes from step to step and keeps model and optimizer between them."""

    def __init__(self, run: Run, device: str):
        self._run, self._device, self._settings = run, device, run.recipe.train
        self._weight: Weight = WEIGHTS.build(run.recipe.weight.name, run.recipe.weight.params)
        self._objective: Objective = OBJECTIVES.build(run.recipe.objective.name, run.recipe.objective.params)
        # Master weights are float32 whatever the export's type: an update of 1e-5 is lost in bfloat16.
        self._model = load(run.student, device=device, dtype="float32")
        if self._settings.gradient_checkpointing:
            _recompute_activations(self._model)
        self._optimizer = _adamw(self._model, self._settings)
        if step := run.current_step():
            folder = run.trainer_path(step)
            store.check_directory(folder, run.update(step - 1)["trainer"])
            checkpoint.restore(folder, self._model, self._optimizer)

    def step(self, step: int) -> dict[str, Any]:
        """Update the student on the responses of `step`, write what comes of it, and return the step's metrics.

        Raises OpdctlError (code 3) when an artifact is damaged, or the loss or the gradient is not finite.
        """
        start = time.monotonic()
        batches = self._micro_batches(list(read_scored(self._run, step)))
        metrics = {"step": step} | self._update(step, batches)
        tokens = sum(len(batch.weight_N) for batch in batches)
        metrics |= {
            "update_seconds": time.monotonic() - start,
            "tokens_per_second": tokens / (time.monotonic() - start),
        }
        self._publish(step, metrics)
        return metrics

    def _micro_batches(self, scored: list[Scored]) -> list[MicroBatch]:
        # Weights need whole responses and, some of them, the whole step: they are taken before anything is batched.
        weights = [self._weight(sample.advantage()) for sample in scored]
        sequences = [(sample.response.prompt_ids, sample.response.response_ids) for sample in scored]
        cut = by_token_budget([len(p) + len(r) for p, r in sequences], self._settings.tokens_per_micro_batch)
        return [
            MicroBatch(
                [scored[i] for i in batch],
                pad([sequences[i] for i in batch], self._device),
                self._column([scored[i].response.logprobs for i in batch]),
                self._column([scored[i].teacher_logprobs for i in batch]),
                self._column([weights[i] for i in batch]),
            )
            for batch in cut
        ]

    def _column(self, values: list[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate(values).astype(np.float32)).to(self._device)

    def _update(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """Make the step's optimizer steps. The old policy is the one before the first, by the trainer's own numbers."""
        tokens = sum(len(batch.weight_N) for batch in batches)
        old_logps: list[Tensor | None] = [None] * len(batches)
        metrics: dict[str, Any] = {}
        for _ in range(self._settings.updates_per_step):
            rate = self._learning_rate(step)
            sums: dict[str, float] = {}
            for index, batch in enumerate(batches):
                old_logps[index], found = self._backward(batch, old_logps[index], tokens)
                sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
            norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm))
            if not math.isfinite(norm):
                raise _not_finite(self._run, f"the gradient's norm is {norm}", [])
            self._optimizer.step()
            self._optimizer.zero_grad()
            means = {key: value / max(tokens, 1) for key, value in sums.items()}
            # k1 and the like describe the policy that drew the responses; what OF_THE_UPDATE names, the last update.
            metrics = (metrics or means) | {key: means[key] for key in OF_THE_UPDATE if key in means}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
        responses = [sample.response for batch in batches for sample in batch.samples]
        return metrics | {
            "responses": len(responses),
            "tokens": tokens,
            "response_length": tokens / max(len(responses), 1),
            "truncated_share": sum(r.finish_reason == "length" for r in responses) / max(len(responses), 1),
        }

    def _backward(self, batch: MicroBatch, old_logp_N: Tensor | None, tokens: int) -> tuple[Tensor, dict[str, float]]:
        """Add a micro-batch's gradient. Return the old policy's log-probs and the sums of loss and metrics."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._run.recipe.student.dtype == "bfloat16"):
            logp_N, entropy_N = response_logprobs(
                self._model,
                batch.padded.input_ids_BT,
                batch.padded.rows_N,
                batch.padded.positions_N,
                vocab_size=self._run.student.vocab_size,
            )
        old_logp_N = logp_N.detach() if old_logp_N is None else old_logp_N
        loss, sums = self._objective(
            logp_N=logp_N,
            old_logp_N=old_logp_N,
            rollout_logp_N=batch.rollout_logp_N,
            teacher_logp_N=batch.teacher_logp_N,
            weight_N=batch.weight_N,
        )
        if not torch.isfinite(loss):
            names = [sample.response.sample_id for sample in batch.samples]
            raise _not_finite(self._run, f"the loss is {loss.item()}", names)
        # The step's loss is (sum over all tokens) / (their number). Dividing each sum by that one number gives its
        # gradient whatever the micro-batches; a mean of their means would not.
        (loss / max(tokens, 1)).backward()
        sums |= {"loss": loss.detach(), "entropy": entropy_N.sum()}
        return old_logp_N, {key: float(value) for key, value in sums.items()}

    def _learning_rate(self, step: int) -> float:
        """Set and return the learning rate of a step, counted from 0: linear warm-up, then constant."""
        warmup = self._settings.warmup_steps
        rate = self._settings.learning_rate * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _publish(self, step: int, metrics: dict[str, Any]) -> None:
        """Write trainer state and student, then update.json, which makes them count."""
        run = self._run
        trainer = store.publish_directory(
            run.trainer_path(step + 1), lambda folder: checkpoint.save(folder, self._model, self._optimizer)
        )
        student = store.publish_directory(run.student_path(step + 1), self._export)
        fingerprint = update_fingerprint(run, step)
        record = {
            "schema_version": SCHEMA_VERSION,
            "stage": "update",
            "step": step,
            "settings": dict(fingerprint.settings),
            "inputs": dict(fingerprint.inputs),
            "trainer": trainer,
            "student": student,
            "metrics": metrics,
        }
        store.write_json(run.update_path(step), record)
        store.append_line(run.metrics_path, metrics)

    def _export(self, folder: Path) -> None:
        """Write a plain model directory: weights in the recipe's type, the rest as the student came."""
        dtype = getattr(torch, self._run.recipe.student.dtype)
        # A cast copy of a tied matrix is no longer tied and would be written a second time.
        tied = self._model.all_tied_weights_keys
        state = {name: value.to(dtype) for name, value in self._model.state_dict().items() if name not in tied}
        self._model.config.dtype = dtype
        self._model.generation_config = GenerationConfig()  # the student's own is copied as it is, valid or not
        self._model.save_pretrained(folder, state_dict=state)
        self._run.student.copy_settings(folder)


def update_fingerprint(run: Run, step: int) -> Fingerprint:
    return Fingerprint(
        settings_of(run.recipe, "update"), {"rollout": run.rollout(step).digest, "teacher": run.scores(step).digest}
    )


def _adamw(model: torch.nn.Module, settings: Train) -> torch.optim.AdamW:
    """Return AdamW whose weight decay spares vectors: norms and biases are no weights to be shrunk."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
    )


def _recompute_activations(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, and dropout not: transformers recomputes only layers in training mode, and a
    policy with dropout is another policy than the one that drew the responses."""
    model.gradient_checkpointing_enable()
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)


def _not_finite(run: Run, what: str, samples: list[str]) -> OpdctlError:
    among = f" among {', '.join(samples[:5])}" if samples else ""
    return OpdctlError(
        f"{what}{among}; nothing of this step was kept",
        hint=f"the last student is whole: {run.student_path(run.current_step())}; lower train.learning_rate?",
        code=ExitCode.DATA,
    )
