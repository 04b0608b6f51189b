"""
Recipes: what the knobs of an optimization are if nothing is said, and the learning rate they make.

    gpt2   the paper's and build-nanogpt's: AdamW, a cosine to a tenth
    fast   the same loss from fewer tokens (README), in exactly the same model: Muon, higher rates, a line to zero

A recipe is nothing but these defaults: every lever is a knob, and works alone, too. bench/recipe/ measures them.
"""

import math

from cli import UserError, knob

RECIPES = {
    "gpt2": {
        "max_lr": 6e-4,
        "min_lr": 6e-5,
        "warmup_steps": 715,  # 375M tokens, as GPT-3
        "schedule": "cosine",
        "muon_lr": 0.0,
    },
    "fast": {
        "max_lr": 1.8e-3,  # three times the paper's; here of embeddings and vectors alone
        "min_lr": 0.0,  # the last steps, at small rates, take the noise out
        "warmup_steps": 250,  # no second moments have to settle first, but the embeddings'
        "schedule": "linear",  # spends fewer steps at rates that are too small
        "muon_lr": 3.6e-3,  # updates of RMS 7e-4: at width 768 Muon's usual 0.02, in the units of Jordan et al.
    },
}


def by_recipe(name: str, help: str, **kwargs):
    """A knob whose default is the recipe's."""
    defaults = {recipe: str(knobs[name]).removesuffix(".0") for recipe, knobs in RECIPES.items()}
    return knob(None, f"{help} (gpt2: {defaults['gpt2']}, fast: {defaults['fast']})", **kwargs)


def fill_in(config) -> None:
    """Give the knobs that were not set, which are None, the values of `config.recipe`."""
    if config.recipe not in RECIPES:
        raise UserError(f"--recipe {config.recipe} is none of {', '.join(RECIPES)}")
    for name, value in RECIPES[config.recipe].items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def check_recipe(config) -> None:
    """UserError for what can't be right together."""
    if config.muon_momentum >= 1:
        raise UserError(f"--muon_momentum is {config.muon_momentum}; it must be below 1, or no matrix ever moves")
    if config.zero and config.muon_lr:
        raise UserError("--zero shares out AdamW's moments, and Muon has but one, of the blocks; drop --zero")


def lr_at(step: int, config) -> float:
    """Of AdamW; Muon's is muon_lr / max_lr times it.

    Linear warm-up over warmup_steps, then from max_lr to min_lr at max_steps: a cosine (Brown et al. 2020), or a line.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    height = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + height * (config.max_lr - config.min_lr)
