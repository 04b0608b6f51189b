"""
Train GPT-2 on token shards: one process or many, on CUDA, MPS or CPU.

    python fineweb.py                                         # once: text -> shards of tokens in edu_fineweb10B/
    python train_gpt2.py                                      # one device
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # eight GPUs
    python plot_log.py log/                                   # inspect the run

Without a flag this is GPT-2 124M on FineWeb-Edu: 19,073 steps of 524,288 tokens.

Contents: Config · Model · Data · Optimization · Evaluation · Ranks and devices · Run directory · Training.
Shapes:   B batch, T time, C channels, nh heads, hs head size, V vocabulary (padded), n tokens that exist, L layers.

This file runs alone, with torch, numpy and tyro. Importing it does nothing. HellaSwag, samples, --init_from,
--recipe fast and --track need hellaswag.py and extras/ beside it. `optional` is for what only checks, shows or saves
more: without extras/ files are trusted, errors of the system are tracebacks, two runs may write into one directory,
a GPU's micro-batch is a guess, the loss takes more memory, and ranks don't agree before they wait.
"""

import contextlib
import gc
import importlib
import io
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Config

SIZES = {  # Radford et al. 2019, table 2; the parameter counts are the released models'
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}
RECIPES = {  # a recipe is a set of defaults and nothing else; bench/recipe/ measures what each of them is worth
    "gpt2": {"max_lr": 6e-4, "min_lr": 6e-5, "warmup_steps": 715, "schedule": "cosine", "muon_lr": 0.0},
    # AdamW, at three times gpt2's rate, has only embeddings, biases and LayerNorms; Muon has the rest, with updates of
    # RMS 7e-4 and full size from step one, so a short warm-up is enough. Linear decay spends fewer steps at rates too
    # small to matter, and at 0 the last steps average the noise out.
    "fast": {"max_lr": 1.8e-3, "min_lr": 0.0, "warmup_steps": 250, "schedule": "linear", "muon_lr": 3.6e-3},
}
VERSIONS = {"torch": str(torch.__version__), "numpy": np.__version__, "python": sys.version.split()[0]}


@dataclass
class Config:
    """All settings; each is a flag of the same name. 0 and auto mean: find out. None means: as --recipe says."""

    data_dir: str = "edu_fineweb10B"  # token shards, as fineweb.py writes them, or .bin files of llm.c
    log_dir: str = "log"  # log.txt and checkpoints go here; one run, one directory
    resume: bool = False  # continue from the newest checkpoint in log_dir, or start if there is none yet
    resume_from: str = ""  # continue from this checkpoint, not the newest; --resume PATH says the same
    seed: int = 1337  # seed of the initial weights, the order of the data, and the samples
    order: Literal["shuffle", "sequential"] = "shuffle"  # a new order of the sequences each epoch, or as they stand

    model: Literal[*SIZES] = "gpt2"  # size of the model
    n_layer: int = 0  # override the number of layers (0 = from --model)
    n_head: int = 0  # override the number of heads (0 = from --model)
    n_embd: int = 0  # override the width (0 = from --model)
    init_from: str = ""  # weights to start from: a checkpoint, a run directory, a hub name or a GPT-2 directory

    total_batch_size: int = 2**19  # tokens per update, over all micro-batches and ranks
    micro_batch: int = 0  # sequences per forward on each rank (0 = what fits); never changes the batch of an update
    seq_len: int = 1024  # tokens per sequence

    max_steps: int = 19073  # updates; 19,073 are 10B tokens at the default batch
    epochs: float = 0.0  # passes over the train split, instead of --max_steps
    recipe: Literal[*RECIPES] = "gpt2"  # the defaults of the next five: GPT-2's, or ours for fewer tokens
    warmup_steps: int | None = None  # linear warm-up (gpt2: 715, fast: 250)
    schedule: Literal["cosine", "linear"] | None = None  # decay from max_lr to min_lr (gpt2: cosine, fast: linear)
    max_lr: float | None = None  # learning rate after the warm-up (gpt2: 0.0006, fast: 0.0018)
    min_lr: float | None = None  # learning rate at the end (gpt2: 6e-05, fast: 0)
    muon_lr: float | None = None  # Muon's, for the matrices of the blocks; 0 = AdamW for all (gpt2: 0, fast: 0.0036)
    muon_momentum: float = 0.95  # Nesterov momentum of Muon
    weight_decay: float = 0.1  # for matrices and embeddings; biases and LayerNorms have none
    grad_clip: float = 1.0  # largest norm of the gradient (0 = no clipping)

    val_every: int = 1000  # steps between validations (0 = never); at the default 1% of the time
    val_tokens: int = 20 * 2**19  # tokens of the val split to validate on: always the same, the first
    hella_every: int = 1000  # steps between HellaSwag evaluations (0 = never)
    hella_data: str = ""  # a local hellaswag_val.jsonl(.gz); empty = the cached file, or download it
    hella_limit: int = 0  # a fixed subset of so many examples (0 = all 10,042)
    sample_every: int = 1000  # steps between samples (0 = never)
    sample_prompt: str = "Hello, I'm a language model,"  # how the samples begin
    log_every: int = 10  # steps between lines on the screen; log.txt has every step
    track: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"  # send the values to a tracker as well

    save_every: int = 1000  # steps between checkpoints; the last step is always saved
    keep_checkpoints: int = 2  # how many of the newest to keep (0 = all); the best validation's is kept, too
    force: bool = False  # resume even though the data, the model or the batch changed

    device: str = "auto"  # cuda, mps, xpu, cpu, or one device such as cuda:1
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision of autocast
    compile: bool | None = None  # torch.compile the training step (default: on CUDA, if there is Triton)
    recompute: bool = False  # keep only the blocks' inputs for the backward pass: slower, far less memory
    sdpa: Literal["auto", "flash", "cudnn", "mem_efficient", "math"] = "auto"  # attention kernel to train with on CUDA
    timeout_minutes: float = 10.0  # end the run if the ranks wait for one of them as long as this


class UserError(ValueError):
    """A mistake the user can correct: one line with the numbers and the next move, exit status 2, no traceback."""


class LocalError(UserError):
    """A UserError that only one rank may hit, so that rank reports it; else the first rank of each node does."""


def missing(*arguments, **options) -> None:
    """Stands in for a function of a file that is not there."""


@lru_cache
def optional(name: str, otherwise: Callable = missing) -> Callable:
    """A function of extras/, or of hellaswag.py, that checks or shows more; `otherwise` where this file runs alone."""
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name not in ("extras", "hellaswag"):
            raise  # extras/ is there, but not all of it, or a package is missing
        return otherwise


# with user_error(message, *kinds, advice=...): what the block raises of these kinds becomes a UserError
user_error = optional("extras.cli.user_error", lambda *_, **options: contextlib.nullcontext())
# with all_or_none(): what one rank may fail at alone; then all fail at once, and none waits for it until a timeout
all_or_none = optional("extras.agree.all_or_none", lambda *_: contextlib.nullcontext())


def resolve(config: Config) -> Config:
    """The config with the recipe's values where a setting is None. Derived when a run starts, not before."""
    recipe = RECIPES.get(config.recipe, {})
    return replace(config, **{name: value for name, value in recipe.items() if getattr(config, name) is None})


# ----------------------------------------------------------------------------------------------------------------------
# Model

@dataclass
class GPTConfig:
    """GPT-2's shape. Ids from `n_tokens` up to `vocab_size` are padding: they are no tokens and have probability 0."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_tokens: int = 0  # 0: all of vocab_size are tokens; but 50304 is GPT-2's 50257, padded to a multiple of 128

    def __post_init__(self):
        optional("extras.checks.check_sizes")(self)
        self.n_tokens = self.n_tokens or (50257 if self.vocab_size == 50304 else self.vocab_size)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, start=0):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))  # (B, nh, T, hs)
        if cache is not None:  # (2, B, nh, S, hs): the first `start` positions are there, these T come behind them
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        # is_causal puts the triangle in the top left corner: right for whole sequences; a later token sees them all
        is_causal = True if mask is None and start == 0 else False  # noqa: SIM210 - a bool also where T is symbolic
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), mask, cache, start)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Parameters have Hugging Face's names; matrices are nn.Linear's, (out, in)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one tensor: Press & Wolf 2017
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # the 2L projections that add to the residual stream keep its variance near 1
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def features(self, idx, positions=None, mask=None, cache=None, start=0):
        """(B, T) ids -> (B, T, C) after the last LayerNorm.

        positions: (T,) or (B, T), by default start, start + 1, ... mask: bool, broadcast to (B, 1, T, S), True where a
        query may look at a key; by default causal. cache: (L, 2, B, nh, S, hs), its first `start` positions filled.
        """
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens are more than this model's block_size {self.config.block_size}")
        assert T == 1 or not start or mask is not None, "several tokens behind a past need a mask"
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = x.bfloat16() if casts_to_bfloat16(x.device) else x  # autocast would leave the residual stream in float32
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[i], start)
        return self.transformer.ln_f(x)

    def head(self, x):
        """(..., C) -> (..., n) logits of the tokens that exist."""
        return self.lm_head(x)[..., : self.config.n_tokens]  # all rows: autocast keeps the cast of a whole weight

    def forward(self, idx, targets=None):
        """(B, T) ids -> logits (B, T, V) and None; with (B, T) targets, None and their mean loss in nats.

        Targets of -100 don't count (a batch of only those has loss 0). Padding ids get logits of -inf.
        """
        x = self.features(idx)
        if targets is None:
            return F.pad(self.head(x), (0, self.config.vocab_size - self.config.n_tokens), value=-math.inf), None
        loss = head_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), self.config.n_tokens)
        return None, loss / (targets >= 0).sum().clamp(min=1)

    def generate(self, idx, max_new_tokens: int = 100, **options):
        """Continue (B, T) ids -> (B, T + new) ids, or a text -> text. The options: see `extras.generation.stream`."""
        from extras.generation import generate
        return generate(self, idx, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, name_or_dir: str, block_size: int | None = None) -> "GPT":
        """A model of the hub ("gpt2" ... "gpt2-xl"), a directory, a run or a checkpoint, cropped to `block_size`."""
        from extras.pretrained import load_any
        return cls.of(*load_any(name_or_dir, block_size))

    from_checkpoint = from_pretrained

    @classmethod
    def of(cls, shape: dict, state: dict) -> "GPT":
        """A model that takes these tensors over as its weights: none are drawn, none are copied."""
        with user_error("these weights are not of the model in this file", RuntimeError, TypeError, AttributeError):
            optional("extras.checks.check_weights")(shape, state)
            with torch.device("meta"):
                model = cls(GPTConfig(**shape))
            model.load_state_dict(state, strict=True, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, directory: str) -> None:
        """Write a new directory for `transformers`, lm-eval and llama.cpp: the tokens that exist, without padding."""
        from extras.pretrained import save
        save(directory, self)


def casts_to_bfloat16(device: torch.device) -> bool:
    """Whether autocast does, here and now."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def plain_loss(x, weight, targets, n_tokens: int):
    """Summed cross-entropy of the tied head. x (N, C), weight (V, C), targets (N,) with -100 for none -> scalar."""
    return F.cross_entropy(F.linear(x, weight)[:, :n_tokens].float(), targets, reduction="sum")


head_loss = optional("extras.loss.head_loss", plain_loss)  # the same, faster and in less memory


# ----------------------------------------------------------------------------------------------------------------------
# Data

class Shard(NamedTuple):
    path: str
    tokens: np.ndarray  # (n,) uint16, memory-mapped
    mask: np.ndarray | None  # (n,) uint8, 1 where the token is a training target; None: everywhere


def read_manifest(data_dir: str) -> dict:
    """What fineweb.py says about a token set; for a directory without manifest.json (build-nanogpt's), GPT-2 tokens."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        return {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "shards": [], "complete": True, "source": None}
    wrong = ValueError, KeyError, TypeError, RecursionError
    with user_error(f"{path} is damaged", *wrong, advice="run fineweb.py again"):
        manifest = {"source": None} | json.loads(path.read_text(encoding="utf-8"))
        optional("extras.checks.check_manifest")(manifest)
    if not manifest.get("complete"):
        raise UserError(f"{data_dir} is not finished; run fineweb.py again, with the same flags: it goes on")
    return manifest


def open_array(path: Path, dtype: str = "uint16") -> np.ndarray:
    """The 1-D array in a .npy file, or the tokens behind the 1,024 bytes of header of a .bin, memory-mapped."""
    with user_error(f"{path} is not a whole {path.suffix} file", Exception, advice="run fineweb.py --verify"):
        optional("extras.checks.check_header")(path, dtype)
        if path.suffix == ".bin":  # of llm.c or modded-nanogpt
            return np.memmap(path, "<u2", "r", offset=1024)
        return np.load(path, mmap_mode="r", allow_pickle=False)


def open_shards(data_dir: str, manifest: dict, split: str) -> list[Shard]:
    """Memory-map the shards of a split, in order. UserError for none, or for one that is not what it should be."""
    paths = [path for path in sorted(Path(data_dir).glob(f"*_{split}[_.]*")) if path.suffix in (".npy", ".bin")]
    paths = [path for path in paths if ".mask" not in path.name]
    optional("extras.checks.check_files")(data_dir, split, paths, manifest)
    if not paths:
        better = "with a --val_size, or train with --val_every 0" if split == "val" else "first"
        raise UserError(f"no {split} shards in {data_dir!r}; run fineweb.py {better}, or change --data_dir")
    shards = []
    for path in paths:
        mask_path = path.with_suffix(".mask.npy")
        shard = Shard(str(path), open_array(path), open_array(mask_path, "uint8") if mask_path.exists() else None)
        optional("extras.checks.check_shard")(shard, manifest)
        shards.append(shard)
    return shards


class SampleStream:
    """The samples of a split: a stream without end, the same whoever reads it, so that no rank has a place to keep.

        a shard:  ..offset..|---- T ----|---- T ----|---- T ----|..rest..       offset + rest <= T tokens go unread
                             <---- T+1 -->           neighbours share a token: last target, first input

    Sample s is sequence s % len(self) of epoch s // len(self). In order "shuffle" every epoch permutes the shards, and
    in each shard the sequences, with a new offset; all of it from (seed, epoch, shard). "sequential" reads straight on.
    """

    def __init__(self, shards: list[Shard], seq_len: int, n_tokens: int, order: str = "sequential", seed: int = 0):
        self.shards, self.T, self.n_tokens, self.order, self.seed = shards, seq_len, n_tokens, order, seed
        spare = 2 if order == "shuffle" else 1  # a shard of a whole number of sequences leaves room for an offset, too
        counts = [max((len(s.tokens) - spare) // seq_len, (len(s.tokens) - 1) // seq_len > 0) for s in shards]
        self.counts = np.array(counts, dtype=np.int64)  # sequences in each shard
        optional("extras.checks.check_length")(self)
        self.has_masks = any(shard.mask is not None for shard in shards)
        self.shard_order = lru_cache(maxsize=2)(self._shard_order)
        self.starts = lru_cache(maxsize=4)(self._starts)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def _shard_order(self, epoch: int):
        """Order of the shards, and the number of sequences up to the end of each."""
        order = np.arange(len(self.shards))
        if self.order == "shuffle":
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return order, self.counts[order].cumsum()

    def _starts(self, epoch: int, shard: int):
        """First tokens of a shard's sequences, in the order of the epoch."""
        starts = np.arange(self.counts[shard]) * self.T
        if self.order == "shuffle":
            rng = np.random.default_rng([self.seed, epoch, shard])
            slack = len(self.shards[shard].tokens) - 1 - len(starts) * self.T
            starts = rng.permutation(starts) + rng.integers(slack + 1)
        return starts

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard and first token of a sample."""
        epoch, place = divmod(sample, len(self))
        order, ends = self.shard_order(epoch)
        nth = int(np.searchsorted(ends, place, side="right"))
        shard = int(order[nth])
        return shard, int(self.starts(epoch, shard)[place - ends[nth] + self.counts[shard]])

    def read(self, samples) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (N, T) and targets (N, T), int32, of N samples; -100 where there is no target. Sample -1 has none."""
        tokens = np.zeros((len(samples), self.T + 1), dtype=np.int32)
        targets = np.full((len(samples), self.T), -100, dtype=np.int32)
        for row, sample in enumerate(samples):
            if sample < 0:
                continue
            index, start = self.locate(sample)
            shard, span = self.shards[index], slice(start, start + self.T + 1)
            tokens[row] = shard.tokens[span]
            if tokens[row].max() >= self.n_tokens:
                raise LocalError(f"{shard.path} holds id {tokens[row].max()}, its tokenizer has {self.n_tokens} ids")
            wanted = True if shard.mask is None else shard.mask[span][1:] != 0
            targets[row] = np.where(wanted, tokens[row, 1:], -100)
        return np.ascontiguousarray(tokens[:, :-1]), targets


def batch_of_step(stream: SampleStream, first: int, count: int, micro_batch: int, ranks: "Ranks"):
    """This rank's part of `count` samples from `first` on: inputs, targets, (micro-batches, B, T) int32, and weights.

    Micro-batch m of rank r takes samples first + (mW + r)B ..., for W ranks. Its weight is its share of the targets,
    times W since DDP averages over ranks: however the samples are split, the loss is the mean over the step's targets.
    """
    B, W = micro_batch, ranks.world_size
    samples = first + np.arange(count).reshape(-1, W, B)  # (micro-batches, W, B)
    x, y = stream.read(samples[:, ranks.rank].flatten())
    weights = [1 / len(samples)] * len(samples)
    if stream.has_masks:
        _, all_ranks = stream.read(samples.flatten())
        per_micro_batch = (y >= 0).reshape(len(samples), -1).sum(axis=1)
        weights = (W * per_micro_batch / max(1, (all_ranks >= 0).sum())).tolist()
    x, y = (torch.from_numpy(array).view(-1, B, stream.T) for array in (x, y))
    return (x.pin_memory(), y.pin_memory(), weights) if ranks.device.type == "cuda" else (x, y, weights)


def prefetched(make: Callable, first: int, stop: int) -> Iterator:
    """make(first), make(first + 1), ... make(stop - 1): each is made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1, "batch") as pool:
        ahead = pool.submit(make, first)
        for index in range(first, stop):
            current, ahead = ahead, pool.submit(make, index + 1) if index + 1 < stop else None
            yield current.result()


# ----------------------------------------------------------------------------------------------------------------------
# Optimization

def lr_at(step: int, config: Config) -> float:
    """AdamW's rate: linear warm-up, then cosine (Brown et al. 2020) or linear decay; Muon's is in proportion."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    height = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.max_lr - config.min_lr)


def make_optimizer(model: GPT, config: Config) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon with it; matrices and embeddings are decayed, biases and LayerNorms are not."""
    settings = {"lr": config.max_lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    if config.muon_lr:
        from extras.muon import make_muon
        dtype = pick_dtype(config.dtype, model.lm_head.weight.device)
        rates = config.muon_lr, config.muon_momentum, config.weight_decay
        return make_muon(model.named_parameters(), *rates, dtype, **settings)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Moments and step counts of a checkpoint; the settings, weight decay among them, stay those of this run.

    The groups are updated, not replaced: their keys stay the checkpoint's, so that the next file has the same bytes.
    """
    ours = optimizer.state_dict()["param_groups"]
    advice = "give the --recipe it was made with"
    with user_error("the checkpoint has another optimizer, AdamW or Muon", Exception, advice=advice):
        theirs = saved["param_groups"]
        groups = [{**group, **mine, "params": group["params"]} for group, mine in zip(theirs, ours)]
        optimizer.load_state_dict(saved | {"param_groups": groups + theirs[len(ours) :]})
        optional("extras.checks.check_moments")(optimizer)


def train_step(run: "Run", batch, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One update: forward and backward over the micro-batches, clip, step. Returns this rank's loss, and the norm.

    Nothing is read from the device. If the norm is not finite the optimizer skips the update, as with GradScaler: by a
    flag that the fused kernels look at. Gradients are averaged by then, so that all ranks skip alike.
    """
    pinned = run.device.type == "cuda"  # non_blocking copies are only safe from pinned memory
    x, y, weights = (p.to(run.device, non_blocking=pinned) if torch.is_tensor(p) else p for p in batch)
    total = torch.zeros((), device=run.device)
    for i, weight in enumerate(weights):
        if run.ranks.world_size > 1:  # DDP looks at it in the forward: average once, at the end
            run.model.require_backward_grad_sync = i == len(weights) - 1
        with run.autocast():
            loss = run.model(x[i], y[i].long())[1] * weight
        run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.raw_model.parameters(), run.config.grad_clip or math.inf)
    if not run.scaler.is_enabled():
        run.optimizer.found_inf = (~torch.isfinite(norm)).float()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return total, norm


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation. Each function returns {stream: value}, or None if the run is to stop; all ranks call it together.

@torch.no_grad()
def validate(run: "Run", stop: "StopSignal") -> dict[str, float] | None:
    """Loss in nats a token on the first val_tokens of the split: the same for any micro-batch and any ranks."""
    rank, W, B = run.ranks.rank, run.ranks.world_size, run.micro_batch
    n = min(max(1, run.config.val_tokens // run.val.T), len(run.val))
    mine = np.arange(rank, -(-n // W) * W, W)
    mine = np.where(mine < n, mine, -1)  # -1 has no targets; with it every rank makes the same number of batches
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    for first in range(0, len(mine), B):
        x, y = (torch.from_numpy(array).to(run.device) for array in run.val.read(mine[first : first + B]))
        with run.autocast():
            loss = run.raw_model(x, y.long())[1]
        count = int((y >= 0).sum())
        sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        if stop.agreed():
            return None
    nats, count = all_reduce(sums, run.ranks).tolist()
    mean = nats / count if count else math.nan
    return {"val": mean} | (optional("extras.screen.bits_per_byte")(run, mean) or {})


EVALUATIONS = {  # name -> the setting that says how often, and the function; a new evaluation is a line here
    "val": ("val_every", validate),
    "hella": ("hella_every", lambda run, stop: optional("hellaswag.score_run")(run, stop, all_reduce)),
    "samples": ("sample_every", lambda run, stop: optional("extras.generation.draw_samples")(run)),
}


def load_texts(config: Config, name: str, ranks: "Ranks") -> tuple:
    """The tokenizer and HellaSwag's rows; None for what is not beside this file: training goes on without."""
    load_tokenizer = optional("extras.tokenizer.load_tokenizer")
    load_rows = optional("hellaswag.rows_for_training") if config.hella_every else missing
    no_extras, no_rows = (any_rank(function is missing, ranks) for function in (load_tokenizer, load_rows))
    if (no_rows and config.hella_every) or (no_extras and config.sample_every):
        lacks = "samples and HellaSwag: extras/" if no_extras else "HellaSwag: hellaswag.py"
        ranks.print0(f"training without {lacks} is not beside train_gpt2.py")
    with all_or_none():
        tokenizer = None if no_extras else load_tokenizer(name)
    return tokenizer, None if no_rows else load_rows(config, tokenizer, ranks, any_rank, all_or_none)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks and devices

class Ranks(NamedTuple):
    """This process among all. Without torchrun: one, rank 0."""

    rank: int
    world_size: int
    device: torch.device

    def print0(self, text: str) -> None:
        if self.rank == 0:
            optional("extras.screen.show", partial(print, flush=True))(text)


def claim_device(name: str, local_rank: int, W: int, local_W: int) -> torch.device:
    """This rank's device; auto: the accelerator that torch finds, or the CPU. UserError if there is none for it."""
    with user_error(f"--device {name} can't be used", RuntimeError):
        device = optional("extras.hardware.find_device")(name, W, local_W)
        if device is None:  # auto alone is never MPS: extras/hardware.py knows which versions compute wrongly there
            device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type not in ("cpu", "mps"):
            device = torch.device(device.type, local_rank if device.index is None else device.index)
            torch.accelerator.set_device_index(device.index)
            torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        optional("extras.hardware.keep_freed_memory")()
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun gives each rank one thread; share the cores instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_W))
    return device


def join_ranks(device: str, check: Callable = lambda: None) -> Ranks:
    """Read what torchrun set, run `check` before anything is opened, claim a device and form the process group."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    optional("extras.agree.prepare_process")(alone)
    rank, local_rank, W, local_W = (int(os.environ.get(name, value)) for name, value in alone.items())
    store, limit = None, timedelta(minutes=3)  # to find each other; after that 30, for downloads and compilation
    if W > 1:
        store = optional("extras.agree.meet")(rank, W, limit) or next(dist.rendezvous("env://", timeout=limit))[0]
    with all_or_none(store, rank, W):
        check()
        mine = claim_device(device, local_rank, W, local_W)
    if W > 1:
        backend = dist.get_default_backend_for_device(mine)
        dist.init_process_group(backend, store=store, rank=rank, world_size=W, timeout=limit)
        dist.all_reduce(torch.zeros(1, device="cpu" if backend == "gloo" else mine))  # NCCL connects here
        set_timeout(30)
    return Ranks(rank, W, mine)


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Ranks]:
    """`join_ranks` for a run, and leave them at the end."""
    failed, check = True, partial(optional("extras.checks.check_settings"), config)
    try:
        yield join_ranks(config.device, check)
        failed = False
    except (RuntimeError, TimeoutError) as error:
        optional("extras.agree.blame")(error, config.log_dir)  # raises, if it was a rank that doesn't come or answer
        raise
    finally:
        backend = dist.get_backend() if dist.is_initialized() else None
        if backend == "gloo" or (backend and not failed):  # NCCL would wait for ranks that wait for this one's message
            dist.destroy_process_group()
        if backend == "gloo":  # DDP's threads live on: one that frees a tensor as Python ends aborts (pytorch 179291)
            time.sleep(0.5)


def set_timeout(minutes: float) -> None:
    """From now on a rank that hangs ends the run after `minutes`."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes))


def all_reduce(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over ranks, of a tensor on the CPU or on the device; on one rank, the tensor itself."""
    if ranks.world_size == 1:
        return tensor
    there = tensor.to("cpu" if dist.get_backend() == "gloo" else ranks.device)
    dist.all_reduce(there)
    return there.to(tensor.device)


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether `flag` is true on any rank: all ranks call this at the same point, and get the same answer."""
    return bool(all_reduce(torch.tensor(float(flag)), ranks))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16 where the hardware has it, float16 on older CUDA cards, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "xpu" or (device.type == "cpu" and fast) else torch.float32


def wants_compile(asked: bool | None, ranks: Ranks) -> bool:
    """What --compile asked for; else whether this is CUDA with a Triton that works, which takes a C compiler."""
    if asked is False or ranks.device.type != "cuda":
        return bool(asked)
    from torch.utils._triton import has_triton
    return optional("extras.hardware.can_compile", lambda *_: asked or has_triton())(asked, ranks, any_rank)


def pick_micro_batch(config: Config, shape: GPTConfig, ranks: Ranks, compiled: bool, dtype: torch.dtype) -> int:
    """Sequences per forward: --micro_batch, which must divide the batch, or the largest divisor that should fit."""
    B, T, W = config.micro_batch, config.seq_len, ranks.world_size
    optional("extras.checks.check_batch")(config, ranks)
    if config.total_batch_size % ((B or 1) * T * W):
        raise UserError(f"--total_batch_size {config.total_batch_size} is not a multiple of {B or 1} * {T} * {W} ranks")
    if B:
        return B
    most = min(64, max(1, 4096 // T))  # on a CPU small is fast: what is worked on should stay in the cache
    if ranks.device.type == "cuda":
        most = optional("extras.hardware.estimate_micro_batch")(config, shape, ranks, compiled, dtype) or 16
    sequences = config.total_batch_size // T // W
    return max(B for B in range(1, most + 1) if sequences % B == 0)


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a checkpoint and a clean exit; one more, 2 s later, exits at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.since, self.number, self.former = ranks, None, 0, {}

    def __enter__(self):
        names = {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"} & set(dir(signal))  # Windows has two of them
        for name in names if threading.current_thread() is threading.main_thread() else ():
            if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
                self.former[name] = signal.signal(getattr(signal, name), self._receive)
        return self

    def __exit__(self, *_):
        for name, handler in self.former.items():
            signal.signal(getattr(signal, name), handler)

    def _receive(self, number, _frame):
        if self.since and time.monotonic() - self.since > 2:  # torchrun passes on what the terminal has already sent
            os._exit(128 + number)
        self.since, self.number = self.since or time.monotonic(), number

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        return any_rank(self.since is not None, self.ranks)


# ----------------------------------------------------------------------------------------------------------------------
# Run directory: log.txt, which only grows, and checkpoints, which are there whole or not at all


def checkpoint_path(log_dir: str | Path, step: int) -> Path:
    return Path(log_dir) / f"ckpt_{step:06d}.pt"


def saved_steps(log_dir: str | Path) -> list[int]:
    """Steps of the checkpoints in a directory, newest first."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    return sorted((int(m[1]) for name in names if (m := re.fullmatch(r"ckpt_(\d{6,})\.pt", name))), reverse=True)


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint in a file, on the CPU; nothing is executed. extras/: UserError unless it is whole and ours."""
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    return optional("extras.checks.read_whole")(path, load) or load()


def checkpoint_to_resume(config: Config, loader: dict, print0: Callable) -> dict | None:
    """The newest checkpoint in log_dir; None for a run that begins. Writes nothing.

    extras/checks.py passes over a damaged one and refuses one of another run. loader: what the samples depend on.
    """
    log_dir, steps = config.log_dir, saved_steps(config.log_dir)
    optional("extras.checks.check_log")(config)
    if not config.resume and (steps or os.path.exists(f"{log_dir}/log.txt")):
        raise UserError(f"{log_dir} already holds a run: --resume goes on with it, another --log_dir starts anew")
    paths = [Path(config.resume_from)] if config.resume_from else [checkpoint_path(log_dir, step) for step in steps]
    choose = optional("extras.checks.choose_checkpoint", lambda *_: read_checkpoint(paths[0]) if paths else None)
    return choose(paths, read_checkpoint, steps, config, loader, print0)


class Log:
    """LOG_DIR/log.txt: `step stream value` a line, or `# what {...}`. On a full disk the lines wait in memory."""

    def __init__(self, log_dir: str, writes: bool, start: int = 0, track: Callable[[int, dict], None] | None = None):
        self.path, self.writes, self.track = Path(log_dir) / "log.txt", writes, track
        self.waiting, self.warned = "", False
        self.last: dict[str, tuple[int, float]] = {}  # stream -> its last step and value
        with user_error(f"{self.path} can't be written", OSError, advice="choose another --log_dir"):
            self.file = open(self.path if writes else os.devnull, "ab", buffering=0)  # noqa: SIM115
        if writes:
            optional("extras.checks.lock_log")(self.file)  # a second trainer in the same directory is refused
            self.file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # a run that was killed may leave half a line
            if self.file.seek(0, os.SEEK_END):
                self.comment("restart", {"step": start})

    def write(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self.last[name] = (step, value)
            self.waiting += f"{step} {name} {value:{'.6g' if name == 'lr' else '.6f'}}\n"
        if self.track:
            self.track(step, values)

    def comment(self, what: str, content: dict) -> None:
        self.waiting += f"# {what} {json.dumps(content)}\n"

    def flush(self, to_disk: bool = False) -> bool:
        """Write the lines that wait; to_disk: and return when they are on the disk. Whether that succeeded."""
        data, end = self.waiting.encode(), self.file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self.file.write(data) :]
            if to_disk:
                os.fsync(self.file.fileno())
            self.waiting = ""
        except OSError as error:
            self.file.truncate(end)  # no half line
            if not self.warned:
                print(f"WARNING: {self.path} can't be written, its lines wait: {error}", file=sys.stderr, flush=True)
            self.warned = True
        return not self.waiting


class Saver:
    """Saves in the background, one at a time. A save that fails warns and leaves the older checkpoints as they are."""

    def __init__(self, log_dir: str, keep: int, log: Log, evaluated: dict[str, dict[int, float]]):
        self.log_dir, self.keep, self.log, self.evaluated = Path(log_dir), keep, log, evaluated
        self.thread, self.failed = None, False
        for half in self.log_dir.glob("ckpt_*.tmp") if log.writes else ():
            half.unlink()  # a run that was killed may have left it

    def save(self, state: dict) -> None:
        """Copy `state` to memory and write it, after the log: a resumed run does not log again what came before."""
        if not self.wait():
            self.log.comment("unsaved", {"before": state["step"]})  # why there may be a log and no checkpoint
        self.failed = self.log.writes and not self.log.flush(to_disk=True)
        if self.log.writes and not self.failed:
            torch.save(state, data := io.BytesIO())
            self.thread = threading.Thread(target=self._write, args=(state["step"], data.getbuffer()))
            self.thread.start()

    def wait(self) -> bool:
        """Until what was saved is on disk, or has failed and said so. Whether it is on disk."""
        if self.thread:
            self.thread.join()
        return not self.failed

    def _write(self, step: int, data: memoryview) -> None:
        """A file that is there whole or not at all; then keep the newest, and that of the best validation."""
        path, self.failed = checkpoint_path(self.log_dir, step), True
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self.failed = False
            optional("extras.files.sync_folder")(self.log_dir)
            # a file with a later step was damaged, or this run would have begun there: it doesn't count as one of ours
            steps, val = [s for s in saved_steps(self.log_dir) if s <= step], self.evaluated.get("val", {})
            scored = [s for s in saved_steps(self.log_dir) if math.isfinite(val.get(s, math.nan))]
            for old in set(steps[self.keep :] if self.keep else ()) - {min(scored, key=val.get, default=None)}:
                checkpoint_path(self.log_dir, old).unlink()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            what = f"{path.name} was not saved" if self.failed else "an old checkpoint could not be removed"
            print(f"WARNING: {what}, training goes on: {error}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Training

class Run:
    """Data, model and what trains it, up to the first step. Setting it up writes nothing."""

    def __init__(self, config: Config, ranks: Ranks):
        config, self.ranks, self.device = resolve(config), ranks, ranks.device
        self.dtype = pick_dtype(config.dtype, self.device)
        with all_or_none():  # no rank waits for another in here
            self.manifest = read_manifest(config.data_dir)
            name, n_tokens = self.manifest["tokenizer"]["name"], self.manifest["tokenizer"]["vocab_size"]
            open_split = partial(open_shards, config.data_dir, self.manifest)
            self.train = SampleStream(open_split("train"), config.seq_len, n_tokens, config.order, config.seed)
            self.val = SampleStream(open_split("val"), config.seq_len, n_tokens) if config.val_every else None
            if config.epochs:
                steps = math.ceil(config.epochs * len(self.train) * config.seq_len / config.total_batch_size)
                config = replace(config, max_steps=steps)
            self.config, self.samples_a_step = config, config.total_batch_size // config.seq_len
            data = optional("extras.checks.fingerprint")(self.train.shards, self.manifest)
            self.loader = {"tokenizer": name, "data": data}  # and, in a checkpoint, the sample that is next

            saved = checkpoint_to_resume(config, self.loader, ranks.print0) or {"step": 0, "loader": {"sample": 0}}
            self.start = saved["step"]  # updates done before
            self.origin = saved["loader"]["sample"] - self.start * self.samples_a_step  # where step 0 began
            self.evaluated = saved.get("evaluations", {})  # stream -> step -> value
            model = GPT.of(saved["model_config"], saved["model"]) if "model" in saved else make_model(config, n_tokens)
            self.raw_model = model.to(self.device)  # is scored, sampled and saved; never rebound
            optional("extras.checks.check_model")(self.raw_model.config, config, n_tokens)
            self.optimizer = make_optimizer(self.raw_model, config)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
            if "optimizer" in saved:
                load_optimizer(self.optimizer, saved["optimizer"])
            if saved.get("scaler"):  # there is none of a run in bfloat16
                self.scaler.load_state_dict(saved["scaler"])
        optional("extras.agree.require_same")(f"shards in {config.data_dir}", self.loader["data"])
        optional("extras.agree.require_same")(f"checkpoints in {config.log_dir}", self.start)

        self.compiled = wants_compile(config.compile, ranks)
        self.micro_batch = pick_micro_batch(config, self.raw_model.config, ranks, self.compiled, self.dtype)
        for kernel in ("flash", "cudnn", "mem_efficient"):
            getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(config.sdpa in ("auto", kernel))
        for block in self.raw_model.transformer.h if config.recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if self.compiled:
            model = torch.compile(model, dynamic=False, options={"use_fast_math": True})
        if ranks.world_size > 1:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.model = model  # is trained: raw_model compiled, in DDP, both or neither
        self.tokenizer, self.hella_rows = load_texts(config, name, ranks)
        self.intervals = {name: getattr(config, setting) for name, (setting, _) in EVALUATIONS.items()}
        self.intervals |= ({} if self.tokenizer else {"samples": 0}) | ({} if self.hella_rows else {"hella": 0})
        if self.compiled or self.device.type != "cpu":  # extras/hardware.py tries it, and halves what doesn't fit
            self.micro_batch = optional("extras.hardware.fit_micro_batch")(self, any_rank) or self.micro_batch
        if ranks.world_size > 1:
            # DDP sorts its buckets after the first backward pass, here of zeros; a resumed run must sum in that order
            idx = torch.zeros(self.micro_batch, config.seq_len, dtype=torch.int32, device=self.device)
            with self.autocast():
                self.model(idx, idx.long())[1].backward()
            self.optimizer.zero_grad(set_to_none=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, step: int):
        """This rank's part of the batch of an update."""
        first = self.origin + step * self.samples_a_step
        return batch_of_step(self.train, first, self.samples_a_step, self.micro_batch, self.ranks)

    def state(self, step: int) -> dict:
        """All that there is to save after `step` updates: no dropout, and the data is a function of the step."""
        return {
            "step": step, "model": self.raw_model.state_dict(), "model_config": asdict(self.raw_model.config),
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            "config": asdict(self.config), "loader": self.loader | {"sample": self.origin + step * self.samples_a_step},
            "evaluations": self.evaluated, "versions": VERSIONS,
        }  # fmt: skip


def make_model(config: Config, n_tokens: int) -> GPT:
    """The model a run begins with: that of --init_from, or random weights from the seed, the same on every device."""
    if config.init_from:
        return GPT.from_pretrained(config.init_from)
    sizes = {name: getattr(config, name) or default for name, default in SIZES[config.model].items()}
    torch.manual_seed(config.seed)
    return GPT(GPTConfig(config.seq_len, -(-n_tokens // 128) * 128, **sizes, n_tokens=n_tokens))


class Meter:
    """Logs and shows. Losses and norms stay on the device until a few steps have come together: no wait per step."""

    def __init__(self, run: Run, log: Log, stop: StopSignal):
        self.run, self.log, self.stop, self.pending = run, log, stop, []
        self.every, self.bad_steps, self.eval_seconds = 1, 0, {}  # at first every step: how slow they are is not known
        self.seconds, self.steps, self.began, self.clock = 0.0, 0, time.perf_counter(), time.perf_counter()
        counts = {"train_tokens": len(run.train) * run.train.T, "val_tokens": len(run.val or ()) * run.train.T}
        parameters = {"parameters": sum(p.numel() for p in run.raw_model.parameters())}
        log.comment("config", asdict(run.config) | {"micro_batch": run.micro_batch, "ranks": run.ranks.world_size})
        log.comment("model", asdict(run.raw_model.config) | parameters)
        log.comment("data", {"source": run.manifest["source"], "tokenizer": run.loader["tokenizer"]} | counts)
        log.comment("versions", VERSIONS | {"host": platform.node(), "pid": os.getpid()})
        log.flush()
        run.ranks.print0(optional("extras.screen.begin")(run) or f"training on {run.device}; extras/ is not here")

    def end(self, step: int, finished: bool) -> dict[str, float]:
        """Show the last values as a block of `key: value`, made for grep, and return those of all streams."""
        last = {name: max(of.items()) for name, of in self.run.evaluated.items()} | self.log.last
        facts = {"step": step} | {n: x for n, (at, x) in last.items() if at >= step - 1 and n not in ("lr", "ms")}
        facts |= optional("extras.screen.end")(self, step, finished) or {}
        for name, value in facts.items():
            self.run.ranks.print0(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
        self.log.comment("done" if finished else "stopped", facts)
        self.log.flush()
        if self.log.track:
            self.log.track.end(finished)
        return {name: value for name, (_, value) in last.items()}

    def restart_clock(self) -> None:
        """After an evaluation or a save; the ranks wait for each other here."""
        self.stop.agreed()
        self.clock = time.perf_counter()

    def add(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Note a step: this rank's loss, the norm of the averaged gradient. True if the run is to stop."""
        optional("extras.agree.note")(step, "after training step")
        self.pending.append((step, lr, loss, norm))
        return self.read() if len(self.pending) >= self.every else False

    def read(self) -> bool:
        """Read, log and show what is noted; True if any rank was asked to stop. All ranks call it together."""
        if not self.pending:
            return self.stop.agreed()
        (steps, lrs, losses, norms), self.pending = zip(*self.pending), []
        values = torch.stack([*losses, *norms]).cpu().double()  # the one wait for the device
        mine = torch.tensor([time.perf_counter() - self.clock, self.stop.since is not None], dtype=torch.float64)
        mean = all_reduce(torch.cat([values[: len(steps)], mine]), self.run.ranks) / self.run.ranks.world_size
        *losses, elapsed, stopping = mean.tolist()
        config, ms = self.run.config, 1000 * elapsed / len(steps)
        if steps[0] == self.run.start:  # its time has the compilation in it
            set_timeout(config.timeout_minutes)
            gc.collect()
            gc.freeze()  # later collections, which halt a step each, need not look at what is there by now
        else:
            self.seconds, self.steps = self.seconds + elapsed, self.steps + len(steps)
        for step, lr, loss, norm in zip(steps, lrs, losses, values[len(steps) :].tolist()):
            self.log.write(step, train=loss, lr=lr, norm=norm, ms=ms)
            self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1  # in a row; every rank sees the same
            if self.bad_steps:
                optional("extras.checks.bad_step")(self, step, loss, norm)
        self.log.flush()
        shown = f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {ms:.0f} ms"
        shown += f" | {config.total_batch_size / ms * 1000:,.0f} tok/s"
        shown += optional("extras.screen.progress")(self.run, step + 1, ms / 1000, self.eval_seconds) or ""
        self.run.ranks.print0(shown)
        self.every = max(1, min(config.log_every, int(2000 / ms)))  # a slow step is shown at once
        self.clock = time.perf_counter()
        return stopping > 0

    def evaluate(self, step: int, name: str) -> bool:
        """Log and show an evaluation, in eval mode and off the training clock. False if it broke off."""
        began, run, (setting, function) = time.perf_counter(), self.run, EVALUATIONS[name]
        optional("extras.agree.note")(step, f"evaluating {name} at step")
        run.raw_model.eval()
        # without cuDNN's attention, which plans anew for every shape, of which HellaSwag's batches have a hundred
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            values = function(run, self.stop)
        run.raw_model.train()
        if values is not None:
            if texts := values.pop("samples", None):
                self.log.comment("samples", {"step": step, "texts": texts})
                run.ranks.print0(optional("extras.screen.samples")(texts))
            values = {stream: float(value) for stream, value in values.items()}
            for stream, value in values.items():
                run.evaluated.setdefault(stream, {})[step] = value
            self.log.write(step, **values)
            self.log.flush()
            self.eval_seconds[setting] = time.perf_counter() - began
            shown = " | ".join(f"{stream} {value:.4f}" for stream, value in values.items()) or name
            shown += optional("extras.screen.compare")(run, step, values) or ""
            run.ranks.print0(f"EVAL {step:5d} | {shown} | {self.eval_seconds[setting]:.1f} s")
        self.restart_clock()
        return values is not None


def train(run: Run, stop: StopSignal) -> dict[str, float]:
    """The loop: evaluate if it is time, save if it is time, update. Returns the last value of each stream."""
    config, step, stopping, rank0 = run.config, run.start, False, run.ranks.rank == 0
    with all_or_none():
        if config.track != "none":
            from extras.track import open_tracker  # if it isn't here, that is said before anything is written
        with user_error(f"--log_dir {config.log_dir} can't be made", OSError, ValueError, advice="choose another"):
            os.makedirs(config.log_dir, exist_ok=True)
        if rank0:
            optional("extras.checks.require_room")(config, run.raw_model)
        track = rank0 and config.track != "none" and open_tracker(config.track, config.log_dir, asdict(config), step)
        log = Log(config.log_dir, rank0, step, track)
        saver = Saver(config.log_dir, config.keep_checkpoints, log, run.evaluated)
    meter = Meter(run, log, stop)
    with log.file, contextlib.closing(prefetched(run.batch, step, config.max_steps)) as batches:
        while True:
            last = step >= config.max_steps
            for name, every in run.intervals.items():
                if step == run.start and step in run.evaluated.get(name, {}):
                    continue  # it was evaluated before this checkpoint was saved
                if every and (last or step % every == 0) and not stopping:
                    stopping = meter.read() or not meter.evaluate(step, name)
            finished = last and not stopping  # whoever is stopped in the last step has evaluations to make up for
            if step > run.start and (last or stopping or (config.save_every and step % config.save_every == 0)):
                stopping |= meter.read()
                if not meter.bad_steps:  # destroyed weights must not push good ones out
                    saver.save(run.state(step))
                meter.restart_clock()
            if last or stopping:
                break
            lr = lr_at(step, config)
            stopping = meter.add(step, lr, *train_step(run, next(batches), lr))
            step += 1
        if not saver.wait():
            saver.save(run.state(step))
            if not saver.wait():
                raise UserError(f"the last checkpoint, of step {step}, could not be saved; make room and --resume")
        values = meter.end(step, finished)
    killed = stop.number not in (0, getattr(signal, "SIGUSR1", 0)) and "TORCHELASTIC_RUN_ID" not in os.environ
    if killed and not finished:
        raise SystemExit(128 + stop.number)  # so that `train && export` stops, too; torchrun wants 0
    return values


def main(config: Config) -> dict[str, float]:
    """Train as `config` says, and return the last value of each stream of the log."""
    config = resolve(config)
    if config.resume_from:
        here = config.log_dir if config.log_dir != Config.log_dir else os.path.dirname(config.resume_from) or "."
        config = replace(config, resume=True, log_dir=here)
    with joined_ranks(config) as ranks, StopSignal(ranks) as stop:
        return train(Run(config, ranks), stop)


def run_command_line(argv: list[str] | None = None) -> None:
    """Parse and train. A UserError is one line on stderr and exit status 2; extras/cli.py has more help for a typo."""
    if (run := optional("extras.cli.run")) is not missing:
        return run(main, Config, __doc__, argv)
    try:
        import tyro
        main(tyro.cli(Config, args=argv, description=__doc__, use_underscores=True, config=(tyro.conf.DisallowNone,)))
    except (UserError, ModuleNotFoundError) as error:
        name = getattr(error, "name", "")
        lacks = "extras/ is not beside train_gpt2.py" if name == "extras" else f"pip install {name}"
        message = f"a setting needs more than this file: {lacks}" if name else error
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, LocalError):
            print(f"train_gpt2.py: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    run_command_line()
