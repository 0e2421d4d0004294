"""The vLLM engine, in this process. The one file that imports vLLM; it knows no tokenizer and no text.

What vLLM does otherwise than opdctl needs, and is put right here: it samples the rows that pad a matrix (they are
masked), it ends at the ids of its own choice (it is given the model directory's), it gives log-probs from before
temperature and top-p (processed ones are asked for), it shortens responses that do not fit (an error), it multiplies
by the output matrix in 16 bits (32 are asked for), and its reload forgets a packed copy of a tied output matrix.

It has no hidden states, and the whole distribution only of small vocabularies: what needs more is refused.

Shapes: T response tokens, W entries that vLLM gives of each, K most probable tokens, V vocabulary, D hidden size.
"""

import contextlib
import gc
import itertools
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.sampling_params import RequestOutputKind

from opdctl.artifacts.records import Ids, Logprobs, TokenScores
from opdctl.engines.base import Completion, EngineContext, Request, ScoreRequest
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.batching import by_token_budget
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe, Sampling, Score

DEFAULTS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: a killed run leaves no engine behind
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see _max_model_len, which checks the recipe's own value
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; else nearly all memory, each engine, beside the trainer
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the threads are the trainer's too
}


for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)


# vLLM heeds its level only from the first engine on, and warns before.
getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())


try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm
        import vllm.v1.engine.core
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
        from vllm.sampling_params import RequestOutputKind
except ImportError as error:
    raise OpdctlError(
        f"the engine `vllm` needs vLLM: {error}", hint="pip install 'opdctl[vllm]', or engine = \"transformers\""
    ) from error


_running: weakref.WeakSet["VllmEngine"] = weakref.WeakSet()
_take_down = vllm.v1.engine.core.cleanup_dist_env_and_memory


def _cleanup_when_last_engine_closes() -> None:
    if not _running:
        _take_down()


# All engines of a process share its process group, and vLLM takes it down with the first of them that stops.
vllm.v1.engine.core.cleanup_dist_env_and_memory = _cleanup_when_last_engine_closes


if vllm.platforms.current_platform.is_cpu():
    # It moves all memory of the process to one NUMA node, the trainer's too, and says so on stderr.
    torch.ops._C.init_cpu_memory_env = lambda nodes: None  # type: ignore[attr-defined]


SMALL_VOCABULARY = 4096  # up to here vLLM is asked for the log-prob of every id


class VllmEngine:
    """Generates and scores with vLLM in this process."""

    _llm: Any = None

    def __init__(self, model: ModelDir, place: EngineContext):
        self._place, self._sleeps = place, place.recipe.vllm.enable_sleep_mode
        self._start(model)
        self.logprob_metadata = {"engine": "vllm", "dtype": model.dtype, "logprobs": "processed, float32, nats"}

    def _start(self, model: ModelDir) -> None:
        self._path, self._eos, self._vocab_size = model.path, list(model.eos_ids), model.vocab_size
        _check_whole(model)
        arguments = _arguments(model, self._place)
        with _translate_errors(f"does not start with {model.path}", "see the recipe's section [vllm]"):
            self._llm = vllm.LLM(**arguments)
        _running.add(self)
        self._room = self._llm.llm_engine.model_config.max_model_len - 1  # see _max_model_len
        self._llm.collective_rpc("opdctl_mask", args=(model.vocab_size,))
        self._sleep()

    def load_weights(self, model: ModelDir) -> None:
        """Take over another directory's weights; in a fresh engine where vLLM does not take them over rightly."""
        self._wake()
        with _translate_errors(f"does not take over the weights of {model.path}"):
            taken = all(self._llm.collective_rpc("opdctl_load", args=(str(model.path),)))
        if not (taken and self._llm.reset_prefix_cache()):
            self.close()
            self._start(model)
            return
        self._path, self._eos = model.path, list(model.eos_ids)
        self._sleep()

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
        advance: Callable[[int], None],
        *,
        entropy: bool = False,
        top_k: int = 0,
    ) -> list[Completion]:
        if entropy:
            raise _unsupported("the entropy of what it samples", "rollout")
        if top_k and (sampling.temperature, sampling.top_p) != (1, 1):
            raise _unsupported("the most probable ids of before temperature and top-p", "rollout")
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        self._check_room(longest + sampling.max_tokens, f"a prompt of {longest} tokens, {sampling.max_tokens} more")

        def work() -> Iterator[tuple[Ids, dict[str, Any]]]:
            for request in requests:
                yield (
                    request.prompt_ids,
                    {
                        "seed": request.seed,
                        "temperature": sampling.temperature,
                        "top_p": sampling.top_p,
                        "max_tokens": sampling.max_tokens,
                        "stop_token_ids": self._eos,
                        "logprobs": top_k,
                    },
                )

        completions = [_completion(output.outputs[0], top_k) for output in self._run(work(), batch_size, advance)]
        self._check_numbers(completions)
        return completions

    def score(
        self, answered: Sequence[ScoreRequest], settings: Score, advance: Callable[[int], None]
    ) -> list[TokenScores]:
        whole = settings.entropy or settings.student_top_k
        if settings.hidden_states:
            raise _unsupported("hidden states", "score")
        if whole and self._vocab_size > SMALL_VOCABULARY:
            what = "entropies" if settings.entropy else "log-probs of ids that it is given"
            raise _unsupported(f"{what} over {self._vocab_size} ids, only over {SMALL_VOCABULARY}", "score")
        lengths = [len(each.prompt_ids) + len(each.response_ids) for each in answered]
        self._check_room(max(lengths, default=0), f"a prompt and response of {max(lengths, default=0)} tokens")
        # At least one token must be drawn, though none is wanted.
        params = {"max_tokens": 1, "prompt_logprobs": -1 if whole else settings.top_k}
        scores: dict[int, TokenScores] = {}
        for batch in by_token_budget(lengths, settings.tokens_per_batch):
            texts = [np.concatenate([answered[i].prompt_ids, answered[i].response_ids]) for i in batch]
            outputs = self._run(((text, params) for text in texts), len(batch), advance)
            for i, output in zip(batch, outputs, strict=True):
                scores[i] = _scores(answered[i], output.prompt_logprobs, settings, self._vocab_size)
        self._check_numbers(scores.values())
        return [scores[i] for i in range(len(answered))]

    def _check_numbers(self, found: Iterable[Completion | TokenScores]) -> None:
        # Of NaN vLLM makes an answer like any other: token 0, over and over.
        if any(np.isnan(each.logprobs).any() for each in found):
            raise OpdctlError(f"{self._path}: vLLM gets NaN from this model", code=ExitCode.BAD_DATA)

    def _check_room(self, tokens: int, what: str) -> None:
        if tokens > self._room:
            raise OpdctlError(
                f"{what}: more than vLLM has room for, {self._room} tokens",
                hint="raise vllm.max_model_len, where the model allows it, or ask for shorter responses",
            )

    def _run(
        self, work: Iterable[tuple[Ids, dict[str, Any]]], at_once: int, advance: Callable[[int], None]
    ) -> list[Any]:
        """Do all requests and return what became of them, in order, with `at_once` of them in work."""
        self._wake()
        engine, waiting = self._llm.llm_engine, enumerate(work)
        under_way: set[str] = set()
        done: dict[str, Any] = {}
        try:
            while True:
                for index, (ids, params) in itertools.islice(waiting, at_once - len(under_way)):
                    prompt = vllm.TokensPrompt(prompt_token_ids=ids.tolist())
                    engine.add_request(str(index), prompt, _params(**params))
                    under_way.add(str(index))
                if not under_way:
                    break
                finished = {output.request_id: output for output in engine.step()}
                done |= finished
                under_way -= finished.keys()
                advance(len(finished))
        finally:
            engine.abort_request(list(under_way))  # an interrupted call leaves none behind for the next
        self._sleep()
        return [done[str(index)] for index in range(len(done))]


class WorkerExtension:
    """What is done inside vLLM's workers, beside the weights. vLLM adds these methods to its own class by name."""

    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    def opdctl_mask(self, vocab_size: int) -> None:
        """Give the rows that pad the output matrix no probability, drawn or scored."""

        def mask(_module: Any, _arguments: Any, logits_CV: Any) -> None:
            if logits_CV is not None:
                logits_CV[..., vocab_size:] = -torch.inf

        for module in self.get_model().modules():
            if isinstance(module, LogitsProcessor) and module.org_vocab_size > vocab_size:
                module.register_forward_hook(mask)

    def opdctl_load(self, path: str) -> bool:
        """Take over the weights of a directory; return whether embedding and output matrix are then its own."""
        self.reload_weights(weights_path=path)
        # On the CPU a layer multiplies by a packed copy of its weights. That of a tied output matrix stays the old
        # one, since the checkpoint names no such layer.
        tables = [
            module
            for module in self.get_model().modules()
            if isinstance(getattr(module, "quant_method", None), UnquantizedEmbeddingMethod)
        ]
        for table in tables:
            table.quant_method.process_weights_after_loading(table)
        return bool(tables) and all(_is_of(table, Path(path)) for table in tables)


@torch.inference_mode()
def _is_of(table: Any, path: Path) -> bool:
    """Whether an embedding or output matrix holds and multiplies by one that is stored in `path`."""
    shard = table.shard_indices
    rows = slice(shard.org_vocab_start_index, shard.org_vocab_end_index)
    held_VD = table.weight[: rows.stop - rows.start]
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                shape = opened.get_slice(name).get_shape()
                if len(shape) != 2 or shape[0] != table.org_vocab_size or shape[1] != held_VD.shape[1]:
                    continue
                stored_VD = opened.get_slice(name)[rows].to(held_VD)
                if torch.equal(stored_VD, held_VD):
                    probe_1D = torch.linspace(-1, 1, held_VD.shape[1]).to(held_VD)[None]
                    found = table.quant_method.apply(table, probe_1D)[..., : len(held_VD)]
                    tolerance = 1e-3 if held_VD.dtype == torch.float32 else 5e-2
                    return torch.allclose(found.float(), (probe_1D @ held_VD.T).float(), tolerance, tolerance)
    return False


@contextlib.contextmanager
def _translate_errors(what: str, hint: str | None = None) -> Iterator[None]:
    """Turn whatever vLLM raises over a model or an argument into one message, and let it warn of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OpdctlError(f"vLLM {what}: {reason}", hint=hint) from error


def _unsupported(what: str, section: str) -> OpdctlError:
    return OpdctlError(f"{section}: vLLM does not give {what}", hint=f'set {section}.engine = "transformers"')


def _check_whole(model: ModelDir) -> None:
    """Raise OpdctlError when a tensor is missing: vLLM takes what the memory held for it, without a word."""
    if "quantization_config" in model.config:
        return  # its tensors have other names than transformers' until it is loaded
    logging.disable_progress_bar()
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            device_map="meta",  # reads the files' headers alone
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except Exception:  # what transformers cannot load, vLLM may be able to, or say why not
        return
    if missing := sorted(info["missing_keys"]):
        raise OpdctlError(f"{model.path}: weights missing: {', '.join(missing[:5])}", code=ExitCode.BAD_DATA)


def _arguments(model: ModelDir, place: EngineContext) -> dict[str, Any]:
    """Return the arguments to vLLM's engine."""
    settings = place.recipe.vllm
    parallel = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
    }
    arguments: dict[str, Any] = {name: size for name, size in parallel.items() if size > 1}
    if place.device == "cuda":
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.enable_sleep_mode:
        arguments["enable_sleep_mode"] = True
    if model.dtype != "float32":
        # In 16 bits the product of hidden states and output matrix is too coarse for log-probs.
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    return arguments | {
        "model": str(model.path),
        "skip_tokenizer_init": True,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # no sampling settings but the recipe's
        "logprobs_mode": "processed_logprobs",  # of the policy that is sampled
        "max_logprobs": -1,
        "max_model_len": _max_model_len(model, place.recipe),
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": settings.enforce_eager,
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        **settings.engine_args,
    }


def _max_model_len(model: ModelDir, recipe: Recipe) -> int:
    """Return the recipe's longest text, in tokens, as far as the model goes.

    One more than that, since vLLM scores a text only with room for a token to draw; that token is never fed back.
    """
    text_config = model.config.get("text_config", model.config)
    limit = text_config.get("max_position_embeddings")
    wanted = recipe.vllm.max_model_len
    if wanted is None:
        wanted = recipe.prompts.max_tokens + max(recipe.rollout.max_tokens, recipe.eval.max_tokens)
        wanted = min(wanted, limit or wanted)
    elif limit and wanted > limit:
        raise OpdctlError(f"vllm.max_model_len: {wanted} is more than the {limit} tokens that {model.path} allows")
    return wanted + 1


def _params(**settings: Any) -> Any:
    # ignore_eos: the ends of sequence are those in stop_token_ids, and no other.
    # FINAL_ONLY: otherwise each step copies each response so far.
    kind = RequestOutputKind.FINAL_ONLY
    return vllm.SamplingParams(ignore_eos=True, detokenize=False, flat_logprobs=True, output_kind=kind, **settings)


def _table(flat: Any, ids_T: Ids, first: int, top_k: int) -> tuple[Ids, Logprobs]:
    """Return ids and log-probs that vLLM gives at positions from `first` on, [T, W], the token itself in front."""
    if not len(ids_T):
        return np.zeros((0, 1 + top_k), np.int32), np.zeros((0, 1 + top_k), np.float32)
    span = slice(flat.start_indices[first], flat.end_indices[first + len(ids_T) - 1])
    ids_TW = np.array(flat.token_ids[span], np.int32).reshape(len(ids_T), -1)
    logprobs_TW = np.array(flat.logprobs[span], np.float32).reshape(ids_TW.shape)
    if not np.array_equal(ids_TW[:, 0], ids_T):
        raise RuntimeError("vLLM's log-probs are of other tokens")
    return ids_TW, logprobs_TW


def _top(ids_TW: Ids, logprobs_TW: Logprobs, top_k: int) -> tuple[Ids, Logprobs]:
    """Return the `top_k` most probable ids, falling, with their log-probs, [T, K]."""
    # The token itself comes in front, and again among the others where it is one of them.
    order_TK = np.argsort(-logprobs_TW[:, 1:], axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(ids_TW[:, 1:], order_TK, 1), np.take_along_axis(logprobs_TW[:, 1:], order_TK, 1)


def _completion(output: Any, top_k: int) -> Completion:
    ids_T = np.array(output.token_ids, np.int32)
    ids_TW, logprobs_TW = _table(output.logprobs, ids_T, 0, top_k)
    top_ids_TK, top_TK = _top(ids_TW, logprobs_TW, top_k) if top_k else (None, None)
    return Completion(
        ids_T,
        logprobs_TW[:, 0].copy(),
        "stop" if output.finish_reason == "stop" else "length",
        top_ids=top_ids_TK,
        top_logprobs=top_TK,
    )


def _scores(answered: ScoreRequest, flat: Any, settings: Score, vocab_size: int) -> TokenScores:
    ids_TW, logprobs_TW = _table(flat, answered.response_ids, len(answered.prompt_ids), settings.top_k)
    found: dict[str, Any] = {"logprobs": logprobs_TW[:, 0].copy()}
    if settings.top_k:
        found["top_ids"], found["top_logprobs"] = _top(ids_TW, logprobs_TW, settings.top_k)
    if settings.entropy or settings.student_top_k:
        logp_TV = np.full((len(ids_TW), max(vocab_size, int(ids_TW.max(initial=0)) + 1)), -np.inf, np.float32)
        np.put_along_axis(logp_TV, ids_TW, logprobs_TW, 1)
        logp_TV = logp_TV[:, :vocab_size]
        if settings.entropy:
            terms_TV = np.exp(logp_TV) * np.maximum(logp_TV, np.finfo(np.float32).min)
            found["entropies"] = np.maximum(-terms_TV.sum(1), 0)
        if settings.student_top_k:
            assert answered.top_ids is not None
            found["student_top_logprobs"] = np.take_along_axis(logp_TV, answered.top_ids.astype(np.int64), 1)
    return TokenScores(**found)
