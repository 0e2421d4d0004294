"""From the text of a prompt to token ids: through the chat template, or as it is for a base model. Imports no torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Ids
from opdctl.data.messages import Message
from opdctl.data.template_process import TemplateError, TemplateProcess
from opdctl.errors import OpdctlError, is_panic

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
        self._section = key.partition(".")[0]
        if tokenizer.chat_template:
            self._template = TemplateProcess(tokenizer)
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
        except TemplateError as error:
            reason = f"the chat template of {self._tokenizer.name_or_path} {error}"
            raise OpdctlError("invalid_data", f"{location}: {reason}", hint=TEMPLATE_HINT) from None
        except BaseException as error:  # tokenizers raises bare Exception
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise OpdctlError(
                "invalid_data",
                f"{location}: cannot be tokenized: {error}",
                hint=f"set {self._section}.suffix if the appended text is the cause, otherwise correct {text[:100]!r}",
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
            rendered, _ = self._render(text, self._content, earlier=earlier)
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
    ) -> tuple[str, bool]:
        """Return a user turn as text, and whether the template read the clock.

        The turn has the generation prompt, unless `arguments` override it, or an answer.
        """
        turns = [*earlier, Message("user", text)]
        messages = [{"role": message.role, "content": content(message.text)} for message in turns]
        if answer is not None:
            messages.append({"role": "assistant", "content": content(answer)})
        arguments = {"add_generation_prompt": answer is None, **self._arguments, **arguments}
        return self._template.render(messages, arguments)

    # ── The test of a chat template ──────────────────────────────────────────────────────────────────────────────────

    def _test_template(self, key: str) -> None:
        """Choose the form of a message's content, strings before lists of parts; warn of a template with a clock."""
        reasons = []
        for content in (str, _as_parts):
            reason = self._find_fault(content)
            if reason is None:
                self._content = content
                self._warn_of_clock(key)
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
            rendered = [self._render(text, content)[0] for text in TEST_TEXTS]
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
        turn, _ = self._render(TEST_TEXTS[0], content, add_generation_prompt=False)
        if len(prompt) > len(turn):
            return False
        dialogue, _ = self._render(TEST_TEXTS[0], content, TEST_ANSWER)
        header, answer, _ = dialogue.removeprefix(prompt).partition(TEST_ANSWER)
        return dialogue.startswith(prompt) and bool(answer and header.strip())

    def _warn_of_clock(self, key: str) -> None:
        if not self._reads_clock():
            return
        words = sorted({*re.findall(r"\w+", self._tokenizer.get_chat_template())})
        names = [word for word in words if any(part in word for part in ("date", "time", "day"))][:MAX_DATE_ARGUMENTS]
        argument = next((name for name in names if not self._reads_clock(**{name: TEST_DATE})), None)
        remedy = f'; {key} = {{ {argument} = "{TEST_DATE}" }} fixes the date' if argument else ""
        console.warn_once(
            f"{self._tokenizer.name_or_path}: the chat template reads the clock: a run that starts at another time has "
            f"other prompts{remedy}"
        )

    def _reads_clock(self, **arguments: Any) -> bool:
        """Whether rendering reads the clock, or does not use the arguments."""
        try:
            rendered, reads_clock = self._render(TEST_TEXTS[0], self._content, **arguments)
        except TemplateError:  # the argument has another meaning
            return True
        return reads_clock or any(value not in rendered for value in arguments.values())
