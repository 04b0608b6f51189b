"""
A token set on disk, as fineweb.py writes it: opened and checked, before anybody trusts it.

`DIR/edufineweb_{train|val}_{index:06d}.npy`, 1-D uint16; a companion `....mask.npy`, uint8, where only some tokens are
training targets; `DIR/manifest.json`. A directory without a manifest (build-nanogpt's) holds GPT-2 tokens.
"""

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError


@dataclass(frozen=True)
class Shard:
    path: str
    tokens: np.ndarray  # (n,) uint16, memory-mapped
    targets: np.ndarray | None  # (n,) uint8, 1 where the token is a training target; None: everywhere


def read_manifest(data_dir: str) -> dict:
    """What fineweb.py says of a token set; for a directory without manifest.json (build-nanogpt's), GPT-2 tokens."""
    path = Path(data_dir) / "manifest.json"
    if not path.is_file():
        return {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "shards": [], "complete": True, "source": None}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["tokenizer"]["name"], manifest["tokenizer"]["vocab_size"], manifest["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); run fineweb.py again") from error
    if not manifest.get("complete"):
        raise UserError(f"{data_dir} is not finished; run fineweb.py again, with the same flags: it goes on")
    return manifest


def open_shards(data_dir: str, split: str, manifest: dict) -> list[Shard]:
    """Memory-map the shards of a split, in order. UserError for none, or for one that is not what it should be."""
    paths = sorted(p for p in glob.glob(f"{glob.escape(data_dir)}/*_{split}_*.npy") if not p.endswith(".mask.npy"))
    listed = {shard["name"]: shard["tokens"] for shard in manifest["shards"] if shard["split"] == split}
    missing = sorted(set(listed) - {os.path.basename(path) for path in paths})
    if missing:
        raise UserError(f"{data_dir} lacks {', '.join(missing[:3])} of manifest.json; run fineweb.py --verify")
    strays = [path for path in paths if listed and os.path.basename(path) not in listed]
    if strays:
        raise UserError(f"{strays[0]} is not in manifest.json: it belongs to another set; move it away")
    if not paths:
        raise UserError(f"no {split} shards in {data_dir!r}; run fineweb.py first, or point --data_dir at its output")
    return [open_shard(path, listed.get(os.path.basename(path))) for path in paths]


def open_shard(path: str, listed_tokens: int | None) -> Shard:
    def load(path, dtype):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a whole .npy file ({error}); run fineweb.py --verify") from error
        if array.ndim != 1 or array.dtype != dtype:
            raise UserError(f"{path} holds {array.dtype}{list(array.shape)}, not {dtype}[n]; run fineweb.py again")
        return array

    tokens, mask_path = load(path, "uint16"), path.removesuffix(".npy") + ".mask.npy"
    targets = load(mask_path, "uint8") if os.path.exists(mask_path) else None
    for what, length in (("manifest.json", listed_tokens), (mask_path, None if targets is None else len(targets))):
        if length not in (None, len(tokens)):
            raise UserError(f"{path} has {len(tokens)} tokens and {what} {length}; run fineweb.py --verify")
    return Shard(path, tokens, targets)


def fingerprint(shards: list[Shard], manifest: dict) -> str:
    """What tells one token set from another: names, lengths, and checksums or else the first tokens."""
    sums = {shard["name"]: [shard.get("sha256"), shard.get("mask_sha256")] for shard in manifest["shards"]}
    names = [os.path.basename(shard.path) for shard in shards]
    facts = [[n, len(s.tokens), sums.get(n) or s.tokens[:1024].tolist()] for n, s in zip(names, shards)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def bytes_per_token(manifest: dict, split: str) -> float | None:
    """UTF-8 bytes of text for each token of a split, None if the manifest does not know."""
    shards = [shard for shard in manifest["shards"] if shard["split"] == split]
    tokens = sum(shard["tokens"] for shard in shards)
    return sum(shard.get("bytes", 0) for shard in shards) / tokens or None if tokens else None
