"""Cost model: memory, FLOPs and time of each stage. Imports no torch.

docs/scaling.md states the formulas and compares them with measurements on a CPU; nothing was measured on GPUs. Lengths
are upper bounds: every prompt and response has its maximum length. Memory is in bytes per GPU, itemized by purpose.
Seconds are those of one step on all GPUs of the stage.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from opdctl.models import CHUNK_LOGITS
from opdctl.models.shapes import (
    active_parameters,
    adapter_parameters,
    attention_parameters,
    block_parameters,
    count_parameters,
    feed_forward_parameters,
    head_parameters,
)
from opdctl.recipe.components import build_objective, reads_trainer_logprobs
from opdctl.recipe.schema import Hardware, ModelShape, Recipe, Sampling

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GRADIENT_BYTES, MOMENT_BYTES = 4, 8  # per parameter: float32, and AdamW's two moments
STATE_BYTES = 4 + MOMENT_BYTES  # per parameter of a checkpoint: the float32 weight and the two moments
LIVE_CHUNKS = 2  # chunks of logits that exist at the same time
COLUMN_BYTES = 2 * 8 + 5 * 4  # per response token of a micro-batch: row, position, and five float32 columns
SAMPLING_COPIES = 3  # float32 copies of the next token's logits during sampling

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
    """Return the bytes that one layer saves per token for the backward pass, in float32 or autocast to bfloat16.

    They are those of a Qwen3 layer: norms save their input and its normalized form in float32, matrix products their
    input, attention its queries, keys, values and output, the gated feed-forward four arrays of its inner size.
    """
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    experts = 4 * 4 * shape.intermediate_size * shape.num_experts_per_tok
    if shape.num_experts > 1:  # also the input and output of each expert; autocast leaves experts in float32
        experts += 4 * 2 * shape.hidden_size * shape.num_experts_per_tok
    elif bfloat16:
        experts //= 2
    if bfloat16:
        return 26 * shape.hidden_size + 10 * (queries + keys) + experts
    return 4 * (6 * shape.hidden_size + 4 * (queries + keys)) + experts


# ── A stage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StageCost:
    """The cost of one step of a stage.

    memory: bytes on each GPU, by purpose. seconds: on all GPUs of the stage; None if the work does not fit into memory.
    concurrent_responses: how many responses an engine samples together.
    """

    gpus: int
    memory: Mapping[str, int]
    seconds: float | None
    concurrent_responses: int | None = None

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    def total_seconds(self, repetitions: int) -> float | None:
        return if_known(lambda seconds: seconds * repetitions, self.seconds)

    def gpu_hours(self, repetitions: int) -> float | None:
        return if_known(lambda seconds: seconds * repetitions * self.gpus / 3600, self.seconds)


def _seconds(hardware: Hardware, dtype: str, flops: float, head_flops: float, gpus: int) -> float:
    """Return the seconds of matrix products: of the layers in `dtype`, of the output matrix in float32."""
    peak = hardware.tflops_float32 if dtype == "float32" else hardware.tflops
    return (flops / peak + head_flops / hardware.tflops_float32) / (1e12 * hardware.utilization * gpus)


def _gpus_per_engine(recipe: Recipe, engine: str) -> int:
    return 1 if engine == "transformers" else recipe.vllm.tensor_parallel_size * recipe.vllm.pipeline_parallel_size


def _batch_tokens(recipe: Recipe, budget: int) -> int:
    """Return the tokens of a full batch. A longer response is a batch by itself; a step bounds the batch."""
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    return min(max(budget, longest), recipe.responses_per_step() * longest)


def _chunk_bytes(shape: ModelShape, tokens: int) -> int:
    return LIVE_CHUNKS * 4 * min(CHUNK_LOGITS, tokens * shape.vocab_size)


def _engine_memory(shape: ModelShape, dtype: str, num_gpus: int) -> dict[str, int]:
    """Return the memory of an engine's weights on each of `num_gpus` GPUs, with a float32 output matrix."""
    memory = {"weights": count_parameters(shape) * DTYPE_BYTES[dtype] // num_gpus}
    if dtype != "float32":
        memory["output matrix"] = 4 * head_parameters(shape) // num_gpus
    return memory


def generation_cost(
    recipe: Recipe, shape: ModelShape, dtype: str, sampling: Sampling, responses: int, parts: int, batch_size: int
) -> StageCost:
    """Return the cost of sampling `responses` responses.

    vLLM samples as many responses together as fit into its part of the memory with caches of maximum length.
    """
    hardware, engine = recipe.hardware, recipe.rollout.engine
    num_gpus = _gpus_per_engine(recipe, engine)
    num_engines = max(1, hardware.rollout_gpus // num_gpus)
    prompt, response = recipe.prompts.max_tokens, sampling.max_tokens
    memory = _engine_memory(shape, dtype, num_gpus)
    cache_per_token = cache_bytes(shape, DTYPE_BYTES[dtype], num_gpus) // recipe.vllm.pipeline_parallel_size
    cache_per_response = cache_per_token * (prompt + response)
    logits_per_response = 4 * SAMPLING_COPIES * shape.vocab_size
    concurrent = min(batch_size, ceil(responses / parts))
    if engine == "transformers":
        cache_per_response += cache_per_response // shape.num_hidden_layers  # a layer's cache is copied as it grows
    else:
        free = recipe.vllm.gpu_memory_utilization * hardware.memory_gib * 2**30 - sum(memory.values())
        fitting = int(free // (cache_per_response + logits_per_response))
        concurrent = min(concurrent, recipe.vllm.max_num_seqs, fitting)
    memory["cache"] = max(concurrent, 1) * cache_per_response
    memory["logits"] = max(concurrent, 1) * logits_per_response
    if concurrent < 1:
        return StageCost(hardware.rollout_gpus, memory, None, 0)
    prefill = _seconds(hardware, dtype, forward_flops(shape, responses * prompt, prompt / 2), 0, hardware.rollout_gpus)
    decoding_steps = max(1.0, responses / (num_engines * concurrent)) * response
    context = prompt + response / 2
    seconds = prefill + decoding_steps * _decoding_seconds(hardware, shape, dtype, concurrent, context, num_gpus)
    return StageCost(hardware.rollout_gpus, memory, seconds, concurrent)


def _decoding_seconds(
    hardware: Hardware, shape: ModelShape, dtype: str, concurrent: int, context: float, num_gpus: int
) -> float:
    """Return the seconds of one decoding step, one token for each of the `concurrent` responses.

    It is the longer of two times: reading weights and caches, and the matrix products.
    """
    dtype_bytes = DTYPE_BYTES[dtype]
    inactive = 1 - shape.num_experts_per_tok / shape.num_experts
    used_experts = 1 - inactive**concurrent if shape.num_experts > 1 else 1.0  # as a fraction of all experts
    experts = shape.num_hidden_layers * feed_forward_parameters(shape, shape.num_experts)
    layers = shape.num_hidden_layers * attention_parameters(shape) + used_experts * experts
    caches = concurrent * context * cache_bytes(shape, dtype_bytes)
    bytes_read = dtype_bytes * layers + 4 * head_parameters(shape) + caches
    reading = bytes_read / (1e9 * hardware.bandwidth_gbs * hardware.utilization * num_gpus)
    flops, head_flops = forward_flops(shape, concurrent, context), 2 * concurrent * head_parameters(shape)
    return max(reading, _seconds(hardware, dtype, flops, head_flops, num_gpus))


def rollout_cost(recipe: Recipe, shape: ModelShape) -> StageCost:
    """Return the cost of sampling a step's responses."""
    settings = recipe.rollout
    responses = recipe.responses_per_step()
    return generation_cost(
        recipe, shape, recipe.student.dtype, settings, responses, settings.num_parts, settings.batch_size
    )


def score_cost(recipe: Recipe, shape: ModelShape, dtype: str, fraction: float = 1) -> StageCost:
    """Return the cost of scoring a fraction of a step's responses with one model on its own GPUs."""
    hardware, engine = recipe.hardware, recipe.score.engine
    num_gpus = _gpus_per_engine(recipe, engine)
    prompt, response = recipe.prompts.max_tokens, recipe.rollout.max_tokens
    memory, dtype_bytes = _engine_memory(shape, dtype, num_gpus), DTYPE_BYTES[dtype]
    batch = _batch_tokens(recipe, recipe.score.tokens_per_batch)
    if engine == "transformers":
        feed_forward = 3 * shape.intermediate_size * shape.num_experts_per_tok
        per_token = dtype_bytes * (4 * shape.hidden_size + feed_forward) + 4 * shape.hidden_size
        memory["activations"] = batch * per_token
        memory["logits"] = _chunk_bytes(shape, batch)
    else:
        memory["cache"] = batch * cache_bytes(shape, dtype_bytes, num_gpus) // recipe.vllm.pipeline_parallel_size
        memory["logits"] = 2 * 4 * recipe.vllm.max_num_batched_tokens * shape.vocab_size
    responses = fraction * recipe.responses_per_step()
    flops = forward_flops(shape, responses * (prompt + response), (prompt + response) / 2)
    head = 2 * head_parameters(shape) * responses * response
    return StageCost(hardware.score_gpus, memory, _seconds(hardware, dtype, flops, head, hardware.score_gpus))


def update_cost(recipe: Recipe, shape: ModelShape, teacher: ModelShape | None) -> StageCost:
    """Return the cost of a step's updates. teacher: its output matrix is loaded for full-vocabulary objectives."""
    hardware, settings, lora = recipe.hardware, recipe.train, recipe.lora.rank > 0
    prompt, response = recipe.prompts.max_tokens, recipe.rollout.max_tokens
    tokens, responses = prompt + response, recipe.responses_per_step()
    body, head = forward_flops(shape, responses * tokens, tokens / 2), 2 * head_parameters(shape) * responses * response
    # The backward pass costs two forward passes, one of them for the gradient of the weights. Recomputing costs one.
    passes = 3 - lora + settings.gradient_checkpointing
    flops, head_flops = passes * body, (3 - lora) * head
    update = _seconds(hardware, recipe.student.dtype, flops, head_flops, hardware.train_gpus)
    updates = settings.updates_per_step * update
    if reads_trainer_logprobs(recipe):
        updates += _seconds(hardware, recipe.student.dtype, body, head, hardware.train_gpus)
    memory = _trained_memory(recipe, shape) | _micro_batch_memory(recipe, shape)
    # Every process makes all micro-batches: ids, positions and stored log-probs of all the step's tokens.
    memory["step's tokens"] = responses * (8 * tokens + COLUMN_BYTES * response)
    if teacher is not None and build_objective(recipe).support == "full":
        memory["teacher's output matrix"] = 4 * head_parameters(teacher)
        memory["logits"] *= 3  # also the teacher's, and the gradient with respect to all logits
        memory["activations"] += 4 * teacher.hidden_size * _batch_tokens(recipe, settings.tokens_per_micro_batch)
    return StageCost(hardware.train_gpus, memory, updates)


def _trained_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the memory of weights, gradients and optimizer on one GPU, with what FSDP2 gathers temporarily."""
    gpus, lora, dtype_bytes = recipe.hardware.train_gpus, recipe.lora.rank, DTYPE_BYTES[recipe.student.dtype]
    is_sharded = gpus > 1 or recipe.train.cpu_offload
    is_bfloat16 = recipe.student.dtype == "bfloat16"
    num_parameters, head, block = count_parameters(shape), head_parameters(shape), block_parameters(shape)
    trained = adapter_parameters(shape, lora) if lora else num_parameters
    weights = dtype_bytes * num_parameters + 4 * trained if lora else 4 * num_parameters
    memory = {
        "weights": weights // gpus,
        "gradients": GRADIENT_BYTES * trained // gpus,
        "moments": MOMENT_BYTES * trained // gpus,
    }
    if recipe.train.cpu_offload:
        memory = dict.fromkeys(memory, 0)
    if is_sharded:
        # Two blocks and the embedding unsharded, and one block's gradient before its reduction.
        memory["gathered"] = (2 if is_bfloat16 else 4) * (2 * block + head) + (0 if lora else 4 * block)
    elif is_bfloat16 and not lora:
        memory["bfloat16 copy"] = 2 * shape.num_hidden_layers * block
    # A float32 copy of the output matrix if it is sharded or stored in a smaller dtype; its gradient if it is trained.
    memory["output matrix"] = 4 * head * ((is_sharded or bool(lora and dtype_bytes < 4)) + (not lora))
    return memory


def _micro_batch_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return the memory of a full micro-batch; with checkpointing, layer inputs and one layer's activations."""
    tokens = _batch_tokens(recipe, recipe.train.tokens_per_micro_batch)
    per_layer = activation_bytes(shape, recipe.student.dtype == "bfloat16")
    per_token = shape.num_hidden_layers * per_layer
    if recipe.train.gradient_checkpointing:
        per_token = shape.num_hidden_layers * 4 * shape.hidden_size + per_layer
    # The last norm saves two arrays; response tokens have hidden states and their gradient.
    per_token += 4 * 4 * shape.hidden_size
    return {"activations": tokens * per_token, "logits": _chunk_bytes(shape, tokens)}
