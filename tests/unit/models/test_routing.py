"""The routers of a mixture of experts: found in models of many kinds, counted, recorded, and replayed."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.architectures import make as make_architecture
from helpers.export import IDS_1T, make
from transformers.integrations import moe

from opdctl.errors import OpdctlError
from opdctl.models.routing import NOT_GIVEN, Routers, check_replay, decode_experts, encode_experts

KINDS = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "ernie4_5_moe",
]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_1T, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_many_architectures_can_be_replayed(kind):
    """Some choose from probabilities, some from logits, some from biased scores in groups, some after dense layers."""
    model = make_architecture(kind).eval()
    routers = Routers(model)
    assert routers.num_experts == 4
    check_replay(model, routers)


def test_dense_model_has_no_routers_and_is_refused():
    model = make("qwen3")
    routers = Routers(model)
    assert not routers.experts
    assert routers.metrics(routers.counts()) == {}
    with pytest.raises(OpdctlError) as error:
        check_replay(model, routers)
    assert error.value.kind == "unsupported_setting"


@pytest.mark.parametrize("kind", ["phimoe", "jetmoe", "llama4_text"])
def test_model_with_other_routers_is_refused(kind):
    """PhiMoE takes one maximum after the other, JetMoE has experts in attention, Llama 4 calls all experts."""
    model = make_architecture(kind).eval()
    with pytest.raises(OpdctlError) as error:
        check_replay(model, Routers(model))
    assert error.value.kind in ("unsupported_setting", "unsupported_model")


def test_router_without_topk_has_no_metrics():
    model = make_architecture("phimoe").eval()
    routers = Routers(model)
    with routers.replay(None, torch.ones(IDS_1T.numel(), dtype=torch.bool)):
        logits(model)
    assert routers.metrics(routers.counts()) == {}


def test_replayed_choices_survive_a_disturbed_router():
    """The weights of the experts come from the disturbed router, so the logits are near and not equal."""
    model = make("qwen3_moe").eval()
    routers = Routers(model)
    before, chosen_NLK = routers.record(lambda: logits(model))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.02 * torch.randn_like(layer.mlp.gate.weight)
    _, other_NLK = routers.record(lambda: logits(model))
    with routers.replay(chosen_NLK):
        replayed, repeated_NLK = routers.record(lambda: logits(model))
    assert (chosen_NLK != other_NLK).any()
    assert torch.equal(repeated_NLK, chosen_NLK)
    assert not torch.equal(replayed, before)


def test_weights_are_the_routers_scores_of_the_given_experts():
    model = make("qwen3_moe").eval()
    routers, layer, used = Routers(model), model.model.layers[0].mlp, []
    layer.experts.register_forward_pre_hook(lambda module, arguments: used.append(arguments))
    hidden_1TD = torch.randn(1, 3, 32)
    given_NLK = torch.tensor([[0, 1], [1, 2], [3, 0]])[:, None].expand(3, 2, 2)
    with torch.no_grad(), routers.replay(given_NLK):
        layer(hidden_1TD)
        p_NE = (hidden_1TD[0] @ layer.gate.weight.T).softmax(-1)
    expected_NK = p_NE.gather(-1, given_NLK[:, 0])
    if layer.gate.norm_topk_prob:
        expected_NK = expected_NK / expected_NK.sum(-1, keepdim=True)
    ((_, ids_NK, weights_NK),) = used
    assert torch.equal(ids_NK, given_NLK[:, 0])
    torch.testing.assert_close(weights_NK, expected_NK)


def test_gradient_of_replay_is_that_of_the_chosen_experts():
    """Replaying a router's own choices changes neither loss nor gradient, with recomputed activations too."""
    gradients = []
    for is_replayed, is_checkpointed in ((False, False), (True, False), (True, True)):
        model = make("qwen3_moe")
        routers = Routers(model)
        _, own_NLK = routers.record(lambda model=model: logits(model))
        if is_checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        with routers.replay(own_NLK if is_replayed else None):
            model(input_ids=IDS_1T, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)
    assert gradients[0]["model.layers.0.mlp.gate.weight"].abs().sum() > 0


def test_places_without_experts_are_left_to_the_router():
    model = make("qwen3_moe").eval()
    routers = Routers(model)
    _, own_NLK = routers.record(lambda: logits(model))
    given_NLK = (own_NLK + 1) % routers.num_experts
    given_NLK[3] = NOT_GIVEN
    with routers.replay(given_NLK):
        _, used_NLK = routers.record(lambda: logits(model))
    assert torch.equal(used_NLK[:3], given_NLK[:3])
    assert torch.equal(used_NLK[4:], given_NLK[4:])
    assert (used_NLK[3] != NOT_GIVEN).all()


def test_metrics_by_hand():
    """Two layers of four experts; of three places, the third is not counted."""
    model = make("qwen3_moe").eval()
    routers = Routers(model)
    scores_NE = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4]])
    given_NLK = torch.tensor([[[0, 1], [2, 3]], [[0, 2], [2, 3]], [[0, 1], [0, 1]]])
    with routers.replay(given_NLK, torch.tensor([True, True, False])):
        for layer in (0, 1):
            routers._choose(layer, scores_NE, *scores_NE.topk(2))
    metrics = routers.metrics(routers.counts())
    # The routers choose experts 0 and 1 twice each: loads 1/2, 1/2, 0, 0. Of the eight given ones they choose three.
    assert metrics == {
        "expert_max_load": pytest.approx(2.0),
        "expert_load_entropy": pytest.approx(math.log(2)),
        "unused_experts": pytest.approx(0.5),
        "router_agreement": pytest.approx(3 / 8),
    }
    routers.reset_counts()
    assert "router_agreement" not in routers.metrics(routers.counts())


@pytest.mark.parametrize(("num_experts", "num_bytes"), [(256, 1), (257, 2)])
def test_stored_experts_have_the_bytes_of_vllm(num_experts, num_bytes):
    model = make("qwen3_moe")
    routers = Routers(model)
    routers.num_experts = num_experts
    ids = torch.arange(24).reshape(3, 2, 4) + num_experts - 24
    stored = encode_experts(ids, num_experts)
    expected = ids.numpy().astype(np.uint8 if num_bytes == 1 else np.uint16)
    assert stored.tobytes() == expected.tobytes()
    assert len(stored) == 24 * num_bytes
    np.testing.assert_array_equal(decode_experts(stored, routers, 3), ids)
    for wrong, count in ((stored, 5), (stored[:0], 3), (stored, 0)):
        with pytest.raises(ValueError, match="experts"):
            decode_experts(wrong, routers, count)
    routers.num_experts = num_experts - 1 if num_bytes == 1 else num_experts
    if num_bytes == 1:
        with pytest.raises(ValueError, match="expert 255"):
            decode_experts(stored, routers, 3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_are_multiplied_in_groups_with_the_gradient_of_a_loop(kind):
    gradients = {}
    for implementation in (None, "eager"):
        model = make(kind)
        if implementation:
            model.set_experts_implementation(implementation)
        else:
            assert model.get_experts_implementation()[""] == "grouped_mm"
        with mock.patch.object(moe, "_grouped_mm", wraps=moe._grouped_mm) as grouped:
            model(input_ids=IDS_1T, use_cache=False).logits.logsumexp(-1).sum().backward()
        assert grouped.call_count == (0 if implementation else 4)  # two products in each of two layers
        gradients[implementation] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients[None][name], gradient, rtol=1e-4, atol=1e-5)


def test_a_gpu_multiplies_in_groups_from_compute_capability_8():
    weight = mock.Mock(device=torch.device("cuda"), dtype=torch.bfloat16)
    for capability, is_grouped in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        with mock.patch("torch.cuda.get_device_capability", return_value=capability):
            assert moe._can_use_grouped_mm(weight, weight, weight) == is_grouped
