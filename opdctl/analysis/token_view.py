"""Single responses in the page of the report: shaded tokens, and the numbers of each."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdctl.analysis.samples import SHADES, Sample, printable, shade_range

MAX_RESPONSE_TOKENS, MAX_PAGE_TOKENS = 2000, 12_000
"""Tokens of a response, and of all responses together, in the page: each takes about 200 bytes."""
LEVELS = 9
"""Shades of a token, and none."""
SHADE_CLASSES = {"signal": "a", "weight": "w", "entropy": "e", "log_ratio": "d"}
"""The first letter of the classes of report.css that shade a token."""


def shade_choices(samples: Sequence[Sample]) -> list[dict[str, str]]:
    """Return the quantities that tokens can be shaded by, with their ranges."""
    if not samples:
        return []
    texts = {
        "signal": "|A| in nats (orange: A < 0, the teacher finds the token less probable; blue: A > 0)",
        "weight": f"weight {next(iter(samples[0].weights))}",
        "entropy": "entropy of the student in nats",
        "log_ratio": "log-ratio of the prefix in nats, student to teacher",
    }
    ranges = {by: shade_range(samples, by) for by in _common_shades(samples)}
    return [{"name": by, "text": f"{texts[by]}, from {low:.3g} to {high:.3g}"} for by, (low, high) in ranges.items()]


def _common_shades(samples: Sequence[Sample]) -> list[str]:
    return [by for by in SHADES if all(by in sample.shades() for sample in samples)]


def sample_sections(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    ranges = {by: shade_range(samples, by) for by in _common_shades(samples)}
    limit = min(MAX_RESPONSE_TOKENS, MAX_PAGE_TOKENS // max(len(samples), 1))
    return [_sample_section(sample, ranges, limit) for sample in samples]


def _sample_section(sample: Sample, ranges: Mapping[str, tuple[float, float]], limit: int) -> dict[str, Any]:
    levels = {by: np.rint(sample.shade(by, limits) * LEVELS).astype(int) for by, limits in ranges.items()}
    shown = [(printable(piece), t) for piece, t in itertools.islice(sample.numbered_pieces(), limit)]
    return {
        "title": sample.title(),
        "reason": sample.reason,
        "signal": f"{np.abs(sample.tokens.advantage_T).mean():.6g}",
        "length": len(sample.tokens),
        "ratio": f"{-sample.log_ratios()[-1]:.6g}",
        "prompt": printable(sample.prompt),
        "tokens": [
            {"text": text}
            if t is None
            else {"text": text, "classes": _classes(sample, levels, t), "tooltip": _tooltip(sample, t)}
            for text, t in shown
        ],
        "omitted": len(sample.pieces) - len(shown),
    }


def _classes(sample: Sample, levels: Mapping[str, np.ndarray], t: int) -> str:
    classes = [f"{SHADE_CLASSES[by]}{level_T[t]}" for by, level_T in levels.items() if level_T[t]]
    return " ".join([*classes, *(["p"] if sample.tokens.advantage_T[t] > 0 else [])])


def _tooltip(sample: Sample, t: int) -> str:
    tokens, name = sample.tokens, next(iter(sample.weights))
    numbers = [f"weight {name} {sample.weights[name][t]:.3f}", f"log-ratio of the prefix {sample.log_ratios()[t]:+.3f}"]
    if "student_entropies" in tokens.columns:
        numbers.append(f"entropy {tokens.columns['student_entropies'][t]:.3f}")
    lines = [
        f"token {t + 1}: A = {tokens.advantage_T[t]:+.3f} nats",
        f"log p student {tokens.student_logp_T[t]:.3f}, teacher {tokens.teacher_logp_T[t]:.3f}",
        *numbers,
    ]
    for model, candidates in sample.candidates.items():
        texts = ", ".join(f"{printable(text).rstrip(chr(10))} {logp:.2f}" for text, logp in candidates[t])
        lines.append(f"{model}’s first: {texts}")
    return "\n".join(lines)
