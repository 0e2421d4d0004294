"""train, one step of it: responses and teacher scores in, the next student out.

Shapes: N response tokens of a micro-batch, C tokens of a chunk, K ids of a top-k support, V vocabulary, D hidden size.
"""

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from opdctl import SCHEMA_VERSION, card, checkpoint, dist, log, policy, store
from opdctl.config import Train, objective_of, settings_of, weight_of
from opdctl.errors import ExitCode, OpdctlError, is_out_of_memory
from opdctl.logprobs import Chunk, Head, output_head, over_chunks, response_states
from opdctl.microbatches import MicroBatch, halved, micro_batches, own_share
from opdctl.model import load_head
from opdctl.objectives import LARGEST_LOG_RATIO, TokenBatch
from opdctl.records import Scored, sample_seed
from opdctl.run import Run
from opdctl.scored import check_ids, read_scored
from opdctl.store import Fingerprint

SQUARED = "rollout_correction_squared"
QUANTILES = (0.5, 0.9, 0.99)
HALVINGS = 6  # times that micro-batches are halved at most where memory does not suffice
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
        self._budget = self._settings.tokens_per_micro_batch
        self._weight, self._objective = weight_of(run.recipe), objective_of(run.recipe)
        self._teacher_heads: dict[str, Head] = {}
        self._model = policy.policy(run.student, run.recipe, device)
        self._optimizer = _adamw(self._model, self._settings)
        self._restore(run.current_step())

    def _restore(self, done: int) -> None:
        """Take up the newest state that is whole, and make the updates since then once more, from their artifacts."""
        run = self._run
        saved = dist.share(newest_state(run, done) if dist.is_main() else 0)
        if past := [step for step in run.earlier if saved < step]:
            raise OpdctlError(
                f"{run.path / 'trainer'}: no whole state since the recipe was changed at step {max(past)}, and the "
                "updates before cannot be made once more under the recipe of now",
                hint=f"restore {run.trainer_path(max(past))} from a copy, or start again in another --output",
                code=ExitCode.DATA,
            )
        if saved:
            checkpoint.restore(run.trainer_path(saved), self._model, self._optimizer)
        if saved == done:
            return
        log.say(f"no trainer state of step {done}: making the updates from step {saved} on once more")
        for step in range(saved, done):
            self._update(step, self.micro_batches(step, list(read_scored(run, step))))
        again = _publish_together(run.path / ".again", lambda folder: self._export(folder, done))
        store.remove(run.path / ".again")
        recorded = run.update(done - 1)["student"]
        if dist.is_main() and any(again[name] != recorded[name] for name in again if name != card.FILE):
            log.warn("these updates came out otherwise than before in the last bits; going on from the new ones")

    def step(self, step: int, stage_seconds: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
        """Update the student on the responses of `step`, write what comes of it, and return the step's metrics.

        stage_seconds: what the stages before took, as far as they were made now. Called by all ranks. Raises
        OpdctlError (code 3) when an artifact is damaged, or the loss or the gradient is not finite.
        """
        start = time.monotonic()
        scored = list(read_scored(self._run, step))
        batches = self.micro_batches(step, scored)
        lag = step - self._run.policy_step(step)
        metrics = {"step": step, "lag": lag} | self._update(step, batches) | describe(scored)
        metrics["spoilt_responses"] = self._run.recipe.responses_per_step() - len(scored)
        seconds = dict(stage_seconds) | {"update": time.monotonic() - start}
        for stage, each in seconds.items():
            metrics |= {f"{stage}_seconds": each, f"{stage}_tokens_per_second": metrics["tokens"] / each}
        metrics["peak_memory_gib"] = _peak_memory(self._device)
        self._publish(step, metrics)
        return metrics

    def repair_student(self, step: int) -> None:
        """Write the newest student, that of `step`, once more, by the state that it was made of.

        Raises OpdctlError (code 3) where it comes out otherwise than recorded.
        """
        path, record = self._run.student_path(step), self._run.update(step - 1)

        def fill(folder: Path) -> None:
            self._export(folder, step, record["metrics"])
            if dist.is_main() and store.is_whole(path / card.FILE, record["student"][card.FILE]):
                store.copy(path / card.FILE, folder)  # it tells of settings that may have changed since

        found = _publish_together(path, fill)
        if dist.is_main() and found != record["student"]:
            raise store.damaged(path, "made again it is another student", "start again in another --output")

    def micro_batches(self, step: int, scored: list[Scored]) -> list[MicroBatch]:
        """Weigh a step's tokens, cut them into micro-batches, and return this rank's."""
        check_ids([sample.response for sample in scored], self._run.student)
        settings = self._settings.model_copy(update={"tokens_per_micro_batch": self._budget})
        recipe = self._run.recipe.model_copy(update={"train": settings})
        batches = micro_batches(recipe, step, scored, self._weight, self._objective, self._device)
        return own_share(batches, dist.rank(), dist.world())

    def _update(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """Make the step's optimizer steps. The old policy is the one before the first, by the trainer's own numbers."""
        torch.manual_seed(sample_seed(self._run.recipe.seed, f"update {step} {dist.rank()}"))  # for adapters' dropout
        metrics: dict[str, Any] = {}
        for _ in range(self._settings.updates_per_step):
            rate = self._set_learning_rate(step)
            batches, sums = self._gradient(batches)
            norm = self._optimizer_step()
            sums = dist.totals(sums)
            count = max(sums.pop("tokens"), 1)
            means = {key: value / (1 if key == "loss" else count) for key, value in sums.items()}
            # k1 and the like describe the policy that drew the responses; what OF_THE_UPDATE names, the last update.
            metrics = (metrics or means) | {key: means[key] for key in OF_THE_UPDATE if key in means}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
        if (square := metrics.pop(SQUARED, None)) is not None:
            # Of how many tokens of equal weight the truncated importance weights are worth, as a share of all.
            metrics["effective_sample_size"] = metrics["rollout_correction"] ** 2 / max(square, 1e-30)
        return metrics

    def _gradient(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], dict[str, float]]:
        """Add up the gradient of the micro-batches, of smaller ones where memory does not suffice: it stays the same.

        Returns them with the old policy's log-probs, and the sums of the metrics. Raises OpdctlError (code 5).
        """
        for _ in range(HALVINGS + 1):
            try:
                return self._backward_all(batches)
            except (RuntimeError, MemoryError) as error:
                # Other ranks wait within a layer that is gathered, and cannot be told.
                if dist.world() > 1 or not is_out_of_memory(error):
                    raise
            self._optimizer.zero_grad()
            if all(len(batch.samples) == 1 for batch in batches):
                break
            batches = [half for batch in batches for half in halved(batch)]
            self._budget = max(batch.padded.input_ids_BT.numel() for batch in batches)
            log.warn(f"out of memory: going on with half as large micro-batches, of {self._budget} tokens at most")
        raise OpdctlError(
            f"out of memory in an update, with micro-batches of {max(len(b.samples) for b in batches)} responses",
            hint="train.gradient_checkpointing, train.cpu_offload or [lora] need less, and so do more processes",
            code=ExitCode.REACH,
        )

    def _backward_all(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], dict[str, float]]:
        done, sums = [], dict[str, float]()
        for batch in batches:
            old_logp_N, found = self._backward(batch)
            done.append(replace(batch, old_logp_N=old_logp_N))
            sums = {key: sums.get(key, 0.0) + value * batch.counts for key, value in found.items()}
        return done, sums

    def _optimizer_step(self) -> float:
        """Update the parameters and return the gradient's norm. Raises OpdctlError when that is not finite."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        norm = float(dist.whole(torch.nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm)))
        if not math.isfinite(norm):
            raise _not_finite(self._run, f"the gradient's norm is {norm}", [])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _backward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """Add a micro-batch's gradient. Return the old policy's log-probs, the loss, and the sums of the metrics."""
        padded, old_logp_N, tally, run = batch.padded, batch.old_logp_N, Tally(), self._run
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
        sums |= {"loss": loss.item(), "tokens": len(batch.share_N)}
        return torch.cat(tally.logps) if old_logp_N is None else old_logp_N, sums

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

    def _set_learning_rate(self, step: int) -> float:
        rate = learning_rate(self._settings, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _publish(self, step: int, metrics: dict[str, Any]) -> None:
        """Write trainer state and student, then update.json, which makes them count."""
        run, done, trainer = self._run, step + 1, {}
        if dist.is_main() and run.update_path(step).exists():  # this process was suspended, and lost its claim
            raise OpdctlError(f"{run.path}: another process has made step {done} meanwhile", code=ExitCode.REACH)
        if done % self._settings.save_every == 0 or done == self._settings.steps:
            trainer = _publish_together(
                run.trainer_path(done), lambda folder: checkpoint.save(folder, self._model, self._optimizer)
            )
        student = _publish_together(run.student_path(done), lambda folder: self._export(folder, done, metrics))
        if dist.is_main():
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
        dist.barrier()

    def _export(self, folder: Path, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        recipe = self._run.recipe
        policy.export(self._model, self._run.student, recipe.student.dtype, folder)
        if dist.is_main():
            card.write(folder, recipe, step, metrics or {})


def newest_state(run: Run, done: int) -> int:
    """Return the step, up to `done`, of the newest saved state that is whole, 0 for none. Names those that are not."""
    for step in range(done, 0, -1):
        recorded, folder = run.update(step - 1)["trainer"], run.trainer_path(step)
        if recorded and folder.is_dir():
            try:
                store.check_directory(folder, recorded)
            except OpdctlError as error:
                log.warn(f"{error.message}: taking the state before it")
            else:
                return step
    return 0


def _publish_together(final: Path, fill: Callable[[Path], None]) -> dict[str, str]:
    """Let every rank write its share into a directory that rank 0 publishes; return its files' digests, there."""

    def together(folder: Path | None) -> None:
        fill(cast(Path, dist.share(folder)))
        dist.barrier()

    if dist.is_main():
        return store.publish_directory(final, together)
    together(None)
    return {}


def learning_rate(settings: Train, step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear rise, then the schedule's fall, if any.

    A function of the step alone, so going on after a kill needs no state.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    assert settings.decay_steps is not None  # the recipe is refused without
    left = max(0.0, 1 - (step - settings.warmup_steps) / (settings.decay_steps - settings.warmup_steps))
    return settings.learning_rate * (left if settings.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def describe(scored: Sequence[Scored]) -> dict[str, float]:
    """Return what a step's responses are like, all ranks' together; A by the stored log-probs, in nats."""
    responses = [sample.response for sample in scored]
    lengths = [len(response.response_ids) for response in responses]
    gaps = [np.abs(sample.teacher.logprobs - sample.response.logprobs) for sample in scored]
    found = {
        "responses": len(responses),
        "tokens": sum(lengths),
        "response_length": sum(lengths) / max(len(responses), 1),
        "truncated_share": sum(r.finish_reason == "length" for r in responses) / max(len(responses), 1),
    }
    if found["tokens"]:
        quantiles = np.quantile(np.concatenate(gaps), QUANTILES)
        found |= {f"abs_advantage_p{q * 100:.0f}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    return found


def _peak_memory(device: str) -> float:
    """Return the most memory that this process has held so far, in GiB: the GPU's, or its resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _mismatch(difference_C: Tensor) -> dict[str, Tensor]:
    """Return what tells trainer and rollout engine apart, from log p_trainer - log p_engine of the sampled tokens: the
    ratio, 1 in the mean, and KL(engine || trainer) by the k3 estimator."""
    difference_C = difference_C.clamp(max=LARGEST_LOG_RATIO)
    return {"mismatch_ratio": difference_C.exp(), "mismatch_kl": difference_C.expm1() - difference_C}


def update_fingerprint(run: Run, step: int) -> Fingerprint:
    return Fingerprint(settings_of(run.recipe, "update"), run.inputs(step))


def _adamw(model: torch.nn.Module, settings: Train) -> torch.optim.AdamW:
    """Return AdamW whose weight decay spares vectors: norms and biases are no weights to be shrunk."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        fused=True,  # no temporary copies of all parameters
    )


def _not_finite(run: Run, what: str, samples: list[str]) -> OpdctlError:
    among = f" among {', '.join(samples[:5])}" if samples else ""
    return OpdctlError(
        f"{what}{among}; nothing of this step was kept",
        hint=f"the last student is whole: {run.student_path(run.current_step())}; lower train.learning_rate?",
        code=ExitCode.DATA,
    )
