"""The short-horizon control's measurements on a small run, and its table by hand."""

import pytest
from arms import IW_OPD, STUDENTS, UNIFORM, Scale
from short_horizon import HORIZONS, ControlRun, control_table, measure_control

from opdctl.data.toy import TASKS

SCALE = Scale(steps=1, prompts_per_step=4)


def test_responses_of_one_token_have_equal_weights_and_longer_ones_do_not():
    student = STUDENTS[0]
    one, other = (measure_control(student, 1, arm, 0, SCALE) for arm in (UNIFORM, IW_OPD))
    assert (one.weight_variation, len(one.accuracy)) == (0.0, 2)
    assert one == other
    longer = measure_control(student, 14, UNIFORM, 0, SCALE)
    assert longer.weight_variation > 0.01
    # A response is correct if it equals the first letters of the worked answer, so a longer one rarely is.
    assert longer.accuracy[0] <= one.accuracy[0]
    assert set(one.accuracy) <= {0.0, 0.25, 0.5, 0.75, 1.0}


def test_table_has_the_differences_by_seed():
    student, runs = STUDENTS[0], {}
    for seed, (opd, iw_opd) in enumerate([(0.5, 0.6), (0.7, 0.6)]):
        runs["one pass", student, UNIFORM, seed] = ControlRun([0.1, opd], 0.2)
        runs["one pass", student, IW_OPD, seed] = ControlRun([0.1, iw_opd], 0.2)
    _, _, row, total = control_table(runs)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:6] == ["one pass", "student", "0.200", "0.100", "0.350", "0.600"]
    # Final differences 0.1 and -0.1: mean 0, standard error 0.1, t with one degree of freedom 12.706.
    assert cells[7] == "+0.000 [-1.271, +1.271]"
    assert cells[6] == "+0.000 [-0.635, +0.635]"
    assert total == row.replace(" student ", " all ")


def test_difference_of_the_table_is_iw_opd_minus_opd():
    student, runs = STUDENTS[0], {}
    for seed in range(2):
        runs["one pass", student, UNIFORM, seed] = ControlRun([0.1, 0.5], 0.2)
        runs["one pass", student, IW_OPD, seed] = ControlRun([0.1, 0.7], 0.2)
    assert control_table(runs)[2].split("|")[-2].strip().startswith("+0.200")


@pytest.mark.parametrize(
    ("task", "prompt", "first"),
    [("sort12", "lkjihgfedcba?", "a:lkjihgfedcb;"), ("perm", "abdce:010101010101010101010101?", "01badce;")],
)
def test_one_pass_is_the_first_pass_of_the_worked_answer(task, prompt, first):
    assert TASKS[task].solve(prompt)[: HORIZONS["one pass"][task]] == first
