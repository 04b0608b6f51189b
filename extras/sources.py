"""
Where text comes from: files of one's own, datasets of the Hugging Face hub, and the English every Python carries.

A source is a list of files, each with a way to bring it to this disk in a form that can be read from the middle.
`Fetcher` does that one file ahead of its use, and removes the file after it. What is brought lies in a scratch
directory, under a name that tells which file of which version it is: what a killed run left is never taken for another.
"""

import ast
import errno
import functools
import glob
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from extras.cli import UserError
from extras.files import atomic_file
from extras.manifest import SourceRecord

PYTHON_DOCS = "python-docs"
KINDS = ("parquet", "jsonl", "txt")  # how a file is read
KIND_OF_SUFFIX = {kind: kind for kind in KINDS} | {"ndjson": "jsonl", "json": "jsonl"}  # before .gz or .zst
HUB_ID = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?(:[^\\]+)?")
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}  # errors here, not of the hub
TRIES, LONGEST_WAIT = 8, 60  # of a request to the hub, seconds between two: some three minutes in all


class SourceFile(NamedTuple):
    """name: as the manifest records it and errors call it. size: bytes. kind: of KINDS.

    path: where it lies once it is here; if `bring(scratch, path)` has to bring it, within a scratch directory.
    """

    name: str
    size: int
    kind: str
    path: str
    bring: Callable[[Path, Path], None] | None = None

    @property
    def weight(self) -> int:
        """Its part of the work, in bytes; never none, so that empty files and unknown sizes divide nothing by zero."""
        return max(1, self.size)

    def place(self, scratch: Path) -> Path:
        """Raises UserError if a link leads out of the scratch directory."""
        path = scratch / self.path if self.bring else Path(self.path)
        if self.bring and not path.resolve().is_relative_to(scratch.resolve()):
            raise UserError(f"{path} leads out of {scratch}; remove the link")
        return path

    def fetch(self, scratch: Path) -> Path:
        path = self.place(scratch)
        if self.bring and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.bring(scratch, path)
        return path


class Source(NamedTuple):
    record: SourceRecord  # for the manifest
    files: list[SourceFile]


def kind_of(name: str) -> str | None:
    """'a/b.jsonl.gz' -> 'jsonl'; None for what we can't read."""
    return KIND_OF_SUFFIX.get(suffix_of(name))


def suffix_of(name: str) -> str:
    """'a/b.JSON.gz' -> 'json'."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1][1:] if suffix in (".gz", ".zst") else suffix[1:]


def is_compressed(name: str) -> bool:
    return name.lower().endswith((".gz", ".zst"))


class Fetcher:
    """Brings files to this disk, one ahead of their use, and removes them after it.

    files: in the order of use. done: how many of them are used up already.
    """

    def __init__(self, files: list[SourceFile], done: int, scratch: Path, keep_downloads: bool):
        self.files, self.scratch, self.keep_downloads = files, scratch, keep_downloads
        self.coming: deque[Future] = deque()  # files [removed, removed + len(coming)) are here or on their way
        self.removed = 0
        scratch.mkdir(exist_ok=True)
        self.release(done)

    def get(self, number: int) -> Path:
        """The number-th file; one after the other."""
        while self.removed + len(self.coming) <= number:
            self.start()
        path = self.coming[number - self.removed].result()
        self.look_ahead()
        return path

    def start(self) -> None:
        self.coming.append(in_background(self.files[self.removed + len(self.coming)].fetch, self.scratch))

    def look_ahead(self) -> None:
        """Fetch the next file, unless two are here already: the disk holds the shards and two files."""
        if len(self.coming) < 2 and self.removed + len(self.coming) < len(self.files):
            self.start()

    def release(self, done: int) -> None:
        """Remove the first `done` files: every token of theirs is committed."""
        for file in self.files[self.removed : done]:
            if self.coming:
                self.coming.popleft().result()
            if file.bring and not self.keep_downloads:
                file.place(self.scratch).unlink(missing_ok=True)
            self.removed += 1
        self.look_ahead()


def in_background(function: Callable, *args) -> Future:
    """Its result to be. A daemon thread, so that Ctrl-C need not wait for the end of a download."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="fetch", daemon=True).start()
    return future


# ----------------------------------------------------------------------------------------------------------------------
# Files of one's own


def local_source(patterns: list[str], flag: str = "--input") -> Source:
    """Files in the order given; those of a glob or a folder by name. Raises UserError."""
    files, stamps = [], []
    for index, path in enumerate(path for pattern in patterns for path in expand(pattern, flag)):
        if kind_of(path) is None:
            suffixes = " ".join(f".{suffix}" for suffix in KIND_OF_SUFFIX)
            raise UserError(f"{flag} {path}: not of a known kind: {suffixes}, also with .gz or .zst")
        name, size, bring = utf8(Path(path).as_posix()), os.path.getsize(path), None
        stamps.append(stamp(path, size))
        if is_compressed(path) or suffix_of(path) == "json":
            bring = functools.partial(lambda path, scratch, plain: unpack(Path(path), plain), path)
            path = scratch_name(flag, index, name, size, stamps[-1])
        files.append(SourceFile(name, size, kind_of(name), path, bring))
    listing = [(file.name, file.size) for file in files]
    return Source(SourceRecord(input=list(map(utf8, patterns)), revision=None, files=listing, stamps=stamps), files)


def utf8(name: str) -> str:
    """A file's name as JSON can hold it: bytes that are not UTF-8 are spelled out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stamp(path: str, size: int, samples: int = 16, length: int = 4096) -> str:
    """What tells a file that was overwritten from the one before, without reading all of it: bytes from all over it.

    And the time of its last change, which alone is no proof: a copy of the same file has another.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in [*range(0, size, max(length, size // samples)), max(0, size - length)]:
            file.seek(start)
            digest.update(file.read(length))
        return f"{digest.hexdigest()[:32]} {os.fstat(file.fileno()).st_mtime_ns}"


def scratch_name(*identity) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def expand(pattern: str, flag: str) -> list[str]:
    """Names of readable files. Raises UserError."""
    if not pattern:
        raise UserError(f"{flag} has an empty name; give files, folders, or a glob in quotes")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = (os.path.join(folder, name) for folder, _, names in os.walk(pattern) for name in names)
        names = sorted(name for name in found if kind_of(name) and not os.path.basename(name).startswith("."))
    elif os.path.exists(pattern) or not glob.has_magic(pattern):
        names = [pattern]  # also if it looks like a glob, such as `a[1].jsonl`
    else:
        names = sorted(glob.glob(pattern, recursive=True))
        names = names or sorted(glob.glob(pattern.replace("[", "[[]"), recursive=True))  # in a folder `a[1]`
    if os.path.isdir(pattern) and not names:
        raise UserError(f"{flag} {pattern}: no file of a known kind in this folder; give files, or a glob in quotes")
    if not names:
        folder = os.path.dirname(pattern) or "."
        unreadable = os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK)
        why = f"the directory {folder} is not readable" if unreadable else "no file matches"
        raise UserError(f"{flag} {pattern}: {why}; give files, folders, or a glob in quotes")
    for name in names:
        if os.path.exists(name) and not os.path.isfile(name):
            raise UserError(f"{flag} {name} is not a regular file; give files, folders, or a glob in quotes")
        try:
            open(name, "rb").close()
        except OSError as error:
            raise UserError(f"{flag} {name}: {error.strerror}; check the path and its permissions") from error
    return names


def unpack(path: Path, plain: Path) -> None:
    """The file, decompressed, and as JSON lines if it is a JSON array: so that work can begin in the middle of it."""
    try:
        with atomic_file(plain) as target:
            for data in blocks_of(path):
                target.write(data)
        if suffix_of(path.name) == "json" and first_byte(plain) == b"[":
            with open(plain, "rb") as file:
                records = json.load(file)
            with atomic_file(plain) as target:
                target.writelines((json.dumps(record) + "\n").encode() for record in records)
    except MemoryError:
        raise UserError(f"{path.name} is too large to be read as one JSON array; write it as JSON lines") from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        plain.unlink(missing_ok=True)
        raise UserError(f"{path.name} is damaged: {error}; get the file again") from error


def blocks_of(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises an error of the codec's, or EOFError, unless it ends where it should."""
    if is_compressed(path.name) and not path.stat().st_size:
        raise EOFError("it is empty")
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        if path.suffix.lower() != ".zst":
            yield from iter(lambda: file.read(2**20), b"")
            return
        import zstandard

        decoder, frame = zstandard.ZstdDecompressor(max_window_size=2**31), None
        while data := file.read(2**16):
            while data:  # of one frame, or of several
                frame = frame or decoder.decompressobj()
                yield frame.decompress(data)
                data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame:
            raise EOFError("it ends in the middle of a frame")


def first_byte(path: Path) -> bytes:
    """The first that is neither white space nor of a byte order mark."""
    with open(path, "rb") as file:
        return file.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of the Hugging Face hub


def hub_source(dataset: str, revision: str | None, recorded: SourceRecord | None, max_bytes: int | None) -> Source:
    """A dataset `ID[:CONFIG]` of the hub: the files of its train split, at one commit.

    recorded: in the manifest, if a run is resumed: the hub need not be asked again. max_bytes: of text that suffice,
    for a dataset that has no files we can read. Raises UserError for what isn't there or can't be reached.
    """
    if not HUB_ID.fullmatch(dataset) or "--" in dataset or ".." in dataset:
        raise UserError(f"--dataset {dataset!r} is not the name of a dataset of the hub; --input takes files, folders")
    repo, _, config = dataset.partition(":")
    if recorded is None:
        ask = lambda: hub().dataset_info(repo, revision=revision, files_metadata=True)  # noqa: E731
        info = with_retries(f"dataset {repo}", ask, 4)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        names = train_files(list(sizes), card_configs(info), config, repo)
        recorded = SourceRecord(dataset=dataset, revision=info.sha, files=[(name, sizes[name]) for name in names])
    commit = recorded.revision
    if not re.fullmatch("[0-9a-f]{40}", commit or ""):
        raise UserError(f"dataset {repo}: revision {commit!r} is no commit; choose another --out")
    if not all(suffix_of(name) in KINDS for name, _ in recorded.files):
        return streamed_source(dataset, commit, recorded, max_bytes)

    def bring(name, size, scratch, path):
        whole = SourceFile(name, size, "", f"{commit}/{name}", download).place(scratch)
        download(repo, commit, name, size, scratch / commit, whole)
        if path != whole:
            unpack(whole, path)
            whole.unlink()

    files = []
    for name, size in recorded.files:
        path = scratch_name(commit, name) if is_compressed(name) else f"{commit}/{name}"
        files.append(SourceFile(name, size, kind_of(name), path, functools.partial(bring, name, size)))
    return Source(recorded, files)


def hub():
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # asked for now, not when the library was first imported


def download(repo: str, commit: str, name: str, size: int, folder: Path, path: Path) -> None:
    """The file to `path`, in `folder`; what a broken attempt has brought is used by the next, if it can be."""

    def attempt():
        try:
            hub().hf_hub_download(repo, name, repo_type="dataset", revision=commit, local_dir=folder)
            came = path.stat().st_size
            if size not in (0, came):  # some mirrors of the hub don't tell
                path.unlink()
                raise OSError(f"{came} bytes came, {size} were announced")
        except OSError as error:
            if type(error) is OSError:  # a wrong length, here or in the library: what is there is no good beginning
                shutil.rmtree(folder / ".cache", ignore_errors=True)
            raise

    with_retries(name, attempt)


def with_retries(what: str, action: Callable, tries: int = TRIES):
    """`action()`, again and again while the hub is busy or the line is down. Raises UserError when it is of no use."""
    for attempt in range(tries):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            last, reason = error, " ".join(str(error).split())[:200]
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            if getattr(error, "errno", None) in DISK:
                raise
            if is_offline():
                raise UserError(f"can't get {what}: HF_HUB_OFFLINE is set; unset it, or use --input") from error
            if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
                raise UserError(f"can't get {what} ({type(error).__name__}: {reason}); check --dataset") from error
            if status in (401, 403, 404):
                raise UserError(f"the hub has no {what} for you ({reason}); check the name, or set HF_TOKEN") from error
            if attempt == 2:
                print(f"the hub does not send {what} ({reason}); trying again", file=sys.stderr)
            if attempt < tries - 1:
                asked = getattr(response, "headers", {}).get("Retry-After", "")
                time.sleep(min(LONGEST_WAIT, int(asked) if asked.isdecimal() else 2**attempt))
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    hint = "set HF_TOKEN for a higher limit" if status == 429 else "run again when it answers, and it goes on from here"
    raise UserError(f"could not get {what} from {endpoint} ({reason}); {hint}") from last


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def card_configs(info) -> list[dict]:
    """What the head of the dataset's README says of its configurations."""
    return (info.card_data.get("configs") if info.card_data else None) or []


def train_files(names: list[str], configs: list[dict], wanted: str, repo: str) -> list[str]:
    """The files of the train split of the wanted configuration, in order; without a card, those that look like it."""
    known = {config.get("config_name", "default"): config.get("data_files") for config in configs}
    if not wanted and len(known) > 1 and "default" not in known:
        raise UserError(f"{repo} has several configurations; say {repo}:NAME, of: {', '.join(known)}")
    if wanted and wanted not in known:
        raise UserError(f"{repo} has no configuration {wanted!r}; it has: {', '.join(known) or 'none'}")
    default = "default" if "default" in known else next(iter(known), None)
    patterns = train_patterns(known.get(wanted or default))
    found = [name for pattern in patterns for name in sorted(names) if re.fullmatch(glob_regex(pattern), name)]
    if not patterns:
        data = [name for name in sorted(names) if kind_of(name)]
        for kind in KINDS:  # parquet if there is any
            found = found or [name for name in data if kind_of(name) == kind]
        split = re.compile(r"(^|[/_.-])(train|test|valid|validation|val|dev|eval)(?=[/_.-])")
        found = [n for n in found if "train" in (s := {m[2] for m in split.finditer(n)}) or not s]
        found = found or [name for name in sorted(names) if "." in name and not name.startswith((".", "README"))]
    if not found:
        raise UserError(f"{repo} has no files to train on{f' in configuration {wanted!r}' if wanted else ''}")
    return list(dict.fromkeys(found))


def train_patterns(data_files) -> list[str]:
    """The patterns of a card's `data_files`: one, several, or one or several per split."""
    if data_files is None:
        return []
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if isinstance(data_files, str):
        data_files = [data_files]
    splits = {entry["split"] for entry in data_files if isinstance(entry, dict) and "split" in entry}
    paths = [
        entry["path"] if isinstance(entry, dict) else entry
        for entry in data_files
        if not isinstance(entry, dict) or "train" not in splits or entry.get("split") == "train"
    ]
    return [path for entry in paths for path in ([entry] if isinstance(entry, str) else entry)]


def glob_regex(pattern: str) -> str:
    """`data/**/train-*.parquet` as a regular expression; `*` stays within a folder, as on the hub."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(piece) or re.escape(piece) for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def streamed_source(dataset: str, commit: str, recorded: SourceRecord, max_bytes: int | None) -> Source:
    """A dataset in a form that only `datasets` can read: its train split, written to one JSON lines file first."""
    repo, _, config = dataset.partition(":")

    def spool(path):
        import datasets

        try:
            rows = datasets.load_dataset(repo, config or None, split="train", revision=commit, streaming=True)
            with atomic_file(path) as target:
                for row in rows:
                    target.write((json.dumps(row, default=str) + "\n").encode())
                    if max_bytes is not None and target.tell() >= max_bytes:
                        break
        except (RuntimeError, ValueError, FileNotFoundError) as error:  # as for scripts, wrong names, broken files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"`datasets` can't read {dataset} ({reason}); take another, or use --input") from error

    def bring(scratch, path):
        with_retries(f"dataset {repo}", lambda: spool(path))

    size = sum(size for _, size in recorded.files)
    path = scratch_name(dataset, commit, max_bytes)
    return Source(recorded, [SourceFile(f"{repo}.jsonl", size, "jsonl", path, bring)])


# ----------------------------------------------------------------------------------------------------------------------
# The built-in corpus: the English that every Python carries


def docs_source(recorded: SourceRecord | None) -> Source:
    """Topics of `help()` and docstrings of the standard library, as JSON lines made on the spot."""
    version = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    if recorded and recorded.revision == version:
        size = recorded.files[0][1]
    else:
        size = len(docs_lines())
    def bring(scratch, path):
        with atomic_file(path) as target:
            target.write(docs_lines())

    file = SourceFile(f"{PYTHON_DOCS}.jsonl", size, "jsonl", scratch_name(version, size), bring)
    return Source(SourceRecord(dataset=PYTHON_DOCS, revision=version, files=[(file.name, size)]), [file])


@functools.lru_cache(maxsize=1)
def docs_lines() -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in python_docs()).encode()


def python_docs() -> list[str]:
    """Documents in an order that depends on the Python version alone, and mixed: any stretch is like any other."""
    texts = help_topics() + module_docs(Path(sysconfig.get_path("stdlib")))
    random.Random(0).shuffle(texts)
    return texts


def help_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [topics[name].strip() for name in sorted(topics)]


def module_docs(library: Path, shortest: int = 40) -> list[str]:
    """One document per module in `library` that has docstrings of `shortest` characters: each under its qualified name.

    The files are parsed, never imported: importing a standard library module can open a browser.
    """
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "pydoc_data"}
    texts = []
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        parts = path.relative_to(library).with_suffix("").parts
        if skipped & set(parts) or parts[0].startswith("config-"):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):  # templates and test data
            continue
        docs = [f"{title}\n\n{doc}" for title, doc in docstrings(tree, name) if len(doc) >= shortest]
        if docs:
            texts.append("\n\n\n".join(docs))
    return texts


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module and all that it defines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and (doc := ast.get_docstring(node)):
        yield name, inspect.cleandoc(doc).strip()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, documented):
            yield from docstrings(child, f"{name}.{child.name}")
