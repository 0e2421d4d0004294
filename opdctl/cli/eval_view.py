"""Evaluations at the terminal: one, its failures, two compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from opdctl import console
from opdctl.evaluation.results import Evaluation
from opdctl.evaluation.results import failures as incorrect_responses

SHOWN_TAIL_CHARS = 600  # characters shown of a failure


def print_evaluation_comparison(found: Sequence[Mapping[str, Any]]) -> None:
    """Print the comparison of two evaluations on each benchmark, and warn of differences in their protocols."""
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
    console.info(f"A  {found[0]['a']['path']}\nB  {found[0]['b']['path']}")
    header = ("benchmark", "A", "B", "B − A, points", "95% CI, paired", "p", "better / worse")
    console.print_table("paired comparison by problem", header, rows)
    for each in found:
        if each["other_protocol"]:
            console.warn(f"{each['bench']}: the protocols differ in {', '.join(each['other_protocol'])}")


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the accuracies of an evaluation with their intervals."""
    rows = [_accuracy_row(f"Avg@{summary['samples']}", summary["avg"], summary["ci"], summary["ci_same_problems"])]
    for name, key in (("pass", "pass_at"), ("maj", "maj_at")):
        found = summary[key].items()
        rows += [_accuracy_row(f"{name}@{k}", each["mean"], each["ci"], None) for k, each in found if k != "1"]
    title = f"{summary['bench']}, {summary['model']}: {summary['problems']} problems, {summary['samples']} samples each"
    console.print_table(title, ("", "", "95% CI, resampled problems", "95% CI, same problems"), rows)
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lengths = summary["response_lengths"]
    console.info(
        f"responses: mean length {summary['response_length']:.0f} tokens (p50 {lengths['p50']:.0f}, p90 "
        f"{lengths['p90']:.0f}), {summary['truncated_fraction']:.1%} truncated; verdicts: {verdicts}"
    )
    _print_warnings(summary)


def _accuracy_row(name: str, value: float, ci: Sequence[float] | None, these: Sequence[float] | None) -> list[str]:
    intervals = (f"[{low_high[0]:.1%}, {low_high[1]:.1%}]" if low_high else "–" for low_high in (ci, these))
    return [name, f"{value:.1%}", *intervals]


def _print_warnings(summary: Mapping[str, Any]) -> None:
    about, name = summary["benchmark"], summary["bench"]
    if failures := summary["grader_failures"]:
        shown = ", ".join(f"{each['sample_id']} ({each['verdict']})" for each in failures[:3])
        console.warn(f"{name}: {len(failures)} answers crashed the grader or timed out and count as incorrect: {shown}")
    if golds := about["unparsable_golds"]:
        console.warn(
            f"{name}: {len(golds)} gold answers could not be parsed; only an exact match counts: {', '.join(golds[:5])}"
        )
    found = about["contamination"]
    if found and found["seen"]:
        console.warn(
            f"{name}: the training prompts contain {found['seen']} of its {found['problems']} problems (at least half "
            f"of their {found['ngram']}-grams): {', '.join(list(found['shares'])[:5])}"
        )


def print_failures(evaluation: Evaluation, count: int) -> None:
    """Print incorrect responses: the gold answer, the extracted answer, and the end of the response."""
    for row in incorrect_responses(evaluation, count):
        answer = "no answer" if row.extracted is None else f"answer {row.extracted[:200]!r}"
        console.info(
            f"{row.sample_id}: {answer}, gold {row.gold[:200]!r}, verdict {row.verdict}, {row.finish_reason}", "bold"
        )
        console.info(("… " if len(row.text) > SHOWN_TAIL_CHARS else "") + row.text[-SHOWN_TAIL_CHARS:])
