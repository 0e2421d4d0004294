"""The factories of the engines that come with opdctl. Each imports its backend only when it is called."""

from opdctl.engines.base import Engine, EngineContext
from opdctl.models.directory import ModelDir
from opdctl.registry import ENGINES


@ENGINES.register("transformers")
def transformers(model: ModelDir, context: EngineContext) -> Engine:
    """Hugging Face transformers in this process: no extra installation, any device."""
    from opdctl.engines.transformers import TransformersEngine

    return TransformersEngine(model, context.device)


@ENGINES.register("vllm")
def vllm(model: ModelDir, context: EngineContext) -> Engine:
    """vLLM in this process, for large models and long responses."""
    from opdctl.engines.vllm import VllmEngine

    return VllmEngine(model, context)


@ENGINES.register("server")
def server(model: ModelDir, context: EngineContext) -> Engine:
    """A vLLM server on any host; the model's `server` is its address."""
    from opdctl.engines.server import ServerEngine

    return ServerEngine(model, context)
