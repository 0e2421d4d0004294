"""The models of an acceptance run: pairs of a student and a teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMON = {"max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": [1], "bos_token_id": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3 8M": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "Qwen3 0.6B": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "Qwen3-MoE 2B": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
"""The second one has the published sizes. The tokenizer is that of the toy tasks: other rows of the vocabulary are
padding. The matrices are not tied, because a random model with tied matrices repeats its input."""
SHARED_MEMORY = ("vllm.enforce_eager=true", "vllm.gpu_memory_utilization=0.3")
"""For engines that start in seconds and fit beside one another and the trainer."""
LOGIT_STD = 2.0  # nats, about that of a trained model


@dataclass(frozen=True)
class Pair:
    """Model directories or toy models, and what the recipe sets for them."""

    name: str
    student: str
    teacher: str
    settings: tuple[str, ...] = ()


def toy_pair() -> Pair:
    """Two models with two attention heads, one for each of two GPUs."""
    settings = ("student.dtype=float32", "teacher.dtype=float32")
    return Pair("toy 0.1M", "toy:student", "toy:student-spread", settings)


def smollm2_pair(directory: str) -> Pair:
    """SmolLM2 teaches itself: the advantage of every token is the rounding between two engines."""
    return Pair("SmolLM2", directory, directory, ("prompts.max_tokens=128",))


def random_pair(name: str, folder: Path, *settings: str, teacher: str | None = None) -> Pair:
    """Write two random models, unless they exist: a student of a config, and a teacher of the same or of another."""
    student_path, teacher_path = (
        folder / f"{model.replace(' ', '-')}-{role}"
        for model, role in ((name, "student"), (teacher or name, "teacher"))
    )
    for seed, (model, path) in enumerate(((name, student_path), (teacher or name, teacher_path))):
        if not (path / "model.safetensors").exists():
            _write(CONFIGS[model], seed, path)
    return Pair(name, str(student_path), str(teacher_path), settings)


def _write(config: dict[str, Any], seed: int, path: Path) -> None:
    import torch
    from helpers.models import save
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    std = LOGIT_STD / config["hidden_size"] ** 0.5
    kind = "qwen3_moe" if "num_experts" in config else "qwen3"
    settings = AutoConfig.for_model(kind, **COMMON, **config, tie_word_embeddings=False, initializer_range=std)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[COMMON["eos_token_id"]] = 0  # a small probability: responses reach a few hundred tokens
    save(model, path)
