"""train, one step of it: responses and teacher scores in, the next student out.

Shapes: N response tokens of a micro-batch, C tokens of a chunk, K ids of a top-k support, V vocabulary, D hidden size.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl import SCHEMA_VERSION, checkpoint, store
from opdctl.config import Train, objective_of, settings_of, weight_of
from opdctl.errors import ExitCode, OpdctlError
from opdctl.logprobs import Chunk, Head, output_head, over_chunks, response_states
from opdctl.microbatches import MicroBatch, micro_batches
from opdctl.model import load, load_head
from opdctl.objectives import LARGEST_LOG_RATIO, TokenBatch
from opdctl.run import Run
from opdctl.scored import read_scored
from opdctl.store import Fingerprint

SQUARED = "rollout_correction_squared"
OF_THE_UPDATE = ("loss", "ratio", "clip_share", "dual_clip_share")


@dataclass
class Tally:
    """What chunk after chunk adds up to: the metrics' sums, and the student's log-probs of the sampled tokens."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    logps: list[Tensor] = field(default_factory=list)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value_C in metrics.items():
            total = value_C.detach().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total


class Trainer:
    """The student in training; goes from step to step and keeps model and optimizer between them."""

    def __init__(self, run: Run, device: str):
        self._run, self._device, self._settings = run, device, run.recipe.train
        self._weight, self._objective = weight_of(run.recipe), objective_of(run.recipe)
        self._teacher_heads: dict[str, Head] = {}
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
        batches = self.micro_batches(step)
        metrics = {"step": step} | self._update(step, batches)
        seconds = time.monotonic() - start
        metrics |= {"update_seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        self._publish(step, metrics)
        return metrics

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """Read a step's responses and scores, weigh their tokens, and cut them into micro-batches."""
        scored = list(read_scored(self._run, step))
        return micro_batches(self._run.recipe, step, scored, self._weight, self._objective, self._device)

    def _update(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """Make the step's optimizer steps. The old policy is the one before the first, by the trainer's own numbers."""
        count = sum(len(batch.weight_N) for batch in batches)
        old_logps: list[Tensor | None] = [None] * len(batches)
        metrics: dict[str, Any] = {}
        for _ in range(self._settings.updates_per_step):
            rate = self._learning_rate(step)
            sums: dict[str, float] = {}
            for index, batch in enumerate(batches):
                old_logps[index], found = self._backward(batch, old_logps[index])
                sums = {key: sums.get(key, 0.0) + value for key, value in found.items()}
            norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.max_grad_norm))
            if not math.isfinite(norm):
                raise _not_finite(self._run, f"the gradient's norm is {norm}", [])
            self._optimizer.step()
            self._optimizer.zero_grad()
            means = {key: value / (1 if key == "loss" else max(count, 1)) for key, value in sums.items()}
            # k1 and the like describe the policy that drew the responses; what OF_THE_UPDATE names, the last update.
            metrics = (metrics or means) | {key: means[key] for key in OF_THE_UPDATE if key in means}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
        if (square := metrics.pop(SQUARED, None)) is not None:
            # Of how many tokens of equal weight the truncated importance weights are worth, as a share of all.
            metrics["effective_sample_size"] = metrics["rollout_correction"] ** 2 / max(square, 1e-30)
        responses = [sample.response for batch in batches for sample in batch.samples]
        return metrics | {
            "responses": len(responses),
            "tokens": count,
            "response_length": count / max(len(responses), 1),
            "truncated_share": sum(r.finish_reason == "length" for r in responses) / max(len(responses), 1),
        }

    def _backward(self, batch: MicroBatch, old_logp_N: Tensor | None) -> tuple[Tensor, dict[str, float]]:
        """Add a micro-batch's gradient. Return the old policy's log-probs, the loss, and the sums of the metrics."""
        padded, tally, run = batch.padded, Tally(), self._run
        with torch.autocast(self._device, torch.bfloat16, enabled=run.recipe.student.dtype == "bfloat16"):
            hidden_ND, ids_N = response_states(self._model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
        teacher_hidden_ND = self._teacher_states(batch)

        def use(chunk: Chunk) -> Tensor:
            old_logp_C = chunk.picked_CK[:, 0].detach() if old_logp_N is None else old_logp_N[chunk.rows]
            loss_C, metrics = self._objective(self._token_batch(batch, chunk, old_logp_C, teacher_hidden_ND))
            # What describes tokens whatever the objective; A by the trainer's numbers, on the sampled token.
            advantage_C = batch.teacher_logp_N[chunk.rows] - old_logp_C
            common = {"k1": -advantage_C, "abs_advantage": advantage_C.abs(), "weight": batch.weight_N[chunk.rows]}
            mismatch = _mismatch(old_logp_C - batch.rollout_logp_N[chunk.rows])
            if "rollout_correction" in metrics:
                mismatch[SQUARED] = metrics["rollout_correction"].square()
            tally.add({**metrics, **common, **mismatch, "entropy": chunk.entropy_C()})
            tally.logps.append(chunk.picked_CK[:, 0].detach())
            return (loss_C * batch.share_N[chunk.rows]).sum()

        support = [] if batch.support_ids_NK is None else [batch.support_ids_NK]
        head = output_head(self._model, run.student.vocab_size)
        loss = over_chunks(head, hidden_ND, torch.cat([ids_N[:, None], *support], dim=-1), use)
        if not torch.isfinite(loss):
            names = [sample.response.sample_id for sample in batch.samples]
            raise _not_finite(run, f"the loss is {loss.item()}", names)
        loss.backward()
        sums = {name: float(value) for name, value in tally.sums.items()}
        return torch.cat(tally.logps) if old_logp_N is None else old_logp_N, sums | {"loss": loss.item()}

    def _token_batch(
        self, batch: MicroBatch, chunk: Chunk, old_logp_C: Tensor, teacher_hidden_ND: Tensor | None
    ) -> TokenBatch:
        """Return the chunk's tokens as the objective wants them, with every log-prob of its support."""
        rows, student, teacher = chunk.rows, None, None
        if teacher_hidden_ND is not None:
            head = self._teacher_head(batch.samples[0].response.teacher)
            student, teacher = chunk.logp_CV, head.logits(teacher_hidden_ND[rows]).log_softmax(-1)
        elif batch.teacher_logp_NK is not None:
            student, teacher = chunk.picked_CK[:, 1:], batch.teacher_logp_NK[rows]
        return TokenBatch(
            chunk.picked_CK[:, 0], old_logp_C, batch.rollout_logp_N[rows], batch.target_logp_N[rows], student, teacher
        )

    def _teacher_states(self, batch: MicroBatch) -> Tensor | None:
        """Read the teacher's hidden states of a micro-batch, [N, D], where the objective is of the whole vocabulary."""
        if self._objective.support != "full":
            return None
        readers = [sample.teacher.hidden_states for sample in batch.samples]
        return torch.from_numpy(np.concatenate([read() for read in readers if read is not None])).to(self._device)

    def _teacher_head(self, name: str) -> Head:
        if name not in self._teacher_heads:
            self._teacher_heads[name] = load_head(self._run.models[name], device=self._device)
        return self._teacher_heads[name]

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


def _mismatch(difference_C: Tensor) -> dict[str, Tensor]:
    """Return what tells trainer and rollout engine apart, from log p_trainer - log p_engine of the sampled tokens: the
    ratio, 1 in the mean, and KL(engine || trainer) by the k3 estimator."""
    difference_C = difference_C.clamp(max=LARGEST_LOG_RATIO)
    return {"mismatch_ratio": difference_C.exp(), "mismatch_kl": difference_C.expm1() - difference_C}


def update_fingerprint(run: Run, step: int) -> Fingerprint:
    return Fingerprint(settings_of(run.recipe, "update"), run.inputs(step))


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
