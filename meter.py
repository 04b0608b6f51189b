"""
What a run tells while it goes: lines on the screen, values in the log; tokens a second, MFU, time left.

Losses and norms stay on the device until a few steps have come together, so that telling costs no wait per step.
"""

import math
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch

from cli import UserError
from machine import freeze_garbage, set_timeout, sum_over_ranks
from reference import GPT2_HELLASWAG, GPT2_LOSS, follows_recipe, on_fineweb_edu, reference_loss

PEAK_TFLOPS = {  # dense bf16, from the makers' data sheets
    "H200": 989, "GH200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


ESTIMATE_AFTER = 5  # seconds of training
EVERY = {"val": "val_every", "hella": "hella_every", "samples": "sample_every"}  # evaluation -> the knob that says when


def flops_per_token(shape, seq_len: int) -> int:
    """Of forward and backward: 6 per weight, and attention counted whole (Chowdhery et al. 2022, appendix B)."""
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    return 6 * (12 * L * C**2 + V * C) + 12 * L * C * seq_len


def peak_flops(device: torch.device) -> float:
    """bf16 FLOP/s of one device by its maker's data sheet, 0 for a card that is not in PEAK_TFLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = set(name.replace("-", " ").split())
    if words & ({"NVL", "Laptop", "Max", "D", "Ti", "MIG"} | ({"PCIe"} if "A100" not in words else set())):
        return 0.0  # of a like name, but others; all A100 are alike
    return next((value * 1e12 for card, value in PEAK_TFLOPS.items() if set(card.split()) <= words), 0.0)


def hardware(device: torch.device) -> str:
    """What the device is, and its memory."""
    if device.type == "cuda":
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(device))
        free += (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2**30  # ours to use
        return f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return f"{torch.get_num_threads()} of {os.cpu_count()} threads, {total:.1f} GiB"
    return f"{torch.get_num_threads()} of {os.cpu_count()} threads"


def peak_memory(device: torch.device) -> float:
    """The most that was in use at once, in GiB: by tensors on a GPU, else by this process; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def duration(seconds: float) -> str:
    """6917 -> "1 h 55 min", 250 -> "4 min 10 s": two units."""
    hours, minutes = round(seconds / 60) // 60, round(seconds / 60) % 60
    if seconds < 3600 - 30:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s" if round(seconds) >= 60 else f"{round(seconds)} s"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


class Meter:
    """Notes the steps; reads, logs and shows them every few."""

    def __init__(self, run, log, stop):
        self.config, self.ranks, self.log, self.stop, self.pending = run.config, run.ranks, log, stop, []
        self.every, self.bad_steps, self.first = 1, 0, run.start  # at first every step: how slow they are is not known
        self.flops, self.peak = flops_per_token(run.raw_model.config, run.config.seq_len), peak_flops(run.ranks.device)
        settings = asdict(run.config) | asdict(run.raw_model.config)
        self.comparable = on_fineweb_edu(run.source, run.tokenizer.name)
        self.on_recipe = self.comparable and follows_recipe(settings)
        self.seconds, self.steps, self.clock = 0.0, 0, time.perf_counter()
        self.began, self.estimated, self.eval_seconds = time.perf_counter(), False, {}
        self.saved_at, self.minutes_unsaved = time.perf_counter(), 0.0

    def tell_begin(self, run) -> None:
        """What was found and decided, on the screen and at the head of the log."""
        config, shape, device, ranks = run.config, run.raw_model.config, run.device, run.ranks
        parameters, tokens = sum(p.numel() for p in run.raw_model.parameters()), len(run.train) * config.seq_len
        accumulation = config.total_batch_size // (run.micro_batch * config.seq_len * ranks.world_size)
        total, dtype = config.max_steps * config.total_batch_size, str(run.dtype).removeprefix("torch.")
        lines = {
            "device": f"{device.type} ({hardware(device)}), {'compiled' if run.compiled else 'eager'}, {dtype}",
            "model": f"{parameters:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd},"
            f" {shape.n_tokens} ids padded to {shape.vocab_size}, windows up to {shape.block_size}",
            "data": f"{config.data_dir}: {tokens:,} train tokens ({run.tokenizer.name}), "
            f"{tokens / config.total_batch_size:,.0f} steps an epoch",
            "step": f"{config.total_batch_size:,} tokens: {run.micro_batch} windows x {config.seq_len} tokens x "
            f"{ranks.world_size} ranks x {accumulation} micro-batches",
            "run": f"{config.max_steps:,} steps, {total:,} tokens, {total / tokens:.2f} epochs, "
            f"{total * self.flops:.1e} FLOP",
        }
        if self.peak:
            ideal = (total - run.start * config.total_batch_size) * self.flops / self.peak / ranks.world_size
            lines["time"] = f"{duration(ideal / 0.4)} at an MFU of 40%, evaluations apart (measured: below)"
        if run.start:
            done = "; all is done, a larger --max_steps goes on" if run.start >= config.max_steps else ""
            lines["resumed"] = f"at step {run.start}{done}"
        if config.warmup_steps >= config.max_steps:
            lines["note"] = f"--warmup_steps {config.warmup_steps:,} is not over when the run is"
        if self.log.was_there:
            self.log.comment("restart", {"step": run.start})
        for name, text in lines.items():
            ranks.say(f"{name:8s} {text}")
        source = {"source": run.source, "tokenizer": run.tokenizer.name, "train_tokens": tokens}
        self.log.comment("config", asdict(config) | {"micro_batch": run.micro_batch, "ranks": ranks.world_size})
        self.log.comment("model", asdict(shape) | {"parameters": parameters})
        self.log.comment("data", source | {"val_tokens": len(run.val) * config.seq_len})
        self.log.comment("versions", run.versions())
        self.log.flush()

    def tell_end(self, step: int) -> None:
        """A block of `key: value`, made for grep."""
        fresh = {name for name, values in self.log.values.items() if max(values) >= step - 1} - {"lr", "ms"}
        facts = {"step": step, **{name: value for name, value in self.log.last().items() if name in fresh}}
        if self.steps:
            speed = self.steps * self.config.total_batch_size / self.seconds
            facts["tokens_per_second"] = round(speed)
            if self.peak:
                facts["mfu_percent"] = round(100 * speed * self.flops / self.peak / self.ranks.world_size, 1)
            facts["training_seconds"] = round(self.seconds, 1)
        facts["total_seconds"] = round(time.perf_counter() - self.began, 1)
        if memory := peak_memory(self.ranks.device):
            facts["peak_memory_gib"] = round(memory, 2)
        if step < self.config.max_steps:
            self.ranks.say(f"stopped after {step} of {self.config.max_steps} steps; --resume goes on")
        for name, value in facts.items():
            self.ranks.say(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
        self.log.comment("done" if step >= self.config.max_steps else "stopped", facts)
        self.log.flush()
        if self.log.track:
            self.log.track.end(step >= self.config.max_steps)

    def restart_clock(self) -> None:
        """After what is not training, on whichever rank it was."""
        self.stop.agreed()
        self.clock = time.perf_counter()

    def saved(self) -> None:
        self.saved_at, self.minutes_unsaved = time.perf_counter(), 0.0
        self.restart_clock()

    def add(self, step: int, lr: float, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Note a step: this rank's loss, the norm of the averaged gradient. True if the run is to stop."""
        self.pending.append((step, lr, loss, norm))
        return self.read() if len(self.pending) >= self.every else False

    def read(self) -> bool:
        """Read, log and show what is noted; True if any rank was asked to stop. All ranks call it together."""
        if not self.pending:
            return self.stop.agreed()
        steps, lrs, losses, norms = zip(*self.pending)
        values = torch.stack([*losses, *norms]).cpu().double()  # the one wait for the device
        elapsed = time.perf_counter() - self.clock
        unsaved = (time.perf_counter() - self.saved_at) / 60
        mine = torch.cat([values[: len(steps)], torch.tensor([elapsed, unsaved, self.stop.asked], dtype=torch.float64)])
        mean = sum_over_ranks(mine, self.ranks) / self.ranks.world_size
        *losses, elapsed, self.minutes_unsaved, stopping = mean.tolist()
        norms, self.pending = values[len(steps) :].tolist(), []
        ms = 1000 * elapsed / len(steps)
        for step, lr, loss, norm in zip(steps, lrs, losses, norms):
            self.log.write(step, train=loss, lr=lr, norm=norm, ms=ms)
        if steps[0] == self.first:  # its time has the compilation in it
            set_timeout(self.config.timeout_minutes)
            freeze_garbage()
        else:
            self.seconds, self.steps = self.seconds + elapsed, self.steps + len(steps)
        self.show(steps[-1], losses[-1], lrs[-1], norms[-1], ms)
        if self.seconds > ESTIMATE_AFTER and not self.estimated:
            self.estimate()
        self.count_bad(steps, losses, norms)
        self.log.flush()
        self.every = max(1, min(self.config.log_every, int(2000 / ms)))  # a slow step is shown at once
        self.clock = time.perf_counter()
        return stopping > 0

    def show(self, step: int, loss: float, lr: float, norm: float, ms: float) -> None:
        speed = self.config.total_batch_size / ms * 1000
        mfu = f"{100 * speed * self.flops / self.peak / self.ranks.world_size:.1f}%" if self.peak else "n/a"
        left = timedelta(seconds=round((self.config.max_steps - step - 1) * ms / 1000 + self.evals_after(step)))
        self.ranks.say(
            f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.3f} | {ms:.0f} ms | {speed:,.0f} tok/s | "
            f"MFU {mfu} | {left} left"
        )

    def estimate(self) -> None:
        """Say once what the whole run will take, from the steps and the evaluations so far."""
        self.estimated = True
        steps = self.config.max_steps - self.first
        training, evals = steps * self.seconds / self.steps, self.evals_after(self.first - 1)
        parts = f"{steps:,} steps at {1000 * self.seconds / self.steps:.0f} ms"
        parts += f", {duration(evals)} of evaluations" if evals else ""
        self.ranks.say(f"time     the whole run: {duration(training + evals)} ({parts}, as measured so far)")

    def evals_after(self, step: int) -> float:
        """Seconds of the evaluations to come behind `step`, each taking as long as it last did."""
        every, end = asdict(self.config), self.config.max_steps
        return sum(
            seconds * (end // every[name] - step // every[name] + (end % every[name] > 0))
            for name, seconds in self.eval_seconds.items()
        )

    def count_bad(self, steps, losses, norms) -> None:
        """Warn of skipped updates. UserError after max_bad_steps in a row; every rank sees the same numbers."""
        for step, loss, norm in zip(steps, losses, norms):
            self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
            if self.bad_steps:
                self.ranks.say(f"WARNING: step {step}: loss {loss}, gradient norm {norm}; the update is skipped")
                self.log.write(step, skipped=1)
            if self.bad_steps >= self.config.max_bad_steps:
                raise UserError(
                    f"{self.bad_steps} steps in a row without a finite gradient, up to {step}; --resume returns to the "
                    "last checkpoint: try a lower --max_lr or --dtype float32"
                )

    def evaluate(self, step: int, name: str, function, run, stop) -> bool:
        """Log and show what an evaluation returns, off the training clock. False if it broke off."""
        began = time.perf_counter()
        values = function(run, stop)
        if values is not None:
            self.log.write(step, **values)
            self.log.flush()
            shown = [f"{stream} {value:.4f}" for stream, value in values.items()] + self.remarks(step, values)
            seconds = self.eval_seconds[EVERY[name]] = time.perf_counter() - began
            self.ranks.say(f"EVAL {step:5d} | {' | '.join(shown) or name} | {seconds:.1f} s")
        self.restart_clock()
        return values is not None

    def remarks(self, step: int, values: dict[str, float]) -> list[str]:
        """How this compares with what is known of GPT-2 124M; nothing where the setup is another."""
        said = []
        if "val" in values and self.on_recipe:
            ahead = float(reference_loss(step)) - values["val"]
            side = "ahead" if ahead >= 0 else "behind"
            said.append(f"reference {values['val'] + ahead:.2f}: {side} by {abs(ahead):.2f}")
        if "val" in values and self.comparable and values["val"] < GPT2_LOSS:
            said.append(f"below GPT-2 124M's {GPT2_LOSS}")
        if self.comparable and values.get("hella", 0) > GPT2_HELLASWAG and values["hella_se"] < 0.005:  # all 10,042
            said.append(f"above GPT-2 124M's {GPT2_HELLASWAG}")
        return said
