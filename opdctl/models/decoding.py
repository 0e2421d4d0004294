"""Decoding a batch of sequences, one token at a time, with the cache that the model makes for itself.

A cache of plain layers is kept in memory that grows in steps: transformers' own copies all of it for every token.

The model's `prepare_inputs_for_generation` arranges the inputs of each pass, as in transformers' `generate`, so every
model that transformers generates with is served. Only the last hidden state is computed: `Head` makes the logits.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, DynamicLayer, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES

from opdctl.artifacts.records import Ids
from opdctl.models import cuda_graphs
from opdctl.models.tracing import DecodeInputs, StaticInputs, TracedDecoding

MIN_ADDED_TOKENS = 64
"""By which the memory of a cache grows; a quarter of its length if that is more."""


@dataclass(frozen=True)
class BatchRules:
    """What a batch may do without changing the log-probs of its sequences.

    left_padding: have prompts of several lengths, padded on the left. drop_rows: continue without some of its rows.
    use_cache: keep what the model computed for earlier tokens.
    """

    left_padding: bool = True
    drop_rows: bool = True
    use_cache: bool = True


class _GrowingLayer(DynamicLayer):
    """A layer of a DynamicCache with room for further tokens. keys, values: views of the tokens that it has."""

    def __init__(self, layer: DynamicLayer):
        self.__dict__ |= vars(layer)
        assert layer.keys is not None
        assert layer.values is not None
        self._length, self._room = layer.keys.shape[-2], [layer.keys, layer.values]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self._length
        keys, values = self.extend(key_states.shape[-2])
        keys[..., start:, :], values[..., start:, :] = key_states, value_states
        return keys, values

    def extend(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values with a place for further tokens at their end, which the caller writes."""
        start, self._length = self._length, self._length + tokens
        if self._length > self._room[0].shape[-2]:
            added = max(MIN_ADDED_TOKENS, start // 4)
            self._room = [nn.functional.pad(room, (0, 0, 0, added)) for room in self._room]
        self.keys, self.values = (room[..., : self._length, :] for room in self._room)
        return self.keys, self.values

    def rooms(self) -> list[Tensor]:
        """Return keys and values with the places of further tokens."""
        return self._room

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the tokens."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._room = [room.index_select(0, beam_idx) for room in self._room]
        self.keys, self.values = (room[..., : self._length, :] for room in self._room)


class DecodeBatch:
    """Sequences of one length, their cache, and the last hidden state of each, [B, D].

    Prompts of several lengths are padded on the left, with position ids from the mask. There is no mask if no prompt
    needs padding, which is faster. A model without a cache gets the entire sequences for every token.

    traced: runs the passes of further tokens where it can; on a GPU they are CUDA graphs then.
    """

    hidden_BD: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Ids],
        rules: BatchRules,
        device: torch.device | str,
        traced: TracedDecoding | None = None,
    ):
        self._model, self._rules, self._cache = model, rules, dict[str, Any]()
        parameters = inspect.signature(model.base_model.forward).parameters
        self._accepts_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._accepted = set(parameters)
        max_length = max(len(prompt) for prompt in prompts)
        ids_BT = torch.zeros(len(prompts), max_length, dtype=torch.int64)
        mask_BT = torch.zeros(len(prompts), max_length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, max_length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BT[row, max_length - len(prompt) :] = 1
        self._mask_BT = None if bool(mask_BT.all()) else mask_BT.to(device)
        self._ids_BT, self._positions_BT = ids_BT.to(device), (mask_BT.cumsum(-1) - 1).clamp(min=0).to(device)
        self._forward(is_first=True)
        self._traced = traced if self._growing_layers() else None
        self._uses_graphs = cuda_graphs.are_available(device)
        self._captured: cuda_graphs.CapturedPass | None = None

    def _forward(self, *, is_first: bool) -> None:
        inputs = self._model.prepare_inputs_for_generation(
            self._ids_BT,
            attention_mask=self._mask_BT,
            position_ids=self._positions_BT if "position_ids" in self._accepted else None,
            use_cache=self._rules.use_cache,
            is_first_iteration=is_first,
            **self._cache,
        )
        inputs.pop("logits_to_keep", None)  # of the output matrix
        outputs = self._model.base_model(
            **{name: value for name, value in inputs.items() if self._accepts_all or name in self._accepted}
        )
        self._cache = {name: outputs[name] for name in ALL_CACHE_NAMES if name in outputs}
        if is_first:
            self._let_cache_grow()
        self.hidden_BD = outputs.last_hidden_state[:, -1]

    def _let_cache_grow(self) -> None:
        for cache in self._cache.values():
            if type(cache) is DynamicCache:
                cache.layers = [
                    _GrowingLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer
                    for layer in cache.layers
                ]

    def feed(self, token_B: Tensor) -> None:
        """Append one token to each sequence."""
        next_B1 = self._positions_BT[:, -1:] + 1
        if self._mask_BT is not None:
            self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(next_B1)], dim=-1)
        if self._cache:
            self._ids_BT, self._positions_BT = token_B[:, None], next_B1
        else:
            self._ids_BT = torch.cat([self._ids_BT, token_B[:, None]], dim=-1)
            self._positions_BT = torch.cat([self._positions_BT, next_B1], dim=-1)
        if self._traced is None:
            self._forward(is_first=not self._cache)
        else:
            self._forward_traced(self._traced)

    def _forward_traced(self, traced: TracedDecoding) -> None:
        """Run the recorded pass. The first pass is the model's own, and is recorded."""
        is_recorded, layers = traced.is_recorded(self._mask_BT is not None), self._growing_layers()
        if is_recorded:
            for layer in layers:
                layer.extend(1)
        else:
            self._forward(is_first=False)
        cache = [tensor for layer in layers for tensor in layer.tensors()]
        inputs = DecodeInputs(self._ids_BT, self._positions_BT, self._mask_BT, cache)
        if is_recorded:
            self.hidden_BD = self._run_graph(traced, inputs, layers) if self._uses_graphs else traced.run(inputs)
        elif not traced.record(inputs, self.hidden_BD):
            self._traced = None

    def _run_graph(self, traced: TracedDecoding, inputs: DecodeInputs, layers: Sequence["_GrowingLayer"]) -> Tensor:
        """Run the recorded pass as a CUDA graph if possible. It is captured again for new rooms of the cache."""
        rooms = [room for layer in layers for room in layer.rooms()]
        if self._captured and self._captured.fits(rooms):
            return self._captured.run(inputs)
        self._captured = None  # which frees its memory
        hidden_BD = traced.run(inputs)
        static = traced.static_pass(inputs, rooms, hidden_BD)
        self._captured = static and cuda_graphs.capture_pass(static, StaticInputs.of(inputs, rooms))
        self._uses_graphs = self._captured is not None
        return hidden_BD

    def _growing_layers(self) -> list["_GrowingLayer"]:
        """Return the layers of the cache if all are of this class, else none."""
        caches = list(self._cache.values())
        layers = caches[0].layers if len(caches) == 1 and type(caches[0]) is DynamicCache else []
        return layers if all(type(layer) is _GrowingLayer for layer in layers) else []

    def select(self, rows: Tensor) -> None:
        """Remove all other rows. Only for a batch whose rules allow it."""
        for cache in self._cache.values():
            cache.reorder_cache(rows)
        self._ids_BT, self._positions_BT = self._ids_BT[rows], self._positions_BT[rows]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[rows]

    @property
    def has_cache(self) -> bool:
        """Whether the model keeps what it computed for earlier tokens."""
        return bool(self._cache)

    @property
    def has_plain_cache(self) -> bool:
        """Whether the cache consists of transformers' own layers only, which the attention mask is made for."""
        caches = [cache for cache in self._cache.values() if type(cache) is DynamicCache]
        layers = [layer for cache in caches for layer in cache.layers]
        return len(caches) == len(self._cache) and all(
            type(layer) is _GrowingLayer or type(layer).__module__ == DynamicCache.__module__ for layer in layers
        )

    def can_select(self, rows: Tensor) -> bool:
        """Remove all other rows if the cache can, and return whether all of its tensors have the selected rows."""
        if not all(hasattr(cache, "reorder_cache") for cache in self._cache.values()):
            return False
        self.select(rows)
        return all(len(tensor) == len(rows) for cache in self._cache.values() for tensor in _tensors(cache))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors, other than scalars, that an object refers to by its attributes, lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
    elif type(value) is _GrowingLayer or type(value).__module__.startswith("transformers"):
        yield from _tensors(vars(value))
