"""Trackers: they receive every metric, and never stop a run."""

import json

import pytest
from helpers.commands import small_recipe
from helpers.training import SHORT, train

from opdctl.training import tracking


@pytest.fixture
def broken(monkeypatch):
    """wandb fails to open; trackio fails to log and to close."""

    def fail(*arguments):
        raise ConnectionError("no network here")

    monkeypatch.setitem(tracking.TRACKER_FACTORIES, "wandb", fail)
    monkeypatch.setitem(tracking.TRACKER_FACTORIES, "trackio", lambda recipe, path: tracking.Tracker(fail, fail))
    return 'tracking.report_to=["wandb", "trackio"]'


def test_failing_tracker_is_disabled(tmp_path, broken, capsys):
    with tracking.open_trackers(small_recipe(broken), tmp_path) as log_metrics:
        for step in range(2):
            log_metrics({"step": step, "loss": 1.0})
    warnings = capsys.readouterr().err
    for name in ("wandb", "trackio"):
        assert warnings.count(f"{name} is disabled") == 1
    assert warnings.count("ConnectionError: no network here") == 2


def test_training_continues_without_a_failing_tracker(tmp_path, broken):
    result = train(tmp_path / "run", *SHORT, "train.steps=1", broken)
    assert result.code == 0
    assert result.err.count("is disabled") == 2
    assert "no network here" in result.err


def test_trackers_receive_metrics_and_step(tmp_path, monkeypatch):
    logged, closed = [], []
    tracker = tracking.Tracker(lambda metrics, step: logged.append((step, metrics)), lambda: closed.append(1))
    monkeypatch.setitem(tracking.TRACKER_FACTORIES, "wandb", lambda recipe, path: tracker)
    with tracking.open_trackers(small_recipe('tracking.report_to=["wandb"]'), tmp_path) as log_metrics:
        log_metrics({"step": 3, "loss": 0.5})
        assert not closed
    assert (logged, closed) == ([(3, {"loss": 0.5})], [1])


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "run", *SHORT, 'tracking.report_to=["tensorboard"]').code == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(metrics[0]) - {"step"}
    assert [event.value for event in events.Scalars("k1")] == pytest.approx([m["k1"] for m in metrics])
