"""
Does this tree train exactly as an earlier commit did? Losses, norms and final weights, bit for bit.

    python bench/same_numbers.py                          # against the commit before the trainer became one file
    python bench/same_numbers.py --before HEAD~1 --all    # every combination: 32 cases, a quarter of an hour

Each case trains 30 steps of a tiny model three times on the same shards: with the earlier commit, with this tree, and
with this tree from the earlier commit's checkpoint of step 10. Cases combine 1 and 2 ranks, AdamW and Muon, float32 and
bfloat16, shards with and without masks, and both orders of the data.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this folder would hide modules of its names

import io
import itertools
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from extras.cli import UserError, run

ROOT = Path(__file__).resolve().parent.parent
FEW = [  # a case is ranks, recipe, dtype, masks, order: here every two values meet in some case
    (1, "gpt2", "float32", False, "sequential"), (1, "fast", "bfloat16", True, "shuffle"),
    (2, "gpt2", "bfloat16", True, "sequential"), (2, "fast", "float32", False, "shuffle"),
    (2, "gpt2", "float32", True, "shuffle"), (1, "fast", "float32", True, "sequential"),
    (1, "gpt2", "bfloat16", False, "shuffle"), (2, "fast", "bfloat16", False, "sequential"),
]  # fmt: skip
ALL = [*itertools.product((1, 2), ("gpt2", "fast"), ("float32", "bfloat16"), (False, True), ("sequential", "shuffle"))]


@dataclass
class Config:
    before: str = "8d316b9"  # the commit to compare with
    all: bool = False  # every combination, instead of eight in which every two values meet


def make_shards(folder: Path, masks: bool) -> None:
    """Random tokens that can be learned: one shard to validate on and two to train on."""
    rng, shards = np.random.default_rng(0), []
    folder.mkdir()
    for i, n in enumerate((2000, 3000, 2500)):
        name = f"edufineweb_{'train' if i else 'val'}_{i:06d}.npy"
        tokens = (np.cumsum(rng.integers(0, 3, n)) * 7 % 97 + rng.integers(0, 3, n)).astype(np.uint16)
        np.save(folder / name, tokens)
        if masks:
            np.save(folder / name.replace(".npy", ".mask.npy"), (rng.random(n) < 0.4).astype(np.uint8))
        shards.append({"name": name, "split": name.split("_")[1], "tokens": n, "bytes": 3 * n, "sha256": str(i)})
    manifest = {"format": 1, "tokenizer": {"name": "bytes", "vocab_size": 257}, "eot": 256, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"source": None, "complete": True}))


def train(tree: Path, data: Path, log_dir: Path, case: tuple, *flags: str) -> None:
    ranks, recipe, dtype, _, order = case
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    settings = {
        "data_dir": data, "log_dir": log_dir, "recipe": recipe, "dtype": dtype, "order": order, "device": "cpu",
        "n_layer": 2, "n_head": 2, "n_embd": 32, "seq_len": 32, "total_batch_size": 256, "micro_batch": 2,
        "max_steps": 30, "warmup_steps": 3, "max_lr": 3e-3, "min_lr": 3e-4, "grad_clip": 0.5, "val_every": 10,
        "val_tokens": 320, "hella_every": 0, "sample_every": 0, "save_every": 10, "keep_checkpoints": 0,
    }  # fmt: skip
    line = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, *torchrun, str(tree / "train_gpt2.py"), *line, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{tree} does not train: {done.stderr.strip().splitlines()[-1]}")


def read_log(log_dir: Path) -> dict[tuple[str, str], str]:
    """(step, stream) -> the last value, as it is written; without bpb, which was wrong where there were masks."""
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines() if not line.startswith("#")]
    return {(step, stream): value for step, stream, value in lines if stream not in ("ms", "bpb")}


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, in two finished runs."""
    a, b = read_log(one), read_log(other)
    found = [f"{key}: {a.get(key)} and {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    a, b = (torch.load(folder / "ckpt_000030.pt", weights_only=True) for folder in (one, other))
    found += [f"weight {name}" for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])]
    moments = [state["optimizer"]["state"] for state in (a, b)]
    return found + [f"optimizer state {i}.{key}" for i in moments[0] for key, value in moments[0][i].items()
                    if not torch.equal(value, moments[1][i][key])]  # fmt: skip


def main(config: Config) -> None:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        archive = subprocess.run(["git", "archive", config.before], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder / "before", filter="data")
        for masks in (False, True):
            make_shards(folder / f"data{masks}", masks)
        for number, case in enumerate(ALL if config.all else FEW):
            data, (before, now, resumed) = folder / f"data{case[3]}", (folder / f"{number}{x}" for x in "bnr")
            train(folder / "before", data, before, case)
            train(ROOT, data, now, case)
            shutil.copytree(before, resumed, ignore=shutil.ignore_patterns("ckpt_000020.pt", "ckpt_000030.pt"))
            train(ROOT, data, resumed, case, "--resume")
            for what, other in (("anew", now), ("resumed", resumed)):
                found = differences(before, other)
                failed += bool(found)
                print(*case, what, f"DIFFERS: {len(found)}, first {found[0]}" if found else "the same", flush=True)
    if failed:
        raise UserError(f"{failed} runs differ from those of {config.before}")


if __name__ == "__main__":
    run(main, Config, __doc__)
