"""LoRA adapters: put into a model, merged into its weights, written in peft's format.

All ranks call every function of this module.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opdctl import console, distributed
from opdctl.errors import OpdctlError, did_you_mean, is_out_of_memory, summarize_exception
from opdctl.models.directory import MAX_DETAIL_CHARS, ModelDir
from opdctl.models.routing import stacked_experts
from opdctl.models.self_check import input_device, probe_ids
from opdctl.recipe.schema import ALL_LINEAR, Lora

ADAPTER = "default"  # the name that peft gives to a single adapter
GRADIENT_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Relative differences between gradients that rounding explains, by the dtype of the frozen weights."""


def inject_adapters(model: PreTrainedModel, settings: Lora, text: tuple[str, ...]) -> None:
    """Put LoRA adapters into the modules whose names begin with one of `text`, and freeze all other weights.

    Raises:
        OpdctlError: a name matches nothing, is the matrix of a tied head, or cannot be trained by peft.
    """
    import peft

    linear, stacked = _linear_layers(model, text)
    targets, saved = _find_layers(model, settings, text, linear | stacked)
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
        modules_to_save=sorted(saved) or None,  # peft takes any end of a name, such as `orm`
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


@contextlib.contextmanager
def adapters_disabled(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute as it did before it had adapters. Passes within are without gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


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
        stacked |= {f"{name}.{key}" for key in stacked_experts(module)}
    return linear, stacked


def _find_layers(
    model: PreTrainedModel, settings: Lora, text: tuple[str, ...], linear: set[str]
) -> tuple[set[str], ...]:
    """Return the full names of the modules and stacked parameters that get an adapter, and of those trained in full.

    linear: the names that `all-linear` matches.
    """
    modules = {name for name, _ in model.named_modules() if name and name.startswith(text)}
    containers = {name.rpartition(".")[0] for name in modules}
    targets, saved = set(linear) if ALL_LINEAR in settings.target_modules else set[str](), set[str]()
    for target in settings.target_modules:
        if target == ALL_LINEAR:
            continue
        key, matching = "lora.target_modules", {name for name in modules | linear if _matches(name, target)}
        if not matching:
            raise _unknown_layer(key, target, {*linear, ALL_LINEAR})
        if groups := sorted(matching & containers):
            inner = {_last_parts(name, 1) for name in linear if name.startswith(f"{groups[0]}.")}
            raise OpdctlError(
                "unsupported_setting",
                f"{key}: `{target}` is no linear layer but contains {', '.join(sorted(inner)) or 'none'}",
                hint="give names of linear layers, or this one in lora.modules_to_save",
            )
        _check_unshared(model, key, target, matching)
        targets |= matching
    for target in settings.modules_to_save:
        key, matching = "lora.modules_to_save", {name for name in modules if _matches(name, target)}
        if not matching:
            raise _unknown_layer(key, target, modules)
        _check_unshared(model, key, target, matching)
        saved |= matching
    targets = {name for name in targets if not any(f"{name}.".startswith(f"{module}.") for module in saved)}
    if not targets:
        raise OpdctlError(
            "unsupported_setting",
            "lora.modules_to_save: it contains all of lora.target_modules",
            hint="set lora.rank = 0 to train all weights",
        )
    return targets, _outermost(saved)


def _outermost(modules: set[str]) -> set[str]:
    """Return the modules that are not within another one of them."""
    return {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}


def _check_unshared(model: PreTrainedModel, key: str, target: str, modules: set[str]) -> None:
    """Raise OpdctlError if a weight of one of these modules is also one of another module, as that of a tied head."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for shared, module in itertools.product((each for each in names.values() if len(each) > 1), modules):
        if 0 < sum(name.startswith(f"{module}.") for name in shared) < len(shared):
            raise OpdctlError(
                "unsupported_setting",
                f"{key}: `{target}` has a weight that the student uses under several names: {', '.join(shared)}",
                hint="remove this name",
            )


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
    layers = adapter_layers(model)
    first = {re.sub(r"\d+", "N", name): name for name in reversed(layers)}.values()
    adapted = {plain_name(name).removesuffix(".weight") for name in layers}
    try:
        gradients = _gradients(model, {name: layers[name] for name in first})
    except Exception as error:  # of any class, where a layer is not called as peft expects
        if is_out_of_memory(error):
            raise
        reason = f"the model fails with these adapters: {type(error).__name__}: {summarize_exception(error)}"
        raise _unsupported_layers(reason, adapted) from error
    for name, (of_weight, matrices, of_matrices) in gradients.items():
        layer_name, layer = layers[name]
        # Only the shape of the weight matters for its change.
        change = _change_of_weight(layer, {name.removeprefix(f"{layer_name}."): of_weight, **matrices})
        expected = torch.autograd.grad((of_weight.float() * change).sum(), list(matrices.values()))
        for value, expected_value in zip(of_matrices, expected, strict=True):
            difference = (value - expected_value).norm()
            if not difference <= GRADIENT_TOLERANCE[of_weight.dtype] * expected_value.norm():
                reason = f"the model uses the weight of {plain_name(name)} in another way than by its layer"
                raise _unsupported_layers(reason, adapted)


def _gradients(
    model: PreTrainedModel, layers: Mapping[str, tuple[str, nn.Module]]
) -> dict[str, tuple[Tensor, dict[str, Tensor], Sequence[Tensor]]]:
    """Return the gradients of the loss of one sequence, by the names in `layers`, which is as of `adapter_layers`.

    That of the weight, then the adapter's matrices and their gradients. All are unsharded.
    """
    used: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, dict[str, Tensor]] = {}

    def find_tensors(name: str) -> None:
        layer_name, layer = layers[name]
        weight = layer.get_parameter(name.removeprefix(f"{layer_name}."))
        weight.requires_grad = True
        matrices = _adapter_matrices(layer)
        used[name] = {"weight": weight, **matrices}
        copies[name] = {key: value.detach().clone().requires_grad_() for key, value in matrices.items()}

    # FSDP gathers the parameters of a layer in front of the forward pass of a module that contains it.
    modules = dict(model.named_modules())
    gathering = [name for name, module in modules.items() if isinstance(module, FSDPModule)]
    hooks = []
    for name, (layer_name, _) in layers.items():
        owners = [owner for owner in gathering if f"{layer_name}.".startswith(f"{owner}.")]
        if owners:
            find = partial(lambda name, *_: find_tensors(name), name)
            hooks.append(modules[max(owners, key=len)].register_forward_pre_hook(find))
        else:
            find_tensors(name)
    ids_T = torch.from_numpy(probe_ids(model)).long().to(input_device(model))
    try:
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        loss = nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:])
        tensors = [tensor for name in layers for tensor in used[name].values()]
        gradients = iter(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
    finally:
        for hook in hooks:
            hook.remove()
        for name in used:
            used[name]["weight"].requires_grad = False
    return {name: (next(gradients), copies[name], [next(gradients) for _ in copies[name]]) for name in layers}


def gather_adapter(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return all trained weights of a model with adapters, unsharded and on the CPU.

    Empty without adapters, and on other ranks than 0.
    """
    if not hasattr(model, "peft_config"):
        return {}
    trained: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gathered = distributed.full_tensor(parameter)
            trained |= {name: gathered.cpu()} if distributed.is_main() else {}
    return trained


def base_model(path: Path) -> tuple[str, str | None]:
    """Return the name and the revision by which peft finds a model: a hub id with its commit, or the path."""
    *_, repository, folder, revision = ("", "", *path.parts)
    if folder == "snapshots" and repository.startswith("models--"):  # the cache of huggingface_hub
        return repository.removeprefix("models--").replace("--", "/"), revision
    return str(path), None


def save_adapter(model: PreTrainedModel, adapter: dict[str, Tensor], student: ModelDir, directory: Path) -> None:
    """Write the adapter, as gathered, in peft's format. It applies to the initial student."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config: Any = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.revision = base_model(student.path)
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
