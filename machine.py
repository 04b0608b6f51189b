"""
The machine under a run: its ranks, their devices, and the signals that ask it to stop. Knows nothing of models.
"""

import contextlib
import ctypes
import gc
import os
import platform
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from cli import UserError

OLDEST_TORCH = (2, 11)  # 2.10 compiled gives NaNs on A100
OLDEST_TORCH_OF_MPS = (2, 13)  # before, fused AdamW takes bad steps, too; 2.11's attention is wrong for few queries


@dataclass(frozen=True)
class Ranks:
    """This process among all. Without torchrun: one, rank 0."""

    rank: int
    world_size: int
    device: torch.device

    def say(self, text: str) -> None:
        """Print, once for all ranks. That nobody reads it any more, `tee` after Ctrl-C for one, must not end a run."""
        if self.rank == 0:
            try:
                print(text, flush=True)
            except OSError:  # BrokenPipeError; on Windows another
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_device(name: str) -> torch.device:
    """The device of that name (auto, cuda, mps, cpu, cuda:N). UserError if it is none, or not one of this machine's."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise UserError(f"torch {torch.__version__} is too old; 2.11 to 2.13 work: pip install -r requirements.txt")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use auto, cuda, mps, cpu or cuda:N") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"--device {name}: there is none here; CUDA devices: {counts['cuda']}, MPS: {counts['mps']}")
    if device.type == "mps" and version < OLDEST_TORCH_OF_MPS:
        raise UserError(f"MPS needs torch 2.13, not {torch.__version__}: pip install torch==2.13.0, or --device cpu")
    return device


def join_ranks(kind: str) -> Ranks:
    """Read what torchrun set, choose the device (`kind`: auto, cuda, mps, cpu, cuda:N), form the process group.

    They find each other in 3 minutes or not at all, and an elastic launch tries again; from then on a rank waits up to
    30 minutes for the others, for downloads and compilation may take some, until `set_timeout` says less.
    """
    rank, local_rank, world_size, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
    )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    device = find_device(kind)
    if device.type == "mps" and world_size > 1:
        raise UserError("MPS can't average over ranks; start one process, or add --device cpu")
    if device.type == "cuda":
        if torch.cuda.device_count() < local_world_size:
            count = torch.cuda.device_count()
            raise UserError(f"{local_world_size} ranks on this node, but {count} CUDA devices; lower --nproc_per_node")
        if device.index is not None and world_size > 1:
            raise UserError(f"--device {kind} under torchrun would put every rank on one card; use --device cuda")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        keep_freed_memory()
        if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun gives each rank one thread; share the cores instead
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    if world_size > 1:
        limit = timedelta(minutes=3)
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(name_this_start(store, rank, world_size, limit.total_seconds()), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        dist.all_reduce(torch.zeros(1, device=device if device.type == "cuda" else "cpu"))  # NCCL's handshake is here
        set_timeout(30)
    return Ranks(rank, world_size, device)


def die_with_parent() -> None:
    """On Linux: who kills torchrun by SIGKILL kills its ranks, too: they would go on, beside the next run."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (AttributeError, OSError, TypeError):
        return  # not Linux
    pr_set_pdeathsig = 1
    prctl(pr_set_pdeathsig, int(getattr(signal, "SIGKILL", 0)))


def name_this_start(store, rank: int, world_size: int, seconds: float) -> str:
    """A name that the ranks of this start share with no other start. TimeoutError if they don't meet in `seconds`.

    torchrun keeps one store for all its restarts, with all that was written into it: who reads an address before its
    new owner has written it waits for the dead until the timeout. So each rank shows a number that was never used
    before, and believes only an answer that repeats it. Rank 0 answers until all have taken its name.
    """
    mine, deadline, others = uuid.uuid4().hex, time.monotonic() + seconds, range(1, world_size)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank:
        store.set(f"hello{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            for other in others:
                store.set(f"welcome{other}", read(f"hello{other}") + mine)
            if all(read(f"joined{other}") == mine for other in others):
                return mine
        elif (welcome := read(f"welcome{rank}")).startswith(mine):
            store.set(f"joined{rank}", welcome.removeprefix(mine))
            return welcome.removeprefix(mine)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank}: not all of the {world_size} ranks came within {seconds:.0f} s")


def set_timeout(minutes: float) -> None:
    """From now on a rank that hangs ends the run after `minutes`."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes))


@contextlib.contextmanager
def joined_ranks(kind: str) -> Iterator[Ranks]:
    """`join_ranks`, and leave them at the end.

    But not after an error, with NCCL: it would wait for the others, who wait for this rank, before a word is said.
    """
    ranks, failed = join_ranks(kind), True
    try:
        yield ranks
        failed = False
    finally:
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            is_gloo = dist.get_backend() == "gloo"
            dist.destroy_process_group()
            if is_gloo:  # DDP keeps its threads alive: one that frees a tensor as Python ends aborts (pytorch 179291)
                time.sleep(0.5)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: each step asks for the same, and a new page costs a fault."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    for parameter, value in ((m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28), (m_mmap_threshold, 2**30)):
        mallopt(parameter, value)


def sharded_adamw(groups: list[dict], **settings) -> torch.optim.Optimizer:
    """AdamW whose moments are shared out: each rank updates its part of the parameters and sends it round (ZeRO-1)."""
    if not dist.is_initialized():
        return torch.optim.AdamW(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **settings)


def whole_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    """As if one rank had had all of it; of a sharded optimizer only on rank 0. All ranks call it."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
        if ranks.device.type == "cuda":  # it copies without waiting
            torch.cuda.synchronize(ranks.device)
        return optimizer.state_dict() if ranks.rank == 0 else {}
    return optimizer.state_dict()


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """What `whole_state` gave; but its settings, weight decay among them, stay those of this run.

    A sharded optimizer takes its share. AdamW's step counts go to where its fused kernels need them:
    ZeroRedundancyOptimizer leaves them on the CPU.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise UserError(
            "the checkpoint has another optimizer, AdamW or Muon; give the --recipe it was made with"
        ) from error
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)
    for parameter, values in getattr(optimizer, "optim", optimizer).state.items():
        values["step"] = values["step"].to(parameter.device)


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The sum over ranks, of a tensor on the CPU or on the device; on one rank, the tensor itself."""
    if ranks.world_size == 1:
        return tensor
    there = tensor.to(ranks.device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(there)
    return there.to(tensor.device)


def least_over_ranks(number: float, ranks: Ranks) -> float:
    """The smallest of the ranks' numbers."""
    if ranks.world_size == 1:
        return number
    there = torch.tensor(float(number), device=ranks.device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(there, op=dist.ReduceOp.MIN)
    return there.item()


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
        fits = config.total_batch_size % (config.seq_len * ranks.world_size) == 0
        better = f"--micro_batch {largest_divisor(per_rank, B)}" if fits else f"--total_batch_size {near}"
        raise UserError(
            f"--total_batch_size {config.total_batch_size} is not a multiple of {f'{B} windows * ' if B else ''}"
            f"--seq_len {config.seq_len} * {ranks.world_size} ranks = {unit}; try {better}, or other ranks"
        )
    if ranks.device.type == "mps" and B * config.seq_len > 2**14:  # a weight's gradient: headloss.LONGEST_SUM
        raise UserError(
            f"--micro_batch {B} * --seq_len {config.seq_len} is over 16,384: MPS sums that wrongly; lower it"
        )
    if B:
        return B
    most = 4096 // config.seq_len  # on a CPU small is fast: what is worked on should stay in the cache
    if ranks.device.type == "cuda":
        parameters = 12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd
        moments = 8 / ranks.world_size if config.zero else 8
        free = 0.9 * torch.cuda.mem_get_info(ranks.device)[0] - (4 + moments) * parameters  # the weights are there
        blocks = 2 * shape.n_layer + 40 if config.recompute else 34 * shape.n_layer  # bytes per token and channel
        most = free // (config.seq_len * (blocks * shape.n_embd + 8 * shape.vocab_size))
    return largest_divisor(per_rank, least_over_ranks(min(most, 64), ranks))


def casts_to_bfloat16(device: torch.device) -> bool:
    """Whether autocast does, here and now."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.bfloat16


def is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Linear(torch.nn.Linear):
    """nn.Linear, whose float32 forwards without gradients are oneDNN's on x86, as bfloat16's are anyway.

    Else they would be MKL's, which on AMD read weights half as fast for one row, and multiply a quarter less for many.
    """

    def forward(self, x):
        in_float32 = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if HAS_ONEDNN_LINEAR and in_float32 and not torch.is_grad_enabled() and not is_traced():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


HAS_ONEDNN_LINEAR = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def largest_divisor(n: int, most: int) -> int:
    """Of n, no larger than `most`, but at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and (d == 1 or d <= most))


def rehearse(run, micro_batch: int) -> None:
    """Two micro-batches of nothing, forward and backward, beside the moments to come: all that a step needs.

    Compiles what there is to compile. No rank waits for another in here: one alone may run out of memory.
    """
    try:
        idx = torch.zeros(micro_batch, run.config.seq_len, dtype=torch.int32, device=run.device)  # as in a step
        parameters = [] if run.optimizer.state else list(run.raw_model.parameters())
        share = parameters[:: run.ranks.world_size if run.config.zero else 1]  # with the embedding: the largest
        moments = [torch.empty_like(p) for p in share for _ in range(2)]
        if run.ranks.world_size > 1:  # DDP looks at it in the forward
            run.model.require_backward_grad_sync = False
        for _ in range(2):  # the second finds the gradients of the first
            with run.autocast():
                loss = run.model(idx, idx.long())[1]
            loss.backward()
        del moments
    finally:
        run.optimizer.zero_grad(set_to_none=True)


def wants_compile(asked: bool | None, ranks: Ranks) -> bool:
    """What --compile asked for; else whether this is CUDA with Triton: Windows' wheels lack it, old cards do, too."""
    if asked and ranks.device.type == "mps":
        raise UserError("--compile on MPS sums the head's gradient wrongly on M1 and M2; leave it out")
    if asked is not None or ranks.device.type != "cuda":
        return bool(asked)
    from torch.utils._triton import has_triton

    if not (there := has_triton()):
        ranks.say("compile  off: there is no Triton for this card or system; training is slower without")
    return there


def fit_micro_batch(run) -> int:
    """run.micro_batch if every rank has the memory for it, or else the half of it that fits; the batch stays.

    A --micro_batch that was asked for is not changed: UserError if it doesn't fit, or if one window doesn't.
    """
    B, config, ranks = run.micro_batch, run.config, run.ranks
    began = time.perf_counter()
    while True:
        failed = 0.0
        try:
            rehearse(run, B)
        except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, a plain one on MPS
            if not re.search("out of memory|ALLOC_FAILED", str(error)):  # the latter from cuBLAS
                raise
            failed = 1.0
        if not sum_over_ranks(torch.tensor(failed), ranks):
            ranks.say(f"ready    {B} windows compiled and tried in {time.perf_counter() - began:.1f} s")
            return B
        if B == 1:
            raise UserError(
                "out of memory with one window per forward; lower --seq_len, choose a smaller --model, or turn on "
                "--recompute (and --zero on several GPUs)"
            )
        if config.micro_batch:
            raise UserError(f"out of memory with --micro_batch {B}; leave it at 0, and what fits is found")
        half = largest_divisor(config.total_batch_size // config.seq_len // ranks.world_size, B // 2)
        ranks.say(f"memory   {B} windows do not fit; trying {half}")
        B = half
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(ranks.device)


SDPA_KERNELS = {  # what F.scaled_dot_product_attention may choose from; "math", in plain PyTorch, is always there
    "auto": ("flash", "cudnn", "mem_efficient"),
    "flash": ("flash", "mem_efficient"),  # which comes second, and takes the masks that flash doesn't
    "cudnn": ("cudnn",),
    "efficient": ("mem_efficient",),
    "math": (),
}


def choose_sdpa(name: str) -> None:
    for kernel in SDPA_KERNELS["auto"]:
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel in SDPA_KERNELS[name])


def freeze_garbage() -> None:
    """What is there by now stays; collections, which stop a step for it, need not look at it again."""
    gc.collect()
    gc.freeze()


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
