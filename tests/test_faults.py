"""Faults: kills, power cuts and errors at any call, a full disk, a read-only one, clocks that jump, memory that ends."""

from pathlib import Path

import faults
import pytest
from faults import power_cut, system_error

from opdctl import claims


@pytest.fixture(autouse=True)
def claims_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness makes them short-lived."""
    monkeypatch.setattr(claims, "LEASE", claims.LEASE)
    monkeypatch.setattr(claims, "HEARTBEAT", claims.HEARTBEAT)


def test_three_workers_a_stage_under_kills_make_the_student_of_an_undisturbed_chain(tmp_path: Path) -> None:
    assert faults.kill(tmp_path, 6, 0, 2, ("rollout.prompts_per_step=12",)).startswith("6 kills (2 of rollout, ")


@pytest.mark.parametrize(("fault", "start"), [(power_cut, 0), (power_cut, 4), (system_error, 2), (system_error, 7)])
def test_after_a_fault_at_a_write_rename_or_flush_a_rerun_ends_the_same(fault, start, tmp_path):
    """Every ninth, from two starts; the harness does all of them."""
    assert "each time a rerun ended the same" in faults.fail_at_calls(tmp_path, fault, start, stride=9)
