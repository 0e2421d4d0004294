"""Single responses, token by token: their text, their numbers, and how they look in a terminal. No model, no torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts.records import ScoredResponse
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import Floats, ResponseTokens, Weight, weigh
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, to_weight_inputs

CHUNK_TOKENS = 2**20  # tokens in work at once, unless a weight ranks the whole step
SHADES = {"signal": (194, 65, 12), "weight": (29, 78, 216)}
"""What a token may be shaded by, and in which colour."""


@dataclass(frozen=True)
class Sample:
    """One response: its prompt's text, the text of each token, its numbers, and the weights of its tokens by name."""

    sample_id: str
    step: int
    prompt: str
    pieces: Sequence[str]
    tokens: ResponseTokens
    weights: Mapping[str, Floats]
    finish_reason: str
    answer: str | None

    def title(self) -> str:
        answer = "" if self.answer is None else f", gold answer {self.answer}"
        return f"{self.sample_id}, step {self.step}: {len(self.pieces)} tokens, {self.finish_reason}{answer}"

    def values(self, by: str) -> Floats:
        """Return what a token is shaded by: |A|, or its first weight."""
        return np.abs(self.tokens.advantage_T) if by == "signal" else next(iter(self.weights.values()))

    def shade(self, by: str, scale: tuple[float, float]) -> Floats:
        """Return how strongly each token is shaded, [T]: 0 up to the first value of the scale, 1 from the second on."""
        low, high = scale
        return np.clip((self.values(by) - low) / (high - low or 1.0), 0, 1)

    def as_dict(self) -> dict[str, Any]:
        columns = {"advantage": self.tokens.advantage_T, "student_logp": self.tokens.student_logp_T}
        columns |= {"teacher_logp": self.tokens.teacher_logp_T} | dict(self.weights)
        return {
            "sample_id": self.sample_id,
            "step": self.step,
            "prompt": self.prompt,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "tokens": list(self.pieces),
            **{name: value_T.tolist() for name, value_T in columns.items()},
        }


def shade_range(shown: Sequence[Sample], by: str) -> tuple[float, float]:
    """Return the values between which the tokens of all these responses are shaded: |A| from 0 to its 95th percentile,
    weights from the least to the greatest."""
    value_N = np.concatenate([np.zeros(0), *(sample.values(by) for sample in shown)])
    if not len(value_N):
        return 0.0, 0.0
    if by == "signal":
        return 0.0, float(np.percentile(value_N, 95) or value_N.max())
    return float(value_N.min()), float(value_N.max())


def response_groups(run: Run, step: int, weights: Mapping[str, Weight]) -> Iterator[list[ScoredResponse]]:
    """Yield a step's responses part by part, or all at once where a weight ranks them against one another."""
    if any(weight.needs_full_step for weight in weights.values()):
        yield list(read_scored(run, step))
        return
    held: list[ScoredResponse] = []
    size = 0
    for scored in read_scored(run, step):
        held.append(scored)
        size += len(scored.response.response_ids)
        if size >= CHUNK_TOKENS:
            yield held
            held, size = [], 0
    if held:
        yield held


def load_samples(run: Run, step: int, wanted: Sequence[str], weights: Mapping[str, Weight]) -> list[Sample]:
    """Return the responses of the ids that are wanted, in their order."""
    read, found = token_decoder(run), {}
    ranked = any(weight.needs_full_step for weight in weights.values())
    for group in response_groups(run, step, weights):
        if not ranked:  # then a response's weights do not depend on the others
            group = [scored for scored in group if scored.response.sample_id in wanted]
        responses = [to_weight_inputs(scored, step, run.recipe.train.extrapolation) for scored in group]
        weighed = {name: weigh(weight, responses) for name, weight in weights.items()}
        for place, scored in enumerate(group):
            if (response := scored.response).sample_id in wanted:
                found[response.sample_id] = Sample(
                    sample_id=response.sample_id,
                    step=step,
                    prompt="".join(read(response.prompt_ids)),
                    pieces=read(response.response_ids),
                    tokens=responses[place],
                    weights={name: weight_RT[place] for name, weight_RT in weighed.items()},
                    finish_reason=response.finish_reason,
                    answer=response.answer,
                )
    return [found[name] for name in wanted if name in found]


def representative_ids(run: Run, step: int) -> list[str]:
    """Return the ids of two responses of a step: of the median and of the greatest mean |A|."""
    means = sorted(
        (
            float(np.abs(to_weight_inputs(scored, step, run.recipe.train.extrapolation).advantage_T).mean()),
            response.sample_id,
        )
        for scored in read_scored(run, step)
        if len((response := scored.response).response_ids)
    )
    return list(dict.fromkeys(means[place][1] for place in (len(means) // 2, -1))) if means else []


def load_sample(run: Run, sample_id: str, steps: Sequence[int], weights: Mapping[str, Weight]) -> Sample:
    """Return the response `sample_id`. Raises OpdctlError when it is not among those of the `steps`."""
    named = sample_id.rsplit("/", 2)[1:2]
    step = int(named[0]) if named and named[0].isdecimal() else None
    found = load_samples(run, step, [sample_id], weights) if step in steps and step is not None else []
    if not found:
        example = next((name for each in steps for name in representative_ids(run, each)), None)
        raise OpdctlError(
            f"--sample {sample_id}: {run.path} has no such response with teacher scores",
            hint=f"an id reads PROMPT/STEP/NUMBER, such as {example}" if example else "no step has teacher scores yet",
        )
    return found[0]


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_decoder(run: Run) -> Callable[[Sequence[int] | np.ndarray], list[str]]:
    """Return what turns ids into the text that each adds; without the student's tokenizer, into the ids in brackets.

    The tokenizer's file is read by itself: loading it with the model's library takes seconds, and torch.
    """
    path = run.student.path / "tokenizer.json"
    try:
        return _Decoder(path)
    except Exception as error:  # tokenizers raises bare Exception
        console.warn(f"{path}: tokens are shown by their ids: {error}")
        return lambda ids: [f"⟨{token}⟩" for token in ids]


class _Decoder:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        from tokenizers.decoders import DecodeStream

        # A character that several tokens spell comes with the last of them; the others add nothing.
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, int(token)) or "" for token in ids]


def printable(text: str) -> str:
    """Return a token's text with nothing in it that is not seen: white space as signs, other controls by their code."""
    signs = {"\n": "↵\n", "\t": "⇥\t", "": "∅"}
    if text in signs:
        return signs[text]
    return "".join(
        signs.get(char, char if char.isprintable() else char.encode("unicode_escape").decode()) for char in text
    )
