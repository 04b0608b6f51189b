"""train_gpt2.py is copied and edited: alone in a directory it trains; a fork's few lines break nothing else."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from test_train import same_weights
from tiny import ROOT, flags, read_log, tiny_config, token_set

BLOCKER = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):  # as if nothing but torch, numpy and tyro were installed
    return None if name.split(".")[0] in BLOCKED else found(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return token_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A directory with train_gpt2.py in it and nothing else, in an environment with only what that needs."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("# make test")[0].splitlines()
    packages = {line.split("==")[0].replace("-", "_") for line in lines if "==" in line} - {"torch", "numpy", "tyro"}
    (tmp_path / "blocker").mkdir()
    blocker = BLOCKER.replace("BLOCKED", repr(packages | {"extras", "hellaswag"}))
    (tmp_path / "blocker" / "sitecustomize.py").write_text(blocker)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocker"))
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "train_gpt2.py", tmp_path / "alone")
    return tmp_path / "alone"


def start(folder, config, ranks=1, **options) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "train_gpt2.py", *flags(config)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes | options)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize("ranks", [1, 2])
def test_alone_it_trains_is_killed_and_ends_as_if_it_had_not_been(alone, data, ranks):
    settings = {"order": "shuffle", "micro_batch": 2, "max_steps": 40, "save_every": 8, "val_every": 8, "log_every": 1}
    straight = tiny_config(data, alone / "straight", **settings, sample_every=10, hella_every=10)
    said = finish(start(alone, straight, ranks))
    left_out = "training without samples and HellaSwag: extras/ is not beside train_gpt2.py"
    assert said.count(left_out) == 1 and "EVAL    40 | val " in said and "\nval: " in said
    killed = replace(straight, log_dir=str(alone / "killed"), resume=True)
    process = start(alone, killed, ranks, stderr=subprocess.DEVNULL)
    assert any("step    19 |" in line for line in process.stdout)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(alone, killed, ranks))
    logs = [read_log(alone / name) for name in ("straight", "killed")]
    assert all(logs[0][stream] == logs[1][stream] for stream in ("train", "val", "norm", "lr"))
    assert '# restart {"step": ' in (alone / "killed" / "log.txt").read_text()
    assert same_weights(alone / "straight" / "ckpt_000040.pt", alone / "killed" / "ckpt_000040.pt")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_alone_it_trains_compiled(alone, data):
    config = tiny_config(data, alone / "log", max_steps=3, compile=True, n_layer=1)
    finish(start(alone, config))
    eager = replace(config, log_dir=str(alone / "eager"), compile=False)
    finish(start(alone, eager))
    logs = [read_log(alone / name)["train"] for name in ("log", "eager")]
    assert list(logs[0].values()) == pytest.approx(list(logs[1].values()), abs=1e-4)


@pytest.mark.parametrize("changes", [{"recipe": "fast"}, {"init_from": "gpt2"}, {"track": "tensorboard"}])
def test_a_setting_that_needs_extras_says_so(alone, data, changes):
    process = start(alone, tiny_config(data, alone / "log", **changes))
    error = process.communicate()[1]
    assert process.returncode == 2 and error.count("\n") == 1 and not (alone / "log").exists()
    assert error.endswith("error: a setting needs more than this file: extras/ is not beside train_gpt2.py\n")


def test_a_single_missing_file_is_named(tmp_path, data):
    shutil.copy(ROOT / "train_gpt2.py", tmp_path)
    shutil.copytree(ROOT / "extras", tmp_path / "extras", ignore=shutil.ignore_patterns("muon.py", "__pycache__"))
    process = start(tmp_path, tiny_config(data, tmp_path / "log", recipe="fast"))
    assert "extras/muon.py is not beside train_gpt2.py" in process.communicate()[1] and process.returncode == 2


# ----------------------------------------------------------------------------------------------------------------------
# Forks


def fork(tmp_path, *edits: tuple[str, str]):
    """A copy of the project whose trainer has been edited: every `old` becomes `new`."""
    folder = tmp_path / "fork"
    folder.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    for name in ("extras", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "train_gpt2.py").read_text(encoding="utf-8")
    changed = 0
    for old, new in edits:
        assert old in text, old
        changed += text.count(old)
        text = text.replace(old, new)
    (folder / "train_gpt2.py").write_text(text, encoding="utf-8")
    return folder, changed


def call(folder, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


FORKS = {  # edits, and whether transformers' GPT-2 is still the same model
    "activation": ([('F.gelu(self.c_fc(x), approximate="tanh")', "F.relu(self.c_fc(x)).square()")], False),
    "RMSNorm": ([("nn.LayerNorm(", "nn.RMSNorm(")], False),
    "dropout": (
        [
            ("x + self.attn(self.ln_1(x), mask, cache, start)",
             "x + F.dropout(self.attn(self.ln_1(x), mask, cache, start), 0.1, self.training)"),
            ("return x + self.mlp(self.ln_2(x))", "return x + F.dropout(self.mlp(self.ln_2(x)), 0.1, self.training)"),
        ],
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORKS)
def test_another_model_takes_few_lines_and_all_else_goes_on(tmp_path, data, name):
    edits, is_gpt2 = FORKS[name]
    folder, changed = fork(tmp_path, *edits)
    assert changed <= 4
    config = tiny_config(data, "log", max_steps=4, save_every=2, val_every=2, sample_every=4, max_lr=3e-2)
    for line in (flags(config), flags(replace(config, max_steps=8, resume=True))):
        done = call(folder, "train_gpt2.py", *line)
        assert done.returncode == 0 and "  > Hello" in done.stdout, done.stderr
    assert max(read_log(folder / "log")["train"]) == 7 and read_log(folder / "log")["train"][7] < 5.3
    done = call(folder, "sample.py", "--prompt", "a", "--max_new_tokens", "5", "--device", "cpu")
    assert done.returncode == 0 and done.stdout.startswith("a"), done.stderr
    done = call(folder, "plot_log.py", "log", "--out", "curves.png")
    assert done.returncode == 0 and (folder / "curves.png").exists(), done.stderr
    done = call(folder, "sample.py", "--export", "exported")
    if is_gpt2:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and "no plain GPT-2, transformers would compute something else" in done.stderr
        assert not (folder / "exported").exists()


def test_one_more_evaluation_is_a_function_and_a_line_and_one_more_flag_is_a_line(tmp_path, data):
    evaluation = 'def wnorm(run, stop):\n    return {"wnorm": float(sum(p.norm() for p in run.raw_model.parameters()))}'
    folder, _ = fork(
        tmp_path,
        ("EVALUATIONS = {", f'{evaluation}\n\n\nEVALUATIONS = {{\n    "wnorm": ("val_every", wnorm),'),
        ("    seed: int = 1337", "    beta2: float = 0.95  # of AdamW\n    seed: int = 1337"),
        ('"betas": (0.9, 0.95)', '"betas": (0.9, config.beta2)'),
    )
    config = flags(tiny_config(data, "log", max_steps=4, val_every=2))
    done = call(folder, "train_gpt2.py", *config, "--beta2", "0.5")
    assert done.returncode == 0 and "| wnorm " in done.stdout, done.stderr
    log = (folder / "log" / "log.txt").read_text()
    assert set(read_log(folder / "log")["wnorm"]) == {0, 2, 4}
    assert json.loads(re.search(r"# config (.*)", log)[1])["beta2"] == 0.5
    assert re.search(r"--beta2 FLOAT +of AdamW \(default: 0.95\)", call(folder, "train_gpt2.py", "--help").stdout)


def test_a_script_in_the_root_and_more_lines_in_the_trainer_fail_no_test_of_the_house(tmp_path):
    folder, _ = fork(tmp_path, ('    """The loop: evaluate', '    """The loop:\n\n\n\n    evaluate'))
    (folder / "mine.py").write_text("import train_gpt2\nraise SystemExit('executed')\n" + "x = 1\n" * 3000)
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    done = call(folder, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_house.py")
    assert done.returncode == 0, done.stdout
