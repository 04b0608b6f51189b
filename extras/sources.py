"""
Where text comes from: files of one's own, datasets of the Hugging Face hub, and the English every Python carries.

A source is a list of files, with their sizes, and a way to bring one of them to this disk in a form that can be read
from the middle. `Fetcher` does that one file ahead of its use, and takes the file away after it.
"""

import ast
import errno
import functools
import glob
import gzip
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
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from extras.cli import UserError
from extras.files import atomic_file

PYTHON_DOCS = "python-docs"
KINDS = ("parquet", "jsonl", "txt")  # of files; by suffix, before .gz or .zst
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}  # errors here, not of the hub
TRIES, LONGEST_WAIT = 8, 60  # of a request to the hub, seconds between two: some three minutes in all


class SourceFile(NamedTuple):
    """name: as the manifest records it and errors call it. size: bytes. kind: of KINDS."""

    name: str
    size: int
    kind: str

    @property
    def weight(self) -> int:
        """Its part of the work, in bytes; never none, so that empty files and unknown sizes divide nothing by zero."""
        return max(1, self.size)


@dataclass
class Source:
    """place: (index of a file, folder for scratch files) -> where it lies, once `fetch` of the same is done."""

    description: dict  # for the manifest: what it is, its revision, its files
    files: list[SourceFile]
    place: Callable[[int, Path], Path]
    fetch: Callable[[int, Path], None]


def kind_of(name: str) -> str | None:
    """'a/b.jsonl.gz' -> 'jsonl'; None for what we can't read."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in (".gz", ".zst"):
        suffix = os.path.splitext(stem)[1]
    return suffix[1:] if suffix[1:] in KINDS else None


def is_compressed(name: str) -> bool:
    return name.lower().endswith((".gz", ".zst"))


class Fetcher:
    """Brings files of a source to this disk, one ahead of their use, and takes them away after it.

    order: indices of the files, in the order of use. done: how many of them are used up already.
    """

    def __init__(self, source: Source, order: list[int], done: int, scratch: Path, keep: bool):
        self.source, self.order, self.scratch, self.keep = source, order, scratch, keep
        self.coming: dict[int, Future] = {}  # the files that are here or on their way
        self.removed = 0
        scratch.mkdir(exist_ok=True)
        self.release(done)

    def get(self, index: int) -> Path:
        self.start(index).result()
        self.look_ahead()
        return self.source.place(index, self.scratch)

    def start(self, index: int) -> Future:
        if index not in self.coming:
            self.coming[index] = in_background(self.source.fetch, index, self.scratch)
        return self.coming[index]

    def look_ahead(self) -> None:
        """Fetch the next file, unless two are here already: the disk holds the shards and two files."""
        later = [index for index in self.order if index > max(self.coming, default=sys.maxsize)]
        if len(self.coming) < 2 and later:
            self.start(later[0])

    def release(self, done: int) -> None:
        """Remove the first `done` files of the order: every token of theirs is committed."""
        for index in self.order[self.removed : done]:
            if index in self.coming:
                self.coming.pop(index).result()
            path = self.source.place(index, self.scratch)
            if not self.keep and self.scratch in path.parents:
                path.unlink(missing_ok=True)
        self.removed = max(done, self.removed)
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


def local_source(patterns: list[str]) -> Source:
    """Files in the order given, those of a glob by name. Raises UserError."""
    names = [name for pattern in patterns for name in expand(pattern)]
    for name in names:
        if kind_of(name) is None:
            raise UserError(f"--input {name}: not of a known kind: .parquet .jsonl .txt, also with .gz or .zst")
    files = [SourceFile(Path(name).as_posix(), os.path.getsize(name), kind_of(name)) for name in names]

    def place(index, scratch):
        return plain_place(files[index], index, scratch) if is_compressed(names[index]) else Path(names[index])

    def fetch(index, scratch):
        if is_compressed(names[index]):
            decompress(Path(names[index]), place(index, scratch))

    return Source(
        {"input": patterns, "revision": None, "files": [[f.name, f.size] for f in files]}, files, place, fetch
    )


def expand(pattern: str) -> list[str]:
    """Names of readable files. Raises UserError."""
    names = sorted(glob.glob(pattern, recursive=True)) if is_glob(pattern) else [pattern]
    if not names:
        folder = os.path.dirname(pattern) or "."
        unreadable = os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK)
        why = f"the directory {folder} is not readable" if unreadable else "no file matches"
        raise UserError(f"--input {pattern}: {why}; give files, or a glob in quotes")
    for name in names:
        if os.path.isdir(name):
            raise UserError(f"--input {name} is a directory; give its files, such as {os.path.join(name, '*.parquet')}")
        try:
            open(name, "rb").close()
        except OSError as error:
            raise UserError(f"--input {name}: {error.strerror}; check the path and its permissions") from error
    return names


def is_glob(pattern: str) -> bool:
    """Not if a file has this very name, such as `a[1].jsonl`."""
    return glob.has_magic(pattern) and not os.path.exists(pattern)


def plain_place(file: SourceFile, index: int, scratch: Path) -> Path:
    return scratch / f"{index:05d}.{file.kind}"


def decompress(path: Path, plain: Path) -> None:
    """A unit of work must be able to begin in the middle, which .gz and .zst don't allow."""
    if plain.exists():
        return
    damage = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.suffix.lower() == ".gz":
        opened = gzip.open(path)  # noqa: SIM115
    else:
        import zstandard

        opened, damage = zstandard.open(path), (*damage, zstandard.ZstdError)
    try:
        with opened as source, atomic_file(plain) as target:
            shutil.copyfileobj(source, target, 2**20)
    except damage as error:
        raise UserError(f"{path.name} is damaged: {error}; fetch it again") from error


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of the Hugging Face hub


def hub_source(dataset: str, revision: str | None, recorded: dict | None, max_bytes: int | None) -> Source:
    """A dataset `ID[:CONFIG]` of the hub: the files of its train split, at one commit.

    recorded: the manifest's description, if a run is resumed: the hub need not be asked again. max_bytes: of text that
    suffice, for a dataset that has no files we can read. Raises UserError for what isn't there or can't be reached.
    """
    repo, _, config = dataset.partition(":")
    if recorded is None:
        info = patiently(f"dataset {repo}", lambda: hub().dataset_info(repo, revision=revision, files_metadata=True), 4)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings}
        names = train_files(list(sizes), card_configs(info), config, repo)
        recorded = {"dataset": dataset, "revision": info.sha, "files": [[name, sizes[name]] for name in names]}
    names, commit = [name for name, _ in recorded["files"]], recorded["revision"]
    if not all(kind_of(name) for name in names):
        return streamed_source(dataset, commit, recorded, max_bytes)
    files = [SourceFile(name, size, kind_of(name)) for name, size in recorded["files"]]

    def place(index, scratch):
        file = files[index]
        return plain_place(file, index, scratch) if is_compressed(file.name) else scratch / file.name

    def fetch(index, scratch):
        file = files[index]
        if not place(index, scratch).exists() or place(index, scratch).stat().st_size != file.size:
            download(repo, commit, file, scratch)
            if is_compressed(file.name):
                decompress(scratch / file.name, place(index, scratch))
                (scratch / file.name).unlink()

    return Source(recorded, files, place, fetch)


def hub():
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))  # asked for now, not when the library was first imported


def download(repo: str, commit: str, file: SourceFile, scratch: Path) -> None:
    """The file to `scratch / file.name`; what a broken attempt has brought is used by the next, if it can be."""

    def attempt():
        try:
            hub().hf_hub_download(repo, file.name, repo_type="dataset", revision=commit, local_dir=scratch)
            size = (scratch / file.name).stat().st_size
            if file.size and size != file.size:  # some mirrors of the hub don't tell
                (scratch / file.name).unlink()
                raise OSError(f"{size} bytes came, {file.size} were announced")
        except OSError as error:
            if type(error) is OSError:  # a wrong length, here or in the library: what is there is no good beginning
                shutil.rmtree(scratch / ".cache", ignore_errors=True)
            raise

    patiently(file.name, attempt)


def patiently(what: str, action: Callable, tries: int = TRIES):
    """`action()`, again and again while the hub is busy or the line is down. Raises UserError when it is of no use."""
    for attempt in range(tries):
        try:
            return action()
        except Exception as error:
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            status = getattr(response, "status_code", None)
            network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
            if not network or getattr(error, "errno", None) in DISK:
                raise
            last, reason = error, " ".join(str(error).split())[:200]
            if type(error).__name__ == "OfflineModeIsEnabled":
                raise UserError(f"can't get {what}: HF_HUB_OFFLINE is set; unset it, or use --input") from error
            if status in (401, 403, 404):
                raise UserError(f"the hub has no {what} for you ({reason}); check the name, or set HF_TOKEN") from error
            if attempt < tries - 1:
                asked = getattr(response, "headers", {}).get("Retry-After", "")
                time.sleep(min(LONGEST_WAIT, int(asked) if asked.isdecimal() else 2**attempt))
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    hint = "set HF_TOKEN for a higher limit" if status == 429 else "run again when it answers, and it goes on from here"
    raise UserError(f"could not get {what} from {endpoint} ({reason}); {hint}") from last


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


def streamed_source(dataset: str, commit: str, recorded: dict, max_bytes: int | None) -> Source:
    """A dataset in a form that only `datasets` can read: its train split, written to one JSON lines file first."""
    repo, _, config = dataset.partition(":")
    file = SourceFile(f"{repo}.jsonl", sum(size for _, size in recorded["files"]), "jsonl")

    def place(index, scratch):
        return scratch / "streamed.jsonl"

    def fetch(index, scratch):
        if not place(index, scratch).exists():
            patiently(f"dataset {repo}", lambda: spool(place(index, scratch)))

    def spool(path):
        import datasets

        try:
            rows = datasets.load_dataset(repo, config or None, split="train", revision=commit, streaming=True)
            with atomic_file(path) as target:
                write_rows(rows, target, max_bytes)
        except (RuntimeError, ValueError, FileNotFoundError) as error:  # as for scripts, wrong names, broken files
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"`datasets` can't read {dataset} ({reason}); take another, or use --input") from error

    return Source(recorded, [file], place, fetch)


def write_rows(rows: Iterable[dict], target, max_bytes: int | None) -> None:
    """Rows as JSON lines, until `max_bytes` are written."""
    for row in rows:
        target.write((json.dumps(row, default=str) + "\n").encode())
        if max_bytes is not None and target.tell() >= max_bytes:
            return


# ----------------------------------------------------------------------------------------------------------------------
# The built-in corpus: the English that every Python carries


def docs_source(recorded: dict | None) -> Source:
    """Topics of `help()` and docstrings of the standard library, as JSON lines made on the spot."""
    version = f"Python {'.'.join(map(str, sys.version_info[:3]))}"
    if recorded and recorded["revision"] == version:
        size = recorded["files"][0][1]
    else:
        size = len(docs_lines())

    def place(index, scratch):
        return scratch / f"{PYTHON_DOCS}.jsonl"

    def fetch(index, scratch):
        if not place(index, scratch).exists():
            with atomic_file(place(index, scratch)) as file:
                file.write(docs_lines())

    file = SourceFile(f"{PYTHON_DOCS}.jsonl", size, "jsonl")
    description = {"dataset": PYTHON_DOCS, "revision": version, "files": [[file.name, file.size]]}
    return Source(description, [file], place, fetch)


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
