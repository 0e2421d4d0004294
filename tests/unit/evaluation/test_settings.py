"""Which runs are seeds of one setting, and the labels of settings."""

from helpers.commands import small_recipe

from opdctl.evaluation.settings import Setting, find_settings

SMALLER = "student.model=toy:student-spread"


def test_runs_that_differ_in_seed_name_and_mutable_keys_are_one_setting() -> None:
    recipes = [small_recipe("seed=0"), small_recipe("seed=1", "name=other", "train.steps=9")]
    assert find_settings(recipes) == [Setting("", "quickstart")] * 2


def test_models_are_the_pair_and_other_keys_the_method() -> None:
    recipes = [
        small_recipe("weight.name=uniform"),
        small_recipe(),
        small_recipe("weight.name=uniform", SMALLER),
        small_recipe("weight.gamma=1.0", SMALLER),
    ]
    settings = find_settings(recipes)
    assert [each.pair for each in settings] == ["student=toy:student"] * 2 + ["student=toy:student-spread"] * 2
    assert [each.method for each in settings] == ["uniform", "iw_opd gamma=0.5", "uniform", "iw_opd gamma=1.0"]
    assert settings[3].label == "student=toy:student-spread iw_opd gamma=1.0"


def test_runs_with_other_models_only_have_one_method() -> None:
    settings = find_settings([small_recipe(), small_recipe(SMALLER, "teacher.model=toy:perm-teacher")])
    assert settings == [
        Setting("student=toy:student teacher=toy:teacher", ""),
        Setting("student=toy:student-spread teacher=toy:perm-teacher", ""),
    ]


def test_reference_that_is_the_student_itself_belongs_to_the_method() -> None:
    extrapolation = ("train.extrapolation=1.25", "reference.dtype=float32")
    recipes = [
        small_recipe(),
        small_recipe(*extrapolation, "reference.model=toy:student"),
        small_recipe(*extrapolation, "reference.model=toy:student-spread", SMALLER),
    ]
    plain, one, other = find_settings(recipes)
    assert (plain.method, plain.pair) == ("extrapolation=1.0", "student=toy:student")
    assert one.method == other.method
    assert "reference=student" in one.method
    assert one.pair == plain.pair != other.pair
