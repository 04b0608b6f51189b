"""
Text -> token shards, the food of train_gpt2.py.

    python fineweb.py                                               # FineWeb-Edu sample-10BT: 10B GPT-2 tokens, 20 GB
    python fineweb.py --dataset python-docs --out data/python-docs  # the English every Python carries: no network
    python fineweb.py --input books/ --out data/books               # .parquet .jsonl .json .txt, also .gz and .zst
    python fineweb.py --input chats.jsonl --format chat --out data/chats  # to finetune on: only the answers are learned
    python fineweb.py --verify                                      # is the set on disk what the manifest says?

How the text goes:

    source --fetch, one ahead--> files --cut--> chunks --worker processes--> tokens, in order --> shards + manifest.json

A chunk is a row group of a parquet file or a few megabytes of a text file; its tokens are one uint16 array. A shard
gets its name when it is whole, and then an entry in the manifest. So a run that was killed at any moment goes on from
the last shard when it is started again, and ends with the same bytes as if nothing had happened.

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
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from extras.cli import UserError, run
from extras.files import exclusive, sync_directory
from extras.manifest import Cursor, Manifest, Settings, Shard, manifest_name, parse_part, read_manifest, write_manifest
from extras.sources import (
    PYTHON_DOCS,
    Fetcher,
    Source,
    SourceFile,
    docs_source,
    hub_source,
    is_compressed,
    local_source,
    utf8,
)
from extras.units import Chunk, Options, Tokens, chunks_of, count, pick_backend, tokenize_all, tokenize_chunk

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
TOKENS_PER_BYTE = {"parquet": 0.35, "jsonl": 0.22, "txt": 0.22}  # GPT-2's, as in FineWeb-Edu, in English
COMPRESSION = 3  # text bytes per byte of .gz or .zst, about



# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    dataset: str = FINEWEB_EDU  # dataset of the Hugging Face hub, ID[:CONFIG], or python-docs
    input: list[str] = field(default_factory=list)  # files, folders or globs of your own, instead of --dataset
    val_input: list[str] = field(default_factory=list)  # the same for the val split, which is then all of them
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
    verify: bool = False  # check the shards in OUT against their manifest and, if it is here, the source


# ----------------------------------------------------------------------------------------------------------------------
# Plan: which chunks, in which order


class Plan:
    """blocks: the files that are cut into chunks together, each for itself or to be shuffled all at once.

    The first `val_files` files are the val split, of part 1. Of the others, a part takes the chunks that begin in its
    n-th of their bytes.
    """

    def __init__(self, files: list[SourceFile], settings: Settings, val_files: int):
        self.settings, (self.part, self.parts) = settings, parse_part(settings.part)
        self.starts = list(accumulate((file.weight for file in files[val_files:]), initial=0))  # in the source's bytes
        low, high = (self.starts[-1] * part for part in (self.part, self.part + 1))
        mine = [
            (index, file, start)
            for index, (file, start) in enumerate(zip(files[val_files:], self.starts))
            if start * self.parts < high and (start + file.weight) * self.parts > low
        ]
        self.blocks = [[(None, file, 0)] for file in files[: val_files if self.part == 0 else 0]]
        self.val_blocks = len(self.blocks)
        self.blocks += [[place] for place in mine] if settings.shuffle is None else [mine] if mine else []
        self.done = list(accumulate(map(len, self.blocks), initial=0))  # files before each block
        self.files = [file for block in self.blocks for _, file, _ in block]  # in the order of use

    def chunks(self, block: int, paths: list[Path]) -> list[Chunk]:
        """The chunks of a block in the order of the stream."""
        chunks, seed = [], self.settings.shuffle if block >= self.val_blocks else None
        for (index, file, start), path in zip(self.blocks[block], paths):
            of_file = chunks_of(file, path, self.settings.text_column)
            for number, chunk in enumerate(of_file):
                place = start * len(of_file) + file.weight * number
                if index is None or place * self.parts // (self.starts[-1] * len(of_file)) == self.part:
                    chunks.append(chunk if seed is None else chunk._replace(order=f"{seed} {index} {number}"))
        if seed is not None:
            random.Random(f"units {seed}").shuffle(chunks)  # the word is part of the seed of finished sets
        return chunks


# ----------------------------------------------------------------------------------------------------------------------
# Shards: nothing half done ever bears its name


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
        digest = sha256_of(self.file.name) if short else self.digest.hexdigest()
        os.replace(self.file.name, self.path)
        return digest

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before can't be now
            self.file.close()
        Path(self.file.name).unlink(missing_ok=True)


class ShardWriter:
    """Writes one stream of tokens as shards, each as it fills, and after each the manifest with its entry."""

    def __init__(self, out: Path, manifest: Manifest, val_blocks: int):
        self.out, self.manifest, self.val_blocks = out, manifest, val_blocks
        self.file = self.mask = None
        self.total = sum(shard.tokens for shard in manifest.shards)

    @property
    def index(self) -> int:
        """Of the shard being written. Parts alternate, so that no two ever use the same name."""
        return len(self.manifest.shards) * self.manifest.part[1] + self.manifest.part[0]

    def write(self, chunk: Tokens, cursor: Cursor, stop: int) -> bool:
        """Append the tokens of a chunk from `cursor` up to `stop`. Whether a shard was committed."""
        done, stop, committed = cursor.token, min(stop, len(chunk.ids)), len(self.manifest.shards)
        while done < stop:
            here = cursor._replace(token=done)
            if self.file and (self.file.length == self.file.size or self.ends_val(cursor.block)):
                self.commit(here)
            if not self.file:
                self.begin(here)
            span = slice(done, min(stop, done + self.file.size - self.file.length))
            ids, targets = chunk.ids[span], None if chunk.targets is None else chunk.targets[span]
            self.file.append(ids)
            if self.mask:
                self.mask.append(targets)
            is_all = len(ids) == len(chunk.ids)
            tokenizer = self.manifest.tokenizer.name
            documents, size = (chunk.documents, chunk.bytes) if is_all else count(ids, targets, tokenizer)
            self.documents += documents
            self.bytes += size
            self.total += len(ids)
            done += len(ids)
        return len(self.manifest.shards) > committed

    def ends_val(self, block: int) -> bool:
        return self.index == 0 and 0 < self.val_blocks <= block

    def begin(self, cursor: Cursor) -> None:
        if self.ends_val(cursor.block):
            raise UserError("--val_input holds no document at all")
        self.start, self.documents, self.bytes, self.skipped_before = cursor, 0, 0, self.manifest.skipped
        self.path = self.out / self.manifest.name_of(self.index)
        self.file = ArrayFile(self.path, "<u2", self.manifest.room(self.index))
        has_mask = self.manifest.settings.format != "text"
        self.mask = ArrayFile(self.path.with_suffix(".mask.npy"), "|u1", self.file.size) if has_mask else None

    def commit(self, cursor: Cursor, complete: bool = False) -> None:
        """Give the shard its name and enter it. cursor: where the next one begins."""
        mask_sha256 = self.mask.commit() if self.mask else None  # first: no shard is ever without its mask
        shard = Shard(
            name=self.path.name,
            split=self.manifest.split_of(self.index),
            tokens=self.file.length,
            documents=self.documents,
            bytes=self.bytes,
            skipped_before=self.skipped_before,
            sha256=self.file.commit(),
            mask_sha256=mask_sha256,
        )
        sync_directory(self.out)
        self.manifest.shards.append(shard)
        self.manifest.starts.append(self.start)
        self.save(cursor, complete)
        self.file = self.mask = None

    def save(self, cursor: Cursor, complete: bool) -> None:
        self.manifest.cursor, self.manifest.complete = cursor, complete
        write_manifest(self.out / manifest_name(self.manifest.part), self.manifest)

    def finish(self, cursor: Cursor) -> None:
        """Commit what there is, and complete the manifest. Raises OnlyVal if the val split would take all."""
        if self.index == 0 and self.file and self.manifest.val_size != 0:
            raise OnlyVal(self.total)
        if not self.total and self.manifest.part[1] == 1:
            raise UserError("the source holds no document at all")
        if self.file:
            self.commit(cursor, complete=True)
        else:
            self.save(cursor, complete=True)

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


def files_of(shard: Shard) -> list[tuple[str, int, str]]:
    """(name, size in bytes, sha256) of the files of a shard: tokens, and perhaps a mask."""
    n = shard.tokens
    files = [(shard.name, len(npy_header(n, "<u2")) + 2 * n, shard.sha256)]
    if shard.mask_sha256:
        files.append((shard.mask_name, len(npy_header(n, "|u1")) + n, shard.mask_sha256))
    return files


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The run


def settings_of(config: Config) -> Settings:
    values = {name: getattr(config, name) for name in Settings.model_fields}
    values |= {"dataset": None if config.input else config.dataset, "val_input": list(map(utf8, config.val_input))}
    return Settings(**values | {"input": list(map(utf8, config.input)) or None})


def downloads_name(part: tuple[int, int]) -> str:
    return manifest_name(part).replace("manifest", "downloads").removesuffix(".json")


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
    if config.val_input and config.val_size is not None:
        raise UserError("--val_size does not go with --val_input, all of which is the val split; leave one out")


def resumed(manifest: Manifest, config: Config, out: Path) -> Manifest:
    """The manifest of the run to go on with. Raises UserError, saying which, if a flag is not what it was."""
    was, asked = manifest.settings.model_dump(), settings_of(config).model_dump()
    changed = [f"--{name} {asked[name]} (it was {was[name]})" for name in sorted(was) if was[name] != asked[name]]
    if changed:
        raise UserError(f"{out} was begun otherwise: {', '.join(changed)}; choose another --out")
    written = (out / manifest_name(manifest.part)).stat().st_mtime_ns
    for number, shard in enumerate(manifest.shards):
        damaged = [name for name, size, sha256 in files_of(shard) if not is_whole(out / name, size, sha256, written)]
        if damaged:
            print(f"{out / damaged[0]} is missing or damaged: going on from there")
            before = {"shards": manifest.shards[:number], "starts": manifest.starts[:number], "complete": False}
            return manifest.model_copy(
                update=before | {"cursor": manifest.starts[number], "skipped": shard.skipped_before}
            )
    return manifest


def is_whole(path: Path, size: int, sha256: str, written: int) -> bool:
    """By its size; by its sha256, too, if it was changed after the manifest was written."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    return path.stat().st_mtime_ns < written or sha256_of(path) == sha256


def check_source(was, now, out: Path) -> None:
    """Raises UserError unless the record of a source, or None, tells of the same files, as they were."""
    if was == now:
        return
    if was.revision != now.revision:
        raise UserError(f"{out} was begun with {was.revision}, and this is {now.revision}; choose another --out")
    stamped = was.stamps is not None  # format 1 has none
    (before, times), (after, new_times) = was.identities(stamped), now.identities(stamped)
    other = [name for name in {**after, **before} if before.get(name) != after.get(name)]
    if other or list(before) != list(after):
        raise UserError(f"{out} was begun before {', '.join(other[:3]) or 'the order'} changed; choose another --out")
    touched = [name for name in times if times[name] != new_times[name]]
    if touched:
        print(f"{', '.join(touched[:3])}: another time of change, but the same size and samples: taken for the same")


def prepare_directory(out: Path, part: tuple[int, int]) -> None:
    """Remove what a killed run left. Raises UserError if shards of unknown origin lie there."""
    manifests, shards = sorted(out.glob("manifest*.json")), sorted(out.glob("edufineweb_*.npy"))
    if shards and not manifests:
        raise UserError(f"{out} holds {shards[0].name}, of which no manifest.json tells; choose another --out")
    halves = [manifest_name(part) + ".tmp", manifest_name((0, 1)) + writer_name(part) + ".tmp"]
    for path in [*out.glob("edufineweb_*.npy.tmp"), *(out / name for name in halves)]:
        index = path.name.split("_")[-1].split(".")[0]
        if path.name in halves or (index.isdecimal() and int(index) % part[1] == part[0]):
            path.unlink(missing_ok=True)


def writer_name(part: tuple[int, int]) -> str:
    """Of the manifest of all parts, which several may write at once: each under a temporary name of its own."""
    return f".part-{part[0] + 1}-of-{part[1]}"


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
    path = out / manifest_name(part)
    there = read_manifest(path)
    manifest = resumed(there, config, out) if there and there.cursor != (0, 0, 0) else None  # else nothing is lost
    val, source = open_sources(config, manifest)
    if manifest:
        check_source(manifest.source, source.record, out)
        check_source(manifest.val_source, val and val.record, out)
    if manifest and manifest.complete:
        remove_downloads(out, config)
        print(f"{out} is complete: {summary(manifest)}; nothing to do")
        whole = read_manifest(out / manifest_name((0, 1)))
        if whole and whole.complete and not list(out.glob("*.tmp")):
            return  # without a lock: it may be read-only
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(path.name + ".lock")):
        if read_manifest(path) != there:
            raise UserError(f"{out} was written by another process just now; run again")
        prepare_directory(out, part)
        if manifest and manifest.complete:
            join_parts(out, part)
            return
        val_size = None if val else val_size_of(config, source.files)
        manifest = manifest or Manifest.begin(settings_of(config), source.record, val and val.record, val_size)
        write_manifest(path, manifest)
        join_parts(out, part)
        plan = plan_of(val, source, manifest.settings)
        try:
            write_shards(config, plan, manifest, out)
        except OnlyVal as ended:
            (total,) = ended.args
            if val:
                raise UserError(f"there is nothing to train on: --val_input has all {total:,} tokens") from None
            print(f"The val split was to have more than the {total:,} tokens there are: it gets a twentieth")
            manifest = manifest.model_copy(update={"val_size": total // 20, "cursor": Cursor(0, 0, 0), "skipped": 0})
            write_manifest(path, manifest)
            write_shards(config, plan, manifest, out)
        join_parts(out, part)
        remove_downloads(out, config)
    report(out, manifest, len(source.files))


def open_sources(config: Config, manifest: Manifest | None) -> tuple[Source | None, Source]:
    """Of the val split, if it has one of its own, and of all else. manifest: of the run that goes on, if one does."""
    val = local_source(config.val_input, "--val_input") if config.val_input else None
    if config.input:
        source = local_source(config.input)
    elif config.dataset == PYTHON_DOCS:
        source = docs_source(manifest and manifest.source)
    else:
        enough = config.max_tokens and 2**20 + 16 * config.max_tokens  # bytes; a token of English is 4.6
        source = hub_source(config.dataset, config.revision, manifest and manifest.source, enough)
    for file in (val.files if val else []) + source.files:
        if config.format != "text" and file.kind != "jsonl":
            raise UserError(f"--format {config.format} reads .jsonl, not {file.name}; write it as JSON lines")
    return val, source


def plan_of(val: Source | None, source: Source, settings: Settings) -> Plan:
    return Plan((val.files if val else []) + source.files, settings, len(val.files) if val else 0)


def join_parts(out: Path, part: tuple[int, int]) -> None:
    """Make manifest.json of the parts' manifests: incomplete, until the last of them is complete.

    Parts may end at the same moment: each writes its own manifest first and then looks at all, so the last one to look
    sees them all; and what is then written is the same, whoever writes it.
    """
    if (count := part[1]) == 1:
        return
    path = out / manifest_name((0, 1))
    paths = [out / manifest_name((i, count)) for i in range(count)]
    begun = [read_manifest(path) for path in paths if path.exists()]
    complete = len(begun) == count and all(part.complete for part in begun)
    whole = begun[0].settings.model_copy(update={"part": f"all of {count}"})
    if (there := read_manifest(path)) and there.settings != whole:
        raise UserError(f"{path} was begun with other flags, or another number of parts; choose another --out")
    if complete or not there:
        shards = sorted((shard for part in begun for shard in part.shards), key=lambda shard: shard.index)
        joined = {"settings": whole, "shards": shards, "starts": [], "cursor": None, "complete": complete}
        joined["skipped"] = sum(part.skipped for part in begun)
        write_manifest(path, begun[0].model_copy(update=joined), writer_name(part))


def summary(manifest: Manifest) -> str:
    shards = manifest.shards
    tokens = {split: sum(shard.tokens for shard in shards if shard.split == split) for split in ("train", "val")}
    documents = sum(shard.documents for shard in shards)
    return f"{documents:,} documents, {len(shards)} shards, {tokens['train']:,} train and {tokens['val']:,} val tokens"


def report(out: Path, manifest: Manifest, files: int) -> None:
    print(f"{out}: {summary(manifest)}")
    if manifest.skipped:
        print(f"{manifest.skipped} documents could not be read and were left out")
    shards, settings = manifest.shards, manifest.settings
    if shards and (last := shards[-1].tokens) < settings.shard_size:
        print(f"The last shard holds what was left, {last:,} of {settings.shard_size:,} tokens: that is no failure.")
    if manifest.val_size and manifest.part[0] == 0 and len(shards) > 1:
        is_one_file = settings.shuffle is None and files > 1 and manifest.starts[1] <= (1, 0, 0)
        if shards[0].documents < 200 or is_one_file:
            where = f", all from the first of {files} files" if is_one_file else ""
            mix = "" if settings.shuffle is not None else "--shuffle 1 mixes all documents before the split, "
            print(
                f"Validation is on the first {shards[0].documents:,} document(s) only{where}; they may differ from the "
                f"rest: {mix}--val_size N takes more, --val_input FILE takes files of your choice."
            )


def write_shards(config: Config, plan: Plan, manifest: Manifest, out: Path) -> None:
    """From the manifest's cursor to the end: write every shard, and complete the manifest. Raises OnlyVal."""
    first = manifest.cursor
    if first.block >= len(plan.blocks) and first != (0, 0, 0):
        raise past_the_end(out)
    scratch = out / downloads_name(manifest.part)
    fetcher = Fetcher(plan.files, plan.done[first.block], scratch, config.keep_downloads)
    writer = ShardWriter(out, manifest, plan.val_blocks)
    progress = Progress(plan.files, config, writer.total)
    chunks = planned_chunks(plan, first, fetcher, progress, out)
    stream = tokenize_all(chunks, options_of(config), workers_of(config))
    with contextlib.closing(stream), contextlib.closing(writer), contextlib.closing(progress.bar):
        for (block, number, chunk), tokens in stream:
            skip = first.token if (block, number) == first[:2] else 0
            if skip >= max(1, len(tokens.ids)):
                raise past_the_end(out)
            stop, before = skip + (config.max_tokens or sys.maxsize) - writer.total, writer.total
            if writer.write(tokens, Cursor(block, number, skip), stop):
                fetcher.release(plan.done[manifest.cursor.block])
            manifest.skipped += tokens.skipped
            progress.update(chunk, writer.total - before, tokens.documents, writer.index)
            if writer.total == config.max_tokens:
                break
        writer.finish(Cursor(len(plan.blocks), 0, 0))
        progress.bar.total = progress.bar.n


def remove_downloads(out: Path, config: Config) -> None:
    if not config.keep_downloads:
        shutil.rmtree(out / downloads_name(parse_part(config.part)), ignore_errors=True)


def past_the_end(out: Path) -> UserError:
    return UserError(f"the manifest in {out} goes on behind the end of the source (cursor); choose another --out")


def options_of(config: Config | Settings, backend: str = "tiktoken") -> Options:
    backend = pick_backend(getattr(config, "backend", backend), config.tokenizer)
    return Options(config.tokenizer, backend, config.text_column, config.skip_bad, config.format)


def planned_chunks(plan: Plan, first: Cursor, fetcher: Fetcher, progress: "Progress", out: Path) -> Iterator:
    """((block, number, chunk), chunk) of every chunk from `first` on; files are fetched as they are needed."""
    for block in range(first.block, len(plan.blocks)):
        chunks = plan.chunks(block, [fetcher.get(number) for number in range(plan.done[block], plan.done[block + 1])])
        progress.open(chunks)
        begin = first.chunk if block == first.block else 0
        if begin >= max(1, len(chunks)):
            raise past_the_end(out)
        for number in range(begin, len(chunks)):
            yield (block, number, chunks[number]), chunks[number]


def workers_of(config: Config) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if config.workers is None else config.workers


class Progress:
    """A bar in tokens. The total is estimated from the bytes of all files, by what is known of some."""

    def __init__(self, files: list[SourceFile], config: Config, done: int):
        import tqdm

        self.bytes = sum(file.weight for file in files) / parse_part(config.part)[1]
        self.limit, self.use_counts = config.max_tokens or sys.maxsize, config.tokenizer == "gpt2"
        self.counted = self.seen = (0, 0.0)  # tokens and bytes: of the files fetched, by token_count; tokenized so far
        self.documents = 0
        total = min(self.limit, estimated_tokens(files, config.tokenizer) // parse_part(config.part)[1])
        seconds = 0.5 if sys.stderr.isatty() else 30  # a log file is no screen
        self.bar = tqdm.tqdm(
            total=max(total, done), initial=done, unit="tok", unit_scale=True, mininterval=seconds, dynamic_ncols=True
        )

    def open(self, chunks: list[Chunk]) -> None:
        if self.use_counts and chunks and all(chunk.tokens is not None for chunk in chunks):
            tokens, size = (sum(values) for values in zip(*((chunk.tokens, chunk.source_bytes) for chunk in chunks)))
            self.counted = self.counted[0] + tokens, self.counted[1] + size

    def update(self, chunk: Chunk, tokens: int, documents: int, shard: int) -> None:
        self.seen = self.seen[0] + tokens, self.seen[1] + chunk.source_bytes
        self.documents += documents
        count, size = self.counted if self.counted[0] else self.seen
        self.bar.total = max(self.bar.n + tokens, min(self.limit, int(count / size * self.bytes)))
        self.bar.set_postfix_str(f"{self.documents:,} documents, shard {shard}", refresh=False)
        self.bar.update(tokens)


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def verify(out: Path, config: Config) -> None:
    """Every shard against its sha256 and, where the source can be read, some against it. Raises UserError."""
    manifest = read_manifest(out / manifest_name((0, 1)))
    if manifest is None:
        raise UserError(f"{out} has no manifest.json to verify the shards against; choose another --out")
    files = [file for shard in manifest.shards for file in files_of(shard)]
    damaged = [name for name, _, digest in files if not (out / name).exists() or sha256_of(out / name) != digest]
    if damaged:
        names = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        raise UserError(
            f"{len(damaged)} of {len(files)} shards in {out} are missing or damaged: {names}; delete "
            "them, and run fineweb.py again with the flags it had: it makes them anew"
        )
    print(f"{out}: {len(files)} shards have the sha256 of the manifest")
    parts = [read_manifest(path) for path in sorted(out.glob("manifest.part-*-of-*.json"))] or [manifest]
    if manifest.is_joined and parts == [manifest]:
        print(f"{out}: not compared with the source: the manifests of the parts are not here")
    else:
        compared = sum(compare_with_source(out, part, config) for part in parts)
        print(f"{out}: {compared:,} tokens are those of the source")
    if not manifest.complete:
        raise UserError(
            f"{out} is sound as far as it goes, but not complete; run fineweb.py again with the flags it had"
        )


def compare_with_source(out: Path, manifest: Manifest, config: Config, samples: int = 3) -> int:
    """Tokenize the chunk that some shards begin in again; how many tokens were compared. Raises UserError.

    Where the source is not at hand, that is said, and it is none.
    """
    was = Config(**{name: value for name, value in manifest.settings if value is not None})
    compared, shards, here = 0, range(len(manifest.shards)), out if os.access(out, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=here, ignore_cleanup_errors=True) as scratch:
        for index in sorted(random.Random(0).sample(shards, min(samples, len(shards)))):
            begin = manifest.starts[index]
            try:
                val, source = open_sources(was, manifest)
                check_source(manifest.source, source.record, out)
                check_source(manifest.val_source, val and val.record, out)
                plan = plan_of(val, source, manifest.settings)
                paths = [file.fetch(Path(scratch)) for _, file, _ in plan.blocks[begin.block]]
                chunk = plan.chunks(begin.block, paths)[begin.chunk]
                tokens = tokenize_chunk(chunk, options_of(manifest.settings))
            except (UserError, OSError, IndexError) as error:
                print(f"{out}: not compared with the source: {error}")
                return compared
            shard = manifest.shards[index]
            for path, expected in [(shard.name, tokens.ids), (shard.mask_name, tokens.targets)][: len(files_of(shard))]:
                stored = np.load(out / path, mmap_mode="r")[: len(expected) - begin.token]
                if not np.array_equal(stored, expected[begin.token :][: len(stored)]):
                    raise UserError(
                        f"{path} does not begin with the tokens of {chunk.name}; make the set anew in another --out"
                    )
            compared += len(stored)
    return compared


def one_interrupt() -> None:
    """The first Ctrl-C ends the run; another one behind it must not interrupt the end."""

    def handler(number, frame):
        signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)


if __name__ == "__main__":
    one_interrupt()
    run(main, Config, __doc__)
