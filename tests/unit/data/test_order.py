"""The order of prompts: torch's sampler, and that of earlier runs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

from opdctl.data.order import epoch_order


def sampler_orders(size: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of each epoch of torch's sampler with one generator, as a data loader exhausts it."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    sampler = RandomSampler(range(size), generator=generator)
    while True:
        yield list(sampler)


@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**32 + 1])
@pytest.mark.parametrize("size", [1, 2, 64, 4096, 57046])
def test_order_of_every_epoch_is_that_of_torch(size: int, seed: int) -> None:
    for epoch, expected in zip(range(4), sampler_orders(size, seed), strict=False):
        assert list(epoch_order("random_sampler", size, seed, epoch)) == expected, epoch


def test_order_does_not_depend_on_the_dropped_batch() -> None:
    """A loader that drops the last incomplete batch exhausts the sampler all the same."""
    generator = torch.Generator()
    generator.manual_seed(42)
    batches = BatchSampler(RandomSampler(range(11), generator=generator), batch_size=4, drop_last=True)
    for epoch in range(3):
        order = epoch_order("random_sampler", 11, 42, epoch)
        assert [*batches] == [[*order[:4]], [*order[4:8]]]


def test_order_of_earlier_runs_starts_with_that_of_the_file() -> None:
    assert epoch_order("numpy", 5, 7, 0) == (0, 1, 2, 3, 4)
    expected = np.random.default_rng([7, 2]).permutation(5).tolist()
    assert list(epoch_order("numpy", 5, 7, 2)) == expected
    assert epoch_order("numpy", 5, 7, 1) != epoch_order("numpy", 5, 7, 2)
