"""Model directories that would be loaded with other numbers than the stored ones, and those that are complete."""

import pytest
import torch
from helpers.models import ARCHITECTURES, SMALL, edit_config, edit_tensors, make, save
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.inspection import inspect_model, size_of_position_table

LAYER = "model.layers.1.mlp.up_proj.weight"


def rejection(folder, engine="transformers"):
    """Return the error of the inspection, which must name the directory."""
    with pytest.raises(OpdctlError) as error:
        inspect_model(ModelDir(folder, "float32"), engine)
    assert str(folder) in error.value.message
    assert error.value.hint
    return error.value


@pytest.fixture
def llama(tmp_path):
    return save(make("llama"), tmp_path / "llama")


def rename(prefix):
    def edit(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return edit


def quantize(dtype):
    """Store the matrices of the layers in 8 bits, each with a scale."""

    def edit(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name] = tensors[name].to(dtype)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    return edit


def mixture(folder):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    return save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **experts)), folder)


# ── Complete directories ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_complete_directory_passes(architecture, tmp_path):
    model = make(architecture)
    found = inspect_model(ModelDir(save(model, tmp_path, max_shard_size="20KB"), "float32"))
    assert (found.architecture, found.dtypes, found.ignored_tensors) == (type(model).__name__, ["F32"], [])


def test_mixture_of_experts_passes(tmp_path):
    assert inspect_model(ModelDir(mixture(tmp_path), "float32")).ignored_tensors == []


HARMLESS = {
    "rotary buffers": "model.layers.0.self_attn.rotary_emb.inv_freq",
    "a value head": "v_head.summary.weight",
    "a vision tower": "visual.blocks.0.attn.qkv.weight",
    "an audio tower": "audio_tower.layers.0.fc1.weight",
}


@pytest.mark.parametrize("name", HARMLESS.values(), ids=list(HARMLESS))
def test_tensors_outside_the_decoder_are_ignored(name, llama):
    edit_tensors(llama, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    found = inspect_model(ModelDir(llama, "float32"))
    assert found.ignored_tensors == ([] if "inv_freq" in name else [name])


def test_layers_for_multi_token_prediction_are_ignored(llama):
    extra = LAYER.replace(".1.", ".2.")
    edit_tensors(llama, lambda tensors: tensors.update({extra: tensors[LAYER].clone()}))
    assert extra in rejection(llama).message
    edit_config(llama, num_nextn_predict_layers=1)
    assert inspect_model(ModelDir(llama, "float32")).ignored_tensors == [extra]


def test_equal_copy_of_a_tied_head_passes(tmp_path):
    folder = save(make("qwen3-tied"), tmp_path)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    inspect_model(ModelDir(folder, "float32"))
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    error = rejection(folder)
    assert error.kind == "invalid_model"
    assert "tie_word_embeddings" in error.message
    edit_config(folder, tie_word_embeddings=False)
    inspect_model(ModelDir(folder, "float32"))


def test_quantized_directory_with_its_config_passes(llama):
    edit_tensors(llama, quantize(torch.float8_e4m3fn))
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_config(llama, quantization_config=fp8)
    assert inspect_model(ModelDir(llama, "float32")).dtypes == ["F32", "F8_E4M3"]


# ── Weights that do not match the config ─────────────────────────────────────────────────────────────────────────────

MISMATCHES = {
    "missing": (lambda tensors: tensors.pop(LAYER), LAYER),
    "shape": (lambda tensors: tensors.update({LAYER: torch.zeros(3, 3)}), LAYER),
    "bias": (lambda tensors: tensors.update({LAYER.replace("weight", "bias"): torch.zeros(64)}), ".bias"),
    "more layers": (lambda t: t.update({LAYER.replace(".1.", ".2."): torch.zeros(64, 32)}), "layers.2"),
    "module.": (rename("module."), "`module.`"),
    "_orig_mod.": (rename("_orig_mod."), "`_orig_mod.`"),
    "base_model.model.": (rename("base_model.model."), "`base_model.model.`"),
    "float8": (quantize(torch.float8_e4m3fn), "up_proj.weight"),
    "int8": (quantize(torch.int8), "up_proj.weight"),
    "float8 without scales": (lambda t: t.update({LAYER: t[LAYER].to(torch.float8_e4m3fn)}), LAYER),
    "packed": (lambda t: t.update({LAYER: t[LAYER].to(torch.uint8)}), LAYER),
    "unused scale": (lambda t: t.update({LAYER.replace("weight", "weight_scale"): torch.ones(1)}), "weight_scale"),
}


@pytest.mark.parametrize(("edit", "text"), MISMATCHES.values(), ids=list(MISMATCHES))
def test_weights_that_do_not_match_the_config_are_rejected(edit, text, llama):
    edit_tensors(llama, edit)
    for engine in ("transformers", "vllm"):
        error = rejection(llama, engine)
        assert error.kind == "invalid_model"
        assert text in error.message


def test_mixture_without_one_expert_is_rejected(tmp_path):
    folder = mixture(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    error = rejection(folder)
    assert error.kind == "invalid_model"
    assert "model.layers.1.mlp.experts" in error.message


def test_report_of_transformers_is_not_printed(llama, capfd):
    edit_tensors(llama, lambda tensors: tensors.pop(LAYER))
    rejection(llama)
    assert capfd.readouterr() == ("", "")


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_beside_weights_is_rejected(name, llama):
    (llama / name).write_text("{}")
    error = rejection(llama)
    assert error.kind == "unsupported_model"
    assert name in error.message


@pytest.mark.parametrize("name", ["model.gguf", "pytorch_model.bin", "consolidated.safetensors", "notes.txt"])
def test_directory_without_model_safetensors_is_rejected(name, llama):
    (llama / "model.safetensors").rename(llama / name)
    error = rejection(llama)
    assert error.kind == "unsupported_model"
    assert ("no weight files" if name == "notes.txt" else name) in error.message


def test_cut_weights_are_rejected(llama):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert rejection(llama).kind == "invalid_model"


CONFIGS = {
    "empty": (b"", "invalid_model"),
    "cut": (b'{"model_type": "llama', "invalid_model"),
    "list": (b"[]", "invalid_model"),
    "no type": (b"{}", "unsupported_model"),
    "unknown type": (b'{"model_type": "nosuch"}', "unsupported_model"),
    "wrong type": (b'{"model_type": "llama", "num_hidden_layers": "2"}', "invalid_model"),
    "contradiction": (b'{"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": []}', "invalid_model"),
    "dtype": (b'{"model_type": "llama", "torch_dtype": "torch.bfloat16"}', "invalid_model"),
    "byte order mark": (b'\xef\xbb\xbf{"model_type": "llama"}', "invalid_model"),
    "not causal": (b'{"model_type": "t5"}', "unsupported_model"),
}


@pytest.mark.parametrize(("content", "kind"), CONFIGS.values(), ids=list(CONFIGS))
def test_config_that_is_invalid_or_not_supported_is_rejected(content, kind, llama):
    (llama / "config.json").write_bytes(content)
    assert rejection(llama).kind == kind


def test_code_of_the_directory_is_not_run(llama):
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_config(llama, model_type="theirs", auto_map=auto_map)
    (llama / "code.py").write_text("raise SystemExit('it ran')")
    error = rejection(llama)
    assert error.kind == "unsupported_model"
    assert "trust_remote_code" in error.hint


# ── Quantization ─────────────────────────────────────────────────────────────────────────────────────────────────────

QUANTIZATIONS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "missing_package"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "missing_package"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "missing_package"),
    "unknown": ({"quant_method": "nosuch"}, "unsupported_model"),
}


@pytest.mark.parametrize(("settings", "kind"), QUANTIZATIONS.values(), ids=list(QUANTIZATIONS))
def test_quantization_that_transformers_cannot_load_is_rejected(settings, kind, llama):
    edit_config(llama, quantization_config=settings)
    assert rejection(llama).kind == kind
    assert inspect_model(ModelDir(llama, "float32"), "vllm").architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("settings", [[], {"bits": 4}, "fp8"])
def test_quantization_without_a_method_is_rejected(settings, llama):
    edit_config(llama, quantization_config=settings)
    assert rejection(llama).kind == "invalid_model"


# ── Positions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_size_of_a_table_of_positions(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=48))
    opt_config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    opt_config.max_position_embeddings = 48
    models = {"gpt2": gpt2, "opt": OPTForCausalLM(opt_config), "llama": make("llama")}
    sizes = {name: size_of_position_table(ModelDir(save(m, tmp_path / name), "float32")) for name, m in models.items()}
    assert sizes == {"gpt2": 48, "opt": 48, "llama": None}
