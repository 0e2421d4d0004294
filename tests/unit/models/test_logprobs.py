"""Log-probs from hidden states equal the plain formula, in value and gradient, for every chunk size."""

import math
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opdctl.models import logprobs
from opdctl.models.batching import pad_batch
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.models.loading import load_model
from opdctl.models.logprobs import Head, map_vocab_chunks, output_head, response_states
from opdctl.recipe.schema import Model

N, D, V, PADDED = 23, 8, 11, 13  # two rows of the matrix are padding
CHUNKS = [1, 4, N, 100]
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 3.0},
}
_constants = torch.Generator().manual_seed(1)
UPSTREAM_NK = torch.randn(N, 4, generator=_constants)
TEACHER_NV = torch.randn(N, V, generator=_constants).log_softmax(-1)
OLD_N = torch.tensor([-1.0, -0.1, 0.1, 1.0]).repeat(N)[:N]  # old minus new log-prob: two are clipped
ADVANTAGE_N = torch.tensor([1.0, -2.0, 0.5, -0.3, 3.0]).repeat(N)[:N]


def ppo(selected_logp_CK, rows):
    ratio_C = (selected_logp_CK[:, 0] - selected_logp_CK[:, 0].detach() - OLD_N[rows]).exp()
    advantage_C = ADVANTAGE_N[rows]
    return -torch.minimum(ratio_C * advantage_C, ratio_C.clamp(0.8, 1.2) * advantage_C).sum()


def kl(logp_CV, rows):
    return (logp_CV.exp() * (logp_CV - TEACHER_NV[rows])).sum()


# Functions of selected log-probs, a function that returns all log-probs, and the tokens' indices.
LOSSES = {
    "linear": lambda selected_logp_CK, whole, rows: (selected_logp_CK * UPSTREAM_NK[rows]).sum(),
    "squares": lambda selected_logp_CK, whole, rows: (selected_logp_CK.square() * UPSTREAM_NK[rows]).sum(),
    "ppo": lambda selected_logp_CK, whole, rows: ppo(selected_logp_CK, rows),
    "read only": lambda selected_logp_CK, whole, rows: (selected_logp_CK[:, 1] * whole().detach().amax(-1)).sum(),
    "reverse kl": lambda selected_logp_CK, whole, rows: kl(whole(), rows),
    "forward kl": lambda selected_logp_CK, whole, rows: -(TEACHER_NV[rows].exp() * whole()).sum(),
    "both": lambda selected_logp_CK, whole, rows: (
        ppo(selected_logp_CK, rows) + (whole().square() * TEACHER_NV[rows]).sum()
    ),
}


def make(count=N, seed=0, bias=False, **kind):
    """Return hidden states, a head, and four ids per token, one of them twice. All but the ids need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, weight_VD, bias_V = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((count, D), (PADDED, D), (PADDED,))
    )
    ids_NK = torch.randint(0, V, (count, 4), generator=generator)
    ids_NK[:, 2] = ids_NK[:, 0]
    return hidden_ND, Head(weight_VD, V, bias_V if bias else None, **kind), ids_NK


def leaves(hidden_ND, head):
    return [value for value in (hidden_ND, head.weight_VD, head.bias_V) if value is not None and value.requires_grad]


def plain(hidden_ND, head):
    """Log-softmax of all logits, in float64."""
    logits_NV = hidden_ND.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_NV = logits_NV + head.bias_V.double()
    logits_NV = logits_NV * head.scale
    if head.softcap:
        logits_NV = head.softcap * (logits_NV / head.softcap).tanh()
    return logits_NV[:, : head.vocab_size].log_softmax(-1)


def plain_loss(loss, hidden_ND, head, ids_NK, order=slice(None)):
    logp_NV = plain(hidden_ND, head)
    return loss(logp_NV.gather(-1, ids_NK), lambda: logp_NV, order)


def chunked_loss(loss, hidden_ND, head, ids_NK, order=None):
    order = torch.arange(len(ids_NK)) if order is None else order
    return map_vocab_chunks(
        head, hidden_ND, ids_NK, lambda chunk: loss(chunk.selected_logp_CK, lambda: chunk.logp_CV, order[chunk.rows])
    )


def in_chunks_of(tokens, vocab_size=PADDED):
    return patch.object(logprobs, "CHUNK_LOGITS", tokens * vocab_size)


def plain_tail(logp_NV, ids_NK):
    return logp_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)


def assert_near(found, want, floor=0.0):
    assert found.shape == want.shape
    assert float((found.double() - want.double()).norm()) <= 1e-5 * float(want.double().norm()) + floor


class Watch(TorchDispatchMode):
    """Records the shape of every tensor that is created."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(value.shape) for value in tree_leaves(out) if isinstance(value, torch.Tensor)}
        return out


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_the_plain_formula(kind, chunk):
    hidden_ND, head, ids_NK = make(**KINDS[kind])
    found, rows = [], []

    def read(part):
        rows.append(torch.arange(N)[part.rows])
        divergence_C = (part.logp_CV.exp() * (part.logp_CV - TEACHER_NV[part.rows])).sum(-1)
        found.append((part.selected_logp_CK, part.entropy_C, *part.top(5), part.logp_CV.clone(), divergence_C))

    with in_chunks_of(chunk), torch.no_grad():
        total = map_vocab_chunks(head, hidden_ND, ids_NK, read, entropy=True)
    assert [len(part) for part in rows] == [min(chunk, N - start) for start in range(0, N, chunk)]
    assert torch.cat(rows).tolist() == list(range(N))
    assert total.item() == 0
    whole_NV = plain(hidden_ND, head).detach()
    top_Nk, top_ids_Nk = whole_NV.topk(5, dim=-1)
    entropy_N, divergence_N = -(whole_NV.exp() * whole_NV).sum(-1), (whole_NV.exp() * (whole_NV - TEACHER_NV)).sum(-1)
    wanted = (whole_NV.gather(-1, ids_NK), entropy_N, top_ids_Nk, top_Nk, whole_NV, divergence_N)
    for value, want in zip((torch.cat(column) for column in zip(*found, strict=True)), wanted, strict=True):
        torch.testing.assert_close(value.double(), want.double(), rtol=0, atol=1e-5)


def test_a_chunk_has_at_least_one_token():
    hidden_ND, head, ids_NK = make()
    sizes = []
    with patch.object(logprobs, "CHUNK_LOGITS", V // 2):
        map_vocab_chunks(head, hidden_ND, ids_NK, lambda chunk: sizes.append(len(chunk.selected_logp_CK)))
    assert sizes == [1] * N


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_tail_equals_the_plain_formula(kind, chunk):
    """The tail of two of the ids, in a loss that also has the selected and all log-probs."""
    hidden_ND, head, ids_NK = make(**KINDS[kind])
    tail_ids_N2 = ids_NK[:, [1, 3]]

    def loss(selected_CK, logp_CV, tail_C, rows):
        by_tail = (tail_C.exp() * UPSTREAM_NK[rows, 0] + tail_C * UPSTREAM_NK[rows, 1]).sum()
        return by_tail + ppo(selected_CK, rows) + (logp_CV.square() * TEACHER_NV[rows]).sum()

    logp_NV = plain(hidden_ND, head)
    wanted = loss(logp_NV.gather(-1, ids_NK), logp_NV, plain_tail(logp_NV, tail_ids_N2), slice(None))
    with in_chunks_of(chunk):
        found = map_vocab_chunks(
            head,
            hidden_ND,
            ids_NK,
            lambda part: loss(part.selected_logp_CK, part.logp_CV, part.tail_logp_C(tail_ids_N2[part.rows]), part.rows),
        )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted_grads = torch.autograd.grad(wanted, leaves(hidden_ND, head))
    for grad, want in zip(torch.autograd.grad(found, leaves(hidden_ND, head)), wanted_grads, strict=True):
        assert_near(grad, want)


@pytest.mark.parametrize(("rest", "is_exact"), [(-5.0, True), (-16.0, True), (-60.0, True), (-90.0, False)])
def test_small_tail_has_the_gradient_of_float64(rest, is_exact):
    """The forward KL of a teacher with 30 % outside the support, for a student with almost nothing there."""
    teacher_3 = torch.tensor([0.5, 0.2, 0.3])
    hidden_ND = torch.tensor([[0.0, rest, rest, rest]], requires_grad=True)
    head, ids_NK = Head(torch.eye(4), 4), torch.tensor([[0, 1]])

    def loss(selected_CK, tail_C):
        student_C3 = torch.cat([selected_CK, tail_C[:, None]], dim=-1)
        return (teacher_3 * (teacher_3.log() - student_C3)).sum()

    found = map_vocab_chunks(
        head, hidden_ND, ids_NK, lambda part: loss(part.selected_logp_CK, part.tail_logp_C(ids_NK))
    )
    logp_NV = hidden_ND.double().log_softmax(-1)
    wanted = loss(logp_NV.gather(-1, ids_NK), plain_tail(logp_NV, ids_NK))
    (found_grad,), (wanted_grad,) = (torch.autograd.grad(value, hidden_ND) for value in (found, wanted))
    assert torch.isfinite(found_grad).all()
    if is_exact:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(found_grad, wanted_grad.float(), rtol=1e-5, atol=1e-7)
    if rest == -16:
        assert found_grad[0].tolist() == pytest.approx([0.5, -0.2, -0.15, -0.15], abs=1e-5)
        assert found.item() == pytest.approx(6.76, abs=0.01)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_the_plain_formula(name, kind, chunk):
    hidden_ND, head, ids_NK = make(**KINDS[kind])
    wanted = plain_loss(LOSSES[name], hidden_ND, head, ids_NK)
    with in_chunks_of(chunk):
        found = chunked_loss(LOSSES[name], hidden_ND, head, ids_NK)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted_grads = torch.autograd.grad(wanted, leaves(hidden_ND, head))
    for grad, want in zip(torch.autograd.grad(found, leaves(hidden_ND, head)), wanted_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad, want)


@given(
    name=st.sampled_from(sorted(LOSSES)),
    kind=st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "scale": st.sampled_from([1.0, 0.0625, 1.5]),
            "softcap": st.sampled_from([None, 1.0, 30.0]),
        }
    ),
    order=st.integers(0, N).flatmap(lambda count: st.permutations(range(count))),
    chunk=st.integers(1, N + 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_gradients_do_not_depend_on_chunks_and_token_order(name, kind, order, chunk, seed):
    hidden_ND, head, ids_NK = make(len(order), seed, **kind)
    with torch.no_grad():
        hidden_ND /= 2  # no probability near 1: 1 - p would have few digits in float32
    rows = torch.tensor(order, dtype=torch.int64)
    wanted = plain_loss(LOSSES[name], hidden_ND, head, ids_NK, torch.arange(len(order)))
    with in_chunks_of(chunk):  # the tokens in another order, each still with its own constants
        found = chunked_loss(LOSSES[name], hidden_ND[rows], head, ids_NK[rows], rows)
    wanted_grads = torch.autograd.grad(wanted, leaves(hidden_ND, head))
    for grad, want in zip(torch.autograd.grad(found, leaves(hidden_ND, head)), wanted_grads, strict=True):
        assert_near(grad, want, floor=1e-5)


def test_padding_rows_get_no_probability_and_no_gradient():
    hidden_ND, head, ids_NK = make(bias=True)
    with torch.no_grad():
        head.weight_VD[V:] += 10  # would be likely
        head.bias_V[V:] += 10
    sums = []

    def loss_fn(chunk):
        sums.append(chunk.logp_CV.detach().exp().sum(-1))
        assert chunk.top(V)[0].max() < V
        return chunk.logp_CV.square().sum() + chunk.selected_logp_CK.sum()

    map_vocab_chunks(head, hidden_ND, ids_NK, loss_fn).backward()
    torch.testing.assert_close(torch.cat(sums), torch.ones(N))
    for value in (head.weight_VD, head.bias_V):
        assert (value.grad[V:] == 0).all()
        assert (value.grad[:V] != 0).all()


@pytest.mark.parametrize("factor", [3.0, -0.5, 0.0])
def test_gradient_is_scaled_by_the_upstream_gradient_and_accumulates(factor):
    hidden_ND, head, ids_NK = make(bias=True)
    wanted = torch.autograd.grad(plain_loss(LOSSES["both"], hidden_ND, head, ids_NK), leaves(hidden_ND, head))
    (factor * chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK)).backward()
    chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK).backward()
    for value, want in zip(leaves(hidden_ND, head), wanted, strict=True):
        assert_near(value.grad, (factor + 1) * want)


@pytest.mark.parametrize("frozen", ["hidden", "matrix", "bias", "head"])
def test_frozen_tensors_get_no_gradient_and_no_memory_for_one(frozen):
    hidden_ND, head, ids_NK = make(bias=True)
    values = {"hidden": hidden_ND, "matrix": head.weight_VD, "bias": head.bias_V}
    still = [value for name, value in values.items() if frozen == name or (frozen == "head" and name != "hidden")]
    for value in still:
        value.requires_grad_(False)
    wanted = torch.autograd.grad(plain_loss(LOSSES["both"], hidden_ND, head, ids_NK), leaves(hidden_ND, head))
    with Watch() as watch, in_chunks_of(4):
        chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK).backward()
    for value, want in zip(leaves(hidden_ND, head), wanted, strict=True):
        assert_near(value.grad, want)
    assert [value.grad for value in still] == [None] * len(still)
    whole = {tuple(value.shape) for value in still}
    assert not whole & watch.shapes
    assert {tuple(value.shape) for value in leaves(hidden_ND, head)} <= watch.shapes


def test_loss_has_no_graph_if_everything_is_frozen():
    hidden_ND, head, ids_NK = make()
    for value in leaves(hidden_ND, head):
        value.requires_grad_(False)
    found = chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK)
    assert not found.requires_grad
    torch.testing.assert_close(found.double(), plain_loss(LOSSES["both"], hidden_ND, head, ids_NK), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_no_grad_gives_the_same_value(mode, kind):
    hidden_ND, head, ids_NK = make(**KINDS[kind])
    requires_grad = []

    def loss_fn(chunk):
        requires_grad.append(
            chunk.selected_logp_CK.requires_grad or chunk.logp_CV.requires_grad or torch.is_grad_enabled()
        )
        return LOSSES["both"](chunk.selected_logp_CK, lambda: chunk.logp_CV, chunk.rows)

    with mode(), in_chunks_of(4):
        found = map_vocab_chunks(head, hidden_ND, ids_NK, loss_fn)
    assert not found.requires_grad
    assert requires_grad == [False] * math.ceil(N / 4)
    torch.testing.assert_close(found.double(), plain_loss(LOSSES["both"], hidden_ND, head, ids_NK), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_zero_tokens_give_zero_loss_and_gradients(name):
    hidden_ND, head, ids_NK = make(0, bias=True)
    found = chunked_loss(LOSSES[name], hidden_ND, head, ids_NK)
    found.backward()
    assert found.item() == 0
    for value in (head.weight_VD, head.bias_V, hidden_ND):
        torch.testing.assert_close(value.grad, torch.zeros_like(value))


def test_zero_tokens_give_one_empty_chunk():
    hidden_ND, head, ids_NK = make(0)
    shapes = []

    def read(chunk):
        shapes.append(
            [value.shape for value in (chunk.selected_logp_CK, chunk.entropy_C, *chunk.top(3), chunk.logp_CV)]
        )

    map_vocab_chunks(head, hidden_ND, ids_NK, read, entropy=True)
    assert shapes == [[(0, 4), (0,), (0, 3), (0, 3), (0, V)]]


def test_chunks_may_have_no_loss_or_a_constant_loss():
    hidden_ND, head, ids_NK = make()

    def loss_fn(chunk):
        start = chunk.rows.start
        return None if start == 0 else torch.tensor(2.5) if start == 4 else chunk.selected_logp_CK[:, 0].sum()

    with in_chunks_of(4):
        found = map_vocab_chunks(head, hidden_ND, ids_NK, loss_fn)
    found.backward()
    picked_N = plain(hidden_ND, head).gather(-1, ids_NK)[8:, 0]
    assert found.item() == pytest.approx(2.5 + picked_N.sum().item(), rel=1e-5)
    assert_near(head.weight_VD.grad, torch.autograd.grad(picked_N.sum(), head.weight_VD)[0])
    assert (hidden_ND.grad[:8] == 0).all()


@pytest.mark.parametrize("result", [None, torch.tensor(1.0)])
def test_backward_works_if_no_chunk_has_a_gradient(result):
    hidden_ND, head, ids_NK = make()
    with in_chunks_of(5):
        found = map_vocab_chunks(head, hidden_ND, ids_NK, lambda chunk: result)
    found.backward()
    assert found.item() == (0 if result is None else 5)
    for value in (hidden_ND, head.weight_VD):
        torch.testing.assert_close(value.grad, torch.zeros_like(value))


def test_second_backward_and_second_derivative_raise():
    hidden_ND, head, ids_NK = make()
    found = chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK)
    found.backward(retain_graph=True)
    first = hidden_ND.grad.clone()
    with pytest.raises(RuntimeError, match="can be taken once"):
        found.backward()
    torch.testing.assert_close(hidden_ND.grad, first, rtol=0, atol=0)
    again = chunked_loss(LOSSES["both"], hidden_ND, head, ids_NK)
    (slope_ND,) = torch.autograd.grad(again.square(), hidden_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope_ND.sum().backward()


def test_bfloat16_hidden_states_use_float32_products():
    hidden_ND, head, ids_NK = make(bias=True)
    half_ND = hidden_ND.detach().bfloat16().requires_grad_()
    single_ND = half_ND.detach().float().requires_grad_()
    found = {}
    for value_ND in (half_ND, single_ND):
        loss = chunked_loss(LOSSES["both"], value_ND, head, ids_NK)
        found[value_ND.dtype] = loss, *torch.autograd.grad(loss, [value_ND, head.weight_VD, head.bias_V])
    (half, grad_ND, *half_grads), (single, want_ND, *single_grads) = found.values()
    assert half.item() == single.item()
    assert grad_ND.dtype == torch.bfloat16
    torch.testing.assert_close(grad_ND, want_ND.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(half_grads, single_grads, rtol=0, atol=0)
    assert single.item() == pytest.approx(plain_loss(LOSSES["both"], half_ND, head, ids_NK).item(), rel=1e-5)


# ── Products on tensor cores ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def float32_results(monkeypatch):
    """bfloat16 products with a float32 result, which a CPU does not have: of the same numbers in float32."""

    def emulate(plain, *operands, out_dtype=None, **options):
        if out_dtype is None:
            return plain(*operands, **options)
        assert [operand.dtype for operand in operands[-2:]] == [torch.bfloat16] * 2
        assert out_dtype == torch.float32
        return plain(*(operand.float() for operand in operands), **options)

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, partial(emulate, getattr(torch, name)))
    monkeypatch.setattr(logprobs, "_has_float32_results", lambda device: True)


def rounded(hidden_ND, head):
    """Return leaves with the numbers of these in bfloat16."""
    bias_V = None if head.bias_V is None else head.bias_V.detach().clone().requires_grad_()
    hidden_ND, weight_VD = (value.detach().bfloat16().float().requires_grad_() for value in (hidden_ND, head.weight_VD))
    return hidden_ND, replace(head, weight_VD=weight_VD, bias_V=bias_V, dtype=torch.float32)


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_products_are_those_of_the_rounded_operands(float32_results, name, kind, chunk):
    """Only a logit's gradient is rounded once more, by at most 2⁻⁹ of it. The master weight gets a float32 gradient."""
    hidden_ND, head, ids_NK = make(**KINDS[kind])
    half_ND = hidden_ND.detach().bfloat16().requires_grad_()
    head = replace(head, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight_VD[V:] += 10  # padding would be likely
    with in_chunks_of(chunk):
        found = chunked_loss(LOSSES[name], half_ND, head, ids_NK)
    exact_ND, exact = rounded(hidden_ND, head)
    wanted = plain_loss(LOSSES[name], exact_ND, exact, ids_NK)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted_grads = torch.autograd.grad(wanted, leaves(exact_ND, exact))
    grads = torch.autograd.grad(found, leaves(half_ND, head))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + [torch.float32] * (len(grads) - 1)
    for grad, want in zip(grads, wanted_grads, strict=True):
        assert float((grad.double() - want).norm()) <= 2**-8 * float(want.norm())
    assert (grads[1][V:] == 0).all()


@pytest.mark.parametrize(("dtype", "gradient_bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.5e-3)])
def test_numbers_at_the_size_of_a_vocabulary(float32_results, dtype, gradient_bound):
    """Of the same bfloat16 operands in float64, for Qwen3's 151,936 rows of which 151,669 are ids."""
    rows, vocabulary, tokens, size = 151_936, 151_669, 12, 64
    generator = torch.Generator().manual_seed(0)
    weight_VD, hidden_ND = (
        torch.randn(count, size, generator=generator).mul(scale).bfloat16()
        for count, scale in ((rows, 0.2), (tokens, 2.0))
    )
    ids_NK = torch.randint(0, vocabulary, (tokens, 1), generator=generator)
    ids_NK[: tokens // 2, 0] = (hidden_ND[: tokens // 2].float() @ weight_VD[:vocabulary].float().T).argmax(-1)
    advantage_N = torch.randn(tokens, generator=generator)
    exact_ND, exact_VD = (value.double().requires_grad_() for value in (hidden_ND, weight_VD))
    wanted_N = (exact_ND @ exact_VD[:vocabulary].T).log_softmax(-1).gather(-1, ids_NK)[:, 0]
    wanted = torch.autograd.grad((wanted_N * advantage_N).sum(), [exact_ND, exact_VD])
    logps, master_VD = [], weight_VD.float().requires_grad_()
    leaf_ND = hidden_ND.float().requires_grad_()  # so that its gradient is not rounded

    def loss(chunk):
        logps.append(chunk.selected_logp_CK[:, 0].detach())
        return (chunk.selected_logp_CK[:, 0] * advantage_N[chunk.rows]).sum()

    found = torch.autograd.grad(
        map_vocab_chunks(Head(master_VD, vocabulary, dtype=dtype), leaf_ND, ids_NK, loss), [leaf_ND, master_VD]
    )
    # float32 sums 152,000 exponentials in the 16 lanes of AVX-512, or in 8, by which the sum is off by 1.4e-5.
    bound = 2e-5 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4e-5
    assert (torch.cat(logps) - wanted_N).abs().max() < bound
    for grad, want in zip(found, wanted, strict=True):
        assert float((grad - want).norm()) < gradient_bound * float(want.norm())


@pytest.mark.parametrize(
    ("device", "has_products", "dtype", "expected"),
    [
        ("cuda", False, torch.bfloat16, torch.bfloat16),
        ("cuda", False, torch.float16, torch.float32),
        ("cuda", False, torch.float32, torch.float32),
        ("cpu", False, torch.bfloat16, torch.float32),
        ("cpu", True, torch.bfloat16, torch.bfloat16),
        ("cpu", True, torch.float32, torch.float32),
    ],
)
def test_dtype_of_the_operands(monkeypatch, device, has_products, dtype, expected):
    monkeypatch.setattr(logprobs, "_has_bfloat16_products", lambda: has_products)
    assert logprobs.product_dtype(torch.device(device), dtype) == expected


@pytest.mark.parametrize("tokens", [1, 12, 200])
def test_products_of_a_cpu_are_those_of_the_rounded_operands(tokens):
    """On a CPU without bfloat16 products oneDNN leaves the operands as they are: the weights are rounded before."""
    generator = torch.Generator().manual_seed(0)
    weight_VD = torch.randn(1000, 256, generator=generator).requires_grad_()
    hidden_ND = torch.randn(tokens, 256, generator=generator).bfloat16()
    ids_N1, logps = torch.randint(0, 1000, (tokens, 1), generator=generator), []

    def loss(chunk):
        logps.append(chunk.selected_logp_CK[:, 0].detach())
        return chunk.selected_logp_CK.sum()

    total = map_vocab_chunks(Head(weight_VD, 1000, dtype=torch.bfloat16), hidden_ND, ids_N1, loss)
    found = torch.autograd.grad(total, weight_VD)[0]
    exact_VD = weight_VD.detach().bfloat16().double().requires_grad_()
    wanted_N = (hidden_ND.double() @ exact_VD.T).log_softmax(-1).gather(-1, ids_N1)[:, 0]
    assert (torch.cat(logps) - wanted_N).abs().max() < 5e-5
    wanted = torch.autograd.grad(wanted_N.sum(), exact_VD)[0]
    assert float((found - wanted).norm()) <= 2**-8 * float(wanted.norm())
    logits_NV = Head(weight_VD.detach().bfloat16().float(), 1000, dtype=torch.bfloat16).logits(hidden_ND)
    torch.testing.assert_close(
        logits_NV.double().log_softmax(-1).gather(-1, ids_N1)[:, 0], wanted_N.detach(), rtol=0, atol=5e-5
    )
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_extreme_logits_give_finite_log_probs_and_gradients():
    hidden_ND, head, ids_NK = make()
    with torch.no_grad():
        hidden_ND.mul_(1e4)
    finite = []

    def loss_fn(chunk):
        finite.append(bool(chunk.logp_CV.isfinite().all() and chunk.entropy_C.isfinite().all()))
        return LOSSES["both"](chunk.selected_logp_CK, lambda: chunk.logp_CV, chunk.rows)

    map_vocab_chunks(head, hidden_ND, ids_NK, loss_fn, entropy=True).backward()
    assert finite == [True]
    assert hidden_ND.grad.isfinite().all()
    assert head.weight_VD.grad.isfinite().all()


def test_no_tensor_has_size_tokens_times_vocabulary():
    tokens, hidden, vocabulary, chunk = 64, 4, 400, 8
    hidden_ND = torch.randn(tokens, hidden, requires_grad=True)
    head = Head(torch.randn(vocabulary, hidden, requires_grad=True), vocabulary, torch.zeros(vocabulary), 0.5, 20.0)
    teacher = Head(torch.randn(vocabulary, hidden), vocabulary)

    def loss_fn(part):
        other_CV = teacher.logits(hidden_ND[part.rows]).log_softmax(-1)
        divergence = (part.logp_CV.exp() * (part.logp_CV - other_CV)).sum()
        return divergence + part.selected_logp_CK.sum() + part.entropy_C.sum() + part.top(7)[1].sum()

    with Watch() as watch, in_chunks_of(chunk, vocabulary):
        map_vocab_chunks(head, hidden_ND, torch.randint(0, vocabulary, (tokens, 3)), loss_fn, entropy=True).backward()
    sizes = {math.prod(shape) for shape in watch.shapes}
    assert chunk * vocabulary in sizes
    assert max(sizes) <= chunk * vocabulary + vocabulary * hidden < tokens * vocabulary


def test_two_ids_of_equal_logit_by_hand():
    # logits 0 and 0: log 1/2 each, entropy log 2; the gradient of one log-prob is ∓ 1/2 times hidden
    head = Head(torch.zeros(2, D, requires_grad=True), 2)
    entropies = []

    def loss_fn(chunk):
        entropies.append(chunk.entropy_C.item())
        return chunk.selected_logp_CK.sum()

    found = map_vocab_chunks(head, torch.ones(1, D), torch.tensor([[1]]), loss_fn, entropy=True)
    found.backward()
    assert found.item() == pytest.approx(-np.log(2))
    assert entropies == pytest.approx([np.log(2)])
    torch.testing.assert_close(head.weight_VD.grad, torch.tensor([[-0.5], [0.5]]).expand(2, D))


@pytest.fixture(scope="module")
def student():
    directory = ModelDir(find_or_download(Model(model="toy:student"), "student.model"), "float32")
    return load_model(directory, device="cpu"), directory


def ragged(lengths):
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 28, p).astype(np.int32), rng.integers(2, 28, r).astype(np.int32)) for p, r in lengths]


@torch.no_grad()
def test_response_states_predict_the_next_token_despite_padding(student):
    """Compared with an unpadded forward pass per sequence; off-by-one is the most common error."""
    model, directory = student
    sequences = ragged([(3, 5), (13, 40), (1, 1), (7, 0), (2, 17)])
    padded = pad_batch(sequences, "cpu")
    hidden_ND, ids_N = response_states(model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
    assert ids_N.tolist() == np.concatenate([response for _, response in sequences]).tolist()
    found = []
    head = output_head(model, directory.vocab_size)
    with in_chunks_of(7, directory.vocab_size):
        map_vocab_chunks(head, hidden_ND, ids_N[:, None], lambda chunk: found.append(chunk.selected_logp_CK[:, 0]))
    for (prompt, response), logp_T in zip(sequences, padded.split(torch.cat(found)), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        whole = model(ids[None]).logits[0].double().log_softmax(-1)
        want = [whole[len(prompt) + t - 1, token].item() for t, token in enumerate(response)]
        np.testing.assert_allclose(logp_T.numpy(), want, rtol=0, atol=2e-5)
