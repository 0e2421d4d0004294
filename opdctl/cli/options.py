"""TODO."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from opdctl.cli import completion

Recipes = Annotated[
    list[Path] | None,
    typer.Option(
        "--recipe",
        help="Recipe (TOML); several merge left to right. Default: the one in --output.",
        autocompletion=completion.recipes,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key: train.steps=10.",
        autocompletion=completion.settings,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="RUN_DIR", help="Run directory. Default: runs/<name>.", autocompletion=completion.runs
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more; tracebacks of internal errors.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="The step to work on. Default: the current one.")]
Repair = Annotated[bool, typer.Option("--repair", help="Make damaged parts of the step again.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Fixed parts, those of worker I of N, from 0. Default: Slurm's array, or any."
    ),
]
Follow = Annotated[
    bool, typer.Option("--follow", help="Stay, with the model loaded, and work on each step as its inputs appear.")
]
Only = Annotated[
    str | None, typer.Option("--only", metavar="NAME", help="Score with one model: teacher, teacher-NAME or reference.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory.", autocompletion=completion.runs)]
EvaluatedRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        "--output",
        metavar="RUN_DIR",
        help="The run. Default: the newest one under runs/.",
        autocompletion=completion.runs,
    ),
]
EvaluatedStep = Annotated[
    int | None, typer.Option("--step", min=0, help="The student of this step. Default: the newest.")
]
EvaluatedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="Another model: a directory, a hub id, `toy:…`, or `teacher` of the run. Without a run: into eval/.",
    ),
]
Benches = Annotated[
    str | None,
    typer.Option(
        "--bench",
        metavar="A,B,…",
        help="Benchmarks, or files of your own. Default: the recipe's.",
        autocompletion=completion.benches,
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Local benchmark file, or a folder of them.")]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Compare two finished evaluations, or two runs, and stop."),
]
ShowFailures = Annotated[
    int, typer.Option("--show-failures", metavar="K", min=0, help="Print so many wrong responses of each benchmark.")
]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="OWNER/NAME", help="Upload the newest student and its card to the model hub."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code-execution", help="Let HumanEval+ and MBPP+ run what the model wrote.")
]
AnalysedRuns = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RUN_DIR", help="The run, or with --compare several. Default: --output."),
]
AnalysedOutput = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The run; or the folder that --compare writes to.")
]
DrawnWeights = Annotated[
    str | None,
    typer.Option("--weights", metavar="A,B,…", help="Token weights to draw besides the recipe's; `all` for every one."),
]
SampleId = Annotated[
    str | None, typer.Option("--sample", metavar="ID", help="Show one response in the terminal, and stop.")
]
Shade = Annotated[Literal["signal", "weight"], typer.Option("--shade", help="What --sample shades a token by.")]
Continuations = Annotated[
    bool, typer.Option("--continuations", help="Let teacher and student go on from the student's prefixes first.")
]
ContinuedStep = Annotated[int, typer.Option("--step", min=0, help="The step whose prefixes are gone on from.")]
CompareRuns = Annotated[bool, typer.Option("--compare", help="Compare the runs' accuracy by step, and stop.")]
Target = Annotated[
    float | None,
    typer.Option("--target", min=0, max=1, help="Accuracy to reach, for --compare. Default: one that all reach."),
]
