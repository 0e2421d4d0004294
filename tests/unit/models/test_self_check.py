"""The self-check at load: models whose log-probs depend on padding, on later tokens, or on the cache are rejected."""

import inspect
from logging import getLogger

import pytest
import torch
from helpers.models import SMALL, make, save
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)
from transformers.integrations import hub_kernels

from opdctl.errors import OpdctlError
from opdctl.models.decoding import BatchRules
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.models.self_check import SLOW_KERNEL, check_scoring, find_batch_rules, scoring_difference, tolerance


def build(kind, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, "initializer_range": 0.3, "num_key_value_heads": 2, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def rejection(model, folder, call=None):
    """Return the error of loading a model, or of `call`; it must name the directory."""
    directory = ModelDir(save(model, folder), "float32")
    with pytest.raises(OpdctlError) as error:
        (call or load_model)(directory, device="cpu")
    assert str(folder) in error.value.message
    assert error.value.kind == "unsupported_model"
    return error.value


@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_models_that_see_later_tokens_are_rejected(kind, tmp_path):
    assert "nats" in rejection(build(kind, type_vocab_size=2, embedding_size=32), tmp_path).message


def test_encoder_decoder_is_rejected(tmp_path):
    config = AutoConfig.for_model("bart", vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1)
    assert "encoder-decoder" in rejection(BartForConditionalGeneration(config), tmp_path).message


def test_error_of_a_forward_pass_names_the_directory(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise TypeError("an argument is missing")

    monkeypatch.setattr(LlamaModel, "forward", fail)
    assert "an argument is missing" in rejection(make("llama"), tmp_path).message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_depend_on_the_neighbours_in_a_batch_are_rejected(dtype, tmp_path, monkeypatch):
    """As with a router whose experts have a limited capacity, or positions counted from the end of the batch."""
    forward = LlamaModel.forward

    def by_batch(self, input_ids=None, **kwargs):
        output = forward(self, input_ids=input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state * input_ids.shape[0]
        return output

    model = make("llama").to(dtype)
    assert scoring_difference(model) < tolerance(model) / 5
    monkeypatch.setattr(LlamaModel, "forward", by_batch)
    assert scoring_difference(model) > tolerance(model)
    assert "nats" in rejection(model, tmp_path).message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_that_neither_cache_nor_entire_pass_makes_right_is_rejected(dtype, tmp_path, monkeypatch):
    prepare = LlamaForCausalLM.prepare_inputs_for_generation

    def shifted(self, input_ids, **kwargs):
        return prepare(self, input_ids + 1, **kwargs)

    model = make("llama").to(dtype)
    rules = find_batch_rules(model, tmp_path)
    assert rules.left_padding
    assert rules.drop_rows
    assert rules.use_cache
    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", shifted)
    with pytest.raises(OpdctlError) as error:
        find_batch_rules(model, tmp_path)
    assert error.value.kind == "unsupported_model"
    assert str(tmp_path) in error.value.message


def test_failure_of_a_faster_way_leaves_the_slower_ones(tmp_path, monkeypatch):
    """A model that accepts no attention mask decodes prompts of one length."""
    forward = LlamaModel.forward

    def without_mask(self, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise TypeError("no mask is supported")
        return forward(self, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", without_mask)
    assert find_batch_rules(make("llama"), tmp_path) == BatchRules(left_padding=False)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_missing_kernels_are_a_warning_where_there_is_a_gpu(has_gpu, tmp_path, monkeypatch, capsys):
    assert SLOW_KERNEL in inspect.getsource(hub_kernels).replace('"\n                    f"', "")
    forward, message = LlamaModel.forward, f"`scan` {SLOW_KERNEL} because `mamba_ssm` is not installed"

    def by_slow_code(self, **kwargs):
        getLogger("transformers").warning(message)
        return forward(self, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", by_slow_code)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    check_scoring(make("llama"), tmp_path)
    check_scoring(make("llama"), tmp_path)
    assert capsys.readouterr().err.count(message) == has_gpu
