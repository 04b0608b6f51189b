"""Trackers get what the log gets, and a resumed run is the same run there. `make trackers` installs them all."""

import importlib
import json
import sys
import time
from types import SimpleNamespace

import pytest
from tiny import tiny_config, token_set

import plot_log
from extras import track
from extras.cli import UserError
from train_gpt2 import Config, main


@pytest.fixture
def resumed(tmp_path):
    """A function that trains with a tracker to step 8, resumes from step 5, as if killed, to 10; -> log_dir, values.

    values: stream -> step -> value as log.txt has them, without what the restart took back.
    """

    def train(name: str):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: make trackers")
        log_dir = tmp_path / "log"
        config = tiny_config(token_set(tmp_path / "data"), log_dir, max_steps=8, track=name)
        main(config)
        (log_dir / "ckpt_000008.pt").unlink()
        main(Config(**vars(config) | {"max_steps": 10, "resume": True}))
        values = plot_log.read_log(log_dir / "log.txt", "log").streams
        assert set(values["val"]) == {0, 5, 10} and set(values["train"]) == set(range(10))
        return log_dir, values

    return train


def test_a_tracker_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        main(tiny_config(token_set(tmp_path / "data"), tmp_path / "log", track="wandb"))
    assert not (tmp_path / "log").exists()


def test_a_run_keeps_its_id(tmp_path):
    ids = iter("abc")
    assert [track.kept_id(tmp_path, name, lambda: next(ids)) for name in ("wandb", "mlflow", "wandb")] == [*"aba"]


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": 7}', '{"wandb": "../x y"}', "{" * 9, '{"wandb": ""}'])
def test_ids_that_no_run_left_are_named_and_not_used(tmp_path, text):
    (tmp_path / "track.json").write_text(text)
    with pytest.raises(UserError, match=r"track.json is not as a run left it \((it|wandb): "):
        track.kept_id(tmp_path, "wandb", str)
    assert (tmp_path / "track.json").read_text() == text


@pytest.mark.parametrize("name, project", [(None, None), ("mine", "ours")])
def test_wandb_is_given_the_names_of_the_environment_or_the_directorys(tmp_path, monkeypatch, name, project):
    started = {}
    run = SimpleNamespace(define_metric=lambda *_, **__: None)
    fake = SimpleNamespace(init=lambda **settings: started.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for variable, value in (("WANDB_NAME", name), ("WANDB_PROJECT", project)):
        monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)
    (tmp_path / "run1").mkdir()
    track.open_tracker("wandb", f"{tmp_path}/run1/", {}, 0)
    assert (started["name"], started["project"]) == (name or "run1", project or "gpt2")


def test_tensorboard(resumed):
    log_dir, values = resumed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log_dir / "tensorboard")).Reload()
    for stream, expected in values.items():
        found = {event.step: event.value for event in events.Scalars(stream)}
        assert found == pytest.approx(expected, rel=1e-5), stream


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"])
def test_mlflow(resumed, tmp_path, monkeypatch, store):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _, values = resumed("mlflow")
    import mlflow

    runs = mlflow.search_runs(experiment_names=["gpt2"], output_format="list")
    assert len(runs) == 1 and runs[0].data.params["max_lr"] == "0.003" and runs[0].info.status == "FINISHED"
    for stream, expected in values.items():
        history = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, stream)
        found = {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5), stream


def test_wandb_offline(resumed, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_dir, values = resumed("wandb")
    parts = sorted((log_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2 and len({part.name for part in parts}) == 1, "two parts of one run"
    for _ in range(100):  # the last row may come a moment after the run's end
        rows = [row for part in parts for row in wandb_history(part)]
        if rows[-1]["step"] == 10:
            break
        time.sleep(0.1)
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for stream in row.keys() & values.keys():
            found.setdefault(stream, {})[row["step"]] = row[stream]
    for stream, expected in values.items():
        assert {step: found[stream][step] for step in expected} == pytest.approx(expected, rel=1e-5), stream


def test_a_tracker_that_refuses_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("extras.track.to_wandb", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="wandb refuses: division by zero; WANDB_MODE=offline"):
        track.open_tracker("wandb", str(tmp_path), {}, 0)


def test_the_end_of_a_run_is_told_and_cannot_fail_it(tmp_path, monkeypatch, capsys):
    told = []
    tracker = track.Tracker(lambda step, values: told.append(step), lambda finished: told.append(finished) or 1 / 0)
    monkeypatch.setattr("extras.checks.require_tracker", lambda name: None)
    monkeypatch.setattr("extras.track.open_tracker", lambda *_: tracker)
    main(tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=2, track="wandb"))
    assert told == [0, 0, 1, 2, True] and "could not end its run: division by zero" in capsys.readouterr().err


def wandb_history(path):
    """The rows that were logged: a header of 7 bytes, then LevelDB's log format, records that are protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header begins so near the end of a block
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]  # 1 whole, 2 first, 3 and 4 last
        whole, at = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            record = Record.FromString(whole)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
