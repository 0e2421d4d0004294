"""From hidden states to log-probs, and to a loss on them, without the logits of all tokens in memory.

`map_vocab_chunks` multiplies a few hidden states at a time by the output matrix and passes the chunk to a function. If
the function returns a loss, its gradient is computed at once, while the chunk's logits are in memory. Each of the three
products with the output matrix is therefore computed once, and no more than one chunk of size [C, V] exists. Scoring
and training both use it. Compare the chunked losses of Liger Kernel (Hsu et al. 2024).

Logits and log-probs are float32 for every dtype of the weights: rounding logits to bfloat16 costs 0.03 to 0.04 nats
RMS, and IW-OPD accumulates |A|. If hidden states are bfloat16, bfloat16 operands are multiplied into float32 results:
on the tensor cores of a GPU, or by a CPU that has such products. These are the logits of the bfloat16 weights that
engines have. Other CPUs multiply in float32.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedConfig, PreTrainedModel

from opdctl.models import BLOCK_LOGITS, CHUNK_LOGITS, GPU_BLOCK_LOGITS, GPU_CHUNK_LOGITS
from opdctl.models.packing import PackedSequences, packed_row

LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of these settings in the configs of Cohere, Falcon-H1, …; Granite, Inkling; Gemma, RecurrentGemma, xLSTM."""
MIN_OTHERS_PROB = 1e-30
"""Least probability of the ids outside a set: its inverse is a factor of gradients in float32."""
PADDING_LOGIT = -1e30
"""Of rows that are padding. Their probability is 0, and so is its product with their log-prob, which is finite."""
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
        weight_VD, hidden_CD = self.weight_VD, _operand(hidden_CD, self.dtype)
        if _has_float32_results(weight_VD.device):
            weight_VD = weight_VD.to(self.dtype)
        with _products(weight_VD.device, self.dtype) as options:
            if out_CY is None and len(hidden_CD) <= SMALL_BATCH_ROWS and hidden_CD.device.type == "cpu":
                logits_CY = torch.mm(weight_VD, hidden_CD.T).T.contiguous()
            else:
                logits_CY = torch.mm(hidden_CD, weight_VD.T, out=out_CY, **options)
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


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of the head's products. Gradients of log-probs are too small for float16."""
    has_products = device.type != "cpu" or _has_bfloat16_products()
    return torch.bfloat16 if dtype == torch.bfloat16 and has_products else torch.float32


def _has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 operands into float32 results, and oneDNN lets it."""
    is_supported = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return is_supported and torch.backends.mkldnn.is_available()


def _has_float32_results(device: torch.device) -> bool:
    """Whether torch has products of 16-bit matrices with a float32 result. On a CPU oneDNN rounds float32 matrices."""
    return device.type != "cpu"


def _operand(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an operand of a product, rounded to `dtype`. It is float32 where 16-bit ones have no float32 result."""
    if value.dtype == dtype == torch.float32:
        return value
    rounded = value.to(dtype)
    return rounded if _has_float32_results(value.device) else rounded.float()


def _products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[dict[str, Any]]:
    """Round the operands of products to `dtype` on a CPU. Yield the arguments with which their result is float32."""
    if dtype == torch.float32:
        return nullcontext({})
    return nullcontext({"out_dtype": torch.float32}) if _has_float32_results(device) else _let_onednn_round()


@contextmanager
def _let_onednn_round() -> Iterator[dict[str, Any]]:
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield {}
    finally:
        settings.fp32_precision = before


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
        weight_VD if weight_VD.dtype == dtype and _has_float32_results(weight_VD.device) else weight_VD.float(),
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


class _Blocks:
    """Blocks of rows of a matrix with `width` columns, with two buffers of the size of a block."""

    def __init__(self, width: int, max_rows: int, device: torch.device):
        limit = BLOCK_LOGITS if device.type == "cpu" else GPU_BLOCK_LOGITS
        self._rows = min(max(1, limit // width), max(1, max_rows))
        self._buffers = [torch.empty(self._rows, width, device=device) for _ in range(2)]

    def slices(self, count: int) -> list[slice]:
        """Return the blocks of `count` rows."""
        return [slice(start, min(start + self._rows, count)) for start in range(0, count, self._rows)]

    def buffers(self, block: slice) -> tuple[Tensor, Tensor]:
        first_BY, second_BY = (buffer_BY[: block.stop - block.start] for buffer_BY in self._buffers)
        return first_BY, second_BY


class Chunk:
    """Some tokens and their log-probs, valid only during the call of the function that receives it.

    rows: the chunk's tokens among those of the batch. selected_logp_CK: the log-probs of the requested ids, in nats.
    entropy_C: of each token's distribution, in nats, without gradient, if it was requested. With `gradient`, a loss is
    differentiable in all log-probs.

    Memory limits the speed. So the logits are the only matrix of their size; what is computed of them goes through
    blocks of rows, which on a CPU fit its cache.
    """

    def __init__(
        self,
        rows: slice,
        logits_CY: Tensor,
        blocks: _Blocks,
        vocab_size: int,
        ids_CK: Tensor,
        *,
        entropy: bool,
        gradient: bool,
    ):
        """logits_CY: with padding, of the logit PADDING_LOGIT. They are overwritten."""
        self.rows, self._logits_CY, self._blocks = rows, logits_CY, blocks
        self._vocab_size, self._ids_CK, self._needs_gradient = vocab_size, ids_CK, gradient
        self._all_logp_CV: Tensor | None = None
        self._tail: tuple[Tensor, Tensor] | None = None
        self._max_C1, self._log_sum_C1 = (logits_CY.new_empty(len(logits_CY), 1) for _ in range(2))
        self.entropy_C = logits_CY.new_empty(len(logits_CY)) if entropy else None
        for block in blocks.slices(len(logits_CY)):
            self._normalize(block)
        self._logz_C1 = self._max_C1 + self._log_sum_C1
        self.selected_logp_CK = logits_CY.gather(-1, ids_CK).sub_(self._max_C1).sub_(self._log_sum_C1)
        if gradient:
            self.selected_logp_CK.requires_grad_()

    def _normalize(self, block: slice) -> None:
        """Find the logarithm of the sum of the exponentials of a block of logits, and the entropy."""
        logits_BY, (shifted_BY, exp_BY) = self._logits_CY[block], self._blocks.buffers(block)
        torch.amax(logits_BY, -1, keepdim=True, out=self._max_C1[block])
        torch.sub(logits_BY, self._max_C1[block], out=shifted_BY)
        sum_B1 = torch.exp(shifted_BY, out=exp_BY).sum(-1, keepdim=True)
        torch.log(sum_B1, out=self._log_sum_C1[block])
        if self.entropy_C is not None:
            # No term is negative, so rounding cannot make the sum negative.
            mean_B1 = shifted_BY.mul_(exp_BY).sum(-1, keepdim=True) / sum_B1
            self.entropy_C[block] = (self._log_sum_C1[block] - mean_B1).squeeze(-1)

    def _p_BY(self, block: slice, out_BY: Tensor) -> Tensor:
        """Write the probabilities of a block, 0 of padding, to `out_BY`, which may be the block itself."""
        torch.sub(self._logits_CY[block], self._max_C1[block], out=out_BY)
        return out_BY.sub_(self._log_sum_C1[block]).exp_()

    @property
    def logp_CV(self) -> Tensor:
        """The log-prob of every id, in place of its logit."""
        if self._all_logp_CV is None:
            with torch.no_grad():
                self._logits_CY.sub_(self._max_C1).sub_(self._log_sum_C1)
            self._max_C1, self._log_sum_C1 = (torch.zeros_like(self._max_C1) for _ in range(2))  # of log-probs
            self._all_logp_CV = self._logits_CY[:, : self._vocab_size].requires_grad_(self._needs_gradient)
        return self._all_logp_CV

    def tail_logp_C(self, ids_CK: Tensor) -> Tensor:
        """Return the log-prob of all ids but these, [C], at least log MIN_OTHERS_PROB. Call it once for a chunk.

        It is the log of their sum: 1 minus the probabilities of a few ids would be a rounding error for a small tail.
        With the chunk's `gradient`, a loss is differentiable in it.
        """
        tail_C1 = torch.empty_like(self._max_C1)
        with torch.no_grad():
            for block in self._blocks.slices(len(tail_C1)):
                p_BY = self._p_BY(block, self._blocks.buffers(block)[0])
                torch.sum(p_BY.scatter_(-1, ids_CK[block], 0.0), -1, keepdim=True, out=tail_C1[block])
            logp_C1 = tail_C1.clamp(min=MIN_OTHERS_PROB).log().requires_grad_(self._needs_gradient)
        self._tail = ids_CK, logp_C1
        return logp_C1.squeeze(-1)

    @torch.no_grad()
    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return ids and log-probs of the `k` most probable tokens in descending order, [C, k], without gradient."""
        logits_Ck, ids_Ck = self._logits_CY[:, : self._vocab_size].topk(k, dim=-1)
        return ids_Ck, logits_Ck.sub_(self._max_C1).sub_(self._log_sum_C1)

    @torch.no_grad()
    def write_gradient(self, loss: Tensor, head: Head) -> Tensor:
        """Return the gradient of `loss` with respect to hidden · weightᵀ + bias, [C, Y], in place of the logits."""
        tail_logp_C1 = self._tail[1] if self._tail else None
        leaves = {"selected": self.selected_logp_CK, "all": self._all_logp_CV, "tail": tail_logp_C1}
        present = [name for name, leaf in leaves.items() if leaf is not None]
        found = torch.autograd.grad(loss, [cast(Tensor, leaves[name]) for name in present], allow_unused=True)
        grads = {name: grad for name, grad in zip(present, found, strict=True) if grad is not None}
        # d log softmax(z)_k / d z_v = [k = v] - p_v, summed over all log-probs in the loss.
        total_C1 = sum((grad.sum(-1, keepdim=True) for grad in grads.values()), torch.zeros_like(self._max_C1))
        factor_C1 = -total_C1
        if tail_logp_C1 is not None and "tail" in grads:
            # d log tail / d z_v = [v in the tail] p_v / tail - p_v.
            factor_C1 = factor_C1 + grads["tail"] / tail_logp_C1.exp()
        offset_C1 = self._logz_C1 - self._max_C1 - self._log_sum_C1  # of logits to what is in their place
        for block in self._blocks.slices(len(total_C1)):
            logits_BY, (derivative_BY, _) = self._logits_CY[block], self._blocks.buffers(block)
            if head.softcap or head.scale != 1:
                head.logit_derivative(torch.add(logits_BY, offset_C1[block], out=derivative_BY))
            p_BY = self._p_BY(block, logits_BY)
            if self._tail and "tail" in grads:
                ids_BK = self._tail[0][block]
                others_BK = -total_C1[block] * p_BY.gather(-1, ids_BK)
                p_BY.mul_(factor_C1[block]).scatter_(-1, ids_BK, others_BK)
            else:
                p_BY.mul_(factor_C1[block])
            grad_BV = p_BY[:, : self._vocab_size]
            if "selected" in grads:
                grad_BV.scatter_add_(-1, self._ids_CK[block], grads["selected"][block])
            if "all" in grads:
                grad_BV += grads["all"][block]
            if head.softcap or head.scale != 1:
                grad_BV *= derivative_BY[:, : self._vocab_size]
        return self._logits_CY


ChunkFunction = Callable[[Chunk], Tensor | None]


def map_vocab_chunks(
    head: Head, hidden_ND: Tensor, ids_NK: Tensor, fn: ChunkFunction, *, entropy: bool = False
) -> Tensor:
    """Call `fn` on every chunk of tokens and return the sum of the scalars that it returns.

    The sum is differentiable once, in the hidden states and the head's parameters. `fn` must treat tokens
    independently, so that the sum does not depend on the chunks. It returns None if there is no loss. Other tensors
    that `fn` uses get no gradient. entropy: whether a chunk has the entropies of its tokens.
    """
    values: tuple[Tensor | None, ...] = (hidden_ND, head.weight_VD, head.bias_V)
    if not torch.is_grad_enabled():
        values = tuple(None if value is None else value.detach() for value in values)
    return _MapVocabChunks.apply(*values, head, ids_NK, fn, entropy)


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
        entropy: bool,
    ) -> Tensor:
        values = (hidden_ND, weight_VD, bias_V)
        grads = [
            torch.zeros_like(value, dtype=torch.float32) if value is not None and is_needed else None
            for value, is_needed in zip(values, ctx.needs_input_grad, strict=False)
        ]
        gradient = any(grad is not None for grad in grads)
        total = torch.zeros((), device=hidden_ND.device)
        head = replace(head, weight_VD=_operand(weight_VD, head.dtype))  # once for all chunks
        limit = CHUNK_LOGITS if hidden_ND.device.type == "cpu" else GPU_CHUNK_LOGITS
        size = min(max(1, limit // len(weight_VD)), max(1, len(hidden_ND)))
        logits_CY = torch.empty(size, len(weight_VD), device=hidden_ND.device)
        blocks = _Blocks(len(weight_VD), size, hidden_ND.device)
        for start in range(0, max(len(hidden_ND), 1), size):  # without tokens there is one empty chunk
            rows = slice(start, start + size)
            ids_CK = ids_NK[rows]
            logits = head.padded_logits(hidden_ND[rows], logits_CY[: len(ids_CK)])
            chunk = Chunk(rows, logits, blocks, head.vocab_size, ids_CK, entropy=entropy, gradient=gradient)
            with torch.set_grad_enabled(gradient):
                loss = fn(chunk)
            if loss is not None:
                total += loss.detach()
            if loss is not None and loss.requires_grad:
                _accumulate(grads, chunk.write_gradient(loss, head), hidden_ND[rows], head, rows)
        ctx.grads = grads
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("map_vocab_chunks: the gradient can be taken once, because it is scaled in place")
        grads, ctx.grads = ctx.grads, None
        return *(None if value is None else value.mul_(grad) for value in grads), None, None, None, None


def _accumulate(grads: list[Tensor | None], grad_CV: Tensor, hidden_CD: Tensor, head: Head, rows: slice) -> None:
    """Write a chunk's gradient of the hidden states, and add those of matrix and bias, unless None. All are float32.

    In 16 bits a logit's gradient has a relative error of at most 2⁻⁹, as the gradients within the model have.
    """
    hidden_ND, weight_VD, bias_V = grads
    if bias_V is not None:
        bias_V += grad_CV.sum(0)
    if _has_float32_results(grad_CV.device):
        grad_CV = grad_CV.to(head.dtype)
    with _products(grad_CV.device, head.dtype) as options:
        if hidden_ND is not None:
            torch.mm(grad_CV, head.weight_VD, out=hidden_ND[rows], **options)
        if weight_VD is not None:
            torch.addmm(weight_VD, grad_CV.T, _operand(hidden_CD, head.dtype), out=weight_VD, **options)


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
