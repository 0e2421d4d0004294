"""Architectures of every kind of cache, state, mask, position and head: log-probs of batches are those of one plain
forward pass over one sequence, in rollouts, scores and training."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.models import save
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, GenerationConfig, PreTrainedModel

from opdctl.artifacts.records import sample_seed
from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import OpdctlError
from opdctl.models.batching import pack_batch, pad_batch
from opdctl.models.decoding import BatchRules
from opdctl.models.directory import LOGPROB_TOLERANCE, ModelDir
from opdctl.models.loading import load_model, reload_weights
from opdctl.models.logprobs import output_head, response_states
from opdctl.models.self_check import enable_packing
from opdctl.recipe.schema import Sampling, Score

VOCAB_SIZE, END_IDS = 56, [1, 5, *range(44, 56)]  # a quarter of the ids ends a response
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GATED_DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8}
NEMOTRON = {
    "hybrid_override_pattern": "M-*-",
    "num_hidden_layers": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}


def rope(kind: str, **settings: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **settings}}


LONGROPE = rope("longrope", short_factor=[1.0] * 8, long_factor=[3.0] * 8, original_max_position_embeddings=24)
KINDS: dict[str, dict[str, object]] = {
    "llama": {},
    "llama, rope yarn": rope("yarn", original_max_position_embeddings=16),
    "llama, rope linear": rope("linear"),
    "gemma2": {
        "sliding_window": 4,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba2": MAMBA,
    "qwen3_next": {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 16},
    "nemotron_h": NEMOTRON,
    "nemotron_h, clamped": {**NEMOTRON, "time_step_min": 0.2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.5,
    },
    "recurrent_gemma": {"logits_soft_cap": 5.0, "tie_word_embeddings": True, "num_hidden_layers": 3},
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "openai-gpt": {"n_embd": 32, "n_head": 2, "n_layer": 2},
    "bart": {
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "is_encoder_decoder": False,
        "is_decoder": True,
    },
    "gemma4_text": {
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 32},
}
"""Settings of a tiny model; the model type is the name up to a comma."""


MULTIMODAL: dict[str, dict[str, object]] = {
    "qwen2_5_vl": {
        "vision_config": QWEN_VISION,
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    },
    "gemma3": {"vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 1},
    "mistral3": {
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8},
        "text_config": {"model_type": "mistral"},
    },
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name in MULTIMODAL:
        settings = {**MULTIMODAL[name], "text_config": {**SIZES, **MULTIMODAL[name].get("text_config", {})}}
        return AutoModelForMultimodalLM.from_config(AutoConfig.for_model(name, **settings, tie_word_embeddings=False))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split(",")[0], **{**SIZES, **KINDS[name]}))


@pytest.fixture(scope="module", params=[*KINDS, *MULTIMODAL])
def architecture(request, tmp_path_factory):
    """Return a model, its directory, and an engine that has loaded it."""
    return load(request.param, tmp_path_factory.mktemp("model"))


def load(name, folder):
    model = build(name).eval()
    model.generation_config = GenerationConfig(eos_token_id=END_IDS, pad_token_id=0)
    directory = ModelDir(save(model, folder), "float32")
    return model, directory, TransformersEngine(directory, "cpu")


def plain_logprobs(model, prompt, response):
    """Return the log-prob of each response token from a pass over this sequence alone."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    with torch.no_grad():
        logp = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :VOCAB_SIZE].log_softmax(-1)
    return logp.gather(-1, ids[0, len(prompt) :, None])[:, 0].numpy()


def sequences(lengths, seed=0):
    """Return a prompt and a response of each pair of lengths."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(6, 44, length).astype(np.int32) for length in pair) for pair in lengths]


def generate(engine, prompts, max_tokens=12):
    requests = [Request(prompt, sample_seed(0, f"sample {i}")) for i, prompt in enumerate(prompts)]
    return engine.generate(requests, Sampling(max_tokens=max_tokens), len(requests), lambda n: None)


def score(engine, pairs, budget):
    requests = [ScoreRequest(prompt, response) for prompt, response in pairs]
    return [scores.logprobs for scores in engine.score(requests, Score(tokens_per_batch=budget), lambda n: None)]


def assert_near(found, want):
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3)


def test_rollouts_with_early_endings(architecture):
    model, _, engine = architecture
    prompts = [prompt for prompt, _ in sequences([(n, 0) for n in (3, 9, 5, 14, 9, 7, 9, 3)])]
    completions = generate(engine, prompts)
    assert len({len(completion.response_ids) for completion in completions}) > 3
    want = [plain_logprobs(model, p, c.response_ids) for p, c in zip(prompts, completions, strict=True)]
    assert_near([completion.logprobs for completion in completions], want)
    assert_near([generate(engine, [prompt])[0].logprobs for prompt in prompts[:1]], want[:1])


def test_scores_of_mixed_batches(architecture):
    model, _, engine = architecture
    pairs = sequences([(3, 20), (9, 2), (5, 31), (1, 1), (14, 7), (2, 0), (9, 2)])
    want = [plain_logprobs(model, *pair) for pair in pairs]
    for budget in (1, 60, 1000):
        assert_near(score(engine, pairs, budget), want)


def test_weights_read_into_a_loaded_model_are_those_of_a_new_one(architecture, tmp_path):
    _, directory, _ = architecture
    loaded = load_model(directory, device="cpu")
    other = directory.with_path(tmp_path / "other")
    shutil.copytree(directory.path, other.path)
    for file in other.path.glob("*.safetensors"):
        tensors = load_file(file).items()
        changed = {name: 1.25 * value if value.is_floating_point() else value for name, value in tensors}
        save_file(changed, file, {"format": "pt"})
    assert reload_weights(loaded, directory, other)
    found, expected = (dict(state_tensors(model)) for model in (loaded, load_model(other, device="cpu")))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def state_tensors(model):
    return itertools.chain(model.named_parameters(), model.named_buffers())


def test_weights_of_another_config_are_not_read_into_a_loaded_model(tmp_path):
    _, directory, _ = load("llama", tmp_path)
    loaded, other = load_model(directory, device="cpu"), directory.with_path(tmp_path / "other")
    shutil.copytree(directory.path, other.path, ignore=shutil.ignore_patterns("other"))
    config = json.loads((other.path / "config.json").read_text())
    (other.path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert not reload_weights(loaded, directory, other)


PACKED = ("llama", "gemma2", "gpt2", "gemma4_text", "qwen2_5_vl", "gemma3", "mistral3")
"""Model types that keep packed sequences separate. The others have a state, or make masks themselves."""


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_forward_pass_of_training(architecture, packs):
    """Also its gradient: neither padding nor packing must change the update."""
    model, directory, _ = architecture
    trained = load_model(directory, device="cpu", dtype="float32")
    if packs:
        obstacle = enable_packing(trained, LOGPROB_TOLERANCE["float32"])
        assert (obstacle is None) == (trained.config.model_type in PACKED), obstacle
        if obstacle:
            return
    pairs = sequences([(3, 12), (9, 2), (5, 5)])
    batch = (pack_batch if packs else pad_batch)(pairs, "cpu")
    hidden_ND, ids_N = response_states(trained, batch.input_ids_BT, batch.rows_N, batch.positions_N, batch.packed)
    logp_NV = output_head(trained, VOCAB_SIZE).logits(hidden_ND).log_softmax(-1)
    found = batch.split(logp_NV.gather(-1, ids_N[:, None])[:, 0])
    assert_near([logp_T.numpy() for logp_T in found], [plain_logprobs(model, *pair) for pair in pairs])
    hidden_ND.square().sum().backward()
    batched = trained.get_input_embeddings().weight.grad.clone()
    trained.zero_grad()
    for pair in pairs:
        alone = pad_batch([pair], "cpu")
        response_states(trained, alone.input_ids_BT, alone.rows_N, alone.positions_N)[0].square().sum().backward()
    torch.testing.assert_close(trained.get_input_embeddings().weight.grad, batched, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("llama", BatchRules()),
        ("qwen3_next", BatchRules()),
        ("bart", BatchRules(left_padding=False)),  # its positions ignore the mask
        ("minimax", BatchRules(left_padding=False, drop_rows=False)),  # a cache class of its own
        ("nemotron_h, clamped", BatchRules(left_padding=False, use_cache=False)),  # by the pass, not by the single step
    ],
)
def test_batches_are_as_large_as_the_architecture_allows(name, rules, tmp_path, capsys):
    _, directory, engine = load(name, tmp_path)
    generate(engine, [np.arange(6, 10, dtype=np.int32)], max_tokens=1)
    assert engine._rules == rules
    reasons = [line for line in capsys.readouterr().err.splitlines() if str(directory.path) in line]
    assert len(reasons) == 3 - sum((rules.left_padding, rules.drop_rows, rules.use_cache))
    engine.load_weights(directory)
    generate(engine, [np.arange(6, 10, dtype=np.int32)], max_tokens=1)
    assert str(directory.path) not in capsys.readouterr().err  # each reason is logged once


# ── Rotary frequencies by the length of the batch ────────────────────────────────────────────────────────────────────

LIMIT = 24
ROPES_BY_LENGTH = {
    "llama, rope dynamic": {**rope("dynamic"), "max_position_embeddings": LIMIT},
    "phi3, rope longrope": {**LONGROPE, "original_max_position_embeddings": LIMIT},
}


@pytest.fixture(params=ROPES_BY_LENGTH)
def by_length(request, tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, request.param, ROPES_BY_LENGTH[request.param])
    return load(request.param, tmp_path)


def test_scores_do_not_depend_on_neighbours_or_on_earlier_batches(by_length):
    """Of sequences below, at and beyond the limit, in every order of the batches."""
    model, _, engine = by_length
    pairs = sequences([(5, 60), (5, 60), (4, 20), (5, 20), (4, 30), (2, 6), (9, 7), (14, 10)])
    # Each by a new model: its rotary embedding keeps what an earlier sequence changed.
    want = [plain_logprobs(copy.deepcopy(model), *pair) for pair in pairs]
    for budget in (1, 70, 1000):
        for order in (pairs, pairs[::-1]):
            found = score(engine, order, budget)
            assert_near(found if order is pairs else found[::-1], want)
    for pair, logprobs in zip(pairs, want, strict=True):
        assert_near(score(engine, [pair], 1000), [logprobs])


def test_sampling_beyond_the_limit_is_rejected(by_length):
    """There, each new token changes the keys of all tokens before, so that no cache is right."""
    _, directory, engine = by_length
    (prompt, _), *_ = sequences([(8, 0)])
    assert len(generate(engine, [prompt], max_tokens=LIMIT - 8)) == 1
    with pytest.raises(OpdctlError) as error:
        generate(engine, [prompt], max_tokens=LIMIT - 7)
    assert error.value.kind == "unsupported_setting"
    assert f"{directory.path}: " in error.value.message
    assert all(f"{number} " in error.value.message for number in (LIMIT, 8, LIMIT - 7))
