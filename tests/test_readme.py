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
    gpus = {"needs GPUs", "needs 8 GPUs and a network", "needs SLURM and GPUs"}
    others = {"", "make", "needs a network", "needs nanoGPT's files", "needs hours"}
    for language, needs, _ in BLOCKS:
        known = {"sh": others | gpus, "python": {""}, "text": {""}}
        assert needs.strip() in known[language], needs


def test_every_picture_is_there_and_has_its_command():
    pictures = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(pictures) >= 4 and {path.name for path in (ROOT / "docs").iterdir()} == {p[5:] for p in pictures}
    for name in pictures:
        assert (ROOT / name).stat().st_size < 150_000
        by_demo = f"--out $(DEMO)/{name[5:].replace('demo', 'curves')}"
        assert re.search(rf"--(out|picture) {re.escape(name)}\b", README) or by_demo in makefile


def test_links_within_the_readme_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    titles = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target[1:] in titles if target.startswith("#") else (ROOT / target).exists(), target


@pytest.mark.timeout(900)  # a dozen processes, each of which imports torch
def test_commands_run_as_written(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "extras", tmp_path / "extras", ignore=shutil.ignore_patterns("__pycache__"))
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
