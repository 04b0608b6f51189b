"""The README promises what runs: its commands that need no GPU and no network are run here, in its order."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_block_says_what_it_needs():
    known = {"sh": {"", "make", "needs GPUs", "needs 8 GPUs and a network", "needs SLURM and GPUs", "needs a network"}}
    for language, needs, _ in BLOCKS:
        assert language in ("sh", "python", "text") and (language != "sh" or needs.strip() in known["sh"]), needs


def test_commands_run_as_written(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for language, needs, text in BLOCKS:
        if language == "sh" and not needs.strip():
            command = ["bash", "-euo", "pipefail", "-c", python + text]
        elif language == "python":
            command = [sys.executable, "-c", text]
        else:
            continue
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    for made in ("log/docs/curves.png", "exported/model.safetensors"):
        assert (tmp_path / made).exists()


@pytest.mark.parametrize("name", re.findall(r"^\| `([^|]*)` \|", README, re.MULTILINE))
def test_the_files_of_the_table_exist(name):
    for part in re.findall(r"[\w/]+\.py", name):
        assert (ROOT / part).exists()


def test_every_module_is_in_the_table():
    table = README[: README.index("## ")]
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in table]
