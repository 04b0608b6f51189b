"""The trainer against references: a plain loop, other splits of the batch, and itself without the interruption."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import USER_ERRORS, flags, launch, read_log, tiny_config, token_set

import train_gpt2
from extras import cli
from extras.reference import remarks
from train_gpt2 import Config, GPTConfig, lr_at, main, make_model, resolve


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def plain_loop(config: Config, targets_of=None, skip=()) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the run, as one would write it without accumulation, ranks, autocast or fusion."""
    tokens = torch.from_numpy(np.load(shards_of(config, "train")[0]).astype(np.int64))
    model = make_model(config, 257)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, G, T = [], [], config.total_batch_size // config.seq_len, config.seq_len
    for step in range(config.max_steps):
        span = slice(step * G * T, (step + 1) * G * T + 1)
        x, y = tokens[span][:-1].view(G, T), tokens[span][1:].view(G, T)
        if targets_of is not None:
            y = torch.where(targets_of[span][1:].view(G, T), y, -100)
        logits, _ = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        norms.append(math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters())))
        for p in model.parameters():
            p.grad *= min(1.0, config.grad_clip / (norms[-1] + 1e-6))
        progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        cosine = config.min_lr + (config.max_lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.max_lr * (step + 1) / config.warmup_steps if step < config.warmup_steps else cosine
        if step not in skip:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def shards_of(config: Config, split: str) -> list[Path]:
    return sorted(Path(config.data_dir).glob(f"*_{split}_??????.npy"))


def logged(log_dir) -> tuple[list[float], list[float]]:
    log = read_log(log_dir)
    return [log["train"][k] for k in sorted(log["train"])], [log["norm"][k] for k in sorted(log["norm"])]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """20 steps of 8 sequences within the first train shard, and what a plain loop makes of them."""
    directory = token_set(tmp_path_factory.mktemp("long"), (700, 20 * 256 + 2, 300))
    config = tiny_config(directory, "unused", max_steps=20)
    return config, plain_loop(config)


@pytest.mark.parametrize("micro_batch, ranks", [(8, 1), (4, 1), (2, 1), (2, 2)])
def test_losses_and_norms_are_those_of_a_plain_loop(reference, tmp_path, micro_batch, ranks):
    config, expected = reference
    config = Config(**vars(config) | {"log_dir": str(tmp_path / "log"), "micro_batch": micro_batch})
    if ranks == 1:
        main(config)
    else:
        result = launch(config, ranks)
        assert result.returncode == 0, result.stderr
    losses, norms = logged(config.log_dir)
    assert losses == pytest.approx(expected[0], abs=1e-5)
    assert norms == pytest.approx(expected[1], abs=1e-5)  # clipping would hide a wrong scale of the gradient
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("micro_batch, ranks", [(8, 1), (2, 1), (2, 2)])
def test_the_loss_is_the_mean_over_target_tokens_however_they_fall(tmp_path, micro_batch, ranks):
    length = 6 * 256 + 2
    rng, mask = np.random.default_rng(1), np.zeros(length, dtype=bool)
    mask[: 3 * 256] = rng.random(3 * 256) < 0.3
    mask[3 * 256 + 5 : 3 * 256 + 20] = True  # in step 3 all the targets are in one window
    mask[4 * 256 :] = rng.random(length - 4 * 256) < 0.05
    masks = [np.ones(700), mask, np.ones(300)]
    directory = token_set(tmp_path / "data", (700, length, 300), masks=masks)
    config = tiny_config(directory, tmp_path / "log", max_steps=6, micro_batch=micro_batch)
    result = launch(config, ranks) if ranks > 1 else main(config)
    assert ranks == 1 or result.returncode == 0, result.stderr
    expected = plain_loop(config, torch.from_numpy(mask))
    assert logged(config.log_dir)[0] == pytest.approx(expected[0], abs=1e-5)
    assert logged(config.log_dir)[1] == pytest.approx(expected[1], abs=1e-5)


def test_validation_is_on_the_same_tokens_for_any_micro_batch(data, tmp_path):
    values = []
    for i, (micro_batch, val_tokens) in enumerate([(8, 320), (2, 320), (1, 320), (8, 10**9)]):
        config = tiny_config(data, tmp_path / str(i), micro_batch=micro_batch, val_tokens=val_tokens, max_steps=1)
        values.append(main(config)["val"])
    assert values[0] == pytest.approx(values[1], abs=1e-6) == pytest.approx(values[2], abs=1e-6)
    model = train_gpt2.GPT.from_checkpoint(tmp_path / "3" / "ckpt_000001.pt")
    tokens = torch.from_numpy(np.load(shards_of(config, "val")[0]).astype(np.int64))
    x, y = tokens[: 62 * 32].view(-1, 32), tokens[1 : 62 * 32 + 1].view(-1, 32)  # 2000 tokens are 62 sequences
    assert values[3] == pytest.approx(F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).item(), abs=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_is_the_same_when_the_ranks_do_not_divide_the_sequences(data, tmp_path, ranks):
    """7 sequences on 2 and 3 ranks: each is counted once, and the sums of all ranks make the value."""
    settings = {"val_tokens": 7 * 32, "total_batch_size": 192, "micro_batch": 1, "max_steps": 1}
    expected = main(tiny_config(data, tmp_path / "one", **settings))
    result = launch(tiny_config(data, tmp_path / "log", **settings), ranks)
    assert result.returncode == 0, result.stderr
    found = read_log(tmp_path / "log")
    assert found["val"][0] == pytest.approx(read_log(tmp_path / "one")["val"][0], abs=1e-6)
    assert found["val"][1] == pytest.approx(expected["val"], abs=1e-5)


def test_a_run_resumed_from_an_older_checkpoint_returns_its_own_values(data, tmp_path, capsys):
    """The log has later steps, of a history that this run is not; no number of it may be given as this run's."""
    config = tiny_config(data, tmp_path / "log", max_steps=10, save_every=4, val_every=2, keep_checkpoints=0)
    first = main(config)
    for step in (8, 10):
        train_gpt2.checkpoint_path(tmp_path / "log", step).unlink()
    capsys.readouterr()
    last = main(Config(**vars(config) | {"resume": True, "max_steps": 6, "val_every": 3}))
    said = capsys.readouterr().out
    assert last["val"] == pytest.approx(read_log(tmp_path / "log")["val"][6], abs=1e-6) and last["val"] != first["val"]
    assert "\nstep: 6\n" in said and f"\nval: {last['val']:.6g}\n" in said
    done = json.loads((tmp_path / "log" / "log.txt").read_text().split("# done ")[-1])
    assert done["step"] == 6 and done["val"] == last["val"] and done["train"] == last["train"]


def interrupt(straight, log_dir, step: int) -> None:
    """A copy of a finished run, as it would be had it been killed a little after the checkpoint of `step`."""
    shutil.copytree(straight, log_dir)
    for path in log_dir.glob("ckpt_*.pt"):
        if path != train_gpt2.checkpoint_path(log_dir, step):
            path.unlink()
    lines = (log_dir / "log.txt").read_text().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if line.startswith(f"{step + 2} train"))
    (log_dir / "log.txt").write_text("".join(lines[:kept]) + f"{step + 2} tra")


def same_weights(a, b) -> bool:
    a, b = train_gpt2.read_checkpoint(a), train_gpt2.read_checkpoint(b)
    moments = [state["optimizer"]["state"] for state in (a, b)]
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"]) and all(
        torch.equal(moments[0][i][key], moments[1][i][key]) for i in moments[0] for key in moments[0][i]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_for_bit_the_run(data, tmp_path, ranks):
    go = (lambda config: launch(config, ranks)) if ranks > 1 else main
    straight = tiny_config(data, tmp_path / "straight", order="shuffle", micro_batch=2)
    go(straight)
    interrupt(tmp_path / "straight", tmp_path / "resumed", 5)
    go(Config(**vars(straight) | {"log_dir": str(tmp_path / "resumed"), "resume": True}))
    logs = [read_log(tmp_path / name) for name in ("straight", "resumed")]
    for name in ("train", "val", "bpb", "norm", "lr"):
        assert logs[0][name] == logs[1][name] and max(logs[1][name]) >= 9
    assert "# restart" in (tmp_path / "resumed" / "log.txt").read_text()
    assert same_weights(tmp_path / "straight" / "ckpt_000010.pt", tmp_path / "resumed" / "ckpt_000010.pt")


def test_one_rank_goes_on_from_two_and_two_from_one(data, tmp_path):
    straight = tiny_config(data, tmp_path / "straight", order="shuffle", micro_batch=4)
    main(straight)
    expected = read_log(tmp_path / "straight")["train"]
    interrupt(tmp_path / "straight", tmp_path / "other", 5)
    other = Config(**vars(straight) | {"log_dir": str(tmp_path / "other"), "resume": True, "micro_batch": 2})
    result = launch(other, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "micro_batch was 4, is 2" in result.stdout
    resumed = read_log(tmp_path / "other")["train"]
    assert list(resumed.values()) == pytest.approx(list(expected.values()), abs=1e-5)


def test_a_checkpoint_is_plain_and_knows_nothing_of_wrapping(data, tmp_path, monkeypatch):
    main(tiny_config(data, tmp_path / "eager", max_steps=2))
    assert launch(tiny_config(data, tmp_path / "ddp", max_steps=2, micro_batch=4), 2).returncode == 0
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    main(tiny_config(data, tmp_path / "compiled", max_steps=2, compile=True))
    read = "import sys, torch; c = torch.load(sys.argv[1], weights_only=True); print(sorted(c), *sorted(c['model']))"
    shown = []
    for name in ("eager", "ddp", "compiled"):
        command = [sys.executable, "-c", read, str(tmp_path / name / "ckpt_000002.pt")]
        shown.append(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert shown[0] == shown[1] == shown[2]
    assert " transformer.h.0.attn.c_attn.weight " in shown[0] and "_orig_mod" not in shown[0]
    for key in ("model", "model_config", "optimizer", "loader", "step", "config", "versions"):
        assert f"'{key}'" in shown[0]


def test_compiled_losses_are_the_eager_ones(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    logs = []
    for name, compiled in (("eager", False), ("compiled", True)):
        config = tiny_config(data, tmp_path / name, compile=compiled, micro_batch=4, sample_every=5)
        main(config)
        logs.append(read_log(tmp_path / name))
    assert list(logs[0]["train"].values()) == pytest.approx(list(logs[1]["train"].values()), abs=1e-5)
    assert list(logs[0]["val"].values()) == pytest.approx(list(logs[1]["val"].values()), abs=1e-5)


def test_the_learning_rate_is_the_papers():
    config = resolve(Config())
    assert lr_at(0, config) == pytest.approx(6e-4 / 715)
    assert lr_at(714, config) == lr_at(715, config) == pytest.approx(6e-4)
    assert lr_at(715 + (19073 - 715) // 2, config) == pytest.approx((6e-4 + 6e-5) / 2)
    assert lr_at(19073, config) == pytest.approx(6e-5)
    assert lr_at(0, resolve(Config(warmup_steps=0, max_steps=1))) == pytest.approx(6e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def broken_weights(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "ckpt_000007.pt").write_bytes(b"not a zip")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_dir": "nowhere"}, "no train shards in 'nowhere'; run fineweb.py first"),
        ({"total_batch_size": 250}, r"--total_batch_size 250 is not a multiple of --seq_len 32; try 256"),
        ({"micro_batch": 3}, r"--micro_batch 3 \* --seq_len 32 \* 1 ranks = 96; try --micro_batch 2, or"),
        ({"n_embd": 33}, "n_embd 33 is not a multiple of n_head 2"),
        ({"seq_len": 4096, "total_batch_size": 4096}, "only 3000; lower it"),
        ({"max_steps": 0}, "--max_steps is 0"),
        ({"max_lr": -1.0}, "--max_lr is -1"),
        ({"min_lr": 1.0}, "--min_lr 1 is above --max_lr 0.003"),
        ({"init_from": "nowhere/nothing"}, "nowhere/nothing"),
        ({"init_from": "other.pt"}, "other.pt"),
        ({"device": "tpu9"}, "--device tpu9 is not a device"),
        ({"device": "cuda"}, "cuda devices: 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(data, tmp_path, monkeypatch, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(USER_ERRORS, match=message):
        main(tiny_config(data, tmp_path / "log", **changes))
    assert not (tmp_path / "log").exists()


def test_a_used_directory_is_refused_and_left_alone(data, tmp_path):
    config = tiny_config(data, tmp_path / "log", max_steps=2)
    main(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    with pytest.raises(USER_ERRORS, match="already holds a run: --resume goes on"):
        main(config)
    for changes in ({"seed": 5}, {"total_batch_size": 512}):
        with pytest.raises(USER_ERRORS, match=rf"same run: {next(iter(changes))} was \d+, is \d+; --force"):
            main(Config(**vars(config) | {"resume": True, "max_steps": 3} | changes))
    with pytest.raises(USER_ERRORS, match=r"another shape: n_layer was 2, is 3 .*give the flags it was made with"):
        main(Config(**vars(config) | {"resume": True, "force": True, "n_layer": 3}))
    with pytest.raises(USER_ERRORS, match="--epochs 2 and --max_steps 2: give one of them"):
        main(Config(**vars(config) | {"resume": True, "epochs": 2.0}))
    other = token_set(tmp_path / "other", (2000, 3100))
    with pytest.raises(USER_ERRORS, match="data was"):
        main(Config(**vars(config) | {"resume": True, "data_dir": str(other)}))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir()}


def test_windows_longer_than_the_pretrained_positions(data, tmp_path):
    model = train_gpt2.GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(USER_ERRORS, match="--seq_len 32 is over the 16 positions"):
        main(tiny_config(data, tmp_path / "log", init_from=str(tmp_path / "small")))
    with pytest.raises(USER_ERRORS, match="257 tokens"):
        main(tiny_config(token_set(tmp_path / "gpt2", tokenizer="gpt2", vocab_size=50257), tmp_path / "log",
                         init_from=str(tmp_path / "small"), seq_len=16))  # fmt: skip


def test_one_line_and_exit_status_2(tmp_path):
    result = launch(tiny_config("nowhere", tmp_path / "log"), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("train_gpt2.py: error: no train shards in 'nowhere'; run fineweb.py first")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", [["--max_steps", "ten"], ["--model", "gpt5"], ["--nonsense"], ["--max_steps"]])
def test_a_flag_that_does_not_fit(line, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(Config, "", line)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and line[0].replace("_", "-") in said.replace("_", "-") and "Traceback" not in said


def test_epochs_instead_of_steps(data, tmp_path):
    last = main(tiny_config(data, tmp_path / "log", epochs=0.5, max_steps=Config.max_steps, order="shuffle"))
    assert last["val"] and max(read_log(tmp_path / "log")["train"]) == 10  # 5472 tokens are 21.4 steps of 256


def test_only_the_recipe_on_fineweb_edu_is_held_against_the_reference(data, tmp_path, capsys):
    main(tiny_config(data, tmp_path / "other", max_steps=1))
    assert "reference" not in capsys.readouterr().out and "GPT-2 124M" not in capsys.readouterr().out
    manifest = json.loads((data / "manifest.json").read_text())
    mine = token_set(tmp_path / "mine", vocab_size=50257, tokenizer="gpt2")
    manifest |= {"source": {"dataset": "HuggingFaceFW/fineweb-edu:sample-10BT"}}
    manifest["tokenizer"] = {"name": "gpt2", "vocab_size": 50257}
    (mine / "manifest.json").write_text(json.dumps(manifest))
    main(tiny_config(mine, tmp_path / "small", max_steps=1, val_tokens=32))
    assert "reference" not in capsys.readouterr().out
    monkey = pytest.MonkeyPatch()
    monkey.setattr("extras.reference.follows_recipe", lambda settings: True)
    main(tiny_config(mine, tmp_path / "recipe", max_steps=1, val_tokens=32))
    monkey.undo()
    assert "reference 10.93: ahead by 0.1" in capsys.readouterr().out


def test_a_mark_is_passed_only_on_all_of_hellaswag():
    edu = ({}, "fineweb-edu", "gpt2")
    assert remarks(9, {"hella": 0.3, "hella_se": 0.0046}, *edu) == ["above GPT-2 124M's 0.2955"]
    assert remarks(9, {"hella": 0.3, "hella_se": 0.1}, *edu) == [], "a small subset says nothing"
    assert remarks(9, {"hella": 0.3, "hella_se": 0.0046, "val": 3.0}, {}, "mine", "gpt2") == []


def test_flags_are_the_fields():
    config = tiny_config("a", "b", compile=False, resume=True)
    assert cli.parse(Config, "", flags(config)) == config
    assert cli.parse(Config, "", ["--max-steps=3", "--no-compile"]) == Config(max_steps=3, compile=False)
    assert cli.parse(Config, "", []) == Config()


def test_without_a_val_split_it_trains_without_validation(tmp_path):
    data = token_set(tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / manifest["shards"].pop(0)["name"]).unlink()
    (data / "manifest.json").write_text(json.dumps(manifest))
    values = main(tiny_config(data, tmp_path / "log", val_every=0))
    assert "val" not in values and values["train"] < 6
    with pytest.raises(USER_ERRORS, match=r"no val shards in .*with a --val_size, or train with --val_every 0"):
        main(tiny_config(data, tmp_path / "other"))


@pytest.mark.parametrize("ids", [[*range(65)] * 500, [55496, 308, *range(999)] * 20], ids=["characters", "a header"])
def test_tokens_of_a_foreign_file_are_not_taken_for_gpt2s(tmp_path, ids):
    for split in ("train", "val"):
        np.save(tmp_path / f"edufineweb_{split}_000000.npy", np.array(ids, np.uint16))
    with pytest.raises(USER_ERRORS, match=r"begins with ids up to (64|55496): not those of gpt2, 0 to 50256;"):
        main(tiny_config(tmp_path, tmp_path / "log"))


def test_a_folder_of_another_projects_tokens_is_recognized(tmp_path):
    (tmp_path / "train.bin").write_bytes(b"0000")
    with pytest.raises(USER_ERRORS, match=r"no train shards in .*, but train.bin of nanoGPT: see the README"):
        main(tiny_config(tmp_path, tmp_path / "log"))


def test_a_sample_of_numbers_that_are_none_is_a_line(tmp_path, capsys, monkeypatch):
    features = train_gpt2.GPT.features
    monkeypatch.setattr(train_gpt2.GPT, "features", lambda *args, **more: features(*args, **more) * math.nan)
    main(tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=1, val_every=0, sample_every=1))
    assert "no samples: the probabilities are not numbers" in capsys.readouterr().out


def test_samples_are_of_the_tokenizer_that_the_manifest_names(tmp_path, capsys):
    """And not of one with as many ids: here none has 300."""
    data = token_set(tmp_path / "data", vocab_size=300)
    main(tiny_config(data, tmp_path / "log", max_steps=1, val_every=0, sample_every=1))
    assert "EVAL     1 | samples" in capsys.readouterr().out
