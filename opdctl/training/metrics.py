"""TODO."""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import ScoredResponse
from opdctl.losses.objectives import MAX_LOG_RATIO

ROLLOUT_CORRECTION_SQUARED = "rollout_correction_squared"
QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class MetricSums:
    """What chunk after chunk adds up to: the metrics' sums, and the student's log-probs of the sampled tokens."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    logps: list[Tensor] = field(default_factory=list)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value_C in metrics.items():
            total = value_C.detach().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total


def response_stats(scored: Sequence[ScoredResponse]) -> dict[str, float]:
    """Return what a step's responses are like, all ranks' together; A by the stored log-probs, in nats."""
    responses = [sample.response for sample in scored]
    lengths = [len(response.response_ids) for response in responses]
    gaps = [np.abs(sample.teacher.logprobs - sample.response.logprobs) for sample in scored]
    found = {
        "responses": len(responses),
        "tokens": sum(lengths),
        "response_length": sum(lengths) / max(len(responses), 1),
        "truncated_fraction": sum(r.finish_reason == "length" for r in responses) / max(len(responses), 1),
    }
    if found["tokens"]:
        quantiles = np.quantile(np.concatenate(gaps), QUANTILES)
        found |= {f"abs_advantage_p{q * 100:.0f}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
    return found


def peak_memory_gib(device: str) -> float:
    """Return the most memory that this process has held so far, in GiB: the GPU's, or its resident set on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mismatch_metrics(difference_C: Tensor) -> dict[str, Tensor]:
    """Return what tells trainer and rollout engine apart, from log p_trainer - log p_engine of the sampled tokens: the
    ratio, 1 in the mean, and KL(engine || trainer) by the k3 estimator."""
    difference_C = difference_C.clamp(max=MAX_LOG_RATIO)
    return {"mismatch_ratio": difference_C.exp(), "mismatch_kl": difference_C.expm1() - difference_C}
