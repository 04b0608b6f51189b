"""
What a run shows beside losses: what it is made of, how fast it should be, how long it will take, how good it is.

`run` is train_gpt2.Run. Without this file the trainer prints its steps and evaluations and no more.
"""

import math
import os
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch

from extras.hardware import flops_per_token, peak_flops
from extras.reference import remarks
from extras.tokenizer import printable


def show(text: str) -> None:
    """Print. That nobody reads it any more, `tee` after Ctrl-C for one, must not end the run."""
    try:
        print(text, flush=True)
    except OSError:  # BrokenPipeError; on Windows another
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def begin(run) -> str:
    """What was found and decided."""
    config, shape, W, B, T = run.config, run.raw_model.config, run.ranks.world_size, run.micro_batch, run.config.seq_len
    parameters, tokens = sum(p.numel() for p in run.raw_model.parameters()), len(run.train) * T
    steps, batch, mode = config.max_steps, config.total_batch_size, "compiled" if run.compiled else "eager"
    epochs, flops = steps * batch / tokens, steps * batch * flops_per_token(shape, T)
    lines = [
        f"device   {run.device.type} ({hardware(run.device)}), {mode}, {str(run.dtype).removeprefix('torch.')}",
        f"model    {parameters:,} parameters: {shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}, "
        f"{shape.n_tokens} ids padded to {shape.vocab_size}, sequences up to {shape.block_size}",
        f"data     {config.data_dir}: {tokens:,} train tokens ({run.loader['tokenizer']}), "
        f"{tokens / batch:,.0f} steps an epoch",
        f"step     {batch:,} tokens: micro-batch {B} x {T} tokens x ranks {W} x accumulation {batch // (B * T * W)}",
        f"run      {steps:,} steps, {steps * batch:,} tokens, {epochs:.2f} epochs, {flops:.1e} FLOP",
    ]
    if run.start:
        done = "; all is done, a larger --max_steps goes on" if run.start >= steps else ""
        lines.append(f"resumed  at step {run.start}{done}")
    if epochs > 100:
        lines.append(f"note     {epochs:,.0f} epochs: the model will learn these {tokens:,} tokens by heart")
    if config.warmup_steps >= steps:
        lines.append(f"note     --warmup_steps {config.warmup_steps:,} is not over when the run is")
    return "\n".join(lines)


def hardware(device: torch.device) -> str:
    """What the device is, and its memory."""
    if device.type == "cuda":
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(device))
        free += (torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2**30  # ours to use
        return f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"
    memory = ""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # Windows has none
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    return f"{torch.get_num_threads()} of {os.cpu_count()} threads{memory}"


def peak_memory(device: torch.device) -> float:
    """The most that was in use at once, in GiB: by tensors on a GPU, else by this process; 0 = unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def mfu(run, seconds_a_step: float) -> float:
    """Percent of the devices' bf16 peak (Chowdhery et al. 2022); 0 if the peak is not known."""
    peak = peak_flops(run.device) * run.ranks.world_size
    flops = flops_per_token(run.raw_model.config, run.config.seq_len) * run.config.total_batch_size
    return 100 * flops / seconds_a_step / peak if peak else 0.0


def progress(run, done: int, seconds_a_step: float, eval_seconds: dict[str, float]) -> str:
    """MFU, and time left after `done` steps; eval_seconds: setting that says how often -> how long the last took."""
    end, left = run.config.max_steps, (run.config.max_steps - done) * seconds_a_step
    for setting, seconds in eval_seconds.items():
        every = getattr(run.config, setting)
        left += seconds * (end // every - (done - 1) // every + (end % every > 0))
    percent = mfu(run, seconds_a_step)
    return f" | MFU {f'{percent:.1f}%' if percent else 'n/a'} | {timedelta(seconds=round(left))} left"


def samples(texts: list[str]) -> str:
    """One a line, whatever is in them."""
    return "\n".join("  > " + printable(text).replace("\n", "\\n") for text in texts)


def compare(run, done: int, values: dict[str, float]) -> str:
    """How an evaluation compares with what is known about GPT-2 124M."""
    settings = asdict(run.config) | asdict(run.raw_model.config)
    found = remarks(done, values, settings, run.manifest["source"], run.loader["tokenizer"])
    return "".join(f" | {remark}" for remark in found)


def bits_per_byte(run, nats: float) -> dict[str, float]:
    """A loss in nats a token in bits a byte of text, where the bytes of the val split are known and none is masked."""
    listed = [shard for shard in run.manifest["shards"] if shard["split"] == "val"]
    text_bytes = 0 if run.val.has_masks else sum(shard.get("bytes", 0) for shard in listed)
    return {"bpb": nats / math.log(2) * sum(s["tokens"] for s in listed) / text_bytes} if text_bytes else {}


def end(meter, step: int, finished: bool) -> dict[str, float]:
    """Speed and memory, for the last block. meter: train_gpt2.Meter."""
    run, seconds, steps, facts = meter.run, meter.seconds, meter.steps, {}
    if steps:
        facts["tokens_per_second"] = round(steps * run.config.total_batch_size / seconds)
        if percent := mfu(run, seconds / steps):
            facts["mfu_percent"] = round(percent, 1)
        facts["training_seconds"] = round(seconds, 1)
    facts["total_seconds"] = round(time.perf_counter() - meter.began, 1)
    if memory := peak_memory(run.device):
        facts["peak_memory_gib"] = round(memory, 2)
    if not finished:
        run.ranks.print0(f"stopped after {step} of {run.config.max_steps} steps; --resume goes on")
    return facts
