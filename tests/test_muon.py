"""Muon against a float64 SVD, against torch's own, one by one, over ranks; and the recipe that uses it."""

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_train import interrupt, same_weights
from tiny import USER_ERRORS, bytes_of, launch, read_log, tiny_config, token_set

import train_gpt2
from extras import cli, muon
from train_gpt2 import (
    GPT,
    RECIPES,
    Config,
    GPTConfig,
    lr_at,
    main,
    make_model,
    make_optimizer,
    resolve,
)

FAST = {"recipe": "fast", "muon_lr": 1e-2}  # tiny_config sets the other rates
RUN = FAST | {"order": "shuffle", "micro_batch": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def draw(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=2, n_head=2, n_embd=16))


def muon_of(model: GPT) -> muon.Muon:
    settings = {"muon_lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "dtype": torch.float32}
    return muon.make_muon(model.named_parameters(), **settings, lr=0.01, fused=True)


def give_gradients(model: GPT, seed: int) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = draw(*parameter.shape, seed=100 * seed + i)


# ----------------------------------------------------------------------------------------------------------------------
# The iteration and the update


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 96), (1, 1, 8)])
@pytest.mark.parametrize("dtype, condition, tolerance", [(torch.float32, 200, 1e-4), (torch.bfloat16, 20, 0.03)])
def test_orthogonalization_is_the_svds(shape, dtype, condition, tolerance):
    u, _, v = torch.linalg.svd(draw(*shape).double(), full_matrices=False)
    stack = (u * torch.logspace(0, -math.log10(condition), shape[1], dtype=torch.float64)) @ v
    for scale in (1e-6, 1.0, 1e4):
        ours = muon.orthogonalize((scale * stack).float(), dtype).double()
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.87 and values.max() < 1.13  # what the five polynomials promise above 0.001
        turned = u.mT @ ours @ v.mT  # diagonal, if the singular vectors are the SVD's
        assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < tolerance
        assert turned.diagonal(dim1=1, dim2=2).min() > 0.87
    assert not muon.orthogonalize(torch.zeros(shape), dtype).any()


def test_a_stack_is_its_matrices_one_by_one(monkeypatch):
    stack = draw(5, 12, 40)
    alone = torch.cat([muon.orthogonalize(stack[i : i + 1], torch.float32) for i in range(5)])
    torch.testing.assert_close(muon.orthogonalize_together(stack, torch.float32), alone, atol=1e-5, rtol=0)
    monkeypatch.setattr(muon, "LARGEST", 2 * 12 * 40)
    torch.testing.assert_close(muon.orthogonalize_together(stack, torch.float32), alone, atol=1e-5, rtol=0)


def test_two_updates_are_what_the_formulas_say():
    """Each of the blocks' matrices alone, queries, keys and values apart; plain AdamW on the rest."""
    model, rest = tiny_model(), tiny_model()
    optimizer, expected = muon_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    others = [p for name, p in rest.named_parameters() if not (".h." in name and p.dim() == 2)]
    groups = [{"params": [p for p in others if p.dim() == d], "weight_decay": 0.1 * (d == 2)} for d in (2, 1)]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    means = {}
    for seed in (1, 2):
        give_gradients(model, seed)
        give_gradients(rest, seed)
        for name, parameter in model.named_parameters():
            if ".h." not in name or parameter.dim() != 2:
                continue
            for i, grad in enumerate(parameter.grad.split(16) if "c_attn" in name else [parameter.grad]):
                means[name, i] = 0.9 * means.get((name, i), 0) + 0.1 * grad
                ahead = (0.9 * means[name, i] + 0.1 * grad).double()
                tall = ahead.shape[0] > ahead.shape[1]
                factor = muon.orthogonalize((ahead.mT if tall else ahead)[None], torch.float64)[0]
                factor = factor.mT if tall else factor
                rows = expected[name][16 * i : 16 * i + len(grad)]
                rows *= 1 - 0.02 * 0.1
                rows -= 0.02 * 0.2 * math.sqrt(max(grad.shape)) * factor
        optimizer.step()
        adamw.step()
    for name, parameter in rest.named_parameters():
        if any(parameter is other for other in others):
            expected[name] = parameter
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=2e-6, rtol=0)


def test_one_matrix_moves_as_with_torchs_muon(monkeypatch):
    """With Jordan's polynomials, whose first undoes our division by 1.01, torch's conventions are ours."""
    a, b, c = 3.4445, -4.7750, 2.0315
    polynomials = [(1.01 * a, 1.01**3 * b, 1.01**5 * c)] + 4 * [(a, b, c)]
    monkeypatch.setattr(muon, "POLYNOMIALS", polynomials)
    ours, theirs = (torch.nn.Parameter(draw(24, 40)) for _ in range(2))
    group = {"params": [ours], "parts": 1, "momentum": 0.95, "lr_ratio": 2.0, "weight_decay": 0.1}
    mine = muon.Muon([group], torch.bfloat16, lr=0.01, fused=True)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for seed in range(1, 5):
        ours.grad, theirs.grad = draw(24, 40, seed=seed), draw(24, 40, seed=seed)
        mine.step()
        torchs.step()
    moved = (ours - draw(24, 40)).abs().mean()
    assert (ours - theirs).abs().mean() < 0.03 * moved  # both round to bfloat16, at other places


def test_an_update_without_a_finite_gradient_changes_nothing():
    model = tiny_model()
    optimizer = muon_of(model)
    for seed, bad in ((1, 0.0), (2, 1.0), (3, 0.0)):
        give_gradients(model, seed)
        optimizer.found_inf = torch.tensor(bad)
        if bad:
            for parameter in model.parameters():
                parameter.grad.fill_(math.nan)
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step()
        if bad:
            torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, atol=0, rtol=0)
    straight = tiny_model()
    unflagged = muon_of(straight)
    for seed in (1, 3):
        give_gradients(straight, seed)
        unflagged.step()
    for one, other in zip(model.parameters(), straight.parameters()):
        assert torch.equal(one, other)


def test_float16_skips_what_overflows_and_then_learns(data, tmp_path, monkeypatch):
    """GradScaler begins with a scale that overflows, and halves it until it finds its own."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**24))
    main(tiny_config(data, tmp_path, dtype="float16", max_steps=20, **FAST))
    log = read_log(tmp_path)
    assert 0 < len(log["skipped"]) < 10
    assert log["train"][19] < log["train"][0] - 0.2 and all(map(math.isfinite, log["train"].values()))


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def weights_of(log_dir: Path, step: int) -> dict:
    return train_gpt2.read_checkpoint(train_gpt2.checkpoint_path(log_dir, step))["model"]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The run on one rank, uninterrupted."""
    log_dir = tmp_path_factory.mktemp("alone") / "log"
    main(tiny_config(data, log_dir, **RUN))
    return log_dir


@pytest.mark.parametrize("ranks", [2, 4])  # 4 ranks have stacks of 6, 2 and 4 matrices to share: some get none
def test_ranks_share_the_work_and_change_nothing(data, alone, tmp_path, ranks):
    result = launch(tiny_config(data, tmp_path / "log", **RUN), ranks)
    assert result.returncode == 0, result.stderr
    expected, log = read_log(alone), read_log(tmp_path / "log")
    for name in ("train", "norm", "val"):
        assert list(log[name].values()) == pytest.approx(list(expected[name].values()), abs=2e-4)
    for name, tensor in weights_of(tmp_path / "log", 10).items():
        torch.testing.assert_close(tensor, weights_of(alone, 10)[name], atol=2e-4, rtol=0)
    if ranks == 2:
        resume(tmp_path / "log", tmp_path / "resumed", lambda config: launch(config, ranks), data)


def resume(straight, log_dir, go, data):
    """Interrupt a copy of a run, go on, and compare: bit for bit."""
    interrupt(straight, log_dir, 5)
    go(tiny_config(data, log_dir, resume=True, **RUN))
    logs = [read_log(directory) for directory in (straight, log_dir)]
    assert logs[0]["train"] == logs[1]["train"] and logs[0]["val"] == logs[1]["val"] and len(logs[1]["train"]) == 10
    assert same_weights(straight / "ckpt_000010.pt", log_dir / "ckpt_000010.pt")


def test_a_resumed_run_is_bit_for_bit_the_run(data, alone, tmp_path):
    resume(alone, tmp_path / "resumed", main, data)
    assert bytes_of(alone / "ckpt_000010.pt") == bytes_of(tmp_path / "resumed/ckpt_000010.pt")
    with pytest.raises(USER_ERRORS, match="has another optimizer"):
        main(tiny_config(data, tmp_path / "resumed", resume=True, order="shuffle"))


def test_a_fast_run_exports_a_plain_gpt2(alone, tmp_path):
    from transformers import GPT2LMHeadModel

    model = GPT.from_checkpoint(alone / "ckpt_000010.pt")
    model.save_pretrained(tmp_path / "exported")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "exported").eval()
    idx = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(idx)[0][..., :257], theirs(idx).logits, atol=1e-5, rtol=0)
    assert theirs.transformer.h[0].attn.c_proj.weight.any()  # from zero, it has learned


def test_a_recipe_put_into_a_made_config_is_the_one_that_trains(data, tmp_path):
    """And the log tells the values that were used."""
    plain = {"max_lr": None, "min_lr": None, "warmup_steps": None, "max_steps": 1}
    main(replace(tiny_config(data, tmp_path / "log", **plain), recipe="fast"))
    log = (tmp_path / "log" / "log.txt").read_text()
    used = json.loads(next(line for line in log.splitlines() if line.startswith("# config"))[9:])
    assert {name: used[name] for name in RECIPES["fast"]} == RECIPES["fast"] and used["recipe"] == "fast"
    assert read_log(tmp_path / "log")["lr"][0] == pytest.approx(1.8e-3 / 250)


# ----------------------------------------------------------------------------------------------------------------------
# The recipe


def test_the_papers_recipe_is_what_it_was():
    config, model = resolve(Config(n_layer=1, n_head=1, n_embd=8)), tiny_model()
    assert (config.max_lr, config.min_lr, config.warmup_steps, config.schedule) == (6e-4, 6e-5, 715, "cosine")
    optimizer = make_optimizer(model, config)
    assert type(optimizer) is torch.optim.AdamW
    decayed, others = optimizer.param_groups
    assert [len(decayed["params"]), len(others["params"])] == [2 + 4 * 2, 2 + 8 * 2]
    for group, decay in ((decayed, 0.1), (others, 0.0)):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (6e-4, (0.9, 0.95), 1e-8, decay)
    assert make_model(config, 257).transformer.h[0].mlp.c_proj.weight.std() > 0.01


def test_what_is_said_goes_before_the_recipe():
    said = resolve(cli.parse(Config, "", ["--recipe", "fast", "--muon_lr=0.5", "--no-compile", "--warmup_steps=0"]))
    assert (said.muon_lr, said.compile, said.warmup_steps, said.schedule) == (0.5, False, 0, "linear")
    fast = resolve(replace(Config(), recipe="fast"))
    assert fast.muon_lr > 0 and fast.min_lr == 0 and fast.schedule == "linear"
    with pytest.raises(USER_ERRORS, match="--recipe slow"):
        main(Config(recipe="slow"))
    with pytest.raises(USER_ERRORS, match="it must be 0 or more, and less than 1"):
        main(Config(recipe="fast", muon_momentum=1.0))


def test_the_line_to_zero_at_its_corners():
    config = resolve(Config(recipe="fast", max_lr=2e-3, min_lr=0.0, warmup_steps=10, max_steps=110))
    expected = {0: 2e-4, 9: 2e-3, 10: 2e-3, 60: 1e-3, 109: 2e-5, 110: 0.0}
    assert {step: lr_at(step, config) for step in expected} == pytest.approx(expected)
    optimizer = make_optimizer(tiny_model(), config)
    ratios = [group["lr_ratio"] for group in optimizer.param_groups if "parts" in group]
    assert ratios == pytest.approx(3 * [config.muon_lr / 2e-3])
