"""Reading stored weights into parameters of which each process keeps some rows.

Where a parameter is a stored tensor, or stacks stored tensors such as those of experts, only a process's own rows are
read. Other conversions of transformers need all sources of a parameter, which are read one parameter at a time.
"""

import contextlib
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from opdctl.models.inspection import loaded_names_and_patterns
from opdctl.models.weights import StoredWeights


@dataclass
class _Source:
    """The stored tensors of a parameter, by the source pattern of their conversion; one under None if there is none.

    Some conversions make several parameters of the same tensors.
    """

    converter: WeightConverter | None
    names: dict[str | None, list[str]] = field(default_factory=dict)

    def stacks_rows(self) -> bool:
        """Whether row n of the parameter is made of the n-th stored tensors alone, such as those of expert n."""
        if self.converter is None:
            return False
        first, *others = self.converter.operations
        return (
            isinstance(first, MergeModulelist)
            and first.dim == 0
            and all(isinstance(each, Concatenate) and each.dim > 0 for each in others)
        )


class WeightReader:
    """Reads the stored weights of a model, one parameter at a time, as `from_pretrained` would load them."""

    def __init__(self, model: PreTrainedModel, weights: StoredWeights):
        """model: on torch's meta device, without adapters, in the dtypes in which it is to be loaded."""
        self._weights, self._config, self._sources = weights, model.config, dict[str, _Source]()
        self._empty = {name: torch.empty_like(value, device="meta") for name, value in model.state_dict().items()}
        converters = [each for each in model._weight_conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        for stored, (name, pattern) in loaded_names_and_patterns(model, weights).items():
            if name in self._empty:
                converter = by_pattern[pattern] if pattern else None
                source = self._sources.setdefault(name, _Source(converter))
                source.names.setdefault(pattern, []).append(stored)

    def read(self, targets: Mapping[str, list[Tensor]]) -> set[str]:
        """Fill tensors with their stored values, a DTensor with the rows of this process. Return the names of all.

        targets: by the name in the model; several tensors may have the same values, such as trained copies.
        """
        filled = set(self._sources)
        with contextlib.ExitStack() as files, torch.no_grad():
            read = _SliceReader(self._weights, files)
            for name, source in self._sources.items():
                for loaded_name, value, first_row in self._convert(name, source, targets, read):
                    filled.add(loaded_name)
                    for target in targets[loaded_name]:
                        _fill(target, value.to(self._empty[loaded_name].dtype), first_row)
        return filled

    def _convert(
        self, name: str, source: _Source, targets: Mapping[str, list[Tensor]], read: "_SliceReader"
    ) -> Iterable[tuple[str, Tensor, int]]:
        """Return the parameters that are made of `source`: the name of each, its rows, and the number of the first."""
        rows, dtype = _own_rows(targets[name][0]), self._empty[name].dtype
        is_sliced = source.converter is None or source.stacks_rows()
        if is_sliced and rows.start == rows.stop:
            return []
        if source.converter is None:
            return [(name, read(source.names[None][-1], rows), rows.start)]
        if not is_sliced:
            rows = slice(0, None)
        converter = copy.deepcopy(source.converter)
        for pattern, all_names in source.names.items():
            for stored in all_names[rows] if is_sliced else all_names:
                value = read(stored).to(dtype)
                converter.add_tensor(name, stored, pattern, lambda value=value: value)
        converted: dict[str, Any] = converter.convert(name, model=_Shapes(self._empty), config=self._config)
        values = {key: value[0] if isinstance(value, list) else value for key, value in converted.items()}
        return [(key, value, rows.start) for key, value in values.items()]


class _Shapes:
    """The parameters' shapes, in place of the model, for conversions that read them."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters

    def get_parameter(self, name: str) -> Tensor:
        return self._parameters[name]


class _SliceReader:
    """Reads rows of stored tensors without mapping their files into memory."""

    def __init__(self, weights: StoredWeights, files: contextlib.ExitStack):
        self._weights, self._files, self._opened = weights, files, dict[Any, Any]()

    def __call__(self, stored: str, rows: slice | None = None) -> Tensor:
        header = self._weights.tensors[stored]
        if header.file not in self._opened:
            self._opened[header.file] = self._files.enter_context(safe_open(header.file, "pt", backend="pread"))
        opened = self._opened[header.file]
        if rows is None or not header.shape:
            return opened.get_tensor(stored)
        return opened.get_slice(stored)[rows]


def _own_rows(tensor: Tensor) -> slice:
    """Return the rows of a tensor that this process keeps."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0] if tensor.ndim else None)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0])


def _fill(target: Tensor, value: Tensor, first_row: int) -> None:
    """Copy the rows of a tensor that this process keeps. `value` begins with row `first_row`."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    rows = _own_rows(target)
    target.to_local().copy_(value[rows.start - first_row : rows.stop - first_row])
