"""fineweb.py's processes: started in any way, killed at any moment, they change nothing and never hang."""

import contextlib
import json
import os
import random
import shutil
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


def undisturbed(folder: Path) -> tuple[Path, Path]:
    """(parquet file, directory of its shards)."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    texts = [f"document {i}: {' '.join(rng.choices(words, k=rng.randrange(1500)))}" for i in range(600)]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet", row_group_size=10)
    fineweb.main(fineweb.Config(**flags(folder), out=str(folder / "out"), workers=0))
    return folder / "texts.parquet", folder / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("whole"))


def flags(folder: Path) -> dict:
    return {"input": [str(folder / "texts.parquet")], "shard_size": 20_000, "backend": "tiktoken"}


def contents(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def start(folder: Path, out: Path, before: str = "", workers: int = 2) -> subprocess.Popen:
    """fineweb.py in a process group of its own. before: what each worker does first."""
    here = out.parent
    serve = "def serve(*arguments):\n    pool.serve(*arguments)\n"
    (here / "altered.py").write_text(
        f"import os, pickle, sys, time\nfrom extras import tokenize_workers as pool\n{before}\n{serve}"
    )
    config = {**flags(folder), "out": str(out), "workers": workers}
    (here / "go.py").write_text(
        f"import sys\nsys.path.append({str(ROOT)!r})\nimport altered, fineweb\n"
        "from extras import tokenize_workers as pool\n"
        f"pool.serve = altered.serve\nconfig = fineweb.Config(**{config!r})\nfineweb.one_interrupt()\n"
        "fineweb.run(lambda _: fineweb.main(config), fineweb.Config, '', [])\n"
    )
    command = [sys.executable, str(here / "go.py")]
    STARTED.append(subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True))
    return STARTED[-1]


STARTED = []


@pytest.fixture(autouse=True)
def no_survivors():
    """A test that fails in the middle leaves nobody behind who waits at a gate: workers end with their parent."""
    yield
    while STARTED:
        STARTED.pop().kill()


SLOW = """
encode = pool.encode_documents
def slow(*arguments):
    time.sleep(0.04)
    return encode(*arguments)
pool.encode_documents = slow
"""


def workers_of(here: Path) -> list[int]:
    """Process ids of the workers of the run that was started in this folder: it is in their search path."""
    found = []
    if Path("/proc/self/stat").exists():
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if str(here).encode() in words and any(b"import serve" in word for word in words):
                    found.append(int(folder.name))
    else:  # macOS
        command = ["ps", "-A", "-ww", "-o", "pid=", "-o", "args="]
        for row in subprocess.run(command, stdout=-1, text=True).stdout.splitlines():
            if f" {here} " in f"{row} " and "import serve" in row:
                found.append(int(row.split()[0]))
    return found


def are_gone(here: Path, seconds: float = 20) -> bool:
    for _ in range(int(seconds * 20)):
        if not workers_of(here):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("way", ["a file", "stdin", "-c"])
def test_a_script_needs_no_main_guard(whole, tmp_path, way):
    config = {**flags(whole[0].parent), "out": str(tmp_path / "out"), "workers": 2}
    script = f"import sys; sys.path.append({str(ROOT)!r})\nimport fineweb\nfineweb.main(fineweb.Config(**{config!r}))\n"
    (tmp_path / "mine.py").write_text(script)
    arguments = {"a file": [str(tmp_path / "mine.py")], "stdin": ["-"], "-c": ["-c", script]}[way]
    text = script if way == "stdin" else ""
    done = subprocess.run([sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(whole[1])


def test_workers_that_cannot_start(whole, tmp_path):
    process = start(whole[0].parent, tmp_path / "out", "if sys.argv[0] == '-c': 1 / 0")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2 and "worker processes can't start, see above" in stderr.splitlines()[-1]
    assert "ZeroDivisionError" in stderr


GATED = """
encode = pool.encode_documents
def gated(texts, *arguments):
    open(f"GATE.{os.getpid()}", "w").close()  # its beginning is behind it
    closed = any(text.startswith("document 300:") for text in texts)
    if closed:
        open(f"GATE.at.{os.getpid()}", "w").close()
    while closed and not os.path.exists("GATE"):
        time.sleep(0.02)
    return encode(texts, *arguments)
pool.encode_documents = gated
"""


def at_work(gate: Path) -> set[int]:
    """Workers of a gated run that have begun a chunk; one that is killed before that may be replaced."""
    return {int(path.suffix[1:]) for path in gate.parent.glob("gate.*")}


@POSIX
def test_a_worker_that_is_killed(whole, tmp_path):
    """Its chunk is done again, by another, and the rest goes on."""
    gate, killed = tmp_path / "gate", set()
    process = start(whole[0].parent, tmp_path / "out", GATED.replace("GATE", str(gate)))
    deadline = time.monotonic() + 100
    while process.poll() is None and len(killed) < 2 and time.monotonic() < deadline:
        fresh = {int(path.suffix[1:]) for path in tmp_path.glob("gate.at.*")} - killed
        if fresh and list((tmp_path / "out").glob("*.npy*")):
            os.kill(min(fresh), signal.SIGKILL)
            killed.add(min(fresh))
        time.sleep(0.1)
    gate.touch()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and len(killed) == 2, stderr
    assert contents(tmp_path / "out") == contents(whole[1])
    assert are_gone(tmp_path)


DIES_SENDING = """
class Half:
    load, UnpicklingError = pickle.load, pickle.UnpicklingError
    def dump(answer, file, protocol):
        data = pickle.dumps(answer, protocol)
        if not os.path.exists("FLAG"):
            open("FLAG", "w").close()
            file.write(data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), 9)
        file.write(data)
if sys.argv[0] == "-c":  # in a worker
    pool.pickle = Half
"""


@POSIX
def test_a_worker_that_is_killed_while_it_sends(whole, tmp_path):
    process = start(whole[0].parent, tmp_path / "out", DIES_SENDING.replace("FLAG", str(tmp_path / "flag")))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "flag").exists(), stderr
    assert contents(tmp_path / "out") == contents(whole[1])


def kill_workers(whole, folder: Path, kills: int, rng: random.Random) -> None:
    """Again and again a run, while workers are killed at any moment: as they start, read, encode, send, wait."""
    done = runs = 0
    while done < kills:
        runs += 1
        (folder / str(runs)).mkdir()
        process = start(whole[0].parent, folder / str(runs) / "out", SLOW)
        while process.poll() is None:
            time.sleep(rng.uniform(0, 1.5))
            if workers := workers_of(folder / str(runs)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(workers), signal.SIGKILL)
                    done += 1
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert contents(folder / str(runs) / "out") == contents(whole[1])
        shutil.rmtree(folder / str(runs))


@POSIX
@pytest.mark.timeout(120)
def test_workers_killed_at_any_moment(whole, tmp_path):
    kill_workers(whole, tmp_path, 6, random.Random(0))


@POSIX
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_hundred_workers_killed(whole, tmp_path):
    kill_workers(whole, tmp_path, 500, random.Random(1))


KILLER = """
encode = pool.encode_documents
def deadly(texts, tokenizer, backend):
    if any(text.startswith("document 237:") for text in texts):
        os._exit(9)
    return encode(texts, tokenizer, backend)
pool.encode_documents = deadly
"""


def test_a_chunk_that_kills_is_named(whole, tmp_path):
    process = start(whole[0].parent, tmp_path / "out", KILLER)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    line = stderr.splitlines()[-1]
    assert "8 worker processes died while tokenizing row group 23, rows 0 to 10 of" in line
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["shards"] and not manifest["complete"]  # what came before it is kept
    assert not list((tmp_path / "out").glob("*.tmp"))


def run_through_kills(whole, out: Path, kills: int, rng: random.Random) -> None:
    """Start, kill the parent or a worker with SIGKILL, start again; the last is left to end."""
    for _ in range(kills):
        process = start(whole[0].parent, out, SLOW)
        deadline = time.monotonic() + 20
        while not workers_of(out.parent) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        victim = rng.choice([process.pid, *workers_of(out.parent)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        if victim != process.pid and rng.random() < 0.5:
            time.sleep(rng.random() * 0.2)
            process.kill()
        process.communicate(timeout=120)
        assert are_gone(out.parent)  # no worker outlives its parent
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
    while process.poll() is None and not (at_work(gate) and list((tmp_path / "out").glob("*.npy"))):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    gate.touch()  # a worker finishes its chunk
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr and "the same command goes on" in stderr
    assert not list((tmp_path / "out").glob("*.tmp")) and are_gone(tmp_path)


@POSIX
def test_ctrl_c_while_the_workers_start(whole, tmp_path):
    process = start(whole[0].parent, tmp_path / "out", SLOW, workers=8)
    while not workers_of(tmp_path) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert are_gone(tmp_path)


@POSIX
@pytest.mark.parametrize("seed", range(3))
def test_two_ctrl_c_close_together(whole, tmp_path, seed):
    rng = random.Random(seed)
    process = start(whole[0].parent, tmp_path / "out", SLOW)
    while not list((tmp_path / "out").glob("*.npy")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3))
    for pause in (0.05, 0.01, 0):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(pause)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert are_gone(tmp_path)
