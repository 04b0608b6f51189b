"""manifest.json as others may leave it: edited in any way, it misleads fineweb.py to nothing."""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fineweb
from extras import tokenize_workers as workers
from extras.cli import UserError
from extras.files import exclusive
from extras.manifest import (
    Cursor,
    Manifest,
    SourceRecord,
    checksum,
    is_plain,
    parse_part,
    read_manifest,
    write_manifest,
)
from extras.sources import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Killed(BaseException):
    pass


def kill_at_commit(patch, number: int) -> None:
    commits, commit = [], fineweb.ShardWriter.commit

    def mortal(*arguments, **keywords):
        commits.append(1)
        if len(commits) == number:
            raise Killed
        commit(*arguments, **keywords)

    patch.setattr(fineweb.ShardWriter, "commit", mortal)


def flags(root: Path, **more) -> dict:
    inputs = [str(root / "a.jsonl"), str(root / "b.txt")]
    return {"input": inputs, "tokenizer": "bytes", "shard_size": 300, "workers": 0} | more


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Inputs, a finished set `whole`, one that was stopped on the way, one in parts, one of the hub."""
    root = tmp_path_factory.mktemp("manifest")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(100)))
    (root / "b.txt").write_text("a text of many words " * 30)
    (root / "far.parquet").write_text("precious")
    fineweb.main(fineweb.Config(**flags(root), out=str(root / "whole")))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at_commit(patch, 4)
        fineweb.main(fineweb.Config(**flags(root), out=str(root / "begun")))
    for part in ("1/2", "2/2"):
        fineweb.main(fineweb.Config(**flags(root, part=part), out=str(root / "parts")))
    (root / "hub").mkdir()
    begun = read_manifest(root / "begun/manifest.json")
    source = {"dataset": "a/b", "input": None}
    files = [(f"data/{i}.jsonl", 100 * i) for i in range(3)]
    record = SourceRecord(dataset="a/b", revision=COMMIT, files=files)
    update = {"settings": begun.settings.model_copy(update=source), "source": record}
    for shard in begun.shards:
        shutil.copy(root / "begun" / shard.name, root / "hub")
    cursors = {"starts": [(0, i, 0) for i in range(len(begun.shards))], "cursor": (2, 0, 0)}
    write_manifest(root / "hub", begun.model_copy(update=update | cursors))
    assert read_manifest(root / "hub/manifest.json")
    make_bins(root / "bins")
    return root


TOKENS = {"dataset": "a/b", "input": [], "tokenizer": "gpt2", "shard_size": 100_000_000}  # flags of a set of .bin files


def make_bins(out: Path) -> None:
    """A finished set of two .bin files of a hub dataset; the hub has a third."""
    out.mkdir()
    names = ["x_val_000000.bin", "x_train_000001.bin", "x_train_000002.bin"]
    record = SourceRecord(dataset="a/b", revision=COMMIT, files=[(name, 1030) for name in names])
    manifest = fineweb.begin(fineweb.Config(**TOKENS), None, Source(record, []))
    for number, name in enumerate(names[:2]):
        (out / name).write_bytes(b"x" * 1030)
        manifest.complete = number == 1
        tokens = workers.Tokens(np.array([50256, 1, 2], np.uint16), None)
        fineweb.record(out / name, manifest, Cursor(number, 0, 0), Cursor(number + 1, 0, 0), [tokens])


JUNK = st.sampled_from(
    [None, True, -1, 0, 1, 7, 10**6, 2**53, 10**400, 1.5, float("nan"), "", "x", "0" * 64, "../../far.parquet", "/far"]
    + ["edufineweb_train_000002.npy", "1/99999999999", "all of 3", [], {}, [0, 0, 0], [9, 0, 0], [0, -1, 0], ["a", 1]]
)


def places(value, path=()):
    """The paths of all values in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def edits(draw):
    """A function from the manifest's bytes to those of an edited one."""
    if draw(st.integers(0, 4)) == 0:
        at, drop, data = draw(st.integers(0, 5000)), draw(st.integers(0, 5000)), draw(st.binary(max_size=9))
        return lambda text: text[: at % len(text)] + data + text[at % len(text) + drop :]
    changes = draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("srrrdac"), JUNK), min_size=1, max_size=3))
    forge = draw(st.booleans())

    def edit(text):
        document = json.loads(text)
        for number, what, junk in changes:
            change(document, number, what, copy.deepcopy(junk))
        if forge:
            with contextlib.suppress(ValueError):
                document["checksum"] = checksum(Manifest.model_validate_json(json.dumps(document)))
        return json.dumps(document).encode()

    return edit


def change(document, number: int, what: str, junk) -> None:
    """Replace, delete, add a key or repeat an element, copy another value: at one of all places."""
    paths = [path for path in places(document) if path]
    path = paths[number % len(paths)]
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    if what == "s":
        owner[key] = owner[key] + (1 if number % 2 else -1) if type(owner[key]) is int else junk
    elif what == "r":
        owner[key] = junk
    elif what == "d":
        del owner[key]
    elif what == "c":
        other = document
        for step in paths[number * 7 % len(paths)]:
            other = other[step]
        owner[key] = copy.deepcopy(other)
    elif isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    else:
        owner["more"] = junk


def tree(folder: Path) -> dict:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_edit(root: Path, name: str, edit, verify: bool) -> None:
    """Refused in one line, or the set that is made is what it would have been; and nothing else was touched."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        shutil.copytree(root / name, here / "inner/out", copy_function=shutil.copy2)
        (here / "far.parquet").write_text("precious")
        path = here / "inner/out" / ("manifest.part-1-of-2.json" if name == "parts" else "manifest.json")
        text = path.read_bytes()
        path.write_bytes(edit(text))
        forged, before, began = is_forged(path, text), tree(root), time.monotonic()
        more = {"parts": {"part": "1/2"}, "hub": {"dataset": "a/b", "input": []}, "bins": TOKENS}.get(name, {})
        config = fineweb.Config(**flags(root, **more), out=str(here / "inner/out"), verify=verify)
        try:
            fineweb.main(config)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            if not verify and not forged and name not in ("parts", "bins"):
                assert tree_of_shards(here / "inner/out") == tree_of_shards(root / "whole")
        assert time.monotonic() - began < 10
        assert tree(root) == before and (here / "far.parquet").read_text() == "precious"
        assert {path.name for path in here.rglob("*")} >= {"inner", "out", "far.parquet"}
        assert {path.name for path in here.iterdir()} == {"inner", "far.parquet"}


def is_forged(path: Path, text: bytes) -> bool:
    """Whether it is another manifest than before, but one of which nobody can tell: its checksum is right."""
    try:
        return read_manifest(path) != Manifest.model_validate_json(text)
    except UserError:
        return False


def tree_of_shards(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in out.glob("*.npy*")}


NAMES = st.sampled_from(["begun", "whole", "parts", "hub", "bins"])
FUZZ = {"deadline": 10_000, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@settings(max_examples=50, **FUZZ)
@given(NAMES, edits(), st.booleans())
def test_an_edited_manifest(root, name, edit, verify):
    check_edit(root, name, edit, verify)


@pytest.mark.slow
@settings(max_examples=2000, **FUZZ)
@given(NAMES, edits(), st.booleans())
def test_two_thousand_edited_manifests(root, name, edit, verify):
    check_edit(root, name, edit, verify)


def set_at(path: tuple, value):
    def edit(text):
        document = owner = json.loads(text)
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value
        return json.dumps(document).encode()

    return edit


NAMED = {
    "cursor.1: Input should be greater": (("cursor", 1), -1),
    "starts and shards differ in number": (("starts",), []),
    "shards.1.name should be edufineweb_train_000001.npy": (("shards", 1, "name"), "edufineweb_train_000007.npy"),
    "shards.0.name: String should match": (("shards", 0, "name"), "../far.npy"),
    "source does not fit settings": (("source", "input"), ["b.txt"]),
    "shards.2.tokens: Input should be greater": (("shards", 2, "tokens"), -5),
    "shards.0.sha256: String should match": (("shards", 0, "sha256"), "abc"),
    "checksum does not match the rest": (("eot",), 50256),
    "--part '1/1e30' must be": (("settings", "part"), "1/1e30"),
    "source.files.0.1: Input should be": (("source", "files", 0, 1), -1),
    "format: Input should be 1 or 2": (("format",), 9),
    "more: Extra inputs": (("more",), 1),
}


@pytest.mark.parametrize("words, path, value", [(words, *change) for words, change in NAMED.items()], ids=list(NAMED))
def test_file_and_field_are_named(root, tmp_path, words, path, value):
    shutil.copytree(root / "begun", tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_bytes(set_at(path, value)(manifest.read_bytes()))
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"manifest.json is not as fineweb.py wrote it \(.*{words}"):
        fineweb.main(fineweb.Config(**flags(root), out=str(tmp_path / "out")))
    assert tree(tmp_path) == before


def forge(path: Path, **changes) -> None:
    write_manifest(path.parent, read_manifest(path).model_copy(update=changes))


@pytest.mark.parametrize("cursor", [(2, 0, 0), (1, 1, 0), (9, 9, 9), (1, 0, 631), (0, 1, 0)])
def test_a_cursor_past_the_end(root, tmp_path, cursor):
    shutil.copytree(root / "begun", tmp_path / "out")
    forge(tmp_path / "out/manifest.json", cursor=cursor)
    with pytest.raises(UserError, match=r"continues past the end of the source \(cursor\)"):
        fineweb.main(fineweb.Config(**flags(root), out=str(tmp_path / "out")))
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize(
    "words, path, value",
    [
        ("shards, cursor and source.files do not fit", ("cursor",), [9, 0, 0]),
        ("shards, cursor and source.files do not fit", ("settings", "part"), "2/3"),
        ("shards.1.split does not fit its name", ("shards", 1, "split"), "val"),
        ("shards.1.name should be x_train_000001.bin", ("shards", 1, "name"), "y_train_000001.bin"),
        ("shards.1.name: String should match", ("shards", 1, "name"), "../x_train_000001.bin"),
        ("in source.files is not a plain relative path", ("source", "files", 2, 0), "../x_train_000001.bin"),
    ],
)
def test_a_manifest_of_fetched_shards(root, tmp_path, words, path, value):
    shutil.copytree(root / "bins", tmp_path / "out")
    fineweb.main(fineweb.Config(**TOKENS, out=str(tmp_path / "out")))
    manifest = tmp_path / "out/manifest.json"
    manifest.write_bytes(set_at(path, value)(manifest.read_bytes()))
    with pytest.raises(UserError, match=rf"manifest.json is not as fineweb.py wrote it \(.*{words}"):
        fineweb.main(fineweb.Config(**TOKENS, out=str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["../../far.parquet", "/far.parquet", "a/../../far", "C:\\far", "..\\far", "a\0b", ""])
def test_a_source_that_leads_out_of_its_directory(root, tmp_path, name):
    assert not is_plain(name)
    shutil.copytree(root / "hub", tmp_path / "x/out")
    (tmp_path / "far.parquet").write_text("precious")
    path = tmp_path / "x/out/manifest.json"
    path.write_bytes(set_at(("source", "files", 0, 0), name)(path.read_bytes()))
    config = fineweb.Config(**flags(root, dataset="a/b", input=[]), out=str(tmp_path / "x/out"))
    with pytest.raises(UserError, match=r"in source.files is not a plain relative path"):
        fineweb.main(config)
    assert (tmp_path / "far.parquet").read_text() == "precious"


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_link_in_place_of_the_downloads(root, tmp_path):
    shutil.copytree(root / "hub", tmp_path / "out")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/0.jsonl").write_text("precious")
    os.symlink(tmp_path / "far", tmp_path / "out/downloads")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        fineweb.main(fineweb.Config(**flags(root, dataset="a/b", input=[]), out=str(tmp_path / "out")))
    assert (tmp_path / "far/0.jsonl").read_text() == "precious"


def test_a_manifest_of_the_first_format(root, tmp_path):
    """No checksum, no stamps, no val_input: it is gone on with."""
    shutil.copytree(root / "begun", tmp_path / "out")
    path = tmp_path / "out/manifest.json"
    document = json.loads(path.read_text())
    for owner, name in ((document, "checksum"), (document, "val_source"), (document["source"], "stamps")):
        del owner[name]
    del document["settings"]["val_input"], document["settings"]["dataset"], document["source"]["dataset"]
    path.write_text(json.dumps(document | {"format": 1}))
    fineweb.main(fineweb.Config(**flags(root), out=str(tmp_path / "out")))
    assert tree_of_shards(tmp_path / "out") == tree_of_shards(root / "whole")


@pytest.mark.parametrize("part", ["0/1", "2/1", "1/99999999999", "1/1e30", "-1/2", "1", "", "١/٢", "1/2/3"])
def test_parts_that_cannot_be(part):
    with pytest.raises(UserError, match=r"must be I/N with 1 <= I <= N <= 10000, such as 2/8"):
        parse_part(part)


def hold(path, ready, done):
    with exclusive(Path(path)):
        ready.set()
        done.wait(60)


def test_two_in_one_directory(root, tmp_path):
    """The second is refused, and told who is there; the lock ends with its owner, even if that is killed."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out/manifest.json.lock"
    first = context.Process(target=hold, args=(str(lock), ready, done))
    first.start()
    assert ready.wait(60)
    config = fineweb.Config(**flags(root), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=rf"out is being written by process {first.pid} on .*; wait for it, or end it"):
        fineweb.main(config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [lock.name]
    first.kill()
    first.join()
    assert lock.exists()
    fineweb.main(config)
    assert not lock.exists() and tree_of_shards(tmp_path / "out") == tree_of_shards(root / "whole")


@pytest.mark.parametrize("what", ["shard", "source"])
def test_overwritten_in_place(root, tmp_path, what):
    """At the same size: a shard is made again; another source is not taken for the one that the run began with."""
    for name in ("a.jsonl", "b.txt"):
        shutil.copy2(root / name, tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at_commit(patch, 4)
        fineweb.main(fineweb.Config(**flags(tmp_path), out=str(tmp_path / "out")))
    config = fineweb.Config(**flags(tmp_path), out=str(tmp_path / "out"))
    if what == "shard":
        path = tmp_path / "out/edufineweb_train_000001.npy"
        np.save(path, np.load(path)[::-1])
        fineweb.main(config)
        assert tree_of_shards(tmp_path / "out") == tree_of_shards(root / "whole")
    else:
        (tmp_path / "b.txt").write_text("a text of more words " * 30)
        with pytest.raises(UserError, match=r"was begun before .*b.txt changed"):
            fineweb.main(config)


def test_a_source_that_was_only_touched(root, tmp_path, capsys):
    for name in ("a.jsonl", "b.txt"):
        shutil.copy(root / name, tmp_path)
    fineweb.main(fineweb.Config(**flags(tmp_path), out=str(tmp_path / "out")))
    os.utime(tmp_path / "a.jsonl", (1, 1))
    fineweb.main(fineweb.Config(**flags(tmp_path), out=str(tmp_path / "out")))
    assert "a.jsonl: modified, but size and samples are the same" in capsys.readouterr().out
