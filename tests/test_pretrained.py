"""Weights in and out: transformers' directories of every form, other trainers' checkpoints, and what does not fit."""

import argparse
import http.server
import importlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import zipfile
from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import SHAPES, reference
from tiny import ROOT, USER_ERRORS

from extras import pretrained
from extras.pretrained import find_checkpoint, load_any
from extras.tokenizer import load_tokenizer
from train_gpt2 import GPT, GPTConfig

IDS = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs():
    return reference(SHAPES["gpt2"]).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """What transformers' save_pretrained writes."""
    folder = tmp_path_factory.mktemp("gpt2")
    theirs.save_pretrained(folder)
    return folder


def copied(folder, tmp_path, **changes):
    """A copy of the directory with other values in its config.json."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def save_tensors(path, tensors: dict) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def tensors_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("size", SHAPES)
def test_what_transformers_wrote_is_read(size, tmp_path):
    theirs = reference(SHAPES[size], seed=3).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=0)
    assert ours.config == GPTConfig(32, 300, **SHAPES[size])
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in ours.parameters())


def test_every_form_of_weights_gives_the_same_model(theirs, folder, tmp_path):
    expected = GPT.from_pretrained(str(folder)).state_dict()
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    mask = {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    forms = {name: tmp_path / name for name in ("sharded", "bin", "sharded bin", "old bin", "as released", "half")}
    for form in forms.values():
        form.mkdir()
        (form / "config.json").write_bytes((folder / "config.json").read_bytes())
    theirs.save_pretrained(forms["sharded"], max_shard_size="40KB")
    assert len(list(forms["sharded"].glob("model-*.safetensors"))) > 2
    torch.save(theirs.state_dict(), forms["bin"] / "pytorch_model.bin")
    torch.save(state, forms["old bin"] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    save_tensors(forms["as released"] / "model.safetensors", bare | mask)
    names = list(state)
    index = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(names)}
    for file in set(index.values()):
        torch.save({name: state[name] for name in names if index[name] == file}, forms["sharded bin"] / file)
    (forms["sharded bin"] / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    save_tensors(forms["half"] / "model.safetensors", {name: tensor.bfloat16() for name, tensor in bare.items()})
    for name, form in forms.items():
        found = GPT.from_pretrained(str(form)).state_dict()
        for key, tensor in found.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, expected[key].bfloat16().float() if name == "half" else expected[key]), (
                name,
                key,
            )


def test_one_function_reads_all_there_is(folder, tmp_path):
    model = GPT.from_pretrained(folder)
    (tmp_path / "log").mkdir()
    saved = {"model": model.state_dict(), "model_config": vars(model.config)}
    torch.save(saved, tmp_path / "log" / "ckpt_000002.pt")
    torch.save(saved | {"model": {}}, tmp_path / "log" / "ckpt_000001.pt")
    for source in (tmp_path / "log", str(tmp_path / "log" / "ckpt_000002.pt")):  # the hub is another test's
        assert torch.equal(GPT.from_pretrained(source)(IDS)[0], model(IDS)[0])
        assert torch.equal(GPT.from_pretrained(source, block_size=20)(IDS[:, :20])[0], model(IDS[:, :20])[0])


def test_the_block_is_cropped_on_request(folder):
    whole, short = GPT.from_pretrained(str(folder)), GPT.from_pretrained(str(folder), block_size=20)
    assert short.config.block_size == 20 and short.transformer.wpe.weight.shape == (20, 32)
    assert torch.equal(short(IDS[:, :20])[0], whole(IDS[:, :20])[0])
    with pytest.raises(USER_ERRORS, match=r"block_size 33 .* 32"):
        GPT.from_pretrained(str(folder), block_size=33)


def test_a_hub_name_is_read_from_the_cache(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    copied(folder, snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(GPT.from_pretrained("someone/tiny")(IDS)[0], GPT.from_pretrained(str(folder))(IDS)[0])
    with pytest.raises(USER_ERRORS, match="someone/other is not here, and the hub can't be reached"):
        GPT.from_pretrained("someone/other")
    (tmp_path / "log" / "a").mkdir(parents=True)
    (tmp_path / "log" / "a" / "ckpt_000001.pt").touch()
    with pytest.raises(USER_ERRORS, match=r"log/b is not there; .*log holds a$"):
        GPT.from_pretrained(str(tmp_path / "log" / "b"))
    with pytest.raises(USER_ERRORS, match=r"has no config.json; .*; there is a run in .*log/a$"):
        GPT.from_pretrained(str(tmp_path / "log"))
    with pytest.raises(USER_ERRORS, match="no name for one on the hub"):
        GPT.from_pretrained("some/where/else")
    with pytest.raises(USER_ERRORS, match=r"config.json is the configuration alone; name the directory"):
        GPT.from_pretrained(str(folder / "config.json"))


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers like the hub, with the files of server.folder as the model a/b."""

    protocol_version, commit = "HTTP/1.1", "0123456789abcdef0123456789abcdef01234567"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, folder = self.path.partition("?")[0], self.server.folder
        files = sorted(file.name for file in folder.iterdir())
        entries = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0"} for name in files]
        body = json.dumps({"id": "a/b", "sha": self.commit} if "/revision/" in path else entries).encode()
        if path.startswith("/a/b/resolve/"):
            body = (folder / path.rpartition("/")[2]).read_bytes()
            self.server.served.append(path.rpartition("/")[2])
        self.send_response(200 if path.startswith(("/a/b", "/api/models/a/b")) else 404)
        about = {"Content-Length": len(body), "ETag": f'"{hash(body)}"', "X-Repo-Commit": self.commit}
        about |= {} if "/a/b" in path else {"X-Error-Code": "RepoNotFound"}
        for name, value in about.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")


FROM_HUB = """
import sys
from train_gpt2 import GPT
for name in sys.argv[1:]:
    try:
        print(float(GPT.from_pretrained(name).transformer.wpe.weight.double().sum()))
    except ValueError as error:
        print(error)
"""


def test_of_a_hub_repository_only_what_is_needed_is_fetched(theirs, folder, tmp_path):
    """In processes of their own: the library reads the address when it is imported."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pickled, both = (tmp_path / name for name in ("pickled", "both"))
    for form in (pickled, both):
        form.mkdir()
        torch.save(theirs.state_dict(), form / "pytorch_model.bin")
        (form / "config.json").write_bytes((folder / "config.json").read_bytes())
        (form / "tf_model.h5").write_bytes(b"large")
    theirs.save_pretrained(both, max_shard_size="40KB")
    expected = float(GPT.from_pretrained(folder).transformer.wpe.weight.double().sum())
    for form, wanted in ((pickled, {"pytorch_model.bin"}), (both, {f.name for f in both.glob("model*")})):
        server.folder, server.served = form, []
        about = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        about |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / f"home {form.name}")}
        command = [sys.executable, "-c", FROM_HUB, "a/b", "a/c"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | about, cwd=ROOT)
        lines = done.stdout.splitlines()
        assert len(lines) == 2 and float(lines[0]) == expected, done.stderr
        assert "a/c is not here, and the hub did not give it: RepositoryNotFoundError" in lines[1]
        assert set(server.served) == wanted | {"config.json"}
    server.shutdown()
    server.server_close()


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def spoil(folder, how: str) -> None:
    """Make a good directory a bad one."""
    weights = folder / "model.safetensors"
    tensors = tensors_of(folder)
    if how == "missing":
        del tensors["transformer.h.1.mlp.c_fc.bias"]
    elif how == "shape":
        tensors["transformer.wpe.weight"] = torch.zeros(31, 32)
    elif how == "extra":
        tensors["transformer.h.3.ln_1.bias"] = torch.zeros(32)
    elif how == "ints":
        tensors["transformer.wpe.weight"] = torch.zeros(32, 32, dtype=torch.int64)
    elif how == "nan":
        tensors["transformer.wpe.weight"][3, 4] = torch.nan
    elif how == "head":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_tensors(weights, tensors)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif how == "header":  # it claims to be half of all that 64 bits can count
        weights.write_bytes(struct.pack("<Q", 2**63) + weights.read_bytes()[8:])
    elif how == "git-lfs":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 548105171\n")
    elif how == "no weights":
        weights.unlink()
    elif how == "no shard":
        weights.unlink()
        save_tensors(folder.parent / "outside.safetensors", tensors)  # it is there, but not in the directory
        index = {"weight_map": {"a": "model-1.safetensors", "b": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "no map":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')
    elif how == "numbers":
        weights.unlink()
        torch.save({1: torch.zeros(2)}, folder / "pytorch_model.bin")
    elif how == "pickle":
        weights.unlink()
        bomb = Bomb()
        bomb.path = folder / "exploded"
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"transformer.wte.weight": bomb}, protocol=2))
    elif how == "no json":
        (folder / "config.json").write_text("{")
    elif how == "deep json":
        (folder / "config.json").write_text("[" * 100_000)
    elif how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "how, changes, words",
    [
        ("missing", {}, "transformer.h.1.mlp.c_fc.bias is missing"),
        ("shape", {}, r"transformer.wpe.weight is \(31, 32\), not \(32, 32\)"),
        ("extra", {}, "transformer.h.3.ln_1.bias is not GPT-2's"),
        ("head", {}, "lm_head.weight differs from wte.weight"),
        ("ints", {}, "transformer.wpe.weight holds torch.int64"),
        ("nan", {}, "is spoilt: 1 of its weights hold nan or inf, the first is transformer.wpe.weight"),
        ("truncated", {}, "model.safetensors is damaged"),
        ("header", {}, "model.safetensors is damaged"),
        ("git-lfs", {}, "git lfs pull"),
        ("garbage", {}, "model.safetensors is damaged"),
        ("no weights", {}, "no weights"),
        ("no shard", {}, "not there: .*outside.safetensors, model-1.safetensors"),
        ("no map", {}, "index.json names files that are not there: none at all"),
        ("numbers", {}, "pytorch_model.bin holds other things"),
        ("pickle", {}, r"pytorch_model.bin wants \w+.mkdir to be called, and nothing in a file is"),
        ("no json", {}, "can't read .*config.json"),
        ("deep json", {}, "can't read .*config.json"),
        ("no config", {}, "has no config.json"),
        ("", {"model_type": "llama"}, "is a llama, not a GPT-2"),
        ("", {"activation_function": "relu"}, "not a plain GPT-2: .*relu"),
        ("", {"layer_norm_epsilon": 1e-6}, "not a plain GPT-2: .*1e-06"),
        ("", {"n_inner": 96}, "not a plain GPT-2: .*96"),
        ("", {"n_embd": None}, "no sensible number for n_embd"),
        ("", {"n_head": 0}, "no sensible number for n_head"),
        ("", {"n_layer": 2**12 + 1}, "no sensible number for n_layer"),
        ("", {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ("", {"n_layer": 2}, "transformer.h.2.* is not GPT-2's.*more"),
        ("", {"vocab_size": 299}, r"wte.weight is \(300, 32\), not \(299, 32\)"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, how, changes, words):
    copied(folder, tmp_path, **changes)
    spoil(tmp_path, how)
    with pytest.raises(USER_ERRORS, match=words) as raised:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_may_not_be_read_are_named(folder, tmp_path, monkeypatch, name):
    """They that read tensors say there is no such file, or what the system says; our own look at it is denied, too."""
    copied(folder, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    def absent(path, *_, **__):
        raise FileNotFoundError(f"No such file or directory: {path}")

    monkeypatch.setattr("safetensors.torch.load_file", absent)
    monkeypatch.setattr(torch, "load", denied)
    monkeypatch.setattr(pretrained, "open", denied, raising=False)
    with pytest.raises(USER_ERRORS, match=rf"{name} can't be read: Permission denied$"):
        GPT.from_pretrained(str(tmp_path))


def test_what_the_system_says_while_weights_are_read_is_told(folder, tmp_path, monkeypatch):
    copied(folder, tmp_path)

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("safetensors.torch.load_file", broken)
    with pytest.raises(USER_ERRORS, match=r"model.safetensors can't be read: Input/output error$"):
        GPT.from_pretrained(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints of other trainers


@dataclass
class TheirConfig:  # as build-nanogpt pickles it, by the name of its script's class
    block_size: int = 32
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


TheirConfig.__module__, TheirConfig.__qualname__ = "__main__", "GPTConfig"


def test_a_checkpoint_of_build_nanogpt_is_read(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 50304, 2, 2, 16))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "model_19072.pt"
    with monkeypatch.context() as patch:  # pickle looks for the class when it writes; later there is none of that name
        patch.setattr(sys.modules["__main__"], "GPTConfig", TheirConfig, raising=False)
        torch.save({"model": state, "config": TheirConfig(), "step": 19072, "val_loss": 3.07}, path)
    loaded = GPT.of(*load_any(str(path)))
    assert loaded.config == model.config and loaded.config.n_tokens == 50257
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_is_read(tmp_path, bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 2, 2, 16))
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": bias, "vocab_size": 65, "dropout": 0.1}
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items() if bias or "bias" not in name}
    saved = {"model": state, "optimizer": {}, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(3.0)}
    torch.save(saved | {"config": {"batch_size": 12}}, tmp_path / "ckpt.pt")
    loaded = GPT.from_checkpoint(tmp_path / "ckpt.pt")
    assert loaded.config == model.config
    assert torch.equal(loaded(IDS % 65)[0], model(IDS % 65)[0])


def test_a_checkpoint_that_would_execute_something_is_refused(tmp_path):
    bomb = Bomb()
    bomb.path = tmp_path / "exploded"
    torch.save({"model": {}, "config": bomb}, tmp_path / "a.pt")
    with pytest.raises(USER_ERRORS, match=r"wants \w+.mkdir to be called, and nothing in a file is"):
        GPT.from_checkpoint(tmp_path / "a.pt")
    assert not bomb.path.exists()


class Harmless:
    """An object of a class that is not there when the checkpoint is read."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


Harmless.__module__, Harmless.__qualname__ = "some.module", "Settings"


def save_foreign(file, monkeypatch, **content):
    with monkeypatch.context() as patch:
        module = type(sys)("some.module")
        module.Settings = Harmless
        patch.setitem(sys.modules, "some", type(sys)("some"))
        patch.setitem(sys.modules, "some.module", module)
        torch.save(content, file)


def test_harmless_objects_beside_the_weights_do_no_harm(tmp_path, monkeypatch):
    model = GPT(GPTConfig(32, 65, 2, 2, 16))
    sizes = {name: size for name, size in vars(model.config).items() if name != "n_tokens"}
    rng = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    extras = {"best": np.float64(3.1), "losses": np.arange(3.0), "rng": rng, "path": Path("a"), "when": date.today()}
    extras |= {"args": argparse.Namespace(lr=np.float32(1)), "counts": defaultdict(int), "line": deque(), "kind": Bomb}
    extras |= {"complex": 1j, "range": range(3), "device": torch.device("cpu"), "set": {1}, "bytes": b"a"}
    save_foreign(tmp_path / "a.pt", monkeypatch, model=model.state_dict(), config=Harmless(**sizes), **extras)
    loaded = GPT.from_checkpoint(tmp_path / "a.pt")
    assert loaded.config == model.config and torch.equal(loaded(IDS % 65)[0], model(IDS % 65)[0])


@pytest.mark.parametrize("call", ["subprocess.call", "builtins.eval", "shutil.rmtree", "train_gpt2.main"])
def test_nothing_that_a_checkpoint_names_is_called(tmp_path, monkeypatch, call):
    module, name = call.split(".")
    called, function = [], getattr(importlib.import_module(module), name)
    monkeypatch.setattr(f"{call}", lambda *_: called.append(call)) if module != "builtins" else None
    target = tmp_path / "exploded"

    class Caller:
        def __reduce__(self):
            return Named, (f"open({str(target)!r}, 'w')",)

    Named = type("Named", (), {})
    Named.__module__, Named.__qualname__ = module, name
    with monkeypatch.context() as patch:
        patch.setattr(f"{call}", Named)
        torch.save({"model": GPT(GPTConfig(32, 65, 1, 1, 8)).state_dict(), "x": Caller()}, tmp_path / "a.pt")
    assert function is not Named
    with pytest.raises(USER_ERRORS):  # it has no sizes; what matters is that it went as far
        GPT.from_checkpoint(tmp_path / "a.pt")
    assert not called and not target.exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off_in_any_order(folder, tmp_path, prefix):
    model = GPT(GPTConfig(32, 65, 2, 2, 16))
    state = {prefix + name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "model_args": vars(model.config)}, tmp_path / "ckpt.pt")
    assert torch.equal(GPT.of(*load_any(str(tmp_path)))(IDS % 65)[0], model(IDS % 65)[0])
    copied(folder, tmp_path)  # the same in a directory of transformers
    tensors = {prefix + name: tensor for name, tensor in tensors_of(folder).items()}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "ckpt.pt").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected = GPT.from_pretrained(str(folder))
    assert torch.equal(GPT.from_pretrained(str(tmp_path))(IDS)[0], expected(IDS)[0])


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_pytorch_tanh", "gelu_accurate", "gelu_python_tanh"])
def test_other_names_of_the_same_activation_are_understood(theirs, folder, tmp_path, name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 1000)
    torch.testing.assert_close(ACT2FN[name](x), ACT2FN["gelu_new"](x), atol=1e-6, rtol=0)
    ours = GPT.from_pretrained(str(copied(folder, tmp_path, activation_function=name)))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-5, rtol=0)


def test_the_newest_checkpoint_of_a_directory_is_read_by_number(tmp_path):
    def newest(*names):
        folder = tmp_path / f"of {names[0]}"
        folder.mkdir()
        for name in (*names, "model_x.pt", "ckpt_7.pt.tmp", "log.txt"):
            (folder / name).touch()
        return find_checkpoint(f"{folder}/").name

    assert newest("ckpt_999999.pt", "ckpt_1000000.pt", "ckpt_000005.pt") == "ckpt_1000000.pt"
    assert newest("model_05000.pt", "model_19072.pt", "model_100000.pt") == "model_100000.pt"
    assert newest("ckpt.pt") == "ckpt.pt" and find_checkpoint("gpt2") is None


@pytest.mark.parametrize("how", ["flipped", "compressed", "cut short"])
def test_a_damaged_file_is_refused_whoever_wrote_it(folder, tmp_path, how):
    copied(folder, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors_of(folder), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= how == "flipped"
    path.write_bytes(data[: -100 if how == "cut short" else None])
    if how == "compressed":  # a zip bomb would be
        with zipfile.ZipFile(path) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in entries:
                archive.writestr(*entry)
    for read in (lambda: GPT.from_pretrained(str(tmp_path)), lambda: checkpoint_of(path)):
        with pytest.raises(USER_ERRORS, match="is damaged, or holds no weights") as raised:
            read()
        assert "\x1b" not in str(raised.value) and "\n" not in str(raised.value)


def checkpoint_of(path):
    path.replace(path.with_suffix(".pt"))
    return GPT.from_checkpoint(path.with_suffix(".pt"))


def test_a_file_of_weights_is_no_checkpoint(folder):
    with pytest.raises(USER_ERRORS, match="is the weights alone; name the directory"):
        load_any(str(folder / "model.safetensors"))


@pytest.mark.parametrize("saved", [{"model": {}}, {"model": 3, "model_args": {"n_layer": 2}}, {"weights": {}}, [1, 2]])
def test_a_foreign_checkpoint_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(USER_ERRORS, match="checkpoint"):
        GPT.from_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_with_a_missing_weight_is_refused(tmp_path):
    model = GPT(GPTConfig(32, 65, 2, 2, 16))
    state = model.state_dict()
    del state["transformer.ln_f.bias"]
    torch.save({"model": state, "model_config": vars(model.config)}, tmp_path / "a.pt")
    with pytest.raises(USER_ERRORS, match=r"transformer.ln_f.bias"):
        GPT.from_checkpoint(tmp_path / "a.pt")


WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"


@pytest.mark.parametrize(
    "weights, sizes, words",
    [
        ({3: torch.zeros(2)}, {}, "its model is not a dict of names and dense tensors"),
        ({WPE: torch.zeros(32, 16).to_sparse()}, {}, "dense tensors"),
        ({WPE: torch.zeros(32, 16, device="meta")}, {}, "dense tensors"),
        ({WPE: torch.zeros(1).expand(2**20, 2**20)}, {"block_size": 2**20, "n_embd": 2**20}, "dense tensors"),
        ({WPE: torch.zeros(32, 16, dtype=torch.float8_e4m3fn)}, {}, "wpe.weight holds torch.float8_e4m3fn"),
        ({"lm_head.weight": torch.zeros(65, 16, dtype=torch.float8_e4m3fn)}, {}, "lm_head.weight holds torch.float8"),
        ({}, {"n_tokens": "x"}, "no sensible number for n_tokens"),
        ({}, {"n_tokens": 3.5}, "no sensible number for n_tokens"),
        ({}, {"n_tokens": None}, "no sensible number for n_tokens"),
        ({}, {"n_tokens": 66}, "no sensible number for n_tokens"),
        ({}, {"n_tokens": -3}, "no sensible number for n_tokens"),
        ({}, {"n_layer": 2**12 + 1}, "no sensible number for n_layer"),
        ({}, {"n_embd": 2**20 + 1, "block_size": 0}, "no sensible number for block_size, n_embd"),
        ({}, {"n_head": True}, "no sensible number for n_head"),
        ({WTE: torch.full((65, 16), torch.nan)}, {}, "spoilt: 1 of its weights hold nan or inf, the first is .*wte"),
    ],
)
def test_a_strange_checkpoint_is_one_line(tmp_path, weights, sizes, words):
    model = GPT(GPTConfig(32, 65, 2, 2, 16))
    state = model.state_dict() | weights
    if WTE in weights:
        state["lm_head.weight"] = state[WTE]  # as a run saves it that went astray
    torch.save({"model": state, "model_config": vars(model.config) | sizes}, tmp_path / "a.pt")
    with pytest.raises(USER_ERRORS, match=words) as raised:
        GPT.from_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)


def test_a_configuration_of_tensors_is_refused(tmp_path):
    torch.save({"model": {}, "model_config": torch.zeros(2)}, tmp_path / "a.pt")  # which is neither true nor false
    with pytest.raises(USER_ERRORS, match="no sensible number for block_size"):
        GPT.from_checkpoint(tmp_path / "a.pt")


# ----------------------------------------------------------------------------------------------------------------------
# Out

ROUND_TRIP = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
folder, text = sys.argv[1], sys.argv[2]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
x = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(x["input_ids"]).logits
greedy = model.generate(**x, max_new_tokens=100, do_sample=False)[0].tolist()
said = pipeline("text-generation", model=folder)(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
torch.save({"ids": x["input_ids"], "logits": logits, "greedy": greedy, "said": said,
            "problems": {k: list(v) for k, v in info.items() if v}, "n": len(tokenizer), "type": type(model).__name__},
           folder + "/result.pt")
assert "train_gpt2" not in sys.modules
"""
TEXT = "It's 12 o'clock,  naïve  café — 東京!\n\n\tdef f(x):  return x\r\n 🦙 don't"


@pytest.mark.parametrize("n_tokens, vocab_size, name", [(50257, 50304, "gpt2"), (257, 384, "bytes")])
def test_a_round_trip_through_transformers_in_a_fresh_process(tmp_path, n_tokens, vocab_size, name):
    torch.manual_seed(5)
    model = GPT(GPTConfig(256, vocab_size, 2, 4, 32, n_tokens=n_tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
        model.transformer.wte.weight[n_tokens:] = 50.0
    folder = tmp_path / "deep" / "exported"
    model.save_pretrained(str(folder))
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ROUND_TRIP, str(folder), TEXT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result, tokenizer = torch.load(folder / "result.pt"), load_tokenizer(name)
    assert result["problems"] == {} and result["n"] == n_tokens and result["type"] == "GPT2LMHeadModel"
    assert result["ids"][0].tolist() == tokenizer.encode(TEXT)
    with torch.no_grad():
        ours = model(result["ids"])[0]
    torch.testing.assert_close(result["logits"], ours[..., :n_tokens], atol=1e-4, rtol=1e-5)
    greedy = model.generate(result["ids"], 100, temperature=0, stop=tokenizer.eot)[0].tolist()
    assert len(greedy) == result["ids"].shape[1] + 100 and result["greedy"] == greedy
    assert result["said"] == tokenizer.decode(greedy[: len(result["ids"][0]) + 5])
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids == tokenizer.encode(TEXT)
    # transformers 4 would by default take spaces out of what it decodes
    assert json.loads((folder / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is False
    back = GPT.from_pretrained(str(folder))
    assert back.config.vocab_size == n_tokens and back.config.block_size == 256
    assert torch.equal(back(result["ids"])[0], ours[..., :n_tokens])


LAYOUTS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(0, 250, 7)[None]
    with torch.no_grad():
        logits = model(ids).logits
    greedy = model.generate(ids[:, :4], attention_mask=torch.ones(1, 4), max_new_tokens=100, do_sample=False)
    torch.save({"ids": ids, "logits": logits, "greedy": greedy[0]}, folder + "/result.pt")
"""


def test_every_layout_is_the_same_model_in_a_fresh_process(tmp_path):
    models, command = {}, [sys.executable, "-c", LAYOUTS]
    for size, shape in SHAPES.items():
        torch.manual_seed(len(models))
        models[size] = GPT(GPTConfig(128, 384, **shape, n_tokens=257)).eval()
        with torch.no_grad():
            for parameter in models[size].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        models[size].save_pretrained(str(tmp_path / size))
        command.append(str(tmp_path / size))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for size, model in models.items():
        result = torch.load(tmp_path / size / "result.pt")
        with torch.no_grad():
            torch.testing.assert_close(model(result["ids"])[0][..., :257], result["logits"], atol=1e-4, rtol=1e-5)
        greedy = model.generate(result["ids"][:, :4], 100, temperature=0, stop=256)[0]
        ends = (result["greedy"] == 256).nonzero()  # transformers stops there, we repeat it
        length = int(ends[0]) + 1 if len(ends) else 104
        assert torch.equal(greedy[:length], result["greedy"]), size


@pytest.fixture(scope="module")
def small() -> GPT:
    return GPT(GPTConfig(32, 65, 2, 2, 16))


def test_config_names_what_readers_ask_for(small, tmp_path):
    small.save_pretrained(str(tmp_path / "a"))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32  # llama.cpp's converter reads n_ctx
    assert config["layer_norm_epsilon"] == 1e-5 and config["eos_token_id"] == 64
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert len(modes) == 1  # who may read the configuration may read the weights
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # 65 tokens: nobody knows which  # fmt: skip


def test_nothing_is_overwritten(small, tmp_path):
    (tmp_path / "a").mkdir()
    small.save_pretrained(str(tmp_path / "a"))  # empty: fine
    before = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    for name in ("a", "a/config.json"):
        with pytest.raises(USER_ERRORS, match="is there already"):
            small.save_pretrained(str(tmp_path / name))
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(USER_ERRORS, match="can't write"):
        small.save_pretrained(str(tmp_path / "a" / "config.json" / "b"))


def test_a_save_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "write_tokenizer", fail)
    with pytest.raises(USER_ERRORS, match="disk full"):
        small.save_pretrained(str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
