"""The routers of a mixture of experts: the experts that they choose, counted, recorded, or given to them.

Rounding changes which experts a router chooses, and another expert changes a log-prob by far more than rounding does.
Replay repeats in the trainer the choices of the rollout's engine (Rollout Routing Replay, arXiv 2510.11370). A router
computes the weights of the given experts from its own scores, so it is trained as before.

A layer with experts is found by its structure: a module whose child stacks the matrices of all experts, [experts, rows,
columns]. It chooses by one `topk` over a score of each expert, and replay replaces the result of this call.

Shape suffixes: see Notation in CONTRIBUTING.md. Here N are all places of a batch, padding included, L the decoder
layers, E the experts, and K the experts of a token.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from opdctl.artifacts.records import ONE_BYTE_EXPERTS, RoutedExperts
from opdctl.errors import OpdctlError
from opdctl.models.self_check import input_device, probe_ids, tolerance

_T = TypeVar("_T")
NOT_GIVEN = -1
"""In place of an id where a router chooses by itself."""
TOP_K = (torch.topk, torch.Tensor.topk)


def stacked_experts(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that stack a matrix of each expert."""
    count = getattr(module, "num_experts", 0)
    return [key for key, value in module.named_parameters(recurse=False) if value.ndim == 3 and len(value) == count]


class Routers:
    """The routers of a model's decoder layers. A dense model, and one of unknown structure, has none.

    They choose as ever except in `replay`. `num_layers` counts all decoder layers, as vLLM does.
    """

    def __init__(self, model: PreTrainedModel):
        # Some configs of dense models do not tell it.
        self.num_layers: int = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
        self.num_experts = 0
        self.experts: dict[int, nn.Module] = {}
        """The module with the experts, by the number of its decoder layer."""
        self._given_NLK: Tensor | None = None
        self._is_counted_N: Tensor | None = None
        self._recorded: dict[int, Tensor] | None = None
        self._counts: dict[int, Tensor] = {}
        self._given: Tensor | int = 0
        self._same: Tensor | int = 0
        modules, body = dict(model.named_modules()), set(model.get_decoder().modules())
        names = [name for name, module in modules.items() if module in body and stacked_experts(module)]
        numbers = [int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))]
        counts = {len(getattr(modules[name], stacked_experts(modules[name])[0])) for name in names}
        if len(set(numbers)) != len(names) or len(counts) > 1:
            return  # such as experts for attention
        self.num_experts = max(counts, default=0)
        for number, name in zip(numbers, names, strict=True):
            # peft wraps the experts once for each of their parameters that has an adapter.
            layer = modules[re.sub(r"(\.base_layer)+$", "", name).rpartition(".")[0]]
            self.experts[number] = modules[name]
            layer.forward = partial(self._forward, number, layer.forward)

    def _forward(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._given_NLK is None and self._is_counted_N is None and self._recorded is None:
            return forward(*args, **kwargs)
        with _TopK(partial(self._choose, number), self.num_experts):
            return forward(*args, **kwargs)

    def _choose(self, number: int, scores_NE: Tensor, top_NK: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and ids of the experts of layer `number`, where its router would choose `top_NK`, `ids_NK`."""
        if self._is_counted_N is not None:
            self._count(number, ids_NK, self._is_counted_N[:, None].expand_as(ids_NK))
        if self._given_NLK is not None:
            given_NK = self._given_NLK[:, number].long()
            if given_NK.shape != ids_NK.shape:
                shapes = f"{tuple(given_NK.shape)} were stored, {tuple(ids_NK.shape)} are chosen"
                raise OpdctlError("invalid_data", f"experts of layer {number}: {shapes}")
            is_given_N = given_NK[:, 0] != NOT_GIVEN
            if self._is_counted_N is not None:
                is_same_NK = (given_NK[..., None] == ids_NK[:, None]).any(-1)
                is_counted_NK = (self._is_counted_N & is_given_N)[:, None].expand_as(is_same_NK)
                self._given = self._given + is_counted_NK.sum()
                self._same = self._same + (is_same_NK & is_counted_NK).sum()
            ids_NK = torch.where(is_given_N[:, None], given_NK, ids_NK)
            top_NK = scores_NE.gather(-1, ids_NK)
        if self._recorded is not None:
            if number in self._recorded:
                raise OpdctlError("unsupported_model", f"the router of layer {number} chooses experts twice")
            self._recorded[number] = ids_NK
        return top_NK, ids_NK

    def _count(self, number: int, ids_NK: Tensor, is_counted_NK: Tensor) -> None:
        # No `bincount`: a host would wait for it.
        counts_E = self._counts.setdefault(
            number, torch.zeros(self.num_experts, dtype=torch.int64, device=ids_NK.device)
        )
        counts_E.scatter_add_(0, ids_NK.flatten(), is_counted_NK.long().flatten())

    def record(self, function: Callable[[], _T]) -> tuple[_T, Tensor]:
        """Call a function that runs the model once. Return its result and the experts of each place, [N, L, K].

        The ids are zero in layers without experts, as those that vLLM returns.
        """
        self._recorded = {}
        try:
            result, recorded = function(), self._recorded
        finally:
            self._recorded = None
        if recorded.keys() != self.experts.keys():
            missing = sorted(self.experts.keys() - recorded.keys())
            raise OpdctlError("unsupported_model", f"the routers of layers {missing} choose experts in an unknown way")
        zeros_NK = torch.zeros_like(next(iter(recorded.values())))
        return result, torch.stack([recorded.get(number, zeros_NK) for number in range(self.num_layers)], 1)

    @contextlib.contextmanager
    def replay(self, given_NLK: Tensor | None, is_counted_N: Tensor | None = None) -> Iterator[None]:
        """Let the routers choose these experts, also where activations are recomputed, and count the choices.

        given_NLK: the ids; where they are `NOT_GIVEN`, and without them, a router chooses by itself. is_counted_N: the
        places that `metrics` counts. What is counted is a router's own choice.
        """
        self._given_NLK, self._is_counted_N = given_NLK, is_counted_N
        try:
            yield
        finally:
            self._given_NLK = self._is_counted_N = None

    def reset_counts(self) -> None:
        self._counts, self._given, self._same = {}, 0, 0

    def counts(self) -> dict[str, float]:
        """Return what was counted since `reset_counts`, as numbers that ranks can add."""
        counts = {"given": float(self._given), "same": float(self._same)}
        for layer in self.experts:
            counts_E = self._counts.get(layer, torch.zeros(self.num_experts))
            counts |= {f"{layer} {expert}": float(count) for expert, count in enumerate(counts_E.tolist())}
        return counts

    def metrics(self, counts: dict[str, float]) -> dict[str, float]:
        """Return the metrics of `counts`, summed over ranks: docs/metrics.md. Empty if nothing was counted."""
        if not any(counts.values()):
            return {}
        experts = range(self.num_experts)
        loads_LE = np.array([[counts[f"{layer} {expert}"] for expert in experts] for layer in self.experts])
        loads_LE = loads_LE / np.maximum(loads_LE.sum(1, keepdims=True), 1)
        logs_LE = np.log(np.where(loads_LE > 0, loads_LE, 1))
        metrics = {
            "expert_max_load": float(loads_LE.max(1).mean() * self.num_experts),
            "expert_load_entropy": float(-(loads_LE * logs_LE).sum(1).mean()),
            "unused_experts": float((loads_LE == 0).mean()),
        }
        return metrics | ({"router_agreement": counts["same"] / counts["given"]} if counts["given"] else {})


class _TopK(TorchFunctionMode):
    """Replaces the result of each `topk` over all experts, [N, E]. Groups of experts are chosen by others."""

    def __init__(self, choose: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], num_experts: int):
        super().__init__()
        self._choose, self._num_experts = choose, num_experts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in TOP_K and args[0].ndim == 2 and args[0].shape[1] == self._num_experts:
            return torch.return_types.topk(self._choose(args[0], *result))
        return result


def encode_experts(ids: Tensor, num_experts: int) -> RoutedExperts:
    """Return the ids of experts as they are stored: flat, in one byte each, or two (little-endian) of many experts."""
    dtype = np.uint8 if num_experts <= ONE_BYTE_EXPERTS else np.dtype("<u2")
    return np.ascontiguousarray(ids.cpu().numpy().astype(dtype)).reshape(-1).view(np.uint8)


def decode_experts(stored: RoutedExperts, routers: Routers, count: int) -> npt.NDArray[np.int16]:
    """Return the stored ids of `count` tokens, [count, L, K].

    Raises:
        ValueError: they are not those of as many tokens, or of this model.
    """
    ids = stored.view(np.uint8 if routers.num_experts <= ONE_BYTE_EXPERTS else "<u2").astype(np.int16)
    if not count or ids.size % (count * routers.num_layers) or not ids.size:
        raise ValueError(f"{ids.size} ids of experts for {count} tokens and {routers.num_layers} layers")
    if ids.max() >= routers.num_experts:
        raise ValueError(f"expert {ids.max()}, the student has {routers.num_experts}")
    return ids.reshape(count, routers.num_layers, -1)


@torch.no_grad()
def check_replay(model: PreTrainedModel, routers: Routers) -> None:
    """Check on one sequence that replay gives the experts that it should, and no others.

    Raises:
        OpdctlError: the model has no experts, or they are chosen in an unknown way.
    """
    check_has_experts(routers)
    ids_1T = torch.from_numpy(probe_ids(model)).long().to(input_device(model))[None]

    def logp() -> Tensor:
        return model(input_ids=ids_1T, use_cache=False).logits.float().log_softmax(-1)

    plain, own_NLK = routers.record(logp)
    with routers.replay(own_NLK):
        repeated = logp()
    if not (repeated - plain).abs().max() <= tolerance(model):  # NaN fails too
        raise _no_replay("its own choices of experts, replayed, change the log-probs of the student")
    other_NLK, used = (own_NLK + 1) % routers.num_experts, dict[int, Any]()
    hooks = [
        module.register_forward_pre_hook(partial(_keep_ids, used, number), with_kwargs=True)
        for number, module in routers.experts.items()
    ]
    try:
        with routers.replay(other_NLK):
            logp()
    finally:
        for hook in hooks:
            hook.remove()
    for number in routers.experts:
        if used.get(number) is None or not torch.equal(used[number], other_NLK[:, number]):
            raise _no_replay(f"the experts of layer {number} of the student are chosen in an unknown way")


def check_has_experts(routers: Routers) -> None:
    """Raise OpdctlError for a model without routers."""
    if not routers.experts:
        raise _no_replay("the student has no experts, or not one group of them in a decoder layer")


def _keep_ids(used: dict[int, Any], number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    used[number] = next((value.long() for value in values if not value.is_floating_point()), None)


def _no_replay(reason: str) -> OpdctlError:
    return OpdctlError(
        "unsupported_setting",
        f"train.router_replay, rollout.routed_experts: {reason}",
        hint="set both to false",
    )
