"""Writes docs/study.md. All numbers, and all statements that depend on them, are generated from the measurements."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from arms import FIXED_LEARNING_RATE, IW_OPD, PREFIX, SUFFIX, UNIFORM, Arm, Student
from plots import WINDOW, draw_figures
from results import ConditionResult, Interval, Results, area, final, holm
from scipy.stats import spearmanr

SIGNIFICANCE_LEVEL = 0.05
EQUIVALENCE_MARGIN = 0.02
"""The difference in accuracy up to which an arm learns as fast as another."""
PREFIX_KINDS = {"right so far": "correct prefixes", "gone wrong": "incorrect prefixes"}
"""The kinds of prefix in the summary of continuations, and their column titles."""


def write(out: Path, results: Results, seconds: float) -> None:
    """Write study.md into `out`, and its figures into `out`/images. seconds: wall time of the measurements."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, png in draw_figures(results).items():
        (out / "images" / f"{name}.png").write_bytes(png)
    (out / "study.md").write_text(format_page(results, seconds))


def format_page(results: Results, seconds: float) -> str:
    sections = (
        setup_section(results, seconds),
        claims_section(results),
        comparison_section(results),
        prefixes_section(results),
        noise_section(results),
        conditions_section(results),
        LIMITATIONS,
    )
    return "\n\n".join(sections) + "\n"


# ── Numbers as text ──────────────────────────────────────────────────────────────────────────────────────────────────


def format_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def format_optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def format_list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def format_names(names: Iterable[str]) -> str:
    return "; ".join(names) or "none"


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


# ── Sections ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def setup_section(results: Results, seconds: float) -> str:
    scale, rates = results.scale, results.learning_rates
    at = {r: format_names(a.name for a in scale.arms if rates[a.name] == r) for r in scale.learning_rates}
    return f"""# A study on the toy tasks

This study measures which token weights and objectives help, and when the start of a response matters most. This page is
the output of

```console
python tests/study
```

It summarizes {len(results.rows)} measurements by opdctl's own commands, which took {seconds / 60:.0f} minutes on two CPU cores with two processes of one
thread each. They are in tests/study/measured.jsonl: the command repeats only those that are removed from that file.

[The toy tasks](embedded-task.md) are sorting and swapping letters in writing. `student` and `student-spread` sort. They
have 110,528 parameters, and their teacher has 365,664. `perm-student` swaps and is as large as its teacher. A training run
has {scale.steps} steps of {scale.prompts_per_step} prompts and otherwise the settings of the quickstart. Seeds: {format_list(scale.seeds)}.

- **Accuracy by step** is the accuracy of the sampled responses of a step. Their problems are new in that run. The area under
  the curve is the mean over steps. The final accuracy is that of the last student on {scale.test_problems} test problems.
- **Pairing**: all arms with the same seed have the same prompts in the same order, and the same first responses.
  Differences are paired by seed. Intervals are Student's t at 95 % over seeds. Over all students each student has a separate
  variance, and the degrees of freedom are Satterthwaite's, as in Welch's test.
- **Correction**: p-values against uniform weights are corrected for {len(scale.arms) - 1} arms (Holm).
- **Learning rates** are selected for each arm from {format_list(f"{rate:g}" for rate in scale.learning_rates)} by the area over all students. The
  selection uses seed {format_list(scale.selection_seeds)}; nothing else does. Arms at the lowest learning rate:
  {at[min(scale.learning_rates)]}. Arms at the highest:
  {at[max(scale.learning_rates)]}. Values outside this range were not tested."""


def paper_claims(arms: dict[str, Arm]) -> list[tuple[str, Arm, Arm, int, float]]:
    """Return each claim of the paper: two arms, and on which side of a threshold their difference supports it.

    The difference is the second arm minus the first. Sign 1: it exceeds the threshold; -1: it is less. Claims whose
    arms are not in the study are omitted.
    """
    claims = (
        ("IW-OPD learns faster than OPD", UNIFORM, IW_OPD, 1, 0.0),
        ("IW-OPD learns faster than a linear decay", arms.get("linear_decay gamma 0.5"), IW_OPD, 1, 0.0),
        (
            "the prefix ratio is sensitive to alpha: 0.3 against 0.03",
            arms.get("prefix_ratio alpha 0.03"),
            arms.get("prefix_ratio alpha 0.3"),
            -1,
            0.0,
        ),
        ("the first 30 % of the tokens teach more than the last 30 %", SUFFIX, PREFIX, 1, 0.0),
        (
            "a weight that rises with position learns more slowly than one that falls (IW-OPD)",
            IW_OPD,
            arms.get("position_sigmoid"),
            -1,
            0.0,
        ),
        ("the first 30 % alone learn as fast as all tokens", UNIFORM, PREFIX, 1, -EQUIVALENCE_MARGIN),
    )
    return [(claim, baseline, arm, *rest) for claim, baseline, arm, *rest in claims if baseline and arm]


def assess_claim(difference: Interval, p: float, expected_sign: int, threshold: float) -> str:
    """Return whether a difference supports a claim. p: corrected, of the hypothesis that it equals the threshold."""
    if p >= SIGNIFICANCE_LEVEL:
        return "open"
    return "supported here" if (difference.mean - threshold) * expected_sign > 0 else "contradicted here"


def claims_section(results: Results) -> str:
    claims = paper_claims({arm.name: arm for arm in results.scale.arms})
    differences = [results.difference(baseline, arm, m) for _, baseline, arm, *_ in claims for m in (area, final)]
    thresholds = [threshold for *_, threshold in claims for _ in (area, final)]
    corrected = holm([each.p_value(threshold) for each, threshold in zip(differences, thresholds, strict=True)])
    rows = []
    for i, (claim, *_, sign, threshold) in enumerate(claims):
        cells = [
            (differences[j].format(), assess_claim(differences[j], corrected[j], sign, threshold))
            for j in (2 * i, 2 * i + 1)
        ]
        rows.append((claim, *cells[0], *cells[1]))
    by_student = format_list(
        f"{student.name} {results.difference(UNIFORM, IW_OPD, area, [student]).format()}"
        for student in results.scale.students
    )
    return f"""## Which claims of the paper hold here

Each claim is a comparison over all students. The intervals are not corrected. The assessments use p-values corrected for all
comparisons of this table (Holm). A claim that they do not decide is open, whatever the sign of the mean. "As fast" is tested
against the margin {EQUIVALENCE_MARGIN}: it is supported if the difference is significantly above -{EQUIVALENCE_MARGIN}, and contradicted if it is
significantly below.

{format_table(("claim of the paper", "area", "", "final", ""), rows)}

Area of IW-OPD (gamma 0.5) minus uniform, by student: {by_student}. In the paper, the gain grows with the difference in size
between teacher and student. Here, size cannot be separated from the kind of weakness: three students have two sizes and
different weaknesses."""


def comparison_section(results: Results) -> str:
    by_area, by_final = results.against_uniform(area), results.against_uniform(final)
    rows = [
        (
            name,
            f"{results.learning_rates[name]:g}",
            by_area[name][0].format(),
            format_p(by_area[name][1]),
            by_final[name][0].format(),
            format_p(by_final[name][1]),
        )
        for name in by_area
    ]
    significant = {
        sign: [n for n, (difference, p) in by_area.items() if p < SIGNIFICANCE_LEVEL and difference.mean * sign > 0]
        for sign in (1, -1)
    }
    others = [name for name in by_area if name not in significant[1] + significant[-1]]
    return f"""## All arms against uniform weights

Area under the accuracy curve, by corrected p-value. Above uniform: {format_names(significant[1])}. Below:
{format_names(significant[-1])}. No significant difference: {format_names(others)}.

{format_table(("arm minus uniform", "learning rate", "area", "p", "final", "p"), rows)}

![Differences from uniform weights](images/study-differences.png)

*Blue and orange: above and below uniform by the corrected p-value. The lines are uncorrected 95 % intervals.*

![Accuracy by step](images/study-accuracy.png)

*Running mean over {WINDOW} steps, averaged over seeds, ± 2 standard errors. Top: weights that emphasize the start; bottom: all others.*

By student: area, final accuracy, and the number of updates until the mean of three steps is halfway between the initial
accuracy and 1 (median over seeds; in parentheses, how many seeds reach it).

{student_table(results)}"""


def student_table(results: Results) -> str:
    students = results.scale.students
    columns = ["arm", *(f"{student.name}: area, final, updates" for student in students)]
    rows = ([arm.name, *(student_cell(results, student, arm) for student in students)] for arm in results.scale.arms)
    return format_table(columns, rows)


def student_cell(results: Results, student: Student, arm: Arm) -> str:
    steps = results.steps_to_target(student, arm)
    reached = sorted(step for step in steps if step is not None)
    # Seeds that do not reach the target rank last, so the median is known if more than half reach it.
    median = str(reached[len(steps) // 2]) if len(reached) > len(steps) // 2 else "–"
    means = [results.values(student, arm, measure).mean() for measure in (area, final)]
    return f"{means[0]:.3f}, {means[1]:.3f}, {median} ({len(reached)} of {len(steps)})"


def prefixes_section(results: Results) -> str:
    rows = [
        (student.name, model, *(pooled_accuracy(results, student, model, kind) for kind in PREFIX_KINDS))
        for student in results.scale.students
        for model in ("teacher", "student")
    ]
    return f"""## The value of a prefix

Teacher and student continue prefixes of 0, 10 … 90 % of {results.scale.responses} responses of each untrained student. The task can check a
prefix, so the prefixes are split into correct and incorrect ones. The table has the accuracy of the complete responses over
all prefix lengths, and their number:

{format_table(("student", "continued by", *PREFIX_KINDS.values()), rows)}

![Accuracy from prefixes](images/study-prefixes.png)

Figure 1b of the paper corresponds to the solid line of the teacher. On these tasks the last letters decide whether a response
is correct, and an incorrect step propagates. So most of the decline is due to the growing fraction of prefixes that are
incorrect already."""


def pooled_accuracy(results: Results, student: Student, model: str, kind: str) -> str:
    rows = [
        r for r in results.rows[f"prefixes/{student.name}"]["by_prefix"] if (r["model"], r["prefix"]) == (model, kind)
    ]
    count = sum(row["problems"] for row in rows)
    return f"{sum(row['accuracy'] * row['problems'] for row in rows) / count:.1%} of {count}" if count else "–"


def noise_section(results: Results) -> str:
    rows = []
    for student in results.scale.students:
        for when in ("before", "after"):
            floor = results.rows[f"noise/{student.name}"][when]
            mean_abs = floor["mean_abs_advantage"]
            rows.append(
                (
                    f"{student.name}, {when}",
                    *(f"{mean_abs[name]:.2g}" for name in ("itself, float32", "itself, bfloat16", "teacher, float32")),
                    f"{floor['weight_rms_change']:.2g}",
                    *(
                        f"{format_optional(floor[f'abs_sum_{kind}'])}, {format_optional(floor[f'mean_weight_{kind}'])}"
                        for kind in ("correct", "incorrect")
                    ),
                )
            )
    columns = (
        "student",
        "itself, float32",
        "itself, bfloat16",
        "teacher",
        "change of w_t",
        "correct: sum, mean w_t",
        "incorrect: sum, mean w_t",
    )
    return f"""## The noise floor of the weights

The weight of IW-OPD divides by the sum of |A| over the response, so its scale does not depend on the size of that sum. The
table shows mean |A| in nats per token: of the student scored by itself, which is rounding error only, and scored by its
teacher, before and after {results.scale.steps} steps with uniform weights at learning rate {FIXED_LEARNING_RATE:g}. Change of w_t: root mean square of the change of
the weight if the teacher scores in bfloat16 instead of float32. Last: the medians over correct and over incorrect responses
of the sum of |A| and of the mean weight.

{format_table(columns, rows)}

A correct response has a small sum of |A|, but its weights are as large as those of an incorrect one: the weight depends on
where in the response the discrepancy is, not on its amount."""


def conditions_section(results: Results) -> str:
    conditions = results.conditions()
    prefix_better = [each for each in conditions if each.difference.low > 0]
    suffix_better = [each for each in conditions if each.difference.high < 0]
    less_retained = [each for each in conditions if each.prefix.high < 1]
    rows = [
        (
            f"{each.name}, rate {each.learning_rate:g}",
            f"{each.length:.0f}",
            f"{each.onset:.0%}",
            f"{each.prefix_signal:.0%}",
            f"{each.start:.2f}",
            each.gain.format(),
            each.prefix.format(".0%"),
            each.suffix.format(".0%"),
        )
        for each in conditions
    ]
    columns = (
        "condition",
        "tokens",
        "onset",
        "signal on first 30 %",
        "start",
        "gain",
        "retained by prefix 30 %",
        "by suffix 30 %",
    )
    return f"""## When the start of a response matters most

The conditions use further students, made for this purpose from a small model (110,528 parameters) that solves the task and
from the teacher itself (large). Each was trained for {results.scale.degrade_steps} steps on faulty answers. For sorting, a fault is an incorrect letter
(content), or the answer stops writing the remaining letters (format). It begins early (first 34 % of the answer) or late
(67 to 83 %). For swapping there are 4, 8 and 12 swaps. In addition, `{results.scale.students[0].name}` is trained at three learning rates. Each student
is trained on all tokens, on the first 30 % and on the last 30 %, with seeds {format_list(results.scale.condition_seeds)}, at learning rate {FIXED_LEARNING_RATE:g} unless stated
otherwise. The gain is the mean accuracy of the last 5 steps minus that of the first step. Retained is the fraction of the
gain of all tokens. Its interval is from the seeds of the condition alone, since their spread differs much, and is not corrected.

The prefix retains more than the suffix, by the 95 % interval of their difference, in {len(prefix_better)} of {len(conditions)} conditions: {format_conditions(prefix_better)}. The suffix retains more in {len(suffix_better)}:
{format_conditions(suffix_better)}. The rank correlation of the difference, prefix minus suffix, with the onset is {format_rank_correlation(conditions, "onset")}, and with the
signal on the first 30 % {format_rank_correlation(conditions, "prefix_signal")}. The prefix retains less than the full gain in {len(less_retained)}: {format_conditions(less_retained)}.

{format_table(columns, rows)}

![Gain retained](images/study-conditions.png)"""


def format_rank_correlation(conditions: Sequence[ConditionResult], name: str) -> str:
    """Return Spearman's correlation of prefix minus suffix with a property of the conditions.

    Conditions with the same initial student are not independent, so they are one observation: their mean.
    """
    by_student: dict[str, list[tuple[float, float]]] = {}
    for each in conditions:
        # Those of one name, and perm4, perm8 and perm.
        by_student.setdefault(each.name.rstrip("0123456789"), []).append((each.difference.mean, getattr(each, name)))
    differences, values = zip(*(np.mean(pairs, axis=0) for pairs in by_student.values()), strict=True)
    result = spearmanr(differences, values)
    p_value = f"p {format_p(float(result.pvalue))}, " if np.isfinite(result.pvalue) else ""  # NaN for two students
    return f"{result.statistic:+.2f} ({p_value}{len(by_student)} students)"


def format_conditions(conditions: Sequence[ConditionResult]) -> str:
    return format_names(f"{each.name} at {each.learning_rate:g}" for each in conditions)


LIMITATIONS = """## Limitations

- The students are toy models that know the task and were degraded. Much of the gain is sharpening. Nothing here is a claim
  about language models of any size.
- Twenty steps show the speed of learning, not its limit.
- The intervals are over seeds: prompts, samples and order. They do not cover other students of the same kind, or another
  teacher.
- A weight of up to 1 + gamma also makes gradients larger. Clipping of the norm and Adam remove most of this effect, but not
  all.
- Learning rates were selected from three values. At a learning rate that suits all tokens, training on a part of them can
  collapse.
- The conditions are compared at one learning rate, with few seeds."""
