"""The model card of a student."""

import re

import pytest
from helpers.commands import small_recipe

from opdctl.runs.phases import TrainingPhase
from opdctl.training.publish import CARD_FILE, CARD_METRICS, write_model_card


def phase(*overrides):
    recipe = small_recipe(*overrides)
    return TrainingPhase((3, 4), {"train.updates_per_step": 2}, [], recipe.weight, recipe.objective)


def card(tmp_path, *overrides, metrics=None):
    write_model_card(tmp_path, small_recipe(*overrides), 5, metrics or {}, tmp_path / "base", [phase(*overrides)])
    return (tmp_path / CARD_FILE).read_text()


def test_card_describes_the_training_and_has_the_recipe(tmp_path):
    text = card(tmp_path, metrics={"k1": 0.123456, "loss": -0.5, "no_such_metric": 1.0})
    for part in (
        "step 5",
        "`toy:student`",
        "`toy:teacher`",
        "`iw_opd`",
        "sort12",
        "| steps | 5 |",
        "| 3 others |",
        "| 3–4 | 4 | `policy_gradient` (clip_low = 0.2, ",
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


def test_every_row_of_the_rendered_tables_has_its_value(tmp_path):
    """Pipes in a label would end its cell."""
    from markdown_it import MarkdownIt

    metrics = dict.fromkeys(CARD_METRICS, 0.25) | {"responses": 12345, "tokens": 7}
    text = card(tmp_path, metrics=metrics).split("---", 2)[2]
    html = MarkdownIt("commonmark").enable("table").render(text)
    tables = re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", tables[2], re.DOTALL)]
    results = {cells[0]: cells[1] for cells in rows if len(cells) == 2 and cells[1]}
    assert results["mean |A|, nats per token"] == "0.25"
    assert results["responses"] == "12,345"
    assert len([row for row in rows if row]) == len(results) == len(CARD_METRICS)


def test_card_has_the_licence_of_the_base_model_and_the_data_sets_of_the_hub(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CARD_FILE).write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    text = card(tmp_path, "prompts.source=zwhe99/DeepMath-103K")
    assert "license: apache-2.0" in text
    assert "datasets:\n- zwhe99/DeepMath-103K" in text
    (tmp_path / "base" / CARD_FILE).write_text("---\n: [\n---\n")
    assert "license" not in card(tmp_path).partition("```toml")[0]
    assert "datasets:" not in card(tmp_path)
