"""The recipes that come with opdctl, by name."""

import pytest

from opdctl.errors import OpdctlError
from opdctl.recipe.library import LIBRARY, describe_recipe, find_recipe, recipe_names


def test_complete_recipes_come_first():
    names = recipe_names()
    assert names[:2] == ["cross_scale", "quickstart"]
    assert {"pairs/4b-to-4b", "variants/perm", "weights/opd"} < set(names)


@pytest.mark.parametrize("name", recipe_names())
def test_description_is_one_sentence(name):
    comment, kind = describe_recipe(name)
    assert comment.endswith(".")
    assert kind == ("overlay" if "/" in name else "complete")


def test_recipe_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("variants/perm") == LIBRARY / "variants" / "perm.toml"
    (tmp_path / "mine.toml").touch()
    assert find_recipe("mine.toml").name == "mine.toml"


def test_file_takes_precedence_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").touch()
    assert find_recipe("quickstart").resolve() == tmp_path / "quickstart"


@pytest.mark.parametrize(("name", "suggestion"), [("quickstrat", "quickstart"), ("mein.toml", "mine.toml")])
def test_unknown_recipe_suggests_the_nearest(name, suggestion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").touch()
    with pytest.raises(OpdctlError) as error:
        find_recipe(name)
    assert error.value.kind == "missing_file"
    assert name in str(error.value.detail)
    assert f"`{suggestion}`" in str(error.value.detail)
