"""The faulty answers that degrade students."""

import random

import pytest
from students import EARLY, LATE, Faults

from opdctl.data.toy import sort12

WORD = "lkjihgfedcba"


@pytest.mark.parametrize("terse", [False, True])
@pytest.mark.parametrize(("passes", "first", "last"), [(EARLY, 0.0, 0.34), (LATE, 0.66, 0.83)])
def test_faults_begin_in_their_passes(passes: range, first: float, last: float, terse: bool) -> None:
    rng = random.Random(0)
    solution = sort12.solve(WORD)
    onsets = []
    for _ in range(50):
        faulty = Faults(passes, 1.0, terse)(WORD, rng)
        onsets += [i for i, (a, b) in enumerate(zip(solution, faulty, strict=False)) if a != b][:1]
    assert onsets
    assert all(first <= onset / len(solution) < last for onset in onsets)
    assert Faults(passes, 0.0, terse)(WORD, rng) == solution
