"""
Tokens from a model, one after the other: a KV cache, and the ways to draw the next id.

    text = model.generate("Once upon a time", 100, temperature=0.8, top_k=50)        # text in, text out
    ids = model.generate(idx, 100, temperature=0.8, top_k=50, stop=eot)              # (B, T) -> (B, T + 100) at most
    idx, padding = pad_left([[15496], [818, 262, 3726]])                             # prompts of unequal length
    for token in stream(model, idx, 100, padding=padding, repetition_penalty=1.2):   # (B, 1), as it is drawn

Knows nothing of training: a model is something with `features(idx, positions, mask, cache, start)`, `head(x)` and a
`config`, as train_gpt2.GPT has them. Shapes: B batch, T prompt, Q new columns, S columns seen, n tokens that exist.
"""

import math
import platform
from collections.abc import Iterator

import torch

from extras.cli import UserError
from extras.tokenizer import encode_prompt, tokenizer_for


def continue_texts(model, prompts: list[str], max_new_tokens: int, tokenizer=None, **options) -> list[str]:
    """Each prompt and its continuation up to end-of-text; the options are those of `stream`.

    tokenizer: by default the one that has as many ids as the model.
    """
    tokenizer = tokenizer or tokenizer_for(model.config.n_tokens)
    encoded, texts = zip(*(encode_prompt(tokenizer, prompt) for prompt in prompts))
    idx, padding = pad_left(encoded, model.lm_head.weight.device)
    drawn = torch.cat([*stream(model, idx, max_new_tokens, padding=padding, stop=tokenizer.eot, **options)], dim=1)
    new = [row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row for row in drawn.tolist()]
    return [text + tokenizer.decode(ids) for text, ids in zip(texts, new)]


@torch.no_grad()
def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=None,
           generator=None, padding=None) -> Iterator[torch.Tensor]:  # fmt: skip
    """Continue (B, T) ids; yields (B, 1) next ids, at most `max_new_tokens` times.

    temperature 0 takes the likeliest id. stop: an id that a row repeats once it has drawn it; the stream ends when all
    rows have. padding: (B,) how many ids at the left of each row are no text. Past block_size the window slides: the
    last block_size ids are seen and the cache is filled anew for each, since every position has moved.
    """
    (B, T), block_size = idx.shape, model.config.block_size
    if T == 0 or (padding is not None and int(padding.max()) >= T):
        raise UserError("a prompt is empty; it needs a token: end-of-text, with which documents begin, would do")
    padded, total = padding is not None and bool(padding.any()), T + max_new_tokens
    seen = torch.empty(B, total, dtype=torch.long, device=idx.device)
    seen[:, :T] = idx
    if padded:  # text, so that repetition_penalty finds nothing else
        seen[:, :T] = torch.where(torch.arange(T, device=idx.device) < padding[:, None], idx[:, -1:], idx)
    ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
    cache = new_cache(model, B, min(total, block_size), idx.device)
    first, start = max(0, T - block_size), 0  # the window's first column, and how many of its columns the cache holds
    for end in range(T, total):
        if start == block_size:
            first, start = end - block_size, 0
        positions, mask = padded_view(first, start, end, padding) if padded else (None, None)
        x = model.features(seen[:, first + start : end], positions, mask, cache, start)
        logits = model.head(x[:, -1]).float()  # (B, n)
        if repetition_penalty != 1.0:
            penalize(logits, seen[:, :end], repetition_penalty)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = filter_logits(logits / temperature, top_k, top_p)
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended = token == stop
        seen[:, end : end + 1], start = token, end - first
        yield token
        if stop is not None and bool(ended.all()):
            return


def generate(model, idx, max_new_tokens: int, **options):
    """Continue (B, T) ids -> (B, T + new) ids, or a text -> text. The options are those of `stream`."""
    if isinstance(idx, str):
        return continue_texts(model, [idx], max_new_tokens, **options)[0]
    return torch.cat([idx, *stream(model, idx, max_new_tokens, **options)], dim=1)


def pad_left(prompts: list[list[int]], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of unequal length as a batch: ids (B, T), and (B,) how many at the left of each row are padding."""
    T = max(map(len, prompts))
    padding = [T - len(prompt) for prompt in prompts]
    rows = [[0] * missing + prompt for missing, prompt in zip(padding, prompts)]
    return torch.tensor(rows, dtype=torch.long, device=device), torch.tensor(padding, device=device)


def new_cache(model, batch: int, size: int, device: torch.device) -> torch.Tensor:
    """Room for the keys and values of `size` positions: (L, 2, B, nh, size, hs), in the dtype that attention sees."""
    c, dtype = model.config, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.empty(c.n_layer, 2, batch, c.n_head, size, c.n_embd // c.n_head, dtype=dtype, device=device)


def padded_view(first: int, start: int, end: int, padding):
    """Positions (B, Q) and mask (B, 1, Q, S) of the columns first + start .. end, for rows with padding at their left.

    The window begins with column `first`. A padding column may look at all before it: no row of attention is empty
    then, and nobody looks at what it gives.
    """
    keys = torch.arange(first, end, device=padding.device)  # (S,)
    queries = keys[start:]  # (Q,)
    begin = padding.clamp(min=first)[:, None]  # (B, 1) the first column that is text
    positions = (queries - begin).clamp(min=0)
    visible = (keys >= begin)[:, None] | (queries < begin)[:, :, None]  # (B, Q, S)
    return positions, (visible & (keys <= queries[:, None]))[:, None]


def penalize(logits, seen, penalty: float) -> None:
    """Make ids that were there less likely, in place: divide what is positive, multiply the rest (Keskar et al. 2019).

    logits (B, n), seen (B, S) ids so far.
    """
    there = logits.gather(1, seen)
    logits.scatter_(1, seen, torch.where(there > 0, there / penalty, there * penalty))


def filter_logits(logits, top_k: int, top_p: float):
    """(B, n) logits -> (B, n) with -inf for what must not be drawn; `transformers` draws from the same ids."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:  # Holtzman et al. 2020: the fewest likeliest ids that have top_p of the probability, never none
        most = int((logits > -math.inf).sum(dim=-1).max()) if top_k > 0 else logits.shape[-1]  # few to sort, with top_k
        ordered, order = (column.flip(-1) for column in logits.topk(most, dim=-1))  # from the least likely on
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[:, -1] = False
        nucleus = ordered.masked_fill(dropped, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter_(1, order, nucleus)
    return logits


class OneDNNLinear(torch.nn.Linear):
    """nn.Linear, whose float32 forwards without gradients are oneDNN's on x86, as bfloat16's are anyway.

    MKL's, on AMD, read weights half as fast for one row, and multiply a quarter less for many.
    """

    def forward(self, x):
        in_float32 = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if in_float32 and not torch.is_grad_enabled() and not traced:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def use_onednn(model: torch.nn.Module) -> None:
    """Let the Linear layers of a model that will not be trained use oneDNN, where there is one."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.__class__ = OneDNNLinear


def draw_samples(run, n: int = 4, length: int = 24) -> dict[str, list[str]]:
    """For train_gpt2.py: n continuations of its --sample_prompt, on rank 0, with the same seed each time."""
    if run.ranks.rank:
        return {}
    generator, prompts = torch.Generator(run.device).manual_seed(run.config.seed), [run.config.sample_prompt] * n
    try:
        with run.autocast():
            texts = continue_texts(run.raw_model, prompts, length, run.tokenizer, top_k=50, generator=generator)
    except RuntimeError as error:
        if "nan" not in str(error):
            raise
        texts = ["no samples: the probabilities are not numbers"]
    return {"samples": texts}
