"""fineweb.py against a local server that answers the hub's calls, and misbehaves as hubs and networks do."""

import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from extras import sources
from extras.cli import UserError
from extras.manifest import SourceRecord
from extras.tokenizer import load_tokenizer

REPO = "HuggingFaceFW/fineweb-edu"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parent.parent


def make_files(folder: Path, files: int = 3, rows: int = 40, group: int = 16) -> list[str]:
    """Parquet files in FineWeb-Edu's schema; their texts, in order."""
    texts = []
    for number in range(files):
        mine = [f"file {number}, document {row}: " + "some words of it " * (row % 7) for row in range(rows)]
        path = folder / f"sample/10BT/{number:03d}_00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = [len(load_tokenizer("gpt2").encode(text)) for text in mine]
        table = pa.table({"text": mine, "id": [str(i) for i in range(rows)], "token_count": counts})
        pq.write_table(table, path, row_group_size=group)
        texts += mine
    (folder / "README.md").write_text("not data")
    return texts


def tokens_of(texts: list[str]) -> np.ndarray:
    return np.concatenate([[50256, *load_tokenizer("gpt2").encode(text)] for text in texts]).astype(np.uint16)


class Hub(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves `folder` as the dataset REPO. faults: ((method, part of the path), what to do), each used up once."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.faults, self.requests, self.pause = folder, [], [], 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        fault = self.take_fault(path)
        if isinstance(fault, int):
            self.reply(fault, b"busy", {"Retry-After": "1"})
        elif path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/{COMMIT}"):
            self.reply(200, json.dumps(self.info()).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self.send_file(self.server.folder / path.rpartition(COMMIT + "/")[2], fault)
        else:
            self.reply(404, b"no", {"X-Error-Code": "RepoNotFound"})

    def take_fault(self, path):
        for number, ((method, piece), _) in enumerate(self.server.faults):
            if method == self.command and piece in path:
                return self.server.faults.pop(number)[1]

    def info(self):
        files = sorted(path for path in self.server.folder.rglob("*") if path.is_file())
        siblings = [
            {"rfilename": p.relative_to(self.server.folder).as_posix(), "size": p.stat().st_size} for p in files
        ]
        configs = [
            {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        ]
        return {"id": REPO, "sha": COMMIT, "siblings": siblings, "cardData": {"configs": configs}}

    def send_file(self, path, fault):
        body = path.read_bytes()
        threading.Event().wait(self.server.pause)  # time.sleep is not what it was
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.reply(206, body[start:], headers)
        elif fault == "cut":  # the connection breaks in the middle of the file
            self.reply(200, body[: len(body) // 2], headers, length=len(body))
            self.close_connection = True
        elif fault == "short":  # a proxy's error page, say
            self.reply(200, body[:100], headers)
        else:
            self.reply(200, body, headers)

    def reply(self, status, body, headers, length=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    server = Hub(folder)
    server.texts = make_files(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when the library was imported
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # nobody waits for a test to be patient
    yield server
    server.shutdown()
    server.server_close()


def build(out, **settings) -> dict:
    fineweb.main(fineweb.Config(out=str(out), **{"workers": 0, "shard_size": 500} | settings))
    return json.loads((out / "manifest.json").read_text())


def stored(out: Path, manifest: dict) -> np.ndarray:
    return np.concatenate([np.load(out / shard["name"]) for shard in manifest["shards"]])


def check_whole(out: Path, hub) -> dict:
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["complete"]
    np.testing.assert_array_equal(stored(out, manifest), tokens_of(hub.texts))
    names = {"manifest.json", *(shard["name"] for shard in manifest["shards"])}
    assert {path.name for path in out.iterdir()} == names  # no downloads, no half shards
    return manifest


def test_the_default_command(hub, tmp_path):
    """`python fineweb.py` as anybody types it, in a process of its own, with workers."""
    command = [sys.executable, str(ROOT / "fineweb.py"), "--shard_size", "500"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    manifest = check_whole(tmp_path / "edu_fineweb10B", hub)
    assert manifest["source"]["revision"] == COMMIT
    assert [name for name, _ in manifest["source"]["files"]] == [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
    assert [shard["tokens"] for shard in manifest["shards"]][:-1] == [500] * (len(manifest["shards"]) - 1)
    assert manifest["shards"][0]["split"] == "val" and manifest["shards"][1]["split"] == "train"
    assert "100%" in done.stderr.splitlines()[-1]


FAULTS = {
    "busy listing": [(("GET", "/api/"), 429), (("GET", "/api/"), 500)],
    "busy head": [(("HEAD", "000_00000"), 429), (("HEAD", "001_00000"), 503)],
    "busy file": [(("GET", "000_00000"), 429), (("GET", "001_00000"), 500), (("GET", "001_00000"), 502)],
    "cut": [(("GET", "001_00000"), "cut")],
    "wrong length": [(("GET", "000_00000"), "short"), (("GET", "002_00000"), "short")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_server_in_trouble(hub, tmp_path, faults):
    hub.faults = list(faults)
    build(tmp_path / "out")
    assert not hub.faults  # each of them happened
    check_whole(tmp_path / "out", hub)


def test_a_cut_download_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)  # what the library keeps at a time
    hub.faults = [(("GET", "001_00000"), "cut")]
    build(tmp_path / "out")
    ranges = [r for method, path, r in hub.requests if method == "GET" and "001_00000" in path]
    assert len(ranges) == 2 and ranges[0] is None and ranges[1].startswith("bytes=")


def test_no_server_then_a_server(hub, tmp_path, monkeypatch):
    """What could not be reached is said; what is committed stays; the second run finishes the job."""
    out, port = tmp_path / "out", hub.server_port
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=rf"could not get dataset {REPO} from http://127.0.0.1:{port}"):
        build(out)
    assert not out.exists()
    again = Hub(hub.folder)  # on another port: the old one may be taken by now
    monkeypatch.setenv("HF_ENDPOINT", again.url)
    again.faults = [((method, "002_00000"), 500) for method in ("HEAD", "GET") for _ in range(200)]
    threading.Thread(target=again.serve_forever, daemon=True).start()
    try:
        with pytest.raises(UserError, match=r"could not get sample/10BT/002_00000.parquet"):
            build(out)
        begun = json.loads((out / "manifest.json").read_text())
        assert begun["shards"] and not begun["complete"] and not list(out.glob("*.tmp"))
        again.faults.clear()
        fetched = len(again.requests)
        build(out)
        assert not any("000_00000" in path for _, path, _ in again.requests[fetched:])  # nothing done twice
    finally:
        again.shutdown()
        again.server_close()
    check_whole(out, hub)


def test_two_files_on_the_disk_at_most(hub, tmp_path, monkeypatch):
    seen, release = [], sources.Fetcher.release

    def watched(fetcher, done):
        if fetcher.thread:
            fetcher.thread.join()
        seen.append(len(list((tmp_path / "out/downloads").rglob("*.parquet"))))
        release(fetcher, done)

    make_files(hub.folder, group=2)  # chunks enough that those in flight are of one file
    monkeypatch.setattr(sources.Fetcher, "release", watched)
    build(tmp_path / "out", shard_size=100)
    assert max(seen) == 2 and len(seen) > 8


def test_revision_part_and_keep_downloads(hub, tmp_path):
    manifest = build(tmp_path / "out", revision=COMMIT, keep_downloads=True)
    assert manifest["source"]["revision"] == COMMIT
    assert len(list((tmp_path / "out/downloads").rglob("*.parquet"))) == 3
    for i in (2, 3, 1):
        hub.requests.clear()
        manifest = build(tmp_path / "parts", part=f"{i}/3", val_size=100)
        assert manifest["complete"] == (i == 1)
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert fetched == [f"/datasets/{REPO}/resolve/{COMMIT}/sample/10BT/000_00000.parquet"]  # a part's own files
    assert [s["split"] for s in manifest["shards"]].count("val") == 1
    assert sum(s["tokens"] for s in manifest["shards"]) == len(tokens_of(hub.texts))
    fineweb.main(fineweb.Config(out=str(tmp_path / "parts"), verify=True))


@pytest.mark.parametrize(
    "dataset, words",
    [
        (f"{REPO}:sample-1BT", "has no configuration 'sample-1BT'; it has: default, sample-10BT"),
        ("somebody/something", "can't get dataset somebody/something"),
    ],
)
def test_what_the_hub_lacks(hub, tmp_path, dataset, words):
    with pytest.raises(UserError, match=re.escape(words)):
        build(tmp_path / "out", dataset=dataset)
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    pass


def kill_at(patch, number: int) -> None:
    """Let the `number`-th shard be the last that is recorded."""
    recorded, record = [], fineweb.record

    def mortal(*arguments, **keywords):
        record(*arguments, **keywords)
        recorded.append(1)
        if len(recorded) == number:
            raise Killed

    patch.setattr(fineweb, "record", mortal)


def offline(patch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr(time, "sleep", None)


def test_offline_is_said_at_once(hub, tmp_path, monkeypatch):
    """Before anything is tokenized, with the files that are missing; unless all that is needed is here."""
    with monkeypatch.context() as patch:
        offline(patch)
        with pytest.raises(UserError, match=r"can't get dataset .*: HF_HUB_OFFLINE is set; unset it, or use --input"):
            build(tmp_path / "new")
    make_files(hub.folder, group=2)
    for limit in (None, 300):  # the limit is reached in the first file
        out = tmp_path / f"out{limit}"
        settings = {"keep_downloads": True, "shard_size": 100, "max_tokens": limit}
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, 2)
            build(out, **settings)
        end_of_fetching()
        for path in sorted((out / "downloads").glob("*.parquet"))[1:]:
            path.unlink()
        before = {path.name for path in out.glob("*.npy")}
        with monkeypatch.context() as patch:
            offline(patch)
            if limit:
                assert build(out, **settings)["complete"]
            else:
                words = r"HF_HUB_OFFLINE is set, and still .* hub: sample/10BT/001_00000.parquet, .*/002_00000.parquet;"
                with pytest.raises(UserError, match=words):
                    build(out, **settings)
                assert {path.name for path in out.glob("*.npy")} == before
    build(tmp_path / "outNone", keep_downloads=True, shard_size=100)
    with monkeypatch.context() as patch:
        offline(patch)
        assert build(tmp_path / "outNone", keep_downloads=True, shard_size=100)["complete"]


def end_of_fetching() -> None:
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join()


def test_offline_on_a_resumed_set_ends_soon(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 1)
        build(tmp_path / "edu_fineweb10B")
    end_of_fetching()
    shutil.rmtree(tmp_path / "edu_fineweb10B/downloads")
    command = [sys.executable, str(ROOT / "fineweb.py"), "--shard_size", "500"]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set, and still to be fetched from the hub: sample/10BT/000_00000.parquet" in done.stderr


def test_which_files_to_train_on():
    def pick(names, configs=(), wanted=""):
        return sources.train_files(names, list(configs), wanted, "a/b")

    assert pick(["data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet", "x.txt"]) == [
        "data/train-0.parquet",
        "data/train-1.parquet",
    ]
    assert pick(["b.jsonl.gz", "a.jsonl.gz", "README.md"]) == ["a.jsonl.gz", "b.jsonl.gz"]
    assert pick(["README.md", ".gitattributes", "data.csv"]) == ["data.csv"]
    card = [{"config_name": "en", "data_files": {"train": ["en/**/*.parquet"], "test": "t.parquet"}}]
    assert pick(["en/x.parquet", "en/y/z.parquet", "t.parquet"], card) == ["en/x.parquet", "en/y/z.parquet"]
    card = [{"data_files": ["a/*.jsonl", "b/0?.jsonl"]}]
    assert pick(["b/01.jsonl", "b/1.jsonl", "a/x.jsonl", "a/y/z.jsonl"], card) == ["a/x.jsonl", "b/01.jsonl"]
    assert pick(["a/1.parquet", "a/b/2.parquet"], [{"data_files": "a/*"}]) == ["a/1.parquet"]
    with pytest.raises(UserError, match="several configurations; say a/b:NAME, of: en, fr"):
        pick(["x.parquet"], [{"config_name": "en"}, {"config_name": "fr"}])


def test_a_dataset_without_files_we_read(hub, tmp_path, monkeypatch):
    """`datasets` streams it; here in the place of the library's own requests stands a generator."""
    import datasets

    rows = [{"text": f"row {i} of a table", "n": i} for i in range(50)]

    def load_dataset(name, config, split, revision, streaming):
        assert (name, config, split, revision, streaming) == (REPO, "default", "train", COMMIT, True)
        return iter(rows)

    (hub.folder / "data/x").mkdir(parents=True)
    (hub.folder / "data/x/rows.csv").write_text("text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in rows))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manifest = build(tmp_path / "out", dataset=f"{REPO}:default")
    np.testing.assert_array_equal(stored(tmp_path / "out", manifest), tokens_of([row["text"] for row in rows]))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy", ".json"}


@pytest.mark.parametrize("error", [RuntimeError, ValueError, FileNotFoundError])
def test_a_dataset_that_datasets_cannot_read(tmp_path, monkeypatch, error):
    import datasets

    def load_dataset(*arguments, **settings):
        raise error("Dataset scripts are\nno longer supported")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(time, "sleep", None)  # no second try
    recorded = SourceRecord(dataset="a/b:c", revision=COMMIT, files=[("script.py", 9)])
    source = sources.hub_source("a/b:c", None, recorded, None)
    with pytest.raises(UserError, match=r"can't read a/b:c .Dataset scripts are no longer supported.; take another"):
        source.files[0].fetch(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO])
def test_errors_of_the_disk_are_not_the_hubs(monkeypatch, code):
    def fail():
        raise OSError(code, os.strerror(code), "here")

    monkeypatch.setattr(time, "sleep", None)
    with pytest.raises(OSError) as caught:
        sources.with_retries("x", fail)
    assert caught.value.errno == code and caught.value.filename == "here"


def test_a_hub_that_tells_no_sizes(hub, tmp_path, monkeypatch):
    info = Answer.info
    untold = lambda self: {"siblings": [s | {"size": None} for s in info(self)["siblings"]]}  # noqa: E731
    monkeypatch.setattr(Answer, "info", lambda self: info(self) | untold(self))
    build(tmp_path / "out")
    check_whole(tmp_path / "out", hub)


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of .bin files


def bin_file(ids, magic=20240520, version=1, count=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids, "<u2").tobytes()


@pytest.fixture
def bins(hub):
    """The hub with token files in place of text: 300 tokens for val, three times 500 to train on."""
    shutil.rmtree(hub.folder)
    hub.folder.mkdir()
    (hub.folder / "README.md").write_text("tokens")
    rng, hub.data = np.random.default_rng(0), {}
    for name in ("val_000000", "train_000001", "train_000002", "train_000003"):
        ids = rng.integers(0, 50257, 300 if "val" in name else 500)
        ids[::50] = 50256
        hub.data[f"finewebedu_{name}.bin"] = bin_file(ids)
    for name, data in hub.data.items():
        (hub.folder / name).write_bytes(data)
    return hub


def fetch(out, **settings) -> dict:
    fineweb.main(fineweb.Config(out=str(out), dataset=REPO, **settings))
    return json.loads((out / "manifest.json").read_text())


def contents(out: Path) -> dict:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_bins_are_fetched_as_they_are(bins, tmp_path, capsys):
    manifest = fetch(tmp_path / "out")
    files = contents(tmp_path / "out")
    del files["manifest.json"]
    assert files == bins.data and manifest["complete"]
    assert manifest["tokenizer"] == {"name": "gpt2", "vocab_size": 50257} and manifest["source"]["revision"] == COMMIT
    lengths = fineweb.count.__globals__["token_lengths"]("gpt2")
    for shard, (name, data) in zip(manifest["shards"], bins.data.items()):
        ids = np.frombuffer(data[1024:], "<u2")
        expected = {"name": name, "split": name.split("_")[1], "tokens": len(ids), "sha256": sha256(data)}
        expected |= {"documents": np.count_nonzero(ids == 50256), "bytes": lengths[ids].sum()}
        assert {key: shard[key] for key in expected} == expected
    assert "4 shards, 1,500 train and 300 val tokens" in capsys.readouterr().out
    fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))
    assert "4 shards have the sha256" in capsys.readouterr().out
    bins.requests.clear()
    fetch(tmp_path / "out")
    assert not bins.requests and "nothing to do" in capsys.readouterr().out


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_killed_fetch_goes_on(bins, tmp_path, monkeypatch, moment):
    """It looks incomplete until it is complete, and nothing that is there is fetched again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, moment)
        fetch(tmp_path / "out")
    end_of_fetching()
    begun = json.loads((tmp_path / "out/manifest.json").read_text())
    assert not begun["complete"] and [shard["name"] for shard in begun["shards"]] == list(bins.data)[:moment]
    with pytest.raises(UserError, match="sound so far, but not complete"):
        fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))
    bins.requests.clear()
    fetch(tmp_path / "out")
    assert not [path for _, path, _ in bins.requests if any(name in path for name in list(bins.data)[:moment])]
    fetch(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_fetch_that_is_killed_with_sigkill(bins, tmp_path):
    """In processes of their own, when so many files have come: what has a name is whole, and the rest still comes."""
    command = [sys.executable, str(ROOT / "fineweb.py"), "--dataset", REPO, "--out"]
    fetch(tmp_path / "whole")
    for number in (0, 1, 2, 3):
        bins.pause, out = 0.6, tmp_path / f"out{number}"  # anew: a file that came ahead is not asked for again
        bins.requests.clear()
        process = subprocess.Popen([*command, str(out)], stdout=-3, stderr=-3)
        while process.poll() is None and not (bins.requests and len(list(out.glob("*.bin"))) >= number):
            threading.Event().wait(0.01)
        threading.Event().wait(0.1)
        assert process.poll() is None
        process.kill()
        process.wait()
        for path in out.glob("*.bin"):
            assert path.read_bytes() == bins.data[path.name]
        bins.pause = 0
        assert subprocess.run([*command, str(out)], stdout=-3, stderr=-3, timeout=60).returncode == 0
        assert contents(out) == contents(tmp_path / "whole")


def test_max_tokens_limits_the_files(bins, tmp_path):
    for limit, number in ((1, 1), (500, 1), (501, 2), (10**9, 3)):
        bins.requests.clear()
        manifest = fetch(tmp_path / f"out{limit}", max_tokens=limit)
        assert [shard["split"] for shard in manifest["shards"]] == ["val"] + ["train"] * number
        assert len({path for _, path, _ in bins.requests if "resolve" in path}) == number + 1 and manifest["complete"]


BAD_BINS = {
    "magic": (bin_file([1, 2], magic=20240801), "begins with 20240801, 1, not 20240520, 1"),
    "version": (bin_file([1, 2], version=2), "begins with 20240520, 2, not 20240520, 1"),
    "count": (bin_file([1, 2], count=3), "header says 3 tokens, 1,030 bytes, and it has 1,028"),
    "negative": (bin_file([1, 2], count=-1), "header says -1 tokens"),
    "negative and short": (bin_file([], count=-5)[:1014], "header says -5 tokens"),
    "odd": (bin_file([1, 2]) + b"x", "header says 2 tokens, 1,028 bytes, and it has 1,029"),
    "cut": (bin_file([1, 2])[:700], "header says 2 tokens, 1,028 bytes, and it has 700"),
    "empty": (b"", "begins with 0, 0"),
    "no tokens": (bin_file([]), "it has no tokens"),
    "id": (bin_file([1, 50257]), "it has id 50257, and GPT-2's end at 50256"),
}


@pytest.mark.parametrize("data, words", BAD_BINS.values(), ids=BAD_BINS)
def test_a_bad_bin_is_named(bins, tmp_path, data, words):
    name = "finewebedu_train_000002.bin"
    (bins.folder / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"^{name} is not a whole .bin file of GPT-2 tokens: .*{re.escape(words)}"):
        fetch(tmp_path / "out")
    assert not (tmp_path / "out" / name).exists()
    (bins.folder / name).write_bytes(bins.data[name])  # mended, it is fetched anew
    assert len(fetch(tmp_path / "out")["shards"]) == 4


def test_a_damaged_bin_is_found_and_fetched_again(bins, tmp_path):
    fetch(tmp_path / "out")
    whole, path = contents(tmp_path / "out"), tmp_path / "out/finewebedu_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"zz")
    with pytest.raises(UserError, match=rf"1 of 4 shards in .* missing or damaged: {path.name}; delete them"):
        fineweb.main(fineweb.Config(out=str(tmp_path / "out"), verify=True))
    path.unlink()
    fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "flags",
    [{"shuffle": 1}, {"tokenizer": "bytes"}, {"part": "1/2"}, {"val_size": 9}, {"shard_size": 9}, {"format": "chat"}],
    ids=str,
)
def test_flags_that_tokens_cannot_have(bins, tmp_path, flags):
    with pytest.raises(UserError, match=rf"{REPO} holds tokens already, which --{next(iter(flags))} can't change"):
        fetch(tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()


def test_bins_of_others_are_not_touched(bins, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/fineweb_train_000001.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"fineweb_train_000001.bin but no manifest.json that lists it"):
        fetch(tmp_path / "out")
    assert contents(tmp_path / "out") == {"fineweb_train_000001.bin": b"precious"}
