"""
What a device is and can do: bf16 FLOP/s by the makers' data sheets, for the MFU on the screen; what a token takes; how
many sequences it holds at a time, estimated, then tried before the first step; and why one is of no use to this torch.
"""

import contextlib
import ctypes
import os
import re
import sys
import time

import torch

from extras.agree import call_libc, exchange
from extras.cli import NO_MEMORY, UserError, user_error
from extras.loss import HEAD_ROWS

PEAK_TFLOPS = {  # dense bf16, summed in float32; NVIDIA names none for the GB10, only sparse FP4
    "B200": 2250, "H200": 989, "GH200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70,
    "MI300X": 1307.4, "RTX A6000": 154.8, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71,
    "T4": 65,  # in float16: it has no bfloat16
}  # fmt: skip


def flops_per_token(shape, seq_len: int) -> int:
    """Of forward and backward: 6 per weight, and attention counted whole (Chowdhery et al. 2022, appendix B)."""
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    return 6 * (12 * L * C**2 + V * C) + 12 * L * C * seq_len


def peak_flops(device: torch.device) -> float:
    """FLOP/s of one device, 0 for a card that is not in PEAK_TFLOPS."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    words = set(name.replace("-", " ").split())
    if words & ({"NVL", "Laptop", "Max", "D", "Ti", "SUPER", "MIG"} | ({"PCIe"} if "A100" not in words else set())):
        return 0.0  # similar names of other cards; all A100 are alike
    return next((value * 1e12 for card, value in PEAK_TFLOPS.items() if set(card.split()) <= words), 0.0)


def find_device(name: str, ranks: int = 1, on_this_node: int = 1) -> torch.device:
    """The device of that name (auto, cuda, mps, cpu, cuda:N). UserError unless each of so many ranks can have one.

    An NVIDIA card of no use to this torch is an error for --device cuda, and a warning for auto.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 11):  # 2.10 compiled gives NaNs on A100
        raise UserError(f"torch {torch.__version__} is too old; 2.11 to 2.13 work: pip install -r requirements.txt")
    here = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    with user_error(f"--device {name} is not a device; use auto, cuda, mps, cpu or cuda:N", RuntimeError):
        device = here if name == "auto" else torch.device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto" or device.type == "cuda":
        problem = cuda_problem(local_rank if device.index is None else device.index)
        if problem and device.type == "cuda":
            raise UserError(f"--device {name}: {problem}")
        if problem and local_rank == 0:
            print(f"WARNING: training on {device.type}, not on CUDA: {problem}", file=sys.stderr, flush=True)
    count = torch.accelerator.device_count() if device.type == here.type else 0
    if device.type != "cpu" and max(device.index or 0, on_this_node - 1) >= count:
        each = f" for {on_this_node} ranks" if on_this_node > 1 else ""
        raise UserError(f"--device {name}: there is none here{each}; {device.type} devices: {count}; auto is {here}")
    if ranks > 1 and (device.type == "mps" or device.index is not None):
        raise UserError(f"--device {device} is one device, and there are {ranks} ranks; use --device cuda or cpu")
    if device.type == "mps" and version < (2, 13):  # fused AdamW takes bad steps; 2.11's attention is wrong, too
        raise UserError(f"MPS needs torch 2.13, not {torch.__version__}: pip install torch==2.13.0, or --device cpu")
    return device


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: each step asks for the same, and a new page costs a fault."""
    for parameter, value in ((-1, 2**31 - 1), (-2, 2**28), (-3, 2**30)):  # M_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD
        call_libc("mallopt", parameter, value)


def estimate_micro_batch(config, shape, ranks, compiled: bool, dtype: torch.dtype) -> int:
    """Sequences per forward that should fit into what every rank's card has free, at most 64."""
    fixed, per_token = step_bytes(config, shape, ranks, compiled, dtype)
    free = 0.85 * torch.cuda.mem_get_info(ranks.device)[0]  # memory has gaps
    return max(1, int(min(64, *exchange((free - fixed) // (config.seq_len * per_token)))))


def step_bytes(config, shape, ranks, compiled: bool, dtype: torch.dtype) -> tuple[int, int]:
    """What a step takes beside the weights: gradients, moments, bf16 weights, DDP's buckets; and for each token.

    As bench/gpuless.py computes and bench/memory.py measured it. Eager keeps no logits, but every LayerNorm's input in
    float32.
    """
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    fixed = (18 if ranks.world_size > 1 else 14) * (12 * L * C**2 + V * C) + (0 if compiled else 13 * HEAD_ROWS * V)
    blocks = 2 * L + 12 if config.recompute else (33 if compiled and dtype == torch.bfloat16 else 38) * L
    return fixed, (blocks * C + (2 * V if compiled else 0)) * (2 if dtype == torch.float32 else 1)


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
        if run.ranks.world_size > 1:
            run.model.require_backward_grad_sync = True
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


def can_compile(asked: bool | None, ranks, any_rank) -> bool:
    """Whether Triton works on every rank; if not, a line, or a UserError where --compile asked for it."""
    problem = triton_problem()
    if off := any_rank(bool(problem), ranks):
        problem = problem or "Triton does not work on another node"
        if asked:
            raise UserError(f"--compile: {problem}")
        ranks.print0(f"compile  off: {problem}; training is slower without")
    return not off


def triton_problem() -> str:
    """Why Triton can make no CUDA kernels here; empty if it can."""
    from torch.utils._triton import has_triton

    if not has_triton():
        return "there is no Triton for this card or system"
    try:
        import triton

        triton.runtime.driver.active.get_current_target()  # the first use builds what launches kernels
    except Exception as error:
        return f"Triton needs gcc and Python's headers to build its launcher ({str(error)[:80]})"
    return ""


def cuda_problem(index: int) -> str:
    """Why that NVIDIA card is of no use to this torch; empty if it is of use, or there is none."""
    driver, needs, torch_version = driver_cuda(), torch.version.cuda, f"torch {torch.__version__}"
    other = f"take its build for CUDA 12.6, {torch.__version__.split('+')[0]}+cu126"
    if not driver:
        return ""
    if not needs:
        return f"there is an NVIDIA driver, but {torch_version} is built without CUDA; install a build with it"
    if torch.cuda.is_available():
        if index >= torch.cuda.device_count() or not (have := torch.cuda.get_arch_list()):
            return ""
        capability = torch.cuda.get_device_capability(index)
        if any(runs_on(arch, capability) for arch in have):
            return ""
        card = f"{torch.cuda.get_device_name(index)}, of compute capability {capability[0]}.{capability[1]}"
        better = other if capability < (7, 5) else "a newer torch may have them"
        return f"{torch_version} has no kernels for {card}; {better}"
    if driver[0] < int(needs.split(".")[0]):
        better = f", or {other}" if driver[0] >= 12 else ""
        knows = f"the NVIDIA driver knows CUDA up to {driver[0]}.{driver[1]}"
        return f"{knows}, and {torch_version} needs {needs}; update the driver{better}"
    return "there is an NVIDIA driver, but no card that CUDA can see: look at nvidia-smi and CUDA_VISIBLE_DEVICES"


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for sm_XY run on such a card, or the PTX of compute_XY can be compiled for it."""
    if not (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch)):
        return False
    made_for = int(match[2]), int(match[3])
    return made_for <= capability and (match[1] == "compute" or made_for[0] == capability[0])


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver knows; None without a driver."""
    version = ctypes.c_int()
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):
            if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version)) == 0:
                return version.value // 1000, version.value % 1000 // 10
    return None
