"""The terms of the report and links to their definitions, which the page has at its end."""

import re
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Term:
    """A term of the report. pattern: how sentences spell it."""

    id: str
    name: str
    text: str
    pattern: str


GLOSSARY = (
    Term(
        "signal",
        "signal, |A|, discrepancy",
        "The absolute advantage of a token in nats: how much teacher and student disagree about it.",
        r"\bsignal\b|\|A\|",
    ),
    Term(
        "advantage",
        "advantage, A",
        "log p_teacher - log p_student of a token that the student sampled, in nats. If it is negative, the update "
        "makes the token less probable.",
        r"\badvantages?\b",
    ),
    Term(
        "kl",
        "reverse KL, k1, k3",
        "The divergence of the student from the teacher in nats per token, estimated from the sampled tokens: k1 is "
        "the mean of -A, k3 that of exp(A) - 1 - A.",
        r"\breverse KL\b",
    ),
    Term(
        "bias",
        "position bias",
        "The signal depends on the position in the response: without a bias, the first 30% of the responses have 30% "
        "of it.",
        r"\bposition bias\b",
    ),
    Term(
        "change",
        "change point",
        "The position that best divides the responses into two parts with different mean |A|.",
        r"\bchange point\b",
    ),
    Term(
        "truncated",
        "truncated",
        "Of a response: it reached the maximum length and has no end, so its last part is missing.",
        r"\btruncated\b",
    ),
    Term(
        "interval",
        "interval",
        "The range in brackets. An estimate from other prompts of the same kind would have an interval that contains "
        "the true value in 95% of the cases, or in 99% where this is stated.",
        r"\bintervals?\b",
    ),
    Term(
        "weight",
        "token weight",
        "The factor of a token’s loss. uniform is 1 everywhere; iw_opd is greater for the first tokens of a response.",
        r"\btoken weights?\b",
    ),
    Term(
        "ess",
        "effective sample size",
        "The number of equally weighted tokens that are worth as much as the weighted ones, as a fraction of all "
        "tokens: (Σ w)² / (N Σ w²).",
        r"\beffective sample size\b",
    ),
    Term(
        "ratio",
        "prefix ratio",
        "The probability of the response so far under the teacher divided by that under the student: the weight that "
        "would make the student’s prefixes those of the teacher.",
        r"\bprefix ratios?\b",
    ),
    Term(
        "prefix",
        "prefix",
        "The tokens of a response up to a position.",
        r"\bprefix(?:es)?\b",
    ),
    Term(
        "overlap",
        "top-k overlap",
        "The fraction of the student’s k most probable tokens that are among the teacher’s.",
        r"\btop[- ]k overlap\b",
    ),
)
_PATTERN = re.compile("|".join(f"(?P<{term.id}>(?<![\\w_]){term.pattern})" for term in GLOSSARY), re.IGNORECASE)


def link_terms(text: str) -> Markup:
    """Return an escaped text with a link to the definition of each term, where it occurs first."""
    linked: set[str] = set()

    def link(match: re.Match[str]) -> str:
        term = match.lastgroup
        if term is None or term in linked:
            return match[0]
        linked.add(term)
        return f'<a class="term" href="#term-{term}">{match[0]}</a>'

    return Markup(_PATTERN.sub(link, str(escape(text))))
