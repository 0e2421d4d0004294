"""One response at the terminal, token by token."""

import numpy as np
from rich.text import Text

from opdctl import console
from opdctl.analysis.samples import SHADES, Sample, printable, shade_range

MAX_LISTED_TOKENS = 10  # tokens that the terminal lists below the text
MIN_SHADE = 0.05  # shade below which a token is left as the terminal has it


# ── Terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def print_sample(sample: Sample, by: str) -> None:
    """Print a response, each token shaded by the signal or by its first weight, and the tokens of the most signal."""
    name = next(iter(sample.weights))
    shade_T = sample.shade(by, shade_range([sample], by))
    low, high = shade_range([sample], by)
    what = "|A| in nats" if by == "signal" else f"weight {name}"
    console.info(f"{sample.title()}; shaded by {what}, from {low:.3g} to {high:.3g}", "bold")
    text = Text().append(printable(sample.prompt), style="dim")
    for piece, shade in zip(sample.pieces, shade_T, strict=True):
        text.append(printable(piece), style=_shade_style(by, float(shade)))
    console.print_renderable(text)
    signal_T = np.abs(sample.tokens.advantage_T)
    most = np.sort(np.argsort(-signal_T, kind="stable")[:MAX_LISTED_TOKENS])
    console.print_table(
        f"the {len(most)} tokens of the most signal",
        ("token", "position", "log p student", "log p teacher", "A", f"weight {name}"),
        [
            [
                printable(sample.pieces[t]),
                str(t + 1),
                f"{sample.tokens.student_logp_T[t]:.3f}",
                f"{sample.tokens.teacher_logp_T[t]:.3f}",
                f"{sample.tokens.advantage_T[t]:+.3f}",
                f"{sample.weights[name][t]:.3f}",
            ]
            for t in most
        ],
    )


def _shade_style(by: str, shade: float) -> str:
    """Return a background between white and the shade's colour, with a foreground that is read on it; none for none."""
    if shade < MIN_SHADE:
        return ""
    red, green, blue = (round(255 + (channel - 255) * shade) for channel in SHADES[by])
    return f"{'white' if shade > 0.6 else 'black'} on rgb({red},{green},{blue})"
