"""calc: add and subtract six numbers from left to right, with a calculator.

    prompt    37+48-15…?                      six numbers of two digits
    response  37+48=85;85-15=70;…;>76         each call ends with `=`; the calculator writes its value and `;`

Every prompt has 18 characters. The model copies numbers and calls the calculator, which does the arithmetic: also that
of an incorrect call.
"""

import random
import re

from opdctl.data.toy.task import Task, ToyTool

NUMBERS = 6
CALL = re.compile(r"(-?[0-9]{1,6})([+-][0-9]{1,6})=")


def sample_numbers(rng: random.Random) -> str:
    first, *others = rng.sample(range(10, 100), NUMBERS)
    return f"{first}{''.join(rng.choice('+-') + str(number) for number in others)}"


def parse_numbers(text: str) -> list[str]:
    """Return the numbers of a prompt, each but the first with its sign."""
    return re.findall(r"[+-]?\d+", text)


def calculate(call: str) -> str:
    """Return the calculator's output: `85;` after `37+48=`, and `?;` after what is not such a call."""
    match = CALL.fullmatch(call)
    return f"{int(match[1]) + int(match[2])};" if match else "?;"


def calculate_in_writing(text: str) -> str:
    value, *others = parse_numbers(text)
    written = ""
    for number in others:
        call = f"{value}{number}="
        output = calculate(call)
        value, written = output.removesuffix(";"), written + call + output
    return f"{written}>{value}"


calc = Task("calc", sample_numbers, calculate_in_writing, ToyTool(calculate, call_end="=", output_end=";"))
