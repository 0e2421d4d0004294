"""A plugin for tests of a cluster: an engine that ends its process when it gets a certain request.

The file `deadly` in the working directory has the seed of the request, and how often the engine dies of it.
"""

import json
import os
import signal
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from opdctl.engines.base import EngineContext, Request
from opdctl.engines.transformers import TransformersEngine
from opdctl.models.directory import ModelDir
from opdctl.registry import ENGINES

FILE = Path("deadly")


class DeadlyEngine(TransformersEngine):
    def stream_completions(self, requests: Iterable[Request | None], *args: Any, **options: Any) -> Generator[Any]:
        found = [request for request in requests if request is not None]
        seed, times = json.loads(FILE.read_text())
        if times and any(request.seed == seed for request in found):
            FILE.write_text(json.dumps([seed, times - 1]))
            os.kill(os.getpid(), signal.SIGKILL)
        yield from super().stream_completions(found, *args, **options)


@ENGINES.register("deadly")
def make_deadly_engine(model: ModelDir, context: EngineContext) -> DeadlyEngine:
    return DeadlyEngine(model, context.device)
