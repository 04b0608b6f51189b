"""What makes the trainer fast or small must not change what it computes: recompute, zero, bfloat16, micro-batches."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_train import interrupt, same_weights
from tiny import ROOT, launch, tiny_config, token_set

import machine
import train_gpt2
from cli import UserError
from train_gpt2 import lr_at, main, set_up, train_step


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def losses(config, steps: int) -> list[float]:
    run = set_up(config, machine.join_ranks("cpu"))
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


def test_zero_is_plain_adamw_and_its_checkpoints_are_anyones(data, tmp_path):
    """Two ranks with shared-out moments; then one rank without goes on from their checkpoint, and they from its."""
    for name, zero in (("plain", False), ("zero", True)):
        result = launch(tiny_config(data, tmp_path / name, micro_batch=4, zero=zero), 2)
        assert result.returncode == 0, result.stderr
    assert same_weights(tmp_path / "plain" / "ckpt_000010.pt", tmp_path / "zero" / "ckpt_000010.pt")
    for source, zero in (("zero", False), ("plain", True)):
        interrupt(tmp_path / source, tmp_path / f"{source}_on", 5)
        result = launch(tiny_config(data, tmp_path / f"{source}_on", micro_batch=4, zero=zero, resume=True), 2)
        assert result.returncode == 0, result.stderr
        assert same_weights(tmp_path / "plain" / "ckpt_000010.pt", tmp_path / f"{source}_on" / "ckpt_000010.pt")


def test_a_sharded_optimizers_step_counts_are_where_its_parameters_are():
    """ZeroRedundancyOptimizer.load_state_dict leaves them on the CPU; fused AdamW on CUDA refuses that."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))

    class Sharded:
        param_groups = ()
        optim = torch.optim.AdamW([parameter])

        def load_state_dict(self, state):
            self.optim.state[parameter] = {"step": torch.tensor(state["step"]), "exp_avg": torch.empty_like(parameter)}

    machine.load_whole_state(Sharded(), {"step": 7.0})
    assert Sharded.optim.state[parameter]["step"].device == parameter.device


def test_a_bfloat16_residual_costs_no_more_than_autocast_does(tmp_path, monkeypatch):
    """Distance from the float32 curve: of autocast alone, and with the residual stream in bfloat16, too."""
    directory, seen, curves = token_set(tmp_path / "data", (700, 60 * 256 + 2)), [], []
    ours, forward = machine.casts_to_bfloat16, train_gpt2.Block.forward
    monkeypatch.setattr(
        train_gpt2.Block, "forward", lambda self, x, *rest: seen.append(x.dtype) or forward(self, x, *rest)
    )
    for dtype, low in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        monkeypatch.setattr(machine, "casts_to_bfloat16", ours if low else lambda device: False)
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

    def counting(graph, inputs):
        graphs.append(len(when))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    step = train_gpt2.train_step
    monkeypatch.setattr(train_gpt2, "train_step", lambda *args: when.append(1) or step(*args))
    torch._dynamo.reset()
    main(tiny_config(data, tmp_path / "log", compile=True, micro_batch=4, sample_every=3, val_every=2, val_tokens=224))
    assert graphs == [0]  # one graph, made by the rehearsal before the first step
    assert len(when) == 10


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batches that fit


def out_of_memory_over(limit: int):
    def rehearse(run, micro_batch):
        if micro_batch > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    return rehearse


@pytest.mark.parametrize("windows, limit, expected", [(8, 8, 8), (8, 3, 2), (12, 5, 3), (9, 4, 3), (6, 1, 1)])
def test_micro_batches_are_halved_until_they_fit(data, tmp_path, monkeypatch, windows, limit, expected):
    config = tiny_config(data, tmp_path / "log", total_batch_size=32 * windows, micro_batch=0)
    run = set_up(config, machine.join_ranks("cpu"))
    assert run.micro_batch == windows
    monkeypatch.setattr(machine, "rehearse", out_of_memory_over(limit))
    run.micro_batch = machine.fit_micro_batch(run)
    assert run.micro_batch == expected
    x, _, weights = run.batch(0)
    assert x.shape == (windows // expected, expected, 32) and sum(weights) == pytest.approx(1)


def test_what_does_not_fit_is_named(data, tmp_path, monkeypatch):
    run = set_up(tiny_config(data, tmp_path / "log", micro_batch=0), machine.join_ranks("cpu"))
    monkeypatch.setattr(machine, "rehearse", out_of_memory_over(0))
    with pytest.raises(UserError, match=r"one window.*--seq_len.*--model.*--recompute"):
        machine.fit_micro_batch(run)
    run = set_up(tiny_config(data, tmp_path / "log", micro_batch=4), machine.join_ranks("cpu"))
    with pytest.raises(UserError, match="out of memory with --micro_batch 4; leave it at 0"):
        machine.fit_micro_batch(run)


def test_other_errors_are_not_taken_for_a_lack_of_memory(data, tmp_path, monkeypatch):
    run = set_up(tiny_config(data, tmp_path / "log"), machine.join_ranks("cpu"))
    monkeypatch.setattr(machine, "rehearse", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        machine.fit_micro_batch(run)


def test_a_rehearsal_leaves_no_trace(data, tmp_path):
    config = tiny_config(data, tmp_path / "log")
    expected = losses(config, 3)
    run = set_up(config, machine.join_ranks("cpu"))
    machine.rehearse(run, 8)
    assert all(p.grad is None for p in run.raw_model.parameters()) and not run.optimizer.state
    assert [float(train_step(run, run.batch(k), lr_at(k, config))[0]) for k in range(3)] == expected


RANK = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
import machine, train_gpt2
from tiny import tiny_config
ranks = machine.join_ranks("cpu")
def rehearse(run, micro_batch):
    if micro_batch > (8 if ranks.rank == 0 else 2):
        raise torch.OutOfMemoryError("CUDA out of memory")
machine.rehearse = rehearse
run = train_gpt2.set_up(tiny_config({data!r}, {log!r}, total_batch_size=512, micro_batch=0), ranks)
before, run.micro_batch = run.micro_batch, machine.fit_micro_batch(run)
loss = train_gpt2.train_step(run, run.batch(0), 1e-3)[0]
mean = float(machine.sum_over_ranks(loss, ranks)) / 2
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


def test_the_estimate_grows_with_the_memory(monkeypatch):
    """124M on cards of 8, 24, 80 and 141 GB; recompute and zero make room; the micro-batch divides the batch."""
    ranks = machine.Ranks(0, 8, torch.device("cuda"))
    shape = train_gpt2.GPTConfig(vocab_size=50304)
    monkeypatch.setattr(machine, "least_over_ranks", lambda number, ranks: number)

    def pick(gigabytes, **settings):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gigabytes * 1e9, gigabytes * 1e9))
        return machine.pick_micro_batch(train_gpt2.Config(**settings), shape, ranks)

    sizes = [pick(gigabytes) for gigabytes in (8, 24, 80, 141)]
    assert sizes == sorted(sizes) and sizes[0] >= 4 and sizes[-1] == 64
    assert pick(8, recompute=True) > pick(8) and pick(4, zero=True) >= pick(4) and pick(1) == 1
    assert pick(141, total_batch_size=8 * 48 * 1024) == 48


def test_zero_alone_is_adamw(data, tmp_path):
    assert type(set_up(tiny_config(data, tmp_path / "log", zero=True), machine.join_ranks("cpu")).optimizer) is (
        torch.optim.AdamW
    )
