"""
How fast is the data step? From parquet files to committed shards, against the way build-nanogpt goes.

    python bench/tokenize.py                       # on docstrings of everything installed here, about 10M tokens
    python bench/tokenize.py FILE.parquet ...      # on files of your own with a column `text`

Variants, alternating within one run, each in a process of its own that starts cold:

    a        Pool(cores // 2).imap of one document at a time, tiktoken, rows fed by the parent from `datasets`
    b        the same with Pool(cores)
    tiktoken python fineweb.py --backend tiktoken
    fineweb  python fineweb.py, as it comes

(Not named tokenize.py: a script's folder comes first in its search path, and the standard library has a `tokenize`.)

Printed: the median of tokens per second, the ratio to (a) and (b), and the largest memory of the whole process tree.
"""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # this file would hide Python's tokenize

import multiprocessing
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras.cli import run
from extras.python_docs import module_docs
from extras.tokenizer import load_tokenizer

SHARD = 100_000_000  # tokens, fineweb.py's default


@dataclass
class Config:
    files: tyro.conf.Positional[list[str]] = field(default_factory=list)  # parquet files with a column `text`
    rounds: int = 3  # how often every variant runs
    repeat: int = 1  # read the files so many times over: longer, and kinder to whoever remembers words
    only: str = ""  # run this variant once, in this process; what the others are started with
    out: str = ""  # where --only writes


def main(config: Config) -> None:
    if config.only:
        imap_like_build_nanogpt(
            config.files, config.out, {"a": max(1, os.cpu_count() // 2), "b": os.cpu_count()}[config.only]
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        files = (config.files or [built_in_corpus(Path(folder))]) * config.repeat
        commands = {
            "a": [__file__, "--only", "a"],
            "b": [__file__, "--only", "b"],
            "tiktoken": [ROOT / "fineweb.py", "--backend", "tiktoken"],
            "fineweb": [ROOT / "fineweb.py"],
        }
        results = {name: [] for name in commands}
        for _ in range(config.rounds):
            for name, command in commands.items():
                results[name].append(measure(name, command, files, Path(folder) / "out"))
                print(f"{name:9} {results[name][-1][0]:6.2f} s  {results[name][-1][1] / 2**20:6.0f} MiB", flush=True)
        report(results, tokens_in(Path(folder) / "out"))


def measure(name: str, command: list, files: list[str], out: Path) -> tuple[float, float]:
    """(seconds, peak bytes of the process tree) of one run from nothing to shards in `out`."""
    subprocess.run([sys.executable, "-c", "import shutil, sys; shutil.rmtree(sys.argv[1], True)", out], check=True)
    files = files if name in "ab" else ["--input", *files]
    start, peak = time.perf_counter(), [0.0]
    process = subprocess.Popen([sys.executable, *command, *files, "--out", out], stdout=-3, stderr=-3)
    watch = threading.Thread(target=watch_memory, args=(process, peak))
    watch.start()
    if process.wait():
        raise SystemExit(f"{name} failed: {' '.join(map(str, process.args))}")
    seconds = time.perf_counter() - start
    watch.join()
    return seconds, peak[0]


def watch_memory(process: subprocess.Popen, peak: list[float]) -> None:
    """Proportional set sizes of the tree, summed ten times a second: shared pages count once. Linux only."""
    while process.poll() is None:
        peak[0] = max(peak[0], sum(proportional_bytes(pid) for pid in tree(process.pid)))
        time.sleep(0.1)


def tree(pid: int) -> list[int]:
    try:
        children = [int(c) for task in os.listdir(f"/proc/{pid}/task") for c in children_of(pid, task)]
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in tree(child))]


def children_of(pid: int, task: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{task}/children").read_text().split()


def proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def report(results: dict, tokens: int) -> None:
    seconds = {name: statistics.median(second for second, _ in runs) for name, runs in results.items()}
    print(f"\n{tokens:,} tokens, {os.cpu_count()} cores, medians of {len(results['a'])}\n")
    print("variant      seconds   Mtok/s    x (a)    x (b)   peak MiB")
    for name, second in seconds.items():
        ratios = f"{seconds['a'] / second:8.2f} {seconds['b'] / second:8.2f}"
        memory = max(peak for _, peak in results[name]) / 2**20
        print(f"{name:9} {second:10.2f} {tokens / second / 1e6:8.2f} {ratios} {memory:10.0f}")


def imap_like_build_nanogpt(files: list[str], out: str, processes: int) -> None:
    """The usual way: every row through the parent, one document a task, 16 to a message; shards by np.save."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=f"{out}/cache")
    os.makedirs(out, exist_ok=True)
    shard, filled, index = np.empty(SHARD, np.uint16), 0, 0
    with multiprocessing.Pool(processes) as pool:
        for ids in pool.imap(tokenize_row, rows, chunksize=16):
            while len(ids):
                piece = ids[: SHARD - filled]
                shard[filled : filled + len(piece)] = piece
                filled, ids = filled + len(piece), ids[len(piece) :]
                if filled == SHARD:
                    np.save(f"{out}/shard_{index:06d}.npy", shard)
                    filled, index = 0, index + 1
    if filled:
        np.save(f"{out}/shard_{index:06d}.npy", shard[:filled])


def tokenize_row(row: dict) -> np.ndarray:
    tokenizer = load_tokenizer("gpt2")
    return np.array([tokenizer.eot, *tokenizer.bpe.encode_ordinary(row["text"])]).astype(np.uint16)


def tokens_in(out: Path) -> int:
    return sum(len(np.load(path, mmap_mode="r")) for path in out.glob("*.npy"))


def built_in_corpus(folder: Path) -> str:
    """Docstrings of the packages installed here, a document a module, as FineWeb-Edu's files are laid out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    packages = Path(np.__file__).parent.parent
    folders = [package for package in sorted(packages.iterdir()) if package.is_dir()]
    texts = ["\n\n\n".join(docs) for folder in folders for docs in module_docs(folder)]
    counts = [len(load_tokenizer("gpt2").encode(text)) for text in texts]
    path = folder / "docstrings.parquet"
    table = pa.table({"text": texts, "id": [str(i) for i in range(len(texts))], "token_count": counts})
    pq.write_table(table, path, compression="zstd", row_group_size=1000)
    return str(path)


if __name__ == "__main__":
    run(main, Config, __doc__)
