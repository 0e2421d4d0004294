"""The recipes that come with opdctl, found by name: `quickstart`, `pairs/…`, `weights/…`, `variants/…`."""

from pathlib import Path

from opdctl.errors import OpdctlError, did_you_mean

PACKAGE = Path(__file__).parent.parent
LIBRARY = next((path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir()), PACKAGE)
"""Inside the package in an installation, beside it in a source checkout."""


def recipe_names() -> list[str]:
    """Return the names of all recipes, those for a complete run first."""
    paths = sorted(LIBRARY.rglob("*.toml"), key=lambda path: (len(path.relative_to(LIBRARY).parts), path))
    return [str(path.relative_to(LIBRARY).with_suffix("")) for path in paths]


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path if it exists, else the recipe of that name.

    Raises:
        OpdctlError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in recipe_names():
        return LIBRARY / f"{name}.toml"
    if path.suffix == ".toml":
        suggestion = did_you_mean(path.name, [each.name for each in path.parent.glob("*.toml")], path.parent)
    else:
        suggestion = did_you_mean(name, recipe_names())
    raise OpdctlError(
        "missing_file",
        f"{name}: no such recipe{suggestion}",
        hint="give a TOML file, or a name from `opdctl list recipes`",
    )


def describe_recipe(name: str) -> tuple[str, str]:
    """Return the first comment line of a recipe, and "complete" or "overlay": the recipes in subdirectories override
    settings of another recipe."""
    text = (LIBRARY / f"{name}.toml").read_text(encoding="utf-8")
    comment = next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")
    return comment, "overlay" if "/" in name else "complete"
