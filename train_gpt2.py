"""
Train GPT-2 on token shards: one process or many, on CUDA, MPS or CPU.

    python fineweb.py                                         # once: text -> shards of tokens in edu_fineweb10B/
    python train_gpt2.py                                      # one device
    torchrun --standalone --nproc_per_node=8 train_gpt2.py    # eight GPUs
    python plot_log.py log/                                   # inspect the run

Without a flag this is the GPT-2 124M recipe on FineWeb-Edu: 19,073 steps of 524,288 tokens. `--help` lists the knobs.

Contents: Config · Model · Data · Optimization · Evaluation · Checkpoints · Training. Importing this file does nothing.
Shapes:   B batch, T time, C channels, nh heads, hs head size, V vocabulary (padded), n tokens that exist, L layers.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hellaswag
import machine
import muon
import pretrained
import rundir
from cli import LocalError, UserError, knob, run
from generate import stream
from headloss import HeadLoss
from machine import SDPA_KERNELS, Linear, Ranks, StopSignal, joined_ranks, sum_over_ranks
from meter import Meter
from recipes import RECIPES, by_recipe, check_recipe, fill_in, lr_at
from shards import Shard, bytes_per_token, fingerprint, open_shards, read_manifest
from tokenizer import load_tokenizer
from track import TRACKERS, open_tracker, require_tracker

# ----------------------------------------------------------------------------------------------------------------------
# Config


SIZES = {  # Radford et al. 2019, table 2; the parameter counts are the released models'
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # 124M
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # 350M
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},  # 774M
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},  # 1558M
}


@dataclass
class Config:
    """Every knob, once. The defaults are GPT-2 124M's; `0` and `auto` mean: find out."""

    data_dir: str = knob("edu_fineweb10B", "token shards, as fineweb.py writes them", group="run")
    log_dir: str = knob("log", "log.txt and checkpoints go here; one run, one directory")
    resume: bool = knob(False, "go on from the newest checkpoint in log_dir; start if there is none")
    seed: int = knob(1337, "initial weights, order of the data, samples")
    order: str = knob("shuffle", "new order of windows each epoch, or as they stand", choices=["shuffle", "sequential"])

    model: str = knob("gpt2", "size of the model", group="model", choices=list(SIZES))
    n_layer: int = knob(0, "instead of the model's own; 0 = its own")
    n_head: int = knob(0, "instead of the model's own; 0 = its own")
    n_embd: int = knob(0, "instead of the model's own; 0 = its own")
    init_from: str = knob("", "weights to start from: a checkpoint, a run directory, a hub name or a GPT-2 directory")

    total_batch_size: int = knob(2**19, "tokens per update, over all micro-batches and ranks", group="batch")
    micro_batch: int = knob(0, "windows per forward on each rank; 0 = what fits; never changes the batch of an update")
    seq_len: int = knob(1024, "tokens per window")

    max_steps: int = knob(19073, "updates; 19,073 are 10B tokens at the default batch", group="optimization")
    epochs: float = knob(0.0, "instead of --max_steps: how often to read the train split", metavar="N")
    recipe: str = knob("gpt2", "defaults of the next five: the paper's, or ours", choices=list(RECIPES))
    warmup_steps: int | None = by_recipe("warmup_steps", "linear warm-up")
    schedule: str | None = by_recipe("schedule", "from max_lr to min_lr", choices=["cosine", "linear"])
    max_lr: float | None = by_recipe("max_lr", "learning rate after the warm-up")
    min_lr: float | None = by_recipe("min_lr", "learning rate at the end")
    muon_lr: float | None = by_recipe("muon_lr", "Muon for the blocks' matrices, at this max_lr; 0 = AdamW for all")
    zero_init: bool = knob(False, "begin with residual projections of 0: a block is the identity")
    muon_momentum: float = knob(0.95, "of its running mean of gradients, with Nesterov's look ahead")
    weight_decay: float = knob(0.1, "of matrices and embeddings; biases and LayerNorms are not decayed")
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0 = no clipping")

    val_every: int = knob(1000, "steps between validations, 1% of the time; 0 = never", group="evaluation")
    val_tokens: int = knob(20 * 2**19, "tokens of the val split to validate on: always the same, the first")
    hella_every: int = knob(1000, "steps between HellaSwag evaluations; 0 = never")
    hella_data: str = knob("", "a local hellaswag_val.jsonl(.gz); empty = the cached file, or download it")
    hella_limit: int = knob(0, "a seeded subset of that many examples; 0 = all 10,042")
    sample_every: int = knob(1000, "steps between samples; 0 = never")
    sample_prompt: str = knob("Hello, I'm a language model,", "how the samples begin")
    log_every: int = knob(10, "steps between lines on the screen; log.txt has every step")
    track: str = knob("none", "tell a tracker, too", choices=list(TRACKERS))

    save_every: int = knob(1000, "steps between checkpoints; the last step is saved, too", group="checkpoints")
    keep_checkpoints: int = knob(2, "how many of the newest to keep; 0 = all; that of the best validation is kept, too")
    save_minutes: float = knob(0.0, "save after so many minutes without a checkpoint, too; 0 = don't")
    max_bad_steps: int = knob(10, "end the run after so many updates in a row without a finite gradient")
    force: bool = knob(False, "resume though the data, the model or the batch are others")

    device: str = knob("auto", "cuda, mps, cpu, or one device such as cuda:1", group="machine")
    recompute: bool = knob(False, "keep only the blocks' inputs and compute the rest twice: slower, far less memory")
    zero: bool = knob(False, "share AdamW's moments out among the ranks: less memory on each")
    sdpa: str = knob("auto", "attention kernel on CUDA; auto = PyTorch's choice", choices=list(SDPA_KERNELS))
    dtype: str = knob("auto", "autocast dtype", choices=["auto", "bfloat16", "float16", "float32"])
    timeout_minutes: float = knob(10.0, "end the run if the ranks wait for one of them as long as this")
    compile: bool | None = knob(None, "torch.compile the training step; default: on CUDA, with Triton")

    def __post_init__(self):
        fill_in(self)


def check(config: Config) -> None:
    """Raise UserError for numbers that can't be right, before anything is opened or written."""
    for name in ("total_batch_size", "seq_len", "max_steps", "max_lr", "log_every", "max_bad_steps"):
        if getattr(config, name) <= 0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be more than 0")
    for name, value in asdict(config).items():
        if isinstance(value, (int, float)) and not value >= 0:
            raise UserError(f"--{name} is {value}; it must not be negative")
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr:g} is above --max_lr {config.max_lr:g}; lower it (a tenth is usual)")
    if config.total_batch_size % config.seq_len:
        near = max(config.seq_len, round(config.total_batch_size / config.seq_len) * config.seq_len)
        raise UserError(
            f"--total_batch_size {config.total_batch_size} is not a multiple of --seq_len {config.seq_len}; try {near}"
        )
    if config.epochs and config.max_steps != Config.max_steps:
        raise UserError(f"--epochs {config.epochs:g} and --max_steps {config.max_steps}: give one of them")
    check_recipe(config)
    require_tracker(config.track)


CHECKPOINT_KEYS = ("model", "model_config", "optimizer", "loader", "step", "config", "versions")
FIXED = ("model", "n_layer", "n_head", "n_embd", "seq_len", "total_batch_size", "order", "seed")  # of a run, for good

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
        if self.n_tokens == 0:
            self.n_tokens = 50257 if self.vocab_size == 50304 else self.vocab_size
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; heads share it equally")


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, start=0):
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))  # (B, nh, T, hs)
        if cache is not None:  # (2, B, nh, S, hs): the first `start` positions are there, these T come behind them
            cache[0, :, :, start : start + T], cache[1, :, :, start : start + T] = k, v
            k, v = cache[:, :, :, : start + T]
        # is_causal puts the triangle in the top left corner: right for whole sequences; a single token may look at all
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

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
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
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
        x = x.bfloat16() if machine.casts_to_bfloat16(x.device) else x  # autocast would leave it in twice the bytes
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
        x, targets = x.flatten(0, 1), targets.flatten()
        count = (targets >= 0).sum().clamp(min=1)
        if torch.compiler.is_compiling():  # the compiler fuses the upcast and the padding into the softmax's reads
            logits = F.linear(x, self.lm_head.weight).float()
            padding = torch.arange(self.config.vocab_size, device=x.device) >= self.config.n_tokens
            return None, F.cross_entropy(logits.masked_fill(padding, -math.inf), targets, reduction="sum") / count
        rows = 256 if x.device.type == "cpu" else 8192
        return None, HeadLoss.apply(
            x, self.lm_head.weight, targets, self.config.n_tokens, rows, torch.is_grad_enabled()
        ) / count

    def generate(self, idx, max_new_tokens, **options) -> torch.Tensor:
        """(B, T) ids -> (B, T + new) ids; the options are those of `generate.stream`."""
        return torch.cat([idx, *stream(self, idx, max_new_tokens, **options)], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_dir: str, block_size: int | None = None) -> "GPT":
        """A GPT-2 of the hub ("gpt2" ... "gpt2-xl") or a directory, cropped to `block_size`; every weight must fit."""
        return cls.of(*pretrained.load(name_or_dir, block_size))

    @classmethod
    def from_checkpoint(cls, path: str) -> "GPT":
        """The model of a checkpoint: of this trainer, of build-nanogpt or of nanoGPT."""
        return cls.of(*pretrained.load_checkpoint(path))

    @classmethod
    def of(cls, shape: dict, state: dict) -> "GPT":
        """A model that takes these tensors over as its weights: none are drawn, none are copied."""
        with torch.device("meta"):
            model = cls(GPTConfig(**shape))
        model.load_state_dict(state, strict=True, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    def save_pretrained(self, directory: str) -> None:
        """Write a new directory for `transformers`, lm-eval and llama.cpp: the tokens that exist, without padding."""
        pretrained.save(directory, asdict(self.config), self.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Windows:
    """The samples of a split: a stream without end, the same whoever reads it, so that nobody's place need be kept.

        a shard:  ..phase..|---- T ----|---- T ----|---- T ----|..rest..       phase + rest <= T tokens go unread
                            <---- T+1 -->           neighbours share a token: last target, first input

    Sample s is window s % len(self) of epoch s // len(self). In order "shuffle" every epoch permutes the shards, and in
    each shard the windows, whose phase is new too; all of it from (seed, epoch, shard). "sequential" reads on and on.
    """

    def __init__(self, shards: list[Shard], seq_len: int, n_tokens: int, order: str = "sequential", seed: int = 0):
        self.shards, self.T, self.n_tokens, self.order, self.seed = shards, seq_len, n_tokens, order, seed
        keep = 2 if order == "shuffle" else 1  # so that a shard of a whole number of windows has room for a phase, too
        counts = [max((len(s.tokens) - keep) // seq_len, (len(s.tokens) - 1) // seq_len > 0) for s in shards]
        self.counts = np.array(counts, dtype=np.int64)  # windows of each shard
        if not len(self):
            raise UserError(
                f"{shards[0].path}: no shard has --seq_len {seq_len} + 1 tokens, only "
                f"{max(len(s.tokens) for s in shards)}; lower it, or raise fineweb.py's --val_size if val is so short"
            )
        self.has_masks = any(shard.targets is not None for shard in shards)
        self.plan = lru_cache(maxsize=2)(self._plan)
        self.shuffled = lru_cache(maxsize=4)(self._shuffled)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def _plan(self, epoch: int):
        """Order of the shards, and the number of windows up to the end of each."""
        order = np.arange(len(self.shards))
        if self.order == "shuffle":
            order = np.random.default_rng([self.seed, epoch]).permutation(order)
        return order, self.counts[order].cumsum()

    def _shuffled(self, epoch: int, shard: int):
        """Order of a shard's windows, and where the first begins."""
        if self.order == "sequential":
            return None, 0
        rng, count = np.random.default_rng([self.seed, epoch, shard]), self.counts[shard]
        slack = len(self.shards[shard].tokens) - 1 - count * self.T
        return rng.permutation(count), int(rng.integers(slack + 1))

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard and first token of a sample's window."""
        epoch, place = divmod(sample, len(self))
        order, ends = self.plan(epoch)
        nth = int(np.searchsorted(ends, place, side="right"))
        shard, window = int(order[nth]), place - int(ends[nth] - self.counts[order[nth]])
        windows, phase = self.shuffled(epoch, shard)
        return shard, phase + (window if windows is None else int(windows[window])) * self.T

    def read(self, samples) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (N, T) and targets (N, T), int32, of N samples; a target of -100 is none. -1 as sample: no targets."""
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
            wanted = True if shard.targets is None else shard.targets[span][1:] != 0
            targets[row] = np.where(wanted, tokens[row, 1:], -100)
        return np.ascontiguousarray(tokens[:, :-1]), targets


def batch_of_step(windows: Windows, first: int, count: int, micro_batch: int, ranks: Ranks):
    """This rank's part of `count` samples from `first` on: inputs, targets, (micro-batches, B, T) int32, and weights.

    Micro-batch m of rank r takes samples first + (mW + r)B ..., for W ranks. Its weight is its share of the targets,
    times W since DDP averages over ranks: however the samples are split, the loss is the mean over the step's targets.
    """
    B, W = micro_batch, ranks.world_size
    samples = first + np.arange(count).reshape(-1, W, B)  # (micro-batches, W, B)
    x, y = windows.read(samples[:, ranks.rank].flatten())
    weights = [1 / len(samples)] * len(samples)
    if windows.has_masks:
        _, everyones = windows.read(samples.flatten())
        per_micro_batch = (y >= 0).reshape(len(samples), -1).sum(axis=1)
        weights = (W * per_micro_batch / max(1, (everyones >= 0).sum())).tolist()
    x, y = (torch.from_numpy(array).view(-1, B, windows.T) for array in (x, y))
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


def make_optimizer(model: GPT, config: Config) -> torch.optim.Optimizer:
    """AdamW, fused, or Muon with it; what multiplies or embeds is decayed, biases and LayerNorms are not."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings = {"lr": config.max_lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    if config.muon_lr:
        rates = config.muon_lr, config.muon_momentum, config.weight_decay
        dtype = machine.pick_dtype(config.dtype, next(model.parameters()).device)
        return muon.make_muon(model.named_parameters(), *rates, dtype, **settings)
    return (machine.sharded_adamw if config.zero else torch.optim.AdamW)(groups, **settings)


def train_step(run: "Run", batch, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One update: forward and backward over the micro-batches, clip, step. Returns this rank's loss, and the norm.

    Nothing is read from the device. A norm that isn't finite makes the optimizer skip the update, as GradScaler does
    it: by a flag that the fused kernels look at. Gradients are averaged by then, so that all ranks skip alike.
    """
    pinned = run.device.type == "cuda"  # from memory that isn't, a copy that doesn't block may come too late
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
        getattr(run.optimizer, "optim", run.optimizer).found_inf = (~torch.isfinite(norm)).float()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return total, norm


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def validate(run: "Run", stop: StopSignal) -> dict[str, float] | None:
    """Loss in nats a token on the first val_tokens of the split: the same for any micro-batch and any ranks.

    With bits per byte where the manifest knows the bytes. None if the run is to stop: all ranks ask equally often.
    """
    ranks, B = run.ranks, run.micro_batch
    n = min(max(1, run.config.val_tokens // run.val.T), len(run.val))
    mine = np.arange(ranks.rank, -(-n // ranks.world_size) * ranks.world_size, ranks.world_size)
    mine = np.where(mine < n, mine, -1)  # so that every rank makes the same number of batches
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    for first in range(0, len(mine), B):
        x, y = (torch.from_numpy(array).to(run.device) for array in run.val.read(mine[first : first + B]))
        with run.autocast():
            loss = run.raw_model(x, y.long())[1]
        count = int((y >= 0).sum())
        sums += torch.tensor([float(loss) * count, count], dtype=torch.float64)
        if stop.agreed():
            return None
    nats, count = sum_over_ranks(sums, ranks).tolist()
    values = {"val": nats / max(1, count)}
    if run.bytes_per_token:
        values["bpb"] = values["val"] / math.log(2) / run.bytes_per_token
    return values


def score_hellaswag(run: "Run", stop: StopSignal) -> dict[str, float] | None:
    """Accuracy by mean loss per token, and its standard error. None if the run is to stop."""
    counts = hellaswag.evaluate(
        run.raw_model.features, run.raw_model.head, run.hella_rows, run.device, run.ranks.rank, run.ranks.world_size,
        should_stop=stop.agreed, autocast=run.autocast,
    )  # fmt: skip
    if counts is None:
        return None
    scores = hellaswag.summarize(sum_over_ranks(counts, run.ranks))
    return {"hella": scores["acc_norm"], "hella_se": scores["stderr_norm"]}


def draw_samples(run: "Run", stop: StopSignal, n: int = 4, length: int = 24) -> dict:
    """Print continuations of the prompt, `length` tokens, of the 50 likeliest: the same seed each time."""
    if run.ranks.rank == 0:
        prompt = run.tokenizer.encode(run.config.sample_prompt) or [run.tokenizer.eot]
        idx = torch.tensor([prompt[-run.val.T :]] * n, device=run.device)
        generator = torch.Generator(run.device).manual_seed(run.config.seed)
        with run.autocast():
            ids = run.raw_model.generate(idx, length, top_k=50, generator=generator)
        for row in ids.tolist():
            run.ranks.say("  > " + run.tokenizer.decode(row).replace("\n", "\\n"))
    return {}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def model_of(saved: dict) -> GPT:
    return GPT.of(saved["model_config"], rundir.to_host(saved["model"]))  # a copy: the file may have to go


def load_model(source: str) -> tuple[GPT, str]:
    """Model and tokenizer name of a checkpoint file, a run directory, a hub name or a directory of `transformers`."""
    steps = rundir.saved_steps(source)
    if os.path.isfile(source) or steps:
        path = rundir.path_of(source, steps[0]) if steps else source
        model = GPT.from_checkpoint(path)
    else:
        model = GPT.from_pretrained(source)
    return model, "bytes" if model.config.n_tokens == 257 else "gpt2"


def make_model(config: Config, n_tokens: int) -> GPT:
    """The model a run begins with: that of --init_from, or random weights from the seed, the same on every device."""
    if not config.init_from:
        sizes = {name: getattr(config, name) or default for name, default in SIZES[config.model].items()}
        torch.manual_seed(config.seed)
        model = GPT(GPTConfig(config.seq_len, -(-n_tokens // 128) * 128, **sizes, n_tokens=n_tokens))
        for block in model.transformer.h if config.zero_init else ():
            nn.init.zeros_(block.attn.c_proj.weight), nn.init.zeros_(block.mlp.c_proj.weight)
        return model
    return load_model(config.init_from)[0]


def check_fit(model: GPT, config: Config, n_tokens: int) -> None:
    """UserError if the data are not for a model that was loaded."""
    if config.seq_len > model.config.block_size:
        where = config.init_from or config.log_dir
        raise UserError(f"--seq_len {config.seq_len} is over the {model.config.block_size} positions of {where}")
    if model.config.n_tokens != n_tokens:
        raise UserError(
            f"the model has {model.config.n_tokens} tokens and {config.data_dir} was made with {n_tokens}; "
            "run fineweb.py with the other --tokenizer"
        )


def load_hellaswag(config: Config, tokenizer, ranks: Ranks) -> list | None:
    """HellaSwag's rows; None if they are not wanted, or not to be had. Rank 0 looks first, and downloads for all."""
    rows, W = None, ranks.world_size
    for turn, having in ((True, 1), (False, W)) if config.hella_every else ():
        if turn == (ranks.rank == 0):
            try:
                examples = hellaswag.load_examples(config.hella_data, config.hella_limit, config.seed)
                rows = hellaswag.render(examples, tokenizer, config.seq_len)
            except hellaswag.Unavailable as error:
                print(f"going on without HellaSwag: {error}", flush=True)
        if sum_over_ranks(torch.tensor(float(rows is not None)), ranks) != having:
            return None
    return rows


@dataclass
class Run:
    """What a run is made of, once it is set up."""

    config: Config
    ranks: Ranks
    tokenizer: object
    source: dict | None  # of the text
    dtype: torch.dtype
    compiled: bool
    raw_model: GPT  # is scored, sampled and saved; never rebound
    model: nn.Module  # is trained: raw_model compiled, in DDP, both or neither
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    micro_batch: int
    train: Windows
    val: Windows
    bytes_per_token: float | None  # of the val split
    hella_rows: list | None
    loader: dict  # what the stream of samples depends on
    start: int  # updates done before
    origin: int  # the sample with which step 0 begins

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sample_at(self, step: int) -> int:
        return self.origin + step * (self.config.total_batch_size // self.config.seq_len)

    def batch(self, step: int):
        first, end = self.sample_at(step), self.sample_at(step + 1)
        return batch_of_step(self.train, first, end - first, self.micro_batch, self.ranks)

    def versions(self) -> dict[str, str]:
        return {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}

    def state(self, step: int) -> dict:
        """All that there is to save after `step` updates: no dropout, and the data is a function of the step."""
        return {
            "step": step, "model": self.raw_model.state_dict(), "model_config": asdict(self.raw_model.config),
            "optimizer": machine.whole_state(self.optimizer, self.ranks), "scaler": self.scaler.state_dict(),
            "config": asdict(self.config), "loader": self.loader | {"sample": self.sample_at(step)},
            "versions": self.versions(),
        }  # fmt: skip


def set_up(config: Config, ranks: Ranks) -> Run:
    """Open the data, make or load the model, and what trains it. Nothing is written."""
    manifest, dtype = read_manifest(config.data_dir), machine.pick_dtype(config.dtype, ranks.device)
    tokenizer = load_tokenizer(manifest["tokenizer"]["name"])
    shards = {split: open_shards(config.data_dir, split, manifest) for split in ("train", "val")}
    windows = Windows(shards["train"], config.seq_len, tokenizer.n_vocab, config.order, config.seed)
    val_windows = Windows(shards["val"], config.seq_len, tokenizer.n_vocab)
    if config.epochs:
        steps = math.ceil(config.epochs * len(windows) * config.seq_len / config.total_batch_size)
        config = replace(config, max_steps=steps)
    loader = {"tokenizer": tokenizer.name, "data": fingerprint(shards["train"], manifest)}
    saved = rundir.open_run(config.log_dir, asdict(config), loader, CHECKPOINT_KEYS, FIXED, ranks.say)
    raw_model = (make_model(config, tokenizer.n_vocab) if saved is None else model_of(saved)).to(ranks.device)
    check_fit(raw_model, config, tokenizer.n_vocab)
    machine.choose_sdpa(config.sdpa)
    micro_batch = machine.pick_micro_batch(config, raw_model.config, ranks)
    optimizer = make_optimizer(raw_model, config)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    start = origin = 0
    if saved is not None:
        machine.load_whole_state(optimizer, rundir.to_host(saved["optimizer"]))
        if saved.get("scaler"):  # there is none of a run in bfloat16
            scaler.load_state_dict(saved["scaler"])
        start = saved["step"]
        origin = saved["loader"]["sample"] - start * (config.total_batch_size // config.seq_len)
    if sum_over_ranks(torch.tensor(float(start)), ranks) != start * ranks.world_size:
        raise UserError(f"the ranks find different checkpoints in {config.log_dir}; all nodes must share it")
    use_compile = machine.wants_compile(config.compile, ranks)
    if config.recompute:
        for block in raw_model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    model = torch.compile(raw_model, dynamic=False) if use_compile else raw_model
    if ranks.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    run = Run(
        config, ranks, tokenizer, manifest["source"], dtype, use_compile, raw_model, model, optimizer, scaler,
        micro_batch, windows, val_windows, bytes_per_token(manifest, "val"), load_hellaswag(config, tokenizer, ranks),
        loader, start, origin,
    )  # fmt: skip
    if use_compile or ranks.device.type != "cpu":
        run.micro_batch = machine.fit_micro_batch(run)
    return run


def train(run: Run, stop: StopSignal) -> dict[str, float]:
    """The loop: evaluate if it is time, save if it is time, update. Returns the last value of each stream."""
    config, step, stopping = run.config, run.start, False
    os.makedirs(config.log_dir, exist_ok=True)
    tracker = open_tracker(config.track, config.log_dir, asdict(config), step) if run.ranks.rank == 0 else None
    log = rundir.Log(config.log_dir, run.ranks.rank == 0, tracker)
    saver = rundir.Saver(config.log_dir, config.keep_checkpoints, log, run.ranks.rank == 0)
    saver.require_room(run.state(step))
    meter = Meter(run, log, stop)
    meter.tell_begin(run)
    evaluations = [("val", config.val_every, validate), ("samples", config.sample_every, draw_samples)]
    if run.hella_rows:
        evaluations.insert(1, ("hella", config.hella_every, score_hellaswag))
    with closing(prefetched(run.batch, step, config.max_steps)) as batches:
        while True:
            last = step >= config.max_steps
            for name, every, evaluate in evaluations:
                known = step == run.start > 0 and log.has(step, name)  # these very weights were, before the save
                if every and (last or step % every == 0) and not known and not stopping:
                    stopping = meter.read() or not meter.evaluate(step, name, evaluate, run, stop)
            timely = 0 < config.save_minutes <= meter.minutes_unsaved
            timely |= config.save_every > 0 and step % config.save_every == 0
            if step > run.start and (last or stopping or timely):
                stopping |= meter.read()
                saver.save(run.state(step))
                meter.saved()
            if last or stopping:
                break
            lr = lr_at(step, config)
            stopping = meter.add(step, lr, *train_step(run, next(batches), lr))
            step += 1
    if not saver.wait():
        saver.save(run.state(step))
        if not saver.wait():
            raise UserError(f"the last checkpoint, of step {step}, could not be saved; make room and --resume")
    meter.tell_end(step)
    return log.last()


def main(config: Config) -> dict[str, float]:
    """Train as `config` says, and return the last value of each stream of the log."""
    check(config)
    with joined_ranks(config.device) as ranks, StopSignal(ranks) as stop:
        return train(set_up(config, ranks), stop)


if __name__ == "__main__":
    run(main, Config, __doc__)
