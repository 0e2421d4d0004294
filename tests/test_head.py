"""Output heads of real architectures, with adapters and sharded: the model's own log-probs and gradients."""

import dataclasses
import shutil

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from opdctl.errors import OpdctlError
from opdctl.models import logprobs
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.models.loading import load_head, load_model
from opdctl.models.logprobs import check_head, map_vocab_chunks, output_head, response_states
from opdctl.recipe.schema import Model

TOY = find_or_download(Model(model="toy:student"), "student.model")
V = 56  # what the embedded tokenizer knows; the matrices have eight rows more
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
UNTIED, TIED = SMALL | {"tie_word_embeddings": False}, SMALL | {"tie_word_embeddings": True}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**UNTIED)),
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**UNTIED, head_dim=16)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**TIED, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TIED, head_dim=16, final_logit_softcapping=5.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**UNTIED, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**TIED, logit_scale=0.25)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**{**UNTIED, "num_key_value_heads": 2})),
}
OWN = {"gemma2": {"softcap": 5.0}, "granite": {"scale": 1 / 8}, "cohere": {"scale": 0.25}}  # phi: a bias

# Four sequences and ten tokens of them, of which the first seven are in the first two.
IDS_BT = torch.randint(2, V, (4, 15), generator=torch.Generator().manual_seed(0))
ROWS_N = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
POSITIONS_N = torch.tensor([3, 4, 5, 6, 1, 2, 3, 13, 14, 9])
SHIFT_N = torch.linspace(-1, 1, 10)


def make(kind):
    """Return a random model whose logits are some units apart, so that bias, scale and cap all tell."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return model


def save(model, folder, **options):
    """Write a model with the embedded tokenizer, and return its directory."""
    model.save_pretrained(folder, **options)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOY / name, folder)
    return ModelDir(folder, "float32")


def loss_of(logp_NV, picked_N, rows):
    return (picked_N * SHIFT_N[rows]).sum() + (logp_NV.exp() * (logp_NV + SHIFT_N[rows, None])).square().sum()


def plain_logp(model):
    return model(IDS_BT, use_cache=False).logits[ROWS_N, POSITIONS_N - 1, :V].log_softmax(-1)


def plain_loss(model):
    logp_NV = plain_logp(model)
    return loss_of(logp_NV, logp_NV[torch.arange(10), IDS_BT[ROWS_N, POSITIONS_N]], slice(None))


def chunked_loss(model, start=0, stop=10):
    """Return the loss on some of the ten tokens, through this package."""
    hidden_ND, ids_N = response_states(model, IDS_BT, ROWS_N[start:stop], POSITIONS_N[start:stop])

    def use(chunk):
        rows = torch.arange(start, stop)[chunk.rows]
        return loss_of(chunk.logp_CV, chunk.selected_logp_CK[:, 0], rows)

    return map_vocab_chunks(output_head(model, V), hidden_ND, ids_N[:, None], use)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(found, want):
    assert found.keys() == want.keys()
    for name, grad in want.items():
        assert float(grad.norm()) > 0, name
        assert float((found[name] - grad).norm()) <= 1e-5 * float(grad.norm()), name


def assert_as_the_model(model):
    """Log-probs, loss and the gradient of everything that is trained are those of the model's own logits."""
    with torch.no_grad():
        assert check_head(model) < 1e-5
        hidden_ND, _ = response_states(model, IDS_BT, ROWS_N, POSITIONS_N)
        found = output_head(model, V).logits(hidden_ND).log_softmax(-1)
        torch.testing.assert_close(found, plain_logp(model), rtol=0, atol=1e-5)
    ours, theirs = chunked_loss(model), plain_loss(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert_near(gradients(ours, model), gradients(theirs, model))


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 3 * V)


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_s_log_probs_and_gradients_are_its_own(kind):
    """All of its parameters: for tied weights the matrix has gradient through both of its uses."""
    assert_as_the_model(make(kind))


@pytest.mark.parametrize("kind", [*OWN, "phi"])
def test_a_head_s_bias_scale_and_soft_cap_are_seen_and_tell(kind):
    model = make(kind)
    head = output_head(model, V)
    for name, value in OWN.get(kind, {}).items():
        assert getattr(head, name) == pytest.approx(value)
    hidden_ND, _ = response_states(model, IDS_BT, ROWS_N, POSITIONS_N)
    without = dataclasses.replace(head, bias_V=None, scale=1.0, softcap=None)
    apart = head.logits(hidden_ND).log_softmax(-1) - without.logits(hidden_ND).log_softmax(-1)
    assert apart.abs().max() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_known_heads_are_loaded_in_either_type(kind, dtype, tmp_path):
    loaded = load_model(save(make(kind), tmp_path), device="cpu", dtype=dtype)
    assert loaded.dtype == getattr(torch, dtype)
    assert output_head(loaded, V).weight_VD.dtype == torch.float32


def test_an_architecture_that_caps_its_logits_under_another_name_is_refused(tmp_path):
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**TIED, logits_soft_cap=1.0))
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    with pytest.raises(OpdctlError, match="its logits are not what opdctl makes of its hidden states"):
        load_model(save(model, tmp_path), device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_does_more_to_its_logits_is_refused(dtype, tmp_path, monkeypatch):
    directory = save(make("llama"), tmp_path)
    forward = LlamaForCausalLM.forward

    def hotter(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 0.5
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", hotter)
    with pytest.raises(OpdctlError, match="its logits are not what opdctl makes of its hidden states"):
        load_model(directory, device="cpu", dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_without_response_tokens_every_parameter_has_a_gradient_of_zero(kind):
    model = make(kind)
    loss = chunked_loss(model, 0, 0)
    assert loss.item() == 0
    found = gradients(loss, model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all((grad == 0).all() for grad in found.values())


def with_lora(model, *others):
    """Inject adapters of random weights, on the head and elsewhere; `others` adapters are only elsewhere."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], **settings))
    for name in others:
        wrapped.add_adapter(name, peft.LoraConfig(target_modules=["v_proj"], **settings))
    return wrapped


@pytest.mark.parametrize("kind", ["llama", "granite", "phi"])
def test_an_adapter_on_the_head_counts_and_is_trained(kind):
    wrapped = with_lora(make(kind))
    model = wrapped.get_base_model()
    assert_as_the_model(model)
    trained = gradients(chunked_loss(model), model).keys()
    assert {f"lm_head.lora_{matrix}.default.weight" for matrix in "AB"} < trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        assert (output_head(model, V).weight_VD - model.lm_head.weight).abs().max() > 0.1


def test_an_adapter_that_is_off_merged_or_not_on_the_head_does_not_count_twice_nor_at_all():
    wrapped = with_lora(make("llama"), "elsewhere")
    model = wrapped.get_base_model()
    own = plain_logp(model)
    with wrapped.disable_adapter(), torch.no_grad():
        assert (plain_logp(model) - own).abs().max() > 0.1
        assert check_head(model) < 1e-5
    assert check_head(model) < 1e-5
    for active in ("elsewhere", ["default", "elsewhere"]):
        wrapped.base_model.set_adapter(active)
        assert_as_the_model(model)
    wrapped.merge_adapter()
    assert check_head(model) < 1e-5


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_alone_is_the_whole_model_s(kind, shards, tmp_path):
    directory = save(make(kind), tmp_path, max_shard_size="50GB" if shards == 1 else "20KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shards == 1)
    for dtype in ("float32", "bfloat16"):
        directory = ModelDir(tmp_path, dtype)
        found, want = load_head(directory, device="cpu"), output_head(load_model(directory, device="cpu"), V)
        assert (found.vocab_size, found.scale, found.softcap) == (V, want.scale, want.softcap)
        assert not found.weight_VD.requires_grad
        torch.testing.assert_close(found.weight_VD, want.weight_VD, rtol=0, atol=0)
        assert (found.bias_V is None) == (want.bias_V is None) == (kind != "phi")
        if found.bias_V is not None:
            torch.testing.assert_close(found.bias_V, want.bias_V, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "name", "named"),
    [
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("phi", "lm_head.bias", "lm_head.bias"),
        ("qwen3-tied", "model.embed_tokens.weight", "lm_head.weight or model.embed_tokens.weight"),
    ],
)
def test_a_directory_without_the_head_is_refused(kind, name, named, tmp_path):
    directory = save(make(kind), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpdctlError, match=f"no {named} in its safetensors"):
        load_head(directory, device="cpu")


SPLITS = [7, 10]  # what rank 0 has of the ten tokens; rank 1 has the others, or none


def shard(model):
    """Shard a model by FSDP2 as a trainer would, gradients summed and not averaged over ranks: losses are shares."""
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    parts = [fully_shard(layer) for layer in model.model.layers] + [fully_shard(model.model)]
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    else:
        parts.append(fully_shard(model.lm_head))
    for part in parts:
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    return model


def train_sharded(rank, store):
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    logprobs.CHUNK_LOGITS = 3 * V
    kinds = {
        "tied": lambda: make("qwen3-tied"),
        "untied": lambda: make("llama"),
        "bias": lambda: make("phi"),
        "adapter": lambda: with_lora(make("llama")).get_base_model(),
    }
    for kind, build in kinds.items():
        whole = build()
        want = plain_loss(whole)
        wanted = gradients(want, whole)
        for cut in SPLITS:
            model = shard(build())
            assert isinstance(model.lm_head.weight, DTensor)
            loss = chunked_loss(model, *((0, cut), (cut, 10))[rank])
            found = {name: grad.full_tensor() for name, grad in gradients(loss, model).items()}
            total = loss.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, want.detach(), rtol=1e-5, atol=0, msg=f"{kind} {cut}")
            assert_near(found, wanted)
    dist.destroy_process_group()


def test_a_sharded_head_sums_the_gradient_of_all_ranks_tokens_even_of_a_rank_without_any(tmp_path):
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path / "store"),), nprocs=2)
