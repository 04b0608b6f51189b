"""
What a worker process does: a unit, which is a piece of a file, becomes tokens.

A unit is a row group of a parquet file, or a few megabytes of a text file, cut between two documents or where no token
can go across. What comes back for it is one array, with all that the manifest will want to know of it.
"""

import base64
import functools
import json
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from extras.cli import UserError
from extras.sources import SourceFile
from extras.tokenizer import load_tokenizer, replace_surrogates

SLICE_BYTES = 4 * 2**20  # of a text file per unit: about a million tokens, as in a row group of FineWeb-Edu
GROUP_BYTES = 64 * 2**20  # of text in a row group, beyond which it makes several units
CHECKED = 512  # one document in so many is tokenized by tiktoken too, if gigatoken does the work
CACHE_BYTES = 2**28  # that gigatoken's memory of words it has met may take in a worker


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
    """What became of a unit: ids (n,) uint16, end-of-text before every document, and how many documents those are, of
    how many bytes of text; skipped: documents left out; targets (n,) uint8, 1 where the token is to be learned, or None
    where all are."""

    ids: np.ndarray
    documents: int
    bytes: int
    skipped: int
    targets: np.ndarray | None = None


class Turn(NamedTuple):
    """Of a dialogue: the answer is learned, and the end-of-text after it; the prompt is not."""

    prompt: str
    answer: str


class Flaw(NamedTuple):
    """Stands where a document should be."""

    reason: str


class Job(NamedTuple):
    """What a worker has to know beside the unit."""

    tokenizer: str
    text_column: str
    skip_bad: bool
    backend: str
    format: str = "text"


def units_of(file: SourceFile, path: Path, text_column: str) -> list[Unit]:
    """The units of a file, in order, each big enough to be worth a message and small enough for any memory."""
    if file.kind == "parquet":
        return row_groups(file, path, text_column)
    size = path.stat().st_size
    starts = range(0, max(1, size), SLICE_BYTES)  # an empty file, too: as .txt it is a document
    return [
        Unit(str(path), file.name, file.kind, 0, start, min(start + SLICE_BYTES, size), file.weight / len(starts))
        for start in starts
    ]


def row_groups(file: SourceFile, path: Path, text_column: str) -> list[Unit]:
    metadata = parquet_metadata(str(path), file.name)
    column = text_column_index(metadata, text_column, file.name)
    counted = token_counts(path, metadata)
    units = []
    for group in range(metadata.num_row_groups):
        if not (rows := metadata.row_group(group).num_rows):
            continue
        text_bytes = metadata.row_group(group).column(column).total_uncompressed_size
        slices = max(1, min(rows, -(-text_bytes // GROUP_BYTES)))
        cuts = [rows * i // slices for i in range(slices + 1)]
        tokens = counted[group] // slices if counted else None
        for start, stop in zip(cuts, cuts[1:]):
            share = file.weight * (stop - start) / metadata.num_rows
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
    import pyarrow as pa

    schema = metadata.schema.to_arrow_schema()
    if text_column not in schema.names:
        raise UserError(f"{name} has no column {text_column!r}; --text_column takes one of: {', '.join(schema.names)}")
    kind = schema.field(text_column).type
    if str(kind.value_type if pa.types.is_dictionary(kind) else kind) not in ("string", "large_string", "string_view"):
        raise UserError(f"column {text_column!r} of {name} holds {kind}, not text; choose another with --text_column")
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_column)


def token_counts(path: Path, metadata) -> list[int] | None:
    """GPT-2 tokens of every row group, ends of text included, where FineWeb's column `token_count` gives them."""
    import pyarrow.parquet as pq

    schema = metadata.schema.to_arrow_schema()
    if "token_count" not in schema.names or str(schema.field("token_count").type) not in ("int32", "int64"):
        return None
    column = pq.read_table(path, columns=["token_count"]).column(0)
    if column.null_count:
        return None
    counts = column.to_numpy()
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    ends = np.cumsum([0, *rows])
    return [int(counts[start:end].sum()) + int(end - start) for start, end in zip(ends, ends[1:])]


def tokenize_unit(unit: Unit, job: Job, documents: slice = slice(None)) -> Tokens:
    """All of a worker's work. documents: which of the unit's, to find one that can't be borne."""
    found, skipped = documents_of(unit, job)
    found, tokenizer, targets = found[documents], load_tokenizer(job.tokenizer), None
    if job.format == "text":
        ids = encode_documents(found, tokenizer, job.backend)
    else:
        ids, targets = encode_dialogues(found, tokenizer, job.backend)
    if unit.kind == "txt" and unit.start > 0:  # the middle of a document
        ids = ids[1:]
    return Tokens(ids, *measure(ids, targets, job.tokenizer), skipped, targets)


def documents_of(unit: Unit, job: Job) -> tuple[list, int]:
    """The documents of a unit in their order, texts or dialogues, and how many were left out.

    Raises UserError, naming the file and the place, for a document that can't be read unless `job.skip_bad`.
    """
    found = READERS[unit.kind](unit, job)
    texts = [text for text in found if not isinstance(text, Flaw)]
    skipped = len(found) - len(texts)
    if skipped and not job.skip_bad:
        flaw = next(text for text in found if isinstance(text, Flaw))
        raise UserError(f"{flaw.reason}; --skip_bad leaves such documents out")
    if unit.order is not None:
        random.Random(unit.order).shuffle(texts)
    return texts, skipped


def read_rows(unit: Unit, job: Job) -> list:
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = parquet_metadata(unit.path, unit.name)
    rows = metadata.row_group(unit.group).num_rows
    try:
        with pq.ParquetFile(unit.path, metadata=metadata, pre_buffer=False, buffer_size=2**20) as file:  # little memory
            if unit.stop - unit.start == rows:
                texts = file.read_row_group(unit.group, [job.text_column], use_threads=False).column(0).to_pylist()
            else:
                batches = file.iter_batches(1024, [unit.group], [job.text_column], use_threads=False)
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


def read_lines(unit: Unit, job: Job) -> list:
    """The documents of the JSON lines that begin in the unit's bytes."""
    found = []
    with open(unit.path, "rb") as file:
        if unit.start > 0:
            file.seek(unit.start - 1)
            file.readline()
        while (begin := file.tell()) < unit.stop and (line := file.readline()):
            if line.isspace():
                continue
            document = document_of(line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line, job)
            if isinstance(document, Flaw):
                document = Flaw(f"line {line_number(unit.path, begin)} of {unit.name} {document.reason}")
            found.append(document)
    return found


def document_of(line: bytes, job: Job) -> str | list[Turn] | Flaw:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Flaw(f"is not JSON ({error})")
    if not isinstance(record, dict):
        return Flaw(f"is no JSON object but {type(record).__name__}")
    if job.format != "text":
        return DIALOGUES[job.format](record)
    if job.text_column not in record:
        return Flaw(f"has no field {job.text_column!r} (--text_column takes one of: {', '.join(record)})")
    text = record[job.text_column]
    return text if isinstance(text, str) else Flaw(f"holds {type(text).__name__} in {job.text_column!r}, not text")


def line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(2**20, offset - at)).count(b"\n") for at in range(0, offset, 2**20)) + 1


def read_text(unit: Unit, job: Job) -> list:
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


def alpaca_turns(record: dict) -> list[Turn] | Flaw:
    """{"instruction", "input" (may be missing or empty), "output"} as one turn, by the template

    Instruction: INSTRUCTION\\n\\nInput: INPUT\\n\\nAnswer: OUTPUT<|endoftext|>      without input: without its line
    """
    for name in ("instruction", "output"):
        if name not in record:
            return Flaw(f"has no field {name!r} (it has: {', '.join(record)}); --format alpaca needs one")
    for name in ("instruction", "input", "output"):
        if not isinstance(record.get(name) or "", str):
            return Flaw(f"holds {type(record[name]).__name__} in {name!r}, not text")
    if not (record["instruction"] or "").strip():
        return Flaw("has an empty 'instruction'")
    if not (record["output"] or "").strip():
        return Flaw("has no answer: its 'output' is empty")
    middle = f"Input: {record['input']}\n\n" if (record.get("input") or "").strip() else ""
    return [Turn(f"Instruction: {record['instruction']}\n\n{middle}Answer:", " " + record["output"])]


def chat_turns(record: dict) -> list[Turn] | Flaw:
    """{"messages": [{"role", "content"}, ...]} as one turn an answer, messages joined by an empty line:

    System: CONTENT\\n\\nUser: CONTENT\\n\\nAssistant: ANSWER<|endoftext|>\\n\\nUser: CONTENT\\n\\nAssistant: ...
    """
    messages, turns, prompt = record.get("messages"), [], ""
    if not isinstance(messages, list):
        return Flaw(f"has no list in 'messages' (it has: {', '.join(record)}); --format chat needs one")
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role is None or content is None:
            return Flaw(f"has no role or no content in message {number}")
        if not (isinstance(role, str) and role in ROLES):
            return Flaw(f"has an unknown role {role!r} in message {number}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            return Flaw(f"holds {type(content).__name__} in 'content' of message {number}, not text")
        prompt += ("\n\n" if number > 1 else "") + ROLES[role]
        if role != "assistant":
            prompt += " " + content
        elif content.strip():
            turns.append(Turn(prompt, " " + content))
            prompt = ""
        else:
            return Flaw(f"has no answer: the assistant's message {number} is empty")
    if not turns:
        return Flaw("has no answer: no message is the assistant's")
    return turns if not prompt else Flaw(f"has no answer to its last message, of {messages[-1]['role']}")


ROLES = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
DIALOGUES = {"alpaca": alpaca_turns, "chat": chat_turns}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def encode_documents(texts: list[str], tokenizer, backend: str) -> np.ndarray:
    """(n,) uint16: end-of-text before every document. Raises UserError, with its beginning, for a text that fails."""
    ids, counts = encode_texts(texts, tokenizer, backend)
    heads = np.cumsum(counts + 1) - counts - 1
    return place_between(ids, heads, tokenizer.eot)


def encode_dialogues(dialogues: list[list[Turn]], tokenizer, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint16, end-of-text before every document and after every answer, and (n,) uint8, 1 where it is learned.

        <|endoftext|> prompt answer <|endoftext|> prompt answer <|endoftext|>
        0             0 ...  1 ...  1             0 ...  1 ...  1

    Prompt and answer are encoded apart: who writes the prompt asks with the tokens that were trained.
    """
    texts = [text for dialogue in dialogues for turn in dialogue for text in turn]
    ids, counts = encode_texts(texts, tokenizer, backend)
    is_answer = np.arange(len(texts)) % 2 == 1
    begins = np.zeros(len(texts), np.int64)  # 1 for the first prompt of a document
    begins[np.cumsum([0] + [2 * len(dialogue) for dialogue in dialogues])[:-1]] = 1
    lengths = begins + counts + is_answer
    ends = np.cumsum(lengths)
    marks = np.sort(np.concatenate([(ends - lengths)[begins == 1], ends[is_answer] - 1]))
    return place_between(ids, marks, tokenizer.eot), np.repeat(is_answer, lengths).astype(np.uint8)


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


def place_between(ids: np.ndarray, places: np.ndarray, eot: int) -> np.ndarray:
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

    It remembers the encoding of every word it meets, for ever; so when it has taken too much memory it is made anew.
    """

    def __init__(self):
        self.reference, self.met = load_tokenizer("gpt2"), 0
        self.renew()

    def renew(self) -> None:
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
            self.renew()
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        try:
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        except TypeError:  # lone surrogates
            texts = [replace_surrogates(text) for text in texts]
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        ids, counts = awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))
        ends = np.cumsum(counts)
        for index in range(-self.met % CHECKED, len(texts), CHECKED):
            if not np.array_equal(
                ids[ends[index] - counts[index] : ends[index]], encode_text(texts[index], self.reference)
            ):
                raise UserError(
                    f"gigatoken and tiktoken differ on the document that begins {texts[index][:60]!r}; start again, in "
                    "another --out, with --backend tiktoken, and please report it to gigatoken"
                )
        self.met += len(texts)
        return ids, counts


def peak_memory() -> int:
    """Bytes this process has ever had in memory; 0 where the system won't tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(ids: np.ndarray, targets: np.ndarray | None, tokenizer_name: str) -> tuple[int, int]:
    """Documents that begin in `ids`, and bytes of text that they are. End-of-text that is learned ends an answer."""
    lengths = token_lengths(tokenizer_name)
    is_eot = ids == len(lengths) - 1
    heads = is_eot if targets is None else is_eot & (targets == 0)
    return int(np.count_nonzero(heads)), int(lengths[ids].sum())


@functools.lru_cache(maxsize=2)
def token_lengths(tokenizer_name: str) -> np.ndarray:
    """(V,) bytes of text behind every token; none behind end-of-text, the last."""
    tokenizer = load_tokenizer(tokenizer_name)
    return np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.eot)] + [0])
