"""Instruction data: whatever cuts, shuffles or kills the work, the answers are the targets, and a model learns them."""

import hashlib
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fineweb import build, build_with_deaths, contents, split_documents
from tiny import tiny_config, token_set

import fineweb
import sample
import train_gpt2
from extras import readers
from extras import tokenize_workers as workers
from extras.cli import UserError
from extras.tokenizer import END, alpaca_prompt, encode_chat, encode_prompt, load_tokenizer

EOT = "<|endoftext|>"
ALPACA = [  # record, and its text, an answer between « and »
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, f"Instruction: Add.\n\nInput: 1 2\n\nAnswer:« 3{EOT}»"),
    ({"instruction": "Greet.", "output": "Hi\nthere"}, f"Instruction: Greet.\n\nAnswer:« Hi\nthere{EOT}»"),
    ({"instruction": "A\n", "input": "", "output": " B "}, f"Instruction: A\n\n\nAnswer:«  B {EOT}»"),
    ({"instruction": "é👩", "input": None, "output": "中 é"}, f"Instruction: é👩\n\nAnswer:« 中 é{EOT}»"),
    (
        {"instruction": "x" * 90, "input": " ", "output": "y" * 90},
        f"Instruction: {'x' * 90}\n\nAnswer:« {'y' * 90}{EOT}»",
    ),
]
CHAT = [
    ("user a, assistant b", f"User: a\n\nAssistant:« b{EOT}»"),
    ("system s, user a, assistant b c", f"System: s\n\nUser: a\n\nAssistant:« b c{EOT}»"),
    (
        "user a, assistant b, user c, system d, assistant e",
        f"User: a\n\nAssistant:« b{EOT}»\n\nUser: c\n\nSystem: d\n\nAssistant:« e{EOT}»",
    ),
    ("assistant hello, user é, assistant 中", f"Assistant:« hello{EOT}»\n\nUser: é\n\nAssistant:« 中{EOT}»"),
    ("user a, assistant b, assistant c", f"User: a\n\nAssistant:« b{EOT}»\n\nAssistant:« c{EOT}»"),
]


def chat(line: str) -> dict:
    turns = (turn.split(" ", 1) for turn in line.split(", "))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FORMATS = {"alpaca": ALPACA, "chat": [(chat(line), text) for line, text in CHAT]}


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reference(texts: list[str], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, a document and a piece of it at a time."""
    tokenizer, ids, mask = load_tokenizer(name), [], []
    for text in texts:
        ids, mask = [*ids, tokenizer.eot], [*mask, 0]
        for piece in re.split("(«.*?»)", text, flags=re.DOTALL):
            answer = piece.startswith("«")
            new = tokenizer.encode(piece.strip("«»").removesuffix(EOT)) + [tokenizer.eot] * answer
            ids, mask = ids + new, mask + [int(answer)] * len(new)
    return np.array(ids), np.array(mask)


def stored(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """All tokens and masks of a finished set. Nothing else may lie there, and the manifest must tell the truth."""
    manifest, ids, masks = json.loads((out / "manifest.json").read_text()), [], []
    assert manifest["complete"]
    for shard in manifest["shards"]:
        paths = [out / shard["name"], out / shard["name"].replace(".npy", ".mask.npy")]
        assert [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths] == [shard["sha256"], shard["mask_sha256"]]
        tokens, mask = (np.load(path) for path in paths)
        assert (tokens.dtype, mask.dtype, mask.shape) == (np.uint16, np.uint8, (shard["tokens"],))
        assert shard["documents"] == np.count_nonzero((tokens == manifest["eot"]) & (mask == 0))
        ids.append(tokens)
        masks.append(mask)
    assert len(list(out.iterdir())) == 1 + 2 * len(manifest["shards"])
    return np.concatenate(ids), np.concatenate(masks)


def check(out: Path, texts: list[str], tokenizer: str) -> None:
    for ours, theirs in zip(stored(out), reference(texts, tokenizer)):
        np.testing.assert_array_equal(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and masks


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
@pytest.mark.parametrize("format", FORMATS)
def test_masks_are_the_answers(tmp_path, monkeypatch, format, tokenizer):
    records, texts = zip(*FORMATS[format])
    path = write_lines(tmp_path / "data.jsonl", records)
    settings = {"format": format, "tokenizer": tokenizer}
    for size, slice_bytes in ((7, 2**22), (10**6, 2**22), (50, 40)):
        monkeypatch.setattr(readers, "CHUNK_BYTES", slice_bytes)  # lines longer and shorter than a chunk
        out = tmp_path / f"out{size}"
        manifest = build(out, path, shard_size=size, **settings)
        check(out, texts, tokenizer)
        assert sum(shard["documents"] for shard in manifest["shards"]) == len(texts)
        fineweb.main(fineweb.Config(out=str(out), verify=True))
    build(tmp_path / "tiktoken", path, shard_size=50, backend="tiktoken", **settings)
    check(tmp_path / "tiktoken", texts, tokenizer)
    build(tmp_path / "few", path, max_tokens=33, **settings)
    for ours, theirs in zip(stored(tmp_path / "few"), reference(texts, tokenizer)):
        np.testing.assert_array_equal(ours, theirs[:33])


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes"])
def test_sampling_gives_the_model_what_it_was_trained_on(tmp_path, tokenizer):
    """Before every answer: the ids from the dialogue's beginning to the answer, as fineweb.py wrote them."""
    encode, questions = load_tokenizer(tokenizer), 0
    for format in FORMATS:
        for number, (record, _) in enumerate(FORMATS[format]):
            path, out = write_lines(tmp_path / "data.jsonl", [record]), tmp_path / f"{format}{number}"
            build(out, path, format=format, tokenizer=tokenizer, val_size=0)
            ids, mask = stored(out)
            answers = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1).tolist()
            if format == "alpaca":
                prompt = alpaca_prompt(record["instruction"], record.get("input") or "")
                asked = [encode_prompt(encode, END + prompt)[0]]
            else:
                messages = [(message["role"], message["content"]) for message in record["messages"]]
                before = [messages[:i] for i, (role, _) in enumerate(messages) if role == "assistant"]
                asked = [encode_chat(encode, some) for some in before]
            assert asked == [ids[:begin].tolist() for begin in answers], record
            questions += len(asked)
    assert questions == len(ALPACA) + sum(text.count("«") for _, text in CHAT)


def test_workers_and_parts_change_nothing(tmp_path):
    records, texts = zip(*FORMATS["chat"] * 20)
    paths = [write_lines(tmp_path / f"{i}.jsonl", records[i * 25 :][:25]) for i in range(4)]
    build(tmp_path / "many", *paths, format="chat", shard_size=100, workers=2)
    check(tmp_path / "many", texts, "gpt2")
    for i in (1, 2):
        build(tmp_path / "parts", *paths, format="chat", shard_size=100, part=f"{i}/2", val_size=0)
    names = sorted((tmp_path / "parts").glob("*.mask.npy"))
    halves = [np.concatenate([np.load(path) for path in names[i::2]]) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), reference(texts, "gpt2")[1])
    fineweb.main(fineweb.Config(out=str(tmp_path / "parts"), verify=True))


def test_shuffled_answers_stay_with_their_questions(tmp_path):
    records = [{"instruction": f"Number {i}", "output": f"It is {i}" * (i % 3 + 1)} for i in range(100)]
    path = write_lines(tmp_path / "data.jsonl", records)
    build(tmp_path / "plain", path, format="alpaca", shard_size=200, val_size=0)
    build(tmp_path / "mixed", path, format="alpaca", shard_size=200, val_size=0, shuffle=1)
    plain, mixed = (
        ids + 60000 * mask.astype(np.int64) for ids, mask in map(stored, (tmp_path / "plain", tmp_path / "mixed"))
    )
    assert split_documents(plain) != split_documents(mixed)
    assert sorted(split_documents(plain)) == sorted(split_documents(mixed))


def test_killed_at_any_moment(tmp_path):
    records, texts = zip(*FORMATS["alpaca"] * 4)
    path = write_lines(tmp_path / "data.jsonl", records)
    build(tmp_path / "whole", path, format="alpaca", shard_size=90)
    check(tmp_path / "whole", texts, "gpt2")
    for moment in range(1, 40, 3):
        out = tmp_path / f"out{moment}"
        build_with_deaths(out, [moment, 5], path, format="alpaca", shard_size=90)
        assert contents(out) == contents(tmp_path / "whole"), moment


def test_a_damaged_mask_is_found_and_made_anew(tmp_path):
    out, path = tmp_path / "out", write_lines(tmp_path / "data.jsonl", [record for record, _ in ALPACA * 9])
    manifest = build(out, path, format="alpaca", shard_size=100)
    whole, victim = contents(out), out / manifest["shards"][2]["name"].replace(".npy", ".mask.npy")
    victim.write_bytes(whole[victim.name][:-1] + bytes([1 - whole[victim.name][-1]]))
    with pytest.raises(UserError, match=f"1 of .* missing or damaged: {victim.name}; delete them"):
        fineweb.main(fineweb.Config(out=str(out), verify=True))
    victim.unlink()
    build(out, path, format="alpaca", shard_size=100)
    assert contents(out) == whole
    with pytest.raises(UserError, match=r"begun with other flags: --format text .it was alpaca"):
        build(out, path, shard_size=100)


def test_verify_compares_masks_with_the_source(tmp_path, monkeypatch):
    """A set that is consistent in itself, but whose masks are not what the source gives."""
    path, encode = write_lines(tmp_path / "data.jsonl", [record for record, _ in ALPACA]), workers.encode_documents
    with monkeypatch.context() as patch:
        patch.setattr(
            workers, "encode_documents", lambda *arguments: (encode(*arguments)[0], 0 * encode(*arguments)[1])
        )
        build(tmp_path / "out", path, format="alpaca", val_size=0)
    with pytest.raises(UserError, match=r"000000.mask.npy does not begin with the tokens of .*data.jsonl"):
        fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))


# ----------------------------------------------------------------------------------------------------------------------
# Weights to begin with


def test_a_runs_own_checkpoint_comes_before_init_from(tmp_path, capsys):
    data = token_set(tmp_path / "data")
    torch.manual_seed(7)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    train_gpt2.GPT(train_gpt2.GPTConfig(32, 257, **shape)).save_pretrained(str(tmp_path / "weights"))
    settings = {"max_steps": 4, "save_every": 2, "val_every": 0, "keep_checkpoints": 0}
    config = tiny_config(data, tmp_path / "log", init_from=str(tmp_path / "weights"), **settings)
    train_gpt2.main(replace(config, max_lr=1e-30, min_lr=0.0))  # so that the weights are those it began with
    begun = train_gpt2.GPT.from_checkpoint(tmp_path / "log/ckpt_000004.pt").state_dict()
    given = train_gpt2.GPT.from_pretrained(str(tmp_path / "weights")).state_dict()
    assert all(torch.allclose(begun[name], given[name], rtol=0, atol=1e-20) for name in given)
    assert "is not used" not in capsys.readouterr().out
    for folder in ("a", "b"):
        shutil.copytree(tmp_path / "log", tmp_path / folder)
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"")  # nobody reads it again
    for folder, init_from in (("a", config.init_from), ("b", "")):
        train_gpt2.main(replace(config, log_dir=str(tmp_path / folder), init_from=init_from, resume=True, max_steps=6))
        said = f"--init_from {config.init_from} is not used: the run goes on from its own checkpoint"
        assert (said in capsys.readouterr().out) == bool(init_from)
    ends = [train_gpt2.GPT.from_checkpoint(tmp_path / f"{folder}/ckpt_000006.pt").state_dict() for folder in "ab"]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["transformer.wpe.weight"], begun["transformer.wpe.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


GOOD = {"alpaca": ALPACA[0][0], "chat": chat("user a, assistant b")}
MISTAKES = [
    ("alpaca", {"instruction": "a"}, "has no field 'output' .it has: instruction.; --format alpaca"),
    ("alpaca", {"output": "a"}, "has no field 'instruction'"),
    ("alpaca", {"instruction": "a", "output": " \n"}, "has no answer: its 'output' is empty"),
    ("alpaca", {"instruction": "a", "output": None}, "has no answer"),
    ("alpaca", {"instruction": "", "output": "b"}, "has an empty 'instruction'"),
    ("alpaca", {"instruction": "a", "output": ["b"]}, "holds list in 'output', not text"),
    ("alpaca", {"instruction": "a", "input": 7, "output": "b"}, "holds int in 'input', not text"),
    ("alpaca", ["a", "b"], "is not a JSON object but list"),
    ("chat", {"text": "a"}, "has no list in 'messages' .it has: text.; --format chat"),
    ("chat", {"messages": []}, "has no answer: no message is the assistant's"),
    ("chat", chat("system a, user b"), "has no answer: no message is the assistant's"),
    ("chat", chat("user a, assistant b, user c"), "has no answer to its last message, of user"),
    ("chat", chat("user a, assistant  "), "has no answer: the assistant's message 2 is empty"),
    ("chat", chat("user a, tool b, assistant c"), "has an unknown role 'tool' in message 2; known are system, user"),
    ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "has an unknown role .*'user'"),
    ("chat", {"messages": [{"role": "user"}]}, "has no role or no content in message 1"),
    ("chat", {"messages": ["a"]}, "has no role or no content in message 1"),
    ("chat", {"messages": [{"role": "user", "content": 3}]}, "holds int in 'content' of message 1, not text"),
]


@pytest.mark.parametrize("format, record, words", MISTAKES)
def test_mistakes_are_named_or_left_out(tmp_path, format, record, words):
    path = write_lines(tmp_path / "data.jsonl", [GOOD[format], record, GOOD[format]])
    with pytest.raises(UserError, match=f"line 2 of .*data.jsonl {words}.*; --skip_bad leaves"):
        build(tmp_path / "out", path, format=format)
    manifest = build(tmp_path / "skipped", path, format=format, skip_bad=True)
    assert manifest["skipped"] == 1 and sum(shard["documents"] for shard in manifest["shards"]) == 2


def test_instructions_are_json_lines(tmp_path):
    (tmp_path / "data.txt").write_text("Instruction: no")
    with pytest.raises(UserError, match=r"--format chat reads .jsonl, not .*data.txt; write it as JSON lines"):
        build(tmp_path / "out", tmp_path / "data.txt", format="chat")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# From instructions to answers


ANSWERS = {"colour": ["red", "blue", "green"], "number": ["one", "two", "six"], "animal": ["cat", "dog", "fox"]}


def test_a_model_learns_to_answer_and_to_stop(tmp_path, capsys):
    """300 questions of three kinds and their answers, to a model that has never seen any text."""
    rng = random.Random(0)
    asked = [(f"{rng.choice(['Name', 'Give', 'Tell me'])} one {kind}", kind) for kind in rng.choices([*ANSWERS], k=300)]
    records = [{"instruction": question, "output": rng.choice(ANSWERS[kind])} for question, kind in asked]
    path = write_lines(tmp_path / "data.jsonl", records)
    build(tmp_path / "data", path, format="alpaca", tokenizer="bytes")
    shape = {"n_embd": 64, "seq_len": 64, "total_batch_size": 1024, "micro_batch": 16}
    rates = {"max_lr": 4e-3, "min_lr": 4e-4, "max_steps": 200, "warmup_steps": 20, "grad_clip": 1.0}
    evals = {"val_every": 100, "save_every": 0, "order": "shuffle"}
    train_gpt2.main(tiny_config(tmp_path / "data", tmp_path / "log", **shape, **rates, **evals))
    model, tokenizer = train_gpt2.GPT.from_checkpoint(str(tmp_path / "log/ckpt_000200.pt")), load_tokenizer("bytes")
    for question, kind in sorted(set(asked)):
        prompt = tokenizer.encode(f"Instruction: {question}\n\nAnswer:")
        answer = model.generate(torch.tensor([prompt]), 20, temperature=0, stop=tokenizer.eot)[0, len(prompt) :]
        assert tokenizer.decode(answer.tolist()) in [f" {word}{EOT}" for word in ANSWERS[kind]], question
    capsys.readouterr()
    prompt = "Instruction: Name one animal\n\nAnswer:"
    sample.main(sample.Config(model=str(tmp_path / "log"), prompt=prompt, temperature=0.0, device="cpu"))
    said = [f"{prompt} {word}\n{'-' * 80}\n" for word in ANSWERS["animal"]]
    assert capsys.readouterr().out in said
    about = {"model": str(tmp_path / "log"), "temperature": 0.0, "device": "cpu"}
    sample.main(sample.Config(prompt="Name one animal", format="alpaca", **about))
    assert capsys.readouterr().out in said
