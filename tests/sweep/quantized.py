"""Takes quantized teachers through opdctl: one tiny directory of each method, written by the formula of its format.

The judge is the same model in float32 with the weights that the formula gives. Methods whose package is not installed
have a directory with the tensors of the format, which can only be refused.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import architectures
from safetensors.torch import save_file
from sweep.models import score_differences
from sweep.outcomes import Outcome, judge
from torch import Tensor
from transformers import PreTrainedModel

BLOCK = 32
Tensors = dict[str, Tensor]


@dataclass
class Quantized:
    """The stored tensors of a weight, by the suffix of their names, and the weight that they stand for."""

    stored: Tensors
    weight: Tensor


def fp8_blocks(weight: Tensor) -> Quantized:
    """float8_e4m3 with a scale for each block of 32 x 32, as DeepSeek-V3."""
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
    scale = blocks.abs().amax((2, 3), keepdim=True) / 448
    quantized = (blocks / scale).to(torch.float8_e4m3fn)

    def join(blocks: Tensor) -> Tensor:
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    return Quantized(
        {"weight": join(quantized), "weight_scale_inv": scale[..., 0, 0].contiguous()}, join(quantized.float() * scale)
    )


def int8_channels(weight: Tensor) -> Quantized:
    """int8 with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = (weight / scale).round().to(torch.int8)
    return Quantized({"weight": quantized, "weight_scale": scale}, quantized.float() * scale)


def int4_groups(weight: Tensor) -> Quantized:
    """int4 with a scale for each group of 32 in a row, eight values in an int32."""
    groups = weight.unflatten(1, (-1, BLOCK))
    scale = groups.abs().amax(2, keepdim=True) / 7
    quantized = (groups / scale).round().clamp(-8, 7)
    nibbles = (quantized + 8).to(torch.int64).flatten(1).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    stored = {
        "weight_packed": nibbles.sum(2).to(torch.int32),
        "weight_scale": scale[..., 0].contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantized(stored, (quantized * scale).flatten(1))


def gptq(weight: Tensor) -> Quantized:
    rows, columns = weight.shape
    stored = {
        "qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "qzeros": torch.zeros(columns // BLOCK, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // BLOCK, rows, dtype=torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // BLOCK,
    }
    return Quantized(stored, weight)


def awq(weight: Tensor) -> Quantized:
    rows, columns = weight.shape
    stored = {
        "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(columns // BLOCK, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // BLOCK, rows, dtype=torch.float16),
    }
    return Quantized(stored, weight)


def bitsandbytes_int8(weight: Tensor) -> Quantized:
    quantized = int8_channels(weight)
    return Quantized(
        {"weight": quantized.stored["weight"], "SCB": quantized.stored["weight_scale"][:, 0] * 127}, weight
    )


def bitsandbytes_nf4(weight: Tensor) -> Quantized:
    stored = {
        "weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(weight.numel() // 64),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }
    return Quantized(stored, weight)


FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def mxfp4(weight_EIO: Tensor) -> Quantized:
    """4-bit floats with a power of 2 for each group of 32 inputs, two values in a byte, as gpt-oss."""
    groups = weight_EIO.transpose(1, 2).unflatten(2, (-1, BLOCK))
    exponent = (groups.abs().amax(3, keepdim=True) / 6).log2().ceil().clamp(min=-127)
    scaled = groups / exponent.exp2()
    code = (scaled.abs()[..., None] - FP4_VALUES).abs().argmin(-1)
    value = FP4_VALUES[code] * scaled.sign() * exponent.exp2()
    code = (code + 8 * (scaled < 0)).to(torch.uint8)
    stored = {"_blocks": code[..., ::2] | code[..., 1::2] << 4, "_scales": (exponent[..., 0] + 127).to(torch.uint8)}
    return Quantized(stored, value.flatten(2).transpose(1, 2).contiguous())


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "format": form, "weights": {"symmetric": True, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Method:
    """A quantized directory: how each linear layer is stored, and what the config says."""

    quantize: Callable[[Tensor], Quantized]
    config: dict[str, Any] | None
    model: str = "llama"
    suffix: str = "_proj.weight"
    """The end of the names of the quantized parameters."""


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
METHODS = {
    "fp8, blocks with scales": Method(fp8_blocks, FP8_CONFIG),
    "fp8, without a quantization config": Method(fp8_blocks, None),
    "int8, without a quantization config": Method(int8_channels, None),
    "compressed-tensors, int8": Method(int8_channels, compressed("int-quantized", num_bits=8, strategy="channel")),
    "compressed-tensors, int4 in groups": Method(
        int4_groups, compressed("pack-quantized", num_bits=4, strategy="group", group_size=BLOCK)
    ),
    "compressed-tensors, without a quantization config": Method(int4_groups, None),
    "MXFP4": Method(mxfp4, {"quant_method": "mxfp4"}, "gpt_oss", "_proj"),
    "MXFP4, without a quantization config": Method(mxfp4, None, "gpt_oss", "_proj"),
    "GPTQ": Method(gptq, {"quant_method": "gptq", "bits": 4, "group_size": BLOCK, "desc_act": False}),
    "AWQ": Method(awq, {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "zero_point": True, "version": "gemm"}),
    "bitsandbytes, int8": Method(bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitsandbytes, NF4": Method(
        bitsandbytes_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    ),
    "HQQ": Method(int8_channels, {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8}}}),
    "torchao": Method(int8_channels, {"quant_method": "torchao", "quant_type": "int8_weight_only"}),
    "a method that transformers does not know": Method(int8_channels, {"quant_method": "newest"}),
}


def save(name: str, folder: Path) -> PreTrainedModel:
    """Write the quantized directory into `folder`, and return the model that it stands for."""
    method = METHODS[name]
    model = architectures.make(method.model, 1)
    architectures.save(model, folder)
    state: Tensors = {}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(method.suffix) and parameter.dim() > 1:
                quantized = method.quantize(parameter)
                stem = key.removesuffix("weight")
                state |= {stem + suffix: tensor.contiguous() for suffix, tensor in quantized.stored.items()}
                parameter.copy_(quantized.weight)
            else:
                state[key] = parameter
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if method.config:
        config["quantization_config"] = method.config
    (folder / "config.json").write_text(json.dumps(config))
    return model


def examine_quantized(name: str, folder: Path) -> Outcome:
    """Let a quantized teacher score the responses of a plain student."""
    model = save(name, folder / "teacher")
    student = architectures.save(architectures.make(METHODS[name].model, 0), folder / "student")
    return judge(partial(score_differences, student, folder / "teacher", model), folder / "run")
