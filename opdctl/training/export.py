"""The exported student: the directory of the initial student with the trained weights.

All ranks call `export_student` and `merged_state_dict`.
"""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from opdctl import distributed
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.inspection import load_on_meta_device, loaded_names
from opdctl.models.json_files import read_json_object
from opdctl.training import adapters

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The floating-point dtypes of safetensors."""
ACCOMPANYING_PATTERNS = ("LICENSE*", "NOTICE*", "*.tiktoken", "*.spm", "additional_chat_templates/*.jinja")
"""Further files of a model directory that a student keeps."""


def text_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return what the names of the text model's modules begin with; the towers of other modalities have other names."""
    if model.config.get_text_config(decoder=True) is model.config:
        return ("",)
    parts = (model.get_decoder(), model.get_output_embeddings())
    return tuple(name for name, module in model.named_modules() if module in parts)


def check_exportable(model: PreTrainedModel, student: ModelDir) -> None:
    """Check that the student's files have a place for every weight of the text model.

    Raises:
        OpdctlError: a weight has none, or the files are quantized.
    """
    if student.is_quantized:
        raise OpdctlError(
            "unsupported_model",
            f"{student.path}: a quantized model cannot be trained",
            hint="use the model before its quantization",
        )
    state = _empty_state(model)
    stored = find_stored_tensors(model, state, student)
    for name, loaded in loaded_names(model, student.weights).items():
        if loaded in state and name not in stored:
            raise _no_place(student, f"the place of {loaded} is unknown, which transformers loads from {name}")


def _empty_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return tensors without content in place of the weights of the text model."""
    text = text_prefixes(model)
    return {
        name: torch.empty(parameter.shape, device="meta")
        for name, parameter in model.named_parameters()
        if name.startswith(text)
    }


def find_stored_tensors(model: PreTrainedModel, state: dict[str, Tensor], student: ModelDir) -> dict[str, Tensor]:
    """Return the weights by the names and with the shapes under which the student's files store them.

    transformers renames, splits or stacks the stored tensors of some models when it loads them, and can revert this.

    Raises:
        OpdctlError: a weight has no place in the files.
    """
    tied = model.all_tied_weights_keys
    state = {source: state[name] for name, source in tied.items() if name in state} | state
    state |= {name: state[source] for name, source in tied.items() if source in state}
    headers, prefix = student.weights.tensors, f"{model.base_model_prefix}."
    stored, missing = {}, {}
    for name, tensor in revert_weight_conversion(model, state).items():
        # transformers also loads the files of a base model, whose names lack its prefix, into a model with a head.
        names = [key for key in (name, name.removeprefix(prefix), prefix + name) if key in headers]
        if names and headers[names[0]].shape == tensor.shape:
            stored[names[0]] = tensor
        else:
            missing[name] = tensor
    kept = {id(tensor) for tensor in stored.values()}  # of two tied weights, one may be missing
    if lost := sorted(name for name, tensor in missing.items() if id(tensor) not in kept):
        raise _no_place(student, f"no tensor has the name and shape of the trained {lost[0]}")
    return stored


def _no_place(student: ModelDir, reason: str) -> OpdctlError:
    return OpdctlError(
        "unsupported_model",
        f"{student.path}: the weight files cannot be written: {reason}",
        hint="convert the directory by from_pretrained and save_pretrained of transformers",
    )


def export_student(model: PreTrainedModel, student: ModelDir, dtype: str, directory: Path) -> None:
    """Write the student's directory with the merged weights, in `dtype`, and adapters also in `adapter/`.

    Only rank 0 writes.
    """
    # The conversion of names looks up weights of the model, whose names adapters change.
    plain = load_on_meta_device(student)[0] if hasattr(model, "peft_config") else model
    state = merged_state_dict(model, export_dtypes(plain, student, dtype))
    adapter = adapters.gather_adapter(model)
    if not distributed.is_main():
        return
    _copy_settings(student, directory)
    config = json.dumps(_with_dtype(student.config, dtype, always=True), indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(config + "\n", encoding="utf-8")
    _write_weights(find_stored_tensors(plain, state, student), student, directory)
    if adapter:
        adapters.save_adapter(model, adapter, student, directory / "adapter")


def export_dtypes(model: PreTrainedModel, student: ModelDir, dtype: str) -> dict[str, torch.dtype]:
    """Return the dtype in which each weight is exported.

    It is `dtype`, but weights that are stored with more bits than most of the student, such as float32 routers, keep
    them.
    """
    state, export_dtype = _empty_state(model), getattr(torch, dtype)
    headers, names = student.weights.tensors, {id(tensor): name for name, tensor in state.items()}
    dtypes, stored = dict.fromkeys(state, export_dtype), find_stored_tensors(model, state, student)
    counts: Counter[str] = Counter()
    for name in stored:
        counts[headers[name].dtype] += math.prod(headers[name].shape)
    usual = counts.most_common(1)[0][0]
    for name, tensor in stored.items():
        if headers[name].dtype != usual and id(tensor) in names:
            dtypes[names[id(tensor)]] = torch.promote_types(DTYPES[headers[name].dtype], export_dtype)
    return dtypes


def merged_state_dict(model: PreTrainedModel, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the weights by their names without adapters, in `dtypes`, on the CPU. Empty except on rank 0."""
    state, layers = {}, adapters.adapter_layers(model)
    for name, value in model.named_parameters():
        plain, is_changed = adapters.plain_name(name), value.requires_grad or name in layers
        if plain not in dtypes or not adapters.is_plain(name):
            continue
        if not is_changed and value.dtype != dtypes[plain]:
            continue  # loading rounded it, the file has it exactly
        weight = distributed.full_tensor(value)
        if name in layers:
            weight = adapters.merge(weight, name, *layers[name])
        if distributed.is_main():
            state[plain] = weight.to("cpu", dtypes[plain])
    return state


def _copy_settings(student: ModelDir, directory: Path) -> None:
    """Copy all files of the student but weights and config.json, and what accompanies them."""
    accompanying = [file for pattern in ACCOMPANYING_PATTERNS for file in student.path.glob(pattern)]
    for file in [*student.files(), *accompanying]:
        if file not in student.weights.files and file.name != "config.json" and not file.name.endswith(".index.json"):
            target = directory / file.relative_to(student.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _with_dtype(config: dict[str, Any], dtype: str, *, always: bool = False) -> dict[str, Any]:
    """Return a config of the model or of a part with another dtype, under the name that it has there."""
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    return changed | dict.fromkeys(keys or ["dtype"] * always, dtype)


def _write_weights(stored: dict[str, Tensor], student: ModelDir, directory: Path) -> None:
    """Write the files of the student with the tensors `stored`; all other tensors are copied."""
    total_bytes = 0
    for file in student.weights.files:
        tensors: dict[str, Tensor] = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = stored.pop(name).contiguous() if name in stored else opened.get_tensor(name)
                # safetensors writes no shared tensors: the head of a tied model, if its copy is stored, too.
                is_shared = any(tensor is other for other in tensors.values())
                tensors[name] = tensor.clone() if is_shared else tensor
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    if index := student.weights.index:
        content = read_json_object(index)
        content["metadata"] = (content.get("metadata") or {}) | {"total_size": total_bytes}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / index.name).write_text(text + "\n", encoding="utf-8")
