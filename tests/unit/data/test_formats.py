"""System turns, chat templates, tools and arguments: of the student, of teachers, and in evaluations."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import CHATML, byte_level, write_tokenizer

from opdctl.data.formats import evaluation_format, read_chat_templates, teacher_formats, training_format
from opdctl.data.messages import Chat, Message
from opdctl.data.prompts import Problem, tokenize
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.prompts import Prompts
from opdctl.recipe.schema import Recipe

TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if thinks %}<think>{% endif %}"
)
ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
MODEL = {"model": "none"}


def make_recipe(**sections: Any) -> Recipe:
    values = {"student": MODEL, "teacher": MODEL, "train": {"steps": 1}, "prompts": {}}
    return Recipe.model_validate({**values, **sections})


def render(folder: Path, form: PromptFormat, chat: Chat, tools: Any = (), template: str | None = CHATML) -> str:
    model = ModelDir(write_tokenizer(folder, template=template), "float32")
    ids = PromptRenderer(model.tokenizer, model.vocab_size, form).token_ids(chat, "p.jsonl: row 7", tools)
    return byte_level().decode(ids.tolist(), skip_special_tokens=False)


def turns(*pairs: tuple[str, str]) -> str:
    """Return ChatML with the generation prompt, by hand."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs) + "<|im_start|>assistant\n"


# ── The system turn ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("system", "expected"), [(None, "Old."), ("New.", "New."), ("", None)], ids=["as it is", "replaced", "removed"]
)
def test_system_turn(tmp_path: Path, system: str | None, expected: str | None, role: str) -> None:
    form, user = PromptFormat(system=system), ("user", "1+1?")
    with_turn = render(tmp_path, form, Chat("1+1?", (Message(role, "Old."),)))
    name = role if system is None else "system"
    assert with_turn == turns(*([(name, expected)] if expected else []), user)
    assert render(tmp_path, form, Chat("1+1?")) == turns(*([("system", system)] if system else []), user)


def test_system_turn_needs_a_template_that_has_it(tmp_path: Path) -> None:
    form = PromptFormat(system="New.")
    with pytest.raises(OpdctlError, match=r"prompts.system: .* has no chat template") as caught:
        render(tmp_path, form, Chat("1+1?"), template=None)
    assert caught.value.kind == "unsupported_setting"
    for template, reason in (
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
        ("{% set messages = messages[-1:] %}", "drops or changes message 1, role `system`"),
    ):
        with pytest.raises(OpdctlError, match=rf"p.jsonl: row 7: .*{reason}") as caught:
            render(tmp_path, form, Chat("1+1?"), template=template + CHATML)
        assert caught.value.kind == "invalid_data"


# ── Templates, tools, and the start of a response ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", [CHATML, None], ids=["other template", "none"])
def test_file_replaces_the_template_of_the_tokenizer(tmp_path: Path, template: str | None) -> None:
    form = PromptFormat(chat_template="{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert render(tmp_path, form, Chat("1+1?", (Message("user", "a"),)), template=template) == "a|1+1?|"
    with pytest.raises(OpdctlError, match="the chat template drops or changes the text of a prompt"):
        render(tmp_path, PromptFormat(chat_template="hello"), Chat("1+1?"), template=template)


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"", "is empty"), (b"\xff", "utf-8")])
def test_template_file_must_be_readable(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OpdctlError, match=rf"prompts.chat_template: .*chat.jinja: .*{reason}"):
        read_chat_templates(make_recipe(prompts={"chat_template": str(file)}))


def test_tools_and_their_calls_reach_the_template(tmp_path: Path) -> None:
    later = (Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", 'a "2"'))
    expected = turns(
        ("tools", '{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}'),
        ("user", "1+1?"),
        ("assistant", 'add({"a": 1})'),
        ("tool", 'a "2"'),
    )
    assert render(tmp_path, PromptFormat(), Chat("1+1?", later=later), (ADD,), TOOLS) == expected
    in_json = TOOLS.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    expected = expected.replace('a "2"', r'"a \"2\""')
    assert render(tmp_path, PromptFormat(), Chat("1+1?", later=later), (ADD,), in_json) == expected


def test_template_that_ignores_tools_or_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpdctlError, match=r"row 7: the chat template drops or changes the tools"):
        render(tmp_path, PromptFormat(), Chat("1+1?"), (ADD,))
    later = (Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "2"))
    with pytest.raises(OpdctlError, match=r"row 7: .*the tool calls of message 2, role `assistant`"):
        render(tmp_path, PromptFormat(), Chat("1+1?", later=later))


@pytest.mark.parametrize("start", ["It is", "It is  ", ""])
def test_response_continues_the_message_of_the_assistant(tmp_path: Path, start: str) -> None:
    chat = Chat("1+1?", later=(Message("assistant", start),))
    assert render(tmp_path, PromptFormat(), chat) == turns(("user", "1+1?")) + start
    tokenizer = ModelDir(write_tokenizer(tmp_path), "float32").tokenizer
    messages = [{"role": each.role, "content": each.text} for each in chat.messages]
    expected = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert render(tmp_path, PromptFormat(), chat) == expected


def test_chat_that_the_template_refuses_names_the_row(tmp_path: Path) -> None:
    alternating = "{% if messages | length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(OpdctlError, match=r"p.jsonl: row 7: .*roles must alternate") as caught:
        render(tmp_path, PromptFormat(), Chat("b", (Message("user", "a"),)), template=alternating + CHATML)
    assert caught.value.kind == "invalid_data"


# ── Teachers and evaluations ─────────────────────────────────────────────────────────────────────────────────────────


def test_unset_settings_of_a_teacher_are_those_of_the_student(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jinja" for name in ("prompts", "b")}
    for name, file in files.items():
        file.write_text(name)
    shared = {"template_arguments": {"thinks": False}, "system": "S", "special_tokens_in_text": "split"}
    teachers: dict[str, Any] = {
        "a": {**MODEL, "template_arguments": {}},
        "b": {**MODEL, "system": "", "chat_template": str(files["b"])},
        "c": MODEL,
    }
    prompts = {**shared, "chat_template": str(files["prompts"]), "teacher_column": "who"}
    recipe = make_recipe(teacher=None, teachers=teachers, prompts=prompts)
    templates = read_chat_templates(recipe)
    assert templates == {"prompts": "prompts", "teachers.b": "b"}
    student = PromptFormat({"thinks": False}, "S", "prompts", "split")
    assert training_format(recipe, templates) == student
    of_a, of_b = PromptFormat({}, "S", "prompts", "split"), PromptFormat({"thinks": False}, "", "b", "split")
    assert teacher_formats(recipe, templates) == {"teacher-a": of_a, "teacher-b": of_b}
    by_model = {"student": student, "teacher-a": of_a, "teacher-b": of_b, "teacher-c": student, "model": student}
    for name, expected in by_model.items():
        assert evaluation_format(recipe, name, templates) == expected
    chosen = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"system": "", "template_arguments": {}})})
    for name in by_model:
        template = "b" if name == "teacher-b" else "prompts"
        assert evaluation_format(chosen, name, templates) == PromptFormat({}, "", template, "split")


def test_each_prompt_is_rendered_for_its_teacher(tmp_path: Path) -> None:
    """A thinking teacher, one with a system turn, and one that reads the student's prompt."""
    model = ModelDir(write_tokenizer(tmp_path, template=TOOLS), "float32")

    def renderer(**settings: Any) -> PromptRenderer:
        return PromptRenderer(model.tokenizer, model.vocab_size, PromptFormat(**settings), "teacher")

    teachers = {"teacher-a": renderer(arguments={"thinks": True}), "teacher-b": renderer(system="S"), "teacher-c": None}
    problems = [Problem(name, "q", None, name, tools=(ADD,)) for name in "abc"]
    problems += [Problem(f"{name}-told", "q", None, name, Chat("hint q"), tools=(ADD,)) for name in "abc"]
    prompts, _ = tokenize(problems, renderer(), Prompts(), teachers)
    tools = ("tools", '{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}')
    plain, told = turns(tools, ("user", "q")), turns(tools, ("user", "hint q"))
    system = ("system", "S")
    expected: list[str | None] = [f"{plain}<think>", turns(tools, system, ("user", "q")), None]
    expected += [f"{told}<think>", turns(tools, system, ("user", "hint q")), told]

    def text(ids: Any) -> str | None:
        return None if ids is None else byte_level().decode(ids.tolist(), skip_special_tokens=False)

    assert [text(prompt.teacher_prompt_ids) for prompt in prompts] == expected
    assert {text(prompt.prompt_ids) for prompt in prompts} == {plain}
    assert [prompt.teacher for prompt in prompts] == [f"teacher-{name}" for name in "abcabc"]
    with pytest.raises(OpdctlError, match=r"1 prompts exceed prompts\.max_tokens"):
        tokenize(problems[:1], renderer(), Prompts(max_tokens=len(prompts[0].prompt_ids)), teachers)
