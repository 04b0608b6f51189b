"""
manifest.json, the record of a token set: its schema, and the only way in which fineweb.py reads it back.

A file that was edited, damaged or made by somebody else must not lead us astray: nothing is done with a manifest before
all of it has been checked here. `checksum` covers the rest, so that a change which fits the schema is found as well.
"""

import hashlib
import re
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from extras.cli import UserError
from extras.files import atomic_file

FORMAT = 2  # 1 had no checksum
MOST_PARTS = 10_000
VOCABULARY = {"gpt2": (50257, 50256), "bytes": (257, 256)}  # size, id of end-of-text

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Cursor(NamedTuple):
    """A place in the stream of tokens: block of files, chunk of the block, token of the chunk."""

    block: Count
    chunk: Count
    token: Count


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True)


class Shard(Record):
    name: Annotated[str, Field(pattern=r"^edufineweb_(val|train)_[0-9]{6,12}\.npy$")]
    split: Literal["val", "train"]
    tokens: Positive
    documents: Count
    bytes: Count  # of text, in UTF-8
    skipped_before: Count = 0  # documents left out before the chunk it starts in
    sha256: Digest
    mask_sha256: Digest | None = None

    @property
    def index(self) -> int:
        return int(self.name.removesuffix(".npy").rpartition("_")[2])

    @property
    def mask_name(self) -> str:
        return self.name.removesuffix(".npy") + ".mask.npy"


class SourceRecord(Record):
    """Where the text comes from. stamps: of local files, what tells an overwritten one from the one that was read."""

    dataset: str | None = None
    input: list[str] | None = None
    revision: str | None
    files: list[tuple[str, Count]]
    stamps: list[str] | None = None

    @model_validator(mode="after")
    def check(self):
        expect((self.dataset is None) != (self.input is None), "either dataset or input is to be given")
        for name, _ in self.files if self.dataset is not None else []:
            expect(is_plain(name), f"{name!r} in files is no plain relative path")
        expect(self.stamps is None or len(self.stamps) == len(self.files), "stamps and files differ in number")
        return self

    def identities(self, stamped: bool) -> tuple[dict, dict]:
        """name -> (size, samples) of every file, and name -> time of its last change."""
        stamps = self.stamps if stamped and self.stamps else [""] * len(self.files)
        pairs = [(name, size, *stamp.partition(" ")[::2]) for (name, size), stamp in zip(self.files, stamps)]
        return {p[0]: p[1:3] for p in pairs}, {p[0]: p[3] for p in pairs}


class Settings(Record):
    """All that the tokens depend on: fineweb.py's flags of these names."""

    dataset: str | None = None
    input: list[str] | None = None
    val_input: list[str] = []
    format: Literal["text", "alpaca", "chat"] = "text"
    text_column: str
    revision: str | None
    max_tokens: Positive | None
    shuffle: int | None
    part: str | None
    skip_bad: bool
    shard_size: Positive
    val_size: Count | None
    tokenizer: Literal["gpt2", "bytes"]


class Tokenizer(Record):
    name: Literal["gpt2", "bytes"]
    vocab_size: int


class Manifest(Record):
    """starts: the cursor at which each shard begins. cursor: where the next one would; None where parts are joined.

    val_size: tokens of the val split, None where all of --val_input is.
    """

    format: Literal[1, 2] = FORMAT
    tokenizer: Tokenizer
    eot: int
    source: SourceRecord
    val_source: SourceRecord | None = None
    settings: Settings
    val_size: Count | None
    shards: list[Shard] = []
    starts: list[Cursor] = []
    cursor: Cursor | None = Cursor(0, 0, 0)
    skipped: Count = 0
    complete: bool = False
    checksum: Digest | None = None

    @classmethod
    def begin(cls, settings: Settings, source: SourceRecord, val_source: SourceRecord | None, val_size: int | None):
        size, eot = VOCABULARY[settings.tokenizer]
        return cls(
            tokenizer=Tokenizer(name=settings.tokenizer, vocab_size=size),
            eot=eot,
            source=source,
            val_source=val_source,
            settings=settings,
            val_size=val_size,
            checksum="0" * 64,
        )

    @property
    def part(self) -> tuple[int, int]:
        """(i, n), i from 0; (0, 1) for a whole set, also for one joined of parts."""
        return (0, 1) if self.is_joined else parse_part(self.settings.part)

    @property
    def is_joined(self) -> bool:
        return self.cursor is None

    def split_of(self, index: int) -> str:
        return "val" if index == 0 and self.val_size != 0 else "train"

    def name_of(self, index: int) -> str:
        return f"edufineweb_{self.split_of(index)}_{index:06d}.npy"

    def room(self, index: int) -> int:
        """Tokens that the shard holds unless the text ends before."""
        return self.settings.shard_size if self.split_of(index) == "train" else self.val_size or 2**40

    @model_validator(mode="after")
    def check(self):
        expect((self.tokenizer.vocab_size, self.eot) == VOCABULARY[self.tokenizer.name], "eot does not fit tokenizer")
        expect(self.tokenizer.name == self.settings.tokenizer, "tokenizer is not that of settings")
        for name in ("dataset", "input"):
            expect(getattr(self.source, name) == getattr(self.settings, name), f"source.{name} is not settings.{name}")
        expect((self.val_source is not None) == bool(self.settings.val_input), "val_source does not fit val_input")
        expect((self.val_size is None) == bool(self.settings.val_input), "val_size does not fit settings.val_input")
        expect(self.is_joined == (self.settings.part or "").startswith("all of "), "cursor does not fit settings.part")
        for number, shard in enumerate(self.shards):
            self.check_shard(number, shard)
        if not self.is_joined:
            self.check_cursors()
        expect(self.format == 1 or self.checksum is not None, "checksum is missing")
        return self

    def check_shard(self, number: int, shard: Shard) -> None:
        i, n = self.part
        expect(shard.split == self.split_of(shard.index), f"shards.{number}.split is not that of its place")
        expect(shard.name == self.name_of(shard.index), f"shards.{number}.name is not that of its place")
        expect(shard.tokens <= self.room(shard.index), f"shards.{number}.tokens is more than a shard holds")
        expect(shard.documents <= shard.tokens, f"shards.{number} has more documents than tokens")
        expect(
            (shard.mask_sha256 is None) == (self.settings.format == "text"), f"shards.{number}.mask_sha256 and format"
        )
        if self.is_joined:
            expect(number == 0 or self.shards[number - 1].index < shard.index, f"shards.{number} is out of order")
        else:
            expect(shard.index == number * n + i, f"shards.{number}.name is not that of its place")
            full = shard.tokens == self.room(shard.index) or (self.val_size is None and shard.index == 0)
            expect(full or number == len(self.shards) - 1, f"shards.{number}.tokens is less than a shard holds")

    def check_cursors(self) -> None:
        expect(len(self.starts) == len(self.shards), "starts and shards differ in number")
        for number, (begin, end) in enumerate(pairwise([*self.starts, self.cursor] if self.shards else [])):
            expect(begin < end, f"starts.{number} is not before the next")
            of_chunk = end.token - begin.token if begin[:2] == end[:2] else self.shards[number].tokens
            expect(of_chunk == self.shards[number].tokens, f"starts.{number} and shards.{number}.tokens differ")
        skipped = [shard.skipped_before for shard in self.shards] + [self.skipped]
        expect(self.format == 1 or skipped == sorted(skipped), "skipped falls from a shard to the next")
        expect(self.shards or self.complete or self.cursor == (0, 0, 0), "cursor is not at the beginning")


def expect(holds, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def is_plain(name: str) -> bool:
    """Whether it can only mean a file below the directory that it is joined to, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not re.search(r'[\\:\x00-\x1f]', name) and parts[0] != "/" and ".." not in parts


def manifest_name(part: tuple[int, int]) -> str:
    return "manifest.json" if part[1] == 1 else f"manifest.part-{part[0] + 1}-of-{part[1]}.json"


def parse_part(part: str | None) -> tuple[int, int]:
    """'2/8' -> (1, 8). Raises UserError."""
    if part is None:
        return 0, 1
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", part)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n <= MOST_PARTS:
        raise UserError(f"--part {part!r} must be I/N with 1 <= I <= N <= {MOST_PARTS}, such as 2/8")
    return i - 1, n


def checksum(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest | None:
    """None where there is none yet. Raises UserError, naming file and field, for one we can't have written."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        why = first["msg"].removeprefix("Value error, ")
        raise UserError(damaged(path, f"{place}: {why}" if place else why)) from None
    if path.name != manifest_name(manifest.part):
        raise UserError(damaged(path, f"settings.part is {manifest.settings.part}"))
    if manifest.checksum not in (None, checksum(manifest)):
        raise UserError(damaged(path, "checksum is not that of the rest"))
    return manifest


def damaged(path: Path, why) -> str:
    return f"{path} is not as fineweb.py wrote it ({why}); restore it, or choose another --out"


def write_manifest(path: Path, manifest: Manifest, writer: str = "") -> None:
    manifest.format, manifest.checksum = FORMAT, None
    manifest.checksum = checksum(manifest)
    with atomic_file(path, writer) as file:
        file.write((manifest.model_dump_json(indent=1) + "\n").encode())
