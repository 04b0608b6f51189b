"""HellaSwag: the fast scorer against plain arithmetic on transformers' logits, and every way the data can be wrong."""

import gzip
import hashlib
import http.server
import json
import random
import re
import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import hellaswag
from extras.cli import UserError, run
from extras.tokenizer import load_tokenizer

WORDS = re.split(
    " ", "a the man boy cat dog runs sits jumps on over under track roof Guitar, slowly 42 café blue-ish it's"
)


def record(rng, endings=4):
    def phrase(n):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, n)))

    ctx_a, ctx_b = phrase(25) + ".", rng.choice(["", phrase(3)])
    return {
        "activity_label": phrase(2), "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip(),
        "endings": [phrase(14) + "." for _ in range(endings)], "label": rng.randrange(4),
    }  # fmt: skip


def write_jsonl(path, records):
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read_lines(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def records():
    rng = random.Random(1)
    records = [record(rng) for _ in range(20)]
    records[3]["endings"][1] = "[substeps] looks [title] up  and [ad] away."
    records[4]["ctx_a"] = "How to sit [title] Buy a chair. [step] Sit  down."
    records[6]["ctx_b"] = "the [ad]"  # leaves a space at the end of the prompt
    return records


@pytest.fixture(scope="module")
def examples(records, tmp_path_factory):
    return hellaswag.load_examples(write_jsonl(tmp_path_factory.mktemp("data") / "val.jsonl.gz", records))


def tiny_gpt2(vocab_size=50257, block_size=128):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=block_size, vocab_size=vocab_size)
    model = GPT2LMHeadModel(shape)
    for parameter in model.parameters():  # opinionated: at the usual scale every ending is equally likely
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny_gpt2()


@pytest.fixture(scope="module")
def scorer(model):
    return hellaswag.callables(model, 50257)


def plain_nats(model, context, ending):
    """One ending behind its context, from the model's own logits, truncated as lm-evaluation-harness does it."""
    tokens = (context + ending)[-(model.config.n_positions + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), logits_to_keep=len(ending)).logits[0]
    return F.cross_entropy(logits, torch.tensor(ending), reduction="sum").item()


def expected_pieces(record, style):
    encode = load_tokenizer("gpt2").encode
    if style == "karpathy":
        endings = [encode(" " + ending) for ending in record["endings"]]
        return encode(record["ctx"]), endings, [len(ending) for ending in endings]

    def clean(text):
        return re.sub("\\[[^]]*\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    b = record["ctx_b"]
    query = clean(record["activity_label"] + ": " + record["ctx_a"] + " " + b[:1].upper() + b[1:].lower())
    choices = [clean(ending) for ending in record["endings"]]
    n = len(encode(query.rstrip()))
    return encode(query.rstrip()), [encode(query + " " + c)[n:] for c in choices], [len(c) for c in choices]


# ----------------------------------------------------------------------------------------------------------------------
# The scorer


@pytest.mark.parametrize("style", ("karpathy", "lm-eval"))
@pytest.mark.parametrize("block_size", [128, 45])  # 45: contexts are cut, and rows split into several trees
def test_tree_rows_give_the_references_numbers(records, examples, style, block_size):
    model = tiny_gpt2(block_size=block_size)
    features, head = hellaswag.callables(model, 50257)
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), block_size, style)
    cut = [len(row.paths[0]) - row.n_scored[0] < len(expected_pieces(rec, style)[0]) for rec, row in zip(records, rows)]
    assert (max(len(row.trees) for row in rows) > 1 and any(cut)) == (block_size == 45)
    assert max(tree.shape[1] for row in rows for tree in row.trees) <= block_size
    fast = hellaswag.score(features, head, rows, "cpu")
    plain = hellaswag.score_plainly(features, head, rows, "cpu")
    for rec, row, found, reference in zip(records, rows, fast, plain):
        context, endings, lengths = expected_pieces(rec, style)
        nats = np.array([plain_nats(model, context, ending) for ending in endings])
        np.testing.assert_allclose(found.nats, nats, rtol=0, atol=1e-3)
        np.testing.assert_allclose(reference.nats, nats, rtol=0, atol=1e-3)
        expected = nats.argmin(), (nats / lengths).argmin()
        assert hellaswag.answers(row, found) == hellaswag.answers(row, reference) == expected
    assert len({hellaswag.answers(row, found) for row, found in zip(rows, fast)}) > 4  # the model does choose


def test_the_trainers_model_is_scored_alike(examples):
    from train_gpt2 import GPT, GPTConfig

    torch.manual_seed(2)
    ours = GPT(GPTConfig(block_size=128, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), 128)
    fast = hellaswag.score(ours.features, ours.head, rows, "cpu")
    plain = hellaswag.score_plainly(ours.features, ours.head, rows, "cpu")
    for row, found, reference in zip(rows, fast, plain):
        np.testing.assert_allclose(found.nats, reference.nats, rtol=0, atol=1e-3)
        assert hellaswag.answers(row, found) == hellaswag.answers(row, reference)


def test_any_number_of_ranks_gives_the_same_counts_and_as_many_polls(examples, scorer, monkeypatch):
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), 128)
    plan = hellaswag.plan_batches
    monkeypatch.setattr(hellaswag, "plan_batches", lambda rows, max_tokens: plan(rows, 160))
    alone = hellaswag.score(*scorer, rows, "cpu")
    whole = hellaswag.tally(rows, alone)
    assert whole[0] == len(rows)
    for world_size in (2, 3, 5):
        polls, counts, seen = [], torch.zeros(4, dtype=torch.float64), [0] * len(rows)
        for rank in range(world_size):
            calls = []
            part = hellaswag.score(*scorer, rows, "cpu", rank, world_size, lambda calls=calls: calls.append(1))
            counts += hellaswag.tally(rows, part)
            polls.append(len(calls))
            for i, found in enumerate(part):
                if found is not None:
                    seen[i] += 1
                    assert (found.nats == alone[i].nats).all()
        assert seen == [1] * len(rows) and len(set(polls)) == 1 and polls[0] >= 2
        assert torch.equal(counts[:3], whole[:3]) and counts[3] == pytest.approx(whole[3].item(), rel=1e-12)


def test_batches_hold_every_row_once_within_the_budget_and_with_little_padding(examples):
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), 45)  # some rows are several trees
    batches = hellaswag.plan_batches(rows, 400)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    trees = [[tree.shape[1] for i in batch for tree in rows[i].trees] for batch in batches]
    assert all(len(sizes) * max(sizes) <= 400 for sizes in trees) and len(batches) < len(rows) / 3


def test_it_stops_when_it_is_told_to(examples, scorer):
    features, head = scorer
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), 128)
    forwards, orders = [], iter([False, True])

    def counted(*args):
        forwards.append(1)
        return features(*args)

    assert hellaswag.score(counted, head, rows, "cpu", should_stop=lambda: next(orders)) is None
    assert len(forwards) == 1


def test_of_equal_endings_the_first_is_chosen(scorer, tmp_path):
    """To the last bit, which takes care: in a long row the same ending rounds differently in another place."""
    rng = random.Random(0)
    long = [" ".join(rng.choices(WORDS, k=k)) for k in range(20, 40)]
    same = [{"ctx": "The man", "endings": [text, "sits.", text, "sits."], "label": 0} for text in long]
    path = write_jsonl(tmp_path / "ties.jsonl", [*same, {**same[0], "endings": ["sits."] * 4}])
    rows = hellaswag.render(hellaswag.load_examples(path), load_tokenizer("gpt2"), 128)
    for row, found in zip(rows, hellaswag.score(*scorer, rows, "cpu")):
        assert found.nats[0] == found.nats[2] and found.nats[1] == found.nats[3]
        assert max(hellaswag.answers(row, found)) <= 1 and row.first.tolist() in ([0, 1, 0, 1], [0] * 4)
    assert hellaswag.answers(row, found) == (0, 0)


def test_bfloat16_autocast_is_close(examples, scorer):
    rows = hellaswag.render(examples, load_tokenizer("gpt2"), 128)
    exact = hellaswag.score(*scorer, rows, "cpu")
    close = hellaswag.score(*scorer, rows, "cpu", autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    a, b = (np.concatenate([found.nats for found in scores]) for scores in (exact, close))
    assert abs(a - b).max() > 0 and np.median(abs(a - b) / a) < 0.02


def test_counts_and_what_is_made_of_them():
    rows = hellaswag.render(
        [{"where": "", "line": 1, "ctx": "a b", "endings": ["x", "y z y z y z"], "label": label} for label in (0, 1)],
        load_tokenizer("bytes"), 128,
    )  # fmt: skip
    found = hellaswag.Score(np.array([5.0, 12.0]), np.array([False, False]))  # 2 and 12 bytes
    assert hellaswag.answers(rows[0], found) == (0, 1)
    counts = hellaswag.tally(rows, [found, found])
    assert counts.tolist() == [2, 1, 1, 17] and hellaswag.tally(rows, [None, found]).tolist() == [1, 0, 1, 12]
    result = hellaswag.summarize(torch.tensor([100, 30, 40, 250], dtype=torch.float64))
    assert result["acc"] == 0.3 and result["acc_norm"] == 0.4 and result["n"] == 100 and result["nats"] == 2.5
    assert result["stderr"] == pytest.approx(np.std([1] * 30 + [0] * 70, ddof=1) / 10)
    assert result["stderr_norm"] == pytest.approx(np.std([1] * 40 + [0] * 60, ddof=1) / 10)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_lm_evals_prompt(records, examples):
    assert examples[4]["query"].split(": ", 1)[1].startswith("How to sit. Buy a chair. Sit down.")
    assert examples[3]["choices"][1] == " looks. up and away."
    joined = {name: records[5][name] for name in ("activity_label", "ctx", "endings", "label")}
    assert hellaswag.read_hellaswag(joined)["query"] == f"{joined['activity_label']}: {joined['ctx']}"


GOOD = {"activity_label": "Running", "ctx": "A boy", "endings": ["runs.", "sits.", "eats.", "sleeps."], "label": 2}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ctx": None}, "'ctx'"),
        ({"ctx": "  "}, "context is empty"),
        ({"endings": GOOD["endings"] + ["flies."]}, "list of 4"),
        ({"endings": "runs."}, "must be a list"),
        ({"endings": ["runs.", " ", "eats.", "sleeps."]}, "ending 1 is empty"),
        ({"endings": ["runs.", "sits.", 3, "sleeps."]}, "ending 2"),
        ({"label": None}, "'label'"),
        ({"label": 4}, "0 to 3"),
        ({"label": True}, "0 to 3"),
        ({"ctx": "word " * 1025}, " tokens; at most 1024"),
        ({"endings": ["runs.", "[ad]", "eats.", "sleeps."]}, "ending 1 is empty in lm-eval style"),
        ({"activity_label": 7}, "activity_label"),
        (b'{"ctx": "A boy", "endings": ["a", "b", "c", "d"], "label": 0}', "'activity_label' is missing"),
        ({"ctx_b": None}, "ctx_b"),
        (b'{"ctx": "A boy"', "not JSON"),
        (b"[1, 2]", "object"),
        (b'{"ctx": "\xff"}', "not JSON"),
    ],
)
def test_a_bad_example_is_named_by_its_line(change, words, tmp_path, capsys):
    bad = change if isinstance(change, bytes) else json.dumps({**GOOD, **change}).encode()
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + bad + b"\n" + json.dumps(GOOD).encode() + b"\n")
    tiny_gpt2(block_size=1024).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit:
        argv = ["-m", str(tmp_path), "-d", "cpu", "--style", "lm-eval", "--data", str(path)]
        run(hellaswag.main, hellaswag.Config, "", argv)
    message = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and f"{path} line 3: " in message and words in message


def test_files_that_cannot_be_read(tmp_path):
    whole = gzip.compress(json.dumps(GOOD).encode() * 50)
    (tmp_path / "short.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"{}")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for name in ("short.jsonl.gz", "plain.jsonl.gz", "empty.jsonl", "absent.jsonl", "."):
        with pytest.raises(UserError, match=str(tmp_path / name)):
            hellaswag.load_examples(str(tmp_path / name))
    with pytest.raises(UserError, match="--data"):
        hellaswag.load_examples(task="piqa")


def test_an_ending_longer_than_the_block_is_no_reason_to_stop_a_training(examples):
    with pytest.raises(hellaswag.Unavailable, match="block size 3"):
        hellaswag.render(examples, load_tokenizer("gpt2"), 3)


def test_a_limit_draws_the_same_examples_everywhere(records, tmp_path):
    path = write_jsonl(tmp_path / "val.jsonl", records)
    drawn = [example["line"] for example in hellaswag.load_examples(path, 10)]
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and drawn != [*range(1, 11)]
    settings, one = SimpleNamespace(hella_data=path, hella_limit=10, seq_len=128), SimpleNamespace(rank=0)
    agreed = (lambda flag, ranks: flag), nullcontext  # as train_gpt2.py's ranks would, if there were several
    rows = hellaswag.rows_for_training(settings, load_tokenizer("gpt2"), one, *agreed)
    assert [row.line for row in rows] == drawn
    assert len(hellaswag.load_examples(path, 1000)) == len(records)
    with pytest.raises(UserError, match="limit of -5"):
        hellaswag.load_examples(path, -5)


ARC = {"question": "Who?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.mark.parametrize(
    "task, record",
    [
        ("hellaswag", {**GOOD, "endings": 7}), ("hellaswag", {**GOOD, "ctx": ["A boy"]}), ("hellaswag", 7),
        ("hellaswag", {**GOOD, "label": "9" * 5000}), ("hellaswag", {**GOOD, "label": {}}),
        ("piqa", {"goal": 1, "sol1": "a", "sol2": "b", "label": 0}), ("lambada", {"text": None}),
        ("arc", {**ARC, "choices": None}), ("arc", {**ARC, "choices": {"text": "ab", "label": ["A", "B"]}}),
        ("arc", {**ARC, "choices": {"text": ["a", 3], "label": ["A", "B"]}}), ("arc", {**ARC, "choices": {"text": []}}),
        ("arc", {**ARC, "choices": {"text": ["a", "b"], "label": "AB"}}), ("arc", {**ARC, "question": 3}),
        ("arc", {**ARC, "choices": {"text": ["a"], "label": ["B"]}}), ("arc", {**ARC, "answerKey": {}}),
        ("arc", {"question": {"stem": "Who?", "choices": 5}}), ("arc", {"question": {"stem": "Who?", "choices": [1]}}),
    ],
)  # fmt: skip
def test_values_of_another_type_are_named_by_their_line(task, record, tmp_path):
    path = write_jsonl(tmp_path / "set.jsonl", [record])
    with pytest.raises(UserError, match=f"{path} line 1: ") as raised:
        hellaswag.load_examples(path, task=task)
    assert "\n" not in str(raised.value)


def test_what_is_read_is_bounded(tmp_path, monkeypatch):
    deep, wide, bomb = tmp_path / "deep.jsonl", tmp_path / "wide.jsonl", tmp_path / "bomb.jsonl.gz"
    deep.write_text("[" * 200_000 + "\n")
    wide.write_bytes(b" " * 2**21)
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(b"\n" * 2**20)
    assert bomb.stat().st_size < 2**21
    monkeypatch.setattr(hellaswag, "LARGEST_FILE", 2**20)
    for path, words in ((deep, "not JSON"), (wide, "line 1: over 1048576 bytes"), (bomb, "1048576 in all")):
        with pytest.raises(UserError, match=words):
            hellaswag.load_examples(str(path))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site that offers the validation set, and a list of the requests that it gets; `site.reply` is what it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            status, length, body = server.reply
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.body = [], (json.dumps(GOOD) + "\n").encode() * 3
    server.reply = 200, len(server.body), server.body
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(server.body).hexdigest())
    monkeypatch.setattr(hellaswag, "CACHE", tmp_path / "hellaswag" / "val.jsonl")
    yield server
    server.shutdown()
    server.server_close()


def test_the_validation_set_is_downloaded_once(site):
    assert len(hellaswag.load_examples()) == len(hellaswag.load_examples()) == 3 and len(site.requests) == 1
    assert [file.name for file in hellaswag.CACHE.parent.iterdir()] == ["val.jsonl"]


@pytest.mark.parametrize("what", ["not found", "cut short", "something else", "no network"])
def test_nothing_is_kept_of_a_download_that_went_wrong(site, what, monkeypatch):
    n = len(site.body)
    site.reply = {
        "not found": (404, n, site.body), "cut short": (200, n + 5, site.body), "something else": (200, n, b"x" * n),
        "no network": (200, n, site.body),
    }[what]  # fmt: skip
    if what == "no network":
        monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:9/val.jsonl")
    with pytest.raises(hellaswag.Unavailable):
        hellaswag.load_examples()
    assert not hellaswag.CACHE.parent.exists() or not list(hellaswag.CACHE.parent.iterdir())


def test_a_file_of_the_users_is_neither_taken_for_the_published_one_nor_overwritten(site):
    hellaswag.CACHE.parent.mkdir()
    hellaswag.CACHE.write_text("mine")
    with pytest.raises(UserError, match="--data"):
        hellaswag.load_examples()
    assert hellaswag.CACHE.read_text() == "mine" and not site.requests


def test_other_tasks(model, scorer, tmp_path):
    texts, labels = ["by a cat", "by the dog", "it"], ["A", "B", "C"]
    sets = {
        "piqa": [{"goal": "To sit", "sol1": "Sit down.", "sol2": "Run.", "label": 1}],
        "arc": [
            {"question": "Who?", "choices": {"text": texts, "label": labels}, "answerKey": "C"},
            {
                "question": {"stem": "Who?", "choices": [{"text": t, "label": i} for t, i in zip(texts, labels)]},
                "answerKey": "C",
            },
        ],
        "lambada": [{"text": "The man sits on a roof"}],
    }
    prompts = {"piqa": "Question: To sit\nAnswer:", "arc": "Question: Who?\nAnswer:", "lambada": "The man sits on a"}
    for task, lines in sets.items():
        examples = hellaswag.load_examples(write_jsonl(tmp_path / "set.jsonl", lines), task=task)
        assert all(example["ctx"] == prompts[task] for example in examples)
        rows = hellaswag.render(examples, load_tokenizer("gpt2"), 128, "lm-eval")
        scores = hellaswag.score(*scorer, rows, "cpu")
        encode = load_tokenizer("gpt2").encode
        for example, found in zip(examples, scores):
            nats = [plain_nats(model, encode(example["ctx"]), encode(" " + ending)) for ending in example["endings"]]
            np.testing.assert_allclose(found.nats, nats, rtol=0, atol=1e-3)
        assert [example["label"] for example in examples] == {"piqa": [1], "arc": [2, 2], "lambada": [0]}[task]


def test_a_last_word_counts_if_it_is_what_the_model_would_have_said(model, scorer, tmp_path):
    tokenizer = load_tokenizer("gpt2")
    context = "The man sits on a"
    with torch.no_grad():  # a word of two tokens, each the likeliest after those before it
        word = []
        while len(word) < 2:
            logits = model(torch.tensor([tokenizer.encode(context) + word])).logits[0, -1]
            word.append(int(logits.argmax()))
    example = {"where": "", "line": 1, "ctx": context, "endings": ["x"], "label": 0, "query": None}
    row = hellaswag.render([example], tokenizer, 128)[0]
    for ending, right in ((word, True), ([word[0], word[1] - 1], False), ([word[0] - 1, word[1]], False)):
        path = np.array(tokenizer.encode(context) + ending, np.int32)
        row = row._replace(paths=[path], n_scored=np.array([2]), trees=hellaswag.grow_trees([path], [2], 128))
        for score in (hellaswag.score, hellaswag.score_plainly):
            counts = hellaswag.tally([row], score(*scorer, [row], "cpu"))
            assert counts.tolist()[:3] == [1, right, right]


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def command(*argv):
    run(hellaswag.main, hellaswag.Config, "", list(argv))


def test_command_line(records, model, tmp_path, capsys):
    data = write_jsonl(tmp_path / "val.jsonl", records)
    out, plain = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    model.save_pretrained(tmp_path / "gpt2")
    common = ["-m", str(tmp_path / "gpt2"), "-d", "cpu", "--data", data]
    command(*common, "--limit", "12", "--out", out, "--show", "2")
    printed = capsys.readouterr().out
    command(*common, "--limit", "12", "--out", plain, "--reference", "--show", "0")
    last = capsys.readouterr().out.splitlines()[-1]
    assert printed.splitlines()[-1] == last and "karpathy style" in last and "n 12" in last
    found, reference = (read_lines(path) for path in (out, plain))
    assert [r["pred_norm"] for r in found] == [r["pred_norm"] for r in reference] and len(found) == 12
    assert sum(r["pred"] == r["label"] for r in found) / 12 == pytest.approx(float(last.split()[4]), abs=1e-4)
    assert printed.count(" nats, ") == 8 and records[found[0]["line"] - 1]["endings"][3] in printed
    command("--compare", out, plain)
    assert capsys.readouterr().out.count("McNemar p 1\n") == 2
    command(*common, "--style", "lm-eval", "--out", plain)
    assert "(lm-eval style): acc" in capsys.readouterr().out
    for argv, words in [
        (["--compare", out, plain], "style"),
        (["--compare", out], "two files"),
        (["--compare", data, data], "--out"),
        ([*common[:-1], str(tmp_path)], "can't read"),
        ([*common, "-m", out], "damaged"),
        ([*common, "-m", str(tmp_path)], "has no config.json"),
        ([*common, "-d", "abacus"], "abacus"),
        ([*common, "--limit", "-5"], "limit of -5"),
        ([*common, "--show", "-1"], "--show is -1"),
        ([*common, "-m", "nowhere", "--out", str(tmp_path / "nodir" / "x")], "can't write --out"),
        ([*common, "-m", "nowhere", "--out", str(tmp_path)], "can't write --out"),
    ]:
        with pytest.raises(SystemExit) as exit:
            command(*argv)
        assert exit.value.code == 2 and words in capsys.readouterr().err


def test_the_result_is_printed_even_if_it_cannot_be_written(records, model, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    data = write_jsonl(tmp_path / "val.jsonl", records[:2])
    with pytest.raises(SystemExit):
        command("-m", str(tmp_path / "gpt2"), "-d", "cpu", "--data", data, "--out", str(tmp_path / "a.jsonl"))
    printed = capsys.readouterr()
    assert "acc_norm" in printed.out.splitlines()[-1] and "No space left" in printed.err


def test_a_run_directory_is_scored_as_its_export(records, tmp_path, capsys):
    from train_gpt2 import GPT, GPTConfig

    ours, data = GPT(GPTConfig(128, 50304, 2, 2, 16)), write_jsonl(tmp_path / "val.jsonl", records)
    for parameter in ours.parameters():
        parameter.data.mul_(8 if parameter.dim() == 2 else 1)
    (tmp_path / "log").mkdir()
    saved = {"model": ours.state_dict(), "model_config": vars(ours.config), "step": 5}
    torch.save(saved, tmp_path / "log" / "ckpt_000005.pt")
    ours.save_pretrained(str(tmp_path / "exported"))
    results = []
    for source in ("log/", "log/ckpt_000005.pt", "exported"):
        command("-m", f"{tmp_path}/{source}", "-d", "cpu", "--data", data, "--out", str(tmp_path / "a.jsonl"))
        results.append([record["nats"] for record in read_lines(tmp_path / "a.jsonl")])
    assert results[0] == results[1] == results[2]
    rows = hellaswag.render(hellaswag.load_examples(data), load_tokenizer("gpt2"), 128)
    for nats, found in zip(results[0], hellaswag.score(ours.features, ours.head, rows, "cpu")):
        np.testing.assert_allclose(nats, found.nats, atol=1e-3)


def test_a_model_of_bytes_is_given_bytes(records, tmp_path, capsys):
    data = write_jsonl(tmp_path / "val.jsonl", records[:4])
    tiny_gpt2(vocab_size=257, block_size=200).save_pretrained(tmp_path / "bytes")
    command("-m", str(tmp_path / "bytes"), "-d", "cpu", "--data", data, "--out", str(tmp_path / "a.jsonl"))
    assert read_lines(tmp_path / "a.jsonl")[0]["lengths"] == [
        len(f" {ending}".encode()) for ending in records[0]["endings"]
    ]
    tiny_gpt2(vocab_size=1000).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        command("-m", str(tmp_path / "other"), "-d", "cpu", "--data", data)
    assert "1000 tokens" in capsys.readouterr().err


def test_mcnemar():
    assert hellaswag.mcnemar(0, 0) == hellaswag.mcnemar(4, 4) == 1
    assert hellaswag.mcnemar(1, 9) == hellaswag.mcnemar(9, 1) == 22 / 1024  # 2 (C(10, 0) + C(10, 1)) / 2^10
    assert hellaswag.mcnemar(1000, 1120) == pytest.approx(0.00975, rel=0.01)  # chi-squared with continuity correction


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.0.mlp.c_fc.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"c_fc.weight is missing"):
        hellaswag.load_model(str(tmp_path), torch.device("cpu"))
    (tmp_path / "model.safetensors").write_bytes(b"12345678not safetensors")
    with pytest.raises(UserError, match="is damaged"):
        hellaswag.load_model(str(tmp_path), torch.device("cpu"))


def test_a_cache_that_cannot_be_written_is_only_unavailable(tmp_path, monkeypatch):
    reply = SimpleNamespace(read=lambda: b"{}")
    monkeypatch.setattr(hellaswag, "urlopen", lambda *_, **__: nullcontext(reply))
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(b"{}").hexdigest())
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setattr(hellaswag, "CACHE", tmp_path / "file" / "hellaswag_val.jsonl")
    with pytest.raises(hellaswag.Unavailable, match="can't write"):
        hellaswag.load_examples()
