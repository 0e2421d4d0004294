"""Responses for tests of token weights: from plain lists, and random ragged steps."""

import math
import random

import numpy as np
from hypothesis import note
from hypothesis import strategies as st

from opdctl.losses.token_weights import COLUMN_SETTINGS, ResponseTokens, weigh
from opdctl.registry import WEIGHTS

K = 16  # columns of the top-k


def tokens(advantage, teacher=None, step=0, **columns):
    """Return a response from plain lists, as read-only arrays. The teacher's log-probs default to -1."""
    teacher_T = np.full(len(advantage), -1.0) if teacher is None else np.array(teacher, float)
    advantage_T, columns = np.array(advantage, float), {name: np.array(value) for name, value in columns.items()}
    for value in (advantage_T, teacher_T, *columns.values()):
        value.flags.writeable = False
    return ResponseTokens(teacher_T - advantage_T, teacher_T, advantage_T, step, columns)


def blank(length, step=0):
    return tokens(np.zeros(length), step=step)


def weights_of(name, step, **params):
    """Return the weights of the responses of a step, as lists."""
    return [weight_T.tolist() for weight_T in weigh(WEIGHTS.build(name, params), step)]


def assert_close(weights, expected, tolerance=1e-10):
    for weight_T, expected_T in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight_T, expected_T, rtol=tolerance, atol=tolerance)
        assert len(weight_T) == len(expected_T)


def response_of(stored, step, length, sizes, pairs, pick):
    """Return a response with values from `sizes` and `pairs`, and the columns that the settings `stored` store.

    For the pair (a, b) of a token, the log-prob of the student's k-th id is -(a + b k).
    """

    def some(values):
        return np.array(pick(values, k=length))

    ids_TK = np.tile(np.arange(K), (length, 1))
    advantage_T, teacher_T = some(sizes) * some([-1, 1]), -some(sizes)
    columns = {"student_entropies": some(sizes), "teacher_entropies": some(sizes), "student_top_ids": ids_TK}
    columns["teacher_top_ids"] = ids_TK[:, ::-1] + some(range(1 - K, K))[:, None].astype(int)
    for name in ("student_top_logprobs", "teacher_student_top_logprobs"):
        a_T, b_T = np.array(pick(pairs, k=length)).reshape(-1, 2).T
        columns[name] = -(a_T[:, None] + b_T[:, None] * ids_TK)
    return tokens(
        advantage_T, teacher_T, step, **{name: x for name, x in columns.items() if COLUMN_SETTINGS[name] in stored}
    )


@st.composite
def steps_of(draw, size, pair):
    """Draw a function from the stored settings to the responses of a step."""
    sizes, pairs = draw(st.lists(size, min_size=1, max_size=5)), draw(st.lists(pair, min_size=1, max_size=3))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 80]), max_size=5))
    step, seed = draw(st.integers(0, 130)), draw(st.integers(0, 999))

    def make(stored=()):
        note(f"step {step}, seed {seed}, lengths {lengths}, of {sizes} and {pairs}")
        pick = random.Random(seed).choices
        return [response_of(stored, step, length, sizes, pairs, pick) for length in lengths]

    return make


# Eighths have ties and exact sums. The probabilities of the top tokens are (1 - r) r^k.
STEPS = steps_of(
    st.integers(0, 40).map(lambda n: n / 8),
    st.sampled_from([0.1, 0.3, 0.5, 0.8, 0.9]).map(lambda r: (-math.log(1 - r), -math.log(r))),
)
EXTREME = st.sampled_from([0.0, 5e-324, 1e-310, 1.0, 1e300]) | st.floats(0, 1e300)
EXTREME_STEPS = steps_of(EXTREME, st.tuples(EXTREME, EXTREME))
