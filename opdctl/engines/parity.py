"""The parity gate: an engine's log-probs against those of the trainer's own forward pass, on a few responses.

An engine in another precision, with stale weights or another temperature gives numbers that look right; they enter A
and the weights. What is left between two sound engines is rounding: 1e-6 nats in float32, 0.03 to 0.04 RMS in bfloat16.
"""

from collections.abc import Sequence

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Logprobs
from opdctl.engines.base import ScoreRequest
from opdctl.environment import resolve_device
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe, Score

RESPONSES = 16


def check_parity(
    recipe: Recipe, engine: str, model: ModelDir, answered: Sequence[ScoreRequest], found: Sequence[Logprobs]
) -> None:
    """Compare an engine's log-probs of the first responses with the trainer's; say RMS and greatest difference in nats.

    Does nothing when `pipeline.max_logprob_rms` is 0, or for the transformers engine, which is the trainer's own forward
    pass. Raises OpdctlError (code 3) when the RMS is above that bound.
    """
    bound = recipe.pipeline.max_logprob_rms
    if not bound or engine == "transformers":
        return
    from opdctl.engines.transformers import TransformersEngine

    own = TransformersEngine(model, resolve_device(recipe.pipeline.device))
    wanted = own.score(answered[:RESPONSES], Score(), lambda _: None)
    own.close()
    pairs = zip(wanted, found[:RESPONSES], strict=True)
    difference_N = np.concatenate([theirs - ours.logprobs for ours, theirs in pairs]).astype(np.float64)
    rms, greatest = float(np.sqrt(np.mean(difference_N**2))), float(np.abs(difference_N).max())
    console.info(
        f"parity of `{engine}` with transformers on {len(difference_N)} tokens: RMS {rms:.2g}, max {greatest:.2g} nats"
    )
    if not rms <= bound:  # NaN is not below anything
        raise OpdctlError(
            f"engine `{engine}`: its log-probs of {model.path} are {rms:.3g} nats RMS from the trainer's, "
            f"pipeline.max_logprob_rms is {bound:g}",
            hint="use the same dtype in both, or another engine; raise the bound only if you know where it comes from",
            code=ExitCode.BAD_DATA,
        )
