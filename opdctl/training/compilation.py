"""Blocks of the student as fused kernels (torch.compile)."""

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opdctl.errors import OpdctlError, is_out_of_memory
from opdctl.models.batching import pad_batch
from opdctl.models.directory import MAX_DETAIL_CHARS
from opdctl.models.logprobs import response_states
from opdctl.models.self_check import probe_ids

COMPILE_BACKEND = "inductor"


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block, for sequences of any length. Blocks of one kind share the code.

    Raises:
        OpdctlError: the compiler fails.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile(dynamic=True, backend=COMPILE_BACKEND)
    ids = probe_ids(model)
    batch = pad_batch([(ids[:1], ids[1:])], model.device)
    try:
        with torch.no_grad():
            response_states(model, batch.input_ids_BT, batch.rows_N, batch.positions_N)
    except Exception as error:  # of any class: of torch's compiler, of the C++ compiler, of the operating system
        if is_out_of_memory(error):
            raise
        raise OpdctlError(
            "unsupported_setting",
            f"train.compile: {' '.join(str(error).split())[:MAX_DETAIL_CHARS]}",
            hint="set train.compile = false, or install a C++ compiler",
        ) from error
