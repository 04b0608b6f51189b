"""
The directory of a run: log.txt, which only grows, and checkpoints, which are there whole or not at all.

A checkpoint is `LOG_DIR/ckpt_{step:06d}.pt`, step = updates done: a plain dict of tensors, numbers and strings that
`torch.load(weights_only=True)` accepts. What is not whole is never trusted, and nothing in a file is ever executed.
"""

import json
import math
import os
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from cli import UserError
from files import atomic_file

NAME = re.compile(r"ckpt_(\d{6,})\.pt")


def path_of(log_dir: str, step: int) -> Path:
    return Path(log_dir) / f"ckpt_{step:06d}.pt"


def saved_steps(log_dir: str) -> list[int]:
    """Steps of the checkpoints in a directory, newest first."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    return sorted((int(match[1]) for match in map(NAME.fullmatch, names) if match), reverse=True)


def read(path: str | Path, needs: tuple[str, ...] = ()) -> dict:
    """The checkpoint in a file, on the CPU, memory-mapped. UserError unless it is whole and has the keys it `needs`.

    `torch.load` does not look at the CRC32 that the archive has of every tensor, so a flipped bit would pass: we look.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: {damaged} fails its checksum; use an older checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        reason = next((line for line in str(error).split("\n") if "WeightsUnpickler" in line), str(error)).strip()[:150]
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}: {reason}); use another") from error
    missing = [key for key in needs if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this trainer: it has no {', '.join(missing)}")
    return state


def read_newest(log_dir: str, needs: tuple[str, ...] = ()) -> tuple[dict | None, list[str]]:
    """The newest whole checkpoint of a directory, None if there is none; and a line on each that was passed over."""
    passed_over = []
    for step in saved_steps(log_dir):
        try:
            return read(path_of(log_dir, step), needs), passed_over
        except UserError as error:
            passed_over.append(str(error))
    return None, passed_over


SHAPE = ("model", "n_layer", "n_head", "n_embd")  # of the weights: what not even --force can change


def open_run(log_dir: str, config: dict, loader: dict, needs: tuple, fixed: tuple, say) -> dict | None:
    """The checkpoint that a run in `log_dir` goes on from; None for a run that begins. Writes nothing.

    config and loader: what the run is to be, against what the checkpoint was; `say` tells the differences. UserError
    for a directory that holds a run already, unless config["resume"]; and for another loader or another of the `fixed`
    keys, unless config["force"], which can't change the shape of the weights.
    """
    if not config["resume"] and (saved_steps(log_dir) or os.path.exists(os.path.join(log_dir, "log.txt"))):
        raise UserError(f"{log_dir} already holds a run: --resume goes on with it, another --log_dir starts anew")
    saved, passed_over = read_newest(log_dir, needs)
    for line in passed_over:
        say(f"WARNING: {line}")
    if saved is None:
        if passed_over and not config["force"]:
            raise UserError(f"{log_dir}: no checkpoint of this run can be read ({passed_over[0]}); --force starts anew")
        return None
    before, now = saved["config"] | saved["loader"], config | loader
    changed = [key for key in now if key in before and before[key] != now[key] and key not in ("resume", "force")]
    told = {key: f"{key} was {before[key]}, is {now[key]}" for key in changed}
    shape = "; ".join(told[key] for key in changed if key in SHAPE)
    if shape:
        raise UserError(f"{log_dir} can't go on with weights of another shape: {shape}; choose another --log_dir")
    others = "; ".join(told[key] for key in changed if key in (*fixed, *loader))
    if others and not config["force"]:
        raise UserError(f"{log_dir} can't go on as the same run: {others}; --force does it all the same")
    if told:
        say(f"resuming with other settings: {'; '.join(told.values())}")
    if config["init_from"]:
        say(f"--init_from {config['init_from']} is not used: the run goes on from its own checkpoint")
    return saved


def write(path: Path, state: dict) -> None:
    """Write a checkpoint, atomically."""
    with atomic_file(path) as file:
        torch.save(state, file)


def size_of(state) -> int:
    """Bytes of the tensors in a nest of dicts and lists."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, values))


def to_host(state, copies=None):
    """A copy of a nest of dicts and lists, tensors in host memory; those that shared memory (tied weights) still do."""
    copies = {} if copies is None else copies
    if isinstance(state, torch.Tensor):
        key = (state.data_ptr(), state.shape, state.dtype)
        if key not in copies:
            copies[key] = state.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(state, dict):
        return {key: to_host(value, copies) for key, value in state.items()}
    return [to_host(value, copies) for value in state] if isinstance(state, (list, tuple)) else state


def require_space(log_dir: str, needed: int) -> None:
    """UserError if `log_dir` has no room for `needed` bytes."""
    free = shutil.disk_usage(log_dir).free
    if free < needed:
        raise UserError(
            f"{log_dir} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed for checkpoints; "
            "free some, lower --keep_checkpoints, or choose another --log_dir"
        )


class Saver:
    """Saves in the background: `save` returns as soon as the state is copied to host memory.

    A save that fails warns and leaves the older checkpoints as they are. One save is under way at a time.
    """

    def __init__(self, log_dir: str, keep: int, log: "Log", writes: bool):
        self.log_dir, self.keep, self.log, self.writes = log_dir, keep, log, writes
        self.thread, self.failed = None, False
        for half in Path(log_dir).glob("ckpt_*.tmp") if writes else ():
            half.unlink()  # a run that was killed may have left it

    def require_room(self, state: dict) -> None:
        """UserError unless all the checkpoints of the run fit, with the best one and the one being written."""
        there = sum(path_of(self.log_dir, step).stat().st_size for step in saved_steps(self.log_dir))
        weights_and_moments = 3 * size_of(state["model"])
        require_space(self.log_dir, (self.keep + 2) * weights_and_moments - there)

    def save(self, state: dict) -> None:
        """Save `state` as its step's checkpoint; then keep the newest `keep`, and that of the best validation."""
        if self.writes:
            self.wait()
            self.thread = threading.Thread(target=self._save, args=(to_host(state),), name="checkpoint")
            self.thread.start()

    def wait(self) -> bool:
        """Until what was saved is on disk, or has failed and said so. Whether it is on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        return not self.failed

    def _save(self, state: dict) -> None:
        path, self.failed = path_of(self.log_dir, state["step"]), True
        try:
            require_space(self.log_dir, size_of(state))
            self.log.sync()  # a resumed run will not log again what came before
            write(path, state)
            self.failed = False
            # a file with a later step was damaged, or this run would have begun there: it doesn't count as one of ours
            steps, best = [step for step in saved_steps(self.log_dir) if step <= state["step"]], self.log.best_step()
            for step in steps[self.keep :] if self.keep else []:
                if step != best:
                    path_of(self.log_dir, step).unlink()
        except (OSError, RuntimeError, UserError) as error:
            what = f"{path.name} was not saved" if self.failed else "an old checkpoint could not be removed"
            print(f"WARNING: {what}, training goes on: {error}", file=sys.stderr, flush=True)


class Log:
    """LOG_DIR/log.txt: `step stream value`, append-only, a step's last value wins; lines with # tell of the run.

    A disk that is full warns once; the lines wait in memory until there is room.
    """

    def __init__(self, log_dir: str, writes: bool, track: Callable[[int, dict], None] | None = None):
        self.path, self.file, self.track = Path(log_dir) / "log.txt", None, track
        self.waiting, self.lock, self.warned = [], threading.Lock(), False
        text = self.path.read_bytes() if self.path.exists() else b""
        self.was_there = bool(text)
        if writes:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self.file.truncate(text.rfind(b"\n") + 1)  # a run that was killed may have left half a line
        self.values: dict[str, dict[int, float]] = {}
        for line in text[: text.rfind(b"\n") + 1].decode("utf-8").splitlines():
            if line and not line.startswith("#"):
                step, stream_name, value = line.split()
                self.values.setdefault(stream_name, {})[int(step)] = float(value)

    def write(self, step: int, **values: float) -> None:
        for stream_name, value in values.items():
            self.values.setdefault(stream_name, {})[step] = value
            self.waiting.append(f"{step} {stream_name} {value:{'.6g' if stream_name == 'lr' else '.6f'}}\n")
        try:
            if self.track:
                self.track(step, values)
        except Exception as error:  # whatever a tracker raises, the run is worth more than it
            self.track = None
            print(f"WARNING: the tracker failed and is left alone from now on: {error}", file=sys.stderr, flush=True)

    def comment(self, what: str, content: dict) -> None:
        self.waiting.append(f"# {what} {json.dumps(content)}\n")

    def has(self, step: int, stream_name: str) -> bool:
        return step in self.values.get(stream_name, {})

    def best_step(self) -> int | None:
        """The step of the lowest validation loss among those that still have a checkpoint; None before the first."""
        val = self.values.get("val", {})
        steps = [step for step in saved_steps(self.path.parent) if math.isfinite(val.get(step, math.nan))]
        return min(steps, key=lambda step: val[step], default=None)

    def last(self) -> dict[str, float]:
        """The last value of each stream."""
        return {stream_name: values[max(values)] for stream_name, values in self.values.items()}

    def flush(self) -> None:
        """Give what was written to the system, so that a reader sees it."""
        try:
            self._flush()
        except OSError as error:
            if not self.warned:
                print(f"WARNING: {self.path} can't be written, its lines wait: {error}", file=sys.stderr, flush=True)
            self.warned = True

    def sync(self) -> None:
        """Flush, and wait until it is on the disk. Raises OSError."""
        self._flush()
        if self.file:
            os.fsync(self.file.fileno())

    def _flush(self) -> None:
        with self.lock:  # the thread that saves syncs, too
            lines, end = "".join(self.waiting), self.file.seek(0, os.SEEK_END) if self.file else 0
            count, data = len(self.waiting), lines.encode()
            try:
                while self.file and data:
                    data = data[self.file.write(data) :]
            except OSError:
                self.file.truncate(end)  # no half line
                raise
            del self.waiting[:count]
