"""
How fast is generation? GPT-2 124M with random weights, the same prompts and greedy draws for each.

    python bench/generate.py                          # 32 + 400 tokens on this machine: one prompt, and 16 of them
    python bench/generate.py --device cuda --dtype bfloat16
    python bench/generate.py --sample                 # draws from the 50 likeliest instead of the likeliest

Three ways to the same tokens, alternating: `cached`, ours; `hf`, transformers' `generate` with its cache; `plain`,
ours without a cache, the whole text again for each token. Prints the median of the rounds, and what `cached` gains over
the others. In float32 they must agree on every token, which is checked. `plain` is for one prompt only: it takes
minutes.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this file would hide the other generate.py

import statistics
import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from extras.cli import run
from extras.generation import use_onednn
from extras.hardware import keep_freed_memory
from train_gpt2 import GPT, SIZES, GPTConfig


@dataclass
class Config:
    model: Literal[*SIZES] = "gpt2"  # size
    prompt_tokens: int = 32  # length of each prompt
    new_tokens: int = 400  # tokens to add
    batches: list[int] = field(default_factory=lambda: [1, 16])  # numbers of prompts side by side
    rounds: int = 3  # how often each is measured
    sample: bool = False  # draw from the 50 likeliest instead of the likeliest
    device: str = "cpu"  # cpu, cuda or mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights


def main(config: Config) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    if config.device == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**SIZES[config.model])).to(config.device, getattr(torch, config.dtype)).eval()
    theirs = same_in_transformers(ours)
    use_onednn(ours)  # as sample.py does
    print(f"{config.model}, {config.prompt_tokens} + {config.new_tokens} tokens, {config.dtype}, {config.device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{'top-k 50' if config.sample else 'greedy'}", flush=True)  # fmt: skip
    for B in config.batches:
        measure(ours, theirs, B, config)


def same_in_transformers(model: GPT):
    """The same weights in transformers' class; no end-of-text, so that all draw as many tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from extras.pretrained import transpose_conv1d

    c, weight = model.config, model.lm_head.weight
    shape = {"n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    theirs.load_state_dict(transpose_conv1d(model.state_dict()))
    return theirs.to(weight.device, weight.dtype).eval()


def measure(ours: GPT, theirs, B: int, config: Config) -> None:
    idx = torch.randint(0, 50257, (B, config.prompt_tokens), device=config.device)
    n, mask = config.new_tokens, torch.ones_like(idx)
    ways = {
        "cached": lambda: ours.generate(idx, n, **({"top_k": 50} if config.sample else {"temperature": 0})),
        "hf": lambda: theirs.generate(idx, attention_mask=mask, max_new_tokens=n, do_sample=config.sample, top_k=50),
    }
    if B == 1:
        ways["plain"] = lambda: plain(ours, idx, n)
    ways["cached"](), ways["hf"]()  # a first time is never a usual time
    seconds, texts = {name: [] for name in ways}, {}
    for _ in range(config.rounds):
        for name, generate in ways.items():
            begin = time.perf_counter()
            texts[name] = generate().tolist()  # waits for the device
            seconds[name].append(time.perf_counter() - begin)
    if not config.sample and config.dtype == "float32":
        assert all(text == texts["cached"] for text in texts.values()), "they should draw the same tokens"
    cached = statistics.median(seconds["cached"])
    for name, times in seconds.items():
        median = statistics.median(times)
        rounds = " ".join(f"{t:.2f}" for t in times)
        line = f"batch {B:3d}  {name:6s}  {median:7.2f} s  {B * n / median:8.1f} tokens/s  ({rounds})"
        print(line if name == "cached" else f"{line}  cached is {median / cached:.2f}x as fast", flush=True)


@torch.no_grad()
def plain(model: GPT, idx: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The likeliest id, again and again, without a cache; only the last position goes through the head."""
    for _ in range(new_tokens):
        idx = torch.cat([idx, model.head(model.features(idx)[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return idx


if __name__ == "__main__":
    run(main, Config, __doc__)
