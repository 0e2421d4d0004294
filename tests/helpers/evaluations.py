"""Planted evaluations: graded responses and summaries that a test chose, in the files of the real stage."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from helpers.commands import Result, invoke, small_recipe

from opdctl.artifacts import files, tables
from opdctl.artifacts.records import GradedResponse
from opdctl.artifacts.stage_dir import Fingerprint, StageDir
from opdctl.evaluation.results import PROTOCOL_KEYS
from opdctl.runs.open import open_run

PROTOCOL = dict.fromkeys(PROTOCOL_KEYS, 1)


def plant_evaluation(
    directory: Path,
    correct: dict[str, list[bool]],
    bench: str = "mine",
    text: str = "text",
    math_verify: bool | None = None,
    **summary: Any,
) -> Path:
    """Write a finished evaluation with these grades in one part. summary: keys that differ from the default."""
    rows = [
        GradedResponse(
            sample_id=f"{bench}/{name}/{n}",
            problem_id=name,
            response_ids=np.arange(2, dtype=np.int32),
            text=text,
            finish_reason="stop",
            gold="1",
            extracted="1" if is_correct else "2",
            correct=is_correct,
            verdict="ok",
            vote="1" if is_correct else "2",
            math_verify=math_verify,
        )
        for name, samples in correct.items()
        for n, is_correct in enumerate(samples)
    ]
    form = {"stage": "eval", "num_parts": 1, "suffix": ".parquet", "rerun_command": "opdctl eval"}
    stage = StageDir(directory, **form, fingerprint=Fingerprint({}))
    stage.start({})
    stage.write(0, partial(tables.write_rows, rows=rows, record=GradedResponse), rows=len(rows), tokens=2 * len(rows))
    stage.finalize()
    avg = float(np.mean([np.mean(samples) for samples in correct.values()]))
    default = {"bench": bench, "avg": avg, "ci": [0.0, 1.0], "protocol": PROTOCOL, "benchmark": {"digest": "d"}}
    default |= {"problems": len(correct), "samples": len(next(iter(correct.values())))}
    files.write_json(directory / "summary.json", default | summary)
    return directory


def grades(pattern: str) -> dict[str, list[bool]]:
    """Return one sample per problem: grades("1100") has two correct problems of four."""
    return {f"p{n}": [each == "1"] for n, each in enumerate(pattern)}


def plant_run(path: Path, evaluations: dict[str, dict[int | str, str]], *overrides: str) -> Path:
    """Write a run with evaluations by benchmark and by step, or name of a teacher. Values: as `grades` has them."""
    open_run(small_recipe(*overrides), path)
    for bench, patterns in evaluations.items():
        for target, pattern in patterns.items():
            name = target if isinstance(target, str) else f"step-{target:05d}"
            plant_evaluation(path / "eval" / bench / name, grades(pattern), bench)
    return path


def plant_curve(path: Path, accuracies: dict[int, float], *overrides: str, digest: str = "d") -> Path:
    """Write a run whose students have these accuracies by step. There are summaries without responses."""
    open_run(small_recipe(*overrides), path)
    for step, accuracy in accuracies.items():
        directory = path / "eval" / "sort12" / f"step-{step:05d}"
        directory.mkdir(parents=True)
        summary = {"bench": "sort12", "problems": 100, "samples": 1, "avg": accuracy, "protocol": PROTOCOL}
        summary |= {"ci": [accuracy - 0.1, accuracy + 0.1], "benchmark": {"digest": digest}}
        files.write_json(directory / "summary.json", summary)
    return path


def change_protocol(directory: Path, **settings: Any) -> None:
    """Change the protocol in the summary of a planted evaluation."""
    path = directory / "summary.json"
    files.write_json(path, files.read_json(path) | {"protocol": PROTOCOL | settings})


# ── A toy model, evaluated ────────────────────────────────────────────────────────────────────────────────

TRANSFORMERS = ("rollout.engine=transformers", "student.dtype=float32", "eval.max_tokens=160")
SHORT_EVAL = (*TRANSFORMERS, "eval.limit=6", "eval.samples=4", "eval.num_parts=3")


def evaluate_toy(*args: object, settings: tuple[str, ...] = SHORT_EVAL) -> Result:
    """Run `opdctl eval` on a toy model without a run: 6 problems, 4 samples each, in 3 parts."""
    options = [word for setting in settings for word in ("--set", setting)]
    return invoke("eval", "--model", "toy:student-spread", "--bench", "sort12", *options, *args)


def evaluation_path(output: Path) -> Path:
    """Return the directory of the only evaluation on sort12 in `output`."""
    (path,) = (path for path in (output / "eval" / "sort12").iterdir() if path.is_dir())
    return path
