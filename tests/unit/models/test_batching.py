"""Batches by a token budget."""

from opdctl.models.batching import by_token_budget


def test_batches_respect_the_budget_and_partition_the_sequences():
    lengths = [5, 100, 7, 7, 30, 1, 64]
    batches = by_token_budget(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 64
