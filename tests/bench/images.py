"""The images of a run in the docs: `python tests/bench/images.py runs/quickstart`.

It continues prefixes, analyzes the run, copies figures and takes screenshots of its report, which need chromium.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIGURES = ("position.png", "continuations.png")
"""Figures of the report, by the names of their files."""


def take_tokens(page: Any) -> bytes:
    """Take the first response, with the numbers of the token that has the most signal."""
    article = page.locator(".responses article").first
    article.locator(".a9").first.hover()
    box, tip = article.bounding_box(), page.locator("#tip").bounding_box()
    return page.screenshot(clip={**box, "height": tip["y"] + tip["height"] + 10 - box["y"]})


SCREENSHOTS: dict[str, Callable[[Any], bytes]] = {
    "report.png": lambda page: page.screenshot(),
    "tokens.png": take_tokens,
}
"""Parts of the report in a browser."""
WINDOW = {"width": 1280, "height": 900}
PREFIX_TOKENS = "continuations.prefix_tokens=[0,16,32,48,64,80,96,112]"


def opdctl(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "opdctl", *words], check=True)


def take_screenshots(report: Path, names: list[str], out: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)
        page.goto(report.resolve().as_uri())
        for name in names:
            (out / name).write_bytes(SCREENSHOTS[name](page))
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="directory of the images")
    names = [*FIGURES, *SCREENSHOTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="the images to make")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if "continuations.png" in args.only:
        opdctl("run", "continuations", str(args.run), "--set", PREFIX_TOKENS)
    opdctl("analyze-position", str(args.run), "--paper")
    for name in set(args.only) & {*FIGURES}:
        shutil.copyfile(args.run / "analysis/figures" / name, args.out / name)
    if screenshots := [name for name in SCREENSHOTS if name in args.only]:
        take_screenshots(args.run / "analysis/report.html", screenshots, args.out)


if __name__ == "__main__":
    main()
