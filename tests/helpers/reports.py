"""A report with every figure."""

from pathlib import Path

from helpers.commands import QUICKSTART, invoke, sets


def make_complete_report(path: Path) -> Path:
    """Train two steps with all optional columns, evaluate, continue prefixes, and return the path of report.html."""
    columns = ("rollout.entropy=true", "score.entropy=true", "rollout.top_k=4", "score.top_k=4")
    overrides = sets("eval.every_steps=1", "continuations.responses=2", *columns)
    for command in (
        ("train", "--recipe", QUICKSTART, *overrides, "--output", path),
        ("run", "continuations", path),
    ):
        result = invoke(*command)
        assert result.code == 0, result.err
    result = invoke("analyze-position", path, "--json")
    assert result.code == 0, result.err
    return Path(result.json()["report"])
