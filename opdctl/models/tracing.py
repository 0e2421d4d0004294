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
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer, PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention

from opdctl.errors import is_out_of_memory

Pass = Callable[..., Tensor]
"""Tensors of DecodeInputs or StaticInputs → the last hidden states, [B, D]."""
STATIC_TOLERANCE = {torch.float32: 1e-4}
"""Relative differences between passes over caches of different sizes that rounding explains; else 0.05."""
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

    @property
    def kind(self) -> Literal["masked", "unmasked"]:
        return "unmasked" if self.mask_BT is None else "masked"

    def tensors(self) -> list[Tensor]:
        return [self.ids_B1, self.positions_B1, *([] if self.mask_BT is None else [self.mask_BT]), *self.cache]

    def resize(self) -> "DecodeInputs":
        """Return a copy of a sequence without padding, without its first position: of a single sequence, two copies.

        For such a sequence the model's own code makes no mask, as it does when padded ones have left the batch.
        """
        rows = self._resized_rows()
        mask_BT = None if self.mask_BT is None else self.mask_BT[rows, 1:]
        cache = [tensor[..., 1:, :][rows] for tensor in self.cache]
        return DecodeInputs(self.ids_B1[rows], self.positions_B1[rows] - 1, mask_BT, cache)

    def resize_rooms(self, rooms: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of the rooms of StaticInputs for `resize`, with one free place less if there is one."""
        end = max(self.cache[0].shape[-2], rooms[0].shape[-2] - 1)
        return [room[..., 1:end, :][self._resized_rows()] for room in rooms]

    def _resized_rows(self) -> list[int]:
        row = 0 if self.mask_BT is None else int(self.mask_BT.sum(-1).argmax())
        return [row] if len(self.ids_B1) > 1 else [row, row]

    def new_columns(self) -> list[Tensor]:
        """Return the places of the new token in the cache."""
        return [tensor[..., -1:, :] for tensor in self.cache]


@dataclass(frozen=True)
class StaticInputs:
    """The inputs of a pass over a cache of a fixed size R.

    mask_BR: zero for padding and for places that have no token yet. place_1: of the new token. rooms: keys and values
    of each layer, [B, heads, R, D] each.
    """

    ids_B1: Tensor
    positions_B1: Tensor
    mask_BR: Tensor
    place_1: Tensor
    rooms: Sequence[Tensor]

    @classmethod
    def of(cls, inputs: DecodeInputs, rooms: Sequence[Tensor]) -> "StaticInputs":
        """Return the same inputs, of which `inputs.cache` are the first places of `rooms`."""
        length, size = inputs.cache[0].shape[-2], rooms[0].shape[-2]
        mask_BR = inputs.ids_B1.new_zeros(len(inputs.ids_B1), size)
        mask_BR[:, :length] = 1 if inputs.mask_BT is None else inputs.mask_BT
        place_1 = inputs.ids_B1.new_full((1,), length - 1)
        return cls(inputs.ids_B1.clone(), inputs.positions_B1.clone(), mask_BR, place_1, rooms)

    def set_token(self, inputs: DecodeInputs) -> None:
        """Write the next token, of inputs with the same rooms, into these tensors."""
        place = inputs.cache[0].shape[-2] - 1
        self.ids_B1.copy_(inputs.ids_B1)
        self.positions_B1.copy_(inputs.positions_B1)
        self.mask_BR[:, place] = 1
        self.place_1.fill_(place)

    def tensors(self) -> list[Tensor]:
        return [self.ids_B1, self.positions_B1, self.mask_BR, self.place_1, *self.rooms]


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


class _StaticLayer(_WrittenLayer):
    """A layer of a DynamicCache of a fixed size, in which the new token has the place `place_1`, not the last one.

    Its length is that of all places but one, so that the query may see all that the mask allows.
    """

    def __init__(self, keys: Tensor, values: Tensor, place_1: Tensor):
        super().__init__(keys, values)
        self._place_1 = place_1

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(-2, self._place_1, key_states)
        self.values.index_copy_(-2, self._place_1, value_states)
        return self.keys, self.values


def run_recorded(recorded: Pass, tensors: Sequence[Tensor]) -> Tensor:
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # fused operations have other bits
        return recorded(*tensors)


class TracedDecoding:
    """The recorded passes of a model: for batches with a mask, for those without, and over a cache of a fixed size.

    A pass is used only if none of its steps depends on values of tensors, or on their sizes, and if it gives the bits
    of the model's own pass, also for another number and length of sequences; over a cache of a fixed size, the numbers
    but for rounding. Weights may change in place.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._passes: dict[Literal["masked", "unmasked", "static"], Pass | None] = {}  # None: not possible

    def is_recorded(self, has_mask: bool) -> bool:
        return self._passes.get("masked" if has_mask else "unmasked") is not None

    def run(self, inputs: DecodeInputs) -> Tensor:
        """Return the last hidden states, [B, D], and write the new tokens into the cache. The pass must be recorded."""
        recorded = self._passes[inputs.kind]
        assert recorded
        return run_recorded(recorded, inputs.tensors())

    def record(self, inputs: DecodeInputs, hidden_BD: Tensor) -> bool:
        """Record the pass once, and return whether it can be used.

        inputs: with what the model's own code has written into the cache. hidden_BD: what it returned.
        """
        if inputs.kind not in self._passes:
            written = [column.clone() for column in inputs.new_columns()]
            try:
                self._passes[inputs.kind] = self._trace(inputs.resize())
                is_equal = self._is_equal(inputs, hidden_BD, written)
            except Exception as error:  # of any class: of the tracer, or of a model that takes no such inputs
                if is_out_of_memory(error):
                    raise
                is_equal = False
            if not is_equal:
                self._passes[inputs.kind] = None
                for column, values in zip(inputs.new_columns(), written, strict=True):
                    column.copy_(values)
        return self._passes[inputs.kind] is not None

    def static_pass(self, inputs: DecodeInputs, rooms: Sequence[Tensor], hidden_BD: Tensor) -> Pass | None:
        """Return the pass over a cache of a fixed size, of StaticInputs; None if it differs from the model's own.

        It is recorded and compared once. inputs, hidden_BD: of a pass that has run. rooms: as in StaticInputs.
        """
        if "static" not in self._passes:
            written = [column.clone() for column in inputs.new_columns()]
            resized = StaticInputs.of(inputs.resize(), inputs.resize_rooms(rooms))
            try:
                static = self._trace_step(self._static_step, resized.tensors())
                is_close = self._is_close(static, inputs, rooms, hidden_BD)
            except Exception:  # of any class, as in `record`; for lack of memory too, which the other pass needs not
                is_close = False
            for column, values in zip(inputs.new_columns(), written, strict=True):
                column.copy_(values)
            self._passes["static"] = static if is_close else None
        return self._passes["static"]

    def _is_close(self, static: Pass, inputs: DecodeInputs, rooms: Sequence[Tensor], hidden_BD: Tensor) -> bool:
        """Return whether the pass over a cache of a fixed size computes what the model does, for other sizes too.

        It writes the new columns of the cache again.
        """
        own = inputs.resize()
        pairs = [(self._own_pass(own), own.new_columns()), (hidden_BD, [each.clone() for each in inputs.new_columns()])]
        resized = inputs.resize_rooms(rooms)
        for (expected_BD, columns), case, case_rooms in zip(pairs, (own, inputs), (resized, rooms), strict=True):
            place, bound = case.cache[0].shape[-2] - 1, STATIC_TOLERANCE.get(hidden_BD.dtype, 0.05)
            for room in case_rooms:
                room[..., place, :] = 0
            found_BD = run_recorded(static, StaticInputs.of(case, case_rooms).tensors())
            found = [found_BD, *(room[..., place : place + 1, :] for room in case_rooms)]
            for one, other in zip(found, [expected_BD, *columns], strict=True):
                if not (one - other).abs().max() <= bound * other.abs().max():  # NaN is not close
                    return False
        return True

    def _trace(self, inputs: DecodeInputs) -> Pass:
        step = self._own_pass_without_mask if inputs.mask_BT is None else self._own_pass_with_mask
        return self._trace_step(step, inputs.tensors())

    @staticmethod
    def _trace_step(step: Pass, tensors: Sequence[Tensor]) -> Pass:
        """Return the recorded pass.

        Raises:
            Exception: a step of it depends on the value, or, outside of SIZE_CHECKS, on the size of a tensor.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=SIZE_CHECKS)  # type: ignore[attr-defined]
            traced: Pass = torch.jit.trace(step, tuple(tensors), check_trace=False)
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
        pairs = zip(inputs.cache[::2], inputs.cache[1::2], strict=True)
        layers = [_WrittenLayer(keys, values) for keys, values in pairs]
        return self._call_model(inputs.ids_B1, inputs.positions_B1, inputs.mask_BT, layers)

    def _call_model(
        self, ids_B1: Tensor, positions_B1: Tensor, mask: Tensor | None, layers: Sequence[DynamicLayer]
    ) -> Tensor:
        cache = DynamicCache()
        cache.layers = [*layers]
        outputs = self._model.base_model(
            input_ids=ids_B1, position_ids=positions_B1, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        hidden_BTD: Tensor = outputs.last_hidden_state
        return hidden_BTD[:, -1]

    def _static_step(
        self, ids_B1: Tensor, positions_B1: Tensor, mask_BR: Tensor, place_1: Tensor, *rooms: Tensor
    ) -> Tensor:
        pairs = zip(rooms[::2], rooms[1::2], strict=True)
        layers = [_StaticLayer(keys, values, place_1) for keys, values in pairs]
        return self._call_model(ids_B1, positions_B1, mask_BR, layers)

    def _own_pass_without_mask(self, ids_B1: Tensor, positions_B1: Tensor, *cache: Tensor) -> Tensor:
        return self._own_pass(DecodeInputs(ids_B1, positions_B1, None, cache))

    def _own_pass_with_mask(self, ids_B1: Tensor, positions_B1: Tensor, mask_BT: Tensor, *cache: Tensor) -> Tensor:
        return self._own_pass(DecodeInputs(ids_B1, positions_B1, mask_BT, cache))
