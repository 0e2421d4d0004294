"""What the study measures of responses, calculated by hand."""

import numpy as np
import pytest
from training import prefix_signal

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores


def test_prefix_signal() -> None:
    ids, zeros = np.arange(4, dtype=np.int32), np.zeros(4, np.float32)
    response = Response(
        response_ids=ids,
        logprobs=zeros,
        finish_reason="stop",
        sample_id="a/0/0",
        prompt_id="a",
        prompt_ids=ids,
        policy_version=0,
        source="test",
        teacher="teacher",
        answer=None,
    )
    scored = ScoredResponse(response, TokenScores(np.array([-1, 2, -4, 1], np.float32)))
    assert prefix_signal([scored]) == pytest.approx(3 / 8)  # the first two of four tokens: 30 %, rounded up
