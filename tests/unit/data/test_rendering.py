"""Prompts through chat templates and post-processors, and the test that a template must pass."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import CHATML, NUM_IDS, SPECIAL, byte_level, surround, write_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers

from opdctl.data import template_process
from opdctl.data.messages import Chat, Message
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir

END, IM_START, IM_END = range(3)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}"
    " {{ m.content | trim }} <|im_end|>{% endif %}{% endfor %}"
)
LLAMA_3_DATE = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n"
)
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
POWER = "{{ 10 ** (10 ** 9) }}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


def make_renderer(
    folder: Path, template: str | None = CHATML, tokenizer: Tokenizer | None = None, **arguments: Any
) -> PromptRenderer:
    model = ModelDir(write_tokenizer(folder, tokenizer, template=template), "float32")
    return PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat(arguments))


def render(renderer: PromptRenderer, text: str, *earlier: Message) -> str:
    return byte_level().decode(renderer.token_ids(Chat(text, earlier), "p.jsonl").tolist(), skip_special_tokens=False)


# ── The test of a template ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\nab 1<|im_end|>\n<|im_start|>assistant\n"),
        (PARTS, "<|im_start|>user\nab 1<|im_end|>\n<|im_start|>assistant\n"),
        (LLAMA_2, "[INST] ab 1 [/INST]"),  # no generation prompt: the answer follows directly
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ab 1"),
        ("{{ messages[0].content if messages[0].content is string else 'parts' }}?", "ab 1?"),
    ],
    ids=["strings", "parts", "no generation prompt", "text alone", "strings come first"],
)
def test_rendered_prompt(tmp_path: Path, template: str, expected: str) -> None:
    assert render(make_renderer(tmp_path, template), "ab 1") == expected


@pytest.mark.parametrize(
    "template",
    [
        "<|im_start|>user\n<|im_end|>\n",
        "{{ messages[0].content | upper }}",
        "{{ messages[0].content[:10] }}",
        CHATML.partition("{% if add")[0],  # an assistant's turn has a header, which the prompt lacks
        "{{ messages[0].content",
        "{{ raise_exception('only with a system prompt') }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.no.such.attribute }}",
    ],
    ids=["no text", "other text", "cut text", "no header", "syntax", "raises", "error", "undefined"],
)
def test_template_that_loses_the_prompt_is_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(OpdctlError) as caught:
        make_renderer(tmp_path, template)
    assert (caught.value.kind, caught.value.code) == ("unsupported_model", ExitCode.USAGE)
    assert str(tmp_path) in caught.value.message
    assert "template" in caught.value.message


@pytest.mark.parametrize("template", [LOOP + CHATML, PARTS + LOOP, POWER + CHATML], ids=["before", "after", "C"])
def test_template_without_an_end_is_refused(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.2)
    with pytest.raises(OpdctlError) as caught:
        make_renderer(tmp_path, template)
    assert caught.value.kind == "unsupported_model"
    assert f"{tmp_path}: the chat template takes more than 0.2 s of processor time" in caught.value.message


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**11 }}", "needs more than 256 MiB of memory"),
        ("{{ '%0999999999d' % 1 }}", "needs more than 256 MiB of memory"),
        (DOUBLING, "needs more than 256 MiB of memory"),
        ("{{ 'a' * 2000000 }}", "makes a prompt of 20"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot be rendered: maximum recursion depth"),
        ("(" * 10 + "{{" + "(" * 10**5 + "1" + ")" * 10**5 + "}}", "cannot be rendered: "),
        ("{{ raise_exception('a' * 10**7) }}", "cannot be rendered: aaa"),
    ],
    ids=["repeat", "format", "doubling", "output", "recursion", "depth", "message"],
)
def test_template_that_takes_memory_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(OpdctlError) as caught:
        make_renderer(tmp_path, template + CHATML)
    assert f"{tmp_path}: the chat template {reason}" in caught.value.message
    assert len(caught.value.message) < 1000


def test_template_without_an_end_for_one_prompt_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.2)
    renderer = make_renderer(tmp_path, "{% if 'bomb' in messages[0].content %}" + LOOP + "{% endif %}" + CHATML)
    assert "ab 1" in render(renderer, "ab 1")
    for text in ("a bomb", "ab 1"):  # the process has ended
        with pytest.raises(OpdctlError, match=r"p.jsonl: .*template of .* takes more than 0.2 s") as caught:
            render(renderer, text)
        assert (caught.value.kind, caught.value.code) == ("invalid_data", ExitCode.BAD_DATA)
        assert str(tmp_path) in caught.value.message


def test_many_prompts_have_more_time_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.3)
    busy = "{% for i in range(40000) %}{% endfor %}"
    renderer, used = make_renderer(tmp_path, busy + CHATML), os.times().children_user
    for _ in range(1000):
        assert "ab 1" in render(renderer, "ab 1")
    del renderer  # the process is waited for
    assert os.times().children_user - used > 0.3


def test_process_that_waits_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MAX_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(template_process, "_render", lambda *request: time.sleep(600))
    with pytest.raises(OpdctlError, match=r"does not finish within 0\.2 s"):
        make_renderer(tmp_path)


def test_chats_rendered_ahead_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    renderer, texts = make_renderer(tmp_path), [f"ab {i}" for i in range(20)]
    expected = [render(renderer, text) for text in texts]
    renderer.render_ahead([(Chat(text), ()) for text in texts])
    sent = renderer._template._ahead
    assert len(sent) == 20
    assert [render(renderer, text) for text in texts] == expected
    assert not sent
    for order in (texts[::-1], texts[5:], [*texts, *texts]):  # others than were sent
        renderer.render_ahead([(Chat(text), ()) for text in texts])
        assert [render(renderer, text) for text in order] == [expected[texts.index(text)] for text in order]


def test_chat_that_ends_the_process_is_named_among_those_rendered_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.2)
    failing = "{{ raise_exception('no 3') if messages[0].content == 'ab 3' else '' }}"
    renderer = make_renderer(
        tmp_path, "{% if 'bomb' in messages[0].content %}" + LOOP + "{% endif %}" + failing + CHATML
    )
    texts = ["ab 1", "ab 2", "ab 3", "ab 4", "a bomb", "ab 6"]
    renderer.render_ahead([(Chat(text), ()) for text in texts])
    for text, reason in zip(texts, ("", "", "no 3", "", "takes more than", "takes more than"), strict=True):
        if reason:
            with pytest.raises(OpdctlError, match=reason):
                render(renderer, text)
        else:
            assert text in render(renderer, text)


def test_fork_leaves_the_process_to_its_parent(tmp_path: Path) -> None:
    """A fork that forgets the tokenizer, or ends, must not end it."""
    template = template_process.TemplateProcess(
        ModelDir(write_tokenizer(tmp_path, template=CHATML), "float32").tokenizer
    )
    child = os.fork()
    if not child:
        template._end()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render([{"role": "user", "content": "Hello"}], {})[0].startswith("<|im_start|>user\nHello")


def test_prompt_that_a_pattern_of_the_tokenizer_cannot_read_is_named(tmp_path: Path) -> None:
    """The error of the library is no Exception."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(q|q)+(?=\d\z)"), "isolated")
    renderer = make_renderer(tmp_path, CHATML, tokenizer)
    with pytest.raises(OpdctlError, match=r"p.jsonl: row 7: cannot be tokenized: Onig") as caught:
        renderer.token_ids(Chat("q" * 40), "p.jsonl: row 7")
    assert caught.value.code == ExitCode.BAD_DATA


def test_default_of_several_templates_is_used(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    model = ModelDir(folder, "float32")
    assert isinstance(model.tokenizer.chat_template, dict)
    assert "<|im_start|>user\nab" in render(PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat()), "ab")


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    template = CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}"
    assert not render(make_renderer(tmp_path, template), "ab").endswith("</think>")
    assert render(make_renderer(tmp_path, template, enable_thinking=False), "ab").endswith("</think>")


# ── The clock ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "argument"),
    [(LLAMA_3_DATE + CHATML, "date_string"), ("{{ strftime_now('%H:%M:%S') }}" + CHATML, None)],
)
def test_template_with_a_clock_is_warned_of_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, argument: str | None
) -> None:
    make_renderer(tmp_path, template)
    warning = capsys.readouterr().err
    assert "warning" in warning
    assert str(tmp_path) in warning
    assert ("prompts.template_arguments" in warning) == (argument is not None)
    make_renderer(tmp_path, template)
    assert capsys.readouterr().err == ""
    if argument:
        assert f"{{ {argument} = " in warning
        assert "1 May 2024" in render(make_renderer(tmp_path / "fixed", template, **{argument: "1 May 2024"}), "ab")
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("template", [CHATML, CHATML + "{% if false %}{{ strftime_now('%d') }}{% endif %}"])
def test_template_that_does_not_read_the_clock_is_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str
) -> None:
    make_renderer(tmp_path, template)
    assert capsys.readouterr().err == ""


# ── Base models ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("post_processor", "before"),
    [
        ("$A", []),
        ("<|im_start|> $A", [IM_START]),
        ("$A <|im_end|>", []),
        ("<|im_start|> $A <|im_end|>", [IM_START]),
        ("<|endoftext|> <|im_start|> $A <|im_end|> <|endoftext|>", [END, IM_START]),
    ],
)
@pytest.mark.parametrize("text", ["ab", "a", "aaaa"])
def test_prompt_of_a_base_model_ends_with_its_text(
    tmp_path: Path, post_processor: str, before: list[int], text: str
) -> None:
    renderer = make_renderer(tmp_path, None, surround(byte_level(), post_processor))
    expected = before + byte_level().encode(text, add_special_tokens=False).ids
    assert renderer.token_ids(Chat(text), "p.jsonl").tolist() == expected


def test_missing_template_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        make_renderer(tmp_path, None)
    assert capsys.readouterr().err.count(f"{tmp_path}: no chat template") == 1


def test_chat_prompt_has_no_token_of_the_post_processor(tmp_path: Path) -> None:
    processed = surround(byte_level(), "<|endoftext|> $A <|im_end|>")
    assert make_renderer(tmp_path, CHATML, processed).token_ids(Chat("ab"), "p.jsonl")[0] == IM_START


# ── Chats ────────────────────────────────────────────────────────────────────────────────────────────────────────────

EARLIER = (Message("system", " Be brief.\n"), Message("user", "1+1?"), Message("assistant", "2"))


@pytest.mark.parametrize("template", [CHATML, PARTS], ids=["strings", "parts"])
def test_chat_is_rendered_message_by_message(tmp_path: Path, template: str) -> None:
    expected = (
        "<|im_start|>system\n Be brief.\n<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(make_renderer(tmp_path, template), "2+2?", *EARLIER) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}{{ m.content }}|{% endfor %}",
        "{{ messages[-1].content }}|",
        "{% for m in messages %}{{ m.content | upper if m.role == 'system' else m.content }}|{% endfor %}",
    ],
    ids=["no system", "last alone", "other text"],
)
def test_template_that_drops_a_message_is_refused(tmp_path: Path, template: str) -> None:
    renderer = make_renderer(tmp_path, template)
    assert render(renderer, "2+2?") == "2+2?|"
    with pytest.raises(OpdctlError, match=r"p.jsonl: .*message 1, role `system`") as caught:
        render(renderer, "2+2?", *EARLIER)
    assert caught.value.kind == "invalid_data"


def test_chat_needs_a_template(tmp_path: Path) -> None:
    """Without a template, one message is plain text, and several are an error."""
    renderer = make_renderer(tmp_path, None)
    assert render(renderer, "2+2?") == "2+2?"
    with pytest.raises(OpdctlError, match=r"p.jsonl: .*`system`, `user`, `assistant`.* need a chat template") as caught:
        render(renderer, "2+2?", *EARLIER)
    assert caught.value.kind == "invalid_data"


def test_template_may_cut_white_space_and_answers(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content | trim }}|{% endfor %}"
    assert render(make_renderer(tmp_path, template), "2+2?", *EARLIER) == "Be brief.|1+1?|2+2?|"


# ── The vocabulary ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_id_outside_the_vocabulary_is_refused_with_its_token(tmp_path: Path) -> None:
    """The tokenizer has one id more than the matrices have rows."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>"])
    renderer = make_renderer(tmp_path, CHATML, tokenizer)
    assert len(renderer.token_ids(Chat("think"), "p.jsonl")) > len(SPECIAL)
    with pytest.raises(OpdctlError) as caught:
        renderer.token_ids(Chat("a <think>"), "p.jsonl: row 7: prompt `x`")
    assert (caught.value.kind, caught.value.code) == ("invalid_data", ExitCode.BAD_DATA)
    assert all(part in caught.value.message for part in ("p.jsonl: row 7", "`<think>`", str(NUM_IDS)))
