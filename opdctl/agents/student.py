"""What an episode needs of the student besides an engine: its chat template, its tokenizer and the limits."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opdctl.agents.api import LOCATION, CallRequest
from opdctl.agents.conversation import Conversation
from opdctl.artifacts.records import Ids
from opdctl.data.messages import Chat
from opdctl.data.rendering import PromptRenderer
from opdctl.data.special_tokens import MarkedText
from opdctl.recipe.schema import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Student:
    """Texts and token ids of the student. Threads share it.

    max_total: tokens of a trajectory with its first prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        renderer: PromptRenderer,
        vocab_size: int,
        sampling: Sampling,
        max_total: int,
    ) -> None:
        self._tokenizer, self._renderer = tokenizer, renderer
        self.vocab_size, self.sampling, self.max_total = vocab_size, sampling, max_total
        self._lock = threading.Lock()  # the process of the chat template renders one chat at a time

    def open_conversation(self) -> Conversation:
        return Conversation(self, self.sampling.max_tokens, self.max_total)

    def read_prompt(self, request: CallRequest) -> MarkedText | Ids:
        """Return the prompt of a request as ids, or as text: special tokens that a text prompt spells are read as such,
        those that the messages of a chat spell are not.

        Raises:
            OpdctlError: the chat cannot be rendered.
        """
        if isinstance(request.prompt, Chat):
            with self._lock:
                return self._renderer.render(request.prompt, LOCATION, request.tools)
        return MarkedText(request.prompt) if isinstance(request.prompt, str) else request.prompt

    def encode(self, text: MarkedText, *, is_continuation: bool) -> Sequence[int]:
        with self._lock:
            return self._renderer.encode(text, LOCATION, is_continuation=is_continuation)

    def decode(self, prompt_ids: Ids, response_ids: Ids) -> str:
        return self._decode_after(prompt_ids, response_ids, skip_special_tokens=False)

    def visible_text(self, prompt_ids: Ids, response_ids: Ids) -> str:
        """Return the text of a response after its prompt, without special tokens."""
        return self._decode_after(prompt_ids, response_ids, skip_special_tokens=True)

    def decode_ids(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=False)

    def _decode_after(self, prompt_ids: Ids, response_ids: Ids, *, skip_special_tokens: bool) -> str:
        """Return the text that a response adds to that of its prompt: alone, some tokenizers drop its first space."""
        before = self._decode(prompt_ids.tolist(), skip_special_tokens=skip_special_tokens)
        text = self._decode(
            np.concatenate([prompt_ids, response_ids]).tolist(), skip_special_tokens=skip_special_tokens
        )
        if text.startswith(before):
            return text[len(before) :]
        return self._decode(response_ids.tolist(), skip_special_tokens=skip_special_tokens)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        with self._lock:
            text = self._tokenizer.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text
