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
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from opdctl import console
from opdctl.artifacts.records import Ids
from opdctl.errors import OpdctlError, is_out_of_memory, summarize_exception
from opdctl.models.architectures import rope_limit
from opdctl.models.batching import SequenceBatch, pack_batch, pad_batch
from opdctl.models.decoding import BatchRules, DecodeBatch
from opdctl.models.directory import LOGPROB_TOLERANCE
from opdctl.models.inspection import captured_report
from opdctl.models.logprobs import output_head, response_states
from opdctl.models.packing import PACKED_SDPA

MAX_IDS = 4096
"""How many ids of the vocabulary are compared. All would cost as much time as the model."""
PROMPT = 5
"""Tokens of the compared sequence that are its prompt in decoding: more than a convolution spans, mostly four."""
FED, FED_BY_LARGE_MODELS = 16, 2
"""Tokens that are decoded after it. A large model, on a CPU, reads all of its weights for each."""
SMALL_MODEL_PARAMETERS = 50_000_000
SLOW_KERNEL = "is falling back to its reference PyTorch implementation"
"""Part of what transformers logs for a kernel of linear attention or a convolution whose package is not installed."""
MAX_LEAK = 0.01
"""Change by another sequence that rounding explains, as a fraction of the difference that it explains otherwise: the
products have the same shapes."""


def tolerance(model: PreTrainedModel) -> float:
    """Return the difference in nats up to which a model is accepted. Quantized weights round activations, too."""
    dtype = torch.bfloat16 if getattr(model, "is_quantized", False) else model.dtype
    return LOGPROB_TOLERANCE[str(dtype).removeprefix("torch.")]


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device on which a model computes. Its parameters may be kept elsewhere, sharded by FSDP2."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


@torch.no_grad()
def scoring_difference(model: PreTrainedModel) -> float:
    """Return by how many nats the log-probs of scoring and training differ from those of a plain forward pass.

    The batch has the sequence itself, padded, and with other tokens after it.
    """
    ids = probe_ids(model)
    short, long = ids[:-2], ids
    plain_TV = _plain_logp(model, short)
    padded = pad_batch([(long[:1], long[1:]), (short[:1], short[1:])], input_device(model))
    hidden_ND, _ = response_states(model, padded.input_ids_BT, padded.rows_N, padded.positions_N)
    logits_NV = output_head(model, plain_TV.shape[-1]).logits(hidden_ND)
    rows = (logits_NV[: len(short) - 1], logits_NV[len(long) - 1 :])
    return float(np.max([_difference(plain_TV[:-1], logits_TV) for logits_TV in rows]))  # NaN is the maximum


def check_scoring(model: PreTrainedModel, path: Path, allowed: float | None = None) -> None:
    """Check that hidden states of a padded batch give the log-probs of a plain forward pass.

    allowed: the difference in nats up to which they are equal (default: by the dtype of the weights).

    Raises:
        OpdctlError: they do not, or transformers fails.
    """
    with _name_failures(path), captured_report() as messages:
        difference = scoring_difference(model)
    for message in messages:
        if SLOW_KERNEL not in message or torch.cuda.is_available():
            console.warn_once(f"{path}: {message}")
    if not difference <= (tolerance(model) if allowed is None else allowed):  # not `>`, so that NaN fails too
        raise OpdctlError(
            "unsupported_model",
            f"{path}: its log-probs in a batch, from hidden states, differ by {difference:.2g} nats from those of one "
            "forward pass over one sequence",
            hint="use a causal language model that applies no more than a bias, a scale and a soft cap to its logits",
        )


@torch.no_grad()
def enable_packing(model: PreTrainedModel, bound: float) -> str | None:
    """Let a model accept packed sequences if they stay separate. Return None, or why they do not.

    Each must have the log-probs that it has in a padded batch, within `bound` nats. Other tokens in one of them must
    not change those of the others, as they do through the states of convolutions and linear attention.
    """
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return "its attention is not `sdpa` of transformers"
    ids = probe_ids(model)
    sequences = [(row[:1], row[1:]) for row in (ids, ids[::-1], ids[:-2])]
    changed = [sequences[0], (ids[1:2], ids[:-1]), sequences[2]]
    padded = _sequence_logp(model, pad_batch(sequences, input_device(model)))
    config._attn_implementation = PACKED_SDPA
    try:
        packed, others = (_sequence_logp(model, pack_batch(each, input_device(model))) for each in (sequences, changed))
        difference = max(map(_difference, padded, packed))
        leak = max(_difference(packed[i], others[i]) for i in (0, 2))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        obstacle = summarize_exception(error)
    else:
        if difference <= bound and leak <= MAX_LEAK * bound:  # not `>`, so that NaN is an obstacle too
            return None
        obstacle = f"its log-probs change by {np.max([difference, leak]):.2g} nats"
    config._attn_implementation = "sdpa"
    return obstacle


def _sequence_logp(model: PreTrainedModel, batch: SequenceBatch) -> list[Tensor]:
    """Return the log-probs at the positions before each response token, one [T, V] for each sequence."""
    hidden_ND, _ = response_states(model, batch.input_ids_BT, batch.rows_N, batch.positions_N, batch.packed)
    return list(batch.split(output_head(model, MAX_IDS).logits(hidden_ND).log_softmax(-1)))


def find_batch_rules(model: PreTrainedModel, path: Path) -> BatchRules:
    """Return the fastest rules under which decoding gives the log-probs of a plain forward pass, and log what is slow.

    Raises:
        OpdctlError: there are none, or transformers fails.
    """
    bound = tolerance(model)
    # A cache is worth the rounding of bfloat16, but in float32 a difference of this size is an error.
    cache_bound = bound / 5 if bound == LOGPROB_TOLERANCE["float32"] else bound
    candidates = {
        BatchRules(): bound / 5,
        BatchRules(left_padding=False): cache_bound,
        BatchRules(left_padding=False, use_cache=False): bound,
    }
    failure: OpdctlError | None = None
    for rules, allowed in candidates.items():
        try:
            with _name_failures(path):
                difference, can_drop, has_cache = _decode(model, rules)
        except OpdctlError as error:
            failure = error  # such as that of a model that accepts no attention mask
        else:
            if difference <= allowed:
                break
    else:
        if failure:
            raise failure
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

    Return the largest difference while both are in the batch, whether it remains small after the other one has left,
    and whether there is a cache.
    """
    ids = probe_ids(model)
    short, other = ids[:-2], ids[::-1] if rules.left_padding else ids[::-1][:PROMPT]
    plain_TV, head = _plain_logp(model, short), output_head(model, MAX_IDS)
    token_T1 = torch.from_numpy(short.astype(np.int64)).to(model.device)[:, None]
    batch = DecodeBatch(model, [other, short[:PROMPT]], rules, model.device)
    if rules.left_padding and not batch.has_plain_cache:
        return math.inf, False, batch.has_cache

    def difference(t: int) -> float:
        return _difference(plain_TV[[t]], head.logits(batch.hidden_BD[-1:]))

    middle = (PROMPT + len(short) + 1) // 2
    together, alone = [difference(PROMPT - 1)], []
    for t in range(PROMPT, middle):
        batch.feed(token_T1[t].expand(2))
        together.append(difference(t))
    can_drop = batch.can_select(torch.tensor([1], device=model.device))
    for t in range(middle, len(short)) if can_drop else ():
        batch.feed(token_T1[t])
        alone.append(difference(t))
    can_drop = can_drop and all(each <= tolerance(model) / 5 for each in alone)
    return float(np.max(together)), can_drop, batch.has_cache


def probe_ids(model: PreTrainedModel) -> Ids:
    """Return ids of the vocabulary, without its first and last ones, which are often special tokens or padding.

    All but the last two are the compared sequence.
    """
    is_fast = input_device(model).type != "cpu" or sum(p.numel() for p in model.parameters()) <= SMALL_MODEL_PARAMETERS
    config = model.config.get_text_config(decoder=True)
    count = PROMPT + (FED if is_fast else FED_BY_LARGE_MODELS) + 2
    count = min(count, getattr(config, "max_position_embeddings", None) or count, rope_limit(config) or count)
    return (np.arange(1, count + 1) * config.vocab_size // (count + 1)).astype(np.int32)


def _plain_logp(model: PreTrainedModel, ids: Ids) -> Tensor:
    """Return the log-probs of a plain forward pass over one sequence, [T, V]."""
    ids_1T = torch.from_numpy(ids.astype(np.int64))[None].to(input_device(model))
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
