"""The turns of a conversation as the token ids that a model reads and samples. Imports no torch.

A model samples the ids of its turn after those of the prompt, and they stay as they are when the next prompt follows.
So the text is tokenized in pieces, cut where a turn of the student begins and ends: a token that would span such a
border does not arise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opdctl.artifacts.records import Ids, LossMask
from opdctl.data.messages import Message, Tool, make_chat
from opdctl.data.rendering import PromptRenderer
from opdctl.data.special_tokens import MarkedText
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_KEYS = ("reasoning_content", "thinking")
IDS_HINT = "store the token ids that the model sampled, such as `prompt_ids` and `response_ids`"


@dataclass(frozen=True)
class RenderedTurns:
    """Turns that follow one another in one sequence.

    prompt_ids: up to the first turn of the student. response_ids, loss_mask: of all later tokens, [T]. turns: the
    number of the student's.
    """

    prompt_ids: Ids
    response_ids: Ids
    loss_mask: LossMask
    turns: int


def render_turns(
    renderer: PromptRenderer,
    messages: Sequence[Message],
    is_own: Sequence[bool],
    location: str,
    tools: Sequence[Tool] = (),
    *,
    is_cut: bool = False,
) -> Iterator[RenderedTurns]:
    """Yield the sequences of a conversation, one unless the chat template changes earlier turns.

    A turn of the student begins with the text of its message, and ends with the last special token of the template's
    text for it, which it sampled. A template that changes an earlier turn, such as one that drops its thinking, gives
    the model another prompt: there a new sequence begins, in whose prompt the earlier turns are. What follows the
    student's last turn is dropped.

    is_own: whether each message is a turn of the student. is_cut: whether the last one was cut off, so that it has no
    token at its end.

    Raises:
        OpdctlError: the messages are no chat, or the template changes the text of a turn of the student.
    """
    pieces: list[tuple[list[int], bool]] = []
    known = ""
    last = max((index for index, own in enumerate(is_own) if own), default=-1)
    for index in (index for index, own in enumerate(is_own) if own):
        prompt = renderer.render(make_chat(messages[:index], location), location, tools).plain
        closed, start = _render_closed(renderer, messages[: index + 1], prompt, location, tools)
        if pieces and not prompt.startswith(known):
            yield _join(pieces)
            pieces, known = [], ""
        read = closed.before(start).after(len(known))
        pieces.append((renderer.encode(read, location, is_continuation=bool(pieces)), False))
        answer = closed.after(start)
        end = renderer.end_of_turn(answer)
        if is_cut and index == last:
            end = min(end, _find_text(messages[index], answer.plain)[1])
        pieces.append((renderer.encode(answer.before(end), location, is_continuation=True), True))
        known = closed.plain[: start + end]
    if pieces:
        yield _join(pieces)


def _render_closed(
    renderer: PromptRenderer, messages: Sequence[Message], prompt: str, location: str, tools: Sequence[Tool]
) -> tuple[MarkedText, int]:
    """Return the text of a chat that ends with an answer, and the index in it where the student's own text begins.

    A template may put text between the prompt and the answer, such as empty thinking. The student has sampled it only
    if the message has thinking.
    """
    closed, message = renderer.render(make_chat(messages, location), location, tools, is_closed=True), messages[-1]
    answer = closed.plain.removeprefix(prompt) if closed.plain.startswith(prompt) else ""
    at, end = _find_text(message, answer)
    if not answer or end < 0:
        reason = f"the chat template changes the text of message {len(messages)}, role `assistant`"
        raise OpdctlError("invalid_data", f"{location}: {reason}", hint=IDS_HINT)
    has_thinking = any(name in message.extra for name in THINKING_KEYS)
    return closed, len(prompt) + (0 if has_thinking else at)


def _find_text(message: Message, answer: str) -> tuple[int, int]:
    """Return the span of a message's text in that of the template, (-1, -1) if it is not there. Some templates remove
    the white space around it."""
    text = next((text for text in (message.text, message.text.strip()) if text in answer), None)
    return (-1, -1) if text is None else (answer.index(text), answer.index(text) + len(text))


def _join(pieces: Sequence[tuple[list[int], bool]]) -> RenderedTurns:
    (prompt_ids, _), *rest = pieces
    ids = [id_ for piece, _ in rest for id_ in piece]
    mask = [is_own for piece, is_own in rest for _ in piece]
    turns = sum(is_own for _, is_own in rest)
    return RenderedTurns(np.asarray(prompt_ids, np.int32), np.asarray(ids, np.int32), np.asarray(mask, bool), turns)


def render_texts(
    renderer: PromptRenderer, tokenizer: "PreTrainedTokenizerBase", prompt: str, response: str, location: str
) -> tuple[Ids, Ids]:
    """Return the ids of the text of a prompt, which the tokenizer begins as it does for any text, and of a response.

    No end of sequence follows a response: programs that write texts drop it, also from a response that was cut off.

    Raises:
        OpdctlError: the prompt is the text of the chat template without its special tokens.
    """
    if renderer.lacks_special_tokens(prompt):
        reason = "has no special tokens, and its end is that of the chat template without them"
        raise OpdctlError("invalid_data", f"{location} {reason}: its token ids are unknown", hint=IDS_HINT)
    has_start = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    prompt_ids = tokenizer(prompt, add_special_tokens=not has_start)["input_ids"]
    response_ids = renderer.encode(MarkedText(response), location, is_continuation=True)
    return np.asarray(prompt_ids, np.int32), np.asarray(response_ids, np.int32)
