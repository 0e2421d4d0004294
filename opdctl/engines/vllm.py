"""The vLLM engine, in this process. This is the only module that imports vLLM. It uses token ids only.

Workarounds for vLLM behavior that opdctl cannot use:

- vLLM samples ids of the output matrix's padding rows: they are masked.
- It stops at the end-of-sequence ids of the model's config: it receives those of the model directory.
- Its log-probs are by default those before temperature and top-p: processed ones are requested.
- It shortens responses that exceed its maximum length: the length is checked, and too long is an error.
- It multiplies by the output matrix in 16 bits: float32 is requested.
- It reads other weight files beside the model's: it receives a directory without them.
- Its weight reload omits copies, such as the packed output matrix and experts of a CPU: the packed output matrix is
  rebuilt, and a reload is used only after one of the same model was right to the bit.

vLLM returns no hidden states, and the entire distribution only for small vocabularies. Settings that require more are
rejected.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import contextlib
import gc
import itertools
import math
import os
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from opdctl import console
from opdctl.artifacts.records import Completion, Ids, Logprobs, TokenScores
from opdctl.engines.base import EngineContext, Request, ScoreRequest
from opdctl.errors import OpdctlError, summarize_exception
from opdctl.models.batching import by_token_budget
from opdctl.models.directory import WEIGHT_PATTERNS, ModelDir
from opdctl.models.self_check import LOGPROB_TOLERANCE
from opdctl.models.weights import INDEX_FILE, SINGLE_FILE
from opdctl.recipe.schema import Recipe, RolloutColumns, Sampling, Score

ENVIRONMENT_DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: a killed run leaves no engine process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # _max_model_len checks the recipe's value
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is nearly all memory per engine, which the trainer needs too
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer uses the same threads
}


for _name, _value in ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)


# vLLM applies VLLM_LOGGING_LEVEL when the first engine starts; earlier warnings would be printed.
getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())


try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import core as engine_core
except ImportError as error:
    raise OpdctlError(
        "missing_package",
        f"the engine `vllm` requires vLLM: {summarize_exception(error)}",
        hint="run `pip install 'opdctl[vllm]'`, or set engine = \"transformers\"",
    ) from error


_running: weakref.WeakSet["VllmEngine"] = weakref.WeakSet()
_cleanup = engine_core.cleanup_dist_env_and_memory


def _cleanup_when_last_engine_closes() -> None:
    if not _running:
        _cleanup()


# All engines of a process share its process group; vLLM would destroy it when the first of them shuts down.
engine_core.cleanup_dist_env_and_memory = _cleanup_when_last_engine_closes


if vllm.platforms.current_platform.is_cpu():
    # It would move all memory of the process, the trainer's included, to one NUMA node, and print that.
    torch.ops._C.init_cpu_memory_env = lambda nodes: None  # type: ignore[attr-defined]


CHECKED_BATCH, CHECKED_TOKENS = 8, 4  # responses that are sampled at the start, and the tokens of each
PROBE_TOKENS = 32
KNOWN_DIFFERENCES = {
    "cohere2": "sliding windows are one token longer",
    "gemma2": "attention logits are capped, which it does in its eager attention only",
    "nemotron_h": "time steps have no minimum",
}
"""What vLLM 0.32 computes otherwise than transformers 5.19, by model type."""
SMALL_VOCABULARY_IDS = 4096  # up to this size, vLLM is asked for the log-prob of every id


class VllmEngine:
    """Generates and scores with vLLM in this process."""

    _llm: Any = None
    _can_reload: bool | None = None  # None: not known yet

    def __init__(self, model: ModelDir, context: EngineContext):
        self._context, self._sleeps = context, context.recipe.vllm.enable_sleep_mode
        if difference := KNOWN_DIFFERENCES.get(model.config.get("model_type", "")):
            console.warn(
                f"{model.path}: vLLM differs from transformers: {difference}. pipeline.max_logprob_rms compares"
            )
        self._start(model)
        self.logprob_metadata = {"engine": "vllm", "dtype": model.dtype, "logprobs": "processed, float32, nats"}

    def _start(self, model: ModelDir) -> None:
        self._model = model
        arguments = _engine_arguments(model, self._context)
        hint = "see the recipe's section [vllm]"
        if model.is_quantized and model.dtype == "float32":
            hint = 'set dtype = "bfloat16" for this model: most kernels for quantized weights need 16 bits'
        try:
            with (
                _translate_errors(f"{model.path}: vLLM cannot start", hint),
                _without_unused_weights(model) as path,
            ):
                self._llm = vllm.LLM(model=str(path), **arguments)
                _running.add(self)
                self._max_tokens = self._llm.llm_engine.model_config.max_model_len - 1  # see _max_model_len
                is_masked = self._llm.collective_rpc("opdctl_mask", args=(model.vocab_size,))
            if not all(is_masked):
                raise OpdctlError(
                    "unsupported_model", f"{model.path}: vLLM computes its logits where opdctl cannot mask padding rows"
                )
            self._sleep()
            self._check_batches(hint)
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
        dtype = "bfloat16" if self._model.is_quantized else self._model.dtype  # quantized weights round activations
        if not difference <= (bound := LOGPROB_TOLERANCE[getattr(torch, dtype)]):  # NaN fails too
            raise OpdctlError(
                "unsupported_model",
                f"{self._model.path}: in vLLM the log-probs of a response depend on the rest of its batch: "
                f"they differ by {difference:.2g} nats from those of the response alone, more than {bound:g}",
                hint='set engine = "transformers"',
            )

    def load_weights(self, model: ModelDir) -> None:
        """Load the weights of another directory, into the running instance if its reload is known to be right.

        Whether vLLM replaces every copy of the weights depends on architecture, device and quantization. So the first
        reload is repeated with a new instance. It is right if both instances give a probe the same log-probs, to the
        bit, and these differ from the log-probs of the weights before. Otherwise every load starts a new instance.
        """
        is_same_model = (model.config, model.vocab_size) == (self._model.config, self._model.vocab_size)
        if self._llm is None or not is_same_model or self._can_reload is False:
            self._restart(model)
            return
        before = None if self._can_reload else self._score_probe()
        try:
            self._reload(model)
            if before is None:
                return
            reloaded = self._score_probe()
        except BaseException:
            self.close()
            raise
        self._restart(model)
        right = self._score_probe()
        if not np.array_equal(reloaded, right):
            self._can_reload = False
            console.warn(
                f"{model.path}: after a reload of weights vLLM's log-probs are up to "
                f"{np.abs(reloaded - right).max():.2g} nats from those of a new instance. Each new student starts one"
            )
        elif not np.array_equal(before, right):
            self._can_reload = True

    def _reload(self, model: ModelDir) -> None:
        self._wake()
        with _translate_errors(f"{model.path}: vLLM cannot load these weights"), _without_unused_weights(model) as path:
            self._llm.collective_rpc("opdctl_load", args=(str(path),))
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("its prefix cache cannot be emptied")
        self._model = model
        self._sleep()

    def _restart(self, model: ModelDir) -> None:
        self.close()
        self._start(model)

    def _score_probe(self) -> Logprobs:
        """Return the log-probs of fixed ids, which depend on every layer and, most likely, on every expert."""
        ids = _probe_ids(self._model, min(PROBE_TOKENS, self._max_tokens), 0)
        (scores,) = self.score([ScoreRequest(ids[:1], ids[1:])], Score(), lambda n: None)
        return scores.logprobs

    def close(self) -> None:
        _running.discard(self)
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _wake(self) -> None:
        if self._sleeps:
            self._llm.wake_up()

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        batch_size: int,
        on_progress: Callable[[int], None],
        *,
        columns: RolloutColumns = RolloutColumns(),  # noqa: B008 - immutable
    ) -> list[Completion]:
        if columns.entropy:
            raise _unsupported("rollout", "the entropy of the sampled distribution")
        if columns.top_k and (sampling.temperature, sampling.top_p) != (1, 1):
            raise _unsupported("rollout", "the most probable ids before temperature and top-p")
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        self._check_length(longest + sampling.max_tokens, f"a prompt of {longest} + {sampling.max_tokens} tokens")

        def prompts() -> Iterator[tuple[Ids, dict[str, Any]]]:
            for request in requests:
                params = {
                    "seed": request.seed,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "max_tokens": sampling.max_tokens,
                    "stop_token_ids": list(self._model.eos_ids),
                    "logprobs": columns.top_k,
                }
                yield request.prompt_ids, params

        outputs = self._run(prompts(), batch_size, on_progress)
        completions = [_completion(output.outputs[0], columns.top_k) for output in outputs]
        self._check_not_nan(completions)
        return completions

    def score(
        self, requests: Sequence[ScoreRequest], settings: Score, on_progress: Callable[[int], None]
    ) -> list[TokenScores]:
        needs_distribution = settings.entropy or settings.student_top_k
        if settings.hidden_states:
            raise _unsupported("score", "hidden states")
        vocab_size = self._model.vocab_size
        if needs_distribution and vocab_size > SMALL_VOCABULARY_IDS:
            feature = "entropies" if settings.entropy else "log-probs of given ids"
            raise _unsupported("score", f"{feature} over {vocab_size} ids, only over {SMALL_VOCABULARY_IDS}")
        lengths = [len(request.prompt_ids) + len(request.response_ids) for request in requests]
        longest = max(lengths, default=0)
        self._check_length(longest, f"a prompt and response of {longest} tokens")
        # vLLM samples at least one token; it is discarded.
        params = {"max_tokens": 1, "prompt_logprobs": -1 if needs_distribution else settings.top_k}
        scores: dict[int, TokenScores] = {}
        for batch in by_token_budget(lengths, settings.tokens_per_batch):
            texts = [np.concatenate([requests[i].prompt_ids, requests[i].response_ids]) for i in batch]
            outputs = self._run(((text, params) for text in texts), len(batch), on_progress)
            for i, output in zip(batch, outputs, strict=True):
                scores[i] = _scores(requests[i], output.prompt_logprobs, settings, vocab_size)
        self._check_not_nan(scores.values())
        return [scores[i] for i in range(len(requests))]

    def _check_not_nan(self, results: Iterable[Completion | TokenScores]) -> None:
        # From NaN logits vLLM makes a normal-looking response: token 0 repeated.
        if any(np.isnan(result.logprobs).any() for result in results):
            raise OpdctlError("nonfinite_value", f"{self._model.path}: the model produced NaN logits in vLLM")

    def _check_length(self, tokens: int, text: str) -> None:
        if tokens > self._max_tokens:
            raise OpdctlError(
                "unsupported_setting",
                f"vllm.max_model_len: {text} exceeds vLLM's maximum of {self._max_tokens} tokens",
                hint="raise vllm.max_model_len if the model allows it, or reduce the maximum response length",
            )

    def _run(
        self, prompts: Iterable[tuple[Ids, dict[str, Any]]], batch_size: int, on_progress: Callable[[int], None]
    ) -> list[Any]:
        """Process all prompts, `batch_size` at a time, and return their outputs in order."""
        self._wake()
        engine, waiting = self._llm.llm_engine, enumerate(prompts)
        running: set[str] = set()
        outputs: dict[str, Any] = {}
        try:
            while True:
                for index, (ids, params) in itertools.islice(waiting, batch_size - len(running)):
                    prompt = vllm.TokensPrompt(prompt_token_ids=ids.tolist())
                    engine.add_request(str(index), prompt, _sampling_params(**params))
                    running.add(str(index))
                if not running:
                    break
                finished = {output.request_id: output for output in engine.step()}
                outputs |= finished
                running -= finished.keys()
                on_progress(len(finished))
        finally:
            engine.abort_request(list(running))  # an interrupted call must leave no request for the next call
        self._sleep()
        return [outputs[str(index)] for index in range(len(outputs))]


class WorkerExtension:
    """Methods that run in vLLM's workers, which hold the weights. vLLM adds them to its worker class by name."""

    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    def opdctl_mask(self, vocab_size: int) -> bool:
        """Give ids from `vocab_size` on probability zero, in sampling and scoring; return whether that is possible."""

        def mask(_module: Any, _arguments: Any, logits_CV: Any) -> None:
            if logits_CV is not None:
                logits_CV[..., vocab_size:] = -torch.inf

        processors = [module for module in self.get_model().modules() if isinstance(module, LogitsProcessor)]
        for processor in processors:
            if processor.org_vocab_size > vocab_size:
                processor.register_forward_hook(mask)
        return bool(processors)

    def opdctl_load(self, path: str) -> None:
        """Load a directory's weights."""
        self.reload_weights(weights_path=path)
        # On the CPU a layer multiplies by a packed copy of its weights. vLLM does not update the copy of a tied output
        # matrix, because the checkpoint contains no tensor of that name.
        for module in self.get_model().modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)


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
    with tempfile.TemporaryDirectory(prefix="opdctl-") as folder:
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
            raise OpdctlError("unsupported_model", f"{detail}: {reason}", hint=hint) from error


def _unsupported(section: str, feature: str) -> OpdctlError:
    return OpdctlError(
        "unsupported_setting",
        f"{section}: vLLM does not return {feature}",
        hint=f'set {section}.engine = "transformers"',
    )


def _engine_arguments(model: ModelDir, context: EngineContext) -> dict[str, Any]:
    """Return the arguments to vLLM's engine besides `model`."""
    settings = context.recipe.vllm
    parallel = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
    }
    arguments: dict[str, Any] = {name: size for name, size in parallel.items() if size > 1}
    if context.device == "cuda":
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.enable_sleep_mode:
        arguments["enable_sleep_mode"] = True
    if model.dtype != "float32":
        # In 16 bits the product of hidden states and output matrix is too inaccurate for log-probs.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    return arguments | {
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # vLLM's neutral defaults; the recipe has all sampling settings
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled
        "max_logprobs": -1,
        "max_model_len": _max_model_len(model, context.recipe),
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        **settings.engine_args,
    }


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
    kind = RequestOutputKind.FINAL_ONLY
    return vllm.SamplingParams(ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=kind, **settings)


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


def _completion(output: Any, top_k: int) -> Completion:
    ids_T = np.array(output.token_ids, np.int32)
    ids_TE, logp_TE = _logprob_table(output.logprobs, ids_T, 0, top_k)
    top_ids_TK, top_logp_TK = _select_top_k(ids_TE, logp_TE, top_k) if top_k else (None, None)
    return Completion(
        ids_T,
        logp_TE[:, 0].copy(),
        "stop" if output.finish_reason == "stop" else "length",
        top_ids=top_ids_TK,
        top_logprobs=top_logp_TK,
    )


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
