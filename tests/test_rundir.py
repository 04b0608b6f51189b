"""Checkpoints are whole or not there, are never executed, and a full disk costs nothing but the save."""

import builtins
import errno
import os
import pickle
import zipfile

import pytest
import torch

import files
import machine
import rundir
from cli import UserError
from rundir import Log, Saver, path_of, read, read_newest, saved_steps, write


def state(step: int) -> dict:
    weight = torch.arange(10_000.0) + step
    return {"step": step, "model": {"a": weight, "tied": weight}, "config": {"name": "x", "n": 1, "lr": 0.1}}


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path, writes=True)


def test_round_trip_and_ties(tmp_path, log):
    saver = Saver(tmp_path, 2, log, True)
    original = state(3)
    saver.save(original)
    original["model"]["a"] += 1  # training goes on while the file is written
    saver.wait()
    again = read(path_of(tmp_path, 3), ("step", "model"))
    assert torch.equal(again["model"]["a"], state(3)["model"]["a"]) and again["config"] == state(3)["config"]
    assert os.path.getsize(path_of(tmp_path, 3)) < 60_000, "tied weights are stored once"
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
        write(path_of(tmp_path, step), state(step))
    damage(path_of(tmp_path, 10))
    with pytest.raises(UserError, match=r"ckpt_000010.pt is (damaged|not a)"):
        read(path_of(tmp_path, 10), ("step", "model"))
    found, passed_over = read_newest(tmp_path, ("step", "model"))
    assert found["step"] == 5 and len(passed_over) == 1 and "ckpt_000010.pt" in passed_over[0]
    assert not os.path.exists("executed")


def test_nothing_to_read(tmp_path):
    assert read_newest(tmp_path / "nowhere") == (None, [])
    with pytest.raises(UserError, match="no checkpoint at"):
        read(tmp_path / "ckpt_000001.pt")


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

    monkeypatch.setattr(files, "open", opened, raising=False)


def test_a_disk_that_is_full_at_any_write(tmp_path, log, monkeypatch, capfd):
    write(path_of(tmp_path, 5), state(5))
    saver, allowed = Saver(tmp_path, 1, log, True), 0
    while True:
        fill_disk(monkeypatch, allowed)
        saver.save(state(10))
        saver.wait()
        if path_of(tmp_path, 10).exists():
            break
        assert "ckpt_000010.pt was not saved, training goes on" in capfd.readouterr().err
        assert read(path_of(tmp_path, 5))["step"] == 5 and not list(tmp_path.glob("*.tmp"))
        allowed += 1
    assert allowed > 3, "the file should take several writes"
    assert saved_steps(tmp_path) == [10]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end(tmp_path, log, monkeypatch, capfd, call):
    write(path_of(tmp_path, 5), state(5))
    saver = Saver(tmp_path, 1, log, True)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, call, fail)
    saver.save(state(10))
    saver.wait()
    assert "was not saved" in capfd.readouterr().err
    assert saved_steps(tmp_path) == [5] and not list(tmp_path.glob("*.tmp"))


def test_no_room_is_known_before(tmp_path, log, capfd, monkeypatch):
    with pytest.raises(UserError, match=r"GB free and 1000000000\.00 GB are needed"):
        rundir.require_space(tmp_path, 10**18)
    monkeypatch.setattr(rundir, "size_of", lambda _: 10**18)
    saver = Saver(tmp_path, 1, log, True)
    saver.save(state(1))
    saver.wait()
    assert "was not saved" in capfd.readouterr().err and saved_steps(tmp_path) == []


def test_the_newest_and_the_best_are_kept(tmp_path, log):
    saver = Saver(tmp_path, 2, log, True)
    for step, loss in ((10, 5.0), (20, 3.0), (30, 4.0), (40, 4.5), (50, 6.0)):
        log.write(step, val=loss)
        saver.save(state(step))
    saver.wait()
    assert saved_steps(tmp_path) == [50, 40, 20]
    everything = Saver(tmp_path, 0, log, True)
    everything.save(state(60))
    everything.wait()
    assert saved_steps(tmp_path) == [60, 50, 40, 20]


def test_a_new_checkpoint_outlives_a_damaged_later_one(tmp_path, log):
    path_of(tmp_path, 9).write_bytes(b"damaged")
    saver = Saver(tmp_path, 1, log, True)
    for step in (7, 8):
        saver.save(state(step))
    assert saver.wait() and saved_steps(tmp_path) == [9, 8]
    assert read_newest(tmp_path)[0]["step"] == 8


def test_only_damaged_checkpoints_are_no_new_beginning(tmp_path):
    path_of(tmp_path, 9).write_bytes(b"damaged")
    settings = {"resume": True, "force": False, "init_from": ""}
    with pytest.raises(UserError, match=r"no checkpoint of this run can be read .*--force starts anew"):
        rundir.open_run(tmp_path, settings, {}, (), (), print)
    assert rundir.open_run(tmp_path, settings | {"force": True}, {}, (), (), print) is None


def test_a_validation_that_is_not_a_number_is_not_the_best(tmp_path, log):
    for step, loss in ((1, 3.0), (2, float("nan"))):
        write(path_of(tmp_path, step), state(step))
        log.write(step, val=loss)
    assert log.best_step() == 1


def test_a_log_on_a_full_disk_waits_and_loses_nothing(tmp_path, log, capfd):
    log.write(1, train=5.0)
    log.flush()
    file, log.file = log.file, FullDisk(log.file, 0)
    log.write(2, train=4.0)
    log.flush()
    log.write(3, train=3.0)
    log.flush()
    saver = Saver(tmp_path, 1, log, True)
    saver.save(state(3))
    assert not saver.wait() and saved_steps(tmp_path) == [], "a checkpoint without its log is none"
    assert capfd.readouterr().err.count("its lines wait") == 1
    log.file = file
    log.flush()
    assert (tmp_path / "log.txt").read_text() == "1 train 5.000000\n2 train 4.000000\n3 train 3.000000\n"


def test_a_tracker_that_fails_is_left_alone(tmp_path, capfd):
    log = Log(tmp_path, True, track=lambda step, values: 1 / 0)
    for step in (1, 2):
        log.write(step, train=1.0)
    assert capfd.readouterr().err.count("the tracker failed") == 1


def test_half_a_file_of_a_killed_run_is_removed(tmp_path, log):
    (tmp_path / "ckpt_000010.pt.tmp").write_bytes(b"half")
    Saver(tmp_path, 2, log, True)
    assert not (tmp_path / "ckpt_000010.pt.tmp").exists()


def test_the_log_grows_and_the_last_value_of_a_step_wins(tmp_path):
    (tmp_path / "log.txt").write_text("# config {}\n3 train 5.000000\n4 train 4.500000\n5 tra")
    log = Log(tmp_path, writes=True)
    log.write(4, train=4.25, lr=6e-4)
    log.sync()
    text = (tmp_path / "log.txt").read_text()
    assert text == "# config {}\n3 train 5.000000\n4 train 4.500000\n4 train 4.250000\n4 lr 0.0006\n"
    again = Log(tmp_path, writes=False)
    assert again.values == {"train": {3: 5.0, 4: 4.25}, "lr": {4: 6e-4}} and again.last() == {"train": 4.25, "lr": 6e-4}


def test_a_resumed_optimizer_has_the_settings_of_its_run_and_the_moments_of_the_checkpoint():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0)
    before, after = (torch.optim.AdamW([parameter], weight_decay=decay) for decay in (0.1, 0.3))
    before.step()
    machine.load_whole_state(after, rundir.to_host(before.state_dict()))
    assert after.param_groups[0]["weight_decay"] == 0.3
    assert torch.equal(after.state[parameter]["exp_avg"], before.state[parameter]["exp_avg"])
    assert after.state[parameter]["step"] == 1
