"""The vLLM engine, in the process of `engines/host.py`. No other module imports vLLM. It uses token ids only.

Workarounds for vLLM behavior that opdctl cannot use:

- vLLM samples ids of the output matrix's padding rows: they are masked.
- It stops at the end-of-sequence ids of the model's config: it receives those of the model directory.
- Its log-probs are by default those before temperature and top-p: processed ones are requested.
- Without its tokenizer, which nothing else needs, it knows no stop strings: these are found here, token by token.
- It returns log-probs of the sampled distribution or of the model's own: where both are stored, it scores the response.
- It shortens responses that exceed its maximum length: the length is checked, and too long is an error.
- It multiplies by the output matrix in 16 bits: float32 is requested.
- On a CPU it cannot sample with a seed from a prompt of which a step computes a part: prompts are not split there.
- It reads other weight files beside the model's: it receives a directory without them.
- Its weight reload omits copies, such as the packed output matrix and experts of a CPU: these are rebuilt, and a reload
  is used only after one of the same model left every tensor as in a new instance, to the bit.
- It starts a second instance in a process only where the first left no memory: a new instance has a new process.

vLLM returns no hidden states, and the entire distribution only for small vocabularies. Of a larger one it returns the
log-probs of given ids where its second model runner is in use, which requires a GPU. Settings that require more are
rejected.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import contextlib
import gc
import hashlib
import itertools
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from pydantic import ValidationError

from opdctl import console
from opdctl.artifacts.files import digest_of
from opdctl.artifacts.records import Completion, Ids, Logprobs, RoutedExperts, TokenScores
from opdctl.engines.base import (
    RESUME_HINT,
    SCORED_AT_ONCE,
    EngineContext,
    Handover,
    InOrder,
    Request,
    ScoreRequest,
    sampling_params,
)
from opdctl.engines.stop_strings import StopSearch
from opdctl.errors import OpdctlError, is_out_of_memory, summarize_exception
from opdctl.models.directory import WEIGHT_PATTERNS, ModelDir
from opdctl.models.held_weights import digest_held_weights
from opdctl.models.shapes import read_shape
from opdctl.models.weights import INDEX_FILE, SINGLE_FILE
from opdctl.recipe.schema import ALL_LINEAR, Lora, Recipe, RolloutColumns, Sampling, Score

ENVIRONMENT_DEFAULTS = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked worker cannot use a GPU that this process has used
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process has no other work: a second one would only start later
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # _max_model_len checks the recipe's value
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is nearly all memory per engine, which the trainer needs too
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same cores
}


for _name, _value in ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)


# vLLM applies VLLM_LOGGING_LEVEL when the first engine starts; earlier warnings would be printed.
getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
getLogger("vllm.logging_utils.dump_input").disabled = True  # before an error, it prints the entire configuration


try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm
        from vllm.config.lora import MaxLoRARanks
        from vllm.distributed import get_pp_group
        from vllm.lora.layers import LogitsProcessorWithLoRA
        from vllm.lora.request import LoRARequest
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.sampling_params import RequestOutputKind
except ImportError as error:
    raise OpdctlError(
        "missing_package",
        f"the engine `vllm` requires vLLM: {summarize_exception(error)}",
        hint="run `pip install 'opdctl[vllm]'`, or set engine = \"transformers\"",
    ) from error


IS_CPU = vllm.platforms.current_platform.is_cpu()
if IS_CPU:
    # It would move all memory of the process to one NUMA node, and print that.
    torch.ops._C.init_cpu_memory_env = lambda nodes: None  # type: ignore[attr-defined]


OVERWRITTEN = 0.71  # any number that is no weight's usual value
PACKED, IDENTITY_ROWS = " (packed)", 1024
CHECKED_BATCH, CHECKED_TOKENS = 8, 4  # responses that are sampled at the start, and the tokens of each
PROBE_TOKENS = 32
KNOWN_DIFFERENCES = {
    "cohere2": "sliding windows are one token longer",
    "gemma2": "attention logits are capped, which it does in its eager attention only",
    "nemotron_h": "time steps have no minimum",
}
"""What vLLM 0.32 computes otherwise than transformers 5.19, by model type."""
CACHE_ADVICE = "Try increasing `gpu_memory_utilization`"  # vLLM's, on any device; opdctl's environment decides on a CPU
CACHE_HINT = (
    "set the environment variable VLLM_CPU_KVCACHE_SPACE to more than its "
    f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB, or reduce vllm.max_model_len"
    if IS_CPU
    else "raise vllm.gpu_memory_utilization or vllm.tensor_parallel_size, or reduce vllm.max_model_len"
)
ADAPTER_HINT = "set vllm.enable_lora = false: vLLM then loads the merged weights"
OUTPUT_MATRIX = "lm_head"
MAX_TEMPERATURE = 2.0  # vLLM refuses higher ones
ROUTED_EXPERTS = "enable_return_routed_experts"  # requires vLLM's second model runner
GIVEN_IDS = "prompt_logprob_token_ids"  # an argument that is new in vLLM 0.32
SMALL_VOCABULARY_IDS = 4096  # up to this size, vLLM is asked for the log-prob of every id


_END: Any = object()
_Prompt = tuple[Ids, dict[str, Any], Callable[[Any], Any]]
"""Token ids, sampling parameters, and a function of vLLM's output that returns the result, another prompt whose output
gives it, or None if it needs further output."""


class VllmEngine(InOrder):
    """Generates and scores with vLLM in this process."""

    batches_across_parts = True
    _llm: Any = None
    _returns_experts = False
    _can_reload: bool | None = None  # None: not known yet
    _uses_adapters = False
    _adapter: Any = None  # of the student, as a LoRARequest
    _base_digests: list[str] | None = None  # of the weights below adapters, which do not change
    _sleep_level = 0

    def __init__(self, model: ModelDir, context: EngineContext):
        student, self._adapter_numbers = model, itertools.count(1)
        self._uses_adapters = _uses_adapters(context)
        if self._uses_adapters:
            model = model.base or model
        self._model = self._base = model
        if difference := KNOWN_DIFFERENCES.get(model.config.get("model_type", "")):
            console.warn(
                f"{model.path}: vLLM differs from transformers: {difference}. pipeline.max_logprob_rms compares"
            )
        arguments = _engine_arguments(model, context)
        self._returns_experts = ROUTED_EXPERTS in arguments
        hint = "see the recipe's section [vllm]"
        if model.is_quantized and model.dtype == "float32":
            hint = 'set dtype = "bfloat16" for this model: most kernels for quantized weights need 16 bits'
        try:
            with (
                _translate_errors(f"{model.path}: vLLM cannot start", hint),
                _without_unused_weights(model) as path,
            ):
                self._llm = vllm.LLM(model=str(path), **arguments)
                self._max_tokens = self._llm.llm_engine.model_config.max_model_len - 1  # see _max_model_len
                has_argument = GIVEN_IDS in vllm.SamplingParams.__struct_fields__
                self._scores_given_ids = has_argument and self._llm.llm_engine.vllm_config.use_v2_model_runner
                core = getattr(self._llm.llm_engine.engine_core, "engine_core", None)
                executor = getattr(core, "model_executor", None)
                self._workers = [worker.proc for worker in getattr(executor, "workers", [])]
                is_masked = self._llm.collective_rpc("opdctl_mask", args=(model.vocab_size,))
            if not all(is_masked):
                raise OpdctlError(
                    "unsupported_model", f"{model.path}: vLLM computes its logits where opdctl cannot mask padding rows"
                )
            self._check_batches(hint)
            if self._uses_adapters:
                self._load_adapter(student)
            self.logprob_metadata = self._describe_logprobs()
        except BaseException:
            self.close()
            raise

    def _check_batches(self, hint: str) -> None:
        """Raise OpdctlError unless the log-probs of a response in a batch are those of the response alone.

        hint: of the error if vLLM fails.
        """
        prompts = [_probe_ids(self._model, 2 + row, row) for row in range(CHECKED_BATCH)]
        tokens = min(CHECKED_TOKENS, self._max_tokens - len(prompts[-1]))
        if tokens < 1:
            return
        requests = [Request(prompt, row) for row, prompt in enumerate(prompts)]
        with _translate_errors(f"{self._model.path}: vLLM cannot run this model", hint):
            *_, sampled = self.generate(requests, Sampling(max_tokens=tokens), CHECKED_BATCH, lambda n: None)
            (alone,) = self.score([ScoreRequest(prompts[-1], sampled.response_ids)], Score(), lambda n: None)
        difference = float(np.abs(sampled.logprobs - alone.logprobs).max())
        if not difference <= (bound := self._model.logprob_tolerance):  # NaN fails too
            raise OpdctlError(
                "unsupported_model",
                f"{self._model.path}: in vLLM the log-probs of a response depend on the rest of its batch: "
                f"they differ by {difference:.2g} nats from those of the response alone, more than {bound:g}",
                hint='set engine = "transformers"',
            )

    def load_weights(self, model: ModelDir) -> Handover | None:
        """Load the weights of another directory, or return what the process of a new instance receives.

        Whether vLLM replaces every copy of the weights depends on architecture, device and quantization. So the first
        reload, after every parameter was overwritten, is followed by a new instance, which compares.
        """
        if self._uses_adapters:
            if (model.base or model).path != self._base.path:
                return {}
            self._load_adapter(model)
            self.logprob_metadata = self._describe_logprobs()
            return None
        if (model.config, model.vocab_size) != (self._model.config, self._model.vocab_size):
            return {}
        if self._can_reload is False:
            return {"can_reload": False}
        if self._can_reload:
            self._reload(model)
            self.logprob_metadata = self._describe_logprobs()
            return None
        before = self._digests()
        self._reload(model, overwrite=True)
        return {"before": before, "reloaded": self._digests(), "probe": self._score_probe()}

    def _load_adapter(self, student: ModelDir) -> None:
        """Let the following requests use the adapter of a student, and the weights alone if it has none."""
        self._wake_up()
        engine, self._model = self._llm.llm_engine, student
        with _translate_errors(f"{student.path}: vLLM cannot load this adapter", ADAPTER_HINT):
            if self._adapter:
                engine.remove_lora(self._adapter.lora_int_id)
                self._adapter = None
            if student.base:
                number = next(self._adapter_numbers)  # vLLM knows an adapter, and what it has cached for it, by this
                adapter = LoRARequest(f"student-{number}", number, str(student.path / "adapter"))
                engine.add_lora(adapter)
                self._adapter = adapter

    def _describe_logprobs(self) -> dict[str, str]:
        """Return how log-probs are computed, with the digest of the weights that all workers hold."""
        metadata = {"engine": "vllm", "dtype": self._model.dtype, "logprobs": "processed, float32, nats"}
        if not self._model.is_quantized:
            held = self._base_digests or self._llm.collective_rpc("opdctl_held_weights")
            if self._uses_adapters:
                self._base_digests = held
            adapters = self._llm.collective_rpc("opdctl_held_adapter") if self._adapter else []
            metadata["weights"] = digest_of([*held, *adapters])
        return metadata

    def take_over(self, handover: Handover) -> None:
        """Find out whether the instance before this one loaded the weights of this one right, if it did.

        They are right if the digests of all tensors are those of this new instance, and a probe has the same log-probs
        but for rounding. The probe alone would not show a tensor that lacks a small step.
        """
        self._can_reload = handover.get("can_reload")
        if "reloaded" not in handover:
            return
        before, reloaded, right = handover["before"], handover["reloaded"], self._digests()
        wrong = sorted(name for name in reloaded.keys() | right.keys() if reloaded.get(name) != right.get(name))
        nats = float(np.abs(handover["probe"] - self._score_probe()).max())
        if wrong or not nats <= self._model.logprob_tolerance:  # NaN fails too
            self._can_reload = False
            tensors = f"{len(wrong)} tensors, such as {wrong[0]}, and log-probs" if wrong else "log-probs"
            console.warn(
                f"{self._model.path}: after a reload of weights vLLM has {tensors} other than those of a new instance, "
                f"by up to {nats:.2g} nats. Each new student starts one"
            )
        # The overwriting does not reach packed copies: only different weights show that these were replaced.
        elif any(before[name] != right[name] for name in [n for n in right if n.endswith(PACKED)] or [*right]):
            self._can_reload = True

    def _reload(self, model: ModelDir, *, overwrite: bool = False) -> None:
        self._wake_up()
        with _translate_errors(f"{model.path}: vLLM cannot load these weights"), _without_unused_weights(model) as path:
            self._llm.collective_rpc("opdctl_load", args=(str(path), overwrite))
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache cannot be emptied")
        self._model = model

    def _digests(self) -> dict[str, str]:
        """Return the digests of all tensors of all workers."""
        self._wake_up()
        workers = self._llm.collective_rpc("opdctl_digests")
        return {f"{rank}:{name}": digest for rank, found in enumerate(workers) for name, digest in found.items()}

    def _score_probe(self) -> Logprobs:
        """Return the log-probs of fixed ids, which depend on every layer and, most likely, on every expert."""
        ids = _probe_ids(self._model, min(PROBE_TOKENS, self._max_tokens), 0)
        (scores,) = self.score([ScoreRequest(ids[:1], ids[1:])], Score(), lambda n: None)
        return scores.logprobs

    def close(self) -> None:
        """End vLLM's workers, and free the memory of the caches for a process that continues, as tests do."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()

    def release(self, *, keep_weights: bool) -> None:
        """Sleep until the next call: give back the GPU memory of the caches, and of the weights.

        keep_weights: in the CPU's memory. Otherwise the next call loads them, if vLLM's reload is known to be right.
        """
        self._sleep_level = 1 if keep_weights or not self._can_reload else 2
        self._llm.sleep(level=self._sleep_level)

    def _wake_up(self) -> int:
        """Take the memory again, and return the level of the sleep, 0 for none."""
        level, self._sleep_level = self._sleep_level, 0
        if level:
            self._llm.wake_up()
        return level

    def stream_completions(
        self,
        requests: Iterable[Request | None],
        sampling: Sampling,
        batch_size: int,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> Generator[tuple[int, Completion]]:
        if columns.routed_experts and not self._returns_experts:
            raise _unsupported("rollout", "the experts of this model")
        if columns.entropy:
            raise _unsupported("rollout", "the entropy of the sampled distribution")
        if columns.routed_experts and sampling.stop:
            raise _unsupported("rollout", "the experts of a response that ends at a stop string")
        if sampling.temperature > MAX_TEMPERATURE:
            raise OpdctlError(
                "unsupported_setting",
                f"temperature {sampling.temperature:g}: vLLM samples at temperatures up to {MAX_TEMPERATURE:g}",
                hint='reduce it, or set rollout.engine = "transformers"',
            )

        top_k = 0 if columns.sampling_logprobs else columns.top_k
        params: dict[str, Any] = sampling_params(sampling) | {"logprobs": top_k}
        params["stop_token_ids"] = self._model.end_ids(sampling.stop_token_ids)

        def prompts() -> Iterator[_Prompt | None]:
            for request in requests:
                if request is None:
                    yield None
                    continue
                length, limit, stop = len(request.prompt_ids), request.limit(sampling), request.stops(sampling)
                self._check_length(length + limit, f"a prompt of {length} + {limit} tokens")
                own = {"seed": request.seed, "max_tokens": limit}
                convert: Callable[[Any], Any] = partial(_completion, columns=columns, top_k=top_k)
                if stop:
                    own["output_kind"] = RequestOutputKind.DELTA
                    convert = _StopAtString(StopSearch(self._model.tokenizer, stop), top_k)
                if columns.sampling_logprobs:
                    convert = partial(self._score_completion, convert, request, columns)
                yield request.prompt_ids, params | own, convert

        return self._run(prompts(), batch_size)

    def _score_completion(
        self, convert: Callable[[Any], Completion | None], request: Request, columns: RolloutColumns, output: Any
    ) -> _Prompt | None:
        """Return the prompt by which vLLM scores a response that it sampled from another distribution than its own."""
        if (completion := convert(output)) is None:
            return None
        scored = ScoreRequest(request.prompt_ids, completion.response_ids)
        ids, params, read_scores = self._score_prompt(scored, Score(top_k=columns.top_k))

        def join(output: Any) -> Completion:
            scores = read_scores(output)
            top = {"top_ids": scores.top_ids, "top_logprobs": scores.top_logprobs}
            return replace(completion, logprobs=scores.logprobs, sampling_logprobs=completion.logprobs, **top)

        return ids, params, join

    def stream_scores(
        self, requests: Iterable[ScoreRequest | None], settings: Score
    ) -> Generator[tuple[int, TokenScores]]:
        if settings.hidden_states:
            raise _unsupported("score", "hidden states")
        vocab_size = self._model.vocab_size
        if self._needs_distribution(settings) and vocab_size > SMALL_VOCABULARY_IDS:
            feature = "entropies" if settings.entropy else "log-probs of given ids"
            raise _unsupported("score", f"{feature} over {vocab_size} ids, only over {SMALL_VOCABULARY_IDS}")
        prompts = (None if each is None else self._score_prompt(each, settings) for each in requests)
        return self._run(prompts, SCORED_AT_ONCE)

    def _needs_distribution(self, settings: Score) -> bool:
        return settings.entropy or (settings.student_top_k and not self._scores_given_ids)

    def _score_prompt(self, request: ScoreRequest, settings: Score) -> _Prompt:
        needs_distribution = self._needs_distribution(settings)
        gives_ids = self._scores_given_ids and not needs_distribution
        ids = np.concatenate([request.prompt_ids, request.response_ids])
        self._check_length(len(ids), f"a prompt and response of {len(ids)} tokens")
        # vLLM samples at least one token; it is discarded.
        params: dict[str, Any] = {"max_tokens": 1}
        if not gives_ids or settings.top_k:
            params["prompt_logprobs"] = -1 if needs_distribution else settings.top_k
        if gives_ids and len(request.response_ids):
            params[GIVEN_IDS] = _given_ids(request, settings)
            params["prompt_logprob_start"] = len(request.prompt_ids) - 1  # whose successor is the first token
        if self._returns_experts:
            params["routed_experts_prompt_start"] = len(ids)

        def convert(output: Any) -> TokenScores:
            if gives_ids:
                return _scores_of_given_ids(request, output, settings)
            return _scores(request, output.prompt_logprobs, settings, self._model.vocab_size)

        return ids, params, convert

    def _check_not_nan(self, result: Any) -> None:
        # From NaN logits vLLM makes a normal-looking response: token 0 repeated.
        if np.isnan(result.logprobs).any():
            raise OpdctlError("nonfinite_value", f"{self._model.path}: the model produced NaN logits in vLLM")

    def _check_length(self, tokens: int, text: str) -> None:
        if tokens > self._max_tokens:
            raise OpdctlError(
                "unsupported_setting",
                f"vllm.max_model_len: {text} exceeds vLLM's maximum of {self._max_tokens} tokens",
                hint="raise vllm.max_model_len if the model allows it, or reduce the maximum response length",
            )

    def _run(self, prompts: Iterable[_Prompt | None], at_once: int) -> Generator[tuple[int, Any]]:
        """Process all prompts, `at_once` at a time, and yield the number and result of each when it is finished.

        None among the prompts: there is none at the moment.
        """
        if self._wake_up() == 2:
            self._reload(self._model)
        engine, waiting, request_ids = self._llm.llm_engine, iter(prompts), itertools.count()
        numbers, has_more = itertools.count(), True
        running: dict[str, tuple[int, Callable[[Any], Any]]] = {}

        def add(number: int, request: _Prompt) -> None:
            (ids, params, convert), request_id = request, str(next(request_ids))
            prompt = vllm.TokensPrompt(prompt_token_ids=ids.tolist())
            engine.add_request(request_id, prompt, _sampling_params(**params), lora_request=self._adapter)
            running[request_id] = number, convert

        try:
            while True:
                with self._translate_failures():
                    while has_more and len(running) < at_once:
                        prompt = next(waiting, _END)
                        has_more = prompt is not _END
                        if prompt is None or prompt is _END:
                            break
                        add(next(numbers), prompt)
                    if not running:
                        if has_more:
                            continue
                        break
                    outputs = engine.step()
                self.num_passes += 1
                for output in outputs:
                    number, convert = running[output.request_id]
                    if (result := convert(output)) is None:
                        continue
                    del running[output.request_id]
                    with self._translate_failures():
                        if not output.finished:  # it has a stop string, which vLLM does not know
                            engine.abort_request([output.request_id])
                        if isinstance(result, tuple):
                            add(number, result)
                            continue
                    self._check_not_nan(result)
                    yield number, result
        finally:
            engine.abort_request(list(running))  # an interrupted call must leave no request for the next call

    @contextlib.contextmanager
    def _translate_failures(self) -> Iterator[None]:
        """Turn an exception of the running engine into OpdctlError, which names a dead worker and its signal."""
        try:
            yield
        except OpdctlError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise OpdctlError(
                "failed_engine",
                f"{self._model.path}: {self._describe_dead_worker() or f'vLLM failed: {summarize_exception(error)}'}",
                hint=RESUME_HINT,
            ) from error

    def _describe_dead_worker(self) -> str:
        """Return which worker process ended and why, or an empty text."""
        ended = {rank: worker.exitcode for rank, worker in enumerate(self._workers) if worker.exitcode is not None}
        # When one has ended, vLLM ends the others: by itself, or by SIGTERM after a while. So does SIGTERM to a worker.
        causes = {rank: code for rank, code in ended.items() if code not in (0, -signal.SIGTERM)}
        if not causes:
            return f"vLLM's {len(self._workers)} workers were ended" if ended else ""
        rank, code = next(iter(causes.items()))
        if code > 0:
            return f"vLLM's worker {rank} of {len(self._workers)} ended with exit code {code}"
        usual = ": the machine was probably out of memory" if code == -signal.SIGKILL else ""
        return f"vLLM's worker {rank} of {len(self._workers)} was killed by {signal.Signals(-code).name}{usual}"


class WorkerExtension:
    """Methods that run in vLLM's workers, which hold the weights. vLLM adds them to its worker class by name."""

    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    def opdctl_mask(self, vocab_size: int) -> bool:
        """Give ids from `vocab_size` on probability zero, in sampling and scoring; return whether that is possible.

        Of several pipeline stages only the last one computes logits.
        """

        def mask(_module: Any, _arguments: Any, logits_CV: Any) -> None:
            if logits_CV is not None:
                logits_CV[..., vocab_size:] = -torch.inf

        kinds = LogitsProcessor, LogitsProcessorWithLoRA  # which does not call the processor that it wraps
        processors = [module for module in self.get_model().modules() if isinstance(module, kinds)]
        for processor in processors:
            if processor.org_vocab_size > vocab_size:
                processor.register_forward_hook(mask)
        return bool(processors) or not get_pp_group().is_last_rank

    def opdctl_load(self, path: str, overwrite: bool) -> None:
        """Load a directory's weights.

        overwrite: every parameter before, so that those which the load leaves as they are differ from the directory's.
        """
        model = self.get_model()
        for parameter in model.parameters() if overwrite else ():
            if parameter.is_floating_point():
                parameter.data.fill_(OVERWRITTEN)
        methods = [(module, getattr(module, "quant_method", None)) for module in model.modules()]
        kernels = {}
        for _, method in methods:
            if IS_CPU and isinstance(method, UnquantizedFusedMoEMethod):
                # With a kernel, vLLM copies experts as they are in the file over the packed ones.
                kernels[method], method.moe_kernel = method.moe_kernel, None
        self.reload_weights(weights_path=path)
        for method, kernel in kernels.items():
            method.moe_kernel = method.moe_kernel or kernel  # the old one if vLLM loaded no experts, as of gpt-oss
        # On the CPU a layer multiplies by a packed copy of its weights. vLLM does not update the copy of a tied output
        # matrix, because the checkpoint contains no tensor of that name.
        for module, method in methods:
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)

    def opdctl_digests(self) -> dict[str, str]:
        """Return the SHA-256 of every parameter, buffer and packed copy of a weight, by name."""
        model = self.get_model()
        digests = {name: _digest([tensor]) for name, tensor in _parameters_and_buffers(model).items()}
        for name, module, width in _packed_layers(model):
            # Its memory is out of reach. Products with the rows of an identity matrix are the weights, to the bit.
            rows = torch.eye(width, dtype=module.weight.dtype).split(IDENTITY_ROWS)
            digests[name + PACKED] = _digest(module.cpu_linear(row_CD, module.weight, None) for row_CD in rows)
        return digests

    def opdctl_held_weights(self) -> str:
        """Return the digest of this worker's weights. A packed copy is in it by its product with one row."""
        model = self.get_model()
        tensors = _parameters_and_buffers(model)
        for name, module, width in _packed_layers(model):
            row_1D = torch.linspace(-1, 1, width, dtype=module.weight.dtype)[None]
            tensors[name + PACKED] = module.cpu_linear(row_1D, module.weight, None)
        return digest_held_weights(tensors)

    def opdctl_held_adapter(self) -> str:
        """Return the digest of this worker's part of the adapter."""
        return digest_held_weights(_adapter_matrices(self.get_model()))


def _parameters_and_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by name, tied ones once."""
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _adapter_matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the matrices of the loaded adapter by name. They are neither parameters nor buffers."""
    return {
        f"{name}.{key}.{number}": matrix
        for name, module in model.named_modules()
        for key, matrices in vars(module).items()
        if key.endswith(("lora_a_stacked", "lora_b_stacked"))
        for number, matrix in enumerate(matrices)
    }


def _packed_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Yield the name, the layer and its number of inputs for every packed copy of weights, which only CPUs have."""
    for name, module in model.named_modules():
        if hasattr(module, "cpu_linear"):
            yield name, module, getattr(module, "input_size_per_partition", module.input_size)


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _probe_ids(model: ModelDir, count: int, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(0, model.vocab_size, count, np.int32)


@contextlib.contextmanager
def _without_unused_weights(model: ModelDir) -> Iterator[Path]:
    """Yield a directory whose weight files are the model's.

    vLLM reads all `*.safetensors`, or if there is an index those that it names, even beside a `model.safetensors`.
    """
    ignored = {file for pattern in WEIGHT_PATTERNS for file in model.path.glob(pattern)} - {*model.weights.files}
    is_index_used = "transformers_weights" not in model.config and model.path / SINGLE_FILE not in model.weights.files
    ignored -= {model.path / INDEX_FILE} if is_index_used else set()
    if not ignored:
        yield model.path  # vLLM's cache of compiled graphs depends on the path
        return
    with tempfile.TemporaryDirectory(prefix="opdctl-vllm-") as folder:
        for entry in model.path.iterdir():
            if entry not in ignored:
                Path(folder, entry.name).symlink_to(entry)
        yield Path(folder)


@contextlib.contextmanager
def _translate_errors(detail: str, hint: str | None = None) -> Iterator[None]:
    """Turn any exception of vLLM about a model or an argument into OpdctlError, and suppress vLLM's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except OpdctlError:
            raise
        except Exception as error:
            reasons = [entry["msg"] for entry in error.errors()] if isinstance(error, ValidationError) else [str(error)]
            reason = " ".join("; ".join(reasons).split()) or type(error).__name__
            needed, cache_advice, _ = reason.partition(CACHE_ADVICE)
            if cache_advice:
                raise OpdctlError("out_of_memory", f"{detail}: {needed.strip()}", hint=CACHE_HINT) from error
            raise OpdctlError("unsupported_model", f"{detail}: {reason}", hint=hint) from error


def _unsupported(section: str, feature: str) -> OpdctlError:
    return OpdctlError(
        "unsupported_setting",
        f"{section}: vLLM does not return {feature}",
        hint=f'set {section}.engine = "transformers"',
    )


def _uses_adapters(context: EngineContext) -> bool:
    """Whether the engine is the student's and loads adapters."""
    return context.recipe.vllm.enable_lora and context.settings == context.recipe.student


def _engine_arguments(model: ModelDir, context: EngineContext) -> dict[str, Any]:
    """Return the arguments to vLLM's engine besides `model`."""
    settings = context.recipe.vllm
    parallel = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
    }
    arguments: dict[str, Any] = {name: size for name, size in parallel.items() if size > 1}
    if context.recipe.spans_nodes("vllm"):
        arguments["distributed_executor_backend"] = "ray"
    if context.device == "cuda":
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.enable_sleep_mode:
        arguments["enable_sleep_mode"] = True
    if context.recipe.rollout.routed_experts and context.settings == context.recipe.student:
        if context.device == "cpu":
            raise _unsupported("rollout", "the experts of a model on a CPU")
        arguments[ROUTED_EXPERTS] = True
    if _uses_adapters(context):
        arguments |= _adapter_arguments(model, context.recipe.lora)
    if model.dtype != "float32":
        # In 16 bits the product of hidden states and output matrix is too inaccurate for log-probs.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    max_model_len = _max_model_len(model, context.recipe)
    max_num_batched_tokens = settings.max_batched_tokens(context.device)
    if IS_CPU:
        # vLLM discards the token that it samples after a part of a prompt, and then rewinds the request's generator of
        # random numbers, which torch cannot do on a CPU.
        arguments["enable_chunked_prefill"] = False
        max_num_batched_tokens = max(max_num_batched_tokens, max_model_len)
    return arguments | {
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # vLLM's neutral defaults; the recipe has all sampling settings
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled
        "max_logprobs": -1,
        "max_model_len": max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        **settings.engine_args,
    }


def _adapter_arguments(model: ModelDir, lora: Lora) -> dict[str, Any]:
    """Return the arguments of an engine that loads adapters: one at a time, on the layers that have one."""
    ranks: tuple[int, ...] = get_args(MaxLoRARanks)  # those that it has kernels for
    targets = sorted({name.rpartition(".")[2] for name in lora.target_modules})
    shape, reason = read_shape(model), ""
    if lora.rank > max(ranks):
        reason = f"vLLM loads adapters of a rank up to {max(ranks)}; lora.rank is {lora.rank}"
    elif OUTPUT_MATRIX in targets:
        reason = f"with an adapter of `{OUTPUT_MATRIX}`, which lora.target_modules contains, vLLM scores wrongly"
    elif shape and shape.num_experts > 1:
        reason = f"{model.path} is a mixture of experts, whose adapters vLLM reads in another form than peft's"
    if reason:
        raise OpdctlError("unsupported_setting", f"vllm.enable_lora: {reason}", hint=ADAPTER_HINT)
    if IS_CPU:
        console.warn("vllm.enable_lora: on a CPU vLLM samples with an adapter several times slower than merged")
    arguments = {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(each for each in ranks if each >= lora.rank)}
    if ALL_LINEAR in lora.target_modules:
        return arguments
    return arguments | {"lora_target_modules": targets}


def _max_model_len(model: ModelDir, recipe: Recipe) -> int:
    """Return the recipe's maximum sequence length in tokens, at most the model's, plus one.

    vLLM scores a sequence only if one more token can be sampled after it. That token is never fed back.
    """
    limit = getattr(model.text_config, "max_position_embeddings", None)
    max_model_len = recipe.vllm.max_model_len
    if max_model_len is None:
        max_model_len = recipe.prompts.max_tokens + max(recipe.rollout.max_tokens, recipe.eval.max_tokens)
        max_model_len = min(max_model_len, limit or max_model_len)
    elif limit and max_model_len > limit:
        raise OpdctlError(
            "unsupported_setting", f"vllm.max_model_len: {max_model_len} exceeds the {limit} tokens of {model.path}"
        )
    rope = getattr(model.text_config, "rope_parameters", None) or {}
    original = rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else math.inf
    if max_model_len >= original:
        raise OpdctlError(
            "unsupported_setting",
            f"vllm.max_model_len: {max_model_len} for {model.path}, whose `longrope` has factors for up to {original} "
            "tokens and others for more; vLLM would use the others for short sequences too, unlike transformers",
            hint=f"set it to at most {original - 1}, or use the engine transformers",
        )
    return max_model_len + 1


def _sampling_params(**settings: Any) -> Any:
    # ignore_eos: only the ids in stop_token_ids end a sequence.
    # FINAL_ONLY: by default each step copies each unfinished response.
    fixed = {"ignore_eos": True, "detokenize": False, "flat_logprobs": True}
    return vllm.SamplingParams(**({"output_kind": RequestOutputKind.FINAL_ONLY} | fixed | settings))


def _logprob_table(flat: Any, ids_T: Ids, first: int, top_k: int) -> tuple[Ids, Logprobs]:
    """Return vLLM's ids and log-probs at positions from `first` on, [T, E], with the token itself in column 0."""
    if not len(ids_T):
        return np.zeros((0, 1 + top_k), np.int32), np.zeros((0, 1 + top_k), np.float32)
    span = slice(flat.start_indices[first], flat.end_indices[first + len(ids_T) - 1])
    ids_TE = np.array(flat.token_ids[span], np.int32).reshape(len(ids_T), -1)
    logp_TE = np.array(flat.logprobs[span], np.float32).reshape(ids_TE.shape)
    if not np.array_equal(ids_TE[:, 0], ids_T):
        raise RuntimeError("vLLM returned log-probs of other tokens")
    return ids_TE, logp_TE


def _select_top_k(ids_TE: Ids, logp_TE: Logprobs, top_k: int) -> tuple[Ids, Logprobs]:
    """Return the `top_k` most probable ids in descending order with their log-probs, [T, K]."""
    # Column 0 is the token itself; it occurs again in the other columns if it is among the most probable.
    order_TK = np.argsort(-logp_TE[:, 1:], axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(ids_TE[:, 1:], order_TK, 1), np.take_along_axis(logp_TE[:, 1:], order_TK, 1)


def _completion(result: Any, columns: RolloutColumns, top_k: int) -> Completion:
    output = result.outputs[0]
    ids_T = np.array(output.token_ids, np.int32)
    completion = _sampled(ids_T, _logprob_table(output.logprobs, ids_T, 0, top_k), output.finish_reason, top_k)
    return replace(completion, routed_experts=_routed_experts(result)) if columns.routed_experts else completion


def _sampled(ids_T: Ids, table: tuple[Ids, Logprobs], finish_reason: str, top_k: int) -> Completion:
    ids_TE, logp_TE = table
    top_ids_TK, top_logp_TK = _select_top_k(ids_TE, logp_TE, top_k) if top_k else (None, None)
    reason = "stop" if finish_reason == "stop" else "length"
    return Completion(ids_T, logp_TE[:, 0].copy(), reason, top_ids=top_ids_TK, top_logprobs=top_logp_TK)


class _StopAtString:
    """A response that vLLM returns token by token, until it contains a stop string or ends."""

    def __init__(self, search: StopSearch, top_k: int):
        self._search, self._top_k = search, top_k
        self._ids: list[int] = []
        self._tables: list[tuple[Ids, Logprobs]] = []

    def __call__(self, result: Any) -> Completion | None:
        output = result.outputs[0]
        ids_T = np.array(output.token_ids, np.int32)
        self._tables.append(_logprob_table(output.logprobs, ids_T, 0, self._top_k))
        reason = output.finish_reason
        for token in ids_T.tolist():
            self._ids.append(token)
            if self._search.add(token):
                reason = "stop"
                break
        if reason is None:
            return None
        count, (ids, logps) = len(self._ids), zip(*self._tables, strict=True)
        table = np.concatenate(ids)[:count], np.concatenate(logps)[:count]
        return _sampled(np.array(self._ids, np.int32), table, reason, self._top_k)


def _routed_experts(result: Any) -> RoutedExperts:
    """Return the experts of the prompt and of all response tokens but the last, which the model has not read."""
    output = result.outputs[0]
    count = len(result.prompt_token_ids) + len(output.token_ids) - 1
    if output.routed_experts is None or len(output.routed_experts) < count:
        found = 0 if output.routed_experts is None else len(output.routed_experts)
        raise RuntimeError(f"vLLM returned the experts of {found} of {count} tokens")
    return np.ascontiguousarray(output.routed_experts[:count]).reshape(-1).view(np.uint8)


def _given_ids(request: ScoreRequest, settings: Score) -> Ids:
    """Return the ids to score at each token, [T, 1 + K]: the token itself, and the student's most probable ones."""
    ids_T1 = request.response_ids[:, None]
    if not settings.student_top_k:
        return ids_T1
    assert request.top_ids is not None
    return np.concatenate([ids_T1, request.top_ids], axis=1)


def _scores_of_given_ids(request: ScoreRequest, output: Any, settings: Score) -> TokenScores:
    width = 1 + (request.top_ids.shape[1] if settings.student_top_k and request.top_ids is not None else 0)
    shape = (len(request.response_ids), width)
    logp_TK = output.prompt_token_id_logprobs if shape[0] else np.zeros(shape, np.float32)
    if logp_TK is None or logp_TK.shape != shape:
        raise RuntimeError(f"vLLM returned no log-probs of {shape[0]} tokens")
    columns: dict[str, Any] = {"logprobs": np.array(logp_TK[:, 0], np.float32)}
    if settings.student_top_k:
        columns["student_top_logprobs"] = np.array(logp_TK[:, 1:], np.float32)
    if settings.top_k:
        start = len(request.prompt_ids)
        ids_TE, logp_TE = _logprob_table(output.prompt_logprobs, request.response_ids, start, settings.top_k)
        columns["top_ids"], columns["top_logprobs"] = _select_top_k(ids_TE, logp_TE, settings.top_k)
    return TokenScores(**columns)


def _scores(request: ScoreRequest, flat: Any, settings: Score, vocab_size: int) -> TokenScores:
    ids_TE, logp_TE = _logprob_table(flat, request.response_ids, len(request.prompt_ids), settings.top_k)
    columns: dict[str, Any] = {"logprobs": logp_TE[:, 0].copy()}
    if settings.top_k:
        columns["top_ids"], columns["top_logprobs"] = _select_top_k(ids_TE, logp_TE, settings.top_k)
    if settings.entropy or settings.student_top_k:
        logp_TV = np.full((len(ids_TE), max(vocab_size, int(ids_TE.max(initial=0)) + 1)), -np.inf, np.float32)
        np.put_along_axis(logp_TV, ids_TE, logp_TE, 1)
        logp_TV = logp_TV[:, :vocab_size]
        if settings.entropy:
            terms_TV = np.exp(logp_TV) * np.maximum(logp_TV, np.finfo(np.float32).min)
            columns["entropies"] = np.maximum(-terms_TV.sum(1), 0)
        if settings.student_top_k:
            assert request.top_ids is not None
            columns["student_top_logprobs"] = np.take_along_axis(logp_TV, request.top_ids.astype(np.int64), 1)
    return TokenScores(**columns)
