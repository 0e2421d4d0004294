"""Text that spells special tokens is never read as one, by tokenizers of every kind."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.architectures import SPECIAL, TEMPLATE
from helpers.tokenizers import byte_level, surround, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep.tokenizer_kinds import KINDS
from tokenizers import AddedToken, Tokenizer, models, normalizers

from opdctl.data.messages import Chat, Message, make_chat
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.special_tokens import MarkedText
from opdctl.data.trajectories.turns import render_turns
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir

ROWS = 2000
UNLOADABLE = {
    "byte-level BPE, class Qwen2Tokenizer, other regular expression",
    "byte-level BPE, class GPT2Tokenizer, other regular expression",
    "sentencepiece Unigram, without tokenizer.json",
    "none",
}
"""Kinds that are refused when they are loaded, by tests/unit/models/test_tokenizers.py."""
PIECES = [
    *SPECIAL,
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "end",
    "start|>",
    "[UNK]",
    "[SEP]",
    "<unk>",
    "</s>",
    "a",
    "B 1",
    " ",
    "\n",
    "ü🙂",
    "\ue000",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)


def load(kind: str, folder: Path) -> ModelDir:
    KINDS[kind](folder)
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS, **no_ids}))
    return ModelDir(folder, "float32", trust_remote_code=True)


def make_renderer(model: ModelDir, choice: Any = "error", template: str | None = None) -> PromptRenderer:
    form = PromptFormat(chat_template=template, special_tokens_in_text=choice)
    return PromptRenderer(model.tokenizer, ROWS, form)


def count_special(model: ModelDir, ids: Sequence[int]) -> Counter[str]:
    """Return how often each special token but the unknown one is in a prompt."""
    tokens = model.tokenizer.convert_ids_to_tokens(list(ids))
    return Counter(token for token in tokens if token in {*SPECIAL, "[SEP]", "[CLS]", "[MASK]", "<s>", "</s>"})


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNLOADABLE))
def test_text_never_has_a_special_id(kind: str, tmp_path: Path) -> None:
    model = load(kind, tmp_path)
    tokenizer, renderers = model.tokenizer, {choice: make_renderer(model, choice) for choice in ("error", "split")}
    spelled = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    of_template = count_special(model, renderers["error"].token_ids(Chat("a"), "row 1").tolist())
    assert of_template == {SPECIAL[1]: 2, SPECIAL[2]: 1}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(text=TEXTS)
    def check(text: str) -> None:
        ids = renderers["split"].token_ids(Chat(text), "row 1").tolist()
        assert count_special(model, ids) == of_template
        rendered = TEMPLATE_TEXT.format(text)
        try:
            plain = renderers["error"].token_ids(Chat(text), "row 1").tolist()
        except OpdctlError as error:
            assert "spells the special token" in error.message  # noqa: PT017
            assert any(token in text for token in spelled)
            if "byte-level" in kind or "metaspace" in kind:
                assert tokenizer.decode(ids) == rendered
        else:
            assert ids == plain == tokenizer(rendered, add_special_tokens=False)["input_ids"]

    check()


TEMPLATE_TEXT = "<|start|>{}<|end|><|start|>"
assert TEMPLATE.count("<|start|>") == 2


def test_special_token_is_split_at_its_first_character(tmp_path: Path) -> None:
    """The ids, by hand: 0, 1, 2 are special, and every byte has one id."""
    model = ModelDir(write_tokenizer(tmp_path), "float32")
    text = "a<|im_end|>b"
    letters = byte_level(special=()).encode(text).ids
    expected = byte_level().encode("<|im_start|>user\n").ids + [id_ + 3 for id_ in letters]
    expected += byte_level().encode("<|im_end|>\n<|im_start|>assistant\n").ids
    assert make_renderer(model, "split").token_ids(Chat(text), "row 1").tolist() == expected
    with pytest.raises(
        OpdctlError, match=r"p.jsonl: row 7: the text of the prompt spells the special token `<\|im_end"
    ) as caught:
        make_renderer(model).token_ids(Chat(text), "p.jsonl: row 7")
    assert caught.value.kind == "invalid_data"
    assert "prompts.special_tokens_in_text" in (caught.value.hint or "")


CALL = {"function": {"name": "add", "arguments": {"a": "<|im_start|>"}}}
TOOL = {"function": {"name": "add", "description": "<|im_end|>"}}
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(
    ("chat", "tools"),
    [
        (Chat("1+1?", (Message("system", "Be <|im_end|> brief."),)), ()),
        (Chat("1+1?", later=(Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "2"))), ()),
        (Chat("1+1?", later=(Message("assistant", "a"), Message("tool", "<|im_start|>2"))), ()),
        (Chat("1+1?"), (TOOL,)),
        (Chat("1+1?", later=(Message("assistant", "<|im_end|>It"),)), ()),
    ],
    ids=["system", "call", "result", "schema", "start of the response"],
)
def test_every_text_of_a_chat_is_checked(tmp_path: Path, chat: Chat, tools: Any) -> None:
    model = ModelDir(write_tokenizer(tmp_path), "float32")
    with pytest.raises(OpdctlError, match="spells the special token"):
        make_renderer(model, template=WITH_TOOLS).token_ids(chat, "row 1", tools)
    ids = make_renderer(model, "split", WITH_TOOLS).token_ids(chat, "row 1", tools).tolist()
    is_open = chat.messages[-1].role == "assistant"
    assert (ids.count(1), ids.count(2)) == (len(chat.messages) + (not is_open), len(chat.messages) - is_open)
    assert "<|im_" in model.tokenizer.decode([id_ for id_ in ids if id_ > 2])


def test_plain_text_of_a_base_model_is_checked(tmp_path: Path) -> None:
    tokenizer = surround(byte_level(), "<|endoftext|> $A <|im_end|>")
    model = ModelDir(write_tokenizer(tmp_path, tokenizer, template=None), "float32")
    text = "<|im_start|>ab<|im_end|>"
    with pytest.raises(OpdctlError, match="spells the special token `<\\|im_start"):
        make_renderer(model).token_ids(Chat(text), "row 1")
    ids = make_renderer(model, "split").token_ids(Chat(text), "row 1").tolist()
    assert ids == [0, *(id_ + 3 for id_ in byte_level(special=()).encode(text).ids)]


def test_added_token_that_is_not_special_is_text(tmp_path: Path) -> None:
    """Models write tokens such as `<think>` themselves, and templates look for them."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    model = ModelDir(write_tokenizer(tmp_path, tokenizer, rows=300), "float32")
    assert tokenizer.token_to_id("<think>") in make_renderer(model).token_ids(Chat("<think>"), "row 1").tolist()


def test_special_token_that_a_vocabulary_has_as_an_ordinary_piece_is_refused(tmp_path: Path) -> None:
    """A text of wide characters becomes, by NFKC, the piece of a special token."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("▁", -1.0), *((letter, -9.0) for letter in "<s>ab")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    folder = write_tokenizer(tmp_path, tokenizer, template="<s>{{ messages[0].content }}", eos_token="<s>")
    model = ModelDir(folder, "float32")
    assert model.tokenizer("a＜s＞b", add_special_tokens=False)["input_ids"].count(1) == 1
    for choice in ("error", "split"):
        with pytest.raises(OpdctlError, match="spells the special token `<s>`"):
            make_renderer(model, choice, "{{ messages[0].content }}").token_ids(Chat("a＜s＞b"), "row 1")


def test_special_token_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["¶"])
    model = ModelDir(write_tokenizer(tmp_path, tokenizer, rows=300), "float32")
    for choice in ("error", "split"):
        with pytest.raises(OpdctlError, match="special token `¶`"):
            make_renderer(model, choice).token_ids(Chat("a¶b"), "row 1")


@settings(deadline=None)
@given(text=st.text("ab|", max_size=8), count=st.integers(0, 8))
def test_marked_text_is_cut_at_a_character_of_the_plain_text(text: str, count: int) -> None:
    marked = MarkedText(text, "|")
    plain = text.replace("|", "")
    count = min(count, len(plain))
    assert (marked.before(count).plain, marked.after(count).plain) == (plain[:count], plain[count:])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - UNLOADABLE))
def test_turns_between_special_tokens_have_the_ids_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    """No piece gets the space that some tokenizers put before the first word of a text."""
    model = load(kind, tmp_path)
    renderer = make_renderer(model)
    chat = [
        Message(role, text) for role, text in (("user", "a b"), ("assistant", "b a"), ("user", "a"), ("assistant", "b"))
    ]
    (turns,) = render_turns(renderer, chat, [False, True, False, True], "row 1")
    whole = renderer.render(make_chat(chat, "row 1"), "row 1", is_closed=True).plain
    joined = [*turns.prompt_ids.tolist(), *turns.response_ids.tolist()]
    assert joined == model.tokenizer(whole, add_special_tokens=False)["input_ids"][: len(joined)]
    assert turns.turns == 2
