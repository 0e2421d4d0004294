"""The division of a step among micro-batches and ranks: every response once, and similar costs in each round."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opdctl.training.division import Division, divide


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    num_groups=st.integers(1, 3),
    budget=st.integers(1, 80),
    world_size=st.integers(1, 5),
    packs=st.booleans(),
    span=st.sampled_from([math.inf, 10.0]),
)
def test_every_response_is_in_one_micro_batch(lengths, num_groups, budget, world_size, packs, span):
    groups = [list(range(start, len(lengths), num_groups)) for start in range(num_groups)]
    by_rank = divide(groups, lengths, budget, Division(world_size, packs, span))
    assert len({len(of_rank) for of_rank in by_rank}) == 1
    shares = [share for of_rank in by_rank for share in of_rank]
    counted = [i for share in shares if not share.is_filler for i in share.indices]
    assert sorted(counted) == list(range(len(lengths)))
    for share in shares:
        own = [lengths[i] for i in share.indices]
        assert len({i % num_groups for i in share.indices}) == 1
        assert own
        assert len(own) == 1 or (sum(own) if packs else max(own) * len(own)) <= budget
    if len(lengths) >= world_size * len(groups) + len(shares):
        assert not any(share.is_filler for share in shares)


def test_by_hand():
    """8 + 1 and 5 + 4 fill the budgets of two ranks. With another 9 there are two rounds: 9 and 8, then 4 + 1 and 5."""
    (first,), (second,) = divide([[0, 1, 2, 3]], [8, 5, 4, 1], 9, Division(2, True))
    assert [sorted(first.indices), sorted(second.indices)] == [[0, 3], [1, 2]]
    by_rank = divide([[0, 1, 2, 3, 4]], [8, 5, 4, 1, 9], 9, Division(2, True))
    assert [[sorted(share.indices) for share in of_rank] for of_rank in by_rank] == [[[4], [2, 3]], [[0], [1]]]


def test_fewer_responses_than_ranks_leave_fillers():
    by_rank = divide([[0, 1, 2]], [9, 5, 4], 100, Division(4, True))
    assert [len(of_rank) for of_rank in by_rank] == [1] * 4
    assert [of_rank[0].is_filler for of_rank in by_rank] == [False, False, False, True]


@pytest.mark.parametrize(("packs", "bound"), [(True, 1.05), (False, 1.15)])
def test_ranks_wait_little(packs, bound):
    """1,024 responses with a long tail on 32 ranks: the most costly micro-batch of a round, relative to their mean."""
    lengths = np.random.default_rng(0).lognormal(8, 0.8, 1024).astype(int).clip(100, 16384).tolist()
    division = Division(32, packs, attention_span=24000)
    by_rank = divide([list(range(1024))], lengths, 18432, division)
    cost = np.array([[division.batch_cost([lengths[i] for i in s.indices]) for s in of_rank] for of_rank in by_rank])
    assert cost.max(0).sum() / cost.mean(0).sum() < bound
    assert cost.sum(1).max() / cost.sum(1).mean() < bound
