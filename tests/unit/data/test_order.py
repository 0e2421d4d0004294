"""The order of prompts: torch's sampler, and that of earlier runs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, RandomSampler

from opdctl.data.order import epoch_order, step_order


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


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=4), st.integers(0, 2**32))
def test_each_source_has_its_own_epochs(sizes: list[tuple[int, int]], seed: int) -> None:
    """(prompts of each step, prompts beyond one step) of each source."""
    sources = [(per_step + more, per_step) for per_step, more in sizes]
    first = 0
    steps = [step_order("random_sampler", sources, seed, step) for step in range(12)]
    for rows, per_step in sources:
        own = [[i - first for i in order if first <= i < first + rows] for order in steps]
        length = rows // per_step
        for step, chosen in enumerate(own):
            epoch, index = divmod(step, length)
            expected = epoch_order("random_sampler", rows, seed, epoch)[index * per_step : (index + 1) * per_step]
            assert chosen == [*expected]
        first += rows


def test_sources_alternate_within_a_step() -> None:
    order = step_order("random_sampler", [(100, 6), (100, 2), (100, 1)], 0, 3)
    assert [i // 100 for i in order] == [0, 0, 1, 0, 2, 0, 0, 1, 0]
