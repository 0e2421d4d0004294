"""The requests and answers of OpenAI's API: of chat completions and completions, with vLLM's additional fields.

The recipe decides how the student samples. A request may not ask for another distribution, nor for what an answer
cannot have: it is refused, and not read in another way.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opdctl.artifacts.records import Completion, Ids
from opdctl.data.cells import check_unicode
from opdctl.data.messages import Chat, Tool, parse_chat, parse_tools
from opdctl.engines.base import sampling_params
from opdctl.engines.stop_strings import text_before_stop
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Sampling

CHAT, COMPLETIONS, MODELS = "chat/completions", "completions", "models"
MODEL_NAME = "student"
LOCATION = "the request"
IGNORED_FIELDS = ("model", "user", "metadata", "store", "parallel_tool_calls", "stream_options", "service_tier")
"""Fields that do not affect a response."""
FIXED_FIELDS: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "top_logprobs": 0,
    "tool_choice": "auto",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "skip_special_tokens": True,
    "add_generation_prompt": True,
}
"""Fields that may have this value only."""


class ApiError(Exception):
    """A request that is refused, with the status and the code of the answer."""

    def __init__(self, message: str, code: str = "invalid_request", status: int = 400):
        super().__init__(message)
        self.code, self.status = code, status

    def to_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class CallRequest:
    """A request for one response.

    prompt: a chat with the schemas of its tools, a text, or ids. stop: strings that end the response, besides those of
    the recipe. includes_stop: whether they belong to its text.
    """

    prompt: Chat | str | Ids
    tools: tuple[Tool, ...]
    max_tokens: int | None
    stop: tuple[str, ...]
    includes_stop: bool
    has_logprobs: bool
    has_token_ids: bool

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, Chat)


def parse_request(endpoint: str, body: Any, sampling: Sampling, vocab_size: int) -> CallRequest:
    """Return the request of a body in JSON.

    Raises:
        ApiError: a field is invalid, unknown, or asks for another distribution than the recipe's.
    """
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    fields = _Fields({key: value for key, value in body.items() if value is not None and key not in IGNORED_FIELDS})
    _check_fixed(fields, sampling_params(sampling))
    is_chat = endpoint == CHAT
    limits = [fields.take(name, int, None) for name in ("max_completion_tokens", "max_tokens")]
    max_tokens = next((limit for limit in limits if limit is not None), None)
    if max_tokens is not None and max_tokens < 1:
        raise ApiError(f"max_tokens must be at least 1, got {max_tokens}")
    stop = fields.take("stop", str | list, [])
    logprobs = fields.take("logprobs", bool if is_chat else bool | int, False)
    if not isinstance(logprobs, bool) and logprobs > 1:
        raise ApiError(f"logprobs must be 0 or 1, got {logprobs}: only the log-prob of the sampled token is returned")
    try:
        request = CallRequest(
            prompt=_parse_chat(fields) if is_chat else _parse_prompt(fields, vocab_size),
            tools=parse_tools(fields.take("tools", list, []), f"{LOCATION}: tools") if is_chat else (),
            max_tokens=max_tokens,
            stop=_parse_stop([stop] if isinstance(stop, str) else stop),
            includes_stop=fields.take("include_stop_str_in_output", bool, False),
            has_logprobs=logprobs is not False,
            has_token_ids=fields.take("return_token_ids", bool, False),
        )
    except OpdctlError as error:
        raise ApiError(f"{error.detail}{f'; {error.hint}' if error.hint else ''}") from None
    if unknown := list(fields.values):
        raise ApiError(f"{unknown[0]} is not supported")
    return request


@dataclass
class _Fields:
    """The fields of a body that were not read yet."""

    values: dict[str, Any]

    def take(self, name: str, kind: Any, default: Any) -> Any:
        if name not in self.values:
            return default
        value = self.values.pop(name)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ApiError(f"{name} has a value of the wrong type, {value!r:.100}")
        return value


def _check_fixed(fields: _Fields, sampling: Mapping[str, Any]) -> None:
    """Check the fields of which one value is allowed only, and remove them."""
    fixed = {key: value for key, value in sampling.items() if key != "max_tokens"}
    for name, allowed in {**FIXED_FIELDS, **fixed}.items():
        value = fields.values.pop(name, allowed)
        accepted = (allowed, "none") if name == "tool_choice" else (allowed, -1) if name == "top_k" else (allowed,)
        if value not in accepted:
            reason = "the recipe decides how the student samples" if name in fixed else "it is not supported"
            raise ApiError(f"{name} must be {allowed!r} or absent, got {value!r:.100}: {reason}")


def _parse_chat(fields: _Fields) -> Chat:
    return parse_chat(fields.take("messages", list, None), f"{LOCATION}: messages", "continue")


def _parse_prompt(fields: _Fields, vocab_size: int) -> str | Ids:
    """Return the prompt of a completion: a text or ids, or a list of one of them."""
    prompt = fields.take("prompt", str | list, None)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt
    if isinstance(prompt, str) and prompt:
        return check_unicode(prompt, f"{LOCATION}: prompt")
    if not isinstance(prompt, list) or not prompt or not {*map(type, prompt)} <= {int}:
        raise ApiError("prompt must be a text or a list of token ids, and not empty")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ApiError(f"prompt has a token id outside of the vocabulary of {vocab_size} ids")
    return np.array(prompt, np.int32)


def _parse_stop(stop: Sequence[Any]) -> tuple[str, ...]:
    if not all(isinstance(each, str) and each for each in stop):
        raise ApiError("stop must be a text or a list of texts, none of them empty")
    return tuple(check_unicode(each, f"{LOCATION}: stop") for each in stop)


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Answer:
    """A response to a request. text: of the response without special tokens. stop: all strings that end it."""

    id: str
    created: int
    request: CallRequest
    prompt_ids: Ids
    completion: Completion
    text: str
    stop: Sequence[str]
    decode: Callable[[list[int]], str]

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        request, is_chat = self.request, self.request.is_chat
        prompt, response = self.prompt_ids.tolist(), self.completion.response_ids.tolist()
        text = self.text if request.includes_stop else text_before_stop(self.text, self.stop)
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.completion.finish_reason, "stop_reason": None}
        choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        choice["logprobs"] = self._logprobs() if request.has_logprobs else None
        body = {
            "id": self.id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self.created,
            "model": MODEL_NAME,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(response),
                "total_tokens": len(prompt) + len(response),
            },
        }
        if request.has_token_ids:  # where vLLM has them
            choice["token_ids"] = response
            (body if is_chat else choice)["prompt_token_ids"] = prompt
        return body

    def _logprobs(self) -> dict[str, Any]:
        tokens = [self.decode([id_]) for id_ in self.completion.response_ids.tolist()]
        logprobs = self.completion.sampled_logprobs.tolist()
        if not self.request.is_chat:
            offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))
            return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}
        content = [
            {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content}


def models_to_json(max_model_len: int) -> dict[str, Any]:
    """Return the list of models: the student."""
    model = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "opdctl", "max_model_len": max_model_len}
    return {"object": "list", "data": [model]}
