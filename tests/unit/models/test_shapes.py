"""The number of parameters of a shape, compared with real models."""

import pytest
import torch
from bench.qwen3 import build_model
from helpers.engines import directory
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3nTextConfig, Gemma4TextConfig

from opdctl.models import shapes
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import ModelShape


@settings(max_examples=15)
@given(
    layers=st.integers(1, 3),
    hidden=st.integers(1, 8).map(lambda n: 8 * n),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    inner=st.integers(1, 40),
    experts=st.sampled_from([1, 4]),
    tied=st.booleans(),
)
def test_parameters_equal_the_models(layers, hidden, kv_heads, groups, inner, experts, tied):
    shape = ModelShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=16,
        intermediate_size=inner,
        vocab_size=50,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = build_model(shape)
    assert shapes.count_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_shape_is_read_from_the_config():
    for name, parameters in (("toy:student", 110_528), ("toy:teacher", 365_664)):
        shape = shapes.read_shape(directory(name))
        assert shape is not None
        assert shapes.count_parameters(shape) == parameters


@pytest.mark.parametrize(
    ("config", "head_dim", "intermediate_size"),
    [
        (Gemma4TextConfig(num_hidden_layers=6, head_dim=16, global_head_dim=32, intermediate_size=48), 32, 48),
        (Gemma3nTextConfig(num_hidden_layers=6, head_dim=16, intermediate_size=[48, 96, 48, 48, 48, 48]), 16, 96),
    ],
    ids=["head_dim", "intermediate_size"],
)
def test_largest_size_of_the_layers_counts(config, head_dim, intermediate_size, tmp_path):
    config.save_pretrained(tmp_path)
    shape = shapes.read_shape(ModelDir(tmp_path, "float32"))
    assert shape is not None
    assert (shape.head_dim, shape.intermediate_size) == (head_dim, intermediate_size)
