"""
What is known of GPT-2 124M, to hold a run against: its recipe, its curve, and the marks of the originals.
"""

import math

import numpy as np

TOKENS_PER_STEP = 524_288  # of GPT-2's recipe, and of build-nanogpt, whose logs don't say
RECIPE = {
    "total_batch_size": TOKENS_PER_STEP, "max_steps": 19_073, "warmup_steps": 715, "max_lr": 6e-4, "min_lr": 6e-5,
    "seq_len": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "schedule": "cosine", "muon_lr": 0,
}  # fmt: skip
REFERENCE_CURVE = {  # step -> validation loss on FineWeb-Edu, as reported of that recipe
    0: 10.93, 250: 6.13, 1_000: 4.16, 2_000: 3.66, 5_000: 3.36, 6_750: 3.28, 10_000: 3.20, 15_000: 3.11, 19_073: 3.07,
}  # fmt: skip
# OpenAI's GPT-2 124M on the same validation tokens, and on HellaSwag in karpathy style: acc_norm, each ending encoded
# alone, mean loss a token (build-nanogpt); GPT-3 124M as its paper has it.
GPT2_LOSS, GPT2_HELLASWAG, GPT3_HELLASWAG = 3.2924, 0.2955, 0.337


def on_fineweb_edu(source: dict | str | None, tokenizer: str | None) -> bool:
    """Is a validation loss comparable with GPT2_LOSS? It is on FineWeb-Edu's shard 0 in GPT-2's tokens.

    source: as manifest.json names it. Files of one's own may be the same text, but not the same validation tokens.
    """
    name = source.get("dataset") if isinstance(source, dict) else source
    return "fineweb-edu" in str(name).lower() and tokenizer == "gpt2"


def follows_recipe(settings: dict) -> bool:
    """Is a run on FineWeb-Edu with these settings, of train_gpt2.Config and GPTConfig, the one of REFERENCE_CURVE?"""
    sizes = ("n_layer", "n_head", "n_embd")  # of which 0 is the model's own
    differs = [k for k, v in RECIPE.items() if settings.get(k) not in (None, v) and (settings[k] or k not in sizes)]
    return not differs and not settings.get("init_from") and settings.get("model") in (None, "gpt2")


def reference_loss(step):
    """REFERENCE_CURVE between its points, on a logarithmic axis of steps, where it is nearly straight."""
    return np.interp(np.log(step + 50), np.log(np.array([*REFERENCE_CURVE]) + 50), [*REFERENCE_CURVE.values()])


def remarks(step: int, values: dict[str, float], settings: dict, source, tokenizer: str) -> list[str]:
    """How an evaluation compares with what is known about GPT-2 124M; nothing where the setup is another."""
    if not on_fineweb_edu(source, tokenizer):
        return []
    found = []
    if "val" in values and follows_recipe(settings):
        expected = float(reference_loss(step))
        side = "ahead" if values["val"] <= expected else "behind"
        found.append(f"reference {expected:.2f}: {side} by {abs(expected - values['val']):.2f}")
    if values.get("val", math.inf) < GPT2_LOSS:
        found.append(f"below GPT-2 124M's {GPT2_LOSS}")
    if values.get("hella", 0) > GPT2_HELLASWAG and values["hella_se"] < 0.005:  # all 10,042
        found.append(f"above GPT-2 124M's {GPT2_HELLASWAG}")
    return found
