"""A Ray cluster: workers that make the parts of stages with their own engines, and the ranks of training.

Ray starts processes on the nodes, restarts those that die, and grows and shrinks the cluster. The processes communicate
through the run directory, as those of any other launcher do: a worker acquires leases on parts, and writes them itself.
So artifacts do not depend on the launcher. `ray` is imported only when a function needs it.
"""

import contextlib
from collections.abc import Iterator

from opdctl import distributed
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.recipe.schema import Recipe
from opdctl.runs.run import Run


@contextlib.contextmanager
def open_engines(
    run: Run, device: str, recipe: Recipe | None = None, *, keep_idle: bool = True
) -> Iterator[EnginePool]:
    """Yield the engines of this process, or those of a cluster if the recipe has `pipeline.launcher = "ray"`.

    A rank of training has its own engines if they are colocated with the trainer. recipe: of the engines, by default
    the run's. keep_idle: keep the workers of a cluster when all parts are made or in work, for the next stage.

    Raises:
        OpdctlError: the cluster cannot be reached.
    """
    recipe, pipeline = recipe or run.recipe, run.recipe.pipeline
    if pipeline.launcher == "local" or (distributed.is_launched() and pipeline.placement == "colocated"):
        with open_engine_pool(recipe, device) as engines:
            yield engines
        return
    from opdctl.cluster.connection import connect
    from opdctl.cluster.remote_engines import RemoteEngines

    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(connect(pipeline))
        yield stack.enter_context(contextlib.closing(RemoteEngines(run, device, recipe, keep_idle)))
