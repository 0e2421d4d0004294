"""The study's page: docs/study.md. Every number and every verdict in it is made from the measurements."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import plots
from arms import FIXED_RATE, IW_OPD, PREFIX, SUFFIX, UNIFORM, Arm, Student
from results import Interval, Kept, Results, area, final, holm
from scipy.stats import spearmanr

SURE = 0.05
KIND = ("right so far", "gone wrong")


def write(out: Path, results: Results, seconds: float) -> None:
    """Write study.md into the folder `out`, and its figures into its folder images."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, data in plots.draw(results).items():
        (out / "images" / f"{name}.png").write_bytes(data)
    parts = (head(results, seconds), claims(results), comparison(results), prefixes(results), noise(results))
    (out / "study.md").write_text("\n\n".join([*parts, conditions(results), LIMITS]) + "\n")


# ── Words for numbers ────────────────────────────────────────────────────────────────────────────────────────────────


def signed(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def shown(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def verdict(found: Interval, p: float, wanted: int) -> str:
    """Return whether a difference has the sign that a claim wants, by its corrected p-value."""
    if p >= SURE:
        return "open"
    return "supported here" if found.mean * wanted > 0 else "contradicted here"


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def head(results: Results, seconds: float) -> str:
    scale = results.scale
    return f"""# A study on the embedded tasks

Which token weights and losses help, and when the beginning of a response matters most. This page is made by

```console
python tests/study
```

from {len(results.rows)} measurements, each by opdctl's own commands. On two CPU cores, two processes of one thread each, they
took {seconds / 60:.0f} minutes. What is measured is kept in build/study, so a study that was killed goes on.

[The embedded tasks](embedded-task.md) are sorting and swapping letters in writing. `student` and `student-spread` sort and
have 110,528 parameters, their teacher 365,664; `perm-student` swaps and is as large as its teacher. A training has
{scale.steps} steps of {scale.prompts_per_step} prompts, the quickstart's settings otherwise; seeds {", ".join(map(str, scale.seeds))}.

- **Accuracy by step** is that of the responses which a step draws: to problems that this training has not seen. The area
  under it is its mean over the steps. The final accuracy is that of the last student on 128 test problems.
- **Paired**: arms of one seed see the same prompts in the same order and begin with the same responses. Differences are
  taken seed by seed; intervals are Student's t at 95 % over seeds, over all students with the spread within each pooled.
- **Corrected**: p-values against uniform weights are corrected for the {len(scale.arms) - 1} arms (Holm).
- **Learning rates** are chosen for each arm among {", ".join(f"{rate:g}" for rate in scale.rates)}, by the area over all
  students with seed {", ".join(map(str, scale.selection_seeds))}, which is used for nothing else. At the lowest rate:
  {named(arm for arm in scale.arms if results.rates[arm.name] == min(scale.rates))}; at the highest:
  {named(arm for arm in scale.arms if results.rates[arm.name] == max(scale.rates))}. Beyond these ends nothing was tried."""


def named(arms: Iterable[Arm]) -> str:
    return "; ".join(arm.name for arm in arms) or "none"


def paper_claims(arms: dict[str, Arm]) -> list[tuple[str, Arm, Arm, int]]:
    """Return each claim of the paper as two arms and the sign that it wants of the second less the first; those whose
    arms are there."""
    wanted = (
        ("IW-OPD learns faster than OPD", UNIFORM, IW_OPD, 1),
        ("IW-OPD learns faster than a linear decay", arms.get("linear_decay gamma 0.5"), IW_OPD, 1),
        (
            "the prefix ratio is sensitive to alpha: 0.3 against 0.03",
            arms.get("prefix_ratio alpha 0.03"),
            arms.get("prefix_ratio alpha 0.3"),
            -1,
        ),
        ("the first 30 % of the tokens teach more than the last 30 %", SUFFIX, PREFIX, 1),
        (
            "a weight that rises with position learns more slowly than one that falls (IW-OPD)",
            IW_OPD,
            arms.get("position_sigmoid"),
            -1,
        ),
        ("the first 30 % alone learn as fast as all tokens", UNIFORM, PREFIX, 1),
    )
    return [(claim, one, other, sign) for claim, one, other, sign in wanted if one and other]


def claims(results: Results) -> str:
    known = paper_claims({arm.name: arm for arm in results.scale.arms})
    found = [results.difference(one, other, measure) for _, one, other, _ in known for measure in (area, final)]
    ps = holm([each.p for each in found])
    rows = []
    for i, (claim, *_, sign) in enumerate(known):
        cells = [(signed(found[j]), verdict(found[j], ps[j], sign)) for j in (2 * i, 2 * i + 1)]
        rows.append((claim, *cells[0], *cells[1]))
    columns = ("claim of the paper", "area", "", "final", "")
    iw = ", ".join(
        f"{student.name} {signed(results.difference(UNIFORM, IW_OPD, area, [student]))}"
        for student in results.scale.students
    )
    return f"""## What supports the paper, and what does not

Each claim is a comparison over all students. Intervals are plain; the words go by p-values corrected for all comparisons
of this table (Holm). What they do not decide is open, whichever way its mean lies.

{table(columns, rows)}

IW-OPD (gamma 0.5) less uniform by student, area: {iw}. The paper's gain grows with the difference in size between teacher
and student; three students of two sizes, weak in different ways, cannot tell size from kind."""


def comparison(results: Results) -> str:
    by_area, by_final = results.against_uniform(area), results.against_uniform(final)
    rows = [
        (
            name,
            f"{results.rates[name]:g}",
            signed(by_area[name][0]),
            shown(by_area[name][1]),
            signed(by_final[name][0]),
            shown(by_final[name][1]),
        )
        for name in by_area
    ]
    sure = {
        sign: [name for name, (found, p) in by_area.items() if p < SURE and found.mean * sign > 0] for sign in (1, -1)
    }
    unsure = [name for name in by_area if name not in sure[1] + sure[-1]]
    return f"""## All arms against uniform weights

By the area under the accuracy curve, corrected: above uniform {"; ".join(sure[1]) or "none"}; below
{"; ".join(sure[-1]) or "none"}; not told apart {"; ".join(unsure) or "none"}.

{table(("arm less uniform", "learning rate", "area", "p", "final", "p"), rows)}

![Differences from uniform weights](images/study-differences.png)

*Blue and orange: above and below uniform by the corrected p-value. The lines are the plain 95 % intervals.*

![Accuracy by step](images/study-accuracy.png)

*Mean of {plots.WINDOW} steps and of the seeds, ± 2 standard errors. Above, weights that lean on the beginning; below, the rest.*

By student: area, final accuracy, and the updates until the mean of three steps is halfway from the start to all right
(median over seeds; how many seeds got there).

{by_student(results)}"""


def by_student(results: Results) -> str:
    students = results.scale.students
    columns = ["arm", *(f"{student.name}: area, final, updates" for student in students)]
    return table(
        columns, ([arm.name, *(cell(results, student, arm) for student in students)] for arm in results.scale.arms)
    )


def cell(results: Results, student: Student, arm: Arm) -> str:
    steps = results.steps_to_target(student, arm)
    reached = sorted(step for step in steps if step is not None)
    # Seeds that did not get there come last, so the median is known as long as more than half did.
    median = str(reached[len(steps) // 2]) if len(reached) > len(steps) // 2 else "–"
    means = [results.values(student, arm, measure).mean() for measure in (area, final)]
    return f"{means[0]:.3f}, {means[1]:.3f}, {median} ({len(reached)} of {len(steps)})"


def prefixes(results: Results) -> str:
    rows = [
        (student.name, model, *(pooled(results, student, model, kind) for kind in KIND))
        for student in results.scale.students
        for model in ("teacher", "student")
    ]
    return f"""## What a prefix is worth

Teacher and student go on from 0, 10 … 90 % of {results.scale.responses} first responses of each student, before any training.
The task knows where an answer went wrong, so prefixes are split into those still right and those gone wrong. Accuracy of the
whole answers, over all lengths of prefix, and how many there were:

{table(("student", "who goes on", *KIND), rows)}

![Accuracy from prefixes](images/study-prefixes.png)

The paper's Figure 1b is the solid line of the teacher. On these tasks an answer is judged by its last letters, and a wrong
step is carried on; so most of its fall is the growing share of prefixes that have gone wrong already."""


def pooled(results: Results, student: Student, model: str, kind: str) -> str:
    rows = [
        r for r in results.rows[f"prefixes/{student.name}"]["by_prefix"] if (r["model"], r["prefix"]) == (model, kind)
    ]
    count = sum(row["problems"] for row in rows)
    return f"{sum(row['accuracy'] * row['problems'] for row in rows) / count:.1%} of {count}" if count else "–"


def noise(results: Results) -> str:
    rows = []
    for student in results.scale.students:
        for when in ("before", "after"):
            found = results.rows[f"noise/{student.name}"][when]
            drift = found["drift"]
            rows.append(
                (
                    f"{student.name}, {when}",
                    *(f"{drift[name]:.2g}" for name in ("itself, float32", "itself, bfloat16", "teacher, float32")),
                    f"{found['weight_error']:.2g}",
                    *(
                        f"{number(found[f'spent_{kind}'])}, {number(found[f'weight_{kind}'])}"
                        for kind in ("right", "wrong")
                    ),
                )
            )
    columns = (
        "student",
        "itself, float32",
        "itself, bfloat16",
        "teacher",
        "change of w_t",
        "right: sum, mean w_t",
        "wrong: sum, mean w_t",
    )
    return f"""## The noise floor of the weights

IW-OPD's weight divides by the sum of |A| over the response, and a small sum is as good as a large one. Mean |A| a token in
nats: of the student scored by itself, where all of it is rounding, and by its teacher; before and after {results.scale.steps} steps of
uniform weights at {FIXED_RATE:g}. Change of w_t: root mean square, by scoring with the teacher in bfloat16 in place of float32.
Then the median sum of |A| over right and over wrong responses, with the median of their mean weights.

{table(columns, rows)}

A right response has spent little, and is weighted like one that has drifted far: the weight says where in the response the
discrepancy lies, not how much there is."""


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def conditions(results: Results) -> str:
    found = results.conditions()
    better = [each for each in found if each.prefix.low > each.suffix.high]
    worse = [each for each in found if each.prefix.high < each.suffix.low]
    enough = [each for each in found if each.prefix.low <= 1 <= each.prefix.high]
    rows = [
        (
            f"{each.name}, rate {each.rate:g}",
            f"{each.length:.0f}",
            f"{each.onset:.0%}",
            f"{each.first_share:.0%}",
            f"{each.start:.2f}",
            signed(each.gain),
            kept(each.prefix),
            kept(each.suffix),
        )
        for each in found
    ]
    columns = (
        "condition",
        "tokens",
        "onset",
        "signal on first 30 %",
        "start",
        "gain",
        "kept by prefix 30 %",
        "by suffix 30 %",
    )
    return f"""## When the beginning matters most

Students made for this, from an able small one (110,528 parameters) and from the teacher itself (large), by {results.scale.lesson_steps} steps on
faulty sorting: a wrong letter (content) or an answer that stops listing what is left (format), early (first 34 % of the answer)
or late (67 to 83 %); swapping with 4, 8 and 12 swaps; and `{results.scale.students[0].name}` at three learning rates. Each was trained on all
tokens, on the first and on the last 30 %, seeds {", ".join(map(str, results.scale.condition_seeds))}, at rate {FIXED_RATE:g} unless it says otherwise. The gain is the accuracy of the
last 5 steps less that of the first; kept is the share of the gain of all tokens (spread over seeds pooled over conditions).

The beginning keeps more than the end, intervals apart, in {len(better)} of {len(found)}: {listed(better)}. The end keeps more in {len(worse)}:
{listed(worse)}. Prefix less suffix goes with the onset by a rank correlation of {rank(found, "onset")}, with the signal on the
first 30 % by {rank(found, "first_share")}. All of the gain lies within the prefix's interval in {len(enough)}: {listed(enough)}.

{table(columns, rows)}

![Gain kept](images/study-conditions.png)"""


def rank(found: Sequence[Kept], name: str) -> str:
    """Return Spearman's correlation of prefix less suffix with what a condition is like."""
    less = [each.prefix.mean - each.suffix.mean for each in found]
    result = spearmanr(less, [getattr(each, name) for each in found])
    return f"{result.statistic:+.2f} (p {shown(float(result.pvalue))}, {len(found)} conditions)"


def kept(found: Interval) -> str:
    return f"{found.mean:.0%} [{found.low:.0%}, {found.high:.0%}]"


def listed(found: Sequence[Kept]) -> str:
    return "; ".join(f"{each.name} at {each.rate:g}" for each in found) or "none"


LIMITS = """## What it does not say

- The students are toys that know the task and were made unsure. Much of the gain is sharpening; nothing here is a claim on
  language models of any size.
- Twenty steps show the speed of learning, not where it ends.
- The intervals are over seeds: prompts, samples, order. They do not cover other students of the same kind, or another teacher.
- A weight of 1 + gamma and less makes gradients larger too. The norm is clipped and Adam divides it out, so most of that is
  gone, but not all.
- Learning rates were chosen on a grid of three. At a rate that suits all tokens, training on a part of them can fall apart.
- The conditions are compared at one rate, and their number of seeds is small."""
