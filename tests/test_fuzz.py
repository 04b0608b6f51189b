"""Files of our formats, edited at random: a script works as before, or says in one line what is wrong, exit status 2.

Never a traceback, never 10 seconds, never a byte written outside the directory it works in. manifest.json as fineweb.py
reads it has its own tests in test_fineweb_manifest.py.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_fineweb_manifest import change
from tiny import flags, tiny_config

import extras.cli
import fineweb
import hellaswag
import plot_log
import sample
import train_gpt2

SECONDS = 10
SHAPE = {"n_layer": 1, "n_embd": 8, "n_head": 2, "seq_len": 8, "total_batch_size": 16, "micro_batch": 2}


def edited(edits: int, slow: int = 2000):
    """The test runs with this many edits in make test, always the same ones, and with `slow` others in make soak."""
    return pytest.mark.parametrize("edits", [edits, pytest.param(slow, marks=pytest.mark.slow)])


def fuzz(edits: int, strategy, check) -> None:
    """check(edit) for so many edits."""
    rules = {"max_examples": edits, "derandomize": edits <= 50, "deadline": None, "database": None}
    rules |= {"phases": [Phase.generate], "suppress_health_check": [HealthCheck.too_slow]}  # they are small as they are
    settings(**rules)(given(strategy)(check))()


# ----------------------------------------------------------------------------------------------------------------------
# Running a command line in this process


WRITING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
allowed, outside = None, []  # the directory that may be written to, while a command runs; what else was


def watch(event: str, arguments: tuple) -> None:
    """An audit hook: notes whatever this process changes outside of `allowed`."""
    if allowed and (event in WRITING or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))):
        paths = [os.fsdecode(path) for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        paths = paths[:1] if event == "open" else paths
        outside.extend(
            f"{event} {path}" for path in paths
            if not os.path.realpath(path).startswith(allowed) and "__pycache__" not in path and path != os.devnull
        )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(watch)  # there is no way to take it out again


def run(script, argv: list[str], directory: Path) -> str:
    """What the command says in its one line of exit status 2; "" if it succeeds. All it writes is in `directory`."""
    global allowed
    out, err, status, began = io.StringIO(), io.StringIO(), 0, time.monotonic()
    allowed = os.path.realpath(directory)
    outside.clear()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if script is train_gpt2:
                script.run_command_line(argv)
            else:
                extras.cli.run(script.main, script.Config, script.__doc__, argv)
    except SystemExit as end:
        status = end.code
    finally:
        allowed = None
    said = [line for line in err.getvalue().splitlines() if " error: " in line]
    assert (status, len(said)) in ((0, 0), (2, 1)), (status, err.getvalue())
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert not outside, outside
    assert time.monotonic() - began < SECONDS, said
    return said[0] if said else ""


# ----------------------------------------------------------------------------------------------------------------------
# Edits


NUMBERS = [None, True, False, -1, 0, 1, 2, 3, 10**6, 2**31, 2**53, 2**63, 10**30, 1.5, -0.0, 1e30, float("nan")]
NUMBERS += [float("inf"), float("-inf")]
TEXTS = ["", "x", "2", "nan", "0" * 64, "gpt2", "bytes", "../../far", "/far", "~/far", "\x00", "\ud800", "ä" * 300]
JUNK = [*NUMBERS, *TEXTS, "edufineweb_train_000002.npy", "../far_train_000001.npy", [], {}, [0], [[]], {"a": {}}]
PIECES = [b"[" * 100_000, b"9" * 5000, b"1e999", b"NaN", b"\x00", b"\xff\xfe", b"\r", b"\n", b"{", b"]", b'"', b"#"]



@dataclass
class Raw:
    """Bytes cut, overwritten, or put in."""

    at: int
    drop: int
    data: bytes

    def __call__(self, text: bytes) -> bytes:
        at = self.at % (len(text) + 1)
        return text[:at] + self.data + text[at + self.drop :]


@dataclass
class Structured:
    """A document of dicts and lists, changed at up to three places."""

    changes: list

    def __call__(self, document):
        for number, what, junk in self.changes:
            with contextlib.suppress(ZeroDivisionError):  # nothing is left of it
                change(document, number, what, junk() if callable(junk) else copy.deepcopy(junk))
        return document


@dataclass
class Json:
    edit: Structured

    def __call__(self, text: bytes) -> bytes:
        return json.dumps(self.edit(json.loads(text))).encode()


PLACE = st.integers(0, 10**6)
RAW = st.builds(
    Raw, PLACE, st.sampled_from([0, 0, 1, 2, 7, 100, 10**6]), st.one_of(st.binary(max_size=9), st.sampled_from(PIECES))
)


def structured(junk=JUNK):
    changes = st.tuples(PLACE, st.sampled_from("srrrdac"), st.sampled_from(junk))
    return st.builds(Structured, st.lists(changes, min_size=1, max_size=3))


JSON = st.one_of(RAW, *[st.builds(Json, structured())] * 3)


# ----------------------------------------------------------------------------------------------------------------------
# The files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """data: shards, as fineweb.py makes them. log: a run of two steps on them. model: that model, exported."""
    home = tmp_path_factory.mktemp("home")
    (home / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i}" * 9}) + "\n" for i in range(60)))
    sizes = {"tokenizer": "bytes", "shard_size": 2000, "val_size": 500, "workers": 0}
    fineweb.main(fineweb.Config(input=[str(home / "text.jsonl")], out=str(home / "data"), **sizes))
    train_gpt2.main(tiny_config(home / "data", home / "log", **SHAPE, max_steps=2, val_every=1, save_every=0))
    sample.main(sample.Config(model=str(home / "log"), export=str(home / "model")))
    plot_log.main(plot_log.Config([str(home / "log")], out=str(home / "curves.png")))  # makes matplotlib's caches
    return home


def trained(home: Path, here: Path, **changes) -> str:
    """One more step of the run in here/log, on the shards in here/data."""
    settings = {"max_steps": 3, "val_every": 1, "save_every": 0, "resume": True} | changes
    return run(train_gpt2, flags(tiny_config(here / "data", here / "log", **SHAPE, **settings)), here)


@contextlib.contextmanager
def copied(home: Path, *names: str):
    """A directory with copies of these files of `home`."""
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            shutil.copytree(home / name, Path(folder, name))
        yield Path(folder)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@edited(50)
def test_a_manifest_as_the_trainer_reads_it(home, edits):
    def check(edit):
        with copied(home, "data", "log") as here:
            path = here / "data/manifest.json"
            path.write_bytes(edit(path.read_bytes()))
            before = files_in(here)
            if trained(home, here):
                assert files_in(here) == before, "a run that is refused touches nothing"

    fuzz(edits, JSON, check)


@dataclass
class Header:
    """Of a .npy file."""

    kind: str
    shape: object
    order: object

    def __call__(self, text: bytes) -> bytes:
        fields = {"descr": self.kind, "fortran_order": self.order, "shape": self.shape}
        header = repr(fields).ljust(117).encode() + b"\n"
        return text[:8] + len(header).to_bytes(2, "little") + header + text[128:]


KINDS = ["<u2", "<u2", "<u1", "<i8", ">u2", "<f4", "|O", "|S3", "<c8", "V0", "", "x", None]
SHAPES = [(2000,), (0,), (-1,), (2**62,), (1, 2000), (), "x", None, (2000, 2**40), (1999,), (True,), (10**30,)]
HEADERS = st.builds(Header, *map(st.sampled_from, (KINDS, SHAPES, [False, False, True, 1, None])))
SHARDS = st.sampled_from(["edufineweb_train_000001.npy", "edufineweb_val_000000.npy"])


@edited(50)
def test_the_header_of_a_shard(home, edits):
    def check(case):
        name, edit = case
        with copied(home, "data", "log") as here:
            path = here / "data" / name
            path.write_bytes(edit(path.read_bytes()))
            before = files_in(here)
            if trained(home, here):
                assert files_in(here) == before
            verified = run(fineweb, ["--verify", "--out", str(here / "data")], here)
            assert bool(verified) == (path.read_bytes() != (home / "data" / name).read_bytes())

    fuzz(edits, st.tuples(SHARDS, st.one_of(RAW, HEADERS)), check)


TENSORS = [  # that have no business in a checkpoint; made when they are needed
    lambda: torch.ones(3), lambda: torch.empty(0), lambda: torch.tensor(1.0),
    lambda: torch.ones(8, 8, dtype=torch.int64), lambda: torch.ones(8, 8, dtype=torch.float16),
    lambda: torch.ones(8, dtype=torch.float64), lambda: torch.ones(8, dtype=torch.complex64),
    lambda: torch.ones(8, dtype=torch.bool), lambda: torch.ones(8).to(torch.float8_e4m3fn),
    lambda: torch.ones(8, 8, device="meta"), lambda: torch.eye(8).to_sparse(),
    lambda: torch.ones(1).expand(10**12), lambda: torch.ones(1, 1).expand(8, 8),
    lambda: torch.full((8,), float("nan")), lambda: torch.ones(8, 24).T,
    lambda: torch.nn.Parameter(torch.ones(3)), lambda: torch.ones([1] * 60),
]  # fmt: skip


def edit_checkpoint(path: Path, edit: Raw | Structured) -> None:
    if isinstance(edit, Raw):
        path.write_bytes(edit(path.read_bytes()))
    else:
        torch.save(edit(torch.load(path, weights_only=True)), path)


CHECKPOINTS = st.one_of(RAW, *[structured(JUNK + TENSORS)] * 3)


@pytest.mark.parametrize("kind", ["V0", "|S0"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_header_of_items_without_a_size(home, kind, shape):
    """numpy maps some of them with a division by zero in C, which ends the process."""
    with copied(home, "data", "log") as here:
        path = here / "data/edufineweb_train_000001.npy"
        path.write_bytes(Header(kind, shape, False)(path.read_bytes()))
        assert "is not a whole .npy file" in trained(home, here)


@edited(50)
def test_a_checkpoint_that_is_resumed(home, edits):
    def check(edit):
        with copied(home, "data", "log") as here:
            edit_checkpoint(here / "log/ckpt_000002.pt", edit)
            before = files_in(here)
            said = trained(home, here)
            if said and "without a finite gradient" not in said:
                assert files_in(here) == before

    fuzz(edits, CHECKPOINTS, check)


SHORT = ["--prompt", "a", "--max_new_tokens", "2", "--device", "cpu"]


@edited(50)
def test_a_checkpoint_that_others_read(home, edits):
    def check(case):
        reader, edit = case
        with copied(home, "data", "log") as here:
            path = here / "log/ckpt_000002.pt"
            edit_checkpoint(path, edit)
            if reader == "init_from":
                trained(home, here, log_dir=str(here / "other"), init_from=str(path), resume=False)
            elif reader == "sample.py":
                run(sample, ["--model", str(path), *SHORT], here)
            elif reader == "plot_log.py":
                run(plot_log, ["--model", str(path), "--prompt", "a"], here)
            else:
                data = here / "few.jsonl"
                data.write_text(json.dumps({"ctx": "a", "label": 0, "endings": list("bcde")}))
                run(hellaswag, ["--model", str(path), "--device", "cpu", "--data", str(data)], here)

    readers = ["init_from", "sample.py", "hellaswag.py"] + ["plot_log.py"] * (edits > 50)
    fuzz(edits, st.tuples(st.sampled_from(readers), CHECKPOINTS), check)


@dataclass
class Lines:
    """A log with lines moved, made up, and a comment whose content has another form."""

    moved: list
    made: list
    comment: int | None
    edit: Structured

    def __call__(self, text: bytes) -> bytes:
        lines = text.decode().splitlines()
        if self.comment is not None:
            chosen = [number for number, line in enumerate(lines) if line.startswith("# ")]
            number = chosen[self.comment % len(chosen)]
            _, kind, content = lines[number].split(" ", 2)
            lines[number] = f"# {kind} {json.dumps(self.edit(json.loads(content)))}"
        for source, target in self.moved:
            lines.insert(target % len(lines), lines.pop(source % len(lines)))
        for place, line in self.made:
            lines[place % len(lines) : place % len(lines) + place % 2] = [line]
        return ("\n".join(lines) + "\n").encode()


WORDS = ["train", "val", "# restart", "# config", "# data", '{"step": -1}', '{"step": 2}', "{}", "[1]", "{", "\x85"]
WORDS += ["999999999999999999999", "-1", "1e400", "nan", "inf", "0x1", "1_0", "٣", "ms", "hella", "2", "9" * 5000]
LINE = st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join)
MOVED, MADE = (st.lists(st.tuples(PLACE, other), max_size=4) for other in (PLACE, LINE))
LOGS = st.one_of(RAW, *[st.builds(Lines, MOVED, MADE, st.one_of(st.none(), PLACE), structured())] * 3)


@edited(50)
def test_a_log_that_is_resumed(home, edits):
    def check(case):
        edit, keeps = case
        with copied(home, "data", "log") as here:
            path = here / "log/log.txt"
            path.write_bytes(edit(path.read_bytes()))
            if not keeps:
                (here / "log/ckpt_000002.pt").unlink()
            before = path.read_bytes()
            said = trained(home, here)
            whole = before[: before.rfind(b"\n") + 1]
            assert path.read_bytes().startswith(whole), "a log only grows"
            assert not said or not keeps, "a checkpoint is enough to go on from"

    fuzz(edits, st.tuples(LOGS, st.sampled_from([True, True, False])), check)


@edited(8, slow=300)  # a second each
def test_a_log_that_is_drawn(home, edits):
    def check(edit):
        with copied(home, "log") as here:
            path = here / "log/log.txt"
            path.write_bytes(edit(path.read_bytes()))
            run(plot_log, [str(here / "log")], here)

    fuzz(edits, LOGS, check)


@edited(50)
def test_a_model_of_transformers(home, edits):
    names = ["config.json", "config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]

    def check(case):
        name, edit = case
        with copied(home, "model") as here:
            path = here / "model" / name
            path.write_bytes(edit(path.read_bytes()))
            run(sample, ["--model", str(here / "model"), *SHORT], here)

    edits_of = {name: RAW if name.endswith("safetensors") else JSON for name in names}
    fuzz(edits, st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), edits_of[name])), check)


RECORDS = {
    "hellaswag": {"ctx": "A b", "ctx_a": "A", "ctx_b": "b", "activity_label": "C", "label": 1, "endings": list("bcde")},
    "arc": {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "B"},
    "piqa": {"goal": "To go", "sol1": "walk", "sol2": "sit", "label": 0},
    "lambada": {"text": "a word and another"},
}  # fmt: skip


def test_brackets_that_are_never_closed_take_no_time():
    """lm-eval's regular expression alone would look for each of them to the end: half an hour for this line."""
    began = time.monotonic()
    assert hellaswag.without_brackets("[a] b " + "[" * 500_000) == " b " + "[" * 500_000
    assert hellaswag.without_brackets("x [a\n] [b] y]") == "x [a\n]  y]".replace("  ", " ")
    assert time.monotonic() - began < SECONDS


@edited(50)
def test_examples_to_score(home, edits):
    def check(case):
        task, style, edit = case
        with copied(home) as here:
            lines = [json.dumps(RECORDS[task]).encode() for _ in range(3)]
            lines[1] = edit(lines[1])
            (here / "data.jsonl").write_bytes(b"\n".join(lines))
            more = ["--data", str(here / "data.jsonl"), "--style", style, "--out", str(here / "out.jsonl")]
            said = run(hellaswag, ["--model", str(home / "log"), "--device", "cpu", "--task", task, *more], here)
            assert (here / "out.jsonl").exists() != bool(said)

    fuzz(edits, st.tuples(st.sampled_from([*RECORDS]), st.sampled_from(["karpathy", "lm-eval"]), JSON), check)


@pytest.mark.skipif(os.name != "posix", reason="links, and names that are not UTF-8")
@pytest.mark.parametrize("name", ["file", "file/x", "loop", "n" * 300, "/proc/x", "not \udcff utf-8", "nul \0"])
def test_a_log_dir_that_cannot_be(home, tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.iterdir())
    directory = Path("/proc") if name.startswith("/") else tmp_path
    said = run(train_gpt2, flags(tiny_config(home / "data", tmp_path / name, **SHAPE)), directory)
    assert re.search("--log_dir .*(can't be made: .*choose another|that can't be printed)", said)
    assert sorted(tmp_path.iterdir()) == before


HUGE = {"total_batch_size": 2**50, "seed": 2**63, "max_lr": float("inf"), "n_layer": 2**62, "val_tokens": 2**70}


@pytest.mark.parametrize("name", HUGE)
def test_numbers_beyond_all_bounds_cost_one_line(home, tmp_path, name):
    changes = SHAPE | {"micro_batch": 0, "max_steps": 1, name: HUGE[name]}
    assert run(train_gpt2, flags(tiny_config(home / "data", tmp_path / "log", **changes)), tmp_path)


def test_what_is_written_outside_is_seen(tmp_path):
    """The test of the tests: each kind of writing that `run` is to find."""
    inside, far, farther = tmp_path / "inside", tmp_path / "far", tmp_path / "farther"
    inside.mkdir()
    for write in (far.touch, lambda: far.rename(farther), farther.unlink, far.mkdir, far.rmdir):
        script = type("script", (), {"main": lambda _, write=write: write(), "Config": plot_log.Config})
        with pytest.raises(AssertionError, match="far"):
            run(script, [], inside)
    script.main = lambda _: np.save(inside / "x.npy", np.zeros(3))
    assert run(script, [], inside) == ""
