"""One training step: scored responses in, the next student out.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from opdctl import console, distributed, signals
from opdctl.artifacts import files
from opdctl.artifacts.manifests import ProbeRecord
from opdctl.artifacts.records import Logprobs, ScoredResponse, sample_seed
from opdctl.artifacts.stage_dir import Fingerprint
from opdctl.artifacts.tensor_files import CreateFile, create_on_disk
from opdctl.errors import OpdctlError, is_out_of_memory
from opdctl.losses.objectives import TokenBatch
from opdctl.losses.token_weights import Uniform, Weight
from opdctl.models import packing
from opdctl.models.batching import SequenceBatch, pad_batch
from opdctl.models.loading import load_head
from opdctl.models.logprobs import Chunk, Head, map_vocab_chunks, output_head, response_states
from opdctl.models.routing import Routers
from opdctl.models.shapes import attention_span, read_shape
from opdctl.models.startup import measure_stage, measure_startup
from opdctl.recipe.components import build_objective, build_token_weight, reads_trainer_logprobs
from opdctl.registry import plugin_errors
from opdctl.runs.fork import new_run_command
from opdctl.runs.phases import phases_of_student
from opdctl.runs.run import Run, UnrecordedUpdate
from opdctl.runs.scored_responses import check_ids, read_scored
from opdctl.training import checkpoint, policy, publish, sharding, writing
from opdctl.training.adapters import adapters_disabled, set_dropout
from opdctl.training.base_scorer import BaseScorer
from opdctl.training.division import Division
from opdctl.training.export import StudentExporter
from opdctl.training.metrics import (
    ROLLOUT_CORRECTION_SQUARED,
    MetricSums,
    mismatch_metrics,
    peak_memory_gib,
    response_stats,
)
from opdctl.training.microbatches import MicroBatch, TokenSupport, make_micro_batches, read_support, split_in_half
from opdctl.training.optimizer import learning_rate, make_adamw
from opdctl.training.router_replay import given_experts, token_places

_T = TypeVar("_T")
MAX_OOM_SPLITS = 6  # how often micro-batches are halved after an out-of-memory error
UPDATE_PROBE_TOKENS = 32  # with which an engine shows that it has an updated student
LOW_OVERLAP = 0.3
"""Of the most probable tokens of student and teacher. In arXiv 2604.13016 it grows from 0.7 to 0.9 where distillation
succeeds; on the embedded task it is 0.36 at first."""
ALL_TOKENS_METRICS = ("k1", "abs_advantage", "weight")
"""Metrics that are means over all tokens. The others are means over those that count in the loss."""
LAST_UPDATE_METRICS = ("loss", "ratio", "clip_fraction", "dual_clip_fraction")
"""Metrics of a step's last update. The others describe the policy before the first one."""


class Trainer:
    """The student in training; keeps model and optimizer from step to step. All ranks call every public method."""

    def __init__(self, run: Run, device: str, *, holds_students: bool = False):
        """holds_students: until the next update, keep a student in memory if the run's directory is slow to write."""
        self._holds_students = holds_students and writing.should_hold_students(run.path)
        self._held: writing.HeldStudent | None = None
        self._run, self._device, self._settings = run, device, run.recipe.train
        self._token_budget = self._settings.tokens_per_micro_batch
        self._weight, self._objective = build_token_weight(run.recipe), build_objective(run.recipe)
        self._teacher_heads: dict[str, Head] = {}
        self._model = policy.load_policy(run.student, run.recipe, device)
        self._exporter = StudentExporter(self._model, run.student, run.recipe.student.dtype)
        self._routers = Routers(self._model)
        shape = read_shape(run.student)
        self._attention_span = attention_span(shape) if shape else math.inf
        self._optimizer = make_adamw(self._model, self._settings)
        self._background = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._saving: Future[None] | None = None  # of a trainer state
        self._restore(distributed.call_on_main(run.current_step))

    def _restore(self, done: int) -> None:
        """Load the latest intact checkpoint, and replay the later updates from their stored responses and scores."""
        run = self._run
        saved = distributed.call_on_main(partial(latest_checkpoint, run, done))
        if saved:
            checkpoint.restore(run.trainer_path(saved), self._model, self._optimizer)
        if saved < done:
            console.info(f"no checkpoint for step {done}; replaying updates from step {saved}")
            for step in range(saved, done):
                self._update(step, self.make_micro_batches(step, list(read_scored(run, step))))
            self._check_replay(done)
        if distributed.call_on_main(run.must_rewrite_student):
            self._rewrite_student(done)
        if distributed.call_on_main(run.must_save_trainer_state):
            self._begin_save(done, partial(run.student_digest, done))

    def _check_replay(self, done: int) -> None:
        """Warn if the replayed student is not bit-identical to the recorded one."""
        directory = self._run.path / ".replayed"
        own = writing.write_student(directory, partial(self._export, step=done), flush=False)
        replayed = writing.complete_student(directory, own)
        if not distributed.is_main():
            return
        files.remove_directory(directory)
        recorded = self._run.student_digests(done)
        if any(recorded.get(name) != digest for name, digest in replayed.items()):
            console.warn(
                "replayed updates are not bit-identical to the originals; continuing from the replayed weights"
            )

    def _rewrite_student(self, step: int) -> None:
        """Write the newest student, whose directory is missing, from the checkpoint.

        Raises:
            OpdctlError: the student differs from the recorded one.
        """
        run = self._run
        recorded, metrics = run.student_digests(step), run.update(step - 1)["metrics"]
        console.info(f"writing the missing student of step {step} from its checkpoint")
        path, export = run.student_path(step), partial(self._export, step=step, metrics=metrics)
        own = writing.write_student(path, export, flush=True)
        written = writing.complete_student(path, own)
        if distributed.is_main() and any(recorded.get(name) != digest for name, digest in written.items()):
            why = "the student written from the checkpoint differs from the recorded one"
            raise files.corrupt_artifact(path, why, "start again in another --output")

    def train_step(self, step: int, stage_seconds: Mapping[str, float] = MappingProxyType({})) -> dict[str, Any]:
        """Update the student on the responses of `step`, write the next student, and return the step's metrics.

        stage_seconds: the time of each earlier stage of this step that was made completely just now, and of `startup`.

        Raises:
            OpdctlError: an artifact is corrupt; the loss or the gradient is not finite; memory is insufficient.
        """
        with measure_stage() as times:
            self._run.finish_update()
            self._release_student()
            scored = list(read_scored(self._run, step))
            update_metrics = self._update(step, self.make_micro_batches(step, scored))
        startup = stage_seconds.get("startup", 0.0) + times.startup
        seconds = {**stage_seconds, "update": times.work, "startup": startup}
        metrics = self._step_metrics(step, scored, update_metrics, seconds)
        self._write(step, metrics, self._score_probe())
        torch.cuda.empty_cache()  # engines on the same GPU are other processes
        return metrics

    def make_micro_batches(self, step: int, scored: list[ScoredResponse]) -> list[MicroBatch]:
        """Weight a step's tokens, divide the responses into micro-batches, and return those of this rank."""
        check_ids([sample.response for sample in scored], self._run.student)
        old_logprobs = self._old_logprobs(step, scored) if reads_trainer_logprobs(self._run.recipe) else None
        return self._batches_of_rank(step, scored, self._weight, old_logprobs)

    def base_scorer(self) -> BaseScorer:
        """Return the scorer for a reference that is the student without its adapters."""
        metadata = {"engine": "trainer", "dtype": self._run.student.dtype, "logprobs": "raw, float32, nats"}
        return BaseScorer(self._base_logp_N, metadata, self._division(), self._token_budget, self._device)

    def _base_logp_N(self, sequences: SequenceBatch) -> Tensor:
        with adapters_disabled(self._model):
            logp_N = self._logp_N(sequences)
            sharding.reshard(self._model)
        return logp_N

    def _division(self) -> Division:
        return Division(distributed.world_size(), packing.is_enabled(self._model), self._attention_span)

    def _batches_of_rank(
        self,
        step: int,
        scored: list[ScoredResponse],
        weight: Weight,
        old_logprobs: Mapping[str, Logprobs] | None = None,
    ) -> list[MicroBatch]:
        settings = self._settings.model_copy(update={"tokens_per_micro_batch": self._token_budget})
        recipe = self._run.recipe.model_copy(update={"train": settings})
        inputs = (weight, self._device, old_logprobs, self._division(), distributed.rank())
        return make_micro_batches(recipe, step, scored, *inputs)

    def _old_logprobs(self, step: int, scored: list[ScoredResponse]) -> dict[str, Logprobs]:
        """Return the log-probs of all responses under the student before the step's updates, by sample id, [T] each.

        Every rank computes those of its micro-batches, without gradient and without dropout.

        Raises:
            OpdctlError: one is not finite; memory is insufficient.
        """
        set_dropout(self._model, False)
        _, own = self._with_smaller_batches(self._logprobs_of, self._batches_of_rank(step, scored, Uniform()))
        set_dropout(self._model, True)
        logprobs = {name: logp_T for of_rank in distributed.gather_objects(own) for name, logp_T in of_rank.items()}
        if wrong := [name for name, logp_T in logprobs.items() if not np.isfinite(logp_T).all()]:
            raise _non_finite_error(self._run, "a log-prob of the trainer is not finite", wrong)
        return logprobs

    def _logprobs_of(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], dict[str, Logprobs]]:
        """Return the micro-batches, and the log-probs of their responses by sample id."""
        logprobs: dict[str, Logprobs] = {}
        for batch in batches:
            with self._routing(batch):
                logp_N = self._logp_N(batch.sequences)
            for sample, logp_T in zip(batch.samples, batch.sequences.split(logp_N), strict=True):
                logprobs[sample.response.sample_id] = logp_T.numpy()
        return batches, logprobs

    def _routing(self, batch: MicroBatch) -> AbstractContextManager[None]:
        """Count the routers' choices of experts for a micro-batch, and with router replay give them the rollout's."""
        if not self._routers.experts:
            return nullcontext()
        is_replayed = self._settings.router_replay
        given_NLK = given_experts(batch.samples, batch.sequences, self._routers) if is_replayed else None
        return self._routers.replay(given_NLK, token_places(batch.samples, batch.sequences) & (not batch.is_filler))

    @torch.no_grad()
    def _logp_N(self, sequences: SequenceBatch) -> Tensor:
        """Return the log-probs of a batch's response tokens, [N], in CPU memory."""
        logps: list[Tensor] = []

        def keep_logp(chunk: Chunk) -> None:
            logps.append(chunk.selected_logp_CK[:, 0].cpu())

        hidden_ND, ids_N = self._response_states(sequences)
        head = output_head(self._model, self._run.student.vocab_size, hidden_ND.dtype)
        map_vocab_chunks(head, hidden_ND, ids_N[:, None], keep_logp)
        return torch.cat(logps)

    def _response_states(self, sequences: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Return the hidden state that predicts each response token, [N, D], and the token's id, [N]."""
        signals.check()
        return response_states(
            self._model, sequences.input_ids_BT, sequences.rows_N, sequences.positions_N, sequences.packed
        )

    def _score_probe(self) -> ProbeRecord:
        """Return fixed ids with their log-probs under the updated student, which its engine must reproduce.

        Random ids reach more of the weights than those of a prompt, most experts for example.

        Raises:
            OpdctlError: a log-prob is not finite.
        """
        count = min(UPDATE_PROBE_TOKENS, 1 + self._run.recipe.rollout.max_tokens)  # any engine has room for as many
        ids = np.random.default_rng(0).integers(0, self._run.student.vocab_size, count, np.int32)
        set_dropout(self._model, False)
        logp_N = self._logp_N(pad_batch([(ids[:1], ids[1:])], self._device))
        set_dropout(self._model, True)
        sharding.reshard(self._model)
        if not torch.isfinite(logp_N).all():
            raise _non_finite_error(self._run, "a log-prob of the updated student is not finite", [])
        return {"ids": ids.tolist(), "logprobs": logp_N.tolist()}

    def _step_metrics(
        self, step: int, scored: list[ScoredResponse], update_metrics: dict[str, Any], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        """Return the metrics of the update together with those of the responses, the times and the memory."""
        run = self._run
        metrics = {"step": step, "staleness": step - run.policy_version(step)} | update_metrics | response_stats(scored)
        manifest = run.rollout_stage(step).manifest()
        assert manifest  # the step was scored
        rows = sum(part["rows"] + len(part.get("failed", [])) for part in manifest["parts"])
        metrics["invalid_responses"] = rows - len(scored)
        if "probe_rms" in manifest["logprob_metadata"]:
            metrics["probe_rms"] = float(manifest["logprob_metadata"]["probe_rms"])
        if step == run.start_step and metrics.get("top_k_overlap", 1.0) < LOW_OVERLAP and distributed.is_main():
            console.warn(
                f"student and teacher share only {metrics['top_k_overlap']:.0%} of their most probable tokens in step "
                f"{step}: check the prompts that both read, by --dry-run, or use a teacher nearer to the student"
            )
        for stage, duration in seconds.items():
            metrics[f"{stage}_seconds"] = duration
            if stage != "startup":
                metrics[f"{stage}_tokens_per_second"] = metrics["tokens"] / duration
        metrics["peak_memory_gib"] = peak_memory_gib(self._device)
        return metrics

    def _update(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """Make the step's optimizer updates and return their metrics.

        The old policy of the ratio is the one before the first update, by the trainer's own log-probs.
        """
        seed = sample_seed(self._run.recipe.seed, f"update {step} {distributed.rank()}")
        torch.manual_seed(seed)  # for LoRA dropout
        metrics: dict[str, Any] = {}
        for _ in range(self._settings.updates_per_step):
            rate = self._set_learning_rate(step)
            batches, sums = self._with_smaller_batches(self._backward_all, batches)
            norm = self._optimizer_step()
            sums = distributed.all_reduce_sum(sums)
            counts = {key: max(sums.pop(key), 1) for key in ("tokens", "loss_tokens")} | {"loss": 1}
            counts |= dict.fromkeys(ALL_TOKENS_METRICS, counts["tokens"])
            means = {key: value / counts.get(key, counts["loss_tokens"]) for key, value in sums.items()}
            means |= self._routers.metrics(distributed.all_reduce_sum(self._routers.counts()))
            metrics = (metrics or means) | {key: means[key] for key in LAST_UPDATE_METRICS if key in means}
            metrics |= {"grad_norm": norm, "learning_rate": rate}
        if (mean_square := metrics.pop(ROLLOUT_CORRECTION_SQUARED, None)) is not None:
            # Kish's effective sample size of the truncated importance weights, as a fraction of all tokens.
            metrics["effective_sample_size"] = metrics["rollout_correction"] ** 2 / max(mean_square, 1e-30)
        return metrics

    def _with_smaller_batches(
        self, function: Callable[[list[MicroBatch]], tuple[list[MicroBatch], _T]], batches: list[MicroBatch]
    ) -> tuple[list[MicroBatch], _T]:
        """Return what the function returns for the micro-batches; after an out-of-memory error, for smaller ones.

        Neither gradient nor log-probs depend on their size.

        Raises:
            OpdctlError: memory does not suffice for micro-batches of one response.
        """
        for _ in range(MAX_OOM_SPLITS + 1):
            try:
                return function(batches)
            except (RuntimeError, MemoryError) as error:
                # Other ranks wait in the collectives of a sharded layer and cannot be notified.
                if distributed.world_size() > 1 or not is_out_of_memory(error):
                    raise
            sharding.discard_pass(self._model)
            if all(len(batch.samples) == 1 for batch in batches):
                break
            batches = [half for batch in batches for half in split_in_half(batch)]
            self._token_budget = max(batch.sequences.input_ids_BT.numel() for batch in batches)
            console.warn(f"out of memory: retrying with micro-batches of at most {self._token_budget} tokens")
        raise OpdctlError(
            "out_of_memory",
            f"in an update, with micro-batches of {max(len(b.samples) for b in batches)} responses",
            hint="set train.gradient_checkpointing or train.cpu_offload, use [lora], or more processes",
        )

    def _backward_all(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], dict[str, float]]:
        """Accumulate the gradient. Return the micro-batches with the old policy's log-probs, and the metrics' sums."""
        with_old_logp, sums = [], dict[str, float]()
        self._routers.reset_counts()
        for batch in batches:
            with self._routing(batch):
                old_logp_N, batch_sums = self._backward(batch)
            with_old_logp.append(replace(batch, old_logp_N=old_logp_N))
            sums = {key: sums.get(key, 0.0) + value * (not batch.is_filler) for key, value in batch_sums.items()}
        return with_old_logp, sums

    def _optimizer_step(self) -> float:
        """Clip the gradient, update the parameters, and return the gradient norm before clipping.

        Raises:
            OpdctlError: the norm is not finite.
        """
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        norm = float(distributed.full_tensor(torch.nn.utils.clip_grad_norm_(trained, self._settings.max_grad_norm)))
        if not math.isfinite(norm):
            raise _non_finite_error(self._run, f"the gradient norm is {norm}", [])
        self.finish_save()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def _backward(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """Add a micro-batch's gradient. Return the old policy's log-probs, [N], and the sums of loss and metrics.

        Raises:
            OpdctlError: the loss is not finite.
        """
        sums, run = MetricSums(), self._run
        hidden_ND, ids_N = self._response_states(batch.sequences)
        teacher_hidden_ND = self._teacher_states(batch)
        support = read_support(batch.samples, self._objective, self._device)

        def chunk_loss(chunk: Chunk) -> Tensor:
            logp_C = chunk.selected_logp_CK[:, 0].detach()
            old_logp_C = logp_C if batch.old_logp_N is None else batch.old_logp_N[chunk.rows]
            tokens = self._token_batch(batch, chunk, old_logp_C, teacher_hidden_ND, support)
            with plugin_errors(self._objective):
                loss_C, metrics = self._objective(tokens)
            sums.add({**metrics, **_token_metrics(batch, chunk, old_logp_C, metrics)})
            sums.logps.append(logp_C)
            return (loss_C * batch.loss_scale_N[chunk.rows]).sum()

        head = output_head(self._model, run.student.vocab_size, hidden_ND.dtype)
        ids_NK = torch.cat([ids_N[:, None], *([support.ids_NK] if support else [])], dim=-1)
        loss = map_vocab_chunks(head, hidden_ND, ids_NK, chunk_loss, entropy=True)
        if not torch.isfinite(loss):
            sample_ids = [sample.response.sample_id for sample in batch.samples]
            raise _non_finite_error(run, f"the loss is {loss.item()}", sample_ids)
        loss.backward()
        sums.sums["loss"] = loss.detach()
        totals = dict(zip(sums.sums, torch.stack([*sums.sums.values()]).tolist(), strict=True))  # one wait for the GPU
        totals["k1"] -= sum(each.advantage for each in batch.left_out)
        totals["abs_advantage"] += sum(each.abs_advantage for each in batch.left_out)
        totals["loss_tokens"] = len(batch.loss_scale_N)
        totals["tokens"] = totals["loss_tokens"] + sum(each.tokens for each in batch.left_out)
        return torch.cat(sums.logps) if batch.old_logp_N is None else batch.old_logp_N, totals

    def _token_batch(
        self,
        batch: MicroBatch,
        chunk: Chunk,
        old_logp_C: Tensor,
        teacher_hidden_ND: Tensor | None,
        support: TokenSupport | None,
    ) -> TokenBatch:
        """Return the chunk's tokens as the input of the objective, with all log-probs of its support."""
        rows, student_logp, teacher_logp, student_tail = chunk.rows, None, None, None
        if teacher_hidden_ND is not None:
            head = self._teacher_head(batch.samples[0].response.teacher)
            student_logp, teacher_logp = chunk.logp_CV, head.logits(teacher_hidden_ND[rows]).log_softmax(-1)
        elif support:
            student_logp, teacher_logp = chunk.selected_logp_CK[:, 1:], support.teacher_logp_NK[rows]
            student_tail = chunk.tail_logp_C(support.ids_NK[rows])
        return TokenBatch(
            chunk.selected_logp_CK[:, 0],
            old_logp_C,
            batch.sampling_logp_N[rows],
            batch.target_logp_N[rows],
            student_logp,
            teacher_logp,
            student_tail,
        )

    def _teacher_states(self, batch: MicroBatch) -> Tensor | None:
        """Return the teacher's hidden states, [N, D], if the objective needs the full vocabulary."""
        if self._objective.support != "full":
            return None
        readers = [sample.teacher.hidden_states for sample in batch.samples]
        return torch.from_numpy(np.concatenate([read() for read in readers if read is not None])).to(self._device)

    def _teacher_head(self, name: str) -> Head:
        if name not in self._teacher_heads:
            with measure_startup():
                self._teacher_heads[name] = load_head(self._run.models[name], device=self._device)
        return self._teacher_heads[name]

    def _set_learning_rate(self, step: int) -> float:
        rate = learning_rate(self._settings, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _write(self, step: int, metrics: dict[str, Any], probe: ProbeRecord) -> None:
        """Write the next student. Begin to complete the step in the background; `run.finish_update` waits for that.

        The next rollout begins meanwhile, but it writes nothing before the step is complete. After the last step there
        is none: this function waits, and the trainer state is complete before the step is.

        Raises:
            OpdctlError: the disk is full; this process was suspended and lost the lease on the run.
        """
        run, done = self._run, step + 1
        fingerprint = distributed.call_on_main(partial(update_fingerprint, run, step))
        record = {"step": step, "settings": dict(fingerprint.settings), "inputs": dict(fingerprint.inputs)}
        record |= {"probe": probe, "metrics": metrics}
        path, export = run.student_path(done), partial(self._export, step=done, metrics=metrics)
        is_saved, is_last = run.saves_trainer_state(done), done == self._settings.steps
        if self._holds_students and not is_last and writing.has_room(self._exporter.num_bytes):
            self._held = writing.hold_student(path.name, export)
            run.held_students[done] = self._held.directory.path
        student = self._held or writing.write_student(path, export, flush=False)
        state = checkpoint.state_tensors(self._model, self._optimizer) if is_saved and is_last else None
        completing = self._background.submit(writing.complete_update, run, record, student, state)
        run.begin_update(UnrecordedUpdate(step, metrics, probe, completing))
        if is_last:
            run.finish_update()
        elif is_saved:
            self._begin_save(done, completing.result)

    def _begin_save(self, done: int, student: Callable[[], str]) -> None:
        """Write the trainer state in a background thread. Until `finish_save`, nothing may change weights and moments.

        student: returns, on rank 0, the digest of the student of the same step.
        """
        self.finish_save()
        state = checkpoint.state_tensors(self._model, self._optimizer)
        path = self._run.trainer_path(done)
        self._saving = self._background.submit(writing.write_trainer_state, path, state, student)

    def finish_save(self) -> None:
        """Wait until the trainer state that is being written is complete.

        Raises:
            OpdctlError: it could not be written.
        """
        if self._saving:
            self._saving.result()
            self._saving = None

    def close(self) -> None:
        """End the background thread, after it has finished its work. An error of it is left to `finish_save`."""
        self._background.shutdown()
        self._release_student()

    def _release_student(self) -> None:
        """Free the memory of the latest student, which is in the run's directory by now."""
        self._run.held_students.clear()
        if self._held:
            self._held.release()
        self._held = None

    def _export(
        self,
        directory: Path,
        create_file: CreateFile = create_on_disk,
        *,
        step: int,
        metrics: Mapping[str, Any] | None = None,
    ) -> dict[str, int]:
        recipe = self._run.recipe
        sizes = self._exporter.export(directory, create_file)
        if distributed.is_main():
            if template := self._run.chat_templates.get("prompts"):  # transformers and vLLM prefer this file
                (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
            phases = phases_of_student(self._run, step)
            publish.write_model_card(directory, recipe, step, metrics or {}, self._run.student.path, phases)
        return sizes


def latest_checkpoint(run: Run, done: int) -> int:
    """Return the step, up to `done`, of the latest intact checkpoint, 0 if there is none. Warns of corrupt ones.

    Raises:
        OpdctlError: the later updates cannot be replayed: they are before the start of a fork, or their responses were
            removed.
    """
    saved = _latest_intact_checkpoint(run, done)
    if lost := [step for step in range(saved, done) if step in run.removed_steps()]:
        why = f"no intact trainer state since step {saved}, and the responses of step {lost[0]} were removed"
        command = new_run_command(run, [("student.model", run.recipe.student.model, str(run.student_path(done)))])
        path = shlex.quote(str(run.step_path(lost[0])))
        hint = f"restore {path} from a copy, or start a new run from the student: `{command}`"
        raise files.corrupt_artifact(run.trainer_path(done), why, hint)
    return saved


def _latest_intact_checkpoint(run: Run, done: int) -> int:
    for step in range(done, run.start_step - (run.start_step > 0), -1):
        if run.trainer_path(step).is_dir():
            try:
                run.check_trainer_state(step)
            except OpdctlError as error:
                console.warn(f"{error.message}; using the checkpoint before it")
            else:
                return step
    if run.start_step:
        why = "no intact checkpoint since the fork"
        raise files.corrupt_artifact(run.trainer_path(run.start_step), why, "restore it from a copy, or fork again")
    return 0


def _token_metrics(
    batch: MicroBatch, chunk: Chunk, old_logp_C: Tensor, metrics: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the metrics of a chunk's tokens that every objective has, [C] each.

    The advantage is by the trainer's log-probs of the sampled tokens.
    """
    advantage_C = batch.teacher_logp_N[chunk.rows] - old_logp_C
    token_metrics = {"k1": -advantage_C, "abs_advantage": advantage_C.abs(), "weight": batch.weight_N[chunk.rows]}
    token_metrics |= mismatch_metrics(old_logp_C - batch.rollout_logp_N[chunk.rows])
    if "rollout_correction" in metrics:
        token_metrics[ROLLOUT_CORRECTION_SQUARED] = metrics["rollout_correction"].square()
    assert chunk.entropy_C is not None
    return token_metrics | {"entropy": chunk.entropy_C}


def update_fingerprint(run: Run, step: int) -> Fingerprint:
    return Fingerprint(run.fingerprint_settings("update"), run.update_input_digests(step))


def _non_finite_error(run: Run, what: str, sample_ids: list[str]) -> OpdctlError:
    responses = f" in responses {', '.join(sample_ids[:5])}" if sample_ids else ""
    student = run.student_path(run.current_step())
    return OpdctlError(
        "nonfinite_value",
        f"{what}{responses}; this step was not written",
        hint=f"lower train.learning_rate; the last good student is {shlex.quote(str(student))}",
    )
