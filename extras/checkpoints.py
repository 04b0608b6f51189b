"""
Weights from wherever they are: a checkpoint of train_gpt2.py, of build-nanogpt or of nanoGPT, a run directory of any of
them, a hub name or a directory of `transformers`. All scripts read models here.

    shape, state = load_any("log")                    # the newest checkpoint of a run
    shape, state = load_checkpoint("ckpt_019073.pt")

A shape is a dict with the fields of train_gpt2.GPTConfig, a state has the names of its parameters.
"""

import os
import re
from pathlib import Path

import torch

from extras.cli import UserError
from extras.pretrained import fit, is_weight, layout, load, read_pickle, sizes_of, unwrapped

NAMES = (re.compile(r"ckpt_(\d{6,})\.pt"), re.compile(r"model_(\d+)\.pt"), re.compile(r"ckpt()\.pt"))  # ours, theirs


def load_any(source: str, block_size: int | None = None) -> tuple[dict, dict]:
    """Shape and state of a checkpoint file, a run directory, a hub name or a directory of `transformers`.

    block_size: take only so many of its positions, the first.
    """
    path = find_checkpoint(source)
    shape, state = load_checkpoint(path) if path else load(source)
    if block_size is None:
        return shape, state
    if not 0 < block_size <= shape["block_size"]:
        raise UserError(f"block_size {block_size} is not in 1 .. {shape['block_size']}, the positions of {source}")
    wpe = state["transformer.wpe.weight"][:block_size].clone()
    return shape | {"block_size": block_size}, state | {"transformer.wpe.weight": wpe}


def find_checkpoint(source: str) -> Path | None:
    """The checkpoint file itself, or a run directory's newest; None for other directories and hub names."""
    if os.path.isfile(source):
        return Path(source)
    files = os.listdir(source) if os.path.isdir(source) else []
    for name in NAMES:
        if found := [match for match in map(name.fullmatch, files) if match]:
            return Path(source, max(found, key=lambda match: int(match[1] or 0))[0])
    if "log.txt" in files and "config.json" not in files:
        raise UserError(f"{source} is a run without a checkpoint; it saves one every --save_every steps and at its end")
    return None


def load_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """Shape and state dict of the model in a checkpoint of train_gpt2.py, of build-nanogpt or of nanoGPT.

    nanoGPT's GELU is the exact one, ours is GPT-2's with tanh: its models' logits come out some 1e-3 different.
    """
    if (suffix := Path(path).suffix) in (".safetensors", ".bin", ".json"):
        alone = "configuration" if suffix == ".json" else "weights"
        raise UserError(f"{path} is the {alone} alone; name the directory, where config.json and the weights are")
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}")
    saved = read_pickle(path)
    if not isinstance(saved, dict) or "model" not in saved:
        raise UserError(f"{path} is no GPT-2 checkpoint: it has no model")
    config = next((saved[key] for key in ("model_config", "model_args", "config") if key in saved), None)
    config = config if isinstance(config, dict) else getattr(config, "__dict__", {})  # build-nanogpt pickles a class
    shape = sizes_of(config, f"{path} is no GPT-2 checkpoint: it")
    ours = "model_config" in saved  # it may be a fork's, whose config has more and whose weights have other names
    shape = config | shape if ours else shape
    if not isinstance(saved["model"], dict) or not all(map(is_weight, saved["model"], saved["model"].values())):
        raise UserError(f"{path} is no GPT-2 checkpoint: its model is not a dict of names and dense tensors")
    state = unwrapped(saved["model"])
    if config.get("bias") is False:  # nanoGPT can leave them out: that is, they are 0
        state |= {name: torch.zeros(1).expand(size) for name, size in layout(shape).items() if name.endswith("bias")}
    if ours and {name for name in state if name != "lm_head.weight"} != set(layout(shape)):
        return shape, state
    return shape, fit(state, shape, str(path))
