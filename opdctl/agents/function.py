"""The user's function of an environment: its call, its result, and what it raises."""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

Environment = Callable[[dict[str, Any], str], Any]
"""`environment(row, base_url)`, a function or an `async def`: plays an episode, and returns rewards."""
Rewards = Mapping[str, float | None]
"""The reward of each trajectory, by the id of the response that ends it."""


def play_episode(environment: Environment, row: dict[str, Any], base_url: str) -> Any:
    """Call the user's function, and return its result."""
    result = environment(row, base_url)
    return asyncio.run(_await(result)) if inspect.isawaitable(result) else result


async def _await(result: Any) -> Any:
    return await result


def read_rewards(result: Any, ends: Sequence[str]) -> Rewards:
    """Return the rewards of the trajectories that a result selects. ends: the ids of the responses that end one.

    Raises:
        ValueError: the result has another form, or names no such response.
    """
    if not isinstance(result, list):
        return dict.fromkeys(ends, _parse_reward(result))
    rewards: dict[str, float | None] = {}
    for item in result:
        if not isinstance(item, dict) or not {"id"} <= item.keys() <= {"id", "reward"}:
            raise ValueError(f'an item of the result must be {{"id": …, "reward": …}}, got {item!r:.100}')
        if item["id"] not in ends or item["id"] in rewards:
            raise ValueError(f"no trajectory ends with the response {item['id']!r:.100}, or two items name it")
        rewards[item["id"]] = _parse_reward(item.get("reward"))
    return rewards


def _parse_reward(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not math.isfinite(float(value)):
        raise ValueError(f"a reward must be a finite number or None, got {value!r:.100}")
    return float(value)


def describe_error(error: BaseException, environment: Environment, stack: traceback.StackSummary | None = None) -> str:
    """Return type and message of an exception, and the last line of the user's file in its traceback, or in a stack."""
    message = " ".join(str(error).split())[:300]
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    own = getattr(environment, "__code__", None)
    stack = stack or traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if own and frame.filename == own.co_filename]
    return f"{text}, at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else text
