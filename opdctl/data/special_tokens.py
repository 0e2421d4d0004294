"""Special tokens that the text of a prompt spells, such as "<|im_end|>": found, and read as plain text.

A chat template frames messages by special tokens, and its result is one text. What a message spells would be read as
the end of its turn. Therefore a mark is put into it before the template is rendered, and the result is tokenized in
pieces, cut at the marks. A prompt without such text is one piece: its ids are the ordinary ones. Imports no torch.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = range(0xE000, 0xF8FF)
"""The code points of private use, of which one that is in no text is the mark."""

UNKNOWN_CHARACTER = "\U00013000"
"""A hieroglyph, which is bytes or unknown in a vocabulary."""


@dataclass(frozen=True)
class MarkedText:
    """A text with a mark in each special token that a message in it spells. mark: "" if there is none. spelled: the
    first of these tokens."""

    text: str
    mark: str = ""
    spelled: str | None = None

    @property
    def plain(self) -> str:
        """The text without marks."""
        return self.text.replace(self.mark, "") if self.mark else self.text

    def after(self, count: int) -> "MarkedText":
        """Return what follows the first `count` characters of the plain text."""
        pieces = self.text.split(self.mark) if self.mark else [self.text]
        while count > len(pieces[0]):
            count -= len(pieces.pop(0))
        return replace(self, text=self.mark.join([pieces[0][count:], *pieces[1:]]))

    def before(self, count: int) -> "MarkedText":
        """Return the first `count` characters of the plain text."""
        pieces = self.text.split(self.mark) if self.mark else [self.text]
        kept = []
        while count > len(pieces[0]):
            kept.append(pieces[0])
            count -= len(pieces.pop(0))
        return replace(self, text=self.mark.join([*kept, pieces[0][:count]]))


class SpecialTokens:
    """The special tokens of a tokenizer. Added tokens that are not special, such as Qwen's `<think>`, are text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._contents = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda each: (-len(each), each))
        self._pattern = re.compile("|".join(map(re.escape, self._contents)) or r"(?!)")

    def first_in(self, texts: Sequence[str]) -> str | None:
        """Return the first special token that a text spells."""
        return next((match[0] for text in texts if (match := self._pattern.search(text))), None)

    def remove_from(self, text: str) -> str:
        """Return the text without special tokens, as `skip_special_tokens` leaves it."""
        return self._pattern.sub("", text)

    def mark(self, text: str, mark: str) -> str:
        """Return the text with a mark after the first character of each special token in it."""
        changed = self._pattern.sub(lambda match: match[0][:1] + mark * (len(match[0]) > 1) + match[0][1:], text)
        return changed if changed == text else self.mark(changed, mark)  # another may overlap, or be a part of it

    def encode(self, marked: MarkedText, *, is_continuation: bool = False) -> tuple[list[int], str | None]:
        """Return the ids of a text without its marks, and a special token among them that the text spells and that
        cannot be split, as the vocabulary of some tokenizers has it as an ordinary piece, too.

        is_continuation: other tokens precede the text.
        """
        text = marked.text
        first, *others = text.split(marked.mark) if marked.mark else [text]
        ids = self._encode_continuation(first) if is_continuation else self._encode(first)
        for piece in others:
            ids += self._encode_continuation(piece)
        found = Counter(self._tokenizer.convert_ids_to_tokens([id_ for id_ in ids if id_ in self._ids]))
        return ids, next(iter(found - Counter(self._pattern.findall(text))), None)

    def end_of_last(self, marked: MarkedText) -> int:
        """Return the index in the plain text after the last special token, or 0. One that a message spells is text."""
        ends = [match.end() for match in self._pattern.finditer(marked.text)]
        return len(replace(marked, text=marked.text[: ends[-1]]).plain) if ends else 0

    @cached_property
    def _ids(self) -> frozenset[int]:
        """The ids of the special tokens but for that of unknown characters, which any text may have."""
        try:
            unknown = self._encode(UNKNOWN_CHARACTER)
        except Exception:  # tokenizers raises bare Exception: there is no token for unknown characters
            unknown = []
        ids = {self._tokenizer.convert_tokens_to_ids(name) for name in self._contents}
        return frozenset(ids - {*unknown, None})

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that other text precedes: some tokenizers put a space before the first word."""
        for name in self._contents:
            id_ = self._tokenizer.convert_tokens_to_ids(name)
            before, *ids = self._encode(name + text) or [-1]
            if before == id_ and self._encode(name) == [id_]:
                return ids
        return self._encode(text)


def choose_mark(texts: Sequence[str]) -> str:
    """Return a character that is in no text."""
    used = set().union(*texts)
    return next(chr(point) for point in MARKS if chr(point) not in used)
