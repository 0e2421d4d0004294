"""Cost model: memory, FLOPs and time of each stage alone. Imports no torch.

docs/scaling.md states the formulas and compares them with measurements on a CPU; nothing was measured on GPUs. Lengths
are upper bounds: every prompt and response has its maximum length. Memory is in bytes per GPU, itemized by purpose.
Seconds are those of one step on all GPUs of the stage. pipeline/stage_plan.py puts the stages together.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any, TypeVar

from opdctl.artifacts.files import HASH_THREADS
from opdctl.models import GPU_BLOCK_LOGITS, GPU_CHUNK_LOGITS
from opdctl.models.shapes import (
    active_parameters,
    adapter_parameters,
    attention_parameters,
    block_parameters,
    count_parameters,
    feed_forward_parameters,
    head_parameters,
)
from opdctl.models.weights import MAX_WEIGHT_FILE_BYTES
from opdctl.recipe.components import build_objective, has_known_components, reads_trainer_logprobs
from opdctl.recipe.schema import Eval, Hardware, ModelShape, Recipe, Rollout

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GRADIENT_BYTES = 4  # per number of the gradient of the output matrix
COLUMN_BYTES = 2 * 8 + 5 * 4  # per response token of a micro-batch: row, position, and five float32 columns
FULL_MATRICES = 5
"""Chunks with an objective on the full vocabulary: log-probs of both models, their gradient, two of the loss."""
FIT_FRACTION = 0.92  # of a GPU's memory; the rest is for CUDA, NCCL and fragmentation
SAMPLING_COPIES = 3  # float32 copies of the next token's logits during sampling
PROMPT_LOGPROB_ROWS = 1024  # vLLM computes the log-probs of a prompt in chunks of 1,024 tokens (prompt_logprob.py)
PROMPT_LOGPROB_COPIES = 2  # float32 copies of such a chunk's logits: of one GPU's ids and gathered, or of two chunks
HASH_BYTES_PER_SECOND = 1.5e9  # SHA-256 by one thread
SERVER_ENTRY_SECONDS = 1.1e-6  # to parse one of a server's most probable tokens, by one thread (docs/engines.md)
START_SECONDS = 60  # of vLLM besides reading weights: process, kernels, graphs; 30 to 100 are reported

Value = TypeVar("Value")


# ── Unknown values ───────────────────────────────────────────────────────────────────────────────────────────────────


def if_known(function: Callable[..., Value], *values: Any) -> Value | None:
    """Return function(*values), or None (unknown) if a value is None."""
    return None if any(value is None for value in values) else function(*values)


def sum_known(values: Iterable[float | None]) -> float | None:
    """Return the sum, or None (unknown) if a value is None."""
    return if_known(lambda *known: sum(known), *values)


# ── A model ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def cache_bytes(shape: ModelShape, dtype_bytes: int, num_gpus: int = 1) -> int:
    """Return the bytes of one token's key-value cache on each of `num_gpus` GPUs, which hold at least one head each."""
    return 2 * shape.num_hidden_layers * ceil(shape.num_key_value_heads / num_gpus) * shape.head_dim * dtype_bytes


def forward_flops(shape: ModelShape, tokens: float, context: float) -> float:
    """Return the FLOPs of `tokens` tokens in the layers; each attends to `context` tokens on average."""
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * context
    return tokens * (2 * active_parameters(shape) + attention)


def activation_bytes(shape: ModelShape, bfloat16: bool) -> int:
    """Return the bytes that one layer saves per token for the backward pass, in float32 or bfloat16.

    They are those of a Qwen3 layer: norms save their input and its normalized form in float32, matrix products their
    input, attention its queries, keys, values and output, the gated feed-forward four arrays of its inner size.
    """
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    experts = 4 * shape.intermediate_size * shape.num_experts_per_tok
    if shape.num_experts > 1:  # also the input and output of each expert
        experts += 2 * shape.hidden_size * shape.num_experts_per_tok
    if bfloat16:
        return 16 * shape.hidden_size + 10 * (queries + keys) + 2 * experts
    return 4 * (6 * shape.hidden_size + 4 * (queries + keys) + experts)


# ── A stage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StageCost:
    """The cost of one step of a stage.

    memory: bytes on each GPU, by purpose. seconds: on all GPUs of the stage; None if the stage cannot run.
    concurrent_responses: how many responses an engine samples together. obstacle: why the stage cannot run, whatever
    the memory. resident: bytes of what is idle on the same GPU meanwhile, by holder. note: what happens besides.
    """

    gpus: int
    memory: Mapping[str, int]
    seconds: float | None
    concurrent_responses: int | None = None
    obstacle: str = ""
    resident: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def bytes(self) -> int:
        return sum(self.memory.values()) + sum(self.resident.values())


def _product_seconds(hardware: Hardware, dtype: str, flops: float, gpus: int) -> float:
    """Return the seconds of matrix products in `dtype`."""
    peak = hardware.tflops_float32 if dtype == "float32" else hardware.tflops
    return flops / (1e12 * peak * hardware.utilization * gpus)


def _pass_seconds(recipe: Recipe, shape: ModelShape, dtype: str, head_dtype: str, gpus: int) -> tuple[float, float]:
    """Return the seconds of a forward pass over a step's responses: of the layers, and of the responses' logits."""
    responses, response = recipe.responses_per_step(), _mean_tokens(recipe, recipe.rollout.max_tokens)
    tokens = recipe.prompts.max_tokens + response
    body = forward_flops(shape, responses * tokens, tokens / 2)
    head = 2 * head_parameters(shape) * responses * response
    return _product_seconds(recipe.hardware, dtype, body, gpus), _product_seconds(
        recipe.hardware, head_dtype, head, gpus
    )


def _batch_tokens(recipe: Recipe, budget: int) -> int:
    """Return the tokens of a full batch. A longer response is a batch by itself; a step bounds the batch."""
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    return min(max(budget, longest), recipe.responses_per_step() * longest)


def _chunk_bytes(shape: ModelShape, tokens: int, bytes_per_logit: int = 4) -> int:
    """Return the memory of a chunk of logits and of two blocks of one."""
    chunk, block = (min(limit, tokens * shape.vocab_size) for limit in (GPU_CHUNK_LOGITS, GPU_BLOCK_LOGITS))
    return bytes_per_logit * chunk + 2 * 4 * block


def _mean_tokens(recipe: Recipe, max_tokens: int) -> int:
    """Return the response length that times assume."""
    return min(recipe.hardware.mean_response_tokens or max_tokens, max_tokens)


# ── Engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head_dtype(engine: str, dtype: str) -> str:
    """Return the dtype in which an engine keeps and multiplies the output matrix. Its logits are float32.

    On a GPU vLLM multiplies 16-bit operands into a float32 result (`LogitsProcessor._apply_head`); the trainer and the
    transformers engine do so in bfloat16.
    """
    return "float32" if engine == "transformers" and dtype != "bfloat16" else dtype


def _weight_memory(shape: ModelShape, engine: str, dtype: str, num_gpus: int) -> dict[str, int]:
    memory = {"weights": count_parameters(shape) * DTYPE_BYTES[dtype] // num_gpus}
    if _head_dtype(engine, dtype) != dtype:
        memory["output matrix"] = 4 * head_parameters(shape)
    return memory


def _forward_bytes(shape: ModelShape, dtype: str, tokens: int, num_gpus: int) -> int:
    """Return the bytes of the activations of a forward pass without gradient."""
    feed_forward = 3 * shape.intermediate_size * shape.num_experts_per_tok // num_gpus
    return tokens * (DTYPE_BYTES[dtype] * (4 * shape.hidden_size + feed_forward) + 4 * shape.hidden_size)


def _vllm_memory(recipe: Recipe, shape: ModelShape, dtype: str) -> dict[str, int]:
    """Return the memory that vLLM takes at its start: gpu_memory_utilization of the GPU, what is left as the cache."""
    settings, num_gpus = recipe.vllm, recipe.gpus_per_engine("vllm")
    memory = _weight_memory(shape, "vllm", dtype, num_gpus)
    memory["activations"] = _forward_bytes(shape, dtype, settings.max_batched_tokens("cuda"), num_gpus)
    memory["logits"] = 4 * SAMPLING_COPIES * settings.max_num_seqs * shape.vocab_size
    budget = int(settings.gpu_memory_utilization * recipe.hardware.memory_gib * 2**30)
    memory["cache"] = max(0, budget - sum(memory.values()))
    return memory


def _vllm_cache_bytes(recipe: Recipe, shape: ModelShape, dtype: str, tokens: int) -> int:
    """Return the bytes of the cache of `tokens` tokens on each GPU of an engine."""
    settings, num_gpus = recipe.vllm, recipe.gpus_per_engine("vllm")
    return tokens * cache_bytes(shape, DTYPE_BYTES[dtype], num_gpus) // settings.pipeline_parallel_size


def _vllm_obstacle(recipe: Recipe, shape: ModelShape, dtype: str, gpus: int, cache: int) -> str:
    """Return why vLLM cannot start on `gpus` GPUs with `cache` bytes, or ""."""
    size, tensor = recipe.gpus_per_engine("vllm"), recipe.vllm.tensor_parallel_size
    of_node = min(gpus, recipe.hardware.gpus_per_node)
    if of_node % size or gpus % size:
        return f"engines of {size} GPUs do not divide {gpus} GPUs, {of_node} on a node"
    heads, key_heads = shape.num_attention_heads, shape.num_key_value_heads
    if heads % tensor or (key_heads % tensor and tensor % key_heads):
        return f"{tensor} GPUs do not divide {heads} heads and {key_heads} key-value heads"
    longest = recipe.prompts.max_tokens + max(recipe.rollout.max_tokens, recipe.eval.max_tokens)
    longest = recipe.vllm.max_model_len or longest
    if cache < _vllm_cache_bytes(recipe, shape, dtype, longest):
        return f"the cache has no room for a sequence of {longest:,} tokens"
    return ""


def generation_cost(
    recipe: Recipe, shape: ModelShape, dtype: str, settings: Rollout | Eval, responses: int, parts: int
) -> StageCost:
    """Return the cost of sampling `responses` responses.

    The engines share the parts. vLLM gets the responses of all its parts at once, and samples as many together as its
    cache holds; transformers gets one part after another. The last response of each has the maximum length. A server is
    assumed to be vLLM; its memory is elsewhere.
    """
    hardware, engine = recipe.hardware, recipe.rollout.engine
    gpus, num_gpus = hardware.rollout_gpus, recipe.gpus_per_engine(engine)
    prompt, longest, mean = recipe.prompts.max_tokens, settings.max_tokens, _mean_tokens(recipe, settings.max_tokens)
    of_part, parts_per_engine = ceil(responses / parts), ceil(parts / max(1, gpus // num_gpus))
    rounds, of_round = (parts_per_engine, of_part) if engine == "transformers" else (1, parts_per_engine * of_part)
    concurrent = min(settings.batch_size, of_round)
    if engine == "transformers":
        memory, cache = _weight_memory(shape, engine, dtype, 1), cache_bytes(shape, DTYPE_BYTES[dtype])
        # A layer's cache is copied as it grows.
        memory["cache"] = concurrent * (cache + cache // shape.num_hidden_layers) * (prompt + longest)
        memory["logits"] = concurrent * 4 * SAMPLING_COPIES * shape.vocab_size
    else:
        memory = _vllm_memory(recipe, shape, dtype)
        if obstacle := _vllm_obstacle(recipe, shape, dtype, gpus, memory["cache"]):
            return StageCost(gpus, memory, None, 0, obstacle)
        fitting = memory["cache"] // _vllm_cache_bytes(recipe, shape, dtype, prompt + mean)
        concurrent = min(concurrent, recipe.vllm.max_num_seqs, fitting)
    batches = of_round / concurrent
    tails = ceil(batches) if engine == "transformers" else 1
    decoding = partial(_decoding_seconds, hardware, shape, engine, dtype, num_gpus)
    seconds = batches * mean * decoding(concurrent, prompt + mean / 2)
    seconds += tails * (longest - mean) * decoding(1, prompt + longest)
    prefill = _product_seconds(hardware, dtype, forward_flops(shape, responses * prompt, prompt / 2), gpus)
    return StageCost(gpus, {} if engine == "server" else memory, prefill + rounds * seconds, concurrent)


def _decoding_seconds(
    hardware: Hardware, shape: ModelShape, engine: str, dtype: str, num_gpus: int, concurrent: int, context: float
) -> float:
    """Return the seconds of one decoding step, one token for each of the `concurrent` responses.

    It is the longer of two times: reading weights and caches, and the matrix products.
    """
    dtype_bytes, head_dtype = DTYPE_BYTES[dtype], _head_dtype(engine, dtype)
    inactive = 1 - shape.num_experts_per_tok / shape.num_experts
    used_experts = 1 - inactive**concurrent if shape.num_experts > 1 else 1.0  # as a fraction of all experts
    experts = shape.num_hidden_layers * feed_forward_parameters(shape, shape.num_experts)
    layers = shape.num_hidden_layers * attention_parameters(shape) + used_experts * experts
    caches = concurrent * context * cache_bytes(shape, dtype_bytes)
    bytes_read = dtype_bytes * layers + DTYPE_BYTES[head_dtype] * head_parameters(shape) + caches
    reading = bytes_read / (1e9 * hardware.bandwidth_gbs * hardware.utilization * num_gpus)
    flops, head_flops = forward_flops(shape, concurrent, context), 2 * concurrent * head_parameters(shape)
    products = _product_seconds(hardware, dtype, flops, num_gpus)
    return max(reading, products + _product_seconds(hardware, head_dtype, head_flops, num_gpus))


def rollout_cost(recipe: Recipe, shape: ModelShape) -> StageCost:
    """Return the cost of sampling a step's responses."""
    settings = recipe.rollout
    return generation_cost(
        recipe, shape, recipe.student.dtype, settings, recipe.responses_per_step(), settings.num_parts
    )


def score_cost(recipe: Recipe, shape: ModelShape, dtype: str, fraction: float = 1) -> StageCost:
    """Return the cost of scoring a fraction of a step's responses with one model. A server's memory is its own."""
    engine, gpus = recipe.score.engine, recipe.hardware.score_gpus
    seconds = fraction * sum(_pass_seconds(recipe, shape, dtype, _head_dtype(engine, dtype), gpus))
    memory: dict[str, int] = {}
    if engine == "server":  # it computes while this process parses
        tokens = recipe.responses_per_step() * _mean_tokens(recipe, recipe.rollout.max_tokens)
        seconds = max(seconds, fraction * tokens * recipe.score.top_k * SERVER_ENTRY_SECONDS)
    elif engine == "transformers":
        batch = _batch_tokens(recipe, recipe.score.tokens_per_batch)
        memory = _weight_memory(shape, engine, dtype, 1)
        memory |= {"activations": _forward_bytes(shape, dtype, batch, 1), "logits": _chunk_bytes(shape, batch)}
    elif engine == "vllm":
        memory = _vllm_memory(recipe, shape, dtype)
        if obstacle := _vllm_obstacle(recipe, shape, dtype, gpus, memory["cache"]):
            return StageCost(gpus, memory, None, obstacle=obstacle)
        memory["prompt logits"] = PROMPT_LOGPROB_COPIES * 4 * PROMPT_LOGPROB_ROWS * shape.vocab_size
    return StageCost(gpus, memory, seconds)


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def update_cost(recipe: Recipe, shape: ModelShape, teacher: ModelShape | None) -> StageCost:
    """Return the cost of a step's updates. teacher: its output matrix is loaded for full-vocabulary objectives."""
    settings, gpus, lora = recipe.train, recipe.hardware.train_gpus, recipe.lora.rank > 0
    dtype = recipe.student.dtype
    body, head = _pass_seconds(recipe, shape, dtype, _head_dtype("transformers", dtype), gpus)
    # The backward pass costs two forward passes, one of them for the gradient of the weights. Recomputing costs one.
    passes = 3 - lora
    recomputed = _checkpointed_layers(recipe, shape) / shape.num_hidden_layers
    seconds = settings.updates_per_step * ((passes + recomputed) * body + passes * head)
    is_known = has_known_components(recipe)  # otherwise the cost without what they might add
    if is_known and reads_trainer_logprobs(recipe):
        seconds += body + head
    is_full = teacher is not None and is_known and build_objective(recipe).support == "full"
    memory = _trained_memory(recipe, shape) | _micro_batch_memory(recipe, shape, FULL_MATRICES if is_full else 1)
    # The process has all of its micro-batches at once: ids, positions and stored log-probs.
    longest = recipe.rollout.max_tokens
    token_bytes = 8 * (recipe.prompts.max_tokens + longest) + COLUMN_BYTES * longest
    memory["step's tokens"] = recipe.responses_per_step() * token_bytes // gpus
    if teacher is not None and is_full:
        teacher_dtype = next(iter(recipe.teacher_models().values())).dtype
        teacher_bytes = DTYPE_BYTES[_head_dtype("transformers", teacher_dtype)]
        memory["teacher's output matrix"] = teacher_bytes * head_parameters(teacher)
        memory["activations"] += 4 * teacher.hidden_size * _batch_tokens(recipe, settings.tokens_per_micro_batch)
    of_node = recipe.hardware.gpus_per_node
    obstacle = ""
    if gpus > of_node and gpus % of_node:
        obstacle = f"torchrun does not start {gpus} processes on nodes of {of_node} GPUs"
    elif settings.fsdp_size and gpus % settings.fsdp_size:
        obstacle = f"train.fsdp_size, {settings.fsdp_size}, does not divide {gpus} processes"
    return StageCost(gpus, memory, None if obstacle else seconds, obstacle=obstacle)


def base_scoring_cost(recipe: Recipe, shape: ModelShape) -> StageCost:
    """Return the cost of scoring a step's responses by the student in training with its adapters disabled."""
    dtype, gpus = recipe.student.dtype, recipe.hardware.train_gpus
    seconds = sum(_pass_seconds(recipe, shape, dtype, _head_dtype("transformers", dtype), gpus))
    batch = _batch_tokens(recipe, recipe.train.tokens_per_micro_batch)
    memory = {name: size for name, size in _trained_memory(recipe, shape).items() if name != "gradients"}
    memory |= {"activations": _forward_bytes(shape, dtype, batch, 1), "logits": _chunk_bytes(shape, batch)}
    return StageCost(gpus, memory, seconds)


def hand_over_cost(
    recipe: Recipe, shape: ModelShape, starts: int, started_bytes: int, *, sampling_seconds: float, colocated: bool
) -> StageCost:
    """Return the cost of passing a student on: ranks write its files, flush and hash them; engines hash and load it.

    On the machine of the trainer engines need not hash it, and the next responses are sampled while it is flushed and
    hashed. The trainer state is written while they are sampled and scored. Only the rest of that time counts.
    starts, started_bytes: how often vLLM starts in a step, and the weights of the models that it reads besides.
    """
    storage, every = 1e9 * recipe.hardware.storage_gbs, recipe.train.save_every_steps
    student = DTYPE_BYTES[recipe.student.dtype] * count_parameters(shape)
    num_files = ceil(student / MAX_WEIGHT_FILE_BYTES)
    is_on_one_machine = colocated and recipe.hardware.train_gpus <= recipe.hardware.gpus_per_node
    completing = student / min(HASH_BYTES_PER_SECOND * min(num_files, recipe.hardware.train_gpus), storage)
    checking = student / (HASH_BYTES_PER_SECOND * min(num_files, HASH_THREADS))
    seconds = 0.0 if is_on_one_machine else completing + checking  # files are written to memory first: that is fast
    seconds += (student + started_bytes) / storage + starts * START_SECONDS
    trained = adapter_parameters(shape, recipe.lora.rank) if recipe.lora.rank else count_parameters(shape)
    state = state_bytes(recipe) * trained
    saving = state / min(HASH_BYTES_PER_SECOND * recipe.hardware.train_gpus, storage)
    hidden = completing if is_on_one_machine else 0.0
    rest, rest_with_state = (max(0.0, work - sampling_seconds) for work in (hidden, hidden + saving))
    seconds += rest + (rest_with_state - rest) / every
    often = "every step" if every == 1 else f"every {every} steps"
    note = f"a trainer state of {state / 1e9:,.1f} GB {often}, in {saving:.1f} s beside the next rollout"
    return StageCost(recipe.hardware.train_gpus, {}, seconds, note=note)


def state_bytes(recipe: Recipe) -> int:
    """Return the bytes per trained parameter of a checkpoint: the weight and AdamW's two moments."""
    return 3 * DTYPE_BYTES[recipe.train.master_dtype]


def idle_trainer_bytes(update: StageCost) -> int:
    """Return what the trainer keeps on its GPU between updates: it frees gradients and cached memory."""
    return sum(update.memory.get(purpose, 0) for purpose in ("weights", "moments", "teacher's output matrix"))


def trainer_cpu_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Return the CPU memory of a sharded trainer process: its rows of the largest matrix, as stored and as loaded.

    With `train.cpu_offload`, also its shards.
    """
    rows = (DTYPE_BYTES[recipe.student.dtype] + 4) * head_parameters(shape) // _num_shards(recipe)
    return rows + recipe.train.cpu_offload * sum(_shard_memory(recipe, shape).values())


def _num_shards(recipe: Recipe) -> int:
    return recipe.train.fsdp_size or recipe.hardware.train_gpus


def _shard_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the memory of a process's part of weights, gradients and moments."""
    lora, num_parameters, shards = recipe.lora.rank, count_parameters(shape), _num_shards(recipe)
    trained = adapter_parameters(shape, lora) if lora else num_parameters
    frozen = DTYPE_BYTES[recipe.student.dtype] * num_parameters if lora else 0
    master = DTYPE_BYTES[recipe.train.master_dtype]  # the dtype of gradients and of both moments, too
    return {
        "weights": (frozen + master * trained) // shards,
        "gradients": master * trained // shards,
        "moments": 2 * master * trained // shards,
    }


def _trained_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the memory of weights, gradients and optimizer on one GPU, with what FSDP2 gathers temporarily."""
    lora, dtype_bytes = recipe.lora.rank, DTYPE_BYTES[recipe.student.dtype]
    is_sharded = recipe.shards_student(recipe.hardware.train_gpus)
    is_bfloat16 = recipe.student.dtype == "bfloat16"
    head, block = head_parameters(shape), block_parameters(shape)
    memory = _shard_memory(recipe, shape)
    master = DTYPE_BYTES[recipe.train.master_dtype]
    if recipe.train.cpu_offload:
        memory = dict.fromkeys(memory, 0)
    if is_sharded:
        # Two blocks and the embedding unsharded, and one block's gradient before its reduction.
        memory["gathered"] = (2 if is_bfloat16 else 4) * (2 * block + head) + (0 if lora else 4 * block)
    # Gathered, or loaded to the GPU; cast to the dtype of the products; and its gradient, if it is trained.
    kept, product = dtype_bytes if lora else master, DTYPE_BYTES[_head_dtype("transformers", recipe.student.dtype)]
    copies = kept * (_num_shards(recipe) > 1 or recipe.train.cpu_offload) + product * (product != kept)
    memory["output matrix"] = head * (copies + (0 if lora else GRADIENT_BYTES))
    return memory


def _checkpointed_layers(recipe: Recipe, shape: ModelShape) -> int:
    settings = recipe.train
    return ceil(shape.num_hidden_layers / settings.checkpoint_every_n_layers) if settings.gradient_checkpointing else 0


def _micro_batch_memory(recipe: Recipe, shape: ModelShape, matrices: int) -> dict[str, int]:
    """Return the memory of a full micro-batch: of checkpointed layers, the inputs and the activations of one.

    matrices: of the size of a chunk of logits that exist at the same time.
    """
    tokens = _batch_tokens(recipe, recipe.train.tokens_per_micro_batch)
    is_bfloat16 = recipe.student.dtype == "bfloat16"
    per_layer = activation_bytes(shape, is_bfloat16)
    checkpointed = _checkpointed_layers(recipe, shape)
    kept = min(shape.num_hidden_layers, shape.num_hidden_layers - checkpointed + 1)
    per_token = kept * per_layer + checkpointed * (2 if is_bfloat16 else 4) * shape.hidden_size
    # The last norm saves two arrays; response tokens have hidden states and their gradient.
    per_token += 4 * 4 * shape.hidden_size
    per_logit = 4 * matrices + 2 * is_bfloat16  # the gradient is also rounded
    return {"activations": tokens * per_token, "logits": _chunk_bytes(shape, tokens, per_logit)}
