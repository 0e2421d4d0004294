"""What becomes of a model directory in opdctl."""

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from opdctl.errors import OpdctlError, summarize_exception

TOLERANCE = 1e-3
"""Nats, or the relative difference of a gradient norm."""


@dataclass
class Outcome:
    """What became of a model directory in one use.

    kind: `right`; `refused`: by an OpdctlError, before a response was sampled; `late`: refused after that; `wrong`: a
    number is; `error`: an exception that is no OpdctlError; `not built`: transformers cannot write and read it.
    differences: the largest of each kind, in nats or relative.
    """

    kind: str = "right"
    detail: str = ""
    differences: dict[str, float] = field(default_factory=dict)


def judge(use: Callable[[Path], dict[str, float]], run: Path) -> Outcome:
    """Use a model directory in the run `run`. `use` returns how far each number is from the right one."""
    try:
        differences = use(run)
    except OpdctlError as error:
        sampled = any(run.glob("step-*/rollout/part-*"))
        return Outcome("late" if sampled else "refused", _without_folder(error.message, run.parent))
    except Exception as error:
        return Outcome("error", _without_folder(describe(error), run.parent))
    bad = {key: value for key, value in differences.items() if not value <= TOLERANCE}
    detail = ", ".join(f"{key} {value:.2g}" for key, value in bad.items())
    return Outcome("wrong" if bad else "right", detail, differences)


def describe(error: BaseException) -> str:
    """Return an exception with the last line of opdctl and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "opdctl" in frame.filename and "site-packages" not in frame.filename]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*own[-1:], frames[-1]])
    return f"{type(error).__name__}: {summarize_exception(error)} ({places})"


def _without_folder(text: str, folder: Path) -> str:
    return re.sub(rf"{re.escape(str(folder))}/((vllm-)?models/)?", "", text)
