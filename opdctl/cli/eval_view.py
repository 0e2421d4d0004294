"""Evaluations at the terminal: one, its failures, two compared."""

from collections.abc import Mapping, Sequence
from typing import Any

from opdctl import console
from opdctl.evaluation.results import Evaluation, differing_responses, incorrect_responses
from opdctl.evaluation.statistics import Estimate

SHOWN_TAIL_CHARS = 600  # of an incorrect response
SHOWN_ANSWER_CHARS = 200
SHOWN_NAMES = 5  # of the problems that a warning lists


def print_evaluation_comparison(comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Print the comparison of two evaluations on each benchmark, and warn of differences in their protocols."""
    rows = [
        [
            f"{each['bench']}, {each['problems']} problems",
            f"{each['a']['avg']:.1%}",
            f"{each['b']['avg']:.1%}",
            f"{100 * each['difference']:+.1f}",
            Estimate(100 * each["difference"], *(100 * bound for bound in each["ci"])).format_interval("+.1f"),
            f"{each['p_value']:.3g}",
            f"{each['better']} / {each['worse']}",
        ]
        for each in comparisons
    ]
    console.answer(f"A  {comparisons[0]['a']['path']}\nB  {comparisons[0]['b']['path']}")
    header = ("benchmark", "A", "B", "B − A, points", "95% CI, paired", "p", "better / worse")
    console.print_table("paired comparison by problem", header, rows)
    for each in comparisons:
        if each["protocol_differences"]:
            console.warn(f"{each['bench']}: the protocols differ in {', '.join(each['protocol_differences'])}")


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the accuracies of an evaluation with their intervals."""
    rows = [_accuracy_row(f"Avg@{summary['samples']}", summary["avg"], summary["ci"], summary["ci_same_problems"])]
    for name, key in (("pass", "pass_at"), ("maj", "maj_at")):
        by_k = summary[key].items()
        rows += [_accuracy_row(f"{name}@{k}", each["mean"], each["ci"], None) for k, each in by_k if k != "1"]
    title = f"{summary['bench']}, {summary['model']}: {summary['problems']} problems, {summary['samples']} samples each"
    console.print_table(title, ("", "", "95% CI, resampled problems", "95% CI, same problems"), rows)
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lengths = summary["response_lengths"]
    console.answer(
        f"responses: mean length {summary['response_length']:.0f} tokens (p50 {lengths['p50']:.0f}, p90 "
        f"{lengths['p90']:.0f}), {summary['truncated_fraction']:.1%} truncated; verdicts: {verdicts}"
    )
    if "ended_thinking_fraction" in summary:
        console.answer(f"thinking was ended in {summary['ended_thinking_fraction']:.1%} of the responses")
    if summary.get("math_verify_differences"):  # older summaries lack the key
        console.answer(
            f"math-verify alone: {summary['avg_math_verify']:.1%}; it differs on {summary['math_verify_differences']} "
            "responses, which --show-failures lists"
        )
    _print_warnings(summary)


def _accuracy_row(name: str, value: float, ci: Sequence[float], ci_same_problems: Sequence[float] | None) -> list[str]:
    intervals = (Estimate(value, *bounds).format_interval() if bounds else "–" for bounds in (ci, ci_same_problems))
    return [name, f"{value:.1%}", *intervals]


def _print_warnings(summary: Mapping[str, Any]) -> None:
    benchmark, name = summary["benchmark"], summary["bench"]
    if failures := summary["grader_failures"]:
        shown = ", ".join(f"{each['sample_id']} ({each['verdict']})" for each in failures[:SHOWN_NAMES])
        console.warn(f"{name}: {len(failures)} answers crashed the grader or timed out and count as incorrect: {shown}")
    if golds := benchmark["unparsable_golds"]:
        shown = ", ".join(golds[:SHOWN_NAMES])
        console.warn(f"{name}: {len(golds)} gold answers could not be parsed; only an exact match counts: {shown}")
    overlap = benchmark["contamination"]
    if overlap and overlap["contaminated"]:
        shown = ", ".join([*overlap["fractions"]][:SHOWN_NAMES])
        console.warn(
            f"{name}: the training prompts contain {overlap['contaminated']} of its {overlap['problems']} problems "
            f"(more than half of their words, in {overlap['ngram']}-grams shared with one prompt): {shown}"
        )


def print_failures(evaluation: Evaluation, count: int) -> None:
    """Print incorrect responses, with their end, and the answers on which the grader differs from math-verify."""
    rows = evaluation.rows()
    for row in incorrect_responses(rows, count):
        answer = "no answer" if row.extracted is None else f"answer {row.extracted[:SHOWN_ANSWER_CHARS]!r}"
        gold = row.gold[:SHOWN_ANSWER_CHARS]
        console.answer(f"{row.sample_id}: {answer}, gold {gold!r}, verdict {row.verdict}, {row.finish_reason}", "bold")
        console.answer(("… " if len(row.text) > SHOWN_TAIL_CHARS else "") + row.text[-SHOWN_TAIL_CHARS:])
    for row in differing_responses(rows, count):
        answer, gold = (row.extracted or "")[:SHOWN_ANSWER_CHARS], row.gold[:SHOWN_ANSWER_CHARS]
        verdicts = ("correct", "incorrect") if row.correct else ("incorrect", "correct")
        console.answer(f"{row.sample_id}: answer {answer!r}, gold {gold!r}: {verdicts[0]}, math-verify: {verdicts[1]}")
