"""The token that completes a stop string, compared with decoding every prefix of the response."""

import pytest
from helpers.engines import directory
from helpers.tokenizers import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from opdctl.engines.stop_strings import StopSearch, text_before_stop

MERGES = [("a", "b"), ("ab", "c"), ("Ċ", "Q"), ("Ċ", "Ċ")]
BYTES = PreTrainedTokenizerFast(tokenizer_object=byte_level(MERGES, ["<end>"]), eos_token="<end>")
"""Characters and strings span tokens."""
BYTES.clean_up_tokenization_spaces = False
TEXTS = ["a", "b", "c", "abc", "\n", "Q", "\n\n", "é", "好", "🙂", " "]


def first_match(tokenizer, ids, stop):
    """Return the number of tokens after which the decoded text contains a stop string, None if it never does."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if any(string in text for string in stop):
            return count
    return None


def search(tokenizer, ids, stop):
    found = StopSearch(tokenizer, stop)
    return next((count for count, token in enumerate(ids, 1) if found.add(token)), None)


pieces = st.sampled_from(
    [BYTES.encode(text, add_special_tokens=False) for text in TEXTS] + [[BYTES.eos_token_id], [0xC3], [188]]
)
stops = st.lists(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map("".join), min_size=1, max_size=3)


@given(st.lists(pieces, max_size=30), stops)
@settings(max_examples=300, deadline=None)
def test_search_finds_the_first_token_by_which_the_text_contains_a_stop_string(response, stop):
    ids = [token for piece in response for token in piece]
    assert search(BYTES, ids, stop) == first_match(BYTES, ids, stop)


@given(st.lists(st.integers(0, 51), max_size=30), st.lists(st.integers(2, 51), min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_search_in_the_text_of_words(ids, wanted):
    tokenizer = directory("toy:student").tokenizer
    stop = [tokenizer.decode(wanted, skip_special_tokens=True)]
    if stop[0]:
        assert search(tokenizer, ids, stop) == first_match(tokenizer, ids, stop)


def test_string_across_tokens_and_special_tokens():
    ids = [*BYTES.encode("x\n"), BYTES.eos_token_id, *BYTES.encode("Question: y")]
    assert search(BYTES, ids, ["\nQuestion:"]) == len(ids) - 2


@pytest.mark.parametrize(("text", "before"), [("4\nQ: a\nQ: b", "4"), ("4", "4"), ("STOP", ""), ("4 END\nQ: ", "4 ")])
def test_text_before_a_stop_string(text, before):
    assert text_before_stop(text, ["\nQ:", "STOP", "END"]) == before


def test_time_of_a_search_does_not_depend_on_the_length():
    """Each token is decoded at most twice in texts of few tokens each."""
    decoded = []

    class Counting:
        def decode(self, ids, skip_special_tokens):
            decoded.append(len(ids))
            return BYTES.decode(ids, skip_special_tokens=skip_special_tokens)

    assert search(Counting(), BYTES.encode("🙂 hello" * 300), ["STOP"]) is None
    assert max(decoded) <= 8
