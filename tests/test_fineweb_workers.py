"""fineweb.py's process and threads: started in any way, killed at any moment, they change nothing and never hang."""

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
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs signals")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]


def undisturbed(folder: Path) -> tuple[Path, Path]:
    """(parquet file, directory of its shards)."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    texts = [f"document {i}: {' '.join(rng.choices(WORDS, k=rng.randrange(1500)))}" for i in range(600)]
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


SLOW = """
encode = pool.encode_documents
def slow(*arguments):
    time.sleep(0.04)
    return encode(*arguments)
pool.encode_documents = slow
"""


def start(folder: Path, out: Path, before: str = SLOW) -> subprocess.Popen:
    """fineweb.py in a process of its own, two threads. before: what is altered in it."""
    config = {**flags(folder), "out": str(out), "workers": 2}
    (out.parent / "go.py").write_text(
        f"import signal, sys, time\nsys.path.append({str(ROOT)!r})\nimport fineweb\n"
        f"from extras import tokenize_workers as pool\n{before}\n"
        f"config = fineweb.Config(**{config!r})\nsignal.signal(signal.SIGINT, fineweb.one_interrupt)\n"
        "fineweb.run(lambda _: fineweb.main(config), fineweb.Config, '', [])\n"
    )
    STARTED.append(subprocess.Popen([sys.executable, str(out.parent / "go.py")], stdout=-1, stderr=-1, text=True))
    return STARTED[-1]


STARTED = []


@pytest.fixture(autouse=True)
def no_survivors():
    yield
    while STARTED:
        STARTED.pop().kill()


def wait_for_a_shard(process: subprocess.Popen, out: Path, number: int = 1) -> None:
    while process.poll() is None and len(list(out.glob("*.npy"))) < number:
        time.sleep(0.01)


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


def run_through_kills(whole, out: Path, kills: int, rng: random.Random) -> None:
    """Start, kill with SIGKILL, start again; the last is left to end."""
    for kill in range(kills):
        process = start(whole[0].parent, out)
        wait_for_a_shard(process, out, 1 + kill % 8)
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.communicate(timeout=120)
    process = start(whole[0].parent, out, "")
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


FAILS = """
encode = pool.encode_documents
def fail(texts, *arguments):
    if any(text.startswith("document 237:") for text, in texts):
        raise ERROR
    return encode(texts, *arguments)
pool.encode_documents = fail
"""


ERRORS = [("MemoryError", 2, "out of memory"), ("KeyError(5)", 1, "KeyError: 5")]


@pytest.mark.parametrize("error, status, words", ERRORS)
def test_an_error_in_a_thread_ends_the_run(whole, tmp_path, error, status, words):
    """What came before it is kept, and the run goes on from there."""
    process = start(whole[0].parent, tmp_path / "out", FAILS.replace("ERROR", error))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status and words in stderr.splitlines()[-1]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["shards"] and not manifest["complete"] and not list((tmp_path / "out").glob("*.tmp"))
    run_through_kills(whole, tmp_path / "out", 0, random.Random(0))


@POSIX
@pytest.mark.parametrize("pauses", [[], [0.05, 0.01, 0]], ids=str)
@pytest.mark.parametrize("shards", [0, 1, 4])
def test_ctrl_c_leaves_nothing_half_done(whole, tmp_path, pauses, shards):
    """Once, or again while it cleans up."""
    process = start(whole[0].parent, tmp_path / "out")
    while process.poll() is None and not (tmp_path / "out/manifest.json").exists():
        time.sleep(0.01)
    wait_for_a_shard(process, tmp_path / "out", shards)
    for pause in [*pauses, 0]:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr and "the same command goes on" in stderr, stderr
    assert not list((tmp_path / "out").glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# From Python


SCRIPT = """
import multiprocessing
import fineweb
import train_gpt2

def work():
    fineweb.main(fineweb.Config(input=["a.parquet", "b.parquet"], out="data/x", val_size=2000))
    train_gpt2.main(train_gpt2.Config(data_dir="data/x", log_dir="log/x", max_steps=3, SETTINGS))

"""
SETTINGS = """n_layer=1, n_head=2, n_embd=16, seq_len=32, total_batch_size=128, micro_batch=4, val_tokens=320,
    hella_every=0, sample_every=0, warmup_steps=1, device="cpu", dtype="float32", compile=False"""
LAST_LINES = {
    "plain": "work()\n",
    "guarded": "if __name__ == '__main__':\n    work()\n",
    "spawn": "if __name__ == '__main__':\n    process = multiprocessing.get_context('spawn').Process(target=work)\n"
    "    process.start(); process.join(); raise SystemExit(process.exitcode)\n",
}


@pytest.mark.parametrize("last", LAST_LINES.values(), ids=LAST_LINES)
def test_from_parquet_files_to_a_model_in_a_script(tmp_path, last):
    rng = random.Random(0)
    for name in ("a", "b"):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(100))) for _ in range(200)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", row_group_size=50)
    (tmp_path / "mine.py").write_text(SCRIPT.replace("SETTINGS", SETTINGS) + last)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "mine.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log/x/log.txt").read_text()
    assert log.count(" train ") == 3 and " val " in log
    assert done.stdout.count("data/x: 400 documents") == 1  # nothing ran twice
