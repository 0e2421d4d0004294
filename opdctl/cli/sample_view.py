"""One response in the terminal, token by token."""

import numpy as np
from rich.text import Text

from opdctl import console
from opdctl.analysis.samples import SHADES, Sample, printable, shade_range
from opdctl.errors import OpdctlError

MAX_LISTED_TOKENS = 10
"""Tokens listed below the text."""
MIN_SHADE = 0.05
"""Tokens of a lower shade keep the terminal's colors."""


def print_sample(sample: Sample, by: str) -> None:
    """Print a response with shaded tokens, and list the tokens with the most signal.

    by: one of SHADES; "weight" is the first weight.

    Raises:
        OpdctlError: the quantity is not stored.
    """
    name = next(iter(sample.weights))
    if by not in sample.shades():
        hint = "start a run with `rollout.entropy = true`, or use another value"
        raise OpdctlError("settings_mismatch", f"--shade {by}: {sample.sample_id} has no stored entropies", hint=hint)
    quantity = {
        "signal": "|A| in nats",
        "weight": f"weight {name}",
        "entropy": "the student's entropy in nats",
        "log_ratio": "log p_student - log p_teacher of the prefix in nats",
    }[by]
    low, high = shade_range([sample], by)
    shade_T = sample.shade(by, (low, high))
    console.answer(f"{sample.title()}; shaded by {quantity}, from {low:.3g} to {high:.3g}", "bold")
    text = Text().append(printable(sample.prompt), style="dim")
    for piece, number in sample.numbered_pieces():
        text.append(printable(piece), style="dim" if number is None else _shade_style(by, float(shade_T[number])))
    console.print_renderable(text)
    signal_T, pieces = np.abs(sample.tokens.advantage_T), sample.own_pieces()
    listed = np.sort(np.argsort(-signal_T, kind="stable")[:MAX_LISTED_TOKENS])
    console.print_table(
        f"the {len(listed)} tokens with the most signal",
        ("token", "position", "log p student", "log p teacher", "A", f"weight {name}"),
        [
            [
                printable(pieces[t]),
                str(t + 1),
                f"{sample.tokens.student_logp_T[t]:.3f}",
                f"{sample.tokens.teacher_logp_T[t]:.3f}",
                f"{sample.tokens.advantage_T[t]:+.3f}",
                f"{sample.weights[name][t]:.3f}",
            ]
            for t in listed
        ],
    )


def _shade_style(by: str, shade: float) -> str:
    """Return a background between white and the color of the shade with a readable foreground; "" below MIN_SHADE."""
    if shade < MIN_SHADE:
        return ""
    red, green, blue = (round(255 + (channel - 255) * shade) for channel in SHADES[by])
    return f"{'white' if shade > 0.6 else 'black'} on rgb({red},{green},{blue})"
