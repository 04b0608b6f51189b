"""
Text -> token shards, the food of train_gpt2.py.

    python fineweb.py                                               # FineWeb-Edu sample-10BT: 10B GPT-2 tokens, 20 GB
    python fineweb.py --dataset python-docs --out data/python-docs  # the English every Python carries: no network
    python fineweb.py --input 'books/*.txt' --out data/books        # .parquet .jsonl .txt, also .gz and .zst
    python fineweb.py --input chats.jsonl --format chat --out data/chats  # to finetune on: only the answers are learned
    python fineweb.py --verify                                      # is the set on disk what the manifest says?

The way of the text:

    source --fetch, one ahead--> files --cut--> units --worker processes--> tokens, in order --> shards + manifest.json

A unit is a row group of a parquet file or a few megabytes of a text file; what comes back for it is one uint16 array. A
shard appears under its name only when it is whole, then the manifest that counts it in. So a run that was killed at any
moment goes on from the last shard when it is started again, and ends with the same bytes as if nothing had happened.

Instructions are JSON lines, in one of two formats. GPT-2 has no tokens for roles, so the template is plain text:

    --format alpaca   {"instruction": I, "input": N, "output": O}; input may be missing or empty, and so then its line
    --format chat     {"messages": [{"role": "system" | "user" | "assistant", "content": C}, ...]}

    Instruction: I                  System: C
                                                                              (empty lines as they stand)
    Input: N                        User: C

    Answer: O<|endoftext|>          Assistant: C<|endoftext|>

                                    User: C ...

Beside each shard lies a mask, `edufineweb_train_000001.mask.npy`: uint8, 1 for the tokens of an answer, from the space
before it to the end-of-text after it, 0 for all others. The trainer learns those alone.
"""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from extras.cli import UserError, run
from extras.files import atomic_file, sync_directory
from extras.sources import (
    PYTHON_DOCS,
    Fetcher,
    Source,
    SourceFile,
    docs_source,
    hub_source,
    is_compressed,
    local_source,
)
from extras.tokenizer import load_tokenizer
from extras.units import Job, Tokens, Unit, documents_of, measure, pick_backend, tokenize_unit, units_of

FORMAT = 1  # of the manifest
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
TOKENS_PER_BYTE = {"parquet": 0.35, "jsonl": 0.22, "txt": 0.22}  # GPT-2's, as in FineWeb-Edu, in English
COMPRESSION = 3  # text bytes per byte of .gz or .zst, about
START_METHOD = "spawn"  # of the workers: safe beside threads, and the same everywhere; fork and forkserver work too


# ----------------------------------------------------------------------------------------------------------------------
# Knobs


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    dataset: str = FINEWEB_EDU  # dataset of the Hugging Face hub, ID[:CONFIG], or python-docs
    input: list[str] = field(default_factory=list)  # files or globs of your own, instead of --dataset
    format: Literal["text", "alpaca", "chat"] = "text"  # plain text, or instructions of which the answers are learned
    text_column: str = "text"  # the column or JSON field that holds the text
    revision: str | None = None  # branch, tag or commit of the hub dataset (default: main as it is today)
    max_tokens: int | None = None  # stop after so many tokens (default: all)
    shuffle: int | None = None  # seed: shuffle row groups over all files, and documents in them; fetches all first
    part: str | None = None  # I/N: tokenize the I-th of N parts, for job arrays; all share --out
    skip_bad: bool = False  # leave out documents that can't be read, and count them

    out: str = "edu_fineweb10B"  # directory of the shards
    shard_size: int = 100_000_000  # tokens in a shard
    val_size: int | None = None  # tokens in shard 0, the val split (default: a shard of FineWeb-Edu, 1/20 of others)
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's byte-pair encoding, or plain bytes

    workers: int | None = None  # processes (default: one a core; 0: none but this one)
    backend: Literal["auto", "gigatoken", "tiktoken"] = "auto"  # GPT-2's encoder; auto: gigatoken if it is installed
    keep_downloads: bool = False  # keep what was fetched, in OUT/downloads
    verify: bool = False  # check the shards in OUT against their manifest and, by samples, against the source


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


def tokenize_all(units: Iterable, job: Job, workers: int) -> Iterator[tuple[tuple, Tokens]]:
    """(key, tokens) of every (key, unit), in order, few of them in memory at a time.

    A worker that dies takes the work of the others along: all of it is done again; and a unit that was next in line
    twice when that happened is done with care.
    """
    if workers == 0:
        yield from ((key, tokenize_unit(unit, job)) for key, unit in units)
        return
    units = iter(units)
    first = list(itertools.islice(units, workers))
    workers = max(1, len(first))  # they all start at once: no more than there is work for
    units, pending, suspect, pool = itertools.chain(first, units), deque(), None, start_workers(workers)
    try:
        while True:
            for key, unit in itertools.islice(units, 3 * workers + 4 - len(pending)):
                pending.append((key, unit, submit(pool, unit, job)))
            if not pending:
                return
            key, unit, future = pending[0]
            try:
                tokens = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False)
                pool = start_workers(workers)
                tokens = tokenize_with_care(unit, job) if key == suspect else None
                redone = [(k, u, f if succeeded(f) else submit(pool, u, job)) for k, u, f in pending]
                suspect, pending = key, deque(redone)
            if tokens is not None:
                pending.popleft()
                yield key, tokens
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def succeeded(future: Future) -> bool:
    return future.done() and future.exception() is None


def submit(pool: ProcessPoolExecutor, unit: Unit, job: Job) -> Future:
    try:
        with unseen_by_children(signal.SIGINT):
            return pool.submit(tokenize_unit, unit, job)
    except BrokenProcessPool as error:  # a worker died since the last result
        future = Future()
        future.set_exception(error)
        return future


def start_workers(workers: int) -> ProcessPoolExecutor:
    """They all start with the first task, before the pool's thread looks after them.

    Else one that dies while another starts could leave that thread waiting for ever: CPython's race, as of 3.11.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(START_METHOD), initializer=begin_worker)
    pool._safe_to_dynamically_spawn_children = False
    return pool


@contextlib.contextmanager
def unseen_by_children(number: int) -> Iterator[None]:
    """Processes that start in here don't get that signal, not even before `begin_worker`: they inherit the mask.

    For us it waits until the end of the block; by the mask alone it would come through another of our threads.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield  # there is no mask on Windows
        return
    came = []
    handler = signal.signal(number, lambda *_: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(number, handler)
        if came:
            signal.raise_signal(number)


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and don't outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_with_care(unit: Unit, job: Job) -> Tokens:
    """A unit that a worker died over, in a process of its own; if that dies too, by halves, down to one document."""

    def attempt(start, stop):
        try:
            with start_workers(1) as pool:
                with unseen_by_children(signal.SIGINT):
                    future = pool.submit(tokenize_unit, unit, job, slice(start, stop))
                return [future.result()]
        except BrokenProcessPool as error:
            stop = len(documents_of(unit, job)[0]) if stop is None else stop
            if stop - start <= 1:
                place = f"row group {unit.group}, rows" if unit.kind == "parquet" else "bytes"
                raise UserError(
                    f"document {start} of {place} {unit.start} to {unit.stop} of {unit.name} kills the process that "
                    "tokenizes it (out of memory?); take it out, or try a machine with more memory"
                ) from error
        middle = (start + stop) // 2
        return attempt(start, middle) + attempt(middle, stop)

    parts = attempt(0, None)
    ids = np.concatenate([part.ids for part in parts])
    targets = None if parts[0].targets is None else np.concatenate([part.targets for part in parts])
    return Tokens(ids, *measure(ids, targets, job.tokenizer), parts[0].skipped, targets)


# ----------------------------------------------------------------------------------------------------------------------
# Plan: which units, in which order


class Cursor(NamedTuple):
    """A place in the stream of tokens: block of files, unit of the block, token of the unit."""

    block: int
    unit: int
    token: int


def plan_blocks(files: list[SourceFile], shuffle: int | None, part: tuple[int, int]) -> list[list[int]]:
    """Indices of the files that are cut into units together: each for itself, or to be shuffled all at once.

    part: (i, n), i from 0. A part takes the units that begin in its n-th of the source's bytes, and only their files.
    """
    total, start, mine = sum(file.weight for file in files), 0, []
    for index, file in enumerate(files):
        if start * part[1] < total * (part[0] + 1) and (start + file.weight) * part[1] > total * part[0]:
            mine.append(index)
        start += file.weight
    return [[index] for index in mine] if shuffle is None else [mine] if mine else []


def units_of_block(block: list[int], paths: list[Path], files: list[SourceFile], config: Config) -> list[Unit]:
    """The units of a block in the order of the stream."""
    (i, n), total = parse_part(config.part), sum(file.weight for file in files)
    units = []
    for index, path in zip(block, paths):
        of_file, start = units_of(files[index], path, config.text_column), sum(file.weight for file in files[:index])
        for number, unit in enumerate(of_file):
            if (start * len(of_file) + files[index].weight * number) * n // (total * len(of_file)) == i:
                units.append((index, number, unit))
    if config.shuffle is None:
        return [unit for _, _, unit in units]
    random.Random(f"units {config.shuffle}").shuffle(units)
    return [unit._replace(order=f"{config.shuffle} {index} {number}") for index, number, unit in units]


def parse_part(part: str | None) -> tuple[int, int]:
    """'2/8' -> (1, 8)."""
    if part is None:
        return 0, 1
    i, slash, n = part.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise UserError(f"--part {part!r} must be I/N with 1 <= I <= N, such as 2/8")
    return int(i) - 1, int(n)


# ----------------------------------------------------------------------------------------------------------------------
# Shards and the manifest: nothing half done ever bears its name


def write_manifest(path: Path, manifest: dict, writer: str = "") -> None:
    with atomic_file(path, writer) as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())


class ArrayFile:
    """A 1-D .npy file under a temporary name, with room for `size` numbers; it may end before."""

    def __init__(self, path: Path, dtype: str, size: int):
        self.path, self.dtype, self.size, self.length = path, dtype, size, 0
        self.file = open(path.with_name(path.name + ".tmp"), "wb")  # noqa: SIM115
        self.file.write(npy_header(size, dtype))
        self.digest = hashlib.sha256(npy_header(size, dtype))

    def append(self, array: np.ndarray) -> None:
        data = array.astype(self.dtype, copy=False).data
        self.file.write(data)
        self.digest.update(data)
        self.length += len(array)

    def commit(self) -> str:
        """Give it its name, once it is on the disk; its sha256."""
        short = self.length < self.size
        if short:
            self.file.seek(0)
            self.file.write(npy_header(self.length, self.dtype))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = sha256_of(Path(self.file.name)) if short else self.digest.hexdigest()
        os.replace(self.file.name, self.path)
        return digest

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before can't be now
            self.file.close()
        Path(self.file.name).unlink(missing_ok=True)


class ShardWriter:
    """Writes one stream of tokens as shards, each as it fills, and after each the manifest that counts it in."""

    def __init__(self, out: Path, manifest: dict, part: tuple[int, int]):
        self.out, self.manifest, self.part = out, manifest, part
        self.tokenizer = manifest["tokenizer"]["name"]
        self.has_mask = manifest["settings"].get("format", "text") != "text"
        self.file = self.mask = None
        self.total = sum(shard["tokens"] for shard in manifest["shards"])

    @property
    def index(self) -> int:
        """Of the shard being written. Parts take turns, so that no two ever use the same name."""
        return len(self.manifest["shards"]) * self.part[1] + self.part[0]

    @property
    def split(self) -> str:
        return "val" if self.index == 0 and self.manifest["val_size"] > 0 else "train"

    @property
    def size(self) -> int:
        """Tokens the shard being written will hold, unless the text ends before."""
        return self.manifest["val_size"] if self.split == "val" else self.manifest["settings"]["shard_size"]

    @property
    def path(self) -> Path:
        return self.out / f"edufineweb_{self.split}_{self.index:06d}.npy"

    def write(self, whole: Tokens, cursor: Cursor, stop: int) -> bool:
        """Append the tokens of the unit `whole` from `cursor` up to `stop`. Whether a shard was committed."""
        done, stop, committed = cursor.token, min(stop, len(whole.ids)), len(self.manifest["shards"])
        while done < stop:
            if self.file and self.file.length == self.size:
                self.commit(cursor._replace(token=done))
            if not self.file:
                self.begin(cursor._replace(token=done))
            span = slice(done, min(stop, done + self.size - self.file.length))
            ids, targets = whole.ids[span], None if whole.targets is None else whole.targets[span]
            self.file.append(ids)
            if self.mask:
                self.mask.append(targets)
            known = len(ids) == len(whole.ids)
            documents, size = (whole.documents, whole.bytes) if known else measure(ids, targets, self.tokenizer)
            self.documents += documents
            self.bytes += size
            self.total += len(ids)
            done += len(ids)
        return len(self.manifest["shards"]) > committed

    def begin(self, cursor: Cursor) -> None:
        self.start, self.documents, self.bytes, self.skipped_before = cursor, 0, 0, self.manifest["skipped"]
        self.file = ArrayFile(self.path, "<u2", self.size)
        self.mask = ArrayFile(self.out / mask_name(self.path.name), "|u1", self.size) if self.has_mask else None

    def commit(self, cursor: Cursor) -> None:
        """Give the shard its name and enter it. cursor: where the next one begins."""
        mask = {"mask_sha256": self.mask.commit()} if self.mask else {}  # first: no shard is ever without its mask
        entry = {
            "name": self.path.name,
            "split": self.split,
            "tokens": self.file.length,
            "documents": self.documents,
            "bytes": self.bytes,
            "skipped_before": self.skipped_before,  # left out before the unit it starts in
            "sha256": self.file.commit(),
        }
        sync_directory(self.out)
        self.manifest["shards"].append(entry | mask)
        self.manifest["starts"].append(list(self.start))
        self.manifest["cursor"] = list(cursor)
        write_manifest(self.out / manifest_name(self.part), self.manifest)
        self.file = self.mask = None

    def finish(self, cursor: Cursor) -> None:
        """Commit what there is, and complete the manifest. Raises OnlyVal if the val split would take all."""
        if self.split == "val" and self.file:
            raise OnlyVal(self.total)
        if not self.total and self.part[1] == 1:
            raise UserError("the source holds no document at all")
        if self.file:
            self.commit(cursor)
        self.manifest["complete"] = True
        write_manifest(self.out / manifest_name(self.part), self.manifest)

    def close(self) -> None:
        """Leave no half shard behind."""
        for file in filter(None, (self.file, self.mask)):
            file.discard()
        self.file = self.mask = None


class OnlyVal(Exception):
    """The text ended within the val split; the argument is the number of tokens there are."""


def npy_header(length: int, dtype: str) -> bytes:
    """What `np.save` writes before a 1-D array; numpy pads it, so that it is as long for any length."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": (length,)})
    return buffer.getvalue()


def files_of(shard: dict) -> list[tuple[str, int, str]]:
    """(name, size in bytes, sha256) of the files of a shard as the manifest tells of it: tokens, and perhaps a mask."""
    n, name = shard["tokens"], shard["name"]
    files = [(name, len(npy_header(n, "<u2")) + 2 * n, shard["sha256"])]
    if "mask_sha256" in shard:
        files.append((mask_name(name), len(npy_header(n, "|u1")) + n, shard["mask_sha256"]))
    return files


def mask_name(shard: str) -> str:
    """'x.npy' -> 'x.mask.npy'."""
    return shard.removesuffix(".npy") + ".mask.npy"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The run


def settings_of(config: Config) -> dict:
    """All that the bytes of the result depend on."""
    names = ["format", "text_column", "revision", "max_tokens", "shuffle", "part", "skip_bad"]
    names += ["shard_size", "val_size", "tokenizer"]
    asked = {"input": config.input} if config.input else {"dataset": config.dataset}
    return asked | {name: getattr(config, name) for name in names}


def manifest_name(part: tuple[int, int]) -> str:
    return "manifest.json" if part[1] == 1 else f"manifest.part-{part[0] + 1}-of-{part[1]}.json"


def writer_name(part: tuple[int, int]) -> str:
    """Of the manifest of all parts, which several may write at once: each under a temporary name of its own."""
    return f".part-{part[0] + 1}-of-{part[1]}"


def scratch_name(part: tuple[int, int]) -> str:
    return manifest_name(part).replace("manifest", "downloads").removesuffix(".json")


def read_manifest(path: Path) -> dict | None:
    """None where there is none yet. Raises UserError for one that is not ours, or of another version."""
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} can't be read ({error}); choose another --out") from error
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}, this fineweb.py writes {FORMAT}; choose another --out")
    return manifest


def new_manifest(config: Config, source: Source) -> dict:
    tokenizer = load_tokenizer(config.tokenizer)
    return {
        "format": FORMAT,
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.n_vocab},
        "eot": tokenizer.eot,
        "source": source.description,
        "settings": settings_of(config),
        "val_size": val_size_of(config, source.files),
        "shards": [],
        "starts": [],
        "cursor": list(Cursor(0, 0, 0)),
        "skipped": 0,
        "complete": False,
    }


def val_size_of(config: Config, files: list[SourceFile]) -> int:
    """Tokens of the val split: a shard of FineWeb-Edu, a twentieth of anything else, and never all there are."""
    if config.val_size is not None:
        return config.val_size
    total = min(estimated_tokens(files, config.tokenizer), config.max_tokens or sys.maxsize)
    is_fineweb = not config.input and config.dataset.startswith(FINEWEB_EDU.partition(":")[0])
    size = config.shard_size if is_fineweb else min(config.shard_size, total // 20)
    return max(1, size if size < (config.max_tokens or sys.maxsize) else config.max_tokens // 20)


def estimated_tokens(files: list[SourceFile], tokenizer: str) -> int:
    """A guess from the files' sizes alone, the same whenever it is made."""
    gpt2 = sum(f.size * TOKENS_PER_BYTE[f.kind] * (COMPRESSION if is_compressed(f.name) else 1) for f in files)
    return int(gpt2 if tokenizer == "gpt2" else gpt2 / TOKENS_PER_BYTE["txt"])


def check(config: Config) -> None:
    """Raises UserError for values that fit no run."""
    for name, least in {"shard_size": 1, "val_size": 0, "max_tokens": 1, "workers": 0}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    parse_part(config.part)
    if config.input and config.dataset != Config.dataset:
        raise UserError(f"--input and --dataset {config.dataset} exclude each other; leave one out")
    if config.revision and (config.input or config.dataset == PYTHON_DOCS):
        raise UserError("--revision is for datasets of the hub; leave it out")
    if config.max_tokens and config.val_size and config.val_size >= config.max_tokens:
        raise UserError(
            f"--val_size {config.val_size} leaves nothing to train on of --max_tokens {config.max_tokens}; lower it"
        )


def resumed(manifest: dict, config: Config, manifest_path: Path) -> dict:
    """The manifest of the run to go on with. Raises UserError, saying which, if a flag is not what it was."""
    asked = json.loads(json.dumps(settings_of(config)))
    was = {"format": "text"} | manifest["settings"]  # sets of before there were others don't name it
    changed = [
        f"--{name} {asked.get(name)} (it was {was.get(name)})"
        for name in sorted(was.keys() | asked.keys())
        if was.get(name) != asked.get(name)
    ]
    if changed:
        raise UserError(f"{manifest_path.parent} was begun otherwise: {', '.join(changed)}; choose another --out")
    for number, shard in enumerate(manifest["shards"]):
        sizes = {manifest_path.parent / name: size for name, size, _ in files_of(shard)}
        damaged = [path for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]
        if damaged:
            print(f"{damaged[0]} is missing or damaged: going on from there")
            kept = {"shards": manifest["shards"][:number], "starts": manifest["starts"][:number], "complete": False}
            skipped = shard.get("skipped_before", manifest["skipped"])
            return manifest | kept | {"cursor": manifest["starts"][number], "skipped": skipped}
    return manifest


def check_source(manifest: dict, source: Source, out: Path) -> None:
    was, now = manifest["source"], json.loads(json.dumps(source.description))
    if was == now:
        return
    if was["revision"] != now["revision"]:
        raise UserError(f"{out} was begun with {was['revision']}, and this is {now['revision']}; choose another --out")
    before = dict(map(tuple, was["files"]))
    other = [name for name, size in now["files"] if before.pop(name, None) != size] + list(before)
    raise UserError(f"{out} was begun before {', '.join(other[:3]) or 'the order'} changed; choose another --out")


def prepare_directory(out: Path, part: tuple[int, int]) -> None:
    """Make `out`, and remove what a killed run left. Raises UserError if shards of unknown origin lie there."""
    out.mkdir(parents=True, exist_ok=True)
    manifests, shards = sorted(out.glob("manifest*.json")), sorted(out.glob("edufineweb_*.npy"))
    if shards and not manifests:
        raise UserError(f"{out} holds {shards[0].name}, of which no manifest.json tells; choose another --out")
    halves = [manifest_name(part) + ".tmp", manifest_name((0, 1)) + writer_name(part) + ".tmp"]
    for path in [*out.glob("edufineweb_*.npy.tmp"), *(out / name for name in halves)]:
        if path.name.startswith("manifest") or int(path.name.split("_")[2].split(".")[0]) % part[1] == part[0]:
            path.unlink(missing_ok=True)


def main(config: Config) -> None:
    check(config)
    out = Path(config.out)
    try:
        if config.verify:
            verify(out, config)
        else:
            tokenize(out, config)
    except KeyboardInterrupt:
        print("\nstopped; what is committed is safe, and the same command goes on from there", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno is None:
            raise
        again = "what is committed is safe, and the same command goes on from there"
        raise UserError(f"{error.filename or out}: {os.strerror(error.errno)}; once that is mended, {again}") from error


def tokenize(out: Path, config: Config) -> None:
    """Begin a set of shards in `out`, or go on with it, to its end."""
    part = parse_part(config.part)
    manifest_path = out / manifest_name(part)
    manifest = read_manifest(manifest_path)
    if manifest:
        manifest = resumed(manifest, config, manifest_path)
    source = open_source(config, manifest and manifest["source"])
    check_format(config.format, source.files)
    if manifest:
        check_source(manifest, source, out)
    prepare_directory(out, part)
    if manifest and manifest["complete"]:
        remove_scratch(out, part, config.keep_downloads)
        print(f"{out} is complete: {summary(manifest)}; nothing to do")
        return
    manifest = manifest or new_manifest(config, source)
    write_manifest(manifest_path, manifest)
    join_parts(out, part)
    try:
        write_shards(config, source, manifest, out)
    except OnlyVal as ended:
        (total,) = ended.args
        print(f"The val split was to have more than the {total:,} tokens there are: it gets a twentieth")
        manifest |= {"val_size": total // 20, "cursor": [0, 0, 0], "skipped": 0}
        write_manifest(manifest_path, manifest)
        write_shards(config, source, manifest, out)
    join_parts(out, part)
    print(f"{out}: {summary(manifest)}")
    if manifest["skipped"]:
        print(f"{manifest['skipped']} documents could not be read and were left out")
    if manifest["shards"] and (last := manifest["shards"][-1]["tokens"]) < config.shard_size:
        print(f"The last shard holds what was left, {last:,} of {config.shard_size:,} tokens: that is no failure.")


def open_source(config: Config, recorded: dict | None) -> Source:
    """recorded: the manifest's description of it, if a run is resumed."""
    if config.input:
        return local_source(config.input)
    if config.dataset == PYTHON_DOCS:
        return docs_source(recorded)
    enough = config.max_tokens and 2**20 + 16 * config.max_tokens  # bytes; a token of English is 4.6
    return hub_source(config.dataset, config.revision, recorded, enough)


def check_format(format: str, files: list[SourceFile]) -> None:
    """Raises UserError for files that can't hold instructions."""
    others = [file.name for file in files if format != "text" and file.kind != "jsonl"]
    if others:
        raise UserError(f"--format {format} reads .jsonl, not {others[0]}; write it as JSON lines, one record a line")


def join_parts(out: Path, part: tuple[int, int]) -> None:
    """Make manifest.json of the parts' manifests: incomplete, until the last of them is complete.

    Parts may end at the same moment: each writes its own manifest first and then looks at all, so the last one to look
    sees them all; and what is then written is the same, whoever writes it.
    """
    if (count := part[1]) == 1:
        return
    path = out / manifest_name((0, 1))
    parts = [read_manifest(out / manifest_name((i, count))) for i in range(count)]
    begun, complete = [p for p in parts if p], all(p and p["complete"] for p in parts)
    whole = begun[0]["settings"] | {"part": f"all of {count}"}
    if (there := read_manifest(path)) and there["settings"] != whole:
        raise UserError(f"{path} was begun with other flags, or another number of parts; choose another --out")
    if complete or not there:
        shards = sorted((s for p in begun for s in p["shards"]), key=lambda shard: shard["name"].rpartition("_")[2])
        skipped = sum(p["skipped"] for p in begun)
        joined = {"settings": whole, "shards": shards, "starts": [], "cursor": None, "skipped": skipped}
        write_manifest(path, begun[0] | joined | {"complete": complete}, writer_name(part))


def summary(manifest: dict) -> str:
    shards = manifest["shards"]
    tokens = {split: sum(s["tokens"] for s in shards if s["split"] == split) for split in ("train", "val")}
    documents = sum(shard["documents"] for shard in shards)
    return f"{documents:,} documents, {len(shards)} shards, {tokens['train']:,} train and {tokens['val']:,} val tokens"


def write_shards(config: Config, source: Source, manifest: dict, out: Path) -> None:
    """From the manifest's cursor to the end: write every shard, and complete the manifest. Raises OnlyVal."""
    part, first = parse_part(config.part), Cursor(*manifest["cursor"])
    blocks = plan_blocks(source.files, config.shuffle, part)
    order, used = [index for block in blocks for index in block], sum(map(len, blocks[: first.block]))
    fetcher = Fetcher(source, order, used, out / scratch_name(part), config.keep_downloads)
    writer = ShardWriter(out, manifest, part)
    progress = Progress(source.files, config, writer.total)
    units = planned_units(blocks, first, fetcher, source.files, config, progress)
    stream = tokenize_all(units, job_of(config), workers_of(config))
    with contextlib.closing(stream), contextlib.closing(writer), contextlib.closing(progress):
        for (block, number, unit), tokens in stream:
            skip = first.token if (block, number) == first[:2] else 0
            stop, before = skip + (config.max_tokens or sys.maxsize) - writer.total, writer.total
            if writer.write(tokens, Cursor(block, number, skip), stop):
                fetcher.release(sum(map(len, blocks[: manifest["cursor"][0]])))
            manifest["skipped"] += tokens.skipped
            progress.update(unit, writer.total - before, tokens.documents, writer.index)
            if writer.total == config.max_tokens:
                break
        writer.finish(Cursor(len(blocks), 0, 0))
        progress.finish()
    remove_scratch(out, part, config.keep_downloads)


def remove_scratch(out: Path, part: tuple[int, int], keep: bool) -> None:
    if not keep:
        shutil.rmtree(out / scratch_name(part), ignore_errors=True)


def job_of(config: Config) -> Job:
    backend = pick_backend(config.backend, config.tokenizer)
    return Job(config.tokenizer, config.text_column, config.skip_bad, backend, config.format)


def planned_units(blocks, first: Cursor, fetcher: Fetcher, files, config: Config, progress: "Progress") -> Iterator:
    """((block, number, unit), unit) of every unit from `first` on; files are fetched as they are needed."""
    for block in range(first.block, len(blocks)):
        units = units_of_block(blocks[block], [fetcher.get(index) for index in blocks[block]], files, config)
        progress.open(units)
        for number in range(first.unit if block == first.block else 0, len(units)):
            yield (block, number, units[number]), units[number]


def workers_of(config: Config) -> int:
    most = 61 if sys.platform == "win32" else sys.maxsize  # processes that a Windows program can wait for
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, cores if config.workers is None else config.workers)


class Progress:
    """One bar for the whole job, in tokens. How many there will be is told by the files that are here, and by bytes."""

    def __init__(self, files: list[SourceFile], config: Config, done: int):
        import tqdm

        self.bytes = sum(file.weight for file in files) / parse_part(config.part)[1]
        self.limit = config.max_tokens or sys.maxsize
        self.counted = self.seen = (0, 0.0)  # tokens and bytes of the source: by column token_count, and by doing
        self.use_counts = config.tokenizer == "gpt2"
        self.documents = 0
        total = min(self.limit, estimated_tokens(files, config.tokenizer) // parse_part(config.part)[1])
        seconds = 0.5 if sys.stderr.isatty() else 30  # a log file is no screen
        self.bar = tqdm.tqdm(
            total=max(total, done), initial=done, unit="tok", unit_scale=True, mininterval=seconds, dynamic_ncols=True
        )

    def open(self, units: list[Unit]) -> None:
        if self.use_counts and units and all(unit.tokens is not None for unit in units):
            tokens, size = self.counted
            self.counted = tokens + sum(unit.tokens for unit in units), size + sum(unit.share for unit in units)

    def update(self, unit: Unit, tokens: int, documents: int, shard: int) -> None:
        self.seen = self.seen[0] + tokens, self.seen[1] + unit.share
        self.documents += documents
        count, size = self.counted if self.counted[0] else self.seen
        self.bar.total = max(self.bar.n + tokens, min(self.limit, int(count / size * self.bytes)))
        self.bar.set_postfix_str(f"{self.documents:,} documents, shard {shard}", refresh=False)
        self.bar.update(tokens)

    def finish(self) -> None:
        self.bar.total = self.bar.n

    def close(self) -> None:
        self.bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def verify(out: Path, config: Config) -> None:
    """Every shard against its sha256, and some against the source, by tiktoken. Raises UserError for any difference."""
    manifest = read_manifest(out / manifest_name((0, 1)))
    if manifest is None:
        raise UserError(f"{out} has no manifest.json to verify the shards against; choose another --out")
    files = [file for shard in manifest["shards"] for file in files_of(shard)]
    damaged = [name for name, _, digest in files if not (out / name).exists() or sha256_of(out / name) != digest]
    if damaged:
        names = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        raise UserError(
            f"{len(damaged)} of {len(files)} shards in {out} are missing or damaged: {names}; delete "
            "them, and run fineweb.py again with the flags it had: it makes them anew"
        )
    print(f"{out}: {len(files)} shards have the sha256 of the manifest")
    parts = sorted(out.glob("manifest.part-*.json")) or [out / manifest_name((0, 1))]
    compared = sum(compare_with_source(out, read_manifest(path), config) for path in parts)
    print(f"{out}: {compared:,} tokens are those of the source")
    if not manifest["complete"]:
        raise UserError(
            f"{out} is sound as far as it goes, but not complete; run fineweb.py again with the flags it had"
        )


def compare_with_source(out: Path, manifest: dict, config: Config, samples: int = 3) -> int:
    """Tokenize the unit that some shards begin in again; how many tokens were compared. Raises UserError."""
    was = Config(**manifest["settings"], out=config.out)
    source, part = open_source(was, manifest["source"]), parse_part(was.part)
    check_source(manifest, source, out)
    blocks, scratch, compared = plan_blocks(source.files, was.shuffle, part), out / (scratch_name(part) + "-verify"), 0
    scratch.mkdir(exist_ok=True)
    try:
        for index in sorted(
            random.Random(0).sample(range(len(manifest["shards"])), min(samples, len(manifest["shards"])))
        ):
            begin, name = Cursor(*manifest["starts"][index]), manifest["shards"][index]["name"]
            for file in blocks[begin.block]:
                source.fetch(file, scratch)
            paths = [source.place(file, scratch) for file in blocks[begin.block]]
            unit = units_of_block(blocks[begin.block], paths, source.files, was)[begin.unit]
            tokens = tokenize_unit(unit, job_of(was)._replace(backend="tiktoken"))
            pairs = [(name, tokens.ids)] + ([] if tokens.targets is None else [(mask_name(name), tokens.targets)])
            for path, expected in pairs:
                stored = np.load(out / path, mmap_mode="r")[: len(expected) - begin.token]
                if not np.array_equal(stored, expected[begin.token :][: len(stored)]):
                    raise UserError(
                        f"{path} does not begin with the tokens of {unit.name}; make the set anew in another --out"
                    )
            compared += len(stored)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return compared


if __name__ == "__main__":
    run(main, Config, __doc__)
