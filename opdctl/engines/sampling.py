"""The sampled token of the transformers engine: vLLM's distribution, and the inverse of its cumulative distribution.

The operations and their order are those of vLLM 0.32: penalties, temperature, min-p, top-k, top-p. Log-probs are those
of the result, renormalized.

Shape suffixes: see Notation in CONTRIBUTING.md. In `_inverse_cdf`, N blocks of b = BLOCK ids.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import Ids
from opdctl.recipe.schema import Sampling

BLOCK = 512  # ids per block of the two-level cumulative sum


def uniform_stream(seed: int, count: int) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) that depend on the response's seed only.

    They are float32, multiples of 2⁻²⁴: of several tokens whose probabilities sum to less, at most one can be sampled.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(count, dtype=np.float32)


class Penalties:
    """The tokens of a batch's prompts and responses, and the penalties of their logits.

    The repetition penalty concerns tokens of prompt and response; the other two concern tokens of the response.
    """

    def __init__(self, prompts: Sequence[Ids], vocab_size: int, sampling: Sampling, device: str):
        self._sampling = sampling
        if not sampling.has_penalties:
            return
        self._in_prompt_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, ids in enumerate(prompts):
            self._in_prompt_BV[row, torch.from_numpy(ids.astype(np.int64)).to(device)] = True
        self._counts_BV = torch.zeros(len(prompts), vocab_size, dtype=torch.int32, device=device)

    def add(self, rows_B: Tensor, token_B: Tensor) -> None:
        """Count one more token of the responses in `rows_B`."""
        if self._sampling.has_penalties:
            self._counts_BV[rows_B, token_B] += 1

    def apply(self, rows_B: Tensor, logits_BV: Tensor) -> Tensor:
        """Return the penalized logits of the next tokens of the responses in `rows_B`."""
        settings = self._sampling
        if not settings.has_penalties:
            return logits_BV
        counts_BV = self._counts_BV[rows_B]
        is_in_response_BV = counts_BV > 0
        if (factor := settings.repetition_penalty) != 1:
            repeated_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
            logits_BV = repeated_BV.where(self._in_prompt_BV[rows_B] | is_in_response_BV, logits_BV)
        return logits_BV - settings.frequency_penalty * counts_BV - settings.presence_penalty * is_in_response_BV


def sample(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Sample one token per row by the inverse CDF at `uniform_B`; return ids and their log-probs in nats, [B].

    logits_BV: after the penalties. The log-probs are those of the sampled distribution. At temperature 0 the most
    probable token has probability 1.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1), torch.zeros_like(uniform_B)
    p_BV = restrict(logits_BV, sampling).softmax(-1)  # in one pass; a log-sum-exp takes several
    token_B1 = _inverse_cdf(p_BV, uniform_B[:, None].double())
    return token_B1.squeeze(-1), p_BV.gather(-1, token_B1).log().squeeze(-1)


def restrict(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the logits at the temperature, with -inf for the tokens that min-p, top-k or top-p cut off.

    Of tokens with equal logits, top-k keeps all, and top-p those of lower ids.
    """
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.min_p > 0:
        least_B1 = logits_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        logits_BV = _top_p_filter(logits_BV, sampling.top_p)
    return logits_BV


def _top_p_filter(logits_BV: Tensor, top_p: float) -> Tensor:
    """Return the logits with -inf for all but the fewest most probable tokens whose probabilities sum to `top_p`."""
    sorted_BV, order_BV = logits_BV.sort(stable=True, dim=-1, descending=True)
    p_BV = sorted_BV.softmax(-1)
    sorted_BV = sorted_BV.masked_fill(p_BV.cumsum(-1) - p_BV >= top_p, -torch.inf)
    return torch.full_like(logits_BV, -torch.inf).scatter(-1, order_BV, sorted_BV)


def _inverse_cdf(p_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """Return the first id whose cumulative probability exceeds `uniform_B1`, [B, 1].

    It finds the block first, then the id within it. Sums are float64, those of a block float32: a float64 sum over a
    large vocabulary costs as much as the model.
    """
    # Targets are scaled by the sum, so that rounding can sample neither past the end nor a token of probability zero.
    if p_BV.shape[-1] <= BLOCK:
        return _find_in_block(p_BV, uniform_B1 * p_BV.sum(-1, keepdim=True).double())
    blocks_BNb = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends_BN = blocks_BNb.sum(-1).cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B1 * ends_BN[:, -1:]
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True).clamp(max=ends_BN.shape[-1] - 1)
    block_Bb = blocks_BNb.take_along_dim(block_B1[..., None], dim=1).squeeze(1)
    within_B1 = target_B1 - torch.where(block_B1 > 0, ends_BN.gather(-1, (block_B1 - 1).clamp(min=0)), 0.0)
    return block_B1 * BLOCK + _find_in_block(block_Bb, within_B1)


def _find_in_block(p_Bb: Tensor, target_B1: Tensor) -> Tensor:
    """Return the first place whose cumulative probability exceeds the target, at most the last possible one, [B, 1]."""
    place_B1 = torch.searchsorted(p_Bb.cumsum(-1, dtype=torch.float64), target_B1, right=True)
    return place_B1.minimum(p_Bb.shape[-1] - 1 - (p_Bb.flip(-1) > 0).int().argmax(-1, keepdim=True))
