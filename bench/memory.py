"""
Memory of the training step: measured, beside what pick_micro_batch expects. One process a row.

    python bench/memory.py                                            # 124M on CUDA at B = 16, 32, 64
    python bench/memory.py --variants compile compile,recompute eager --micro_batches 8 16

16 P are weights, gradients and AdamW's moments in float32; what is beyond them grows with the tokens of a micro-batch.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import multiprocessing
from dataclasses import dataclass, field
from typing import Literal

import torch

import train_gpt2
from bench.train_step import batches, room
from extras.cli import run
from extras.hardware import step_bytes
from train_gpt2 import SIZES


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    model: Literal[*SIZES] = "gpt2"  # size
    n_layer: int = 0  # instead of the model's own
    seq_len: int = 1024  # tokens per sequence
    device: str = "auto"  # cuda or cpu; on a CPU nothing is counted, and only the way is tried
    variants: list[str] = field(
        default_factory=lambda: ["compile", "eager", "compile,recompute", "compile,dtype=float16"]
    )
    """modes, as settings of the trainer behind commas"""
    micro_batches: list[int] = field(default_factory=lambda: [16, 32, 64])  # sequences per forward


def measure(pipe, config: Config, variant: str, B: int) -> None:
    """Send peak bytes of two steps, allocated, reserved and expected, and how many parameters; or what went wrong."""
    settings = dict(item.split("=") if "=" in item else (item, True) for item in variant.split(",") if item != "eager")
    ours = train_gpt2.Config(**{
        "data_dir": config.data_dir, "log_dir": "bench/out/unused", "model": config.model, "n_layer": config.n_layer,
        "total_batch_size": 2 * B * config.seq_len, "micro_batch": B, "seq_len": config.seq_len, "hella_every": 0,
        "device": config.device, "compile": False, **settings,
    })  # fmt: skip
    try:
        trainer = train_gpt2.Run(ours, train_gpt2.join_ranks(ours.device))
        on_gpu = trainer.device.type == "cuda"
        for step in range(2):
            float(train_gpt2.train_step(trainer, trainer.batch(step), 1e-4)[0])
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
        shape, P = trainer.raw_model.config, sum(p.numel() for p in trainer.raw_model.parameters())
        fixed, per_token = step_bytes(trainer.config, shape, trainer.ranks, trainer.compiled, trainer.dtype)
        pipe.send((peak, reserved, 4 * P + fixed + B * config.seq_len * per_token, P))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def main(config: Config) -> None:
    context = multiprocessing.get_context("spawn")
    rows = [(variant, B) for variant in config.variants for B in config.micro_batches]
    print("| variant | B | peak GiB | reserved GiB | expected GiB | bytes a token beyond 16 P |")
    print("|---|--:|--:|--:|--:|--:|")
    for some in batches(rows, room(config.device)):  # side by side: each counts its own
        pipes = []
        for variant, B in some:
            here, there = context.Pipe()
            context.Process(target=measure, args=(there, config, variant, B), daemon=True).start()
            there.close()
            pipes.append(here)
        for (variant, B), pipe in zip(some, pipes):
            try:
                answer = pipe.recv()
            except EOFError:
                answer = "its process died"
            if isinstance(answer, str):
                print(f"| {variant} | {B} | {answer} | | | |", flush=True)
                continue
            *memory, P = answer
            per_token = (memory[0] - 16 * P) / (B * config.seq_len)
            gib = " | ".join(f"{number / 2**30:.2f}" for number in memory)
            print(f"| {variant} | {B} | {gib} | {per_token:,.0f} |", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
