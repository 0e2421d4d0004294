"""The factories of the engines that come with opdctl. Each imports its backend only when it is called.

vLLM always runs in a separate process, and transformers on a GPU. On a CPU transformers runs in this process, which
has imported it anyway.
"""

from opdctl.engines.base import Engine, EngineContext
from opdctl.models.directory import ModelDir
from opdctl.registry import ENGINES


@ENGINES.register("transformers")
def transformers(model: ModelDir, context: EngineContext) -> Engine:
    """Hugging Face transformers: no extra installation, any device."""
    if context.device == "cpu":
        return _start_transformers(model, context)
    from opdctl.engines.host import HostedEngine

    return HostedEngine(_start_transformers, model, context)


@ENGINES.register("vllm")
def vllm(model: ModelDir, context: EngineContext) -> Engine:
    """vLLM in a separate process, for large models and long responses."""
    if context.recipe.spans_nodes("vllm"):  # its processes are actors in the placement group of this one
        return _start_vllm(model, context)
    from opdctl.engines.host import HostedEngine

    can_sleep = context.recipe.vllm.enable_sleep_mode
    return HostedEngine(_start_vllm, model, context, can_sleep=can_sleep, batches_across_parts=True)


@ENGINES.register("server")
def server(model: ModelDir, context: EngineContext) -> Engine:
    """A vLLM server on any host; the model's `server` is its address."""
    from opdctl.engines.server import ServerEngine

    return ServerEngine(model, context)


def _start_transformers(model: ModelDir, context: EngineContext) -> Engine:
    from opdctl.engines.transformers import TransformersEngine

    return TransformersEngine(model, context.device)


def _start_vllm(model: ModelDir, context: EngineContext) -> Engine:
    from opdctl.engines.vllm import VllmEngine

    return VllmEngine(model, context)
