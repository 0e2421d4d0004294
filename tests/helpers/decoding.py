"""Decoding of random sequences, and an emulation of CUDA graphs."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import numpy as np
import torch
from helpers.architectures import make
from torch import Tensor

from opdctl.models import cuda_graphs
from opdctl.models.decoding import BatchRules, DecodeBatch
from opdctl.models.tracing import Pass, run_recorded

PLAIN_CACHES = ("qwen3", "llama", "gemma", "granite", "olmo2", "olmoe")
"""Architectures whose passes are recorded."""
OTHER_CACHES = ("cohere2", "bamba", "llama, rope dynamic")
"""A cache of a sliding window, one of states, and frequencies that depend on the length."""


def model_of(name):
    return make(name).eval().requires_grad_(False)


def decode(model, lengths, tokens, traced, drop_after=None, *, copy=True):
    """Return the last hidden states of each pass. drop_after: the pass after which only the last sequence is left."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 200, length).astype(np.int32) for length in lengths]
    with torch.inference_mode():
        batch, hidden = DecodeBatch(model, prompts, BatchRules(), "cpu", traced), []
        count = len(prompts)
        for t in range(tokens):
            batch.feed(torch.from_numpy(rng.integers(3, 200, len(prompts)))[-count:])
            hidden.append(batch.hidden_BD.clone() if copy else batch.hidden_BD)
            if t == drop_after:
                batch.select(torch.tensor([len(prompts) - 1]))
                count = 1
    return hidden


class EmulatedGraphs:
    """A replay computes with the captured tensors and writes to the captured result, as that of a CUDA graph does."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, function: Pass, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        result = run_recorded(function, tensors)

        def replay() -> Tensor:
            self.replays += 1
            return result.copy_(run_recorded(function, tensors))

        return replay


@contextlib.contextmanager
def emulated_graphs() -> Iterator[EmulatedGraphs]:
    """Capture passes on any device."""
    emulation = EmulatedGraphs()
    with (
        mock.patch.object(cuda_graphs, "are_available", return_value=True),
        mock.patch.object(cuda_graphs, "capture", emulation.capture),
    ):
        yield emulation
