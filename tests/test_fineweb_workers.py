"""fineweb.py's processes: started in any way, killed at any moment, they change nothing and never hang."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs signals and fork")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(parquet file, directory of its shards): the run that nobody disturbed."""
    folder, rng = tmp_path_factory.mktemp("whole"), random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [f"document {i}: {' '.join(rng.choices(words, k=rng.randrange(1500)))}" for i in range(600)]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet", row_group_size=10)
    fineweb.main(fineweb.Config(**flags(folder), out=str(folder / "out"), workers=0))
    return folder / "texts.parquet", folder / "out"


def flags(folder: Path) -> dict:
    return {"input": [str(folder / "texts.parquet")], "shard_size": 20_000, "backend": "tiktoken"}


def contents(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def start(folder: Path, out: Path, before: str = "", workers: int = 2) -> subprocess.Popen:
    """fineweb.py in a process group of its own. before: what to do first, in the parent and in every spawned worker."""
    script = out.parent / "go.py"
    config = {**flags(folder), "out": str(out), "workers": workers}
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport fineweb, units\n{before}\n"
        f"if __name__ == '__main__':\n    config = fineweb.Config(**{config!r})\n"
        "    fineweb.run(lambda _: fineweb.main(config), fineweb.Config, '', [])\n"
    )
    command = [sys.executable, str(script)]
    STARTED.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True))
    return STARTED[-1]


STARTED = []


@pytest.fixture(autouse=True)
def no_survivors():
    """A test that fails in the middle leaves nobody behind who waits at a gate."""
    yield
    while STARTED:
        with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(STARTED.pop().pid, signal.SIGKILL)


SLOW = """
encode = units.encode_documents
def slow(*arguments):
    time.sleep(0.04)
    return encode(*arguments)
units.encode_documents = slow
"""


def children(pid: int) -> list[int]:
    if not Path("/proc/self/stat").exists():  # macOS
        command = ["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="]
        rows = [line.split(None, 2) for line in subprocess.run(command, stdout=-1, text=True).stdout.splitlines()]
        return [int(row[0]) for row in rows if int(row[1]) == pid and "spawn_main" in row[2]]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def group_is_gone(group: int, seconds: float = 20) -> bool:
    for _ in range(int(seconds * 20)):
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "method", ["spawn", pytest.param("fork", marks=POSIX), pytest.param("forkserver", marks=POSIX)]
)
def test_every_start_method(whole, tmp_path, method):
    process = start(whole[0].parent, tmp_path / "out", f"fineweb.START_METHOD = {method!r}")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert contents(tmp_path / "out") == contents(whole[1])


GATED = """
encode = units.encode_documents
def gated(texts, *arguments):
    open(f"GATE.{os.getpid()}", "w").close()  # its beginning is behind it
    closed = any(text.startswith("document 300:") for text in texts)
    if closed:
        open(f"GATE.at.{os.getpid()}", "w").close()
    while closed and not os.path.exists("GATE"):
        time.sleep(0.02)
    return encode(texts, *arguments)
units.encode_documents = gated
"""


def at_work(gate: Path) -> set[int]:
    """Workers of a gated run that have begun a unit: where one is killed or interrupted before, others may start."""
    return {int(path.suffix[1:]) for path in gate.parent.glob("gate.*")}


@POSIX
def test_a_worker_that_is_killed(whole, tmp_path):
    """Its units are done again, by others, and the rest goes on."""
    gate, killed, known = tmp_path / "gate", 0, set()
    process = start(whole[0].parent, tmp_path / "out", GATED.replace("GATE", str(gate)))
    deadline = time.monotonic() + 100
    while process.poll() is None and killed < 2 and time.monotonic() < deadline:
        workers = set(children(process.pid))
        at_gate = {int(path.suffix[1:]) for path in tmp_path.glob("gate.at.*")}  # it holds no lock of the queues there
        if (fresh := (workers - known) & at_gate) and list((tmp_path / "out").glob("*.npy*")):
            os.kill(min(fresh), signal.SIGKILL)
            killed, known = killed + 1, known | workers
        time.sleep(0.1)
    gate.touch()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and killed == 2, stderr
    assert contents(tmp_path / "out") == contents(whole[1])
    assert group_is_gone(process.pid)


KILLER = """
encode = units.encode_documents
def deadly(texts, tokenizer, backend):
    if any(text.startswith("document 237:") for text in texts):
        os._exit(9)
    return encode(texts, tokenizer, backend)
units.encode_documents = deadly
"""


def test_a_document_that_kills_is_named(whole, tmp_path):
    process = start(whole[0].parent, tmp_path / "out", KILLER)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    line = stderr.splitlines()[-1]
    assert "document 7 of row group 23, rows 0 to 10 of" in line and "kills the process that tokenizes it" in line
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["shards"] and not manifest["complete"]  # what came before it is kept
    assert not list((tmp_path / "out").glob("*.tmp"))


def run_through_kills(whole, out: Path, kills: int, rng: random.Random) -> None:
    """Start, kill the parent or a worker with SIGKILL, start again; the last is left to end."""
    for _ in range(kills):
        process = start(whole[0].parent, out, SLOW)
        deadline = time.monotonic() + 20
        while not list(out.glob("*.tmp")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        victim = rng.choice([process.pid, *children(process.pid)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        if victim != process.pid and rng.random() < 0.5:
            time.sleep(rng.random() * 0.2)
            process.kill()
        process.communicate(timeout=120)
        assert group_is_gone(process.pid)  # no worker outlives its parent
    process = start(whole[0].parent, out)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert contents(out) == contents(whole[1])


@POSIX
def test_killed_and_started_again(whole, tmp_path):
    run_through_kills(whole, tmp_path / "out", 3, random.Random(1))


@POSIX
@pytest.mark.slow
def test_killed_twenty_times_and_started_again(whole, tmp_path):
    run_through_kills(whole, tmp_path / "out", 20, random.Random(2))


@POSIX
def test_ctrl_c_leaves_nothing_half_done(whole, tmp_path):
    gate = tmp_path / "gate"  # it can't be done before
    process = start(whole[0].parent, tmp_path / "out", GATED.replace("GATE", str(gate)))
    while process.poll() is None and not (len(at_work(gate)) == 2 and list((tmp_path / "out").glob("*.npy.tmp"))):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    gate.touch()  # a worker ends the unit it is at
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr and "the same command goes on" in stderr
    assert not list((tmp_path / "out").glob("*.tmp")) and group_is_gone(process.pid)


@POSIX
def test_ctrl_c_while_the_workers_start(whole, tmp_path):
    """They are told to leave it to their parent only once they run."""
    process = start(whole[0].parent, tmp_path / "out", SLOW, workers=8)
    while not children(process.pid) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert group_is_gone(process.pid)
