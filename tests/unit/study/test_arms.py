"""The design of the study."""

from arms import ARMS, FULL, STUDENTS, UNIFORM, Training


def test_no_run_is_used_for_both_selection_and_comparison() -> None:
    learning_rates = dict.fromkeys((arm.name for arm in ARMS), 1e-4)
    keys = [training.key for training in [*FULL.selection(), *FULL.comparison(learning_rates)]]
    assert len(keys) == len(set(keys)) == 3 * 15 * (3 + 5)
    assert Training(STUDENTS[0], UNIFORM, 1e-4, 0).key == "student/uniform/0.0001/0"
