"""Ranks that start together find each other, and nobody else."""

import contextlib
import random
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny import ROOT, USER_ERRORS

import train_gpt2
from extras import hardware
from extras.agree import blame, name_this_start


def names_of(store, world_size: int, delays: list[float]) -> list[str]:
    """What each of the ranks takes for the name of this start, when they come as late as `delays` says."""
    names = [""] * world_size

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        names[rank] = name_this_start(store, rank, world_size, seconds=20)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_of_a_start_share_a_name_that_no_other_start_had():
    """Ranks of a restart find in the store all that those before them wrote, and come in any order."""
    store, rng, seen = dist.HashStore(), random.Random(0), set()
    for _ in range(6):
        names = names_of(store, 3, [rng.uniform(0, 0.2) for _ in range(3)])
        assert len(set(names)) == 1 and names[0] not in seen | {""}
        seen.add(names[0])


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_rank_that_waits_for_nobody_gives_up():
    store = dist.HashStore()
    names_of(store, 2, [0, 0])
    for rank in (0, 1):
        with pytest.raises(TimeoutError, match=f"rank {rank}: not all of the 2 ranks came within 0 s"):
            name_this_start(store, rank, 2, seconds=0.2)


SPEAKER = """
import sys, torch, train_gpt2
ranks = train_gpt2.Ranks(0, 1, torch.device("cpu"))
sys.stdin.read()
for line in ("nobody reads this", "nor this"):
    ranks.print0(line)
print("saved", file=sys.stderr)
"""


def test_a_reader_that_is_gone_ends_no_run():
    """Ctrl-C in `train_gpt2.py | tee screen.txt` ends `tee`, too; the run has yet to save."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SPEAKER], cwd=ROOT, text=True, **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == "saved\n" and process.wait(timeout=60) == 0


@pytest.mark.parametrize("backend, fails, leaves", [("nccl", True, False), ("nccl", False, True), ("gloo", True, True)])
def test_a_rank_that_fails_does_not_wait_for_the_others(monkeypatch, backend, fails, leaves):
    """NCCL's end is a collective: the message of the one that failed came after it, if ever."""
    told = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: told.append("left"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = train_gpt2.resolve(train_gpt2.Config(device="cpu"))
    with contextlib.suppress(ZeroDivisionError), train_gpt2.joined_ranks(config) as ranks:
        assert ranks.world_size == 1 and not told
        if fails:
            1 / 0  # noqa: B018
    assert told == ["left"] * leaves


def test_ranks_that_did_not_meet_are_one_line(monkeypatch, tmp_path):
    """A run of one process has nobody to wait for: its errors stay what they are."""
    for error in (dist.DistStoreError("wait timeout\nand a stack"), TimeoutError("wait timeout")):
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert blame(error, str(tmp_path)) is None
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(USER_ERRORS, match=r"^not all 2 ranks came in time \(wait timeout\); see what"):
            blame(error, str(tmp_path))
    assert blame(RuntimeError("another"), str(tmp_path)) is None
    monkeypatch.setattr(dist, "is_initialized", lambda: True)  # a network file system's time-out is no rank's
    assert blame(TimeoutError(110, "Connection timed out"), str(tmp_path)) is None and not list(tmp_path.iterdir())


class Launcher:
    """Triton's driver, which is built at its first use."""

    def get_current_target(self):
        if not self.compiler:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


def test_no_triton_or_no_compiler_is_eager_and_one_line(monkeypatch, capsys):
    cuda, cpu = (train_gpt2.Ranks(0, 1, torch.device(kind)) for kind in ("cuda", "cpu"))
    launcher = Launcher()
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=launcher)))
    monkeypatch.setitem(sys.modules, "triton", triton)
    for has_triton, launcher.compiler, words in (
        (False, True, "there is no Triton for this card"),
        (True, False, "needs gcc and Python's headers to build its launcher (Failed to find C compiler."),
    ):
        monkeypatch.setattr("torch.utils._triton.has_triton", lambda there=has_triton: there)
        assert not train_gpt2.wants_compile(None, cuda)
        out = capsys.readouterr().out
        assert out.startswith("compile  off: ") and words in out and out.count("\n") == 1
        with pytest.raises(USER_ERRORS, match=f"^--compile: .*{re.escape(words)}"):
            train_gpt2.wants_compile(True, cuda)
    launcher.compiler = True
    assert train_gpt2.wants_compile(None, cuda) and train_gpt2.wants_compile(True, cuda)
    assert train_gpt2.wants_compile(True, cpu) and not train_gpt2.wants_compile(None, cpu)
    assert not train_gpt2.wants_compile(False, cuda) and not capsys.readouterr().out


def accelerator(monkeypatch, device: torch.device | None) -> None:
    """As if torch had found this one."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: int(device is not None))


A100, V100 = ("NVIDIA A100-SXM4-80GB", (8, 0)), ("Tesla V100-SXM2-16GB", (7, 0))


@pytest.mark.parametrize(
    "driver, wheel, card, words",
    [
        (None, None, None, ""),  # no NVIDIA card at all
        (None, "13.0", None, ""),
        ((13, 0), "13.0", A100, ""),
        ((13, 0), "13.0", V100, "no kernels for Tesla V100-SXM2-16GB, of compute capability 7.0; .*, 2.13.0.cu126$"),
        ((13, 0), "13.0", ("NVIDIA B300", (10, 3)), ""),  # sm_100's run on it
        ((13, 0), "13.0", ("NVIDIA R100", (11, 0)), "a newer torch may have them"),
        ((12, 2), "13.0", None, "knows CUDA up to 12.2, and .* needs 13.0; update the driver, or .* 2.13.0.cu126$"),
        ((11, 8), "13.0", None, "needs 13.0; update the driver$"),
        ((12, 2), None, None, "is built without CUDA"),
        ((13, 0), "13.0", None, "no card that CUDA can see"),
    ],
)
def test_an_nvidia_card_of_no_use_is_explained(driver, wheel, card, words, monkeypatch, capsys):
    """Asked for, it is an error; --device auto goes on, on the CPU, only where torch sees no card, and says so."""
    cuda = torch.cuda
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(hardware, "driver_cuda", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", wheel)
    monkeypatch.setattr(cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(cuda, "device_count", lambda: int(card is not None))
    monkeypatch.setattr(cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"])
    monkeypatch.setattr(cuda, "get_device_name", lambda index=0: card[0])
    monkeypatch.setattr(cuda, "get_device_capability", lambda index=0: card[1])
    accelerator(monkeypatch, card and torch.device("cuda"))
    assert hardware.find_device("cpu").type == "cpu" and not capsys.readouterr().err
    for name in ("auto", "cuda"):
        if card and not words:
            assert hardware.find_device(name).type == "cuda"
        elif card or name == "cuda":
            with pytest.raises(ValueError, match=words or "there is none here"):
                hardware.find_device(name)
        else:
            assert hardware.find_device(name).type == "cpu"
    warned = capsys.readouterr().err.startswith("WARNING: training on cpu, not on CUDA: ")
    assert warned == bool(words and not card)


def test_mps_wants_a_newer_torch(monkeypatch):
    accelerator(monkeypatch, torch.device("mps"))
    monkeypatch.setattr(torch, "__version__", "2.12.1")
    with pytest.raises(USER_ERRORS, match=r"MPS needs torch 2\.13, not 2\.12\.1: .* or --device cpu"):
        hardware.find_device("mps")
    assert hardware.find_device("cpu").type == "cpu"
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert hardware.find_device("mps").type == "mps"


def test_fewer_sequences_than_ranks_is_one_line():
    config, shape = train_gpt2.Config(total_batch_size=32, seq_len=32), train_gpt2.GPTConfig(32, 384, 1, 1, 32)
    for micro_batch in (0, 1):
        with pytest.raises(USER_ERRORS, match=r"--seq_len 32 \* 2 ranks = 64; try --total_batch_size 64"):
            ranks = train_gpt2.Ranks(0, 2, torch.device("cpu"))
            train_gpt2.pick_micro_batch(
                train_gpt2.replace(config, micro_batch=micro_batch), shape, ranks, False, torch.float32
            )


def test_the_micro_batch_is_the_largest_divisor_that_should_fit():
    ranks, shape = train_gpt2.Ranks(0, 1, torch.device("cpu")), train_gpt2.GPTConfig(16, 384, 1, 1, 32)
    for n, T, expected in ((8, 512, 8), (9, 512, 3), (7, 1024, 1), (2**40, 1, 64), (3 * 2**40, 64, 64), (5, 8192, 1)):
        config = train_gpt2.Config(total_batch_size=n * T, seq_len=T)
        assert train_gpt2.pick_micro_batch(config, shape, ranks, False, torch.float32) == expected
