"""Trackers get what the log gets, and a resumed run is the same run there. `make trackers` installs them all."""

import importlib

import pytest
from tiny import read_log, tiny_config, token_set

from cli import UserError
from train_gpt2 import Config, main


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """A function that trains with a tracker to step 5, then resumes to step 10, and returns the log directory."""

    def train(name: str):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make trackers")
        data = token_set(tmp_path / "data")
        config = tiny_config(data, tmp_path / "log", max_steps=5, track=name)
        main(config)
        main(Config(**vars(config) | {"max_steps": 10, "resume": True}))
        return tmp_path / "log"

    return train


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        main(tiny_config(token_set(tmp_path / "data"), tmp_path / "log", track="wandb"))
    assert not (tmp_path / "log").exists()


def test_tensorboard(resumed):
    log_dir = resumed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir / "tensorboard")).Reload()
    for stream, values in read_log(log_dir).items():
        found = {event.step: event.value for event in events.Scalars(stream)}
        assert found == pytest.approx(values, rel=1e-5)


def test_mlflow(resumed, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log_dir = resumed("mlflow")
    import mlflow

    runs = mlflow.search_runs(experiment_names=["gpt2"])
    assert len(runs) == 1
    found = mlflow.MlflowClient().get_metric_history(runs["run_id"][0], "train")
    assert {metric.step: metric.value for metric in found} == pytest.approx(read_log(log_dir)["train"], rel=1e-5)


def test_wandb_offline(resumed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_dir = resumed("wandb")
    runs = sorted((log_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.split("-")[-1] for run in runs}) == 1, "two parts of one run"
