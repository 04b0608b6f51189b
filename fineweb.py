"""
Text -> token shards, the food of train_gpt2.py.

    python fineweb.py                                               # FineWeb-Edu sample-10BT: 10B GPT-2 tokens, 20 GB
    python fineweb.py --dataset python-docs --out data/python-docs  # Python's own documentation: no network
    python fineweb.py --input books/ --out data/books               # .parquet .jsonl .json .txt, also .gz and .zst
    python fineweb.py --input chats.jsonl --format chat --out data/chats  # to finetune on: only the answers are learned
    python fineweb.py --dataset kjj0/finewebedu10B-gpt2 --out data/bins   # .bin shards of tokens are only fetched
    python fineweb.py --verify                                      # is the set on disk what the manifest says?

    source --fetch, one ahead--> files --cut--> chunks --threads--> tokens, in order --> shards + manifest.json

A chunk is a row group of a parquet file or a few megabytes of a text file. A shard is written when it is full, and then
recorded in the manifest. A run that was killed at any moment continues after the last shard when it is started again,
and ends with the same bytes as an undisturbed one.

Instructions are JSON lines in one of two formats. GPT-2 has no tokens for roles, so the template is plain text:

    --format alpaca   {"instruction": I, "input": N, "output": O}; without input its line is left out
    --format chat     {"messages": [{"role": "system" | "user" | "assistant", "content": C}, ...]}

    Instruction: I\\n\\nInput: N\\n\\nAnswer: O<|endoftext|>
    System: C\\n\\nUser: C\\n\\nAssistant: C<|endoftext|>\\n\\nUser: C ...

Each shard then has a mask, `edufineweb_train_000001.mask.npy`: uint8, 1 for the tokens of an answer, from the space
before it to the end-of-text after it, else 0. Only those tokens are training targets.
"""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from extras import manifest as schema
from extras.cli import UserError, run
from extras.files import atomic_file, exclusive
from extras.manifest import Cursor, Manifest, Shard, manifest_name, parse_part, read_manifest, write_manifest
from extras.python_docs import PYTHON_DOCS, docs_source
from extras.readers import Chunk, chunks_of
from extras.sources import Fetcher, Source, SourceFile, hub_source, is_compressed, local_source, utf8
from extras.tokenize_workers import Tokens, count, pick_backend, tokenize_all, tokenize_chunk
from extras.tokenizer import load_tokenizer

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu:sample-10BT"
TOKENS_PER_BYTE = {"parquet": 0.35, "jsonl": 0.22, "txt": 0.22}  # GPT-2's, as in FineWeb-Edu, in English
COMPRESSION = 3  # text bytes per byte of .gz or .zst, about
PAST_THE_END = "manifest.json continues past the end of the source (cursor); choose another --out"
HEADER_BYTES = 1024  # of a .bin file of llm.c or modded-nanogpt: 256 int32, of which three count


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    dataset: str = FINEWEB_EDU  # dataset of the Hugging Face hub, ID[:CONFIG], or python-docs
    input: list[str] = field(default_factory=list)  # files, folders or globs of your own, instead of --dataset
    val_input: list[str] = field(default_factory=list)  # files for the val split, which is then all of them
    format: Literal["text", "alpaca", "chat"] = "text"  # plain text, or instructions of which the answers are learned
    text_column: str = "text"  # the column or JSON field that holds the text
    revision: str | None = None  # branch, tag or commit of the hub dataset (default: main as it is today)
    max_tokens: int | None = None  # stop after so many tokens (default: all); .bin shards: once they hold them
    shuffle: int | None = None  # seed: shuffle row groups over all files, and documents in them; fetches all first
    part: str | None = None  # I/N: tokenize the I-th of N parts, for job arrays; all share --out
    skip_bad: bool = False  # leave out documents that can't be read, and count them

    out: str = "edu_fineweb10B"  # directory of the shards
    shard_size: int = 100_000_000  # tokens in a shard
    val_size: int | None = None  # tokens in shard 0, the val split (default: a shard of FineWeb-Edu, 1/20 of others)
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"  # GPT-2's byte-pair encoding, or plain bytes

    workers: int | None = None  # threads (default: one a core)
    backend: Literal["auto", "gigatoken", "tiktoken"] = "auto"  # GPT-2's encoder; auto: gigatoken if it is installed
    keep_downloads: bool = False  # keep what was fetched, in OUT/downloads
    verify: bool = False  # check the shards in OUT against their manifest and, if it is available, the source


def check(config: Config) -> None:
    """Raises UserError for values that fit no run."""
    for name, least in {"shard_size": 1, "val_size": 0, "max_tokens": 1, "workers": 0}.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    parse_part(config.part)
    if config.input and config.dataset != Config.dataset:
        raise UserError(f"--input and --dataset {config.dataset} exclude each other; leave one out")
    if config.revision and (config.input or config.dataset == PYTHON_DOCS):
        raise UserError("--revision is for datasets of the hub; leave it out")
    val, limit = config.val_size or 0, config.max_tokens or sys.maxsize
    if val >= limit:
        raise UserError(f"--val_size {val} leaves nothing to train on of --max_tokens {limit}; lower it")
    if config.val_input and config.val_size is not None:
        raise UserError("--val_size does not go with --val_input, all of which is the val split; leave one out")


# ----------------------------------------------------------------------------------------------------------------------
# Plan: which chunks, in which order


class Plan:
    """blocks: lists of (index, file, start in the source's bytes) whose chunks are shuffled together, if at all.

    The first `val_blocks` blocks are --val_input, in part 1. Of the others, part i of n takes the chunks that begin in
    the i-th n-th of the bytes.
    """

    def __init__(self, val: Source | None, source: Source, settings: schema.Settings):
        self.settings, (self.part, self.parts) = settings, parse_part(settings.part)
        starts = list(itertools.accumulate((file.weight for file in source.files), initial=0))
        self.bytes = starts[-1]
        places = zip(itertools.count(), source.files, starts)
        mine = [p for p in places if self.part_of(p[2]) <= self.part <= self.part_of(p[2] + p[1].weight - 1)]
        self.blocks = [[(None, file, 0)] for file in val.files] if val and self.part == 0 else []
        self.val_blocks = len(self.blocks)
        self.blocks += [[place] for place in mine] if settings.shuffle is None else [mine] if mine else []
        self.done = list(itertools.accumulate(map(len, self.blocks), initial=0))  # files before each block
        self.files = [file for block in self.blocks for _, file, _ in block]  # in the order of use

    def part_of(self, byte: int) -> int:
        return byte * self.parts // self.bytes

    def chunks(self, block: int, paths: list[Path]) -> list[Chunk]:
        """The chunks of a block in the order of the stream."""
        chunks, seed = [], self.settings.shuffle if block >= self.val_blocks else None
        for (index, file, start), path in zip(self.blocks[block], paths):
            of_file = chunks_of(file, path, self.settings.text_column)
            for number, chunk in enumerate(of_file):
                if index is None or self.part_of(start + file.weight * number // len(of_file)) == self.part:
                    chunks.append(chunk if seed is None else chunk._replace(order=f"{seed} {index} {number}"))
        if seed is not None:
            random.Random(f"units {seed}").shuffle(chunks)  # "units": so that old sets can still be resumed
        return chunks


# ----------------------------------------------------------------------------------------------------------------------
# Shards


class ShardWriter:
    """Cuts the token stream into shards. A shard stays in memory until it is full, and is then written at once."""

    def __init__(self, out: Path, manifest: Manifest, val_blocks: int):
        self.out, self.manifest, self.val_blocks = out, manifest, val_blocks
        self.pieces: list[tuple[Cursor, Tokens, int]] = []  # where each begins, and the documents skipped before it
        self.length = 0  # tokens in pieces
        self.total = sum(shard.tokens for shard in manifest.shards)

    @property
    def index(self) -> int:
        """Of the shard in memory. Parts alternate, so that no two ever use the same name."""
        return len(self.manifest.shards) * self.manifest.part[1] + self.manifest.part[0]

    def write(self, cursor: Cursor, chunk: Tokens, skipped: int, stop: int = sys.maxsize) -> None:
        """Append the tokens of a chunk from `cursor` up to `stop`. skipped: documents left out before the chunk."""
        done, stop = cursor.token, min(stop, len(chunk.ids))
        while done < stop:
            here, val_ends = cursor._replace(token=done), self.index == 0 < self.val_blocks <= cursor.block
            if val_ends and not self.pieces:
                raise UserError("--val_input holds no document at all")
            if val_ends or self.length == self.manifest.capacity(self.index):
                self.commit(here)
            end = min(stop, done + self.manifest.capacity(self.index) - self.length)
            piece = Tokens(chunk.ids[done:end], None if chunk.targets is None else chunk.targets[done:end])
            self.pieces.append((here, piece, skipped))
            self.length += end - done
            self.total += end - done
            done = end

    def commit(self, cursor: Cursor) -> None:
        """Write the shard and record it. cursor: where the next one begins."""
        start, _, skipped = self.pieces[0]
        pieces, path = [tokens for _, tokens, _ in self.pieces], self.out / self.manifest.name_of(self.index)
        if pieces[0].targets is not None:  # the mask first, so that no shard is ever without it
            write_array(path.with_suffix(".mask.npy"), [piece.targets for piece in pieces])
        write_array(path, [piece.ids for piece in pieces])
        self.pieces, self.length = [], 0
        record(path, self.manifest, start, cursor, pieces, skipped)

    def finish(self, cursor: Cursor) -> None:
        """Write the last shard and complete the manifest. If val has taken all the text, it gets a twentieth."""
        if self.index == 0 and self.pieces and self.manifest.val_size != 0:
            if self.val_blocks:
                raise UserError(f"there is nothing to train on: --val_input has all {self.total:,} tokens")
            print(f"The source has only {self.total:,} tokens, all of which would be val: val gets a twentieth")
            self.manifest.val_size = self.total // 20
            pieces, self.pieces, self.length, self.total = self.pieces, [], 0, 0
            for piece in pieces:
                self.write(*piece)
        if not self.total and self.manifest.part[1] == 1:
            raise UserError("the source holds no document at all")
        self.manifest.complete, self.manifest.cursor = True, cursor
        if self.pieces:
            self.commit(cursor)
        else:
            write_manifest(self.out, self.manifest)


def record(path: Path, manifest: Manifest, start: Cursor, cursor: Cursor, pieces: list[Tokens], skipped: int = 0):
    """Add the shard at `path` to the manifest: it has these tokens and begins at `start`, the next one at `cursor`."""
    counts = [(len(piece.ids), *count(piece.ids, piece.targets, manifest.tokenizer.name)) for piece in pieces]
    tokens, documents, text_bytes = map(sum, zip(*counts))
    shard = {"name": path.name, "split": "train" if "_train_" in path.name else "val", "tokens": tokens}
    shard |= {"documents": documents, "bytes": text_bytes, "skipped_before": skipped, "sha256": sha256_of(path)}
    mask_sha256 = None if pieces[0].targets is None else sha256_of(path.with_suffix(".mask.npy"))
    manifest.shards.append(Shard(**shard, mask_sha256=mask_sha256))
    manifest.starts.append(start)
    manifest.cursor = cursor
    write_manifest(path.parent, manifest)


def write_array(path: Path, arrays: list[np.ndarray]) -> None:
    """Write the arrays as one 1-D .npy file, as np.save would; but a full disk has its errno."""
    header = {"descr": arrays[0].dtype.str, "fortran_order": False, "shape": (sum(map(len, arrays)),)}
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(arrays)


def sha256_of(path: Path) -> str | None:
    """None if there is no such file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Beginning and resuming


def begin(config: Config, val: Source | None, source: Source) -> Manifest:
    known = load_tokenizer(config.tokenizer)
    values = {"tokenizer": schema.Tokenizer(name=known.name, vocab_size=known.n_vocab), "eot": known.eot}
    values |= {"source": source.record, "val_source": val and val.record, "settings": settings_of(config)}
    val_size = None if val or source.record.is_tokens else val_size_of(config, source.files)
    return Manifest(val_size=val_size, **values)


def settings_of(config: Config) -> schema.Settings:
    values = {name: getattr(config, name) for name in schema.Settings.model_fields}
    values |= {name: list(map(utf8, getattr(config, name))) for name in ("input", "val_input")}
    return schema.Settings(**values | ({"dataset": None} if config.input else {"input": None}))


def val_size_of(config: Config, files: list[SourceFile]) -> int:
    """Tokens in the val split: a shard of FineWeb-Edu, a twentieth of anything else, and never all there are."""
    if config.val_size is not None:
        return config.val_size
    size, limit = config.shard_size, config.max_tokens or sys.maxsize
    if config.input or not config.dataset.startswith(FINEWEB_EDU.partition(":")[0]):
        # a guess from the files' sizes alone, so that it is the same whenever it is made
        sizes = ((f.kind, f.size * (COMPRESSION if is_compressed(f.name) else 1)) for f in files)
        tokens = sum(size * TOKENS_PER_BYTE[kind] for kind, size in sizes)
        tokens = int(tokens if config.tokenizer == "gpt2" else tokens / TOKENS_PER_BYTE["txt"])
        size = min(size, min(tokens, limit) // 20)
    return max(1, size if size < limit else limit // 20)


def resumed(manifest: Manifest, config: Config, out: Path) -> Manifest:
    """The manifest to continue from, before the first damaged shard. Raises UserError if a flag has changed."""
    was, asked = manifest.settings.model_dump(), settings_of(config).model_dump()
    changed = [f"--{name} {asked[name]} (it was {was[name]})" for name in sorted(was) if was[name] != asked[name]]
    if changed:
        raise UserError(f"{out} was begun with other flags: {', '.join(changed)}; choose another --out")
    written = (out / manifest_name(manifest.part)).stat().st_mtime_ns
    for number, shard in enumerate(manifest.shards):
        for name, sha256 in shard.files:
            path = out / name
            is_older = path.is_file() and path.stat().st_mtime_ns < written  # checksums take long: trust the times
            if not is_older and sha256_of(path) != sha256:
                print(f"{path} is missing or damaged: going on from there")
                before = {"shards": manifest.shards[:number], "starts": manifest.starts[:number], "complete": False}
                before |= {"cursor": manifest.starts[number], "skipped": shard.skipped_before}
                return manifest.model_copy(update=before)
    return manifest


def open_sources(config: Config, manifest: Manifest | None, out: Path) -> tuple[Source | None, Source]:
    """(--val_input, everything else). Raises UserError if they are not those of the manifest that is resumed."""
    val = local_source(config.val_input, "--val_input") if config.val_input else None
    if config.input:
        source = local_source(config.input)
    elif config.dataset == PYTHON_DOCS:
        source = docs_source()
    else:
        enough = config.max_tokens and 2**20 + 16 * config.max_tokens  # bytes; an English token has 4.6
        source = hub_source(config.dataset, config.revision, manifest and manifest.source, enough)
    if source.record.is_tokens:
        for name in ("val_input", "format", "shuffle", "part", "shard_size", "val_size", "tokenizer"):
            if getattr(config, name) != getattr(Config(), name):
                raise UserError(f"{config.dataset} holds tokens already, which --{name} can't change; leave it out")
    for file in (val.files if val else []) + source.files:
        if config.format != "text" and file.kind != "jsonl":
            raise UserError(f"--format {config.format} reads .jsonl, not {file.name}; write it as JSON lines")
    if manifest:
        check_source(manifest.source, source.record, out)
        if val:
            check_source(manifest.val_source, val.record, out)
    return val, source


def check_source(was: schema.SourceRecord, now: schema.SourceRecord, out: Path) -> None:
    """Raises UserError unless both records are of the same files with the same contents."""
    if was.revision != now.revision:
        raise UserError(f"{out} was begun with {was.revision}, and this is {now.revision}; choose another --out")
    stamps = zip(was.stamps or [], now.stamps or [])  # format 1 has none
    other = [name for (name, size), old in zip(now.files, was.files) if (name, size) != old]
    other += [name for (name, _), (old, new) in zip(now.files, stamps) if old.split()[:1] != new.split()[:1]]
    if other or len(was.files) != len(now.files):
        what = ", ".join(other[:3]) or f"the number of files ({len(was.files)})"
        raise UserError(f"{out} was begun before {what} changed; choose another --out")
    if was.stamps and was != now:
        touched = [name for (name, _), old, new in zip(now.files, was.stamps, now.stamps) if old != new]
        print(f"{', '.join(touched[:3])}: modified, but size and samples are the same, so it is taken as unchanged")


# ----------------------------------------------------------------------------------------------------------------------
# The run


def main(config: Config) -> None:
    check(config)
    out, again = Path(config.out), "the shards so far are safe, and the same command goes on from there"
    try:
        (verify if config.verify else make)(out, config)
    except KeyboardInterrupt:
        print(f"\nstopped; {again}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno is None:
            raise
        where = error.filename or out
        raise UserError(f"{where}: {os.strerror(error.errno)}; fix that, then run again: {again}") from error


def make(out: Path, config: Config) -> None:
    """Begin a set of shards in `out`, or resume it, to its end."""
    part = parse_part(config.part)
    path, downloads = out / manifest_name(part), out / manifest_name(part).replace("manifest", "downloads")[:-5]
    found = read_manifest(path)
    manifest = resumed(found, config, out) if found and found.cursor != (0, 0, 0) else None  # else begin again
    val, source = open_sources(config, manifest, out)
    if manifest and manifest.complete:
        print(f"{out} is complete: {summary(manifest)}; nothing to do")
        whole = read_manifest(out / "manifest.json")
        if whole and whole.complete:
            return  # without a lock: it may be read-only
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(path.with_name(path.name + ".lock")):
        if read_manifest(path) != found:
            raise UserError(f"{out} was written by another process just now; run again")
        strays = sorted([*out.glob("edufineweb_*.npy"), *out.glob("*_train_*.bin"), *out.glob("*_val_*.bin")])
        if strays and not list(out.glob("manifest*.json")):
            raise UserError(f"{out} has {strays[0].name} but no manifest.json that lists it; choose another --out")
        manifest = manifest or begin(config, val, source)
        write_manifest(out, manifest)
        join_parts(out, part)
        if not manifest.complete:
            if source.record.is_tokens:
                fetch_shards(config, source.files, manifest, out, downloads)
            else:
                write_shards(config, Plan(val, source, manifest.settings), manifest, out, downloads)
            join_parts(out, part)
    print(f"{out}: {summary(manifest)}")
    if not source.record.is_tokens:
        remark(manifest, len(source.files))


def join_parts(out: Path, part: tuple[int, int]) -> None:
    """Make manifest.json of the parts' manifests: incomplete, until the last of them is complete.

    Parts may end at the same moment. Each writes its own manifest before it looks at all of them, so the last one to
    look finds them complete; and whoever writes the joined manifest, it is the same.
    """
    i, n = part
    if n == 1:
        return
    path = out / "manifest.json"
    begun = [manifest for j in range(n) if (manifest := read_manifest(out / manifest_name((j, n))))]
    complete = len(begun) == n and all(manifest.complete for manifest in begun)
    settings = begun[0].settings.model_copy(update={"part": f"all of {n}"})
    if (joined := read_manifest(path)) and joined.settings != settings:
        raise UserError(f"{path} was begun with other flags, or another number of parts; choose another --out")
    if complete or not joined:
        shards = sorted((shard for manifest in begun for shard in manifest.shards), key=lambda shard: shard.index)
        changes = {"settings": settings, "shards": shards, "starts": [], "cursor": None, "complete": complete}
        changes["skipped"] = sum(manifest.skipped for manifest in begun)
        write_manifest(out, begun[0].model_copy(update=changes), f".part-{i + 1}-of-{n}")


def summary(manifest: Manifest) -> str:
    tokens, documents = {"train": 0, "val": 0}, sum(shard.documents for shard in manifest.shards)
    for shard in manifest.shards:
        tokens[shard.split] += shard.tokens
    what = f"{documents:,} documents, {len(manifest.shards)} shards"
    return f"{what}, {tokens['train']:,} train and {tokens['val']:,} val tokens"


def remark(manifest: Manifest, files: int) -> None:
    """Print what may surprise about a set: left out documents, a short shard, a val split unlike the rest."""
    shards, size, is_shuffled = manifest.shards, manifest.settings.shard_size, manifest.settings.shuffle is not None
    if manifest.skipped:
        print(f"{manifest.skipped} documents could not be read and were left out")
    if shards and (last := shards[-1].tokens) < size:
        print(f"The last shard is short ({last:,} of {size:,} tokens): expected, no failure.")
    if manifest.val_size and manifest.part[0] == 0 and len(shards) > 1:
        is_one_file = not is_shuffled and files > 1 and manifest.starts[1] <= (1, 0, 0)
        if (n := shards[0].documents) < 200 or is_one_file:
            which = "document" if n == 1 else f"{n:,} documents"
            where = f", all from the first of {files} files" if is_one_file else ""
            mix = "" if is_shuffled else "--shuffle 1 mixes all documents first, "
            better = f"{mix}--val_size N takes more, --val_input FILE takes your own"
            print(f"Validation uses only the first {which}{where}, perhaps unlike the rest: {better}.")


def fetch_shards(config: Config, files: list[SourceFile], manifest: Manifest, out: Path, downloads: Path) -> None:
    """Fetch a dataset of .bin files, which are shards as they are: each is checked, moved to `out` and recorded."""
    import tqdm

    sizes = ((file.size - HEADER_BYTES) // 2 if "_train_" in file.name else 0 for file in files)
    before = itertools.accumulate(sizes, initial=0)  # val files, which come first, count nothing
    files = [file for file, tokens in zip(files, before) if tokens < (config.max_tokens or sys.maxsize)]
    first = manifest.cursor.block
    fetcher = Fetcher(files, first, downloads, config.keep_downloads)
    for number in tqdm.trange(first, len(files), initial=first, total=len(files), unit="file", dynamic_ncols=True):
        name, path = files[number].name, fetcher.get(number)
        data = path.read_bytes()
        path.unlink()  # if it is damaged, it is fetched again next time
        ids = ids_of_bin(name, data)
        with atomic_file(out / name) as file:
            file.write(data)
        record(out / name, manifest, Cursor(number, 0, 0), Cursor(number + 1, 0, 0), [Tokens(ids, None)])
        fetcher.release(number + 1)
    shutil.rmtree(downloads, ignore_errors=True)
    manifest.complete, manifest.cursor = True, Cursor(len(files), 0, 0)
    write_manifest(out, manifest)


def ids_of_bin(name: str, data: bytes) -> np.ndarray:
    """(n,) uint16: the ids in a .bin file of llm.c or modded-nanogpt. Raises UserError for anything else."""
    magic, version, length = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    if (magic, version) != (20240520, 1):
        what = f"it begins with {magic}, {version}, not 20240520, 1"
    elif length < 0 or len(data) != HEADER_BYTES + 2 * length:
        what = f"its header says {length:,} tokens, {HEADER_BYTES + 2 * length:,} bytes, and it has {len(data):,}"
    elif not length or (ids := np.frombuffer(data, "<u2", offset=HEADER_BYTES)).max() >= 50257:
        what = f"it has id {ids.max()}, and GPT-2's end at 50256" if length else "it has no tokens"
    else:
        return ids
    raise UserError(f"{name} is not a whole .bin file of GPT-2 tokens: {what}; run again, or take another --dataset")


def write_shards(config: Config, plan: Plan, manifest: Manifest, out: Path, downloads: Path) -> None:
    """Write every shard from the manifest's cursor to the end, and complete the manifest."""
    import tqdm

    first, limit = manifest.cursor, config.max_tokens or sys.maxsize
    done, is_limited = plan.done[min(first.block, len(plan.blocks))], config.max_tokens is not None
    fetcher = Fetcher(plan.files, done, downloads, config.keep_downloads, is_limited)
    writer = ShardWriter(out, manifest, plan.val_blocks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if config.workers is None else config.workers
    backend = pick_backend(config.backend, config.tokenizer)
    stream = tokenize_all(planned_chunks(plan, first, fetcher), manifest.settings, backend, workers)
    bytes_total = sum(file.weight for file in plan.files) / manifest.part[1]
    tokens_seen = bytes_seen = 0
    seconds = 0.5 if sys.stderr.isatty() else 30  # a log file is not a screen
    bar = tqdm.tqdm(initial=writer.total, mininterval=seconds, unit="tok", unit_scale=True, dynamic_ncols=True)
    with contextlib.closing(stream), bar:
        for cursor, chunk, tokens in stream:
            if cursor.token >= max(1, len(tokens.ids)):
                raise UserError(PAST_THE_END)
            writer.write(cursor, tokens, manifest.skipped, cursor.token + limit - writer.total)
            fetcher.release(plan.done[manifest.cursor.block])
            manifest.skipped += tokens.skipped
            tokens_seen += chunk.tokens if chunk.tokens and config.tokenizer == "gpt2" else len(tokens.ids)
            bytes_seen += chunk.source_bytes
            bar.total = max(writer.total, min(limit, int(tokens_seen / bytes_seen * bytes_total)))
            bar.set_postfix_str(f"shard {writer.index}", refresh=False)
            bar.update(writer.total - bar.n)
            if writer.total == limit:
                break
        if not config.keep_downloads:
            shutil.rmtree(downloads, ignore_errors=True)
        writer.finish(Cursor(len(plan.blocks), 0, 0))
        bar.total = bar.n


def planned_chunks(plan: Plan, first: Cursor, fetcher: Fetcher) -> Iterator[tuple[Cursor, Chunk]]:
    """Every chunk, and where in it to begin, from `first` on; files are fetched as they are needed."""
    if first.block >= len(plan.blocks) and first != (0, 0, 0):
        raise UserError(PAST_THE_END)
    for block in range(first.block, len(plan.blocks)):
        chunks = plan.chunks(block, [fetcher.get(number) for number in range(plan.done[block], plan.done[block + 1])])
        begin = first if block == first.block else Cursor(block, 0, 0)
        if begin.chunk >= max(1, len(chunks)):
            raise UserError(PAST_THE_END)
        for number in range(begin.chunk, len(chunks)):
            yield begin if number == begin.chunk else Cursor(block, number, 0), chunks[number]


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def verify(out: Path, config: Config) -> None:
    """Check every shard's sha256 and, where the source can be read, some shards against it. Raises UserError."""
    manifest = read_manifest(out / "manifest.json")
    if manifest is None:
        raise UserError(f"{out} has no manifest.json to verify the shards against; choose another --out")
    files = [file for shard in manifest.shards for file in shard.files]
    damaged = [name for name, sha256 in files if sha256_of(out / name) != sha256]
    if damaged:
        names = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        what = f"{len(damaged)} of {len(files)} shards in {out} are missing or damaged: {names}"
        raise UserError(f"{what}; delete them and run fineweb.py again with the same flags, which makes them again")
    print(f"{out}: {len(files)} shards have the sha256 of the manifest")
    if not manifest.source.is_tokens:
        for part in [read_manifest(path) for path in sorted(out.glob("manifest.part-*-of-*.json"))] or [manifest]:
            compare_with_source(out, part)
    if not manifest.complete:
        raise UserError(f"{out} is sound so far, but not complete; run fineweb.py again with the same flags")


def compare_with_source(out: Path, manifest: Manifest, samples: int = 3) -> None:
    """Tokenize the chunk in which some shards begin again. Raises UserError if they differ, and says if it can't."""
    was = Config(**{name: value for name, value in manifest.settings if value is not None})
    compared, plan, shards, place = 0, None, range(len(manifest.starts)), out if os.access(out, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as scratch:
        for index in sorted(random.Random(0).sample(shards, min(samples, len(shards)))):
            begin, shard = manifest.starts[index], manifest.shards[index]
            try:
                plan = plan or Plan(*open_sources(was, manifest, out), manifest.settings)
                paths = [file.fetch(Path(scratch)) for _, file, _ in plan.blocks[begin.block]]
                chunk = plan.chunks(begin.block, paths)[begin.chunk]
                tokens = tokenize_chunk(chunk, manifest.settings, "tiktoken")
            except (UserError, OSError, IndexError) as error:
                print(f"{out}: not compared with the source: {error}")
                return
            for (name, _), expected in zip(shard.files, (tokens.ids, tokens.targets)):
                stored = np.load(out / name, mmap_mode="r")[: max(0, len(expected) - begin.token)]
                if not np.array_equal(stored, expected[begin.token :][: len(stored)]):
                    raise UserError(f"{name} does not begin with the tokens of {chunk.name}; make it in another --out")
            compared += len(stored)
    print(f"{out}: {compared:,} tokens are those of the source")


def one_interrupt(number: int, frame) -> None:
    """The first Ctrl-C ends the run; a second one must not interrupt the clean-up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, one_interrupt)
    run(main, Config, __doc__)
