"""Output heads of real architectures, with adapters and sharded: the model's log-probs and gradients."""

import dataclasses
import gc
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from helpers.models import ARCHITECTURES, make
from helpers.models import VOCAB_SIZE as V
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opdctl.models import logprobs
from opdctl.models.logprobs import map_vocab_chunks, output_head, response_states
from opdctl.models.self_check import scoring_difference

HEAD_SETTINGS = {"gemma2": {"softcap": 5.0}, "granite": {"scale": 1 / 8}, "cohere": {"scale": 0.25}}  # phi: a bias

# Four sequences and ten tokens of them, of which the first seven are in the first two.
IDS_BT = torch.randint(2, V, (4, 15), generator=torch.Generator().manual_seed(0))
ROWS_N = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
POSITIONS_N = torch.tensor([3, 4, 5, 6, 1, 2, 3, 13, 14, 9])
SHIFT_N = torch.linspace(-1, 1, 10)


def loss_of(logp_NV, picked_N, rows):
    return (picked_N * SHIFT_N[rows]).sum() + (logp_NV.exp() * (logp_NV + SHIFT_N[rows, None])).square().sum()


def plain_logp(model):
    return model(IDS_BT, use_cache=False).logits[ROWS_N, POSITIONS_N - 1, :V].log_softmax(-1)


def plain_loss(model):
    logp_NV = plain_logp(model)
    return loss_of(logp_NV, logp_NV[torch.arange(10), IDS_BT[ROWS_N, POSITIONS_N]], slice(None))


def chunked_loss(model, start=0, stop=10):
    """Return the loss on some of the ten tokens, computed in chunks."""
    hidden_ND, ids_N = response_states(model, IDS_BT, ROWS_N[start:stop], POSITIONS_N[start:stop])

    def loss_fn(chunk):
        rows = torch.arange(start, stop)[chunk.rows]
        return loss_of(chunk.logp_CV, chunk.selected_logp_CK[:, 0], rows)

    return map_vocab_chunks(output_head(model, V), hidden_ND, ids_N[:, None], loss_fn)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_near(found, want):
    assert found.keys() == want.keys()
    for name, grad in want.items():
        assert float(grad.norm()) > 0, name
        assert float((found[name] - grad).norm()) <= 1e-5 * float(grad.norm()), name


def assert_equals_model(model):
    """Log-probs, loss and the gradients of all trained parameters equal those of the model's logits."""
    with torch.no_grad():
        assert scoring_difference(model) < 1e-5
        hidden_ND, _ = response_states(model, IDS_BT, ROWS_N, POSITIONS_N)
        found = output_head(model, V).logits(hidden_ND).log_softmax(-1)
        torch.testing.assert_close(found, plain_logp(model), rtol=0, atol=1e-5)
    ours, theirs = chunked_loss(model), plain_loss(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert_near(gradients(ours, model), gradients(theirs, model))


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 3 * V)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logprobs_and_gradients_equal_the_model(kind):
    """For all parameters; a tied matrix has gradients through both of its uses."""
    assert_equals_model(make(kind))


@pytest.mark.parametrize("kind", [*HEAD_SETTINGS, "phi"])
def test_bias_scale_and_soft_cap_have_an_effect(kind):
    model = make(kind)
    head = output_head(model, V)
    for name, value in HEAD_SETTINGS.get(kind, {}).items():
        assert getattr(head, name) == pytest.approx(value)
    hidden_ND, _ = response_states(model, IDS_BT, ROWS_N, POSITIONS_N)
    without = dataclasses.replace(head, bias_V=None, scale=1.0, softcap=None)
    apart = head.logits(hidden_ND).log_softmax(-1) - without.logits(hidden_ND).log_softmax(-1)
    assert apart.abs().max() > 0.5


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_zero_tokens_give_zero_gradients(kind):
    model = make(kind)
    loss = chunked_loss(model, 0, 0)
    assert loss.item() == 0
    found = gradients(loss, model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all((grad == 0).all() for grad in found.values())


def with_lora(model, *others):
    """Add adapters with random weights, on the head and elsewhere; those named in `others` are only elsewhere."""
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head", "q_proj"], **settings))
    for name in others:
        wrapped.add_adapter(name, peft.LoraConfig(target_modules=["v_proj"], **settings))
    return wrapped


@pytest.mark.parametrize("kind", ["llama", "granite", "phi"])
def test_adapter_on_the_head_is_applied_and_trained(kind):
    wrapped = with_lora(make(kind))
    model = wrapped.get_base_model()
    assert_equals_model(model)
    trained = gradients(chunked_loss(model), model).keys()
    assert {f"lm_head.lora_{matrix}.default.weight" for matrix in "AB"} < trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        assert (output_head(model, V).weight_VD - model.lm_head.weight).abs().max() > 0.1


def test_disabled_merged_and_other_adapters():
    wrapped = with_lora(make("llama"), "elsewhere")
    model = wrapped.get_base_model()
    own = plain_logp(model)
    with wrapped.disable_adapter(), torch.no_grad():
        assert (plain_logp(model) - own).abs().max() > 0.1
        assert scoring_difference(model) < 1e-5
    assert scoring_difference(model) < 1e-5
    for active in ("elsewhere", ["default", "elsewhere"]):
        wrapped.base_model.set_adapter(active)
        assert_equals_model(model)
    wrapped.merge_adapter()
    assert scoring_difference(model) < 1e-5


SPLITS = [7, 10]  # tokens of rank 0; rank 1 has the other ones, or none


def shard(model):
    """Shard a model by FSDP2 like the trainer, with gradients summed over ranks: each rank has a part of the loss."""
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
    check_sharded(rank)
    gc.collect()  # frees the sharded models, which refer to the process group, before it is destroyed
    dist.barrier()
    dist.destroy_process_group()


def check_sharded(rank):
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


def test_sharded_head_sums_gradients_over_ranks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # the spawned ranks import this file as tests.unit.…
    torch.multiprocessing.spawn(train_sharded, (str(tmp_path / "store"),), nprocs=2)
