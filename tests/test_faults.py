"""Runs that are killed, stopped, poisoned or crashed end where they would have ended."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import interrupt, plain_loop, same_weights
from tiny import ROOT, USER_ERRORS, flags, launch, read_log, tiny_config, token_set

import train_gpt2
from train_gpt2 import Config, main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


def command(config: Config, ranks: int, *options: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(ROOT / "train_gpt2.py"), *flags(config)]


def wait_for(process: subprocess.Popen, words: str) -> bool:
    """Read the output up to a line with `words`; False if the process ends before."""
    return any(words in line for line in process.stdout)


SLOW = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import torch, train_gpt2
from extras.cli import run
save = torch.save
def slow(state, file):
    save(state, file)
    time.sleep(0.3)  # so that it is often killed here: the file is written, but has not its name yet
torch.save = slow
train_gpt2.run_command_line()
"""


def wreck(line: list[str], rng: random.Random) -> bool:
    """Start the run, and kill or stop it at a random moment. Whether it was still running then."""
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    words = rng.choice(["device ", "run ", "step ", "step ", "step ", "val "])
    for _ in range(rng.randint(1, 12) if words == "step " else 1):
        if not wait_for(process, words):
            process.wait()
            return False
    time.sleep(rng.uniform(0, 0.2))
    landed, number = process.poll() is None, rng.choice([signal.SIGKILL, signal.SIGTERM])
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it came too late
        os.killpg(process.pid, number)  # as a scheduler does: everybody is told
    process.stdout.read()
    process.wait(timeout=60)
    return landed


def unharmed(data, tmp_path, ranks: int, kills: int, seed: int) -> None:
    end = 60 + 30 * kills  # a start gets some twenty steps further
    settings = {"order": "shuffle", "micro_batch": 2, "max_steps": end, "val_every": 8, "save_every": 7, "log_every": 1}
    straight = tiny_config(data, tmp_path / "straight", **settings, sample_every=16, n_layer=4, n_embd=64)
    assert launch(straight, ranks).returncode == 0
    wrecked = Config(**vars(straight) | {"log_dir": str(tmp_path / "wrecked"), "resume": True})
    (tmp_path / "slow.py").write_text(SLOW)
    line = command(wrecked, ranks)
    at = line.index(str(ROOT / "train_gpt2.py"))
    line[at : at + 1] = [str(tmp_path / "slow.py"), str(ROOT)]
    rng = random.Random(seed)
    assert sum(wreck(line, rng) for _ in range(kills)) >= kills - 1, "the kills came too late"
    result = launch(wrecked, ranks)
    assert result.returncode == 0, result.stderr
    logs = [read_log(tmp_path / name) for name in ("straight", "wrecked")]
    for stream in ("train", "val", "bpb", "norm", "lr"):
        assert logs[0][stream] == logs[1][stream], stream
    lines = [line.split() for line in (tmp_path / "wrecked" / "log.txt").read_text().splitlines() if line[0] != "#"]
    repeated = [(int(step), name, float(value)) for step, name, value in lines if name in ("train", "val", "norm")]
    assert all(logs[0][name][step] == value for step, name, value in repeated), "what was logged twice is the same"
    assert same_weights(*(train_gpt2.checkpoint_path(tmp_path / name, end) for name in ("straight", "wrecked")))
    names = {path.name for path in (tmp_path / "wrecked").iterdir()} - {"log.txt"}
    assert all(re.fullmatch(r"ckpt_\d{6}\.pt", name) for name in names), "no half file is left"


@pytest.mark.skipif(os.name != "posix", reason="kills process groups")
@pytest.mark.parametrize("ranks, kills", [(1, 3), (2, 1)])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(data, tmp_path, ranks, kills):
    unharmed(data, tmp_path, ranks, kills, seed=ranks)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks, seed", [(1, 10), (1, 11), (2, 12)])
def test_a_run_killed_at_many_random_moments(data, tmp_path, ranks, seed):
    unharmed(data, tmp_path, ranks, 10, seed)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_asked_to_stop_it_saves_and_says_how_to_go_on(data, tmp_path):
    config = tiny_config(data, tmp_path / "log", max_steps=100_000, save_every=0, val_every=0, log_every=1)
    process = subprocess.Popen(command(config, 1), stdout=subprocess.PIPE, text=True)
    assert wait_for(process, "step     3 |")
    with pytest.raises(USER_ERRORS, match=rf"is being written by process {process.pid} on "):
        main(replace(config, resume=True, max_lr=1e-3))
    process.send_signal(signal.SIGUSR1)
    output = process.stdout.read()
    assert process.wait(timeout=30) == 0
    (step,) = train_gpt2.saved_steps(tmp_path / "log")
    assert f"stopped after {step} of 100000 steps; --resume goes on" in output
    assert max(read_log(tmp_path / "log")["train"]) == step - 1


@pytest.mark.parametrize(
    "name, ranks, status", [("SIGINT", 1, 130), ("SIGTERM", 1, 143), ("SIGHUP", 1, 129), ("SIGHUP", 2, 1)]
)
def test_a_run_that_was_told_to_end_saves_and_does_not_look_finished(data, tmp_path, name, ranks, status):
    settings = {"max_steps": 100_000, "save_every": 0, "val_every": 0, "log_every": 1, "micro_batch": 4}
    line, pipes = command(tiny_config(data, tmp_path / "log", **settings), ranks), {"stdout": -1, "stderr": -1}
    obey = {"start_new_session": True, "preexec_fn": lambda: signal.signal(getattr(signal, name), signal.SIG_DFL)}
    process = subprocess.Popen(line, **pipes, **obey, text=True)  # under nohup, SIGHUP is ignored here and inherited
    assert wait_for(process, "step     3 |")
    os.killpg(process.pid, getattr(signal, name))  # as a terminal that closes does: with all who write to it
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and len(list((tmp_path / "log").glob("ckpt_*.pt"))) == 1, stderr


@pytest.mark.parametrize("ranks", [3, 4])
def test_many_ranks_resumed_end_as_if_undisturbed(data, tmp_path, ranks):
    """Three terms can be added in two orders: DDP must sort its buckets before the first step, not after it."""
    config = tiny_config(data, tmp_path / "straight", total_batch_size=384, micro_batch=1, n_embd=64, n_layer=4)
    assert launch(config, ranks).returncode == 0
    interrupt(tmp_path / "straight", tmp_path / "resumed", 5)
    assert launch(replace(config, log_dir=str(tmp_path / "resumed"), resume=True), ranks).returncode == 0
    assert same_weights(tmp_path / "straight" / "ckpt_000010.pt", tmp_path / "resumed" / "ckpt_000010.pt")


BUCKETS = """
import sys
from functools import partial
sys.path.insert(0, sys.argv.pop(1))
import torch, train_gpt2
graphs = []
def counting(graph, inputs, **_):
    graphs.append(1)
    return graph.forward
torch.compile = partial(torch.compile, backend=counting)
train = train_gpt2.train
def watched(run, stop):
    assert run.model.require_backward_grad_sync, "the pass that sorts DDP's buckets was not shared"
    assert len(graphs) == 1, f"{len(graphs)} graphs"
    return train(run, stop)
train_gpt2.train = watched
train_gpt2.run_command_line()
"""


def test_compiled_ranks_sort_their_buckets_before_the_first_step_and_compile_once(data, tmp_path):
    config = tiny_config(data, tmp_path / "log", micro_batch=4, compile=True, max_steps=2, val_every=0)
    (tmp_path / "buckets.py").write_text(BUCKETS)
    line = command(config, 2)
    at = line.index(str(ROOT / "train_gpt2.py"))
    line[at : at + 1] = [str(tmp_path / "buckets.py"), str(ROOT)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no SIGUSR1")
def test_a_run_that_is_stopped_in_its_last_step_still_has_to_be_evaluated(tmp_path, monkeypatch):
    config = tiny_config(token_set(tmp_path / "data"), tmp_path / "log", max_steps=4, val_every=2)
    lr_at = train_gpt2.lr_at
    with monkeypatch.context() as patch:
        stop = lambda step: os.kill(os.getpid(), signal.SIGUSR1) if step == 3 else None  # noqa: E731
        patch.setattr(train_gpt2, "lr_at", lambda step, config: stop(step) or lr_at(step, config))
        main(config)
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "# stopped" in log and "# done" not in log and 4 not in read_log(tmp_path / "log")["val"]
    assert train_gpt2.saved_steps(tmp_path / "log") == [4]
    main(replace(config, resume=True))
    assert 4 in read_log(tmp_path / "log")["val"] and "# done" in (tmp_path / "log" / "log.txt").read_text()


def test_every_step_has_its_lines_however_often_it_saves(data, tmp_path):
    tiny = {"n_layer": 1, "n_embd": 8, "seq_len": 8, "total_batch_size": 16, "micro_batch": 2}
    main(tiny_config(data, tmp_path / "log", **tiny, max_steps=60, save_every=1, log_every=1, val_every=0))
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if " train " in line] == [str(step) for step in range(60)]


def test_a_stop_inside_an_evaluation_breaks_it_off(data, tmp_path, monkeypatch):
    straight = tiny_config(data, tmp_path / "straight", max_steps=6, save_every=0, val_every=3)
    main(straight)
    config = Config(**vars(straight) | {"log_dir": str(tmp_path / "log")})
    asked = []

    def agreed(self):
        asked.append(self.since)
        return len(asked) > 7  # once before and 5 times in the first validation, and then in the second

    monkeypatch.setattr(config, "val_tokens", 5 * 8 * 32)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.StopSignal, "agreed", agreed)
        main(config)
    assert train_gpt2.saved_steps(tmp_path / "log") == [3] and 3 not in read_log(tmp_path / "log")["val"]
    main(Config(**vars(config) | {"resume": True, "val_tokens": straight.val_tokens}))
    assert same_weights(*(train_gpt2.checkpoint_path(tmp_path / name, 6) for name in ("straight", "log")))
    assert sorted(read_log(tmp_path / "log")["val"]) == [0, 3, 6]


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(data, tmp_path):
    config = tiny_config(data, tmp_path / "straight")
    main(config)
    shutil.copytree(tmp_path / "straight", tmp_path / "log")
    newest = train_gpt2.checkpoint_path(tmp_path / "log", 10)
    newest.write_bytes(newest.read_bytes()[:-1000])
    main(Config(**vars(config) | {"log_dir": str(tmp_path / "log"), "resume": True}))
    assert same_weights(train_gpt2.checkpoint_path(tmp_path / "straight", 10), newest)


POISONED = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train_gpt2
from extras.cli import run
whole = train_gpt2.batch_of_step
bad_rank, bad_steps = int(sys.argv.pop(1)), eval(sys.argv.pop(1))
def poisoned(sequences, first, count, micro_batch, ranks):
    x, y, weights = whole(sequences, first, count, micro_batch, ranks)
    if ranks.rank == bad_rank and first // count in bad_steps:
        weights = [float("nan"), *weights[1:]]
    return x, y, weights
train_gpt2.batch_of_step = poisoned
train_gpt2.run_command_line()
"""


@pytest.mark.parametrize("ranks, bad_rank", [(1, 0), (2, 1)])
def test_an_update_with_a_bad_gradient_is_skipped_on_all_ranks(tmp_path, ranks, bad_rank):
    directory = token_set(tmp_path / "data", (700, 20 * 256 + 2, 300))
    config = tiny_config(directory, tmp_path / "log", max_steps=8, micro_batch=2, log_every=4)
    (tmp_path / "poisoned.py").write_text(POISONED)
    line = command(config, ranks)
    at = line.index(str(ROOT / "train_gpt2.py"))
    line[at : at + 1] = [str(tmp_path / "poisoned.py"), str(ROOT), str(bad_rank), "[4]"]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 4: loss nan, gradient norm nan; the update is skipped" in result.stdout
    expected, _ = plain_loop(config, skip={4})
    log = read_log(config.log_dir)
    assert log["skipped"] == {4: 1}
    losses = [log["train"][step] for step in range(8) if step != 4]
    assert losses == pytest.approx([loss for step, loss in enumerate(expected) if step != 4], abs=1e-5)


def test_bad_gradients_in_a_row_end_the_run(data, tmp_path, monkeypatch):
    whole = train_gpt2.batch_of_step

    def poisoned(sequences, first, count, *rest):
        x, y, weights = whole(sequences, first, count, *rest)
        return x, y, [float("inf")] * len(weights) if first // count >= 6 else weights

    monkeypatch.setattr(train_gpt2, "batch_of_step", poisoned)
    monkeypatch.setattr("extras.checks.MAX_BAD_STEPS", 3)
    with pytest.raises(USER_ERRORS, match="3 steps in a row without a finite gradient, up to 8"):
        main(tiny_config(data, tmp_path / "log", max_steps=50, log_every=1))
    assert train_gpt2.saved_steps(tmp_path / "log") == [5]
    state = train_gpt2.read_checkpoint(train_gpt2.checkpoint_path(tmp_path / "log", 5))
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_torchrun_restarts_after_a_rank_was_killed(data, tmp_path):
    straight = tiny_config(data, tmp_path / "straight", max_steps=60, micro_batch=2)
    main(Config(**vars(straight) | {"micro_batch": 4}))
    config = Config(**vars(straight) | {"log_dir": str(tmp_path / "log"), "resume": True, "log_every": 1})
    line = command(config, 2, "--max-restarts=3")
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert wait_for(process, "step    20 |")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.stdout.read()
    assert process.wait(timeout=120) == 0
    logs = [read_log(tmp_path / name)["train"] for name in ("straight", "log")]
    assert list(logs[0].values()) == pytest.approx([logs[1][step] for step in logs[0]], abs=1e-5)
    assert "# restart" in (tmp_path / "log" / "log.txt").read_text()


def two_ranks_at_work(data, tmp_path) -> subprocess.Popen:
    """torchrun, whose ranks have made some steps and would go on for hours."""
    settings = {"max_steps": 100_000, "save_every": 0, "val_every": 0, "log_every": 1, "micro_batch": 4}
    line = command(tiny_config(data, tmp_path / "log", **settings), 2)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert wait_for(process, "step     3 |")
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's environment")
def test_under_torchrun_too_a_rank_that_was_killed_is_named(data, tmp_path):
    """torchrun sends SIGTERM to those that are left while they find out who is silent."""
    process = two_ranks_at_work(data, tmp_path)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    killed = [pid for pid in children if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(killed[0]), signal.SIGKILL)
    assert "the ranks wait for one that does not answer: rank 1" in process.communicate(timeout=60)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ranks_end_with_torchrun(data, tmp_path):
    """Or they would write into the directory of the run that is started next."""
    process = two_ranks_at_work(data, tmp_path)
    process.kill()
    process.communicate(timeout=30)  # the output ends when the last that could write to it has


@pytest.mark.skipif(os.name != "posix", reason="needs a shell's ulimit")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_without_room_for_the_last_checkpoint_all_ranks_end_and_say_so(data, tmp_path, ranks):
    line = command(tiny_config(data, tmp_path / "log", micro_batch=4), ranks)
    line = ["sh", "-c", 'ulimit -f 100; exec "$@"', "-", *line]  # 512 or 1,024 bytes each
    result = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert "ckpt_000005.pt was not saved, training goes on: [Errno 27] File too large" in result.stderr
    assert "the last checkpoint, of step 10, could not be saved; make room and --resume" in result.stderr
    assert result.returncode == (2 if ranks == 1 else 1) and "RuntimeError" not in result.stderr
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["log.txt"]


DRIVER = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import hashlib, train_gpt2
from extras.cli import run
what, where = sys.argv.pop(1), sys.argv.pop(1)
whole = train_gpt2.batch_of_step
def watched(sequences, first, count, micro_batch, ranks):
    batch = whole(sequences, first, count, micro_batch, ranks)
    if what == "hash":
        with open(f"{where}/{ranks.world_size}-{ranks.rank}", "a") as file:
            for row in batch[0].flatten(0, 1).numpy():
                print(first // count, hashlib.sha256(row.tobytes()).hexdigest(), file=file)
    elif ranks.rank == 1 and first // count == 4:
        time.sleep(600)
    return batch
train_gpt2.batch_of_step = watched
train_gpt2.run_command_line()
"""


def drive(tmp_path, what: str, where, config: Config, ranks: int) -> subprocess.CompletedProcess:
    """A run whose batches are watched: "hash" writes the hash of each row under `where`, "hang" halts a rank."""
    (tmp_path / "driver.py").write_text(DRIVER)
    line = command(config, ranks)
    at = line.index(str(ROOT / "train_gpt2.py"))
    line[at : at + 1] = [str(tmp_path / "driver.py"), str(ROOT), what, str(where)]
    return subprocess.run(line, capture_output=True, text=True, timeout=500)  # less than "hang" sleeps


def test_from_one_rank_to_four_to_two_the_batches_are_the_same(data, tmp_path):
    settings = {"max_steps": 9, "micro_batch": 2, "save_every": 3, "keep_checkpoints": 0}
    straight = tiny_config(data, tmp_path / "straight", order="shuffle", **settings)
    (tmp_path / "one").mkdir()
    assert drive(tmp_path, "hash", tmp_path / "one", straight, 1).returncode == 0
    (tmp_path / "many").mkdir()
    for ranks, end in ((1, 3), (4, 6), (2, 9)):
        config = Config(**vars(straight) | {"log_dir": str(tmp_path / "log"), "resume": True})
        result = drive(tmp_path, "hash", tmp_path / "many", config, ranks)
        assert result.returncode == 0, result.stderr
        for step in train_gpt2.saved_steps(tmp_path / "log"):
            if end < 9 and step > end:
                train_gpt2.checkpoint_path(tmp_path / "log", step).unlink()  # as if it had been stopped at `end`
    expected = sorted((tmp_path / "one" / "1-0").read_text().splitlines())
    seen = {name.name: name.read_text().splitlines() for name in (tmp_path / "many").iterdir()}
    for world_size, steps in (("1", range(0, 3)), ("4", range(3, 6)), ("2", range(6, 9))):
        rows = sorted(row for name, rows in seen.items() if name.startswith(world_size) for row in rows)
        assert rows[0][:2] == f"{steps[0]} "  # it went on where it was to
        for step in steps:
            assert [row for row in rows if row[:2] == f"{step} "] == [row for row in expected if row[:2] == f"{step} "]
    logs = [read_log(tmp_path / name)["train"] for name in ("straight", "log")]
    assert [logs[1][step] for step in range(9)] == pytest.approx([logs[0][step] for step in range(9)], abs=1e-5)


def test_a_rank_that_hangs_ends_the_run(data, tmp_path):
    config = tiny_config(data, tmp_path / "log", micro_batch=4, timeout_minutes=0.05)
    result = drive(tmp_path, "hang", "nowhere", config, 2)
    assert result.returncode != 0
    silent = r"wait for one that does not answer: rank 1, last heard of \d+ s ago: after training step"
    assert re.search(silent, result.stderr)
    assert "train_step" in (tmp_path / "log" / "stack_rank0.txt").read_text()


ONE_OF_THREE = """
import os, sys
from datetime import timedelta
import train_gpt2
from extras import agree
meet = agree.meet
agree.meet = lambda rank, world_size, limit: meet(rank, world_size, timedelta(seconds=8))
train_gpt2.run_command_line()
"""


@pytest.mark.parametrize("come, missing", [((0, 2), "1"), ((0,), "1, 2"), ((1, 2), "0")])
def test_ranks_that_never_come_are_named(data, tmp_path, come, missing):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = [sys.executable, "-c", ONE_OF_THREE, *flags(tiny_config(data, tmp_path / "log", micro_batch=4))]
    common = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(line, env=os.environ | common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in come
    ]
    for rank, process in zip(come, ranks):
        said = process.communicate(timeout=100)[1]
        error = [text for text in said.splitlines() if "error: " in text]
        assert process.returncode == 2 and len(error) == 1 and "Traceback" not in said, said
        assert f"rank {rank} waited 8 s for rank {missing}; see what the others say" in error[0]


LATE = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
from extras import agree
import train_gpt2
note = agree.note
def late(step, what):
    time.sleep(0.2 * (os.environ["RANK"] == "1"))  # the rank that is halted is the one last heard of
    note(step, what)
agree.note = late
train_gpt2.run_command_line()
"""


@pytest.mark.skipif(os.name != "posix", reason="stops a process")
@pytest.mark.parametrize("how", ["SIGSTOP", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_of_three_ranks_the_one_that_is_silent_is_named(data, tmp_path, how):
    """Not the one that was heard of before all others: that one may only be the fastest."""
    (tmp_path / "late.py").write_text(LATE)
    settings = {"total_batch_size": 384, "micro_batch": 1, "max_steps": 100_000, "val_every": 0, "log_every": 1}
    config = tiny_config(data, tmp_path / "log", **settings, timeout_minutes=0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(free.getsockname()[1])
    line = [sys.executable, str(tmp_path / "late.py"), str(ROOT), *flags(config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(line, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(3)
    ]
    assert wait_for(ranks[0], "step     3 |"), ranks[0].stderr.read()
    ranks[1].send_signal(getattr(signal, how))
    said = [ranks[rank].communicate(timeout=60)[1] for rank in (0, 2)]
    ranks[1].kill()
    ranks[1].communicate()
    for rank, text in zip((0, 2), said):
        assert ranks[rank].returncode == 2 and "Traceback" not in text
        named = r"wait for one that does not answer: rank 1, last heard of \d+ s ago: after training step \d+; what"
        assert re.search(named, text) and text.count("error:") == 1, text
        assert "train_step" in (tmp_path / "log" / f"stack_rank{rank}.txt").read_text()
