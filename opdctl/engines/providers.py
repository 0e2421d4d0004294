"""TODO."""

from opdctl.engines.base import Engine, EngineContext
from opdctl.models.directory import ModelDir
from opdctl.registry import ENGINES


@ENGINES.register("transformers")
def transformers(model: ModelDir, place: EngineContext) -> Engine:
    """The models' own library: no extra installation, any device."""
    from opdctl.engines.transformers import TransformersEngine

    return TransformersEngine(model, place.device)


@ENGINES.register("vllm")
def vllm(model: ModelDir, place: EngineContext) -> Engine:
    """vLLM in this process, for large models and long responses."""
    from opdctl.engines.vllm import VllmEngine

    return VllmEngine(model, place)


@ENGINES.register("server")
def server(model: ModelDir, place: EngineContext) -> Engine:
    """A vLLM server that runs elsewhere; the model's `server` is its address."""
    from opdctl.engines.server import ServerEngine

    return ServerEngine(model, place)
