"""
Weights from wherever they are: a checkpoint of train_gpt2.py, of build-nanogpt or of nanoGPT, a run directory, a hub
name or a directory of `transformers`.

    shape, state = load_any("log")                    # the newest checkpoint of a run
    shape, state = load_checkpoint("ckpt_019073.pt")

A shape is a dict with the fields of train_gpt2.GPTConfig, a state has the names of its parameters.
"""

import os
import re
import zipfile
from pathlib import Path

import torch

from extras.cli import UserError
from extras.pretrained import fit, is_size, is_weight, layout, load

NAME = re.compile(r"ckpt_(\d{6,})\.pt")


def load_any(source: str) -> tuple[dict, dict]:
    """Shape and state of a checkpoint file, a run directory, a hub name or a directory of `transformers`."""
    steps = saved_steps(source)
    if os.path.isfile(source) or steps:
        return load_checkpoint(Path(source) / f"ckpt_{steps[0]:06d}.pt" if steps else source)
    return load(source)


def saved_steps(log_dir: str) -> list[int]:
    """Steps of the checkpoints in a directory, newest first."""
    names = os.listdir(log_dir) if os.path.isdir(log_dir) else []
    return sorted((int(match[1]) for match in map(NAME.fullmatch, names) if match), reverse=True)


def read(path: str | Path, needs: tuple[str, ...] = ()) -> dict:
    """The checkpoint in a file, on the CPU, memory-mapped. UserError unless it is whole and has the keys it `needs`.

    `torch.load` does not look at the CRC32 that the archive has of every tensor, so a flipped bit would pass: we look.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"{path} is damaged: {damaged} fails its checksum; use an older checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        reason = next((line for line in str(error).split("\n") if "WeightsUnpickler" in line), str(error)).strip()[:150]
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__}: {reason}); use another") from error
    missing = [key for key in needs if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path} is not a checkpoint of this trainer: it has no {', '.join(missing)}")
    return state


class PickledConfig:
    """Stands in for build-nanogpt's `__main__.GPTConfig`: the unpickler fills its attributes and calls nothing."""


def load_checkpoint(path: str | Path) -> tuple[dict, dict]:
    """Shape and state dict of the model in a checkpoint of train_gpt2.py, of build-nanogpt or of nanoGPT.

    nanoGPT's GELU is the exact one, ours is GPT-2's with tanh: its models' logits come out some 1e-3 different.
    """
    if Path(path).suffix in (".safetensors", ".bin"):
        raise UserError(f"{path} is the weights alone; name the directory, where config.json is beside them")
    with torch.serialization.safe_globals([(PickledConfig, "__main__.GPTConfig")]):
        saved = read(path, ("model",))
    config = next((saved[key] for key in ("model_config", "model_args", "config") if key in saved), None)
    config = vars(config) if isinstance(config, PickledConfig) else config
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    if not isinstance(config, dict):
        raise UserError(f"{path} is no GPT-2 checkpoint: it does not tell {', '.join(names)}")
    bad = [name for name in names if not is_size(name, config.get(name))]
    tokens = config.get("n_tokens", 0)
    if not bad and not (type(tokens) is int and 0 <= tokens <= config["vocab_size"]):
        bad = ["n_tokens"]
    if bad:
        raise UserError(f"{path} is no GPT-2 checkpoint: it has no sensible number for {', '.join(bad)}")
    ours = "model_config" in saved  # it may be a fork's, whose config has more and whose weights have other names
    shape = {name: config[name] for name in config if ours or name in (*names, "n_tokens")}
    if not isinstance(saved["model"], dict) or not all(map(is_weight, saved["model"], saved["model"].values())):
        raise UserError(f"{path} is no GPT-2 checkpoint: its model is not a dict of names and dense tensors")
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in saved["model"].items()}
    if config.get("bias") is False:  # nanoGPT can leave them out: that is, they are 0
        state |= {name: torch.zeros(1).expand(size) for name, size in layout(shape).items() if name.endswith("bias")}
    if ours and {name for name in state if name != "lm_head.weight"} != set(layout(shape)):
        return shape, state
    return shape, fit(state, shape, str(path))
