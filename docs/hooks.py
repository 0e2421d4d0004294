"""Pages of the site that are generated from the code at every build, so that they are never outdated.

    index.md                  the README
    commands/NAME.md          every command, with the text of its help
    reference/recipe.md       every key of a recipe: type, default, meaning, affected stages
    reference/artifacts.md    every record and column
    source/FILE.md            files outside docs/ that a page links to

A link to a file outside docs/ leads to its generated page. The same link works on a code host.
"""

import functools
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

from opdctl.artifacts import records
from opdctl.artifacts.tables import arrow_schema, tensor_specs
from opdctl.cli.main import app
from opdctl.recipe import dependencies, load, schema
from opdctl.recipe.section import Section
from opdctl.registry import OBJECTIVES, WEIGHTS, Registry

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()(?!https?:|#)([^)#\s]+)")
LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash"}
UNLISTED = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the commands in the navigation."""
    for entry in config.nav or []:
        if "Commands" in entry:
            entry["Commands"] = [{name: command_uri(name)} for name in list_commands()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    readme = (ROOT / "README.md").read_text()
    pages = {"index.md": _relocate_links(readme, ROOT, "index.md")}
    pages |= {command_uri(name): command_page(name, command) for name, command in list_commands().items()}
    pages |= {"reference/recipe.md": recipe_page(), "reference/artifacts.md": artifacts_page()}
    texts = [(ROOT, readme)] + [(path.parent, path.read_text()) for path in sorted(DOCS.rglob("*.md"))]
    for path in sorted({path for folder, text in texts for path in _linked_files(folder, text)}):
        pages[_uri(path)] = source_page(path)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a written page to files outside docs/ at the generated pages."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else _relocate_links(markdown, (DOCS / uri).parent, uri)


# ── Links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _linked_files(folder: Path, markdown: str) -> Iterator[Path]:
    """Yield the files outside docs/ that `markdown`, a text in `folder`, links to."""
    paths = ((folder / target).resolve() for _, target in LINK.findall(markdown))
    yield from (path for path in paths if path.is_file() and not path.is_relative_to(DOCS))


def _uri(path: Path) -> str:
    """Return the address of a file of the repository within the site."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else f"source/{path.relative_to(ROOT).as_posix()}.md"


def _relocate_links(markdown: str, folder: Path, uri: str) -> str:
    """Return `markdown`, a text in `folder`, with its links relative to the page `uri` of the site."""

    def relocate(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if not path.is_relative_to(ROOT) or not path.is_file():
            return match[0]
        return match[1] + os.path.relpath(_uri(path), PurePosixPath(uri).parent)

    return LINK.sub(relocate, markdown)


def source_page(path: Path) -> str:
    fence = f"````{LANGUAGES.get(path.suffix, 'text')}"
    return f"{UNLISTED}# {path.relative_to(ROOT).as_posix()}\n\n{fence}\n{path.read_text()}\n````\n"


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_commands() -> dict[str, Any]:
    """Return every command by its name; those of a group as `run fork`."""
    return dict(_walk(typer.main.get_command(app), ""))


def _walk(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _walk(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def command_uri(name: str) -> str:
    return f"commands/{name.replace(' ', '-')}.md"


def command_page(name: str, command: Any) -> str:
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    usage = " ".join(["opdctl", name, "[OPTIONS]", *(_usage(argument) for argument in arguments)])
    rows = [(f"`{_metavar(argument)}`", argument.help or "") for argument in arguments]
    rows += [
        (", ".join(map(_code, [*option.opts, *option.secondary_opts])) + _value(option), option.help)
        for option in options
    ]
    return (
        f"# opdctl {name}\n\n{_help(command.help)}\n\n```text\n{usage}\n```\n\n{_table(('option', 'meaning'), rows)}\n"
    )


def _code(text: str) -> str:
    return f"`{text}`"


def _usage(argument: Any) -> str:
    return _metavar(argument) if argument.required else f"[{_metavar(argument)}]"


def _metavar(parameter: Any) -> str:
    """Return how a parameter is written: its metavar, its choices, or its name."""
    annotation = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        choices = [str(member.value) for member in annotation]
    else:
        choices = [str(value) for value in typing.get_args(annotation)] if _is_literal(annotation) else []
    return parameter.metavar or "/".join(choices) or parameter.name.strip("_").upper()


def _is_literal(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Literal


def _value(option: Any) -> str:
    return "" if option.is_flag or option.count else f" `{_metavar(option)}`"


def _help(text: str) -> str:
    """Return a command's help as Markdown. A paragraph that typer does not wrap is a block of examples."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"```console\n{p[1:].strip()}\n```" if p.startswith("\b") else p for p in paragraphs)


# ── Recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def recipe_page() -> str:
    """Return the reference of the recipe, with the sections in the order of the schema."""
    sections: dict[type[Section], list[str]] = {}
    for section, header in _headers(schema.Recipe):
        sections.setdefault(section, []).append(header)
    top_level = {name: field for name, field in schema.Recipe.model_fields.items() if not _section(field)}
    parts = [_section_part("Top level", "", "", top_level)]
    for section, headers in sections.items():
        title, key = ", ".join(f"`{header}`" for header in headers), headers[0].strip("[]") + "."
        parts.append(_section_part(title, section.__dict__.get("__doc__") or "", key, section.model_fields))
        if registry := {schema.WeightSettings: WEIGHTS, schema.ObjectiveSettings: OBJECTIVES}.get(section):
            parts.append(_components(registry))
    return RECIPE_HEAD + "\n\n".join(parts) + "\n"


def _headers(outer: type[Section], prefix: str = "") -> Iterator[tuple[type[Section], str]]:
    """Yield all sections within a section, each with its header in TOML."""
    for name, field in outer.model_fields.items():
        if section := _section(field):
            path = f"{prefix}{name}.NAME" if typing.get_origin(field.annotation) is dict else f"{prefix}{name}"
            yield section, f"[{path}]"
            yield from _headers(section, f"{path}.")


RECIPE_HEAD = """# Recipe reference

A recipe is a TOML file. Every key is listed with its default, which is the recommended setting. *Affects* lists the
stages whose artifacts depend on the key: a run that has such an artifact rejects another value. A key that affects
nothing may change at any time. `[teacher]`, `[teachers.NAME]` and `[reference]` affect scores, not rollouts.

"""


def _section_part(title: str, about: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{name}`", _kind(field), _default(field), field.description or "", ", ".join(_affected(f"{prefix}{name}")))
        for name, field in fields.items()
    ]
    table = _table(("key", "type", "default", "meaning", "affects"), rows)
    return "\n\n".join(filter(None, [f"## {title}", about, table]))


def _components(registry: Registry[Any]) -> str:
    """Return the components of a kind, as `opdctl list` prints them."""
    rows = [
        (f"`{entry.name}`", entry.summary, ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in entry.parameters.items()))
        for entry in registry.entries()
    ]
    return _table(("name", registry.kind, "parameters"), rows)


def _section(field: FieldInfo) -> type[Section] | None:
    """Return the section type of a field, or of the values of a table; None for other fields."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
    return sections[0] if sections else None


def _affected(key: str) -> list[str]:
    """Return the stages that have `key` in the fingerprint of their artifacts."""
    if key.startswith(("weight.", "objective.")):
        return ["update"]
    keys = {stage: dependencies.fingerprint_settings(_example(), stage) for stage in dependencies.STAGE_DEPENDENCIES}
    return [stage for stage, known in keys.items() if any(f"{name}.".startswith(f"{key}.") for name in known)]


@functools.cache
def _example() -> schema.Recipe:
    """Return a recipe with one key in each table, and with the keys that are in no fingerprint by default."""
    tables = ["prompts.where.a=1.0", "prompts.sources.NAME.weight=1.0", "prompts.template_arguments.a=1"]
    added = ["rollout.eos_token_ids=[1]", "student.tokenizer=file", "teacher.tokenizer=file"]
    added += [f"teacher.{key}=a" for key in ("system", "chat_template")]
    added += ["teacher.template_arguments.a=1", "eval.system=a", "eval.template_arguments.a=1"]
    return load.load_recipe([ROOT / "recipes" / "quickstart.toml"], [*tables, *added])


def _kind(field: FieldInfo) -> str:
    """Return a field's type and bounds in words."""
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not type(None)]
    if _is_literal(field.annotation):
        return " or ".join(f"`{value}`" for value in kinds)
    if typing.get_origin(field.annotation) in (list, dict):
        return {list: "list", dict: "table"}[typing.get_origin(field.annotation)]
    kind = kinds[0] if kinds else field.annotation
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return " ".join([names.get(kind, "table"), *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    yield from (
        f"{sign} {getattr(bound, n)}" for bound in field.metadata for n, sign in signs.items() if hasattr(bound, n)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    unset = field.default_factory or field.default is None or isinstance(field.default, Section)
    return "" if unset else f"`{json.dumps(field.default, ensure_ascii=False)}`"


# ── Artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def artifacts_page() -> str:
    """Return the reference of the artifacts: their records with columns and Arrow types."""
    tables = [
        ("prompts.parquet", records.Prompt),
        ("step-*/rollout/part-*.parquet", records.Response),
        ("eval/*/*/part-*.parquet", records.GradedResponse),
        ("eval/*/*/prompts/part-*.parquet", records.EvalPrompt),
    ]
    layout = inspect.cleandoc(records.__doc__ or "").partition("\n\n")[2]
    parts = ["# Artifacts\n", _text(layout)]
    for name, record in tables:
        rows = [
            (f"`{field.name}`", f"`{field.type}`", "yes" if field.nullable else "") for field in arrow_schema(record)
        ]
        table = _table(("column", "Arrow type", "nullable"), rows)
        parts += [f"\n## {name}\n", _text(inspect.getdoc(record) or ""), "", table]
    rows = [(f"`{name}`", f"`{dtype}`", str(rank)) for name, (dtype, rank) in tensor_specs().items()]
    parts += ["\n## step-*/teacher/part-*.safetensors\n", _text(inspect.getdoc(records.TokenScores) or "")]
    parts += [
        "",
        "The responses of a part are concatenated; `offsets` holds the start of each, and the end of the last.",
        "",
    ]
    return "\n".join([*parts, _table(("tensor", "type", "dimensions"), rows)]) + "\n"


def _text(docstring: str) -> str:
    """Return a docstring as Markdown, with brackets escaped."""
    return docstring.replace("[", "\\[")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(_cell(cell) for cell in row) for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
