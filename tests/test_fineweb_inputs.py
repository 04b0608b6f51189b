"""What people give fineweb.py: every source ends whole or is named, whatever it throws; folders, formats, val files."""

import gzip
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import fineweb
from extras import readers, sources
from extras.cli import UserError
from extras.tokenizer import load_tokenizer


def build(out: Path, *inputs, **flags) -> dict:
    settings = {"workers": 0, "tokenizer": "bytes"} | flags
    fineweb.main(fineweb.Config(input=[str(path) for path in inputs], out=str(out), **settings))
    return json.loads((out / "manifest.json").read_text())


def texts_in(out: Path, split: str = "") -> list[str]:
    paths = sorted(out.glob(f"edufineweb_{split}*.npy"), key=lambda path: path.name[-10:])
    ids = np.concatenate([np.load(path) for path in paths])
    pieces = np.split(ids, np.flatnonzero(ids == 256))[1:]
    return [load_tokenizer("bytes").decode_bytes(piece[1:]).decode() for piece in pieces]


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


TEXTS = [f"document {i} of some words" for i in range(3000)]


@pytest.mark.parametrize("suffix", ["jsonl.zst", "txt.zst", "jsonl.gz", "txt.gz"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_compressed_file_that_was_cut(tmp_path, suffix, skip_bad):
    path = tmp_path / f"cut.{suffix}"
    data = lines(TEXTS)
    data = gzip.compress(data) if suffix.endswith("gz") else zstandard.compress(data)
    for size in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=rf"cut.{suffix} is damaged"):
            build(tmp_path / "out", path, skip_bad=skip_bad)
        assert not list((tmp_path / "out").glob("*.npy"))


def test_zstd_frames_of_all_sorts(tmp_path):
    """Several frames, one that is to be skipped, an empty one, and a window as long as `zstd --long=31` makes."""
    cuts = [lines(TEXTS[i : i + 500]) for i in range(0, 3000, 500)]
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"abcde"
    long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=29))
    frames = [*map(zstandard.compress, cuts[:-1]), skippable, zstandard.compress(b"")]
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        file.write(b"".join(frames))
        with long.stream_writer(file, closefd=False) as writer:
            writer.write(cuts[-1])
    build(tmp_path / "out", tmp_path / "a.jsonl.zst")
    assert texts_in(tmp_path / "out") == TEXTS


def column(kind: str):
    """A column of three rows, of which the second is not UTF-8."""
    rows = [b"plain", b"caf\xe9 noir", b"the end"]
    binary = pa.array(rows, pa.binary())
    if kind == "dictionary":
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), column("string"))
    types = {"string": pa.binary(), "large_string": pa.large_binary(), "string_view": pa.binary_view()}
    binary = binary.cast(types[kind])
    to = {"string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view()}[kind]
    return pa.Array.from_buffers(to, 3, binary.buffers())


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_rows_that_are_not_utf8(tmp_path, kind):
    try:
        pq.write_table(pa.table({"text": column(kind)}), tmp_path / "bad.parquet")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        pytest.skip(f"pyarrow does not write it: {error}")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"row 1 of .*bad.parquet is not UTF-8; --skip_bad leaves"):
            build(tmp_path / f"out{workers}", tmp_path / "bad.parquet", workers=workers)
        manifest = build(tmp_path / f"skip{workers}", tmp_path / "bad.parquet", workers=workers, skip_bad=True)
        assert texts_in(tmp_path / f"skip{workers}") == ["plain", "the end"] and manifest["skipped"] == 1


@pytest.mark.parametrize("name", ["text", "token_count"])
def test_a_damaged_page(tmp_path, name):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": TEXTS, "token_count": range(len(TEXTS))}), path, use_dictionary=False)
    row_group, data = pq.read_metadata(path).row_group(0), bytearray(path.read_bytes())
    damaged = next(c for c in map(row_group.column, range(2)) if c.path_in_schema == name)
    for i in range(damaged.data_page_offset, damaged.data_page_offset + damaged.total_compressed_size):
        data[i] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.parquet is damaged .*; get the file again"):
        build(tmp_path / "out", path)


@pytest.mark.parametrize("name", ["text", "token_count"])
def test_two_columns_of_one_name(tmp_path, name):
    names = ["text", "token_count", name]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array(["b"])], names)
    pq.write_table(table, tmp_path / "x.parquet")
    if name == "text":
        with pytest.raises(UserError, match=r"x.parquet has 2 columns 'text'"):
            build(tmp_path / "out", tmp_path / "x.parquet")
    else:
        build(tmp_path / "out", tmp_path / "x.parquet")
        assert texts_in(tmp_path / "out") == ["a"]


def test_whatever_a_reader_throws_names_the_place(tmp_path, monkeypatch):
    def fail(chunk, options):
        raise KeyError("surprise")

    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    monkeypatch.setitem(readers.READERS, "jsonl", fail)
    with pytest.raises(UserError, match=r"bytes 0 to \d+ of .*a.jsonl is damaged .*KeyError: 'surprise'"):
        build(tmp_path / "out", tmp_path / "a.jsonl")


def test_a_long_text_is_not_left_out_by_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"some words " * 50 + b"\xff" + b" more words" * 50)
    with pytest.raises(UserError, match=r"byte 550 of .*a.txt is not UTF-8; the file is one document, too long"):
        build(tmp_path / "out", tmp_path / "a.txt", skip_bad=True)


def test_many_small_files_take_linear_time(tmp_path):
    """With a few loops over all files for each file, as there were, this takes minutes."""
    (tmp_path / "in").mkdir()
    for i in range(3000):
        (tmp_path / f"in/{i:06d}.txt").write_text(f"Document number {i}")
    began = time.monotonic()
    build(tmp_path / "out", tmp_path / "in")
    assert time.monotonic() - began < 30
    assert texts_in(tmp_path / "out") == [f"Document number {i}" for i in range(3000)]


def test_a_folder_and_all_suffixes(tmp_path):
    folder = tmp_path / "my [data] x"
    (folder / "b").mkdir(parents=True)
    array = [{"text": "in an array"}, {"text": "and\nanother"}]
    files = {"a.ndjson": lines(["nd"]), "b/c.json": json.dumps(array, indent=2).encode(), "d.json.gz": lines(["gz"])}
    files |= {"e.jsonl": lines(["line"]), "f.txt": b"text", "g.md": b"not this", ".h.txt": b"nor this"}
    files["i.json.zst"] = zstandard.compress(b"\xef\xbb\xbf \n" + json.dumps(array).encode())
    for name, data in files.items():
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    build(tmp_path / "out", folder)
    expected = ["nd", "in an array", "and\nanother", "gz", "line", "text", "in an array", "and\nanother"]
    assert texts_in(tmp_path / "out") == expected
    build(tmp_path / "glob", folder / "*.txt")
    assert texts_in(tmp_path / "glob") == ["text"]
    (tmp_path / "bad.json").write_text('[{"text": "a"}, {"te')
    with pytest.raises(UserError, match=r"bad.json is damaged: Unterminated string"):
        build(tmp_path / "bad", tmp_path / "bad.json")


def test_alpaca_as_it_is_published(tmp_path):
    records = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Hi", "output": "A"}]
    (tmp_path / "alpaca.json").write_text(json.dumps(records, indent=4))
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("alpaca.json", "alpaca.jsonl"):
        build(tmp_path / f"out-{name}", tmp_path / name, format="alpaca", val_size=20)
    arrays = [[np.load(path).tolist() for path in sorted(out.glob("*.npy"))] for out in tmp_path.glob("out-*")]
    assert arrays[0] == arrays[1]


@pytest.mark.parametrize("name", ["./mydata", "mydata/", "data/of/mine", "my data", "C:\\data", "../up", "a--b"])
def test_a_dataset_that_is_a_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mydata").mkdir()
    with pytest.raises(UserError, match=r"--dataset .* is not the name of a dataset .*; --input takes files"):
        fineweb.main(fineweb.Config(dataset=name, out="out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and names that are bytes")
def test_odd_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe.jsonl is not a regular file"):
        build(tmp_path / "out", tmp_path / "pipe.jsonl")
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"some text")
    except OSError:
        return  # macOS takes only UTF-8
    for _ in range(2):
        build(tmp_path / "out", os.fsdecode(path))
    assert texts_in(tmp_path / "out") == ["some text"]


@pytest.mark.parametrize("flags", [{}, {"shuffle": 1}, {"part": "2"}, {"workers": 2}], ids=str)
def test_val_input(tmp_path, flags):
    """All of it is val, whatever its size and the order, and nothing else is."""
    (tmp_path / "v.jsonl").write_bytes(lines(f"val {i}" for i in range(50)))
    (tmp_path / "w.json").write_text(json.dumps([{"text": "val 50"}]))
    for i in range(3):
        (tmp_path / f"t{i}.jsonl").write_bytes(lines(TEXTS[100 * i : 100 * i + 100]))
    val = [str(tmp_path / "v.jsonl"), str(tmp_path / "w.json")]
    inputs, count = [tmp_path / f"t{i}.jsonl" for i in range(3)], int(flags.get("part", 1))
    for i in range(count):
        part = {"part": f"{i + 1}/{count}"} if count > 1 else {}
        manifest = build(tmp_path / "out", *inputs, val_input=val, shard_size=300, **flags | part)
    assert manifest["complete"] and manifest["shards"][0]["split"] == "val"
    assert texts_in(tmp_path / "out", "val") == [f"val {i}" for i in range(51)]
    assert [shard["split"] for shard in manifest["shards"]].count("val") == 1
    if count == 1:
        assert sorted(texts_in(tmp_path / "out", "train")) == sorted(TEXTS[:300])
    fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))


def test_val_input_that_cannot_be(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for words, val, flags in (
        ("--val_input holds no document", "empty.jsonl", {}),
        ("--val_size does not go with --val_input", "t.jsonl", {"val_size": 9}),
        ("nothing to train on: --val_input has all 30 tokens", "t.jsonl", {"max_tokens": 30}),
        ("--val_input .*nowhere.txt: No such file", "nowhere.txt", {}),
    ):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "out", tmp_path / "t.jsonl", val_input=[str(tmp_path / val)], **flags)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_which_documents_are_val_is_said(tmp_path, capsys):
    for name in ("neg", "pos"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(f"{name} {i}" for i in range(3000)))
    words = "Validation uses only the first"
    build(tmp_path / "a", tmp_path / "neg.jsonl", val_size=4000)
    assert words not in capsys.readouterr().out
    build(tmp_path / "b", tmp_path / "neg.jsonl", tmp_path / "pos.jsonl", val_size=4000)
    assert words in (said := capsys.readouterr().out) and "documents, all from the first of 2 files" in said
    assert "--shuffle 1 mixes" in said and "--val_input FILE" in said
    build(tmp_path / "c", tmp_path / "neg.jsonl", tmp_path / "pos.jsonl", val_size=4000, shuffle=1)
    assert words not in capsys.readouterr().out
    build(tmp_path / "d", tmp_path / "neg.jsonl", val_size=100)
    assert f"{words} 16 documents, perhaps unlike the rest: --shuffle" in capsys.readouterr().out
    build(tmp_path / "e", tmp_path / "neg.jsonl", val_size=3)
    said = capsys.readouterr().out
    assert f"{words} document, perhaps unlike the rest" in said and "tokens): expected, no failure." in said


def test_verify_without_the_source(tmp_path, capsys):
    """The checksums are enough; that there was nothing to compare with is said. And nothing is written."""
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    build(tmp_path / "out", tmp_path / "t.jsonl.gz")
    verify = fineweb.Config(out=str(tmp_path / "out"), verify=True)
    if os.name == "posix" and os.getuid():
        (tmp_path / "out").chmod(0o555)
    fineweb.main(verify)
    assert "tokens are those of the source" in capsys.readouterr().out
    (tmp_path / "t.jsonl.gz").rename(tmp_path / "elsewhere.gz")
    fineweb.main(verify)
    said = capsys.readouterr().out
    assert "not compared with the source: --input" in said and "shards have the sha256 of the manifest" in said
    (tmp_path / "out").chmod(0o755)


def test_stale_downloads(tmp_path, monkeypatch):
    """What a killed run unpacked is used for the file that it came from, not for another of that name."""
    path, out = tmp_path / "t.jsonl.gz", tmp_path / "out"
    path.write_bytes(gzip.compress(lines(TEXTS)))

    class Killed(BaseException):
        pass

    def die(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fineweb.ShardWriter, "write", die)
        build(out, path)
    assert len(list((out / "downloads").iterdir())) == 1
    path.write_bytes(gzip.compress(lines(reversed(TEXTS))))
    (out / "manifest.json").unlink()
    build(out, path)
    assert texts_in(out) == TEXTS[::-1] and not (out / "downloads").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fineweb.ShardWriter, "write", die)
        build(tmp_path / "again", path)
    monkeypatch.setattr(sources, "decompressed", None)  # it is there
    build(tmp_path / "again", path)
    assert texts_in(tmp_path / "again") == TEXTS[::-1]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("out", ["file", "file/x", "loop", "n" * 300, "/proc/x", "out"])
def test_an_out_that_cannot_be(tmp_path, out):
    (tmp_path / "t.jsonl").write_bytes(lines(TEXTS[:9]))
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "out/manifest.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"File exists|Not a directory|symbolic links|too long|No such|Is a directory"):
        build(tmp_path / out, tmp_path / "t.jsonl")
