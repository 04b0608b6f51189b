"""
The evaluations of train_gpt2.py that need more than the model and its tokens: HellaSwag, and samples.

`run` is train_gpt2.Run. Each returns {stream: value}, or None if the run is to stop.
"""

from functools import partial

import torch

from extras.agree import all_or_none
from extras.tokenizer import load_tokenizer


def load(config, tokenizer_name: str, ranks, any_rank) -> tuple:
    """The tokenizer, and HellaSwag's rows; None for what is not to be had, with a line that says so.

    All ranks call it together and get both or neither. any_rank(flag, ranks): whether a flag is true on one of them.
    """
    with all_or_none():
        tokenizer, rows, hellaswag = load_tokenizer(tokenizer_name), None, None
    if not config.hella_every:
        return tokenizer, None
    try:
        import hellaswag
    except ModuleNotFoundError:
        ranks.print0("training without HellaSwag: hellaswag.py is not beside train_gpt2.py")
    if any_rank(hellaswag is None, ranks):
        return tokenizer, None
    read = partial(hellaswag.rows_or_none, config.hella_data, config.hella_limit, tokenizer, config.seq_len)
    with all_or_none():
        rows = read() if ranks.rank == 0 else None  # it may have to download a file
    if any_rank(rows is not None, ranks):
        with all_or_none():
            rows = read() if ranks.rank else rows
    return tokenizer, None if any_rank(rows is None, ranks) else rows


def score_hellaswag(run, stop, all_reduce) -> dict[str, float] | None:
    """Accuracy by mean loss per token, and its standard error."""
    import hellaswag

    counts = hellaswag.evaluate(
        run.raw_model.features, run.raw_model.head, run.hella_rows, run.device, run.ranks.rank, run.ranks.world_size,
        should_stop=stop.agreed, autocast=run.autocast,
    )  # fmt: skip
    if counts is None:
        return None
    scores = hellaswag.summarize(all_reduce(counts, run.ranks))
    return {"hella": scores["acc_norm"], "hella_se": scores["stderr_norm"]}


def draw_samples(run, n: int = 4, length: int = 24) -> dict[str, list[str]]:
    """n continuations of `length` tokens, sampled on rank 0 from the 50 likeliest with the same seed each time."""
    if run.ranks.rank:
        return {}
    prompt = run.tokenizer.encode(run.config.sample_prompt) or [run.tokenizer.eot]
    idx = torch.tensor([prompt[-run.config.seq_len :]] * n, device=run.device)
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    try:
        with run.autocast():
            ids = run.raw_model.generate(idx, length, top_k=50, generator=generator)
    except RuntimeError as error:
        if "nan" not in str(error):
            raise
        return {"samples": ["(none: the probabilities are not numbers)"]}
    return {"samples": [run.tokenizer.decode(row) for row in ids.tolist()]}
