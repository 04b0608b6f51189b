"""
The machine under a run: its ranks, their devices, and the signals that ask it to stop. Knows nothing of models.
"""

import ctypes
import os
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cli import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among all. Without torchrun: one, rank 0."""

    rank: int
    world_size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Print, once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)


def join_ranks(kind: str) -> Ranks:
    """Read what torchrun set, choose the device (`kind`: auto, cuda, mps, cpu, cuda:N), form the process group.

    Until `shorten_timeout` the ranks wait 30 minutes for each other: downloads and compilation may take some.
    """
    rank, local_rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(kind)
    except RuntimeError as error:
        raise UserError(f"--device {kind} is no device; use auto, cuda, mps, cpu or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available() or torch.cuda.device_count() < local_world_size:
            count = torch.cuda.device_count()
            raise UserError(f"{local_world_size} ranks on this node, but {count} CUDA devices; lower --nproc_per_node")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but this machine has none; use --device cpu")
    elif device.type == "cpu":
        keep_freed_memory()
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun gives each rank one thread; share the cores instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Ranks(rank, world_size, device)


def shorten_timeout(minutes: float) -> None:
    """From now on a rank that hangs ends the run after `minutes`."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes))


def leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: each step asks for the same, and a new page costs a fault."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    for parameter, value in ((m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_mmap_threshold, 2**30)):
        mallopt(parameter, value)


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over ranks, of a tensor on the CPU or on the device; on one rank, the tensor itself."""
    if ranks.world_size == 1:
        return tensor
    there = tensor.to(ranks.device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(there)
    return there.to(tensor.device)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16 where the hardware has it, float16 on older CUDA cards, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def pick_micro_batch(config, shape, ranks: Ranks) -> int:
    """Windows per forward: --micro_batch, which must divide the batch, or the largest divisor that should fit."""
    B, per_rank = config.micro_batch, config.total_batch_size // config.seq_len // ranks.world_size
    unit = (B or 1) * config.seq_len * ranks.world_size
    if config.total_batch_size % unit:
        near = max(1, config.total_batch_size // unit) * unit
        raise UserError(
            f"--total_batch_size {config.total_batch_size} is not a multiple of micro_batch * seq_len * ranks = "
            f"{B or 1} * {config.seq_len} * {ranks.world_size} = {unit}; try {near}"
        )
    if B:
        return B
    most = 4096 // config.seq_len  # on a CPU small is fast: what is worked on should stay in the cache
    if ranks.device.type == "cuda":
        parameters = 12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd
        free = 0.85 * torch.cuda.mem_get_info(ranks.device)[0] - 16 * parameters  # weights, gradients, AdamW's moments
        most = free // (config.seq_len * (40 * shape.n_layer * shape.n_embd + 8 * shape.vocab_size))
    return max(b for b in range(1, per_rank + 1) if per_rank % b == 0 and (b == 1 or b <= min(most, 64)))


class StopSignal:
    """SIGTERM, SIGINT or SIGUSR1 ask for a checkpoint and the end; another, two seconds later or more, ends at once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.since, self.former = ranks, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    self.former[name] = signal.signal(getattr(signal, name), self._receive)
        return self

    def __exit__(self, *_):
        for name, handler in self.former.items():
            signal.signal(getattr(signal, name), handler)

    def _receive(self, number, _frame):
        if self.since and time.monotonic() - self.since > 2:  # torchrun passes on what the terminal has already sent
            os._exit(128 + number)
        self.since = self.since or time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether this rank was."""
        return self.since is not None

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: all ranks call this at the same point, and get the same answer."""
        return bool(sum_over_ranks(torch.tensor(float(self.asked)), self.ranks))
