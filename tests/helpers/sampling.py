"""The distribution that an engine samples, in float64, token by token, as vLLM defines it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from opdctl.artifacts.records import Completion
from opdctl.engines.base import Request
from opdctl.recipe.schema import Sampling

FloatArray = npt.NDArray[np.float64]


def sampled_distribution(
    logits: Sequence[float], prompt: Sequence[int], response: Sequence[int], s: Sampling
) -> FloatArray:
    """Return the probability of each next token."""
    logits = [float(value) for value in logits]
    for token in range(len(logits)):
        if token in prompt or token in response:
            logits[token] *= s.repetition_penalty if logits[token] <= 0 else 1 / s.repetition_penalty
        logits[token] -= s.frequency_penalty * response.count(token)
        logits[token] -= s.presence_penalty if token in response else 0
    p = np.exp((np.array(logits) - max(logits)) / s.temperature)
    p[p / p.sum() < s.min_p * p.max() / p.sum()] = 0
    if s.top_k:
        p[p < np.sort(p)[-min(s.top_k, len(p))]] = 0
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]  # the mass of more probable tokens
    p[order[before >= s.top_p]] = 0
    return p / p.sum()


def logprobs_of(model: Any, request: Request, done: Completion, s: Sampling) -> tuple[FloatArray, FloatArray]:
    """Return the log-probs of a response's tokens under the model's own distribution and under the sampled one, [T]."""
    prompt, response = request.prompt_ids.tolist(), done.response_ids.tolist()
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    own, sampled = [], []
    for t, token in enumerate(response):
        own.append(float(logits_TV[t].log_softmax(-1)[token]))
        sampled.append(float(np.log(sampled_distribution(logits_TV[t].tolist(), prompt, response[:t], s)[token])))
    return np.array(own), np.array(sampled)
