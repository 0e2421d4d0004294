"""The cost model compared with real models and with results calculated by hand."""

import peft
import pytest
import torch
from bench.qwen3 import build_model
from helpers.commands import ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from opdctl.models.shapes import active_parameters, adapter_parameters
from opdctl.pipeline import costs
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import ModelShape, Recipe

PAPER = ROOT / "recipes" / "cross_scale.toml"
DENSE = ModelShape(
    num_hidden_layers=3,
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    intermediate_size=384,
    vocab_size=96,
    tie_word_embeddings=True,
)
MIXTURE = DENSE.model_copy(
    update={"intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False}
)


def paper(*overrides: str) -> Recipe:
    return load_recipe([PAPER], overrides)


def student(*overrides: str) -> ModelShape:
    shape = paper(*overrides).student.shape
    assert shape is not None
    return shape


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_activations_equal_what_the_layers_save(shape, bfloat16):
    model = build_model(shape).to(torch.bfloat16 if bfloat16 else torch.float32)
    ends = (6 if bfloat16 else 8) * shape.hidden_size  # the last norm's
    per_token = (saved(model, 512) - saved(model, 256)) / 256 - ends
    assert per_token == pytest.approx(shape.num_hidden_layers * costs.activation_bytes(shape, bfloat16), rel=0.05)


def saved(model: PreTrainedModel, tokens: int) -> int:
    """Return the bytes that the layers save for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.randint(0, model.config.vocab_size, (1, tokens))
        model.base_model(input_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for data, tensor in kept.items() if data not in weights)


def test_flops_equal_torchs_count():
    model, tokens = build_model(DENSE), 40
    with FlopCounterMode(display=False) as counted:
        model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert counted.get_total_flops() == costs.forward_flops(DENSE, tokens, 0)  # torch counts no attention on a CPU
    # Attention to 20 tokens on average: two products of 4 heads of 48, in 3 layers.
    assert (
        costs.forward_flops(DENSE, tokens, 20) - costs.forward_flops(DENSE, tokens, 0) == 40 * 3 * 2 * 2 * 20 * 4 * 48
    )


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_cache_size_equals_the_models(shape):
    model, cache = build_model(shape), DynamicCache()
    model.base_model(input_ids=torch.zeros(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(value.nbytes for layer in cache.layers for value in (layer.keys, layer.values))
    assert held == 2 * 7 * costs.cache_bytes(shape, 4)
    assert costs.cache_bytes(shape, 4, num_gpus=2) == costs.cache_bytes(shape, 4) / 2
    assert costs.cache_bytes(shape, 4, num_gpus=8) == costs.cache_bytes(shape, 4, num_gpus=2)  # at least one head


def test_adapter_parameters_equal_pefts():
    model = build_model(DENSE)
    peft.inject_adapter_in_model(peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"), model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(DENSE, 5) == trained


def test_memory_of_the_papers_update_by_hand():
    """Qwen3-4B in bfloat16 over 32 GPUs, 18,432 tokens in a micro-batch, gradient checkpointing."""
    memory = costs.update_cost(paper(), student(), None).memory
    everything, head = 4_022_468_096, 151_936 * 2560
    assert memory["weights"] == memory["gradients"] == 4 * everything // 32
    assert memory["moments"] == 8 * everything // 32
    assert memory["output matrix"] == (4 + 2 + 4) * head  # gathered, in bfloat16, and its gradient
    block = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert memory["gathered"] == 2 * (2 * block + head) + 4 * block
    layer = 16 * 2560 + 10 * (4096 + 1024) + 8 * 9728
    assert memory["activations"] == 18_432 * (36 * 2 * 2560 + layer + 16 * 2560)
    assert memory["logits"] == (4 + 2) * 2**27 + 2 * 4 * 2**25


def test_update_time_is_that_of_the_matrix_products():
    recipe = paper("train.gradient_checkpointing=false", "hardware.utilization=1.0")
    shape = student()
    tokens, responses = 1024 * 18_432, 1024 * 16_384
    layers = 3 * tokens * (2 * active_parameters(shape) + 4 * 36 * 4096 * 9216)
    head = 3 * 2 * 151_936 * 2560 * responses
    expected = (layers + head) / 989e12 / 32
    assert costs.update_cost(recipe, shape, None).seconds == pytest.approx(expected)


LAYER = 16 * 2560 + 10 * (4096 + 1024) + 8 * 9728
EVERY_LAYER = 36 * 2 * 2560 + LAYER + 16 * 2560
EVERY_SECOND = 18 * 2 * 2560 + 19 * LAYER + 16 * 2560


def test_recomputing_every_second_layer_saves_half_of_the_recomputation():
    overrides = ([], ["train.checkpoint_every_n_layers=2"], ["train.gradient_checkpointing=false"])
    every, second, none = (costs.update_cost(paper(*each), student(), None).seconds for each in overrides)
    assert every - second == pytest.approx((every - none) / 2)


@pytest.mark.parametrize(
    ("override", "purpose", "factor"),
    [
        ("train.gradient_checkpointing=false", "activations", None),
        ("hardware.train_gpus=64", "moments", 0.5),
        ("train.cpu_offload=true", "weights", 0),
        ("train.fsdp_size=8", "weights", 4),
        ("lora.rank=16", "weights", 0.5),
        ("train.tokens_per_micro_batch=36_864", "activations", 2),
        # 18 inputs of layers, 18 + 1 times a layer's activations, and both ends of the model
        ("train.checkpoint_every_n_layers=2", "activations", EVERY_SECOND / EVERY_LAYER),
    ],
)
def test_settings_change_memory(override, purpose, factor):
    one, other = (costs.update_cost(paper(*given), student(), None).memory[purpose] for given in ([], [override]))
    if factor is None:
        assert other > 5 * one
    else:
        assert other == pytest.approx(factor * one, rel=0.05)


def test_twice_the_gpus_take_half_the_time():
    one, other = (costs.update_cost(paper(f"hardware.train_gpus={n}"), student(), None).seconds for n in (16, 32))
    assert one == pytest.approx(2 * other)


ONE_ENGINE = (
    "vllm.tensor_parallel_size=1",
    "vllm.gpu_memory_utilization=0.9",
    "hardware.rollout_gpus=1",
    "rollout.batch_size=256",
    "rollout.num_parts=4",
)
"""An engine gets 4 parts of 256 responses."""


def test_vllm_takes_its_part_of_the_memory_and_samples_as_many_responses_as_its_cache_holds():
    """One Qwen3-4B on one GPU: 8 GB of weights, which the output matrix is part of; 147,456 bytes of cache a token."""
    stage = costs.rollout_cost(paper(*ONE_ENGINE), student())
    assert stage.bytes == int(0.9 * 79 * 2**30)
    assert stage.memory["weights"] == 2 * 4_022_468_096
    assert stage.memory["logits"] == 3 * 4 * 151_936 * 256
    forward = 16_384 * (2 * (4 * 2560 + 3 * 9728) + 4 * 2560)
    cache = 0.9 * 79 * 2**30 - 2 * 4_022_468_096 - 3 * 4 * 151_936 * 256 - forward
    assert stage.concurrent_responses == cache // (18_432 * 2 * 36 * 8 * 128 * 2) == 24
    assert costs.rollout_cost(paper(*ONE_ENGINE, "vllm.max_num_seqs=8"), student()).concurrent_responses == 8
    # A decoding step of 24 responses reads the weights and the caches, half full on average.
    read = 2 * active_parameters(student()) + 2 * 151_936 * 2560 + 24 * (2048 + 8192) * 147_456
    decoding = 1024 / 24 * 16_384 * read / (3350e9 * 0.4)
    prefill = costs.forward_flops(student(), 1024 * 2048, 1024) / (989e12 * 0.4)
    assert stage.seconds == pytest.approx(decoding + prefill, rel=1e-6)


def test_the_longest_response_ends_last():
    """At a mean of 4,096 tokens a batch holds more responses; one decodes on to 16,384 after the others."""
    recipe = paper(*ONE_ENGINE, "hardware.mean_response_tokens=4096")
    stage, longest = costs.rollout_cost(recipe, student()), costs.rollout_cost(paper(*ONE_ENGINE), student())
    assert stage.memory == longest.memory
    assert stage.concurrent_responses == longest.memory["cache"] // (6144 * 147_456) == 73
    weights = 2 * active_parameters(student()) + 2 * 151_936 * 2560
    batches = 1024 / 73 * 4096 * (weights + 73 * (2048 + 2048) * 147_456) / (3350e9 * 0.4)
    tail = (16_384 - 4096) * (weights + (2048 + 16_384) * 147_456) / (3350e9 * 0.4)
    prefill = costs.forward_flops(student(), 1024 * 2048, 1024) / (989e12 * 0.4)
    assert stage.seconds == pytest.approx(batches + tail + prefill, rel=1e-6)


def test_vllm_gets_all_its_parts_at_once():
    """8 engines: of 4 parts, half of them are idle; of 32, each gets four. transformers makes one after another."""
    costs_of = {
        parts: costs.rollout_cost(paper("hardware.rollout_gpus=32", f"rollout.num_parts={parts}"), student())
        for parts in (4, 8, 32)
    }
    assert costs_of[4].seconds == pytest.approx(2 * costs_of[8].seconds, rel=0.01)
    assert costs_of[32] == costs_of[8]
    of_part = [
        costs.rollout_cost(
            paper("hardware.rollout_gpus=1", "rollout.engine=transformers", f"rollout.num_parts={parts}"), student()
        )
        for parts in (8, 32)
    ]
    assert [stage.concurrent_responses for stage in of_part] == [128, 32]
    assert of_part[1].seconds > 1.1 * of_part[0].seconds


def test_the_output_matrix_is_multiplied_in_16_bits():
    """Into a float32 result, but transformers multiplies float16 in float32."""

    def seconds(engine: str, dtype: str) -> float:
        return costs.score_cost(paper(f"score.engine={engine}", "hardware.score_gpus=8"), student(), dtype).seconds

    assert seconds("transformers", "bfloat16") == pytest.approx(seconds("vllm", "bfloat16"))
    head = 2 * 151_936 * 2560 * 1024 * 16_384
    difference = seconds("transformers", "float16") - seconds("vllm", "float16")
    assert difference == pytest.approx(head * (1 / 67e12 - 1 / 989e12) / 0.4 / 8)
    memory = costs.score_cost(paper("score.engine=vllm", "hardware.score_gpus=8"), student(), "bfloat16").memory
    assert "output matrix" not in memory
    assert memory["prompt logits"] == 2 * 4 * 1024 * 151_936


def test_top_k_of_a_server_takes_the_time_to_parse_it():
    """A step of the paper has 1,024 responses of 16,384 tokens."""

    def seconds(top_k: int) -> float:
        served = ("score.engine=server", "teacher.server=http://a:1", "hardware.score_gpus=8", f"score.top_k={top_k}")
        return costs.score_cost(paper(*served), student(), "bfloat16").seconds

    assert seconds(64) == pytest.approx(1024 * 16_384 * 64 * 1.1e-6)
    assert seconds(1) == seconds(0) > 1024 * 16_384 * 1.1e-6


@pytest.mark.parametrize(
    ("override", "obstacle"),
    [
        ("vllm.tensor_parallel_size=16", "16 GPUs do not divide 8 GPUs"),
        ("vllm.tensor_parallel_size=3", "3 GPUs do not divide"),
        ("hardware.rollout_gpus=2", "4 GPUs do not divide 2 GPUs"),
        ("hardware.rollout_gpus=10", "4 GPUs do not divide 10 GPUs, 8 on a node"),
        ("vllm.gpu_memory_utilization=0.03", "no room for a sequence of 18,432 tokens"),
    ],
)
def test_engine_that_cannot_start(override, obstacle):
    stage = costs.rollout_cost(paper("hardware.rollout_gpus=8", override), student())
    assert obstacle in stage.obstacle
    assert stage.seconds is None


def test_passing_a_student_on():
    """8.04 GB of a student in two files, hashed twice at 2 × 1.5 GB/s and read at 5; vLLM reads 61 GB and starts."""
    recipe, parameters = paper(), 4_022_468_096
    options = {"sampling_seconds": 100.0, "colocated": True}
    cost = costs.hand_over_cost(recipe, student(), 0, 0, **options)
    assert cost.seconds == pytest.approx(2 * parameters * (2 / 3e9 + 1 / 5e9))
    more = costs.hand_over_cost(recipe, student(), 2, 61e9, **options)
    assert more.seconds == pytest.approx(cost.seconds + 120 + 61e9 / 5e9)


@pytest.mark.parametrize(
    ("sampling", "every", "rest"),
    [
        (100.0, 2, 0.0),
        (8.0, 2, (2 * 4.022468096 / 3 + 12 * 4.022468096 / 5 - 8.0) / 2),  # of the state, every other step
        (1.0, 1, 2 * 4.022468096 / 3 + 12 * 4.022468096 / 5 - 1.0),
    ],
)
def test_student_is_flushed_and_hashed_beside_the_next_rollout_of_the_same_machine(sampling, every, rest):
    """8.04 GB in two files at 1.5 GB/s each; the state of 48.3 GB at the storage's 5 GB/s."""
    recipe = paper("hardware.train_gpus=8", f"train.save_every_steps={every}")
    apart, beside = (
        costs.hand_over_cost(recipe, student(), 0, 0, sampling_seconds=sampling, colocated=colocated).seconds
        for colocated in (False, True)
    )
    read = 2 * 4.022468096 / 5
    assert beside == pytest.approx(read + rest, rel=1e-6)
    state = max(0.0, 12 * 4.022468096 / 5 - sampling) / every
    assert apart == pytest.approx(read + 2 * 2 * 4.022468096 / 3 + state, rel=1e-6)


@pytest.mark.parametrize(("gpus", "rate"), [(2, 3e9), (32, 5e9)])
def test_trainer_state_costs_what_the_next_rollout_does_not_hide(gpus, rate):
    """48.3 GB, hashed by each rank at 1.5 GB/s, all to a storage of 5 GB/s."""
    recipe, seconds = paper(f"hardware.train_gpus={gpus}", "train.save_every_steps=2"), 12 * 4_022_468_096 / rate
    hidden, shown = (
        costs.hand_over_cost(recipe, student(), 0, 0, sampling_seconds=sampling, colocated=False)
        for sampling in (100.0, 4.0)
    )
    assert shown.seconds == pytest.approx(hidden.seconds + (seconds - 4.0) / 2)
    assert hidden.note == f"a trainer state of 48.3 GB every 2 steps, in {seconds:.1f} s beside the next rollout"
