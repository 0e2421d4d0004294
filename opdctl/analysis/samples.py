"""Single responses, token by token: their text, their numbers and their shades. No model, no torch."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.analysis.shown_weights import ShownWeights
from opdctl.artifacts.records import LossMask, ScoredResponse
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import Floats, ResponseTokens, Weight, weigh
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs

CHUNK_TOKENS = 2**20
"""Tokens in memory at once, unless a weight needs the full step."""
SHADES = {"signal": (194, 65, 12), "weight": (29, 78, 216), "entropy": (21, 128, 61), "log_ratio": (147, 51, 234)}
"""The quantities that a token can be shaded by, with their colors (RGB)."""
SHOWN_CANDIDATES = 3
"""The most probable tokens of a model that are shown at a token."""
Candidates = list[list[tuple[str, float]]]
"""The most probable tokens at each token, most probable first: their texts and log-probs in nats."""


@dataclass(frozen=True)
class Sample:
    """One response: the text of its prompt and of each token, and the numbers of the student's own tokens, [T] each.

    pieces: the text of all tokens. loss_mask: which of these are the student's own, None if all are. weights: by name.
    reason: why the response was chosen. candidates: by model, if they are stored.
    """

    sample_id: str
    step: int
    prompt: str
    pieces: Sequence[str]
    tokens: ResponseTokens
    weights: Mapping[str, Floats]
    finish_reason: str
    answer: str | None
    loss_mask: LossMask | None = None
    reason: str = ""
    candidates: Mapping[str, Candidates] = field(default_factory=dict)

    def title(self) -> str:
        answer = "" if self.answer is None else f", gold answer {self.answer}"
        read = len(self.pieces) - len(self.tokens)
        others = f" and {read} that it read" if read else ""
        return f"{self.sample_id}, step {self.step}: {len(self.tokens)} tokens{others}, {self.finish_reason}{answer}"

    def numbered_pieces(self) -> Iterator[tuple[str, int | None]]:
        """Yield the text of each token, with its number among the student's own; None if it is not one of these."""
        numbers = itertools.count()
        for piece, is_own in zip(self.pieces, self._mask(), strict=True):
            yield piece, next(numbers) if is_own else None

    def own_pieces(self) -> list[str]:
        """Return the text of each of the student's own tokens."""
        return [piece for piece, number in self.numbered_pieces() if number is not None]

    def _mask(self) -> list[bool]:
        return [True] * len(self.pieces) if self.loss_mask is None else self.loss_mask.tolist()

    def shades(self) -> list[str]:
        """Return the quantities that the tokens can be shaded by: the entropy only if it is stored."""
        return [by for by in SHADES if by != "entropy" or "student_entropies" in self.tokens.columns]

    def values(self, by: str) -> Floats:
        """Return the quantity that the tokens are shaded by, [T].

        |A|, the first weight, the student's entropy, or how much less probable the teacher finds the response up to
        and including the token than the student does, in nats; 0 if it is more probable.
        """
        if by == "weight":
            return next(iter(self.weights.values()))
        if by == "entropy":
            return self.tokens.column("student_entropies")
        return np.abs(self.tokens.advantage_T) if by == "signal" else np.maximum(-self.log_ratios(), 0)

    def log_ratios(self) -> Floats:
        """Return log p_teacher - log p_student of the response up to and including each token, [T]."""
        return np.cumsum(self.tokens.teacher_logp_T - self.tokens.student_logp_T)

    def shade(self, by: str, value_range: tuple[float, float]) -> Floats:
        """Return the shade of each token, [T]: 0 at the lower end of the range and below, 1 at the upper and above."""
        low, high = value_range
        return np.clip((self.values(by) - low) / (high - low or 1.0), 0, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return the response as JSON values. The numbers of a token that is not the student's own are null."""
        columns = {"advantage": self.tokens.advantage_T, "student_logp": self.tokens.student_logp_T}
        columns |= {"teacher_logp": self.tokens.teacher_logp_T} | dict(self.weights)
        return {
            "sample_id": self.sample_id,
            "step": self.step,
            "prompt": self.prompt,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "tokens": list(self.pieces),
            "loss_mask": self._mask(),
            **{name: self._with_nulls(value_T) for name, value_T in columns.items()},
        }

    def _with_nulls(self, value_T: Floats) -> list[float | None]:
        values = value_T.tolist()
        return [None if number is None else values[number] for _, number in self.numbered_pieces()]


def shade_range(samples: Sequence[Sample], by: str) -> tuple[float, float]:
    """Return the range of values that the shades of these responses cover.

    A weight from its minimum to its maximum, all others from 0 to their 95th percentile.
    """
    value_N = np.concatenate([np.zeros(0), *(sample.values(by) for sample in samples)])
    if not len(value_N):
        return 0.0, 0.0
    if by == "weight":
        return float(value_N.min()), float(value_N.max())
    return 0.0, float(np.percentile(value_N, 95) or value_N.max())


def response_groups(run: Run, step: int, weights: Mapping[str, Weight]) -> Iterator[list[ScoredResponse]]:
    """Yield a step's responses in groups of about CHUNK_TOKENS, or all at once if a weight needs the full step."""
    if any(weight.needs_full_step for weight in weights.values()):
        yield list(read_scored(run, step))
        return
    group: list[ScoredResponse] = []
    size = 0
    for scored in read_scored(run, step):
        group.append(scored)
        size += len(scored.response.own_ids)
        if size >= CHUNK_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group


def load_samples(
    run: Run, step: int, sample_ids: Sequence[str] | Mapping[str, str], weights: Mapping[str, Weight]
) -> list[Sample]:
    """Return the responses with these ids, in the order of the ids; unknown ids are ignored.

    sample_ids: a mapping has the reason why each response was chosen.
    """
    decode, samples = token_decoder(run), {}
    reasons = sample_ids if isinstance(sample_ids, Mapping) else {}
    needs_full_step = any(weight.needs_full_step for weight in weights.values())
    for group in response_groups(run, step, weights):
        if not needs_full_step:
            group = [scored for scored in group if scored.response.sample_id in sample_ids]
        responses = [to_weight_inputs(scored, step) for scored in group]
        weights_by_name = {name: weigh(weight, responses) for name, weight in weights.items()}
        for index, scored in enumerate(group):
            if (response := scored.response).sample_id in sample_ids:
                samples[response.sample_id] = Sample(
                    sample_id=response.sample_id,
                    step=step,
                    prompt="".join(decode(response.prompt_ids)),
                    pieces=decode(response.response_ids),
                    tokens=responses[index],
                    weights={name: weight_RT[index] for name, weight_RT in weights_by_name.items()},
                    finish_reason=response.finish_reason,
                    answer=response.answer,
                    loss_mask=response.loss_mask,
                    reason=reasons.get(response.sample_id, ""),
                    candidates=dict(_candidates(scored, decode)),
                )
    return [samples[name] for name in sample_ids if name in samples]


def _candidates(
    scored: ScoredResponse, decode: Callable[[Sequence[int] | np.ndarray], list[str]]
) -> Iterator[tuple[str, Candidates]]:
    """Yield the stored candidates of the student and of the teacher."""
    for model, record in (("student", scored.response), ("teacher", scored.teacher)):
        if record.top_ids is not None and record.top_logprobs is not None:
            shown = record.top_ids[:, :SHOWN_CANDIDATES]
            texts = {int(id_): "".join(decode([int(id_)])) for id_ in np.unique(shown)}
            yield (
                model,
                [
                    [(texts[int(id_)], float(logp)) for id_, logp in zip(ids_K, logp_K, strict=False)]
                    for ids_K, logp_K in zip(shown, record.top_logprobs, strict=True)
                ],
            )


def representative_ids(run: Run, step: int) -> dict[str, str]:
    """Return the ids of some responses of a step, each with the reason why it was chosen.

    The reasons are extremes and medians over the responses with tokens. A response may have several. That with the
    median of the mean |A| is the first.
    """
    means, greatest, lengths, truncated = [], [], [], []
    for scored in read_scored(run, step):
        signal_T, name = np.abs(to_weight_inputs(scored, step).advantage_T), scored.response.sample_id
        if len(signal_T):
            means.append((float(signal_T.mean()), name))
            greatest.append((float(signal_T.max()), name))
            lengths.append((len(signal_T), name))
            truncated += means[-1:] if scored.response.finish_reason == "length" else []
    reasons: dict[str, list[str]] = {}
    for reason, values, index in (
        ("median of the mean |A|", means, len(means) // 2),
        ("greatest mean |A|", means, -1),
        ("greatest |A| of a token", greatest, -1),
        ("longest", lengths, -1),
        ("median of the mean |A| among the truncated ones", truncated, len(truncated) // 2),
    ):
        if values:
            reasons.setdefault(sorted(values)[index][1], []).append(reason)
    return {sample_id: f"step {step}: {', '.join(texts)}" for sample_id, texts in reasons.items()}


def load_sample(run: Run, sample_id: str, steps: Sequence[int], weights: ShownWeights) -> Sample:
    """Return the response `sample_id`.

    Raises:
        OpdctlError: it is not among the responses of `steps`.
    """
    step_part = sample_id.rsplit("/", 2)[1:2]
    step = int(step_part[0]) if step_part and step_part[0].isdecimal() else None
    samples = load_samples(run, step, [sample_id], weights.at(step)) if step in steps and step is not None else []
    if not samples:
        example = next((name for each in steps for name in representative_ids(run, each)), None)
        hint = f"give PROMPT_ID/STEP/SAMPLE, such as {example}" if example else f"run `{run.next_command()}`"
        raise OpdctlError("unknown_name", f"{run.path}: no scored response `{sample_id}`", hint=hint)
    return samples[0]


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_decoder(run: Run) -> Callable[[Sequence[int] | np.ndarray], list[str]]:
    """Return a function that decodes token ids, each to the text that it adds.

    It reads the student's tokenizer.json without transformers, whose import takes seconds. If that fails, it returns
    the ids in brackets.
    """
    path = run.student.path / "tokenizer.json"
    try:
        return _Decoder(path)
    except Exception as error:  # tokenizers raises bare Exception
        console.warn(f"{path}: cannot be read, so tokens are shown as ids: {error}")
        return lambda ids: [f"⟨{token}⟩" for token in ids]


class _Decoder:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        from tokenizers.decoders import DecodeStream

        # The text of a character that spans several tokens is added by the last of them.
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, int(token)) or "" for token in ids]


def printable(text: str) -> str:
    """Return the text of a token with white space as symbols, and other control characters as escape codes."""
    symbols = {"\n": "↵\n", "\t": "⇥\t", "": "∅"}
    if text in symbols:
        return symbols[text]
    return "".join(
        symbols.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )
