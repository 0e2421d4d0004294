"""Which weights of a model make which stored tensors.

transformers renames, splits or stacks the stored tensors of some models when it loads them. It can revert this for a
complete state dict (`transformers.core_model_loading.revert_weight_conversion`). Here the same conversions are applied
to a few weights at a time.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class Conversion:
    """Weights that are converted together, such as the experts of a layer.

    name: as transformers calls the result. sources: the name of each weight, and the pattern that it matched.
    """

    name: str
    transform: WeightTransform
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_renaming(self) -> bool:
        """Whether a single weight is stored as it is."""
        return isinstance(self.transform, WeightRenaming)

    def convert(self, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors to store by name. Their memory may be that of the weights."""
        if self.is_renaming:
            return {self.name: weights[self.sources[0][0]]}
        transform = deepcopy(self.transform)
        for name, pattern in self.sources:
            transform.add_tensor(self.name, name, pattern, weights[name])
        converted = transform.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def find_conversions(model: PreTrainedModel, names: Iterable[str]) -> list[Conversion]:
    """Group the weights of a loaded model by how transformers converts them when it saves them."""
    reverse = [conversion.reverse_transform() for conversion in reversed(model._weight_conversions)]
    renamings = [conversion for conversion in reverse if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in reverse if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings depend on the names before
        converted, pattern = rename_source_key(name, renamings, converters, reverse=True)
        transform = WeightRenaming(name, converted) if pattern is None else by_pattern[pattern]
        conversions.setdefault(converted, Conversion(converted, transform)).sources.append((name, pattern or name))
    return list(conversions.values())
