"""A budget of thinking tokens: which responses are continued, after which tokens, and within which length."""

import numpy as np
import pytest
from helpers.engines import directory, requests
from helpers.thinking import END_OF_THINK, THINK, save_thinking_model

from opdctl.artifacts.records import Completion
from opdctl.engines.base import Request, ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import OpdctlError
from opdctl.evaluation.thinking import BudgetedCompletion, ThinkingBudget
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Eval, Sampling, Score

END, EOS = END_OF_THINK, 1
BUDGET = ThinkingBudget(5, THINK, END, np.array([9, END, 8], np.int32))


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    return ModelDir(save_thinking_model(tmp_path_factory.mktemp("thinking") / "model"), "float32")


class ScriptedEngine:
    """Continues each prompt by the tokens that a test gives for it, and records what it was asked."""

    def __init__(self, script: dict[tuple[int, ...], list[int]]):
        self.script, self.asked = script, list[tuple[list[tuple[int, ...]], int]]()

    def stream_completions(self, wanted, sampling, batch_size):
        wanted = list(wanted)
        self.asked.append(([tuple(request.prompt_ids.tolist()) for request in wanted], sampling.max_tokens))
        for number, request in reversed([*enumerate(wanted)]):
            ids = self.script[tuple(request.prompt_ids.tolist())][: sampling.max_tokens]
            reason = "stop" if ids[-1] == EOS else "length"
            yield number, Completion(np.array(ids, np.int32), -np.arange(1.0, len(ids) + 1, dtype=np.float32), reason)


def complete(script, prompts, max_tokens=20) -> tuple[list[Completion], ScriptedEngine]:
    engine = ScriptedEngine(script)
    wanted = [Request(np.array(ids, np.int32), seed) for seed, ids in enumerate(prompts)]
    results = dict(BUDGET.stream_completions(engine, wanted, Sampling(max_tokens=max_tokens), 4))
    return [results[number] for number in range(len(prompts))], engine


def test_thinking_is_ended_and_the_answer_is_within_the_rest_of_the_length():
    prompt = (2, THINK)
    script = {prompt: [3] * 30, (*prompt, *[3] * 5, 9, END, 8): [4] * 40}
    (done,), engine = complete(script, [prompt])
    assert [max_tokens for _, max_tokens in engine.asked] == [5, 20 - 5 - 3]
    assert done.response_ids.tolist() == [3] * 5 + [9, END, 8] + [4] * 12
    assert (done.finish_reason, done.ended_thinking.tolist()) == ("length", [5, 8])
    assert done.logprobs.tolist() == [-1, -2, -3, -4, -5, 0, 0, 0, *(-float(n) for n in range(1, 13))]


@pytest.mark.parametrize(
    ("prompt", "begun", "is_ended"),
    [
        ((2, THINK), [3, 3, END, 4, 4], False),
        ((2,), [THINK, 3, 3, 3, 3], True),
        ((2,), [THINK, 3, END, 4, THINK], True),
        ((2,), [3, 3, 3, 3, 3], False),  # a model that does not think
        ((2, THINK, END), [3, 3, 3, 3, 3], False),  # a template that turns thinking off
    ],
)
def test_thinking_is_open_after_the_last_start_without_an_end(prompt, begun, is_ended):
    ending = [9, END, 8] if is_ended else []
    (done,), engine = complete({prompt: begun + [7] * 9, (*prompt, *begun, *ending): [4, EOS]}, [prompt])
    assert done.response_ids.tolist() == [*begun, *ending, 4, EOS]
    assert done.finish_reason == "stop"
    assert engine.asked[-1][1] == 20 - 5 - len(ending)
    assert isinstance(done, BudgetedCompletion)
    assert (done.ended_thinking is not None) == is_ended


def test_responses_keep_their_numbers():
    prompts = [(2, THINK), (5, THINK), (6,), (7, THINK)]
    script = {
        prompts[0]: [3] * 9,
        prompts[1]: [3, END, EOS],
        prompts[2]: [4] * 9,
        prompts[3]: [10] * 9,
        (*prompts[0], 3, 3, 3, 3, 3, 9, END, 8): [20, EOS],
        (*prompts[3], 10, 10, 10, 10, 10, 9, END, 8): [21, EOS],
        (*prompts[2], 4, 4, 4, 4, 4): [22, EOS],
    }
    done, engine = complete(script, prompts)
    assert [each.response_ids.tolist()[-2] for each in done] == [20, END, 22, 21]
    assert [len(asked) for asked, _ in engine.asked] == [4, 2, 1]


def test_an_engine_samples_the_answer_after_the_ended_thinking(thinking_model):
    """Its log-probs are those of a forward pass over the joined response."""
    engine = TransformersEngine(thinking_model, "cpu")
    settings = Eval(max_tokens=40, max_thinking_tokens=12, end_thinking="0 </think>")
    budget = ThinkingBudget.from_settings(settings, thinking_model)
    assert budget.ending_ids.tolist() == [28, 55, END]
    wanted = [Request(np.append(request.prompt_ids, THINK).astype(np.int32), request.seed) for request in requests(6)]
    results = dict(budget.stream_completions(engine, wanted, settings, 4))
    assert sorted(results) == [*range(6)]
    scores = engine.score(
        [ScoreRequest(wanted[n].prompt_ids, results[n].response_ids) for n in range(6)], Score(), print
    )
    for number, scored in enumerate(scores):
        done = results[number]
        assert isinstance(done, BudgetedCompletion)
        assert done.response_ids[12:15].tolist() == [28, 55, END]
        assert len(done.response_ids) <= 40
        sampled = np.r_[:12, 15 : len(done.response_ids)]
        np.testing.assert_allclose(done.logprobs[sampled], scored.logprobs[sampled], rtol=0, atol=1e-4)
    answers = {results[number].response_ids[15:].tobytes() for number in range(6)}
    assert len(answers) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"end_thinking": "0 </ think>"},
            r"eval\.end_thinking: '0 </ think>' does not contain the token `</think>` once",
        ),
        ({"max_tokens": 13}, r"eval\.max_tokens: 13 leaves no room for an answer after 13 tokens"),
    ],
)
def test_settings_that_do_not_fit_the_model(thinking_model, settings, message):
    eval_settings = Eval(**{"max_tokens": 40, "max_thinking_tokens": 12, "end_thinking": "</think>"} | settings)
    with pytest.raises(OpdctlError, match=message):
        ThinkingBudget.from_settings(eval_settings, thinking_model)


def test_model_without_the_tokens_of_thinking():
    with pytest.raises(OpdctlError, match=r"the tokenizer of .* has no token `<think>`") as error:
        ThinkingBudget.from_settings(Eval(max_thinking_tokens=9), directory("toy:student"))
    assert error.value.kind == "unsupported_setting"
