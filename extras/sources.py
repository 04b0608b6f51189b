"""
Where text comes from: local files and datasets of the Hugging Face hub; extras/python_docs.py has the built-in corpus.

A source is a list of files. A file that can't be read from the middle where it is (on the hub, compressed, a JSON
array) is first written to a scratch directory; `Fetcher` does that one file ahead and removes the file after its use.
Scratch names contain a hash of the file's identity, so leftovers of a killed run are never taken for another version.
"""

import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from extras.cli import UserError
from extras.files import atomic_file
from extras.manifest import SourceRecord

ADVICE = "give files, folders, or a glob in quotes"
KINDS = ("parquet", "jsonl", "txt")  # how a file is read
KIND_OF_SUFFIX = {kind: kind for kind in KINDS} | {"ndjson": "jsonl", "json": "jsonl"}  # before .gz or .zst
BINS = re.compile(r"\w[\w-]*_(train|val)_\d+\.bin")  # shards of llm.c and modded-nanogpt
HUB_ID = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?(:[^\\]+)?")
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}  # not the hub's fault
TRIES = 6  # of a request to the hub, each of which its library repeats


class SourceFile(NamedTuple):
    """name, size in bytes: as the manifest records them. make: if given, writes the file to `path` in the scratch."""

    name: str
    size: int
    path: str
    make: Callable[[Path], None] | None = None
    is_remote: bool = False

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    @property
    def weight(self) -> int:
        """Its share of the work, in bytes; at least 1, so that empty files and unknown sizes never divide by zero."""
        return max(1, self.size)

    def fetch(self, scratch: Path) -> Path:
        if not self.make:
            return Path(self.path)
        if not (path := scratch / self.path).exists():
            self.make(path)
        return path


class Source(NamedTuple):
    record: SourceRecord  # for the manifest
    files: list[SourceFile]


def kind_of(name: str) -> str | None:
    """'a/b.jsonl.gz' -> 'jsonl'; None for files we can't read."""
    return KIND_OF_SUFFIX.get(suffix_of(name))


def suffix_of(name: str) -> str:
    """'a/b.JSON.gz' -> 'json'."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1][1:] if suffix in (".gz", ".zst") else suffix[1:]


def is_compressed(name: str) -> bool:
    return name.lower().endswith((".gz", ".zst"))


def scratch_name(name: str, *identity) -> str:
    stem = re.sub(r"[^\w-]", "_", os.path.basename(name).partition(".")[0])[:60]
    return f"{stem}-{hashlib.sha256(repr((name, identity)).encode()).hexdigest()[:16]}.{kind_of(name)}"


class Fetcher:
    """Brings files to this disk, one ahead of their use, and removes them after it.

    files: in the order of use. done: how many of them are already used up. is_limited: perhaps not all are needed.
    """

    def __init__(self, files: list[SourceFile], done: int, scratch: Path, keep_downloads: bool, is_limited=False):
        self.files, self.scratch, self.keep_downloads = files, scratch, keep_downloads
        self.released, self.thread = 0, None
        scratch.mkdir(exist_ok=True)
        needed = files[done : done + 1] if is_limited else files[done:]
        absent = [file.name for file in needed if file.is_remote and not (scratch / file.path).exists()]
        if absent and is_offline():  # said before any work
            names = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            raise UserError(f"HF_HUB_OFFLINE is set, and still to be fetched from the hub: {names}; unset it to go on")
        self.release(done)

    def get(self, number: int) -> Path:
        if self.thread:
            self.thread.join()
        path = self.files[number].fetch(self.scratch)
        self.fetch_ahead()
        return path

    def fetch_ahead(self) -> None:
        """At most two files are on the disk, unless more are needed at once. `get` tries again what fails here."""
        number, is_busy = self.released + 1, self.thread and self.thread.is_alive()
        if number < len(self.files) and self.files[number].make and not is_busy:
            # a daemon, so that Ctrl-C need not wait for the end of a download
            self.thread = threading.Thread(target=self.try_to_fetch, args=[number], name="fetch", daemon=True)
            self.thread.start()

    def try_to_fetch(self, number: int) -> None:
        with contextlib.suppress(BaseException):
            self.files[number].fetch(self.scratch)

    def release(self, done: int) -> None:
        """Remove the first `done` files: all of their tokens are committed."""
        for file in self.files[self.released : done]:
            if file.make and not self.keep_downloads:
                (self.scratch / file.path).unlink(missing_ok=True)
        if done > self.released:
            self.released = done
            self.fetch_ahead()


# ----------------------------------------------------------------------------------------------------------------------
# Local files


def local_source(patterns: list[str], flag: str = "--input") -> Source:
    """Files in the order given; those of a glob or a folder sorted by name. Raises UserError."""
    files, stamps = [], []
    for index, path in enumerate(path for pattern in patterns for path in expand(pattern, flag)):
        if kind_of(path) is None:
            suffixes = " ".join(f".{suffix}" for suffix in KIND_OF_SUFFIX)
            raise UserError(f"{flag} {path}: not of a known kind: {suffixes}, also with .gz or .zst")
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
            raise UserError(f"{flag} {path} is not a regular file; {ADVICE}")
        name, make = utf8(Path(path).as_posix()), None
        try:
            size = os.path.getsize(path)
            stamps.append(stamp(path, size))
        except OSError as error:
            raise UserError(f"{flag} {path}: {error.strerror}; check the path and its permissions") from error
        if is_compressed(path) or suffix_of(path) == "json":
            make = functools.partial(unpack, Path(path))
            path = scratch_name(name, flag, index, size, stamps[-1])
        files.append(SourceFile(name, size, path, make))
    listing = [(file.name, file.size) for file in files]
    return Source(SourceRecord(input=list(map(utf8, patterns)), revision=None, files=listing, stamps=stamps), files)


def utf8(name: str) -> str:
    """A file name that JSON can hold: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stamp(path: str, size: int, samples: int = 16, length: int = 4096) -> str:
    """Tells an overwritten file from the one before without reading it all: a hash of samples, and its mtime."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in [*range(0, size, max(length, size // samples)), max(0, size - length)]:
            file.seek(start)
            digest.update(file.read(length))
        return f"{digest.hexdigest()[:32]} {os.fstat(file.fileno()).st_mtime_ns}"


def expand(pattern: str, flag: str) -> list[str]:
    """Names of files, which may not exist. Raises UserError if there is none."""
    pattern = os.path.expanduser(pattern)
    folder, why = os.path.dirname(pattern) or ".", "no file matches"
    if os.path.isdir(pattern):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names)
        names = sorted(name for name in found if kind_of(name) and not os.path.basename(name).startswith("."))
        why = "no file of a known kind in this folder"
    elif os.path.exists(pattern) or not glob.has_magic(pattern):
        names = [pattern]  # also if it looks like a glob, such as `a[1].jsonl`
    else:
        literal = pattern.replace("[", "[[]")  # for files in a folder `a[1]`
        names = sorted(glob.glob(pattern, recursive=True) or glob.glob(literal, recursive=True))
    if not names:
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            why = f"the directory {folder} is not readable"
        raise UserError(f"{flag} {pattern}: {why}; {ADVICE}")
    return names


def unpack(path: Path, target: Path) -> None:
    """Decompress the file, and turn a JSON array into JSON lines, so that reading can begin in the middle."""
    try:
        blocks = filter(None, decompressed(path))
        first = next(blocks, b"")
        blocks = itertools.chain([first], blocks)
        if suffix_of(path.name) == "json" and first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            records = json.loads(b"".join(blocks))
            blocks = ((json.dumps(record) + "\n").encode() for record in records)
        with atomic_file(target) as file:
            file.writelines(blocks)
    except MemoryError:
        raise UserError(f"{path.name} is too large to be read as one JSON array; write it as JSON lines") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault
        raise UserError(f"{path.name} is damaged: {error}; get the file again") from error


def decompressed(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises the codec's error, or EOFError, for a file that was cut short."""
    suffix = path.suffix.lower()
    if is_compressed(path.name) and not path.stat().st_size:
        raise EOFError("it is empty")
    with gzip.open(path) if suffix == ".gz" else open(path, "rb") as file:
        blocks = iter(lambda: file.read(2**20), b"")
        if suffix != ".zst":
            yield from blocks
            return
        import zstandard

        decoder, frame = zstandard.ZstdDecompressor(max_window_size=2**31), None
        for data in blocks:
            while data:  # of one frame or several; zstandard's own reader accepts a truncated last frame
                frame = frame or decoder.decompressobj()
                yield frame.decompress(data)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame:
            raise EOFError("it ends in the middle of a frame")


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of the Hugging Face hub


def hub_source(dataset: str, revision: str | None, recorded: SourceRecord | None, max_bytes: int | None) -> Source:
    """A dataset `ID[:CONFIG]` of the hub: the files of its train split, at one commit.

    recorded: in the manifest of a run that is resumed, so that the hub need not be asked again. max_bytes: how much
    text is enough, for a dataset that must be streamed. Raises UserError for what isn't there or can't be reached.
    """
    if not HUB_ID.fullmatch(dataset) or "--" in dataset or ".." in dataset:
        raise UserError(f"--dataset {dataset!r} is not the name of a dataset of the hub; --input takes files, folders")
    repo, _, config = dataset.partition(":")
    if recorded is None:
        settings = {"revision": revision, "files_metadata": True}
        info = with_retries(f"dataset {repo}", hub().dataset_info, repo, **settings)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        configs = (info.card_data.get("configs") if info.card_data else None) or []
        names = train_files(list(sizes), configs, config, repo)
        recorded = SourceRecord(dataset=dataset, revision=info.sha, files=[(name, sizes[name]) for name in names])
    commit, files = recorded.revision, []
    if all(suffix_of(name) in (*KINDS, "bin") for name, _ in recorded.files):
        for name, size in recorded.files:
            make = functools.partial(download, repo, commit, name)
            files.append(SourceFile(name, size, scratch_name(name, commit), make, True))
    else:
        name, size = f"{repo}.jsonl", sum(size for _, size in recorded.files)
        make = functools.partial(with_retries, f"dataset {repo}", stream, dataset, commit, max_bytes)
        files.append(SourceFile(name, size, scratch_name(name, dataset, commit, max_bytes), make, True))
    return Source(recorded, files)


def is_offline() -> bool:
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def hub():
    from huggingface_hub import HfApi, utils

    utils.disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # as set now, not at the first import


def download(repo: str, commit: str, name: str, target: Path) -> None:
    """Fetch a file of the hub to `target`, which is there whole or not at all."""
    folder = target.with_name(target.name + ".download")
    settings = {"repo_type": "dataset", "revision": commit, "local_dir": folder}
    path = Path(with_retries(name, hub().hf_hub_download, repo, name, **settings))
    if is_compressed(name):
        unpack(path, target)
    else:
        os.replace(path, target)
    shutil.rmtree(folder, ignore_errors=True)


def stream(dataset: str, commit: str, max_bytes: int | None, target: Path) -> None:
    """Write the train split of a dataset that only `datasets` can read to a JSON lines file."""
    import datasets

    repo, _, config = dataset.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split="train", revision=commit, streaming=True)
        with atomic_file(target) as file:
            for row in rows:
                file.write((json.dumps(row, default=str) + "\n").encode())
                if max_bytes is not None and file.tell() >= max_bytes:
                    break
    except (RuntimeError, ValueError, FileNotFoundError) as error:  # dataset scripts, wrong names, broken files
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"`datasets` can't read {dataset} ({reason}); take another, or use --input") from error


def with_retries(what: str, action: Callable, *arguments, **settings):
    """What `action` returns, repeated while the hub is busy or unreachable. Raises UserError when that is of no use."""
    for attempt in range(TRIES):
        try:
            return action(*arguments, **settings)
        except Exception as error:
            if isinstance(error, UserError) or getattr(error, "errno", None) in DISK_ERRORS:
                raise
            if is_offline():
                raise UserError(f"can't get {what}: HF_HUB_OFFLINE is set; unset it, or use --input") from error
            reason = " ".join(str(error).split())[:200]
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            is_network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
            if status in (401, 403, 404) or not is_network:
                raise UserError(f"can't get {what} ({reason}); check --dataset, or set HF_TOKEN") from error
            if attempt == TRIES - 1:
                hint = "set HF_TOKEN for a higher limit" if status == 429 else "run again later: it goes on from here"
                raise UserError(f"could not get {what} from {hub().endpoint} ({reason}); {hint}") from error
            if attempt == 2:
                print(f"the hub does not send {what} ({reason}); trying again", file=sys.stderr)
            time.sleep(2**attempt)


def train_files(names: list[str], configs: list[dict], wanted: str, repo: str) -> list[str]:
    """The files of the train split of a configuration, in order; without a dataset card, those that look like it.

    Of a dataset of token files those of val come first, as they do among our own shards.
    """
    from fsspec.utils import glob_translate  # what the hub's own library matches names with

    if bins := [name for name in names if BINS.fullmatch(name)]:
        return sorted(bins, key=lambda name: ("_val_" not in name, name))
    data_files = {config.get("config_name", "default"): config.get("data_files") for config in configs}
    if not wanted and len(data_files) > 1 and "default" not in data_files:
        raise UserError(f"{repo} has several configurations; say {repo}:NAME, of: {', '.join(data_files)}")
    if wanted and wanted not in data_files:
        raise UserError(f"{repo} has no configuration {wanted!r}; it has: {', '.join(data_files) or 'none'}")
    chosen = wanted or ("default" if "default" in data_files else next(iter(data_files), None))
    names, patterns = sorted(names), train_patterns(data_files.get(chosen))
    found = [name for pattern in patterns for name in names if re.fullmatch(glob_translate(pattern), name)]
    if not patterns:
        split = re.compile(r"(^|[/_.-])(train|test|valid|validation|val|dev|eval)(?=[/_.-])")
        found = next(filter(None, ([n for n in names if kind_of(n) == kind] for kind in KINDS)), [])
        found = [n for n in found if "train" in (s := {m[2] for m in split.finditer(n)}) or not s]
        found = found or [name for name in names if "." in name and not name.startswith((".", "README"))]
    if not found:
        raise UserError(f"{repo} has no files to train on{f' in configuration {wanted!r}' if wanted else ''}")
    return list(dict.fromkeys(found))


def train_patterns(data_files) -> list[str]:
    """The patterns for train in a dataset card's `data_files`: one or several, or a dict or a list of them by split."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    entries = [data_files] if isinstance(data_files, str) else data_files or []
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in entries]
    paths = [entry["path"] for entry in entries if entry.get("split", "train") == "train"]
    return [path for several in paths for path in ([several] if isinstance(several, str) else several)]
