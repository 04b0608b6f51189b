"""
The same mathematics? Loss curves of the trainer beside a plain loop, from the same weights on the same batches.

    python fineweb.py --dataset python-docs --out data/python-docs       # once
    python bench/curves.py                                               # 200 steps of each, a table and a picture

`plain` is the reference: transformers' GPT-2, eager, in float32, the loss of all logits at once, AdamW neither fused
nor grouped by kernel. `autocast` is the same under bfloat16 autocast and nothing else: its distance from `plain` is
the noise that bfloat16 makes. `nudged` is `plain` from weights of which each is moved to a neighbouring number,
up or down by chance: its distance is what rounding alone makes of 200 steps. `ours` are the trainer's steps: in
float32, which must be `plain` but for rounding, and as they run by default, with the residual stream in bfloat16, the
head's loss in slices and a fused optimizer.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this folder would hide modules of its names

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train_gpt2
from extras.cli import run
from extras.pretrained import transpose_conv1d
from train_gpt2 import lr_at


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    steps: int = 200  # updates of each
    n_layer: int = 4  # of the model
    n_head: int = 4  # of the model
    n_embd: int = 128  # of the model
    seq_len: int = 256  # tokens per window
    micro_batch: int = 2  # windows per update
    max_lr: float = 6e-4  # learning rate after 20 steps of warm-up
    device: str = "auto"  # cuda, mps or cpu
    compile: bool = False  # the compiled trainer, too
    out: str = "bench/out/curves.png"  # the picture


def trainer_of(config: Config, dtype: str, compile: bool = False):
    names = ("data_dir", "n_layer", "n_head", "n_embd", "seq_len", "device")
    settings = {name: getattr(config, name) for name in names}
    return train_gpt2.Run(
        train_gpt2.Config(
            **settings, log_dir="bench/out/unused", micro_batch=config.micro_batch, hella_every=0, dtype=dtype,
            total_batch_size=config.micro_batch * config.seq_len, max_steps=config.steps, compile=compile,
            warmup_steps=20, max_lr=config.max_lr, min_lr=config.max_lr / 10,
        ),
        train_gpt2.join_ranks(config.device),
    )  # fmt: skip


def ours(config: Config, dtype: str, compile: bool = False):
    """Losses of the trainer's own steps, one by one."""
    trainer = trainer_of(config, dtype, compile)
    for step in range(config.steps):
        yield train_gpt2.train_step(trainer, trainer.batch(step), lr_at(step, trainer.config))[0].item()


def plain(config: Config, autocast: bool = False, nudge: bool = False):
    """Losses of the loop that one would write without us."""
    from transformers import GPT2Config, GPT2LMHeadModel

    trainer = trainer_of(config, "float32")
    c, none = trainer.raw_model.config, {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": c.n_tokens, "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_embd=c.n_embd, **none))
    state = transpose_conv1d(trainer.raw_model.state_dict())
    model.load_state_dict({name: state[name][: len(value)] for name, value in model.state_dict().items()})
    if nudge:
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            direction = torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1
            p.data.copy_(torch.nextafter(p.data, direction * torch.inf))
    model.to(trainer.device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    context = partial(torch.autocast, trainer.device.type, torch.bfloat16) if autocast else nullcontext
    for step in range(config.steps):
        x, y = (part[0].to(trainer.device).long() for part in trainer.batch(step)[:2])
        with context():
            logits = model(x).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, trainer.config)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def main(config: Config) -> None:
    ways = {
        "plain, float32": plain(config),
        "plain, float32, nudged": plain(config, nudge=True),
        "plain, bfloat16 autocast": plain(config, autocast=True),
        "ours, float32": ours(config, "float32"),
        "ours, bfloat16": ours(config, "bfloat16"),
    }
    if config.compile:
        ways["ours, bfloat16, compiled"] = ours(config, "bfloat16", compile=True)
    curves = {name: np.array(list(tqdm(way, name, config.steps, disable=None))) for name, way in ways.items()}
    reference = curves["plain, float32"]
    print(f"\nloss {reference[0]:.4f} -> {reference[-10:].mean():.4f}, mean of the last 10 of {config.steps} steps\n")
    print("| distance from plain, float32 | largest | of the loss | mean | mean with sign, last half |")
    print("|---|--:|--:|--:|--:|")
    for name, curve in list(curves.items())[1:]:
        gap = curve - reference
        numbers = [np.abs(gap).max(), (np.abs(gap) / reference).max(), np.abs(gap).mean()]
        cells = [f"{number:.2e}" for number in numbers] + [f"{gap[config.steps // 2 :].mean():+.2e}"]
        print(f"| {name} | {' | '.join(cells)} |")
    draw(config, curves, reference)


def draw(config: Config, curves: dict, reference) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    for name, curve in curves.items():
        (line,) = above.plot(curve, label=name, linewidth=1)
        if curve is not reference:
            gap = np.maximum(np.abs(curve - reference), 1e-7)  # what is equal lies on the edge
            below.plot(gap, color=line.get_color(), linewidth=1)
    above.set(ylabel="training loss (nats)")
    below.set(yscale="log", ylabel="distance from plain, float32 (nats)", xlabel="step")
    above.legend(frameon=False)
    os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
    figure.savefig(config.out, dpi=120)
    print(f"\n{config.out}")


if __name__ == "__main__":
    run(main, Config, __doc__)
