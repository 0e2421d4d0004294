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
    model = build_model(shape)
    ends = 2 * 4 * shape.hidden_size  # the last norm's
    # What does not depend on the number of tokens, such as autocast's copies of the weights, is no activation.
    per_token = (saved(model, 512, bfloat16) - saved(model, 256, bfloat16)) / 256 - ends
    assert per_token == pytest.approx(shape.num_hidden_layers * costs.activation_bytes(shape, bfloat16), rel=0.05)


def saved(model: PreTrainedModel, tokens: int, bfloat16: bool) -> int:
    """Return the bytes that the layers save for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
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
    assert memory["output matrix"] == 2 * 4 * head  # gathered, and its gradient
    block = 2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert memory["gathered"] == 2 * (2 * block + head) + 4 * block
    layer = 26 * 2560 + 10 * (4096 + 1024) + 8 * 9728
    assert memory["activations"] == 18_432 * (36 * 4 * 2560 + layer + 16 * 2560)
    assert memory["logits"] == 2 * 4 * 2**24


def test_update_time_is_that_of_the_matrix_products():
    recipe = paper("train.gradient_checkpointing=false", "hardware.utilization=1.0")
    shape = student()
    tokens, responses = 1024 * 18_432, 1024 * 16_384
    layers = 3 * tokens * (2 * active_parameters(shape) + 4 * 36 * 4096 * 9216)
    head = 3 * 2 * 151_936 * 2560 * responses
    expected = (layers / 989e12 + head / 67e12) / 32
    assert costs.update_cost(recipe, shape, None).seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("override", "purpose", "factor"),
    [
        ("train.gradient_checkpointing=false", "activations", None),
        ("hardware.train_gpus=64", "moments", 0.5),
        ("train.cpu_offload=true", "weights", 0),
        ("lora.rank=16", "weights", 0.5),
        ("train.tokens_per_micro_batch=36_864", "activations", 2),
    ],
)
def test_settings_change_memory(override, purpose, factor):
    one, other = (costs.update_cost(paper(*given), student(), None).memory[purpose] for given in ([], [override]))
    if factor is None:
        assert other > 5 * one
    else:
        assert other == pytest.approx(factor * one, rel=0.05)


def test_gpu_hours_do_not_depend_on_the_number_of_gpus():
    one, other = (costs.update_cost(paper(f"hardware.train_gpus={n}"), student(), None).gpu_hours(10) for n in (16, 32))
    assert one == pytest.approx(other)


def test_generation_samples_as_many_responses_together_as_caches_fit():
    """One Qwen3-4B on one GPU: 8 GB of weights, 1.6 of output matrix; 18,432 tokens of 147,456 bytes per response."""
    overrides = [
        "vllm.tensor_parallel_size=1",
        "hardware.rollout_gpus=1",
        "rollout.batch_size=256",
        "rollout.num_parts=4",
    ]
    recipe = paper(*overrides)
    room = 0.9 * 80 * 2**30 - 2 * 4_022_468_096 - 4 * 151_936 * 2560
    each = 18_432 * 2 * 36 * 8 * 128 * 2 + 3 * 4 * 151_936
    stage = costs.rollout_cost(recipe, student())
    assert stage.concurrent_responses == room // each == 24
    assert stage.bytes <= 0.9 * 80 * 2**30
    assert costs.rollout_cost(paper(*overrides, "vllm.max_num_seqs=8"), student()).concurrent_responses == 8
    # A decoding step of 24 responses reads the weights, the float32 output matrix and the caches, half full on average.
    layers = 2 * (active_parameters(student()))
    read = layers + 4 * 151_936 * 2560 + 24 * (2048 + 8192) * 147_456
    decoding = 1024 / 24 * 16_384 * read / (3350e9 * 0.4)
    prefill = costs.forward_flops(student(), 1024 * 2048, 1024) / (989e12 * 0.4)
    assert stage.seconds == pytest.approx(decoding + prefill, rel=1e-6)
