"""Where the text of a response contains a stop string, found while it is sampled. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE_CHAR = "\ufffd"  # how a tokenizer decodes the first bytes of a character


class StopSearch:
    """The search for stop strings in one response.

    The response ends with the first token by which its text, without special tokens, contains a stop string. A token is
    decoded together with the few before it, so that the time of a search does not depend on the length so far.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._end = 0  # of the tokens that gave the last characters; later ones have none so far
        self._tail, self._tail_length = "", max(map(len, stop)) - 1  # the text before the tokens from `_end` on

    def add(self, token_id: int) -> bool:
        """Append a token, and return whether the text now contains a stop string."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._start :])
        new = text[len(self._decode(self._ids[self._start : self._end])) :]
        searched = self._tail + new
        if any(string in searched for string in self._stop):
            return True
        if new and not new.endswith(INCOMPLETE_CHAR):
            self._start, self._end = self._end, len(self._ids)
            self._tail = searched[max(0, len(searched) - self._tail_length) :]
        return False

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def text_before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first stop string that it contains."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]
