"""From hidden states to what a model says of each token, and to a loss on it, without the logits in memory.

`over_chunks` is the one way: it multiplies a few hidden states at a time by the output matrix, hands the chunk to a
function, and, where that returns a loss, takes the gradient at once, while the chunk's logits are still there. So the
three products with the output matrix are made once each, and of size [tokens, vocabulary] there is never more than a
chunk. Scoring and training both go through it.

Products and softmax run in float32 whatever the weights' type: rounding to bfloat16 alone costs 0.03 to 0.04 nats RMS,
and IW-OPD adds up |A|.

Shapes: B responses, T positions, N response tokens of the batch, C tokens of a chunk, D hidden size, V vocabulary,
K ids picked out of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

CHUNK_LOGITS = 2**24  # float32 logits of a chunk: 64 MiB
SMALL_BATCH_ROWS = 32  # rows up to which a CPU multiplies a large matrix by them twice as fast as them by the matrix


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: cap(scale (hidden · weightᵀ + bias)), over the first `vocab_size` ids.

    Rows from `vocab_size` on pad the matrix and get no probability. weight_VD and bias_V are float32.
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CD: Tensor, out_CV: Tensor | None = None) -> Tensor:
        """Return the logits, [C, V], float32, in `out_CV` if given. Not differentiable: see `over_chunks`."""
        with torch.no_grad(), torch.autocast(hidden_CD.device.type, enabled=False):
            weight_VD, hidden_CD = self.weight_VD[: self.vocab_size], hidden_CD.float()
            if out_CV is None and len(hidden_CD) <= SMALL_BATCH_ROWS:
                logits_CV = torch.mm(weight_VD, hidden_CD.T).T.contiguous()
            else:
                logits_CV = torch.mm(hidden_CD, weight_VD.T, out=out_CV)
            if self.bias_V is not None:
                logits_CV += self.bias_V[: self.vocab_size]
            if self.scale != 1:
                logits_CV *= self.scale
            if self.softcap:
                logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
            return logits_CV

    def logit_derivative(self, logits_CV: Tensor) -> Tensor:
        """Return the derivative of logits by hidden · weightᵀ + bias. Uses the logits up."""
        if not self.softcap:
            return logits_CV.fill_(self.scale)
        return logits_CV.div_(self.softcap).square_().neg_().add_(1).mul_(self.scale)


def output_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """Return a model's head, with gradient into its parameters: tied, with LoRA, or sharded by FSDP2."""
    layer = model.get_output_embeddings()
    weight_VD = layer.weight
    if hasattr(layer, "get_delta_weight") and not layer.merged and not layer.disable_adapters:
        # peft's LoRA: the product of its two matrices on top. An active adapter need not be on this layer.
        deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A]
        weight_VD = _whole(weight_VD) + sum(_whole(delta_VD) for delta_VD in deltas)
    config = model.config.get_text_config()
    bias_V = getattr(layer, "bias", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(
        _whole(weight_VD).float(),
        vocab_size,
        None if bias_V is None else _whole(bias_V).float(),
        scale,
        getattr(config, "final_logit_softcapping", None),
    )


def _whole(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter. Each rank's gradient is that of its own tokens; they are summed as they go back."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)


class Chunk:
    """Some tokens and their log-probs; alive only while the function that it is handed to runs.

    rows: which of the batch's tokens these are. logp_CV: the log-prob of every id, in nats. selected_logp_CK: those of the ids
    asked for. Where a gradient is wanted it flows from `selected_logp_CK` and, if that was used, from `logp_CV`.
    """

    def __init__(self, rows: slice, logits_CV: Tensor, buffer_CV: Tensor, ids_CK: Tensor, gradient: bool):
        self.rows, self._ids_CK = rows, ids_CK
        # log softmax in the two given arrays: what costs time here is memory, and fresh memory most of all.
        greatest_C1 = logits_CV.amax(-1, keepdim=True)
        self._p_CV = torch.exp(logits_CV.sub_(greatest_C1), out=buffer_CV)
        mass_C1 = self._p_CV.sum(-1, keepdim=True)
        self._p_CV.div_(mass_C1)
        self.logp_CV = logits_CV.sub_(mass_C1.log())
        self._logz_C1 = greatest_C1 + mass_C1.log()
        self.selected_logp_CK = self.logp_CV.gather(-1, ids_CK)
        if gradient:
            self.logp_CV.requires_grad_()
            self.selected_logp_CK.requires_grad_()

    @torch.no_grad()
    def entropy_C(self) -> Tensor:
        """Return the entropy of each token's distribution, without gradient."""
        return -torch.einsum("cv,cv->c", self._p_CV, self.logp_CV).clamp(max=0)  # rounding must not make it negative

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the ids and log-probs of the `k` most probable tokens, falling, [C, k], without gradient."""
        logp_Ck, ids_Ck = self.logp_CV.topk(k, dim=-1)
        return ids_Ck, logp_Ck

    @torch.no_grad()
    def gradient(self, loss: Tensor, head: Head) -> Tensor:
        """Return the gradient of `loss` by hidden · weightᵀ + bias, [C, V]. Uses the chunk up."""
        selected_logp_CK, whole_CV = torch.autograd.grad(loss, [self.selected_logp_CK, self.logp_CV], allow_unused=True)
        # d log softmax(z)_k / d z_v = [k = v] - p_v, and so for each log-prob that the loss depends on.
        total_C1 = sum(grad.sum(-1, keepdim=True) for grad in (selected_logp_CK, whole_CV) if grad is not None)
        grad_CV = self._p_CV.mul_(-total_C1)
        if selected_logp_CK is not None:
            grad_CV.scatter_add_(-1, self._ids_CK, selected_logp_CK)
        if whole_CV is not None:
            grad_CV += whole_CV
        if head.softcap or head.scale != 1:
            grad_CV *= head.logit_derivative(self.logp_CV.detach().add_(self._logz_C1))
        return grad_CV


Use = Callable[[Chunk], Tensor | None]


def map_vocab_chunks(head: Head, hidden_ND: Tensor, ids_NK: Tensor, use: Use) -> Tensor:
    """Call `use` on every chunk of tokens and return the sum of the scalars that it returns.

    The sum is differentiable, once, in the hidden states and the head's parameters. `use` must treat tokens one by one,
    so that the chunks' sums add up, whatever the chunks; it returns None where there is no loss to it. No gradient
    reaches anything else that `use` works with.
    """
    values: tuple[Tensor | None, ...] = (hidden_ND, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():
        values = tuple(None if value is None else value.detach() for value in values)
    return _OverChunks.apply(*values, head, ids_NK, use)


class _OverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: Head, ids_NK: Tensor, use: Use
    ) -> Tensor:
        values = (hidden_ND, weight_VD, bias_V)
        grads = [
            torch.zeros_like(value, dtype=torch.float32) if value is not None and wanted else None
            for value, wanted in zip(values, ctx.needs_input_grad, strict=False)
        ]
        gradient = any(grad is not None for grad in grads)
        total = torch.zeros((), device=hidden_ND.device)
        size = min(max(1, CHUNK_LOGITS // head.vocab_size), max(1, len(hidden_ND)))
        logits_CV, buffer_CV = (torch.empty(size, head.vocab_size, device=hidden_ND.device) for _ in range(2))
        for start in range(0, max(len(hidden_ND), 1), size):  # no tokens are one empty chunk
            rows = slice(start, start + size)
            count = len(ids_NK[rows])
            chunk = Chunk(
                rows, head.logits(hidden_ND[rows], logits_CV[:count]), buffer_CV[:count], ids_NK[rows], gradient
            )
            with torch.set_grad_enabled(gradient):
                loss = use(chunk)
            if loss is not None:
                total += loss.detach()
            if loss is not None and loss.requires_grad:
                _add(grads, chunk.gradient(loss, head), hidden_ND[rows].float(), head, rows)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("over_chunks: its gradient can be taken once: it is scaled in place")
        grads, ctx.grads = ctx.grads, None
        return *(None if value is None else value.mul_(grad) for value in grads), None, None, None


def _add(grads: list[Tensor | None], grad_CV: Tensor, hidden_CD: Tensor, head: Head, rows: slice) -> None:
    """Add a chunk's share to the gradients of hidden states, matrix and bias, where they are wanted."""
    hidden_ND, weight_VD, bias_V = grads
    if hidden_ND is not None:
        torch.mm(grad_CV, head.weight_VD[: head.vocab_size], out=hidden_ND[rows])
    if weight_VD is not None:
        weight_VD[: head.vocab_size].addmm_(grad_CV.T, hidden_CD)
    if bias_V is not None:
        bias_V[: head.vocab_size] += grad_CV.sum(0)


def response_states(
    model: PreTrainedModel, input_ids_BT: Tensor, rows_N: Tensor, positions_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the hidden state that predicts each response token, [N, D], and the token's id, [N].

    Token n is input_ids_BT[rows_N[n], positions_N[n]]; it is predicted from the position before. Rows are padded on
    the right, where a causal model's real tokens cannot see, so there is no attention mask.
    """
    hidden_BTD = model.base_model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
    flat_N = rows_N * input_ids_BT.shape[1] + positions_N
    return hidden_BTD.flatten(0, 1).index_select(0, flat_N - 1), input_ids_BT.flatten().index_select(0, flat_N)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> float:
    """Return how far, in nats, this file's log-probs are from those of the model's own logits, on a few tokens.

    They differ when the model does more to its logits than a `Head` knows of.
    """
    ids_1T = torch.arange(8, device=model.device)[None]
    theirs_TV = model(input_ids=ids_1T, use_cache=False).logits[0].float().log_softmax(-1)
    positions_N = torch.arange(1, 8, device=model.device)
    hidden_ND, ids_N = response_states(model, ids_1T, torch.zeros_like(positions_N), positions_N)
    ours_CV = output_head(model, theirs_TV.shape[-1]).logits(hidden_ND).log_softmax(-1)
    return float((theirs_TV[:-1] - ours_CV).gather(-1, ids_N[:, None]).abs().max())
