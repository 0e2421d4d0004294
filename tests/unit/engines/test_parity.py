"""The parity check beside an engine that has the GPU's memory; what it refuses is in integration/test_parity.py."""

import numpy as np
import pytest
from helpers.commands import small_recipe
from helpers.engines import directory, requests

from opdctl import console
from opdctl.engines import transformers
from opdctl.engines.base import ScoreRequest
from opdctl.engines.parity import check_parity
from opdctl.engines.transformers import TransformersEngine
from opdctl.recipe.schema import Score


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 16 * 100), ("cuda", 16 * 64)])
def test_reference_runs_on_the_cpu_over_the_first_tokens(device, tokens, monkeypatch):
    devices, messages = [], []

    class Reference(TransformersEngine):
        def __init__(self, model, device):
            devices.append(device)
            super().__init__(model, device)

    model = directory("toy:student")
    rng = np.random.default_rng(0)
    scored = [ScoreRequest(each.prompt_ids, rng.integers(2, 56, 100, np.int32)) for each in requests(20)]
    logprobs = [each.logprobs for each in TransformersEngine(model, "cpu").score(scored, Score(), lambda n: None)]
    monkeypatch.setattr(transformers, "TransformersEngine", Reference)
    monkeypatch.setattr(console, "info", messages.append)
    recipe = small_recipe("pipeline.max_logprob_rms=0.001")
    check_parity(recipe, "vllm", model, scored, logprobs, device)
    assert devices == ["cpu"]
    assert f"on {tokens} tokens" in messages[0]
