"""The metrics of a training step: sums over chunks, statistics of the responses, peak memory.

Shape suffixes: see Notation in CONTRIBUTING.md. docs/metrics.md defines each metric.
"""

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import ScoredResponse
from opdctl.losses.objectives import MAX_LOG_RATIO
from opdctl.losses.token_weights import top_k_overlap
from opdctl.runs.scored_responses import to_weight_inputs

ROLLOUT_CORRECTION_SQUARED = "rollout_correction_squared"
QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class MetricSums:
    """Accumulator over the chunks of a micro-batch.

    sums: of each metric over the tokens. logps: the student's log-probs of the sampled tokens, one tensor per chunk.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    logps: list[Tensor] = field(default_factory=list)

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        for name, value_C in metrics.items():
            total = value_C.detach().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total


def response_stats(scored: Sequence[ScoredResponse]) -> dict[str, float]:
    """Return statistics of all responses of a step. The quantiles of |A|, in nats, are of the stored log-probs."""
    responses = [sample.response for sample in scored]
    lengths = [len(response.own_ids) for response in responses]
    stats = {
        "responses": len(responses),
        "tokens": sum(lengths),
        "response_length": sum(lengths) / max(len(responses), 1),
        "truncated_fraction": sum(r.finish_reason == "length" for r in responses) / max(len(responses), 1),
    }
    for name in ("turns", "tool_seconds", "reward"):
        values = [value for response in responses if (value := getattr(response, name)) is not None]
        if values:
            stats[name] = sum(values) / len(values)
    if sum(lengths):
        abs_advantages = [np.abs(sample.teacher.logprobs - sample.response.logprobs) for sample in scored]
        quantiles = np.quantile(np.concatenate(abs_advantages), QUANTILES)
        stats |= {f"abs_advantage_p{q * 100:.0f}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}
        if all(sample.response.top_ids is not None and sample.teacher.top_ids is not None for sample in scored):
            overlaps = [top_k_overlap(to_weight_inputs(sample, step=0)) for sample in scored]
            stats["top_k_overlap"] = float(np.concatenate(overlaps).mean())
    return stats


def peak_memory_gib(device: str) -> float:
    """Return the peak memory of this process in GiB: GPU memory, or on a CPU the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mismatch_metrics(log_ratio_C: Tensor) -> dict[str, Tensor]:
    """Return metrics of the mismatch between trainer and rollout engine, [C] each.

    log_ratio_C: log p_trainer - log p_engine of the sampled tokens. The ratio is 1 on average without a mismatch. The
    KL is KL(engine || trainer) by the k3 estimator, http://joschu.net/blog/kl-approx.html.
    """
    log_ratio_C = log_ratio_C.clamp(max=MAX_LOG_RATIO)
    return {"mismatch_ratio": log_ratio_C.exp(), "mismatch_kl": log_ratio_C.expm1() - log_ratio_C}
