"""From hidden states to log-probs, and to a loss on them, without the logits of all tokens in memory.

`map_vocab_chunks` multiplies a few hidden states at a time by the output matrix and passes the chunk to a function. If
the function returns a loss, its gradient is computed at once, while the chunk's logits are in memory. Each of the three
products with the output matrix is therefore computed once, and no more than one chunk of size [C, V] exists. Scoring
and training both use it. Compare the chunked losses of Liger Kernel (Hsu et al. 2024).

Logits and log-probs are float32 for every dtype of the weights: rounding logits to bfloat16 costs 0.03 to 0.04 nats
RMS, and IW-OPD accumulates |A|. If hidden states are bfloat16, a GPU multiplies bfloat16 operands into float32 results,
on its tensor cores. These are the logits of the bfloat16 weights that engines have. A CPU multiplies in float32.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedConfig, PreTrainedModel

from opdctl.models import CHUNK_LOGITS, GPU_CHUNK_LOGITS
from opdctl.models.packing import PackedSequences, packed_row

LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of these settings in the configs of Cohere, Falcon-H1, …; Granite, Inkling; Gemma, RecurrentGemma, xLSTM."""
MIN_OTHERS_PROB = 1e-30
"""Least probability of the ids outside a set: its inverse is a factor of gradients in float32."""
PADDING_LOGIT = -1e30
"""Of rows that are padding. Their probability is 0, and so is its product with their log-prob, which is finite."""
ENTROPY_BLOCK_LOGITS = 2**18
SMALL_BATCH_ROWS = 32  # up to here a CPU computes weight · hiddenᵀ twice as fast as hidden · weightᵀ


@dataclass(frozen=True)
class Head:
    """The LM head: logits = cap(scale (hidden · weightᵀ + bias)), over the first `vocab_size` ids.

    Rows from `vocab_size` on are padding and get probability zero. They are multiplied, too: on a GPU, products with an
    odd number of rows are slow. bias_V is float32, and so is a trained weight_VD. dtype: of the operands of products.
    """

    weight_VD: Tensor
    vocab_size: int
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the logits, [C, V], float32. Not differentiable: use `map_vocab_chunks`."""
        return self._all_logits(hidden_CD)[:, : self.vocab_size]

    @torch.no_grad()
    def padded_logits(self, hidden_CD: Tensor, out_CY: Tensor) -> Tensor:
        """Write the logits to `out_CY`, which has a column for each row of the matrix: PADDING_LOGIT for padding."""
        logits_CY = self._all_logits(hidden_CD, out_CY)
        logits_CY[:, self.vocab_size :] = PADDING_LOGIT
        return logits_CY

    def _all_logits(self, hidden_CD: Tensor, out_CY: Tensor | None = None) -> Tensor:
        weight_VD, hidden_CD = self.weight_VD.to(self.dtype), hidden_CD.to(self.dtype)
        if out_CY is None and len(hidden_CD) <= SMALL_BATCH_ROWS and hidden_CD.device.type == "cpu":
            logits_CY = torch.mm(weight_VD, hidden_CD.T).T.contiguous()
        else:
            logits_CY = torch.mm(hidden_CD, weight_VD.T, out=out_CY, **_float32_result(self.dtype))
        if self.bias_V is not None:
            logits_CY += self.bias_V
        if self.scale != 1:
            logits_CY *= self.scale
        if self.softcap:
            logits_CY.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CY

    def logit_derivative(self, logits_CV: Tensor) -> Tensor:
        """Return the derivative of the logits with respect to hidden · weightᵀ + bias. Overwrites the logits."""
        if not self.softcap:
            return logits_CV.fill_(self.scale)
        return logits_CV.div_(self.softcap).square_().neg_().add_(1).mul_(self.scale)


def _float32_result(dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments with which a product of operands in `dtype` is float32."""
    return {} if dtype == torch.float32 else {"out_dtype": torch.float32}


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of the head's products. torch has a float32 result of 16-bit ones on GPUs only.

    Gradients of log-probs are too small for float16.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and device.type != "cpu" else torch.float32


def output_head(model: PreTrainedModel, vocab_size: int, dtype: torch.dtype | None = None) -> Head:
    """Return a model's head, differentiable in its parameters. They may be tied, have LoRA, or be sharded by FSDP2.

    dtype: of the hidden states, by default the model's.
    """
    layer = model.get_output_embeddings()
    weight_VD = layer.weight
    if hasattr(layer, "get_delta_weight") and not layer.merged and not layer.disable_adapters:
        # LoRA of peft adds the product of its two matrices. An active adapter need not be on this layer.
        deltas = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A]
        weight_VD = _gather(weight_VD) + sum(_gather(delta_VD) for delta_VD in deltas)
    config = model.config.get_text_config(decoder=True)
    bias_V, weight_VD = getattr(layer, "bias", None), _gather(weight_VD)
    dtype = product_dtype(weight_VD.device, dtype or model.dtype)
    return Head(
        weight_VD if weight_VD.dtype == dtype else weight_VD.float(),
        vocab_size,
        None if bias_V is None else _gather(bias_V).float(),
        _scale(config),
        next((cap for name in SOFT_CAPS if (cap := getattr(config, name, None))), None),
        dtype,
    )


def _scale(config: PreTrainedConfig) -> float:
    """Return the factor that a model applies to its logits or to the hidden states before its output matrix."""
    factor = math.prod(getattr(config, name, None) or 1.0 for name in LOGIT_FACTORS)
    divisor = math.prod(getattr(config, name, None) or 1.0 for name in LOGIT_DIVISORS)
    # HyperCLOVA X multiplies by what Granite divides by.
    return factor * divisor if config.model_type.startswith("hyperclovax") else factor / divisor


def _gather(parameter: Tensor) -> Tensor:
    """Gather a sharded parameter on the device of its mesh; with CPU offloading its shards are on the CPU.

    Backward sums the gradients of all ranks, each of which has its own tokens.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    on_mesh = cast(DTensor, parameter.to(mesh.device_type))
    return on_mesh.full_tensor(grad_placements=[Partial()] * mesh.ndim)


class Chunk:
    """Some tokens and their log-probs, valid only during the call of the function that receives it.

    rows: the chunk's tokens among those of the batch. logp_CV: the log-prob of every id, in nats. selected_logp_CK:
    the log-probs of the requested ids. With `gradient`, a loss is differentiable in both.
    """

    def __init__(
        self, rows: slice, logits_CY: Tensor, buffer_CY: Tensor, vocab_size: int, ids_CK: Tensor, gradient: bool
    ):
        """logits_CY: with padding, of the logit PADDING_LOGIT. They are overwritten."""
        self.rows, self._vocab_size, self._ids_CK, self._needs_gradient = rows, vocab_size, ids_CK, gradient
        self._tail: tuple[Tensor, Tensor] | None = None
        self._buffer_CY, self._has_p = buffer_CY, False
        selected_CK = logits_CY.gather(-1, ids_CK)
        # Within two given buffers, and one pass over the logits: memory limits the speed.
        self._logp_CY = torch.log_softmax(logits_CY, -1, out=logits_CY)
        self.logp_CV = self._logp_CY[:, :vocab_size]
        self.selected_logp_CK = self.logp_CV.gather(-1, ids_CK)
        self._logz_C1 = (selected_CK - self.selected_logp_CK)[:, :1]
        if gradient:
            self.logp_CV.requires_grad_()
            self.selected_logp_CK.requires_grad_()

    @property
    def _p_CY(self) -> Tensor:
        """The probability of every id, 0 of padding, in the buffer."""
        if not self._has_p:
            torch.exp(self._logp_CY, out=self._buffer_CY)
            self._has_p = True
        return self._buffer_CY

    def tail_logp_C(self, ids_CK: Tensor) -> Tensor:
        """Return the log-prob of all ids but these, [C], at least log MIN_OTHERS_PROB. Call it once for a chunk.

        It is the log of their sum: 1 minus the probabilities of a few ids would be a rounding error for a small tail.
        With the chunk's `gradient`, a loss is differentiable in it.
        """
        with torch.no_grad():
            p_CK = self._p_CY.gather(-1, ids_CK)
            tail_C1 = self._p_CY.scatter_(-1, ids_CK, 0.0).sum(-1, keepdim=True)
            self._p_CY.scatter_(-1, ids_CK, p_CK)
            logp_C1 = tail_C1.clamp(min=MIN_OTHERS_PROB).log().requires_grad_(self._needs_gradient)
        self._tail = ids_CK, logp_C1
        return logp_C1.squeeze(-1)

    @torch.no_grad()
    def entropy_C(self) -> Tensor:
        """Return the entropy of each token's distribution in nats, without gradient."""
        # In blocks that fit a cache: all products would be another chunk in memory. einsum takes ten times as long.
        size = max(1, ENTROPY_BLOCK_LOGITS // self._p_CY.shape[-1])
        blocks = zip(self._p_CY.split(size), self._logp_CY.detach().split(size), strict=True)
        negative_C = torch.cat([(p_BY * logp_BY).sum(-1) for p_BY, logp_BY in blocks])
        return -negative_C.clamp(max=0)  # rounding could make it negative

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return ids and log-probs of the `k` most probable tokens in descending order, [C, k], without gradient."""
        logp_Ck, ids_Ck = self.logp_CV.topk(k, dim=-1)
        return ids_Ck, logp_Ck

    @torch.no_grad()
    def write_gradient(self, loss: Tensor, head: Head) -> None:
        """Write the gradient of `loss` with respect to hidden · weightᵀ + bias to the buffer. Overwrites the chunk."""
        leaves = [self.selected_logp_CK, self.logp_CV, *([self._tail[1]] if self._tail else [])]
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        selected_CK, all_CV = grads[:2]
        # d log softmax(z)_k / d z_v = [k = v] - p_v, summed over all log-probs in the loss.
        total_C1 = sum(grad.sum(-1, keepdim=True) for grad in grads if grad is not None)
        if self._tail is None or grads[2] is None:
            grad_CY = self._p_CY.mul_(-total_C1)
        else:
            # d log tail / d z_v = [v in the tail] p_v / tail - p_v.
            ids_CK, tail_logp_C1 = self._tail
            p_CK = self._p_CY.gather(-1, ids_CK)
            grad_CY = self._p_CY.mul_(grads[2] / tail_logp_C1.exp() - total_C1)
            grad_CY.scatter_(-1, ids_CK, -total_C1 * p_CK)
        grad_CV = grad_CY[:, : self._vocab_size]
        if selected_CK is not None:
            grad_CV.scatter_add_(-1, self._ids_CK, selected_CK)
        if all_CV is not None:
            grad_CV += all_CV
        if head.softcap or head.scale != 1:
            grad_CV *= head.logit_derivative(self.logp_CV.detach().add_(self._logz_C1))


ChunkFunction = Callable[[Chunk], Tensor | None]


def map_vocab_chunks(head: Head, hidden_ND: Tensor, ids_NK: Tensor, fn: ChunkFunction) -> Tensor:
    """Call `fn` on every chunk of tokens and return the sum of the scalars that it returns.

    The sum is differentiable once, in the hidden states and the head's parameters. `fn` must treat tokens
    independently, so that the sum does not depend on the chunks. It returns None if there is no loss. Other tensors
    that `fn` uses get no gradient.
    """
    values: tuple[Tensor | None, ...] = (hidden_ND, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():
        values = tuple(None if value is None else value.detach() for value in values)
    return _MapVocabChunks.apply(*values, head, ids_NK, fn)


class _MapVocabChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        ids_NK: Tensor,
        fn: ChunkFunction,
    ) -> Tensor:
        values = (hidden_ND, weight_VD, bias_V)
        grads = [
            torch.zeros_like(value, dtype=torch.float32) if value is not None and is_needed else None
            for value, is_needed in zip(values, ctx.needs_input_grad, strict=False)
        ]
        gradient = any(grad is not None for grad in grads)
        total = torch.zeros((), device=hidden_ND.device)
        head = replace(head, weight_VD=weight_VD.to(head.dtype))  # once for all chunks
        limit = CHUNK_LOGITS if hidden_ND.device.type == "cpu" else GPU_CHUNK_LOGITS
        size = min(max(1, limit // len(weight_VD)), max(1, len(hidden_ND)))
        logits_CY, buffer_CY = (torch.empty(size, len(weight_VD), device=hidden_ND.device) for _ in range(2))
        for start in range(0, max(len(hidden_ND), 1), size):  # without tokens there is one empty chunk
            rows = slice(start, start + size)
            count = len(ids_NK[rows])
            logits = head.padded_logits(hidden_ND[rows], logits_CY[:count])
            chunk = Chunk(rows, logits, buffer_CY[:count], head.vocab_size, ids_NK[rows], gradient)
            with torch.set_grad_enabled(gradient):
                loss = fn(chunk)
            if loss is not None:
                total += loss.detach()
            if loss is not None and loss.requires_grad:
                chunk.write_gradient(loss, head)
                _accumulate(grads, buffer_CY[:count], hidden_ND[rows], head, rows)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("map_vocab_chunks: the gradient can be taken once, because it is scaled in place")
        grads, ctx.grads = ctx.grads, None
        return *(None if value is None else value.mul_(grad) for value in grads), None, None, None


def _accumulate(grads: list[Tensor | None], grad_CV: Tensor, hidden_CD: Tensor, head: Head, rows: slice) -> None:
    """Write a chunk's gradient of the hidden states, and add those of matrix and bias, unless None. All are float32.

    In 16 bits a logit's gradient has a relative error of at most 2⁻⁹, as the gradients within the model have.
    """
    hidden_ND, weight_VD, bias_V = grads
    if bias_V is not None:
        bias_V += grad_CV.sum(0)
    grad_CV, options = grad_CV.to(head.dtype), _float32_result(head.dtype)
    if hidden_ND is not None:
        torch.mm(grad_CV, head.weight_VD, out=hidden_ND[rows], **options)
    if weight_VD is not None:
        torch.addmm(weight_VD, grad_CV.T, hidden_CD.to(head.dtype), out=weight_VD, **options)


def response_states(
    model: PreTrainedModel,
    input_ids_BT: Tensor,
    rows_N: Tensor,
    positions_N: Tensor,
    packed: PackedSequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the hidden state that predicts each response token, [N, D], and the token's id, [N].

    Token n is input_ids_BT[rows_N[n], positions_N[n]]; the position before predicts it. packed: the sequences of a
    single row. Otherwise there is no attention mask: rows are padded on the right, and a causal model's real tokens do
    not attend to later positions.
    """
    arguments = packed.model_arguments if packed else {}
    with packed_row(packed):
        hidden_BTD = model.base_model(input_ids=input_ids_BT, use_cache=False, **arguments).last_hidden_state
    flat_N = rows_N * input_ids_BT.shape[1] + positions_N
    return hidden_BTD.flatten(0, 1).index_select(0, flat_N - 1), input_ids_BT.flatten().index_select(0, flat_N)
