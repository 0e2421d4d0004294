"""Several sequences in one row, without padding: attention within each sequence only.

An object takes the place of the mask of transformers. It reaches every attention layer, also when gradient
checkpointing calls a layer again. Kernels of linear attention and convolutions get the boundaries under the names that
transformers has for them. `self_check.enable_packing` decides whether a model's sequences stay separate.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_SDPA = "opdctl_packed_sdpa"
"""The name in transformers of its implementation `sdpa` with packed sequences in addition."""
MAX_VARLEN_HEAD_DIM = 256  # of torch's flash kernels


@dataclass(frozen=True)
class PackedSequences:
    """The lengths in tokens of the sequences in one row, [1, T], and the width of a sliding window, if any."""

    lengths: tuple[int, ...]
    device: torch.device
    window: int | None = None

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The number and the length of neighbours of equal length, which attention treats as one batch."""
        return [(len(list(group)), length) for length, group in itertools.groupby(self.lengths)]

    @cached_property
    def ends(self) -> Tensor:
        """0 and the end of each sequence in the row, as kernels for sequences of different lengths read it."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(self.device)

    @cached_property
    def model_arguments(self) -> dict[str, Tensor]:
        """The arguments of a model's forward pass besides the ids."""
        numbers_T = np.repeat(np.arange(len(self.lengths)), self.lengths)
        positions_T = np.arange(len(numbers_T)) - np.repeat(np.cumsum([0, *self.lengths[:-1]]), self.lengths)
        return {
            "position_ids": torch.from_numpy(positions_T[None]).to(self.device),
            "seq_idx": torch.from_numpy(numbers_T[None].astype(np.int32)).to(self.device),
            "cu_seq_lens_q": self.ends,
            "cu_seq_lens_k": self.ends,
        }


_current: ContextVar[PackedSequences | None] = ContextVar("the packed sequences of a forward pass", default=None)


@contextlib.contextmanager
def packed_row(sequences: PackedSequences | None) -> Iterator[None]:
    """Make the masks of a forward pass those of packed sequences; those of its rows if None."""
    token = _current.set(sequences)
    try:
        yield
    finally:
        _current.reset(token)


def is_enabled(model: PreTrainedModel) -> bool:
    """Whether a model accepts packed sequences."""
    return model.config.get_text_config(decoder=True)._attn_implementation == PACKED_SDPA


def _make_mask(*, local_size: int | None = None, config: Any = None, use_vmap: bool = False, **arguments: Any) -> Any:
    """Return the mask of `sdpa`, or what stands in for it in a forward pass over packed sequences.

    Raises:
        ValueError: the mask is neither causal nor that of a sliding window.
    """
    sequences = _current.get()
    if sequences is None:
        return sdpa_mask(local_size=local_size, config=config, use_vmap=use_vmap, **arguments)
    if use_vmap or "allow_is_bidirectional_skip" in arguments:
        raise ValueError("its attention is not causal")
    if local_size is None:
        return sequences
    if local_size != getattr(config, "sliding_window", None):
        raise ValueError("its local attention is not a sliding window")
    return replace(sequences, window=local_size)


@torch.compiler.disable  # lengths differ in each micro-batch, and each would be compiled anew
def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """Return what `sdpa` of transformers returns, for each packed sequence by itself.

    query, key, value: [1, heads, T, head dim]. The result is [1, T, heads, head dim].

    Raises:
        ValueError: the layer has another mask in a forward pass over packed sequences.
    """
    if not isinstance(attention_mask, PackedSequences):
        if _current.get() is not None:
            raise ValueError("its layers make their masks themselves")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)
    if _has_kernel(query, key, value) and attention_mask.window is None and not arguments.get("dropout"):
        return _attend_by_kernel(query, key, value, attention_mask, arguments.get("scaling")), None
    outputs = []
    sizes = [count * length for count, length in attention_mask.runs]
    pieces = [tensor.squeeze(0).split(sizes, dim=1) for tensor in (query, key, value)]
    for (count, length), *qkv in zip(attention_mask.runs, *pieces, strict=True):
        rows = [piece.unflatten(1, (count, length)).transpose(0, 1) for piece in qkv]
        mask = _window_mask(length, attention_mask.window, query.device)
        output, _ = sdpa_attention_forward(module, *rows, mask, **arguments)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None], None


def _has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for sequences of different lengths can multiply these."""
    is_half = {tensor.dtype for tensor in (query, key, value)} in ({torch.bfloat16}, {torch.float16})
    return query.is_cuda and is_half and query.shape[-1] == key.shape[-1] == value.shape[-1] <= MAX_VARLEN_HEAD_DIM


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, scale: float | None
) -> Tensor:
    longest, rows = max(sequences.lengths), [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    output = varlen_attn(
        rows[0],
        rows[1],
        rows[2],
        sequences.ends,
        sequences.ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast(Tensor, output)[None]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys a query sees, [length, length], or None if it sees all up to its own."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(PACKED_SDPA, _attend)
AttentionMaskInterface.register(PACKED_SDPA, _make_mask)
