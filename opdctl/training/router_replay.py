"""The stored experts of a micro-batch's tokens, laid out as the trainer's model reads the tokens.

Shape suffixes: see Notation in CONTRIBUTING.md. N are all places of a batch, padding included; L, K as in
`models/routing.py`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from opdctl.artifacts.records import Response, ScoredResponse
from opdctl.errors import OpdctlError
from opdctl.models.batching import SequenceBatch
from opdctl.models.routing import NOT_GIVEN, Routers, decode_experts


def given_experts(samples: Sequence[ScoredResponse], batch: SequenceBatch, routers: Routers) -> Tensor:
    """Return the experts that the rollout's engine chose, [N, L, K], and `NOT_GIVEN` for padding and last tokens.

    A last token predicts none, so what its experts are has no effect.

    Raises:
        OpdctlError: a response has none, or not those of the student.
    """
    experts_NLK: Tensor | None = None
    for response, place in _places(samples, batch):
        count = len(response.prompt_ids) + len(response.response_ids) - 1
        try:
            if response.routed_experts is None:
                raise ValueError("no experts are stored")
            ids = decode_experts(response.routed_experts, routers, count)
        except ValueError as error:
            why = f"{response.sample_id}: routed_experts: {error}"
            raise OpdctlError(
                "invalid_data", why, hint="set train.router_replay = false, or sample the step again"
            ) from error
        if experts_NLK is None:
            shape = (batch.input_ids_BT.numel(), *ids.shape[1:])
            experts_NLK = torch.full(shape, NOT_GIVEN, dtype=torch.int16)
        experts_NLK[place : place + count] = torch.from_numpy(ids)
    assert experts_NLK is not None  # a batch has a response
    return experts_NLK.to(batch.input_ids_BT.device)


def token_places(samples: Sequence[ScoredResponse], batch: SequenceBatch) -> Tensor:
    """Return which places have a token, [N]."""
    is_token_N = torch.zeros(batch.input_ids_BT.numel(), dtype=torch.bool)
    for response, place in _places(samples, batch):
        is_token_N[place : place + len(response.prompt_ids) + len(response.response_ids)] = True
    return is_token_N.to(batch.input_ids_BT.device)


def _places(samples: Sequence[ScoredResponse], batch: SequenceBatch) -> Iterator[tuple[Response, int]]:
    """Yield each response with the place of the first token of its prompt."""
    width = batch.input_ids_BT.shape[1]
    sizes = [len(sample.response.prompt_ids) + len(sample.response.response_ids) for sample in samples]
    starts = width * np.arange(len(samples)) if batch.packed is None else np.cumsum([0, *sizes[:-1]])
    for sample, start in zip(samples, starts.tolist(), strict=True):
        yield sample.response, start
