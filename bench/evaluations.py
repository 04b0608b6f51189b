"""
What evaluations cost in a run: seconds of the first and of later ones, beside a training step.

    python bench/evaluations.py --data_dir data/corpus --hella_data hellaswag_val.jsonl.gz
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import contextlib
import io
import time
from dataclasses import dataclass
from typing import Literal

import torch

import hellaswag
import train_gpt2
from extras.cli import run
from train_gpt2 import SIZES


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    hella_data: str = ""  # hellaswag_val.jsonl(.gz)
    hella_limit: int = 0  # a subset of that many examples; 0 = all
    model: Literal[*SIZES] = "gpt2"  # size
    n_layer: int = 0  # instead of the model's own
    seq_len: int = 1024  # tokens per sequence
    micro_batch: int = 64  # sequences per forward
    val_tokens: int = 20 * 2**19  # tokens of the val split
    device: str = "auto"  # cuda, mps or cpu
    compile: bool | None = None  # as in train_gpt2.py
    repeats: int = 3  # times each


def main(config: Config) -> None:
    ours = train_gpt2.Config(
        data_dir=config.data_dir, log_dir="bench/out/unused", model=config.model, n_layer=config.n_layer,
        total_batch_size=config.micro_batch * config.seq_len, micro_batch=config.micro_batch, seq_len=config.seq_len,
        hella_data=config.hella_data, hella_limit=config.hella_limit, device=config.device, compile=config.compile,
        val_tokens=config.val_tokens,
    )  # fmt: skip
    ranks = train_gpt2.join_ranks(ours.device)
    trainer = train_gpt2.Run(ours, ranks)
    synchronize = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    meter = train_gpt2.Meter(trainer, train_gpt2.Log("", writes=False, start=0), train_gpt2.StopSignal(ranks))

    def seconds(function) -> float:
        synchronize()
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            function()
        synchronize()
        return time.perf_counter() - began

    def update():
        train_gpt2.train_step(trainer, trainer.batch(0), 1e-4)

    update()
    rows = trainer.hella_rows or []
    batches = hellaswag.plan_batches(rows, 16384)
    sizes = [(sum(len(rows[i].trees) for i in batch), max(tree.shape[1] for tree in rows[batch[0]].trees))
             for batch in batches]  # fmt: skip
    print(f"HellaSwag: {len(rows)} rows, {len(batches)} batches, {len(set(sizes))} distinct shapes")
    print("| what | " + " | ".join(f"time {i + 1}, s" for i in range(config.repeats)) + " |")
    print("|---|" + "--:|" * config.repeats)
    evaluations = {name: lambda name=name: meter.evaluate(0, name) for name in train_gpt2.EVALUATIONS}
    if not rows:
        del evaluations["hella"]
    for name, function in ({"a training step": update} | evaluations | {"a training step after them": update}).items():
        print(f"| {name} | {' | '.join(f'{seconds(function):.3f}' for _ in range(config.repeats))} |", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
