"""Panels as SVG within the page of the report: text stays text, and its colors are those of the page.

The SVG is that of matplotlib without its ids, style sheet and inline styles, which a page with a strict content
security policy does not apply. Colors are variables of the page's style sheet, so that they suit a dark page, too.
"""

import re
from xml.etree import ElementTree

from opdctl.analysis.plotting import Panel, draw_panel, figure_bytes

SVG, LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
COLOR_VARIABLES = {
    "#c2410c": "orange",
    "#1d4ed8": "blue",
    "#15803d": "green",
    "#9333ea": "purple",
    "#0891b2": "cyan",
    "#db2777": "pink",
    "#64748b": "grey",
    "#0f172a": "ink",
    "#000000": "ink",
    "#94a3b8": "edge",
    "#e2e8f0": "grid",
    "#ffffff": "paper",
    "#facc15": "yellow",
    "#ca8a04": "yellow",
}
"""The variable of report.css in place of each color of the figures."""
DROPPED_PROPERTIES = {"font-family", "stroke-linejoin", "stroke-linecap", "-inkscape-font-specification"}
"""What the style sheet of the page sets for all panels."""


def render_panel(panel: Panel, name: str) -> str:
    """Return a panel as an `svg` element whose ids begin with `name`, described by its text."""
    figure, axis = draw_panel(panel)
    drawn = figure_bytes(figure, "svg").decode()
    root = ElementTree.fromstring(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", drawn))
    ids = {id_: f"{name}-{number}" for number, id_ in enumerate(sorted(set(re.findall(r'#([^")]+)[")]', drawn))))}
    for parent in root.iter():
        for child in [child for child in parent if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style")]:
            parent.remove(child)
    for element in root.iter():
        _rewrite(element, ids)
    _drop_empty(root)
    width, height = figure.get_size_inches() * 72
    box = axis.get_position()
    root.attrib.clear()
    root.attrib |= {
        "xmlns": SVG,
        "viewBox": f"0 0 {width:g} {height:.0f}",
        "role": "img",
        "aria-labelledby": f"{name}-text",
        # For the script that shows the values of the curves: the axes in units of the view box, and their limits.
        "data-box": " ".join(
            f"{number:.2f}" for number in (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
        ),
        "data-x": " ".join(map(_format_limit, axis.get_xlim())) + f" {axis.get_xscale()}",
        "data-y": " ".join(map(_format_limit, axis.get_ylim())) + f" {axis.get_yscale()}",
        "data-label": panel.x,
    }
    text = ElementTree.Element("desc", {"id": f"{name}-text"})
    text.text = _describe(panel, axis.get_legend_handles_labels()[1])
    root.insert(0, text)
    return _serialize(root)


def _describe(panel: Panel, labels: list[str]) -> str:
    """Return what a panel shows, for screen readers; its values are in the table of the figure."""
    curves = f". Curves: {', '.join(dict.fromkeys(labels))}" if labels else ""
    return f"{panel.title}: {panel.y or 'values'} by {panel.x}{curves}."


def _format_limit(value: float) -> str:
    return f"{value:.6g}"


def _rewrite(element: ElementTree.Element, ids: dict[str, str]) -> None:
    """Replace ids, styles and colors of an element by those of the page."""
    kind, _, series = element.attrib.pop("id", "").partition(" ")
    if kind in ("curve", "band"):
        element.attrib |= {"class": kind, "data-series": series}
    elif kind in ids:
        element.set("id", ids[kind])
    for item in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key and key not in DROPPED_PROPERTIES:
            element.set(key, value.removesuffix("px"))
    for key in ("fill", "stroke"):
        if element.get(key) in COLOR_VARIABLES:
            element.set(key, f"var(--{COLOR_VARIABLES[element.attrib[key]]})")
    if (link := element.attrib.pop(LINK, None)) is not None:
        element.set("href", f"#{ids[link[1:]]}" if link.startswith("#") else link)
    if clip := re.fullmatch(r"url\(#(.*)\)", element.get("clip-path", "")):
        element.set("clip-path", f"url(#{ids[clip[1]]})")
    if "d" in element.attrib:
        element.set("d", _shorten(element.attrib["d"]))
    for key in ("x", "y", "transform"):
        if key in element.attrib:
            element.set(key, _shorten(element.attrib[key]))
    if element.get("transform", "").startswith("rotate(-0 ") or element.get("transform", "").startswith("rotate(0 "):
        del element.attrib["transform"]


def _shorten(text: str) -> str:
    """Return coordinates with two decimals, a line of a path beside the next."""
    numbers = re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), text)
    return " ".join(numbers.split())


def _drop_empty(parent: ElementTree.Element) -> None:
    """Remove groups without content, and replace a group without attributes by its only child."""
    for child in list(parent):
        _drop_empty(child)
        if child.tag == f"{{{SVG}}}g" and not len(child):
            parent.remove(child)
        elif child.tag == f"{{{SVG}}}g" and not child.attrib and len(child) == 1:
            parent[list(parent).index(child)] = child[0]


def _serialize(root: ElementTree.Element) -> str:
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{SVG}}}")
        if not (element.text or "").strip():
            element.text = None
        element.tail = None
    return ElementTree.tostring(root, encoding="unicode")
