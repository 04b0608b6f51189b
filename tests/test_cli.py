"""Every entry point has a --help that can be read, and fails in one line that says what to do."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tiny import ROOT

import cli
import machine
from cli import UserError

ENTRY_POINTS = ["train_gpt2", "fineweb", "hellaswag", "sample", "plot_log"]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_fits_the_screen_and_names_every_knob_once(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit_:
        cli.run(module.main, module.Config, module.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and max(map(len, text.splitlines())) <= 120
    assert text.startswith("usage: ") and "\nContents:" not in text and f"python {name}.py" in text
    flags = text[text.index("show this help message") :]
    for field in vars(module.Config()):
        if field != "run_dirs":
            assert len(re.findall(rf"^  (?:-\w \S+, )?--{field}\b", flags, re.MULTILINE)) == 1, field
    groups = re.findall(r"^[a-z ]+:$", flags, re.MULTILINE)
    assert len(groups) == len(set(groups)) and (len(groups) > 1 or name == "plot_log")
    assert "(default: [" not in flags, "a list is shown as words"
    assert "--no-resume" not in flags and ("--no-compile" in flags) == (name == "train_gpt2")


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--a is 3;\n  try 4"), "error: --a is 3; try 4"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), "error: out of memory: a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "error: out of memory: a smaller"),
        (MemoryError(), "error: out of memory: a smaller"),
    ],
)
def test_failures_are_one_line(error, line, capsys):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(main, importlib.import_module("sample").Config, "", [])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and line in said and said.count("\n") == 1


def test_help_shows_lists_as_they_are_typed(capsys):
    @dataclass
    class Lists:
        words: list[str] = cli.knob(["a", "b"], "some")
        numbers: list[int] = cli.knob([1, 16], "more")

    with pytest.raises(SystemExit):
        cli.parse(Lists, "", ["--help"])
    output = capsys.readouterr().out
    assert "some (default: a b)" in output and "more (default: 1 16)" in output


def test_what_is_not_the_users_keeps_its_traceback():
    def main(config):
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        cli.run(main, importlib.import_module("sample").Config, "", [])


@pytest.mark.parametrize("rank, error, speaks", [("1", UserError, False), ("1", cli.LocalError, True)])
def test_who_speaks_among_ranks(rank, error, speaks, monkeypatch, capsys):
    def main(config):
        raise error("no")

    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        cli.run(main, importlib.import_module("sample").Config, "", [])
    assert ("rank 1: no" in capsys.readouterr().err) == speaks


def test_an_old_torch_is_named(monkeypatch):
    for version in ("2.10.0+cu128", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(UserError, match=r"is too old; 2\.11 to 2\.13 work: pip install"):
            machine.find_device("cpu")
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+git1")
    assert machine.find_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "command, line",
    [
        (["train_gpt2.py"], "no train shards in 'edu_fineweb10B'; run fineweb.py first"),
        (["train_gpt2.py", "--max_steps", "ten"], "argument --max_steps: invalid int value: 'ten'; --help lists"),
        (["train_gpt2.py", "--max-step", "9"], "--max_step 9; did you mean --max_steps? --help lists"),
        (["train_gpt2.py", "--quark"], "unrecognized arguments: --quark; --help lists the flags"),
        (["train_gpt2.py", "--total-batch-size=100000"], "is not a multiple of --seq_len 1024; try 100352"),
        (["sample.py", "--prompt", "a"], "no run in log/; name a checkpoint"),
        (["plot_log.py"], "no log file"),
    ],
)
def test_the_first_mistakes(command, line, tmp_path):
    command = [sys.executable, ROOT / command[0], *command[1:]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "RANK": "0"})
    assert result.returncode == 2 and line in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
