"""From the text of a prompt to token ids: through the chat template, or as it is for a base model. Imports no torch."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids
from opdctl.data.messages import Message
from opdctl.errors import OpdctlError, summarize_exception

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEST_TEXTS = ("What is the 1st colour?", "Sort 7 letters, please.")
TEST_ANSWER = "It is blue."
TEST_DATE = "1 January 2025"
TEMPLATE_TIMEOUT_SECONDS = 10.0
Content = Callable[[str], Any]
"""The content of a message for a text."""


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


class PromptRenderer:
    """Renders prompts with a tokenizer and the arguments of its chat template.

    vocab_size: ids from this one on are refused. key: of the arguments in the recipe.

    Raises:
        OpdctlError: the chat template fails its test: it drops the text of a prompt, for example.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int, arguments: Mapping[str, Any], key: str
    ) -> None:
        self._tokenizer, self._vocab_size, self._arguments = tokenizer, vocab_size, dict(arguments)
        self._content: Content = str
        if tokenizer.chat_template:
            self._test_template(key)
        else:
            console.info_once(f"{tokenizer.name_or_path}: no chat template: prompts are plain text")

    def token_ids(self, text: str, location: str, earlier: Sequence[Message] = ()) -> Ids:
        """Return the ids of a user turn with the generation prompt; of plain text without a chat template.

        earlier: the messages before the turn. location: of the prompt, for errors.

        Raises:
            OpdctlError: the template or the tokenizer fails, or drops an earlier message; there are earlier messages
                and no template; or an id is outside the vocabulary.
        """
        try:
            ids = self._turn_ids(text, location, earlier)
        except OpdctlError:
            raise
        except Exception as error:  # tokenizers raises bare Exception, a template any exception
            raise OpdctlError(
                "invalid_data",
                f"{location}: cannot be tokenized: {error}",
                hint=f"remove or correct the prompt, whose text starts with {text[:60]!r}",
            ) from error
        outside = next((id_ for id_ in ids if id_ >= self._vocab_size), None)
        if outside is not None:
            token = self._tokenizer.convert_ids_to_tokens(outside)
            raise OpdctlError(
                "invalid_data",
                f"{location}: token {outside} `{token}` is outside the models' vocabulary of {self._vocab_size} ids",
                hint="remove it from the prompt, or use models that have this token",
            )
        return np.asarray(ids, np.int32)

    def _turn_ids(self, text: str, location: str, earlier: Sequence[Message]) -> list[int]:
        if self._tokenizer.chat_template:
            # A template's variables cannot be listed, so a typo among its arguments is not detected.
            rendered = self._render(text, self._content, earlier=earlier)
            for number, message in enumerate(earlier, 1):
                # The reasoning of an assistant's message is dropped by design.
                if message.role != "assistant" and message.text.strip() not in rendered:
                    reason = f"the chat template drops or changes message {number}, role `{message.role}`"
                    raise OpdctlError("invalid_data", f"{location}: {reason}", hint="use a template that has this role")
            return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])
        if earlier:
            roles = ", ".join(f"`{message.role}`" for message in earlier)
            raise OpdctlError(
                "invalid_data",
                f"{location}: messages before the user's ({roles}) need a chat template, and the tokenizer has none",
                hint="use a model with a chat template, or prompts of one user message",
            )
        return self._text_ids(text)

    def _text_ids(self, text: str) -> list[int]:
        """Return the ids of a text and what the tokenizer puts before it, but not after it: an end of sequence."""
        with_special_tokens = list(self._tokenizer(text)["input_ids"])
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        starts = range(len(with_special_tokens) - len(ids) + 1)
        start = next((i for i in starts if with_special_tokens[i : i + len(ids)] == ids), 0)
        return with_special_tokens[:start] + ids

    def _render(
        self, text: str, content: Content, answer: str | None = None, earlier: Sequence[Message] = (), **arguments: Any
    ) -> str:
        """Return a user turn as text: with the generation prompt, unless `arguments` override it, or an answer."""
        turns = [*earlier, Message("user", text)]
        messages = [{"role": message.role, "content": content(message.text)} for message in turns]
        if answer is not None:
            messages.append({"role": "assistant", "content": content(answer)})
        arguments = {"add_generation_prompt": answer is None, **self._arguments, **arguments}
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments))

    # ── The test of a chat template ──────────────────────────────────────────────────────────────────────────────────

    def _test_template(self, key: str) -> None:
        """Choose the form of a message's content, strings before lists of parts; warn of a template with a clock."""
        reasons = []
        try:
            with _limit_time(TEMPLATE_TIMEOUT_SECONDS):
                for content in (str, _as_parts):
                    reason = self._find_fault(content)
                    if reason is None:
                        self._content = content
                        self._warn_of_clock(key)
                        return
                    reasons.append(reason)
        except TimeoutError:
            reasons.insert(0, f"does not finish within {TEMPLATE_TIMEOUT_SECONDS:g} seconds")
        raise OpdctlError(
            "unsupported_model",
            f"{self._tokenizer.name_or_path}: the chat template {reasons[0]}",
            hint="correct chat_template.jinja, or chat_template in tokenizer_config.json, or "
            "its arguments in the recipe",
        )

    def _find_fault(self, content: Content) -> str | None:
        """Return what the template does wrong with contents of this form."""
        try:
            rendered = [self._render(text, content) for text in TEST_TEXTS]
            is_changed = (text not in result for text, result in zip(TEST_TEXTS, rendered, strict=True))
            is_printed = content is _as_parts and re.search("[\"']type[\"']", rendered[0])  # the list itself
            if any(is_changed) or is_printed:
                return "drops or changes the text of a prompt"
            if rendered[0] == rendered[1]:
                return "renders two different prompts identically"
            return "has no generation prompt" if self._lacks_generation_prompt(rendered[0], content) else None
        except TimeoutError:
            raise
        except Exception as error:
            return f"cannot be rendered: {summarize_exception(error)}"

    def _lacks_generation_prompt(self, prompt: str, content: Content) -> bool:
        """Whether an answer to a rendered prompt would have to begin with the header of its turn.

        With a generation prompt, the result is longer than without. The templates of some models, such as Llama 2, have
        none and need none: the answer follows directly.
        """
        turn = self._render(TEST_TEXTS[0], content, add_generation_prompt=False)
        if len(prompt) > len(turn):
            return False
        dialogue = self._render(TEST_TEXTS[0], content, TEST_ANSWER)
        header, answer, _ = dialogue.removeprefix(prompt).partition(TEST_ANSWER)
        return dialogue.startswith(prompt) and bool(answer and header.strip())

    def _warn_of_clock(self, key: str) -> None:
        if not self._reads_clock():
            return
        names = sorted({*re.findall(r"\w*(?:date|time|day)\w*", self._tokenizer.get_chat_template())})
        argument = next((name for name in names if not self._reads_clock(**{name: TEST_DATE})), None)
        remedy = f'; {key} = {{ {argument} = "{TEST_DATE}" }} fixes the date' if argument else ""
        console.warn_once(
            f"{self._tokenizer.name_or_path}: the chat template reads the clock: a run that starts at another time has "
            f"other prompts{remedy}"
        )

    def _reads_clock(self, **arguments: Any) -> bool:
        """Whether rendering calls `strftime_now`, or does not use the arguments."""
        calls = []

        def strftime_now(form: str) -> str:
            calls.append(form)
            return datetime.now().strftime(form)

        try:
            rendered = self._render(TEST_TEXTS[0], self._content, strftime_now=strftime_now, **arguments)
        except TimeoutError:
            raise
        except Exception:  # the argument has another meaning
            return True
        return bool(calls) or any(value not in rendered for value in arguments.values())


@contextlib.contextmanager
def _limit_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the Python code of the block after `seconds`. No signal: it works in any thread."""
    deadline, previous = time.monotonic() + seconds, sys.gettrace()

    def check(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError
        return check

    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(previous)
