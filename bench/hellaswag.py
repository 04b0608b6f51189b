"""
HellaSwag, in tree rows and the plain way: examples per second, alternating in one run, in float32 and in bfloat16.

    python bench/hellaswag.py --data hellaswag_val.jsonl.gz                          # 124M, random weights, CPU
    python bench/hellaswag.py --data hellaswag_val.jsonl.gz -d cuda --limit 1000     # and how long the whole set takes

All sides score the same examples with the same weights, and must choose the same endings in float32. The plain way is
the field's: an example a forward, four endings behind four copies of the context, every position's logits; `plain` with
our model, `hf` with transformers', as the field runs it. Prints the medians, the median of the rounds' ratios, and how
much less there is to multiply: with the same kernels on both sides, that is about the most there can be to win.
"""

import sys

sys.path[0] += "/.."  # the modules beside this folder, not its files of the same names

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

import hellaswag
from extras.cli import run
from extras.hardware import find_device
from extras.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig


@dataclass
class Config:
    data: str = ""  # a HellaSwag .jsonl or .jsonl.gz file; by default the validation set, downloaded once
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    limit: int = 32  # examples in each measurement, drawn at random
    rounds: int = 5  # how often every variant runs
    n_layer: int = 12  # of the model; with n_head and n_embd as in GPT-2 124M
    n_head: int = 12  # of the model
    n_embd: int = 768  # of the model
    style: Literal["karpathy", "lm-eval"] = "karpathy"  # whose convention to follow


def main(config: Config) -> None:
    device = find_device(config.device)
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=50304, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    model = GPT(shape).eval().to(device)
    examples = hellaswag.load_examples(config.data, config.limit)
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), shape.block_size, config.style)
    lowp = partial(torch.autocast, device.type, torch.bfloat16)
    methods = {
        (name, dtype): partial(method, model.features, model.head, rows, device, autocast=autocast)
        for dtype, autocast in (("float32", nullcontext), ("bfloat16", lowp))
        for name, method in (("plain", hellaswag.score_plainly), ("tree", hellaswag.score))
    }
    methods["hf", "float32"] = partial(hellaswag.score_plainly, *transformers_parts(model), rows, device)
    seconds, scores = {name: [] for name in methods}, {}
    for round in range(config.rounds + 1):  # the first is a warm-up
        for name, method in methods.items():
            start = time.perf_counter()
            scores[name] = method()  # ends with a copy to the host, so the device has done its work
            if round:
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{where(device)}, torch {torch.__version__}, {len(rows)} examples, {config.style} style, {config.rounds} times"
    )
    print(f"multiplications, plain / tree: {work(rows, model, plainly=True) / work(rows, model, plainly=False):.2f}")
    for (name, dtype), times in seconds.items():
        spread = f"{len(rows) / max(times):.2f} to {len(rows) / min(times):.2f}"
        print(f"  {name:5s} {dtype:8s} {len(rows) / statistics.median(times):8.2f} examples/s ({spread})")
    for fast, *slow in (
        ("float32", "plain", "float32"), ("float32", "hf", "float32"),
        ("bfloat16", "plain", "bfloat16"), ("bfloat16", "plain", "float32"), ("bfloat16", "hf", "float32"),
    ):  # fmt: skip
        ratios = [b / a for a, b in zip(seconds["tree", fast], seconds[tuple(slow)])]
        print(f"  tree {fast} / {' '.join(slow)}: {statistics.median(ratios):.2f}x")
    same = [
        hellaswag.answers(row, a) == hellaswag.answers(row, b) == hellaswag.answers(row, c)
        for row, a, b, c in zip(rows, scores["tree", "float32"], scores["plain", "float32"], scores["hf", "float32"])
    ]
    print(f"  the same choices in float32 on {sum(same)} of {len(same)} examples")
    if device.type == "cuda":
        time_the_whole_set(config, model, device, lowp)
    if not all(same):
        sys.exit(1)


def transformers_parts(model: GPT):
    """Features and head of transformers' GPT-2 with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from extras.pretrained import transpose_conv1d

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd))
    state = {name: value[: c.n_tokens] if "wte" in name or "lm_head" in name else value
             for name, value in transpose_conv1d(model.state_dict()).items()}  # fmt: skip
    theirs.load_state_dict(state)
    theirs.to(next(model.parameters()).device).eval()
    return lambda idx: theirs.transformer(idx, use_cache=False).last_hidden_state, theirs.lm_head


def where(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )


def work(rows, model, plainly: bool) -> float:
    """Multiplications of the matrix products, without attention's: 12 L C^2 a token, V C a position with logits."""
    c = model.config
    if plainly:
        tokens = logits = sum(len(row.paths) * (max(map(len, row.paths)) - 1) for row in rows)
    else:
        tokens = sum(tree.shape[1] for row in rows for tree in row.trees)
        logits = sum((tree[3] >= 0).sum() for row in rows for tree in row.trees)
    return tokens * 12 * c.n_layer * c.n_embd**2 + logits * c.n_tokens * c.n_embd


def time_the_whole_set(config: Config, model, device: torch.device, lowp) -> None:
    """As in training: the rows are made once, and scored at every evaluation."""
    start = time.perf_counter()
    rows = hellaswag.render(hellaswag.load_examples(config.data), load_tokenizer("gpt2"), 1024, config.style)
    print(f"  all {len(rows)} examples: {time.perf_counter() - start:.2f} s to read and tokenize, once;", end=" ")
    times = []
    for _ in range(config.rounds):
        start = time.perf_counter()
        hellaswag.score(model.features, model.head, rows, device, autocast=lowp)
        times.append(time.perf_counter() - start)
    print(f"{statistics.median(times):.2f} s to score in bfloat16 ({min(times):.2f} to {max(times):.2f})")


if __name__ == "__main__":
    run(main, Config, __doc__)
