"""
Where a training step goes: a table by operator, and a trace for chrome://tracing or ui.perfetto.dev.

    python bench/profile.py                                   # eager, on what there is
    python bench/profile.py --compile --micro_batch 64 --trace bench/out/trace.json
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this file would hide Python's own profile

from dataclasses import dataclass
from typing import Literal

import torch

import train_gpt2
from extras.cli import run
from train_gpt2 import SIZES


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    model: Literal[*SIZES] = "gpt2"  # size
    n_layer: int = 0  # instead of the model's own
    micro_batch: int = 4  # windows per forward
    seq_len: int = 1024  # tokens per window
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # autocast dtype
    compile: bool = False  # the step as torch.compile makes it
    steps: int = 2  # how many to look at, after two that are not
    rows: int = 25  # of the table
    trace: str = ""  # write a trace there


def main(config: Config) -> None:
    ours = train_gpt2.Config(
        data_dir=config.data_dir, log_dir="bench/out/unused", model=config.model, n_layer=config.n_layer,
        total_batch_size=config.micro_batch * config.seq_len, micro_batch=config.micro_batch, seq_len=config.seq_len,
        hella_every=0, device=config.device, dtype=config.dtype, compile=config.compile,
    )  # fmt: skip
    trainer = train_gpt2.set_up(ours, train_gpt2.join_ranks(ours.device))
    batches = [trainer.batch(step) for step in range(2 + config.steps)]
    for batch in batches[:2]:
        train_gpt2.train_step(trainer, batch, 1e-4)
    kinds, on_gpu = [torch.profiler.ProfilerActivity.CPU], trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        for batch in batches[2:]:
            loss, _ = train_gpt2.train_step(trainer, batch, 1e-4)
        float(loss)  # waits for the device
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=config.rows, max_name_column_width=60))
    if config.trace:
        os.makedirs(os.path.dirname(config.trace) or ".", exist_ok=True)
        profile.export_chrome_trace(config.trace)


if __name__ == "__main__":
    run(main, Config, __doc__)
