"""An agent on the toy task calc: the student writes calls, and a calculator answers them."""

from typing import Any

import httpx

from opdctl.data.toy import calc
from opdctl.data.toy.calculating import calculate

MAX_TURNS = 9  # of the student in an episode
SAMPLING = {"stop": ["="], "include_stop_str_in_output": True}  # a call ends with `=`


def solve(row: dict[str, Any], base_url: str) -> float:
    """Return the reward of one trajectory: 1 for the correct answer, otherwise 0."""
    messages = [{"role": "user", "content": row["prompt"]}]
    with httpx.Client(base_url=base_url, timeout=None) as student:
        for _ in range(MAX_TURNS):
            response = student.post("chat/completions", json={"messages": messages} | SAMPLING).raise_for_status()
            text = response.json()["choices"][0]["message"]["content"]
            if not text.endswith("="):
                return float(calc.extract(text) == row["answer"])
            messages.append({"role": "assistant", "content": text})
            messages.append({"role": "tool", "content": calculate(text)})
    return 0.0
