"""What a run says on the screen: its head, its steps, its evaluations, and a last block for grep."""

import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config, token_set

import train_gpt2
from extras import hardware, screen
from train_gpt2 import main


def test_the_screen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(screen, "peak_flops", lambda device: 1e12)  # as if the card were known
    main(tiny_config(token_set(tmp_path / "data"), tmp_path / "log", log_every=5))
    lines = capsys.readouterr().out.splitlines()
    head = {line.split()[0]: line for line in lines[:5]}
    assert list(head) == ["device", "model", "data", "step", "run"]
    assert re.search(r"cpu \(\d+ of \d+ threads, [\d.]+ GiB\), eager, float32", head["device"])
    assert "38,784 parameters: 2 layers, 2 heads, width 32" in head["model"]
    assert "5,472 train tokens (bytes), 21 steps an epoch" in head["data"]
    assert "256 tokens: micro-batch 8 x 32 tokens x ranks 1 x accumulation 1" in head["step"]
    flops = 2560 * hardware.flops_per_token(SimpleNamespace(n_layer=2, n_embd=32, vocab_size=384), 32)
    assert f"10 steps, 2,560 tokens, 0.47 epochs, {flops:.1e} FLOP" in head["run"]
    assert [line[:10] for line in lines if line.startswith("EVAL")] == ["EVAL     0", "EVAL     5", "EVAL    10"]
    steps = [line for line in lines if line.startswith("step ") and " | loss " in line]
    assert all(re.search(r"\| lr .* \| norm .* ms \| .* tok/s \| MFU [\d.]+% \| .* left$", line) for line in steps)
    facts = dict(line.split(": ") for line in lines[lines.index("step: 10") :])
    assert {"val", "train", "bpb", "norm", "tokens_per_second", "training_seconds", "total_seconds"} <= facts.keys()
    assert all(float(value) >= 0 for value in facts.values()) and {"mfu_percent", "peak_memory_gib"} <= facts.keys()


@pytest.mark.parametrize(
    "step, validations, samples",
    [(-1, 11, 5), (0, 10, 4), (99, 10, 4), (100, 9, 4), (899, 2, 2), (900, 1, 1), (999, 1, 1)],
)
def test_evaluations_to_come(step, validations, samples):
    """With validations of 4 s and samples of 1 s: at 0, 100 ... 1000, and at 0, 300, 600, 900, 1000."""
    config = train_gpt2.Config(max_steps=1000, val_every=100, sample_every=300)
    run = SimpleNamespace(config=config, ranks=SimpleNamespace(world_size=1), device=torch.device("cpu"))
    run.raw_model = SimpleNamespace(config=train_gpt2.GPTConfig())
    shown = screen.progress(run, step + 1, 0.6, {"val_every": 4.0, "sample_every": 1.0})
    left = timedelta(seconds=round((999 - step) * 0.6 + 4 * validations + samples))
    assert shown == f" | MFU n/a | {left} left"


CARDS = {
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA GH200 480GB": 989, "NVIDIA GeForce RTX 4090": 165.2, "NVIDIA L4": 121,
    "NVIDIA L40S": 362, "NVIDIA H100 PCIe": 0, "NVIDIA H100 NVL": 0, "NVIDIA L40": 0, "NVIDIA RTX A1000": 0,
    "NVIDIA GeForce RTX 4090 D": 0, "NVIDIA GeForce RTX 4090 Laptop GPU": 0, "NVIDIA GeForce RTX 3090 Ti": 0,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": 0, "Tesla T4": 65, "NVIDIA B200": 2250, "NVIDIA GB200": 0, "NVIDIA GB10": 0,
    "NVIDIA A10G": 70, "NVIDIA A10": 0, "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 0,
    "NVIDIA GeForce RTX 4080": 97.5, "NVIDIA GeForce RTX 4080 SUPER": 0, "AMD Instinct MI300X": 1307.4,
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_no_card_is_taken_for_another(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda")) == CARDS[name] * 1e12


def test_a_run_of_a_thousand_epochs_is_noted(tmp_path, capsys):
    data = token_set(tmp_path / "data", (700, 300))
    main(tiny_config(data, tmp_path / "log", max_steps=150, val_every=0, n_layer=1))
    note = r"^note +1\d\d epochs: the model will learn these \d+ tokens by heart$"
    assert re.search(note, capsys.readouterr().out, re.M)
