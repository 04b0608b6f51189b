"""
HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest? And other sets of its kind.

    python hellaswag.py -m gpt2 -d cuda                    # a hub name, a GPT-2 directory
    python hellaswag.py -m log                             # a run's newest checkpoint, or a checkpoint file
    python hellaswag.py -m gpt2 --style lm-eval            # the convention of lm-evaluation-harness
    python hellaswag.py -m gpt2 --limit 500 --reference    # the plain method, for anyone who doubts the fast one
    python hellaswag.py -m gpt2 --out a.jsonl              # what it answered to every example
    python hellaswag.py --compare a.jsonl b.jsonl          # are two models different? (McNemar)

The usual way forwards the context four times, once in front of each ending, and takes the logits of every position.
Here an example is one tree row; positions restart behind the context, and a mask hides the endings from each other, so
that each of them sees what it would see alone:

                    context  ending 1   ending 2            what a token (row) may look at (column)
     tokens          A  man  sits on a  sits eats  an          c c 1 1 1 2 2 2      c  context
     positions       0   1    2   3  4   2    3    4         c x . . . . . . .      1  ending 1
     segments        0   0    1   1  1   2    2    2         c x x . . . . . .      2  ending 2
     targets                 on   a roof eats an apple       1 x x x . . . . .
                                                             1 x x x x . . . .
     An ending begins with the context's last token, which   1 x x x x x . . .
     predicts its first one, and ends before its own last,   2 x x . . . x . .
     which predicts nothing. Only the positions that have    2 x x . . . x x .
     a target go through the head.                           2 x x . . . x x x

Rows are sorted by length and batched by tokens. That is 1.62M tokens and 1.18M logit rows for the validation set, where
the usual way takes 3.3M of both.

Two conventions that can't be compared; every number says its style:

    karpathy   build-nanogpt's: `ctx` and " " + ending encoded apart; acc_norm is the lowest mean loss per token
    lm-eval    "activity_label: ctx_a Ctx_b", cleaned of WikiHow's brackets; acc_norm is the lowest loss per character
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.request import urlopen

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from extras.cli import UserError, run, user_error
from extras.files import atomic_file
from extras.hardware import find_device
from extras.pretrained import load_any, to_transformers
from extras.tokenizer import printable, tokenizer_for

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
CACHE = Path(__file__).resolve().parent / "hellaswag" / "hellaswag_val.jsonl"
LONGEST_CONTEXT = 1024  # tokens; a longer one is taken for a mistake in the file, unless the model has a longer block
BAR = {"desc": "scoring", "file": sys.stderr, "dynamic_ncols": True}
LARGEST_FILE, LONGEST_LINE = 2**28, 2**20  # bytes after decompression; HellaSwag's validation set has 12 MB


@dataclass
class Config:
    """All settings; each is a flag of the same name."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"])] = "gpt2"  # a hub name, a run directory, a checkpoint
    device: Annotated[str, tyro.conf.arg(aliases=["-d"])] = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # precision of the matrix products
    task: Literal["hellaswag", "piqa", "arc", "lambada"] = "hellaswag"  # which set of questions
    data: str = ""  # a .jsonl or .jsonl.gz file; by default HellaSwag's validation set, downloaded once
    limit: int = 0  # score this many examples, always the same ones; 0 = all
    style: Literal["karpathy", "lm-eval"] = "karpathy"  # whose convention to follow
    reference: bool = False  # the plain method: every ending behind its own context, every logit
    show: int = 3  # print this many examples with their losses
    out: str = ""  # write one line per example to this .jsonl file
    compare: list[str] = field(default_factory=list)  # two files that --out wrote: compare them and score nothing


def main(config: Config) -> None:
    if config.compare:
        print(compare(config.compare))
        return
    if config.out and (os.path.isdir(config.out) or not os.access(Path(config.out).absolute().parent, os.W_OK)):
        raise UserError(f"can't write --out {config.out}: it needs a directory that is there and may be written to")
    if config.show < 0:
        raise UserError(f"--show is {config.show}; it must be at least 0")
    device = find_device(config.device)
    examples = load_examples(config.data, config.limit, config.task)
    model, tokenizer = load_model(config.model, device)
    rows = render(examples, tokenizer, model.config.n_positions, config.style)
    features, head = callables(model, tokenizer.n_vocab)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and the batches have a hundred
    how = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {config.dtype}, {device}"
    print(f"{len(rows)} examples of {config.task}, {config.style} style; {config.model}: {how}")
    autocast = nullcontext if config.dtype == "float32" else partial(torch.autocast, device.type, torch.bfloat16)
    method = score_plainly if config.reference else score
    scores = method(features, head, rows, device, autocast=autocast, progress=True)
    for example, row, found in list(zip(examples, rows, scores))[: config.show]:
        print(printable(shown(example, row, found)))
    result = summarize(tally(rows, scores))
    normed = f"acc_norm {result['acc_norm']:.4f} ± {result['stderr_norm']:.4f}"
    other = f"perplexity {math.exp(result['nats']):.2f}" if config.task == "lambada" else normed
    numbers = f"acc {result['acc']:.4f} ± {result['stderr']:.4f}  {other}  n {result['n']}"
    print(f"{config.task} ({config.style} style): {numbers}", flush=True)
    if config.out:
        write_records(config, rows, scores)


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Unavailable(UserError):
    """The examples are neither here nor to be had, or don't fit the model: training can go on without."""


def load_examples(path: str = "", limit: int = 0, task: str = "hellaswag") -> list[dict]:
    """The examples of a .jsonl or .jsonl.gz file, every one checked: ctx, endings, label (an index), line, where, and
    what lm-eval makes of them, query and choices (query is empty if the file lacks HellaSwag's activity_label).

    Without a path, HellaSwag's validation set, downloaded on first use, by one process at a time. limit draws that
    many, always the same ones, in the file's order. Raises Unavailable if the set is not here and can't be downloaded,
    UserError with file and line for an example that is not right.
    """
    if limit < 0:
        raise UserError(f"a limit of {limit} examples makes no sense; 0 scores all of them")
    if not path and task != "hellaswag":
        raise UserError(f"only HellaSwag is downloaded; --task {task} needs --data FILE")
    file = Path(path) if path else cached_validation_set()
    examples = []
    for line, record in read_jsonl(file):
        where = f"{file} line {line}"
        try:
            if not isinstance(record, dict):
                raise ValueError("it is no JSON object")
            examples.append({"where": where, "line": line, **READERS[task](record)})
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"{where}: not a record of {task}: {error}") from error
    if not examples:
        raise UserError(f"{file} has no examples")
    if 0 < limit < len(examples):
        examples = [examples[i] for i in sorted(random.Random(0).sample(range(len(examples)), limit))]
    return examples


def rows_for_training(config, tokenizer, ranks, any_rank, all_or_none) -> list["Row"] | None:
    """For train_gpt2.py: the rows on every rank, or None on all of them. any_rank and all_or_none are the trainer's."""
    rows = None
    for first in (True, False):  # rank 0 before the others: it may have to download the file
        with all_or_none():
            if first == (ranks.rank == 0):
                try:
                    rows = render(load_examples(config.hella_data, config.hella_limit), tokenizer, config.seq_len)
                except Unavailable as error:
                    print(f"training without HellaSwag: {error}", flush=True)
        if first and not any_rank(rows is not None, ranks):
            return None
    return None if any_rank(rows is None, ranks) else rows


def score_run(run, stop, all_reduce) -> dict[str, float] | None:
    """For train_gpt2.py: accuracy by mean loss per token, and its standard error. None if the run is to stop."""
    model, ranks = run.raw_model, (run.ranks.rank, run.ranks.world_size)
    scores = score(model.features, model.head, run.hella_rows, run.device, *ranks, stop.agreed, run.autocast)
    if scores is None:
        return None
    result = summarize(all_reduce(tally(run.hella_rows, scores), run.ranks))
    return {"hella": result["acc_norm"], "hella_se": result["stderr_norm"]}


def cached_validation_set() -> Path:
    """Where the published file is, after downloading it if need be."""
    try:
        if not CACHE.exists():
            with urlopen(URL, timeout=30) as reply:
                data = reply.read()
            if hashlib.sha256(data).hexdigest() != SHA256:
                raise Unavailable(f"{URL} gave {len(data)} bytes that are not HellaSwag's validation set")
            CACHE.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(CACHE) as file:
                file.write(data)
    except (OSError, HTTPException) as error:  # URLError is an OSError; a reply cut short is an HTTPException
        raise Unavailable(f"can't fetch {URL} or can't write {CACHE} ({error}); give the file with --data") from error
    if hashlib.sha256(CACHE.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{CACHE} is not the published file, by its sha256; delete it, or give it with --data")
    return CACHE


def read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of every line that isn't blank. The file may come from anywhere: what is read is bounded."""
    line = size = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for line, text in enumerate(iter(partial(file.readline, LONGEST_LINE + 1), b""), start=1):
                size += len(text)
                if len(text) > LONGEST_LINE or size > LARGEST_FILE:
                    raise OSError(f"over {LONGEST_LINE} bytes a line or {LARGEST_FILE} in all")
                if text.strip():
                    yield line, json.loads(text)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"can't read {path}, line {line}: {error}") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise UserError(f"{path} line {line}: not JSON: {error}") from error


# What each task's records look like, as their authors or the hub's mirrors publish them. Prompts are lm-eval's.


def read_hellaswag(record: dict) -> dict:
    ctx, endings = text_of(record, "ctx"), record.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        raise ValueError(f"'endings' must be a list of 4 texts, not {json.dumps(endings)[:60]}")
    example = question(ctx, endings, record.get("label")) | {"query": ""}
    if "activity_label" in record:  # a file may have ctx_a and ctx_b only joined: all of that counts as ctx_a
        parts = {"ctx_a": ctx, "ctx_b": "", **record}
        activity, a, b = (text_of(parts, name) for name in ("activity_label", "ctx_a", "ctx_b"))
        example["query"] = without_brackets(f"{activity}: {a} {b.capitalize()}")
        example["choices"] = [without_brackets(ending) for ending in endings]
    return example


def read_piqa(record: dict) -> dict:
    endings = [text_of(record, "sol1"), text_of(record, "sol2")]
    return question(f"Question: {text_of(record, 'goal')}\nAnswer:", endings, record.get("label"))


def read_arc(record: dict) -> dict:
    choices, key = record.get("choices"), record.get("answerKey")
    if isinstance(stem := record.get("question"), dict):  # the authors' form; the hub's has choices as two lists
        record = {"question": stem.get("stem")}
        choices = {name: [choice[name] for choice in stem["choices"]] for name in ("text", "label")}
    texts, labels = choices["text"], choices["label"]
    if not (isinstance(texts, list) and isinstance(labels, list) and key in labels and 2 <= len(labels) == len(texts)):
        raise ValueError(f"'choices' must be lists of as many texts as labels, and answerKey {key!r} one of the labels")
    return question(f"Question: {text_of(record, 'question')}\nAnswer:", texts, labels.index(key))


def read_lambada(record: dict) -> dict:
    ctx, _, word = text_of(record, "text").rpartition(" ")
    return question(ctx, [word], 0)


READERS = {"hellaswag": read_hellaswag, "piqa": read_piqa, "arc": read_arc, "lambada": read_lambada}


def question(ctx: str, endings: list, label) -> dict:
    """One checked example, with one prompt for both styles. Raises ValueError with what is wrong."""
    if not ctx.strip():
        raise ValueError("the context is empty")
    for i, ending in enumerate(endings):
        if not isinstance(ending, str) or not ending.strip():
            raise ValueError(f"ending {i} is empty: {json.dumps(ending)[:60]}")
    if isinstance(label, str) and label.isdecimal():  # as the hub has it
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f"'label' must be one of 0 to {len(endings) - 1}, not {json.dumps(label)}")
    return {"ctx": ctx, "endings": endings, "label": label, "query": ctx, "choices": endings}


def text_of(record: dict, name: str) -> str:
    if not isinstance(record.get(name), str):
        raise ValueError(f"{name!r} must be a text, not {json.dumps(record.get(name, 'missing'))[:60]}")
    return record[name]


def without_brackets(text: str) -> str:
    """lm-eval's way with WikiHow's markup: "How to knit [title] Buy wool. [step] Go" -> "How to knit. Buy wool. Go"."""
    lines = (line.rpartition("]") for line in text.strip().replace(" [title]", ". ").split("\n"))
    found = (re.sub(r"\[.*?\]", "", head + end) + tail for head, end, tail in lines)  # a [ in the tail has no end
    return "\n".join(found).replace("  ", " ")


# ----------------------------------------------------------------------------------------------------------------------
# From examples to rows of tokens


class Row(NamedTuple):
    """One example with K endings, tokenized."""

    line: int
    label: int
    paths: list  # K int32 arrays: context + ending, of at most block_size + 1 tokens
    n_scored: np.ndarray  # (K,) tokens of each ending, the last ones of its path
    lengths: np.ndarray  # (K,) what acc_norm divides an ending's loss by
    first: np.ndarray  # (K,) the first ending of the same tokens: equal endings have equal scores, to the last bit
    trees: list  # int32 arrays (4, T): tokens, positions, segments, targets; one, if the endings fit the block


def render(examples: list[dict], tokenizer, block_size: int, style: str = "karpathy") -> list[Row]:
    """Tokenize examples in that style for a model of that block size, one Row each.

    A context that leaves no room for an ending loses its beginning, as in lm-eval. Raises UserError, naming the line,
    for a context longer than both the block and LONGEST_CONTEXT, or an ending that is empty once cleaned; and
    Unavailable for an ending that alone is longer than the block.
    """
    rows, longest = [], max(block_size, LONGEST_CONTEXT)
    for example in examples:
        where, (context, endings, lengths) = example["where"], encode(example, tokenizer, style)
        sizes = [len(ending) for ending in endings]
        if len(context) > longest:
            raise UserError(f"{where}: a context of {len(context)} tokens; at most {longest} are allowed")
        if min(lengths) == 0:
            raise UserError(f"{where}: ending {lengths.index(0)} is empty in {style} style")
        if max(sizes) > block_size:
            raise Unavailable(f"{where}: an ending of {max(sizes)} tokens is over the block size {block_size}")
        # n tokens of context and an ending of m are n + m - 1 fed tokens
        contexts = [context[max(0, len(context) + size - block_size - 1) :] for size in sizes]
        paths = [np.array(kept + ending, np.int32) for kept, ending in zip(contexts, endings)]
        first, trees = [endings.index(ending) for ending in endings], grow_trees(paths, sizes, block_size)
        rows.append(Row(example["line"], example["label"], paths, *map(np.array, (sizes, lengths, first)), trees))
    return rows


def encode(example: dict, tokenizer, style: str) -> tuple[list[int], list[list[int]], list[int]]:
    """Tokens of the context, of each ending, and what acc_norm divides each ending's loss by."""
    if style == "karpathy":
        endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
        return tokenizer.encode(example["ctx"]), endings, [len(ending) for ending in endings]
    query, choices = example["query"], example["choices"]
    if not query:
        raise UserError(f"{example['where']}: 'activity_label' is missing, which lm-eval's prompt begins with")
    # spaces at the end of the context go to the ending; an ending is what the context leaves of both encoded together
    context = query.rstrip()
    head = tokenizer.encode(context)
    endings = [tokenizer.encode(context + query[len(context) :] + " " + choice)[len(head) :] for choice in choices]
    return head, endings, [len(choice) for choice in choices]


def grow_trees(paths: list, sizes: list[int], block_size: int) -> list[np.ndarray]:
    """The trees of a Row: an ending joins the last one if that has the same context and room; targets are -1 in it."""
    trees, before = [], None
    for i, (path, size) in enumerate(zip(paths, sizes), start=1):
        n = len(path) - size  # tokens of context
        if n != before or len(trees[-1][0]) + size > block_size:
            trees.append((list(path[: n - 1]), list(range(n - 1)), [0] * (n - 1), [-1] * (n - 1)))
        parts = path[n - 1 : -1], range(n - 1, len(path) - 1), [i] * size, path[n:]
        for line, part in zip(trees[-1], parts):
            line.extend(part)
        before = n
    return [np.array(tree, np.int32) for tree in trees]


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


class Score(NamedTuple):
    """What a model makes of one Row: nats (K,) summed over each ending, greedy (K,) whether it would have said it."""

    nats: np.ndarray
    greedy: np.ndarray


@torch.no_grad()
def score(features, head, rows, device, rank=0, world_size=1, should_stop=None, autocast=nullcontext, progress=False):
    """A Score for each of `rows`, None for those of other ranks; or None, as soon as should_stop() says so.

    features(tokens (B, T), positions (B, T), mask (B, 1, T, T) bool, True = may attend) -> (B, T, C) after the last
    norm; head((n, C)) -> (n, V) logits; autocast() gives the context that they run in. Batches don't
    depend on the ranks, to whom they are dealt in turn: the results are the same for any number of ranks, and every
    rank calls should_stop equally often, before each of its batches, so that it may be a collective.
    """
    device = torch.device(device)
    max_tokens, max_logits = (1024, 128) if device.type == "cpu" else (16384, 2048)  # on a CPU, what a cache can hold
    batches, found = plan_batches(rows, max_tokens), []
    with autocast():  # once around it all: it keeps the weights that it has cast until it ends
        for first in tqdm(range(0, len(batches), world_size), **BAR, disable=not progress):
            if should_stop is not None and should_stop():
                return None
            for batch in batches[first : first + world_size][rank : rank + 1]:
                tensors = collate([rows[i] for i in batch], device)
                found.append((batch, *batch_nats(features, head, *tensors, max_logits)))
    scores = [None] * len(rows)
    for batch, nats, greedy in found:  # only now does the host wait for the device
        starts = np.cumsum([0, *np.concatenate([rows[i].n_scored for i in batch])])[:-1]
        nats = np.add.reduceat(nats.cpu().double().numpy(), starts)  # of each ending
        greedy = np.logical_and.reduceat(greedy.cpu().numpy(), starts)
        begin = 0
        for i in batch:
            scores[i] = Score(nats[begin + rows[i].first], greedy[begin + rows[i].first])
            begin += len(rows[i].first)
    return scores


def plan_batches(rows: list[Row], max_tokens: int) -> list[list[int]]:
    """Indices of rows, the longest first, in batches of at most max_tokens with padding; or of one row."""
    sizes = [max(tree.shape[1] for tree in row.trees) for row in rows]
    batches, lines = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -sizes[i]):
        lines += len(rows[i].trees)
        if not batches or lines * sizes[batches[-1][0]] > max_tokens:
            batches.append([])
            lines = len(rows[i].trees)
        batches[-1].append(i)
    return batches


def collate(rows: list[Row], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows -> tokens, positions, segments (3, B, T); (n,) places in B * T that have a target, and the (n,) targets."""
    trees = [tree for row in rows for tree in row.trees]
    batch = np.zeros((4, len(trees), max(tree.shape[1] for tree in trees)), np.int64)
    batch[3] = -1  # padding looks like more context, and no token sees it
    for b, tree in enumerate(trees):
        batch[:, b, : tree.shape[1]] = tree
    sources = np.flatnonzero(batch[3] >= 0)
    tensors = [torch.from_numpy(array) for array in (batch[:3], sources, batch[3].ravel()[sources])]
    if device.type == "cuda":  # so that the copies queue up behind the batch before, and the host goes on
        tensors = [tensor.pin_memory() for tensor in tensors]
    return tuple(tensor.to(device, non_blocking=device.type == "cuda") for tensor in tensors)


def batch_nats(features, head, batch, sources, targets, max_logits) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (n,) float32 nats of the targets, and whether each is the likeliest token."""
    (tokens, positions, segments), nats, greedy = batch, [], []
    T = tokens.shape[1]
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T queries, T keys)
    mask = seen & torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
    x = features(tokens, positions, mask[:, None]).flatten(0, 1)[sources]  # (n, C)
    for rows, target in zip(x.split(max_logits), targets.split(max_logits)):  # (n, V) would not fit
        logits = head(rows).float()
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.gather(1, target[:, None])[:, 0] >= logits.amax(1))
    return torch.cat(nats), torch.cat(greedy)


@torch.no_grad()
def score_plainly(features, head, rows, device, autocast=nullcontext, progress=False) -> list[Score]:
    """The reference: an example a forward, each ending behind its own context, all logits, and their cross-entropy."""
    scores = []
    for row in tqdm(rows, **BAR, disable=not progress):
        tokens = pad_sequence([torch.from_numpy(path).long() for path in row.paths], batch_first=True)  # (K, T)
        targets = torch.full_like(tokens, -100)  # which cross_entropy leaves out
        for target, path, size in zip(targets, row.paths, row.n_scored):
            target[len(path) - size : len(path)] = torch.from_numpy(path[-size:])
        tokens, targets = tokens[:, :-1].to(device), targets[:, 1:].to(device)
        with autocast():
            logits = head(features(tokens)).float().mT  # (K, V, T - 1)
        losses = F.cross_entropy(logits, targets, reduction="none")
        greedy = (logits.argmax(1) == targets) | (targets < 0)
        scores.append(Score(losses.sum(1).cpu().double().numpy(), greedy.all(1).cpu().numpy()))
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# From scores to numbers


def answers(row: Row, found: Score) -> tuple[int, int]:
    """The endings chosen by acc and by acc_norm, the first among equals; a single one only if it is greedy, else -1."""
    if len(found.nats) == 1:
        return (0, 0) if found.greedy[0] else (-1, -1)
    return int(found.nats.argmin()), int((found.nats / row.lengths).argmin())


def tally(rows: list[Row], scores: list[Score | None]) -> torch.Tensor:
    """(4,) float64: examples, correct, correct by acc_norm, nats of the right endings; over the rows with a score."""
    counts = torch.zeros(4, dtype=torch.float64)
    for row, found in zip(rows, scores):
        if found is not None:
            pred, pred_norm = answers(row, found)
            counts += torch.tensor([1, pred == row.label, pred_norm == row.label, found.nats[row.label]]).double()
    return counts


def summarize(counts: torch.Tensor) -> dict[str, float]:
    """acc, acc_norm, their standard errors, n, and the mean nats of the right ending, from counts summed over ranks."""
    n, correct, correct_norm, nats = counts.tolist()
    result = {"n": int(n), "nats": nats / n, "acc": correct / n, "acc_norm": correct_norm / n}
    for name, error in (("acc", "stderr"), ("acc_norm", "stderr_norm")):
        p = result[name]
        result[error] = math.sqrt(p * (1 - p) / max(n - 1, 1))  # as lm-eval: from the sample variance
    return result


def shown(example: dict, row: Row, found: Score) -> str:
    """An example for the eye: its endings with their nats, '*' the right one, '<' the choice of acc_norm."""
    _, pred_norm = answers(row, found)
    lines = [example["where"], f"  {example['ctx']}"]
    for i, ending in enumerate(example["endings"]):
        marks = ("*" if i == row.label else " ") + ("<" if i == pred_norm else " ")
        lines.append(f"  {marks} {found.nats[i]:8.3f} nats, {found.nats[i] / row.lengths[i]:6.3f} normed: {ending}")
    return "\n".join(lines)


def write_records(config: Config, rows: list[Row], scores: list[Score]) -> None:
    """The --out file, a line per example."""
    about = {"task": config.task, "style": config.style, "model": config.model}
    with user_error(f"can't write {config.out}", OSError), atomic_file(config.out) as file:
        for row, found in zip(rows, scores):
            pred, pred_norm = answers(row, found)
            record = {"line": row.line, "label": row.label, "pred": pred, "pred_norm": pred_norm}
            record |= {"nats": found.nats.tolist(), "lengths": row.lengths.tolist()}
            file.write(json.dumps(about | record).encode() + b"\n")


def compare(paths: list[str]) -> str:
    """Two files of --out, example by example: McNemar's exact test of whether one model is right more often."""
    if len(paths) != 2:
        raise UserError(f"--compare takes two files that --out wrote, not {len(paths)}")
    sets = [[record for _, record in read_jsonl(Path(path))] for path in paths]
    with user_error(f"{paths[0]} or {paths[1]} was not written by --out, for it lacks a field", KeyError, TypeError):
        a, b = ([(r["task"], r["style"], r["line"], r["label"]) for r in records] for records in sets)
        right = {name: [[r[name] == r["label"] for r in records] for records in sets] for name in ("pred", "pred_norm")}
    if a != b or not a:
        raise UserError(f"{paths[0]} ({len(a)} lines) and {paths[1]} ({len(b)}) are not of the same examples and style")
    lines = [f"{a[0][0]} ({a[0][1]} style), n {len(a)}: A {paths[0]}, B {paths[1]}"]
    for name, metric in (("pred", "acc"), ("pred_norm", "acc_norm")):
        in_a, in_b = np.array(right[name])
        only_a, only_b = int((in_a & ~in_b).sum()), int((in_b & ~in_a).sum())
        accs = f"{metric:8s} A {in_a.mean():.4f} B {in_b.mean():.4f}"
        lines.append(f"  {accs}; right only in A {only_a}, only in B {only_b}: McNemar p {mcnemar(only_a, only_b):.3g}")
    return "\n".join(lines)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p: the odds that a fair coin falls as unevenly as b against c (McNemar 1947)."""
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))


# ----------------------------------------------------------------------------------------------------------------------
# Models of transformers


def load_model(source: str, device: torch.device):
    """The model of a hub name, run directory, checkpoint or GPT-2 directory as transformers', ready to score, and its
    tokenizer."""
    shape, state = load_any(source)
    tokenizer = tokenizer_for(shape["n_tokens"], source)
    return to_transformers(shape, state).to(device), tokenizer


def callables(model, n_vocab: int) -> tuple[Callable, Callable]:
    """features and head, as `score` wants them, of a GPT2LMHeadModel; ids from n_vocab on are padding."""

    def features(tokens, positions=None, mask=None):
        return model.transformer(tokens, position_ids=positions, attention_mask=mask, use_cache=False).last_hidden_state

    return features, lambda x: model.lm_head(x)[..., :n_vocab]


if __name__ == "__main__":
    run(main, Config, __doc__)
