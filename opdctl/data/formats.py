"""The formats of a recipe's prompts: those of the student, of each teacher, and of evaluations. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from opdctl.artifacts import parsing
from opdctl.data.rendering import PromptFormat
from opdctl.errors import OpdctlError
from opdctl.recipe.schema import Recipe, model_key

MAX_TEMPLATE_BYTES = 2**18


def chat_template_files(recipe: Recipe) -> dict[str, Path]:
    """Return the chat templates that a recipe names, by section: `prompts`, `teacher`, `teachers.NAME`."""
    files = {"prompts": recipe.prompts.chat_template}
    files |= {model_key(name): teacher.chat_template for name, teacher in recipe.teacher_models().items()}
    return {section: Path(file).expanduser() for section, file in files.items() if file is not None}


def read_chat_template(file: Path, section: str) -> str:
    """Return the text of a chat template. section: that of the recipe that names it, for errors.

    Raises:
        OpdctlError: the file is missing, empty, too large or not UTF-8.
    """
    key = f"{section}.chat_template"
    try:
        text = parsing.read_bytes(file, MAX_TEMPLATE_BYTES, follow_links=True).decode()
    except OSError as error:
        raise OpdctlError("missing_file", f"{key}: {file}: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or too large
        raise OpdctlError("invalid_data", f"{key}: {file}: {error}") from None
    if not text.strip():
        raise OpdctlError("invalid_data", f"{key}: {file}: is empty")
    return text


def read_chat_templates(recipe: Recipe) -> dict[str, str]:
    """Return the texts of the chat templates that a recipe names, by section. Raises OpdctlError as
    `read_chat_template` does."""
    return {section: read_chat_template(file, section) for section, file in chat_template_files(recipe).items()}


def training_format(recipe: Recipe, templates: Mapping[str, str]) -> PromptFormat:
    """Return the format of the student's prompts. templates: as `read_chat_templates` returns them."""
    prompts = recipe.prompts
    return PromptFormat(
        prompts.template_arguments, prompts.system, templates.get("prompts"), prompts.special_tokens_in_text
    )


def teacher_formats(recipe: Recipe, templates: Mapping[str, str]) -> dict[str, PromptFormat]:
    """Return the format of each teacher with separate prompts, by name: the student's but for its settings."""
    return {
        name: PromptFormat(
            recipe.prompts.template_arguments if teacher.template_arguments is None else teacher.template_arguments,
            recipe.prompts.system if teacher.system is None else teacher.system,
            templates.get(model_key(name), templates.get("prompts")),
            recipe.prompts.special_tokens_in_text,
        )
        for name, teacher in recipe.teacher_models().items()
        if teacher.has_own_prompts()
    }


def evaluation_format(recipe: Recipe, name: str, templates: Mapping[str, str]) -> PromptFormat:
    """Return the format of the prompts of the model `name` in an evaluation: that of training but for what [eval]
    sets."""
    settings = recipe.eval_of(name)
    template = templates.get(model_key(name), templates.get("prompts"))
    arguments = settings.template_arguments or {}
    return PromptFormat(arguments, settings.system, template, recipe.prompts.special_tokens_in_text)
