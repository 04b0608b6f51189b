"""
How long the step waits for its data: the share of the training time in which the next batch was not ready.

    python bench/data_wait.py                       # 124M, 4 x 1024 tokens a micro-batch
    python bench/data_wait.py --compile --micro_batch 64 --total_batch_size 524288
    python bench/data_wait.py --steps 0 --micro_batch 64 --total_batch_size 524288    # how fast are the data alone?

Each shard is dropped from the page cache before every step (POSIX; elsewhere it stays), so that all reads are cold, and
windows are in order "shuffle", so that none is read on from the last. Prints the wait of each step, and what reading a
batch takes by itself.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # as in the other benchmarks

import mmap
import statistics
import time
from dataclasses import dataclass

import torch

import train_gpt2
from extras.cli import run


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    n_layer: int = 0  # instead of the model's own 12
    micro_batch: int = 4  # windows per forward
    seq_len: int = 1024  # tokens per window
    total_batch_size: int = 0  # tokens per update; 0 = one micro-batch
    device: str = "auto"  # cuda, mps or cpu
    compile: bool = False  # the step as torch.compile makes it
    steps: int = 5  # how many to look at, after the first; 0 = none, only read


def drop_from_cache(shards) -> None:
    for shard in shards if hasattr(os, "posix_fadvise") else ():
        for array in (shard.tokens, shard.targets):
            if array is not None:
                array._mmap.madvise(mmap.MADV_DONTNEED)  # pages that are mapped would stay
        descriptor = os.open(shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main(config: Config) -> None:
    ours = train_gpt2.Config(
        data_dir=config.data_dir, log_dir="bench/out/unused", n_layer=config.n_layer, micro_batch=config.micro_batch,
        total_batch_size=config.total_batch_size or config.micro_batch * config.seq_len, seq_len=config.seq_len,
        hella_every=0, device=config.device, compile=config.compile,
    )  # fmt: skip
    trainer = train_gpt2.Run(ours, train_gpt2.join_ranks(ours.device))
    cold = []
    for step in range(5):
        drop_from_cache(trainer.train.shards)
        began = time.perf_counter()
        trainer.batch(step)
        cold.append(time.perf_counter() - began)
    tokens = ours.total_batch_size
    print(f"{trainer.device.type}, torch {torch.__version__}, {tokens:,} tokens a step")
    print(f"a batch takes {1000 * statistics.median(cold):.2f} ms to read from a cold cache: "
          f"{tokens / statistics.median(cold):,.0f} tokens/s", flush=True)  # fmt: skip
    if not config.steps:
        return
    batches, waits, total = train_gpt2.prefetched(trainer.batch, 0, config.steps + 1), [], 0.0
    for step in range(config.steps + 1):
        drop_from_cache(trainer.train.shards)
        began = time.perf_counter()
        batch = next(batches)
        ready = time.perf_counter()
        loss, _ = train_gpt2.train_step(trainer, batch, 1e-4)
        float(loss)  # waits for the device, which the trainer doesn't: a longer wait than in a run, never a shorter
        if step:  # the first batch has nothing to hide behind
            waits.append(ready - began)
            total += time.perf_counter() - began
    print(f"a step takes {1000 * total / config.steps:.1f} ms and waits {1000 * sum(waits) / config.steps:.3f} ms: "
          f"{100 * sum(waits) / total:.3f}%")  # fmt: skip


if __name__ == "__main__":
    run(main, Config, __doc__)
