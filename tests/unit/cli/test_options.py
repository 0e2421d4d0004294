import pytest
import typer
from typer.main import get_command

from opdctl.cli.main import app

COMMANDS = ("rollout", "score-teacher", "train", "eval", "analyze-position", "status", "compare", "list", "run")


def command(*names: str):
    found = get_command(app)
    for name in names:
        found = found.commands[name]
    return found


def options(*names: str) -> set[str]:
    """Return the first name of every option of a command, without --help."""
    return {param.opts[0] for param in command(*names).params if param.param_type_name == "option"}


def test_commands():
    assert tuple(command().commands) == COMMANDS
    assert set(command("run").commands) == {
        "fork",
        "repair",
        "prune",
        "show",
        "export",
        "sync",
        "import",
        "continuations",
    }


@pytest.mark.parametrize(("name", "most"), [("train", 10), ("eval", 14), ("analyze-position", 9)])
def test_number_of_options(name, most):
    assert len(options(name)) <= most


PATHS = [(name,) for name in COMMANDS[:-1]] + [
    ("run", name) for name in ("fork", "repair", "prune", "show", "export", "sync", "import", "continuations")
]


@pytest.mark.parametrize("names", PATHS, ids=" ".join)
def test_every_command_prints_json_and_has_one_option_for_messages(names):
    assert {"--json", "--verbose"} <= options(*names)
    (verbose,) = (param for param in command(*names).params if param.opts[0] == "--verbose")
    assert set(verbose.opts + verbose.secondary_opts) == {"--verbose", "-v", "--quiet", "-q"}


@pytest.mark.parametrize("names", PATHS, ids=" ".join)
def test_every_option_has_a_help_text_and_every_command_an_example(names):
    assert all(getattr(param, "help", None) for param in command(*names).params)
    assert f"opdctl {' '.join(names)} " in command(*names).help


@pytest.mark.parametrize(
    "names",
    [("rollout",), ("score-teacher",), ("train",), ("eval",), ("run", "fork"), ("run", "repair"), ("run", "sync")],
)
def test_commands_that_write_have_a_dry_run(names):
    assert "--dry-run" in options(*names)


@pytest.mark.parametrize("gone", ["--shard", "--repair", "--compare", "--list", "--sample", "--continuations"])
def test_former_options_do_not_come_back(gone):
    assert not [names for names in PATHS if gone in options(*names)]


def test_app_is_a_typer_app_without_rich_tracebacks():
    assert isinstance(app, typer.Typer)
    assert not app.pretty_exceptions_enable
