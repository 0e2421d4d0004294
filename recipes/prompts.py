"""Build the paper's training prompts from their sources: `python recipes/prompts.py --out data`.

The paper trains on two files of the data set Keven16/G-OPD-Training-Data. This script makes the same prompts, in the
same order, from the data sets that these were made from, for machines that have only those, or mirrors of them:

    math.jsonl        zwhe99/DeepMath-103K: each question of difficulty 6 and above once, with the boxed instruction
    code.jsonl        PRIME-RL/Eurus-2-RL-Data: the programming problems, with the instruction to think first
    math-code.jsonl   both, with the domain of each prompt, for two teachers

A row has `id`, `domain`, `prompt` (the user's message) and `answer` (null for code). A recipe for one of the files has

    [prompts]
    source = "data/math.jsonl"
    id_column = "id"
    prompt_column = "prompt"
    answer_column = "answer"
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

REVISIONS = {
    "zwhe99/DeepMath-103K": "5cf055d1fe3d7a2eb19719ac020211469736ae44",
    "PRIME-RL/Eurus-2-RL-Data": "9776b13264b5aaa0b16495fcf086a0a8d86fd655",
}
MATH, CODE = REVISIONS
MIN_DIFFICULTY = 6
BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
THINK_INSTRUCTION = "\nYou need to think first then write the Python code."
Row = dict[str, Any]


def math(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield every question once, where it occurs first and with the answer given there, if any of its occurrences is
    difficult enough."""
    firsts: dict[str, tuple[int, Row]] = {}
    difficult = set()
    for number, row in enumerate(rows):
        firsts.setdefault(row["question"], (number, row))
        if row["difficulty"] >= MIN_DIFFICULTY:
            difficult.add(row["question"])
    for question, (number, row) in firsts.items():
        if question in difficult:
            prompt, answer = question + BOXED_INSTRUCTION, str(row["final_answer"])
            yield {"id": f"math-{number}", "domain": "math", "prompt": prompt, "answer": answer}


def code(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the programming problems: the user message, without the system prompt."""
    for number, row in enumerate(rows):
        if row["ability"] == "code":
            (message,) = (turn["content"] for turn in row["prompt"] if turn["role"] == "user")
            yield {"id": f"code-{number}", "domain": "code", "prompt": message + THINK_INSTRUCTION, "answer": None}


def read(source: str, columns: list[str]) -> Iterable[Row]:
    """Return the rows of a data set of the hub, at its revision if it is one of REVISIONS, or of a local directory."""
    rows = datasets.load_dataset(source, split="train", revision=REVISIONS.get(source))
    return rows.select_columns(columns)


def write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
    sys.stderr.write(f"wrote {path}: {len(lines)} prompts\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--math", default=MATH, help="hub data set or local directory of mathematics problems")
    parser.add_argument("--code", default=CODE, help="hub data set or local directory of programming problems")
    args = parser.parse_args()
    questions = list(math(read(args.math, ["question", "difficulty", "final_answer"])))
    problems = list(code(read(args.code, ["ability", "prompt"])))
    write(args.out / "math.jsonl", questions)
    write(args.out / "code.jsonl", problems)
    write(args.out / "math-code.jsonl", [*questions, *problems])


if __name__ == "__main__":
    main()
