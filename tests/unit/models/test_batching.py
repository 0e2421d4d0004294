"""Batches by a token budget."""

import numpy as np

from opdctl.models.batching import by_token_budget


def test_batches_respect_the_budget_and_partition_the_sequences():
    lengths = [5, 100, 7, 7, 30, 1, 64]
    batches = by_token_budget(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 64


def test_padding_of_long_tailed_lengths_is_below_5_percent():
    lengths = np.random.default_rng(0).lognormal(7, 0.8, 1024).astype(int).clip(16, 16384).tolist()
    batches = by_token_budget(lengths, 16384)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(1024))
    assert sum(lengths) / padded > 0.95
