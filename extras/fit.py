"""
How many sequences a GPU holds at a time: estimated, then tried before the first step.
"""

import re
import time

import torch

from extras.cli import NO_MEMORY, UserError
from extras.loss import HEAD_ROWS


def estimate(config, shape, ranks, compiled: bool, dtype: torch.dtype) -> int:
    """Sequences per forward that should fit into what the card has free, at most 64.

    In bytes, as bench/gpuless.py computes and an H200 measured them: for gradients, moments, bf16 weights and DDP's
    buckets, then for each token. Eager keeps no logits, but every LayerNorm's input in float32.
    """
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    fixed = (18 if ranks.world_size > 1 else 14) * (12 * L * C**2 + V * C) + (0 if compiled else 13 * HEAD_ROWS * V)
    blocks = 2 * L + 12 if config.recompute else (33 if compiled and dtype == torch.bfloat16 else 38) * L
    per_token = (blocks * C + (2 * V if compiled else 0)) * (2 if dtype == torch.float32 else 1)
    free = 0.85 * torch.cuda.mem_get_info(ranks.device)[0]  # memory has gaps
    return max(1, int(min(64, (free - fixed) // (config.seq_len * per_token))))


def try_micro_batch(run, micro_batch: int) -> None:
    """All the memory that a step needs: two micro-batches of zeros, forward and backward, with room for the moments.

    Compiles what there is to compile. No rank waits for another in here: one alone may run out of memory.
    """
    try:
        idx = torch.zeros(micro_batch, run.config.seq_len, dtype=torch.int32, device=run.device)  # as in a step
        moments = [torch.empty_like(p) for p in run.raw_model.parameters() if not run.optimizer.state for _ in range(2)]
        if run.ranks.world_size > 1:  # DDP looks at it in the forward
            run.model.require_backward_grad_sync = False
        for _ in range(2):  # the second finds the gradients of the first
            with run.autocast():
                loss = run.model(idx, idx.long())[1]
            loss.backward()
        del moments
    finally:
        run.optimizer.zero_grad(set_to_none=True)


def fit_micro_batch(run, any_rank) -> int:
    """run.micro_batch, or the half of it for which every rank has the memory; the batch of an update stays.

    any_rank(flag, ranks) tells whether a flag is true on any rank. UserError if one sequence doesn't fit, or if the
    --micro_batch that was asked for doesn't.
    """
    B, per_rank = run.micro_batch, run.config.total_batch_size // run.config.seq_len // run.ranks.world_size
    began = time.perf_counter()
    while True:
        failed = ""
        try:
            try_micro_batch(run, B)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on MPS
            failed = str(error)
            if not re.search(NO_MEMORY, failed):
                raise
        if not any_rank(bool(failed), run.ranks):
            what = "compiled and tried" if run.compiled else "tried"
            run.ranks.print0(f"ready    micro-batch {B} {what} in {time.perf_counter() - began:.1f} s")
            return B
        if B == 1 or run.config.micro_batch:
            better = "leave --micro_batch at 0" if B > 1 else "lower --seq_len or --model, or turn on --recompute"
            raise UserError(f"out of memory with --micro_batch {B}; {better} ({failed[:100] or 'on another rank'})")
        B = max(d for d in range(1, B // 2 + 1) if per_rank % d == 0)
        run.ranks.print0(f"memory   does not suffice; trying micro-batch {B}")
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(run.device)
