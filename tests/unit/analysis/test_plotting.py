"""Panels: what their axes show, and the formats that they are saved in."""

import re

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes

from opdctl.analysis import plotting
from opdctl.analysis.page_svg import render_panel
from opdctl.analysis.plotting import Panel, compose, draw_panel, figure_bytes, plot_band, plot_reference, scale_by_step


def drawn(mean, low=None, high=None, adapt=lambda axis: None) -> Axes:
    def draw(axis: Axes) -> None:
        plot_band(axis, range(len(mean)), mean, mean if low is None else low, mean if high is None else high, "k", "m")
        adapt(axis)

    return draw_panel(Panel("title", "step", "nats", draw))[1]


def test_y_axis_follows_the_curve_and_not_its_band():
    low, high = drawn([1.0, 2.0, 3.0], [-2400.0] * 3, [2400.0] * 3).get_ylim()
    assert low == 0  # all values have one sign
    assert 3 < high < 3.5


@pytest.mark.parametrize(
    ("mean", "includes"),
    [([-3.0, -2.0], (-3.0, 0.0)), ([-1.0, 2.0], (-1.0, 2.0)), ([0.0, 0.0], (0.0, 1.0)), ([5.0], (0.0, 5.0))],
)
def test_y_axis_includes_all_values(mean, includes):
    low, high = drawn(mean).get_ylim()
    assert low <= includes[0] < includes[1] <= high


def test_y_axis_includes_the_reference():
    assert drawn([0.1, 0.2], adapt=lambda axis: plot_reference(axis, 0.3, "30%")).get_ylim()[1] > 0.3


@pytest.mark.parametrize(
    ("mean", "scale"),
    [
        ([100.0, 1.0, 1.0, 1.0], "log"),  # the first step is 100 times the median
        ([9.0, 1.0, 1.0, 1.0], "linear"),
        ([100.0, 1.0, 1.0, -1.0], "linear"),  # a logarithm needs positive values
        ([np.nan, np.nan], "linear"),
    ],
)
def test_scale_is_logarithmic_if_the_first_steps_are_much_greater(mean, scale):
    assert drawn(mean, adapt=scale_by_step).get_yscale() == scale


def test_point_between_gaps_is_a_dot():
    curve, dots = drawn([1.0, np.nan, 2.0, np.nan, 3.0, 4.0]).get_lines()
    assert np.isnan(curve.get_ydata()).tolist() == [False, True, False, True, False, False]
    assert dots.get_xdata().tolist() == [0, 2]


def test_curves_of_many_names_are_different():
    names = [f"weight {number}" for number in range(12)] + ["iw_opd", "iw_opd signed=true"]
    styles = plotting.series_styles(names)
    assert len({tuple(style.values()) for style in styles.values()}) == len(names)


def draw_two(axis: Axes) -> None:
    plot_band(axis, [1, 2], [1, 2], [0, 1], [2, 3], "#c2410c", "a")


def draw_one(axis: Axes) -> None:
    plot_band(axis, [1], [1], [np.nan], [np.nan], "#1d4ed8", "b")


PANELS = [Panel("one & <two>", "x (tokens)", "$y", draw_two), Panel("three", "x", "y", draw_one)]


@pytest.mark.parametrize("kind", ["pdf", "png"])
def test_figures_are_the_same_bytes_each_time(kind):
    one, other = (figure_bytes(compose(PANELS), kind) for _ in range(2))
    assert one == other
    assert one.startswith({"pdf": b"%PDF", "png": b"\x89PNG"}[kind])


def test_pdf_embeds_its_fonts():
    with matplotlib.rc_context({"pdf.compression": 0}):
        content = figure_bytes(compose(PANELS), "pdf")
    assert b"/FontFile2" in content  # TrueType
    assert b"/Type3" not in content


def test_vector_formats_leave_the_resolution_of_the_image():
    figure = compose(PANELS)
    alone = figure_bytes(compose(PANELS), "png")
    figure_bytes(figure, "pdf")
    assert figure_bytes(figure, "png") == alone


def test_panels_of_a_page_have_separate_ids_and_no_styles():
    texts = [render_panel(panel, f"figure-{number}") for number, panel in enumerate(PANELS)]
    ids = [re.findall(r'\bid="(.*?)"', text) for text in texts]
    assert not {*ids[0]} & {*ids[1]}
    assert all(len(each) == len({*each}) for each in ids)
    for text, known in zip(texts, ids, strict=True):
        assert {*re.findall(r'(?:url\(#|href="#)(.*?)[)"]', text)} <= {*known}
        assert not re.search(r"style|#[0-9a-f]{6}\b|<!DOCTYPE|<\?xml", text)
    assert "one &amp; &lt;two&gt;" in texts[0]
    assert 'data-series="a"' in texts[0]
    assert "var(--orange)" in texts[0]
