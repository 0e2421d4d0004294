"""The parity check: an engine's log-probs compared with the trainer's forward pass, on a few responses.

An engine with another precision, stale weights or another temperature returns plausible but wrong log-probs, which
enter the advantage A and the token weights. Between two correct engines only rounding differs: 1e-6 nats in float32,
0.03 to 0.04 nats RMS in bfloat16.
"""

from collections.abc import Sequence

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Logprobs
from opdctl.engines.base import ScoreRequest
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe, Score

MAX_PARITY_RESPONSES = 16


def check_parity(
    recipe: Recipe,
    engine: str,
    model: ModelDir,
    requests: Sequence[ScoreRequest],
    engine_logprobs: Sequence[Logprobs],
    device: str,
) -> None:
    """Compare an engine's log-probs of the first responses with the trainer's, and print the RMS and maximum in nats.

    Skipped if `pipeline.max_logprob_rms` is 0, and for the transformers engine, which is the trainer's forward pass.

    Raises:
        OpdctlError: the RMS exceeds `pipeline.max_logprob_rms`.
    """
    bound = recipe.pipeline.max_logprob_rms
    if not bound or engine == "transformers":
        return
    from opdctl.engines.transformers import TransformersEngine

    reference = TransformersEngine(model, device)
    reference_scores = reference.score(requests[:MAX_PARITY_RESPONSES], Score(), lambda _: None)
    reference.close()
    pairs = zip(engine_logprobs[:MAX_PARITY_RESPONSES], reference_scores, strict=True)
    difference_N = np.concatenate([logp_T - scores.logprobs for logp_T, scores in pairs]).astype(np.float64)
    rms, maximum = float(np.sqrt(np.mean(difference_N**2))), float(np.abs(difference_N).max())
    console.info(
        f"parity of `{engine}` with transformers on {len(difference_N)} tokens: RMS {rms:.2g}, max {maximum:.2g} nats"
    )
    if not rms <= bound:  # not `>`, so that NaN fails too
        raise OpdctlError(
            "logprob_mismatch",
            f"engine `{engine}`: its log-probs of {model.path} differ from the trainer's by {rms:.3g} nats RMS; "
            f"pipeline.max_logprob_rms is {bound:g}",
            hint="use the same dtype in both, or another engine; raise the bound only if you know the cause",
        )
