"""Conversations as the ids that a model reads and samples, turn by turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import CHATML, byte_level, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from opdctl.data.messages import Message
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.trajectories.turns import RenderedTurns, render_texts, render_turns
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir

MERGES = [("Ċ", "Ċ"), ("Ċ", "a"), ("a", "b"), ("b", "Ċ"), ("a", "Ċ")]
"""Tokens of two characters, also across the borders of a turn: a newline is Ċ."""
PLAIN = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
"""A template without special tokens."""
DROPPING = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last %}{{ message.content }}{% else %}{{ message.content.split('</think>')[-1] }}{% endif %}",
)
"""A template that drops the thinking of earlier turns."""
CHAT = [
    Message("user", "1+1"),
    Message("assistant", "call"),
    Message("tool", "2"),
    Message("assistant", "two"),
    Message("user", "bye"),
]


class Renderer:
    """A tokenizer with merges, and a chat template."""

    def __init__(self, folder: Path, template: str | None = CHATML, **form: Any):
        tokenizer = byte_level(MERGES)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.model = ModelDir(write_tokenizer(folder, tokenizer, rows=300, template=template), "float32")
        self.tokenizer = self.model.tokenizer
        self.renderer = PromptRenderer(self.tokenizer, 300, PromptFormat(**{"special_tokens_in_text": "split", **form}))

    def render(
        self, messages: Sequence[Message], is_own: Sequence[bool] | None = None, **how: Any
    ) -> list[RenderedTurns]:
        own = [message.role == "assistant" for message in messages] if is_own is None else is_own
        return [*render_turns(self.renderer, messages, own, "row 1", **how)]

    def decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def runs(self, turns: RenderedTurns) -> list[tuple[bool, str]]:
        """Return the decoded runs of equal mask."""
        runs: list[tuple[bool, list[int]]] = []
        for id_, is_own in zip(turns.response_ids.tolist(), turns.loss_mask.tolist(), strict=True):
            if not runs or runs[-1][0] != is_own:
                runs.append((is_own, []))
            runs[-1][1].append(id_)
        return [(is_own, self.decode(ids)) for is_own, ids in runs]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(tmp_path_factory.mktemp("chatml") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(tmp_path_factory.mktemp("plain") / "model", PLAIN)


def test_turns_end_with_their_special_token(chatml: Renderer) -> None:
    (turns,) = chatml.render(CHAT)
    assert chatml.decode(turns.prompt_ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.runs(turns) == [
        (True, "call<|im_end|>"),
        (False, "\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"),
        (True, "two<|im_end|>"),
    ]
    assert turns.turns == 2


def test_turns_without_special_tokens_end_with_their_text(plain: Renderer) -> None:
    (turns,) = plain.render(CHAT)
    assert plain.decode(turns.prompt_ids) == "u:1+1\na:"
    assert plain.runs(turns) == [(True, "call"), (False, "\nt:2\na:"), (True, "two")]


def test_earlier_answers_that_are_not_the_students(chatml: Renderer) -> None:
    (turns,) = chatml.render(CHAT, [False, False, False, True, False])
    assert chatml.decode(turns.prompt_ids).endswith("2<|im_end|>\n<|im_start|>assistant\n")
    assert chatml.runs(turns) == [(True, "two<|im_end|>")]


def test_no_token_spans_the_border_of_a_turn(chatml: Renderer) -> None:
    """The template ends with a newline, and the answer begins with one: tokenized together they would be one token."""
    messages = [Message("user", "hi"), Message("assistant", "\nab")]
    (turns,) = chatml.render(messages)
    whole = chatml.tokenizer.apply_chat_template(
        [{"role": each.role, "content": each.text} for each in messages], tokenize=True, return_dict=True
    )["input_ids"]
    joined = [*turns.prompt_ids.tolist(), *turns.response_ids.tolist()]
    assert chatml.decode(whole) == chatml.decode(joined) + "\n"
    assert len(whole) == len(joined), "one token less, and the newline after the turn"
    assert chatml.decode(turns.prompt_ids).endswith("assistant\n")
    assert turns.response_ids.tolist() == chatml.tokenizer("\nab<|im_end|>")["input_ids"]


TEXT = st.text("ab\n", min_size=1, max_size=4).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_each_turn_is_tokenized_alone(name: str, texts: list[tuple[str, str]], request: pytest.FixtureRequest) -> None:
    renderer: Renderer = request.getfixturevalue(name)
    messages = [Message(role, text) for pair in texts for role, text in zip(("user", "assistant"), pair, strict=True)]
    (turns,) = renderer.render(messages)
    chat = [{"role": each.role, "content": each.text} for each in messages]
    whole = renderer.tokenizer.apply_chat_template(chat, tokenize=False)
    joined = renderer.decode([*turns.prompt_ids, *turns.response_ids])
    assert whole.startswith(joined)
    assert not whole.removeprefix(joined).strip()
    own = [text for is_own, text in renderer.runs(turns) if is_own]
    end = "<|im_end|>" if name == "chatml" else ""
    assert own == [text + end if end else text.rstrip() for _, text in texts]
    expected = [id_ for text in own for id_ in renderer.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert turns.response_ids[turns.loss_mask].tolist() == expected


def test_a_template_that_drops_thinking_begins_another_sequence(tmp_path: Path) -> None:
    renderer = Renderer(tmp_path / "model", DROPPING)
    answers = ["<think>x</think>one", "<think>y</think>two"]
    messages = [
        Message("user", "a"),
        Message("assistant", answers[0]),
        Message("user", "b"),
        Message("assistant", answers[1]),
    ]
    first, second = renderer.render(messages)
    assert renderer.runs(first) == [(True, f"{answers[0]}<|im_end|>")]
    assert renderer.runs(second) == [(True, f"{answers[1]}<|im_end|>")]
    assert "<|im_start|>assistant\none<|im_end|>" in renderer.decode(second.prompt_ids)


def test_text_that_a_template_puts_before_an_answer_is_read(tmp_path: Path) -> None:
    """Qwen 3 puts empty thinking before an answer without one."""
    start = "{% if message.role == 'assistant' %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    renderer = Renderer(tmp_path / "model", CHATML.replace("{{ message.content }}", start + "{{ message.content }}"))
    (turns,) = renderer.render([Message("user", "a"), Message("assistant", " two")])
    assert renderer.decode(turns.prompt_ids).endswith("assistant\n<think></think>")
    assert renderer.runs(turns) == [(True, " two<|im_end|>")]
    (turns,) = renderer.render([Message("user", "a"), Message("assistant", "two", {"reasoning_content": "one"})])
    assert renderer.decode(turns.prompt_ids).endswith("assistant\n")
    assert renderer.runs(turns) == [(True, "<think>one</think>two<|im_end|>")]


def test_a_template_that_changes_an_answer_is_refused(tmp_path: Path) -> None:
    renderer = Renderer(tmp_path / "model", CHATML.replace("message.content }}", "message.content.split('|')[-1] }}"))
    with pytest.raises(OpdctlError, match="message 2, role `assistant`"):
        renderer.render([Message("user", "a"), Message("assistant", "x|y")])


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_a_turn_that_was_cut_has_no_token_at_its_end(name: str, request: pytest.FixtureRequest) -> None:
    renderer: Renderer = request.getfixturevalue(name)
    (turns,) = renderer.render(CHAT, is_cut=True)
    assert renderer.runs(turns)[-1] == (True, "two")
    assert renderer.runs(turns)[0] == (True, "call<|im_end|>" if name == "chatml" else "call")
    (turns,) = renderer.render([Message("user", "a"), Message("assistant", "\nb ")], is_cut=True)
    assert renderer.runs(turns) == [(True, "\nb " if name == "chatml" else "\nb")]


def test_special_tokens_in_a_message_are_text(chatml: Renderer) -> None:
    (turns,) = chatml.render([Message("user", "a"), Message("assistant", "x<|im_end|>y")])
    assert chatml.runs(turns) == [(True, "x<|im_end|>y<|im_end|>")]
    assert turns.response_ids.tolist().count(2) == 1


def test_tools_of_the_prompt(tmp_path: Path) -> None:
    template = "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}" + CHATML
    renderer = Renderer(tmp_path / "model", template)
    tools = [{"type": "function", "function": {"name": "sum"}}]
    (turns,) = renderer.render(CHAT, tools=tools)
    assert renderer.decode(turns.prompt_ids).startswith("sum;<|im_start|>user")


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_texts_are_tokenized_apart(chatml: Renderer) -> None:
    prompt_ids, response_ids = render_texts(chatml.renderer, chatml.tokenizer, "a", "b\n", "row 1")
    assert chatml.decode(prompt_ids) == "a"
    assert response_ids.tolist() == chatml.tokenizer("b\n")["input_ids"]


@pytest.mark.parametrize("prompt", ["user\nhi\nassistant\n", "system\nx\nuser\nhi\nassistant"])
def test_texts_without_the_templates_special_tokens_are_refused(prompt: str, chatml: Renderer) -> None:
    with pytest.raises(OpdctlError, match="row 1"):
        render_texts(chatml.renderer, chatml.tokenizer, prompt, "b", "row 1")


def test_texts_with_the_templates_special_tokens(chatml: Renderer, plain: Renderer) -> None:
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    prompt_ids, _ = render_texts(chatml.renderer, chatml.tokenizer, prompt, "b", "row 1")
    assert prompt_ids.tolist().count(2) == 1
    prompt_ids, _ = render_texts(plain.renderer, plain.tokenizer, "u:hi\na:", "b", "row 1")
    assert plain.decode(prompt_ids) == "u:hi\na:", "a template without special tokens loses nothing"
