"""What a model and the stages' work with it take: parameters, bytes, FLOPs, seconds. Imports no torch.

The formulas are stated, and held against measurements, in docs/scaling.md. Lengths are upper bounds: every prompt and
response at its limit. Memory is in bytes on one GPU, by what takes it; seconds are those of a stage's whole allocation
for one step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from opdctl.models import CHUNK_LOGITS
from opdctl.models.directory import ModelDir
from opdctl.recipe.components import build_objective
from opdctl.recipe.schema import Hardware, ModelShape, Recipe, Sampling

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GRADIENT_BYTES, MOMENT_BYTES = 4, 8  # float32, and AdamW's two moments, a parameter
STATE_BYTES = 4 + MOMENT_BYTES  # the float32 weight and the two moments, as they are saved
LIVE_CHUNKS = 2  # alive at once
STORED_BYTES = 2 * 8 + 5 * 4  # of a response token in a micro-batch: its row and position, and five float32 columns
DRAW_COPIES = 3  # float32 copies of the next token's logits while it is drawn


# ── A model ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shape_of(model: ModelDir) -> ModelShape | None:
    """Read a model's shape from its config, or return None where the config does not name it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=model.trust_remote_code
        ).get_text_config()
    except (OSError, ValueError, KeyError):
        return None

    def first(*names: str) -> Any:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    layers, hidden, heads = (first(name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if not (layers and hidden and heads and first("vocab_size")):
        return None
    experts = first("num_experts", "num_local_experts", "n_routed_experts") or 1
    inner = ("moe_intermediate_size", "intermediate_size") if experts > 1 else ("intermediate_size",)
    return ModelShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim") or hidden // heads,
        intermediate_size=first(*inner) or 4 * hidden,
        vocab_size=first("vocab_size"),
        num_experts=experts,
        num_experts_per_tok=first("num_experts_per_tok") or 1,
        tie_word_embeddings=bool(config.tie_word_embeddings),
    )


def _attention_parameters(shape: ModelShape) -> int:
    return shape.hidden_size * shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)


def _feed_forward_parameters(shape: ModelShape, experts: int) -> int:
    router = shape.hidden_size * shape.num_experts if shape.num_experts > 1 else 0
    return 3 * shape.hidden_size * shape.intermediate_size * experts + router


def block_parameters(shape: ModelShape) -> int:
    """Return the parameters of one layer, its norms included."""
    norms = 2 * shape.hidden_size + 2 * shape.head_dim
    return _attention_parameters(shape) + _feed_forward_parameters(shape, shape.num_experts) + norms


def head_parameters(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def parameters(shape: ModelShape) -> int:
    """Return all parameters of a decoder with gated feed-forward layers and norms of queries and keys."""
    matrices = 1 if shape.tie_word_embeddings else 2
    return shape.num_hidden_layers * block_parameters(shape) + matrices * head_parameters(shape) + shape.hidden_size


def active_parameters(shape: ModelShape) -> int:
    """Return the parameters of the layers' matrices that one token is multiplied by."""
    return shape.num_hidden_layers * (
        _attention_parameters(shape) + _feed_forward_parameters(shape, shape.num_experts_per_tok)
    )


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Return the parameters of LoRA adapters on every linear layer but the output matrix."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    return (
        shape.num_hidden_layers
        * rank
        * (attention + 3 * shape.num_experts * (shape.hidden_size + shape.intermediate_size))
    )


def cache_bytes(shape: ModelShape, width: int, share: int = 1) -> int:
    """Return the key-value cache of one token on one of `share` GPUs, which hold at least a head each."""
    return 2 * shape.num_hidden_layers * ceil(shape.num_key_value_heads / share) * shape.head_dim * width


def forward_flops(shape: ModelShape, tokens: float, context: float) -> float:
    """Return the FLOPs of `tokens` tokens through the layers; each attends to `context` tokens in the mean."""
    attention = 4 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * context
    return tokens * (2 * active_parameters(shape) + attention)


def activation_bytes(shape: ModelShape, low: bool) -> int:
    """Return what one layer keeps of one token for the backward pass, in float32 or under autocast to bfloat16.

    Counted from what Qwen3's layer saves: norms keep their input and its normalised form in float32, products their
    input, attention its queries, keys, values and output, the gated feed-forward four arrays of its inner size.
    """
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    experts = 4 * 4 * shape.intermediate_size * shape.num_experts_per_tok
    if shape.num_experts > 1:  # of each its input and output too; autocast leaves experts in float32
        experts += 4 * 2 * shape.hidden_size * shape.num_experts_per_tok
    elif low:
        experts //= 2
    if low:
        return 26 * shape.hidden_size + 10 * (queries + keys) + experts
    return 4 * (6 * shape.hidden_size + 4 * (queries + keys)) + experts


# ── A stage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StageCost:
    """What a stage takes: the bytes on each GPU by what takes them, and the seconds of a step on all its GPUs.

    `at_once` is how many responses an engine draws together. `seconds` is None where the work does not fit.
    """

    gpus: int
    memory: Mapping[str, int]
    seconds: float | None
    at_once: int | None = None

    @property
    def bytes(self) -> int:
        return sum(self.memory.values())

    def total(self, times: int) -> float | None:
        """Return the seconds of going through it so many times."""
        return None if self.seconds is None else self.seconds * times

    def gpu_hours(self, times: int) -> float | None:
        return None if self.seconds is None else self.seconds * times * self.gpus / 3600


def _seconds(hardware: Hardware, dtype: str, flops: float, head_flops: float, gpus: int) -> float:
    """Return the time of matrix products: the layers' in `dtype`, the output matrix' in float32."""
    peak = hardware.tflops_float32 if dtype == "float32" else hardware.tflops
    return (flops / peak + head_flops / hardware.tflops_float32) / (1e12 * hardware.utilisation * gpus)


def _gpus_per_engine(recipe: Recipe, engine: str) -> int:
    return 1 if engine == "transformers" else recipe.vllm.tensor_parallel_size * recipe.vllm.pipeline_parallel_size


def _batch_tokens(recipe: Recipe, budget: int) -> int:
    """Return the tokens of a full batch: a longer response goes alone, and there are no more than a step's."""
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    return min(max(budget, longest), recipe.responses_per_step() * longest)


def _chunk_bytes(shape: ModelShape, tokens: int) -> int:
    return LIVE_CHUNKS * 4 * min(CHUNK_LOGITS, tokens * shape.vocab_size)


def _engine_memory(shape: ModelShape, dtype: str, share: int) -> dict[str, int]:
    """Return what an engine's weights take on each of `share` GPUs; the output matrix lies there in float32 too."""
    memory = {"weights": parameters(shape) * BYTES[dtype] // share}
    if dtype != "float32":
        memory["output matrix"] = 4 * head_parameters(shape) // share
    return memory


def generation_cost(
    recipe: Recipe, shape: ModelShape, dtype: str, sampling: Sampling, responses: int, parts: int, batch_size: int
) -> StageCost:
    """Size up drawing so many responses. vLLM draws as many at once as its share of the memory holds caches for."""
    hardware, engine = recipe.hardware, recipe.rollout.engine
    share = _gpus_per_engine(recipe, engine)
    copies = max(1, hardware.rollout_gpus // share)
    prompt, response = recipe.prompts.max_tokens, sampling.max_tokens
    memory = _engine_memory(shape, dtype, share)
    of_one = cache_bytes(shape, BYTES[dtype], share) // recipe.vllm.pipeline_parallel_size * (prompt + response)
    of_one_logits = 4 * DRAW_COPIES * shape.vocab_size
    at_once = min(batch_size, ceil(responses / parts))
    if engine == "transformers":
        of_one += of_one // shape.num_hidden_layers  # a layer's cache is there twice as it grows
    else:
        room = recipe.vllm.gpu_memory_utilization * hardware.memory_gib * 2**30 - sum(memory.values())
        at_once = min(at_once, recipe.vllm.max_num_seqs, int(room // (of_one + of_one_logits)))
    memory |= {"cache": max(at_once, 1) * of_one, "logits": max(at_once, 1) * of_one_logits}
    if at_once < 1:
        return StageCost(hardware.rollout_gpus, memory, None, 0)
    prefill = _seconds(hardware, dtype, forward_flops(shape, responses * prompt, prompt / 2), 0, hardware.rollout_gpus)
    tokens_each = max(1.0, responses / (copies * at_once)) * response
    seconds = prefill + tokens_each * _token_seconds(hardware, shape, dtype, at_once, prompt + response / 2, share)
    return StageCost(hardware.rollout_gpus, memory, seconds, at_once)


def _token_seconds(
    hardware: Hardware, shape: ModelShape, dtype: str, at_once: int, context: float, share: int
) -> float:
    """Return the time of one more token each: the longer of reading weights and caches, and of the products."""
    width = BYTES[dtype]
    touched = 1 - (1 - shape.num_experts_per_tok / shape.num_experts) ** at_once if shape.num_experts > 1 else 1.0
    experts = shape.num_hidden_layers * _feed_forward_parameters(shape, shape.num_experts)
    layers = shape.num_hidden_layers * _attention_parameters(shape) + touched * experts
    read = width * layers + 4 * head_parameters(shape) + at_once * context * cache_bytes(shape, width)
    products = _seconds(
        hardware, dtype, forward_flops(shape, at_once, context), 2 * at_once * head_parameters(shape), share
    )
    return max(read / (1e9 * hardware.bandwidth_gbs * hardware.utilisation * share), products)


def rollout_cost(recipe: Recipe, shape: ModelShape) -> StageCost:
    """Size up drawing a step's responses."""
    settings = recipe.rollout
    responses = recipe.responses_per_step()
    return generation_cost(
        recipe, shape, recipe.student.dtype, settings, responses, settings.num_parts, settings.batch_size
    )


def score_cost(recipe: Recipe, shape: ModelShape, dtype: str, of_all: float = 1) -> StageCost:
    """Size up scoring a share of a step's responses with one model, on an allocation of its own."""
    hardware, engine = recipe.hardware, recipe.score.engine
    share = _gpus_per_engine(recipe, engine)
    prompt, response = recipe.prompts.max_tokens, recipe.rollout.max_tokens
    memory, width = _engine_memory(shape, dtype, share), BYTES[dtype]
    batch = _batch_tokens(recipe, recipe.score.tokens_per_batch)
    if engine == "transformers":
        inner = 3 * shape.intermediate_size * shape.num_experts_per_tok
        memory["activations"] = batch * (width * (4 * shape.hidden_size + inner) + 4 * shape.hidden_size)
        memory["logits"] = _chunk_bytes(shape, batch)
    else:
        memory["cache"] = batch * cache_bytes(shape, width, share) // recipe.vllm.pipeline_parallel_size
        memory["logits"] = 2 * 4 * recipe.vllm.max_num_batched_tokens * shape.vocab_size
    responses = of_all * recipe.responses_per_step()
    flops = forward_flops(shape, responses * (prompt + response), (prompt + response) / 2)
    head = 2 * head_parameters(shape) * responses * response
    return StageCost(hardware.score_gpus, memory, _seconds(hardware, dtype, flops, head, hardware.score_gpus))


def update_cost(recipe: Recipe, shape: ModelShape, teacher: ModelShape | None) -> StageCost:
    """Size up a step's updates. `teacher`: of an objective on the whole vocabulary, whose output matrix is here too."""
    hardware, settings, lora = recipe.hardware, recipe.train, recipe.lora.rank > 0
    prompt, response = recipe.prompts.max_tokens, recipe.rollout.max_tokens
    tokens, responses = prompt + response, recipe.responses_per_step()
    body, head = forward_flops(shape, responses * tokens, tokens / 2), 2 * head_parameters(shape) * responses * response
    # Forward once, backward twice as much, once of it for the weights' gradient; recomputing is a forward more.
    passes = 3 - lora + settings.gradient_checkpointing
    flops, head_flops = passes * body, (3 - lora) * head
    once = _seconds(hardware, recipe.student.dtype, flops, head_flops, hardware.train_gpus)
    memory = _trained_memory(recipe, shape) | _micro_batch_memory(recipe, shape)
    # Ids, places and stored log-probs of all the step's tokens: every process makes all micro-batches.
    memory["step's tokens"] = responses * (8 * tokens + STORED_BYTES * response)
    if teacher is not None and build_objective(recipe).support == "full":
        memory["teacher's output matrix"] = 4 * head_parameters(teacher)
        memory["logits"] *= 3  # the teacher's too, and the gradient by the whole distribution
        memory["activations"] += 4 * teacher.hidden_size * _batch_tokens(recipe, settings.tokens_per_micro_batch)
    return StageCost(hardware.train_gpus, memory, settings.updates_per_step * once)


def _trained_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return what weights, gradients and optimizer take on one GPU, with what FSDP2 gathers of them for a while."""
    gpus, lora, own = recipe.hardware.train_gpus, recipe.lora.rank, BYTES[recipe.student.dtype]
    sharded = gpus > 1 or recipe.train.cpu_offload
    low = recipe.student.dtype == "bfloat16"
    all_parameters, head, block = parameters(shape), head_parameters(shape), block_parameters(shape)
    trained = adapter_parameters(shape, lora) if lora else all_parameters
    held = own * all_parameters + 4 * trained if lora else 4 * all_parameters
    memory = {
        "weights": held // gpus,
        "gradients": GRADIENT_BYTES * trained // gpus,
        "moments": MOMENT_BYTES * trained // gpus,
    }
    if recipe.train.cpu_offload:
        memory = dict.fromkeys(memory, 0)
    if sharded:
        # Two blocks and the embedding whole, and one block's gradient before it is summed over the GPUs.
        memory["gathered"] = (2 if low else 4) * (2 * block + head) + (0 if lora else 4 * block)
    elif low and not lora:
        memory["bfloat16 copy"] = 2 * shape.num_hidden_layers * block
    # The output matrix is whole, in float32, wherever it is sharded or lower; its gradient wherever it is trained.
    memory["output matrix"] = 4 * head * ((sharded or bool(lora and own < 4)) + (not lora))
    return memory


def _micro_batch_memory(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Return what a full micro-batch takes; with checkpointing, the layers' inputs and one layer's activations."""
    tokens = _batch_tokens(recipe, recipe.train.tokens_per_micro_batch)
    of_a_layer = activation_bytes(shape, recipe.student.dtype == "bfloat16")
    layers = shape.num_hidden_layers * of_a_layer
    if recipe.train.gradient_checkpointing:
        layers = shape.num_hidden_layers * 4 * shape.hidden_size + of_a_layer
    ends = 4 * 4 * shape.hidden_size  # the last norm's two, and of the response tokens the states and their gradient
    return {"activations": tokens * (layers + ends), "logits": _chunk_bytes(shape, tokens)}
