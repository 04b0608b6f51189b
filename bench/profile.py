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
    rows: int = 45  # of the table
    trace: str = ""  # write a trace there


KINDS = {  # what a CUDA kernel's name tells
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated"),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "splitk"),
    "fused by Inductor": ("triton_",),
    "optimizer": ("adam", "multi_tensor"),
    "copies": ("memcpy", "memset"),
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words)), "other")


def show_kernels(profile, config: Config) -> None:
    """Milliseconds a step on the GPU: by kind, then the longest kernels."""
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = sorted(((event.self_device_time_total / 1000 / config.steps, event.count // config.steps, event.key)
                   for event in kernels), reverse=True)  # fmt: skip
    total, kinds = sum(row[0] for row in rows), {}
    for ms, _, name in rows:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    print("| kind | ms a step | share |\n|---|--:|--:|")
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {ms:.2f} | {ms / total:.1%} |")
    print("\n| kernel | calls | ms a step | share |\n|---|--:|--:|--:|")
    for ms, count, name in rows[: config.rows]:
        print(f"| {name[:110]} | {count} | {ms:.2f} | {ms / total:.1%} |")


def main(config: Config) -> None:
    ours = train_gpt2.Config(
        data_dir=config.data_dir, log_dir="bench/out/unused", model=config.model, n_layer=config.n_layer,
        total_batch_size=config.micro_batch * config.seq_len, micro_batch=config.micro_batch, seq_len=config.seq_len,
        hella_every=0, device=config.device, dtype=config.dtype, compile=config.compile,
    )  # fmt: skip
    trainer = train_gpt2.Run(ours, train_gpt2.join_ranks(ours.device))
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
    if on_gpu:
        show_kernels(profile, config)
    else:
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=config.rows))
    if config.trace:
        os.makedirs(os.path.dirname(config.trace) or ".", exist_ok=True)
        profile.export_chrome_trace(config.trace)


if __name__ == "__main__":
    run(main, Config, __doc__)
