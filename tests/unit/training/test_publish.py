"""The model card of a student."""

import pytest
from helpers.commands import small_recipe

from opdctl.training.publish import CARD_FILE, write_model_card


def card(tmp_path, *overrides, metrics=None):
    write_model_card(tmp_path, small_recipe(*overrides), 5, metrics or {})
    return (tmp_path / CARD_FILE).read_text()


def test_card_describes_the_training_and_has_the_recipe(tmp_path):
    text = card(tmp_path, metrics={"k1": 0.123456, "loss": -0.5, "no_such_metric": 1.0})
    for part in (
        "step 5",
        "`toy:student`",
        "`toy:teacher`",
        "`iw_opd`",
        "sort12",
        "| updates | 5 |",
        "| responses | 40 |",
    ):
        assert part in text, part
    assert "0.1235" in text
    assert "no_such_metric" not in text
    for setting in ("gamma = 0.5", "learning_rate = 0.0002"):
        assert setting in text.partition("```toml")[2]


def test_card_is_reproducible(tmp_path):
    assert card(tmp_path, metrics={"loss": 0.1}) == card(tmp_path, metrics={"loss": 0.1})


@pytest.mark.parametrize(
    ("model", "is_hub_id"), [("Qwen/Qwen3-4B", True), ("./models/mine", False), ("toy:student", False)]
)
def test_card_links_a_student_on_the_hub(tmp_path, model, is_hub_id):
    assert (f"base_model: {model}" in card(tmp_path, f"student.model={model}")) == is_hub_id
