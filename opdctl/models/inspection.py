"""What a model directory holds, checked before a run starts.

The model is built without memory on torch's meta device, and transformers matches the names and shapes of the stored
tensors with it: only headers are read. A model whose parameters would differ from what is stored is rejected.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from logging import Filter, LogRecord, getLogger
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging

from opdctl import console
from opdctl.errors import ErrorKind, OpdctlError
from opdctl.models.architectures import auto_class, separate_body
from opdctl.models.directory import MERGE_HINT, ModelDir, translate_loading_errors
from opdctl.models.json_files import read_model_file
from opdctl.models.weights import StoredWeights, have_equal_content

WRAPPER_PREFIXES = {
    "module.": "DataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "peft",
    "_fsdp_wrapped_module.": "FSDP",
}
"""Prefixes of the names of tensors that were saved from a wrapped model, and what wrapped it."""
BUFFER_NAMES = re.compile(r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.(bias|masked_bias)|position_ids)$")
"""Stored buffers that models compute instead of loading."""
SCALE_NAMES = re.compile(r"(scale|scales|scale_inv|zeros|zero_point|g_idx|absmax|quant_map|quant_state\.\w+)$")
"""Tensors that accompany quantized weights."""
PLAIN_DTYPES = {"F64", "F32", "BF16", "F16", "I64", "BOOL"}
"""Dtypes of weights, and of counters, tables of ids and masks, which quantizers do not use."""
MAX_LISTED_TENSORS = 3
MAX_POSITION_OFFSET = 8  # rows of a table of positions before the first position, as in OPT
DOWNLOAD_HINT = "download or export the model again"


@dataclass(frozen=True)
class Inspection:
    """What was found. dtypes: of the stored tensors. ignored_tensors: those that the text model does not have."""

    architecture: str
    dtypes: list[str]
    ignored_tensors: list[str]


def inspect_model(model: ModelDir, engine: str = "transformers") -> Inspection:
    """Check a model directory by its configs and the headers of its weights. engine: which loads it.

    vLLM supports architectures and quantizations that transformers does not; of these only the files are checked.

    Raises:
        OpdctlError: a file is missing or corrupt; stored tensors do not match the architecture; the directory holds an
            adapter; or a library or package does not support the model.
    """
    check_files(model)
    try:
        return _inspect_tensors(model)
    except OpdctlError as error:
        if engine != "vllm" or error.kind not in ("missing_package", "unsupported_model"):
            raise
        console.debug(f"{model.path}: not checked: transformers cannot load it: {error.detail}")
    dtypes = sorted({tensor.dtype for tensor in model.weights.tensors.values()})
    architecture = (model.config.get("architectures") or ["unknown architecture"])[0]
    return Inspection(architecture, dtypes, [])


def check_files(model: ModelDir) -> None:
    if read_model_file(model.path / "config.json").startswith(b"\xef\xbb\xbf"):
        detail = f"{model.path / 'config.json'}: begins with a byte order mark, which transformers rejects"
        raise OpdctlError("invalid_model", detail, hint="convert this file to UTF-8 without a byte order mark")
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (model.path / name).exists():
            raise OpdctlError(
                "unsupported_model",
                f"{model.path / name}: an adapter beside the weights; transformers would apply it to them",
                hint=f"if the weights are merged, move the adapter to another directory; if not, {MERGE_HINT}",
            )
    if not model.weights.files:
        others = ", ".join(file.name for file in model.weights.unused) or "no weight files"
        detail = f"{model.path}: no model.safetensors and no model.safetensors.index.json, but {others}"
        hint = "convert the model to safetensors; opdctl loads neither pickled weights nor GGUF"
        raise OpdctlError("unsupported_model", detail, hint=hint)


def _inspect_tensors(model: ModelDir) -> Inspection:
    _check_quantization(model)
    empty, loading_info = load_on_meta_device(model)
    ignored = sorted(loading_info["unexpected_keys"])
    check_loaded_tensors(model, empty, loading_info)
    _check_dtypes(model, ignored)
    _check_tied_head(model, empty)
    used = {tensor.dtype for name, tensor in model.weights.tensors.items() if name not in ignored}
    return Inspection(type(empty).__name__, sorted(used), ignored)


def _check_quantization(model: ModelDir) -> None:
    if not model.is_quantized:
        return
    settings = model.config["quantization_config"]
    if not isinstance(settings, dict) or not isinstance(settings.get("quant_method"), str):
        detail = f"{model.path / 'config.json'}: quantization_config has no quant_method"
        raise OpdctlError("invalid_model", detail, hint=DOWNLOAD_HINT)
    with captured_report():
        is_supported = AutoHfQuantizer.supports_quant_method(settings)
    if not is_supported:
        detail = f"{model.path}: quantization `{settings['quant_method']}`: not supported by transformers"
        raise OpdctlError("unsupported_model", detail, hint="use the model before its quantization")


def load_on_meta_device(model: ModelDir, dtype: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model without memory, and what transformers reports of the names of its tensors.

    dtype: of its parameters (default: as stored), except those that transformers keeps in float32.
    """
    logging.disable_progress_bar()
    kind: ErrorKind = "unsupported_model" if model.is_quantized else "invalid_model"
    auto = auto_class(model.full_config, model.path)
    with captured_report() as report, translate_loading_errors(model.path, "the model", kind):
        try:
            loaded, loading_info = auto.from_pretrained(
                model.path,
                device_map="meta",
                dtype=getattr(torch, dtype) if dtype else "auto",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **model.loading_arguments(),
            )
        except RuntimeError as error:
            if failed := re.findall(r"^(\S+) +\| CONVERSION", "\n".join(report), re.MULTILINE):
                detail = f"{model.path}: the stored parts of {failed[0]} do not fit together"
                raise OpdctlError("invalid_model", detail, hint=DOWNLOAD_HINT) from error
            raise
    separate_body(loaded, model.path)
    return loaded, loading_info


def loaded_names(model: PreTrainedModel, weights: StoredWeights) -> dict[str, str]:
    """Return the name in the model of each stored tensor: transformers renames the tensors of some architectures.

    Several stored tensors may make one parameter, such as those of the experts.
    """
    return {stored: name for stored, (name, _) in loaded_names_and_patterns(model, weights).items()}


def loaded_names_and_patterns(model: PreTrainedModel, weights: StoredWeights) -> dict[str, tuple[str, str | None]]:
    """Return the name in the model of each stored tensor, in the order in which transformers converts them.

    With it comes the source pattern of the conversion that makes a parameter of it; None if there is none.
    """
    conversions = model._weight_conversions
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    parameters, prefix = model.state_dict(), model.base_model_prefix
    names = {}
    for stored in sorted(weights.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, parameters)
        if name not in parameters:
            name, pattern = rename_source_key(stored, [], [], prefix, parameters)
        names[stored] = (name, pattern)
    return names


@contextlib.contextmanager
def captured_report() -> Iterator[list[str]]:
    """Collect what transformers logs instead of printing it."""
    messages: list[str] = []

    class Collect(Filter):
        def filter(self, record: LogRecord) -> bool:
            messages.append(record.getMessage())
            return False

    collect = Collect()
    handlers = getLogger("transformers").handlers
    for handler in handlers:
        handler.addFilter(collect)
    try:
        yield messages
    finally:
        for handler in handlers:
            handler.removeFilter(collect)


def check_loaded_tensors(model: ModelDir, loaded: PreTrainedModel, loading_info: dict[str, Any]) -> None:
    """Check that each parameter has a stored tensor of its shape, and that the layers use all tensors stored for them.

    loading_info: as `from_pretrained` returns it.

    Raises:
        OpdctlError: a tensor is missing, has another shape, or is not used.
    """
    for name, stored, expected in sorted(loading_info["mismatched_keys"]):
        detail = f"{model.path}: {name} is stored as {list(stored)}; the config requires {list(expected)}"
        raise OpdctlError("invalid_model", detail, hint="restore the config.json of these weights")
    if missing := sorted(loading_info["missing_keys"]):
        detail = f"{model.path}: {_count(missing)} missing from the weights: {_listed(missing)}"
        hint = DOWNLOAD_HINT
        for prefix, wrapper in WRAPPER_PREFIXES.items():
            if model.weights.tensors and all(name.startswith(prefix) for name in model.weights.tensors):
                detail += f"; all stored names begin with `{prefix}`, as saved from a wrapper ({wrapper})"
                hint = f"save the model inside the wrapper, or remove `{prefix}` from the names"
        raise OpdctlError("invalid_model", detail, hint=hint)
    layers = re.compile("|".join(_layer_patterns(loaded)))
    unexpected = sorted(
        name
        for name in loading_info["unexpected_keys"]
        if (SCALE_NAMES.search(name) or layers.match(name))
        and not BUFFER_NAMES.search(name)
        and not _is_prediction_layer(name, loaded)
    )
    if unexpected:
        reason = f"{_count(unexpected)} stored that {type(loaded).__name__} does not use: {_listed(unexpected)}"
        hint = "restore the config.json of these weights: their number of layers, biases or quantization differs"
        raise OpdctlError("invalid_model", f"{model.path}: {reason}", hint=hint)


def _layer_patterns(loaded: PreTrainedModel) -> list[str]:
    """Return patterns of the names of tensors inside the layers of the text model."""
    names = [name for name, module in loaded.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = [name for name in names if not re.search(r"\.\d+\.", name)]
    return [rf"{re.escape(name)}\.\d+\." for name in outermost] or [r"(?!)"]


def _is_prediction_layer(name: str, loaded: PreTrainedModel) -> bool:
    """Whether a tensor belongs to a layer for multi-token prediction, which is stored after the last layer."""
    config = loaded.config.get_text_config(decoder=True)
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", None) or 0
    index = re.search(r"\.(\d+)\.", name)
    return index is not None and first <= int(index[1]) < first + count


def _check_dtypes(model: ModelDir, ignored: Collection[str]) -> None:
    """Reject weights in short integers or 8-bit numbers that no quantization_config explains."""
    if model.is_quantized:
        return
    for name, tensor in model.weights.tensors.items():
        if tensor.dtype not in PLAIN_DTYPES and name not in ignored and not BUFFER_NAMES.search(name):
            raise OpdctlError(
                "invalid_model",
                f"{tensor.file}: {name} is stored as {tensor.dtype}, and config.json has no quantization_config",
                hint="restore the config.json of these weights, or use the model before its quantization",
            )


def _check_tied_head(model: ModelDir, empty: PreTrainedModel) -> None:
    """Reject an output matrix that is stored with other values than the embedding that the config ties it to."""
    tensors = {name: model.weights.tensors[stored] for stored, name in loaded_names(empty, model.weights).items()}
    for target, source in getattr(empty, "all_tied_weights_keys", {}).items():
        if target not in tensors or source not in tensors:
            continue
        head, embedding = tensors[target], tensors[source]
        if not have_equal_content(head, embedding):
            raise OpdctlError(
                "invalid_model",
                f"{head.file}: {target} differs from {source}, and config.json sets tie_word_embeddings",
                hint="set tie_word_embeddings to false in config.json to use the stored matrix, or remove it",
            )


def size_of_position_table(model: ModelDir) -> int | None:
    """Return how many positions a model has that looks them up in a table; None if positions are unlimited."""
    limit = getattr(model.text_config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    auto = auto_class(model.full_config, model.path)
    with torch.device("meta"), translate_loading_errors(model.path, "the model"):
        empty = auto.from_config(model.full_config, trust_remote_code=model.trust_remote_code)
    embedding = empty.get_input_embeddings()
    tables = [
        module.weight
        for module in empty.base_model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not embedding
    ]
    tables += [buffer for buffer in empty.base_model.buffers() if buffer.ndim == 2]
    return limit if any(limit <= len(table) <= limit + MAX_POSITION_OFFSET for table in tables) else None


def _count(names: list[str]) -> str:
    return "a tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED_TENSORS]) + (", …" if len(names) > MAX_LISTED_TENSORS else "")
