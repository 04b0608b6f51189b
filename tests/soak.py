"""
A thousand faults: runs are killed, halted, told to end, left without disk, torn, and end as if nothing had happened.

    python tests/soak.py                                 # make soak: training, then tokenizing
    python tests/soak.py --faults 100 --seed 7           # a shorter one, with other moments

A fault costs about a second, because every run is forked from this process, which has torch imported. A series is one
run that is started again after each fault, until it is done; then its log and its last checkpoint must be, bit for bit,
those of an undisturbed run. In every forked rank an audit hook and two hooks of torch see in which phase it is, so that
a fault can be aimed: at the third checkpoint that is opened, at the fifth update. The others come at any moment.
Linux alone: it takes fork, /proc and prlimit.
"""

import argparse
import contextlib
import gc
import io
import json
import mmap
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from tiny import bytes_of, flags, read_log, tiny_config, token_set  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import train_gpt2  # noqa: E402

PHASES = ("start-up", "set-up", "training", "evaluation", "saving")
RESTARTS = 3  # of its ranks, by torchrun
LONGEST = 120  # seconds without a word, from a run that writes a line a step; then it counts as hanging


# ----------------------------------------------------------------------------------------------------------------------
# What ranks and this process tell each other, in memory that they share


class Board:
    """The phase and the process of each rank, and the next fault: rank, phase, how many beginnings from now, kind."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 4096)

    def get(self, slot: int):
        return json.loads(self.memory[slot * 256 : slot * 256 + 256].rstrip(b"\0") or b"null")

    def set(self, slot: int, value) -> None:
        self.memory[slot * 256 : slot * 256 + 256] = json.dumps(value).encode().ljust(256, b"\0")

    def clear(self) -> None:
        self.memory[:] = bytes(4096)


AIM, STRUCK, ENDING, RANKS = 0, 1, 2, 3  # slots of the board; from RANKS on one for each rank
board = Board()


def enter(phase: str) -> None:
    """In a rank: a phase begins, perhaps the one at which a fault is aimed."""
    rank = int(os.environ.get("RANK", 0))
    board.set(RANKS + rank, [phase, os.getpid()])
    aim = board.get(AIM)
    if not aim or aim["rank"] != rank or aim["phase"] != phase:
        return
    board.set(AIM, aim | {"count": aim["count"] - 1})
    if aim["count"] == 1:
        board.set(AIM, None)
        board.set(STRUCK, phase)
        if aim["kind"] in BY_RANK:
            strike(aim["kind"], os.getpid(), os.getpgid(0))
        while board.get(STRUCK):  # until whoever watches has done its part
            time.sleep(0.001)


def seen(event: str, arguments: tuple) -> None:
    """The audit hook of a rank."""
    name = os.path.basename(str(arguments[0])) if event in ("open", "os.rename", "os.remove") else ""
    if name == "manifest.json" or name.endswith(".npy"):
        enter("set-up")
    elif name.startswith("ckpt_") and "probe" not in name:
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        enter("set-up" if reads else "saving")


def rank_main(argv: list[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # torchrun's handlers, which a started rank has not
        signal.signal(number, signal.SIG_DFL)
    board.set(ENDING, None)  # torchrun can lose a signal that comes while it logs, and start its ranks again
    enter("start-up")
    sys.addaudithook(seen)
    register_optimizer_step_post_hook(lambda *_: enter("training"))
    switch = torch.nn.Module.train

    def train(module, mode=True):
        if not mode and isinstance(module, train_gpt2.GPT):
            enter("evaluation")
        return switch(module, mode)

    torch.nn.Module.train = train
    train_gpt2.run_command_line(argv)
    if board.get(ENDING):  # a forked rank would wait until torchrun has read what it returns; a started one can't
        sys.stdout.flush()
        os._exit(0)


# ----------------------------------------------------------------------------------------------------------------------
# Faults

BY_RANK = ("kill a rank", "kill all", "kill torchrun", "terminate", "halt", "halt for good", "tear")
AIMS = {  # kind -> the phases it may be aimed at; "" = any moment
    "kill a rank": ("", *PHASES), "kill all": ("", *PHASES), "kill torchrun": ("", *PHASES),
    "terminate": ("", "set-up", "training", "evaluation", "saving"), "halt": ("", *PHASES),
    "halt for good": ("training", "evaluation"), "full disk": ("", "training", "evaluation", "saving"),
    "tear": ("training", "evaluation", "saving"),
}  # fmt: skip
WEIGHTS = {"kill a rank": 5, "kill all": 5, "kill torchrun": 3, "terminate": 4, "halt": 3, "halt for good": 0.4}
WEIGHTS |= {"full disk": 3, "tear": 2}
GOES_ON = ("halt", "full disk")  # the run is still there when the fault is over


def strike(kind: str, pid: int, group: int) -> None:
    """What a signal can do: to a rank, to its process group, or to the group's first process, which is torchrun."""
    with contextlib.suppress(ProcessLookupError):
        if kind in ("kill all", "tear"):
            os.killpg(group, signal.SIGKILL)
        elif kind == "terminate":
            board.set(ENDING, True)
            os.killpg(group, signal.SIGTERM)
        elif kind == "kill torchrun":
            os.kill(group, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL if kind == "kill a rank" else signal.SIGSTOP)


def tear(log: Path, steps: list[int]) -> None:
    """Leave half of the last line, if it is of a step that no checkpoint has; else add half a line."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    if not lines:
        return
    first, last = lines[-1].split()[:1], max(steps, default=-1)
    if first and first[0].isdigit() and int(first[0]) > last:
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    else:
        lines.append(b"%d tra" % (last + 1))
    log.write_bytes(b"".join(lines))


class Disk:
    """Where the runs are: a small file system of its own if that can be mounted, else files that may not grow."""

    def __init__(self, folder: Path, megabytes: int = 24):
        self.folder, self.filler = folder, folder / "filler"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, pids: list[int]) -> None:
        if self.mounted:
            with contextlib.suppress(OSError), open(self.filler, "wb", buffering=0) as file:
                for size in [2**20] * 1000 + [2**8] * 10_000:
                    with contextlib.suppress(OSError if size > 2**8 else ()):
                        file.write(bytes(size))
            return
        self.limit(pids, 1000)  # a log is longer, and so is a checkpoint

    def free(self, pids: list[int]) -> None:
        self.filler.unlink(missing_ok=True)
        if not self.mounted:
            self.limit(pids, resource.RLIM_INFINITY)

    def limit(self, pids: list[int], size: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)])


# ----------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass
class Kind:
    """How a run is started, and its settings."""

    name: str
    ranks: int
    torchrun: bool
    settings: dict

    def faults(self) -> list[str]:
        alone = self.ranks == 1
        without = {"kill a rank"} if alone else set()
        without |= set() if self.torchrun else {"kill torchrun"}
        without |= {"halt for good"} if alone or self.torchrun else set()  # torchrun would restart them all
        return [kind for kind in AIMS if kind not in without]


BASE = {"n_layer": 1, "n_embd": 8, "n_head": 2, "seq_len": 8, "total_batch_size": 48, "val_tokens": 96}
BASE |= {"val_every": 8, "save_every": 7, "log_every": 1, "order": "shuffle"}
MUON = {"recipe": "fast", "max_lr": None, "min_lr": None, "warmup_steps": 20, "n_embd": 16, "dtype": "bfloat16"}
KINDS = [
    Kind("one process", 1, False, {"max_steps": 800}),
    Kind("two ranks under torchrun", 2, True, {"max_steps": 300}),
    Kind("one process, Muon, bfloat16", 1, False, MUON | {"max_steps": 500}),
    Kind("two ranks", 2, False, {"max_steps": 300}),
    Kind("three ranks", 3, False, {"max_steps": 300}),
    Kind("two ranks under torchrun, Muon, bfloat16", 2, True, MUON | {"max_steps": 300}),
]


def fork(function, output: Path, environment: dict, group: int) -> int:
    """The pid of a child that calls the function, in the process group, or in a new one if that is 0."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, group)
        return pid
    status = 1
    try:
        os.setpgid(0, group)
        os.environ.update(environment)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        function()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def under_torchrun(argv: list[str], ranks: int) -> None:
    """torchrun's agent, whose ranks are forked rather than started anew."""
    rendezvous = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    manner = {"max_restarts": RESTARTS, "monitor_interval": 0.05, "start_method": "fork"}
    try:
        elastic_launch(LaunchConfig(1, 1, ranks, **rendezvous, **manner), rank_main)(argv)
    except Exception as error:  # a rank that failed, or a signal: torch says it at length
        print(f"torchrun: {type(error).__name__}")
        sys.exit(1)


def next_port() -> int:
    """One that nobody listens on, below those of the system, which gloo of another lane may get in the meantime."""
    global port_number
    for _ in range(1000):
        port_number = (port_number + 1) % 1000
        port = 20_000 + 1000 * (os.getpid() % 10) + port_number
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


port_number = 0


def start(kind: Kind, config, output: Path) -> list[int]:
    """Process ids: of torchrun, or of the ranks. They are one process group."""
    argv = flags(config)
    if kind.torchrun:
        return [fork(lambda: under_torchrun(argv, kind.ranks), output, {}, 0)]
    port, pids = str(next_port()), []
    for rank in range(kind.ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": kind.ranks, "LOCAL_WORLD_SIZE": kind.ranks}
        environment = {name: str(value) for name, value in names.items()} if kind.ranks > 1 else {}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        pids.append(fork(lambda: rank_main(argv), output, environment, pids[0] if pids else 0))
    return pids


class Soak:
    """folder: data and undisturbed runs, for all lanes. here: what this lane writes."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.here, self.seed, self.rng = folder, folder, seed, random.Random(seed)
        self.data, self.disk = token_set(folder / "data"), None
        self.table, self.seconds, self.series, self.starts, self.wrong = Counter(), Counter(), 0, 0, []

    def add(self, other: "Soak") -> None:
        self.table, self.seconds, self.disk = self.table + other.table, self.seconds + other.seconds, other.disk
        self.series, self.starts = self.series + other.series, self.starts + other.starts
        self.wrong += other.wrong

    def done(self) -> int:
        return sum(self.table.values())

    def config(self, kind: Kind, log_dir: Path):
        return tiny_config(self.data, log_dir, **BASE | {"micro_batch": 6 // kind.ranks} | kind.settings)

    def undisturbed(self, kind: Kind) -> Path:
        """The log directory of a run without faults; as many ranks give the same, with torchrun or without."""
        return self.folder / f"undisturbed-{kind.ranks}-{len(kind.settings)}"

    def run_undisturbed(self) -> None:
        board.clear()
        kinds = {self.undisturbed(kind): replace(kind, torchrun=False) for kind in KINDS}
        output = self.folder / "undisturbed.txt"
        pids = [pid for path, kind in kinds.items() for pid in start(kind, self.config(kind, path), output)]
        statuses = [os.waitpid(pid, 0)[1] for pid in pids]
        assert not any(statuses), output.read_text()[-3000:]

    def run_series(self, kind: Kind) -> None:
        """A run, started again after every fault, to its end."""
        expected, log_dir = self.undisturbed(kind), self.disk.folder / "log"
        config = replace(self.config(kind, log_dir), resume=True)
        for _ in range(500):
            output = self.here / "output.txt"
            output.unlink(missing_ok=True)
            fault = self.next_fault(kind)
            minutes = 0.08 if fault["kind"] == "halt for good" else 10
            statuses = self.disturbed(kind, replace(config, timeout_minutes=minutes), output, fault)
            self.starts += 1
            self.disk.free([])
            if not any(statuses):
                break
        said = compare(expected, log_dir, config.max_steps)
        if said:
            self.complain(f"{kind.name}: {said}", output)
        self.series += 1
        shutil.rmtree(log_dir)

    def next_fault(self, kind: Kind) -> dict:
        name = self.rng.choices(kind.faults(), [WEIGHTS[fault] for fault in kind.faults()])[0]
        phase = self.rng.choice(AIMS[name])
        most = {"start-up": 1, "set-up": 4, "training": 25, "evaluation": 3, "saving": 9}.get(phase, 1)
        rank = 0 if phase == "saving" or name == "full disk" else self.rng.randrange(kind.ranks)
        return {"kind": name, "phase": phase, "count": self.rng.randint(1, most), "rank": rank}

    def complain(self, what: str, output: Path) -> None:
        self.wrong.append(what)
        text = output.read_text() if output.exists() else ""
        begin = re.search("^Traceback", text, re.MULTILINE)
        print(f"WRONG: {what}\n", text[max(0, begin.start() - 1000) :][:4000] if begin else text[-3000:], flush=True)

    def disturbed(self, kind: Kind, config, output: Path, fault: dict) -> list[int]:
        """The wait statuses of one start, with its faults: one that ends it, or several that do not."""
        board.clear()
        board.set(AIM, fault if fault["phase"] else None)
        pids, statuses, began = start(kind, config, output), {}, time.monotonic()
        group, at, hits, restarts = pids[0], self.moment(fault), [], 0
        struck, said, moved = -1, 0, began
        while len(statuses) < len(pids):
            for pid in pids:
                if pid not in statuses and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    statuses[pid] = found[1]
            landed, where = board.get(STRUCK), board.get(RANKS + fault["rank"])
            if not landed and at and time.monotonic() > at and where and state_of(where[1]) not in "ZX":
                at, landed = None, where[0]
                if fault["kind"] in BY_RANK:
                    strike(fault["kind"], where[1], group)
            if landed:
                hits.append((fault["kind"], landed))
                struck = fault["rank"]
                self.attend(kind, fault, landed, pids)
                board.set(STRUCK, None)
                restarts += (restarted := kind.torchrun and fault["kind"] == "kill a rank")
                if fault["kind"] in GOES_ON or (restarted and restarts <= RESTARTS):
                    others = [self.next_fault(kind) for _ in range(50)]
                    fault = next(other for other in others if other["kind"] != "halt for good")
                    board.set(AIM, fault if fault["phase"] else None)
                    at = self.moment(fault)
                else:
                    fault = fault | {"phase": "over"}
            if (size := output.stat().st_size if output.exists() else 0) != said:
                said, moved = size, time.monotonic()
            if time.monotonic() - moved > LONGEST:
                self.complain(f"{kind.name}: hangs after {hits}", output)
                os.killpg(group, signal.SIGKILL)
                statuses |= {pid: os.waitpid(pid, 0)[1] for pid in pids if pid not in statuses}
            time.sleep(0.005)
        self.end(kind, config, output, hits, [statuses[pid] for pid in pids], group, struck)
        for hit in hits:
            self.table[hit] += 1
            self.seconds[hit[0]] += (time.monotonic() - began) / len(hits)
        return [*statuses.values()]

    def moment(self, fault: dict) -> float | None:
        """When a fault that is not aimed at a phase comes."""
        return None if fault["phase"] else time.monotonic() + self.rng.uniform(0.05, 1.5)

    def attend(self, kind: Kind, fault: dict, landed: str, pids: list[int]) -> None:
        """The part of a fault that the ranks can't do themselves."""
        processes = {rank: found[1] for rank in range(kind.ranks) if (found := board.get(RANKS + rank))}
        if fault["kind"] == "halt":
            while state_of(processes[fault["rank"]]) not in "TZX":  # it says so just before it halts
                time.sleep(0.001)
            time.sleep(self.rng.uniform(0, 0.6))
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[fault["rank"]], signal.SIGCONT)
        elif fault["kind"] == "halt for good":
            others = [pid for rank, pid in enumerate(pids) if rank != fault["rank"]]
            deadline = time.monotonic() + 60
            while any(state_of(pid) not in "ZX" for pid in others) and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(processes[fault["rank"]], signal.SIGKILL)
        elif fault["kind"] == "full disk":
            self.disk.fill([*processes.values()])
            board.set(STRUCK, None)
            time.sleep(self.rng.uniform(0.1, 0.8))
            self.disk.free([*processes.values()])
        elif fault["kind"] in ("kill all", "tear") and not kind.torchrun:
            for pid in pids:  # one that was forked after its group was killed is not yet of it
                strike("kill a rank", pid, 0)
        elif fault["kind"] == "kill a rank" and not kind.torchrun and landed == "start-up":
            time.sleep(0.2)  # those who wait for one that never came give up after three minutes; here they are killed
            strike("kill all", 0, pids[0])

    def end(self, kind: Kind, config, output: Path, hits: list, statuses: list[int], group: int, rank: int) -> None:
        """After the end of a start: what it said, and that nobody is left."""
        text, last = output.read_text() if output.exists() else "", hits[-1] if hits else ("", "")
        with contextlib.suppress(ProcessLookupError):
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                os.killpg(group, 0)
                time.sleep(0.01)
            self.complain(f"{kind.name}: {last} leaves a process behind", output)
            os.killpg(group, signal.SIGKILL)
        interrupted = "_terminate_process_handler" in text  # torchrun's, by a signal that came while it was logging
        if re.search("^Traceback", text, re.MULTILINE) and not interrupted:  # others it logs with a date before them
            self.complain(f"{kind.name}: a traceback after {hits}", output)
        stacks = [*Path(config.log_dir).glob("stack_rank*.txt")]
        if last[0] == "halt for good":
            halted = re.findall(r"does not answer: (rank \d)", text)
            if {*halted} != {f"rank {rank}"} or len(halted) != kind.ranks - 1 or len(stacks) != kind.ranks - 1:
                self.complain(f"{kind.name}: {last}: {halted} named, {len(stacks)} stacks", output)
        for stack in stacks:
            stack.unlink()
        if last[0] == "tear":
            tear(Path(config.log_dir) / "log.txt", train_gpt2.saved_steps(config.log_dir))
        at_once = signal.SIGTERM in statuses  # a rank that had not begun to listen; the others then miss it
        if last[0] == "terminate" and not (kind.torchrun or at_once) and {*statuses} - {0, 143 << 8}:
            self.complain(f"{kind.name}: wait statuses {statuses} after {hits}", output)


def state_of(pid: int) -> str:
    """Of a process, as /proc has it: R or S, T if it is halted, Z or X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def compare(expected: Path, log_dir: Path, steps: int) -> str:
    """How the run differs from the undisturbed one; "" if it does not."""
    logs = [read_log(folder) for folder in (expected, log_dir)]
    for stream in ("train", "val", "bpb", "norm", "lr"):
        if logs[0][stream] != logs[1][stream]:
            return f"other values of {stream}"
    for line in (log_dir / "log.txt").read_text().splitlines():
        if not line.startswith("#"):
            step, name, value = line.split()
            if name in ("train", "val", "norm", "lr") and logs[0][name][int(step)] != float(value):
                return f"step {step} was logged with another {name}"
    if len({bytes_of(folder / f"ckpt_{steps:06d}.pt") for folder in (expected, log_dir)}) > 1:
        return "another last checkpoint"
    ours = re.compile(r"log\.txt|ckpt_\d{6}\.pt")
    strays = [path.name for path in log_dir.iterdir() if not ours.fullmatch(path.name)]
    return f"left behind: {strays}" if strays else ""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing


def soak_tokenizer(soak: Soak, faults: int, end: float) -> None:
    """fineweb.py is killed and started again."""
    import test_fineweb_workers as tokenizing

    whole, number = tokenizing.undisturbed(soak.folder / "whole"), 0
    while soak.done() < faults and time.monotonic() < end:
        began, number = time.monotonic(), number + 1
        (folder := soak.folder / f"tokens{number}").mkdir()
        tokenizing.run_through_kills(whole, folder / "out", 1, soak.rng)
        soak.table["kill fineweb.py", "tokenizing"] += 1
        soak.seconds["kill fineweb.py"] += time.monotonic() - began


# ----------------------------------------------------------------------------------------------------------------------


def report(soak: Soak, lanes: int, minutes: float) -> str:
    phases = [*PHASES, "tokenizing"]
    rows = [("fault", *phases, "all", "s each")]
    for kind in dict.fromkeys(kind for kind, _ in soak.table):
        counts = [soak.table[kind, phase] for phase in phases]
        rows.append((kind, *map(str, counts), str(sum(counts)), f"{soak.seconds[kind] / sum(counts):.1f}"))
    rows.append(("all", *(str(sum(soak.table[pair] for pair in soak.table if pair[1] == phase)) for phase in phases)))
    rows[-1] += (str(soak.done()), f"{sum(soak.seconds.values()) / max(1, soak.done()):.1f}")
    lines = [f"{row[0]:24s}" + "".join(f"{cell:>11s}" for cell in row[1:]) for row in rows]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    where = f"{lanes} lanes, {minutes:.1f} minutes on {os.cpu_count()} cores, load at the end {load}"
    lines.append(f"{soak.series} series, {soak.starts} starts, {where}")
    disk = "a full file system" if soak.disk.mounted else "files that may not grow"
    wrong = "\n".join(f"WRONG: {what}" for what in soak.wrong)
    lines.append(f"full disk: {disk}. {wrong or 'All ended bit for bit as undisturbed, none hung, no traceback.'}")
    return "\n".join(lines)


def lane(soak: Soak, number: int, faults: int, began: float, end: float) -> None:
    """Its share of the faults, one series after the other, in a directory of its own."""
    global board
    board, soak.rng = Board(), random.Random(f"{soak.seed} {number}")
    soak.here = soak.folder / f"lane{number}"
    soak.here.mkdir()
    soak.disk = Disk(soak.here / "disk")
    try:
        while soak.done() < faults and time.monotonic() < end:
            soak.run_series(KINDS[number % len(KINDS)])
            number += 1
            print(f"{time.monotonic() - began:5.0f} s: {soak.done()} of {faults} faults of this lane", flush=True)
    except Exception as error:
        soak.complain(f"{type(error).__name__}: {error}", Path(os.devnull))
    finally:
        soak.disk.close()
        (soak.here / "done.pickle").write_bytes(pickle.dumps(soak))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=4, help="side by side: most of the time is waiting")
    parser.add_argument("--minutes", type=float, default=120, help="no series begins after this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "log" / "soak.txt"), help="the table goes there, too")
    options, began = parser.parse_args(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak"))  # not one that removes itself: every fork would do that, too
    soak = Soak(folder, options.seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch imports much of itself at its first use
            train_gpt2.main(tiny_config(soak.data, folder / "warm", **BASE | {"max_steps": 1, "micro_batch": 6}))
        soak.run_undisturbed()
        gc.freeze()  # a collection in a fork would copy all of this memory
        tokenizing = options.faults // 10
        share = -(-(options.faults - tokenizing) // options.lanes)
        for number in range(options.lanes):
            if not os.fork():
                lane(soak, number, share, began, began + 60 * options.minutes)
                os._exit(0)
        try:
            soak_tokenizer(soak, tokenizing, began + 60 * options.minutes)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            soak.complain(f"tokenizing: {error}", Path(os.devnull))
        for _ in range(options.lanes):
            os.wait()
        for number in range(options.lanes):
            soak.add(pickle.loads((folder / f"lane{number}" / "done.pickle").read_bytes()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = report(soak, options.lanes, (time.monotonic() - began) / 60)
    print(table)
    Path(options.out).parent.mkdir(exist_ok=True)
    Path(options.out).write_text(table + "\n")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
