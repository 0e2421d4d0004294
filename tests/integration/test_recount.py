"""Every number of an analysis against a recount from the files of the run, for runs of eight shapes."""

import html
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from helpers import recount
from helpers.commands import invoke
from helpers.recount import Means, Recorded, RecordedRun
from helpers.run_shapes import LIMIT, SHAPES, is_on_track

from opdctl.analysis import analyze, captions, report
from opdctl.analysis.results import Analysis
from opdctl.artifacts.manifests import AnalysisRecord, check_form
from opdctl.runs.run import Run

QUANTITIES = ("abs_advantage", "k1", "k3", "student_logp", "teacher_logp")


class Case:
    """The analysis of a run as `analyze-position` writes it, and the recount of its files."""

    def __init__(self, path: Path):
        analyses: list[Analysis] = []
        self.figures: set[str] = set()
        with pytest.MonkeyPatch.context() as patch:
            # No test here looks at the figures, which take most of the time.
            patch.setattr(report, "write_figure", lambda path, panels: [])
            patch.setattr(report, "render_panels", lambda panels, name: self.figures.add(name) or [])
            write = report.write_report
            record = lambda folder, each, **options: analyses.append(each) or write(folder, each, **options)  # noqa: E731
            patch.setattr(report, "write_report", record)
            result = invoke("analyze-position", path, "--json")
        assert result.code == 0, result.err
        self.captions = captions.figure_captions(analyses[0])
        self.page = text_of((path / "analysis" / "report.html").read_text())
        self.terminal = " ".join(result.err.split())
        self.summary: dict[str, Any] = json.loads((path / "analysis" / "summary.json").read_text())
        assert self.summary == {**result.json()["summary"], "digest": self.summary["digest"]}
        tables = sorted((path / "analysis" / "tables").glob("*.parquet"))
        self.tables = {table.stem: pq.read_table(table).to_pydict() for table in tables}
        self.run = recount.read_run(path)
        self.weights = list(dict.fromkeys(self.tables["weights"]["weight"]))
        recount.add_weight(self.run, self.weights[0], lambda step: recount.trained_weight(self.run, step))
        for label in self.weights[1:]:
            recount.add_weight(self.run, label)

    def phases(self, table: str) -> Iterator[tuple[str, list[Recorded]]]:
        """Yield the name and the responses of each phase of a table."""
        for name in dict.fromkeys(self.tables[table]["phase"]):
            yield name, self.responses_of(name)

    def responses_of(self, phase: str) -> list[Recorded]:
        """Return the responses of a phase: "step 3", "steps 0–3"."""
        first, _, last = phase.split()[1].partition("–")
        return [response for response in self.run.responses if int(first) <= response.step <= int(last or first)]

    def rows(self, table: str, **cells: Any) -> list[dict[str, Any]]:
        """Return the rows of a table with these cells."""
        columns = self.tables[table]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [row for row in rows if all(row[name] == value for name, value in cells.items())]

    def quantities(self) -> list[str]:
        """Return the quantities that have means: those of the tokens and the weights."""
        optional = [name for name in ("student_entropy", "teacher_entropy", "top_k_overlap") if name in self.columns]
        return [*QUANTITIES, *optional, *self.weights]

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.run.responses[0].values


def text_of(page: str) -> str:
    """Return the text of a page with single spaces. A link is within a sentence."""
    page = re.sub(r"<(style|script)\b.*?</\1>|</?a\b[^>]*>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@pytest.fixture(scope="module", params=SHAPES)
def case(request, tmp_path_factory) -> Case:
    path = tmp_path_factory.mktemp("recount") / "run"
    SHAPES[request.param](path)
    return Case(path)


def number(cell: float | None) -> float:
    return math.nan if cell is None else float(cell)


def cells(row: Mapping[str, Any], name: str) -> list[float]:
    """Return a value and the bounds of its interval."""
    return [number(row[column]) for column in (name, f"{name}_low", f"{name}_high")]


def check_estimate(row: Mapping[str, Any], name: str, expected: tuple[float, float, float]) -> None:
    """Check a value and its exact interval in a row of a table."""
    assert cells(row, name) == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), (name, row)


def check_bootstrap(row: Mapping[str, Any], name: str, expected: float, ranges: np.ndarray) -> None:
    """Check a value, and that its interval is that of another bootstrap but for chance."""
    value, *bounds = cells(row, name)
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), (name, row)
    for bound, (least, greatest) in zip(bounds, (ranges[:2], ranges[2:]), strict=True):
        assert math.isnan(bound) == math.isnan(least), (name, row)
        if not math.isnan(bound):
            rounding = 1e-9 * max(1.0, abs(bound))
            assert least - rounding <= bound <= greatest + rounding, (name, row)


def check_means(rows: list[dict[str, Any]], means: Means) -> None:
    """Check the means by bin, and that their intervals contain them and are within the range of the values."""
    for b, row in enumerate(rows):
        assert row["tokens"] == pytest.approx(means.tokens[b])
        assert row["responses"] == means.responses[b]
        assert row.get("prompts", means.prompts[b]) == means.prompts[b]
        for q, name in enumerate(means.names):
            check_bootstrap(row, name, means.value[b, q], means.bounds[:, b, q])
            value, low, high = cells(row, name)
            rounding = 1e-9 * max(1.0, abs(value))
            assert means.least[b, q] - rounding <= value <= means.greatest[b, q] + rounding
            if not math.isnan(low):
                assert means.least[b, q] - rounding <= low <= value + rounding, (name, row)
                assert value - rounding <= high <= means.greatest[b, q] + rounding, (name, row)


def bounds(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["from_position"], row["to_position"]) for row in rows]


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_position(case):
    for phase, responses in case.phases("position"):
        rows = case.rows("position", phase=phase)
        assert bounds(rows) == recount.position_bins(max(map(len, responses)))
        check_means(rows, recount.count_means(responses, recount.position_shares, case.quantities()))


def test_cohorts(case):
    for phase in case.summary["phases"]:
        cohorts = recount.cohorts(case.responses_of(phase["phase"]))
        rows = case.rows("cohorts", phase=phase["phase"])
        assert {row["cohort"] for row in rows} == cohorts.keys()
        for label, responses in cohorts.items():
            rows = case.rows("cohorts", phase=phase["phase"], cohort=label)
            shortest = min(map(len, responses))
            assert bounds(rows) == [
                each for each in recount.position_bins(max(map(len, responses))) if each[1] <= shortest
            ]
            assert {row["responses"] for row in rows} == {len(responses)}
            check_means(rows, recount.count_means(responses, recount.position_shares, case.quantities()))


def test_relative_position(case):
    for phase, responses in case.phases("relative"):
        rows = case.rows("relative", phase=phase)
        assert [(row["from_percent"], row["to_percent"]) for row in rows] == [(p, p + 5) for p in range(0, 100, 5)]
        check_means(rows, recount.count_means(responses, recount.relative_shares, case.quantities()))


def test_log_prob_of_prefixes(case):
    for phase, responses in case.phases("prefix_logp"):
        rows = case.rows("prefix_logp", phase=phase)
        bins = recount.position_bins(max(map(len, responses)))[: recount.shown_bins(responses)]
        assert [row["tokens"] for row in rows] == [last for _, last in bins]
        for model in ("student", "teacher"):
            value, ranges = recount.cumulative_logp(responses, model)
            for b, row in enumerate(rows):
                check_bootstrap(row, model, value[b], ranges[:, b])
            assert (np.diff([row[model] for row in rows]) <= 0).all()  # as in each response


def test_weights_over_the_same_responses(case):
    for phase, responses in case.phases("weights_of_long"):
        size, long = recount.long_responses(responses)
        rows = case.rows("weights_of_long", phase=phase)
        assert bounds(rows) == [each for each in recount.position_bins(max(map(len, long))) if each[1] <= size]
        assert {row["responses"] for row in rows} == {len(long)}
        check_means(rows, recount.count_means(long, recount.position_shares, case.weights))


def test_steps(case):
    assert case.tables["steps"]["step"] == case.summary["steps"] == case.run.steps
    assert case.summary["skipped"] == case.run.skipped
    rows = case.rows("steps")
    for row in rows:
        responses = case.run.of_steps([row["step"]])
        means = recount.count_means(responses, recount.overall_share, case.quantities())
        check_means([row | {"responses": means.responses[0]}], means)
        assert row["responses"] == len(responses)
        check_estimate(row, "prefix_fraction", recount.prefix_fraction(responses))
        check_estimate(row, "own_fraction", recount.own_fraction(responses))
        first = recount.overall_means(case.run.of_steps(case.run.steps[:1]), ["k1"])["k1"]
        assert row["k1_relative"] == pytest.approx(means.value[0, means.names.index("k1")] / first, rel=1e-9)
        if row is not rows[0]:
            check_estimate(row, "k1_relative", recount.ratio(cells(row, "k1"), cells(rows[0], "k1")))


def test_steps_by_relative_position(case):
    for step in case.run.steps:
        rows = case.rows("steps_relative", step=step)
        means = recount.count_means(case.run.of_steps([step]), recount.relative_shares, ["abs_advantage"])
        assert [row["abs_advantage"] for row in rows] == pytest.approx(means.value[:, 0].tolist())


def test_prefix_ratio(case):
    for phase, responses in case.phases("prefix_ratio"):
        size, long = recount.long_responses(responses)
        for row in case.rows("prefix_ratio", phase=phase):
            first, last = row["from_position"], row["to_position"]
            assert last <= size
            for name, fraction in (("low", 0.1), ("median", 0.5), ("high", 0.9)):
                below, above = recount.position_quantiles(long, row["weight"], first, last, fraction)
                if row[name] == 0.0:
                    assert below < math.exp(-30)
                    continue
                logs = [math.log(max(value, 1e-300)) for value in (below, above)]
                tolerance = max(map(abs, logs)) / 3 + 0.002
                assert logs[0] - tolerance <= math.log(row[name]) <= logs[1] + tolerance
            expected = recount.sample_size_at(long, row["weight"], first, last)
            assert row["effective_sample_size"] == pytest.approx(expected, rel=1e-6)


def test_cumulative_signal(case):
    for phase, responses in case.phases("cumulative_signal"):
        for row in case.rows("cumulative_signal", phase=phase):
            expected = recount.prefix_fraction(responses, row["percent"]) if row["percent"] else (0.0, 0.0, 0.0)
            check_estimate(row, "cumulative_signal", expected)


def test_weights(case):
    for phase, responses in case.phases("weights"):
        means = recount.count_means(responses, recount.overall_share, case.weights)
        rows = case.rows("weights", phase=phase)
        for q, row in enumerate(rows):
            name = row["weight"]
            check_bootstrap(row, "mean", means.value[0, q], means.bounds[:, 0, q])
            check_bootstrap(row, "effective_sample_size", *recount.effective_sample_size(responses, name))
            check_estimate(row, "prefix_fraction", recount.prefix_fraction(responses, weight=name))
    assert case.summary["weights"] == case.rows("weights")


def test_correlations(case):
    for phase, responses in case.phases("correlations"):
        expected = recount.rank_correlations(responses)
        rows = case.rows("correlations", phase=phase)
        assert [row["property"] for row in rows] == list(expected)
        for row in rows:
            found = [number(row[name]) for name in ("correlation", "partial_correlation")]
            assert found == pytest.approx(expected[row["property"]], abs=1e-6, nan_ok=True), row["property"]


def test_continuations(case):
    folders = sorted((case.run.path / "continuations").glob("step-*"))
    found = case.rows("continuations") if folders else []
    expected = [
        {"step": int(folder.name.removeprefix("step-")), **row}
        for folder in folders
        for row in recount.continuation_rows(folder, is_on_track)
    ]
    assert len(found) == len(expected)
    for row in expected:
        place = {name: row[name] for name in ("step", "prefix", "model", "percent", "tokens")}
        (match,) = case.rows("continuations", **place)
        numbers = {name: value for name, value in row.items() if name not in place}
        assert {name: match[name] for name in numbers} == pytest.approx(numbers, rel=1e-9)


def test_csv_files_have_the_numbers_of_the_tables(case):
    for name, columns in case.tables.items():
        rows = pacsv.read_csv(case.run.path / "analysis" / "tables" / f"{name}.csv").to_pydict()
        assert rows.keys() == columns.keys()
        for column, values in columns.items():
            for found, expected in zip(rows[column], values, strict=True):
                is_number = isinstance(expected, int | float) and not isinstance(expected, bool)
                wanted = pytest.approx(expected, rel=1e-12, nan_ok=True) if is_number else expected
                assert found == wanted or found in ("", None), (name, column)


# ── Summary ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bias(case):
    check_bias(case.summary["bias"], case.run.responses)
    directions = {each["bias"]["direction"] for each in (case.summary, *case.summary["phases"])} - {"unknown"}
    assert case.summary["direction"] == (
        "unknown" if not directions else "mixed" if len(directions) > 1 else directions.pop()
    )


def check_bias(found: Mapping[str, Any], responses: Sequence[Recorded]) -> None:
    for each, expected in zip(found["estimates"], recount.prefix_estimates(responses), strict=True):
        assert (each["of"], each["responses"]) == (expected["of"], expected["responses"])
        fraction = [number(each["fraction"][name]) for name in ("value", "low", "high")]
        assert fraction == pytest.approx(expected["fraction"], rel=1e-6, nan_ok=True)
        assert number(each["p_value"]) == pytest.approx(expected["p_value"], rel=1e-6, nan_ok=True)
    assert found["direction"] == recount.direction(responses)
    if change := found["change_point"]:
        check_change_point(change, recount.change_point(responses))


def check_change_point(found: Mapping[str, Any], expected: recount.ChangePoint) -> None:
    assert found["position"]["value"] == expected.position
    for name, (least, greatest) in (("low", expected.lows), ("high", expected.highs)):
        assert least - 1e-9 <= found["position"][name] <= greatest + 1e-9
    assert (found["before"], found["after"]) == pytest.approx((expected.before, expected.after), rel=1e-9)
    assert found["p_value"] == pytest.approx(expected.p_value, abs=0.005)


def test_summary_has_its_form(case):
    """The schema, and the keys that docs/analysis.md lists."""
    form = {name: value for name, value in case.summary.items() if name != "digest"}
    check_form(form, AnalysisRecord)
    page = (Path(__file__).parents[2] / "docs/analysis.md").read_text()
    table = page.partition("| key | content |")[2].partition("\n\n")[0]
    documented = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    ]
    assert documented == list(AnalysisRecord.__annotations__) == list(form)
    with pytest.raises(ValueError, match="direction"):
        check_form(form | {"direction": "middle"}, AnalysisRecord)


def test_phases(case):
    for phase in case.summary["phases"]:
        responses = case.responses_of(phase["phase"])
        expected = recount.overall_means(responses, case.quantities())
        assert {name: phase[name] for name in expected} == pytest.approx(expected, rel=1e-9)
        assert phase["weight"] == phase[case.weights[0]]
        assert phase["responses"] == len(responses)
        assert phase["tokens"] == sum(map(len, responses))
        assert phase["truncated"] == sum(response.is_truncated for response in responses)
        fraction = [number(phase["prefix_fraction"][name]) for name in ("value", "low", "high")]
        assert fraction == pytest.approx(recount.prefix_fraction(responses), rel=1e-6, nan_ok=True)
        omitted = phase["omitted_tokens"], phase["omitted_signal"]
        assert omitted == pytest.approx(recount.omitted_fractions(responses), abs=1e-9)
        check_bias(phase["bias"], responses)


def test_training_phases(case):
    """The steps of each training phase, and what changed, by the records of the updates."""
    weights = {step: recount.trained_weight(case.run, step)["name"] for step in case.run.steps}
    changed = [step for step in case.run.steps[1:] if weights[step] != weights[case.run.steps[0]]]
    training = case.summary["training"]
    assert len(training) == (2 if changed else 1)
    if changed:
        assert [each["name"] for each in training] == ["steps 0–1", "steps 2–3"]
        assert [each["weight"] for each in training] == ["iw_opd gamma=2", "linear_decay gamma=0.75"]
        assert [phase["phase"] for phase in case.summary["phases"]] == ["steps 0–1", "steps 2–3"]
        assert case.weights[0] == "as trained"
        keys = [change[0] for change in training[1]["changes"]]
        assert {"weight.name", "weight.gamma"} <= {*keys}


# ── Sentences ────────────────────────────────────────────────────────────────────────────────────────────────────────


NUMBER = re.compile(r"(?<![\w.=/])[-+]?\d+(?:,\d{3})*(?:\.\d+)?%?")
Numbers = Sequence[float | Sequence[float]]


def check_numbers(case: Case, name: str, expected: Numbers) -> None:
    """Check that the caption of a figure has these numbers, as rounded, in this order, and no others.

    Names of weights, cohorts and responses are no numbers. An estimate without an interval is one number, and one
    without a value none.
    """
    text = case.captions[name]
    assert text in case.page
    for each in sorted(
        {*case.weights, *(response.sample_id for response in case.run.responses)}, key=len, reverse=True
    ):
        text = text.replace(each, "")
    text = re.sub(r"\d+–\d+ tokens|of 1 token\b|step-\d{5}|\(k1\)", "", text)
    numbers = [value for each in expected for value in (each if isinstance(each, Sequence) else [each])]
    numbers = [value for value in numbers if not math.isnan(value)]
    found = NUMBER.findall(text)
    assert len(found) == len(numbers), (text, found, numbers)
    for shown, value in zip(found, numbers, strict=True):
        assert is_rounded(shown, value), (shown, value, text)


def is_rounded(shown: str, value: float) -> bool:
    """Whether a number is a value, rounded to its decimals, or to three significant digits without decimals."""
    plain = shown.rstrip("%").replace(",", "")
    value *= 100 if shown.endswith("%") else 1
    decimals = len(plain.partition(".")[2])
    return abs(float(plain) - value) <= max(0.501 * 10**-decimals, 0 if decimals else 5.01e-4 * abs(value))


def steps_in(phase: str) -> list[int]:
    """Return the numbers in the name of a phase."""
    return [int(digits) for digits in re.findall(r"\d+", phase)]


def test_no_number_is_missing_in_the_page(case):
    assert not re.search(r"\b(nan|inf)\b|nan%", f"{case.page} {case.terminal}")
    assert case.captions.keys() == case.figures


def test_page_has_the_numbers_of_the_tables(case):
    for table in ("weights", "relative", "steps", "correlations"):
        for row in case.rows(table):
            for name in (name for name in row if f"{name}_low" in row):
                value, low, high = cells(row, name)
                interval = "" if math.isnan(low) else f" [{low:.4g}, {high:.4g}]"
                assert math.isnan(value) or f"{value:.4g}{interval}" in case.page, (table, name, row)
    for estimate in case.summary["bias"]["estimates"]:
        assert f"{estimate['fraction']['value']:.1%}" in case.page


def test_caption_of_position(case):
    phases = [
        (
            *steps_in(phase),
            len(responses),
            sum(map(len, responses)),
            *recount.overall_means(responses, ["abs_advantage", "k1"]).values(),
            0.3,
            recount.prefix_fraction(responses)[0],
        )
        for phase, responses in case.phases("position")
    ]
    check_numbers(case, "position", [*phases, *omissions(case)])


def omissions(case: Case) -> list[tuple[float, ...]]:
    """Return the numbers of what is left out, of each phase that leaves something out."""
    numbers = []
    for phase, responses in case.phases("position"):
        tokens, signal = recount.omitted_fractions(responses)
        bins = recount.position_bins(max(map(len, responses)))[: recount.shown_bins(responses)]
        numbers += [(*steps_in(phase), bins[-1][1], tokens, signal)] if tokens else []
    return numbers


def test_caption_of_log_probs(case):
    phases = []
    for phase, _ in case.phases("prefix_logp"):
        last = case.rows("prefix_logp", phase=phase)[-1]
        phases.append((*steps_in(phase), last["tokens"], last["student"], last["teacher"]))
    check_numbers(case, "prefix_logp", [*phases, *omissions(case)])


def test_caption_of_cumulative_signal(case):
    responses = case.run.responses
    half = next(p for p in range(101) if signal_share(responses, p) >= 0.5)
    bias = case.summary["bias"]
    if bias["direction"] == "unknown":
        prompts = len({response.prompt_id for response in responses})
        return check_numbers(case, "cumulative_signal", [prompts, 20, half / 100])
    estimates = recount.prefix_estimates(responses)
    fractions = [each["fraction"] for each in estimates]
    shown = [0.3, *fractions, 0.3, 0.99]
    p_values = [each["p_value"] for each in estimates if not math.isnan(each["p_value"])]
    p_value = p_values[0] if bias["direction"] == "none found" else max(p_values)
    shown += [] if bias["direction"] == "mixed" else [max(p_value, 0.001)]
    if change := bias["change_point"]:
        position = [change["position"][name] for name in ("value", "low", "high")]
        shown += [position, change["before"], change["after"]]
    return check_numbers(case, "cumulative_signal", [*shown, half / 100])


def signal_share(responses: Sequence[Recorded], percent: int) -> float:
    before = math.fsum(recount.signal_before(response.signal, percent) for response in responses)
    return before / math.fsum(value for response in responses for value in response.signal)


def test_caption_of_steps(case):
    if len(case.run.steps) == 1:
        assert not {"steps", "heatmap"} & case.captions.keys()
        return
    rows = case.rows("steps")
    first, last = rows[0], rows[-1]
    expected = [cells(first, "k1"), first["step"], cells(last, "k1"), last["step"], cells(last, "k1_relative"), 0.3]
    expected += [cells(row, name) for name in ("prefix_fraction", "own_fraction") for row in (first, last)]
    check_numbers(case, "steps", expected)
    places: list[float] = []
    for row in (first, last):
        signal = [each["abs_advantage"] for each in case.rows("steps_relative", step=row["step"])]
        start = signal.index(max(signal))
        end = next((b for b in range(start, len(signal)) if signal[b] < max(signal) * (1 - 1e-9)), len(signal))
        places += [0.05 * start, 0.05 * end, row["step"]]
    check_numbers(case, "heatmap", places)


def sizes_of_long(responses: Sequence[Recorded]) -> tuple[int, int, int]:
    """Return the number of long responses, that of all with a token, and the tokens that long ones have at least."""
    length, long = recount.long_responses(responses)
    return len(long), sum(len(each) > 0 for each in responses), length


def test_caption_of_weights(case):
    ratios = [name for name in case.weights if name.startswith("prefix_ratio")]
    all_steps = case.rows("weights")[: len(case.weights)]
    sizes = [row["effective_sample_size"] for row in all_steps if row["weight"] not in ratios]
    lengths, differences = [], []
    for phase, responses in case.phases("weights_of_long"):
        rows = case.rows("weights_of_long", phase=phase)
        lengths.append((*steps_in(phase), *sizes_of_long(responses)))
        difference = max(abs(row["iw_opd"] - row["iw_opd signed=true"]) for row in rows)
        differences.append((difference, *steps_in(phase)))
    check_numbers(case, "weights", [*sizes, *lengths, *differences])
    expected: list[float] = [0.1, 0.9]
    for phase, responses in case.phases("prefix_ratio"):
        rows = case.rows("prefix_ratio", phase=phase)
        expected += [*steps_in(phase), *sizes_of_long(responses), rows[-1]["to_position"]]
        for name in ratios:
            of_weight = [row for row in rows if row["weight"] == name]
            low = [row["from_position"] for row in of_weight if row["median"] < 0.01]
            expected += [0.01, low[0]] if low else [of_weight[-1]["median"]]
            expected.append(of_weight[-1]["effective_sample_size"])
    check_numbers(case, "prefix_ratio", expected)


def test_caption_of_correlations(case):
    expected: list[float | Sequence[float]] = []
    for phase, responses in case.phases("correlations"):
        expected += [*steps_in(phase), *[sum(map(len, responses))] * 2]
        for row in case.rows("correlations", phase=phase):
            raw, partial = cells(row, "correlation"), cells(row, "partial_correlation")
            expected += [] if math.isnan(raw[0]) else [raw, partial]
    check_numbers(case, "correlations", expected)


def test_caption_of_cohorts(case):
    expected: list[float] = []
    for phase, responses in case.phases("position"):
        cohorts = recount.cohorts(responses)
        sizes = {
            min(map(len, each)) if label != "truncated" else math.inf: len(each) for label, each in cohorts.items()
        }
        others = sum(len(each) > 0 for each in responses) - sum(sizes.values())
        expected += [*steps_in(phase), *(sizes[shortest] for shortest in sorted(sizes)), *([others] if others else [])]
    check_numbers(case, "cohorts", expected)


def test_caption_of_the_median_response(case):
    """The response with the median mean |A| of the first step."""
    responses = [response for response in case.run.of_steps(case.run.steps[:1]) if len(response)]
    ordered = sorted(responses, key=lambda each: (np.mean(each.signal), each.sample_id))
    median = ordered[len(ordered) // 2]
    assert case.captions["one_response"].startswith(median.sample_id)
    place = median.signal.index(max(median.signal)) + 1
    check_numbers(case, "one_response", [case.run.steps[0], place, len(median), max(median.signal)])
    table = case.tables["one_response"]
    assert table["sample_id"] == [median.sample_id] * len(median)
    assert table["position"] == [*range(1, len(median) + 1)]
    assert np.abs(table["advantage"]) == pytest.approx(median.signal)
    for name in ("student_logp", "teacher_logp", *case.weights):
        assert table[name] == pytest.approx(median.values[name]), name


def test_caption_of_entropies(case):
    names = [name for name in ("student_entropy", "teacher_entropy", "top_k_overlap") if name in case.columns]
    if not names:
        assert "entropy" not in case.captions
        return
    means = []
    for _, responses in case.phases("position"):
        found = recount.count_means(responses, recount.overall_share, names)
        means += [found.value[0, q] for q in range(len(names))]
    text = case.captions["entropy"]
    assert [float(each) for each in re.findall(r"(?:entropy|overlap) ([\d.]+)", text)] == pytest.approx(
        means, abs=5.01e-4
    )


def test_caption_of_continuations(case):
    folders = sorted((case.run.path / "continuations").glob("step-*"))
    expected: list[float] = []
    for folder in folders:
        rows = [row for row in recount.continuation_rows(folder, is_on_track) if row["prefix"] == "any"]
        expected.append(12)
        for model in ("student", "teacher"):
            percents = [row for row in rows if row["model"] == model and row["percent"] is not None]
            for row in (percents[0], percents[-1]):
                expected += [row["accuracy"], row["low"], row["high"], row["percent"] / 100]
            for row in rows:
                if row["model"] == model and row["tokens"] is not None:
                    expected += [row["accuracy"], row["low"], row["high"], row["tokens"], row["responses"]]
        expected.append(LIMIT)
    if folders:
        check_numbers(case, "continuations", expected)
    else:
        assert "continuations" not in case.captions


def test_answers(case):
    """What the answers at the top of the page state of mean |A| in the compared phases, and of the run's own weight."""
    phases = [phase["phase"] for phase in case.summary["phases"]]
    interval = r"(?: \[[^\]]*\])?"
    level = rf"([\d.]+){interval} nats per token in {phases[0]} and ([\d.]+){interval} in {phases[-1]}"
    found = re.findall(level, case.page)
    assert bool(found) == (len(phases) > 1)
    for shown in found:
        for text, phase in zip(shown, (phases[0], phases[-1]), strict=True):
            responses = case.responses_of(phase)
            signal = recount.overall_means(responses, ["abs_advantage"])["abs_advantage"]
            assert float(text) == pytest.approx(signal, rel=5.01e-3)
            assert f"{recount.prefix_fraction(responses)[0]:.1%}" in case.page
    (size,) = re.findall(rf"With {re.escape(case.weights[0])} the run’s tokens are worth (\d+%)", case.page)
    assert is_rounded(size, recount.effective_sample_size(case.run.responses, case.weights[0])[0])


def test_caption_of_accuracies(finished_run):
    """The accuracies of the first and of the last student and of the teacher, from the graded responses."""
    analysis = analyze.analyze_run(Run.load(finished_run))
    (folder,) = (finished_run / "eval").iterdir()
    students = {int(path.name[-5:]): recount.accuracy(path) for path in folder.glob("step-*")}
    first, last = min(students), max(students)
    expected = [students[first], first, students[last], last, recount.accuracy(folder / "teacher")]
    shown = NUMBER.findall(captions.figure_captions(analysis)["accuracy"].removeprefix(folder.name))
    assert all(is_rounded(each, value) for each, value in zip(shown, expected, strict=True)), (shown, expected)


def test_terminal(case):
    """The terminal has the sentence of each phase and the headline of the report."""
    for phase, responses in case.phases("position"):
        signal = recount.overall_means(responses, ["abs_advantage"])["abs_advantage"]
        share = recount.prefix_fraction(responses)[0]
        assert re.search(
            rf"{phase}: {len(responses)} responses.*? mean \|A\| {signal:.4f} .*? {share:.1%}", case.terminal
        )
    for row in case.rows("weights")[: len(case.weights)]:
        cell = rf"{re.escape(row['weight'])} │ {row['mean']:.4g}"
        assert re.search(cell, case.terminal), cell


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(finished_run_with_columns) -> RecordedRun:
    run = recount.read_run(finished_run_with_columns)
    recount.add_weight(run, "weight", lambda step: recount.trained_weight(run, step))
    return run


def test_metrics(trained):
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == trained.steps
    for line in lines:
        expected = recount.step_metrics(trained.of_steps([line["step"]]))
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert (line["invalid_responses"], line["staleness"]) == (0, 0)
        # The trainer's log-probs differ from the stored ones by rounding.
        means = recount.overall_means(trained.of_steps([line["step"]]), ["k1", "abs_advantage", "weight"])
        assert {name: line[name] for name in means} == pytest.approx(means, rel=1e-3)
