"""Every entry point has a --help that can be read, and fails with a message that says what to do, status 2."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, USER_ERRORS

import train_gpt2
from extras import cli, hardware
from extras.cli import UserError

ENTRY_POINTS = ["train_gpt2", "fineweb", "hellaswag", "sample", "plot_log"]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_help_fits_the_screen_and_explains_every_flag(name):
    module, environment = importlib.import_module(name), os.environ | {"COLUMNS": "120"}
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")
    assert done.returncode == 0 and done.stderr == ""
    assert max(len(line) for line in done.stdout.splitlines() if line[:1] in "╭│╰") <= 120
    assert "usage: " in done.stdout and "\nContents:" not in done.stdout and f"python {name}.py" in done.stdout
    options = done.stdout[done.stdout.index("show this help message") :]
    for field in set(vars(module.Config())) - {"run_dirs"}:
        described = re.search(rf"│ (?:-\w \w+, )?--{field}[ ,][^\n]*\n?(?:(?!│ -).*\n)*", options)
        words = described[0].split("(default")[0] if described else ""
        assert len(re.findall(r"[a-z]{2,}", words)) >= 2, f"--{field} has no explanation"


def test_help_of_the_trainer_comes_at_once():
    """torch's import is most of it. CPU seconds, since others may use the machine, the fewer of two."""

    def seconds(*arguments: str) -> float:
        code = "import os, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True); "
        code += "print(os.times().children_user + os.times().children_system)"
        return float(subprocess.check_output([sys.executable, "-c", code, *arguments]))

    ours, torchs = [str(ROOT / "train_gpt2.py"), "--help"], ["-c", "import torch.nn.parallel, torch.utils.checkpoint"]
    assert min(seconds(*ours) for _ in range(2)) < min(seconds(*torchs) for _ in range(2)) + 1


def test_the_numbers_of_the_recipes_in_the_help_are_the_recipes():
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    comments = dict(re.findall(r"^    (\w+): .* = None  # .*\(gpt2: ([^)]*)\)$", text, re.MULTILINE))
    assert set(comments) == set(train_gpt2.RECIPES["gpt2"])
    for name, text in comments.items():
        values = [train_gpt2.RECIPES[recipe][name] for recipe in ("gpt2", "fast")]
        assert text.split(", fast: ") == [value if isinstance(value, str) else f"{value:g}" for value in values], name


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--a is 3;\n  try 4"), "error: --a is 3; try 4"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"), "error: out of memory: a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "error: out of memory: a smaller"),
        (MemoryError(), "error: out of memory: a smaller"),
    ],
)
def test_failures_are_one_line(error, line, capsys, monkeypatch):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as exit_:
        cli.run(main, importlib.import_module("sample").Config, "", [])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and line in said and said.count("\n") == 1
    monkeypatch.setattr(train_gpt2, "main", main)
    with pytest.raises(SystemExit) as exit_:
        train_gpt2.run_command_line([])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and line in said and said.count("\n") == 1


def test_what_is_not_the_users_keeps_its_traceback(monkeypatch):
    def main(config):
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        cli.run(main, importlib.import_module("sample").Config, "", [])
    monkeypatch.setattr(train_gpt2, "main", main)
    with pytest.raises(RuntimeError, match="of ours"):
        train_gpt2.run_command_line([])


def test_a_lack_of_memory_is_no_mistake_in_a_file():
    mistake = cli.user_error("weights.pt is damaged", RuntimeError, advice="use another")
    with pytest.raises(UserError, match=r"^weights.pt is damaged: other shapes; use another$"), mistake:
        raise RuntimeError("other shapes")
    for lack in (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()):
        with pytest.raises(type(lack)), cli.user_error("weights.pt is damaged", Exception, advice="use another"):
            raise lack


@pytest.mark.parametrize("error, speaks", [(train_gpt2.UserError, False), (train_gpt2.LocalError, True)])
def test_who_speaks_among_ranks(error, speaks, monkeypatch, capsys):
    def main(config):
        raise error("no")

    monkeypatch.setenv("RANK", "9")
    monkeypatch.setattr(train_gpt2, "main", main)
    for local_rank in ("0", "1"):  # the first of its node speaks, for its node may be the only one to meet the error
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(SystemExit):
            train_gpt2.run_command_line([])
        assert ("rank 9: no" in capsys.readouterr().err) == (speaks or local_rank == "0")


def test_an_old_torch_is_named(monkeypatch):
    for version in ("2.10.0+cu128", "1.13.1"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(USER_ERRORS, match=r"is too old; 2\.11 to 2\.13 work: pip install"):
            hardware.find_device("cpu")
    monkeypatch.setattr(torch, "__version__", "2.11.0a0+git1")
    assert hardware.find_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "command, line",
    [
        (["train_gpt2.py", "--dropout", "0.1"], "there is no --dropout here"),
        (["train_gpt2.py", "--timeout_minutes", "0"], "--timeout_minutes is 0.0; it must be more than 0"),
        (["train_gpt2.py", "--learning-rate", "1"], "there is no --learning_rate here; it is called --max_lr"),
        (["train_gpt2.py"], "no train shards in 'edu_fineweb10B'; run fineweb.py first"),
        (["train_gpt2.py", "--max_steps", "ten"], "--max-steps: invalid literal for int() with base 10: 'ten'"),
        (["train_gpt2.py", "--max-step", "9"], "--max-steps INT"),
        (["train_gpt2.py", "--quark"], "Unrecognized options: --quark"),
        (["train_gpt2.py", "--total-batch-size=100000"], "is not a multiple of --seq_len 1024; try 100352"),
        (["sample.py", "--prompt", "a"], "no run in log/; name a checkpoint"),
        (["plot_log.py"], "no log file"),
    ],
)
def test_the_first_mistakes(command, line, tmp_path):
    command = [sys.executable, ROOT / command[0], *command[1:]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "RANK": "0"})
    said = result.stderr.replace("_", "-")
    assert result.returncode == 2 and line.replace("_", "-") in said and "Traceback" not in said
    assert said.count("\n") == 1 or "─" in said, "one line; a flag that can't be parsed, tyro's box"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"RANK": "x"}, {"RANK": "5"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"}])
def test_an_environment_that_makes_no_sense_costs_one_line(settings, tmp_path):
    command = [sys.executable, ROOT / "train_gpt2.py", "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **settings})
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert next(iter(settings)) in result.stderr and "let torchrun set them" in result.stderr


def test_without_docstrings_and_asserts_the_scripts_still_answer():
    for script in ("train_gpt2.py", "fineweb.py", "sample.py", "plot_log.py", "hellaswag.py"):
        line = [sys.executable, "-OO", str(ROOT / script), "--quark"]
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
