"""LoRA adapters: put into a model, merged into its weights, written in peft's format.

All ranks call every function of this module.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opdctl import console, distributed
from opdctl.errors import OpdctlError, did_you_mean, is_out_of_memory, summarize_exception
from opdctl.models.directory import MAX_DETAIL_CHARS, ModelDir
from opdctl.models.self_check import probe_ids
from opdctl.recipe.schema import Lora

ADAPTER = "default"  # the name that peft gives to a single adapter
ALL_LINEAR = "all-linear"
GRADIENT_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative differences between gradients that rounding explains, by the dtype of the frozen weights."""


def inject_adapters(model: PreTrainedModel, settings: Lora, text: tuple[str, ...]) -> None:
    """Put LoRA adapters into the modules whose names begin with one of `text`, and freeze all other weights.

    Raises:
        OpdctlError: a name matches nothing, is the matrix of a tied head, or cannot be trained by peft.
    """
    import peft

    _check_tied_head(model, settings)
    linear, stacked = _linear_layers(model, text)
    targets = _find_targets(model, settings, text, linear | stacked)
    modules, parameters = targets - stacked, targets & stacked
    if parameters and settings.dropout:
        raise OpdctlError(
            "unsupported_setting",
            f"lora.dropout: peft has no dropout for stacked experts: {sorted(parameters)[0]}",
            hint="set it to 0, or give other names in lora.target_modules",
        )
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_shorten(modules, {name for name, _ in model.named_modules()}),
        target_parameters=_shorten(parameters, {name for name, _ in model.named_parameters()}) or None,
        modules_to_save=settings.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        # peft prints a set, whose order differs between processes.
        reason = re.sub(
            r"\{(.*?)\}", lambda match: ", ".join(sorted(match[1].split(", "))), " ".join(str(error).split())
        )
        raise _unsupported_layers(reason, linear | stacked) from error
    except TypeError as error:
        raise OpdctlError(
            "unsupported_setting",
            f"lora.modules_to_save: {' '.join(str(error).split())}",
            hint="give names of layers that get no adapter",
        ) from error
    _check_injected(model, {f"{name}.weight" for name in modules} | parameters, linear | stacked)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()  # the layers of peft are in training mode, with dropout


def log_untrained_matrices(model: PreTrainedModel, settings: Lora, text: tuple[str, ...]) -> None:
    """Log the matrices of the text model, except embeddings and the output matrix, that `all-linear` does not train."""
    if ALL_LINEAR not in settings.target_modules:
        return
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded, layers = [module.weight for module in [*tables, model.get_output_embeddings()]], adapter_layers(model)
    untrained = {
        _last_parts(plain_name(name).removesuffix(".weight"), 2)
        for name, value in model.named_parameters()
        if value.ndim >= 2
        and not value.requires_grad
        and name.startswith(text)
        and is_plain(name)
        and name not in layers
        and not any(value is weight for weight in excluded)
    }
    if untrained:
        console.info(f"lora.target_modules: {ALL_LINEAR} does not include {', '.join(sorted(untrained))}")


def set_dropout(model: PreTrainedModel, enabled: bool) -> None:
    """Enable or disable the dropout of adapters. The model itself remains without dropout."""
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train(enabled)


def _check_injected(model: PreTrainedModel, expected: set[str], layers: set[str]) -> None:
    """Raise OpdctlError unless these parameters, and no others, have an adapter, each of them one."""
    unshared, adapters = {name for name, _ in model.named_parameters()}, adapter_layers(model)
    # In some mixtures of experts, peft takes the names of linear layers for those of the experts.
    wrong = expected ^ {plain_name(name) for name in adapters}
    for parameter, (_, layer) in adapters.items():
        base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
        # Some routers and grouped products are subclasses that compute something else.
        is_other = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if is_other or parameter not in unshared:
            wrong.add(plain_name(parameter))
    if wrong:
        names = ", ".join(sorted({_last_parts(name.removesuffix(".weight"), 2) for name in wrong}))
        raise _unsupported_layers(f"peft cannot train an adapter on {names} of this model", layers)


def _check_tied_head(model: PreTrainedModel, settings: Lora) -> None:
    """Raise OpdctlError if a name is that of the embedding or output matrix of a model in which they are one."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    for name, module in model.named_modules():
        targets = settings.target_modules if module is embedding or module is head else []
        saved = settings.modules_to_save if {embedding, head} & set(module.modules()) else []
        matching = [f"lora.target_modules: `{target}`" for target in targets if _matches(name, target)]
        matching += [f"lora.modules_to_save: `{target}`" for target in saved if name.endswith(target)]
        if matching:
            raise OpdctlError(
                "unsupported_setting",
                f"{matching[0]} has the output matrix of the student, which is also its embedding",
                hint="remove this name",
            )


def _linear_layers(model: PreTrainedModel, text: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Return the names of the linear layers, without the output matrix, and of the parameters that stack matrices.

    A mixture of experts stacks a matrix of all its experts in one parameter, [experts, rows, columns].
    """
    linear, stacked = set(), set()
    for name, module in model.named_modules():
        if not name.startswith(text) or module is model.get_output_embeddings():
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            linear.add(name)
        for key, value in module.named_parameters(recurse=False):
            if value.ndim == 3 and len(value) == getattr(module, "num_experts", 0):
                stacked.add(f"{name}.{key}")
    return linear, stacked


def _find_targets(model: PreTrainedModel, settings: Lora, text: tuple[str, ...], linear: set[str]) -> set[str]:
    """Return the full names of the modules and of the stacked parameters that get an adapter.

    linear: the names that `all-linear` matches.
    """
    modules = {name for name, _ in model.named_modules() if name}
    targets: set[str] = set()
    for target in settings.target_modules:
        candidates = linear | {name for name in modules if name.startswith(text)}
        matching = linear if target == ALL_LINEAR else {name for name in candidates if _matches(name, target)}
        if not matching:
            raise _unknown_layer("lora.target_modules", target, {*linear, ALL_LINEAR})
        targets |= matching
    for target in settings.modules_to_save:
        if not any(name.endswith(target) for name in modules):
            raise _unknown_layer("lora.modules_to_save", target, modules)
    targets = {name for name in targets if not any(f".{saved}." in f".{name}." for saved in settings.modules_to_save)}
    if not targets:
        raise OpdctlError(
            "unsupported_setting",
            "lora.modules_to_save: it contains all of lora.target_modules",
            hint="set lora.rank = 0 to train all weights",
        )
    return targets


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _last_parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])


def _unknown_layer(key: str, target: str, layers: Collection[str]) -> OpdctlError:
    similar = did_you_mean(target, {_last_parts(name, 1) for name in layers})
    return OpdctlError(
        "unsupported_setting", f"{key}: the student has no layer `{target}`{similar}", hint=f"correct {key}"
    )


def _unsupported_layers(reason: str, layers: Collection[str]) -> OpdctlError:
    """Return the error with peft's reason. Its hint has the names of the layers that the reason does not mention."""
    names = {_last_parts(name, 1) for name in layers}
    usable = sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", reason))
    hint = f"set lora.target_modules to some of {json.dumps(usable)}" if usable else "correct lora.target_modules"
    return OpdctlError("unsupported_setting", f"lora.target_modules: {reason[:MAX_DETAIL_CHARS]}", hint=hint)


def _shorten(names: set[str], all_names: set[str]) -> list[str]:
    """Return the last parts of the names where no other of `all_names` has them, otherwise the names, sorted."""
    others = {_last_parts(name, 1) for name in all_names - names}
    return sorted({name if (last := _last_parts(name, 1)) in others else last for name in names})


def plain_name(name: str) -> str:
    """Return the name that a parameter has without adapters."""
    return re.sub(rf"\.(base_layer|modules_to_save\.{ADAPTER})(?=\.)", "", name)


def is_plain(name: str) -> bool:
    """Whether a parameter is one of the model, neither of an adapter nor replaced by a trained copy."""
    return not re.search(r"\.(lora_\w+|original_module)\.", name)


def adapter_layers(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the name and the layer of each adapter by the name of the parameter that it changes."""
    layers: dict[str, tuple[str, nn.Module]] = {}
    if not hasattr(model, "peft_config"):
        return layers
    from peft.tuners.lora import LoraLayer

    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = getattr(module, "parameter_name", "weight")
            layers[f"{names[module.get_base_layer()]}.{parameter}"] = (name, module)
    return layers


def merge(weight: Tensor, parameter: str, name: str, layer: nn.Module) -> Tensor:
    """Return the unsharded `weight`, float32, with its adapter. `parameter`, `name`: as in `adapter_layers`."""
    matrices = {key: distributed.full_tensor(value) for key, value in _adapter_matrices(layer).items()}
    matrices[parameter.removeprefix(f"{name}.")] = weight = weight.float()
    with torch.no_grad():
        return weight + _change_of_weight(layer, matrices)


def _adapter_matrices(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {key: value for key, value in layer.named_parameters() if key.startswith("lora_")}


class _Delta(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        delta: Tensor = self.layer.get_delta_weight(ADAPTER)  # type: ignore[operator]
        return delta


def _change_of_weight(layer: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the change of a layer's weight by its adapter, if the layer had these parameters."""
    change: Tensor = torch.func.functional_call(
        _Delta(layer), {f"layer.{key}": value for key, value in parameters.items()}, ()
    )
    return change


def check_adapters(model: PreTrainedModel) -> None:
    """Check on one sequence that adapters change the loss as their changes of the weights would, to first order.

    Some models use a weight without calling its layer. Its adapter would be merged without an effect in training. Of
    each kind of layer, the first is checked.

    Raises:
        OpdctlError: an adapter has another effect, or the model fails with adapters.
    """
    layers, parameters = adapter_layers(model), dict(model.named_parameters())
    first = {re.sub(r"\d+", "N", name): name for name in reversed(layers)}.values()
    matrices = {name: _adapter_matrices(layers[name][1]) for name in first}
    adapted = {plain_name(name).removesuffix(".weight") for name in layers}
    try:
        gradients = _gradients(
            model,
            {name: parameters[name] for name in first}
            | {(name, key): matrix for name in first for key, matrix in matrices[name].items()},
        )
    except Exception as error:  # of any class, where a layer is not called as peft expects
        if is_out_of_memory(error):
            raise
        reason = f"the model fails with these adapters: {type(error).__name__}: {summarize_exception(error)}"
        raise _unsupported_layers(reason, adapted) from error
    for name in first:
        change = (gradients[name].float() * _change_of_weight(layers[name][1], matrices[name])).sum()
        expected = torch.autograd.grad(change, list(matrices[name].values()))
        for key, value in zip(matrices[name], expected, strict=True):
            if not (gradients[name, key] - value).norm() <= GRADIENT_TOLERANCE[model.dtype] * value.norm():
                reason = f"the model uses the weight of {plain_name(name)} in another way than by its layer"
                raise _unsupported_layers(reason, adapted)


def _gradients(model: PreTrainedModel, tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return the gradients of the loss of one sequence."""
    ids_T = torch.from_numpy(probe_ids(model)).long().to(model.device)
    frozen = [tensor for tensor in tensors.values() if not tensor.requires_grad]
    for tensor in frozen:
        tensor.requires_grad = True
    try:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        loss = nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:])
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
    finally:
        for tensor in frozen:
            tensor.requires_grad = False
    return dict(zip(tensors, gradients, strict=True))


def gather_adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all trained weights of a model with adapters, unsharded and on the CPU. Empty without adapters."""
    if not hasattr(model, "peft_config"):
        return {}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: distributed.full_tensor(parameter).cpu() for name, parameter in trained}


def save_adapter(model: PreTrainedModel, adapter: dict[str, Tensor], student: ModelDir, directory: Path) -> None:
    """Write the adapter, as gathered, in peft's format. It applies to the initial student."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config: Any = model.peft_config[ADAPTER]
    config.base_model_name_or_path = str(student.path)
    # peft keeps names in sets, whose order differs between processes.
    config.target_modules = sorted(config.target_modules or [])
    config.target_parameters = sorted(config.target_parameters or []) or None
    state = peft.get_peft_model_state_dict(model, state_dict=adapter, adapter_name=ADAPTER, save_embedding_layers=False)
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    if convert_peft_adapter_state_dict_for_transformers(model, config, state).keys() != state.keys():
        console.warn_once("no adapter/ is written: peft would take its names for others of this model")
        return
    config.save_pretrained(str(directory))
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
