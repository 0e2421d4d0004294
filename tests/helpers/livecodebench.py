"""Rows in the form of LiveCodeBench."""

import base64
import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Case = tuple[str, str]
"""Input and output of a test."""


def encode_private(content: object) -> str:
    """Encode private tests as the data set does."""
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def question(
    name: str, public: Sequence[Case], private: Sequence[Case], function: str | None = None, **columns: Any
) -> dict[str, Any]:
    """Return the row of a problem. columns: those that differ from the default."""
    kind = "functional" if function else "stdin"
    cases = [
        [{"input": text, "output": output, "testtype": kind} for text, output in each] for each in (public, private)
    ]
    return {
        "question_title": name,
        "question_content": f"Solve {name}.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": name,
        "contest_id": "c",
        "contest_date": "2025-02-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(cases[0]),
        "private_test_cases": encode_private(json.dumps(cases[1])),
        "metadata": json.dumps({"func_name": function} if function else {}),
    } | columns


ADD = question("add", [("1 2", "3\n")], [("5 7\n", "12")])
SCALE = question(
    *("scale", [("[1, 2]\n3", "[3, 6]")], [("[]\n3", "[]"), ("[0.5]\n2", "[1.0]")], "scale"),
    starter_code="class Solution:\n    def scale(self, xs: List[int], k: int) -> List[int]:\n        ",
)


def write_questions(path: Path, rows: Sequence[dict[str, Any]] = (ADD, SCALE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
