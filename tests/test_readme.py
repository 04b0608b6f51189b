"""README and docs/ promise what runs: commands that need no GPU and no network run here; all others are parsed."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import ROOT, token_set

import extras.checks
import extras.cli
import fineweb
import hellaswag
import plot_log
import sample
import train_gpt2

PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
PAGES |= {f"docs/{path.name}": path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
OTHERS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
README, RESULTS = PAGES["README.md"], (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^([^\n]*)\n\n```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# page, what it needs by the visible line above it, language, rest of the fence's line, text
BLOCKS = [
    (page, "".join(re.findall(r"\*Needs ([^*]*):\*$", above)), language, rest, text)
    for page, content in PAGES.items()
    for above, language, rest, text in FENCE.findall(content)
]
NEEDS = {  # nothing else keeps a command from being run
    "", "a GPU", "GPUs", "SLURM and GPUs", "eight GPUs and a network", "a network", "a network for pip",
    "a network, or `--hella_data FILE`", "a network, and instructions of yours in `alpaca.jsonl`", "the runs above",
    "hours, and English text as parquet files", "the demo's model, and minutes",
}  # fmt: skip
CONFIGS = {
    "fineweb": fineweb.Config, "hellaswag": hellaswag.Config, "plot_log": plot_log.Config, "sample": sample.Config,
    "train_gpt2": train_gpt2.Config,
}  # fmt: skip
FLAGS = {name for config in CONFIGS.values() for name in config.__dataclass_fields__}
FLAGS |= {f"no_{name}" for name in FLAGS} | {"nproc_per_node", "max_restarts"}  # the last two are torchrun's
RECORD = r"""record() { printf '%s\x1f' "$@" >> record; printf '\x1e' >> record; }
python() { record "$@"; }; torchrun() { record "$@"; }; srun() { "$@"; }; sh() { record "$@"; }
"""


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_block_is_found_and_says_above_it_what_it_needs():
    assert sum(content.count("\n```") for content in PAGES.values()) == 2 * len(BLOCKS)
    for page, needs, language, rest, _ in BLOCKS:
        assert needs in NEEDS and language in ("sh", "python", "diff", "text") and not rest, (page, needs, language)
    assert {needs for _, needs, *_ in BLOCKS} == NEEDS
    said = sum(content.count("*Needs ") for content in PAGES.values())
    assert said == sum(bool(needs) for _, needs, *_ in BLOCKS)


def test_the_readme_is_short_and_its_contents_are_complete():
    assert len(README.split()) <= 2000
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    contents = README[: README.index("\n## ")]
    assert [title for title, _ in re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", contents)] == titles
    assert not [page for page in PAGES if page != "README.md" and f"]({page})" not in README]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    text, folder = (PAGES | OTHERS)[page], (ROOT / page).parent
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert not target.startswith("http"), target
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_every_picture_is_shown_and_has_its_command():
    text, makefile = "".join(PAGES.values()), (ROOT / "Makefile").read_text(encoding="utf-8")
    pictures = {name.split("/")[-1] for name in re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", text, re.MULTILINE)}
    assert len(pictures) >= 4 and {path.name for path in (ROOT / "docs").iterdir() if path.suffix != ".md"} == pictures
    for name in pictures:
        assert (ROOT / "docs" / name).stat().st_size < 150_000
        by_demo = f"--out $(DEMO)/{name.replace('demo', 'curves')}"
        assert re.search(rf"--(out|picture) docs/{re.escape(name)}\b", text) or by_demo in makefile


def test_every_measured_number_stands_where_it_was_measured():
    checked = 0
    for content in PAGES.values():
        for row in table_rows(content):
            if not row[-1].startswith("measured"):
                continue
            linked = [page for page in PAGES if page != "README.md" and f"({page})" in row[-1]]
            sources = RESULTS + "".join(PAGES[page] for page in linked)
            for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", " ".join(row[:-1])):
                assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", sources), (number, row)
                checked += 1
    assert checked >= 12


def test_every_number_of_the_start_says_where_it_comes_from():
    rows = [row for row in table_rows(README[: README.index("## Files")]) if row[-1] not in ("source", "---")]
    assert len(rows) >= 8 and all(row[-1].startswith(("measured", "cited", "computed")) for row in rows)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_every_target_of_make_exists(page):
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL))
    flags = [flag for span in code for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", span)]
    assert not {flag.replace("-", "_") for flag in flags} - FLAGS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    blocks = [line for where, _, _, _, text in BLOCKS if where == page for line in text.splitlines()]
    for target in re.findall(r"^make (\w+)", "\n".join([*code, *blocks]), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_command_parses(tmp_path):
    """What a block would start, by a shell in which python, torchrun and srun only note what they are given."""
    bash, seen = shutil.which("bash"), set()
    for page, _, language, _, text in BLOCKS:
        if language != "sh":
            continue
        (tmp_path / "record").write_text("")
        subprocess.run([bash, "-c", RECORD + text], cwd=tmp_path, env={"PATH": ""}, capture_output=True, timeout=60)
        for line in (tmp_path / "record").read_text().split("\x1e")[:-1]:
            words = line.split("\x1f")[:-1]
            script = next((i for i, word in enumerate(words) if word.endswith((".py", ".sh"))), None)
            if script is None:
                assert words[0] == "-c", words
                continue
            assert (ROOT / words[script]).exists(), (page, words)
            name, arguments = words[script].removesuffix(".py"), words[script + 1 :]
            if name == "train_gpt2":
                config = extras.cli.parse(train_gpt2.Config, "", arguments)
                extras.checks.check_settings(train_gpt2.resolve(config))
            elif name in CONFIGS:
                extras.cli.parse(CONFIGS[name], "", arguments)
            seen.add(name)
    assert seen >= set(CONFIGS)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the scripts, beside two files of nanoGPT's kind."""
    folder = tmp_path_factory.mktemp("fresh")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=shutil.ignore_patterns("__pycache__"))
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 1000).astype(np.uint16).tofile(folder / f"{split}.bin")
    return folder


def call(command: list[str], folder) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"


@pytest.mark.timeout(1800)  # two dozen processes, each of which imports torch
def test_commands_run_as_written(fresh):
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    for _, needs, language, _, text in BLOCKS:
        if language == "sh" and not needs:
            call(["bash", "-euo", "pipefail", "-c", python + text], fresh)
        elif language == "python":
            call([sys.executable, "-c", text], fresh)
    for made in ("log/docs/curves.png", "log/docs/ckpt_000080.pt", "exported/model.safetensors", "hours.svg"):
        assert (fresh / made).exists()
    converted = np.load(fresh / "data/owt/edufineweb_train_000001.npy")
    assert (converted == np.fromfile(fresh / "train.bin", np.uint16)).all()


DIFFS = [text for _, _, language, _, text in BLOCKS if language == "diff"]


@pytest.mark.parametrize("index", range(len(DIFFS)))
def test_changes_of_the_model_apply_and_train(tmp_path, index):
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    before, after = (
        "".join(line[1:] + "\n" for line in DIFFS[index].splitlines() if line.startswith(sign)) for sign in "-+"
    )
    assert source.count(before) == 1
    shutil.copytree(ROOT / "extras", tmp_path / "extras", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "train_gpt2.py").write_text(source.replace(before, after), encoding="utf-8")
    token_set(tmp_path / "data")
    small = "--data_dir data --n_layer 1 --n_head 1 --n_embd 32 --seq_len 32 --total_batch_size 64 --max_steps 2"
    call([sys.executable, "train_gpt2.py", *small.split(), "--warmup_steps", "1", "--hella_every", "0"], tmp_path)
    if "wnorm" in after:
        assert re.search(r"^2 wnorm ", (tmp_path / "log" / "log.txt").read_text(), re.MULTILINE)


def test_every_file_of_the_table_exists_and_every_script_is_in_it():
    table = README[README.index("## Files") : README.index("## What you get")]
    for row in table_rows(table)[2:]:
        for name in re.findall(r"`([^`]+)`", row[0]):
            assert (ROOT / name).exists(), name
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in table]


def test_a_license_and_metadata():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "MIT" and (ROOT / project["license-files"][0]).read_text().startswith("MIT License\n")
    assert (ROOT / project["readme"]).exists() and project["requires-python"] == ">=3.11"
