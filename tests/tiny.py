"""Small token sets and small runs, for the tests."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import extras.cli
import train_gpt2
from train_gpt2 import Config

ROOT = Path(__file__).parent.parent
USER_ERRORS = (train_gpt2.UserError, extras.cli.UserError)  # two classes: train_gpt2.py runs without extras/


def token_set(directory: Path, lengths=(2000, 3000, 2500), tokenizer="bytes", vocab_size=257, masks=None) -> Path:
    """Shards of random tokens of the given lengths, the first for val, with a manifest."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    shards = []
    for i, n in enumerate(lengths):
        split = "train" if i else "val"
        name = f"edufineweb_{split}_{i:06d}.npy"
        # skewed and correlated, so that there is something to learn
        tokens = (np.cumsum(rng.integers(0, 3, n)) * 7 % 97 + rng.integers(0, 3, n)).astype(np.uint16)
        tokens[0] = vocab_size - 1
        np.save(directory / name, tokens)
        if masks is not None:
            np.save(directory / name.replace(".npy", ".mask.npy"), masks[i].astype(np.uint8))
        shards.append({"name": name, "split": split, "tokens": n, "documents": 1, "bytes": 3 * n, "sha256": str(i)})
    manifest = {"format": 1, "tokenizer": {"name": tokenizer, "vocab_size": vocab_size}, "eot": vocab_size - 1}
    manifest |= {"source": {"dataset": "random"}, "shards": shards, "complete": True}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def tiny_config(data, log, **changes) -> Config:
    """A run of some milliseconds a step: 8 sequences of 32 tokens, 2 layers of 32 channels."""
    settings = {
        "data_dir": str(data), "log_dir": str(log), "order": "sequential", "device": "cpu", "dtype": "float32",
        "n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 32, "total_batch_size": 256, "micro_batch": 8,
        "max_steps": 10, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4, "grad_clip": 0.5, "val_every": 5,
        "val_tokens": 320, "hella_every": 0, "sample_every": 0, "save_every": 5,
    }  # fmt: skip
    return Config(**{**settings, **changes})


def flags(config: Config) -> list[str]:
    """The command line that says `config`."""
    line = []
    for name, value in vars(config).items():
        if isinstance(value, bool) or value is None:
            line += [] if value is None else [f"--{name}" if value else f"--no-{name}"]
        else:
            line.append(f"--{name}={value}")
    return line


def launch(config: Config, ranks: int = 1, **kwargs) -> subprocess.CompletedProcess:
    """Run train_gpt2.py in processes of its own: alone, or under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train_gpt2.py"), *flags(config)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kwargs)


def read_log(log_dir) -> dict[str, dict[int, float]]:
    """stream -> step -> value; the last value of a step wins."""
    streams: dict[str, dict[int, float]] = {}
    for line in (Path(log_dir) / "log.txt").read_text().splitlines():
        if not line.startswith("#"):
            step, name, value = line.split()
            streams.setdefault(name, {})[int(step)] = float(value)
    return streams


def bytes_of(checkpoint) -> bytes:
    """What a run goes on from, as torch.save writes it: two files of it are the same to the byte, or they are not."""
    state = torch.load(checkpoint, weights_only=True)
    torch.save([state[key] for key in ("model", "optimizer", "loader", "step")], file := io.BytesIO())
    return file.getvalue()
