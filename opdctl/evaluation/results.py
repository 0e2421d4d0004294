"""Finished evaluations, read back: their tables, the failures in them, two of them compared problem by problem."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import log, stats, store
from opdctl.errors import ExitCode, OpdctlError
from opdctl.records import Graded

TAIL = 600  # characters shown of a failure
NOTABLE = ("samples", "temperature", "top_p", "max_tokens", "suffix", "template_arguments", "grader", "engine", "dtype")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: its folder and what its summary says."""

    path: Path
    summary: Mapping[str, Any]

    def rows(self) -> list[Graded]:
        return store.sealed_rows(self.path, Graded)

    def shares(self) -> dict[str, float]:
        """Return the share of right samples of each problem, by id."""
        correct: dict[str, list[bool]] = defaultdict(list)
        for row in self.rows():
            correct[row.problem_id].append(row.correct)
        return {name: float(np.mean(samples)) for name, samples in correct.items()}

    def same_problems_as(self, other: "Evaluation") -> bool:
        """Whether both were asked the same problems."""
        digests = [each.summary["benchmark"]["digest"] for each in (self, other)]
        return digests[0] == digests[1]


def load(path: Path) -> Evaluation:
    """Open an evaluation's folder. Raises OpdctlError when it holds no finished one."""
    if not (path / "summary.json").exists():
        raise OpdctlError(
            f"{path}: no finished evaluation: it has no summary.json",
            hint="give a run directory, or a folder such as runs/NAME/eval/BENCH/step-00064",
        )
    return Evaluation(path, store.read_json(path / "summary.json"))


def of_benches(path: Path) -> dict[str, Evaluation]:
    """Return the evaluations that `path` stands for, by benchmark: its own, or of a run directory the newest student's.

    Raises OpdctlError when there is none.
    """
    if (path / "summary.json").exists() or not (path / "eval").is_dir():
        found = load(path)
        return {found.summary["bench"]: found}
    newest = {
        folder.name: max(steps)
        for folder in sorted((path / "eval").iterdir())
        if (steps := [step.parent for step in folder.glob("step-*/summary.json")])
    }
    if not newest:
        raise OpdctlError(f"{path}: no student of this run was evaluated", hint=f"run `opdctl eval --run {path}`")
    return {bench: load(step) for bench, step in newest.items()}


def compare(one: Path, other: Path, benches: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare two evaluations, or two runs' newest ones, on every benchmark that both have: `other` minus `one`.

    Raises OpdctlError: 2 where they share no benchmark, 4 where one benchmark's problems are not the same.
    """
    left, right = of_benches(one), of_benches(other)
    shared = [bench for bench in left if bench in right and (benches is None or bench in benches)]
    if not shared or {*(benches or ())} - {*shared}:
        raise OpdctlError(
            f"--compare: {one} was evaluated on {', '.join(left)}, {other} on {', '.join(right)}",
            hint="evaluate both on the same benchmarks",
        )
    return [_compared(left[bench], right[bench]) for bench in shared]


def refuse_other_problems(a: Evaluation, b: Evaluation) -> None:
    """Raise OpdctlError (code 4) unless both were asked the same problems."""
    if not a.same_problems_as(b):
        raise OpdctlError(
            f"--compare: {a.path} and {b.path} were asked other problems",
            hint="evaluate one of them again: same --data, same eval.problems",
            code=ExitCode.SETTINGS,
        )


def _compared(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    refuse_other_problems(a, b)
    one, other = a.shares(), b.shares()
    found = stats.compare([one[name] for name in one], [other[name] for name in one])
    protocols = a.summary["protocol"], b.summary["protocol"]
    return {
        "bench": a.summary["bench"],
        "a": {"path": str(a.path), "avg": a.summary["avg"], "ci": a.summary["ci"]},
        "b": {"path": str(b.path), "avg": b.summary["avg"], "ci": b.summary["ci"]},
        "problems": len(one),
        "better": sum(other[name] > one[name] for name in one),
        "worse": sum(other[name] < one[name] for name in one),
        "difference": found.difference,
        "ci": list(found.ci),
        "p_value": found.p_value,
        "other_protocol": [key for key in NOTABLE if protocols[0][key] != protocols[1][key]],
    }


def show_comparison(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what `compare` found, and warn of differences in the protocol."""
    rows = [
        [
            f"{each['bench']}, {each['problems']} problems",
            f"{each['a']['avg']:.1%}",
            f"{each['b']['avg']:.1%}",
            f"{100 * each['difference']:+.1f}",
            f"[{100 * each['ci'][0]:+.1f}, {100 * each['ci'][1]:+.1f}]",
            f"{each['p_value']:.3g}",
            f"{each['better']} / {each['worse']}",
        ]
        for each in found
    ]
    log.say(f"A  {found[0]['a']['path']}\nB  {found[0]['b']['path']}")
    header = ("benchmark", "A", "B", "B − A, points", "95 %, paired", "p", "better / worse")
    log.table("compared problem by problem", header, rows)
    for each in found:
        if each["other_protocol"]:
            log.warn(f"{each['bench']}: not the same protocol: {', '.join(each['other_protocol'])} differ")


def show(summary: Mapping[str, Any]) -> None:
    """Print one evaluation's accuracies with both intervals."""
    rows = [_line(f"Avg@{summary['samples']}", summary["avg"], summary["ci"], summary["ci_these"])]
    for name, key in (("pass", "pass_at"), ("maj", "maj_at")):
        found = summary[key].items()
        rows += [_line(f"{name}@{k}", each["mean"], each["ci"], None) for k, each in found if k != "1"]
    title = f"{summary['bench']}, {summary['model']}: {summary['problems']} problems, {summary['samples']} samples each"
    log.table(title, ("", "", "95 %, such problems", "95 %, these problems"), rows)
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lengths = summary["response_lengths"]
    log.say(
        f"responses: {summary['response_length']:.0f} tokens in the mean (median {lengths['p50']:.0f}, 90 % below "
        f"{lengths['p90']:.0f}), {summary['truncated_share']:.1%} truncated; verdicts: {verdicts}"
    )
    _warn(summary)


def _line(name: str, value: float, ci: Sequence[float] | None, these: Sequence[float] | None) -> list[str]:
    intervals = (f"[{low_high[0]:.1%}, {low_high[1]:.1%}]" if low_high else "–" for low_high in (ci, these))
    return [name, f"{value:.1%}", *intervals]


def _warn(summary: Mapping[str, Any]) -> None:
    about, name = summary["benchmark"], summary["bench"]
    if killers := summary["killers"]:
        shown = ", ".join(f"{each['sample_id']} ({each['verdict']})" for each in killers[:3])
        log.warn(f"{name}: {len(killers)} answers killed or outlasted their grader and count as wrong: {shown}")
    if golds := about["unreadable_golds"]:
        log.warn(f"{name}: {len(golds)} gold answers can only be met word for word: {', '.join(golds[:5])}")
    found = about["contamination"]
    if found and found["seen"]:
        log.warn(
            f"{name}: the training prompts hold {found['seen']} of its {found['problems']} problems (half of their "
            f"{found['ngram']}-grams or more): {', '.join(list(found['shares'])[:5])}"
        )


def failures(evaluation: Evaluation, count: int) -> list[Graded]:
    """Return wrong responses, the first one of every problem before any second one."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for order, row in enumerate(evaluation.rows()):
        if not row.correct:
            ranked.append((seen[row.problem_id], order, row))
            seen[row.problem_id] += 1
    return [row for _, _, row in sorted(ranked, key=lambda each: each[:2])[:count]]


def show_failures(evaluation: Evaluation, count: int) -> None:
    """Print wrong responses: what was wanted, what was read, and how the response ends."""
    for row in failures(evaluation, count):
        answer = "no answer" if row.extracted is None else f"answer {row.extracted[:200]!r}"
        log.say(
            f"{row.sample_id}: {answer}, gold {row.gold[:200]!r}, verdict {row.verdict}, {row.finish_reason}", "bold"
        )
        log.say(("… " if len(row.text) > TAIL else "") + row.text[-TAIL:])
