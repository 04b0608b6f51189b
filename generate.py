"""
Ids from a model, one after the other: a KV cache, and the ways to draw the next id.

Knows nothing of training: a model is something with `features(idx, positions, mask, cache, start)`, `head(x)` and a
`config`, as train_gpt2.GPT has them. Shapes: B batch, T prompt, Q new columns, S columns seen, n tokens that exist.
"""

import math
from collections.abc import Iterator

import torch


@torch.no_grad()
def stream(model, idx, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=None,
           generator=None, padding=None) -> Iterator[torch.Tensor]:  # fmt: skip
    """Continue (B, T) ids; yields (B, 1) next ids, at most `max_new_tokens` times.

    temperature 0 takes the likeliest id. stop: an id that a row repeats once it has drawn it; the stream ends when all
    rows have. padding: (B,) how many ids at the left of each row are no text. Past block_size the window slides: the
    last block_size ids are seen and the cache is filled anew for each, since every position has moved.
    """
    (B, T), block_size = idx.shape, model.config.block_size
    total = T + max_new_tokens
    seen = torch.zeros(B, total, dtype=torch.long, device=idx.device)
    seen[:, :T] = idx
    padding = torch.zeros(B, dtype=torch.long, device=idx.device) if padding is None else padding
    padded, ended = bool(padding.any()), torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
    cache = new_cache(model, B, min(total, block_size), idx.device)
    first, start = max(0, T - block_size), 0  # the window's first column, and how many of its columns the cache holds
    for end in range(T, total):
        if start == block_size:
            first, start = end - block_size, 0
        queries = torch.arange(first + start, end, device=idx.device)
        positions, mask = padded_view(queries, first, padding) if padded else (None, None)
        x = model.features(seen[:, first + start : end], positions, mask, cache, start)
        logits = model.head(x[:, -1]).float()  # (B, n)
        text = torch.arange(end, device=idx.device) >= padding[:, None]  # (B, S)
        logits = filter_logits(logits, seen[:, :end], text, temperature, top_k, top_p, repetition_penalty)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (B, 1)
        if stop is not None:
            token = token.masked_fill(ended, stop)
            ended |= token == stop
        seen[:, end : end + 1], start = token, end - first
        yield token
        if stop is not None and bool(ended.all()):
            return


def new_cache(model, batch: int, size: int, device: torch.device) -> torch.Tensor:
    """Room for the keys and values of `size` positions: (L, 2, B, nh, size, hs), in the dtype that attention sees."""
    c, dtype = model.config, model.lm_head.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.empty(c.n_layer, 2, batch, c.n_head, size, c.n_embd // c.n_head, dtype=dtype, device=device)


def padded_view(queries, first: int, padding):
    """Positions (B, Q) and mask (B, 1, Q, S) of rows with padding at their left, when columns before `first` are gone.

    A padding column may look at all before it: no row of attention is empty then, and nobody looks at what it gives.
    """
    keys = torch.arange(first, int(queries[-1]) + 1, device=queries.device)  # (S,)
    begin = padding.clamp(min=first)[:, None]  # (B, 1) the first column that is text
    positions = (queries - begin).clamp(min=0)
    visible = (keys >= begin)[:, None] | (queries < begin)[:, :, None]  # (B, Q, S)
    return positions, (visible & (keys <= queries[:, None]))[:, None]


def filter_logits(logits, seen, text, temperature, top_k, top_p, repetition_penalty):
    """(B, n) logits -> (B, n) with -inf for what must not be drawn. Order and meaning are those of `transformers`.

    seen (B, S) ids so far, text (B, S) True where they count for the repetition penalty.
    """
    if repetition_penalty != 1.0:  # Keskar et al. 2019: divide what is positive, multiply what is negative
        repeated = torch.zeros_like(logits).scatter_add_(1, seen, text.to(logits.dtype)) > 0
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(repeated, penalized, logits)
    if temperature > 0:
        logits = logits / temperature
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:  # Holtzman et al. 2020: the smallest set that holds top_p of the probability, never empty
        ordered, order = logits.sort(dim=-1)
        dropped = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -math.inf)
    return logits
