"""
From files to documents. A file is read in chunks: a row group of a parquet file, or a few megabytes of a text file, cut
between two documents or at a place that no token crosses.
"""

import contextlib
import functools
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from extras.cli import UserError
from extras.manifest import Settings
from extras.sources import SourceFile
from extras.tokenizer import ROLES, alpaca_prompt, chat_pieces

SKIP_BAD = "--skip_bad leaves such documents out"
CHUNK_BYTES = 4 * 2**20  # of a text file per chunk: about a million tokens, as in a row group of FineWeb-Edu
ROW_CHUNK_BYTES = 64 * 2**20  # a row group with more text than this becomes several chunks


class Chunk(NamedTuple):
    """Rows [start, stop) of a row group, or the lines that begin in bytes [start, stop).

    source_bytes: its share of the file's size. tokens: an estimate, if the file counts them. order: seed to shuffle by.
    """

    path: str
    name: str
    kind: str
    group: int
    start: int
    stop: int
    source_bytes: float
    tokens: float | None = None
    order: str | None = None

    def __str__(self):
        where = f"row group {self.group}, rows" if self.kind == "parquet" else "bytes"
        return f"{where} {self.start} to {self.stop} of {self.name}"


class BadDocument(ValueError):
    """A document that can't be read, and why. With --skip_bad a reader gives None in its place."""


@contextlib.contextmanager
def naming(place):
    """Turn whatever reading a damaged file may raise into a UserError that names the place."""
    try:
        yield
    except (UserError, MemoryError, ImportError):
        raise
    except Exception as error:  # of pyarrow, its C++, codecs, the file system
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{place} is damaged or not what its name says ({why}); get the file again") from error


def chunks_of(file: SourceFile, path: Path, text_column: str) -> list[Chunk]:
    """The chunks of a file, in order: large enough to be worth a task, small enough for any memory."""
    with naming(file.name):
        if file.kind == "parquet":
            return row_groups(file, str(path), text_column)
        size = path.stat().st_size
    starts = range(0, max(1, size), CHUNK_BYTES)  # an empty .txt file is a document, too
    return [
        Chunk(str(path), file.name, file.kind, 0, start, min(start + CHUNK_BYTES, size), file.weight / len(starts))
        for start in starts
    ]


def documents_of(chunk: Chunk, settings: Settings) -> tuple[list[list[str]], int]:
    """The documents of a chunk, [text] or [prompt, answer, prompt, answer, ...], and how many were left out.

    Raises UserError, naming file and place, for a document that can't be read, unless `settings.skip_bad`.
    """
    with naming(chunk):
        found = list(READERS[chunk.kind](chunk, settings))
    good = [document for document in found if document is not None]
    if chunk.order is not None:
        random.Random(chunk.order).shuffle(good)
    return good, len(found) - len(good)


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


@functools.lru_cache(maxsize=2)
def parquet_metadata(path: str):
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def row_groups(file: SourceFile, path: str, text_column: str) -> list[Chunk]:
    metadata, chunks = parquet_metadata(path), []
    column, per_row = text_column_index(metadata, text_column, file.name), tokens_per_row(path, metadata)
    for group in range(metadata.num_row_groups):
        info = metadata.row_group(group)
        slices = max(1, min(info.num_rows, -(-info.column(column).total_uncompressed_size // ROW_CHUNK_BYTES)))
        cuts = [info.num_rows * i // slices for i in range(slices + 1)]
        for start, stop in zip(cuts, cuts[1:]):
            if rows := stop - start:
                size, tokens = file.weight * rows / metadata.num_rows, per_row and rows * per_row
                chunks.append(Chunk(path, file.name, "parquet", group, start, stop, size, tokens))
    return chunks


def tokens_per_row(path: str, metadata) -> float | None:
    """By FineWeb's column `token_count`, if the file has it; 1 more for end-of-text."""
    import pyarrow.parquet as pq

    schema = metadata.schema.to_arrow_schema()
    if schema.names.count("token_count") != 1 or str(schema.field("token_count").type) not in ("int32", "int64"):
        return None
    counts = pq.read_table(path, columns=["token_count"]).column(0).drop_null()
    return 1 + counts.to_numpy().mean() if len(counts) else None


def text_column_index(metadata, text_column: str, name: str) -> int:
    """Raises UserError for a column that isn't there, is there twice, or doesn't hold text."""
    import pyarrow as pa

    schema = metadata.schema.to_arrow_schema()
    if (found := schema.names.count(text_column)) != 1:
        how_many = f"{found} columns" if found else "no column"
        raise UserError(f"{name} has {how_many} {text_column!r}; --text_column takes one of: {', '.join(schema.names)}")
    kind = schema.field(text_column).type
    if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"column {text_column!r} of {name} holds {kind}, not text; choose another with --text_column")
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_column)


def read_rows(chunk: Chunk, settings: Settings) -> Iterator[list[str] | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata, row = parquet_metadata(chunk.path), chunk.start - 1
    first = sum(metadata.row_group(group).num_rows for group in range(chunk.group))
    with pq.ParquetFile(chunk.path, metadata=metadata, pre_buffer=False, buffer_size=2**20) as file:  # little memory
        batches = file.iter_batches(1024, [chunk.group], [settings.text_column], use_threads=False)
        columns = (batch.column(0).cast(pa.large_binary()) for batch in batches)  # as str, one bad row would fail all
        rows = itertools.chain.from_iterable(column.to_pylist() for column in columns)
        for row, data in enumerate(itertools.islice(rows, chunk.start, chunk.stop), chunk.start):
            try:
                yield [data.decode("utf-8")]
            except (UnicodeDecodeError, AttributeError):
                if not settings.skip_bad:
                    reason = "has no text" if data is None else "is not UTF-8"
                    raise UserError(f"row {first + row} of {chunk.name} {reason}; {SKIP_BAD}") from None
                yield None
    if row + 1 != chunk.stop:
        raise EOFError(f"{row + 1 - chunk.start} rows of {chunk.stop - chunk.start}")


# ----------------------------------------------------------------------------------------------------------------------
# JSON lines: texts, or instructions


def read_lines(chunk: Chunk, settings: Settings) -> Iterator[list[str] | None]:
    """The documents of the JSON lines that begin in the chunk's bytes."""
    with open(chunk.path, "rb") as file:
        if chunk.start > 0:
            file.seek(chunk.start - 1)
            file.readline()
        while (begin := file.tell()) < chunk.stop and (line := file.readline()):
            if not line.isspace():
                try:
                    yield parse_line(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line, settings)
                except BadDocument as error:
                    if not settings.skip_bad:
                        number = line_number(chunk.path, begin)
                        raise UserError(f"line {number} of {chunk.name} {error}; {SKIP_BAD}") from None
                    yield None


def line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(2**20, offset - at)).count(b"\n") for at in range(0, offset, 2**20)) + 1


def parse_line(line: bytes, settings: Settings) -> list[str]:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadDocument(f"is not a JSON object but {type(record).__name__}")
    if settings.format != "text":
        return (alpaca_dialogue if settings.format == "alpaca" else chat_dialogue)(record)
    if settings.text_column not in record:
        raise BadDocument(f"has no field {settings.text_column!r} (--text_column takes one of: {', '.join(record)})")
    return [text_of(record[settings.text_column], repr(settings.text_column))]


def text_of(value, where: str) -> str:
    if not isinstance(value, str):
        raise BadDocument(f"holds {type(value).__name__} in {where}, not text")
    return value


def alpaca_dialogue(record: dict) -> list[str]:
    for name in ("instruction", "output"):
        if name not in record:
            raise BadDocument(f"has no field {name!r} (it has: {', '.join(record)}); --format alpaca needs one")
    names = ("instruction", "input", "output")  # each of which may be null
    instruction, given, output = (text_of(record.get(name) or "", repr(name)) for name in names)
    if not instruction.strip():
        raise BadDocument("has an empty 'instruction'")
    if not output.strip():
        raise BadDocument("has no answer: its 'output' is empty")
    return [alpaca_prompt(instruction, given), f" {output}"]


def chat_dialogue(record: dict) -> list[str]:
    messages, said = record.get("messages"), []
    if not isinstance(messages, list):
        raise BadDocument(f"has no list in 'messages' (it has: {', '.join(record)}); --format chat needs one")
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role is None or content is None:
            raise BadDocument(f"has no role or no content in message {number}")
        if role not in ROLES:
            raise BadDocument(f"has an unknown role {role!r} in message {number}; known are {', '.join(ROLES)}")
        said.append((role, text_of(content, f"'content' of message {number}")))
        if role == "assistant" and not content.strip():
            raise BadDocument(f"has no answer: the assistant's message {number} is empty")
    if "assistant" not in dict(said):
        raise BadDocument("has no answer: no message is the assistant's")
    if role != "assistant":
        raise BadDocument(f"has no answer to its last message, of {role}")
    return chat_pieces(said)


# ----------------------------------------------------------------------------------------------------------------------
# Plain text


def read_text(chunk: Chunk, settings: Settings) -> Iterator[list[str] | None]:
    """A .txt file is one document. A large one is cut where no GPT-2 token crosses, so the tokens stay the same."""
    with open(chunk.path, "rb") as file:
        start, stop = safe_cut(file, chunk.start), safe_cut(file, chunk.stop)
        file.seek(start)
        data, is_all = file.read(stop - start), chunk.start == 0 and not file.read(1)
    try:
        yield [data.decode("utf-8").removeprefix("\ufeff" if chunk.start == 0 else "")]
    except UnicodeDecodeError as error:
        bad = f"byte {start + error.start} of {chunk.name} is not UTF-8"
        if not is_all:
            raise UserError(f"{bad}; the file is one document, too long to be left out: convert it") from error
        if not settings.skip_bad:
            raise UserError(f"{bad}; {SKIP_BAD}") from error
        yield None


WORD_END = re.compile(  # a visible ASCII character, or one from U+3001 to U+FFFF (Chinese, Japanese), then a space
    rb"(?:[!-~]|\xe3\x80[\x81-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]|[\xe4-\xef][\x80-\xbf]{2})(?=[ \t\n\r])"
)


def safe_cut(file, offset: int) -> int:
    """The first place at or after `offset` between a character that is not a space and an ASCII space.

    No GPT-2 token crosses it: in GPT-2's pattern whitespace only begins a token, and nothing looks back.
    """
    at, data = max(0, offset - 3), b""
    file.seek(at)
    while offset and (more := file.read(len(data) or 2**16)):  # twice as much each time
        data += more
        for found in WORD_END.finditer(data):
            if at + found.end() >= offset:
                return at + found.end()
    return at + len(data)


READERS = {"parquet": read_rows, "jsonl": read_lines, "txt": read_text}
