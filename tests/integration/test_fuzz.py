"""Damaged and forged files of a run, a model directory and data: a part of the harness of helpers/fuzz.py."""

from pathlib import Path

from helpers.fuzz import fuzz, make_corpus

MUTATIONS = 300
SEED = 22


def test_no_file_of_others_crashes_hangs_or_escapes(finished_run: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, finished_run)
    outcomes = [fuzz(corpus, tmp_path, number, SEED) for number in range(MUTATIONS)]
    faults = [each for each in outcomes if each.fault]
    assert not faults, "\n".join(f"{each.number} {each.fault}: {each.description}\n{each.output}" for each in faults)
    assert sum(each.code == 3 for each in outcomes) > MUTATIONS / 4
