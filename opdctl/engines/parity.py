"""An engine's log-probs compared with the trainer's: of a few responses on request, of a student's probe always.

An engine with another precision, stale weights or another temperature returns plausible but wrong log-probs, which
enter the advantage A and the token weights. Between two correct engines only rounding differs: 1e-6 nats in float32,
0.03 to 0.04 nats RMS in bfloat16.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Logprobs, LossMask
from opdctl.engines.base import Engine, ScoreRequest
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, Probe
from opdctl.recipe.schema import Recipe, Score

MAX_PARITY_RESPONSES = 16
MAX_PARITY_TOKENS = 64  # of each response, if the engine has the GPU, for the reference then runs on the CPU


def measure_probe(engine: Engine, probe: Probe) -> tuple[float, float]:
    """Return by how many nats the log-probs of an engine and of the trainer differ: the RMS and the maximum."""
    ids = np.array(probe.ids, np.int32)
    (scores,) = engine.score([ScoreRequest(ids[:1], ids[1:])], Score(), lambda _: None)
    return _difference([scores.logprobs - np.array(probe.logprobs)])


def _difference(differences: Sequence[Logprobs]) -> tuple[float, float]:
    difference_N = np.concatenate(differences).astype(np.float64)
    return float(np.sqrt(np.mean(difference_N**2))), float(np.abs(difference_N).max())


def check_parity(
    recipe: Recipe,
    engine: str,
    model: ModelDir,
    requests: Sequence[ScoreRequest],
    engine_logprobs: Sequence[Logprobs],
    device: str,
    masks: Sequence[LossMask | None] = (),
) -> None:
    """Compare an engine's log-probs of the first responses with the trainer's, and print the RMS and maximum in nats.

    engine: its name, or `trainer`. masks: the loss masks of the responses, all None if empty. Skipped if
    `pipeline.max_logprob_rms` is 0, and for `trainer` and the transformers engine, which has the same forward pass.
    The reference is loaded into the CPU's memory: the engine has that of the GPU.

    Raises:
        OpdctlError: the RMS exceeds `pipeline.max_logprob_rms`.
    """
    bound = recipe.pipeline.max_logprob_rms
    if not bound or engine in ("transformers", "trainer"):
        return
    from opdctl.engines.transformers import TransformersEngine

    end = None if device == "cpu" else MAX_PARITY_TOKENS
    compared = [replace(each, response_ids=each.response_ids[:end]) for each in requests[:MAX_PARITY_RESPONSES]]
    reference = TransformersEngine(model, "cpu")
    reference_scores = reference.score(compared, Score(), lambda _: None)
    reference.close()
    pairs = zip(engine_logprobs[:MAX_PARITY_RESPONSES], reference_scores, strict=True)
    differences = [logp_T[:end] - scores.logprobs for logp_T, scores in pairs]
    for index, mask_T in enumerate(masks[: len(differences)]):
        if mask_T is not None:
            differences[index] = differences[index][mask_T[:end]]
    rms, maximum = _difference(differences)
    num_tokens = sum(map(len, differences))
    console.info(
        f"parity of `{engine}` with transformers on {num_tokens} tokens: RMS {rms:.2g}, max {maximum:.2g} nats"
    )
    if not rms <= bound:  # not `>`, so that NaN fails too
        raise OpdctlError(
            "logprob_mismatch",
            f"engine `{engine}`: its log-probs of {model.path} differ from the trainer's by {rms:.3g} nats RMS; "
            f"pipeline.max_logprob_rms is {bound:g}",
            hint="use the same dtype in both, or another engine; raise the bound only if you know the cause",
        )
