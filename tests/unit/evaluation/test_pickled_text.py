"""Text in a pickle: what Python writes for a str is read, and nothing else is."""

import contextlib
import os
import pickle
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.evaluation.pickled_text import decompress, read_pickled_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(TEXTS, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_text_is_read_as_pickle_reads_it(text: str, protocol: int) -> None:
    assert read_pickled_text(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("size", [0, 1, 255, 256, 2**16 - 9, 2**16, 2**20])
def test_long_text_is_read(size: int, protocol: int) -> None:
    for text in ("x" * size, "é" * size):
        assert read_pickled_text(pickle.dumps(text, protocol)) == text
        assert read_pickled_text(pickle._dumps(text, protocol)) == text  # type: ignore[attr-defined]


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


class HarmfulText(str):
    def __reduce_ex__(self, protocol: object) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


TEXT = pickle.dumps("ab", 4)
REFUSED = {
    "reduce": pickle.dumps(Harmful()),
    "reduce of a text": pickle.dumps(HarmfulText("ab")),
    "global": b"\x80\x04cos\nsystem\n.",
    "text, then a call": TEXT[:-1] + b"0cos\nsystem\n(X\x05\x00\x00\x00falsetR.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "list": pickle.dumps(["ab"]),
    "nested list": pickle.dumps([[["ab"]]]),
    "dict": pickle.dumps({"a": "b"}),
    "bytes": pickle.dumps(b"ab"),
    "number": pickle.dumps(7),
    "none": pickle.dumps(None),
    "two texts": b"\x80\x04\x8c\x01a\x8c\x01b.",
    "memo that is read": b"\x80\x04\x8c\x01a\x94h\x00.",
    "memo twice": b"\x80\x04\x8c\x01a\x94\x94.",
    "protocol 0": pickle.dumps("ab", 0),
    "protocol 9": b"\x80\x09" + TEXT[2:],
    "after the stop": TEXT + b"x",
    "no stop": TEXT[:-1],
    "truncated": TEXT[:-4],
    "length of 4 GiB": b"\x80\x04X\xff\xff\xff\xffab.",
    "length of 2^64": b"\x80\x04\x8d" + b"\xff" * 8 + b"ab.",
    "shorter than its text": b"\x80\x04\x8c\x01ab\x94.",
    "no UTF-8": b"\x80\x04\x8c\x01\xff.",
    "lone surrogate": pickle.dumps("\ud800"),
    "empty": b"",
    "text": b"ab",
    "JSON": b'["ab"]',
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(command))
    with pytest.raises(ValueError, match=r"not a pickle|codec can't decode"):
        read_pickled_text(REFUSED[name])


@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 255))
def test_changed_bytes_are_refused_or_a_text(data: bytes, at: int, value: int) -> None:
    changed = bytearray(pickle.dumps("ab" * 8, 4))
    changed[at % len(changed)] = value
    for content in (data, b"\x80\x04" + data, bytes(changed)):
        with contextlib.suppress(ValueError):
            assert isinstance(read_pickled_text(content), str)


def test_inflated_size_is_bounded() -> None:
    bomb = zlib.compress(b"\0" * 2**24)
    assert len(bomb) < 2**15
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        decompress(bomb, 1000)
    assert decompress(zlib.compress(b"x" * 1000), 1000) == b"x" * 1000


@pytest.mark.parametrize("data", [b"", b"ab", zlib.compress(b"ab")[:-1], zlib.compress(b"ab") + b"x"])
def test_corrupt_compression_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"truncated|header check"):
        decompress(data, 1000)
