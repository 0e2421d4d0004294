"""From the text of a prompt to token ids: through the chat template, or as it is for a base model. Imports no torch."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids
from opdctl.data.messages import Chat, Message, Tool, find_texts, map_texts, tool_name
from opdctl.data.special_tokens import MarkedText, SpecialTokens, choose_mark
from opdctl.data.template_process import TemplateError, TemplateProcess
from opdctl.errors import OpdctlError, is_panic
from opdctl.recipe.prompts import SpecialTokensInText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEST_TEXTS = ("What is the 1st colour?", "Sort 7 letters, please.")
TEST_ANSWER = "It is blue."
TEST_DATE = "1 January 2025"
MAX_DATE_ARGUMENTS = 10  # that are tried
TEMPLATE_HINT = "correct chat_template.jinja, or chat_template in tokenizer_config.json, or its arguments in the recipe"
Content = Callable[[str], Any]
"""The content of a message for a text."""


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@dataclass(frozen=True)
class PromptFormat:
    """How a chat becomes a prompt.

    arguments: of the chat template. system: the text of the system turn, in place of that of the chat; "" removes it.
    chat_template: the text of a template in place of the tokenizer's. special_tokens_in_text: whether a prompt whose
    text spells a special token is refused, or the token is split.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    chat_template: str | None = None
    special_tokens_in_text: SpecialTokensInText = "error"


class PromptRenderer:
    """Renders prompts with a tokenizer in a format.

    vocab_size: ids from this one on are refused. section: of the format in the recipe, for messages.

    Raises:
        OpdctlError: the chat template fails its test: it drops the text of a prompt, for example; or the format has a
            system turn, and there is no chat template.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, form: PromptFormat, section: str = "prompts"
    ) -> None:
        self._tokenizer, self._vocab_size, self._format, self._section = tokenizer, vocab_size, form, section
        self._content: Content = str
        self._special_tokens = SpecialTokens(tokenizer)
        self._has_template = bool(form.chat_template or tokenizer.chat_template)
        if self._has_template:
            self._template = TemplateProcess(tokenizer, form.chat_template)
            self._test_template()
        elif form.system:
            reason = f"{tokenizer.name_or_path} has no chat template, which a system turn needs"
            hint = f"unset {section}.system, or set prompts.chat_template"
            raise OpdctlError("unsupported_setting", f"{section}.system: {reason}", hint=hint)
        else:
            console.info_once(f"{tokenizer.name_or_path}: no chat template: prompts are plain text")

    def token_ids(self, chat: Chat, location: str, tools: Sequence[Tool] = ()) -> Ids:
        """Return the ids of a chat with the generation prompt; of plain text without a chat template.

        If the last message is the assistant's, the response continues it. location: of the prompt, for errors. tools:
        their schemas.

        Raises:
            OpdctlError: the template or the tokenizer fails, or the template drops a message or a tool; there are
                several messages and no template; a text spells a special token; or an id is outside the vocabulary.
        """
        return np.asarray(self.encode(self.render(chat, location, tools), location), np.int32)

    def render_ahead(self, chats: Sequence[tuple[Chat, Sequence[Tool]]]) -> None:
        """Begin to render chats, each with its tools, that `token_ids` is called with next, in this order."""
        if not self._has_template:
            return
        self._template.send_ahead(
            [self._request(self._with_system(chat.messages), self._content, tools) for chat, tools in chats]
        )

    def render(self, chat: Chat, location: str, tools: Sequence[Tool] = (), *, is_closed: bool = False) -> MarkedText:
        """Return the text of a chat, as for `token_ids`. A special token that a message spells has a mark in it.

        is_closed: the last message is whole, and no response follows.

        Raises:
            OpdctlError: as by `token_ids`, but for the tokenizer.
        """
        messages = self._with_system(chat.messages)
        texts = [text for message in messages for text in message.texts()] + list(find_texts(tools))
        mark = ""
        if spelled := self._special_tokens.first_in(texts):
            mark = choose_mark(texts)
            split = partial(self._special_tokens.mark, mark=mark)
            if (left := self._special_tokens.first_in([split(text) for text in texts])) is not None:
                self._check_spelled(location, left)
                raise _spelling_error(location, left, "; a token of one character cannot be split")
            messages, tools = [message.map_texts(split) for message in messages], map_texts(tools, split)
        try:
            return MarkedText(self._render_text(messages, tools, location, is_closed=is_closed), mark, spelled)
        except TemplateError as error:
            reason = f"the chat template of {self._tokenizer.name_or_path} {error}"
            raise OpdctlError("invalid_data", f"{location}: {reason}", hint=TEMPLATE_HINT) from None

    def encode(self, text: MarkedText, location: str, *, is_continuation: bool = False) -> list[int]:
        """Return the ids of a text. is_continuation: other tokens precede it.

        Raises:
            OpdctlError: the tokenizer fails; the text has a mark, and special tokens in it are refused, or one cannot
                be split; an id is outside the vocabulary.
        """
        if text.mark and text.mark in text.text:
            self._check_spelled(location, text.spelled or "")
        try:
            has_start = not self._has_template and not is_continuation
            before = (
                self._ids_before(text.text.partition(text.mark)[0] if text.mark else text.text) if has_start else []
            )
            ids, unsplit = self._special_tokens.encode(text, is_continuation=is_continuation)
        except BaseException as error:  # tokenizers raises bare Exception
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            key = "eval.suffix" if self._section == "eval" else "prompts.suffix"
            hint = f"set {key} if the appended text is the cause, otherwise correct {text.plain[:100]!r}"
            raise OpdctlError("invalid_data", f"{location}: cannot be tokenized: {error}", hint=hint) from error
        if unsplit is not None:
            raise _spelling_error(location, unsplit, "; the tokenizer cannot split it")
        outside = next((id_ for id_ in before + ids if id_ >= self._vocab_size), None)
        if outside is not None:
            token = self._tokenizer.convert_ids_to_tokens(outside)
            raise OpdctlError(
                "invalid_data",
                f"{location}: token {outside} `{token}` is outside the models' vocabulary of {self._vocab_size} ids",
                hint="remove it from the prompt, or use models that have this token",
            )
        return before + ids

    def _check_spelled(self, location: str, spelled: str) -> None:
        """Raise OpdctlError if a special token in the text of a message is refused."""
        if self._format.special_tokens_in_text == "error":
            raise _spelling_error(location, spelled, ', or set prompts.special_tokens_in_text = "split" to split it')

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages with the system turn of the format in place of theirs."""
        if self._format.system is None:
            return messages
        rest = itertools.dropwhile(lambda message: message.role in ("system", "developer"), messages)
        return [*([Message("system", self._format.system)] if self._format.system else []), *rest]

    def end_of_turn(self, text: MarkedText) -> int:
        """Return the number of characters of a turn up to the last special token, which the student sampled; all but
        white space at the end if there is none."""
        return self._special_tokens.end_of_last(text) or len(text.plain.rstrip())

    def lacks_special_tokens(self, text: str) -> bool:
        """Whether the text of a prompt is that of the chat template without its special tokens, as far as the end of
        the prompt shows. The beginning of sequence, which the tokenizer adds, may be missing."""
        if not self._has_template or self._special_tokens.first_in([text]):
            return False
        rendered, _ = self._render([Message("user", TEST_TEXTS[0])], self._content)
        rendered = rendered.removeprefix(self._tokenizer.bos_token or "")
        end = self._special_tokens.remove_from(rendered.partition(TEST_TEXTS[0])[2]).strip()
        has_special_tokens = self._special_tokens.first_in([rendered]) is not None
        return has_special_tokens and bool(end) and text.rstrip().endswith(end)

    def _render_text(
        self, messages: Sequence[Message], tools: Sequence[Tool], location: str, *, is_closed: bool
    ) -> str:
        """Return the text of messages and tools: by the chat template, or of the one message of a base model."""
        if self._has_template:
            return self._render_checked(messages, tools, location, is_closed=is_closed)
        if len(messages) > 1 or tools:
            roles = ", ".join(f"`{message.role}`" for message in messages)
            raise OpdctlError(
                "invalid_data",
                f"{location}: several messages ({roles}) or tools need a chat template, and the tokenizer has none",
                hint="use a model with a chat template, prompts.chat_template, or prompts of one user message",
            )
        return messages[0].text

    def _render_checked(
        self, messages: Sequence[Message], tools: Sequence[Tool], location: str, *, is_closed: bool
    ) -> str:
        # A template's variables cannot be listed, so a typo among its arguments is not detected.
        end = {"add_generation_prompt": False, "continue_final_message": False} if is_closed else {}
        text, _ = self._render(messages, self._content, tools, **end)
        for number, message in enumerate(messages, 1):
            what = f"message {number}, role `{message.role}`"
            # The reasoning of an assistant's message is dropped by design.
            if message.role != "assistant" and not _contains(text, message.text.strip()):
                raise _dropping_error(location, what, "that has this role")
            names = [tool_name(call) or "" for call in message.extra.get("tool_calls", ())]
            if not all(_contains(text, name) for name in names):
                raise _dropping_error(location, f"the tool calls of {what}", "with tool calls")
        if not all(_contains(text, tool_name(tool) or "") for tool in tools):
            raise _dropping_error(location, "the tools (prompts.tools_column)", "with tools")
        return text

    def _ids_before(self, text: str) -> list[int]:
        """Return what the tokenizer puts before a text, but not what it puts after it: an end of sequence."""
        with_special_tokens = list(self._tokenizer(text)["input_ids"])
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        starts = range(len(with_special_tokens) - len(ids) + 1)
        start = next((i for i in starts if with_special_tokens[i : i + len(ids)] == ids), 0)
        return with_special_tokens[:start]

    def _render(
        self, messages: Sequence[Message], content: Content, tools: Sequence[Tool] = (), **arguments: Any
    ) -> tuple[str, bool]:
        """Return a chat as text, and whether the template read the clock.

        It has the generation prompt, unless `arguments` override it; a last message of the assistant is left open.
        """
        return self._template.render(*self._request(messages, content, tools, **arguments))

    def _request(
        self, messages: Sequence[Message], content: Content, tools: Sequence[Tool], **arguments: Any
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the turns and the arguments for the template."""
        turns = [{"role": each.role, "content": content(each.text), **each.extra} for each in messages]
        is_continued = messages[-1].role == "assistant"
        end = {"continue_final_message": True} if is_continued else {"add_generation_prompt": True}
        given = {"tools": [*tools]} if tools else {}
        return turns, {**end, **self._format.arguments, **arguments, **given}

    # ── The test of a chat template ──────────────────────────────────────────────────────────────────────────────────

    def _test_template(self) -> None:
        """Choose the form of a message's content, strings before lists of parts; warn of a template with a clock."""
        reasons = []
        for content in (str, _as_parts):
            reason = self._find_fault(content)
            if reason is None:
                self._content = content
                self._warn_of_clock()
                return
            reasons.append(reason)
        raise OpdctlError(
            "unsupported_model",
            f"{self._tokenizer.name_or_path}: the chat template {reasons[0]}",
            hint=TEMPLATE_HINT,
        )

    def _find_fault(self, content: Content) -> str | None:
        """Return what the template does wrong with contents of this form."""
        try:
            rendered = [self._render([Message("user", text)], content)[0] for text in TEST_TEXTS]
            is_changed = (text not in result for text, result in zip(TEST_TEXTS, rendered, strict=True))
            is_printed = content is _as_parts and re.search("[\"']type[\"']", rendered[0])  # the list itself
            if any(is_changed) or is_printed:
                return "drops or changes the text of a prompt"
            if rendered[0] == rendered[1]:
                return "renders two different prompts identically"
            return "has no generation prompt" if self._lacks_generation_prompt(rendered[0], content) else None
        except TemplateError as error:
            return str(error)

    def _lacks_generation_prompt(self, prompt: str, content: Content) -> bool:
        """Whether an answer to a rendered prompt would have to begin with the header of its turn.

        With a generation prompt, the result is longer than without. The templates of some models, such as Llama 2, have
        none and need none: the answer follows directly.
        """
        question = Message("user", TEST_TEXTS[0])
        turn, _ = self._render([question], content, add_generation_prompt=False)
        if len(prompt) > len(turn):
            return False
        answered = [question, Message("assistant", TEST_ANSWER)]
        dialogue, _ = self._render(answered, content, continue_final_message=False, add_generation_prompt=False)
        header, answer, _ = dialogue.removeprefix(prompt).partition(TEST_ANSWER)
        return dialogue.startswith(prompt) and bool(answer and header.strip())

    def _warn_of_clock(self) -> None:
        if not self._reads_clock():
            return
        words = sorted({*re.findall(r"\w+", self._format.chat_template or self._tokenizer.get_chat_template())})
        names = [word for word in words if any(part in word for part in ("date", "time", "day"))][:MAX_DATE_ARGUMENTS]
        argument = next((name for name in names if not self._reads_clock(**{name: TEST_DATE})), None)
        remedy = (
            f'; {self._section}.template_arguments = {{ {argument} = "{TEST_DATE}" }} fixes the date'
            if argument
            else ""
        )
        console.warn_once(
            f"{self._tokenizer.name_or_path}: the chat template reads the clock: a run that starts at another time has "
            f"other prompts{remedy}"
        )

    def _reads_clock(self, **arguments: Any) -> bool:
        """Whether rendering reads the clock, or does not use the arguments."""
        try:
            rendered, reads_clock = self._render([Message("user", TEST_TEXTS[0])], self._content, **arguments)
        except TemplateError:  # the argument has another meaning
            return True
        return reads_clock or any(value not in rendered for value in arguments.values())


def _contains(rendered: str, text: str) -> bool:
    """Whether a rendered chat contains a text, as it is or as in JSON, the form in which templates give tools."""
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _dropping_error(location: str, what: str, template: str) -> OpdctlError:
    reason = f"the chat template drops or changes {what}"
    return OpdctlError("invalid_data", f"{location}: {reason}", hint=f"use a template {template}")


def _spelling_error(location: str, token: str, more: str) -> OpdctlError:
    reason = f"the text of the prompt spells the special token `{token}`"
    hint = f"remove it{more}; for a chat, give a list of messages without the tokens of a chat template"
    return OpdctlError("invalid_data", f"{location}: {reason}", hint=hint)
