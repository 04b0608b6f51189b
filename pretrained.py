"""
GPT-2 weights in and out, in the form that Hugging Face's `transformers` reads and writes.

Knows no model class: it speaks of a shape, a dict of sizes with the names of train_gpt2.GPTConfig, and of a state dict
with Hugging Face's names and nn.Linear's layout. `transformers` is imported where it is used.
"""

import json
import os
import re

from cli import UserError

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def load(name_or_dir: str) -> tuple[dict, dict]:
    """Shape and state dict (float32) of a GPT-2 on the hub or in a directory. UserError unless every weight fits."""
    from transformers import AutoConfig, GPT2LMHeadModel

    try:
        shape = AutoConfig.from_pretrained(name_or_dir)
        if shape.model_type != "gpt2":
            raise UserError(f"{name_or_dir} is a {shape.model_type} model, not a GPT-2")
        model, info = GPT2LMHeadModel.from_pretrained(name_or_dir, dtype="float32", output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # OSError, huggingface_hub's, safetensors', pickle's: each library has its own
        if os.path.isdir(name_or_dir):
            what = "a directory that transformers can load"
        else:
            what = "a file or directory here, nor could the hub be asked for it (online once, it is cached then)"
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{name_or_dir} is not {what}: {type(error).__name__}: {reason}") from error
    problems = {what: sorted(map(str, keys)) for what, keys in info.items() if keys}
    if problems:
        raise UserError(f"the weights in {name_or_dir} don't fit its config: {json.dumps(problems)[:300]}")
    if shape.activation_function != "gelu_new" or shape.n_inner not in (None, 4 * shape.n_embd):
        raise UserError(f"{name_or_dir} is not a plain GPT-2: {shape.activation_function=}, {shape.n_inner=}")
    sizes = {"block_size": shape.n_positions, "vocab_size": shape.vocab_size}
    sizes |= {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")}
    return sizes, transpose_conv1d(model.state_dict())


def save(directory: str, shape: dict, state: dict) -> None:
    """Write a directory that `transformers` and lm-eval load. Of the vocabulary, the `n_tokens` ids that are tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
    ends = {"bos_token_id": shape["n_tokens"] - 1, "eos_token_id": shape["n_tokens"] - 1}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=shape["n_tokens"], n_positions=shape["block_size"], **sizes, **ends, **none)
    state = transpose_conv1d(state)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name][: shape["n_tokens"]]
    model = GPT2LMHeadModel(config)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(directory)


def transpose_conv1d(state: dict) -> dict:
    """Between `transformers`' Conv1D matrices, (in, out), and nn.Linear's, (out, in). Its own inverse."""
    return {name: tensor.t().contiguous() if CONV1D.search(name) else tensor for name, tensor in state.items()}
