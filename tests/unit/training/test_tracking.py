"""Trackers: they receive every metric, and never stop a run."""

import json

import pytest
from helpers.commands import invoke, small_recipe
from helpers.training import SHORT, train

from opdctl.recipe.load import load_recipe
from opdctl.training import tracking


@pytest.fixture
def broken(monkeypatch):
    """wandb fails to open; trackio fails to log and to close."""

    def fail(*arguments):
        raise ConnectionError("no network here")

    monkeypatch.setitem(tracking.TRACKER_FACTORIES, "wandb", fail)
    monkeypatch.setitem(
        tracking.TRACKER_FACTORIES, "trackio", lambda recipe, path, identity: tracking.Tracker(fail, fail)
    )
    return 'tracking.report_to=["wandb", "trackio"]'


def test_failing_tracker_is_disabled(tmp_path, broken, capsys):
    with tracking.open_trackers(small_recipe(broken), tmp_path) as trackers:
        for step in range(2):
            trackers.log({"step": step, "loss": 1.0})
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
    monkeypatch.setitem(tracking.TRACKER_FACTORIES, "wandb", lambda recipe, path, identity: tracker)
    with tracking.open_trackers(small_recipe('tracking.report_to=["wandb"]'), tmp_path) as trackers:
        trackers.log({"step": 3, "loss": 0.5})
        assert not closed
    assert (logged, closed) == ([(3, {"loss": 0.5})], [1])


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = (*SHORT, "eval.limit=8", "eval.every_steps=2")
    assert train(tmp_path / "run", *settings, 'tracking.report_to=["tensorboard"]').code == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    accuracies = {f"accuracy/sort12{end}{part}" for end in ("", "/teacher") for part in ("", "/low", "/high")}
    assert set(events.Tags()["scalars"]) == set().union(*metrics) - {"step"} | accuracies
    assert [event.step for event in events.Scalars("accuracy/sort12")] == [0, 2]
    assert [event.value for event in events.Scalars("k1")] == pytest.approx([m["k1"] for m in metrics])


class Recorder:
    """A tracker that keeps what it receives."""

    def __init__(self, monkeypatch):
        self.logged, self.saved, self.identities = [], [], []
        monkeypatch.setitem(tracking.TRACKER_FACTORIES, "wandb", self.open)

    def open(self, recipe, path, identity):
        self.identities.append(identity)
        log = lambda metrics, step: self.logged.append((step, metrics))  # noqa: E731
        return tracking.Tracker(log, lambda: None, self.saved.append)


def test_accuracies_and_the_card_are_logged_once_under_one_id(tmp_path, monkeypatch):
    recorder = Recorder(monkeypatch)
    settings = (*SHORT, "eval.limit=8", "eval.every_steps=1", 'tracking.report_to=["wandb"]')
    assert train(tmp_path / "run", *settings, "train.steps=1").code == 0
    (tmp_path / "run").rename(tmp_path / "renamed")
    assert train(tmp_path / "renamed", *settings, "train.steps=2").code == 0
    assert len(recorder.identities) == 2
    assert len(set(recorder.identities)) == 1
    updates = [metrics for _, metrics in recorder.logged if "loss" in metrics]
    names = {f"{stage}_{unit}" for stage in ("rollout", "score", "update") for unit in ("seconds", "tokens_per_second")}
    assert [names & metrics.keys() for metrics in updates] == [names, names]
    accuracies = [(step, metrics) for step, metrics in recorder.logged if "accuracy/sort12" in metrics]
    assert [step for step, _ in accuracies] == [0, 1, 2]
    summary = json.loads((tmp_path / "renamed/eval/sort12/step-00001/summary.json").read_text())
    low, high = summary["ci"]
    expected = {"accuracy/sort12": summary["avg"], "accuracy/sort12/low": low, "accuracy/sort12/high": high}
    assert accuracies[1][1] == expected
    assert [step for step, metrics in recorder.logged if "accuracy/sort12/teacher" in metrics] == [0]
    cards = [tmp_path / "run/student/step-00001/README.md", tmp_path / "renamed/student/step-00002/README.md"]
    assert recorder.saved == cards


def test_report_of_the_analysis_is_kept_under_the_id_of_the_run(finished_copy, monkeypatch):
    recorder = Recorder(monkeypatch)
    set_trackers(finished_copy, "wandb", "tensorboard")  # the latter keeps no files
    assert invoke("analyze-position", finished_copy).code == 0
    assert recorder.saved == [finished_copy / "analysis/report.html"]
    assert recorder.identities == [tracking.run_identity(finished_copy)]
    assert not (finished_copy / "tensorboard").exists()


def test_failing_tracker_does_not_fail_the_analysis(finished_copy, broken):
    set_trackers(finished_copy, "wandb")
    result = invoke("analyze-position", finished_copy, "--json")
    assert result.code == 0
    assert "wandb is disabled after an error: ConnectionError" in result.err
    assert result.json()["report"] == str(finished_copy / "analysis/report.html")


def test_analysis_of_a_run_without_trackers_opens_none(finished_copy, monkeypatch):
    monkeypatch.delattr(tracking, "save_to_trackers")
    assert invoke("analyze-position", finished_copy).code == 0
    assert not (finished_copy / tracking.IDENTITY_FILE).exists()


def set_trackers(run, *kinds):
    recipe = load_recipe([run / "recipe.toml"], [f"tracking.report_to={json.dumps(kinds)}"])
    (run / "recipe.toml").write_text(recipe.to_toml())


def test_runs_of_one_name_have_different_ids(tmp_path):
    paths = [tmp_path / name / "cross_scale" for name in ("first", "second")]
    for path in paths:
        path.mkdir(parents=True)
    first, second = map(tracking.run_identity, paths)
    assert first != second
    assert tracking.run_identity(paths[0]) == first


def test_run_that_was_tracked_before_ids_keeps_its_name(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert tracking.run_identity(tmp_path) == tmp_path.name


def test_mlflow_continues_the_run_of_the_same_id(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # for the artifacts
    recipe = small_recipe('tracking.report_to=["mlflow"]')
    run = tmp_path / "run"
    run.mkdir()
    for step in range(2):
        with tracking.open_trackers(recipe, run) as trackers:
            trackers.log({"step": step, "accuracy/sort12": 0.5 + step})
            assert trackers.opened.keys() == {"mlflow"}
    (run / "report.html").write_text("<p>report</p>")
    tracking.save_to_trackers(recipe, run, run / "report.html")
    (stored,) = mlflow.search_runs(experiment_names=["opdctl"], output_format="list")
    assert stored.info.run_name == "run"
    artifacts = {file.path for file in mlflow.MlflowClient().list_artifacts(stored.info.run_id)}
    assert artifacts == {"recipe.json", "report.html"}
    history = mlflow.MlflowClient().get_metric_history(stored.info.run_id, "accuracy/sort12")
    assert [(each.step, each.value) for each in history] == [(0, 0.5), (1, 1.5)]
