"""What makes the trainer fast or small must not change what it computes: recompute, zero, bfloat16, micro-batches."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_train import same_weights
from tiny import ROOT, USER_ERRORS, tiny_config, token_set

import train_gpt2
from extras import hardware
from train_gpt2 import Run, lr_at, main, train_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def losses(config, steps: int) -> list[float]:
    run = Run(config, train_gpt2.join_ranks("cpu"))
    return [float(train_step(run, run.batch(k), lr_at(k, config))[0]) for k in range(steps)]


# ----------------------------------------------------------------------------------------------------------------------
# The same numbers


def test_recompute_changes_memory_and_nothing_else(data, tmp_path, monkeypatch):
    calls, forward = [], train_gpt2.MLP.forward
    monkeypatch.setattr(train_gpt2.MLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts = []
    for recompute in (False, True):
        main(tiny_config(data, tmp_path / str(recompute), recompute=recompute, val_every=0))
        counts.append(len(calls))
    assert counts == [20, 20 + 40]  # 10 steps of 2 layers; and twice as many
    assert same_weights(tmp_path / "False" / "ckpt_000010.pt", tmp_path / "True" / "ckpt_000010.pt")


class WithDropout(train_gpt2.MLP):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


def test_with_dropout_recompute_draws_the_same_and_validation_draws_nothing(data, tmp_path, monkeypatch):
    """A fork may add it: what is computed twice must see the same mask, and evaluations must see none."""
    monkeypatch.setattr(train_gpt2, "MLP", WithDropout)
    config = tiny_config(data, tmp_path / "log", micro_batch=4)
    gradients = []
    for recompute in (False, True):
        run = Run(replace(config, recompute=recompute), train_gpt2.join_ranks("cpu"))
        x, y, _ = run.batch(0)
        torch.manual_seed(1)
        run.raw_model(x[0], y[0].long())[1].backward()
        gradients.append([p.grad for p in run.raw_model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients)) and run.raw_model.training
    last, values = main(replace(config, max_steps=1)), []
    for max_steps in (2, 3):  # an evaluation of the same weights, twice
        shutil.copytree(tmp_path / "log", tmp_path / f"log{max_steps}")
        with monkeypatch.context() as patch:
            patch.setattr(train_gpt2, "lr_at", lambda step, config: 0.0)
            longer = replace(config, log_dir=str(tmp_path / f"log{max_steps}"), resume=True, max_steps=max_steps)
            values.append(main(longer))
    assert values[0]["val"] == values[1]["val"] == last["val"]


def test_a_bfloat16_residual_costs_no_more_than_autocast_does(tmp_path, monkeypatch):
    """Distance from the float32 curve: of autocast alone, and with the residual stream in bfloat16, too."""
    directory, seen, curves = token_set(tmp_path / "data", (700, 60 * 256 + 2)), [], []
    ours, forward = train_gpt2.casts_to_bfloat16, train_gpt2.Block.forward
    monkeypatch.setattr(
        train_gpt2.Block, "forward", lambda self, x, *rest: seen.append(x.dtype) or forward(self, x, *rest)
    )
    for dtype, low in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        monkeypatch.setattr(train_gpt2, "casts_to_bfloat16", ours if low else lambda device: False)
        config = tiny_config(directory, tmp_path / "unused", dtype=dtype, n_layer=4, max_steps=60, n_embd=64)
        curves.append(np.array(losses(config, 60)))
        assert set(seen) == {torch.bfloat16 if low else torch.float32}
        seen.clear()
    exact, autocast, residual = curves
    assert exact[-1] < exact[0] - 1
    assert 0 < np.abs(autocast - exact).max() < 0.02 and np.abs(residual - exact).max() < 0.02
    assert abs((residual - exact)[-20:].mean()) < 0.005


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


def test_nothing_is_compiled_after_the_first_step(data, tmp_path, monkeypatch):
    """Evaluations, samples, saving and a smaller last batch of the val split go on beside the compiled step."""
    graphs, when = [], []

    def counting(graph, inputs, options):
        graphs.append(len(when))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    step = train_gpt2.train_step
    monkeypatch.setattr(train_gpt2, "train_step", lambda *args: when.append(1) or step(*args))
    torch._dynamo.reset()
    main(tiny_config(data, tmp_path / "log", compile=True, micro_batch=4, sample_every=3, val_every=2, val_tokens=224))
    assert graphs == [0]  # one graph, made by the trial before the first step
    assert len(when) == 10


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches that fit


def out_of_memory_over(limit: int):
    def try_micro_batch(run, micro_batch):
        if micro_batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    return try_micro_batch


@pytest.mark.parametrize("sequences, limit, expected", [(8, 8, 8), (8, 3, 2), (12, 5, 3), (9, 4, 3), (6, 1, 1)])
def test_micro_batches_are_halved_until_they_fit(data, tmp_path, monkeypatch, sequences, limit, expected):
    config = tiny_config(data, tmp_path / "log", total_batch_size=32 * sequences, micro_batch=0)
    run = Run(config, train_gpt2.join_ranks("cpu"))
    assert run.micro_batch == sequences
    monkeypatch.setattr(hardware, "try_micro_batch", out_of_memory_over(limit))
    run.micro_batch = hardware.fit_micro_batch(run, train_gpt2.any_rank)
    assert run.micro_batch == expected
    x, _, weights = run.batch(0)
    assert x.shape == (sequences // expected, expected, 32) and sum(weights) == pytest.approx(1)


def test_what_does_not_fit_is_named(data, tmp_path, monkeypatch):
    run = Run(tiny_config(data, tmp_path / "log", micro_batch=0), train_gpt2.join_ranks("cpu"))
    monkeypatch.setattr(hardware, "try_micro_batch", out_of_memory_over(0))
    with pytest.raises(USER_ERRORS, match=r"with --micro_batch 1; lower --seq_len.*--model.*--recompute"):
        hardware.fit_micro_batch(run, train_gpt2.any_rank)
    run = Run(tiny_config(data, tmp_path / "log", micro_batch=4), train_gpt2.join_ranks("cpu"))
    with pytest.raises(USER_ERRORS, match="out of memory with --micro_batch 4; leave --micro_batch at 0"):
        hardware.fit_micro_batch(run, train_gpt2.any_rank)


def test_other_errors_are_not_taken_for_a_lack_of_memory(data, tmp_path, monkeypatch):
    run = Run(tiny_config(data, tmp_path / "log"), train_gpt2.join_ranks("cpu"))
    monkeypatch.setattr(hardware, "try_micro_batch", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        hardware.fit_micro_batch(run, train_gpt2.any_rank)


def test_a_trial_leaves_no_trace(data, tmp_path):
    config = tiny_config(data, tmp_path / "log")
    expected = losses(config, 3)
    run = Run(config, train_gpt2.join_ranks("cpu"))
    hardware.try_micro_batch(run, 8)
    assert all(p.grad is None for p in run.raw_model.parameters()) and not run.optimizer.state
    assert [float(train_step(run, run.batch(k), lr_at(k, config))[0]) for k in range(3)] == expected


RANK = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import train_gpt2
from extras import hardware
from tiny import tiny_config
ranks = train_gpt2.join_ranks("cpu")
def try_micro_batch(run, micro_batch):
    if micro_batch > (8 if ranks.rank == 0 else 2):
        raise torch.OutOfMemoryError("CUDA out of memory")
hardware.try_micro_batch = try_micro_batch
run = train_gpt2.Run(tiny_config({data!r}, {log!r}, total_batch_size=512, micro_batch=0), ranks)
before, run.micro_batch = run.micro_batch, hardware.fit_micro_batch(run, train_gpt2.any_rank)
loss = train_gpt2.train_step(run, run.batch(0), 1e-3)[0]
mean = float(train_gpt2.all_reduce(loss, ranks)) / 2
print(f"rank {{ranks.rank}}: {{before}} {{run.micro_batch}} {{mean:.6f}}\\n", end="", flush=True)
torch.distributed.destroy_process_group()
"""


def test_all_ranks_halve_together(data, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(root=str(ROOT), tests=str(ROOT / "tests"), data=str(data), log=str(tmp_path / "log")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = sorted(line for line in result.stdout.splitlines() if line.startswith("rank"))
    loss = losses(tiny_config(data, tmp_path / "log", total_batch_size=512, micro_batch=16), 1)[0]
    assert [line.split()[2:4] for line in lines] == [["8", "2"]] * 2
    assert [float(line.split()[-1]) for line in lines] == [pytest.approx(loss, abs=1e-5)] * 2


def estimate(monkeypatch, gib: float, size="gpt2", W=1, compiled=True, dtype=torch.bfloat16, **settings) -> int:
    """The micro-batch on a card of so many GiB: half a GiB is CUDA's own, and the weights are there already."""
    shape = train_gpt2.GPTConfig(vocab_size=50304, **train_gpt2.SIZES[size])
    weights = 4 * (12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd)
    free = (gib - 0.5) * 2**30 - weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, gib * 2**30))
    config, ranks = train_gpt2.Config(model=size, **settings), train_gpt2.Ranks(0, W, torch.device("cuda"))
    return train_gpt2.pick_micro_batch(config, shape, ranks, compiled, dtype)


def test_the_estimate_is_what_was_measured(monkeypatch):
    """Peaks beyond 16 bytes a parameter, measured on an H200 or (*) computed by bench/gpuless.py: a step must fit."""
    pick = partial(estimate, monkeypatch)
    parameters, slope = 124.5e6, {"compiled": 402e3, "eager": 342e3, "recompute": 123e3}  # the first and the last *
    constant = {"compiled": 2 * parameters, "eager": 13 * hardware.HEAD_ROWS * 50304, "recompute": 2 * parameters}
    for how, settings in (("compiled", {}), ("eager", {"compiled": False}), ("recompute", {"recompute": True})):
        for gib in (7.6, 15.6, 23.5, 39.4, 79.1):
            B = pick(gib, **settings)
            needed = 16 * parameters + constant[how] + 1024 * slope[how] * B
            double = needed + 1024 * slope[how] * B
            room = (gib - 0.5) * 2**30
            assert needed < 0.95 * room and (B == 64 or double > 0.75 * room), (how, gib, B)
    assert pick(23.5) == 32 and pick(39.4) == 64
    assert pick(23.5, dtype=torch.float32) == 16 and pick(7.6, W=8) <= pick(7.6)
    assert pick(1) == 1 and pick(79.1, W=8, total_batch_size=8 * 48 * 1024) == 48


def test_the_readme_has_the_estimates(monkeypatch):
    gib = {"24 GB": 23.5, "40 GB": 39.4, "80 GB": 79.1, "141 GB": 139.7}  # of each what CUDA says there is
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [row.split(" | ") for row in text.splitlines() if re.search(r"\| \d+ GB \|", row)]
    assert len(rows) >= 6
    for _, memory, small, _, *others in rows:
        for size, cell in zip(train_gpt2.SIZES, [small, *others]):
            B = estimate(monkeypatch, gib[memory], size)
            assert cell.strip("| ").startswith("no" if B == 1 else str(B)), (memory, size, B)
