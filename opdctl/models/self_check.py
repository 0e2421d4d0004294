"""The self-check of a loaded model: batches must give the log-probs of one forward pass over one sequence.

A difference is in nats: the RMS over tokens sampled from the plain pass, at the position where it is largest. The
log-probs of improbable tokens, of which this measure has few, differ most by rounding.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from opdctl import console
from opdctl.artifacts.records import Ids
from opdctl.errors import OpdctlError, is_out_of_memory, summarize_exception
from opdctl.models.batching import pad_batch
from opdctl.models.decoding import BatchRules, DecodeBatch
from opdctl.models.logprobs import output_head, response_states

LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""Differences in nats that rounding explains, by the dtype in which a model is run."""
SHORT, LONG = 7, 9
"""Tokens of the sequence that is compared, and of the other one in its batch."""
MAX_IDS = 4096
"""How many ids of the vocabulary are compared. All would cost as much time as the model."""
PROMPT = 5
"""Tokens of the compared sequence that are its prompt in decoding: more than a convolution spans, mostly four."""


def tolerance(model: PreTrainedModel) -> float:
    """Return the difference in nats up to which a model is accepted. Quantized weights round activations, too."""
    return LOGPROB_TOLERANCE[torch.bfloat16 if getattr(model, "is_quantized", False) else model.dtype]


def _bound_of_options(model: PreTrainedModel) -> float:
    """Return the difference in nats up to which a batch is padded and rows leave it: both only save time."""
    return tolerance(model) / 5


@torch.no_grad()
def scoring_difference(model: PreTrainedModel) -> float:
    """Return by how many nats the log-probs of scoring and training differ from those of a plain forward pass.

    The batch has the sequence itself, padded, and with other tokens after it.
    """
    ids = _token_ids(model)
    plain_TV = _plain_logp(model, ids[:SHORT])
    padded = pad_batch([(ids[:1], ids[1:]), (ids[:1], ids[1:SHORT])], model.device)
    hidden_ND, _ = response_states(model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
    logits_NV = output_head(model, plain_TV.shape[-1]).logits(hidden_ND)
    rows = (logits_NV[: SHORT - 1], logits_NV[LONG - 1 :])
    return max(_difference(plain_TV[:-1], logits_TV) for logits_TV in rows)


def check_scoring(model: PreTrainedModel, path: Path) -> None:
    """Check that hidden states of a padded batch give the log-probs of a plain forward pass.

    Raises:
        OpdctlError: they do not, or transformers fails.
    """
    with _name_failures(path):
        difference = scoring_difference(model)
    if not difference <= tolerance(model):  # not `>`, so that NaN fails too
        raise OpdctlError(
            "unsupported_model",
            f"{path}: its log-probs in a batch, from hidden states, differ by {difference:.2g} nats from those of one "
            "forward pass over one sequence",
            hint="use a causal language model that applies no more than a bias, a scale and a soft cap to its logits",
        )


def find_batch_rules(model: PreTrainedModel, path: Path) -> BatchRules:
    """Return the fastest rules under which decoding gives the log-probs of a plain forward pass, and log what is slow.

    Raises:
        OpdctlError: there are none, or transformers fails.
    """
    for rules in (BatchRules(), BatchRules(left_padding=False), BatchRules(left_padding=False, use_cache=False)):
        with _name_failures(path):
            difference, can_drop, has_cache = _decode(model, rules)
        if difference <= (_bound_of_options(model) if rules.left_padding else tolerance(model)):
            break
    else:
        raise OpdctlError(
            "unsupported_model",
            f"{path}: its log-probs, token by token, differ by {difference:.2g} nats from those of one forward pass "
            "over the sequence",
            hint="use a causal language model",
        )
    if not rules.left_padding:
        console.info(f"{path}: left padding changes its log-probs, so a batch has prompts of one length")
    if not can_drop:
        console.info(f"{path}: its cache cannot drop rows, so finished responses stay in the batch")
    if not has_cache:
        console.info(f"{path}: decoding is without a cache, so each token costs a pass over the entire sequence")
    return dataclasses.replace(rules, drop_rows=can_drop)


@torch.no_grad()
def _decode(model: PreTrainedModel, rules: BatchRules) -> tuple[float, bool, bool]:
    """Decode a sequence next to another one, which then leaves the batch.

    Return the largest difference while both are in the batch, whether it is as small after the other one has left, and
    whether there was a cache.
    """
    ids = _token_ids(model)
    plain_TV, token_T = _plain_logp(model, ids[:SHORT]), torch.from_numpy(ids).to(model.device)
    other = ids[::-1] if rules.left_padding else ids[::-1][:PROMPT]
    head = output_head(model, plain_TV.shape[-1])
    batch = DecodeBatch(model, [other, ids[:PROMPT]], rules, model.device)
    if rules.left_padding and not batch.has_plain_cache:
        return math.inf, False, batch.has_cache
    differences = [_difference(plain_TV[[PROMPT - 1]], head.logits(batch.hidden_BD[1:]))]
    batch.feed(token_T[[PROMPT, PROMPT]])
    differences.append(_difference(plain_TV[[PROMPT]], head.logits(batch.hidden_BD[1:])))
    can_drop = batch.can_select(torch.tensor([1], device=model.device))
    if can_drop:
        batch.feed(token_T[[PROMPT + 1]])
        can_drop = _difference(plain_TV[[PROMPT + 1]], head.logits(batch.hidden_BD)) <= _bound_of_options(model)
    return max(differences), can_drop, batch.has_cache


def _token_ids(model: PreTrainedModel) -> Ids:
    """Return ids of the vocabulary, without its first and last ones, which are often special tokens or padding."""
    vocab_size = model.config.get_text_config().vocab_size
    return (np.arange(1, LONG + 1) * vocab_size // (LONG + 1)).astype(np.int32)


def _plain_logp(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Return the log-probs of a plain forward pass over one sequence, [T, V]."""
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0, :, :MAX_IDS].float().log_softmax(-1)


def _difference(plain_TV: Tensor, logits_TV: Tensor) -> float:
    """Return the RMS difference at the worst position between these log-probs and those of logits, in nats."""
    logp_TV = logits_TV.log_softmax(-1)
    p_TV = plain_TV.exp()
    squared_TV = torch.where(p_TV == 0, 0.0, p_TV * (plain_TV - logp_TV).square())
    return float(squared_TV.sum(-1).max().sqrt())


@contextlib.contextmanager
def _name_failures(path: Path) -> Iterator[None]:
    """Turn an error of transformers into one that names the model directory, unless memory is insufficient."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {summarize_exception(error)}"
        raise OpdctlError("unsupported_model", f"{path}: a forward pass of the model fails: {reason}") from error
