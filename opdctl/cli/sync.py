"""`opdctl run sync`: a run directory and an object store."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console
from opdctl.cli.options import DryRun, Json, RunDirOrWord, RunOption, Verbose
from opdctl.cli.session import command_session, named_or_newest_run, print_json
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.runs.sync import RunSync
    from opdctl.runs.sync_plan import Direction, SyncPlan

KINDS = ("sent", "received", "unchanged")


def sync(
    run_dir: RunDirOrWord = None,
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="Such as s3://bucket/runs/NAME.", show_default=False)
    ] = None,
    run: RunOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Keep both sides in step until the run is finished on both.")
    ] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Copy a run to an object store, or back: what is new or changed. Nothing is deleted.

    The order of the arguments is the direction: from the first to the second. Any file system of fsspec can be used.

    \b
    opdctl run sync runs/quickstart s3://bucket/runs/quickstart
    opdctl run sync s3://bucket/runs/quickstart runs/quickstart
    opdctl run sync --follow runs/quickstart s3://bucket/runs/quickstart
    then, on another machine: opdctl run sync s3://bucket/runs/quickstart runs/quickstart
    """
    with command_session(verbose, as_json=json_):
        from opdctl.artifacts.object_store import ObjectStore
        from opdctl.runs.sync import RunSync

        path, address, direction = _split_direction(run_dir, url, run)
        work, start = RunSync(path, ObjectStore(address)), time.monotonic()
        if dry_run:
            counts = _count(work.plan("both" if follow else direction, follow=follow))
        elif follow:
            counts = _follow(work)
        else:
            with work.hold():
                plan = work.plan(direction)
                work.transfer(plan)
            counts = _count(plan)
        _report(work, counts, direction, time.monotonic() - start, dry_run=dry_run, as_json=json_)


def _split_direction(first: str | None, second: str | None, option: Path | None) -> tuple[Path, str, "Direction"]:
    """Return the run, the URL, and the direction between them."""
    from opdctl.artifacts.object_store import is_url

    words = [word for word in (first, second) if word is not None]
    urls = [word for word in words if is_url(word)]
    if len(urls) != 1:
        hint = "give a run directory and a URL such as s3://bucket/runs/NAME; the first is copied to the second"
        raise OpdctlError("invalid_usage", f"URL is {'given twice' if urls else 'missing'}", hint=hint)
    paths = [Path(word) for word in words if not is_url(word)]
    path = named_or_newest_run(paths[0] if paths else None, option)
    return path, urls[0], "receive" if len(words) > 1 and is_url(words[0]) else "send"


def _follow(work: "RunSync") -> dict[str, dict[str, int]]:
    counts = {kind: {"files": 0, "bytes": 0} for kind in KINDS}

    def report(plan: "SyncPlan") -> None:
        for kind, count in _count(plan).items():
            is_total = kind != "unchanged"
            counts[kind] = {unit: count[unit] + counts[kind][unit] * is_total for unit in count}
        console.info(_summarize(_count(plan), ("sent", "received")))

    with work.hold():
        work.follow(report)
    return counts


def _count(plan: "SyncPlan") -> dict[str, dict[str, int]]:
    """Return the number of files and bytes that a plan sends, receives and leaves as they are."""
    return {kind: {"files": len(getattr(plan, kind)), "bytes": getattr(plan, f"{kind}_bytes")} for kind in KINDS}


def _summarize(counts: dict[str, dict[str, int]], kinds: tuple[str, ...]) -> str:
    from opdctl.artifacts.files import format_bytes

    described = [(kind, counts[kind]["files"], format_bytes(counts[kind]["bytes"])) for kind in kinds]
    return ", ".join(f"{kind} {number:,} files ({size})" for kind, number, size in described if number) or "no changes"


def _report(
    work: "RunSync",
    counts: dict[str, dict[str, int]],
    direction: "Direction",
    seconds: float,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from opdctl.artifacts.files import format_bytes
    from opdctl.runs.run import Run

    moved = counts["sent"]["bytes"] + counts["received"]["bytes"]
    if dry_run:
        console.answer(f"{work.path} and {work.store.url}: {_summarize(counts, KINDS)}")
        console.info("nothing was written")
    else:
        speed = f", {format_bytes(int(moved / max(seconds, 1e-3)))}/s" if moved else ""
        console.answer(f"{work.path} and {work.store.url}: {_summarize(counts, KINDS)}; {seconds:.1f} s{speed}")
    if direction == "receive" and not dry_run:
        command = Run.load(work.path).next_command()
    else:
        command = shlex.join(["opdctl", "run", "sync", work.store.url, str(work.path)])
    console.info(f"next: {command}" if direction == "receive" else f"next, on another machine: {command}")
    if as_json:
        result: dict[str, Any] = {"run_dir": str(work.path), "url": work.store.url, **counts}
        print_json({**result, "seconds": seconds, "next": command})
