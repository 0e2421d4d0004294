"""A model's pass for one more token of each sequence, as recorded operations, without the model's Python code.

A small model spends more time in its Python code than in the operations. `torch.jit.trace` records them in 0.1 s, for
any number and length of sequences. torch deprecates it, but torch.compile takes 14 s for the embedded student and is no
faster, and the graph of torch.export is Python code again. Where it is missing or fails, the model's own code runs.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention

from opdctl.errors import is_out_of_memory

SIZE_CHECKS = "|".join(re.escape(module.__name__) for module in (masking_utils, sdpa_attention))
"""Modules that compare sizes, always with the same result if there is one query."""


@dataclass(frozen=True)
class DecodeInputs:
    """The inputs of a pass for one more token.

    ids_B1, positions_B1: of the new tokens. mask_BT: None if no prompt is padded. cache: the keys and values of each
    layer, [B, heads, T, D] each, of which the pass writes those of the new token, at the end.
    """

    ids_B1: Tensor
    positions_B1: Tensor
    mask_BT: Tensor | None
    cache: Sequence[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.ids_B1, self.positions_B1, *([] if self.mask_BT is None else [self.mask_BT]), *self.cache]

    def resize(self) -> "DecodeInputs":
        """Return a copy of a sequence without padding, without its first position: of a single sequence, two copies.

        For such a sequence the model's own code makes no mask, as it does when padded ones have left the batch.
        """
        row = 0 if self.mask_BT is None else int(self.mask_BT.sum(-1).argmax())
        rows = [row] if len(self.ids_B1) > 1 else [row, row]
        mask_BT = None if self.mask_BT is None else self.mask_BT[rows, 1:]
        cache = [tensor[..., 1:, :][rows] for tensor in self.cache]
        return DecodeInputs(self.ids_B1[rows], self.positions_B1[rows] - 1, mask_BT, cache)

    def new_columns(self) -> list[Tensor]:
        """Return the places of the new token in the cache."""
        return [tensor[..., -1:, :] for tensor in self.cache]


class _WrittenLayer(DynamicLayer):
    """A layer of a DynamicCache that has room for the new token at its end."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.dtype, self.device = keys.dtype, keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys[..., -1:, :], self.values[..., -1:, :] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2] - 1


class TracedDecoding:
    """The recorded pass of a model, one for batches with a mask and one for those without.

    A pass is used only if none of its steps depends on values of tensors, or on their sizes, and if it gives the bits
    of the model's own pass, also for another number and length of sequences. Weights may change in place.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._passes: dict[bool, Callable[..., Tensor] | None] = {}  # by whether there is a mask; None: not possible

    def is_recorded(self, has_mask: bool) -> bool:
        return self._passes.get(has_mask) is not None

    def run(self, inputs: DecodeInputs) -> Tensor:
        """Return the last hidden states, [B, D], and write the new tokens into the cache. The pass must be recorded."""
        recorded = self._passes[inputs.mask_BT is not None]
        assert recorded
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # fused operations have other bits
            return recorded(*inputs.tensors())

    def record(self, inputs: DecodeInputs, hidden_BD: Tensor) -> bool:
        """Record the pass once, and return whether it can be used.

        inputs: with what the model's own code has written into the cache. hidden_BD: what it returned.
        """
        kind = inputs.mask_BT is not None
        if kind not in self._passes:
            written = [column.clone() for column in inputs.new_columns()]
            try:
                self._passes[kind] = self._trace(inputs.resize())
                is_equal = self._is_equal(inputs, hidden_BD, written)
            except Exception as error:  # of any class: of the tracer, or of a model that takes no such inputs
                if is_out_of_memory(error):
                    raise
                is_equal = False
            if not is_equal:
                self._passes[kind] = None
                for column, values in zip(inputs.new_columns(), written, strict=True):
                    column.copy_(values)
        return self.is_recorded(kind)

    def _trace(self, inputs: DecodeInputs) -> Callable[..., Tensor]:
        """Return the recorded pass.

        Raises:
            Exception: a step of it depends on the value, or, outside of SIZE_CHECKS, on the size of a tensor.
        """
        step = self._own_pass_without_mask if inputs.mask_BT is None else self._own_pass_with_mask
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=SIZE_CHECKS)  # type: ignore[attr-defined]
            traced: Callable[..., Tensor] = torch.jit.trace(step, tuple(inputs.tensors()), check_trace=False)
        return traced

    def _is_equal(self, inputs: DecodeInputs, hidden_BD: Tensor, written: list[Tensor]) -> bool:
        """Return whether the recorded pass gives the bits of the model's own, for other sizes too."""
        for column in inputs.new_columns():
            column.zero_()
        pairs = [(self.run(inputs), hidden_BD), *zip(inputs.new_columns(), written, strict=True)]
        own, recorded = inputs.resize(), inputs.resize()
        pairs += [(self.run(recorded), self._own_pass(own)), *zip(recorded.cache, own.cache, strict=True)]
        return all(torch.equal(of_pass, of_model) for of_pass, of_model in pairs)

    def _own_pass(self, inputs: DecodeInputs) -> Tensor:
        cache = DynamicCache()
        pairs = zip(inputs.cache[::2], inputs.cache[1::2], strict=True)
        cache.layers = [_WrittenLayer(keys, values) for keys, values in pairs]
        outputs = self._model.base_model(
            input_ids=inputs.ids_B1,
            position_ids=inputs.positions_B1,
            attention_mask=inputs.mask_BT,
            past_key_values=cache,
            use_cache=True,
        )
        hidden_BTD: Tensor = outputs.last_hidden_state
        return hidden_BTD[:, -1]

    def _own_pass_without_mask(self, ids_B1: Tensor, positions_B1: Tensor, *cache: Tensor) -> Tensor:
        return self._own_pass(DecodeInputs(ids_B1, positions_B1, None, cache))

    def _own_pass_with_mask(self, ids_B1: Tensor, positions_B1: Tensor, mask_BT: Tensor, *cache: Tensor) -> Tensor:
        return self._own_pass(DecodeInputs(ids_B1, positions_B1, mask_BT, cache))
