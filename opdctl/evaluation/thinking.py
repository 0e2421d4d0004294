"""A budget of thinking tokens: the thinking that exceeds it is ended by a text, and the answer is sampled after it.

This is budget forcing, as in s1 (arXiv 2501.19393) and Qwen3 (arXiv 2505.09388). A response takes two requests of an
engine. The first one has the budget as its maximum length. The second one continues what the first one did not end.
"""

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass

import numpy as np

from opdctl.artifacts.records import Completion, Ids, sample_seed
from opdctl.engines.base import Engine, Request
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import END_OF_THINKING, START_OF_THINKING, Eval, Sampling


@dataclass(frozen=True, slots=True)
class BudgetedCompletion(Completion):
    """A completion of two requests.

    ended_thinking: the span [start, end) of the tokens that ended its thinking, which were not sampled and have the
    log-prob 0; None if it ended by itself.
    """

    ended_thinking: Ids | None = None


@dataclass(frozen=True)
class ThinkingBudget:
    """The budget of a model, with its ids of `<think>` and `</think>` and the tokens that end thinking."""

    max_tokens: int
    start_id: int
    end_id: int
    ending_ids: Ids

    @classmethod
    def from_settings(cls, settings: Eval, model: ModelDir) -> "ThinkingBudget":
        """Return the budget of the recipe for a model.

        Raises:
            OpdctlError: the tokenizer has no such tokens; the ending leaves no room for an answer.
        """
        assert settings.max_thinking_tokens is not None
        vocabulary = model.tokenizer.get_vocab()
        if missing := [token for token in (START_OF_THINKING, END_OF_THINKING) if token not in vocabulary]:
            raise OpdctlError(
                "unsupported_setting",
                f"eval.max_thinking_tokens: the tokenizer of {model.path} has no token `{missing[0]}`",
                hint="remove the setting: eval.max_tokens limits the entire response",
            )
        start_id, end_id = vocabulary[START_OF_THINKING], vocabulary[END_OF_THINKING]
        ending_ids = np.array(model.tokenizer(settings.end_thinking, add_special_tokens=False)["input_ids"], np.int32)
        if (ending_ids == end_id).sum() != 1 or ending_ids.max() >= model.vocab_size:
            detail = f"eval.end_thinking: {settings.end_thinking!r} does not contain the token `{END_OF_THINKING}` once"
            raise OpdctlError("unsupported_setting", detail, hint="correct the text")
        if (least := settings.max_thinking_tokens + len(ending_ids)) >= settings.max_tokens:
            detail = f"eval.max_tokens: {settings.max_tokens} leaves no room for an answer after {least} tokens"
            raise OpdctlError("unsupported_setting", detail, hint="raise it, or lower eval.max_thinking_tokens")
        return cls(settings.max_thinking_tokens, start_id, end_id, ending_ids)

    def is_thinking(self, ids: Ids) -> bool:
        """Whether a sequence ends within thinking: its last `<think>` is not closed."""
        marks = ids[(ids == self.start_id) | (ids == self.end_id)]
        return len(marks) > 0 and int(marks[-1]) == self.start_id

    def stream_completions(
        self, engine: Engine, requests: Iterable[Request], sampling: Sampling, batch_size: int
    ) -> Generator[tuple[int, Completion]]:
        """Complete every request within the budget; yield its number and its completion."""
        requests = list(requests)
        unfinished: dict[bool, list[tuple[int, Completion]]] = {True: [], False: []}
        first = sampling.model_copy(update={"max_tokens": self.max_tokens})
        with contextlib.closing(engine.stream_completions(requests, first, batch_size)) as completions:
            for number, begun in completions:
                if begun.finish_reason == "stop":
                    yield number, begun
                else:
                    ids = np.concatenate([requests[number].prompt_ids, begun.response_ids])
                    unfinished[self.is_thinking(ids)].append((number, begun))
        for is_thinking, pairs in ((each, pairs) for each, pairs in unfinished.items() if pairs):
            ending_ids = self.ending_ids if is_thinking else self.ending_ids[:0]
            max_tokens = sampling.max_tokens - self.max_tokens - len(ending_ids)
            pairs.sort(key=lambda pair: pair[0])
            continued = [_continued(requests[number], begun, ending_ids) for number, begun in pairs]
            second = sampling.model_copy(update={"max_tokens": max_tokens})
            with contextlib.closing(engine.stream_completions(continued, second, batch_size)) as completions:
                for index, rest in completions:
                    number, begun = pairs[index]
                    yield number, _joined(begun, ending_ids, rest)


def _continued(request: Request, begun: Completion, ending_ids: Ids) -> Request:
    ids = np.concatenate([request.prompt_ids, begun.response_ids, ending_ids])
    return Request(ids, sample_seed(request.seed, "continued"))


def _joined(begun: Completion, ending_ids: Ids, rest: Completion) -> BudgetedCompletion:
    start, count = len(begun.response_ids), len(ending_ids)
    return BudgetedCompletion(
        np.concatenate([begun.response_ids, ending_ids, rest.response_ids]),
        np.concatenate([begun.logprobs, np.zeros(count, np.float32), rest.logprobs]),
        rest.finish_reason,
        ended_thinking=np.array([start, start + count], np.int32) if count else None,
    )
