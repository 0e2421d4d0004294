"""Solved examples before each problem: as earlier turns of a chat, or as plain text for a base model.

The plain text has the form of lm-evaluation-harness's gsm8k. The examples of a problem are the first ones that are not
the problem itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from opdctl import console
from opdctl.data.columns import find_cell
from opdctl.data.messages import Chat, Message
from opdctl.data.prompts import append_suffix
from opdctl.data.tables import read_table
from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import AnswerFormat, chosen_columns, parse_gold, read_problems
from opdctl.recipe.schema import Eval

SOLUTION_COLUMN = "solution"
QUESTION, ANSWER = "Question:", "Answer:"


@dataclass(frozen=True)
class Example:
    """A problem and the text that answers it."""

    problem: str
    solution: str


def read_examples(settings: Eval, answer_format: AnswerFormat) -> list[Example]:
    """Return the examples of the recipe's file; none if it has none.

    The text of an answer is the column `solution`, otherwise that of the answers. If the benchmark asks for a box, an
    answer without one gets it.

    Raises:
        OpdctlError: the file is missing or invalid.
    """
    if not settings.few_shot or settings.few_shot_file is None:
        return []
    rows, columns = list(read_table(Path(settings.few_shot_file).expanduser())), chosen_columns(settings)
    problems = read_problems(iter(rows), settings.few_shot_file, columns)
    examples = []
    for row, problem in zip(rows, problems, strict=True):
        steps, answer = row.get(SOLUTION_COLUMN), find_cell(row, columns.answer, "eval.answer_column", problem.location)
        if isinstance(steps, str) and steps.strip():
            solution = steps.strip()
        elif isinstance(answer[0], str):
            solution = answer[0].strip()
            steps = solution.rpartition("####")[0].strip()  # as in GSM8K
        else:
            solution, steps = parse_gold(*answer), ""
        if answer_format == "box" and "\\boxed" not in solution:
            solution = f"{steps or ''}\n\\boxed{{{problem.answer}}}".strip()
        examples.append(Example(problem.text, solution))
    return examples


def add_examples(chat: Chat, problem: str, examples: Sequence[Example], settings: Eval, suffix: str) -> Chat:
    """Return the chat with the first `eval.few_shot` examples as turns before it, after its system turn.

    problem: the text of the problem, which is no example of itself. suffix: the text that follows each problem.

    Raises:
        OpdctlError: there are fewer examples.
    """
    turns = [
        message
        for example in _examples_of(problem, examples, settings)
        for message in (Message("user", append_suffix(example.problem, suffix)), Message("assistant", example.solution))
    ]
    system = tuple(takewhile(lambda message: message.role in ("system", "developer"), chat.earlier))
    return replace(chat, earlier=(*system, *turns, *chat.earlier[len(system) :]))


def to_plain_text(chat: Chat, problem: str, examples: Sequence[Example], settings: Eval, suffix: str) -> Chat:
    """Return the chat with the first examples in its text, as `add_examples` does."""
    if not any(stop.strip() in QUESTION for stop in settings.stop):
        console.warn_once(
            "eval.few_shot: prompts are plain text, after which a model may continue with another question; "
            f"eval.stop = ['{QUESTION}'] ends the response before it"
        )
    chosen = _examples_of(problem, examples, settings)
    shots = [f"{QUESTION} {append_suffix(each.problem, suffix)}\n{ANSWER} {each.solution}\n\n" for each in chosen]
    return replace(chat, text=f"{''.join(shots)}{QUESTION} {chat.text}\n{ANSWER}")


def _examples_of(problem: str, examples: Sequence[Example], settings: Eval) -> list[Example]:
    others = [example for example in examples if example.problem.split() != problem.split()]
    if len(others) < settings.few_shot:
        raise OpdctlError(
            "invalid_data",
            f"{settings.few_shot_file}: {len(others)} examples other than the problem itself, eval.few_shot = "
            f"{settings.few_shot}",
            hint="lower eval.few_shot, or provide more examples",
        )
    return others[: settings.few_shot]
