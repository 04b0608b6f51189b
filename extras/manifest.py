"""
manifest.json, the record of a token set: its schema, and the only code that reads or writes it.

The checksum finds accidental changes. The schema holds even for a manifest that was changed on purpose, checksum
included: it cannot name a file outside the directory.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from extras.cli import UserError
from extras.files import atomic_file

FORMAT = 2  # format 1 had no checksum
MAX_PARTS = 10_000

Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Cursor(NamedTuple):
    """A position in the token stream: block of files, chunk in the block, token in the chunk."""

    block: Count
    chunk: Count
    token: Count


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", validate_default=True)


class Shard(Record):
    name: Annotated[str, Field(pattern=r"^(edufineweb_(val|train)_[0-9]{6,12}\.npy|\w[\w-]*_(val|train)_[0-9]+\.bin)$")]
    split: Literal["val", "train"]
    tokens: Positive
    documents: Count
    bytes: Count  # of text, in UTF-8
    skipped_before: Count = 0  # documents left out before the chunk in which the shard starts
    sha256: Digest
    mask_sha256: Digest | None = None

    @property
    def index(self) -> int:
        return int(self.name.removesuffix(".npy").rpartition("_")[2])

    @property
    def files(self) -> list[tuple[str, str]]:
        """(name, sha256): of the tokens, and perhaps of a mask."""
        both = [(self.name, self.sha256), (self.name.removesuffix(".npy") + ".mask.npy", self.mask_sha256)]
        return [(name, sha256) for name, sha256 in both if sha256]


class SourceRecord(Record):
    """Where the text comes from. stamps: for each local file, a hash of samples of it and its modification time."""

    dataset: str | None = None
    input: list[str] | None = None
    revision: str | None
    files: list[tuple[str, Count]]
    stamps: list[str] | None = None

    @property
    def is_tokens(self) -> bool:
        """Whether the files are shards as they are: .bin files of llm.c and modded-nanogpt."""
        return self.input is None and any(name.endswith(".bin") for name, _ in self.files)


class Settings(Record):
    """Everything that the tokens depend on: fineweb.py's flags of these names."""

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
    """starts: the cursor at which each shard begins. cursor: where the next shard would; None where parts are joined.

    val_size: tokens in the val split, or None where it is all of --val_input, or the shards were fetched as they are.
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

    @property
    def part(self) -> tuple[int, int]:
        """(i, n), i from 0; (0, 1) for a whole set, also for one joined of parts."""
        return (0, 1) if self.cursor is None else parse_part(self.settings.part)

    def split_of(self, index: int) -> str:
        return "val" if index == 0 and self.val_size != 0 else "train"

    def name_of(self, index: int) -> str:
        if self.source.is_tokens:
            return self.source.files[index][0]
        return f"edufineweb_{self.split_of(index)}_{index:06d}.npy"

    def capacity(self, index: int) -> int:
        """Tokens in a full shard."""
        return self.settings.shard_size if self.split_of(index) == "train" else self.val_size or 2**40

    @model_validator(mode="after")
    def check(self):
        source, settings, is_joined = self.source, self.settings, self.cursor is None
        for name, _ in source.files if source.input is None else []:
            expect(is_plain(name), f"{name!r} in source.files is not a plain relative path")
        expect((source.dataset, source.input) == (settings.dataset, settings.input), "source does not fit settings")
        expect((self.val_source is None) == (not settings.val_input), "val_source does not fit settings.val_input")
        expect(is_joined == (settings.part or "").startswith("all of "), "cursor does not fit settings.part")
        expect(is_joined or len(self.starts) == len(self.shards), "starts and shards differ in number")
        if source.is_tokens:
            fits = settings.part is None and self.cursor.block == len(self.shards) <= len(source.files)
            expect(fits, "shards, cursor and source.files do not fit")
        i, n = self.part
        for number, shard in enumerate(self.shards):
            index = shard.index if is_joined else number * n + i
            expect(shard.name == self.name_of(index), f"shards.{number}.name should be {self.name_of(index)}")
            expect(f"_{shard.split}_" in shard.name, f"shards.{number}.split does not fit its name")
        return self


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def is_plain(name: str) -> bool:
    """Whether the name can only mean a file below the directory it is joined to, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not re.search(r"[\\:\x00-\x1f]", name) and parts[0] != "/" and ".." not in parts


def manifest_name(part: tuple[int, int]) -> str:
    return "manifest.json" if part[1] == 1 else f"manifest.part-{part[0] + 1}-of-{part[1]}.json"


def parse_part(part: str | None) -> tuple[int, int]:
    """'2/8' -> (1, 8). Raises UserError."""
    if part is None:
        return 0, 1
    i, n = map(int, part.split("/")) if re.fullmatch("[0-9]{1,6}/[0-9]{1,6}", part) else (0, 0)
    if not 1 <= i <= n <= MAX_PARTS:
        raise UserError(f"--part {part!r} must be I/N with 1 <= I <= N <= {MAX_PARTS}, such as 2/8")
    return i - 1, n


def checksum(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.model_dump_json(exclude={"checksum"}).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest | None:
    """None if there is no file. Raises UserError, naming file and field, for one that fineweb.py did not write."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
        expect(path.name == manifest_name(manifest.part), f"settings.part is {manifest.settings.part}")
        is_right = manifest.checksum == checksum(manifest) or (manifest.format == 1 and manifest.checksum is None)
        expect(is_right, "checksum does not match the rest")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        why = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_input=False)[0]
            place, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            why = f"{place}: {why}" if place else why
        raise UserError(f"{path} is not as fineweb.py wrote it ({why}); restore it, or choose another --out") from None
    return manifest


def write_manifest(out: Path, manifest: Manifest, writer: str = "") -> None:
    """Write the manifest of a set, or of a part of it, in `out`. writer: see `atomic_file`."""
    manifest.format = FORMAT
    manifest.checksum = checksum(manifest)
    with atomic_file(out / manifest_name(manifest.part), writer) as file:
        file.write((manifest.model_dump_json(indent=1) + "\n").encode())
