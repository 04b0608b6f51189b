"""
How long training pauses for a checkpoint: written at once, or copied and written in a thread.

    python bench/checkpoint.py                      # GPT-2 124M with AdamW's moments, 1.5 GB, on this machine
    python bench/checkpoint.py --n_layer 2 --n_embd 64 --n_head 2 --rounds 3

The two alternate in one run; a round of the second waits, unmeasured, until its file is on disk.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # bench/tokenize.py would hide Python's own

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_gpt2
from extras.cli import run
from extras.hardware import keep_freed_memory
from train_gpt2 import GPT, GPTConfig


@dataclass
class Config:
    n_layer: int = 12  # of the model
    n_head: int = 12  # of the model
    n_embd: int = 768  # of the model
    rounds: int = 5  # measured saves of each kind, after one that is not
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the model lies
    directory: str = ""  # where to write; by default a temporary directory


def main(config: Config) -> None:
    keep_freed_memory()
    model = GPT(GPTConfig(1024, 50304, config.n_layer, config.n_head, config.n_embd)).to(config.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    times: dict[str, list[float]]
    times = {"written at once": [], "copied, written in a thread": [], "until it is on disk": []}
    with tempfile.TemporaryDirectory(dir=config.directory or None) as directory:
        log = train_gpt2.Log(directory, writes=True)
        saver = train_gpt2.Saver(directory, 1, log, {})
        for step in range(config.rounds + 1):
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            times["written at once"].append(timed(config.device, write, Path(directory) / "plain.pt", state))
            began = time.perf_counter()
            times["copied, written in a thread"].append(timed(config.device, saver.save, state))
            saver.wait()
            times["until it is on disk"].append(time.perf_counter() - began)
        size = train_gpt2.checkpoint_path(directory, config.rounds).stat().st_size / 1e9
    print(f"{size:.2f} GB, {config.device}, torch {torch.__version__}, medians of {config.rounds}")
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:30s} {median:6.2f} s")
    print(f"the pause is {medians['written at once'] / medians['copied, written in a thread']:.1f} times shorter")


def write(path: Path, state: dict) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())


def timed(device: str, function, *arguments) -> float:
    if device != "cpu":
        getattr(torch, torch.device(device).type).synchronize()
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    run(main, Config, __doc__)
