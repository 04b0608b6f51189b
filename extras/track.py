"""
The values of a run, sent to TensorBoard, Weights & Biases or MLflow as well, if you ask for it and have it installed.

A resumed run goes on as the same run there: its id is kept in LOG_DIR/track.json. Offline modes are the trackers' own:
WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:///mlflow.db. Names are gpt2 and the directory's, unless WANDB_PROJECT,
WANDB_NAME, MLFLOW_EXPERIMENT_NAME or MLFLOW_RUN_NAME says otherwise. TensorBoard's files are in LOG_DIR/tensorboard.
"""

import importlib
import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from extras.cli import UserError, user_error
from extras.files import atomic_file

HINTS = {
    "tensorboard": "mend that",
    "wandb": "WANDB_MODE=offline needs no account and no network",
    "mlflow": "MLFLOW_TRACKING_URI=sqlite:///mlflow.db needs no server",
}


def require_tracker(name: str) -> None:
    """UserError if the tracker's package is not installed."""
    with user_error(f"--track {name} needs a package, pip install {name}", ImportError):
        importlib.import_module(name)


@dataclass
class Tracker:
    """Called with (step, {stream: value}) while the run goes. What a tracker raises is said, and does not end it."""

    tell: Callable[[int, dict], None]
    close: Callable[[bool], None]

    def __call__(self, step: int, values: dict) -> None:
        try:
            self.tell(step, values)
        except Exception as error:
            self.tell = lambda step, values: None
            print(f"WARNING: the tracker failed and is left alone from now on: {error}", file=sys.stderr, flush=True)

    def end(self, finished: bool) -> None:
        try:
            self.close(finished)
        except Exception as error:
            print(f"WARNING: the tracker could not end its run: {error}", file=sys.stderr, flush=True)


def open_tracker(name: str, log_dir: str, config: dict, start: int) -> Tracker:
    """A tracker that goes on at step `start`. UserError if the tracker refuses."""
    try:
        return {"tensorboard": to_tensorboard, "wandb": to_wandb, "mlflow": to_mlflow}[name](log_dir, config, start)
    except UserError:
        raise
    except Exception as error:  # no key, no network, a store it no longer likes: each has its own
        raise UserError(f"{name} refuses: {error}; {HINTS[name]}, or leave --track out") from error


def kept_id(log_dir: str, name: str, new: Callable[[], str]) -> str:
    """The id under which the tracker knows the run of this directory, made by `new` the first time."""
    from pydantic import Field, TypeAdapter, ValidationError

    path, kept = Path(log_dir) / "track.json", dict[str, Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")]]
    try:
        ids = TypeAdapter(kept).validate_json(path.read_bytes(), strict=True) if path.exists() else {}
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"{path} is not as a run left it ({place}: {first['msg']}); delete it, or restore it") from None
    if name not in ids:
        ids[name] = new()
        with atomic_file(path) as file:
            file.write(json.dumps(ids).encode())
    return ids[name]


def names(log_dir: str, project_variable: str, name_variable: str) -> tuple[str, str]:
    """Of project and run: what the environment says, or gpt2 and the directory's."""
    return os.environ.get(project_variable) or "gpt2", os.environ.get(name_variable) or Path(log_dir).resolve().name


def to_tensorboard(log_dir: str, config: dict, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What was evaluated at `start` stands; what came after the checkpoint is done again.
    writer = SummaryWriter(os.path.join(log_dir, "tensorboard"), purge_step=start + 1 if start else None)
    if start == 0:
        writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```")

    def tell(step: int, values: dict) -> None:
        for stream, value in values.items():
            writer.add_scalar(stream, value, step)
        writer.flush()

    return Tracker(tell, lambda finished: writer.close())


def to_wandb(log_dir: str, config: dict, start: int) -> Tracker:
    import wandb

    project, name = names(log_dir, "WANDB_PROJECT", "WANDB_NAME")
    run_id = kept_id(log_dir, "wandb", lambda: uuid.uuid4().hex[:8])
    run = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=log_dir, config=config)
    run.define_metric("*", step_metric="step")
    return Tracker(lambda step, values: run.log(values | {"step": step}), lambda finished: run.finish(not finished))


def to_mlflow(log_dir: str, config: dict, start: int) -> Tracker:
    import mlflow

    project, name = names(log_dir, "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_NAME")
    client, experiment = mlflow.MlflowClient(), mlflow.set_experiment(project).experiment_id
    run_id = kept_id(log_dir, "mlflow", lambda: client.create_run(experiment, run_name=name).info.run_id)
    client.update_run(run_id, status="RUNNING")
    if start == 0:
        for key, value in config.items():
            client.log_param(run_id, key, value)

    def tell(step: int, values: dict) -> None:
        for stream, value in values.items():
            if math.isfinite(value):  # MLflow's stores take no NaN
                client.log_metric(run_id, stream, value, step=step)

    return Tracker(tell, lambda finished: client.set_terminated(run_id, "FINISHED" if finished else "KILLED"))
