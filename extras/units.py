"""
From files to tokens: cut into chunks, read, tokenized, by worker processes.

A chunk is a row group of a parquet file, or a few megabytes of a text file, cut between two documents or where no token
can go across. What comes back is one array, with the counts that the manifest records.
"""

import base64
import contextlib
import functools
import json
import os
import pickle
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras.cli import UserError
from extras.sources import SourceFile, in_background
from extras.tokenizer import load_tokenizer, replace_surrogates

CHUNK_BYTES = 4 * 2**20  # of a text file per chunk: about a million tokens, as in a row group of FineWeb-Edu
ROW_CHUNK_BYTES = 64 * 2**20  # of text in a row group, beyond which it makes several chunks
CHECK_EVERY = 512  # one document in so many is tokenized by tiktoken too, if gigatoken does the work
READY = b"+"  # what a worker process says first
CACHE_BYTES = 2**28  # that gigatoken's memory of words it has seen may take in a worker


# ----------------------------------------------------------------------------------------------------------------------
# Chunks: what one worker does at a time


class Chunk(NamedTuple):
    """A piece of a file: rows [start, stop) of a row group, or the lines that begin in bytes [start, stop).

    source_bytes: its part of the file, compressed or not. tokens: how many it will give, where the file says so.
    order: the seed its documents are shuffled by, if they are.
    """

    path: str
    name: str
    kind: str
    group: int
    start: int
    stop: int
    source_bytes: float
    tokens: int | None = None
    order: str | None = None


class Tokens(NamedTuple):
    """The tokens of a chunk, with end-of-text before every document."""

    ids: np.ndarray  # (n,) uint16
    documents: int
    bytes: int  # of text
    skipped: int  # documents left out
    targets: np.ndarray | None = None  # (n,) uint8, 1 where the token is a training target; None: everywhere


class Exchange(NamedTuple):
    """A prompt and its answer. The answer and the end-of-text after it are training targets."""

    prompt: str
    answer: str


class BadDocument(NamedTuple):
    """In the place of a document that can't be read."""

    reason: str


class Options(NamedTuple):
    """How chunks are read and tokenized."""

    tokenizer: str
    backend: str
    text_column: str
    skip_bad: bool
    format: str = "text"


def chunks_of(file: SourceFile, path: Path, text_column: str) -> list[Chunk]:
    """The chunks of a file, in order, each big enough to be worth a message and small enough for any memory."""
    with naming(file.name):
        if file.kind == "parquet":
            return row_groups(file, path, text_column)
        size = path.stat().st_size
    starts = range(0, max(1, size), CHUNK_BYTES)  # an empty file, too: as .txt it is a document
    return [
        Chunk(str(path), file.name, file.kind, 0, start, min(start + CHUNK_BYTES, size), file.weight / len(starts))
        for start in starts
    ]


@contextlib.contextmanager
def naming(place: str):
    """Whatever a source throws at its reader becomes a UserError with the file and the place in it."""
    try:
        yield
    except (UserError, MemoryError, ImportError):
        raise
    except Exception as error:  # of pyarrow, its C++, codecs, the file system
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{place} is damaged or not what its name says ({why}); get the file again") from error


def row_groups(file: SourceFile, path: Path, text_column: str) -> list[Chunk]:
    metadata = parquet_metadata(str(path))
    column = text_column_index(metadata, text_column, file.name)
    counted = token_counts(path, metadata)
    chunks = []
    for group in range(metadata.num_row_groups):
        if not (rows := metadata.row_group(group).num_rows):
            continue
        text_bytes = metadata.row_group(group).column(column).total_uncompressed_size
        slices = max(1, min(rows, -(-text_bytes // ROW_CHUNK_BYTES)))
        cuts = [rows * i // slices for i in range(slices + 1)]
        tokens = counted[group] // slices if counted else None
        for start, stop in zip(cuts, cuts[1:]):
            size = file.weight * (stop - start) / metadata.num_rows
            chunks.append(Chunk(str(path), file.name, "parquet", group, start, stop, size, tokens))
    return chunks


@functools.lru_cache(maxsize=2)
def parquet_metadata(path: str):
    import pyarrow.parquet as pq

    return pq.read_metadata(path)


def text_column_index(metadata, text_column: str, name: str) -> int:
    """Where the column is in `metadata`. Raises UserError if it isn't there, is there twice, or holds no text."""
    import pyarrow as pa

    schema = metadata.schema.to_arrow_schema()
    if (found := schema.names.count(text_column)) != 1:
        how_many = f"{found} columns" if found else "no column"
        raise UserError(f"{name} has {how_many} {text_column!r}; --text_column takes one of: {', '.join(schema.names)}")
    kind = schema.field(text_column).type
    if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"column {text_column!r} of {name} holds {kind}, not text; choose another with --text_column")
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_column)


def token_counts(path: Path, metadata) -> list[int] | None:
    """GPT-2 tokens of every row group, ends of text included, where FineWeb's column `token_count` gives them."""
    import pyarrow.parquet as pq

    schema = metadata.schema.to_arrow_schema()
    if schema.names.count("token_count") != 1 or str(schema.field("token_count").type) not in ("int32", "int64"):
        return None
    column = pq.read_table(path, columns=["token_count"]).column(0)
    if column.null_count:
        return None
    counts = column.to_numpy()
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum([0, *rows])
    return [int(counts[start:end].sum()) + int(end - start) for start, end in zip(ends, ends[1:])]


def count_documents(chunk: Chunk, options: Options) -> int:
    return len(documents_of(chunk, options)[0])


def tokenize_chunk(chunk: Chunk, options: Options, start: int = 0, stop: int | None = None) -> Tokens:
    """All of a worker's work. [start, stop): which of its documents, to find one that kills the process."""
    found, skipped = documents_of(chunk, options)
    found, tokenizer, targets = found[start:stop], load_tokenizer(options.tokenizer), None
    if options.format == "text":
        ids = encode_documents(found, tokenizer, options.backend)
    else:
        ids, targets = encode_dialogues(found, tokenizer, options.backend)
    if chunk.kind == "txt" and chunk.start > 0:  # the middle of a document
        ids = ids[1:]
    return Tokens(ids, *count(ids, targets, options.tokenizer), skipped, targets)


def documents_of(chunk: Chunk, options: Options) -> tuple[list, int]:
    """The documents of a chunk in their order, texts or dialogues, and how many were left out.

    Raises UserError, naming the file and the place, for a document that can't be read unless `options.skip_bad`.
    """
    with naming(place_of(chunk)):
        found = READERS[chunk.kind](chunk, options)
    good = [document for document in found if not isinstance(document, BadDocument)]
    skipped = len(found) - len(good)
    if skipped and not options.skip_bad:
        bad = next(document for document in found if isinstance(document, BadDocument))
        raise UserError(f"{bad.reason}; --skip_bad leaves such documents out")
    if chunk.order is not None:
        random.Random(chunk.order).shuffle(good)
    return good, skipped


def place_of(chunk: Chunk) -> str:
    where = f"row group {chunk.group}, rows" if chunk.kind == "parquet" else "bytes"
    return f"{where} {chunk.start} to {chunk.stop} of {chunk.name}"


def read_rows(chunk: Chunk, options: Options) -> list:
    import pyarrow.parquet as pq

    metadata = parquet_metadata(chunk.path)
    group = metadata.row_group(chunk.group)
    with pq.ParquetFile(chunk.path, metadata=metadata, pre_buffer=False, buffer_size=2**20) as file:  # little memory
        if chunk.stop - chunk.start == group.num_rows:
            columns = [file.read_row_group(chunk.group, [options.text_column], use_threads=False).column(0)]
        else:
            batches = file.iter_batches(1024, [chunk.group], [options.text_column], use_threads=False)
            columns = columns_between(batches, chunk.start, chunk.stop)
        texts = [text for column in columns for text in texts_of(column)]
    if len(texts) != chunk.stop - chunk.start:
        raise EOFError(f"{len(texts)} rows of {chunk.stop - chunk.start}")
    first = sum(metadata.row_group(group).num_rows for group in range(chunk.group)) + chunk.start
    why = {type(None): "has no text", bytes: "is not UTF-8"}
    bad = [(row, why[type(text)]) for row, text in enumerate(texts) if not isinstance(text, str)]
    for row, reason in bad:
        texts[row] = BadDocument(f"row {first + row} of {chunk.name} {reason}")
    return texts


def columns_between(batches, start: int, stop: int) -> Iterator:
    row = 0
    for batch in batches:
        yield batch.column(0)[max(0, start - row) : max(0, stop - row)]
        row += len(batch)
        if row >= stop:
            break


def texts_of(column) -> list:
    """The rows of a column of strings: str, None where there is none, bytes where they are not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow as pa

        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        rows = column.cast(pa.binary_view() if column.type == pa.string_view() else pa.large_binary()).to_pylist()
    for row, data in enumerate(rows):
        with contextlib.suppress(UnicodeDecodeError, AttributeError):
            rows[row] = data.decode("utf-8")
    return rows


def read_lines(chunk: Chunk, options: Options) -> list:
    """The documents of the JSON lines that begin in the chunk's bytes."""
    found = []
    with open(chunk.path, "rb") as file:
        if chunk.start > 0:
            file.seek(chunk.start - 1)
            file.readline()
        while (begin := file.tell()) < chunk.stop and (line := file.readline()):
            if line.isspace():
                continue
            document = document_of(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line, options)
            if isinstance(document, BadDocument):
                document = BadDocument(f"line {line_number(chunk.path, begin)} of {chunk.name} {document.reason}")
            found.append(document)
    return found


def document_of(line: bytes, options: Options) -> str | list[Exchange] | BadDocument:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadDocument(f"is not JSON ({error})")
    if not isinstance(record, dict):
        return BadDocument(f"is no JSON object but {type(record).__name__}")
    if options.format != "text":
        return DIALOGUES[options.format](record)
    if options.text_column not in record:
        return BadDocument(f"has no field {options.text_column!r} (--text_column takes one of: {', '.join(record)})")
    text = record[options.text_column]
    if not isinstance(text, str):
        return BadDocument(f"holds {type(text).__name__} in {options.text_column!r}, not text")
    return text


def line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(2**20, offset - at)).count(b"\n") for at in range(0, offset, 2**20)) + 1


def read_text(chunk: Chunk, options: Options) -> list:
    """A .txt file is one document; a big one is cut where no token of GPT-2 goes across, so that nothing changes."""
    with open(chunk.path, "rb") as file:
        start, stop = safe_cut(file, chunk.start), safe_cut(file, chunk.stop)
        file.seek(start)
        data, is_all = file.read(stop - start), chunk.start == 0 and not file.read(1)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = BadDocument(f"byte {start + error.start} of {chunk.name} is not UTF-8")
        if is_all:
            return [bad]
        raise UserError(f"{bad.reason}; the file is one document, too long to be left out: convert it") from error
    return [text.removeprefix("\ufeff") if chunk.start == 0 else text]


NO_SPACE_THEN_SPACE = re.compile(
    rb"(?:[!-~]|\xe3\x80[\x81-\xbf]|\xe3[\x81-\xbf][\x80-\xbf]|[\xe4-\xef][\x80-\xbf]{2})(?=[ \t\n\r])"
)


def safe_cut(file, offset: int) -> int:
    """The first place at or after `offset` between a character that is no space and an ASCII one that is.

    Which characters are no space is plain in ASCII and from U+3001 to U+FFFF, where Chinese and Japanese are; others
    are passed by. No token of GPT-2 goes across: its pattern takes whitespace only at the beginning of a token, and
    never looks back.
    """
    if offset == 0:
        return 0
    at, last = max(0, offset - 3), b""
    file.seek(at)
    while block := file.read(2**16):
        data = last + block
        for found in NO_SPACE_THEN_SPACE.finditer(data):
            if at + found.end() >= offset:
                return at + found.end()
        last = data[-3:]
        at += len(data) - len(last)
    return at + len(last)


READERS = {"parquet": read_rows, "jsonl": read_lines, "txt": read_text}


# ----------------------------------------------------------------------------------------------------------------------
# Instructions: a document is a dialogue, of which the answers are learned


def alpaca_exchanges(record: dict) -> list[Exchange] | BadDocument:
    """--format alpaca, by the template in fineweb.py."""
    for name in ("instruction", "output"):
        if name not in record:
            return BadDocument(f"has no field {name!r} (it has: {', '.join(record)}); --format alpaca needs one")
    for name in ("instruction", "input", "output"):
        if not isinstance(record.get(name) or "", str):
            return BadDocument(f"holds {type(record[name]).__name__} in {name!r}, not text")
    if not (record["instruction"] or "").strip():
        return BadDocument("has an empty 'instruction'")
    if not (record["output"] or "").strip():
        return BadDocument("has no answer: its 'output' is empty")
    middle = f"Input: {record['input']}\n\n" if (record.get("input") or "").strip() else ""
    return [Exchange(f"Instruction: {record['instruction']}\n\n{middle}Answer:", " " + record["output"])]


def chat_exchanges(record: dict) -> list[Exchange] | BadDocument:
    """--format chat, by the template in fineweb.py: an exchange for each answer."""
    messages, exchanges, prompt = record.get("messages"), [], ""
    if not isinstance(messages, list):
        return BadDocument(f"has no list in 'messages' (it has: {', '.join(record)}); --format chat needs one")
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role is None or content is None:
            return BadDocument(f"has no role or no content in message {number}")
        if not (isinstance(role, str) and role in ROLES):
            return BadDocument(f"has an unknown role {role!r} in message {number}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            return BadDocument(f"holds {type(content).__name__} in 'content' of message {number}, not text")
        prompt += ("\n\n" if number > 1 else "") + ROLES[role]
        if role != "assistant":
            prompt += " " + content
        elif content.strip():
            exchanges.append(Exchange(prompt, " " + content))
            prompt = ""
        else:
            return BadDocument(f"has no answer: the assistant's message {number} is empty")
    if not exchanges:
        return BadDocument("has no answer: no message is the assistant's")
    return exchanges if not prompt else BadDocument(f"has no answer to its last message, of {messages[-1]['role']}")


ROLES = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
DIALOGUES = {"alpaca": alpaca_exchanges, "chat": chat_exchanges}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def encode_documents(texts: list[str], tokenizer, backend: str) -> np.ndarray:
    """(n,) uint16: end-of-text before every document. Raises UserError, with its beginning, for a text that fails."""
    ids, counts = encode_texts(texts, tokenizer, backend)
    heads = np.cumsum(counts + 1) - counts - 1
    return insert_tokens(ids, heads, tokenizer.eot)


def encode_dialogues(dialogues: list[list[Exchange]], tokenizer, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint16, end-of-text before every document and after every answer, and (n,) uint8, 1 where it is learned.

        <|endoftext|> prompt answer <|endoftext|> prompt answer <|endoftext|>
        0             0 ...  1 ...  1             0 ...  1 ...  1

    Prompt and answer are encoded apart: who writes the prompt asks with the tokens that were trained.
    """
    texts = [text for dialogue in dialogues for exchange in dialogue for text in exchange]
    ids, counts = encode_texts(texts, tokenizer, backend)
    is_answer = np.arange(len(texts)) % 2 == 1
    begins = np.zeros(len(texts), np.int64)  # 1 for the first prompt of a document
    begins[np.cumsum([0] + [2 * len(dialogue) for dialogue in dialogues])[:-1]] = 1
    lengths = begins + counts + is_answer
    ends = np.cumsum(lengths)
    marks = np.sort(np.concatenate([(ends - lengths)[begins == 1], ends[is_answer] - 1]))
    return insert_tokens(ids, marks, tokenizer.eot), np.repeat(is_answer, lengths).astype(np.uint8)


def encode_texts(texts: list[str], tokenizer, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ids of all texts together, and (texts,) how many each has."""
    if tokenizer.name == "gpt2" and backend == "gigatoken":
        try:
            return gigatoken().encode(texts)
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException:  # a panic is no Exception; tiktoken may manage, and names the document if it doesn't
            gigatoken.cache_clear()
    arrays = [encode_text(text, tokenizer) for text in texts]
    return np.concatenate([np.empty(0, np.uint16), *arrays]), np.array([len(a) for a in arrays], np.int64)


def insert_tokens(ids: np.ndarray, places: np.ndarray, eot: int) -> np.ndarray:
    """(n + m,) uint16: the n ids in their order, and end-of-text at the m places."""
    joined, is_text = np.empty(len(ids) + len(places), np.uint16), np.ones(len(ids) + len(places), bool)
    is_text[places] = False
    joined[places], joined[is_text] = eot, ids
    return joined


def encode_text(text: str, tokenizer) -> np.ndarray:
    """(n,) uint16, by the reference."""
    if tokenizer.name == "bytes":
        return np.frombuffer(replace_surrogates(text).encode("utf-8"), np.uint8).astype(np.uint16)
    try:
        return np.array(tokenizer.encode(text), np.uint16)
    except BaseException as error:  # tiktoken's PanicException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"the document that begins {text[:60]!r} can't be tokenized: {error}") from None


def pick_backend(asked: str, tokenizer: str) -> str:
    """gigatoken or tiktoken. Raises UserError if gigatoken is asked for and not here."""
    if asked == "tiktoken" or tokenizer != "gpt2":
        return "tiktoken"
    try:
        import gigatoken  # noqa: F401
    except ImportError as error:
        if asked == "gigatoken":
            raise UserError(
                "--backend gigatoken: it is not installed; pip install gigatoken, or leave it out"
            ) from error
        return "tiktoken"
    return "gigatoken"


@functools.lru_cache(maxsize=1)
def gigatoken() -> "Gigatoken":
    return Gigatoken()


class Gigatoken:
    """GPT-2's encoding by the package gigatoken: over ten times as fast as tiktoken, which a sample is checked with.

    It remembers the encoding of every word it sees, for ever; so when it has taken too much memory it is made anew.
    """

    def __init__(self):
        self.reference, self.seen = load_tokenizer("gpt2"), 0
        self.reset()

    def reset(self) -> None:
        from gigatoken import Tokenizer

        ranks = self.reference.bpe._mergeable_ranks  # no special tokens: "<|endoftext|>" in a text is text
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
            self.tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="gpt2")
        self.memory = peak_memory()

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(n,) uint32 ids of all texts together, and (documents,) how many each has."""
        import awkward

        if peak_memory() > self.memory + CACHE_BYTES:
            self.reset()
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        try:
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        except TypeError:  # lone surrogates
            texts = [replace_surrogates(text) for text in texts]
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        ids, counts = awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))
        ends = np.cumsum(counts)
        for index in range(-self.seen % CHECK_EVERY, len(texts), CHECK_EVERY):
            if not np.array_equal(
                ids[ends[index] - counts[index] : ends[index]], encode_text(texts[index], self.reference)
            ):
                raise UserError(
                    f"gigatoken and tiktoken differ on the document that begins {texts[index][:60]!r}; start again, in "
                    "another --out, with --backend tiktoken, and please report it to gigatoken"
                )
        self.seen += len(texts)
        return ids, counts


def peak_memory() -> int:
    """Bytes this process has ever had in memory; 0 where the system won't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count(ids: np.ndarray, targets: np.ndarray | None, tokenizer_name: str) -> tuple[int, int]:
    """Documents that begin in `ids`, and bytes of text. An end-of-text that is a training target ends an answer."""
    lengths = token_lengths(tokenizer_name)
    is_eot = ids == len(lengths) - 1
    heads = is_eot if targets is None else is_eot & (targets == 0)
    return int(np.count_nonzero(heads)), int(lengths[ids].sum())


@functools.lru_cache(maxsize=2)
def token_lengths(tokenizer_name: str) -> np.ndarray:
    """(V,) bytes of text behind every token; none behind end-of-text, the last."""
    tokenizer = load_tokenizer(tokenizer_name)
    return np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.eot)] + [0])


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes


def serve(tokenizer: str, backend: str) -> None:
    """The loop of a worker process: function and arguments from stdin, result or error to stdout, until stdin ends.

    It ends at once with its parent, even in the middle of a chunk.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    requests = queue.SimpleQueue()

    def receive():
        while True:
            try:
                requests.put(pickle.load(sys.stdin.buffer))
            except BaseException:  # the end, or half a request of a parent that was killed
                os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    encode_texts([], load_tokenizer(tokenizer), backend)  # what takes long to load: not while a chunk is at risk
    answers.write(READY)
    while True:
        answers.flush()
        function, arguments = requests.get()
        try:
            answer = function(*arguments), None
        except MemoryError:
            os._exit(1)  # the parent tries smaller pieces
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        pickle.dump(answer, answers, protocol=5)


class WorkerDied(Exception):
    pass


class WorkerPool:
    """At most `size` processes, started as they are needed, each with a thread of ours that waits for its answer.

    They share nothing, no queue and no lock, only a pipe with us: one that is killed, at whatever moment, takes its own
    chunk along and nothing else. They never run the script that started us, so it needs no `if __name__ == "__main__"`.
    """

    def __init__(self, size: int, options: Options):
        self.options = options
        self.idle = queue.LifoQueue()  # processes, and None for each that may be started yet
        self.processes, self.lock, self.is_closed = [], threading.Lock(), False
        for _ in range(size):
            self.idle.put(None)

    def call(self, function: Callable, *arguments):
        """Its result, from a worker. Raises WorkerDied."""
        process = self.idle.get()
        try:
            process = process or self.start()
            pickle.dump((function, arguments), process.stdin)
            process.stdin.flush()
            result, error = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as died:
            if process:
                process.kill()
                process.wait()
            process = None
            raise WorkerDied from died
        finally:
            self.idle.put(process)
        if error:
            raise error
        return result

    def start(self) -> subprocess.Popen:
        code = f"import sys; sys.path[:] = sys.argv[1:]; from {serve.__module__} import serve; serve{self.options[:2]}"
        # a group of its own: a terminal's Ctrl-C is for us alone
        group = {"process_group": 0} if os.name == "posix" else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        for _ in range(50):
            with self.lock:
                if self.is_closed:
                    raise EOFError
                process = subprocess.Popen([sys.executable, "-c", code, *sys.path], stdin=-1, stdout=-1, **group)
                self.processes.append(process)
            if process.stdout.read(1) == READY:
                return process
            if process.wait() > 0:
                raise UserError("worker processes can't start, see above; --workers 0 does without")
        raise UserError("50 worker processes were killed as they started; is there memory? --workers 0 does without")

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def tokenize_all(chunks: Iterable, options: Options, workers: int) -> Iterator[tuple[tuple, Tokens]]:
    """(key, tokens) of every (key, chunk), in order, few of them in memory at a time."""
    if workers == 0:
        yield from ((key, tokenize_chunk(chunk, options)) for key, chunk in chunks)
        return
    pool, pending = WorkerPool(workers, options), deque()
    try:
        for key, chunk in chunks:
            pending.append((key, in_background(tokenize_despite_deaths, pool.call, chunk, options)))
            if len(pending) > 3 * workers + 3:
                yield pending[0][0], pending.popleft()[1].result()
        while pending:
            yield pending[0][0], pending.popleft()[1].result()
    finally:
        pool.close()
        wait([future for _, future in pending], timeout=10)


def tokenize_despite_deaths(call: Callable, chunk: Chunk, options: Options) -> Tokens:
    """In a worker; if three in a row die over it, by halves, down to the one document that kills them."""

    def ask(function, *arguments):
        for _ in range(3):
            with contextlib.suppress(WorkerDied):
                return call(function, chunk, options, *arguments)

    def attempt(start, stop):
        if (part := ask(tokenize_chunk, start, stop)) is not None:
            return [part]
        if stop is None and (stop := ask(count_documents)) is None:
            raise UserError(f"to read {place_of(chunk)} kills the process that does; take the file out")
        if stop - start <= 1:
            raise UserError(
                f"document {start} of {place_of(chunk)} kills the process that tokenizes it (out of memory?); take it "
                "out, or try a machine with more memory"
            )
        middle = (start + stop) // 2
        return attempt(start, middle) + attempt(middle, stop)

    parts = attempt(0, None)
    if len(parts) == 1:
        return parts[0]
    ids = np.concatenate([part.ids for part in parts])
    targets = None if parts[0].targets is None else np.concatenate([part.targets for part in parts])
    return Tokens(ids, *count(ids, targets, options.tokenizer), parts[0].skipped, targets)
