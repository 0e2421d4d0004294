"""The vLLM engine, and small models that it can load."""

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers.commands import small_recipe
from helpers.models import SMALL, save
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.v1.engine import core as engine_core

from opdctl.artifacts.records import Completion
from opdctl.engines.base import Engine, EngineContext, Request, ScoreRequest
from opdctl.engines.vllm import VllmEngine
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Score

NEAR = 2e-4  # nats in float32; the measured difference is 6e-5
# Tests run several engines in one process, which share its process group. vLLM would destroy it with the first of them.
destroy_process_groups = engine_core.cleanup_dist_env_and_memory
engine_core.cleanup_dist_env_and_memory = lambda *arguments: None
LENGTHS = ("prompts.max_tokens=60", "rollout.max_tokens=180")


def start(model: ModelDir, *overrides: str) -> VllmEngine:
    gc.collect()  # closed engines, whose processes would have ended
    recipe = small_recipe("vllm.enforce_eager=true", *LENGTHS, *overrides)
    return VllmEngine(model, EngineContext(recipe, recipe.student, "cpu"))


def load(engine: VllmEngine, model: ModelDir, *overrides: str) -> None:
    """Load weights as the processes of an engine do: if it hands over, it becomes a new one."""
    if (handover := engine.load_weights(model)) is not None:
        engine.close()
        vars(engine).clear()
        vars(engine).update(vars(start(model, *overrides)))
        engine.take_over(handover)


def pair_of_tied_models(folder: Path) -> list[ModelDir]:
    """Two random models with near-uniform distributions, eight padding rows, a tied output matrix, and the
    end-of-sequence ids 1 and 5. The config contains another one, and the generation config an id without a row, which
    must be ignored."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        # vLLM's attention on the CPU requires a head size of 32.
        config = LlamaConfig(**SMALL | {"num_attention_heads": 1}, tie_word_embeddings=True)
        paths.append(save(LlamaForCausalLM(config), folder / str(seed)))
        settings = json.loads((paths[-1] / "config.json").read_text())
        (paths[-1] / "config.json").write_text(json.dumps(settings | {"eos_token_id": 9}))
        generation = json.loads((paths[-1] / "generation_config.json").read_text())
        eos = {"eos_token_id": [*generation["eos_token_id"], 99999]}
        (paths[-1] / "generation_config.json").write_text(json.dumps(generation | eos))
    return [ModelDir(path, "float32") for path in paths]


def changed(model: ModelDir, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> ModelDir:
    """Copy a model with its tensors changed."""
    path = Path(shutil.copytree(model.path, folder))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return ModelDir(path, model.dtype)


def answers(wanted: list[Request], completions: list[Completion]) -> list[ScoreRequest]:
    return [ScoreRequest(r.prompt_ids, c.response_ids, c.top_ids) for r, c in zip(wanted, completions, strict=True)]


def logprobs(engine: Engine, answered: list[ScoreRequest]) -> np.ndarray:
    return np.concatenate([each.logprobs for each in engine.score(answered, Score(), lambda n: None)])


def near(found: object, wanted: object) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=NEAR)
