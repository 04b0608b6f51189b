"""
What must hold on a CUDA device before its speed means anything: tables of differences; exit status 1 if one is large.

    python bench/cuda_check.py

1. Attention: output and gradients of each kernel that F.scaled_dot_product_attention may choose, in bfloat16, against
   float64 on the same rounded inputs.
2. Training: the losses of the first 20 steps on the device, in each mode, against float32 on the CPU.
3. Resume: a run that was interrupted at step 10 against the one that was not. On CUDA some sums have no fixed order, so
   that two undisturbed runs differ, too: they say how much may be.
4. Ranks: two of them on the one card against one, compiled; gloo averages, since NCCL wants a card for each. NCCL with
   one rank, for its settings and DDP's calls.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import contextlib
import io
import shutil
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_gpt2
from bench.train_step import free_port
from extras.agree import prepare_process
from extras.cli import run

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass
class Config:
    data_dir: str = "data/python-docs"  # token shards
    device: str = "cuda"  # the device to check against the CPU
    steps: int = 20  # of each run


def attention_errors(device: torch.device) -> dict[str, str]:
    """kernel -> relative errors of output, dq, dk, dv; or why it did not run."""
    torch.manual_seed(0)
    B, T, nh, hs = 4, 1024, 12, 64
    qkv = torch.randn(B, T, 3 * nh * hs, device=device, dtype=torch.bfloat16)
    grad = torch.randn(B, nh, T, hs, device=device, dtype=torch.bfloat16)

    def attend(dtype):
        x = qkv.detach().to(dtype).requires_grad_()
        q, k, v = (part.view(B, T, nh, hs).transpose(1, 2) for part in x.split(nh * hs, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.backward(grad.to(dtype))
        return [y.detach(), *x.grad.split(nh * hs, dim=2)]

    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(torch.float64)
    errors = {}
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                found = attend(torch.bfloat16)
            errors[name] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact)]
        except RuntimeError as error:
            errors[name] = str(error).splitlines()[0]
    return errors


def train(config: Config, log_dir: str, **changes) -> list[float]:
    """Losses of the steps of a small run."""
    start(config, log_dir, **changes)
    return losses_of(config, log_dir)


def start(config: Config, log_dir: str, **changes) -> None:
    settings = {
        "data_dir": config.data_dir, "log_dir": log_dir, "n_layer": 4, "n_head": 4, "n_embd": 256, "seq_len": 128,
        "total_batch_size": 16 * 128, "micro_batch": 8, "max_steps": config.steps, "warmup_steps": 5, "max_lr": 1e-3,
        "hella_every": 0, "sample_every": 0, "val_every": 0, "save_every": 0, "keep_checkpoints": 0,
    } | changes  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        train_gpt2.main(train_gpt2.Config(**settings))


def losses_of(config: Config, log_dir: str) -> list[float]:
    with open(os.path.join(log_dir, "log.txt")) as file:
        lines = [line.split() for line in file if not line.startswith("#")]
    values = {int(step): float(value) for step, name, value in lines if name == "train"}
    assert sorted(values) == list(range(config.steps)), f"log.txt has {len(values)} of {config.steps} steps"
    return [values[step] for step in sorted(values)]


def start_rank(rank: int, port: int, config: Config, log_dir: str, settings: dict) -> None:
    """One of two ranks on one device, in a process of its own."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_gpt2.claim_device = lambda *_: torch.device(config.device)
    dist.get_default_backend_for_device = lambda device: "gloo"
    start(config, log_dir, **settings)


def train_on_two_ranks(config: Config, log_dir: str, **settings) -> list[float]:
    torch.multiprocessing.spawn(start_rank, (free_port(), config, log_dir, settings), nprocs=2)
    return losses_of(config, log_dir)


def use_nccl(_: int, port: int) -> None:
    """What the trainer asks of NCCL, with one rank; whatever NCCL refuses raises."""
    prepare_process({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    train_gpt2.set_timeout(30)
    model = torch.nn.Linear(8, 8).to(device)
    model = train_gpt2.DistributedDataParallel(torch.compile(model), gradient_as_bucket_view=True)
    model(torch.ones(8, 8, device=device)).sum().backward()
    said = [None]
    dist.all_gather_object(said, torch.cuda.nccl.version())
    dist.barrier()
    print(f"NCCL {'.'.join(map(str, said[0]))}, one rank: DDP, its timeout and gathered objects work", flush=True)
    dist.destroy_process_group()


def main(config: Config) -> None:
    device, failed = torch.device(config.device), []
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"\n{name}, torch {torch.__version__}, Python {sys.version.split()[0]}\n", flush=True)

    print("| attention, bfloat16 | output | dq | dk | dv |\n|---|--:|--:|--:|--:|")
    for kernel, errors in attention_errors(device).items():
        if isinstance(errors, str):
            print(f"| {kernel} | {errors} | | | |")
            continue
        print(f"| {kernel} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)
        failed += [kernel] * (max(errors) > 1e-2)

    scratch, on = tempfile.mkdtemp(), {"device": config.device}
    recipes = {"gpt2": {}, "fast": {"recipe": "fast", "max_lr": 1e-3, "muon_lr": 2e-3, "min_lr": 0.0}}
    modes = {  # how far the losses may be from float32's on the CPU, in nats
        "float32": ({"dtype": "float32", "compile": False}, 2e-3),
        "bfloat16": ({"dtype": "bfloat16", "compile": False}, 3e-2),
        "float16": ({"dtype": "float16", "compile": False}, 3e-2),
        "float32, compiled": ({"dtype": "float32", "compile": True}, 2e-3),
        "bfloat16, compiled": ({"dtype": "bfloat16", "compile": True}, 3e-2),
        "bfloat16, compiled, cudnn": ({"dtype": "bfloat16", "compile": True, "sdpa": "cudnn"}, 3e-2),
        "bfloat16, compiled, flash": ({"dtype": "bfloat16", "compile": True, "sdpa": "flash"}, 3e-2),
        "bfloat16, compiled, recompute": ({"dtype": "bfloat16", "compile": True, "recompute": True}, 3e-2),
    }
    print("\n| recipe | mode | first loss | last loss | largest distance from the CPU's float32 | bound |")
    print("|---|---|--:|--:|--:|--:|")
    for recipe, settings in recipes.items():
        exact = train(config, f"{scratch}/{recipe}-cpu", device="cpu", dtype="float32", **settings)
        print(f"| {recipe} | CPU, float32 | {exact[0]:.4f} | {exact[-1]:.4f} | | |", flush=True)
        for mode, (change, bound) in modes.items():
            if recipe == "fast" and mode not in ("float32", "bfloat16, compiled"):
                continue
            if not torch.backends.cuda.is_built() and "float16" in mode.split(", "):
                continue  # it would take minutes on a CPU
            try:
                losses = train(config, f"{scratch}/{recipe}-{mode}", **on, **settings, **change)
            except Exception as error:  # the other rows are wanted all the same
                print(f"| {recipe} | {mode} | {type(error).__name__}: {str(error).splitlines()[0]} | | | |", flush=True)
                failed.append(mode)
                continue
            far = max(abs(a - b) for a, b in zip(losses, exact))
            print(f"| {recipe} | {mode} | {losses[0]:.4f} | {losses[-1]:.4f} | {far:.1e} | {bound:.0e} |", flush=True)
            failed += [f"{recipe}, {mode}"] * (not far <= bound)

    half, mode = config.steps // 2, modes["bfloat16, compiled"][0]
    train(config, f"{scratch}/whole", **on, **mode, save_every=half)
    os.makedirs(f"{scratch}/resumed")
    shutil.copy(f"{scratch}/whole/ckpt_{half:06d}.pt", f"{scratch}/resumed")
    shutil.copy(f"{scratch}/whole/log.txt", f"{scratch}/resumed")
    train(config, f"{scratch}/resumed", **on, **mode, save_every=half, resume=True)
    train(config, f"{scratch}/again", **on, **mode, save_every=half)
    path = f"ckpt_{config.steps:06d}.pt"
    whole, resumed, again = (
        torch.load(f"{scratch}/{run}/{path}", weights_only=True, map_location="cpu")["model"]
        for run in ("whole", "resumed", "again")
    )
    apart, noise = (max(float((whole[name] - other[name]).abs().max()) for name in whole) for other in (resumed, again))
    print(
        f"\nresumed at step {half} of {config.steps}: weights differ by at most {apart:.1e} from the undisturbed run's"
    )
    print(f"two undisturbed runs: by {noise:.1e}", flush=True)
    failed += ["resume"] * (apart > 2 * noise)

    emulated = device.type == "cuda" and not torch.backends.cuda.is_built()
    if emulated:
        print("\nranks are left out: DDP wants streams, which the emulated card has not")
    for recipe in () if emulated else recipes:
        one = train(config, f"{scratch}/{recipe}-one", **on, **mode, **recipes[recipe])
        two = train_on_two_ranks(config, f"{scratch}/{recipe}-two", **on, **mode, **recipes[recipe])
        far = max(abs(a - b) for a, b in zip(one, two))
        print(f"{recipe}, two ranks on one device: losses differ by at most {far:.1e} from one rank's", flush=True)
        failed += [f"{recipe}, two ranks"] * (not far <= 3e-2)
    if device.type == "cuda" and not emulated:
        torch.multiprocessing.spawn(use_nccl, (free_port(),), nprocs=1)
    shutil.rmtree(scratch)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    run(main, Config, __doc__)
