"""Download and write the prompts of the code recipes: `python recipes/prompts.py --out data`.

It writes code.jsonl, the programming problems of Eurus-2-RL-Data, and math-code.jsonl, which adds the problems of
DeepMath-103K of difficulty 6 and above, with the domain of each problem, for two teachers.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

CODE, MATH = "PRIME-RL/Eurus-2-RL-Data", "zwhe99/DeepMath-103K"
MIN_DIFFICULTY = 6
Row = dict[str, Any]


def code(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the programming problems: the user message, without the system prompt."""
    for number, row in enumerate(rows):
        if row["ability"] == "code":
            (message,) = (turn["content"] for turn in row["prompt"] if turn["role"] == "user")
            yield {"id": f"code-{number}", "domain": "code", "prompt": message, "answer": None}


def math(rows: Iterable[Row]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if row["difficulty"] >= MIN_DIFFICULTY:
            answer = str(row["final_answer"])
            yield {"id": f"math-{number}", "domain": "math", "prompt": row["question"], "answer": answer}


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.stderr.write(f"wrote {path}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--code", default=CODE, help="hub dataset or local directory of programming problems")
    parser.add_argument("--math", default=MATH, help="hub dataset or local directory of mathematics problems")
    parser.add_argument("--count", type=int, default=25_000, help="number of programming problems: the first N")
    args = parser.parse_args()
    problems = list(code(datasets.load_dataset(args.code, split="train")))[: args.count]
    write(args.out / "code.jsonl", problems)
    write(args.out / "math-code.jsonl", [*problems, *math(datasets.load_dataset(args.math, split="train"))])


if __name__ == "__main__":
    main()
