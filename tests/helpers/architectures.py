"""Tiny random models of every architecture of transformers, each with a tokenizer, as published model directories.

A model's settings are those of its config class, with small sizes by name (`SIZES`), and `SETTINGS` where that does not
suffice.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto

CAUSAL = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MULTIMODAL = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
"""The class of each type of config that transformers generates text with."""

SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]  # ids 0, 1, 2
CORPUS = ["What is 1 + 2? Reason step by step, and put the answer within the box.", "sort the letters of the word"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>' }}{% endif %}"
)
VOCAB_ROWS = 320
VOCAB = 300
"""Ids of the tokenizer. The matrices have more rows, as many published models."""
EOS_IDS = (2, *range(256, 290))
"""Ids that end a response: a ninth of all, so that the responses of a batch end at different times."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_ROWS,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "sliding_window": 8,
    "d_model": 64,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "num_layers": 4,
    "num_heads": 4,
    "n_layers": 4,
    "n_heads": 4,
    "emb_dim": 64,
    "embedding_size": 32,
    "rotary_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,
    "index_topk": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "vocab_size_per_layer_input": VOCAB_ROWS,
    "hidden_size_per_layer_input": 8,
    "query_pre_attn_scalar": 16,
    "type_vocab_size": 2,
    "base_channels": 32,
    "depth": 2,
    "out_hidden_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "projection_dim": 64,
}
"""Settings by name. A config gets those that it has."""

LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
CONV_AND_FULL = {"layer_types": ["conv", "full_attention"] * 2}
MAMBA_AND_HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


def mrope(*sections: int, **settings: Any) -> dict[str, Any]:
    return rope("default", mrope_section=list(sections), **settings)


SLIDING_AND_FULL_MROPE = SLIDING_AND_FULL | {
    "rope_parameters": {kind: mrope(2, 3, 3)["rope_parameters"] for kind in SLIDING_AND_FULL["layer_types"]}
}
QSA = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
MLA = {"num_key_value_heads": 4}
DECODER = {"is_decoder": True}
ATTENTION_SCALE = {"attention_multiplier": 0.25}
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "blt": {
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "encoder_hash_byte_group_vocab": 64,
    },
    "camembert": DECODER,
    "chameleon": {"vocabulary_map": {"<image>": 10}},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5},
    "cohere2_vision": {"alignment_intermediate_size": 64},
    "cohere_compass": {"text_config": SLIDING_AND_FULL_MROPE},
    "cohere_compass_text": SLIDING_AND_FULL_MROPE,
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "ctrl": {"dff": 96},
    "cwm": {"bos_token_id": 1},
    "data2vec-text": DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "hidden_size": 64},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2}},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "electra": DECODER,
    "emu3": {"text_config": {"bos_token_id": 1}, "vocabulary_map": {"<image>": 10}},
    "ernie": DECODER,
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 32]} | mrope(3, 3, 2)},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3": {"text_config": SLIDING_AND_FULL},
    "gemma3_text": SLIDING_AND_FULL,
    "gemma3n_text": SLIDING_AND_FULL | {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 32, "num_kv_shared_layers": 0},
    "glm46v": {"text_config": mrope(2, 3, 3)},
    "glm4_moe_lite": MLA,
    "glm4v": {"text_config": mrope(2, 3, 3)},
    "glm4v_moe": {"text_config": mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "glm_moe_dsa": MLA,
    "glm_ocr": {"text_config": mrope(2, 3, 3)},
    "glmga": {"text_config": mrope(2, 3, 3)},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granite": ATTENTION_SCALE,
    "granitemoe": ATTENTION_SCALE,
    "granitemoehybrid": LINEAR_AND_FULL | ATTENTION_SCALE,
    "granitemoeshared": ATTENTION_SCALE,
    "hunyuan_vl": {"text_config": mrope(2, 3, 3)},
    "hyperclovax": ATTENTION_SCALE,
    "hyperclovax_vision_v2": {"text_config": ATTENTION_SCALE},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_k25": {"text_config": MLA},
    "kimi_linear": MLA | LINEAR_AND_FULL | {"linear_head_dim": 16, "linear_num_heads": 4},
    "laguna": SLIDING_AND_FULL,
    "lfm2": CONV_AND_FULL,
    "lfm2_moe": CONV_AND_FULL,
    "llama4": {"vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}},
    "longcat_flash": MLA | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "megatron-bert": DECODER,
    "mellum": SLIDING_AND_FULL,
    "minicpm3": MLA,
    "mistral4": MLA,
    "mllama": {"text_config": {"bos_token_id": 1}},
    "modernbert-decoder": {"bos_token_id": 1, "local_attention": 8},
    "paddleocr_vl": {"text_config": mrope(2, 3, 3)},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen2_5_omni_thinker": {"text_config": mrope(2, 3, 3)},
    "qwen2_5_vl": {"text_config": mrope(2, 3, 3)},
    "qwen2_vl": {"text_config": mrope(2, 3, 3), "vision_config": {"embed_dim": 64, "mlp_ratio": 1}},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "reformer": DECODER | {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 96},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER | {"shape_vocab_size": 16, "pronunciation_vocab_size": 16},
    "roformer": DECODER,
    "smollm3": SLIDING_AND_FULL,
    "xlm": {"causal": True},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xmod": DECODER | {"default_language": "en_XX"},
    "youtu": MLA | {"pad_token_id": None},  # transformers zeroes the embedding of a padding token when it loads one
    "zamba": MAMBA_AND_HYBRID,
    "zamba2": MAMBA_AND_HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}
"""Further settings of a type."""

LLAMA3 = rope("llama3", factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONGROPE = rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=32)
VARIANTS: dict[str, dict[str, Any]] = {
    "bert, encoder": {"model_type": "bert", "is_decoder": False},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, rope dynamic": {"model_type": "llama", "max_position_embeddings": 32, **rope("dynamic", factor=2.0)},
    "llama, rope linear": {"model_type": "llama", **rope("linear", factor=2.0)},
    "llama, rope llama3": {"model_type": "llama", **LLAMA3},
    "llama, rope yarn": {"model_type": "llama", **rope("yarn", factor=2.0, original_max_position_embeddings=16)},
    "llama, rope longrope": {"model_type": "llama", **LONGROPE},
    "phi3, rope longrope": {"model_type": "phi3", "original_max_position_embeddings": 32, **LONGROPE},
    "qwen3, tied": {"model_type": "qwen3", "tie_word_embeddings": True},
}
"""Further models of a type."""

IMAGES = "its forward pass requires images"
TIMM = "needs the package timm"
NO_CONFIG = "no tiny config was found"
NOT_BUILT: dict[str, str] = {
    "blip": IMAGES,
    "blip-2": IMAGES,
    "cosmos3_edge": NO_CONFIG,
    "diffusion_gemma": "a diffusion model",
    "fast_vlm": TIMM,
    "florence2": "an encoder-decoder",
    "fun_asr_nano": NO_CONFIG,
    "gemma3n": TIMM,
    "gemma4_assistant": "a drafter for speculative decoding, without embeddings",
    "gemma4_unified_assistant": "a drafter for speculative decoding, without embeddings",
    "glm5_next": NO_CONFIG,
    "granite4_vision": NO_CONFIG,
    "idefics": IMAGES,
    "instructblip": IMAGES,
    "instructblipvideo": IMAGES,
    "kosmos-2": IMAGES,
    "kyutai_speech_to_text": "its tokens are audio codes",
    "muse_glimmer": NO_CONFIG,
    "musicgen": "its tokens are audio codes",
    "musicgen_melody": "its tokens are audio codes",
    "nemotron_h_omni": NO_CONFIG,
    "perception_lm": TIMM,
    "pi0": "its forward pass requires the state of a robot",
    "pix2struct": "an encoder-decoder",
    "pp_formulanet": "an encoder-decoder",
    "qwen2_5_omni": NO_CONFIG,
    "qwen3_omni_moe": NO_CONFIG,
    "shieldgemma2": "a classifier",
    "t5gemma2": "an encoder-decoder",
    "udop": "an encoder-decoder",
    "vibevoice_asr": NO_CONFIG,
    "vision-encoder-decoder": "an encoder-decoder",
    "voxtral_realtime": "its forward pass requires audio",
}
"""Types that have no tiny model here, and why."""

NAMES = [name for name in [*CAUSAL, *sorted(MULTIMODAL.keys() - CAUSAL.keys()), *VARIANTS] if name not in NOT_BUILT]


def make(name: str, seed: int = 0, sizes: Mapping[str, int] = MappingProxyType({})) -> PreTrainedModel:
    """Return a tiny random model, float32, whose logits differ much and depend on all tokens before.

    name: a type, or one of `VARIANTS`. sizes: instead of those in `SIZES`.
    """
    settings = dict(VARIANTS.get(name, {}))
    model_type = settings.pop("model_type", name)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_arguments(config_class, SETTINGS.get(model_type, {}) | settings, SIZES | sizes))
    torch.manual_seed(seed)
    model = getattr(transformers, MULTIMODAL.get(model_type) or CAUSAL[model_type])(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.std() < 0.15:
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:  # biases and norms are initialized to 0 and 1
                parameter += 0.1 * torch.randn_like(parameter)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        if head is not None and head.weight is embedding:
            embedding.normal_(std=0.1)  # otherwise the most probable token is always the last one
        embedding[0] = 0  # some classes do this to the padding token when they load a model
    return model


def _arguments(
    config_class: type[PreTrainedConfig], settings: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a config: `sizes` where it has these settings, then `settings`."""
    names = {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    arguments = {name: value for name, value in sizes.items() if name in names}
    default = config_class() if config_class.sub_configs else None
    parts = {name: getattr(default, name) for name in config_class.sub_configs}
    for name, part in parts.items():
        if isinstance(part, PreTrainedConfig):
            part_arguments = _arguments(type(part), settings.get(name, {}), sizes)
            arguments[name] = {"model_type": part.model_type, **part_arguments}
    return arguments | {name: value for name, value in settings.items() if name not in parts}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCAB` ids with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model directory as published: weights, config, generation config and tokenizer."""
    model.generation_config = GenerationConfig(eos_token_id=list(EOS_IDS), pad_token_id=0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
