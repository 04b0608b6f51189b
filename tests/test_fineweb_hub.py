"""fineweb.py against a local server that answers the hub's calls, and misbehaves as hubs and networks do."""

import errno
import hashlib
import http.server
import json
import os
import re
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


def make_files(folder: Path, files: int = 3, rows: int = 40) -> list[str]:
    """Parquet files in FineWeb-Edu's schema; their texts, in order."""
    texts = []
    for number in range(files):
        mine = [f"file {number}, document {row}: " + "some words of it " * (row % 7) for row in range(rows)]
        path = folder / f"sample/10BT/{number:03d}_00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        counts = [len(load_tokenizer("gpt2").encode(text)) for text in mine]
        table = pa.table({"text": mine, "id": [str(i) for i in range(rows)], "token_count": counts})
        pq.write_table(table, path, row_group_size=16)
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
        self.folder, self.faults, self.requests = folder, [], []
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
        for future in list(fetcher.coming.values()):
            future.result()
        seen.append(len(list((tmp_path / "out/downloads").rglob("*.parquet"))))
        release(fetcher, done)

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


def test_offline_is_said_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(time, "sleep", None)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it, or use --input"):
        build(tmp_path / "out")


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
