"""
What train_gpt2.py refuses before it begins: settings that can't be right, files that are not what they should be, a run
that is not the one to go on with, and a directory that it could not write into.

No value of a file is used before it has been checked. Without this one the trainer trusts what it reads.
"""

import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch

from extras.cli import UserError, user_error
from extras.files import lock
from extras.track import require_tracker

SHAPE = ("model", "n_layer", "n_head", "n_embd")  # of the weights: what not even --force can change
FIXED = ("seq_len", "total_batch_size", "order", "seed", "tokenizer", "data")  # what only --force can change
MAX_BAD_STEPS = 10  # updates in a row without a finite gradient, after which the run ends
POSITIVE = ("total_batch_size", "seq_len", "max_steps", "max_lr", "log_every", "timeout_minutes")


def check_settings(config) -> None:
    """UserError for a value that can't be right, before anything is opened or written. config: train_gpt2.Config."""
    kinds = get_type_hints(type(config))
    for name, value in asdict(config).items():
        if get_origin(kinds[name]) is Literal and value not in get_args(kinds[name]):
            raise UserError(f"--{name} {value}: choose one of {', '.join(get_args(kinds[name]))}")
        most = math.inf if isinstance(value, float) else 2**63  # what a tensor or a generator can hold
        most = {"timeout_minutes": 10_000, "muon_momentum": 1}.get(name, most)
        if isinstance(value, (int, float)) and not (0 < value < most if name in POSITIVE else 0 <= value < most):
            least = "more than 0" if name in POSITIVE else "0 or more"
            raise UserError(f"--{name} is {value}; it must be {least}, and less than {most}")
        if isinstance(value, str) and not value.isprintable():  # a name that is not UTF-8: a checkpoint can't hold it
            raise UserError(f"--{name} {value!a} has characters that can't be printed; give it another name")
    if config.min_lr > config.max_lr:
        raise UserError(f"--min_lr {config.min_lr:g} is above --max_lr {config.max_lr:g}; lower it (a tenth is usual)")
    if (total := config.total_batch_size) % (T := config.seq_len):
        near = max(1, round(total / T)) * T
        raise UserError(f"--total_batch_size {total} is not a multiple of --seq_len {T}; try {near}")
    if config.epochs and config.max_steps != type(config).max_steps:
        raise UserError(f"--epochs {config.epochs:g} and --max_steps {config.max_steps}: give one of them")
    if config.track != "none":
        require_tracker(config.track)


def check_batch(config, ranks) -> None:
    """UserError unless ranks and micro-batches can share the batch of an update, and the device sums it well."""
    B, T, W, total = config.micro_batch, config.seq_len, ranks.world_size, config.total_batch_size
    if total % (unit := (B or 1) * T * W):
        of = f"of {f'--micro_batch {B} * ' if B else ''}--seq_len {T} * {W} ranks = {unit}"
        near = max(1, total // unit) * unit
        divisor = next((d for d in range(B, 1, -1) if total // T // W % d == 0), 1)
        better = f"--total_batch_size {near}" if total % (T * W) else f"--micro_batch {divisor}"
        raise UserError(f"--total_batch_size {total} is not a multiple {of}; try {better}, or other ranks")
    if ranks.device.type == "mps" and config.compile:
        raise UserError("--compile on MPS sums the head's gradient wrongly on M1 and M2; leave it out")
    if ranks.device.type == "mps" and B * T > 2**14:  # as many terms are in a weight's gradient
        raise UserError(f"--micro_batch {B} * --seq_len {T} is over 16,384: MPS sums that wrongly; lower it")


def check_model(shape, config, n_tokens: int) -> None:
    """UserError unless a model of that shape has room for --seq_len, and the tokenizer of the data."""
    source = config.init_from or config.log_dir
    if config.seq_len > shape.block_size:
        raise UserError(f"--seq_len {config.seq_len} is over the {shape.block_size} positions of {source}")
    if shape.n_tokens != n_tokens:
        other = f"{config.data_dir} was made with {n_tokens}; run fineweb.py with the other --tokenizer"
        raise UserError(f"the model in {source} has {shape.n_tokens} tokens and {other}")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def check_manifest(manifest: dict) -> None:
    """ValueError, KeyError or TypeError unless the fields that the trainer uses are what they should be."""
    of_shard = {"name": str, "split": str, "tokens": int, "bytes": int}
    wanted = [(manifest["tokenizer"], {"name": str, "vocab_size": int})]
    wanted += [({"bytes": 0} | shard, of_shard) for shard in manifest["shards"]]
    for fields, kinds in wanted:
        for name, kind in kinds.items():
            most = 2**16 if name == "vocab_size" else 2**53
            if type(fields[name]) is not kind or (kind is int and not 0 <= fields[name] <= most):
                raise ValueError(f"{name} {fields[name]!r:.60}")


def check_files(data_dir: str, split: str, paths: list[Path], manifest: dict) -> None:
    """UserError unless these files are the manifest's; where it lists none of the split, any will do."""
    names, listed = {path.name for path in paths}, {s["name"] for s in manifest["shards"] if s["split"] == split}
    if missing := sorted(listed - names):
        raise UserError(f"{data_dir} lacks {', '.join(missing[:3])} of manifest.json; run fineweb.py --verify")
    if strays := sorted(names - (listed or names)):
        raise UserError(f"{data_dir}/{strays[0]} is not in manifest.json: it belongs to another set; move it away")
    if len({path.suffix for path in paths}) > 1:
        raise UserError(f"{data_dir} has .npy and .bin files of {split}: the same tokens twice? Move one kind away")
    if not paths and (others := sorted(path.name for path in Path(data_dir).glob("*.bin"))):
        there = f"no {split} shards in {data_dir!r}, but {', '.join(others[:3])} of nanoGPT"
        raise UserError(f"{there}: see the README, or change --data_dir")


def fingerprint(shards: list, manifest: dict) -> str:
    """What tells one token set from another: names, lengths, and checksums or else the first tokens."""
    sums = {shard["name"]: [shard.get("sha256"), shard.get("mask_sha256")] for shard in manifest["shards"]}
    names = [Path(shard.path).name for shard in shards]
    facts = [[n, len(s.tokens), sums.get(n) or s.tokens[:1024].tolist()] for n, s in zip(names, shards)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def check_length(stream) -> None:
    """UserError unless a train_gpt2.SampleStream has a sequence."""
    if not len(stream):
        most = max(len(shard.tokens) for shard in stream.shards)
        none = f"{stream.shards[0].path}: no shard has --seq_len {stream.T} + 1 tokens, only {most}"
        more = "prepare more text (for val: fineweb.py with a larger --val_size and a new --out)"
        raise UserError(f"{none}; lower it, or {more}")


def check_header(path: Path, dtype: str) -> None:
    """Check a file's header before numpy maps it: of a .npy, a zero-size dtype would crash the process.

    A .bin begins with 256 int32: 20240520, version 1, the number of tokens, and zeros.
    """
    if path.suffix == ".bin":
        header, tokens = np.fromfile(path, "<i4", 256), (path.stat().st_size - 1024) / 2
        if header[:3].tolist() != [20240520, 1, tokens]:
            raise ValueError(f"header {header[:3]}, not [20240520 1 {tokens:.12g}]")
        return
    with open(path, "rb") as file:
        major, _ = np.lib.format.read_magic(file)
        shape, _, found = getattr(np.lib.format, f"read_array_header_{major}_0")(file)
    if len(shape) != 1 or found != dtype:
        raise ValueError(f"it holds {found}{list(shape)}, not {dtype}[n]")


def check_shard(shard, manifest: dict) -> None:
    """UserError unless shard and mask have the length that the manifest says, and begin with the tokenizer's ids."""
    path, tokens, mask, n_tokens = shard.path, shard.tokens, shard.mask, manifest["tokenizer"]["vocab_size"]
    listed_tokens = next((s["tokens"] for s in manifest["shards"] if s["name"] == Path(path).name), None)
    for what, length in (("manifest.json", listed_tokens), ("its .mask.npy", None if mask is None else len(mask))):
        if length not in (None, len(tokens)):
            raise UserError(f"{path} has {len(tokens)} tokens and {what} {length}; run fineweb.py --verify")
    largest = int(tokens[: 2**20].max(initial=0))
    if largest >= n_tokens or (len(tokens) > 2**14 and not listed_tokens and largest < 1000):  # a header; characters
        ids = f"ids up to {largest}: not those of {manifest['tokenizer']['name']}, 0 to {n_tokens - 1}"
        raise UserError(f"{path} begins with {ids}; a manifest.json can name another tokenizer")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def choose_checkpoint(paths: list[Path], read, steps: list[int], config, loader: dict, print0) -> dict | None:
    """What `read` finds in the first of these files that is whole, if it is this run's; None for no files.

    steps: of all checkpoints in log_dir.
    """
    for path in paths:
        try:
            saved = read(path)
        except UserError as error:
            advice = f"{config.log_dir} has the checkpoints of steps {steps}"
            if not config.resume_from:
                advice = "no checkpoint of this run can be read; --force starts anew"
            if path == paths[-1] and (config.resume_from or not config.force):
                raise UserError(f"--resume: {error}; {advice}") from error
            print0(f"WARNING: {error}")
        else:
            compare_settings(saved, steps, config, loader, print0)
            return saved
    if os.path.exists(f"{config.log_dir}/log.txt"):
        there = "that can be read" if paths else "yet"
        print0(f"resuming at step 0: {config.log_dir} has no checkpoint {there}")
    return None


def read_whole(path: str | Path, load) -> dict:
    """What `load` reads from a checkpoint. UserError unless it is whole and of train_gpt2.py."""
    try:
        check_archive(path)
        state = load()
        check_checkpoint(state)
        return state
    except Exception as error:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        reason = next((line for line in str(error).split("\n") if "WeightsUnpickler" in line), str(error)).strip()[:150]
        raise UserError(f"{path} is not a whole checkpoint of this trainer ({reason}); use another") from error


def check_archive(path: str | Path) -> None:
    """ValueError unless a checkpoint is as torch.save writes it, and undamaged: torch.load looks at no checksum."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):  # it could be of any size
            raise ValueError("it is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} fails its checksum")


def check_checkpoint(state: dict) -> None:
    """An exception unless it has all keys, and all but the tensors is of the kind that the trainer saved.

    GPT.of looks at the weights, `check_moments` at the rest.
    """
    keys = ("step", "model", "model_config", "optimizer", "loader", "config", "versions")
    if lacking := [key for key in keys if key not in state]:
        raise ValueError(f"it has no {', '.join(lacking)}")
    plain = state["config"] | state["loader"] | (state.get("scaler") or {})
    wrong = [name for name, value in plain.items() if isinstance(value, torch.Tensor)]
    counts = {"step": state["step"], "sample": state["loader"].get("sample")}
    wrong += [name for name, n in counts.items() if type(n) is not int or not 0 <= n < 2**63]
    values = [pair for of in state.get("evaluations", {}).values() for pair in of.items()]
    if not all(type(at) is int and type(value) is float for at, value in values):
        wrong.append("evaluations")
    if wrong:
        raise ValueError(f"{', '.join(wrong)} can't be what a checkpoint holds")


def check_sizes(shape) -> None:
    """UserError unless a train_gpt2.GPTConfig could be that of a model."""
    if not all(isinstance(size, int) and 0 <= size < 2**31 for size in vars(shape).values()) or not shape.n_head:
        raise UserError(f"{shape} is not a valid model shape")
    if shape.n_embd % shape.n_head:
        raise UserError(f"n_embd {shape.n_embd} is not a multiple of n_head {shape.n_head}; heads share it equally")


def check_weights(shape: dict, state: dict) -> None:
    """TypeError or UserError unless these are dense tensors of one precision, at least one for each layer."""
    for name, t in state.items():
        dense = t.is_floating_point() and t.device.type != "meta" and t.is_contiguous()
        if not dense or t.dtype != next(iter(state.values())).dtype:
            raise TypeError(f"{name} is {t.dtype}, {t.layout} on {t.device}")
    if type(shape.get("n_layer")) is int and shape["n_layer"] > len(state):  # building these could take forever
        raise UserError(f"these weights, {len(state)} tensors, are not those of {shape['n_layer']} layers")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless the moments have the shapes of their weights: the fused kernels trust what they are given."""
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            sizes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            if parts := group.get("parts"):  # Muon's momentum is with a group's first matrix, for all of them
                stack = (len(group["params"]) * parts, *sorted((p.shape[0] // parts, p.shape[1])))
                sizes = {"step": (), "momentum": stack} if i == 0 else {}
            moments = optimizer.state.get(p, {})
            found = {name: moment.shape for name, moment in moments.items()}
            fit = all(moment.is_contiguous() and moment.is_floating_point() for moment in moments.values())
            if found != sizes or not fit:
                raise ValueError(f"{found} beside {sizes}")


# ----------------------------------------------------------------------------------------------------------------------
# The run directory


def check_log(config) -> None:
    """UserError for a log.txt without checkpoints, unless it is a run's of ours that died before its first save.

    That may have failed, on a full disk: then the log says "unsaved".
    """
    log = Path(config.log_dir, "log.txt")
    if not os.path.exists(log) or list(log.parent.glob("ckpt_*.pt")):
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    done = max(map(int, re.findall(r"^(\d{1,15}) train ", text, re.M)), default=0)
    lost = done > 2 * config.save_every > 0 and "\n# unsaved " not in text  # the first save ends before the second
    if text and (lost or not text.startswith("# config {")):
        there = f"{config.log_dir} has a log.txt but no checkpoint to resume from"
        raise UserError(f"{there}; choose another --log_dir")


def lock_log(file) -> None:
    """UserError if another process trains in the directory of this open log.txt; else none can until it is closed."""

    def owner() -> str:
        text = Path(file.name).read_text(encoding="utf-8", errors="replace")
        said = re.findall(r'"host": "(.*?)", "pid": (\d+)', text)
        return "process {1} on {0}".format(*said[-1]) if said else "another process"

    lock(file, owner)


def compare_settings(saved: dict, steps: list[int], config, loader: dict, print0) -> None:
    """UserError if this run can't go on from checkpoint `saved`; else say what changed. steps: of all in log_dir."""
    if "evaluations" not in saved:  # an older version's: they are in its log alone
        log = Path(config.log_dir, "log.txt")
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        logged = {int(step): float(value) for step, value in re.findall(r"^(\d{1,15}) val (\d+\.\d+)$", text, re.M)}
        saved["evaluations"] = {"val": {step: value for step, value in logged.items() if step <= saved["step"]}}
    if later := [step for step in steps if step > saved["step"]] if config.resume_from else []:
        print0(f"resuming at step {saved['step']}; later checkpoints stay until this run overtakes them: {later}")
    known = {key: value for key, value in saved["loader"].items() if value is not None}  # without this file: no "data"
    before, now = saved["config"] | known, asdict(config) | loader
    changed = {key: f"{key} was {before[key]}, is {now[key]}" for key in now if before.get(key, now[key]) != now[key]}
    if shape := "; ".join(changed[key] for key in changed if key in SHAPE):
        same = "(0 = from --model); give the flags it was made with, or another --log_dir"
        raise UserError(f"{config.log_dir} can't go on with weights of another shape: {shape} {same}")
    others = "; ".join(changed[key] for key in changed if key in FIXED)
    if others and not config.force:
        raise UserError(f"{config.log_dir} can't go on as the same run: {others}; --force does it all the same")
    if told := "; ".join(changed[key] for key in changed if key not in ("resume", "resume_from", "force")):
        print0(f"resuming with other settings: {told}")
    if config.init_from:
        print0(f"--init_from {config.init_from} is not used: the run goes on from its own checkpoint")


def bad_step(meter, step: int, loss: float, norm: float) -> None:
    """Warn of a skipped update, the last of meter.bad_steps in a row. UserError after MAX_BAD_STEPS."""
    meter.run.ranks.print0(f"WARNING: step {step}: loss {loss}, gradient norm {norm}; the update is skipped")
    meter.log.write(step, skipped=1)
    if meter.bad_steps >= MAX_BAD_STEPS:
        better = "--resume, or --resume PATH of an older checkpoint, with a lower --max_lr or --dtype float32"
        raise UserError(f"{meter.bad_steps} steps in a row without a finite gradient, up to {step}; {better}")


def require_room(config, model) -> None:
    """UserError unless --log_dir takes files, and has room for all checkpoints."""
    log_dir, size = config.log_dir, 12 * sum(p.numel() for p in model.parameters())  # weights and two moments
    needed = (config.keep_checkpoints + 2) * size  # and the best one, and one that is being written
    needed -= sum(path.stat().st_size for path in Path(log_dir).glob("ckpt_*"))  # half a one is removed before
    if needed > (free := shutil.disk_usage(log_dir).free):
        there = f"{log_dir} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed for checkpoints"
        raise UserError(f"{there}; free some, lower --keep_checkpoints, or choose another --log_dir")
    with user_error(f"no checkpoint could be saved in {log_dir}", OSError):
        (probe := Path(log_dir, "ckpt_probe.tmp")).write_bytes(b"x" * 4096)
        probe.unlink()
