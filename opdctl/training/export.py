"""The exported student: the directory of the initial student with the trained weights.

All ranks call `StudentExporter.export`. The weights are gathered and converted one after another, and every rank writes
files.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opdctl import distributed
from opdctl.artifacts.tensor_files import CreateFile, TensorEntry, TensorFileWriter, create_on_disk, position_in_file
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.dtypes import DTYPE_NAMES, DTYPES, tensor_bytes
from opdctl.models.inspection import load_on_meta_device, loaded_names
from opdctl.models.json_files import read_json_object
from opdctl.models.weights import CHUNK_BYTES, INDEX_FILE, MAX_WEIGHT_FILE_BYTES, TensorHeader
from opdctl.training import adapters
from opdctl.training.conversions import Conversion, find_conversions

ACCOMPANYING_PATTERNS = ("LICENSE*", "NOTICE*", "*.tiktoken", "*.spm", "additional_chat_templates/*.jinja")
"""Further files of a model directory that a student keeps."""
MIN_WRITTEN_APART_BYTES = 2**17
"""Of a tensor that another thread writes: the change of threads takes as long as the copy of a smaller one."""


def text_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Return what the names of the text model's modules begin with; the towers of other modalities have other names."""
    if model.config.get_text_config(decoder=True) is model.config:
        return ("",)
    parts = (model.get_decoder(), model.get_output_embeddings())
    return tuple(name for name, module in model.named_modules() if module in parts)


# ── Places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TensorSource:
    """What a stored tensor is made of.

    parameters: the name in the model of each weight of the conversion. name: of the tensor among its results.
    """

    conversion: Conversion
    parameters: Mapping[str, str]
    name: str


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
    stored, weights = find_sources(model, student), _empty_weights(model)
    for name, loaded in loaded_names(model, student.weights).items():
        if loaded in weights and name not in stored:
            raise _no_place(student, f"the place of {loaded} is unknown, which transformers loads from {name}")


def _empty_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return tensors without content in place of the weights of the text model."""
    text = text_prefixes(model)
    return {
        name: torch.empty(parameter.shape, device="meta")
        for name, parameter in model.named_parameters()
        if name.startswith(text)
    }


def find_sources(model: PreTrainedModel, student: ModelDir) -> dict[str, TensorSource]:
    """Return what each tensor of the student's files is made of, by its name there. Those of other parts are left out.

    Raises:
        OpdctlError: a weight of the text model has no place in the files.
    """
    empty, tied = _empty_weights(model), model.all_tied_weights_keys
    parameters = {name: name for name in empty}
    parameters = {source: parameters[name] for name, source in tied.items() if name in parameters} | parameters
    parameters |= {name: parameters[source] for name, source in tied.items() if source in parameters}
    headers, prefix = student.weights.tensors, f"{model.base_model_prefix}."
    stored: dict[str, TensorSource] = {}
    missing: dict[str, str] = {}
    for conversion in find_conversions(model, parameters):
        of_conversion = {name: parameters[name] for name, _ in conversion.sources}
        tensors = conversion.convert(model, {name: empty[parameter] for name, parameter in of_conversion.items()})
        for name, tensor in tensors.items():
            # transformers also loads the files of a base model, whose names lack its prefix, into a model with a head.
            names = [key for key in (name, name.removeprefix(prefix), prefix + name) if key in headers]
            if names and headers[names[0]].shape == tensor.shape:
                stored[names[0]] = TensorSource(conversion, of_conversion, name)
            else:
                missing[name] = next(iter(of_conversion.values())) if conversion.is_renaming else name
    # Of two tied weights, one may be missing.
    kept = {next(iter(source.parameters.values())) for source in stored.values() if source.conversion.is_renaming}
    if lost := sorted(name for name, parameter in missing.items() if parameter not in kept):
        raise _no_place(student, f"no tensor has the name and shape of the trained {lost[0]}")
    return stored


def _no_place(student: ModelDir, reason: str) -> OpdctlError:
    return OpdctlError(
        "unsupported_model",
        f"{student.path}: the weight files cannot be written: {reason}",
        hint="convert the directory by from_pretrained and save_pretrained of transformers",
    )


# ── Export ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the exported files.

    header: of the same tensor in the initial student. source: None if it is copied from there.
    """

    entry: TensorEntry
    header: TensorHeader
    source: TensorSource | None


class StudentExporter:
    """Writes a student in training as a model directory. What its files consist of is found once.

    student: the directory of the initial one. dtype: of the trained weights in the files.
    """

    def __init__(self, model: PreTrainedModel, student: ModelDir, dtype: str):
        # The conversion of names looks up weights of the model, whose names adapters change.
        plain = load_on_meta_device(student)[0] if hasattr(model, "peft_config") else model
        self._model, self._student, self._dtype = model, student, dtype
        self._weights = MergedWeights(model, plain, student, getattr(torch, dtype))
        self._files = plan_files(self._weights.tensors, student)
        self.num_bytes = sum(map(_total_bytes, self._files.values()))
        """Of the weight files of all ranks."""

    def export(self, directory: Path, create_file: CreateFile = create_on_disk) -> dict[str, int]:
        """Write the student's directory with the merged weights, and adapters also in `adapter/`. Called by all ranks.

        Every rank writes its share of the weight files, and keeps what one conversion returns for them until it is
        written. It returns the bytes of its weight files by name. They are not flushed to disk.

        create_file: opens a weight file.
        """
        weights, files = self._weights, self._files
        adapter = adapters.gather_adapter(self._model)
        if distributed.is_main():
            _copy_settings(self._student, directory)
            _write_configs(files, self._student, self._dtype, directory)
            if adapter:
                adapters.save_adapter(self._model, adapter, self._student, directory / "adapter")
        sizes: dict[str, int] = {}
        names, world_size = list(files), distributed.world_size()
        weights.start_export(tensor for name in names[distributed.rank() :: world_size] for tensor in files[name])
        for start in range(0, len(names), world_size):
            of_round = {name: files[name] for name in names[start : start + world_size]}
            sizes |= _write_round(of_round, weights, directory, create_file)
        return sizes


def _write_round(
    files: Mapping[str, list[StoredTensor]], weights: "MergedWeights", directory: Path, create_file: CreateFile
) -> dict[str, int]:
    """Write at most one file of each rank, the n-th by rank n. Called by all ranks, also by those without a file.

    The files' tensors are gathered in turn, so that all ranks write at the same time. A rank writes a tensor while the
    next ones are gathered.
    """
    rank = distributed.rank()
    own = dict(enumerate(files)).get(rank)
    with ExitStack() as stack:
        if own:
            entries = [tensor.entry for tensor in files[own]]
            file = stack.enter_context(TensorFileWriter(directory / own, entries, {"format": "pt"}, create_file))
        background, writing = stack.enter_context(ThreadPoolExecutor(1)), Future[None]()
        writing.set_result(None)
        for tensors in zip_longest(*files.values()):
            for owner, tensor in enumerate(tensors):
                if tensor:
                    weights.convert(tensor)
                if tensor and owner == rank:
                    writing.result()
                    if tensor.entry.num_bytes < MIN_WRITTEN_APART_BYTES:
                        _write_pieces(file, weights.take(tensor))
                        continue
                    writing = background.submit(_write_pieces, file, weights.take(tensor))
        writing.result()
        return {own: file.finish()} if own else {}


def _write_pieces(file: TensorFileWriter, pieces: Iterable[bytes | memoryview]) -> None:
    for piece in pieces:
        file.write(piece)


def plan_files(tensors: list[StoredTensor], student: ModelDir) -> dict[str, list[StoredTensor]]:
    """Return the tensors of each file in their order: the student's files, or others if one were too large."""
    files: dict[str, list[StoredTensor]] = {file.name: [] for file in student.weights.files}
    for tensor in tensors:
        files[tensor.header.file.name].append(tensor)
    if any(_total_bytes(of_file) > MAX_WEIGHT_FILE_BYTES for of_file in files.values()):
        parts: list[list[StoredTensor]] = [[]]
        for tensor in tensors:
            if parts[-1] and _total_bytes([*parts[-1], tensor]) > MAX_WEIGHT_FILE_BYTES:
                parts.append([])
            parts[-1].append(tensor)
        files = {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}
    return {name: sorted(of_file, key=lambda tensor: position_in_file(tensor.entry)) for name, of_file in files.items()}


def _total_bytes(tensors: list[StoredTensor]) -> int:
    return sum(tensor.entry.num_bytes for tensor in tensors)


def export_dtypes(
    model: PreTrainedModel, sources: Mapping[str, TensorSource], headers: Mapping[str, TensorHeader], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the dtype in which each weight is exported.

    It is `dtype`, but weights that are stored with more bits than most of the student, such as float32 routers, keep
    them.
    """
    dtypes = dict.fromkeys(_empty_weights(model), dtype)
    counts: Counter[str] = Counter()
    for name in sources:
        counts[headers[name].dtype] += math.prod(headers[name].shape)
    usual = counts.most_common(1)[0][0]
    for name, source in sources.items():
        if headers[name].dtype != usual and source.conversion.is_renaming:
            (parameter,) = source.parameters.values()
            dtypes[parameter] = torch.promote_types(DTYPES[headers[name].dtype], dtype)
    return dtypes


class MergedWeights:
    """The weights of a model with its adapters merged, in the form in which its files store them.

    model: with adapters, sharded or not. plain: the same without adapters; its weights need no memory.
    """

    def __init__(self, model: PreTrainedModel, plain: PreTrainedModel, student: ModelDir, dtype: torch.dtype):
        self._plain, self._layers = plain, adapters.adapter_layers(model)
        headers, sources = student.weights.tensors, find_sources(plain, student)
        self._dtypes = export_dtypes(plain, sources, headers, dtype)
        named = {adapters.plain_name(name): name for name, _ in model.named_parameters() if adapters.is_plain(name)}
        self._names, self._parameters = named, dict(model.named_parameters())
        self._results: dict[str, dict[str, str]] = {}  # of each conversion: stored name → name in the results
        self._kept: set[str] = set()
        self._done: set[str] = set()  # names of conversions
        self._converted: dict[str, Tensor] = {}  # not yet written
        self.tensors: list[StoredTensor] = []
        """In the order of the student's files."""
        for name, header in headers.items():
            self.tensors.append(self._stored_tensor(name, header, sources.get(name)))
        for name, source in sources.items():
            self._results.setdefault(source.conversion.name, {})[name] = source.name

    def _is_changed(self, parameter: str) -> bool:
        name = self._names[parameter]
        return self._parameters[name].requires_grad or name in self._layers

    def _stored_tensor(self, name: str, header: TensorHeader, source: TensorSource | None) -> StoredTensor:
        dtype, num_bytes = header.dtype, header.end - header.start
        if source:
            parameters = list(source.parameters.values())
            is_changed = any(map(self._is_changed, parameters))
            # Where loading has rounded an unchanged weight, the file has it exactly.
            if is_changed or all(self._parameters[self._names[p]].dtype == self._dtypes[p] for p in parameters):
                exported = self._dtypes[parameters[0]]
                dtype, num_bytes = DTYPE_NAMES[exported], math.prod(header.shape) * exported.itemsize
            source = source if is_changed else None
        return StoredTensor(TensorEntry(name, dtype, header.shape, num_bytes), header, source)

    def start_export(self, kept: Iterable[StoredTensor]) -> None:
        """Begin with the present weights. kept: the tensors that this rank keeps when they have been converted."""
        self._kept = {tensor.entry.name for tensor in kept}
        self._done.clear()
        self._converted.clear()

    def convert(self, tensor: StoredTensor) -> None:
        """Gather and convert what a tensor is made of, unless that was done for another one. Called by all ranks."""
        if tensor.source and tensor.source.conversion.name not in self._done:
            self._done.add(tensor.source.conversion.name)
            self._converted |= self._convert(tensor.source)

    def take(self, tensor: StoredTensor) -> Iterable[bytes | memoryview]:
        """Return the bytes of a tensor that this rank keeps, in pieces. A converted one is forgotten."""
        return [tensor_bytes(self._converted.pop(tensor.entry.name))] if tensor.source else _read_stored(tensor)

    def _convert(self, source: TensorSource) -> dict[str, Tensor]:
        """Gather the weights of a conversion. Return those of its results that this rank keeps by name, on the CPU."""
        results = {name: of for name, of in self._results[source.conversion.name].items() if name in self._kept}
        weights = {name: self._gather(parameter) for name, parameter in source.parameters.items()}
        if not results:
            return {}
        converted = source.conversion.convert(self._plain, {name: weight.cpu() for name, weight in weights.items()})
        return {stored: converted[name] for stored, name in results.items()}

    def _gather(self, parameter: str) -> Tensor:
        """Return an unsharded weight, merged, in its dtype."""
        name, dtype = self._names[parameter], self._dtypes[parameter]
        if name in self._layers:
            weight = distributed.full_tensor(self._parameters[name])
            return adapters.merge(weight, name, *self._layers[name]).to(dtype)
        return distributed.full_tensor(self._parameters[name].detach().to(dtype))  # fewer bytes to gather


def _read_stored(tensor: StoredTensor) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a tensor of the initial student, in the dtype of the exported one."""
    stored, exported = tensor.header.dtype, tensor.entry.dtype
    with tensor.header.file.open("rb") as file:
        file.seek(tensor.header.start)
        while chunk := file.read(min(CHUNK_BYTES, tensor.header.end - file.tell())):
            if stored == exported:
                yield chunk
            else:
                yield tensor_bytes(torch.frombuffer(bytearray(chunk), dtype=DTYPES[stored]).to(DTYPES[exported]))


# ── Other files ──────────────────────────────────────────────────────────────────────────────────────────────────────


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


def _write_configs(files: Mapping[str, list[StoredTensor]], student: ModelDir, dtype: str, directory: Path) -> None:
    """Write config.json and, if there are several weight files, their index."""
    config, index = _with_dtype(student.config, dtype, always=True), student.weights.index
    content = read_json_object(index) if index else {}
    name = index.name if index else INDEX_FILE
    if files.keys() != {file.name for file in student.weights.files}:
        config.pop("transformers_weights", None)
        name = INDEX_FILE
        content["weight_map"] = {tensor.entry.name: file for file, tensors in files.items() for tensor in tensors}
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if "weight_map" in content:
        total = sum(map(_total_bytes, files.values()))
        content["metadata"] = (content.get("metadata") or {}) | {"total_size": total}
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
