"""
The head and its loss, alone: milliseconds and memory of several formulations as torch.compile makes them.

    python bench/loss.py                                          # 64 x 1024 rows of 768, 50,304 ids, on CUDA
    python bench/loss.py --rows 512 --width 64 --ids 1024 --device cpu

All have the same value and gradients up to rounding, which is checked against the first. A number behind a colon says
into how many slices of rows the loss is cut (ours does that itself), `fast` that Inductor may use approximate
exponentials (use_fast_math, as in training).
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import math
import multiprocessing
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt2
from bench.train_step import batches
from extras.cli import run


@dataclass
class Config:
    forms: list[str] = field(default_factory=lambda: ["ours", "ours:1:fast", *(
        f"{form}:{parts}{fast}" for form in ("cross_entropy", "logsumexp", "online", "two_passes")
        for parts in (1, 2) for fast in ("", ":fast")
    )])  # fmt: skip
    """what to measure"""
    rows: int = 64 * 1024  # tokens
    width: int = 768  # channels
    ids: int = 50304  # rows of the head, the last 47 of them padding
    at_once: int = 5  # processes that compile side by side; one at a time is measured
    repeats: int = 20  # of which the fastest half counts
    device: str = "cuda"  # cuda or cpu


def padded(logits, n):
    return logits.float().masked_fill(torch.arange(logits.shape[1], device=logits.device) >= n, -math.inf)


def cross_entropy(logits, targets, n):
    return F.cross_entropy(padded(logits, n), targets, reduction="sum")


def logsumexp(logits, targets, n):
    logits, ids = padded(logits, n), torch.arange(logits.shape[1], device=logits.device)
    picked = torch.where(ids == targets[:, None], logits, 0.0).sum(1)
    return ((torch.logsumexp(logits, 1) - picked) * (targets >= 0)).sum()


def online(logits, targets, n):
    """In the form in which Inductor recognizes the one-pass softmax (keepdim), with nothing saved but a row's sum."""
    logits, ids = padded(logits, n), torch.arange(logits.shape[1], device=logits.device)
    top = logits.detach().amax(1, keepdim=True)
    log_z = top + (logits - top).exp().sum(1, keepdim=True).log()
    picked = torch.where(ids == targets[:, None], logits, 0.0).sum(1, keepdim=True)
    return ((log_z - picked) * (targets >= 0)[:, None]).sum()


def two_passes(logits, targets, n):
    """The maximum in a pass of its own: more reads, fewer instructions."""
    logits, ids = padded(logits, n), torch.arange(logits.shape[1], device=logits.device)
    top, log2e = logits.detach().amax(1, keepdim=True), math.log2(math.e)
    log_z = top + torch.exp2((logits - top) * log2e).sum(1, keepdim=True).log()
    picked = torch.where(ids == targets[:, None], logits, 0.0).sum(1, keepdim=True)
    return ((log_z - picked) * (targets >= 0)[:, None]).sum()


def work(pipe, config: Config, form: str) -> None:
    name, parts, *fast = (form if ":" in form else f"{form}:1").split(":")
    n, device = config.ids - 47, torch.device(config.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    x = torch.randn(config.rows, config.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(config.ids, config.width, device=device) * 0.05).requires_grad_()
    targets = torch.randint(0, n, (config.rows,), device=device)
    targets[::7] = -100

    def loss(x, w):
        if name == "ours":
            return train_gpt2.head_loss(x, w, targets, n) / config.rows
        chunks = zip(x.chunk(int(parts)), targets.chunk(int(parts)))
        return sum(globals()[name](F.linear(part, w), target, n) for part, target in chunks) / config.rows

    def step():
        x.grad = w.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            value = compiled(x, w)
        value.backward()
        return value

    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    try:
        compiled = torch.compile(loss, dynamic=False, options={"use_fast_math": True} if fast else None)
        value = float(step())
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated() if on_gpu else 0
        step()
        synchronize()
        peak = torch.cuda.max_memory_allocated() - base if on_gpu else 0
        pipe.send("ready")
        pipe.recv()  # our turn
        times = []
        for _ in range(config.repeats):
            synchronize()
            began = time.perf_counter()
            step()
            synchronize()
            times.append(time.perf_counter() - began)
        times = sorted(times)[: max(1, config.repeats // 2)]
        sample = torch.cat([x.grad[:64].flatten().float(), w.grad[:64].flatten(), w.grad[-47:].flatten()]).cpu().numpy()
        pipe.send((1000 * sum(times) / len(times), peak / config.rows, value, sample))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])


def main(config: Config) -> None:
    context, first = multiprocessing.get_context("spawn"), None
    print("| loss | ms, forward and backward with its three matmuls | bytes a token | value | gradients differ by |")
    print("|---|--:|--:|--:|--:|", flush=True)
    for some in batches(config.forms, config.at_once):
        pipes = []
        for form in some:
            here, there = context.Pipe()
            context.Process(target=work, args=(there, config, form), daemon=True).start()
            pipes.append(here)
        ready = [pipe.recv() for pipe in pipes]
        for form, pipe, state in zip(some, pipes, ready):
            answer = state
            if state == "ready":
                pipe.send(1)
                answer = pipe.recv()
            if isinstance(answer, str):
                print(f"| {form} | {answer} | | | |", flush=True)
                continue
            ms, per_token, value, sample = answer
            first = sample if first is None else first
            apart = np.linalg.norm(sample - first) / np.linalg.norm(first)
            print(f"| {form} | {ms:.2f} | {per_token:,.0f} | {value:.5f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__)
