"""fineweb.py: whatever the text, the shard size, the workers and the moment of death, the shards are its tokens."""

import errno
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fineweb
from extras import readers, sources
from extras import tokenize_workers as workers
from extras.cli import UserError
from extras.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
GPT2 = load_tokenizer("gpt2")
NASTY = [
    "An ordinary document.",
    "",
    "a literal <|endoftext|> in it",
    "\x00\x00 NULs \x00",
    "emoji 👩‍👩‍👧‍👦 and 中文，全角　空格 \u2028 lines",
    "x" * 50 + " y" * 1_000_000,  # one line of 2 MB
    "before" + " " * 1_100_000 + "after",  # tiktoken alone panics at this
    "windows\r\nlines\r\n\r\n  indented\t\r\n",
    "don't I'LL \x85\xa0\x1c 12345678901234567890",
    "",
    "The end.",
]


def reference(texts: list[str], tokenizer=GPT2) -> np.ndarray:
    """What the trainer is to read, by the reference tokenizer, a document at a time."""
    return np.concatenate([[tokenizer.eot, *tokenizer.encode(text)] for text in texts]).astype(np.uint16)


def write_parquet(path: Path, texts: list, rows: int = 3, column: str = "text") -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), column: pa.array(texts, pa.string())}), path, row_group_size=rows)
    return path


def write_jsonl(path: Path, texts: list) -> Path:
    data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def build(out: Path, *inputs: Path, **flags) -> dict:
    """fineweb.py in this process; the manifest it leaves."""
    fineweb.main(fineweb.Config(input=[str(path) for path in inputs], out=str(out), **{"workers": 0} | flags))
    return json.loads((out / "manifest.json").read_text())


def stored(out: Path) -> np.ndarray:
    """All tokens of a finished set, in order. Nothing else may lie there, and the manifest must tell the truth."""
    manifest = json.loads((out / "manifest.json").read_text())
    lengths = workers.token_lengths(manifest["tokenizer"]["name"])
    arrays = []
    for shard in manifest["shards"]:
        arrays.append(np.load(out / shard["name"], mmap_mode="r"))
        assert arrays[-1].dtype == np.uint16 and arrays[-1].ndim == 1
        assert shard["tokens"] == len(arrays[-1])
        assert shard["documents"] == np.count_nonzero(arrays[-1] == manifest["eot"])
        assert shard["bytes"] == lengths[arrays[-1]].sum()
        assert shard["sha256"] == hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest()
    assert manifest["complete"]
    assert {path.name for path in out.iterdir()} == {"manifest.json", *(shard["name"] for shard in manifest["shards"])}
    return np.concatenate(arrays)


def contents(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# The tokens


@pytest.mark.parametrize("backend", ["tiktoken", "auto"])
@pytest.mark.parametrize("shard_size", [7, 100_000, 10**9])
def test_shards_are_the_documents_whatever_their_size(tmp_path, shard_size, backend):
    texts = NASTY if shard_size > 7 else [text[:300] for text in NASTY]
    path = write_parquet(tmp_path / "texts.parquet", texts)
    manifest = build(tmp_path / "out", path, shard_size=shard_size, backend=backend, val_size=min(shard_size, 1000))
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(texts))
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    assert sizes[0] == min(shard_size, 1000) and set(sizes[1:-1]) <= {shard_size} and 0 < sizes[-1] <= shard_size
    assert [shard["split"] for shard in manifest["shards"]] == ["val"] + ["train"] * (len(sizes) - 1)
    names = [f"edufineweb_{shard['split']}_{i:06d}.npy" for i, shard in enumerate(manifest["shards"])]
    assert names == [shard["name"] for shard in manifest["shards"]]
    assert sum(shard["bytes"] for shard in manifest["shards"]) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tmp_path, workers):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["the", "quick", "brown", "fox"], k=rng.randrange(40))) for _ in range(200)]
    inputs = [
        write_parquet(tmp_path / "a.parquet", texts[:150], rows=10),
        write_jsonl(tmp_path / "b.jsonl", texts[150:]),
    ]
    build(tmp_path / "one", *inputs, shard_size=300)
    build(tmp_path / "many", *inputs, shard_size=300, workers=workers)
    np.testing.assert_array_equal(stored(tmp_path / "one"), reference(texts))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "JSONL"])
def test_json_lines(tmp_path, monkeypatch, suffix):
    texts = [*NASTY, "lone \ud800 surrogates \udfff", "\ufeffafter a byte order mark"]
    build(tmp_path / "long", write_jsonl(tmp_path / f"long.{suffix}", texts))
    np.testing.assert_array_equal(stored(tmp_path / "long"), reference(texts))
    monkeypatch.setattr(readers, "CHUNK_BYTES", 50)  # lines longer and shorter than a slice
    texts = [text[:200] for text in texts]
    build(tmp_path / "cut", write_jsonl(tmp_path / f"cut.{suffix}", texts))
    np.testing.assert_array_equal(stored(tmp_path / "cut"), reference(texts))


def test_a_long_row_group_makes_several_chunks(tmp_path, monkeypatch):
    texts = [f"document {i} " + "word " * (i % 50) for i in range(5000)]
    path = write_parquet(tmp_path / "texts.parquet", texts, rows=5000)
    monkeypatch.setattr(readers, "ROW_CHUNK_BYTES", 50_000)
    assert len(readers.row_groups(sources.SourceFile("x.parquet", 1, str(path)), str(path), "text")) > 5
    build(tmp_path / "out", path)
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(texts))


TEXTS = [
    "plain words in lines\nand more of them\n\n\n  indented\ttabs\n" * 20,
    "windows\r\nlines\r\n\r\n  and\r\n" * 30,
    "中文没有空格。\n第二行　全角空格\n" * 30,
    "nospacesatall" * 100,
    "runs" + " " * 500 + "of" + "\n" * 500 + "space " * 3,
    "\xa0\u2003 odd\u3000 \x85spaces \x1c\x1d between\xa0 \xa0words " * 30,
]


def test_empty_row_groups_and_unknown_counts(tmp_path):
    schema = pa.schema({"text": pa.string(), "token_count": pa.int64()})
    with pq.ParquetWriter(tmp_path / "texts.parquet", schema) as writer:
        for texts in ([], ["one", "two"], [], ["three"]):
            table = pa.table({"text": texts, "token_count": [None for _ in texts]}, schema)
            writer.write_table(table)
    assert pq.read_metadata(tmp_path / "texts.parquet").row_group(0).num_rows == 0
    build(tmp_path / "out", tmp_path / "texts.parquet")
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(["one", "two", "three"]))


def test_an_empty_text_file_is_an_empty_document(tmp_path):
    for name, text in {"a": "", "b": "words", "c": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    build(tmp_path / "out", tmp_path / "*.txt")
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(["", "words", ""]))
    build(tmp_path / "alone", tmp_path / "a.txt")
    np.testing.assert_array_equal(stored(tmp_path / "alone"), reference([""]))


def test_a_name_with_glob_characters(tmp_path):
    build(tmp_path / "out", write_jsonl(tmp_path / "a[1].jsonl", ["some text"]))
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(["some text"]))


def test_a_big_row_group_is_read_a_little_at_a_time(tmp_path):
    table = pa.table({"text": [f"{i:01000}" for i in range(40_000)]})
    pq.write_table(table, tmp_path / "texts.parquet", compression="none", use_dictionary=False)
    code = (  # in a process of its own, for the most memory it ever took
        "import pyarrow, types; from extras import readers; "
        "chunk = readers.Chunk('PATH', 'x', 'parquet', 0, 30_000, 30_010, 1.0); "
        "texts = list(readers.read_rows(chunk, types.SimpleNamespace(text_column='text'))); "
        "assert [int(text) for text, in texts] == list(range(30_000, 30_010)); "
        "print(pyarrow.default_memory_pool().max_memory())"
    ).replace("PATH", (tmp_path / "texts.parquet").as_posix())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert 0 < int(done.stdout) < 20e6, done.stderr  # of 40 MB


def test_chinese_is_cut_at_the_ends_of_its_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("甲乙。\n丙　\nひ\n".encode() + b"x" * 100)
    with open(path, "rb") as file:
        cuts = [readers.safe_cut(file, offset) for offset in range(40)]
    assert sorted(set(cuts)) == [0, 9, 20, path.stat().st_size]  # not after the ideographic space, which is one
    assert all(cut >= offset for offset, cut in enumerate(cuts)) and cuts[9] == 9


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_file_is_one_document_however_it_is_cut(tmp_path, monkeypatch, text):
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfanother")
    whole = reference([text, "another"])
    for size in (1, 7, 64, 10**6):
        monkeypatch.setattr(readers, "CHUNK_BYTES", size)
        out = tmp_path / f"out{size}"
        assert sum(shard["documents"] for shard in build(out, tmp_path / "*.txt")["shards"]) == 2
        np.testing.assert_array_equal(stored(out), whole)


def test_bytes_as_tokens(tmp_path):
    texts = [text[:500] for text in NASTY] + ["lone \ud800"]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    manifest = build(tmp_path / "out", path, tokenizer="bytes", shard_size=200)
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(texts, load_tokenizer("bytes")))
    assert manifest["tokenizer"] == {"name": "bytes", "vocab_size": 257} and manifest["eot"] == 256


def test_max_tokens_is_exact(tmp_path):
    texts = [f"document {i}" for i in range(100)]
    path = write_parquet(tmp_path / "texts.parquet", texts)
    for limit in (2, 99, 100, 101, 10**6):
        build(tmp_path / f"out{limit}", path, max_tokens=limit, shard_size=50)
        np.testing.assert_array_equal(stored(tmp_path / f"out{limit}"), reference(texts)[:limit])


@pytest.mark.parametrize("count", [1, 2, 30, 1000])
def test_val_is_a_twentieth_and_train_never_empty(tmp_path, count):
    """Also where there is less text than its bytes promise."""
    full = {"text": "word " * 40, "more": ""}
    thin = {"text": "w", "more": "this is not text to train on " * 40}
    for name, row in (("full", full), ("thin", thin)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * count)
        splits = {"train": 0, "val": 0}
        for shard in build(tmp_path / name, tmp_path / f"{name}.jsonl")["shards"]:
            splits[shard["split"]] += shard["tokens"]
        assert splits["train"] >= 19 * splits["val"] / 3 and splits["train"] > 0
        assert splits["val"] > 0 or sum(splits.values()) < 20
        np.testing.assert_array_equal(stored(tmp_path / name), reference([row["text"]] * count))


# ----------------------------------------------------------------------------------------------------------------------
# gigatoken


gigatoken_only = pytest.mark.skipif(
    fineweb.pick_backend("auto", "gpt2") != "gigatoken", reason="gigatoken is not installed"
)


@gigatoken_only
@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=[]) | st.sampled_from(" \n\t'\u00a0s"), max_size=200)))
@example(["<|endoftext|>", "", " " * 1000, "\ud800"])
def test_gigatoken_is_tiktoken(texts):
    documents = [[text] for text in texts]
    ids, targets = workers.encode_documents(documents, GPT2, "gigatoken")
    expected, _ = workers.encode_documents(documents, GPT2, "tiktoken")
    np.testing.assert_array_equal(ids, expected)
    assert not targets.any() and len(targets) == len(ids)


@gigatoken_only
def test_gigatoken_is_checked_and_reset(monkeypatch):
    monkeypatch.setattr(workers.Gigatoken, "idle", deque())
    monkeypatch.setattr(workers, "RESET_EVERY", 15_000)
    backend = workers.Gigatoken()
    texts = [f"text {i}" for i in range(1200)]
    workers.Gigatoken.idle.append(backend)
    for kept in (True, False):  # about 10,000 characters
        ids, _ = workers.encode_texts(texts, GPT2, "gigatoken")
        assert ids.tolist() == [i for text in texts for i in GPT2.encode(text)]
        assert list(workers.Gigatoken.idle) == [backend] * kept
    checked = []
    monkeypatch.setattr(workers, "encode_text", lambda text, tokenizer: checked.append(text) or np.array([1, 2, 3]))
    backend.seen = 1000
    with pytest.raises(UserError, match=r"differ on the document that begins 'text 24'; .* --backend tiktoken"):
        backend.encode(texts)
    assert checked == ["text 24"]  # 1024 = 2 * 512


def test_tiktoken_steps_in_where_gigatoken_fails(monkeypatch):
    class Panic(BaseException):
        pass

    def panic(self, texts):
        raise Panic

    monkeypatch.setattr(workers.Gigatoken, "encode", panic)
    monkeypatch.setattr(workers.Gigatoken, "idle", deque())
    ids, _ = workers.encode_documents([[text] for text in NASTY], GPT2, "gigatoken")
    np.testing.assert_array_equal(ids, reference(NASTY))


def test_a_panic_names_the_document(monkeypatch):
    class Panic(BaseException):
        pass

    def panic(text):
        raise Panic("the regex engine gave up")

    monkeypatch.setattr(GPT2, "encode", panic)
    with pytest.raises(UserError, match="the document that begins 'Once upon' can't be tokenized: the regex engine"):
        workers.encode_documents([["Once upon"]], GPT2, "tiktoken")


# ----------------------------------------------------------------------------------------------------------------------
# Order and parts


def documents(out: Path) -> list[tuple]:
    return split_documents(stored(out))


def split_documents(tokens: np.ndarray) -> list[tuple]:
    return [tuple(document) for document in np.split(tokens, np.flatnonzero(tokens == 50256))[1:]]


def test_shuffle(tmp_path):
    texts = [f"document {i}" for i in range(300)]
    inputs = [write_parquet(tmp_path / f"{i}.parquet", texts[100 * i : 100 * i + 100], rows=10) for i in range(3)]
    build(tmp_path / "plain", *inputs)
    build(tmp_path / "one", *inputs, shuffle=1, shard_size=400)
    build(tmp_path / "again", *inputs, shuffle=1, shard_size=400, workers=2)
    build(tmp_path / "two", *inputs, shuffle=2)
    plain, one, two = documents(tmp_path / "plain"), documents(tmp_path / "one"), documents(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    assert sorted(plain) == sorted(one) == sorted(two) and len({tuple(plain), tuple(one), tuple(two)}) == 3
    place = {document: i for i, document in enumerate(plain)}
    first = [place[document] for document in one[:100]]
    assert len({i // 100 for i in first}) == 3  # of all files
    assert first[:10] != sorted(first[:10])  # and within a row group


@pytest.mark.parametrize("count", [2, 7])
def test_parts_side_by_side_are_one_set(tmp_path, count):
    texts = [f"document {i} " + "word " * (i % 9) for i in range(200)]
    inputs = [write_parquet(tmp_path / f"{i}.parquet", texts[40 * i : 40 * i + 40], rows=7) for i in range(5)]
    for i in range(count, 0, -1):
        assert i == count or not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
        build(tmp_path / "out", *inputs, part=f"{i}/{count}", shard_size=100)
    for path in (tmp_path / "out").glob("manifest.part-*"):
        assert json.loads(path.read_text())["complete"]
        path.unlink()
    build(tmp_path / "whole", *inputs)
    assert sorted(documents_over_parts(tmp_path / "out", count)) == sorted(documents(tmp_path / "whole"))


def test_parts_that_end_at_the_same_moment(tmp_path, monkeypatch):
    """Each is about to give manifest.json its name when the other does; and what a killed one left is removed."""
    path = write_parquet(tmp_path / "texts.parquet", ["some text"] * 60)
    out, replace, others = tmp_path / "out", os.replace, [(1, 2)]

    def slow(source, target):
        if Path(target).name == "manifest.json" and len(list(out.glob("manifest.part-*.json"))) == 2 and others:
            fineweb.join_parts(out, others.pop())
        replace(source, target)

    build(out, path, part="2/2", shard_size=50)
    monkeypatch.setattr(os, "replace", slow)
    assert build(out, path, part="1/2", shard_size=50)["complete"] and not others
    (out / "manifest.json.part-1-of-2.tmp").write_bytes(b"half")  # one was killed before it joined them
    (out / "manifest.json").unlink()
    assert build(out, path, part="1/2", shard_size=50)["complete"]
    assert not list(out.glob("*.tmp"))


def documents_over_parts(out: Path, count: int) -> list[tuple]:
    stored(out)
    found = []
    for i in range(count):  # a document may run over the end of a shard into the part's next
        paths = sorted((p for p in out.glob("*.npy") if int(p.stem[-6:]) % count == i), key=lambda p: p.stem[-6:])
        joined = np.concatenate([np.load(path) for path in paths]) if paths else np.empty(0)
        found += split_documents(joined)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Death and resurrection


class Killed(BaseException):
    pass


def die_after(monkeypatch, calls: int):
    """Let one of the moments at which files change be the last: the `calls`-th."""
    left = [calls]

    def mortal(function):
        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (fineweb, "sha256_of"),
        (fineweb, "write_array"),
        (workers, "tokenize_chunk"),
        (fineweb.Fetcher, "release"),
        (fineweb.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))


def build_with_deaths(out: Path, moments: list[int], *inputs: Path, **flags) -> None:
    for calls in moments:
        with pytest.MonkeyPatch.context() as patch:
            die_after(patch, calls)
            try:
                build(out, *inputs, **flags)
            except Killed:
                end_of_fetching()
                continue
            break
    build(out, *inputs, **flags)


def end_of_fetching() -> None:
    """A process that is killed takes its threads along; here the next attempt must not meet those of the last."""
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()


@pytest.mark.parametrize("flags", [{}, {"shuffle": 3}, {"max_tokens": 500}, {"val_size": 10**6}], ids=str)
def test_killed_at_any_moment(tmp_path, flags):
    texts = [f"document {i} " + "word " * (i % 9) for i in range(120)]
    inputs = [
        write_parquet(tmp_path / "a.parquet", texts[:60], rows=7),
        write_jsonl(tmp_path / "b.jsonl.gz", texts[60:]),
    ]
    build(tmp_path / "whole", *inputs, shard_size=150, **flags)
    stored(tmp_path / "whole")
    for moment in [*range(1, 60, 7), 100]:
        out = tmp_path / f"out{moment}"
        build_with_deaths(out, [moment, 2, 7], *inputs, shard_size=150, **flags)
        assert contents(out) == contents(tmp_path / "whole"), moment


@st.composite
def jobs(draw):
    alphabet = st.sampled_from("ab \n\x00é👩\u2028'") | st.characters(exclude_categories=["Cs"])
    return {
        "texts": draw(st.lists(st.text(alphabet, max_size=40), min_size=1, max_size=25)),
        "rows": draw(st.integers(1, 9)),
        "shard_size": draw(st.integers(1, 60)),
        "val_size": draw(st.none() | st.integers(0, 60)),
        "backend": draw(st.sampled_from(["tiktoken", "auto"])),
        "deaths": draw(st.lists(st.integers(1, 60), max_size=3)),
        "kind": draw(st.sampled_from(["parquet", "jsonl", "jsonl.gz"])),
    }


def check_job(job: dict) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / f"texts.{job['kind']}", Path(folder) / "out"
        if job["kind"] == "parquet":
            write_parquet(path, job["texts"], job["rows"])
        else:
            write_jsonl(path, job["texts"])
        flags = {name: job[name] for name in ("shard_size", "val_size", "backend")}
        build_with_deaths(out, job["deaths"], path, **flags)
        np.testing.assert_array_equal(stored(out), reference(job["texts"]))


@settings(max_examples=40, deadline=None)
@given(jobs())
def test_any_documents_any_sizes_any_deaths(job):
    check_job(job)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(jobs())
def test_any_documents_any_sizes_any_deaths_at_length(job):
    check_job(job)


def test_killed_in_the_middle_of_decompressing(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "texts.jsonl.gz", ["some text"] * 30)

    def die(path):
        yield b'{"text": "some'
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sources, "decompressed", die)
        build(tmp_path / "out", path)
    build(tmp_path / "out", path)
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(["some text"] * 30))


def test_a_finished_set_is_left_alone(tmp_path, capsys):
    path = write_parquet(tmp_path / "texts.parquet", ["some text"] * 30)
    build(tmp_path / "out", path)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    build(tmp_path / "out", path)
    assert "is complete: 30 documents, 2 shards" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_other_flags_are_refused(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", ["some text"] * 30)
    build(tmp_path / "out", path, shard_size=20)
    before = contents(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"begun with other flags: --shard_size 30 \(it was 20\), --shuffle 1 \(it was None\);"
    ):
        build(tmp_path / "out", path, shard_size=30, shuffle=1)
    with pytest.raises(UserError, match=r"--dataset python-docs \(it was None\), --input None"):
        fineweb.main(fineweb.Config(dataset="python-docs", out=str(tmp_path / "out"), shard_size=20))
    write_parquet(path, ["other text"] * 40)
    with pytest.raises(UserError, match=r"texts.parquet changed"):
        build(tmp_path / "out", path, shard_size=20)
    assert contents(tmp_path / "out") == before


def test_shards_of_others_are_not_touched(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", ["some text"] * 30)
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out/edufineweb_train_000007.npy", np.zeros(5, np.uint16))
    with pytest.raises(UserError, match=r"edufineweb_train_000007.npy but no manifest.json that lists it"):
        build(tmp_path / "out", path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["edufineweb_train_000007.npy"]


@pytest.mark.parametrize("call", range(1, 16, 2))
def test_disk_full(tmp_path, monkeypatch, call):
    """Whichever file it strikes: clear words, nothing half done left, and all goes well once there is space."""
    path = write_jsonl(tmp_path / "texts.jsonl.gz", [f"document {i}" for i in range(100)])
    build(tmp_path / "whole", path, shard_size=100)
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device; .* the same command goes on from there"):
            build(tmp_path / "out", path, shard_size=100)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    build(tmp_path / "out", path, shard_size=100)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def test_verify(tmp_path, capsys):
    out = tmp_path / "out"
    path = write_parquet(tmp_path / "texts.parquet", [f"document {i}" for i in range(300)])
    manifest = build(out, path, shard_size=100)
    whole = contents(out)
    fineweb.main(fineweb.Config(out=str(out), verify=True))
    assert "shards have the sha256" in capsys.readouterr().out
    victim = out / manifest["shards"][3]["name"]
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    with pytest.raises(UserError, match=rf"1 of \d+ shards in .* missing or damaged: {victim.name}; delete them"):
        fineweb.main(fineweb.Config(out=str(out), verify=True))
    victim.unlink()  # as it says
    build(out, path, shard_size=100)
    assert contents(out) == whole


def test_verify_compares_with_the_source(tmp_path):
    """A set that is consistent in itself, but not what the source gives."""
    path = write_parquet(tmp_path / "texts.parquet", [f"document {i}" for i in range(300)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "encode_text", lambda text, tokenizer: np.array([1, 2, 3], np.uint16))
        build(tmp_path / "out", path, shard_size=100, backend="tiktoken")
    stored(tmp_path / "out")
    with pytest.raises(UserError, match=r"does not begin with the tokens of .*texts.parquet"):
        fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_lists(path: Path) -> Path:
    pq.write_table(pa.table({"text": [["a"]]}), path)
    return path


MISTAKES = {
    "null": (
        lambda d: write_parquet(d / "x.parquet", ["a"] * 7 + [None]),
        {},
        "row 7 of .*x.parquet has no text; --skip",
    ),
    "line": (lambda d: write(d / "x.jsonl", b'{"text": "a"}\n\n{"text": "b"\n'), {}, "line 3 of .*x.jsonl is not JSON"),
    "utf8": (
        lambda d: write(d / "x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
        {},
        "line 2 of .*x.jsonl is not JSON",
    ),
    "list": (lambda d: write(d / "x.jsonl", b"[1]\n"), {}, "line 1 of .*x.jsonl is not a JSON object but list"),
    "field": (
        lambda d: write(d / "x.jsonl", b'{"content": "a", "n": 1}\n'),
        {},
        r"no field 'text' .*one of: content, n",
    ),
    "number": (lambda d: write(d / "x.jsonl", b'{"text": 5}\n'), {}, "line 1 of .* holds int in 'text', not text"),
    "latin1": (lambda d: write(d / "x.txt", b"caf\xe9"), {}, "byte 3 of .*x.txt is not UTF-8"),
    "column": (
        lambda d: write_parquet(d / "x.parquet", ["a"], column="content"),
        {},
        "no column 'text'.*: id, content",
    ),
    "type": (
        lambda d: write_parquet(d / "x.parquet", ["a"]),
        {"text_column": "id"},
        "'id' of .* holds int64, not text",
    ),
    "list of strings": (
        lambda d: write_lists(d / "x.parquet"),
        {},
        r"'text' of .* holds list<.*string>, not text; choose another",
    ),
    "no parquet": (lambda d: write(d / "x.parquet", b"PAR1 not"), {}, "x.parquet is damaged or not what its name says"),
    "cut gz": (lambda d: write(d / "x.jsonl.gz", gzip.compress(b"{}" * 999)[:20]), {}, "x.jsonl.gz is damaged"),
    "no gz": (lambda d: write(d / "x.txt.gz", b"plain"), {}, "x.txt.gz is damaged"),
    "no zst": (lambda d: write(d / "x.txt.zst", b"plain text"), {}, "x.txt.zst is damaged"),
    "suffix": (lambda d: write(d / "x.doc", b""), {}, "x.doc: not of a known kind: .parquet .jsonl .txt"),
    "empty": (lambda d: write(d / "x.jsonl", b""), {}, "the source holds no document at all"),
    "nothing": (lambda d: d / "*.parquet", {}, r"\*.parquet: no file matches"),
    "missing": (lambda d: d / "x.parquet", {}, "x.parquet: No such file or directory; check the path"),
    "directory": (lambda d: d, {}, "no file of a known kind in this folder; give files"),
    "shard_size": (lambda d: d, {"shard_size": 0}, "--shard_size 0 must be at least 1"),
    "part": (lambda d: d, {"part": "3/2"}, "--part '3/2' must be I/N with 1 <= I <= N"),
    "val": (lambda d: d, {"val_size": 9, "max_tokens": 9}, "--val_size 9 leaves nothing to train on of --max_tokens 9"),
    "both": (lambda d: d, {"dataset": "python-docs"}, "--input and --dataset python-docs exclude each other"),
    "verify": (lambda d: d, {"verify": True}, "has no manifest.json to verify the shards against"),
}


@pytest.mark.parametrize("make, flags, words", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, make, flags, words):
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    with pytest.raises(UserError, match=words) as error:
        build(tmp_path / "out", path, **flags)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.npy*"))


def test_an_unreadable_directory(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read anything
    with pytest.raises(UserError, match=r"the directory .*locked is not readable"):
        build(tmp_path / "out", tmp_path / "locked/*.parquet")


def test_skip_bad_counts_and_goes_on(tmp_path, capsys):
    lines = [b'{"text": "one"}', b"broken", b'{"text": null}', b'{"text": "two"}', b"\xff\xfe", b'{"text": "three"}']
    inputs = [
        write(tmp_path / "a.jsonl", b"\n".join(lines)),
        write_parquet(tmp_path / "b.parquet", [None, "four", None, "five"], rows=2),
    ]
    manifest = build(tmp_path / "out", *inputs, skip_bad=True, shard_size=3)
    assert manifest["skipped"] == 5 and "5 documents could not be read" in capsys.readouterr().out
    np.testing.assert_array_equal(stored(tmp_path / "out"), reference(["one", "two", "three", "four", "five"]))


def test_what_is_skipped_is_counted_once_though_a_shard_is_made_again(tmp_path):
    texts = [None, "one", "two", None, "three", "four", None, "five", "six", None]
    path = write_parquet(tmp_path / "texts.parquet", texts, rows=2)
    for damaged in (0, 1, 2):
        out = tmp_path / f"out{damaged}"
        manifest = build(out, path, skip_bad=True, shard_size=3)
        whole = contents(out)
        (out / manifest["shards"][damaged]["name"]).unlink()
        assert build(out, path, skip_bad=True, shard_size=3)["skipped"] == 4
        assert contents(out) == whole


def test_a_mistake_is_one_line_and_exit_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "fineweb.py"), "--input", "nothing*.txt", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("fineweb.py: error: --input nothing*.txt: no file matches")
    assert not list(tmp_path.iterdir())


def test_importing_is_silent_and_light():
    code = (
        "import sys, threading, fineweb; heavy = {'pyarrow', 'datasets', 'huggingface_hub', 'tiktoken', "
        "'tqdm', 'gigatoken', 'torch'} & set(sys.modules); assert not heavy, heavy; "
        "assert threading.active_count() == 1"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
