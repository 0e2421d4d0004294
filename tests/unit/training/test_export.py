"""The exported student: the files of the initial student with the trained values, for directories of many kinds."""

import json

import pytest
import torch
from helpers.commands import small_recipe
from helpers.export import IDS_1T, KINDS, LINEAR_ATTENTION, check_export, edit_tensors, make, train_and_export
from helpers.models import SMALL, save
from helpers.ranks import in_ranks
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.core_model_loading import revert_weight_conversion

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.training import export
from opdctl.training.conversions import find_conversions
from opdctl.training.export import MergedWeights, StudentExporter, check_exportable
from opdctl.training.policy import check_trainable, load_policy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export_has_the_stored_tensors_with_the_trained_values(kind, tied, tmp_path):
    folder = save(make(kind, tied=tied), tmp_path / "student")
    policy, exported = train_and_export(folder)
    check_export(folder, policy, exported)
    assert {file.name for file in exported.iterdir()} == {file.name for file in folder.iterdir()}
    assert json.loads((exported / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_shards_keep_their_files_and_index(tmp_path):
    folder = save(make("qwen3_moe"), tmp_path / "student", max_shard_size="20KB")
    (folder / "model-old.safetensors").write_bytes(b"not a model")
    check_export(folder, *train_and_export(folder))
    indices = [
        json.loads((path / "model.safetensors.index.json").read_text()) for path in (folder, tmp_path / "exported")
    ]
    assert indices[0] == indices[1]
    assert len(set(indices[0]["weight_map"].values())) > 2
    exported = train_and_export(folder, dtype="bfloat16")[1]
    metadata = json.loads((exported / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["total_size"] * 2 == indices[0]["metadata"]["total_size"]


@pytest.mark.parametrize("files_named_by_config", [False, True])
def test_files_above_the_limit_are_divided(files_named_by_config, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_WEIGHT_FILE_BYTES", 20_000)
    folder = save(make("qwen3_moe"), tmp_path / "student")
    if files_named_by_config:
        (folder / "model.safetensors").rename(folder / "own.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    policy, exported = train_and_export(folder)
    stored, written = (ModelDir(path, "float32").weights for path in (folder, exported))
    assert {name: header.shape for name, header in written.tensors.items()} == {
        name: header.shape for name, header in stored.tensors.items()
    }
    assert len(written.files) > 3
    for file in written.files:
        sizes = [header.end - header.start for header in written.tensors.values() if header.file == file]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(header.end - header.start for header in written.tensors.values())
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        torch.testing.assert_close(model(IDS_1T).logits, policy(IDS_1T).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_by_parts_are_those_of_the_complete_state(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save(make(kind), tmp_path / "student"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    expected, found = revert_weight_conversion(model, dict(weights)), {}
    for conversion in find_conversions(model, weights):
        found |= conversion.convert(model, {name: weights[name] for name, _ in conversion.sources})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_export_holds_the_weights_of_one_layer_of_experts(tmp_path, monkeypatch):
    folder, held, convert = save(make("qwen3_moe"), tmp_path / "student"), [], MergedWeights._convert

    def watch(weights, source):
        converted = convert(weights, source)
        tensors = [*weights._converted.values(), *converted.values()]
        held.append(sum(tensor.nbytes for tensor in tensors))
        return converted

    monkeypatch.setattr(MergedWeights, "_convert", watch)
    policy, _ = train_and_export(folder)
    experts = policy.model.layers[0].mlp.experts
    assert max(held) <= sum(parameter.nbytes for parameter in experts.parameters())
    assert len(held) > 20


@pytest.mark.parametrize("overrides", [(), ("lora.rank=4",)])
@pytest.mark.parametrize("num_ranks", [2, 4])  # one file is left for a second round, or one rank has none
def test_ranks_share_the_files_of_one_process(num_ranks, overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_WEIGHT_FILE_BYTES", 60_000)
    student = ModelDir(save(make("qwen3_moe"), tmp_path / "student"), "float32")

    def export_to(name: str) -> dict[str, int]:
        policy, directory = load_policy(student, small_recipe(*overrides), "cpu"), tmp_path / name
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01)
        directory.mkdir(exist_ok=True)
        return StudentExporter(policy, student, "float32").export(directory)

    expected = export_to("one")
    written = in_ranks(num_ranks, lambda: export_to("ranks"))
    assert len(expected) == 3
    assert [list(of_rank) for of_rank in written] == [list(expected)[rank::num_ranks] for rank in range(num_ranks)]
    assert {name: size for of_rank in written for name, size in of_rank.items()} == expected
    files = {file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file()}
    assert all((tmp_path / "ranks" / file).read_bytes() == (tmp_path / "one" / file).read_bytes() for file in files)


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_weights_are_stored_as_before(stored, tmp_path):
    folder = save(make("qwen3", tied=True), tmp_path / "student")
    matrix = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    names = {"embedding": ["model.embed_tokens.weight"], "head": ["lm_head.weight"]}
    chosen = names.get(stored, [*names["embedding"], *names["head"]])
    edit_tensors(
        folder,
        lambda tensors: {
            **{name: tensor for name, tensor in tensors.items() if name not in names["embedding"]},
            **dict.fromkeys(chosen, matrix),
        },
    )
    check_export(folder, *train_and_export(folder))
    written = load_file(tmp_path / "exported/model.safetensors")
    assert all(torch.equal(written[name], written[chosen[0]]) for name in chosen)


def test_names_without_the_prefix_of_the_base_model_are_kept(tmp_path):
    """As in the published GPT-2."""
    folder = save(make("gpt2", tied=True), tmp_path / "student")
    edit_tensors(folder, lambda tensors: {name.removeprefix("transformer."): value for name, value in tensors.items()})
    check_export(folder, *train_and_export(folder))


def multimodal(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**SMALL, "head_dim": 16, "initializer_range": 0.3}
    vision = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
    if kind == "gemma3":
        vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60)
        return Gemma3ForConditionalGeneration(config).float()
    vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    return Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text | LINEAR_ATTENTION, vision_config=vision)
    ).float()


@pytest.mark.parametrize("overrides", [(), ("lora.rank=4",)])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_towers_and_further_heads_are_unchanged(kind, overrides, tmp_path):
    folder = save(multimodal(kind), tmp_path / "student")
    extra = {"mtp.fc.weight": torch.ones(3, 3), "v_head.summary.weight": torch.ones(1, 32, dtype=torch.bfloat16)}
    edit_tensors(folder, lambda tensors: tensors | extra)
    policy, exported = train_and_export(folder, *overrides)
    check_export(folder, policy, exported)
    check_export(folder, policy, exported, AutoModelForImageTextToText)
    before, after = (load_file(path / "model.safetensors") for path in (folder, exported))
    kept = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert len(kept) > 10
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == [type(multimodal(kind)).__name__]
    assert not any("vision" in name or "visual" in name for name, p in policy.named_parameters() if p.requires_grad)


def test_export_dtype_holds_for_all_but_weights_stored_with_more_bits(tmp_path):
    folder = save(make("qwen3_next").bfloat16(), tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {"unknown_key": [1]}))
    edit_tensors(folder, lambda tensors: {k: v.float() if "A_log" in k else v for k, v in tensors.items()})
    for dtype in ("bfloat16", "float32"):
        exported = train_and_export(folder, dtype=dtype)[1]
        tensors = load_file(exported / "model.safetensors")
        assert {tensor.dtype for name, tensor in tensors.items() if "A_log" in name} == {torch.float32}
        assert {tensor.dtype for name, tensor in tensors.items() if "A_log" not in name} == {getattr(torch, dtype)}
        expected = config | {"unknown_key": [1], "torch_dtype": dtype}
        assert json.loads((exported / "config.json").read_text()) == expected


def test_frozen_weights_with_more_bits_are_exact(tmp_path):
    folder = save(make("qwen3_next").bfloat16(), tmp_path / "student")
    edit_tensors(folder, lambda tensors: {k: v.float() + 1e-5 if "A_log" in k else v for k, v in tensors.items()})
    exported = train_and_export(folder, "lora.rank=2", 'lora.target_modules=["q_proj"]', dtype="bfloat16")[1]
    before, after = (load_file(path / "model.safetensors") for path in (folder, exported))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}


def test_settings_are_copied_and_stray_files_are_not(tmp_path):
    folder = save(make("qwen3"), tmp_path / "student")
    kept = ("preprocessor_config.json", "modeling_own.py", "LICENSE", "additional_chat_templates/tools.jinja")
    stray = ("pytorch_model.bin", "old.safetensors", "pytorch_model.bin.index.json", "optimizer.pt", "README.md")
    for name in (*kept, *stray):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "generation_config.json").unlink()
    exported = train_and_export(folder)[1]
    files = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    expected = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {*stray}
    assert files == expected


def test_weight_without_a_place_in_the_files_is_refused(tmp_path):
    """transformers loads both names into one weight, and only one of them would get the trained values."""
    folder = save(make("gpt2"), tmp_path / "student")
    edit_tensors(folder, lambda tensors: tensors | {"wte.weight": tensors["transformer.wte.weight"]})
    with pytest.raises(OpdctlError) as error:
        check_trainable(ModelDir(folder, "float32"), small_recipe())
    assert error.value.kind == "unsupported_model"
    assert str(folder) in error.value.message
    assert error.value.hint


def test_lost_weight_is_refused(tmp_path):
    folder = save(make("qwen3"), tmp_path / "student")
    student = ModelDir(folder, "float32")
    model = load_policy(student, small_recipe(), "cpu")
    model.model.layers[1].mlp.up_proj.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(OpdctlError) as error:
        check_exportable(model, student)
    assert error.value.kind == "unsupported_model"
    assert "model.layers.1.mlp.up_proj.extra" in error.value.message


def test_quantized_student_is_refused(tmp_path):
    folder = save(make("qwen3"), tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(OpdctlError) as error:
        check_exportable(make("qwen3"), ModelDir(folder, "float32"))
    assert error.value.kind == "unsupported_model"
    assert error.value.hint
