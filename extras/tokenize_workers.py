"""
From documents to tokens, in threads: pyarrow and both encoders release Python's lock, so they use every core.
"""

import base64
import functools
import importlib.util
import itertools
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from extras.cli import UserError
from extras.manifest import Settings
from extras.readers import Chunk, documents_of
from extras.tokenizer import load_tokenizer, replace_surrogates

CHECK_EVERY = 512  # gigatoken's tokens are compared with tiktoken's for one document in so many
RESET_EVERY = 2**30  # characters, after which gigatoken is loaded anew: its cache of words only grows


class Tokens(NamedTuple):
    """The tokens of a chunk, with end-of-text before every document."""

    ids: np.ndarray  # (n,) uint16
    targets: np.ndarray | None  # (n,) uint8, 1 where the token is a training target; None: everywhere
    skipped: int = 0  # documents left out


def tokenize_all(chunks: Iterable[tuple], settings: Settings, backend: str, workers: int) -> Iterator[tuple]:
    """(key, chunk, tokens) of every (key, chunk), in order; only a few are in memory at a time."""
    pool, pending = ThreadPoolExecutor(max(1, workers)), deque()

    def oldest() -> tuple:
        key, chunk, tokens = pending.popleft()
        return key, chunk, tokens.result()

    try:
        for key, chunk in chunks:
            pending.append((key, chunk, pool.submit(tokenize_chunk, chunk, settings, backend)))
            if len(pending) > 3 * workers + 3:
                yield oldest()
        while pending:
            yield oldest()
    finally:
        pool.shutdown(cancel_futures=True)


def tokenize_chunk(chunk: Chunk, settings: Settings, backend: str) -> Tokens:
    documents, skipped = documents_of(chunk, settings)
    ids, targets = encode_documents(documents, load_tokenizer(settings.tokenizer), backend)
    if chunk.kind == "txt" and chunk.start > 0:  # it continues a document
        ids = ids[1:]
    return Tokens(ids, None if settings.format == "text" else targets, skipped)


def encode_documents(documents: list[list[str]], tokenizer, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) uint16, end-of-text before every document and after every answer, and (n,) uint8, 1 for training targets.

        <|endoftext|> prompt answer <|endoftext|> prompt answer <|endoftext|>
        0             0 ...  1 ...  1             0 ...  1 ...  1

    A document is [text] or [prompt, answer, prompt, answer, ...]. Its pieces are encoded separately, so a prompt at
    inference has the same tokens as in training. Raises UserError that quotes a piece which fails.
    """
    ids, counts = encode_texts([*itertools.chain.from_iterable(documents)], tokenizer, backend)
    sizes = np.array([len(document) for document in documents], np.int64)
    numbers = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each piece in its document
    is_first, is_answer = numbers == 0, numbers % 2 == 1
    lengths = is_first + counts + is_answer
    ends = np.cumsum(lengths)
    joined, is_text = np.full(lengths.sum(), tokenizer.eot, np.uint16), np.ones(lengths.sum(), bool)
    is_text[(ends - lengths)[is_first]] = False
    is_text[ends[is_answer] - 1] = False
    joined[is_text] = ids
    return joined, np.repeat(is_answer, lengths).view(np.uint8)


def encode_texts(texts: list[str], tokenizer, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """(n,) ids of all texts together, and (texts,) how many each has."""
    if tokenizer.name == "gpt2" and backend == "gigatoken":
        try:  # one for each thread: those that share one take turns
            encoder = Gigatoken.idle.pop()
        except IndexError:
            encoder = Gigatoken()
        try:
            result = encoder.encode(texts)
            if encoder.characters < RESET_EVERY:
                Gigatoken.idle.append(encoder)
            return result
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException:  # a panic is not an Exception; tiktoken may succeed, or else quotes the document
            pass
    arrays = [encode_text(text, tokenizer) for text in texts]
    return np.concatenate([np.empty(0, np.uint16), *arrays]), np.array([len(a) for a in arrays], np.int64)


def encode_text(text: str, tokenizer) -> np.ndarray:
    """(n,) uint16, by the reference tokenizer."""
    if tokenizer.name == "bytes":
        return np.frombuffer(replace_surrogates(text).encode("utf-8"), np.uint8).astype(np.uint16)
    try:
        return np.array(tokenizer.encode(text), np.uint16)
    except BaseException as error:  # tiktoken's PanicException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"the document that begins {text[:60]!r} can't be tokenized: {error}") from None


def pick_backend(asked: str, tokenizer: str) -> str:
    """gigatoken or tiktoken. Raises UserError if gigatoken is asked for and not installed."""
    is_here = importlib.util.find_spec("gigatoken") is not None
    if asked == "gigatoken" and tokenizer == "gpt2" and not is_here:
        raise UserError("--backend gigatoken: it is not installed; pip install gigatoken, or leave it out")
    return "gigatoken" if is_here and asked != "tiktoken" and tokenizer == "gpt2" else "tiktoken"


class Gigatoken:
    """GPT-2's encoding by the package gigatoken, several times as fast as tiktoken, which checks a sample of it."""

    idle: ClassVar[deque["Gigatoken"]] = deque()  # loaded, and not in use

    def __init__(self):
        from gigatoken import Tokenizer

        self.reference, self.seen, self.characters = load_tokenizer("gpt2"), 0, 0
        ranks = self.reference.bpe._mergeable_ranks  # no special tokens: "<|endoftext|>" in a text is text
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
            self.tokenizer = Tokenizer.from_tiktoken(path, pretokenizer="gpt2")

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(n,) uint32 ids of all texts together, and (documents,) how many each has."""
        import awkward

        try:
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        except TypeError:  # lone surrogates
            texts = [replace_surrogates(text) for text in texts]
            rows = self.tokenizer.encode_batch(texts, parallel=False)
        ids, counts = awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))
        ends = np.cumsum(counts)
        for i in range(-self.seen % CHECK_EVERY, len(texts), CHECK_EVERY):
            if not np.array_equal(ids[ends[i] - counts[i] : ends[i]], encode_text(texts[i], self.reference)):
                raise UserError(
                    f"gigatoken and tiktoken differ on the document that begins {texts[i][:60]!r}; start again, in "
                    "another --out, with --backend tiktoken, and please report it to gigatoken"
                )
        self.seen, self.characters = self.seen + len(texts), self.characters + sum(map(len, texts))
        return ids, counts


def count(ids: np.ndarray, targets: np.ndarray | None, tokenizer_name: str) -> tuple[int, int]:
    """Documents that begin in `ids`, and bytes of text. An end-of-text that is a training target ends an answer."""
    lengths = token_lengths(tokenizer_name)
    counts, eot = np.bincount(ids, minlength=len(lengths)), len(lengths) - 1
    ends = 0 if targets is None else np.count_nonzero(targets[ids == eot])
    return int(counts[eot] - ends), int(counts @ lengths)


@functools.cache
def token_lengths(tokenizer_name: str) -> np.ndarray:
    """(V,) bytes of text in every token; none in end-of-text, the last."""
    tokenizer = load_tokenizer(tokenizer_name)
    return np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.eot)] + [0])
