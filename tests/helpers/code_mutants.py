"""Wrong answers to code tasks: mutants of the reference solutions, graded by opdctl and by EvalPlus.

    PYTHONPATH=tests python -m helpers.code_mutants                    # all mutants
    PYTHONPATH=tests python -m helpers.code_mutants --count 40 --seed 1

A mutant differs in one place: an operator, a comparison, a number, a name, a statement that is gone, or what happens
to the returned value. Some return the right values. The tasks have the names and the ids of EvalPlus' tasks with a
special test, and the other kinds of values; their solutions are written here. HumanEval/32 is left out: EvalPlus 0.3.1
accepts no answer to it (`tests/unit/evaluation/test_code_values.py` compares its special test).
"""

import argparse
import ast
import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from opdctl.evaluation import code_execution
from opdctl.evaluation.code_execution import CODE_GRADER

TIME_LIMIT_SECONDS = 3.0


def _task(
    dataset: str, number: int, solution: str, base: list[Any], plus: list[Any], atol: float = 0
) -> dict[str, Any]:
    prefix = {"humaneval": "HumanEval", "mbpp": "Mbpp"}[dataset]
    functions = [node for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
    return {
        "dataset": dataset,
        "task_id": f"{prefix}/{number}",
        "entry_point": functions[0].name,
        "prompt": "",
        "canonical_solution": solution,
        "base_input": base,
        "plus_input": plus,
        "atol": atol,
    }


TASKS = [
    _task(
        "humaneval",
        901,
        """
import math
def lengths(points):
    return [math.sqrt(x * x + y * y) for x, y in points if x >= 0]
""",
        [[[[3.0, 4.0], [-1.0, 2.0]]], [[]]],
        [[[[0.1, 0.2], [0.0, 0.0]]], [[[1e-4, 1e-5]]]],
    ),
    _task(
        "humaneval",
        902,
        """
def mean_deviation(numbers):
    mean = sum(numbers) / len(numbers)
    return sum(abs(n - mean) for n in numbers) / len(numbers)
""",
        [[[1.0, 2.0, 3.0]]],
        [[[0.5]], [[-1.5, 1e3, 2.25, 0.0]]],
        1e-6,
    ),
    _task(
        "humaneval",
        903,
        """
def histogram(text):
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    most = max(counts.values(), default=0)
    return {word: count for word, count in counts.items() if count == most}
""",
        [["a b a"], [""]],
        [["c c b b a"], ["x"]],
    ),
    _task(
        "humaneval",
        904,
        """
def rows(n):
    triangle = [[1]]
    for i in range(1, n):
        last = triangle[-1]
        triangle.append([1] + [last[j] + last[j + 1] for j in range(i - 1)] + [1])
    return triangle if n > 0 else []
""",
        [[3], [0]],
        [[1], [6]],
    ),
    _task(
        "humaneval",
        905,
        """
def is_sorted(numbers):
    for left, right in zip(numbers, numbers[1:]):
        if left > right:
            return False
    return len(set(numbers)) == len(numbers)
""",
        [[[1, 2, 3]], [[1, 1]]],
        [[[3, 2]], [[]], [[-5, 0, 7]]],
    ),
    _task(
        "humaneval",
        906,
        """
def encode(text):
    return "".join(chr((ord(c) - 97 + 5) % 26 + 97) if c.islower() else c for c in text)[::-1]
""",
        [["abc"], [""]],
        [["xyz A"], ["Hello, World"]],
    ),
    _task(
        "mbpp",
        2,
        """
def similar_elements(first, second):
    return tuple(sorted(set(first) & set(second)))
""",
        [[[3, 4, 5, 6], [5, 7, 4, 10]]],
        [[[1, 2], [3]], [[1, 1], [1]]],
    ),
    _task(
        "mbpp",
        164,
        """
def are_equivalent(a, b):
    divisors = lambda n: sum(d for d in range(1, n) if n % d == 0)
    return divisors(a) == divisors(b)
""",
        [[36, 57], [2, 4]],
        [[23, 47], [6, 28]],
    ),
    _task(
        "mbpp",
        295,
        """
def sum_div(number):
    return sum(d for d in range(1, number) if number % d == 0)
""",
        [[8], [12]],
        [[7], [1]],
    ),
    _task(
        "mbpp",
        558,
        """
def digit_distance_nums(a, b):
    return sum(abs(int(x) - int(y)) for x, y in zip(str(a), str(b)))
""",
        [[1, 2], [23, 56]],
        [[123, 256], [7, 100]],
    ),
    _task(
        "mbpp",
        581,
        """
def surface_Area(base, height):
    side = (base ** 2 / 4 + height ** 2) ** 0.5
    return round(2 * base * side + base ** 2)
""",
        [[3, 4], [4, 5]],
        [[1, 2], [10, 7]],
    ),
    _task(
        "mbpp",
        769,
        """
def Diff(first, second):
    return list(set(first) - set(second)) + list(set(second) - set(first))
""",
        [[[10, 15, 20], [25, 20]]],
        [[[], [1]], [[1, 1, 2], [3]]],
    ),
    _task(
        "mbpp",
        794,
        """
import re
def text_starta_endb(text):
    return re.search("a.*?b$", text)
""",
        [["aabbbb"], ["aabAbbbc"]],
        [["b"], ["ab"], [""]],
    ),
    _task(
        "mbpp",
        124,
        """
import cmath
def angle_complex(a, b):
    return cmath.phase(a + b)
""",
        [[0, "1j"]],
        [[2, "1j"], [0, "2j"]],
        1e-6,
    ),
]

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.Mod: ast.FloorDiv}
OPERATORS |= {ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.FloorDiv: ast.Div}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
NAMES = {"sum": "max", "max": "min", "abs": "float", "set": "list", "sorted": "reversed", "len": "bool", "round": "int"}
RETURNS = (
    *("list({})", "tuple({})", "set({})", "str({})", "float({})", "bool({})", "[{}]", "({}, 1)", "None", "iter({})"),
    *("{} + 1e-7", "{} + 1e-5", "{} * (1 + 1e-8)", "-{}", "{}[:-1]", "{}[::-1]", "{} or None", "{} == {}", "not {}"),
    *("__import__('numpy').array({})", "__import__('numpy').float32({})", "__import__('fractions').Fraction({})"),
    *("[x + 1e-7 for x in {}]", "type('F', (float,), {{}})({})", "lambda: {}", "float('nan')", "0", "1 / 0"),
)


class Mutant(NamedTuple):
    task: dict[str, Any]
    code: str


def mutants() -> list[Mutant]:
    """Return the different mutants of all tasks, without the solutions."""
    found = {}
    for task in TASKS:
        tree = ast.parse(task["canonical_solution"])
        for mutated in _changed_trees(tree):
            code = ast.unparse(ast.fix_missing_locations(mutated))
            if code != ast.unparse(tree):
                found[task["task_id"], code] = Mutant(task, code)
    return list(found.values())


def _changed_trees(tree: ast.Module) -> Iterator[ast.Module]:
    count = sum(1 for _ in ast.walk(tree))
    for number in range(count):
        for choice in range(len(RETURNS)):
            changed = copy.deepcopy(tree)
            node = next(node for at, node in enumerate(ast.walk(changed)) if at == number)
            if not _change(node, choice):
                break
            yield changed


def _change(node: Any, choice: int) -> bool:
    """Change a node in place by its change of this number. Return whether there is one."""
    if isinstance(node, ast.Return) and node.value is not None:
        text = ast.unparse(node.value)
        node.value = ast.parse(RETURNS[choice].replace("{}", f"({text})").replace("{{}}", "{}"), mode="eval").body
        return True
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and choice < 3:
        node.value = (node.value + 1, node.value - 1, node.value * 1.0000001)[choice]
        return True
    if choice:
        return False
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.Name) and node.id in NAMES:
        node.id = NAMES[node.id]
    elif isinstance(node, ast.FunctionDef | ast.For | ast.If) and len(node.body) > 1:
        del node.body[-2]
    else:
        return False
    return True


EVALPLUS = """\
import json, sys
from evalplus.data.mbpp import mbpp_deserialize_inputs
from evalplus.eval import untrusted_check
from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
from evalplus.gen.util import trusted_exec
limit = float(sys.argv[1])
for task, code in json.load(sys.stdin):
    name, verdicts = task["entry_point"], []
    for key in ("base_input", "plus_input"):
        inputs = task[key]
        if task["dataset"] == "mbpp":
            inputs = mbpp_deserialize_inputs(task["task_id"], inputs)
        expected, seconds = trusted_exec(
            task["canonical_solution"], inputs, name, record_time=True,
            output_not_none=task["dataset"] == "mbpp" and name in MBPP_OUTPUT_NOT_NONE_TASKS)
        verdicts.append(untrusted_check(task["dataset"], code, inputs, name, expected, task["atol"], seconds,
                                        fast_check=True, min_time_limit=limit, gt_time_limit_factor=1)[0])
    print(int(verdicts == ["pass", "pass"]), end="", flush=True)
"""


def grade_by_evalplus(chosen: list[Mutant]) -> list[bool]:
    """Return the verdicts of EvalPlus' functions: whether the values of both sets of inputs are correct."""
    command = [sys.executable, "-c", EVALPLUS, str(TIME_LIMIT_SECONDS)]
    result = subprocess.run(command, input=json.dumps(chosen), capture_output=True, text=True, check=True)
    assert len(result.stdout) == len(chosen), result.stderr
    return [verdict == "1" for verdict in result.stdout]


def grade_by_opdctl(chosen: list[Mutant]) -> list[bool]:
    """Return the verdicts of the sandbox."""
    pairs = [(json.dumps(task), f"```python\n{code}\n```") for task, code in chosen]
    return [grade.correct for grade in CODE_GRADER.grade(pairs)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    code_execution.MIN_TIME_LIMIT_SECONDS = TIME_LIMIT_SECONDS
    chosen = mutants()
    if options.count:
        chosen = random.Random(options.seed).sample(chosen, options.count)
    solutions = [Mutant(task, task["canonical_solution"]) for task in TASKS]
    by_evalplus, by_opdctl = grade_by_evalplus(solutions + chosen), grade_by_opdctl(solutions + chosen)
    print(f"{len(solutions)} solutions: {sum(by_opdctl[: len(solutions)])} correct")
    verdicts = list(zip(chosen, by_evalplus[len(solutions) :], by_opdctl[len(solutions) :], strict=True))
    different = [(mutant, expected) for mutant, expected, found in verdicts if expected != found]
    for mutant, expected in different:
        print(f"{mutant.task['task_id']}: EvalPlus {expected}\n{mutant.code}\n")
    wrong = sum(not expected for _, expected, _ in verdicts)
    print(f"{len(chosen)} mutants, {wrong} wrong by EvalPlus; {len(different)} verdicts differ")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
