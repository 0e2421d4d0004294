"""The command line: parse, call, print. Data go to stdout, everything else to stderr. Imports no torch up here."""

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from opdctl import SCHEMA_VERSION, completion, dist, hub, log
from opdctl.errors import FULL, UNWRITABLE, ExitCode, OpdctlError, did_you_mean, is_out_of_memory

if TYPE_CHECKING:
    from opdctl.config import Recipe
    from opdctl.run import Run
    from opdctl.store import Shard

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


class Requeue(BaseException):
    """SIGTERM or SIGUSR1: a cluster wants its machine back."""


@contextlib.contextmanager
def _session(verbose: int, quiet: bool) -> Iterator[None]:
    """Turn errors and signals into one message and an exit code."""
    others = not dist.is_main()  # they say their errors, and no more
    log.set_level(-1 if quiet or others else min(verbose, 1), f"rank {dist.rank()}: " if others else "")
    os.umask(os.umask(0) | 0o002)  # nothing that all may write to, whatever the shell says
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, _requeue)
    try:
        yield
    except OpdctlError as error:
        log.error(error.message, error.hint)
        raise typer.Exit(error.code) from error
    except Requeue as stop:
        if not others:
            log.error("stopped by a signal; finished parts are kept", "run the same command again to go on")
        raise typer.Exit(ExitCode.REQUEUE) from stop
    except KeyboardInterrupt as stop:
        log.error("interrupted; finished parts are kept", "run the same command again to go on")
        raise typer.Exit(ExitCode.INTERRUPTED) from stop
    except typer.Exit:
        raise
    except BrokenPipeError as error:  # the reader of stdout has gone: there is nobody to tell
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it on its way out
        raise typer.Exit(ExitCode.NO) from error
    except Exception as error:
        if dist.is_echo(error):
            log.error("another process of this run has failed, as it says itself", None)
            raise typer.Exit(ExitCode.NO) from error
        if is_out_of_memory(error):
            hint = "smaller batches need less: rollout.batch_size, score.tokens_per_batch, train.tokens_per_micro_batch"
            log.error(f"out of memory: {' '.join(str(error).split())[:300]}", hint)
            raise typer.Exit(ExitCode.REACH) from error
        if isinstance(error, OSError) and error.errno in (*FULL, *UNWRITABLE):
            log.error(f"{error.filename or 'a file'}: cannot be written: {error.strerror}", None)
            raise typer.Exit(ExitCode.REACH) from error
        if verbose:
            raise
        log.error(f"internal error: {type(error).__name__}: {error}", "run again with -v for the traceback")
        raise typer.Exit(ExitCode.NO) from error
    finally:
        dist.stop()


def _requeue(number: int, frame: FrameType | None) -> None:
    raise Requeue


def _emit(value: dict[str, Any]) -> None:
    if dist.is_main():
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def _recipe(recipes: list[Path] | None, overrides: list[str] | None, output: Path | None) -> "Recipe":
    from opdctl.config import load_recipe
    from opdctl.run import read_recipe

    if recipes:
        return load_recipe(recipes, overrides or [])
    if output is None:
        raise OpdctlError("no recipe", hint="give --recipe FILE, or --output RUN_DIR of a run that was begun")
    return read_recipe(output, overrides or [])


def _open(recipe: "Recipe", output: Path | None, *needs: str, record: bool = True) -> tuple["Run", str]:
    """Open the run, with the models that are needed at hand, and set torch up. Return the run and the device."""
    from opdctl.run import open_run

    dist.start()
    run = dist.main_first(lambda: open_run(recipe, output, needs=needs, record=record))
    return run, _device(recipe)


def _device(recipe: "Recipe") -> str:
    """Set torch up as the recipe says, and return the device."""
    import torch

    from opdctl.engines import resolve_device

    if recipe.pipeline.threads:
        torch.set_num_threads(recipe.pipeline.threads)
    device = resolve_device(recipe.pipeline.device)
    log.detail(f"device {device}, {torch.get_num_threads()} threads")
    return device


def _show_plan(recipe: "Recipe", output: Path | None, as_json: bool) -> None:
    from opdctl import plan as planning

    plan = planning.plan(recipe, output)
    if as_json:
        _emit(plan.as_dict())
    log.pairs("plan", planning.rows(plan))
    log.say("nothing was written")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"opdctl {importlib.metadata.version('opdctl')}\n")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distil a teacher language model into a student on the student's own responses, stage by stage.

    \b
    opdctl train --recipe recipes/quickstart.toml
    opdctl status runs/quickstart
    opdctl analyze-position runs/quickstart
    """


@app.command()
def rollout(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    step: Step = None,
    shard: ShardOption = None,
    follow: Follow = False,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Draw the current student's responses to a step's prompts.

    \b
    opdctl rollout --recipe recipes/quickstart.toml
    opdctl rollout --output runs/quickstart --step 3 --repair
    opdctl rollout --output runs/quickstart --follow
    then: opdctl score-teacher
    """
    with _session(verbose, quiet):
        _refuse_to_follow(follow, {"--step": step is not None, "--repair": repair})
        resolved = _recipe(recipe, set_, output)
        if dry_run:
            _show_plan(resolved, output, json_)
        elif follow:
            _follow("rollout", *_open(resolved, output, "student"), json_, shard)
        else:
            _run_stage("rollout", *_open(resolved, output, "student"), step, repair, json_, shard)


@app.command("score-teacher")
def score_teacher(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    step: Step = None,
    only: Only = None,
    shard: ShardOption = None,
    follow: Follow = False,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Score each token of a step's responses with the teacher, or with every teacher and the reference model.

    \b
    opdctl score-teacher --recipe recipes/quickstart.toml
    opdctl score-teacher --output runs/two-teachers --only teacher-math
    then: opdctl train --no-fill
    """
    with _session(verbose, quiet):
        _refuse_to_follow(follow, {"--step": step is not None, "--repair": repair})
        resolved = _recipe(recipe, set_, output)
        names = _scorers(resolved, only)
        if dry_run:
            _show_plan(resolved, output, json_)
        elif follow:
            _follow("score-teacher", *_open(resolved, output, *names), json_, shard, names)
        else:
            _run_stage("score-teacher", *_open(resolved, output, *names), step, repair, json_, shard, names)


def _refuse_to_follow(follow: bool, others: Mapping[str, bool]) -> None:
    for option, given in others.items():
        if follow and given:
            raise OpdctlError(f"--follow goes from step to step and makes what is missing: give it without {option}")


def _scorers(recipe: "Recipe", only: str | None) -> list[str]:
    """Return the names of the models to score with."""
    names = list(recipe.scorers())
    if only is not None and only not in names:
        raise OpdctlError(f"--only {only}: no such model{did_you_mean(only, names)}")
    return names if only is None else [only]


def _run_stage(
    name: str,
    run: "Run",
    device: str,
    step: int | None,
    repair: bool,
    as_json: bool,
    shard: str | None,
    scorers: Collection[str] = (),
) -> None:
    """Run rollout, or score-teacher with the `scorers`, on one step."""
    from opdctl import plan as planning
    from opdctl.engines import engine_pool
    from opdctl.stages import rollout, score
    from opdctl.status import next_stage_command

    start, at, own = time.monotonic(), _step(run, step), _shard(shard)
    planning.check_space(run, [name.removesuffix("-teacher")])
    with engine_pool(run.recipe, device) as engines:
        if name == "rollout":
            made, stages = rollout.run(run, at, engines, repair=repair, shard=own), [run.rollout(at)]
        else:
            made = score.run(run, at, engines, only=scorers, repair=repair, shard=own)
            stages = [run.score(at, scorer) for scorer in scorers]
    parts = [part for stage in stages for part in (stage.manifest() or {"parts": []})["parts"]]
    folders = ", ".join(str(stage.path) for stage in stages)
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(run.path),
        "stage": name,
        "step": at,
        "parts": len(parts),
        "parts_made": made,
        "rows": sum(part["rows"] for part in parts),
        "tokens": sum(part["tokens"] for part in parts),
        "seconds": time.monotonic() - start,
        "next": next_stage_command(run),
    }
    counts = f"{report['rows']} responses, {report['tokens']} tokens, {report['seconds']:.1f} s"
    if not all(stage.done() for stage in stages):
        there, whole = (
            sum(len(s.names) - len(s.missing(digests=False)) for s in stages),
            sum(len(s.names) for s in stages),
        )
        log.say(f"step {at}: {there} of {whole} parts are there; others are at work on the rest")
    elif made:
        log.say(f"step {at}: wrote {folders}: {counts}")
    elif run.current_step() == run.recipe.train.steps:
        log.say(f"nothing to do: all {run.recipe.train.steps} steps are done; raise train.steps to go on")
    else:
        log.say(f"nothing to do: {folders} {'is' if len(stages) == 1 else 'are'} finished")
    log.say(f"next: {report['next']}")
    if as_json:
        _emit(report)


def _follow(
    name: str, run: "Run", device: str, as_json: bool, shard: str | None, scorers: Collection[str] = ()
) -> None:
    """Run rollout, or score-teacher with the `scorers`, on one step after another."""
    from opdctl import online
    from opdctl.status import next_stage_command

    start, first, steps = time.monotonic(), run.current_step(), run.recipe.train.steps
    online.follow(run, device, name, scorers, _shard(shard))
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(run.path),
        "stage": name,
        "steps": list(range(first, steps)),
        "seconds": time.monotonic() - start,
        "next": next_stage_command(run),
    }
    log.say(f"{name}: all {steps} steps are done here; next: {report['next']}")
    if as_json:
        _emit(report)


def _shard(text: str | None) -> "Shard":
    """Return the worker that `--shard`, torchrun or Slurm's array names. Raises OpdctlError for a senseless one."""
    from opdctl.store import WHOLE, Shard

    if text is None and dist.world() > 1:
        return Shard(dist.rank(), dist.world())
    if text is None:
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        task, least, count = (os.environ.get(name) for name in names)
        if task is None or count is None:
            return WHOLE
        text = f"{int(task) - int(least or 0)}/{count}"
        log.say(f"shard {text}, by Slurm's array")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise OpdctlError(
            f"--shard {text}: must read I/N with 0 <= I < N, such as 0/4", hint="N workers are I = 0 … N-1"
        )
    return Shard(int(index), int(count))


def _step(run: "Run", step: int | None) -> int:
    """Return the step to work on: the current one by default, the last when all are done.

    Raises OpdctlError for a step that the run has not, or not yet.
    """
    current, steps = run.current_step(), run.recipe.train.steps
    if step is None:
        return min(current, steps - 1)
    if step >= steps:
        raise OpdctlError(f"--step {step}: {run.path} has steps 0 to {steps - 1}")
    if not run.may_draw(step):
        raise OpdctlError(
            f"--step {step}: step {step} has no student yet, {current} updates are done",
            hint=f"run `{run.command('train')}`",
        )
    return step


@app.command()
def train(
    recipe: Recipes = None,
    set_: Overrides = None,
    output: Output = None,
    no_fill: Annotated[bool, typer.Option("--no-fill", help="Only update, on what other jobs have made.")] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Only update, and wait for what other jobs still have to make.")
    ] = False,
    list_weights: Annotated[bool, typer.Option("--list-weights", help="List the token weights, and stop.")] = False,
    list_objectives: Annotated[bool, typer.Option("--list-objectives", help="List the objectives, and stop.")] = False,
    push: Push = None,
    repair: Repair = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Train step after step: make what is missing, update, write the next student.

    \b
    opdctl train --recipe recipes/quickstart.toml
    opdctl train --recipe recipes/quickstart.toml --set weight.name=uniform --output runs/uniform
    then: opdctl analyze-position runs/quickstart
    """
    with _session(verbose, quiet):
        if list_weights or list_objectives:
            _list_components(recipe, set_, output, list_weights, list_objectives, json_)
            return
        _refuse_to_follow(follow, {"--repair": repair})
        if no_fill and repair:
            raise OpdctlError("--no-fill makes no parts, so there is nothing to --repair", hint="give one of them")
        resolved = _recipe(recipe, set_, output)
        if push is not None:
            hub.check(push)
        if dry_run:
            _show_plan(resolved, output, json_)
        else:
            needs = _needed_to_update(resolved) if no_fill or follow else resolved.models()
            run, device = _open(resolved, output, *needs)
            _train(run, device, no_fill or follow, follow, repair, json_)
            if push is not None:
                _push(run, push)


def _list_components(
    recipes: list[Path] | None,
    overrides: list[str] | None,
    output: Path | None,
    weights: bool,
    objectives: bool,
    as_json: bool,
) -> None:
    """Print the components that a recipe can name; a given recipe's plugins are among them."""
    from opdctl.config import recipe_to_evaluate
    from opdctl.registry import OBJECTIVES, WEIGHTS

    if recipes or output:
        _recipe(recipes, overrides, output)
    elif overrides:
        recipe_to_evaluate("toy:student", overrides)  # any recipe will do: the plugins matter
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
    for wanted, title, registry in ((weights, "weights", WEIGHTS), (objectives, "objectives", OBJECTIVES)):
        if wanted:
            entries = registry.entries()
            log.components(title, entries)
            found[title] = [asdict(entry) for entry in entries]
    if as_json:
        _emit(found)


def _needed_to_update(recipe: "Recipe") -> list[str]:
    """Return the models whose files an update reads: full-vocabulary losses need the teachers' output matrices."""
    from opdctl.config import objective_of

    return ["student", *(recipe.teacher_models() if objective_of(recipe).support == "full" else ())]


def _train(run: "Run", device: str, no_fill: bool, follow: bool, repair: bool, as_json: bool) -> None:
    from opdctl import online

    before = run.current_step()
    clock = online.train(run, device, fill=not no_fill, follow=follow, repair=repair)
    _close_training(run, before, clock.seconds, no_fill, as_json)


def _close_training(run: "Run", before: int, seconds: dict[str, float], no_fill: bool, as_json: bool) -> None:
    """Say what training came to: accuracy, where the time went, what was written, what to do next."""
    from opdctl import online
    from opdctl.status import next_stage_command

    done, steps = run.current_step(), run.recipe.train.steps
    if no_fill and done == before < steps:
        raise OpdctlError(
            f"{run.path}: step {done} has no teacher scores to learn from yet",
            hint=f"run `{next_stage_command(run)}`",
            code=ExitCode.NO,
        )
    accuracy, student = online.accuracy(run), run.student_path(done) if done else run.student.path
    if done == before:
        log.say(f"nothing to do: all {steps} steps are done")
    shown = {key: "not measured" if value is None else f"{value:.1%}" for key, value in accuracy.items()}
    teachers = ", ".join(f"{name} {shown[name]}" for name in run.recipe.teacher_models())
    spent = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items() if value)
    best = online.best(run)
    measured = [("accuracy", f"{shown['before']} → {shown['after']}  ({teachers})")]
    measured += [("best", f"step {best[0]}, {best[1]:.1%}" if best else "not measured")]
    log.pairs(
        f"{run.path}: {done} of {steps} steps",
        [
            *(measured if any(value is not None for value in accuracy.values()) else []),
            ("time", f"{sum(seconds.values()):.1f} s: {spent}" if spent else "none"),
            ("student", str(student)),
            ("next", next_stage_command(run)),
        ],
    )
    if as_json:
        _emit(
            {
                "schema_version": SCHEMA_VERSION,
                "run_dir": str(run.path),
                "steps": done,
                "student": str(student),
                "accuracy": accuracy,
                "best": {"step": best[0], "accuracy": best[1]} if best else None,
                "seconds": seconds,
            }
        )


def _push(run: "Run", repo: str) -> None:
    """Upload the newest student, if this process speaks for the run."""
    done = run.current_step()
    if dist.is_main():
        log.say(f"pushing {run.student_path(done)} to {repo}")
        address = hub.push(run.student_at(done).path, repo, f"{run.recipe.name}, step {done}")
        log.say(f"pushed {address}")


@app.command("eval")
def evaluate(
    recipe: Recipes = None,
    set_: Overrides = None,
    run_dir: EvaluatedRun = None,
    step: EvaluatedStep = None,
    model: EvaluatedModel = None,
    bench: Benches = None,
    data: Data = None,
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks, and stop.")] = False,
    compare: Compare = None,
    show_failures: ShowFailures = 0,
    allow_code_execution: AllowCode = False,
    shard: ShardOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged parts of the evaluation again.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Grade a student, a teacher or any model on benchmarks, with intervals.

    \b
    opdctl eval --bench sort12                 the newest run under runs/
    opdctl eval --run runs/quickstart --model teacher
    opdctl eval --model Qwen/Qwen3-0.6B --bench aime25,math500
    opdctl eval --compare runs/uniform runs/quickstart
    """
    with _session(verbose, quiet):
        from opdctl.config import with_benches

        if list_:
            _list_benches(json_)
            return
        names = bench.split(",") if bench is not None else None
        if compare is not None:
            _compare(*compare, names, json_)
            return
        overrides = [*(set_ or []), *(["eval.allow_code_execution=true"] if allow_code_execution else [])]
        resolved, output = _evaluation_recipe(recipe, overrides, run_dir, model)
        chosen = with_benches(resolved, resolved.eval.bench if names is None else names)
        if data is not None and not data.exists():
            raise OpdctlError(f"--data {data}: no such file or folder")
        if model is not None and step is not None:
            raise OpdctlError("--step and --model name two different models", hint="give one of them")
        if dry_run:
            _show_evaluation_plan(chosen, output, data, json_)
            return
        run, device = _open_evaluation(resolved, recipe, output, model)
        run = replace(run, recipe=with_benches(run.recipe, chosen.eval.bench))
        _evaluate(run, device, model, step, data, repair, shard, show_failures, json_)


def _list_benches(as_json: bool) -> None:
    from opdctl.benchmarks import Benchmark
    from opdctl.registry import BENCHMARKS

    found: list[Benchmark] = [BENCHMARKS.get(name)() for name in BENCHMARKS.names()]
    rows = [
        {
            "bench": each.name,
            "source": each.source.where,
            "grader": each.grader.name,
            "samples": each.samples,
        }
        for each in found
    ]
    log.table(
        "benchmarks", ("name", "data", "grader", "samples"), [list(map(str, each.values())) for each in rows], left=3
    )
    log.say("or a file of your own: --bench mine.jsonl (.parquet, .csv)")
    if as_json:
        _emit({"schema_version": SCHEMA_VERSION, "benchmarks": rows})


def _compare(one: Path, other: Path, benches: list[str] | None, as_json: bool) -> None:
    from opdctl import evaluations

    found = evaluations.compare(one, other, benches)
    evaluations.show_comparison(found)
    if as_json:
        _emit({"schema_version": SCHEMA_VERSION, "comparisons": found})


def _evaluation_recipe(
    recipes: list[Path] | None, overrides: list[str], output: Path | None, model: str | None
) -> tuple["Recipe", Path | None]:
    """Return the recipe to evaluate by and the run directory, or where a model that is of no run has its results."""
    from opdctl.config import is_scorer, recipe_to_evaluate
    from opdctl.run import newest_run

    of_a_run = recipes or (output is not None and (output / "recipe.toml").exists())
    if model is not None and not is_scorer(model) and not of_a_run:
        return recipe_to_evaluate(model, overrides), output or Path()
    if not recipes and output is None:
        output = newest_run()
        log.say(f"using the newest run, {output}")
    return _recipe(recipes, overrides, output), output


def _open_evaluation(
    recipe: "Recipe", given: list[Path] | None, output: Path | None, model: str | None
) -> tuple["Run", str]:
    """Open the run to evaluate in, or its stand-in where there is none."""
    from opdctl.run import bare_run

    if not given and output is not None and not (output / "recipe.toml").exists():
        return bare_run(recipe, output), _device(recipe)
    needs = model if model in recipe.scorers() else "student"
    return _open(recipe, output, str(needs), record=False)


def _show_evaluation_plan(recipe: "Recipe", output: Path | None, data: Path | None, as_json: bool) -> None:
    from opdctl import plan as planning

    found = planning.evaluation(recipe, output, data)
    if as_json:
        _emit(found)
    log.pairs("plan", planning.evaluation_rows(found))
    log.say("nothing was written")


def _evaluate(
    run: "Run",
    device: str,
    model: str | None,
    step: int | None,
    data: Path | None,
    repair: bool,
    shard: str | None,
    failures: int,
    as_json: bool,
) -> None:
    from opdctl import evaluations
    from opdctl.engines import engine_pool
    from opdctl.stages import evaluate as stage

    subject, own = stage.subject(run, model, step), _shard(shard)
    summaries = []
    with engine_pool(run.recipe, device) as engines:
        for name in run.recipe.eval.bench:
            summary, made = stage.run(run, name, subject, engines, data, repair=repair, shard=own)
            folder = run.evaluation_path(name, subject.name)
            if summary is None:
                log.say(f"wrote {made} parts of {folder}; the summary comes with the last shard's parts")
                continue
            summaries.append(summary)
            evaluations.show(summary)
            evaluations.show_failures(evaluations.load(folder), failures)
            log.say(f"wrote {folder}" if made else f"nothing to do: {folder} is finished")
    log.say(f"next: {_after_evaluation(run, summaries)}")
    if as_json:
        _emit(summaries[0] if len(summaries) == 1 else {"schema_version": SCHEMA_VERSION, "benches": summaries})


def _after_evaluation(run: "Run", summaries: list[dict[str, Any]]) -> str:
    """Return the command that goes on with the run, or one that looks at the responses."""
    from opdctl.status import next_stage_command

    if (run.path / "run.json").exists():
        return next_stage_command(run)
    folders = [run.evaluation_path(each["bench"], each["model"]) for each in summaries]
    return f"evaluate another model, then `opdctl eval --compare {folders[0]} OTHER`" if folders else "the other shards"


@app.command("analyze-position")
def analyze_position(
    run_dirs: AnalysedRuns = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    output: AnalysedOutput = None,
    weights: DrawnWeights = None,
    sample: SampleId = None,
    shade: Shade = "signal",
    continuations: Continuations = False,
    step: ContinuedStep = 0,
    compare: CompareRuns = False,
    target: Target = None,
    shard: ShardOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged parts of the continuations again.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Show where in the response the teacher's signal lies: figures, tables, a verdict, in one report.html.

    Works from the stored artifacts alone, without a model; only --continuations runs models. Of a recipe and --set,
    only weight.* and continuations.* matter here.

    \b
    opdctl analyze-position runs/quickstart
    opdctl analyze-position runs/quickstart --set weight.gamma=1.0 --weights prefix_ratio,teacher_confidence
    opdctl analyze-position runs/quickstart --sample sort12-abc/00003/0
    opdctl analyze-position runs/quickstart --continuations
    opdctl analyze-position --compare runs/uniform-0 runs/uniform-1 runs/iw_opd-0 runs/iw_opd-1
    """
    with _session(verbose, quiet):
        if compare:
            _compare_runs(run_dirs or [], target, output, json_)
            return
        run = _run_to_analyse(run_dirs or [], recipe, set_, output)
        names = weights.split(",") if weights is not None else None
        if continuations and not _continue(run, _step(run, step), _shard(shard), repair, dry_run, json_):
            return
        if sample is not None:
            _show_sample(run, sample, names, shade, json_)
        else:
            _analyze(run, names, dry_run, json_)


def _run_to_analyse(
    run_dirs: list[Path], recipe: list[Path] | None, overrides: list[str] | None, output: Path | None
) -> "Run":
    """Open the run as recorded, with the weight and the continuations that the recipe and the overrides say."""
    from opdctl.run import recorded_run, run_path

    if len(run_dirs) > 1:
        raise OpdctlError(f"{len(run_dirs)} runs at once", hint="give one, or --compare them")
    path = run_dirs[0] if run_dirs else output
    resolved = _recipe(recipe, overrides, path)
    run = recorded_run(path or run_path(resolved, None))
    changes = {"weight": resolved.weight, "continuations": resolved.continuations}
    return replace(run, recipe=run.recipe.model_copy(update=changes))


def _analyze(run: "Run", weights: list[str] | None, dry_run: bool, as_json: bool) -> None:
    from opdctl import report, sentences
    from opdctl.stages import analyze

    if dry_run:
        steps, left_out = analyze.scored_steps(run)
        log.say(f"{len(steps)} scored steps to read, {len(left_out)} that are not wholly scored; nothing was written")
        if as_json:
            _emit({"schema_version": SCHEMA_VERSION, "run_dir": str(run.path), "steps": steps, "left_out": left_out})
        return
    found = analyze.run(run, weights)
    written = report.write(run.path / "analysis", found)
    for phase in found.phases:
        log.say(sentences.sentence(phase))
    log.say(sentences.headline(found.verdict), "bold")
    for said in sentences.suggestions(found.verdict):
        log.say(said)
    log.table("token weights over all steps", *report.weight_lines(found))
    log.say(f"wrote {written['report']}, {len(written['figures'])} figures, {len(written['tables'])} tables beside it")
    log.say(f"next: open {written['report']}")
    if as_json:
        _emit({"schema_version": SCHEMA_VERSION, **written})


def _show_sample(run: "Run", sample_id: str, weights: list[str] | None, shade: str, as_json: bool) -> None:
    from opdctl import samples
    from opdctl.stages import analyze

    found = samples.one(run, sample_id, analyze.scored_steps(run)[0], analyze.chosen_weights(run, weights))
    samples.show(found, shade)
    if as_json:
        _emit({"schema_version": SCHEMA_VERSION, **found.as_dict()})


def _continue(run: "Run", step: int, shard: "Shard", repair: bool, dry_run: bool, as_json: bool) -> bool:
    """Make the continuations that are missing, or say how many there are; return whether nothing is left to others."""
    from opdctl import sentences
    from opdctl.engines import engine_pool
    from opdctl.run import open_run, read_recipe
    from opdctl.stages import continuations as stage

    if dry_run:
        log.say(stage.plan(run, step))
        return True
    models = ("student", *run.recipe.teacher_models())
    open_run(read_recipe(run.path), run.path, needs=models, record=False)  # refuses models that are not the run's
    with engine_pool(stage.recipe_for_engines(run.recipe), _device(run.recipe)) as engines:
        summary, made = stage.run(run, step, engines, repair=repair, shard=shard)
    if summary is None:
        log.say(f"wrote {made} parts of {stage.folder(run, step)}; the summary comes with the last shard's parts")
        if as_json:
            _emit({"schema_version": SCHEMA_VERSION, "run_dir": str(run.path), "parts_made": made})
        return False
    log.say(sentences.continued(summary))
    return True


def _compare_runs(paths: list[Path], target: float | None, output: Path | None, as_json: bool) -> None:
    from opdctl import comparison, report

    found = comparison.compare(paths, target)
    for each in found:
        log.say(comparison.line(each))
        log.table(f"{each['bench']}, {each['problems']} problems", *comparison.lines(each))
    written = report.write_comparison(output or Path("comparison"), found)
    log.say(f"wrote {', '.join(map(str, written))}")
    if as_json:
        _emit({"schema_version": SCHEMA_VERSION, "comparisons": found, "files": list(map(str, written))})


@app.command()
def change(
    run_dir: RunDir,
    recipe: Recipes = None,
    set_: Overrides = None,
    branch: Annotated[
        Path | None,
        typer.Option("--branch", metavar="NEW_RUN_DIR", help="Leave the run as it is, and make a new one of it."),
    ] = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Go on with a begun run under another recipe, from its current step on, and record that.

    \b
    opdctl change runs/quickstart --set weight.gamma=0.7 --dry-run
    opdctl change runs/quickstart --set weight.gamma=0.7
    opdctl change runs/quickstart --set weight.name=uniform --branch runs/uniform
    then: opdctl train --output runs/quickstart
    """
    with _session(verbose, quiet):
        from opdctl.run import recorded_run, with_engines

        resolved = with_engines(_recipe(recipe, set_, run_dir), run_dir)
        _change(recorded_run(run_dir), resolved, branch, dry_run, json_)


def _change(run: "Run", recipe: "Recipe", branch: Path | None, dry_run: bool, as_json: bool) -> None:
    from opdctl import change as changing
    from opdctl.status import next_stage_command

    found = changing.change(run, recipe)
    for line in found.lines():
        log.say(line)
    report = {
        "schema_version": SCHEMA_VERSION,
        "run_dir": str(branch or run.path),
        "step": found.step,
        "changes": [{"key": key, "old": old, "new": new} for key, old, new in found.settings],
        "dropped": [str(path) for path in found.dropped],
    }
    if dry_run:
        log.say("nothing was written")
    elif branch is not None:
        log.say(f"wrote {branch}: shares {changing.branch(found, branch)} files with {run.path}")
        log.say(f"next: {next_stage_command(replace(run, path=branch))}")
    else:
        changing.apply(found)
        log.say(f"{run.path}: from step {found.step} on under the new recipe")
        log.say(f"next: {next_stage_command(replace(run, recipe=recipe))}")
    if as_json:
        _emit(report)


@app.command()
def status(
    run_dir: RunDir,
    verify: Annotated[bool, typer.Option("--verify", help="Read every part and check its digest.")] = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Say what is done, missing or damaged in a run directory, and the next command.

    \b
    opdctl status runs/quickstart
    opdctl status runs/quickstart --verify
    """
    with _session(verbose, quiet):
        from opdctl import status as reading
        from opdctl.run import recorded_run

        found = reading.status(recorded_run(run_dir), verify=verify)
        log.pairs(f"{run_dir}: {found['steps_done']} of {found['steps']} steps", reading.rows(found))
        if json_:
            _emit(reading.as_json(found))
        stages = found["stages"] + found["continuations"]
        if found["damaged_evaluations"] or any(stage.state == "damaged" for stage in stages):
            raise typer.Exit(ExitCode.DATA)


def main() -> None:
    """Run the command line."""
    completion.join_bash_words(os.environ)
    app(prog_name="opdctl")
