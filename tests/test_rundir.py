"""Checkpoints are whole or not there, are never executed, and a full disk costs nothing but the save."""

import builtins
import errno
import os
import pickle
import re
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import USER_ERRORS, tiny_config, token_set

import train_gpt2
from extras import track
from extras.checks import require_room
from extras.cli import parse
from train_gpt2 import (
    GPT,
    Config,
    GPTConfig,
    Log,
    Saver,
    checkpoint_path,
    main,
    read_checkpoint,
    resolve,
    saved_steps,
)


def state(step: int) -> dict:
    weight = torch.arange(10_000.0) + step
    found = {"step": step, "model": {"a": weight, "tied": weight}, "config": {"name": "x", "n": 1, "lr": 0.1}}
    found["loader"] = {"sample": 8 * step}
    return {key: {} for key in ("model_config", "optimizer", "versions")} | found


def write(path, state: dict) -> None:
    torch.save(state, path)


def resume(log_dir, **settings):
    """What a run in log_dir would continue from, and what it says."""
    said = []
    config = resolve(Config(log_dir=str(log_dir), **{"resume": True, **settings}))
    return train_gpt2.checkpoint_to_resume(config, {"data": "d"}, said.append), said


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path, writes=True)


def test_round_trip_and_ties(tmp_path, log):
    saver = Saver(tmp_path, 2, log, {})
    original = state(3)
    saver.save(original)
    original["model"]["a"] += 1  # training goes on while the file is written
    saver.wait()
    again = read_checkpoint(checkpoint_path(tmp_path, 3))
    assert torch.equal(again["model"]["a"], state(3)["model"]["a"]) and again["config"] == state(3)["config"]
    assert os.path.getsize(checkpoint_path(tmp_path, 3)) < 60_000, "tied weights are stored once"
    assert not list(tmp_path.glob("*.tmp"))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "truncated at the very end": lambda p: p.write_bytes(p.read_bytes()[:-3]),
    "one bit of a tensor": lambda p: flip(p, p.stat().st_size // 2),
    "text": lambda p: p.write_text("log.txt"),
    "another zip": lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"),
    "another program's": lambda p: torch.save({"weights": torch.ones(3)}, p),
    "not a dict": lambda p: torch.save([1, 2], p),
    "malicious": lambda p: torch.save({"step": Bomb(), "model": 1, "config": 1}, p),
    "malicious pickle": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "a class": lambda p: torch.save({"step": 1, "model": 1, "config": zipfile.ZipInfo("x")}, p),
}


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_whole_is_named_passed_over_and_never_executed(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    for step in (5, 10):
        write(checkpoint_path(tmp_path, step), state(step))
    damage(checkpoint_path(tmp_path, 10))
    with pytest.raises(USER_ERRORS, match=r"ckpt_000010.pt is not a whole checkpoint"):
        read_checkpoint(checkpoint_path(tmp_path, 10))
    found, said = resume(tmp_path)
    assert found["step"] == 5 and len(said) == 1 and "ckpt_000010.pt" in said[0]
    assert not os.path.exists("executed")


def test_nothing_to_read(tmp_path):
    assert resume(tmp_path / "nowhere") == (None, [])
    with pytest.raises(USER_ERRORS, match=r"ckpt_000001.pt is not a whole checkpoint .*No such file"):
        read_checkpoint(tmp_path / "ckpt_000001.pt")


class FullDisk:
    """An opened file whose `allowed`-th write, and all after it, find the disk full."""

    def __init__(self, file, allowed):
        self.file, self.left = file, allowed

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def fill_disk(monkeypatch, allowed: int) -> None:
    def opened(path, mode="r", **kwargs):
        file = builtins.open(path, mode, **kwargs)  # noqa: SIM115
        return FullDisk(file, allowed) if str(path).endswith(".tmp") else file

    monkeypatch.setattr(train_gpt2, "open", opened, raising=False)


def test_a_disk_that_is_full_at_any_write(tmp_path, log, monkeypatch, capfd):
    write(checkpoint_path(tmp_path, 5), state(5))
    saver, allowed = Saver(tmp_path, 1, log, {}), 0
    while True:
        fill_disk(monkeypatch, allowed)
        saver.save(state(10))
        saver.wait()
        if checkpoint_path(tmp_path, 10).exists():
            break
        assert "ckpt_000010.pt was not saved, training goes on" in capfd.readouterr().err
        assert read_checkpoint(checkpoint_path(tmp_path, 5))["step"] == 5 and not list(tmp_path.glob("*.tmp"))
        allowed += 1
    assert allowed > 0
    assert saved_steps(tmp_path) == [10]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path, log, monkeypatch, capfd, call):
    write(checkpoint_path(tmp_path, 5), state(5))
    saver = Saver(tmp_path, 1, log, {})

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(train_gpt2.os, call, fail)
    saver.save(state(10))
    saver.wait()
    assert "was not saved" in capfd.readouterr().err
    assert saved_steps(tmp_path) == [5] and not list(tmp_path.glob("*.tmp"))


def test_no_room_is_known_before(tmp_path, log, monkeypatch):
    model = GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=1, n_head=1, n_embd=8))
    need = 12 * sum(p.numel() for p in model.parameters())
    write(checkpoint_path(tmp_path, 1), state(1))
    for free, keep, enough in ((4 * need, 2, True), (3 * need - 50_000, 2, False), (3 * need, 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        try:
            require_room(Config(log_dir=str(tmp_path), keep_checkpoints=keep), model)
            assert enough
        except USER_ERRORS as error:
            assert not enough and "GB free and" in str(error) and "GB are needed for checkpoints" in str(error)


def test_the_newest_and_the_best_are_kept(tmp_path, log):
    evaluated = {"val": {}}
    saver = Saver(tmp_path, 2, log, evaluated)
    for step, loss in ((10, 5.0), (20, 3.0), (30, 4.0), (40, 4.5), (50, 6.0)):
        evaluated["val"][step] = loss
        saver.save(state(step))
    saver.wait()
    assert saved_steps(tmp_path) == [50, 40, 20]
    everything = Saver(tmp_path, 0, log, evaluated)
    everything.save(state(60))
    everything.wait()
    assert saved_steps(tmp_path) == [60, 50, 40, 20]


def test_a_new_checkpoint_outlives_a_damaged_later_one(tmp_path, log):
    checkpoint_path(tmp_path, 9).write_bytes(b"damaged")
    saver = Saver(tmp_path, 1, log, {})
    for step in (7, 8):
        saver.save(state(step))
    assert saver.wait() and saved_steps(tmp_path) == [9, 8]
    assert resume(tmp_path)[0]["step"] == 8


def test_only_damaged_checkpoints_are_no_new_beginning(tmp_path):
    checkpoint_path(tmp_path, 9).write_bytes(b"damaged")
    with pytest.raises(USER_ERRORS, match=r"no checkpoint of this run can be read; --force starts anew"):
        resume(tmp_path)
    assert resume(tmp_path, force=True)[0] is None


def test_a_log_without_a_checkpoint_is_resumed_only_if_there_was_none_to_lose(tmp_path):
    """build-nanogpt's own log directory has our default name; a run killed early has a log and nothing else."""
    log = tmp_path / "log.txt"
    for text in ("0 val 10.9\n0 train 10.9\n", '# config {}\n0 train 9.0\n21 train 5.0\n'):
        log.write_text(text)
        for settings in ({}, {"resume": False}):
            with pytest.raises(USER_ERRORS, match=r"a log.txt but no checkpoint to resume from; choose another"):
                resume(tmp_path, save_every=10, **settings)
    log.write_text("# config {}\n0 train 9.0\n7 train 5.0\n")
    assert resume(tmp_path, save_every=10) == (None, [f"resuming at step 0: {tmp_path} has no checkpoint yet"])
    with pytest.raises(USER_ERRORS, match="already holds a run: --resume goes on"):
        resume(tmp_path, save_every=10, resume=False)


def test_a_checkpoint_that_does_not_know_its_data_is_resumed(tmp_path):
    """The trainer without extras/ takes no fingerprint of its data."""
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=2, val_every=0)
    main(config)
    path = checkpoint_path(tmp_path / "log", 2)
    alone = torch.load(path, weights_only=True)
    alone["loader"]["data"] = None
    write(path, alone)
    main(replace(config, max_steps=4, resume=True))
    assert read_checkpoint(checkpoint_path(tmp_path / "log", 4))["loader"]["data"]


def test_evaluations_of_a_resumed_run_are_those_of_its_own_history(tmp_path, capsys):
    """What a later checkpoint saw is no part of a run that goes on from an earlier one: neither done, nor the best."""
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=6, val_every=2, save_every=2)
    config = replace(config, keep_checkpoints=0)
    main(config)
    seen = read_checkpoint(checkpoint_path(tmp_path / "log", 4))["evaluations"]
    assert set(seen["val"]) == set(seen["bpb"]) == {0, 2, 4}
    capsys.readouterr()
    again = replace(config, resume_from=str(checkpoint_path(tmp_path / "log", 4)), max_lr=1e-3, min_lr=0.0)
    values = main(again)
    assert re.findall(r"EVAL +(\d+)", capsys.readouterr().out) == ["6"], "step 4 was evaluated before it was saved"
    after = read_checkpoint(checkpoint_path(tmp_path / "log", 6))["evaluations"]["val"]
    assert after == seen["val"] | {6: values["val"]}


def test_an_evaluation_may_return_any_number(tmp_path, monkeypatch):
    """What a fork's evaluation returns goes into the checkpoint, which must still be readable."""
    kinds = {"int": 3, "numpy": np.float64(0.5), "tensor": torch.tensor(2)}
    monkeypatch.setitem(train_gpt2.EVALUATIONS, "kinds", ("val_every", lambda run, stop: dict(kinds)))
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=2, val_every=2)
    main(config)
    main(replace(config, max_steps=4, resume=True))
    seen = read_checkpoint(checkpoint_path(tmp_path / "log", 4))["evaluations"]
    for name, value in kinds.items():
        assert seen[name] == dict.fromkeys((0, 2, 4), float(value))


def test_the_best_checkpoint_of_an_older_version_is_kept(tmp_path):
    """Its evaluations are in log.txt alone."""
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=6, val_every=2, save_every=2)
    main(replace(config, keep_checkpoints=0))
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    lines = ["2 val 0.100000" if line.startswith("2 val") else line for line in lines]
    (tmp_path / "log" / "log.txt").write_text("\n".join(lines) + "\n")
    for step in (2, 4, 6):
        state = torch.load(checkpoint_path(tmp_path / "log", step), weights_only=True)
        del state["evaluations"]
        write(checkpoint_path(tmp_path / "log", step), state)
    main(replace(config, keep_checkpoints=1, max_steps=8, resume=True))
    assert saved_steps(tmp_path / "log") == [8, 2]


def test_a_validation_that_is_not_a_number_is_not_the_best(tmp_path, log):
    for step in (1, 2):
        write(checkpoint_path(tmp_path, step), state(step))
    saver = Saver(tmp_path, 1, log, {"val": {1: 3.0, 2: float("nan")}})
    saver.save(state(3))
    assert saver.wait() and saved_steps(tmp_path) == [3, 1]


def test_a_log_on_a_full_disk_waits_and_loses_nothing(tmp_path, log, capfd):
    log.write(1, train=5.0)
    log.flush()
    file, log.file = log.file, FullDisk(log.file, 0)
    log.write(2, train=4.0)
    log.flush()
    log.write(3, train=3.0)
    log.flush()
    saver = Saver(tmp_path, 1, log, {})
    saver.save(state(3))
    assert not saver.wait() and saved_steps(tmp_path) == [], "a checkpoint without its log is none"
    assert capfd.readouterr().err.count("its lines wait") == 1
    log.file = file
    log.flush()
    assert (tmp_path / "log.txt").read_text() == "1 train 5.000000\n2 train 4.000000\n3 train 3.000000\n"


def test_a_tracker_that_fails_is_left_alone(tmp_path, capfd):
    log = Log(tmp_path, True, track=track.Tracker(lambda step, values: 1 / 0, print))
    for step in (1, 2):
        log.write(step, train=1.0)
    assert capfd.readouterr().err.count("the tracker failed") == 1


def test_half_a_file_of_a_killed_run_is_removed(tmp_path, log):
    (tmp_path / "ckpt_000010.pt.tmp").write_bytes(b"half")
    Saver(tmp_path, 2, log, {})
    assert not (tmp_path / "ckpt_000010.pt.tmp").exists()


def test_the_log_grows_and_the_last_value_of_a_step_wins(tmp_path):
    (tmp_path / "log.txt").write_text("# config {}\n3 train 5.000000\n4 train 4.500000\n5 tra")
    log = Log(tmp_path, writes=True, start=5)
    log.write(4, train=4.25, lr=6e-4)
    log.flush(to_disk=True)
    text = (tmp_path / "log.txt").read_text()
    restart = '# restart {"step": 5}\n'
    assert text == f"# config {{}}\n3 train 5.000000\n4 train 4.500000\n{restart}4 train 4.250000\n4 lr 0.0006\n"
    assert log.last == {"train": (4, 4.25), "lr": (4, 6e-4)}


def test_a_resumed_optimizer_has_the_settings_of_its_run_and_the_moments_of_the_checkpoint():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    before, after = (torch.optim.AdamW([parameter], weight_decay=decay) for decay in (0.1, 0.3))
    before.step()
    train_gpt2.load_optimizer(after, before.state_dict())
    assert after.param_groups[0]["weight_decay"] == 0.3
    assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    assert after.state[parameter]["step"] == 1


LIES = {
    "evaluations that are text": lambda s: s["evaluations"].update(val={2: "low"}),
    "evaluations that are a list": lambda s: s.update(evaluations=[1]),
    "the step is text": lambda s: s.update(step="7"),
    "the step is negative": lambda s: s.update(step=-1),
    "the step is a bool": lambda s: s.update(step=True),
    "the sample is negative": lambda s: s["loader"].update(sample=-3),
    "the sample is missing": lambda s: s["loader"].pop("sample"),
    "a setting that is a tensor": lambda s: s["config"].update(n_layer=torch.ones(2)),
    "the model is a list": lambda s: s.update(model=[1]),
    "no head": lambda s: s["model_config"].update(n_head=0),
    "a billion layers": lambda s: s["model_config"].update(n_layer=10**9),
    "a width that is text": lambda s: s["model_config"].update(n_embd="32"),
    "a setting nobody knows": lambda s: s["model_config"].update(colour="red"),
    "a weight is missing": lambda s: s["model"].popitem(),
    "a weight too many": lambda s: s["model"].update(more=torch.ones(1)),
    "a weight of another shape": lambda s: change(s["model"], lambda t: t[:1]),
    "a weight of whole numbers": lambda s: change(s["model"], lambda t: t.int()),
    "a sparse weight": lambda s: change(s["model"], lambda t: t.to_sparse()),
    "a weight without memory": lambda s: change(s["model"], lambda t: t.to("meta")),
    "a weight that is a number": lambda s: s["model"].update({"transformer.wpe.weight": 3}),
    "a moment of another shape": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "a moment is missing": lambda s: s["optimizer"]["state"][0].pop("exp_avg_sq"),
    "a moment of one number, repeated": lambda s: repeat(s["optimizer"]["state"][0]),
    "a weight of one number, repeated": lambda s: change(s["model"], lambda t: torch.ones(1, 1).expand(t.shape)),
    "a weight of half the precision": lambda s: change(s["model"], lambda t: t.half()),
    "a moment that is text": lambda s: s["optimizer"]["state"][0].update(exp_avg="x"),
    "no moments' group": lambda s: s["optimizer"]["param_groups"].pop(),
    "no moments of a weight": lambda s: s["optimizer"]["state"].pop(0),
}


def change(tensors, how):
    name = "transformer.wpe.weight"
    tensors[name] = how(tensors[name])


def repeat(moments):
    moments["exp_avg"] = torch.ones(1, 1).expand(moments["exp_avg"].shape)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of shards, and the checkpoint of two steps on them."""
    home = tmp_path_factory.mktemp("saved")
    data = token_set(home / "data")
    train_gpt2.main(tiny_config(data, home / "log", max_steps=2, val_every=0))
    return data, home / "log" / "ckpt_000002.pt"


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_checkpoint_that_lies_is_named_and_nothing_is_touched(saved, tmp_path, lie):
    data, path = saved
    state = torch.load(path, weights_only=True)
    lie(state)
    torch.save(state, tmp_path / "ckpt_000002.pt")
    before = (tmp_path / "ckpt_000002.pt").read_bytes()
    with pytest.raises(USER_ERRORS, match=r"checkpoint|these weights|valid model shape"):
        train_gpt2.main(tiny_config(data, tmp_path, resume=True, max_steps=4, val_every=0))
    assert os.listdir(tmp_path) == ["ckpt_000002.pt"] and (tmp_path / "ckpt_000002.pt").read_bytes() == before


def test_a_compressed_checkpoint_is_not_unpacked(saved, tmp_path):
    with zipfile.ZipFile(saved[1]) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(USER_ERRORS, match="it is compressed"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_a_run_goes_on_from_the_checkpoint_it_is_given(saved, tmp_path, capsys):
    data, path = saved
    config = parse(Config, "", ["--resume", str(path)])
    assert config.resume and config.resume_from == str(path)
    assert parse(Config, "", ["--resume", "--max_steps", "3"]).resume_from == ""
    shutil.copytree(path.parent, tmp_path / "log")
    long = tiny_config(data, tmp_path / "log", max_steps=6, val_every=0, save_every=2, keep_checkpoints=0)
    train_gpt2.main(replace(long, resume=True))
    capsys.readouterr()
    middle = str(tmp_path / "log" / "ckpt_000004.pt")
    train_gpt2.main(replace(long, resume=True, resume_from=middle, max_steps=5, save_every=0))
    said = capsys.readouterr().out
    assert "resuming at step 4; later checkpoints stay until this run overtakes them: [6]" in said
    slip = r"--resume: .*ckpt_00002.pt .*No such file.*has the checkpoints of steps \[6, 5, 4, 2\]"
    with pytest.raises(USER_ERRORS, match=slip):  # and no new beginning
        train_gpt2.main(replace(long, resume_from=str(tmp_path / "log" / "ckpt_00002.pt"), force=True))
    assert saved_steps(tmp_path / "log") == [6, 5, 4, 2] and "\nstep     4 |" in said and "\nstep     3 |" not in said


def test_two_runs_do_not_share_a_directory(tmp_path, log):
    pytest.importorskip("fcntl")
    log.comment("versions", {"host": "here", "pid": 7})
    log.flush()
    with pytest.raises(USER_ERRORS, match=r"is being written by process 7 on here; wait for it, or end it"):
        Log(tmp_path, writes=True)
    log.file.close()
    Log(tmp_path, writes=True).file.close()


def test_a_directory_without_room_for_a_file_is_known_before(tmp_path, log, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(train_gpt2.Path, "write_bytes", fail)
    model = GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(USER_ERRORS, match=r"no checkpoint could be saved in .*Read-only file system"):
        require_room(Config(log_dir=str(tmp_path), keep_checkpoints=1), model)


def test_destroyed_weights_do_not_push_good_checkpoints_out(saved, tmp_path):
    data, path = saved
    shutil.copytree(path.parent, tmp_path / "log")
    config = tiny_config(data, tmp_path / "log", max_steps=40, val_every=0, save_every=3, warmup_steps=0)
    with pytest.raises(USER_ERRORS, match=r"10 steps in a row without a finite gradient.*--resume PATH of an older"):
        train_gpt2.main(replace(config, resume=True, max_lr=1e30, min_lr=0.0))
    assert saved_steps(tmp_path / "log")[-1] == 2 and len(saved_steps(tmp_path / "log")) <= 2
    train_gpt2.main(replace(config, resume=True, resume_from=str(tmp_path / "log" / "ckpt_000002.pt"), max_steps=8))


def test_a_step_of_thousands_of_digits_is_no_step(tmp_path):
    (tmp_path / "log.txt").write_text("# config {}\n" + "9" * 5000 + " train 5.0\n")
    assert resume(tmp_path)[0] is None


def test_a_run_whose_first_saves_failed_begins_again(saved, tmp_path, monkeypatch):
    """The disk was full; the user made room and does what the message says."""
    config = tiny_config(saved[0], tmp_path / "log", max_steps=7, val_every=0, save_every=2)
    with monkeypatch.context() as full:
        full.setattr(train_gpt2.os, "replace", lambda *_: exec("raise OSError(28, 'No space left on device')"))
        with pytest.raises(USER_ERRORS, match="step 7, could not be saved; make room and --resume"):
            train_gpt2.main(config)
    assert not saved_steps(tmp_path / "log")
    train_gpt2.main(replace(config, resume=True))
    assert saved_steps(tmp_path / "log") == [7, 6]
    for step in (7, 6):
        train_gpt2.checkpoint_path(tmp_path / "log", step).unlink()
    text = (tmp_path / "log/log.txt").read_text()
    (tmp_path / "log/log.txt").write_text(text.replace("# unsaved ", "# "))
    with pytest.raises(USER_ERRORS, match=r"has a log\.txt but no checkpoint"):  # they were there, and are gone
        train_gpt2.main(replace(config, resume=True))
