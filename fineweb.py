"""
Text -> token shards, the food of train_gpt2.py.

    python fineweb.py                                               # FineWeb-Edu sample-10BT: 10B GPT-2 tokens, 20 GB
    python fineweb.py --dataset python-docs --out data/python-docs  # the English every Python carries: no network
    python fineweb.py --input 'books/*.txt' --out data/books        # .parquet .jsonl .txt, also .gz and .zst
    python fineweb.py --verify                                      # is the set on disk what the manifest says?

The way of the text:

    source --fetch, one ahead--> files --cut--> units --worker processes--> tokens, in order --> shards + manifest.json

A unit is a row group of a parquet file or a few megabytes of a text file; what comes back for it is one uint16 array. A
shard appears under its name only when it is whole, then the manifest that counts it in. So a run that was killed at any
moment goes on from the last shard when it is started again, and ends with the same bytes as if nothing had happened.
"""

import ast
import contextlib
import functools
import glob
import gzip
import hashlib
import inspect
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError, knob, run
from tokenizer import TOKENIZERS, load_tokenizer, replace_surrogates

FORMAT = 1  # of the manifest
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
PYTHON_DOCS = "python-docs"
KINDS = ("parquet", "jsonl", "txt")  # of files; by suffix, before .gz or .zst
SLICE_BYTES = 4 * 2**20  # of a text file per unit: about a million tokens, as in a row group of FineWeb-Edu
GROUP_BYTES = 64 * 2**20  # of text in a row group, beyond which it makes several units
TOKENS_PER_BYTE = {"parquet": 0.35, "jsonl": 0.22, "txt": 0.22}  # GPT-2's, as in FineWeb-Edu, in English
COMPRESSION = 3  # text bytes per byte of .gz or .zst, about


# ----------------------------------------------------------------------------------------------------------------------
# Knobs


@dataclass
class Config:
    dataset: str = knob(FINEWEB_EDU, f"dataset of the Hugging Face hub, ID[:CONFIG], or {PYTHON_DOCS}", group="source")
    input: list[str] = knob(  # noqa: RUF009
        [], "files or globs of your own, instead of --dataset", metavar="FILE"
    )
    text_column: str = knob("text", "the column or JSON field that holds the text", metavar="NAME")
    revision: str | None = knob(None, "branch, tag or commit of the hub dataset (default: main as it is today)")
    max_tokens: int | None = knob(None, "stop after so many tokens (default: all)", metavar="N")
    shuffle: int | None = knob(None, "shuffle row groups over all files, and documents in them", metavar="SEED")
    part: str | None = knob(None, "tokenize the I-th of N parts, for job arrays; all share --out", metavar="I/N")
    skip_bad: bool = knob(False, "leave out documents that can't be read, and count them")

    out: str = knob("edu_fineweb10B", "directory of the shards", group="shards", metavar="DIR")
    shard_size: int = knob(100_000_000, "tokens in a shard", metavar="N")
    val_size: int | None = knob(
        None, "tokens in shard 0, the val split (default: one shard of FineWeb-Edu, a twentieth of others)", metavar="N"
    )
    tokenizer: str = knob("gpt2", "GPT-2's byte-pair encoding, or plain bytes", choices=TOKENIZERS)

    workers: int | None = knob(None, "processes (default: one a core; 0: none but this one)", group="run", metavar="N")
    keep_downloads: bool = knob(False, "keep what was fetched, in OUT/downloads")


# ----------------------------------------------------------------------------------------------------------------------
# Units: what one worker does at a time


class Unit(NamedTuple):
    """A piece of a file: rows [start, stop) of a row group, or the lines that begin in bytes [start, stop).

    share: bytes of the source that it stands for. tokens: how many it will give, where the file says so. order: the
    seed its documents are shuffled by, if they are.
    """

    path: str
    name: str
    kind: str
    group: int
    start: int
    stop: int
    share: float
    tokens: int | None = None
    order: str | None = None


class Tokens(NamedTuple):
    """What became of a unit: ids (n,) uint16, end-of-text before every document; documents in it, and those skipped."""

    ids: np.ndarray
    documents: int
    skipped: int


class Flaw(NamedTuple):
    """Stands where a document should be."""

    reason: str


class Job(NamedTuple):
    """What a worker has to know beside the unit."""

    tokenizer: str
    text_column: str
    skip_bad: bool


def units_of(file: SourceFile, path: Path, text_column: str) -> list[Unit]:
    """The units of a file, in order, each big enough to be worth a message and small enough for any memory."""
    if file.kind == "parquet":
        return row_groups(file, path, text_column)
    size = path.stat().st_size
    starts = range(0, size, SLICE_BYTES)
    return [
        Unit(str(path), file.name, file.kind, 0, start, min(start + SLICE_BYTES, size), file.size / len(starts))
        for start in starts
    ]


def row_groups(file: SourceFile, path: Path, text_column: str) -> list[Unit]:
    metadata = parquet_metadata(str(path), file.name)
    column = text_column_index(metadata, text_column, file.name)
    counted = token_counts(path, metadata)
    units = []
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        text_bytes = metadata.row_group(group).column(column).total_uncompressed_size
        slices = max(1, min(rows, -(-text_bytes // GROUP_BYTES)))
        cuts = [rows * i // slices for i in range(slices + 1)]
        tokens = counted[group] // slices if counted else None
        for start, stop in zip(cuts, cuts[1:]):
            share = file.size * (stop - start) / max(1, metadata.num_rows)
            units.append(Unit(str(path), file.name, "parquet", group, start, stop, share, tokens))
    return units


@functools.lru_cache(maxsize=2)
def parquet_metadata(path: str, name: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} is not a parquet file, or a damaged one: {error}") from error


def text_column_index(metadata, text_column: str, name: str) -> int:
    """Where the column is in `metadata`. Raises UserError if it isn't there, or holds no text."""
    schema = metadata.schema.to_arrow_schema()
    if text_column not in schema.names:
        raise UserError(f"{name} has no column {text_column!r}; --text_column takes one of: {', '.join(schema.names)}")
    kind = str(schema.field(text_column).type)
    if "string" not in kind and "utf8" not in kind:
        raise UserError(f"column {text_column!r} of {name} holds {kind}, not text; choose another with --text_column")
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_column)


def token_counts(path: Path, metadata) -> list[int] | None:
    """GPT-2 tokens of every row group, ends of text included, where FineWeb's column `token_count` gives them."""
    import pyarrow.parquet as pq

    schema = metadata.schema.to_arrow_schema()
    if "token_count" not in schema.names or str(schema.field("token_count").type) not in ("int32", "int64"):
        return None
    counts = pq.read_table(path, columns=["token_count"]).column(0).to_numpy()
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum([0, *rows])
    return [int(counts[start:end].sum()) + int(end - start) for start, end in zip(ends, ends[1:])]


def tokenize_unit(unit: Unit, job: Job, documents: slice = slice(None)) -> Tokens:
    """All of a worker's work. documents: which of the unit's, to find one that can't be borne."""
    texts, skipped = documents_of(unit, job)
    texts = texts[documents]
    ids = encode_documents(texts, job.tokenizer)
    if unit.kind == "txt" and unit.start > 0:  # the middle of a document
        return Tokens(ids[1:], 0, skipped)
    return Tokens(ids, len(texts), skipped)


def documents_of(unit: Unit, job: Job) -> tuple[list[str], int]:
    """The texts of a unit in their order, and how many were left out.

    Raises UserError, naming the file and the place, for a document that can't be read unless `job.skip_bad`.
    """
    found = READERS[unit.kind](unit, job.text_column)
    texts = [text for text in found if not isinstance(text, Flaw)]
    skipped = len(found) - len(texts)
    if skipped and not job.skip_bad:
        flaw = next(text for text in found if isinstance(text, Flaw))
        raise UserError(f"{flaw.reason}; --skip_bad leaves such documents out")
    if unit.order is not None:
        random.Random(unit.order).shuffle(texts)
    return texts, skipped


def read_rows(unit: Unit, text_column: str) -> list:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = parquet_metadata(unit.path, unit.name)
    rows = metadata.row_group(unit.group).num_rows
    try:
        with pq.ParquetFile(unit.path, metadata=metadata) as file:
            if unit.stop - unit.start == rows:
                texts = file.read_row_group(unit.group, [text_column], use_threads=False).column(0).to_pylist()
            else:
                batches = file.iter_batches(1024, [unit.group], [text_column], use_threads=False)
                texts = rows_between(batches, unit.start, unit.stop)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"row group {unit.group} of {unit.name} is damaged: {error}; fetch the file again") from error
    if None in texts:
        first = sum(metadata.row_group(group).num_rows for group in range(unit.group)) + unit.start
        texts = [Flaw(f"row {first + i} of {unit.name} has no text") if t is None else t for i, t in enumerate(texts)]
    return texts


def rows_between(batches, start: int, stop: int) -> list:
    texts, row = [], 0
    for batch in batches:
        texts += batch.column(0)[max(0, start - row) : max(0, stop - row)].to_pylist()
        row += len(batch)
        if row >= stop:
            break
    return texts


def read_lines(unit: Unit, text_column: str) -> list:
    """The texts of the JSON lines that begin in the unit's bytes."""
    texts = []
    with open(unit.path, "rb") as file:
        if unit.start > 0:
            file.seek(unit.start - 1)
            file.readline()
        while (begin := file.tell()) < unit.stop and (line := file.readline()):
            if line.isspace():
                continue
            text = text_of(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line, text_column)
            if isinstance(text, Flaw):
                text = Flaw(f"line {line_number(unit.path, begin)} of {unit.name} {text.reason}")
            texts.append(text)
    return texts


def text_of(line: bytes, text_column: str) -> str | Flaw:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Flaw(f"is not JSON ({error})")
    if not isinstance(record, dict):
        return Flaw(f"is no JSON object but {type(record).__name__}")
    if text_column not in record:
        return Flaw(f"has no field {text_column!r} (--text_column takes one of: {', '.join(record)})")
    text = record[text_column]
    return text if isinstance(text, str) else Flaw(f"holds {type(text).__name__} in {text_column!r}, not text")


def line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(2**20, offset - at)).count(b"\n") for at in range(0, offset, 2**20)) + 1


def read_text(unit: Unit, text_column: str) -> list:
    """A .txt file is one document; a big one is cut where no token of GPT-2 goes across, so that nothing changes."""
    with open(unit.path, "rb") as file:
        start, stop = safe_cut(file, unit.start), safe_cut(file, unit.stop)
        file.seek(start)
        data = file.read(stop - start)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return [Flaw(f"byte {start + error.start} of {unit.name} is not UTF-8")]
    return [text.removeprefix("\ufeff") if unit.start == 0 else text]


def safe_cut(file, offset: int) -> int:
    """The first place at or after `offset` between an ASCII character that is no space and one that is.

    No token of GPT-2 goes across: its pattern takes whitespace only at the beginning of a token, and never looks back.
    """
    if offset == 0:
        return 0
    file.seek(offset - 1)
    at, last = offset - 1, b""
    while block := file.read(2**16):
        data = last + block
        if found := re.search(rb"[!-~](?=[ \t\n\r])", data):
            return at + found.end()
        at, last = at + len(data) - 1, data[-1:]
    return at + len(last)


READERS = {"parquet": read_rows, "jsonl": read_lines, "txt": read_text}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def encode_documents(texts: list[str], tokenizer_name: str) -> np.ndarray:
    """(n,) uint16: end-of-text before every document. Raises UserError, with its beginning, for a text that fails."""
    tokenizer = load_tokenizer(tokenizer_name)
    arrays = []
    for text in texts:
        if tokenizer.name == "bytes":
            ids = np.frombuffer(replace_surrogates(text).encode("utf-8"), np.uint8)
        else:
            try:
                ids = tokenizer.encode(text)
            except BaseException as error:  # tiktoken's PanicException is not an Exception
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                raise UserError(f"the document that begins {text[:60]!r} can't be tokenized: {error}") from None
        array = np.empty(len(ids) + 1, np.uint16)
        array[0], array[1:] = tokenizer.eot, ids
        arrays.append(array)
    return np.concatenate(arrays) if arrays else np.empty(0, np.uint16)


def token_lengths(tokenizer) -> np.ndarray:
    """(V,) bytes of text behind every token; none behind end-of-text."""
    lengths = np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.n_vocab)])
    lengths[tokenizer.eot] = 0
    return lengths


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


def tokenize_all(units: Iterable, job: Job, workers: int) -> Iterator[tuple[tuple, Tokens]]:
    """(key, tokens) of every (key, unit), in order, few of them in memory at a time.

    A worker that dies takes what it was doing along; those units are done again with care, and the rest goes on.
    """
    if workers == 0:
        yield from ((key, tokenize_unit(unit, job)) for key, unit in units)
        return
    units, pending, pool = iter(units), deque(), None
    try:
        while True:
            pool = pool or start_workers(workers)
            for key, unit in itertools.islice(units, 2 * workers + 2 - len(pending)):
                pending.append((key, unit, submit(pool, unit, job)))
            if not pending:
                return
            key, unit, future = pending.popleft()
            try:
                tokens = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False)
                pool, tokens = None, tokenize_with_care(unit, job)
            yield key, tokens
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)


def submit(pool: ProcessPoolExecutor, unit: Unit, job: Job) -> Future:
    try:
        return pool.submit(tokenize_unit, unit, job)
    except BrokenProcessPool as error:  # a worker died since the last result
        future = Future()
        future.set_exception(error)
        return future


def start_workers(workers: int) -> ProcessPoolExecutor:
    """By spawn, which is safe beside threads and the same everywhere, unless the program has chosen for itself."""
    method = multiprocessing.get_start_method(allow_none=True) or "spawn"
    return ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=begin_worker)


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
                return [pool.submit(tokenize_unit, unit, job, slice(start, stop)).result()]
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
    return Tokens(np.concatenate([part.ids for part in parts]), sum(part.documents for part in parts), parts[0].skipped)


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
    total, start, mine = sum(file.size for file in files), 0, []
    for index, file in enumerate(files):
        if start * part[1] < total * (part[0] + 1) and (start + file.size) * part[1] > total * part[0]:
            mine.append(index)
        start += file.size
    return [[index] for index in mine] if shuffle is None else [mine] if mine else []


def units_of_block(block: list[int], paths: list[Path], files: list[SourceFile], config: Config) -> list[Unit]:
    """The units of a block in the order of the stream."""
    (i, n), total = parse_part(config.part), sum(file.size for file in files)
    units = []
    for index, path in zip(block, paths):
        of_file, start = units_of(files[index], path, config.text_column), sum(file.size for file in files[:index])
        for number, unit in enumerate(of_file):
            if (start * len(of_file) + files[index].size * number) * n // (total * len(of_file)) == i:
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


def write_manifest(path: Path, manifest: dict) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())


class ShardWriter:
    """Writes one stream of tokens as shards, each as it fills, and after each the manifest that counts it in."""

    def __init__(self, out: Path, manifest: dict, part: tuple[int, int]):
        self.out, self.manifest, self.part = out, manifest, part
        self.tokenizer = load_tokenizer(manifest["tokenizer"]["name"])
        self.lengths = token_lengths(self.tokenizer)
        self.file, self.tokens = None, 0
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

    def write(self, ids: np.ndarray, cursor: Cursor) -> bool:
        """Append the tokens that begin at `cursor`. Whether a shard was committed."""
        done, committed = 0, len(self.manifest["shards"])
        while done < len(ids):
            if self.file and self.tokens == self.size:
                self.commit(cursor._replace(token=cursor.token + done))
            if not self.file:
                self.begin(cursor._replace(token=cursor.token + done))
            piece = ids[done : done + self.size - self.tokens]
            self.file.write(piece.astype("<u2", copy=False).tobytes())
            self.counts += np.bincount(piece, minlength=len(self.lengths))
            self.tokens += len(piece)
            self.total += len(piece)
            done += len(piece)
        return len(self.manifest["shards"]) > committed

    def begin(self, cursor: Cursor) -> None:
        self.start, self.tokens, self.counts = cursor, 0, np.zeros(len(self.lengths), np.int64)
        self.file = open(self.path.with_name(self.path.name + ".tmp"), "wb")  # noqa: SIM115
        self.file.write(npy_header(self.size))

    def commit(self, cursor: Cursor) -> None:
        """Give the shard its name and enter it. cursor: where the next one begins."""
        header = npy_header(self.tokens)
        self.file.seek(0)
        self.file.write(header)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = sha256_of(Path(self.file.name))
        os.replace(self.file.name, self.path)
        sync_directory(self.out)
        entry = {
            "name": self.path.name,
            "split": self.split,
            "tokens": self.tokens,
            "documents": int(self.counts[self.tokenizer.eot]),
            "bytes": int(self.counts @ self.lengths),
            "sha256": digest,
        }
        self.manifest["shards"].append(entry)
        self.manifest["starts"].append(list(self.start))
        self.manifest["cursor"] = list(cursor)
        write_manifest(self.out / manifest_name(self.part), self.manifest)
        self.file, self.tokens = None, 0

    def finish(self, cursor: Cursor) -> None:
        """Commit what there is, and complete the manifest. Raises OnlyVal if the val split would take all."""
        if self.split == "val" and self.file:
            raise OnlyVal(self.total)
        if self.file:
            self.commit(cursor)
        self.manifest["complete"] = True
        write_manifest(self.out / manifest_name(self.part), self.manifest)

    def close(self) -> None:
        """Leave no half shard behind."""
        if self.file:
            with contextlib.suppress(OSError):  # what could not be written before can't be now
                self.file.close()
            Path(self.file.name).unlink(missing_ok=True)
            self.file = None


class OnlyVal(Exception):
    """The text ended within the val split; the argument is the number of tokens there are."""


def npy_header(tokens: int) -> bytes:
    """What `np.save` writes before a 1-D uint16 array; numpy pads it, so that its length is the same for any count."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    return buffer.getvalue()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The run


def settings_of(config: Config) -> dict:
    """All that the bytes of the result depend on."""
    names = ["text_column", "revision", "max_tokens", "shuffle", "part", "skip_bad"]
    names += ["shard_size", "val_size", "tokenizer"]
    asked = {"input": config.input} if config.input else {"dataset": config.dataset}
    return asked | {name: getattr(config, name) for name in names}


def manifest_name(part: tuple[int, int]) -> str:
    return "manifest.json" if part[1] == 1 else f"manifest.part-{part[0] + 1}-of-{part[1]}.json"


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
    was = manifest["settings"]
    changed = [
        f"--{name} {asked.get(name)} (it was {was.get(name)})"
        for name in sorted(was.keys() | asked.keys())
        if was.get(name) != asked.get(name)
    ]
    if changed:
        raise UserError(f"{manifest_path.parent} was begun otherwise: {', '.join(changed)}; choose another --out")
    for number, shard in enumerate(manifest["shards"]):
        path = manifest_path.parent / shard["name"]
        size = len(npy_header(shard["tokens"])) + 2 * shard["tokens"]
        if not path.exists() or path.stat().st_size != size:
            print(f"{path} is missing or damaged: going on from there")
            kept = {"shards": manifest["shards"][:number], "starts": manifest["starts"][:number], "complete": False}
            return manifest | kept | {"cursor": manifest["starts"][number]}
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


def clear_directory(out: Path, part: tuple[int, int], begun: bool) -> None:
    """Make `out`, without what a killed run left. Raises UserError if shards of unknown origin lie there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} can't be made: {error.strerror}") from error
    strange = sorted([*out.glob("edufineweb_*.npy"), *out.glob("manifest.*json")])
    if strange and part[1] == 1 and not begun:
        raise UserError(f"{out} holds {strange[0].name}, of which no manifest.json tells; choose another --out")
    for path in out.glob("edufineweb_*.npy.tmp"):
        if int(path.name.split("_")[2].split(".")[0]) % part[1] == part[0]:
            path.unlink(missing_ok=True)
    (out / f"{manifest_name(part)}.tmp").unlink(missing_ok=True)


def main(config: Config) -> None:
    check(config)
    out, part = Path(config.out), parse_part(config.part)
    manifest_path = out / manifest_name(part)
    manifest = read_manifest(manifest_path)
    if manifest:
        manifest = resumed(manifest, config, manifest_path)
    source = open_source(config, manifest and manifest["source"])
    if manifest:
        check_source(manifest, source, out)
    if manifest and manifest["complete"]:
        print(f"{out} is complete: {summary(manifest)}; nothing to do")
        return
    clear_directory(out, part, begun=manifest is not None)
    manifest = manifest or new_manifest(config, source)
    write_manifest(manifest_path, manifest)
    try:
        tokenize_source(config, source, manifest, out)
    except OnlyVal as ended:
        (total,) = ended.args
        print(f"The val split was to have more than the {total:,} tokens there are: it gets a twentieth")
        manifest["val_size"] = total // 20
        write_manifest(manifest_path, manifest)
        tokenize_source(config, source, manifest, out)
    print(f"{out}: {summary(manifest)}")
    if manifest["skipped"]:
        print(f"{manifest['skipped']} documents could not be read and were left out")
    if manifest["shards"] and (last := manifest["shards"][-1]["tokens"]) < config.shard_size:
        print(f"The last shard holds what was left, {last:,} of {config.shard_size:,} tokens: that is no failure.")


def summary(manifest: dict) -> str:
    shards = manifest["shards"]
    tokens = {split: sum(s["tokens"] for s in shards if s["split"] == split) for split in ("train", "val")}
    documents = sum(shard["documents"] for shard in shards)
    return f"{documents:,} documents, {len(shards)} shards, {tokens['train']:,} train and {tokens['val']:,} val tokens"


def tokenize_source(config: Config, source: Source, manifest: dict, out: Path) -> None:
    """From the manifest's cursor to the end: write every shard, and complete the manifest."""
    part, first = parse_part(config.part), Cursor(*manifest["cursor"])
    blocks = plan_blocks(source.files, config.shuffle, part)
    fetcher = Fetcher(source, blocks, out / scratch_name(part), config.keep_downloads)
    writer = ShardWriter(out, manifest, part)
    progress = Progress(source.files, config, writer.total)
    job = Job(config.tokenizer, config.text_column, config.skip_bad)
    units = planned_units(blocks, first, fetcher, source.files, config, progress)
    stream = tokenize_all(units, job, workers_of(config))
    with contextlib.closing(stream), contextlib.closing(writer), contextlib.closing(progress):
        for (block, number, unit), tokens in stream:
            skip = first.token if (block, number) == first[:2] else 0
            ids = tokens.ids[skip:][: (config.max_tokens or sys.maxsize) - writer.total]
            if writer.write(ids, Cursor(block, number, skip)):
                fetcher.release(blocks[manifest["cursor"][0]][0])
            manifest["skipped"] += tokens.skipped
            progress.update(unit, len(ids), tokens.documents, writer.index)
            if writer.total == config.max_tokens:
                break
        writer.finish(Cursor(len(blocks), 0, 0))
    if not config.keep_downloads:
        shutil.rmtree(out / scratch_name(part), ignore_errors=True)


def planned_units(blocks, first: Cursor, fetcher: Fetcher, files, config: Config, progress: "Progress") -> Iterator:
    """((block, number, unit), unit) of every unit from `first` on; files are fetched as they are needed."""
    for block in range(first.block, len(blocks)):
        units = units_of_block(blocks[block], [fetcher.get(index) for index in blocks[block]], files, config)
        progress.open(units)
        for number in range(first.unit if block == first.block else 0, len(units)):
            yield (block, number, units[number]), units[number]


def workers_of(config: Config) -> int:
    if config.workers is not None:
        return config.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """One bar for the whole job, in tokens. How many there will be is told by the files that are here, and by bytes."""

    def __init__(self, files: list[SourceFile], config: Config, done: int):
        import tqdm

        self.bytes = sum(file.size for file in files) / parse_part(config.part)[1]
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
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


if __name__ == "__main__":
    run(main, Config, __doc__)
