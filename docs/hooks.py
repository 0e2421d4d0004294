"""The pages of the site that are made from the code when the site is built, so that they cannot go stale.

    index.md                  the README
    commands/NAME.md          every command, as its help has it
    reference/recipe.md       every key of a recipe: type, default, meaning, what it shapes
    reference/artifacts.md    every record and column
    source/FILE.md            files outside of docs/ that a page links to

Links lead to these pages where they leave docs/, so that the pages also read well on a code host.
"""

import functools
import inspect
import json
import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo

from opdctl.artifacts import records
from opdctl.cli.main import app
from opdctl.recipe import dependencies, load, schema
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
            entry["Commands"] = [{name: f"commands/{name}.md"} for name in _commands()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    readme = (ROOT / "README.md").read_text()
    pages = {"index.md": _moved(readme, ROOT, "index.md")}
    pages |= {f"commands/{name}.md": command_page(name, command) for name, command in _commands().items()}
    pages |= {"reference/recipe.md": recipe_page(), "reference/artifacts.md": artifacts_page()}
    texts = [(ROOT, readme)] + [(path.parent, path.read_text()) for path in sorted(DOCS.rglob("*.md"))]
    for path in sorted({path for folder, text in texts for path in _outside(folder, text)}):
        pages[_uri(path)] = source_page(path)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a written page that leave docs/ to the generated pages."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else _moved(markdown, (DOCS / uri).parent, uri)


# ── Links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _outside(folder: Path, markdown: str) -> Iterator[Path]:
    """Yield the files outside of docs/ that `markdown`, written in `folder`, links to."""
    paths = ((folder / target).resolve() for _, target in LINK.findall(markdown))
    yield from (path for path in paths if path.is_file() and not path.is_relative_to(DOCS))


def _uri(path: Path) -> str:
    """Return where the site has a file of the repository."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else f"source/{path.relative_to(ROOT).as_posix()}.md"


def _moved(markdown: str, folder: Path, uri: str) -> str:
    """Return `markdown`, written in `folder`, with its links as the page `uri` of the site needs them."""

    def moved(match: re.Match[str]) -> str:
        path = (folder / match[2]).resolve()
        if not path.is_relative_to(ROOT) or not path.is_file():
            return match[0]
        return match[1] + os.path.relpath(_uri(path), PurePosixPath(uri).parent)

    return LINK.sub(moved, markdown)


def source_page(path: Path) -> str:
    fence = f"````{LANGUAGES.get(path.suffix, 'text')}"
    return f"{UNLISTED}# {path.relative_to(ROOT).as_posix()}\n\n{fence}\n{path.read_text()}\n````\n"


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def command_page(name: str, command: Any) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join(["opdctl", name, "[OPTIONS]", *(_optional(each) for each in arguments)])
    rows = [(f"`{each.metavar}`", each.help) for each in arguments]
    rows += [(", ".join(f"`{option}`" for option in each.opts) + _value(each), each.help) for each in options]
    return (
        f"# opdctl {name}\n\n{_help(command.help)}\n\n```text\n{usage}\n```\n\n{_table(('option', 'meaning'), rows)}\n"
    )


def _optional(argument: Any) -> str:
    return argument.metavar if argument.required else f"[{argument.metavar}]"


def _value(option: Any) -> str:
    if option.is_flag or option.count:
        return ""
    return f" `{option.metavar or option.name.strip('_').upper()}`"


def _help(text: str) -> str:
    """Return a command's help as Markdown: a paragraph marked not to be wrapped is a block of examples."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"```console\n{p[1:].strip()}\n```" if p.startswith("\b") else p for p in paragraphs)


# ── Recipe ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def recipe_page() -> str:
    """Return the reference of the recipe: its sections in the order of the schema."""
    sections: dict[type[schema.Section], list[str]] = {}
    for section, header in _headers(schema.Recipe):
        sections.setdefault(section, []).append(header)
    own = {name: field for name, field in schema.Recipe.model_fields.items() if not _section(field)}
    parts = [_section_part("Top level", "", "", own)]
    for section, headers in sections.items():
        title, key = ", ".join(f"`{header}`" for header in headers), headers[0].strip("[]") + "."
        parts.append(_section_part(title, section.__dict__.get("__doc__") or "", key, section.model_fields))
        if registry := {schema.WeightSettings: WEIGHTS, schema.ObjectiveSettings: OBJECTIVES}.get(section):
            parts.append(_components(registry))
    return RECIPE_HEAD + "\n\n".join(parts) + "\n"


def _headers(outer: type[schema.Section], prefix: str = "") -> Iterator[tuple[type[schema.Section], str]]:
    """Yield the sections within a section, and those within them, each with its header in TOML."""
    for name, field in outer.model_fields.items():
        if section := _section(field):
            path = f"{prefix}{name}.NAME" if typing.get_origin(field.annotation) is dict else f"{prefix}{name}"
            yield section, f"[{path}]"
            yield from _headers(section, f"{path}.")


RECIPE_HEAD = """# Recipe reference

A recipe is one TOML file. Every key is listed with its default, which is the recommended setting. *Shapes* names the
stages whose artifacts depend on the key: once such an artifact is there, the run directory refuses another value. A key
that shapes nothing may change at any time. `[teacher]`, `[teachers.NAME]` and `[reference]` shape scores, not rollouts.

"""


def _section_part(title: str, about: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{name}`", _kind(field), _default(field), field.description or "", ", ".join(_shaped(f"{prefix}{name}")))
        for name, field in fields.items()
    ]
    table = _table(("key", "type", "default", "meaning", "shapes"), rows)
    return "\n\n".join(filter(None, [f"## {title}", about, table]))


def _components(registry: Registry[Any]) -> str:
    """Return what there is of a kind, as `train --list-weights` prints it."""
    rows = [
        (f"`{entry.name}`", entry.summary, ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in entry.parameters.items()))
        for entry in registry.entries()
    ]
    return _table(("name", registry.kind, "parameters"), rows)


def _section(field: FieldInfo) -> type[schema.Section] | None:
    """Return the section that a field is, or is a table of."""
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, schema.Section)]
    return found[0] if found else None


def _shaped(key: str) -> list[str]:
    """Return the stages that have `key` in the fingerprint of their artifacts."""
    if key.startswith(("weight.", "objective.")):
        return ["update"]
    keys = {stage: dependencies.fingerprint_settings(_example(), stage) for stage in dependencies.STAGE_DEPENDENCIES}
    return [stage for stage, known in keys.items() if any(f"{name}.".startswith(f"{key}.") for name in known)]


@functools.cache
def _example() -> schema.Recipe:
    """Return a recipe whose tables are not empty, so that each has a key."""
    tables = ["prompts.min_values.a=1.0", "prompts.template_arguments.a=1"]
    return load.load_recipe([ROOT / "recipes" / "quickstart.toml"], tables)


def _kind(field: FieldInfo) -> str:
    """Return a field's type and bounds in words."""
    kinds = [kind for kind in typing.get_args(field.annotation) if kind is not type(None)]
    if typing.get_origin(field.annotation) is typing.Literal:
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
    unset = field.default is None or isinstance(field.default, schema.Section)
    return "" if unset else f"`{json.dumps(field.default, ensure_ascii=False)}`"


# ── Artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def artifacts_page() -> str:
    """Return the reference of the artifacts: their records with columns and Arrow types."""
    tables = [
        ("prompts.parquet", records.Prompt, records.PROMPTS),
        ("step-*/rollout/part-*.parquet", records.Response, records.RESPONSES),
        ("eval/**/part-*.parquet", records.GradedResponse, records.GRADED),
    ]
    layout = inspect.cleandoc(records.__doc__ or "").partition("\n\n")[2]
    parts = ["# Artifacts\n", _text(layout)]
    for name, record, arrow_schema in tables:
        rows = [(f"`{field.name}`", f"`{field.type}`") for field in arrow_schema]
        parts += [f"\n## {name}\n", _text(inspect.getdoc(record) or ""), "", _table(("column", "Arrow type"), rows)]
    rows = [("`offsets`", "int64")]
    rows += [
        (f"`{name}`", "int32" if name == "top_ids" else "float32") for name in records.TokenScores.__dataclass_fields__
    ]
    parts += ["\n## step-*/teacher/part-*.safetensors\n", _text(inspect.getdoc(records.TokenScores) or "")]
    parts += ["", "The responses of a part stand behind one another; `offsets` says where each begins.", ""]
    return "\n".join([*parts, _table(("tensor", "type"), rows)]) + "\n"


def _text(docstring: str) -> str:
    """Return a docstring as Markdown, whose brackets are no links."""
    return docstring.replace("[", "\\[")


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [" | ".join(_cell(cell) for cell in row) for row in (header, ("---",) * len(header), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
